"""`decode_scores` and `decode_topk` in PyTorch: sum the logits of each unit once, then the units of each word.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["mean", "contrast", "loglik"]

_BLOCK_SCORES = 1 << 19
"""Scores that `decode_topk` holds at a time. Changes memory and speed, never the result."""


class _Dictionary(NamedTuple):
    word_ptr: Tensor  # [W + 1]
    word_units: Tensor  # [nnz]
    word_edges: Tensor  # [W]
    correction_ptr: Tensor  # [W + 1]
    correction_rows: Tensor  # [nc]
    correction_kinds: Tensor  # [nc]


class _Rule(NamedTuple):
    mode: Mode
    edge_weight: float
    temperature: float
    rows_per_unit: int
    dtype: torch.dtype


class _Sums(NamedTuple):
    rows: Tensor  # [V, B]: probabilities, or logits less log(pos_weight)
    units: Tensor  # [U, B]
    total: Tensor  # [B]: sum over all rows


def decode_scores_eager(
    z: Tensor,
    word_ptr: Tensor,
    word_units: Tensor,
    word_edges: Tensor,
    unit_rows: Tensor,
    correction_ptr: Tensor,
    correction_rows: Tensor,
    correction_kinds: Tensor,
    *,
    mode: Mode,
    edge_weight: float = 1.0,
    pos_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Score every word of a dictionary against multi-label logits.

    Args:
        z: `[B, V]` logits, floating point.
        word_ptr: `[W + 1]`, bounds of each word in `word_units`.
        word_units: `[nnz]`, each in `[0, U)`; within a word the inner units come first, then the edge units.
        word_edges: `[W]`, how many of a word's last units are edge units: 0, 1 or 2.
        unit_rows: `[U, m]`, each in `[0, V)`.
        correction_ptr: `[W + 1]`, bounds of each word in the two next arguments.
        correction_rows: `[nc]`, rows to take off again, so that multisets become sets.
        correction_kinds: `[nc]`: 0 repeated inside the inner set, 1 inside the edge set, 2 in both sets (loglik only).
        mode: `"mean"`, `"contrast"` or `"loglik"`.
        edge_weight: factor of the edge set in `mean` and `contrast`.
        pos_weight: the loss's weight of positives, whose logarithm `loglik` takes off every logit.
        temperature: divides every score.

    Returns:
        `[B, W]` float32 (float64 for float64 logits). Words without units get the smallest finite number.
    """
    rule = _Rule(mode, edge_weight, temperature, unit_rows.shape[1], _score_dtype(z))
    words = _Dictionary(word_ptr, word_units, word_edges, correction_ptr, correction_rows, correction_kinds)
    sums = _sum_units(z, unit_rows, mode, pos_weight)
    return _score_words(sums, words, rule)


