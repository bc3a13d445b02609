"""Attention whose scores are weakened or strengthened per key, in PyTorch: dense, and over suffixes of shared prompts.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["shift_min", "log_additive", "multiply", "shift_min_all"]

MODES: tuple[Mode, ...] = ("shift_min", "log_additive", "multiply", "shift_min_all")

_CHUNK_SCORES = 1 << 19
"""Scores that the dense path holds at a time. Changes memory and speed, never the result."""


def suppress_scores(scores: Tensor, factors: Tensor, mode: Mode, visible: Tensor | None = None) -> Tensor:
    """Apply the factor f of every key to the scores s of all rows; m is the least score that a row may see.

    - `"shift_min"`: m + (s - m) f. The row's weakest key is the floor: f = 0 puts a key there, it does not remove it.
    - `"log_additive"`: s + log f, which multiplies the unnormalized weight by f. A row whose visible keys all have
      f = 0 keeps its scores.
    - `"multiply"`: s f. Raises the weight of a suppressed key whose score is negative: with scores (-2, 0) and f = 0.1
      on the first key, its weight rises from 0.119 to 0.450.
    - `"shift_min_all"`: as `"shift_min"`, but m is taken over all keys, also over those that the row may not see.

    A key with f = 1 keeps the bits of its score.

    Args:
        scores: `[..., Tq, Tk]`, scaled, soft-capped and biased, but not masked.
        factors: broadcastable to `scores`, not negative.
        mode: one of `MODES`.
        visible: bool, broadcastable to `scores`: which keys a row may see. None: all.

    Returns:
        `[..., Tq, Tk]`. What stands at invisible keys has no meaning; the caller masks them.

    Source: Deiseroth et al. 2023, "AtMan", section 3.
    """
    if mode == "multiply":
        return scores * factors
    if mode == "log_additive":
        return scores + _log_factors(factors, visible)
    if visible is None or mode == "shift_min_all":
        lowest = scores.amin(-1, keepdim=True)
    else:
        lowest = scores.masked_fill(~visible, torch.finfo(scores.dtype).max).amin(-1, keepdim=True)
    return _shift(scores, factors, lowest)


def atman_attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    *,
    mode: Mode = "shift_min",
    scale: float | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with manipulated scores.

    Args:
        query: `[B, H, Tq, D]`.
        key: `[B, Hk, Tk, D]`, H a multiple of Hk.
        value: `[B, Hk, Tk, Dv]`.
        factors: `[B, Tk]`, not negative; 1 leaves a key as it is. None: plain attention.
        mode: how a factor acts on a score, see `suppress_scores`.
        scale: of the scores; None stands for D**-0.5.
        visible: bool, broadcastable to `[B, H, Tq, Tk]`: which keys a row may see.
        bias: broadcastable to `[B, H, Tq, Tk]`, finite, added to the scores before they are manipulated.
        is_causal: row i sees the keys up to Tk - Tq + i.
        window: with `is_causal`, a row sees the last `window` of these at most.
        softcap: c turns the scaled scores s into c tanh(s / c), before the bias.
        sinks: `[H]`, a further logit per head in every softmax, never manipulated.

    Returns:
        `[B, H, Tq, Dv]` in the dtype of `query`. A row that sees no key is zero.
    """
    (Tq, D), Tk = query.shape[2:], key.shape[2]
    visible, bias = _four_axes(visible), _four_axes(bias)
    scale = D**-0.5 if scale is None else scale
    is_causal = is_causal and (Tq > 1 or window is not None)  # a single row is the last one: it sees all keys
    if factors is None and softcap is None and sinks is None:
        causal_only = is_causal and window is None and visible is None and bias is None and Tq == Tk
        mask = None if causal_only else _sdpa_mask(_all_visible(Tq, Tk, is_causal, window, visible, query), bias, query)
        return F.scaled_dot_product_attention(
            query, key, value, mask, scale=scale, is_causal=causal_only, enable_gqa=query.shape[1] != key.shape[1]
        )
    dtype = _score_dtype(query)
    f = None if factors is None else factors.to(dtype)[:, None, None, :]  # [B, 1, 1, Tk]
    bias = None if bias is None else bias.to(dtype)
    if softcap is None and sinks is None and f is not None and mode in ("multiply", "log_additive"):
        shown = _all_visible(Tq, Tk, is_causal, window, visible, query)
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        if mode == "multiply":  # q . (f k) = f (q . k)
            k = k * f.transpose(2, 3)
            bias = None if bias is None else bias * f
        else:
            bias = _log_factors(f, shown) if bias is None else bias + _log_factors(f, shown)
        causal_only = is_causal and window is None and visible is None and bias is None and Tq == Tk
        mask = None if causal_only else _sdpa_mask(shown, bias, q)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, is_causal=causal_only, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.to(query.dtype)
    return _attend_in_chunks(query, key, value, f, mode, scale, visible, bias, is_causal, window, softcap, sinks)


