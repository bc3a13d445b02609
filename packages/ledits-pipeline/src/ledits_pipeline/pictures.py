"""Pictures in and out: sizes a model can take, user masks of any kind at latent size."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def legal_pixels(pixels: Tensor, multiple: int, *, pad: bool) -> tuple[Tensor, tuple[int, int] | None]:
    """The pixels `[B, 3, H, W]` at a size the model takes, and what to cut results back to if they were padded.

    Raises:
        ValueError: a side is no multiple of `multiple` and `pad` is False.
    """
    height, width = pixels.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return pixels, None
    if not pad:
        nearest = tuple(max(multiple, round(side / multiple) * multiple) for side in (height, width))
        raise ValueError(
            f"height and width of the image must be multiples of {multiple}, got {height} x {width}; "
            f"the nearest legal size is height={nearest[0]}, width={nearest[1]}. Pass these, or pad=True."
        )
    missing = (0, -width % multiple, 0, -height % multiple)
    mode = "reflect" if missing[1] < width and missing[3] < height else "replicate"
    return F.pad(pixels, missing, mode=mode), (height, width)


def latent_user_masks(
    user_mask: Any, edits: int, batch: int, latent_size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """User masks as `[E or 1, B or 1, 1, h, w]` in [0, 1], area-averaged to latent size.

    Args:
        user_mask: a mask for all edits, or a list or tuple with one per edit: tensor, array or PIL picture; bool or
            numbers in [0, 1] (pictures: 0 to 255); `(H, W)`, `(B, H, W)`, `(1 or B, 1, H, W)`, any size.
        edits: E.
        batch: B.
        latent_size: (h, w).
        device: of the result.
        dtype: of the result.
    """
    if user_mask is None:
        return None
    if isinstance(user_mask, (list, tuple)):
        if len(user_mask) != edits:
            raise ValueError(
                f"user_mask has {len(user_mask)} entries for {edits} editing prompts; give one each, or one for all."
            )
        parts = [_one_mask(m, batch, latent_size, dtype) for m in user_mask]
        widest = max(part.shape[0] for part in parts)
        masks = torch.stack([part.expand(widest, -1, -1, -1) for part in parts])
    else:
        masks = _one_mask(user_mask, batch, latent_size, dtype)[None]
    return masks.to(device)


def _one_mask(mask: Any, batch: int, latent_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    values = _as_tensor(mask).detach().to(dtype)
    if values.ndim == 2:
        values = values[None, None]
    elif values.ndim == 3:
        values = values[:, None]
    if values.ndim != 4 or values.shape[0] not in (1, batch):
        raise ValueError(
            f"user_mask must have shape (H, W), (B, H, W) or (B, 1, H, W) with B = 1 or {batch}, "
            f"got {tuple(values.shape)}."
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"user_mask must hold values in [0, 1], got {float(values.min()):g} to {float(values.max()):g}."
        )
    if values.shape[1] != 1:
        if not bool((values == values[:, :1]).all()):
            raise ValueError(f"user_mask must have one channel, got {values.shape[1]} that differ.")
        values = values[:, :1]
    if tuple(values.shape[-2:]) == tuple(latent_size):
        return values
    return F.interpolate(values, size=latent_size, mode="area")


def _as_tensor(mask: Any) -> Tensor:
    if isinstance(mask, Tensor):
        return mask
    if hasattr(mask, "convert"):
        return torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32) / 255.0)
    return torch.as_tensor(np.asarray(mask))


def spread_texts(name: str, texts: Any, batch: int) -> tuple[str, ...] | None:
    """One text per picture: a single one holds for all."""
    if texts is None:
        return None
    if isinstance(texts, str):
        return (texts,) * batch
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text or a list of texts, got {texts!r}.")
    if len(texts) != batch:
        raise ValueError(f"{name} has {len(texts)} entries for {batch} pictures; give one each, or one text.")
    return tuple(texts)
