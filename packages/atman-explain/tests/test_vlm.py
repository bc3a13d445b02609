"""Vision-language models: explanations by the decoder and inside the vision tower, held against slow references."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atman_explain import AtMan, Explanation, UnsupportedModelError, explain
from atman_explain.remote.vision_atman import _patch_places
from tests.support import vlm as tiny
from tests.support.atman import reference_factors
from tests.support.vlm import TARGET, Vlm, decoder_embeds, picture, reference_logprobs, tower_inputs

FAMILIES = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "gemma3"]
WHOLE_ROWS = ["qwen3_vl", "gemma3"]
TOLERANCE = 1e-10


@functools.cache
def family(name: str) -> Vlm:
    return getattr(tiny, name)()


def image_for(name: str) -> Image.Image:
    """A picture that stands on the patch grid of a model without being resized, where the model takes such."""
    return (
        picture(24, 16)
        if name.startswith("qwen")
        else picture(40, 16)
        if name in ("idefics3", "smolvlm")
        else picture()
    )


def quietly(call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call without the warning of models whose rows cannot be run in parts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*whole rows are run for every unit")
        return call(*args, **settings)


@functools.cache
def usual(name: str) -> Explanation:
    """The explanation of a model's usual prompt and picture, with default settings."""
    return explained(name)


def explained(name: str, **settings: Any) -> Any:
    of = family(name)
    prompt, images = settings.pop("prompt", of.prompt), settings.pop("images", [image_for(name)])
    return quietly(explain, of.model, of.processor, prompt, images=images, target=[*TARGET], **settings)


def expected(name: str, units: Any, inputs: Any = None, mode: str = "shift_min", factor: float = 0.1) -> Tensor:
    """Scores of units of the decoder by the reference: images with similar columns, text alone."""
    of = family(name)
    inputs = of.encode(of.prompt, image_for(name)) if inputs is None else inputs
    embeds = decoder_embeds(of.model, inputs, TARGET)
    plain = reference_logprobs(of.model, inputs, TARGET)
    columns = []
    for unit in units:
        factors = reference_factors(embeds, unit.columns, factor, 0.7 if unit.kind == "image" else None)
        columns.append(plain - reference_logprobs(of.model, inputs, TARGET, decoder=factors, mode=mode))
    return torch.stack(columns, 1)


def assert_near(one: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_one_whole_row_per_unit(name):
    of, found = family(name), usual(name)
    inputs = of.encode(of.prompt, image_for(name))
    some = [*range(0, len(found.units), 5), len(found.units) - 1]
    assert_near(found.scores[:, some], expected(name, [found.units[u] for u in some]))
    assert found.scores.abs().mean() > 0.01
    with torch.no_grad():
        rows = of.model(**tiny.row_of(inputs, TARGET)).logits[0, -len(TARGET) :].log_softmax(-1)
    assert_near(found.baseline_logprobs, rows.gather(1, torch.tensor(TARGET)[:, None])[:, 0])


@pytest.mark.parametrize("mode", ["log_additive", "multiply", "shift_min_all"])
def test_modes(mode):
    found = explained("qwen2_vl", mode=mode, factor=0.3)
    some = found.units[::3]
    assert_near(found.scores[:, ::3], expected("qwen2_vl", some, mode=mode, factor=0.3))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_packed_suffixes_give_what_whole_rows_give(name, monkeypatch):
    monkeypatch.setattr("atman_explain.remote.routes_atman.agree", lambda *_: False)
    assert_near(explained(name).scores, usual(name).scores, 1e-12)


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_rows_with_and_without_running_the_tower_again(name, monkeypatch):
    monkeypatch.setattr("atman_explain.remote.batches_atman.BatchPasses._can_replay", lambda *_: False)
    assert_near(explained(name).scores, usual(name).scores, 1e-12)


@pytest.mark.parametrize(
    ("name", "times"), [("llava", 1), ("qwen2_vl", 1), ("idefics3", 1), ("gemma3", 2), ("qwen3_vl", 2)]
)
def test_the_tower_does_not_run_for_every_unit(name, times):
    of, runs = family(name), []
    tower = next(module for part, module in of.model.named_modules() if part.rpartition(".")[2] in tiny.TOWERS)
    handle = tower.register_forward_hook(lambda *_: runs.append(1))
    found = explained(name)
    handle.remove()
    assert len(found.units) > 6
    assert len(runs) == times  # to see that rows cannot be run in parts takes a run


@pytest.mark.parametrize("name", WHOLE_ROWS)
def test_models_whose_rows_need_each_other_warn_once_and_run_whole_rows(name):
    of = family(name)
    atman = AtMan(of.model, of.processor)
    with pytest.warns(
        UserWarning, match=f"{type(of.model).__name__} .* so whole rows are run for every unit"
    ) as caught:
        one, two = atman.explain([of.prompt] * 2, images=[image_for(name)] * 2, target=[[*TARGET]] * 2)
    assert len(caught) == 1
    assert_near(one.scores, two.scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atman.explain(of.prompt, images=image_for(name), target=[*TARGET])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "gemma3"])
