"""`"diffusers"` mode against diffusers' own pipelines in float64: latents to 1e-6, and not one bit of the masks."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("ledits_pipeline")

from diffusers import DDIMScheduler, LEditsPPPipelineStableDiffusion, LEditsPPPipelineStableDiffusionXL
from diffusers.models.attention_processor import AttnProcessor2_0

from ledits_pipeline import LEditsPipeline
from tests.support import ledits

STEPS = 4
TWO_EDITS = {
    "editing_prompt": ["cat", "dog bite"],
    "reverse_editing_direction": [False, True],
    "edit_guidance_scale": [7.0, 4.0],
    "edit_threshold": [0.8, 0.7],
}
CASES = [
    pytest.param({}, {}, id="reconstruction"),
    pytest.param({"editing_prompt": "cat"}, {}, id="defaults"),
    pytest.param(
        {"editing_prompt": "cat", "use_intersect_mask": False, "use_cross_attn_mask": True, "edit_threshold": 0.8},
        {},
        id="attention-mask-with-tied-quantile",
    ),
    pytest.param({"editing_prompt": "cat", "use_intersect_mask": False}, {}, id="noise-mask"),
    pytest.param(TWO_EDITS | {"use_intersect_mask": True}, {"skip": 0.4}, id="two-edits-intersection"),
    pytest.param(
        TWO_EDITS
        | {"edit_warmup_steps": [0, 2], "edit_cooldown_steps": [3, 9], "user_mask": torch.eye(16).clamp(min=0.25)},
        {},
        id="windows-and-user-mask",
    ),
    pytest.param({"editing_prompt": ["cat"], "negative_prompt": "dog"}, {}, id="negative-prompt"),
]
FAMILIES = {
    "sd": (LEditsPPPipelineStableDiffusion, ledits.sd_components, {"requires_safety_checker": False}),
    "sdxl": (LEditsPPPipelineStableDiffusionXL, ledits.sdxl_components, {}),
}


@functools.cache
def components(family: str) -> dict[str, Any]:
    return FAMILIES[family][1](dtype=torch.float64)


@pytest.fixture(params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    components(request.param)["unet"].set_attn_processor(AttnProcessor2_0())  # diffusers leaves its own behind


def both(family: str, **changes: Any) -> tuple[Any, LEditsPipeline]:
    """diffusers' pipeline and ours, over the same modules."""
    reference, _, options = FAMILIES[family]
    parts = components(family) | {"scheduler": ledits.scheduler(steps_offset=1)} | changes
    ours = LEditsPipeline(**parts, **options)
    theirs = reference(**(parts | {"scheduler": copy.deepcopy(parts["scheduler"])}), **options)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return theirs, ours


def assert_parity(
    family: str, edit: dict[str, Any], inversion: dict[str, Any], size: tuple[int, int] = (32, 32)
) -> None:
    theirs, ours = both(family, **inversion.pop("changes", {}))
    image = ledits.picture(*size)
    fields = {"num_inversion_steps": STEPS} | inversion
    ours.invert(image, generator=ledits.seeded(), inversion="diffusers", **fields)
    found = ours(output_type="latent", **edit)
    theirs.invert(image, generator=ledits.seeded(), **fields)
    expected = theirs(output_type="latent", **edit)
    torch.testing.assert_close(ours.init_latents, theirs.init_latents, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.zs, theirs.zs, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-6)
    if edit:
        bits = theirs.activation_mask[:, :, :, 0].bool()
        assert torch.equal(found.masks, bits)
        assert 0 < bits.float().mean() < 1
        torch.testing.assert_close(ours.sem_guidance.float(), theirs.sem_guidance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("edit", "inversion"), CASES)
def test_equals_diffusers(family: str, edit: dict[str, Any], inversion: dict[str, Any]) -> None:
    assert_parity(family, dict(edit), dict(inversion))


def test_equals_diffusers_on_pictures_that_are_not_square(family: str) -> None:
    assert_parity(family, {"editing_prompt": "cat", "edit_threshold": 0.6}, {}, size=(32, 64))


def test_equals_diffusers_with_more_steps_and_another_first_noise_level(family: str) -> None:
    changes = {"scheduler": ledits.scheduler(steps_offset=1, final_sigmas_type="sigma_min", lower_order_final=False)}
    assert_parity(family, {"editing_prompt": "cat"}, {"num_inversion_steps": 7, "changes": changes})


def test_equals_diffusers_for_xl_with_ddim_and_a_source_prompt() -> None:
    changes = {"scheduler": DDIMScheduler(clip_sample=False)}
    inversion = {"changes": changes, "source_prompt": "dog", "num_zero_noise_steps": 1}
    assert_parity("sdxl", {"editing_prompt": "cat"}, inversion)
    components("sdxl")["unet"].set_attn_processor(AttnProcessor2_0())


def test_given_guidance_replaces_the_edits(family: str) -> None:
    guidance = [torch.full((1, 4, 16, 16), 0.1, dtype=torch.float64)] * 2
    assert_parity(family, {"editing_prompt": "cat", "sem_guidance": guidance}, {})


def test_another_scheduler_becomes_the_one_diffusers_takes(family: str) -> None:
    from diffusers import PNDMScheduler

    assert_parity(family, {"editing_prompt": "cat"}, {"changes": {"scheduler": PNDMScheduler(steps_offset=1)}})
