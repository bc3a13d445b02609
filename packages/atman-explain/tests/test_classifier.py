"""Explanations of classifiers against the method's definition, run one unit at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from atman_explain import Explanation, UnsupportedModelError, explain_classifier
from tests.support.atman_columns import similar_factors, spread, suppressed, unit_factors
from tests.support.atman_tokenizers import word_level

EXACT = {"rtol": 0.0, "atol": 1e-10}
LABELS = ("cat", "dog", "tree, oak")
PIXELS = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PATCHES = 9
TEXTS = torch.tensor([[5, 6, 7, 2], [8, 9, 5, 2], [6, 10, 11, 2]])
TOKENS = (5, 6, 7, 8, 9)
_BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_VISION = _BODY | {"image_size": 12, "patch_size": 4}
_TEXT = _BODY | {"vocab_size": 24, "max_position_embeddings": 8}
_TOWERS = {"vision_config": _VISION, "text_config": _TEXT | {"eos_token_id": 2, "pad_token_id": 0}}

IMAGE_MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # class, settings, columns before the patches
    "vit": ("ViTForImageClassification", _VISION, 1),
    "deit": ("DeiTForImageClassificationWithTeacher", _VISION, 2),
    "beit": ("BeitForImageClassification", _VISION | {"use_relative_position_bias": True}, 1),
    "dinov2": ("Dinov2WithRegistersForImageClassification", _VISION | {"num_register_tokens": 3}, 4),
    "clip": ("CLIPForImageClassification", _TOWERS, 1),
    "siglip": ("SiglipForImageClassification", _TOWERS, 0),
}
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", _TEXT),
    "modernbert": ("ModernBertForSequenceClassification", _TEXT | {"pad_token_id": 0, "local_attention": 2}),
    "llama": ("LlamaForSequenceClassification", _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "llama-without-padding": ("LlamaForSequenceClassification", _TEXT | {"pad_token_id": None}),
}


def build(name: str, settings: dict[str, Any], labels: Sequence[str] = LABELS, **changes: Any) -> PreTrainedModel:
    model_class = getattr(transformers, name)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    return spread(model_class(model_class.config_class(**settings | names | changes)))


def image_model(family: str = "vit", **changes: Any) -> PreTrainedModel:
    return build(*IMAGE_MODELS[family][:2], **changes)


def text_model(family: str = "bert", **changes: Any) -> PreTrainedModel:
    return build(*TEXT_MODELS[family], **changes)


def pair_model(name: str = "CLIP") -> PreTrainedModel:
    model_class = getattr(transformers, f"{name}Model")
    model = spread(model_class(model_class.config_class(**_TOWERS)))
    model.logit_scale.data = torch.tensor(1.5, dtype=torch.float64)
    return model


def patch_rows(leading: int, factor: float = 0.1) -> list[Tensor]:
    return [unit_factors([leading + patch], leading + PATCHES, factor) for patch in range(PATCHES)]


def reference(
    model: PreTrainedModel,
    rows: Sequence[Tensor],
    read: Callable[[], Tensor],
    mode: str = "shift_min",
    chosen: Callable[[str], bool] = lambda name: "text_model" not in name,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Scores [1, U] for factors of each unit."""
    values = []
    for factors in [None, *rows]:
        with suppressed(model, chosen, factors, mode, heads):
            values.append(read())
    return torch.stack([values[0] - each for each in values[1:]])[None]


