"""Where an edit may act: M1 from cross-attention, M2 from the noise estimate, both by quantiles per image.

All arithmetic is float32 or wider, whatever the model's dtype: quantiles of bfloat16 maps are full of ties.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothing_kernel() -> Tensor:
    """The published 3 x 3 kernel, `[3, 3]` float32. Its bracket holds 2 sigma where a Gaussian has sqrt(2) sigma."""
    offsets = torch.arange(3, dtype=torch.float32) - 1.0
    # the factor cancels below, but not its rounding: thresholds of tied maps depend on the last bit
    line = 1 / (0.5 * math.sqrt(2 * math.pi)) * torch.exp(-((offsets / (2 * 0.5)) ** 2))
    kernel = line[:, None] * line[None, :]
    return kernel / kernel.sum()


def smooth(maps: Tensor) -> Tensor:
    """Smooth attention maps `[..., h, w]`, the border reflected (repeated where a side has length 1)."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    kernel = smoothing_kernel().to(maps.device, maps.dtype)
    return F.conv2d(F.pad(flat, (1, 1, 1, 1), mode=mode), kernel[None, None]).reshape(maps.shape)


def row_quantiles(values: Tensor, shares: Sequence[float], *, dtype: torch.dtype | None = None) -> Tensor:
    """The linearly interpolated quantile of every row of `values` `[E, B, n]` at its edit's share, `[E, B]`.

    Args:
        values: floating point, float32 or wider.
        shares: one number in [0, 1] per edit.
        dtype: what the quantile is computed in, if not in the dtype of `values`; the result has the latter.
    """
    source = values if dtype is None else values.to(dtype)
    rows = [torch.quantile(rows, share, dim=-1) for rows, share in zip(source, shares, strict=True)]
    return torch.stack(rows).to(values.dtype)


def at_least_quantile(maps: Tensor, shares: Sequence[float], *, dtype: torch.dtype | None = None) -> Tensor:
    """Which positions of `maps` `[E, B, h, w]` reach their image's quantile, bool."""
    thresholds = row_quantiles(maps.flatten(2), shares, dtype=dtype)
    return maps >= thresholds[:, :, None, None]


def attention_masks(
    attention: Tensor, thresholds: Sequence[float], size: tuple[int, int], *, quantile_dtype: torch.dtype | None = None
) -> Tensor:
    """M1: where the smoothed attention to an edit's tokens is high, `[E, B, h, w]` bool.

    Args:
        attention: `[E, B, gh, gw]`, attention mass on the edit's tokens.
        thresholds: lambda, one per edit.
        size: (h, w) of the latents.
        quantile_dtype: see `row_quantiles`.
    """
    coarse = at_least_quantile(smooth(attention), thresholds, dtype=quantile_dtype)
    return F.interpolate(coarse.to(torch.float32), size=size, mode="nearest").bool()


def noise_masks(
    directions: Tensor, thresholds: Sequence[float], *, quantile_dtype: torch.dtype | None = None
) -> Tensor:
    """M2: where an edit changes the noise estimate most, all channels together.

    `[E, B, C, h, w]` to `[E, B, h, w]` bool.
    """
    return at_least_quantile(directions.abs().sum(dim=2), thresholds, dtype=quantile_dtype)


def grow(masks: Tensor, reach: int) -> Tensor:
    """Bool masks `[E, B, h, w]`, every true position spread `reach` positions in all eight directions."""
    spread = F.max_pool2d(masks.float(), 2 * reach + 1, stride=1, padding=reach)
    return spread.bool()
