"""Stable Diffusion XL: a UNet under two CLIP text encoders, told the sizes of the picture."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from torch import Tensor

from .adapter_sd import UNetAdapter
from .adapters import CallContext, FamilyDefaults, PromptRequest, PromptRows, register_adapter
from .text import clip_token_weights, encode_once, lora_scaled, tokenize


class StableDiffusionXLAdapter(UNetAdapter):
    """Stable Diffusion XL, with both text encoders or only the second."""

    name = "stable-diffusion-xl"
    defaults = FamilyDefaults(num_inversion_steps=50, num_zero_noise_steps=3, use_intersect_mask=False)
    loaders = (StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin, IPAdapterMixin, FromSingleFileMixin)
    callback_tensors: ClassVar[dict[str, tuple[str, str]]] = UNetAdapter.callback_tensors | {
        "add_text_embeds": ("all", "text_embeds"),
        "add_time_ids": ("all", "time_ids"),
        "negative_pooled_prompt_embeds": ("unconditional", "text_embeds"),
    }

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        return pipe.unet is not None and pipe.text_encoder_2 is not None

    def encode_prompts(self, request: PromptRequest) -> PromptRows:
        device, dtype = self.pipe._execution_device, self.denoiser.dtype
        if request.embeds is not None:
            return self._given_rows(request, device, dtype)
        texts = list(request.prompts or [""] * request.rows)
        others = list(request.prompts_2 or texts)
        skip = None if request.is_negative else request.clip_skip
        parts, pooled, tokens = [], None, None
        with lora_scaled([self.pipe.text_encoder, self.pipe.text_encoder_2], request.lora_scale):
            for tokenizer, encoder, prompts in self._encoders(texts, others):
                converted = self.pipe.maybe_convert_prompt(prompts, tokenizer)
                tokens = tokenize(tokenizer, converted, warn=not request.is_negative)
                hidden, pooled = self._encode(tokens, encoder, skip)
                parts.append(hidden)
        embeds = torch.cat(parts, dim=-1).to(device, dtype)
        assert pooled is not None
        pooled = pooled.to(device, dtype)
        if request.is_negative and request.prompts is None and self.pipe.config.force_zeros_for_empty_prompt:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        weights = clip_token_weights(request, tokens, len(texts), embeds.shape[1], device)
        return PromptRows(embeds, {"text_embeds": pooled}, weights)

    def _given_rows(self, request: PromptRequest, device: torch.device, dtype: torch.dtype) -> PromptRows:
        assert request.embeds is not None
        if request.pooled is None:
            which = "negative_prompt_embeds" if request.is_negative else "editing_prompt_embeds"
            other = "negative_pooled_prompt_embeds" if request.is_negative else "editing_pooled_prompt_embeds"
            raise ValueError(f"{which} needs {other} with it: this model reads both.")
        embeds, pooled = request.embeds.to(device, dtype), request.pooled.to(device, dtype)
        if embeds.shape[0] == 1:
            embeds, pooled = embeds.expand(request.rows, -1, -1), pooled.expand(request.rows, -1)
        weights = clip_token_weights(request, None, embeds.shape[0], embeds.shape[1], device)
        return PromptRows(embeds, {"text_embeds": pooled}, weights)

    def _encoders(self, texts: list[str], others: list[str]) -> list[tuple[Any, Any, list[str]]]:
        pipe = self.pipe
        second = (pipe.tokenizer_2, pipe.text_encoder_2, others)
        return [second] if pipe.text_encoder is None else [(pipe.tokenizer, pipe.text_encoder, texts), second]

    def _encode(self, tokens: Sequence[Any], encoder: Any, clip_skip: int | None) -> tuple[Tensor, Tensor]:
        layer = -2 if clip_skip is None else -(clip_skip + 2)
        device = self.pipe._execution_device

        def outputs(row: Any) -> tuple[Tensor, Tensor]:
            found = encoder(row["input_ids"].to(device), output_hidden_states=True)
            return found.hidden_states[layer], found[0]

        hidden, pooled = encode_once(tokens, outputs)
        return hidden, pooled

    def with_context(self, prompts: PromptRows, context: CallContext) -> PromptRows:
        # diffusers' pipeline tells the model (width, height) where it was trained on (height, width)
        size = context.size[::-1] if context.as_diffusers else context.size
        ids = torch.tensor([[*size, *context.crops_coords_top_left, *size]])
        prompts = super().with_context(prompts, context)
        return prompts.with_value("time_ids", ids.to(prompts.embeds).expand(len(prompts), -1))

    def added_conditions(self, prompts: PromptRows, context: CallContext) -> dict[str, Any]:
        return {"text_embeds": prompts.extras["text_embeds"], "time_ids": prompts.extras["time_ids"]}

    def check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        from diffusers.utils import is_invisible_watermark_available

        wanted = self.pipe.config.add_watermarker
        if wanted is None:
            wanted = is_invisible_watermark_available()
        if wanted:
            from diffusers.pipelines.stable_diffusion_xl.watermark import StableDiffusionXLWatermarker

            pixels = StableDiffusionXLWatermarker().apply_watermark(pixels)
        return pixels, None


for _pipeline in (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LEditsPPPipelineStableDiffusionXL",
    "LEditsPipelineSDXL",
):
    register_adapter(_pipeline, StableDiffusionXLAdapter)