def head_reader(model: PreTrainedModel, index: int, **inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: model(**inputs).logits[0].log_softmax(-1)[index]


def plain(model: PreTrainedModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits[0] if hasattr(output, "logits") else output.logits_per_image[0]


@pytest.mark.parametrize("family", IMAGE_MODELS)
def test_scores_of_patches_are_those_of_the_definition(family: str) -> None:
    model, leading = image_model(family), IMAGE_MODELS[family][2]
    found = explain_classifier(model, None, PIXELS, "dog")
    expected = reference(model, patch_rows(leading), head_reader(model, 1, pixel_values=PIXELS))
    assert expected.abs().max() > 1e-2
    kappaless = explain_classifier(model, None, PIXELS, "dog", kappa=1.0, max_similar=1)
    torch.testing.assert_close(kappaless.scores, expected, **EXACT)
    torch.testing.assert_close(found.baseline_logprobs, plain(model, pixel_values=PIXELS).log_softmax(-1)[1:2], **EXACT)
    assert [unit.columns for unit in found.units] == [(leading + patch,) for patch in range(PATCHES)]
    assert found.grids == ((3, 3),)
    assert (found.targets[0].text, found.targets[0].id) == ("dog", 1)


@pytest.mark.parametrize("mode", ["log_additive", "multiply"])
def test_modes_layers_and_heads(mode: str) -> None:
    model = image_model()
    found = explain_classifier(model, None, PIXELS, 2, mode=mode, factor=0.3, kappa=1.0, layers=[-1], heads=[1, 2])
    read = head_reader(model, 2, pixel_values=PIXELS)
    rows = patch_rows(1, 0.3)
    expected = reference(model, rows, read, mode, chosen=lambda name: "layers.1." in name, heads=[1, 2])
    torch.testing.assert_close(found.scores, expected, **EXACT)


def features(model: PreTrainedModel) -> Tensor:
    """Hidden states [T, D] as they enter the last layer's attention."""
    seen: list[Tensor] = []
    handle = model.vit.layers[-1].attention.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((args or (kwargs.get("hidden_states"),))[0][0]), with_kwargs=True
    )
    plain(model, pixel_values=PIXELS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kappa", [None, 0.2, -1.0])
def test_similar_patches_are_suppressed_too_but_never_the_class_token(kappa: float | None) -> None:
    model = image_model()
    states = features(model)
    states[0] = 0.0
    rows = [similar_factors(states, [1 + patch], 0.1, 0.7 if kappa is None else kappa) for patch in range(PATCHES)]
    assert kappa is None or sum(int((row != 1).sum()) for row in rows) > PATCHES
    found = explain_classifier(model, None, PIXELS, 0, kappa=kappa)
    torch.testing.assert_close(
        found.scores, reference(model, rows, head_reader(model, 0, pixel_values=PIXELS)), **EXACT
    )


def test_class_token_is_kept_even_if_everything_is_similar() -> None:
    model = image_model()
    everything = torch.tensor([1.0] + [0.1] * PATCHES, dtype=torch.float64)
    found = explain_classifier(model, None, PIXELS, 0, kappa=-1.0, scale_by_similarity=False)
    expected = reference(model, [everything] * PATCHES, head_reader(model, 0, pixel_values=PIXELS))
    torch.testing.assert_close(found.scores, expected, **EXACT)


def test_neighboring_patches() -> None:
    model = image_model()
    found = explain_classifier(model, None, PIXELS, 0, kappa=1.0, neighbourhood=1)
    columns = [1 + column for column in (0, 1, 3, 4)]
    expected = reference(model, [unit_factors(columns, 10, 0.1)], head_reader(model, 0, pixel_values=PIXELS))
    torch.testing.assert_close(found.scores[:, :1], expected, **EXACT)


def test_tiles_and_their_picture(tmp_path: Path) -> None:
    model = image_model()
    found = explain_classifier(model, None, PIXELS, 0, tiles=(1, 2), kappa=1.0)
    tiles = [[1, 4, 7], [2, 3, 5, 6, 8, 9]]
    assert [list(unit.columns) for unit in found.units] == tiles
    rows = [unit_factors(tile, 10, 0.1) for tile in tiles]
    expected = reference(model, rows, head_reader(model, 0, pixel_values=PIXELS))
    torch.testing.assert_close(found.scores, expected, **EXACT)
    left, right = found.scores[0].tolist()
    assert found.image_map(0).tolist() == [[left, right, right]] * 3
    assert found.overlay(Image.new("RGB", (30, 20))).size == (30, 20)
    found.save(tmp_path / "e.json")
    assert Explanation.load(tmp_path / "e.json").image_map(0).equal(found.image_map(0))
    assert "dog" not in str(found) and "cat" in str(found)


def test_coarse_tiles_are_looked_into() -> None:
    model = image_model()
    patches = explain_classifier(model, None, PIXELS, 0, kappa=1.0).scores[0]
    found = explain_classifier(model, None, PIXELS, 0, kappa=1.0, granularity="auto", tiles=(3, 1), keep=1)
    assert found.is_coarse is not None and sum(found.is_coarse) == 2
    fine = {unit.columns[0] - 1: score for unit, score in zip(found.units, found.scores[0], strict=True)}
    inside = [fine[u.columns[0] - 1] for u, coarse in zip(found.units, found.is_coarse, strict=True) if not coarse]
    assert len(inside) == 3
    assert all(min(abs(score - patch) for patch in patches) < 1e-10 for score in inside)


def test_pictures_need_not_be_square() -> None:
    model = image_model(image_size=(8, 20))
    pixels = torch.randn(1, 3, 8, 20, dtype=torch.float64)
    found = explain_classifier(model, None, pixels, 0, kappa=1.0)
    assert found.image_map(0).shape == (2, 5)
    rows = [unit_factors([1 + patch], 11, 0.1) for patch in range(10)]
    torch.testing.assert_close(
        found.scores, reference(model, rows, head_reader(model, 0, pixel_values=pixels)), **EXACT
    )


def test_factor_one_changes_nothing() -> None:
    for model, inputs in ((image_model(), PIXELS), (text_model(), TOKENS)):
        assert explain_classifier(model, None, inputs, factor=1.0, kappa=None).scores.eq(0.0).all()


def test_batches_do_not_change_scores() -> None:
    sizes: list[int] = []
    model = image_model()
    expected = explain_classifier(model, None, PIXELS, 0).scores
    handle = model.register_forward_hook(lambda _m, _a, output: sizes.append(len(output.logits)))
    for limits, most in (({"batch_size": 2}, 2), ({"max_tokens_per_batch": 35}, 3), ({"max_tokens_per_batch": 1}, 1)):
        sizes.clear()
        torch.testing.assert_close(explain_classifier(model, None, PIXELS, 0, **limits).scores, expected, **EXACT)
        assert max(sizes) == most
    handle.remove()


def compare(model: PreTrainedModel) -> Tensor:
    return model(pixel_values=PIXELS, input_ids=TEXTS, attention_mask=torch.ones_like(TEXTS)).logits_per_image[0]


PAIR = {"pixel_values": PIXELS, "input_ids": TEXTS, "attention_mask": torch.ones_like(TEXTS)}


@pytest.mark.parametrize(("name", "leading"), [("CLIP", 1), ("Siglip", 0)])
def test_images_are_held_against_candidates(name: str, leading: int) -> None:
    model = pair_model(name)
    read = F.logsigmoid if name == "Siglip" else lambda logits: logits.log_softmax(-1)
    found = explain_classifier(model, None, PAIR, "dog", candidates=LABELS, kappa=1.0)
    expected = reference(model, patch_rows(leading), lambda: read(compare(model))[1])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.scores, expected, **EXACT)
    torch.testing.assert_close(found.baseline_logprobs, read(plain(model, **PAIR))[1:2], **EXACT)
    assert found.score_unit == "nats"
    best = explain_classifier(model, None, PAIR, candidates=LABELS)
    assert best.targets[0].text == LABELS[int(plain(model, **PAIR).argmax())]


def test_texts_run_once() -> None:
    model, calls = pair_model(), []
    handle = model.text_model.register_forward_hook(lambda *_: calls.append(1))
    explain_classifier(model, None, PAIR, 0, candidates=LABELS, batch_size=1)
    handle.remove()
    assert calls == [1]


def test_a_single_text_is_explained_by_its_similarity() -> None:
    one = PAIR | {"input_ids": TEXTS[:1], "attention_mask": torch.ones_like(TEXTS[:1])}
    for name, leading in (("CLIP", 1), ("Siglip", 0)):
        model = pair_model(name)
        found = explain_classifier(model, None, one, kappa=1.0)
        assert (found.score_unit, found.targets[0].text) == ("logits", "text 0")
        expected = reference(model, patch_rows(leading), lambda model=model: compare(model)[0])
        torch.testing.assert_close(found.scores, expected, **EXACT)
        torch.testing.assert_close(found.baseline_logprobs, plain(model, **one), **EXACT)
    sure = explain_classifier(model, None, one, candidates=["dog"])  # SigLIP: this text or not
    torch.testing.assert_close(sure.baseline_logprobs, F.logsigmoid(plain(model, **one)), **EXACT)
    with pytest.raises(ValueError, match=r'delta must be "logit" for CLIPModel with 1 output\(s\), got .logprob.'):
        explain_classifier(pair_model(), None, one, delta="logprob")


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_processors_read_pictures_and_candidates(name: str) -> None:
    tokenizer = word_level("[PAD]", "[END]", "a", "cat", "dog", eos_token="[END]")
    tokenizer.pad_token = "[PAD]"
    size = {"height": 12, "width": 12}
    pictures = getattr(transformers, f"{name}ImageProcessor")(size=size, do_center_crop=False)
    processor = getattr(transformers, f"{name}Processor")(image_processor=pictures, tokenizer=tokenizer)
    model = pair_model(name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    found = explain_classifier(model, processor, image, "a dog", candidates=["cat", "a dog"])
    padding = {"padding": "max_length", "max_length": 8} if name == "Siglip" else {"padding": True}
    tensors = processor(text=["cat", "a dog"], images=image, return_tensors="pt", **padding)
    tensors = {key: value for key, value in tensors.items() if key != "token_type_ids"}
    logits = plain(model, **tensors | {"pixel_values": tensors["pixel_values"].double()})
    expected = F.logsigmoid(logits) if name == "Siglip" else logits.log_softmax(-1)
    torch.testing.assert_close(found.baseline_logprobs, expected[1:], **EXACT)
    assert found.overlay(image).size == (30, 20)
    assert explain_classifier(model, processor, image, "a dog").score_unit == "logits"


def test_patches_of_any_shape_in_a_row() -> None:
    settings = _VISION | {"num_patches": 9}
    model = spread(transformers.Siglip2Model(transformers.Siglip2Config(**_TOWERS | {"vision_config": settings})))
    inputs = {
        "pixel_values": torch.randn(1, 9, 48, dtype=torch.float64),
        "pixel_attention_mask": torch.tensor([[1] * 8 + [0]]),
        "spatial_shapes": torch.tensor([[2, 4]]),
        "input_ids": TEXTS,
    }
    found = explain_classifier(model, None, inputs, 0, candidates=LABELS)
    assert found.image_map(0).shape == (2, 4)
    torch.testing.assert_close(found.baseline_logprobs, F.logsigmoid(plain(model, **inputs))[:1], **EXACT)
    assert found.scores.abs().max() > 1e-4


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_scores_of_tokens_are_those_of_the_definition(family: str) -> None:
    model = text_model(family)
    ids = torch.tensor([TOKENS])
    found = explain_classifier(model, None, TOKENS, 1)
    rows = [unit_factors([column], len(TOKENS), 0.1) for column in range(len(TOKENS))]
    expected = reference(model, rows, head_reader(model, 1, input_ids=ids, attention_mask=torch.ones_like(ids)))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.scores, expected, rtol=0.0, atol=1e-6 if family == "modernbert" else 1e-10)
    torch.testing.assert_close(found.baseline_logprobs, plain(model, input_ids=ids).log_softmax(-1)[1:2], **EXACT)


def test_words_spans_and_similar_tokens_of_a_text() -> None:
    tokenizer = word_level("[END]", "a", "good", "film", "bad", eos_token="[END]")
    model = text_model()
    text = "a good film a bad film [END]"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = explain_classifier(model, tokenizer, text, "cat", granularity="word", kappa=0.5)
    assert [unit.text.strip() for unit in found.units] == ["a", "good", "film", "a", "bad", "film"]
    embeds = model.get_input_embeddings()(ids)[0].detach()
    rows = [similar_factors(embeds, [column], 0.1, 0.5) for column in range(6)]
    assert rows[0][3] == pytest.approx(0.1)
    torch.testing.assert_close(found.scores, reference(model, rows, head_reader(model, 0, input_ids=ids)), **EXACT)
    span = explain_classifier(model, tokenizer, text, "cat", spans=[(2, 11)])
    expected = reference(model, [unit_factors([1, 2], 7, 0.1)], head_reader(model, 0, input_ids=ids))
    torch.testing.assert_close(span.scores, expected, **EXACT)


def test_pairs_of_texts_keep_their_token_types() -> None:
    model, ids = text_model(), torch.tensor([[5, 6, 7, 8, 0]])
    types = torch.tensor([[0, 0, 1, 1, 0]])
    inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    found = explain_classifier(model, None, inputs, 2)
    logprobs = plain(model, input_ids=ids[:, :4], token_type_ids=types[:, :4]).log_softmax(-1)
    torch.testing.assert_close(found.baseline_logprobs, logprobs[2:], **EXACT)
    assert len(found.units) == 4


@pytest.mark.parametrize("label", [2, np.int64(2), "tree, oak"])
def test_labels_are_indices_or_names(label: Any) -> None:
    assert explain_classifier(image_model(), None, PIXELS, label, tiles=(1, 1)).targets[0].id == 2


def test_predicted_class_is_the_default_label() -> None:
    model = image_model()
    found = explain_classifier(model, None, PIXELS, tiles=(1, 1))
    assert found.targets[0].id == int(plain(model, pixel_values=PIXELS).argmax())


def test_further_names_of_classes_are_known() -> None:
    model = image_model()
    model.config.label2id = {"hound": 1, "nonsense": 9}
    assert explain_classifier(model, None, PIXELS, "hound", tiles=(1, 1)).targets[0].text == "dog"
    with pytest.raises(ValueError, match="got 'nonsense'"):
        explain_classifier(model, None, PIXELS, "nonsense")


@pytest.mark.parametrize("label", ["bird", 3, -1, True, 1.0])
def test_unknown_labels_name_the_choices(label: Any) -> None:
    with pytest.raises(ValueError, match=r"label must be a class index in \[0, 3\), or one of .*'cat'.*, got"):
        explain_classifier(image_model(), None, PIXELS, label)


def test_choices_are_capped_and_near_ones_come_first() -> None:
    model = image_model(labels=[f"class {number}" for number in range(30)])
    with pytest.raises(ValueError, match=r"one of 'class 27', .* and 20 others, got 'klass 27'\."):
        explain_classifier(model, None, PIXELS, "klass 27")


@pytest.mark.parametrize(
    "changes", [{"labels": ("score",)}, {"problem_type": "multi_label_classification"}, {"problem_type": "regression"}]
)
def test_outputs_that_are_no_alternatives_are_explained_by_logits(changes: dict[str, Any]) -> None:
    model, ids = text_model(**changes), torch.tensor([TOKENS])
    found = explain_classifier(model, None, TOKENS, 0)
    assert found.score_unit == "logits"
    rows = [unit_factors([column], len(TOKENS), 0.1) for column in range(len(TOKENS))]
    torch.testing.assert_close(found.scores, reference(model, rows, lambda: model(input_ids=ids).logits[0, 0]), **EXACT)
    with pytest.raises(ValueError, match='delta must be "logit" for BertForSequenceClassification with'):
        explain_classifier(model, None, TOKENS, 0, delta="logprob")


def test_training_mode_and_attention_are_left_as_they_were() -> None:
    model = image_model(hidden_dropout_prob=0.5)
    expected = explain_classifier(model, None, PIXELS, 0).scores
    model.train()
    model.vit.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.testing.assert_close(explain_classifier(model, None, PIXELS, 0).scores, expected, **EXACT)
    with pytest.raises(ValueError, match="label must be"):
        explain_classifier(model, None, PIXELS, "bird")
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    pair = pair_model()
    explain_classifier(pair, None, PAIR, 0, candidates=LABELS)
    parts = [part for part in pair.modules() if isinstance(part, PreTrainedModel)]
    assert {part.config._attn_implementation for part in parts} == {"sdpa"}


@pytest.mark.parametrize(("family", "inputs"), [("vit", PIXELS), ("bert", TOKENS), ("llama", TOKENS)])
def test_heads_of_half_precision_are_formed_in_float32(family: str, inputs: Any) -> None:
    model = (image_model() if family == "vit" else text_model(family)).to(torch.bfloat16)
    found = explain_classifier(model, None, inputs, 0)
    assert found.baseline_logprobs.dtype == torch.float32
    tensors = {"pixel_values": PIXELS.bfloat16()} if family == "vit" else {"input_ids": torch.tensor([inputs])}
    logits = plain(model, **tensors)
    expected = logits.float().log_softmax(-1)[:1]
    torch.testing.assert_close(found.baseline_logprobs, expected, rtol=0.02, atol=0.05)
    logit = explain_classifier(model, None, inputs, 0, delta="logit").baseline_logprobs
    assert logit.ne(logit.bfloat16().float()).all()


def test_comparisons_of_half_precision_are_formed_in_float32() -> None:
    model = pair_model().to(torch.bfloat16)
    found = explain_classifier(model, None, PAIR, 0, candidates=LABELS)
    assert found.scores.dtype == torch.float32
    logits = plain(model, **PAIR | {"pixel_values": PIXELS.bfloat16()}).float()
    torch.testing.assert_close(found.baseline_logprobs, logits.log_softmax(-1)[:1], rtol=0.02, atol=0.02)


def test_nan_names_the_unit() -> None:
    model, passes = image_model(), [0]

    def spoil(_module: Any, _args: Any, output: Tensor) -> Tensor:
        passes[0] += 1
        return output * torch.nan if passes[0] > 2 else output

    handle = model.classifier.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"logits are NaN when the unit 'image 0 \[0,0\]' is suppressed"):
        explain_classifier(model, None, PIXELS, 0)
    handle.remove()