def _attend_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    f: Tensor | None,
    mode: Mode,
    scale: float,
    visible: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with explicit scores, `_CHUNK_SCORES` at a time."""
    (B, H, Tq, D), (Hk, Tk) = query.shape, key.shape[1:3]
    dtype = _score_dtype(query)
    q = (query.to(dtype) * scale).reshape(B, Hk, H // Hk, Tq, D)
    k, v = key.to(dtype).mT, value.to(dtype)
    if sinks is not None:
        v = F.pad(v, (0, 0, 0, 1))
        sinks = sinks.to(dtype)[None, :, None, None]
    shown = _all_visible(Tq, Tk, is_causal, window, visible, query)
    rows = Tq if torch.compiler.is_compiling() else max(1, _CHUNK_SCORES // max(1, B * H * Tk))
    parts = []
    for start in range(0, Tq, rows):
        stop = min(start + rows, Tq)
        part = q[:, :, :, start:stop].reshape(B, Hk, -1, D)
        s = (part @ k).view(B, H, stop - start, Tk)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if bias is not None:
            s = s + _rows_of(bias, start, stop)
        seen = None if shown is None else _rows_of(shown, start, stop)
        if f is not None:
            s = suppress_scores(s, f, mode, seen)
        if seen is not None:
            s = s.masked_fill(~seen, torch.finfo(dtype).min)
        if sinks is not None:
            s = torch.cat([s, sinks.expand(B, H, stop - start, 1)], -1)
        out = (s.softmax(-1).view(B, Hk, -1, s.shape[-1]) @ v).view(B, H, stop - start, -1)
        if seen is not None:
            out = out.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        parts.append(out)
    return torch.cat(parts, 2).to(query.dtype) if parts else query.new_zeros(B, H, 0, value.shape[-1])


class _Segment(NamedTuple):
    """The rows of one segment, its prefix, and the range of its rows whose factors are not all 1."""

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int
    changed_start: int
    changed_stop: int


def atman_suffix_attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    factors: Tensor | None,
    *,
    cu_seqlens: Tensor,
    prefix_start: Tensor,
    prefix_length: Tensor,
    mode: Mode = "shift_min",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend in packed segments, each to a stored prefix and causally to itself.

    Args:
        query: `[S, H, D]`.
        key: `[S, Hk, D]`, H a multiple of Hk.
        value: `[S, Hk, Dv]`.
        prefix_key: `[N, Hk, D]`, the keys of one or several prompts.
        prefix_value: `[N, Hk, Dv]`.
        factors: `[S]`, not negative, of the segments' own keys; those of a prefix count as 1. None: plain attention.
        cu_seqlens: `[R + 1]`, where segments start.
        prefix_start: `[R]`, where each segment's prefix starts in `prefix_key`.
        prefix_length: `[R]`, how many keys it has; row i of the segment stands at position prefix_length + i.
        mode: how a factor acts on a score, see `suppress_scores`; `"shift_min_all"` is undefined here.
        scale: of the scores; None stands for D**-0.5.
        softcap: c turns the scaled scores s into c tanh(s / c).
        window: a row sees the last `window` keys at most, its own included.
        sinks: `[H]`, a further logit per head in every softmax, never manipulated.

    Returns:
        `[S, H, Dv]` in the dtype of `query`.
    """
    (S, H, D), Hk = query.shape, key.shape[1]
    dtype = _score_dtype(query)
    scale = D**-0.5 if scale is None else scale
    q = (query.to(dtype) * scale).view(S, Hk, H // Hk, D).permute(1, 2, 0, 3).contiguous()  # [Hk, g, S, D]
    k, v = key.to(dtype).transpose(0, 1), value.to(dtype).transpose(0, 1)  # [Hk, S, D]
    k0, v0 = prefix_key.to(dtype).transpose(0, 1), prefix_value.to(dtype).transpose(0, 1)  # [Hk, N, D]
    f = None if factors is None else factors.to(dtype)
    sink_column = None if sinks is None else sinks.to(dtype).view(Hk, H // Hk, 1, 1)
    parts = []
    for each in _segments(factors, cu_seqlens, prefix_start, prefix_length):
        n, length = each.stop - each.start, each.prefix_stop - each.prefix_start
        first = 0 if window is None else max(0, length + 1 - window)  # no row sees the prefix keys before
        shared, own = slice(each.prefix_start + first, each.prefix_stop), slice(each.start, each.stop)
        keys = torch.cat([k0[:, shared], k[:, own]], 1)  # [Hk, length - first + n, D]
        values = torch.cat([v0[:, shared], v[:, own]], 1)
        s = (q[:, :, own].reshape(Hk, -1, D) @ keys.mT).view(Hk, H // Hk, n, -1)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        seen = _all_visible(n, keys.shape[1], True, window, None, query)
        if f is not None and each.changed_stop > each.changed_start:
            s = suppress_scores(s, F.pad(f[own], (length - first, 0), value=1.0), mode, seen)
        if seen is not None:
            s = s.masked_fill(~seen, torch.finfo(dtype).min)
        if sink_column is not None:
            s = torch.cat([s, sink_column.expand(Hk, H // Hk, n, 1)], -1)
            values = F.pad(values, (0, 0, 0, 1))
        out = s.softmax(-1).view(Hk, -1, s.shape[-1]) @ values
        parts.append(out.view(Hk, H // Hk, n, -1))
    if not parts:
        return query.new_zeros(S, H, value.shape[-1])
    return torch.cat(parts, 2).permute(2, 0, 1, 3).reshape(S, H, -1).to(query.dtype)


def _segments(
    factors: Tensor | None, cu_seqlens: Tensor, prefix_start: Tensor, prefix_length: Tensor
) -> Iterator[_Segment]:
    bounds, starts, lengths = cu_seqlens.tolist(), prefix_start.tolist(), prefix_length.tolist()
    changed = [] if factors is None else (factors != 1).tolist()
    for r, (first, length) in enumerate(zip(starts, lengths, strict=True)):
        start, stop = bounds[r], bounds[r + 1]
        rows = [i for i in range(start, stop) if changed[i]] if changed else []
        lowest, highest = (rows[0], rows[-1] + 1) if rows else (start, start)
        if stop > start:
            yield _Segment(start, stop, first, first + length, lowest - start, highest - start)


def _score_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _shift(scores: Tensor, factors: Tensor, lowest: Tensor) -> Tensor:
    return torch.where(factors == 1, scores, lowest + (scores - lowest) * factors)


def _log_factors(factors: Tensor, visible: Tensor | None) -> Tensor:
    """What to add to the scores: log f, and 0 in rows that would lose all they see."""
    remains = factors > 0
    if visible is not None:
        remains = remains & visible
    return torch.where(remains.any(-1, keepdim=True), factors.log(), 0.0)


def _all_visible(
    Tq: int, Tk: int, is_causal: bool, window: int | None, visible: Tensor | None, like: Tensor
) -> Tensor | None:
    """`visible`, less the keys that a causal row, or a window, does not reach. None: all keys."""
    if not is_causal:
        return visible
    band = torch.ones(1, 1, Tq, Tk, dtype=torch.bool, device=like.device).tril(Tk - Tq)
    if window is not None:
        band = band.triu(Tk - Tq - window + 1)
    return band if visible is None else visible & band


def _four_axes(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[(None,) * (4 - tensor.ndim)]


def _rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows of a tensor that broadcasts to `[B, H, Tq, Tk]`."""
    return tensor if tensor.shape[2] == 1 else tensor[:, :, start:stop]


def _sdpa_mask(visible: Tensor | None, bias: Tensor | None, query: Tensor) -> Tensor | None:
    if bias is None:
        return visible
    bias = bias.to(query.dtype)
    return bias if visible is None else torch.where(visible, bias, -torch.inf)
