"""Inversion without edits gives the picture back: to float32 rounding, and in paired mode to the bit."""

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("ledits_pipeline")

from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from ledits_pipeline import LEditsInversion, LEditsPipeline
from tests.support import ledits


@functools.cache
def components(family: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"sd": ledits.sd_components, "sdxl": ledits.sdxl_components}[family](dtype=dtype)


def pipeline(family: str = "sd", dtype: torch.dtype = torch.float32, **changes: Any) -> LEditsPipeline:
    pipe = LEditsPipeline(**(components(family, dtype) | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count: int) -> list[Any]:
    return [ledits.picture(seed=seed) for seed in range(count)]


def error(pipe: LEditsPipeline, images: list[Any], output: Any) -> float:
    pixels = pipe.image_processor.preprocess(images)
    return float((output.images - pipe.adapter.encode_image(pixels).to(output.images)).abs().max())


def reconstruct(pipe: LEditsPipeline, batch: int = 1, edit: dict[str, Any] | None = None, **fields: Any) -> float:
    images = pictures(batch)
    with torch.no_grad():
        made = pipe.invert(images, generator=ledits.seeded(), **({"num_inversion_steps": 4} | fields))
        return error(pipe, images, pipe(output_type="latent", inversion=made, **(edit or {})))


@pytest.mark.parametrize("mode", ["exact", "paired"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "skip", "batch"),
    [
        (4, 0.0, 3),
        (12, 0.2, 1),
        pytest.param(30, 0.5, 1, marks=pytest.mark.slow),
        pytest.param(12, 0.5, 3, marks=pytest.mark.slow),
    ],
)
def test_reconstruction(mode: str, dtype: torch.dtype, prediction: str, steps: int, skip: float, batch: int) -> None:
    pipe = pipeline(dtype=dtype, scheduler=ledits.scheduler(prediction_type=prediction, steps_offset=1))
    found = reconstruct(pipe, batch, num_inversion_steps=steps, skip=skip, inversion=mode)
    assert found <= (1e-5 if mode == "exact" else 0.0)


@pytest.mark.parametrize("mode", ["exact", "paired"])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"source_prompt": "dog"}, id="guided"),
        pytest.param({"source_prompt": "dog", "source_guidance_scale": 1.0}, id="conditional-only"),
        pytest.param({"source_prompt": "dog", "source_guidance_scale": 0.0}, id="unconditional"),
        pytest.param({"source_prompt": ["dog", "cat"], "negative_prompt": "ox"}, id="one-each-and-negative"),
        pytest.param({"solver": "first_order", "eta": 0.0}, id="ode"),
        pytest.param({"solver": "first_order", "eta": 0.5}, id="half-noise"),
        pytest.param({"clip_skip": 1}, id="clip-skip"),
    ],
)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_reconstruction_keeps_what_inversion_was_told(family: str, mode: str, fields: dict[str, Any]) -> None:
    assert reconstruct(pipeline(family), 2, inversion=mode, **fields) <= (1e-5 if mode == "exact" else 0.0)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(), EulerDiscreteScheduler(), ledits.scheduler(use_karras_sigmas=True)]
)
def test_any_scheduler_reconstructs_and_stays_as_it_was(scheduler: Any) -> None:
    before = (dict(scheduler.config), scheduler.timesteps.clone(), scheduler.config.get("timestep_spacing"))
    assert reconstruct(pipeline(scheduler=scheduler)) <= 1e-5
    assert (dict(scheduler.config), scheduler.config.get("timestep_spacing")) == (before[0], before[2])
    assert torch.equal(scheduler.timesteps, before[1])


@pytest.mark.parametrize(
    ("mode", "limit"), [pytest.param("exact", 1e-3, id="exact"), pytest.param("paired", 0.0, id="paired")]
)
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param({"edit_guidance_scale": 0.0}, id="scale-0"),
        pytest.param({"user_mask": torch.zeros(8, 8)}, id="masked-everywhere"),
        pytest.param({"edit_warmup_steps": 99}, id="still-warming-up"),
    ],
)
def test_edits_that_change_nothing(mode: str, limit: float, edit: dict[str, Any]) -> None:
    assert reconstruct(pipeline(), edit={"editing_prompt": "cat"} | edit, inversion=mode) <= limit


def test_beats_diffusers_where_its_last_noise_map_is_lost() -> None:
    pipe = pipeline()
    assert reconstruct(pipe, inversion="diffusers", num_inversion_steps=10) > 1e-2
    assert reconstruct(pipe, inversion="exact", num_inversion_steps=10) <= 1e-5


def test_batched_inversion_stays_close() -> None:
    assert reconstruct(pipeline(), inversion_batch_size=3, num_inversion_steps=8) <= 1e-2


@pytest.mark.parametrize("mode", ["exact", "paired", "diffusers"])
def test_saved_inversion_reconstructs(mode: str, tmp_path: Any) -> None:
    pipe, images = pipeline(), pictures(2)
    made = pipe.invert(images, source_prompt="dog", num_inversion_steps=4, generator=ledits.seeded(), inversion=mode)
    made.save_pretrained(tmp_path)
    again = LEditsInversion.from_pretrained(tmp_path)
    outputs = [pipeline()(output_type="latent", editing_prompt="cat", inversion=i).images for i in (made, again)]
    assert torch.equal(*outputs)


def test_saving_rounded_maps_is_a_choice(tmp_path: Any) -> None:
    pipe = pipeline()
    made = pipe.invert(pictures(1), num_inversion_steps=4, generator=ledits.seeded())
    made.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = LEditsInversion.from_pretrained(tmp_path)
    assert again.maps.dtype == torch.float32
    assert error(pipe, pictures(1), pipe(output_type="latent", inversion=again)) > 1e-5


def test_inversion_shows_the_pictures_it_was_made_of() -> None:
    made = pipeline().invert(pictures(2), num_inversion_steps=4, inversion="paired")
    assert [image.size for image in made.images] == [(32, 32)] * 2
    assert [image.size for image in made.vae_reconstruction_images] == [(32, 32)] * 2


def test_padding_takes_any_size_and_cuts_back() -> None:
    pipe = pipeline()
    output = pipe.edit(ledits.picture(22, 36), "cat", num_inversion_steps=4, pad=True)
    assert output.images[0].size == (36, 22)
    assert output.masks.shape[-2:] == (12, 20)


def latents_of(pipe: LEditsPipeline, images: list[Any], generator: Any, **fields: Any) -> Tensor:
    made = pipe.invert(images, generator=generator, num_inversion_steps=4, **fields)
    return pipe(editing_prompt=["cat", "dog"], edit_guidance_scale=3, output_type="latent", inversion=made).images


@pytest.mark.parametrize("mode", ["exact", "paired", "diffusers"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_batch_gives_what_its_pictures_give_alone(family: str, mode: str) -> None:
    pipe, images = pipeline(family, torch.float64), pictures(2)
    fields = {"inversion": mode}
    together = latents_of(pipe, images, [ledits.seeded(0), ledits.seeded(1)], **fields)
    for i in range(2):
        alone = latents_of(pipe, images[i : i + 1], [ledits.seeded(i)], **fields)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)