def decode_topk_eager(
    z: Tensor,
    word_ptr: Tensor,
    word_units: Tensor,
    word_edges: Tensor,
    unit_rows: Tensor,
    correction_ptr: Tensor,
    correction_rows: Tensor,
    correction_kinds: Tensor,
    k: int,
    *,
    mode: Mode,
    edge_weight: float = 1.0,
    pos_weight: float = 1.0,
    temperature: float = 1.0,
    word_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k best words of every row without a `[B, W]` tensor; arguments as for `decode_scores_eager`.

    Args:
        k: how many, in `[1, W]`.
        word_mask: `[W]` bool, False for words that must not be chosen: they score minus infinity.

    Returns:
        `values` `[B, k]` in descending order, `indices` `[B, k]` int64 (the lower one first among equal scores), and
        `logsumexp` `[B]` over all words, so that `values - logsumexp[:, None]` are log-probabilities.
    """
    rule = _Rule(mode, edge_weight, temperature, unit_rows.shape[1], _score_dtype(z))
    words = _Dictionary(word_ptr, word_units, word_edges, correction_ptr, correction_rows, correction_kinds)
    sums = _sum_units(z, unit_rows, mode, pos_weight)
    B, W = z.shape[0], word_ptr.numel() - 1
    block = W if torch.compiler.is_compiling() else max(k, _BLOCK_SCORES // max(B, 1))  # block bounds are data
    best, normalizer = sums.total.new_empty(B, 0), sums.total.new_full((B,), -math.inf)
    best_index = torch.empty(B, 0, dtype=torch.int64, device=z.device)
    for start, part in _word_blocks(words, max(block, 1)):
        scores = _score_words(sums, part, rule)
        if word_mask is not None:
            scores = scores.masked_fill(~word_mask[start : start + scores.shape[1]], -math.inf)
        normalizer = torch.logaddexp(normalizer, scores.logsumexp(1))
        index = torch.arange(start, start + scores.shape[1], device=z.device).expand_as(scores)
        scores, index = torch.cat([best, scores], 1), torch.cat([best_index, index], 1)
        best, best_index = _best(scores, index, min(k, scores.shape[1]))
    return best, best_index, normalizer


def _score_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _sum_units(z: Tensor, unit_rows: Tensor, mode: Mode, pos_weight: float) -> _Sums:
    values = z.to(_score_dtype(z))
    values = values - math.log(pos_weight) if mode == "loglik" else torch.sigmoid(values)
    # not .contiguous(): that keeps the strides of a one-column transpose, with which embedding_bag is 25 times slower
    rows = values.T.clone(memory_format=torch.contiguous_format)  # [V, B]
    bounds = torch.arange(unit_rows.shape[0] + 1, dtype=unit_rows.dtype, device=z.device) * unit_rows.shape[1]
    return _Sums(rows, _GatherSum.apply(bounds, unit_rows.reshape(-1), rows, None), values.sum(1))


def _score_words(sums: _Sums, words: _Dictionary, rule: _Rule) -> Tensor:
    word_ptr = words.word_ptr.to(words.word_units.dtype)
    s = _GatherSum.apply(word_ptr, words.word_units, sums.units, _unit_factors(words, rule))  # [W, B]
    s = s - _corrections(sums.rows, words, rule)
    s = s.T.contiguous()  # [B, W]
    unit_counts = word_ptr.diff()  # [W]
    if rule.mode == "loglik":
        s = s / rule.temperature
    else:
        active = (unit_counts * rule.rows_per_unit).to(s.dtype)
        inverse = 1.0 / (active.clamp_min(1) * rule.temperature)
        if rule.mode == "contrast":  # s / active + (s - total) / idle
            idle_inverse = 1.0 / ((sums.rows.shape[0] - active).clamp_min(1) * rule.temperature)
            s = torch.addcmul(s * (inverse + idle_inverse), sums.total[:, None], idle_inverse, value=-1)
        else:
            s = s * inverse
    return s.masked_fill_(unit_counts == 0, torch.finfo(s.dtype).min)


def _unit_factors(words: _Dictionary, rule: _Rule) -> Tensor | None:
    """`[nnz]` weights of all units: `edge_weight` for the last `word_edges` of each word. None stands for ones."""
    if rule.mode == "loglik" or rule.edge_weight == 1.0:
        return None
    ends, edges, nnz = words.word_ptr[1:].long(), words.word_edges.long(), words.word_units.numel()
    factors = torch.ones(nnz + 1, dtype=rule.dtype, device=ends.device)  # words without an edge unit meet in the last
    for back in (1, 2):
        factors.index_fill_(0, torch.where(edges >= back, ends - back, nnz), rule.edge_weight)
    return factors[:nnz]


def _corrections(rows: Tensor, words: _Dictionary, rule: _Rule) -> Tensor:
    """`[W, B]` what the repeated rows of each word add up to."""
    factors = [1.0, 1.0, 1.0] if rule.mode == "loglik" else [1.0, rule.edge_weight, 0.0]
    by_kind = torch.tensor(factors, dtype=rows.dtype, device=rows.device)
    entry_factors = by_kind.index_select(0, words.correction_kinds.int())
    correction_ptr = words.correction_ptr.to(words.correction_rows.dtype)
    return _GatherSum.apply(correction_ptr, words.correction_rows, rows, entry_factors)


class _GatherSum(torch.autograd.Function):
    """CSR sums of table rows; the gradient is the same over the transposed CSR, hence deterministic and fast."""

    @staticmethod
    def forward(ctx: Any, indptr: Tensor, indices: Tensor, table: Tensor, factors: Tensor | None) -> Tensor:
        ctx.save_for_backward(indptr, indices, factors)
        ctx.rows = table.shape[0]
        return F.embedding_bag(indices, table, indptr, mode="sum", per_sample_weights=factors, include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indptr, indices, factors = ctx.saved_tensors
        bags = torch.arange(indptr.numel() - 1, dtype=indices.dtype, device=indices.device)
        bag_of_entry = bags.repeat_interleave(indptr.diff(), output_size=indices.numel())
        in_order, order = torch.sort(indices, stable=True)
        bounds = torch.searchsorted(in_order, torch.arange(ctx.rows + 1, dtype=indices.dtype, device=indices.device))
        factors = None if factors is None else factors[order]
        grad = F.embedding_bag(
            bag_of_entry[order],
            grad.contiguous(),
            bounds.to(indices.dtype),
            mode="sum",
            per_sample_weights=factors,
            include_last_offset=True,
        )
        return None, None, grad, None


def _word_blocks(words: _Dictionary, block: int) -> Iterator[tuple[int, _Dictionary]]:
    """Yield the first word and the part of the dictionary of every block of words."""
    W = words.word_ptr.numel() - 1
    if block >= W:
        yield 0, words
        return
    starts = list(range(0, W, block))
    unit_bounds = [*words.word_ptr[:-1:block].tolist(), int(words.word_ptr[-1])]
    correction_bounds = [*words.correction_ptr[:-1:block].tolist(), int(words.correction_ptr[-1])]
    for i, start in enumerate(starts):
        stop = min(start + block, W)
        u, c = slice(*unit_bounds[i : i + 2]), slice(*correction_bounds[i : i + 2])
        yield (
            start,
            _Dictionary(
                words.word_ptr[start : stop + 1] - u.start,
                words.word_units[u],
                words.word_edges[start:stop],
                words.correction_ptr[start : stop + 1] - c.start,
                words.correction_rows[c],
                words.correction_kinds[c],
            ),
        )


def _best(scores: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row, columns in ascending order of index deciding between equals.

    `torch.topk` promises no order among equals, so it only finds the k-th value.
    """
    key = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # NaN first, as torch.sort has it
    threshold = key.topk(k, dim=1).values[:, -1:]  # [B, 1]
    above, equal = key > threshold, key == threshold
    wanted = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= wanted))
    columns = chosen.nonzero()[:, 1].view(-1, k)
    order = key.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    columns = columns.gather(1, order)
    return scores.gather(1, columns), index.gather(1, columns)
