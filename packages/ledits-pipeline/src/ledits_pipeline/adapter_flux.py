"""Flux: latents packed two by two, T5 words before the picture in one rotated sequence, guidance as an input."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.loaders import FluxIPAdapterMixin, FluxLoraLoaderMixin, FromSingleFileMixin, TextualInversionLoaderMixin
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from .adapter_sd3 import FlowTransformerAdapter, word_columns
from .adapters import CallContext, FamilyAdapter, FamilyDefaults, PromptRequest, PromptRows, register_adapter
from .attention import MassRecorder, column_mass
from .text import clip_token_weights, encode_once, lora_scaled, tokenize


class TextFirstRecording:
    """Wraps a joint attention processor whose sequence is [text, image]: records, then lets the inner one work."""

    def __init__(self, inner: Any, recorder: MassRecorder) -> None:
        self.inner = inner
        self.recorder = recorder

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
        **kwargs: Any,
    ) -> Any:
        if self.recorder.is_recording and encoder_hidden_states is not None:
            image, text = self.recorder.rows(hidden_states), self.recorder.rows(encoder_hidden_states)
            self._record(attn, image, text, image_rotary_emb)
        given = {"ip_hidden_states": ip_hidden_states, "ip_adapter_masks": ip_adapter_masks}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs)

    def _record(self, attn: Any, image: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None) -> None:
        query = attn.norm_q(attn.to_q(image).unflatten(-1, (-1, attn.head_dim)))  # [R, Q, H, d]
        key = attn.norm_k(attn.to_k(image).unflatten(-1, (-1, attn.head_dim)))
        words = attn.norm_added_k(attn.add_k_proj(text).unflatten(-1, (-1, attn.head_dim)))
        key = torch.cat([words, key], dim=1)
        if rotary is not None:
            start = text.shape[1]
            query = apply_rotary_emb(query, (rotary[0][start:], rotary[1][start:]), sequence_dim=1)
            key = apply_rotary_emb(key, rotary, sequence_dim=1)
        weights = self.recorder.weights(0, image.shape[1])
        self.recorder.add(column_mass(query.transpose(1, 2), key.transpose(1, 2), weights))


class FluxAdapter(FlowTransformerAdapter):
    """Flux, guidance-distilled or not."""

    name = "flux"
    defaults = FamilyDefaults(num_inversion_steps=28)
    loaders = (FluxLoraLoaderMixin, FluxIPAdapterMixin, TextualInversionLoaderMixin, FromSingleFileMixin)
    recorder_wrapper = TextFirstRecording
    patch_size = 2
    has_even_sigmas = True
    max_t5_tokens = 512
    default_guidance = 3.5
    callback_tensors: ClassVar[dict[str, tuple[str, str]]] = FamilyAdapter.callback_tensors | {
        "pooled_prompt_embeds": ("all", "pooled"),
        "negative_pooled_prompt_embeds": ("unconditional", "pooled"),
    }

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        return cls.is_denoiser(pipe.transformer, "FluxTransformer2DModel")

    def encode_prompts(self, request: PromptRequest) -> PromptRows:
        pipe, device, dtype = self.pipe, self.pipe._execution_device, self.denoiser.dtype
        if request.embeds is not None:
            return self.given_rows(request, device, dtype)
        texts = list(request.prompts or [""] * request.rows)
        tokens = tokenize(pipe.tokenizer, pipe.maybe_convert_prompt(texts, pipe.tokenizer), warn=False)
        words = pipe.maybe_convert_prompt(list(request.prompts_2 or texts), pipe.tokenizer_2)
        rows = tokenize(pipe.tokenizer_2, words, max_length=self.max_t5_tokens, warn=not request.is_negative)
        with lora_scaled([pipe.text_encoder, pipe.text_encoder_2], request.lora_scale):
            (pooled,) = encode_once(tokens, lambda row: (pipe.text_encoder(row["input_ids"].to(device)).pooler_output,))
            (embeds,) = encode_once(rows, lambda row: (pipe.text_encoder_2(row["input_ids"].to(device))[0],))
        weights = None
        if request.wants_tokens and request.token_spans is None:
            weights = word_columns(pipe.tokenizer_2, rows).to(device)
        elif request.wants_tokens:
            weights = clip_token_weights(request, None, len(texts), embeds.shape[1], device)
        return PromptRows(embeds.to(device, dtype), {"pooled": pooled.to(device, dtype)}, weights)

    def denoise(self, latents: Tensor, timesteps: Tensor, prompts: PromptRows, context: CallContext) -> Tensor:
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        guidance = None
        if self.denoiser.config.guidance_embeds:
            value = self.default_guidance if context.guidance is None else context.guidance
            guidance = torch.full((latents.shape[0],), value, device=latents.device, dtype=torch.float32)
        output = self.denoiser(
            hidden_states=pack(latents.to(self.denoiser.dtype)),
            timestep=(timesteps / 1000).expand(latents.shape[0]).to(self.denoiser.dtype),
            guidance=guidance,
            pooled_projections=prompts.extras["pooled"],
            encoder_hidden_states=prompts.embeds,
            txt_ids=prompts.embeds.new_zeros(prompts.embeds.shape[1], 3),
            img_ids=image_positions(height, width).to(prompts.embeds),
            joint_attention_kwargs=context.attention_kwargs,
            return_dict=False,
        )[0]
        return unpack(output, height, width)


def pack(latents: Tensor) -> Tensor:
    """`[R, C, h, w]` to tokens of two by two positions, `[R, h * w / 4, 4 * C]`."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for `height` by `width` tokens."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


def image_positions(height: int, width: int) -> Tensor:
    """`[height * width, 3]`: 0, row and column of every token."""
    rows, columns = torch.arange(height), torch.arange(width)
    grid = torch.cartesian_prod(rows, columns).float()
    return F.pad(grid, (1, 0))


for _pipeline in ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "LEditsPipelineFlux"):
    register_adapter(_pipeline, FluxAdapter)
