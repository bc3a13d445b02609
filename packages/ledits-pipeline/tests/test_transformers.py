"""Flow-matching transformers: exactness, masks from joint attention, and what each family's own pipeline would do."""

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("ledits_pipeline")

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from ledits_pipeline import LEditsPipeline, PromptRequest
from ledits_pipeline.attention import column_mass
from tests.support import ledits

STEPS = 4


@functools.cache
def components(family: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"sd3": ledits.sd3_components, "flux": ledits.flux_components}[family](dtype=dtype)


def pipeline(family: str = "sd3", dtype: torch.dtype = torch.float32, **changes: Any) -> LEditsPipeline:
    pipe = LEditsPipeline(**(components(family, dtype) | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count: int) -> list[Any]:
    return [ledits.picture(32, 48, seed=seed) for seed in range(count)]


@torch.no_grad()
def error(pipe: LEditsPipeline, count: int) -> float:
    pixels = pipe.image_processor.preprocess(pictures(count))
    output = pipe(output_type="latent").images
    return float((output - pipe.adapter.encode_image(pixels).to(output)).abs().max())


FIELDS = [
    pytest.param({}, id="default"),
    pytest.param({"skip": 0.0}, id="from-pure-noise"),
    pytest.param({"skip": 0.5, "num_inversion_steps": 12}, id="half"),
    pytest.param({"solver": "2m", "skip": 0.0}, id="second-order"),
    pytest.param({"eta": 0.0}, id="ode"),
    pytest.param({"eta": 0.5}, id="half-noise"),
    pytest.param({"source_prompt": "dog"}, id="source-prompt"),
]


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("mode", ["exact", "paired"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fields", FIELDS)
def test_reconstruction(family: str, mode: str, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    pipe = pipeline(family, dtype)
    pipe.invert(
        pictures(2), generator=ledits.seeded(), inversion=mode, **({"num_inversion_steps": STEPS, "skip": 0.2} | fields)
    )
    assert error(pipe, 2) <= (1e-5 if mode == "exact" else 0.0)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("mode", ["exact", "paired"])
def test_a_batch_gives_what_its_pictures_give_alone(family: str, mode: str) -> None:
    pipe, fields = pipeline(family, torch.float64), {"num_inversion_steps": STEPS, "inversion": mode}

    def edited(images: list[Any], seeds: list[int]) -> Any:
        pipe.invert(images, generator=[ledits.seeded(seed) for seed in seeds], **fields)
        return pipe(editing_prompt=["cat", "dog"], edit_threshold=0.6, output_type="latent")

    both = edited(pictures(2), [0, 1])
    for i in range(2):
        alone = edited(pictures(2)[i : i + 1], [i])
        torch.testing.assert_close(both.images[i : i + 1], alone.images, rtol=1e-6, atol=1e-6)
        assert torch.equal(both.masks[:, :, i : i + 1], alone.masks)


def test_sd3_prompts_are_encoded_as_its_own_pipeline_does() -> None:
    parts = components("sd3", torch.float32)
    own = StableDiffusion3Pipeline(**parts)
    with torch.no_grad():
        expected, _, pooled, _ = own.encode_prompt("cat", None, None, do_classifier_free_guidance=False)
        rows = pipeline().adapter.encode_prompts(PromptRequest(rows=1, prompts=["cat"], wants_tokens=True))
    torch.testing.assert_close(rows.embeds, expected)
    torch.testing.assert_close(rows.extras["pooled"], pooled)
    assert rows.token_weights.nonzero()[:, 1].tolist() == [1, 2, 3, 17, 18, 19]  # CLIP's words, then T5's


def test_joint_attention_mass_is_that_of_the_whole_softmax() -> None:
    pipe = pipeline("sd3", torch.float64)
    adapter, latent_size = pipe.adapter, (16, 24)
    rows = adapter.encode_prompts(PromptRequest(rows=2, prompts=["cat", "dog bite"], wants_tokens=True))
    latents = torch.randn(2, 4, *latent_size, dtype=torch.float64)
    found = []
    from ledits_pipeline import CallContext

    def materialized(attn: Any, hidden_states: Any, encoder_hidden_states: Any, *_: Any, **__: Any) -> None:
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        query = heads(torch.cat([attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states)], dim=1))
        key = heads(torch.cat([attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states)], dim=1))
        whole = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        image = hidden_states.shape[1]
        found.append((whole[:, :, :image, image:] * rows.token_weights[:, None, None].double()).sum(-1).mean(1))

    chosen = [pipe.transformer.transformer_blocks[i].attn for i in (1, 2)]
    handles = [a.register_forward_pre_hook(lambda m, _, k: materialized(m, **k), with_kwargs=True) for a in chosen]
    with torch.no_grad(), adapter.recording(latent_size) as recorder:
        recorder.begin(rows.token_weights, 0)
        adapter.denoise(latents, torch.tensor(500.0), rows, CallContext(size=(32, 48)))
        maps = adapter.attention_maps(recorder, latent_size)
    for handle in handles:
        handle.remove()
    assert maps.shape == (2, 8, 12)
    torch.testing.assert_close(maps.flatten(1), torch.stack(found).mean(0), rtol=1e-6, atol=1e-9)


def test_flux_attention_mass_is_that_of_the_whole_softmax() -> None:
    from diffusers.models.transformers import transformer_flux

    from ledits_pipeline import CallContext

    pipe, latent_size = pipeline("flux", torch.float64), (16, 24)
    adapter = pipe.adapter
    rows = adapter.encode_prompts(PromptRequest(rows=2, prompts=["cat", "dog bite"], wants_tokens=True))
    latents, found = torch.randn(2, 4, *latent_size, dtype=torch.float64), []
    words = rows.embeds.shape[1]

    def look(query: Any, key: Any, value: Any, **fields: Any) -> Any:
        scores = torch.einsum("rqhd,rkhd->rhqk", query, key) / query.shape[-1] ** 0.5
        mass = scores.softmax(-1)[:, :, words:, :words] * rows.token_weights[:, None, None].double()
        found.append(mass.sum(-1).mean(1))
        return attend(query, key, value, **fields)

    attend, transformer_flux.dispatch_attention_fn = transformer_flux.dispatch_attention_fn, look
    try:
        with torch.no_grad(), adapter.recording(latent_size) as recorder:
            recorder.begin(rows.token_weights, 0)
            adapter.denoise(latents, torch.tensor(500.0), rows, CallContext(size=(32, 48)))
            maps = adapter.attention_maps(recorder, latent_size)
    finally:
        transformer_flux.dispatch_attention_fn = attend
    assert recorder.layers == 3
    torch.testing.assert_close(maps.flatten(1), torch.stack(found[:3]).mean(0), rtol=1e-5, atol=1e-8)


def test_flux_tokens_and_prompts_are_those_of_its_own_pipeline() -> None:
    from diffusers import FluxPipeline

    from ledits_pipeline.adapter_flux import image_positions, pack, unpack

    latents = torch.randn(2, 4, 8, 12)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 4, 8, 12))
    assert torch.equal(unpack(pack(latents), 4, 6), latents)
    cpu = torch.device("cpu")
    assert torch.equal(image_positions(4, 6), FluxPipeline._prepare_latent_image_ids(1, 4, 6, cpu, torch.float32))
    own = FluxPipeline(**components("flux", torch.float32))
    with torch.no_grad():
        expected, pooled, _ = own.encode_prompt("cat", None)
        rows = pipeline("flux").adapter.encode_prompts(PromptRequest(rows=1, prompts=["cat"], wants_tokens=True))
    torch.testing.assert_close(rows.embeds, expected)
    torch.testing.assert_close(rows.extras["pooled"], pooled)
    assert rows.token_weights.nonzero()[:, 1].tolist() == [1, 2, 3]


