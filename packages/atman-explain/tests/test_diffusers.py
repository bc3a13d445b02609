"""Factors per text token in the cross-attention of diffusion models."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from atman_explain import UnsupportedModelError

diffusers = pytest.importorskip("diffusers")

from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor2_0  # noqa: E402

from atman_explain.integrations.diffusers import AtManAttnProcessor, suppress_text  # noqa: E402

L = 7  # text tokens
MODES = ("shift_min", "log_additive", "multiply", "shift_min_all")


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    ).eval()
    for module in cross_attention(model):
        module.to_k.weight.data *= 8  # scores that differ: attention, and so its suppression, makes a difference
        module.to_out[0].weight.data *= 20
    return model


def cross_attention(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("attn2")]


@torch.no_grad()
def run(unet: Any, batch: int = 2, **inputs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    text = torch.randn(batch, L, 12, generator=generator)
    return unet(sample, 5, encoder_hidden_states=text, **inputs).sample


def test_factors_of_one_change_nothing(unet):
    plain = run(unet)
    for mode in MODES:
        with suppress_text(unet, torch.ones(L), mode=mode):
            torch.testing.assert_close(run(unet), plain, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_factor_changes_the_output_and_leaves_no_trace(unet, mode):
    plain = run(unet)
    with suppress_text(unet, torch.tensor([1.0, 0.1]), mode=mode):
        assert (run(unet) - plain).abs().max() > 1e-3
    assert torch.equal(run(unet), plain)


def test_log_additive_zero_is_a_masked_token(unet):
    mask = torch.ones(2, L)
    mask[:, 3] = 0
    masked = run(unet, encoder_attention_mask=mask)
    assert (masked - run(unet)).abs().max() > 1e-3
    with suppress_text(unet, mask[0], mode="log_additive"):
        torch.testing.assert_close(run(unet), masked, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("mode", ["shift_min", "log_additive", "multiply"])
def test_masked_tokens_do_not_count(unet, mode):
    mask = torch.ones(2, L)
    mask[:, 5:] = 0
    factors = torch.tensor([1.0, 0.3, 1.0, 2.0, 1.0, 1.0, 1.0])
    with suppress_text(unet, factors, mode=mode):
        masked = run(unet, encoder_attention_mask=mask)
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, L, 12, generator=generator)
    with suppress_text(unet, factors[:5], mode=mode), torch.no_grad():
        shorter = unet(sample, 5, encoder_hidden_states=text[:, :5]).sample
    torch.testing.assert_close(masked, shorter, rtol=0.0, atol=1e-5)


def test_rows_of_factors_belong_to_rows_that_follow_each_other(unet):
    factors = torch.ones(2, L)
    factors[1, 2] = 0.0
    plain = run(unet, batch=4)
    with suppress_text(unet, factors):
        both = run(unet, batch=4)
    with suppress_text(unet, factors[1]):
        second = run(unet, batch=4)
    torch.testing.assert_close(both[:2], plain[:2], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(both[2:], second[2:], rtol=0.0, atol=1e-6)
    assert (both[2:] - plain[2:]).abs().max() > 1e-3


def test_guidance_keeps_the_unconditional_half(unet):
    factors = torch.tensor([1.0, 0.0, 3.0])
    plain = run(unet)
    with suppress_text(unet, factors, is_guided=True):
        guided = run(unet)
    with suppress_text(unet, factors):
        everywhere = run(unet)
    torch.testing.assert_close(guided[:1], plain[:1], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(guided[1:], everywhere[1:], rtol=0.0, atol=1e-6)
    assert (everywhere[:1] - plain[:1]).abs().max() > 1e-3


def test_factors_by_cross_attention_kwargs(unet, caplog):
    factors = torch.tensor([1.0, 0.1, 1.0, 1.0, 2.0])
    with suppress_text(unet, factors):
        expected = run(unet)
    plain = run(unet)
    diffusers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            ignored = run(unet, cross_attention_kwargs={"atman_factors": factors})
            assert "atman_factors" in caplog.text, "diffusers says when a processor does not take factors"
            caplog.clear()
            unet.set_attn_processor(AtManAttnProcessor())
            taken = run(unet, cross_attention_kwargs={"atman_factors": factors})
            without = run(unet)
            assert not caplog.text
    finally:
        unet.set_attn_processor(AttnProcessor2_0())
        diffusers.utils.logging.disable_propagation()
    assert torch.equal(ignored, plain)
    assert torch.equal(without, plain)
    assert torch.equal(taken, expected)


def test_factors_of_a_call_multiply_those_of_the_processor(unet):
    factors = torch.tensor([1.0, 0.5, 3.0])
    with suppress_text(unet, factors * factors):
        expected = run(unet)
    unet.set_attn_processor(AtManAttnProcessor(factors))
    try:
        torch.testing.assert_close(run(unet, cross_attention_kwargs={"atman_factors": factors}), expected)
    finally:
        unet.set_attn_processor(AttnProcessor2_0())


def test_only_cross_attention_is_replaced(unet):
    with suppress_text(unet, torch.ones(2)):
        changed = [name for name, each in unet.attn_processors.items() if isinstance(each, AtManAttnProcessor)]
    assert len(changed) == len(cross_attention(unet))
    assert all("attn2" in name for name in changed)


def test_processors_come_back_after_an_exception(unet):
    before = unet.attn_processors
    with pytest.raises(TypeError), suppress_text(unet, torch.ones(2)):
        unet()
    assert unet.attn_processors == before


def test_half_precision(unet):
    text = torch.randn(1, L, 12)
    module = cross_attention(unet)[0]
    states = torch.randn(1, 16, module.to_q.in_features)
    processor = AtManAttnProcessor(torch.tensor([1.0, 0.1]))
    with torch.no_grad():
        exact = processor(module, states, text)
        try:
            out = processor(module.to(torch.bfloat16), states.bfloat16(), text.bfloat16())
        finally:
            module.float()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=5e-2, atol=5e-2 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (torch.tensor([1.0, -0.5]), r"factors must be finite and not negative, got -0.5"),
        (torch.tensor([1.0, torch.nan]), r"factors must be finite and not negative, got nan"),
        (torch.ones(1, 1, 1), r"factors must be \[tokens\] or \[rows, tokens\], got the shape \[1, 1, 1\]"),
        (torch.ones(0), r"factors must be \[tokens\] or \[rows, tokens\], got the shape \[0\]"),
    ],
)
def test_bad_factors_are_refused(unet, factors, message):
    with pytest.raises(ValueError, match=message), suppress_text(unet, factors):
        pass


@pytest.mark.parametrize("factors", [torch.ones(3, L), torch.ones(L + 1)], ids=["rows", "tokens"])
def test_factors_that_do_not_fit_the_batch_are_refused(unet, factors):
    with suppress_text(unet, factors), pytest.raises(ValueError, match="but the model runs 2 rows, of 7 text tokens"):
        run(unet)


def test_unknown_mode_is_refused(unet):
    with pytest.raises(ValueError, match=r"mode must be one of \('shift_min'.*got 'min'"):
        AtManAttnProcessor(mode="min")


def test_models_without_cross_attention_are_refused():
    with (
        pytest.raises(UnsupportedModelError, match="Linear has no cross-attention to text"),
        suppress_text(torch.nn.Linear(2, 2), torch.ones(2)),
    ):
        pass


def test_other_processors_are_not_replaced(unet):
    with (
        suppress_text(unet, torch.ones(2)),
        pytest.raises(UnsupportedModelError, match="computes cross-attention by AtManAttnProcessor"),
        suppress_text(unet, torch.ones(2)),
    ):
        pass


def test_a_pipeline_that_does_not_tell_is_asked_about_guidance(unet):
    class Pipeline:
        def __init__(self) -> None:
            self.unet = unet

    with (
        pytest.raises(ValueError, match="is_guided must be said for Pipeline"),
        suppress_text(Pipeline(), torch.ones(2)),
    ):
        pass


@pytest.fixture(scope="module")
def pipeline(unet) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, guidance: float, negative: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(1, L, 12, generator=generator)
    negative = torch.randn(1, L, 12, generator=generator) if negative is None else negative
    return torch.from_numpy(
        pipe(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            guidance_scale=guidance,
            num_inference_steps=2,
            num_images_per_prompt=2,
            height=8,
            width=8,
            generator=generator,
            output_type="np",
        ).images
    )


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["unguided", "guided"])
def test_pipeline(pipeline, guidance):
    plain = picture(pipeline, guidance)
    with suppress_text(pipeline, torch.ones(L)):
        torch.testing.assert_close(picture(pipeline, guidance), plain, rtol=0.0, atol=1e-5)
    with suppress_text(pipeline, torch.tensor([1.0, 0.0, 0.0]), mode="log_additive"):
        changed = picture(pipeline, guidance)
    assert (changed - plain).abs().max() > 1e-3
