"""Stable Diffusion 3 and 3.5: a transformer in which picture and text attend to each other."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders import FromSingleFileMixin, SD3IPAdapterMixin, SD3LoraLoaderMixin
from torch import Tensor

from .adapters import CallContext, FamilyAdapter, FamilyDefaults, PromptRequest, PromptRows, register_adapter
from .attention import MassRecorder, column_mass, recording, split_heads
from .flow_schedules import flow_schedule, flow_scheduler
from .solver import Schedule, SolverName
from .text import clip_token_weights, encode_once, lora_scaled, tokenize
from .vae import decode_latents, encode_pixels

_JOINT_BLOCK = re.compile(r"(?:^|\.)transformer_blocks\.(\d+)\.attn$")


class FlowTransformerAdapter(FamilyAdapter):
    """What flow-matching transformers with joint attention share."""

    denoiser_name = "transformer"
    recorder_wrapper: ClassVar[type]
    has_even_sigmas: ClassVar[bool] = False
    """Noise levels are evenly spaced before shifting, from 1 on."""
    mask_blocks: Sequence[int] | None = None
    """Joint blocks that M1 is read from; None: the middle half. Set it on the pipeline's adapter to change it."""

    @staticmethod
    def is_denoiser(model: Any, class_name: str) -> bool:
        """Whether the model, or what was compiled to it, is of the class."""
        return type(getattr(model, "_orig_mod", model)).__name__ == class_name

    @property
    def patch_size(self) -> int:
        """Latent positions per token along a side."""
        return int(self.denoiser.config.patch_size)

    @property
    def size_multiple(self) -> int:  # type: ignore[override]
        return self.patch_size

    def editing_scheduler(self, height: int, width: int) -> FlowMatchEulerDiscreteScheduler:
        private = flow_scheduler(self.pipe.scheduler)
        side = self.vae_scale_factor * self.patch_size
        # dynamic shifting needs it in `schedule`; only this private copy carries it
        private.register_to_config(ledits_tokens=(height // side) * (width // side))
        return private

    def schedule(self, scheduler: Any, steps: int, skip: float, *, solver: SolverName | None, eta: float) -> Schedule:
        tokens, is_even = scheduler.config.ledits_tokens, self.has_even_sigmas
        return flow_schedule(scheduler, steps, skip, tokens, is_even=is_even, solver=solver, eta=eta)

    def scheduler_stepper(self, scheduler: Any, schedule: Schedule) -> NoReturn:
        raise ValueError(
            f'inversion="diffusers" repeats diffusers\' own pipelines, and there is none for {self.name!r}; '
            'use "exact" or "paired".'
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode_pixels(self.pipe.vae, pixels, self.pipe._execution_device)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_latents(self.pipe.vae, latents)

    def given_rows(self, request: PromptRequest, device: torch.device, dtype: torch.dtype) -> PromptRows:
        """Rows of embeddings that the user made; `"pooled"` goes with them."""
        assert request.embeds is not None
        if request.pooled is None:
            which = "negative" if request.is_negative else "editing"
            raise ValueError(
                f"{which}_prompt_embeds needs {which}_pooled_prompt_embeds with it: this model reads both."
            )
        embeds, pooled = request.embeds.to(device, dtype), request.pooled.to(device, dtype)
        if embeds.shape[0] == 1:
            embeds, pooled = embeds.expand(request.rows, -1, -1), pooled.expand(request.rows, -1)
        weights = clip_token_weights(request, None, embeds.shape[0], embeds.shape[1], device)
        return PromptRows(embeds, {"pooled": pooled}, weights)

    def mask_grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        return latent_size[0] // self.patch_size, latent_size[1] // self.patch_size

    @contextmanager
    def recording(self, latent_size: tuple[int, int]) -> Iterator[MassRecorder]:
        layers = [m for name, m in self.denoiser.named_modules() if _JOINT_BLOCK.search(name)]
        wanted = self.mask_blocks
        if wanted is None:
            margin = len(layers) // 4
            wanted = range(margin, len(layers) - margin)
        chosen = [layers[i] for i in wanted]
        recorder = MassRecorder(self.mask_grid(latent_size), len(chosen), self.state_dtype)
        with recording(chosen, self.recorder_wrapper, recorder):
            yield recorder


class ImageFirstRecording:
    """Wraps a joint attention processor whose sequence is [image, text]: records, then lets the inner one work."""

    def __init__(self, inner: Any, recorder: MassRecorder) -> None:
        self.inner = inner
        self.recorder = recorder

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.recorder.is_recording:
            self._record(attn, self.recorder.rows(hidden_states), self.recorder.rows(encoder_hidden_states))
        if ip_hidden_states is not None:
            kwargs |= {"ip_hidden_states": ip_hidden_states, "temb": temb}
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    def _record(self, attn: Any, image: Tensor, text: Tensor) -> None:
        query, key = split_heads(attn.to_q(image), attn.heads), split_heads(attn.to_k(image), attn.heads)
        words = split_heads(attn.add_k_proj(text), attn.heads)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        words = words if attn.norm_added_k is None else attn.norm_added_k(words)
        weights = self.recorder.weights(image.shape[1], 0)
        self.recorder.add(column_mass(query, torch.cat([key, words], dim=2), weights))


class StableDiffusion3Adapter(FlowTransformerAdapter):
    """Stable Diffusion 3 and 3.5, with or without the T5 encoder."""

    name = "stable-diffusion-3"
    defaults = FamilyDefaults(num_inversion_steps=28)
    loaders = (SD3LoraLoaderMixin, SD3IPAdapterMixin, FromSingleFileMixin)
    recorder_wrapper = ImageFirstRecording
    max_t5_tokens = 256
    callback_tensors: ClassVar[dict[str, tuple[str, str]]] = FamilyAdapter.callback_tensors | {
        "pooled_prompt_embeds": ("all", "pooled"),
        "negative_pooled_prompt_embeds": ("unconditional", "pooled"),
    }

    @classmethod
    def matches(cls, pipe: Any) -> bool:
        return cls.is_denoiser(pipe.transformer, "SD3Transformer2DModel")

    def encode_prompts(self, request: PromptRequest) -> PromptRows:
        device, dtype = self.pipe._execution_device, self.denoiser.dtype
        if request.embeds is not None:
            return self.given_rows(request, device, dtype)
        texts = list(request.prompts or [""] * request.rows)
        skip = None if request.is_negative else request.clip_skip
        with lora_scaled([self.pipe.text_encoder, self.pipe.text_encoder_2], request.lora_scale):
            first, pooled_1, tokens = self._clip(self.pipe.tokenizer, self.pipe.text_encoder, texts, skip)
            second, pooled_2, _ = self._clip(
                self.pipe.tokenizer_2, self.pipe.text_encoder_2, list(request.prompts_2 or texts), skip
            )
        words, word_weights = self._t5(list(request.prompts_3 or texts))
        short = torch.cat([first, second], dim=-1)
        embeds = torch.cat([F.pad(short, (0, words.shape[-1] - short.shape[-1])), words.to(short)], dim=1)
        weights = None
        if request.wants_tokens:
            clip_weights = clip_token_weights(request, tokens, len(texts), short.shape[1], device)
            assert clip_weights is not None
            weights = torch.cat([clip_weights, word_weights.to(clip_weights)], dim=1)
            if request.token_spans is not None:
                weights = clip_token_weights(request, None, len(texts), embeds.shape[1], device)
        pooled = torch.cat([pooled_1, pooled_2], dim=-1)
        return PromptRows(embeds.to(device, dtype), {"pooled": pooled.to(device, dtype)}, weights)

    def _clip(
        self, tokenizer: Any, encoder: Any, texts: list[str], clip_skip: int | None
    ) -> tuple[Tensor, Tensor, list[Any]]:
        layer, device = -2 if clip_skip is None else -(clip_skip + 2), self.pipe._execution_device

        def outputs(row: Any) -> tuple[Tensor, Tensor]:
            found = encoder(row["input_ids"].to(device), output_hidden_states=True)
            return found.hidden_states[layer], found[0]

        tokens = tokenize(tokenizer, texts, warn=False)
        hidden, pooled = encode_once(tokens, outputs)
        return hidden, pooled, tokens

    def _t5(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings `[n, L, D]` (zeros without a T5 encoder) and which columns are words `[n, L]`."""
        pipe, device = self.pipe, self.pipe._execution_device
        if pipe.text_encoder_3 is None:
            # columns of zeros still take part in attention, so there are as many as with the encoder
            shape = (len(texts), self.max_t5_tokens)
            width = self.denoiser.config.joint_attention_dim
            return torch.zeros(*shape, width, device=device), torch.zeros(shape)
        rows = tokenize(pipe.tokenizer_3, texts, max_length=self.max_t5_tokens)
        (embeds,) = encode_once(rows, lambda row: (pipe.text_encoder_3(row["input_ids"].to(device))[0],))
        return embeds, word_columns(pipe.tokenizer_3, rows)

    def denoise(self, latents: Tensor, timesteps: Tensor, prompts: PromptRows, context: CallContext) -> Tensor:
        return self.denoiser(
            hidden_states=latents.to(self.denoiser.dtype),
            timestep=timesteps.expand(latents.shape[0]),
            encoder_hidden_states=prompts.embeds,
            pooled_projections=prompts.extras["pooled"],
            joint_attention_kwargs=context.attention_kwargs,
            return_dict=False,
        )[0]


def word_columns(tokenizer: Any, rows: Sequence[Any]) -> Tensor:
    """`[n, L]` float32: 1 for tokens that are neither padding nor special."""
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    found = [row["attention_mask"].bool() & ~torch.isin(row["input_ids"], special) for row in rows]
    return torch.cat(found).float()


for _pipeline in (
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "LEditsPipelineSD3",
):
    register_adapter(_pipeline, StableDiffusion3Adapter)
