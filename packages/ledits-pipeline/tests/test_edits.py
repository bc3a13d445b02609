"""What edits do, what they cost, and what they leave alone."""

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("ledits_pipeline")

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ledits_pipeline import LEditsPipeline
from tests.support import ledits

STEPS = 4


@functools.cache
def components(family: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"sd": ledits.sd_components, "sdxl": ledits.sdxl_components}[family](dtype=dtype)


def pipeline(family: str = "sd", dtype: torch.dtype = torch.float64, **changes: Any) -> LEditsPipeline:
    pipe = LEditsPipeline(**(components(family, dtype) | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inverted(mode: str = "exact", family: str = "sd", batch: int = 1, **fields: Any) -> LEditsPipeline:
    pipe = pipeline(family)
    images = [ledits.picture(seed=seed) for seed in range(batch)]
    pipe.invert(images, num_inversion_steps=STEPS, generator=ledits.seeded(), inversion=mode, **fields)
    return pipe


def latents(pipe: LEditsPipeline, *prompts: str, **fields: Any) -> Tensor:
    return pipe(editing_prompt=list(prompts), output_type="latent", **fields).images


class Rows:
    """Counts model calls and their rows."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows: list[int] = []
        self._handle = module.register_forward_pre_hook(lambda _, args: self.rows.append(args[0].shape[0]))

    def __enter__(self) -> list[int]:
        return self.rows

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def test_inversion_costs_one_row_per_step() -> None:
    pipe = pipeline()
    with Rows(pipe.unet) as rows:
        pipe.invert(ledits.picture(), num_inversion_steps=STEPS)
    assert rows == [1] * STEPS


def test_batched_inversion_makes_fewer_calls() -> None:
    pipe = pipeline()
    with Rows(pipe.unet) as rows:
        pipe.invert(ledits.picture(), source_prompt="dog", num_inversion_steps=STEPS, inversion_batch_size=3)
    assert rows == [6, 2]


def test_paired_inversion_asks_no_model() -> None:
    pipe = pipeline()
    with Rows(pipe.unet) as rows:
        pipe.invert(ledits.picture(), num_inversion_steps=STEPS, inversion="paired")
    assert rows == []


def test_edits_out_of_their_window_are_not_evaluated() -> None:
    pipe = inverted(batch=2)
    with Rows(pipe.unet) as rows:
        latents(pipe, "cat", "dog", edit_warmup_steps=[1, 2], edit_cooldown_steps=[3, None])
    assert rows == [2, 4, 6, 4]


def test_paired_steps_before_the_first_edit_are_free() -> None:
    pipe = inverted("paired")
    with Rows(pipe.unet) as rows:
        latents(pipe, "cat", edit_warmup_steps=1, edit_cooldown_steps=3)
    assert rows == [3, 3, 2][: STEPS - 1]


def test_conditional_inversion_needs_no_unconditional_row() -> None:
    pipe = pipeline()
    with Rows(pipe.unet) as rows:
        pipe.invert(ledits.picture(), source_prompt="ox", source_guidance_scale=1.0, num_inversion_steps=STEPS)
        latents(pipe, "cat", edit_warmup_steps=2)
    assert rows == [1] * STEPS + [1, 1, 3, 3]


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by Python."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["exact", "paired"])
def test_the_loop_never_waits_for_the_device(mode: str) -> None:
    counts = []
    for steps in (3, 6):
        pipe = pipeline()
        pipe.invert(ledits.picture(), num_inversion_steps=steps, inversion=mode)
        with HostReads() as reads:
            latents(pipe, "cat", "dog")
        counts.append(reads.count)
    assert counts[1] - counts[0] <= 3  # the three further timesteps, read from the CPU before the loop


@pytest.mark.parametrize("mode", ["exact", "paired"])
def test_order_of_edits_does_not_matter(mode: str) -> None:
    pipe = inverted(mode)
    one = latents(pipe, "cat", "dog", edit_guidance_scale=[3, 4])
    other = latents(pipe, "dog", "cat", edit_guidance_scale=[4, 3])
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_reversing_is_a_negative_scale() -> None:
    pipe = inverted()
    one = latents(pipe, "cat", reverse_editing_direction=True, edit_guidance_scale=3)
    assert torch.equal(one, latents(pipe, "cat", edit_guidance_scale=-3))
    again = latents(pipe, "cat", reverse_editing_direction=True, edit_guidance_scale=-3)
    assert torch.equal(again, latents(pipe, "cat", edit_guidance_scale=3))


def test_equal_prompts_are_independent_edits() -> None:
    pipe = inverted()
    twice = pipe(editing_prompt=["cat", "cat"], edit_threshold=[0.9, 0.5], output_type="latent")
    assert not torch.equal(twice.masks[:, 0], twice.masks[:, 1])


@pytest.mark.parametrize("fields", [{"use_intersect_mask": False}, {"use_cross_attn_mask": True}], ids=["M2", "M1"])
def test_masks_leave_out_their_threshold(fields: dict[str, Any]) -> None:
    pipe = inverted()
    shares = []
    for threshold in (0.9, 0.8, 0.0, 1.0):
        found = pipe(
            editing_prompt="cat",
            edit_threshold=threshold,
            output_type="latent",
            **({"use_intersect_mask": False} | fields),
        )
        shares.append(found.masks[0, 0, 0])
    cells = 256 if "use_cross_attn_mask" not in fields else 16
    densities = [float(mask.float().mean()) for mask in shares]
    assert densities[0] == pytest.approx(0.1, abs=1 / cells)
    assert densities[1] == pytest.approx(0.2, abs=1 / cells)
    assert densities[2:] == [1.0, 1 / cells]
    assert bool((shares[0] <= shares[1]).all())


def test_intersection_is_the_product_of_both_masks() -> None:
    pipe = inverted()
    options: tuple[dict[str, Any], ...] = (
        {"use_intersect_mask": False, "use_cross_attn_mask": True},
        {"use_intersect_mask": False},
        {},
    )
    m1, m2, both = (pipe(editing_prompt="cat", edit_threshold=0.5, output_type="latent", **o).masks[0] for o in options)
    assert torch.equal(both, m1 & m2)
    assert bool(both.any())


def test_only_what_the_user_mask_allows_is_guided() -> None:
    pipe = inverted()
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    latents(pipe, "cat", user_mask=left, edit_threshold=0.0)
    assert pipe.sem_guidance[..., 8:].abs().max() == 0
    assert pipe.sem_guidance[..., :8].abs().max() > 0


@pytest.mark.parametrize("kind", ["bool", "picture", "array", "latent", "batch", "one-each"])
def test_user_masks_of_any_kind(kind: str) -> None:
    pipe = inverted(batch=2)
    half = torch.zeros(16, 16)
    half[:8] = 1
    large = half.repeat_interleave(2, 0).repeat_interleave(2, 1)
    from PIL import Image

    given = {
        "bool": large.bool(),
        "picture": Image.fromarray((large.numpy() * 255).astype("uint8")),
        "array": large.numpy(),
        "latent": half[None, None],
        "batch": torch.stack([large, large])[:, None],
        "one-each": [large, half],
    }[kind]
    expected = latents(pipe, "cat", "dog", user_mask=half)
    assert torch.equal(latents(pipe, "cat", "dog", user_mask=given), expected)


def test_generators_make_runs_repeatable() -> None:
    assert torch.equal(latents(inverted(), "cat"), latents(inverted(), "cat"))


def test_negative_prompts_are_kept_and_can_be_replaced() -> None:
    pipe = inverted(batch=2, negative_prompt="ox")
    kept = latents(pipe, "cat")
    assert torch.equal(kept, latents(pipe, "cat", negative_prompt=["ox", "ox"]))
    assert not torch.equal(kept, latents(pipe, "cat", negative_prompt="cow"))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_embeddings_do_what_their_texts_do(family: str) -> None:
    from ledits_pipeline import PromptRequest

    pipe = inverted(family=family, batch=2)
    with torch.no_grad():
        rows = pipe.adapter.encode_prompts(PromptRequest(rows=2, prompts=["cat", "dog"], wants_tokens=True))
    pooled = {"editing_pooled_prompt_embeds": rows.extras["text_embeds"]} if family == "sdxl" else {}
    found = pipe(
        editing_prompt_embeds=rows.embeds, editing_token_spans=[range(1, 4)] * 2, output_type="latent", **pooled
    )
    assert torch.equal(found.images, latents(pipe, "cat", "dog"))
    without = pipe(editing_prompt_embeds=rows.embeds, output_type="latent", **pooled)
    assert without.masks.any()


def test_callbacks_read_and_change_everything() -> None:
    pipe = inverted(family="sdxl")
    seen = []

    def look(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, int(timestep), sorted(tensors)))
        return tensors

    names = pipe._callback_tensor_inputs
    plain = latents(pipe, "cat")
    fields: dict[str, Any] = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
    assert torch.equal(latents(pipe, "cat", **fields), plain)
    assert seen == [(k, int(t), sorted(names)) for k, t in enumerate(pipe.inversion_steps)]
    for name in names:

        def change(
            pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor], name: str = name
        ) -> dict[str, Tensor]:
            return {name: tensors[name] * 1.5 + 0.1}

        changed = latents(pipe, "cat", callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name])
        assert not torch.equal(changed, plain), name


@pytest.mark.parametrize("mode", ["exact", "paired"])
def test_callbacks_can_interrupt(mode: str) -> None:
    pipe = inverted(mode)
    steps = []

    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    latents(pipe, "cat", callback_on_step_end=stop)
    assert steps == [0, 1]
    assert latents(pipe, "cat").isfinite().all()


@pytest.mark.parametrize("mode", ["exact", "paired", "diffusers"])
def test_processors_are_the_same_objects_afterwards(mode: str) -> None:
    pipe = inverted(mode)
    before = dict(pipe.unet.attn_processors)
    latents(pipe, "cat")

    def fail(*_: Any) -> dict[str, Tensor]:
        raise KeyError("callback")

    with pytest.raises(KeyError, match="callback"):
        latents(pipe, "cat", callback_on_step_end=fail)
    after = pipe.unet.attn_processors
    assert before.keys() == after.keys()
    assert all(after[name] is processor for name, processor in before.items())


def test_attention_maps_of_chosen_steps() -> None:
    pipe = inverted(batch=2)
    fields: dict[str, Any] = {"editing_prompt": ["cat", "dog"], "output_type": "latent", "attn_store_steps": [0, 2]}
    each = pipe(**fields, store_averaged_over_steps=False).attention_maps
    assert each.shape == (2, 2, 2, 4, 4)
    assert bool((each > 0).all()) and bool((each < 1).all())
    torch.testing.assert_close(pipe(**fields).attention_maps, each.mean(dim=0))


def test_rescaling_pulls_the_spread_towards_the_edits() -> None:
    pipe = inverted()
    assert not torch.equal(latents(pipe, "cat"), latents(pipe, "cat", guidance_rescale=0.7))


def test_one_call_edits_like_two() -> None:
    pipe = pipeline()
    fields: dict[str, Any] = {"output_type": "latent", "edit_guidance_scale": 3, "num_inversion_steps": STEPS}
    once = pipe.edit(ledits.picture(), "cat", generator=ledits.seeded(), **fields)
    assert torch.equal(once.images, latents(inverted("paired"), "cat", edit_guidance_scale=3))
    with pytest.raises(TypeError, match=r"edit got unexpected keyword arguments \['edit_scale'\]\."):
        pipe.edit(ledits.picture(), "cat", edit_scale=3)


def test_modes_agree_about_an_edit() -> None:
    exact, paired = (latents(inverted(mode), "cat", edit_guidance_scale=1.0) for mode in ("exact", "paired"))
    torch.testing.assert_close(exact, paired, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "paired"])
def test_averaged_attention_gives_steadier_masks(mode: str) -> None:
    pipe = inverted(mode)
    fields: dict[str, Any] = {"editing_prompt": "cat", "use_intersect_mask": False, "use_cross_attn_mask": True}
    plain, steady = (pipe(**fields, mask_ema=share, output_type="latent").masks for share in (0.0, 0.9))
    assert torch.equal(plain[0], steady[0])
    assert (steady[1:] ^ steady[:-1]).sum() <= (plain[1:] ^ plain[:-1]).sum()


def test_grown_masks_hold_the_plain_ones_and_their_neighbours() -> None:
    from ledits_pipeline.masks import grow

    mask = torch.zeros(1, 1, 5, 6, dtype=torch.bool)
    mask[..., 0, 3] = True
    assert grow(mask, 1).nonzero()[:, 2:].tolist() == [[0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [1, 4]]
    pipe = inverted()
    plain, grown = (pipe(editing_prompt="cat", mask_dilate=n, output_type="latent").masks[0] for n in (0, 2))
    assert torch.equal(grown, grow(plain, 2))


@pytest.mark.parametrize("mode", ["exact", "paired"])
def test_residuals_can_be_left_out_where_edits_acted(mode: str) -> None:
    pipe = inverted(mode)
    fields: dict[str, Any] = {"edit_guidance_scale": 1.0, "edit_threshold": 0.5, "output_type": "latent"}
    plain = pipe(editing_prompt="cat", **fields)
    without = pipe(editing_prompt="cat", apply_residual="background", **fields)
    changed = (plain.images != without.images).any(dim=1)
    assert torch.equal(changed, plain.masks[-1, 0])


def test_modes_agree_about_left_out_residuals() -> None:
    fields: dict[str, Any] = {"edit_guidance_scale": 1.0, "apply_residual": "background"}
    exact, paired = (latents(inverted(mode), "cat", **fields) for mode in ("exact", "paired"))
    torch.testing.assert_close(exact, paired, rtol=1e-4, atol=1e-4)