def test_several_images_in_a_prompt(name):
    of = family(name)
    mark = of.prompt.split()[0]
    prompt, images = f"{mark} and {mark} : what is it ?", [image_for(name), picture(24, 16, seed=1)]
    found = explained(name, prompt=prompt, images=images)
    assert len(found.grids) >= 2
    assert {unit.image for unit in found.units if unit.kind == "image"} == set(range(len(found.grids)))
    some = range(0, len(found.units), 4)
    inputs = of.encode(prompt, *images)
    assert_near(found.scores[:, some], expected(name, [found.units[u] for u in some], inputs))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_prompts_with_and_without_images_side_by_side(name):
    of = family(name)
    text = "what is a panda ?"
    images = [image_for(name), None, picture(16, 24, seed=2)]
    prompts = [of.prompt, text, of.prompt]
    together = quietly(explain, of.model, of.processor, prompts, images=images, target=[[*TARGET]] * 3)
    for found, prompt, image in zip(together, prompts, images, strict=True):
        alone = usual(name) if image is images[0] else explained(name, prompt=prompt, images=image)
        assert found.units == alone.units
        assert_near(found.scores, alone.scores)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_processors_output_is_a_prompt(name):
    of = family(name)
    encoded = of.encode(of.prompt, image_for(name))
    given = quietly(explain, of.model, of.processor, encoded, target=[*TARGET])
    assert_near(given.scores, usual(name).scores)
    assert given.grids == usual(name).grids
    without_processor = quietly(explain, of.model, None, encoded, target=[*TARGET], units="image")
    is_image = [unit.kind == "image" for unit in usual(name).units]
    assert_near(without_processor.scores, usual(name).scores[:, is_image])


def test_a_padded_batch_of_the_processor():
    of = family("llava")
    prompts, images = ["<image> what is it ?", "<image> the panda"], [picture(seed=3), picture(seed=4)]
    encoded = of.processor(text=prompts, images=images, padding=True, return_tensors="pt")
    found = explain(of.model, of.processor, encoded, target=[[*TARGET]] * 2)
    for each, prompt, image in zip(found, prompts, images, strict=True):
        assert_near(each.scores, explained("llava", prompt=prompt, images=image).scores)


def test_patches_that_cannot_be_told_apart_by_prompt_are_refused():
    of = family("qwen2_vl")
    encoded = of.processor(text=[of.prompt] * 2, images=[picture(seed=3), picture(seed=4)], return_tensors="pt")
    with pytest.raises(ValueError, match=r"prompt\['pixel_values'\] must have a first dimension of 2 .* one by one"):
        explain(of.model, of.processor, encoded, target=[[*TARGET]] * 2)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "gemma3"])
def test_without_a_target_it_is_what_the_model_says(name):
    of = family(name)
    inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in of.encode(of.prompt, image_for(name)).items()
    }
    said = of.model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found = quietly(explain, of.model, of.processor, of.prompt, images=[image_for(name)], max_new_tokens=2)
    assert [target.id for target in found.targets] == said.tolist()