def test_models_without_a_key_per_patch_are_refused() -> None:
    swin = {"image_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    with pytest.raises(UnsupportedModelError, match="SwinForImageClassification has attention with 16 keys for an ima"):
        explain_classifier(build("SwinForImageClassification", swin), None, torch.randn(1, 3, 16, 16))
    convolutions = {"hidden_sizes": [4, 4], "depths": [1, 1], "num_stages": 2}
    with pytest.raises(UnsupportedModelError, match="ConvNextForImageClassification ran without calling attention"):
        explain_classifier(build("ConvNextForImageClassification", convolutions), None, torch.randn(1, 3, 32, 32))


def test_models_that_are_no_classifiers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"BertForTokenClassification is no classifier: .* \[1, 5, 3\]"):
        explain_classifier(build("BertForTokenClassification", _TEXT), None, TOKENS)
    with pytest.raises(
        UnsupportedModelError, match=r"ViTModel is no classifier: .* got none; load the model with a cl"
    ):
        explain_classifier(build("ViTModel", _VISION), None, PIXELS)
    settings = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 24}
    settings |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    with pytest.raises(UnsupportedModelError, match="BartForSequenceClassification reads the text twice"):
        explain_classifier(build("BartForSequenceClassification", settings), None, TOKENS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": "encoder"}, r"sites must be among \('vision',\) for a classifier of images, got 'encoder'\."),
        ({"attribute_target": True}, "attribute_target must be False for a classifier, got True: a class is no token"),
        ({"units": "text"}, "units='text' is about text, but all units of an image are patches"),
        ({"exclude": (0,)}, r"exclude=\(0,\) is about text, but all units of an image are patches"),
        ({"delimiter": ","}, "delimiter=',' is about text, but all units of an image are patches"),
        ({"chunks": [[0]]}, "spans and chunks are units of text"),
        ({"layers": [2]}, r"layers must lie in \[0, 2\), got 2\."),
        ({"factr": 1.0}, "AtManConfig has no field factr"),
        ({"candidates": LABELS}, "candidates must be None for ViTForImageClassification, whose classes are fixed"),
    ],
)
def test_settings_that_mean_nothing_for_an_image_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain_classifier(image_model(), None, PIXELS, **settings)


