"""What the loops must be told about a model family, and which adapter a pipeline gets."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .attention import MassRecorder
from .scheduler_steps import SchedulerStepper
from .solver import AffineStepper, Schedule, SolverName


@dataclass(frozen=True)
class PromptRows:
    """Encoded prompts, one row each."""

    embeds: Tensor
    """`[n, L, D]`."""

    extras: dict[str, Tensor] = field(default_factory=dict)
    """Further inputs with n rows each: pooled embeddings, sizes, attention masks."""

    token_weights: Tensor | None = None
    """`[n, L]` float32: 1 for the text columns an edit's mask looks at; None where no mask will."""

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def repeat_interleave(self, times: int) -> "PromptRows":
        """Every row `times` times in a row."""
        weights = None if self.token_weights is None else self.token_weights.repeat_interleave(times, 0)
        extras = {k: v.repeat_interleave(times, 0) for k, v in self.extras.items()}
        return PromptRows(self.embeds.repeat_interleave(times, 0), extras, weights)

    def split(self, rows: int) -> list["PromptRows"]:
        """Groups of `rows` rows."""
        starts = range(0, len(self), rows)
        return [
            PromptRows(
                self.embeds[i : i + rows],
                {k: v[i : i + rows] for k, v in self.extras.items()},
                None if self.token_weights is None else self.token_weights[i : i + rows],
            )
            for i in starts
        ]

    def with_value(self, name: str, value: Tensor) -> "PromptRows":
        """The same rows with another `"embeds"` or another extra."""
        if name == "embeds":
            return replace(self, embeds=value)
        return replace(self, extras=self.extras | {name: value})


def concat_prompts(parts: Sequence[PromptRows]) -> PromptRows:
    """All rows of all parts, in order."""
    weights = [p.token_weights for p in parts]
    if all(w is None for w in weights):
        joined = None
    else:
        joined = torch.cat(
            [p.embeds.new_zeros(p.embeds.shape[:2], dtype=torch.float32) if w is None else w
             for p, w in zip(parts, weights, strict=True)]
        )  # fmt: skip
    extras = {k: torch.cat([p.extras[k] for p in parts]) for k in parts[0].extras}
    return PromptRows(torch.cat([p.embeds for p in parts]), extras, joined)


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """What diffusers' pipeline of the family does unless told otherwise."""

    num_inversion_steps: int = 30
    """N."""

    num_zero_noise_steps: int = 0
    """Last noise maps set to zero, `"diffusers"` mode only."""

    use_intersect_mask: bool = True
    """M1 * M2, `"diffusers"` mode only; our modes always intersect."""

    attention_only_above: float | None = None
    """Timestep above which `"diffusers"` mode uses M1 alone where it intersects."""


@dataclass(frozen=True, kw_only=True)
class PromptRequest:
    """Prompts to encode: one text (or embedding) per row, everything else for all rows."""

    rows: int
    """How many rows; `prompts=None` means the family's empty prompt in each."""
    prompts: Sequence[str] | None = None
    prompts_2: Sequence[str] | None = None
    prompts_3: Sequence[str] | None = None
    embeds: Tensor | None = None
    pooled: Tensor | None = None
    token_spans: Sequence[Sequence[int]] | None = None
    """Text columns per row that masks look at; None: the prompt's own tokens."""
    clip_skip: int | None = None
    is_negative: bool = False
    """The prompt of the unconditional rows."""
    wants_tokens: bool = False
    """Fill `PromptRows.token_weights`."""
    as_diffusers: bool = False
    """Count tokens as diffusers' pipeline does with the installed tokenizer."""
    lora_scale: float | None = None
    """Strength of LoRA weights in the text encoders."""


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """What the denoiser is told besides latents, timestep and prompts; the same at inversion and edit."""

    size: tuple[int, int]
    """(height, width) in pixels."""

    attention_kwargs: dict[str, Any] | None = None
    """Passed on to attention processors."""

    crops_coords_top_left: tuple[int, int] = (0, 0)
    """SDXL's micro-conditioning."""

    row_extras: dict[str, Tensor] = field(default_factory=dict)
    """Further inputs per picture, `[1 or B, ...]` each: IP-Adapter embeddings, control images."""

    control_scale: float = 1.0
    """Strength of a ControlNet."""

    guidance: float | None = None
    """Embedded guidance value of guidance-distilled models."""

    as_diffusers: bool = False
    """Repeat diffusers' quirks that its results depend on."""

    @property
    def lora_scale(self) -> float | None:
        """Strength of LoRA weights; None: as loaded."""
        return (self.attention_kwargs or {}).get("scale")