def test_units_of_text_or_images():
    everything = usual("llava")
    for kind in ("text", "image"):
        only = explained("llava", units=kind)
        members = [u for u, unit in enumerate(everything.units) if unit.kind == kind]
        assert [unit.kind for unit in only.units] == [kind] * len(members)
        assert_near(only.scores, everything.scores[:, members])


@pytest.mark.parametrize(
    ("settings", "boxes"),
    [
        ({"tiles": (2, 1)}, [(0, 0, 2, 4), (2, 0, 2, 4)]),
        ({"granularity": "paragraph"}, [(0, 0, 4, 4)]),
        (
            {"granularity": "sentence"},
            [(r, c, h, w) for r, h in ((0, 1), (1, 1), (2, 2)) for c, w in ((0, 1), (1, 1), (2, 2))],
        ),
    ],
)
def test_tiles_are_suppressed_as_a_whole(settings, boxes):
    found = explained("llava", units="image", **settings)
    assert [unit.box for unit in found.units] == boxes
    assert_near(found.scores, expected("llava", found.units))
    assert found.image_map(0).shape == (4, 4)
    assert found.image_map(0).isfinite().all()


def test_similar_patches_are_suppressed_along_unless_kappa_says_otherwise():
    of = family("llava")
    flat = Image.new("RGB", (16, 16), (200, 30, 30))  # patches differ by their position only
    widely, alone = (explained("llava", images=[flat], units="image", **each) for each in ({}, {"kappa": 1.0}))
    assert (widely.scores - alone.scores).abs().max() > 0.01
    some = range(0, 16, 5)
    assert_near(widely.scores[:, some], expected("llava", [widely.units[u] for u in some], of.encode(of.prompt, flat)))


def test_neighbors_of_a_patch_are_suppressed_along():
    of = family("llava")
    found = explained("llava", units="image", kappa=1.0, neighbourhood=1)
    inputs = of.encode(of.prompt, image_for("llava"))
    near = torch.ones(21 + len(TARGET) - 1, dtype=torch.float64)
    near[[1 + 4 * row + col for row in (0, 1) for col in (2, 3)]] = 0.1  # around the upper right corner
    scores = reference_logprobs(of.model, inputs, TARGET) - reference_logprobs(of.model, inputs, TARGET, decoder=near)
    assert_near(found.scores[:, 3], scores)


def test_parts_of_a_picture_and_the_whole_come_in_order():
    found = usual("idefics3")
    assert found.grids == ((2, 2),) * 3
    boxes = {(unit.image, unit.box) for unit in found.units if unit.kind == "image"}
    assert boxes == {(image, (row, col, 1, 1)) for image in range(3) for row in range(2) for col in range(2)}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_target_tokens_are_units_behind_an_image(name):
    found = explained(name, attribute_target=True)
    assert [unit.kind for unit in found.units[-2:]] == ["target"] * 2
    assert_near(found.scores[:, -2:], expected(name, found.units[-2:]))
    assert found.scores[0, -2:].tolist() == [0.0, 0.0]


def test_maps_and_overlays():
    found, image = usual("qwen2_vl"), image_for("qwen2_vl")
    assert found.image_map(0).shape == (2, 3)
    by_box = {
        unit.box[:2]: score for unit, score in zip(found.units, found.scores.sum(0).tolist(), strict=True) if unit.box
    }
    assert found.image_map(0)[1, 2].item() == by_box[1, 2]
    assert found.overlay(image).size == image.size
    assert np.asarray(found.overlay(image, alpha=0.0)).tolist() == np.asarray(image).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    of = tiny.llava(dtype)
    found = explain(of.model, of.processor, of.prompt, images=[picture()], target=[*TARGET])
    exact = of.model.double()
    wide = explain(exact, of.processor, of.prompt, images=[picture()], target=[*TARGET])
    assert found.scores.dtype == torch.float32
    assert_near(found.scores.double(), wide.scores, 1e-4 if dtype == torch.float32 else 0.5)