def test_sites_of_text_classifiers() -> None:
    assert len(explain_classifier(text_model(), None, TOKENS, sites="encoder").units) == len(TOKENS)
    with pytest.raises(ValueError, match=r"sites must be among \('encoder', 'decoder'\) for a classifier of text, got"):
        explain_classifier(text_model(), None, TOKENS, sites="vision")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (Image.new("RGB", (12, 12)), "inputs is Image, which needs a processor, got processor=None"),
        (PIXELS.repeat(2, 1, 1, 1), r"inputs must be one image, got pixel_values of shape \[2, 3, 12, 12\]"),
        ({"pixels": PIXELS}, r"inputs must be an image or a mapping with 'pixel_values', got \['pixels'\]"),
    ],
)
def test_one_image_is_explained_at_a_time(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain_classifier(image_model(), None, inputs)
    assert explain_classifier(image_model(), None, PIXELS[0], 0).grids == ((3, 3),)


def test_one_text_of_fitting_length_is_explained_at_a_time() -> None:
    with pytest.raises(ValueError, match="inputs must be one text, got 2; explain texts one by one"):
        explain_classifier(text_model(), None, [TOKENS, TOKENS])
    with pytest.raises(ValueError, match=r"inputs needs 9 positions, but the model has 8; shorten it\."):
        explain_classifier(text_model(), None, list(range(9)))


@pytest.mark.parametrize(
    ("inputs", "label", "candidates", "message"),
    [
        (PIXELS, None, None, "label must be a text if there are no candidates to choose from, got None"),
        (PIXELS, 1, None, "label must be a text if there are no candidates to choose from, got 1"),
        (PIXELS, None, "dog", "candidates must be a list of at least one text, got 'dog'"),
        (PIXELS, None, [], r"candidates must be a list of at least one text, got \[\]"),
        (PIXELS, "dog", None, "label and candidates are texts, which need a processor, got processor=None"),
        (PAIR, None, ["dog"], "candidates has 1 texts, but inputs holds the input_ids of 3"),
        (PAIR, "bird", LABELS, r"label must be a class index in \[0, 3\), or one of 'cat', 'dog', 'tree, oak', got 'b"),
    ],
)
def test_texts_to_hold_an_image_against(inputs: Any, label: Any, candidates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain_classifier(pair_model(), None, inputs, label, candidates=candidates)


def test_other_comparisons_of_image_and_text_are_refused() -> None:
    model = pair_model()
    plain_forward = model.forward

    def forward(**inputs: Any) -> Any:
        output = plain_forward(**inputs)
        output.logits_per_image = output.logits_per_image + 1.0
        return output

    model.forward = forward
    with pytest.raises(UnsupportedModelError, match="CLIPModel does not compare image and text by the cosine"):
        explain_classifier(model, None, PAIR, 0, candidates=LABELS)
