"""What cannot be done is refused by name, and odd but legal input works."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("ledits_pipeline")

from diffusers import DDIMScheduler

from ledits_pipeline import FamilyAdapter, LEditsInversion, LEditsPipeline, register_adapter
from ledits_pipeline.masks import row_quantiles, smooth
from tests.support import ledits

STEPS = 3


@functools.cache
def components(family: str) -> dict[str, Any]:
    return {"sd": ledits.sd_components, "sdxl": ledits.sdxl_components}[family]()


def pipeline(family: str = "sd", **changes: Any) -> LEditsPipeline:
    pipe = LEditsPipeline(**(components(family) | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inverted(batch: int = 1, **changes: Any) -> LEditsPipeline:
    pipe = pipeline(**changes)
    images = [ledits.picture(seed=seed) for seed in range(batch)]
    pipe.invert(images, num_inversion_steps=STEPS, generator=ledits.seeded(), inversion="paired")
    return pipe


INVERSION_REFUSALS = [
    ({"num_inversion_steps": 0}, r"num_inversion_steps must be an integer of at least 1, got 0\."),
    ({"num_inversion_steps": 2.5}, r"num_inversion_steps must be an integer of at least 1, got 2\.5\."),
    ({"num_inversion_steps": 2000}, r"num_inversion_steps must leave distinct timesteps"),
    ({"skip": -0.5}, r"skip must lie in \[0, 1\), got -0\.5\."),
    ({"skip": 1.0}, r"skip must lie in \[0, 1\), got 1\.0\."),
    ({"inversion": "null-text"}, r"inversion must be one of \['exact', 'paired', 'diffusers'\], got 'null-text'\."),
    ({"inversion_batch_size": 0}, r"inversion_batch_size must be at least 1, got 0\."),
    ({"num_zero_noise_steps": -1}, r"num_zero_noise_steps must be at least 0, got -1\."),
    ({"source_prompt": ["a", "b"]}, r"source_prompt has 2 entries for 1 pictures; give one each, or one text\."),
    ({"negative_prompt": 3}, r"negative_prompt must be a text or a list of texts, got 3\."),
    ({"solver": "heun"}, r'solver must be "2m" or "first_order", got \'heun\'\.'),
    ({"control_image": ledits.picture()}, r"control_image needs a ControlNet; pass controlnet="),
]
EDIT_REFUSALS = [
    ({"editing_prompt": ""}, r"editing_prompt must hold texts that are not empty, got ''"),
    ({"editing_prompt": ["cat", 3]}, r"editing_prompt must hold texts that are not empty, got 3"),
    ({"edit_guidance_scale": [1.0, 2.0]}, r"edit_guidance_scale has 2 entries for 1 editing prompts; give one each"),
    ({"edit_guidance_scale": "strong"}, r"edit_guidance_scale must hold finite numbers, got 'strong'\."),
    ({"edit_guidance_scale": float("nan")}, r"edit_guidance_scale must hold finite numbers, got nan\."),
    ({"edit_warmup_steps": (0, 1, 2)}, r"edit_warmup_steps has 3 entries for 1 editing prompts"),
    ({"edit_warmup_steps": -1}, r"edit_warmup_steps must hold whole numbers of steps, at least 0, got -1\."),
    ({"edit_cooldown_steps": 1.5}, r"edit_cooldown_steps must hold whole numbers of steps, at least 0, got 1\.5\."),
    (
        {"edit_threshold": 1.2},
        r"edit_threshold must lie in \[0, 1\] \(0: everything, 1: only the maximum\), got 1\.2\.",
    ),
    ({"reverse_editing_direction": "up"}, r"reverse_editing_direction must hold booleans, got 'up'\."),
    ({"user_mask": torch.full((4, 4), 2.0)}, r"user_mask must hold values in \[0, 1\], got 2 to 2\."),
    ({"user_mask": torch.ones(5, 1, 4, 4)}, r"user_mask must have shape \(H, W\), .* got \(5, 1, 4, 4\)\."),
    ({"user_mask": [torch.ones(4, 4)] * 2}, r"user_mask has 2 entries for 1 editing prompts; give one each"),
    ({"guidance_rescale": 2.0}, r"guidance_rescale must lie in \[0, 1\], got 2\.0\."),
    ({"mask_ema": 1.0}, r"mask_ema must lie in \[0, 1\), got 1\.0\."),
    ({"mask_dilate": -1}, r"mask_dilate must be a whole number of positions, at least 0, got -1\."),
    ({"apply_residual": "none"}, r'apply_residual must be "all" or "background", got \'none\'\.'),
    ({"denoising_end": 1.5}, r"denoising_end must lie in \(0, 1\), got 1\.5\."),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"callback_on_step_end_tensor_inputs has unknown names \['noi"),
    ({"negative_prompt": ["a", "b"]}, r"negative_prompt has 2 entries for 1 pictures"),
    (
        {"editing_prompt_embeds": torch.zeros(1, 16, 32)},
        r"editing_prompt and editing_prompt_embeds describe the same edits; pass one of them\.",
    ),
    (
        {"editing_prompt": None, "editing_prompt_embeds": torch.zeros(1, 16, 32), "use_intersect_mask": True},
        r"use_intersect_mask=True with editing_prompt_embeds needs editing_token_spans",
    ),
    (
        {"editing_prompt": None, "editing_prompt_embeds": torch.zeros(2, 16, 32), "editing_token_spans": [[1]]},
        r"editing_token_spans has 1 entries for 2 edits; give one each\.",
    ),
    (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 16, 32)},
        r"negative_prompt and negative_prompt_embeds describe the same; pass one of them\.",
    ),
]


@pytest.mark.parametrize(("fields", "message"), INVERSION_REFUSALS)
def test_inversion_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline().invert(ledits.picture(), **({"num_inversion_steps": STEPS} | fields))


@pytest.mark.parametrize(("fields", "message"), EDIT_REFUSALS)
def test_editing_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inverted()(**({"editing_prompt": "cat", "output_type": "latent"} | fields))


def test_editing_needs_an_inversion() -> None:
    with pytest.raises(ValueError, match=r"no inversion is stored\. Call pipe\.invert\(image=\.\.\.\) before"):
        pipeline()(editing_prompt="cat")
    with pytest.raises(TypeError, match=r"inversion must be a LEditsInversion, got 'paired'"):
        pipeline()(editing_prompt="cat", inversion="paired")


def test_unknown_keywords_are_errors() -> None:
    pipe = inverted()
    with pytest.raises(TypeError, match="edit_scale"):
        pipe(editing_prompt="cat", edit_scale=3)
    with pytest.raises(TypeError, match="num_steps"):
        pipe.invert(ledits.picture(), num_steps=3)


def test_illegal_sizes_name_the_nearest_legal_one() -> None:
    with pytest.raises(ValueError, match=r"multiples of 8, got 32 x 38; the nearest legal size is height=32, width=40"):
        pipeline().invert(ledits.picture(32, 38), num_inversion_steps=STEPS)


def test_an_inversion_of_another_family_is_refused_and_of_another_model_warned_about() -> None:
    made = inverted().inversion
    with pytest.raises(ValueError, match=r"inversion was made for the family 'stable-diffusion', but this pipeline is"):
        pipeline("sdxl")(editing_prompt="cat", inversion=made)
    other = pipeline(unet=ledits.unet(layers_per_block=2))
    with pytest.warns(UserWarning, match="inversion was made with another denoiser than this pipeline's"):
        other(editing_prompt="cat", inversion=made, output_type="latent")


def test_unsupported_predictions_are_named() -> None:
    with pytest.raises(ValueError, match=r"prediction_type of the scheduler must be one of .*, got 'magic'"):
        pipeline(scheduler=DDIMScheduler(prediction_type="magic")).invert(ledits.picture(), num_inversion_steps=STEPS)


def test_diffusers_mode_notices_another_scheduler() -> None:
    made = pipeline().invert(ledits.picture(), num_inversion_steps=STEPS, inversion="diffusers")
    other = pipeline(scheduler=ledits.scheduler(num_train_timesteps=500))
    with pytest.raises(ValueError, match=r'the scheduler changed since the inversion, which "diffusers" mode cannot'):
        other(editing_prompt="cat", inversion=made)


def test_a_prompt_that_is_cut_off_warns_and_uses_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    from diffusers.utils import logging

    logging.enable_propagation()
    found = inverted()(editing_prompt="a very long text of many words", output_type="latent")
    logging.disable_propagation()
    assert "this part of the prompt was cut off" in caplog.text
    assert found.masks.any()


def test_sdxl_embeddings_need_their_pooled_part() -> None:
    pipe = pipeline("sdxl")
    pipe.invert(ledits.picture(), num_inversion_steps=STEPS, inversion="paired")
    with pytest.raises(ValueError, match=r"editing_prompt_embeds needs editing_pooled_prompt_embeds with it"):
        pipe(editing_prompt_embeds=torch.zeros(1, 16, 64))


SHALLOW = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
DEEP = {
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
}
WITHOUT = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}


@pytest.mark.parametrize("fields", [SHALLOW, DEEP], ids=["only-finer", "only-coarser"])
def test_masks_fall_back_to_attention_on_another_grid(fields: dict[str, Any]) -> None:
    found = inverted(unet=ledits.unet(**fields))(editing_prompt="cat", edit_threshold=0.5, output_type="latent")
    assert 0 < found.masks.float().mean() < 0.5


def test_a_unet_without_cross_attention_says_how_to_go_on() -> None:
    pipe = inverted(unet=ledits.unet(**WITHOUT))
    with pytest.raises(
        ValueError, match=r"no cross-attention .* use_cross_attn_mask=False and use_intersect_mask=False"
    ):
        pipe(editing_prompt="cat")
    assert pipe(editing_prompt="cat", use_intersect_mask=False, output_type="latent").masks.any()


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2)])
def test_smoothing_small_grids(grid: tuple[int, int]) -> None:
    torch.testing.assert_close(smooth(torch.ones(2, *grid)), torch.ones(2, *grid))


def test_quantiles_by_hand() -> None:
    values = torch.tensor([[[1.0, 2.0, 3.0, 5.0]], [[0.0, 0.0, 10.0, 10.0]]])
    assert row_quantiles(values, [0.5, 1.0]).tolist() == [[2.5], [10.0]]


def test_adapters_register_once_and_only_adapters() -> None:
    class Other(FamilyAdapter):
        pass

    with pytest.raises(TypeError, match="adapter must be a subclass of FamilyAdapter"):
        register_adapter("AnyPipeline", dict)
    with pytest.raises(ValueError, match=r"pipeline_class_name 'StableDiffusionPipeline' already has the adapter"):
        register_adapter("StableDiffusionPipeline", Other)


def test_components_of_no_family_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no adapter matches the components \['scheduler', 'vae'\]; known are"):
        LEditsPipeline(vae=components("sd")["vae"], scheduler=ledits.scheduler())


def saved(folder: Path) -> dict[str, Any]:
    inverted().inversion.save_pretrained(folder)
    return json.loads((folder / "inversion.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version in inversion\.json must be 1, got 2\."),
        ({"mode": "magic"}, r"mode in inversion\.json must be one of"),
        ({"extra": 1}, r"inversion\.json must hold exactly the keys"),
        ({"size": [True, 32]}, r"size in inversion\.json must be two sizes in \[1, 65536\], got \[True, 32\]\."),
        ({"size": [32, 10**9]}, r"size in inversion\.json must be two sizes"),
        ({"timesteps": []}, r"timesteps must hold 1 to 10000 numbers, got 0\."),
        ({"sigmas": [0.5]}, r"sigmas must hold one number more than timesteps, 4, got 1\."),
        ({"alphas": [0.5, 0.4, 0.3, 0.2]}, r"alphas and sigmas must lead from noise to picture"),
        ({"eta": float("nan")}, r"inversion\.json must hold finite numbers, got NaN\."),
        ({"skip": 10**400}, r"skip in inversion\.json must be a number in \[0, 1\)"),
        ({"condition": {}}, r"condition must hold exactly the keys"),
    ],
)
def test_inversion_files_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = saved(tmp_path) | changes
    (tmp_path / "inversion.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        LEditsInversion.from_pretrained(tmp_path)


def test_inversion_folders_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no inversion\.json; it is written by LEditsInversion"):
        LEditsInversion.from_pretrained(tmp_path)
    values = saved(tmp_path)
    values["timesteps"] = values["timesteps"][:2]
    values["alphas"], values["sigmas"] = values["alphas"][:3], values["sigmas"][:3]
    (tmp_path / "inversion.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"maps must have shape \[2, B, C, h, w\]"):
        LEditsInversion.from_pretrained(tmp_path)
