"""`row_quantile` in PyTorch: the two numbers that a quantile lies between, from the smaller tail of each row.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

import math

import torch
from torch import Tensor


def row_quantile_eager(S: Tensor, q: Tensor | float) -> Tensor:
    """Quantile of every row by linear interpolation, equal to that of `torch.quantile`.

    Args:
        S: `[R, n]`, float32 or float64.
        q: in [0, 1]; a number, or `[R]` with one per row.

    Returns:
        `[R]` in the dtype of `S`; NaN for a row with a NaN.
    """
    if torch.compiler.is_compiling() or (isinstance(q, Tensor) and q.device.type != "cpu"):
        levels = q if isinstance(q, Tensor) else S.new_full((S.shape[0],), q)
        return _by_sorting(S, _ranks(S, levels))  # here numbers cannot be read
    levels = q if isinstance(q, Tensor) else torch.tensor([q], dtype=S.dtype)  # on the CPU, whatever S is on
    ranks = _ranks(S, levels).tolist()
    bounds = [i for i in range(1, len(ranks)) if ranks[i] != ranks[i - 1]]
    if not bounds:
        return _between(S, ranks[0]) if ranks else S.new_empty(0)
    parts = zip(S.tensor_split(bounds), [0, *bounds], strict=True)  # rows of one rank at a time
    return torch.cat([_between(rows, ranks[start]) for rows, start in parts])


def _ranks(S: Tensor, levels: Tensor) -> Tensor:
    """Rounded to the dtype of S, as `torch.quantile` does."""
    return levels.to(S.dtype).clamp(0.0, 1.0) * (S.shape[1] - 1)


def _by_sorting(S: Tensor, ranks: Tensor) -> Tensor:
    ranks = ranks.unsqueeze(1)
    below = ranks.floor()
    pair = S.sort(1).values.gather(1, torch.cat([below, ranks.ceil()], 1).long())
    out = torch.lerp(pair[:, 0], pair[:, 1], (ranks - below)[:, 0])
    return _with_nans_of(S, out)


def _between(S: Tensor, rank: float) -> Tensor:
    """The number at this rank of every sorted row. Both neighbours are extremes of the smaller tail that holds them."""
    n, below, above = S.shape[1], math.floor(rank), math.ceil(rank)
    takes_upper = n - below <= above + 1
    tail = S.topk(n - below if takes_upper else above + 1, dim=1, largest=takes_upper, sorted=False).values
    if below == above:
        out = tail.amin(1) if takes_upper else tail.amax(1)
    else:
        inner, outer = tail.topk(2, dim=1, largest=not takes_upper).values.unbind(1)
        lower, upper = (inner, outer) if takes_upper else (outer, inner)
        out = torch.lerp(lower, upper, rank - below)
    return _with_nans_of(S, out)


def _with_nans_of(S: Tensor, out: Tensor) -> Tensor:
    """NaN where a row has one: the maximum tells, in a thirtieth of the time of the selection."""
    largest = S.amax(1)
    return torch.where(largest.isnan(), largest, out)
