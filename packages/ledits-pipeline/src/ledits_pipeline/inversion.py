"""A picture as the noise that gives it back: the noisy path, and what inversion stores of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .solver import Schedule

Mode = Literal["exact", "paired", "diffusers"]
MODES = ("exact", "paired", "diffusers")


class Stepper(Protocol):
    """Walks a schedule step by step, in order."""

    def advance(self, k: int, x: Tensor, output: Tensor, stored: Tensor) -> Tensor:
        """The state after step `k`."""

    def extract(self, k: int, x: Tensor, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(what to store so that step `k` leads from `x` to `target`, the state it then leads to)."""


@dataclass(frozen=True, kw_only=True)
class SourceCondition:
    """What the model was told about the picture at inversion; editing tells it the same."""

    source_prompt: tuple[str, ...] = ()
    """One per picture; empty: none."""

    source_guidance_scale: float = 1.0
    """0: unconditional, 1: the source prompt alone, above: guided by it."""

    negative_prompt: tuple[str, ...] | None = None
    """One per picture; None: the family's empty prompt."""

    negative_prompt_2: tuple[str, ...] | None = None
    """SDXL, SD3: for the second text encoder."""

    clip_skip: int | None = None
    """Layers left out at the end of the text encoder."""

    crops_coords_top_left: tuple[int, int] = (0, 0)
    """SDXL's micro-conditioning."""

    control_scale: float = 1.0
    """Strength of a ControlNet."""

    guidance_scale: float | None = None
    """The guidance value that guidance-distilled models take as an input; None: the family's default."""

    @property
    def has_source(self) -> bool:
        """Whether the source prompt takes part."""
        return bool(self.source_prompt) and self.source_guidance_scale != 0.0

    @property
    def has_unconditional(self) -> bool:
        """Whether the unconditional prediction takes part."""
        return not (self.has_source and self.source_guidance_scale == 1.0)


@dataclass(frozen=True, kw_only=True)
class LEditsInversion:
    """One inversion of B pictures: any number of edits can start from it."""

    mode: Mode
    """How it is replayed: `"exact"`, `"paired"` or `"diffusers"`."""

    family: str
    """Name of the adapter that made it."""

    schedule: Schedule
    """The N steps."""

    init_latents: Tensor
    """`[B, C, h, w]`, float32 or wider: the noisiest state."""

    maps: Tensor
    """`[N, B, C, h, w]`, in order of the steps: residuals (`"exact"`), noise maps z (`"diffusers"`), or the states of
    the noisy path after each step (`"paired"`)."""

    size: tuple[int, int]
    """(height, width) of the pictures in pixels."""

    skip: float = 0.0
    """Share of additional steps that were left out."""

    condition: SourceCondition = SourceCondition()
    """What the model was told at inversion."""

    crop: tuple[int, int] | None = None
    """(height, width) to cut results back to, where the pictures were padded."""

    row_extras: dict[str, Tensor] = field(default_factory=dict)
    """Further inputs of the denoiser per picture, `[1 or B, ...]`: IP-Adapter embeddings, control images."""

    model_hash: str = ""
    """Fingerprint of the denoiser's configuration; editing with another model warns."""

    images: Any = field(default=None, compare=False, repr=False)
    """The pictures as the model saw them, resized and cropped (PIL); None after loading."""

    decode: Callable[[], Any] | None = field(default=None, compare=False, repr=False)
    """Gives `vae_reconstruction_images`; None after loading."""

    @property
    def vae_reconstruction_images(self) -> Any:
        """The pictures through the autoencoder alone, decoded on use: the best that unedited parts can look."""
        if self.decode is None:
            raise ValueError("vae_reconstruction_images is known where the inversion was made, not after loading it.")
        return self.decode()

    def __len__(self) -> int:
        return self.init_latents.shape[0]

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write it into a folder; see `save_inversion`."""
        from .storage import save_inversion

        save_inversion(self, directory, dtype=dtype)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LEditsInversion":
        """Read what `save_pretrained` wrote."""
        from .storage import load_inversion

        return load_inversion(directory)


def noisy_path(clean: Tensor, schedule: Schedule, generator: Any = None) -> Tensor:
    """Every state of the path with noise of its own, noisiest first, the clean latents last; `[N + 1, B, C, h, w]`.

    Noise is drawn from the least noisy step on, one draw of the latents' shape per step, as diffusers does.

    Args:
        clean: `[B, C, h, w]`, float32 or wider.
        schedule: the steps.
        generator: one for all pictures or one per picture; None: the global one.
    """
    steps = len(schedule)
    path = clean.new_empty((steps + 1, *clean.shape))
    path[steps] = clean
    for k in reversed(range(steps)):
        noise = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        path[k] = schedule.alphas[k] * clean + schedule.sigmas[k] * noise
    return path


def extract_maps(path: Tensor, stepper: Stepper, predict: Callable[[int, Tensor], Tensor]) -> Tensor:
    """What must be stored so that the sampler walks `path`, `[N, B, C, h, w]`; `path` is corrected in place.

    The correction is what makes replay exact: the next step starts from where this one leads after rounding.

    Args:
        path: `[N + 1, B, C, h, w]`.
        stepper: fresh.
        predict: (step, state) to the model's output at inversion.
    """
    steps = path.shape[0] - 1
    maps = torch.empty_like(path[1:])
    for k in range(steps):
        maps[k], path[k + 1] = stepper.extract(k, path[k], predict(k, path[k]), path[k + 1])
    return maps
