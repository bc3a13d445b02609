"""Editing with Stable Diffusion 3 and Flux: model calls as in their own pipelines, masks, what stays as it was."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("ledits_pipeline")

from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from torch import Tensor
from transformers import T5TokenizerFast

from ledits_pipeline import CallContext, LEditsInversion, LEditsPipeline, PromptRequest
from ledits_pipeline.subclasses import LEditsPipelineFlux, LEditsPipelineSD3
from tests.support import ledits

STEPS = 4
OWN = {"sd3": StableDiffusion3Img2ImgPipeline, "flux": FluxImg2ImgPipeline}
THIN = {"sd3": LEditsPipelineSD3, "flux": LEditsPipelineFlux}
both_families = pytest.mark.parametrize("family", ["sd3", "flux"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@functools.cache
def components(family: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"sd3": ledits.sd3_components, "flux": ledits.flux_components}[family](dtype=dtype)


def pipeline(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> LEditsPipeline:
    pipe = LEditsPipeline(**(components(family, dtype) | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def invert(pipe: LEditsPipeline, **fields: Any) -> LEditsInversion:
    settings = {"num_inversion_steps": STEPS, "skip": 0.2, "generator": ledits.seeded()}
    return pipe.invert(ledits.picture(32, 48), **(settings | fields))


def clean(pipe: LEditsPipeline) -> Tensor:
    with torch.no_grad():
        return pipe.adapter.encode_image(pipe.image_processor.preprocess(ledits.picture(32, 48)))


@both_families
@pytest.mark.parametrize(
    "settings",
    [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}],
    ids=["shift", "dynamic", "dynamic-linear"],
)
def test_steps_and_model_calls_are_those_of_the_familys_own_pipeline(family: str, settings: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(base_image_seq_len=8, max_image_seq_len=96, **settings)
    own, pipe = OWN[family](**(components(family, torch.float32) | {"scheduler": scheduler})), pipeline(family)
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler.config))
    own.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []
    handle = own.transformer.register_forward_hook(
        lambda _, __, given, result: calls.append(given | {"result": result[0]}), with_kwargs=True
    )
    asked: dict[str, Any] = {"num_inference_steps": 5, "strength": 0.8, "guidance_scale": 1.0, "output_type": "latent"}
    own("cat", image=ledits.picture(32, 48), height=32, width=48, generator=ledits.seeded(), **asked)
    handle.remove()

    made = invert(pipe, inversion="paired").schedule
    torch.testing.assert_close(torch.tensor(made.sigmas), own.scheduler.sigmas[-STEPS - 1 :])
    torch.testing.assert_close(made.timesteps.float(), own.scheduler.timesteps[-STEPS:])
    rows = pipe.adapter.encode_prompts(PromptRequest(rows=1, prompts=["cat"]))
    context = CallContext(size=(32, 48), guidance=1.0 if family == "flux" else None)
    assert len(calls) == STEPS
    for call, time in zip(calls, made.timesteps, strict=True):
        state, expected = call["hidden_states"], call["result"]
        if family == "flux":
            state, expected = (OWN["flux"]._unpack_latents(x, 32, 48, own.vae_scale_factor) for x in (state, expected))
        with torch.no_grad():
            found = pipe.adapter.denoise(state, time, rows, context)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@both_families
@both_dtypes
@pytest.mark.parametrize("mode", ["exact", "paired"])
def test_several_masked_edits(family: str, dtype: torch.dtype, mode: str) -> None:
    pipe = pipeline(family, dtype)
    invert(pipe, inversion=mode)
    out = pipe(
        editing_prompt=["cat", "dog bite"],
        edit_guidance_scale=[6.0, 4.0],
        edit_threshold=[0.5, 0.8],
        edit_warmup_steps=[0, 1],
        reverse_editing_direction=[False, True],
        output_type="latent",
    )
    share = out.masks.float().mean(dim=(2, 3, 4))
    assert torch.isfinite(out.images).all()
    assert out.masks.shape == (STEPS, 2, 1, 16, 24)
    assert share[1, 1] > 0.0
    assert share[0, 1] == 0.0  # still warming up
    assert (share[:, 0] <= 0.5 + 1 / 96).all()
    assert (share[:, 1] <= 0.2 + 1 / 96).all()
    assert (out.images - clean(pipe).to(out.images)).abs().max() > 1e-2


@both_families
@both_dtypes
def test_paired_edits_that_do_nothing_change_nothing(family: str, dtype: torch.dtype) -> None:
    pipe = pipeline(family, dtype)
    invert(pipe, inversion="paired")
    start = clean(pipe).to(pipe.adapter.state_dtype)
    for nothing in ({"edit_guidance_scale": 0.0}, {"user_mask": torch.zeros(16, 24)}):
        out = pipe(editing_prompt=["cat", "dog"], output_type="latent", **nothing)
        assert torch.equal(out.images, start)


@both_families
def test_attention_masks_are_as_dense_as_asked(family: str) -> None:
    pipe = pipeline(family)
    invert(pipe)
    out = pipe(
        editing_prompt="cat", edit_threshold=0.75, use_cross_attn_mask=True, use_intersect_mask=False, output_type="np"
    )
    tokens = out.masks[..., ::2, ::2]
    assert torch.equal(tokens.repeat_interleave(2, -1).repeat_interleave(2, -2), out.masks)  # one bit per token
    assert (tokens.float().mean(dim=(2, 3, 4)) - 0.25).abs().max() <= 1 / 96


@both_families
def test_processors_and_scheduler_stay_what_they_were(family: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    before = {name: repr(value) for name, value in vars(scheduler).items()}
    pipe = pipeline(family, scheduler=scheduler)
    processors = dict(pipe.transformer.attn_processors)
    invert(pipe)
    pipe(editing_prompt="cat", output_type="latent")

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        pipe(editing_prompt="cat", callback_on_step_end=fail)
    after = pipe.transformer.attn_processors
    assert after.keys() == processors.keys()
    assert all(after[name] is processors[name] for name in after)
    assert {name: repr(value) for name, value in vars(scheduler).items()} == before


@both_families
def test_words_of_a_tokenizer_without_start_token_count(family: str) -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in "abcdefghijkl")]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=8)
    pipe = pipeline(family, **{"tokenizer_3" if family == "sd3" else "tokenizer_2": tokenizer})
    request = PromptRequest(rows=2, prompts=["cab", "a"], wants_tokens=True)
    start = ledits.LENGTH if family == "sd3" else 0
    weights = pipe.adapter.encode_prompts(request).token_weights[:, start:]
    count = [len(tokenizer(text)["input_ids"]) - 1 for text in ("cab", "a")]  # without the end
    assert [row.nonzero().flatten().tolist() for row in weights] == [list(range(n)) for n in count]


def test_stable_diffusion_3_without_t5() -> None:
    without: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    pipe, pipe_parts = pipeline("sd3", **without), components("sd3", torch.float32) | without
    invert(pipe)
    assert (pipe(output_type="latent").images - clean(pipe)).abs().max() <= 1e-5
    assert pipe(editing_prompt="cat", output_type="latent").masks.any()
    own = StableDiffusion3Img2ImgPipeline(**pipe_parts)
    with torch.no_grad():
        expected, _, _, _ = own.encode_prompt("cat", None, None, do_classifier_free_guidance=False)
        rows = pipe.adapter.encode_prompts(PromptRequest(rows=1, prompts=["cat"], wants_tokens=True))
    torch.testing.assert_close(rows.embeds, expected)
    assert rows.token_weights.nonzero()[:, 1].tolist() == [1, 2, 3]


@both_families
def test_a_compiled_transformer_is_recognized(family: str) -> None:
    compiled = torch.compile(components(family, torch.float32)["transformer"], backend="eager")
    adapter = pipeline(family, transformer=compiled).adapter
    assert type(adapter) is type(pipeline(family).adapter)
    with adapter.recording((16, 24)) as recorder:
        assert recorder.layers > 0


def test_every_row_of_a_distilled_model_gets_the_same_guidance() -> None:
    pipe, seen = pipeline("flux"), []
    invert(pipe, guidance_scale=2.0)
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["guidance"]), with_kwargs=True
    )
    pipe(editing_prompt=["cat", "dog"], output_type="latent")
    handle.remove()
    assert all(torch.equal(values, torch.full((3,), 2.0)) for values in seen)
    undistilled = LEditsPipeline(**ledits.flux_components(guidance_embeds=False))
    undistilled.set_progress_bar_config(disable=True)
    invert(undistilled)
    assert (undistilled(output_type="latent").images - clean(undistilled)).abs().max() <= 1e-5


@both_families
def test_saved_inversions_and_thin_pipelines(family: str, tmp_path: Path) -> None:
    whole = pipeline(family)
    invert(whole).save_pretrained(tmp_path)
    thin = THIN[family].from_pipe(OWN[family](**components(family, torch.float32)))
    thin.set_progress_bar_config(disable=True)
    fields: dict[str, Any] = {"editing_prompt": "cat", "output_type": "latent"}
    again = thin(inversion=LEditsInversion.from_pretrained(tmp_path), **fields)
    assert torch.equal(again.images, whole(**fields).images)
    assert thin.transformer is whole.transformer


@both_families
def test_embeddings_need_their_pooled_ones(family: str) -> None:
    pipe = pipeline(family)
    invert(pipe)
    with torch.no_grad():  # attention takes other kernels with gradients
        rows = pipe.adapter.encode_prompts(PromptRequest(rows=1, prompts=["cat"]))
    with pytest.raises(ValueError, match="editing_prompt_embeds needs editing_pooled_prompt_embeds with it"):
        pipe(editing_prompt_embeds=rows.embeds)
    span = [[1, 2, 3, 17, 18, 19] if family == "sd3" else [1, 2, 3]]
    given = pipe(
        editing_prompt_embeds=rows.embeds,
        editing_pooled_prompt_embeds=rows.extras["pooled"],
        editing_token_spans=span,
        output_type="latent",
    )
    assert torch.equal(given.images, pipe(editing_prompt="cat", output_type="latent").images)