def test_embedded_guidance_is_kept_by_the_inversion() -> None:
    pipe = pipeline("flux")
    fields: dict[str, Any] = {"num_inversion_steps": STEPS, "generator": ledits.seeded()}
    pipe.invert(pictures(1), guidance_scale=1.0, **fields)
    assert error(pipe, 1) <= 1e-5
    assert pipe.inversion.condition.guidance_scale == 1.0
    low = pipe.zs.clone()
    pipe.invert(pictures(1), **(fields | {"generator": ledits.seeded()}))
    assert not torch.equal(low, pipe.zs)


def test_flux_noise_levels_are_those_of_its_own_pipeline() -> None:
    import numpy as np

    pipe = pipeline("flux")
    made = pipe.invert(ledits.picture(64, 64), num_inversion_steps=STEPS, skip=0.0, inversion="paired")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=0.5)  # 256 image tokens: the low end
    torch.testing.assert_close(torch.tensor(made.schedule.sigmas), scheduler.sigmas)


def test_column_mass_is_the_sum_of_probabilities() -> None:
    draw = ledits.seeded(3)
    query, key = torch.randn(2, 3, 5, 8, generator=draw), torch.randn(2, 3, 11, 8, generator=draw)
    weights = torch.rand(2, 11, generator=draw).round()
    expected = ((query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) * weights[:, None, None]).sum(-1).mean(1)
    torch.testing.assert_close(column_mass(query, key, weights), expected)
    assert column_mass(query.bfloat16(), key.bfloat16(), weights).dtype == torch.float32


def test_mask_blocks_can_be_chosen() -> None:
    pipe = pipeline()
    pipe.invert(pictures(1), num_inversion_steps=STEPS, generator=ledits.seeded())
    fields: dict[str, Any] = {"editing_prompt": "cat", "attn_store_steps": [0], "output_type": "latent"}
    middle = pipe(**fields).attention_maps
    pipe.adapter.mask_blocks = [0]
    assert not torch.equal(middle, pipe(**fields).attention_maps)


def test_shifting_by_size_follows_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = pipeline(scheduler=scheduler)
    small = pipe.invert(ledits.picture(32, 32), num_inversion_steps=STEPS, inversion="paired").schedule
    large = pipe.invert(ledits.picture(64, 64), num_inversion_steps=STEPS, inversion="paired").schedule
    assert large.sigmas[1] > small.sigmas[1]
    assert "ledits_tokens" not in scheduler.config
    assert len(scheduler.timesteps) == 1000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inversion": "diffusers"}, r'inversion="diffusers" repeats diffusers\' own pipelines, and there is none for'),
        ({"num_inversion_steps": 600, "skip": 0.5}, r"600 steps with skip 0\.5 need 1200 of the scheduler's 1000\."),
        ({"ip_adapter_image": ledits.picture()}, r"ip_adapter_image is not supported for the family"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline().invert(pictures(1), **({"num_inversion_steps": STEPS} | fields))


def test_schedulers_of_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="scheduler must be a flow-matching one for this family, got DDIMScheduler"):
        pipeline(scheduler=DDIMScheduler()).invert(pictures(1), num_inversion_steps=STEPS)
