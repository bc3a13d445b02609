"""Attention whose scores are weakened or strengthened per key, in PyTorch: dense, and over suffixes of shared prompts.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["shift_min", "log_additive", "multiply", "shift_min_all"]

MODES: tuple[Mode, ...] = ("shift_min", "log_additive", "multiply", "shift_min_all")

_CHUNK_SCORES = 1 << 20
"""Scores that are held at a time where they are explicit. Changes memory and speed, never the result."""

_GROUP_SCORES = 1 << 17
"""Scores of the short segments that are computed together. Changes speed, never the result."""


class _Rule(NamedTuple):
    """How scores are made and changed."""

    mode: Mode
    scale: float
    softcap: float | None = None
    window: int | None = None


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
        factors: broadcastable to `scores`, same dtype, not negative.
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
    if visible is not None and mode == "shift_min":
        lowest = torch.where(visible, scores, torch.finfo(scores.dtype).max).amin(-1, keepdim=True)
    else:
        lowest = scores.amin(-1, keepdim=True)
    return torch.lerp(lowest, scores, factors)


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
    (H, Tq, D), (Hk, Tk) = query.shape[1:], key.shape[1:3]
    rule = _Rule(mode, D**-0.5 if scale is None else scale, softcap)
    visible, bias = _four_axes(visible), _four_axes(bias)
    if is_causal and (Tq > 1 or window is not None):  # a single row is the last one: it sees all keys
        is_plain_causal = window is None and visible is None and bias is None and Tq == Tk
        band = _causal_band(Tq, Tk, window, query.device)
        visible = band if visible is None else visible & band
    else:
        is_plain_causal = False
    if softcap is None and sinks is None:
        if factors is None:
            return _sdpa(query, key, value, rule.scale, None if is_plain_causal else visible, bias, is_plain_causal)
        f = factors.to(_score_dtype(query))[:, None, None, :]  # [B, 1, 1, Tk]
        if mode == "log_additive" or (mode == "multiply" and Tq * H > D * Hk):  # else the keys are more than the scores
            q, k, v = (each.to(f.dtype) for each in (query, key, value))
            if mode == "multiply":  # q . (f k) = f (q . k)
                k, bias = k * f.mT, None if bias is None else bias * f
            else:
                bias, is_plain_causal = _log_factors(f, visible) + (0.0 if bias is None else bias), False
            out = _sdpa(q, k, v, rule.scale, None if is_plain_causal else visible, bias, is_plain_causal)
            return out.to(query.dtype)
    return _attend_in_chunks(query, key, value, factors, visible, bias, sinks, rule)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None, bias: Tensor | None, causal: bool
) -> Tensor:
    mask = visible
    if bias is not None:
        bias = bias.to(query.dtype)
        mask = bias if visible is None else torch.where(visible, bias, -torch.inf)
    is_grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210 (a compiler needs the branch)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, is_causal=causal, enable_gqa=is_grouped)


def _attend_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    visible: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    rule: _Rule,
) -> Tensor:
    """Attention with explicit scores of `_CHUNK_SCORES` at a time."""
    (B, H, Tq, D), (Hk, Tk) = query.shape, key.shape[1:3]
    dtype = _score_dtype(query)
    q = (query.to(dtype) * rule.scale).reshape(B, Hk, H // Hk, Tq, D)
    k, v = key.to(dtype), value.to(dtype)
    f = None if factors is None else factors.to(dtype)[:, None, None, None, :]
    sinks = None if sinks is None else sinks.to(dtype).view(Hk, H // Hk, 1, 1)
    seen, offset = _by_group(visible, Hk), None if bias is None else _by_group(bias.to(dtype), Hk)
    rows = Tq if torch.compiler.is_compiling() else max(1, _CHUNK_SCORES // max(1, B * H * Tk))
    parts = []
    for i in range(0, Tq, rows):
        chunk, shown = q[:, :, :, i : i + rows], _rows_of(seen, i, rows)
        limit = None if shown is None else _limit(shown, dtype)
        part = _attend(chunk, k, v, f, limit, _rows_of(offset, i, rows), sinks, rule)
        parts.append(part if shown is None else part.masked_fill(~shown.any(-1, keepdim=True), 0.0))
    if not parts:
        return query.new_zeros(B, H, 0, value.shape[-1])
    return torch.cat(parts, 3).view(B, H, Tq, -1).to(query.dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor | None,
    limit: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    rule: _Rule,
) -> Tensor:
    """Attend with scaled queries `[X, Y, g, n, D]` to keys `[X, Y, T, D]`; all else broadcasts to `[X, Y, g, n, T]`."""
    X, Y, g, n, D = q.shape
    s = (q.reshape(X, Y, g * n, D) @ k.mT).view(X, Y, g, n, -1)
    # scores are nobody else's, so they are changed in place, unless a backward pass or a compiler needs every version
    needs_graph = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (s, f, bias, sinks)
    )
    out = None if needs_graph or torch.compiler.is_compiling() else s
    if rule.softcap is not None:
        s = torch.mul(torch.tanh(torch.div(s, rule.softcap, out=out), out=out), rule.softcap, out=out)
    if bias is not None:
        s = torch.add(s, bias, out=out)
    if f is not None and rule.mode in ("shift_min", "shift_min_all"):
        if limit is not None and rule.mode == "shift_min":
            s = torch.maximum(s, limit, out=out)
        s = torch.lerp(s.amin(-1, keepdim=True), s, f, out=out)
    elif f is not None:
        s = (
            torch.mul(s, f, out=out)
            if rule.mode == "multiply"
            else torch.add(s, _log_factors(f, None if limit is None else limit < 0), out=out)
        )
    if limit is not None:
        s = torch.minimum(s, -limit, out=out)
    if sinks is not None:
        s, v = torch.cat([s, sinks.expand(X, Y, g, n, 1)], -1), F.pad(v, (0, 0, 0, 1))
        out = None if out is None else s
    weights = torch.softmax(s, -1, out=out)
    return (weights.view(X, Y, g * n, -1) @ v).view(X, Y, g, n, -1)


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
        cu_seqlens: `[R + 1]`, where segments start; the last one is S.
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
    check_suffix_mode(mode)
    rule = _Rule(mode, query.shape[-1] ** -0.5 if scale is None else scale, softcap, window)
    pack = _Pack(query, key, value, factors, cu_seqlens)
    prefixes = _Prefixes(prefix_key, prefix_value, prefix_start, prefix_length)
    attend = _attend_in_one_piece if torch.compiler.is_compiling() else _attend_in_groups  # segments are data
    return attend(pack, prefixes, sinks, rule)


def check_suffix_mode(mode: Mode) -> None:
    """Refuse the mode that looks at keys which a segment does not have."""
    if mode == "shift_min_all":
        raise ValueError(
            'mode must not be "shift_min_all" here: its minimum takes in future keys, so no prefix can be shared; use '
            '"shift_min", or atman_attention over whole rows.'
        )


class _Pack(NamedTuple):
    query: Tensor  # [S, H, D]
    key: Tensor  # [S, Hk, D]
    value: Tensor  # [S, Hk, Dv]
    factors: Tensor | None  # [S]
    bounds: Tensor  # [R + 1]


class _Prefixes(NamedTuple):
    key: Tensor  # [N, Hk, D]
    value: Tensor  # [N, Hk, Dv]
    start: Tensor  # [R]
    length: Tensor  # [R]


def _attend_in_groups(pack: _Pack, prefixes: _Prefixes, sinks: Tensor | None, rule: _Rule) -> Tensor:
    """Segment by segment, short ones of one prompt together."""
    (S, H, D), Hk = pack.query.shape, pack.key.shape[1]
    dtype = _score_dtype(pack.query)
    q = (pack.query.to(dtype) * rule.scale).transpose(0, 1)  # [H, S, D]
    k, v, k0, v0 = (each.to(dtype).transpose(0, 1) for each in (pack.key, pack.value, prefixes.key, prefixes.value))
    f = None if pack.factors is None else pack.factors.to(dtype)
    is_explicit = rule.softcap is not None or sinks is not None or (f is not None and rule.mode == "shift_min")
    if f is not None and rule.mode == "multiply" and not is_explicit:
        k, f = k * f[:, None], None  # q . (f k) = f (q . k)
    sinks = None if sinks is None else sinks.to(dtype).view(Hk, 1, H // Hk, 1, 1)
    ones = q.new_ones(1, k0.shape[1])
    bounds = pack.bounds.tolist()
    if bounds[-1] != S:
        raise ValueError(f"cu_seqlens must end with {S}, the number of rows of query, got {bounds[-1]}.")
    groups = _groups(bounds, prefixes, H, rule.window)
    tallest = max((each.height for each in groups), default=0)
    longest = max((each.length for each in groups), default=0)
    band = _causal_band(tallest, longest, rule.window, q.device)
    limits = _limit(band, dtype)
    masks = (-limits).clamp(max=0)
    parts = []
    for group in groups:
        G, n = len(group.rows), group.height
        keys, values = (group.gather(*each).view(Hk, G, group.length, -1) for each in ((k0, k), (v0, v)))
        corner = (..., slice(tallest - n, None), slice(longest - group.length, None))
        factors = None if f is None else group.gather(ones, f[None]).view(G, 1, 1, -1)
        if is_explicit:
            queries = torch.stack([q.view(Hk, -1, S, D)[:, :, stop - n : stop] for _, stop in group.rows], 1)
            step = max(1, _CHUNK_SCORES // (H * G * group.length))  # rows of a long segment, a few at a time
            pieces = []
            for i in range(0, n, step):
                seen = min(group.length - n + i + step, group.length)  # keys that the last of these rows sees
                block, limit = queries[:, :, :, i : i + step], limits[corner][..., i : i + step, :seen]
                own = None if factors is None else factors[..., :seen]
                pieces.append(_attend(block, keys[:, :, :seen], values[:, :, :seen], own, limit, None, sinks, rule))
            out = torch.cat(pieces, 3).permute(1, 3, 0, 2, 4)  # [G, n, Hk, g, Dv]
        else:
            queries = torch.stack([q[:, stop - n : stop] for _, stop in group.rows])  # [G, H, n, D]
            mask = masks[corner]
            if factors is not None:
                mask = mask + _log_factors(factors, band[corner])
            out = _sdpa(queries, keys.transpose(0, 1), values.transpose(0, 1), 1.0, None, mask, False)
            out = out.transpose(1, 2)
        parts += [out[i, n - (stop - start) :] for i, (start, stop) in enumerate(group.rows)]  # [rows, ..., Dv]
    if not parts:
        return pack.query.new_zeros(S, H, v.shape[-1])
    return torch.cat(parts).view(S, H, -1).to(pack.query.dtype)


class _Group(NamedTuple):
    """Segments that see equally many keys, and so have their last rows in common with the longest, the first one."""

    rows: list[tuple[int, int]]
    prefixes: list[tuple[int, int]]
    length: int

    @property
    def height(self) -> int:
        return self.rows[0][1] - self.rows[0][0]

    def gather(self, prefix: Tensor, own: Tensor) -> Tensor:
        """What belongs to the keys of all segments, along axis 1."""
        bounds = zip(self.prefixes, self.rows, strict=True)
        return torch.cat([part for p, r in bounds for part in (prefix[:, slice(*p)], own[:, slice(*r)])], 1)


def _groups(bounds: list[int], prefixes: _Prefixes, heads: int, window: int | None) -> list[_Group]:
    groups: list[_Group] = []
    lists = (bounds[:-1], bounds[1:], prefixes.start.tolist(), prefixes.length.tolist())
    for start, stop, prefix_start, prefix_length in zip(*lists, strict=True):
        if start == stop:
            continue
        length = prefix_length + stop - start
        skipped = 0 if window is None else max(0, prefix_length + 1 - window)  # keys that no row reaches
        rows, prefix = (start, stop), (prefix_start + skipped, prefix_start + prefix_length)
        if groups and _fits(groups[-1], stop - start, length - skipped, stop, heads):
            groups[-1].rows.append(rows)
            groups[-1].prefixes.append(prefix)
        else:
            groups.append(_Group([rows], [prefix], length - skipped))
    return groups


def _fits(group: _Group, rows: int, length: int, stop: int, heads: int) -> bool:
    """Whether a segment may join: its rows, filled up from those before it, are those of the group."""
    scores = heads * group.height * group.length * (len(group.rows) + 1)
    is_alike = length == group.length and 0.75 * group.height <= rows <= group.height <= stop
    return is_alike and scores <= _GROUP_SCORES


def _attend_in_one_piece(pack: _Pack, prefixes: _Prefixes, sinks: Tensor | None, rule: _Rule) -> Tensor:
    """The same as one dense attention with a mask: more work, but a graph that does not depend on the segments."""
    S, N = pack.query.shape[0], prefixes.key.shape[0]
    row, column = torch.arange(S, device=pack.query.device), torch.arange(N, device=pack.query.device)
    segment = torch.searchsorted(pack.bounds, row.to(pack.bounds.dtype), right=True) - 1  # [S]
    start, length = prefixes.start[segment][:, None], prefixes.length[segment][:, None]
    shared = (column >= start) & (column < start + length)  # [S, N]
    own = (segment[:, None] == segment) & (row <= row[:, None])  # [S, S]
    if rule.window is not None:
        position = length + (row - pack.bounds[segment])[:, None]
        shared &= position - (column - start) < rule.window
        own &= row[:, None] - row < rule.window
    visible = torch.cat([shared, own], 1)[None, None]
    q, k, v, k0, v0 = (each.transpose(0, 1)[None] for each in (*pack[:3], *prefixes[:2]))
    f = None if pack.factors is None else F.pad(pack.factors, (N, 0), value=1.0)[None]
    keys, values = torch.cat([k0, k], 2), torch.cat([v0, v], 2)
    return _attend_in_chunks(q, keys, values, f, visible, None, sinks, rule)[0].transpose(0, 1)


def _score_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _log_factors(factors: Tensor, visible: Tensor | None) -> Tensor:
    """What to add to the scores: log f, and 0 in rows that would lose all they see."""
    reads_data = factors.device.type == "cpu" and not torch.compiler.is_compiling()
    if reads_data and bool((factors > 0).all()):
        return factors.log()
    remains = factors > 0
    if visible is not None:
        remains = remains & visible
    return torch.where(remains.any(-1, keepdim=True), factors.log(), 0.0)


def _limit(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number where a key is hidden, the least one elsewhere.

    A maximum with it hides keys from the minimum of a row, a minimum with its negative hides them from the softmax;
    both are vectorized, and so ten times as fast as `masked_fill`.
    """
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype, device=visible.device)
    return torch.where(visible, -largest, largest)


def _causal_band(Tq: int, Tk: int, window: int | None, device: torch.device) -> Tensor:
    """`[1, 1, Tq, Tk]`: the keys that the last Tq of Tk rows see; any lower right part of it is such a band, too."""
    band = torch.ones(1, 1, Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)
    return band if window is None else band.triu(Tk - Tq - window + 1)


def _four_axes(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[(None,) * (4 - tensor.ndim)]


def _by_group(tensor: Tensor | None, Hk: int) -> Tensor | None:
    """`[B, H, Tq, Tk]`, or what broadcasts to it, as `[B, Hk, g, Tq, Tk]`."""
    if tensor is None:
        return None
    return tensor[:, None] if tensor.shape[1] == 1 else tensor.unflatten(1, (Hk, -1))


def _rows_of(tensor: Tensor | None, start: int, rows: int) -> Tensor | None:
    return tensor if tensor is None or tensor.shape[3] == 1 else tensor[:, :, :, start : start + rows]
