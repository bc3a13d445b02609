"""Pictures to latents and back, with an autoencoder that overflows in float16 run in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def safe_dtype(vae: Any) -> Iterator[torch.dtype]:
    """The dtype to run the autoencoder in; a float16 one that must not is float32 for the block, float16 after it."""
    if not (vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)):
        yield vae.dtype
        return
    vae.to(torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(torch.float16)


def encode_pixels(vae: Any, pixels: Tensor, device: torch.device) -> Tensor:
    """Pixels `[B, 3, H, W]` in [-1, 1] to the mode of their scaled latents `[B, C, h, w]`.

    `device` is where the model runs, which the device of an offloaded model does not tell.
    """
    with safe_dtype(vae) as dtype:
        latents = vae.encode(pixels.to(device, dtype)).latent_dist.mode()
    return (latents - _shift(vae)) * vae.config.scaling_factor


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents to pixels in [-1, 1].

    Raises:
        FloatingPointError: the result is not finite.
    """
    with safe_dtype(vae) as dtype:
        latents = latents / vae.config.scaling_factor + _shift(vae)
        pixels = vae.decode(latents.to(dtype), return_dict=False)[0]
    if not torch.isfinite(pixels).all():
        raise FloatingPointError(
            f"the VAE decoded to values that are not finite, in {dtype}; load it in float32 or bfloat16 "
            "(pipe.vae.to(torch.float32)), or edit with a smaller edit_guidance_scale."
        )
    return pixels


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
