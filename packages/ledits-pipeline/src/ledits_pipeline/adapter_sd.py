"""Stable Diffusion 1.x and 2.x: a UNet under one CLIP text encoder."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.loaders import (
    FromSingleFileMixin,
    IPAdapterMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from torch import Tensor, nn

from .adapters import CallContext, FamilyAdapter, FamilyDefaults, PromptRequest, PromptRows, register_adapter
from .attention import CrossAttentionRecording, MassRecorder, recording
from .image_conditions import control_pixels, image_conditions, image_embeddings
from .schedules import editing_scheduler, gaussian_schedule
from .solver import Schedule, SolverName
from .text import clip_token_weights, encode_once, lora_scaled, tokenize
from .vae import decode_latents, encode_pixels

_CROSS_ATTENTION = re.compile(r"(down|up)_blocks\.(\d+)\..*attn2$")


class UNetAdapter(FamilyAdapter):
    """What every UNet with cross-attention shares."""

    scheduler_settings: ClassVar[dict[str, Any]] = {}

    def editing_scheduler(self, height: int, width: int) -> DDIMScheduler | DPMSolverMultistepScheduler:
        return editing_scheduler(self.pipe.scheduler, **self.scheduler_settings)

    def schedule(self, scheduler: Any, steps: int, skip: float, *, solver: SolverName | None, eta: float) -> Schedule:
        return gaussian_schedule(scheduler, steps, skip, solver=solver, eta=eta)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode_pixels(self.pipe.vae, pixels, self.pipe._execution_device)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.pipe.vae, latents)

    def denoise(self, latents: Tensor, timesteps: Tensor, prompts: PromptRows, context: CallContext) -> Tensor:
        inputs = latents.to(self.denoiser.dtype)
        added = self.added_conditions(prompts, context)
        return self.denoiser(
            inputs,
            timesteps,
            encoder_hidden_states=prompts.embeds,
            cross_attention_kwargs=context.attention_kwargs,
            added_cond_kwargs=added | image_conditions(prompts) or None,
            return_dict=False,
            **self._controls(inputs, timesteps, prompts, added, context),
        )[0]

    def _controls(
        self, inputs: Tensor, timesteps: Tensor, prompts: PromptRows, added: dict[str, Any], context: CallContext
    ) -> dict[str, Any]:
        if "control_image" not in prompts.extras:
            return {}
        down, middle = self.pipe.controlnet(
            inputs,
            timesteps,
            encoder_hidden_states=prompts.embeds,
            controlnet_cond=prompts.extras["control_image"],
            conditioning_scale=context.control_scale,
            added_cond_kwargs=added or None,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def added_conditions(self, prompts: PromptRows, context: CallContext) -> dict[str, Any]:
        """The family's part of the UNet's `added_cond_kwargs`."""
        return {}

    def row_extras(self, size: tuple[int, int], batch: int, **inputs: Any) -> dict[str, Tensor]:
        found = image_embeddings(self.pipe, inputs.pop("ip_adapter_image"), inputs.pop("ip_adapter_image_embeds"))
        control = inputs.pop("control_image")
        if control is not None:
            found["control_image"] = control_pixels(self.pipe, control, size, batch)
        return found | super().row_extras(size, batch, **inputs)

    @contextmanager
    def recording(self, latent_size: tuple[int, int]) -> Iterator[MassRecorder]:
        layers, grid = mask_layers(self.denoiser, latent_size, self.mask_grid(latent_size))
        recorder = MassRecorder(grid, len(layers), self.state_dtype)
        with recording(layers, CrossAttentionRecording, recorder):
            yield recorder

    def attention_maps(self, recorder: MassRecorder, latent_size: tuple[int, int]) -> Tensor:
        maps, wanted = recorder.maps(), self.mask_grid(latent_size)
        if recorder.grid == wanted:
            return maps
        if recorder.grid[0] > wanted[0]:
            return F.adaptive_avg_pool2d(maps, wanted)
        return F.interpolate(maps[:, None], size=wanted, mode="bilinear", align_corners=False)[:, 0]


def mask_layers(
    unet: Any, latent_size: tuple[int, int], wanted: tuple[int, int]
) -> tuple[list[nn.Module], tuple[int, int]]:
    """The cross-attention layers that M1 is read from, and their grid.

    Those of down and up blocks on the wanted grid (a quarter of the latents); a UNet without any gives its largest
    coarser ones, or else its smallest finer ones.
    """
    by_level: dict[int, list[nn.Module]] = {}
    levels = len(unet.config.block_out_channels)
    for name, module in unet.named_modules():
        if found := _CROSS_ATTENTION.search(name):
            index = int(found[2])
            by_level.setdefault(index if found[1] == "down" else levels - 1 - index, []).append(module)
    if not by_level:
        raise ValueError(
            "the UNet has no cross-attention in its down and up blocks to read masks from; "
            "pass use_cross_attn_mask=False and use_intersect_mask=False."
        )
    grids = {level: tuple(-(-side // 2**level) for side in latent_size) for level in by_level}
    count = wanted[0] * wanted[1]
    small_enough = [level for level, (h, w) in grids.items() if h * w <= count]
    level = min(small_enough) if small_enough else max(grids)
    return by_level[level], (grids[level][0], grids[level][1])


class StableDiffusionAdapter(UNetAdapter):
    """Stable Diffusion 1.x and 2.x."""

    name = "stable-diffusion"
    defaults = FamilyDefaults(num_inversion_steps=30, use_intersect_mask=True, attention_only_above=800)
    loaders = (StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin, IPAdapterMixin, FromSingleFileMixin)
    # diffusers' pipelines correct these two in old scheduler files, too
    scheduler_settings: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        return pipe.unet is not None and getattr(pipe, "text_encoder_2", None) is None

    def encode_prompts(self, request: PromptRequest) -> PromptRows:
        pipe, device = self.pipe, self.pipe._execution_device
        if request.embeds is not None:
            embeds = request.embeds.to(device, self.denoiser.dtype)
            embeds = embeds.expand(request.rows, -1, -1) if embeds.shape[0] == 1 else embeds
            weights = clip_token_weights(request, None, embeds.shape[0], embeds.shape[1], device)
            return PromptRows(embeds, {}, weights)
        texts = self.converted(request.prompts or [""] * request.rows, pipe.tokenizer)
        tokens = tokenize(pipe.tokenizer, texts, warn=not request.is_negative)
        skip = None if request.is_negative else request.clip_skip
        with lora_scaled([pipe.text_encoder], request.lora_scale):
            (embeds,) = encode_once(tokens, lambda row: (self._encode_row(row, skip),))
        weights = clip_token_weights(request, tokens, len(texts), embeds.shape[1], device)
        return PromptRows(embeds.to(device, self.denoiser.dtype), {}, weights)

    def converted(self, prompts: Sequence[str], tokenizer: Any) -> list[str]:
        """Prompts with textual-inversion words spelled out."""
        return self.pipe.maybe_convert_prompt(list(prompts), tokenizer)

    def check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        pipe = self.pipe
        if pipe.safety_checker is None:
            return pixels, None
        shown = pipe.image_processor.postprocess(pixels, output_type="pil")
        seen = pipe.feature_extractor(shown, return_tensors="pt").pixel_values
        seen = seen.to(pipe._execution_device, pipe.safety_checker.dtype)
        return pipe.safety_checker(images=pixels, clip_input=seen)

    def _encode_row(self, row: Any, clip_skip: int | None) -> Tensor:
        encoder = self.pipe.text_encoder
        ids = row["input_ids"].to(self.pipe._execution_device)
        attend = row["attention_mask"].to(ids.device) if getattr(encoder.config, "use_attention_mask", False) else None
        if clip_skip is None:
            return encoder(ids, attention_mask=attend)[0]
        hidden = encoder(ids, attention_mask=attend, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
        return getattr(encoder, "text_model", encoder).final_layer_norm(hidden)


for _pipeline in (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LEditsPPPipelineStableDiffusion",
    "LEditsPipelineSD",
):
    register_adapter(_pipeline, StableDiffusionAdapter)
