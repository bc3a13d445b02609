"""Relevance painted over a picture."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RAMP = ((0.35, 0.0, 0.45), (0.85, 0.1, 0.3), (1.0, 0.5, 0.0), (1.0, 0.95, 0.35))
"""RGB at strength 0, 1/3, 2/3 and 1: violet, red, orange, yellow. Lighter means more, also without color."""


def overlay_map(values: Tensor, image: Any, *, alpha: float = 0.6) -> Any:
    """Paint a map over a picture: stronger patches are lighter and more opaque, negative and unknown ones stay bare.

    Args:
        values: [rows, columns], relevance of the patches that together cover the picture.
        image: a PIL image, or an array [H, W, 3] of bytes.
        alpha: opacity of the greatest value, in [0, 1].

    Returns:
        A PIL image of the same size, RGB.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    picture = to_picture(image)
    strength = upsample(values, picture.height, picture.width)[..., None]
    pixels = np.asarray(picture, dtype=np.float32) / 255.0
    opacity = alpha * strength * strength * (3.0 - 2.0 * strength)  # rises late, so that noise leaves no stains
    mixed = pixels + (ramp_colors(strength[..., 0]) - pixels) * opacity  # [H, W, 3]
    return to_picture((mixed * 255.0).round().astype(np.uint8))


def to_picture(image: Any) -> Any:
    """Turn a PIL image, or an array [H, W, 3] of bytes, into a PIL image, RGB."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Painting over pictures needs Pillow: pip install atman-explain[plot].") from error
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"image must be a PIL image or uint8 [H, W, 3], got {array.dtype} {list(array.shape)}.")
    return Image.fromarray(array)


def upsample(values: Tensor, height: int, width: int) -> np.ndarray:
    """Map relevance to [0, 1], 1 being the greatest and 0 all below zero, and smoothly to pixels: [height, width]."""
    clipped = values.detach().to("cpu", torch.float32).nan_to_num(0.0).clamp(min=0.0)
    strength = clipped / clipped.max().clamp(min=torch.finfo(torch.float32).tiny)
    pixels = F.interpolate(strength[None, None], (height, width), mode="bicubic", align_corners=False)
    return pixels[0, 0].clamp(0.0, 1.0).numpy()


def ramp_colors(strength: np.ndarray) -> np.ndarray:
    """Color of every strength in [0, 1]: [..., 3]."""
    stops = np.linspace(0.0, 1.0, len(RAMP))
    return np.stack([np.interp(strength, stops, [color[channel] for color in RAMP]) for channel in range(3)], axis=-1)