def test_models_are_left_as_they_were():
    of = family("llava")
    parts = [of.model.config, of.model.config.text_config, of.model.config.vision_config]
    before = [part._attn_implementation for part in parts]
    explained("llava")
    explained("llava", sites=("vision",))
    assert [part._attn_implementation for part in parts] == before
    assert not any(module._forward_pre_hooks for module in of.model.modules())


def places_by_pixels(name: str) -> dict[tuple[int, int], int]:
    """The tower's column of every patch, found by changing its pixels."""
    of, image = family(name), image_for(name)
    plain = tower_inputs(of.model, of.encode(of.prompt, image))
    places = {}
    for row in range(image.height // 4):
        for col in range(image.width // 4):
            pixels = np.array(image)
            patch = pixels[4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            patch[:] = 255 - patch
            changed = tower_inputs(of.model, of.encode(of.prompt, Image.fromarray(pixels)))
            (place,) = ((changed - plain).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
            places[row, col] = place
    return places


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_patches_of_the_tower_against_the_reference(name):
    of, found = family(name), explained(name, sites=("vision",))
    inputs = of.encode(of.prompt, image_for(name))
    places = places_by_pixels(name)
    assert found.grids == ((image_for(name).height // 4, image_for(name).width // 4),)
    assert [unit.box[:2] for unit in found.units] == list(places)
    features = tower_inputs(of.model, inputs, layer=-1)
    order = torch.tensor(list(places.values()))  # a class token is in nobody's neighborhood
    plain = reference_logprobs(of.model, inputs, TARGET)
    assert_near(found.baseline_logprobs, plain)
    for u in range(0, len(found.units), 5):
        factors = torch.ones(len(features), dtype=torch.float64)
        factors[order] = reference_factors(features[order], [u], 0.1, 0.7)
        assert_near(found.scores[:, u], plain - reference_logprobs(of.model, inputs, TARGET, tower=factors))
    assert found.scores.abs().mean() > 0.01


@pytest.mark.parametrize("name", ["idefics3", "llava_next", "llava", "qwen2_5_vl"])
def test_patches_of_several_images_in_the_tower(name):
    of = family(name)
    prompt, images = f"{of.prompt} {of.prompt}", [image_for(name), picture(16, 16, seed=5)]
    found = explained(name, prompt=prompt, images=images, sites=("vision",), kappa=1.0, tiles=(2, 2))
    inputs = of.encode(prompt, *images)
    plain = reference_logprobs(of.model, inputs, TARGET)
    layouts = _patch_places(of.model, inputs, len(tower_inputs(of.model, inputs)))
    for u in (0, len(found.units) // 2, len(found.units) - 1):
        factors = torch.ones(len(tower_inputs(of.model, inputs)), dtype=torch.float64)
        factors[layouts[list(found.units[u].columns)]] = 0.1
        assert_near(found.scores[:, u], plain - reference_logprobs(of.model, inputs, TARGET, tower=factors))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_batches_in_the_tower_change_nothing(name):
    settings = {"sites": ("vision",), "tiles": (2, 2)}
    one, many = explained(name, batch_size=1, **settings), explained(name, max_tokens_per_batch=4096, **settings)
    assert_near(one.scores, many.scores, 1e-12)


def test_layers_and_heads_of_the_tower():
    everywhere, nowhere, last, head = (
        explained("llava", sites=("vision",), **each)
        for each in ({}, {"factor": 1.0}, {"layers": (2,)}, {"heads": (1,)})
    )
    assert nowhere.scores.abs().max() == 0
    assert last.scores.abs().max() < 1e-12  # LLaVA takes what comes out of the layer before
    assert (head.scores - everywhere.scores).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r'layers must lie in \[0, 3\) of site "vision", got 3\.'):
        explained("llava", sites=("vision",), layers=(3,))


def test_coarse_tiles_first_then_patches():
    found = explained("qwen2_vl", sites=("vision",), granularity="auto", keep=2)
    exact = explained("qwen2_vl", sites=("vision",))
    fine = {unit.box: u for u, unit in enumerate(exact.units)}
    for u, unit in enumerate(found.units):
        if not found.is_coarse[u]:
            assert_near(found.scores[:, u], exact.scores[:, fine[unit.box]])
    assert sum(not coarse for coarse in found.is_coarse) >= 2
    assert found.image_map(0).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ("vision", "decoder")}, r'sites must not join "vision" with others, got \(.vision., .decoder.\)'),
        ({"units": "text"}, r"units='text' is about text, but with sites=\(\"vision\",\) all units are patches"),
        ({"attribute_target": True}, r"attribute_target=True is about text"),
        ({"exclude": (1,)}, r"exclude=\(1,\) is about text"),
        ({"delimiter": "\n"}, r"delimiter='\\n' is about text"),
        ({"spans": [(0, 3)]}, r"spans and chunks are units of text; with sites=\(\"vision\",\) all units are patches"),
        ({"prompt": "what is it ?", "images": None}, r"sites=\(\"vision\",\) needs images, got a prompt without"),
    ],
)
def test_text_means_nothing_in_the_tower(settings, message):
    with pytest.raises(ValueError, match=message):
        explained("llava", **{"sites": ("vision",), **settings})


def test_towers_without_a_key_per_patch_are_refused(monkeypatch):
    monkeypatch.setattr(family("qwen2_vl").model.config, "model_type", "paddleocr_vl")
    with pytest.raises(
        UnsupportedModelError,
        match=r'sites=\("vision",\) is not available for Qwen2VLForConditionalGeneration, whose vision tower takes pat',
    ):
        explained("qwen2_vl", sites=("vision",))


def test_images_need_a_processor():
    of = family("llava")
    for processor, message in (
        (of.processor.tokenizer, "images need a processor that takes them, got the tokenizer"),
        (None, "images need a processor"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(of.model, processor, of.prompt, images=[picture()], target=[*TARGET])


def test_image_tokens_need_images():
    with pytest.raises(ValueError, match=r"prompt has 1 image tokens \('<image>'\) but no image came with it; pass im"):
        explained("llava", images=None)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "gemma3"])
@pytest.mark.parametrize("count", [0, 2])
def test_image_tokens_are_as_many_as_images(name, count):
    of = family(name)
    with pytest.raises(ValueError, match=r"(?i)image"):
        explained(name, prompt=" ".join([of.prompt] * count) or "what is it ?", images=[picture()])


def test_images_need_a_model_that_reads_them():
    from tests.support.atman import tiny_model

    of = family("llava")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM takes no images as part of its input sequence"):
        explain(tiny_model("llama"), of.processor, of.prompt, images=[picture()], target=[*TARGET])


def test_pictures_of_any_size():
    """Pixtral's tower: pictures of two sizes in one prompt, packed into one row of patches."""
    of = tiny.pixtral()
    pixels = torch.zeros(2, 3, 12, 16, dtype=torch.float64)
    pixels[0, :, :8], pixels[1, :, :, :8] = torch.rand(3, 8, 16), torch.rand(3, 12, 8)
    image, row, end = tiny.IMAGE_ID, tiny.VOCAB - 20, tiny.VOCAB - 19
    ids = [1, *[image] * 4, row, *[image] * 4, end, *([image] * 2 + [row]) * 3, 25, 26]
    encoded = {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[8, 16], [12, 8]]),
    }
    for sites, count in ((None, 14), (("vision",), 14)):
        found = explain(of.model, None, encoded, target=[*TARGET], units="image", sites=sites, kappa=1.0)
        assert found.grids == ((2, 4), (3, 2))
        assert len(found.units) == count
        plain = reference_logprobs(of.model, encoded, TARGET)
        for u in range(0, count, 5):
            factors = torch.ones(14 if sites else len(ids) + 2, dtype=torch.float64)
            factors[list(found.units[u].columns)] = 0.1
            changed = reference_logprobs(of.model, encoded, TARGET, **{"tower" if sites else "decoder": factors})
            assert_near(found.scores[:, u], plain - changed)
