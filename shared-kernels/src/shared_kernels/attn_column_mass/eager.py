"""`attn_column_mass` in PyTorch: as many scores at a time as stay in the cache.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

import torch
from torch import Tensor

_CACHED_SCORES = 1 << 18
_SCORES_ON_DEVICE = 1 << 26
"""How many scores exist at a time, on the CPU and elsewhere. Change speed, never the result."""


def attn_column_mass_eager(
    q: Tensor,
    k: Tensor,
    column_weight: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Mean over the heads of sum_c weight_c P_c, P the attention probabilities of a query.

    Args:
        q: `[rows, H, Q, D]`, floating point.
        k: `[rows, Hk, K, D]`, H a multiple of Hk.
        column_weight: `[rows, K]`; 1 for the keys whose share is wanted, else 0.
        scale: of the scores; None stands for D**-0.5.
        lse: `[rows, H, Q]`, the logarithm of each query's sum of exponentials over all its keys, if it is known: then
            `k` needs to hold only keys that have a weight.
        attn_mask: bool (which keys a query sees) or added to the scores, broadcastable to `[rows, H, Q, K]`.

    Returns:
        `[rows, Q]`, float32, or float64 for float64 arguments. 0 for a query that sees no key.
    """
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return attn_column_mass_eager(q, k, column_weight, scale=scale, lse=lse, attn_mask=attn_mask)
    (rows, H, Q, D), Hk = q.shape, k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = D**-0.5 if scale is None else scale
    weight, bias = column_weight.to(dtype), _additive(attn_mask, dtype)
    is_compiling = torch.compiler.is_compiling()
    if lse is not None and q.device.type == "cpu" and not is_compiling:  # here the weights can be looked at
        used = weight.any(0).nonzero()
        columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
        k, weight = k[:, :, columns], weight[:, columns]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., columns]
    K = k.shape[2]
    if K == 0 or q.numel() == 0:
        return q.new_zeros(rows, Q, dtype=dtype)
    if bias is not None:
        bias = bias.expand(rows, H, Q, K)
    keys = k if Hk == H else k.repeat_interleave(H // Hk, 1)
    budget = rows * H * Q * K if is_compiling else _CACHED_SCORES if q.device.type == "cpu" else _SCORES_ON_DEVICE
    out = [
        _row_mass(
            q[i],
            keys[i].to(dtype).transpose(1, 2),
            weight[i],
            scale,
            None if lse is None else lse[i].to(dtype),
            None if bias is None else bias[i],
            budget,
        )
        for i in range(rows)
    ]
    return torch.stack(out).div_(H)


def _row_mass(
    q: Tensor, keys: Tensor, weight: Tensor, scale: float, lse: Tensor | None, bias: Tensor | None, budget: int
) -> Tensor:
    """`[Q]`: the mass of all heads, added up, of q `[H, Q, D]` and keys `[H, D, K]`."""
    (H, Q, _), K = q.shape, keys.shape[2]
    queries = min(Q, max(1, budget // K))
    heads = max(1, budget // (queries * K))
    pieces = []
    for start in range(0, Q, queries):
        own = slice(start, start + queries)
        masses = []
        for first in range(0, H, heads):
            part = slice(first, first + heads)
            own_lse = None if lse is None else lse[part, own]
            own_bias = None if bias is None else bias[part, own]
            masses.append(_head_sum(q[part, own].to(keys.dtype), keys[part], weight, scale, own_lse, own_bias))
        pieces.append(sum(masses[1:], masses[0]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _head_sum(q: Tensor, keys: Tensor, weight: Tensor, scale: float, lse: Tensor | None, bias: Tensor | None) -> Tensor:
    """`[Q]`: the mass of a few heads, added up."""
    scores = torch.baddbmm(q.new_zeros(()), q, keys, beta=0, alpha=scale)  # [heads, Q, K]
    if bias is not None:
        scores += bias
    probabilities = scores.softmax(-1) if lse is None else (scores - lse.unsqueeze(-1)).exp_()
    mass = probabilities @ weight  # [heads, Q]
    if bias is not None:
        largest = scores.amax(-1) if lse is None else lse
        mass = mass.masked_fill(largest == -torch.inf, 0.0)  # sees no key
    return mass.sum(0)


def _additive(attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers to add to the scores."""
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return None if attn_mask is None else attn_mask.to(dtype)
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, -torch.inf)