class FamilyAdapter(ABC):
    """One model family behind the loops. Latents are `[rows, C, h, w]` everywhere outside `denoise`.

    The pipeline's components are read at every call, never kept: offloading and `.to()` may replace them.
    """

    name: ClassVar[str] = ""
    """Written into saved inversions."""

    denoiser_name: ClassVar[str] = "unet"
    """Component that predicts."""

    defaults: ClassVar[FamilyDefaults] = FamilyDefaults()
    size_multiple: ClassVar[int] = 4
    """Latent sides must be multiples of this."""

    callback_tensors: ClassVar[dict[str, tuple[str, str]]] = {
        "prompt_embeds": ("all", "embeds"),
        "negative_prompt_embeds": ("unconditional", "embeds"),
    }
    """What step callbacks may read and change: name to (which rows, `"embeds"` or an extra)."""

    loaders: ClassVar[tuple[type, ...]] = ()
    """diffusers' loader mixins whose methods the pipeline answers to."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
    @abstractmethod
    def matches(cls, pipe: Any) -> bool:
        """Whether the components of `pipe` are of this family."""

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along a side."""
        vae = self.pipe.vae
        return 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8

    @property
    def state_dtype(self) -> torch.dtype:
        """States, guidance, masks and residuals: float32 or wider."""
        return torch.promote_types(self.denoiser.dtype, torch.float32)

    @abstractmethod
    def editing_scheduler(self, height: int, width: int) -> Any:
        """A private copy of the scheduler, for latents of this size."""

    @abstractmethod
    def schedule(self, scheduler: Any, steps: int, skip: float, *, solver: SolverName | None, eta: float) -> Schedule:
        """The kept steps; `scheduler` is what `editing_scheduler` returned."""

    def scheduler_stepper(self, scheduler: Any, schedule: Schedule) -> SchedulerStepper | AffineStepper:
        """The steps of `"diffusers"` mode."""
        return SchedulerStepper(scheduler, schedule)

    @abstractmethod
    def encode_prompts(self, request: PromptRequest) -> PromptRows:
        """Rows for the requested prompts; equal texts give equal bits, however many rows there are."""

    def with_context(self, prompts: PromptRows, context: CallContext) -> PromptRows:
        """Add what depends on the picture rather than the prompt (sizes, ids, `row_extras`) to the rows."""
        for name, value in context.row_extras.items():
            times = len(prompts) // value.shape[0]
            prompts = prompts.with_value(name, value.repeat(times, *[1] * (value.ndim - 1)))
        return prompts

    def row_extras(self, size: tuple[int, int], batch: int, **inputs: Any) -> dict[str, Tensor]:
        """What pictures given beside the edited ones become: see `CallContext.row_extras`.

        Args:
            size: (height, width) in pixels.
            batch: B.
            **inputs: `ip_adapter_image`, `ip_adapter_image_embeds`, `control_image`; None where not given.
        """
        if given := [name for name, value in inputs.items() if value is not None]:
            raise ValueError(f"{given[0]} is not supported for the family {self.name!r}.")
        return {}

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1] to scaled latents `[B, C, h, w]`."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to pixels in [-1, 1]."""

    def check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Pixels with what the family's safety checker objects to blacked out, and to which it objects."""
        return pixels, None

    @abstractmethod
    def denoise(self, latents: Tensor, timesteps: Tensor, prompts: PromptRows, context: CallContext) -> Tensor:
        """One call of the denoiser: rows in, raw outputs out, both `[rows, C, h, w]`.

        Args:
            latents: states in `state_dtype`; cast to the model's dtype here.
            timesteps: 0-dimensional, or one per row.
            prompts: one row per latent.
            context: the rest.
        """

    def mask_grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """Side lengths of the attention maps for M1."""
        return latent_size[0] // 4, latent_size[1] // 4

    @abstractmethod
    def recording(self, latent_size: tuple[int, int]) -> AbstractContextManager[MassRecorder]:
        """For the time of the block, let the recorder that is given out see the attention of the mask layers."""

    def attention_maps(self, recorder: MassRecorder, latent_size: tuple[int, int]) -> Tensor:
        """What the last call recorded, `[rows, gh, gw]` on `mask_grid`."""
        return recorder.maps()


_ADAPTERS: dict[str, type[FamilyAdapter]] = {}


def register_adapter(pipeline_class_name: str, adapter: type[FamilyAdapter]) -> None:
    """Let `LEditsPipeline` edit with the components of another diffusers pipeline.

    Args:
        pipeline_class_name: e.g. `"StableDiffusionPipeline"`, for messages and against registering twice.
        adapter: how to run that family; its `matches` recognizes the components.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, FamilyAdapter)):
        raise TypeError(f"adapter must be a subclass of FamilyAdapter, got {adapter!r}.")
    known = _ADAPTERS.get(pipeline_class_name)
    if known is not None and known is not adapter:
        raise ValueError(f"pipeline_class_name {pipeline_class_name!r} already has the adapter {known.__name__}.")
    _ADAPTERS[pipeline_class_name] = adapter


def choose_adapter(pipe: Any) -> type[FamilyAdapter]:
    """The adapter whose family the components of `pipe` are; the one registered last wins.

    Raises:
        ValueError: none matches.
    """
    for adapter in reversed(list(dict.fromkeys(_ADAPTERS.values()))):
        if adapter.matches(pipe):
            return adapter
    present = sorted(name for name, part in pipe.components.items() if part is not None)
    raise ValueError(
        f"no adapter matches the components {present}; known are {sorted(_ADAPTERS)}. "
        "Register one for this family with register_adapter."
    )
