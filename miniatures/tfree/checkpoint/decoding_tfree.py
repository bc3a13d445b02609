"""Head output to word scores: how well each word of a dictionary fits the predicted rows (T-FREE section 3.3)."""

import math
from typing import Any

import torch
from torch import Tensor

from .dictionary_tfree import FactoredDictionary
from .kernels_tfree import csr_gather_sum, decode_scores, decode_topk

DECODE_MODES = ("mean", "contrast", "loglik")


def dictionary_scores(
    row_logits: Tensor,
    dictionary: FactoredDictionary,
    *,
    mode: str = "contrast",
    edge_weight: float = 1.0,
    pos_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Score every word of a dictionary against the head's row logits; a softmax over the result is the next word.

    With p = sigmoid(z), n_w trigrams of m rows each, inner(w) and edge(w) *sets* of rows, and
    s_w = sum_{inner(w)} p + edge_weight * sum_{edge(w)} p:

    - "mean": s_w / (n_w m)
    - "contrast": s_w / (n_w m) + (s_w - sum_c p_c) / max(v - n_w m, 1)
    - "loglik": sum over c in inner(w) | edge(w) of (z_c - log pos_weight); `edge_weight` does not enter.

    Args:
        row_logits: z, float [B, v].
        dictionary: W words.
        mode: one of the above.
        edge_weight: w_e, weight of the rows of border trigrams, at least 0.
        pos_weight: weight of the ones that the head was trained with; it shifts every logit by its logarithm.
        temperature: divides the scores, above 0.

    Returns:
        float32 [B, W] (float64 for float64 input); the smallest finite number for entries that are no words.

    Raises:
        ValueError: an argument is out of range.

    Source: Deiseroth et al. 2024, "T-FREE", section 3.3; "loglik" is the posterior of independent rows.
    """
    _check_decoding(row_logits, dictionary, mode, edge_weight, pos_weight, temperature)
    settings: dict[str, Any] = {
        "mode": mode, "edge_weight": edge_weight, "pos_weight": pos_weight, "temperature": temperature
    }  # fmt: skip
    if torch.is_grad_enabled() and row_logits.requires_grad:
        return _differentiable_scores(row_logits, dictionary, **settings)
    return decode_scores(row_logits, *dictionary.tensors(), **settings)


def dictionary_topk(
    row_logits: Tensor,
    dictionary: FactoredDictionary,
    k: int,
    *,
    word_mask: Tensor | None = None,
    mode: str = "contrast",
    edge_weight: float = 1.0,
    pos_weight: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k best words without forming the scores of all of them.

    Args:
        row_logits: z, float [B, v].
        dictionary: W words.
        k: how many, in [1, W].
        word_mask: bool [W], words that may be chosen. None: all.
        mode, edge_weight, pos_weight, temperature: as for `dictionary_scores`.

    Returns:
        scores [B, k] in descending order, words int64 [B, k], and [B] the log of the sum of the exponentials of all
        scores: `scores - logsumexp[:, None]` are exact log-probabilities.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_decoding(row_logits, dictionary, mode, edge_weight, pos_weight, temperature)
    if not 1 <= k <= len(dictionary):
        raise ValueError(f"k must lie in [1, {len(dictionary)}] (the number of words), got {k}.")
    return decode_topk(
        row_logits,
        *dictionary.tensors(),
        k=k,
        word_mask=word_mask,
        mode=mode,
        edge_weight=edge_weight,
        pos_weight=pos_weight,
        temperature=temperature,
    )


def sum_active_rows(dictionary: FactoredDictionary, table: Tensor) -> Tensor:
    """Sum a table's rows over each word's *set* of active rows, each row once; differentiable.

    Applied to the head [v, D] this gives one output vector per word, applied to row logits [v, B] the words' scores.

    Args:
        dictionary: W words.
        table: float [v, D].

    Returns:
        [W, D] in the dtype of `table`.
    """
    repeats = csr_gather_sum(dictionary.correction_ptr, dictionary.correction_rows, table)
    return csr_gather_sum(dictionary.word_ptr, dictionary.word_units, _unit_sums(dictionary, table)) - repeats


def _differentiable_scores(
    row_logits: Tensor,
    dictionary: FactoredDictionary,
    mode: str,
    edge_weight: float,
    pos_weight: float,
    temperature: float,
) -> Tensor:
    z = row_logits if row_logits.dtype == torch.float64 else row_logits.float()
    n = dictionary.num_trigrams
    if mode == "loglik":
        scores = sum_active_rows(dictionary, z.T - math.log(pos_weight)).T  # [B, W]
    else:
        p = z.sigmoid()
        fitting = _weighted_sums(dictionary, p.T.contiguous(), edge_weight).T  # s_w, [B, W]
        pattern = n * dictionary.unit_rows.shape[1]
        scores = fitting / pattern.clamp(min=1)
        if mode == "contrast":
            scores = scores + (fitting - p.sum(1, keepdim=True)) / (z.shape[1] - pattern).clamp(min=1)
    return (scores / temperature).masked_fill(n == 0, torch.finfo(z.dtype).min)


def _weighted_sums(dictionary: FactoredDictionary, table: Tensor, edge_weight: float) -> Tensor:
    """Sum over inner(w) + edge_weight * sum over edge(w), each a set: [W, D]."""
    entry_weight = table.new_ones(dictionary.word_units.shape[0])
    for i in (1, 2):
        entry_weight[dictionary.word_ptr[1:][dictionary.word_edges >= i] - i] = edge_weight
    repeat_weight = table.new_tensor([1.0, edge_weight, 0.0])[dictionary.correction_kinds.long()]
    repeats = csr_gather_sum(dictionary.correction_ptr, dictionary.correction_rows, table, repeat_weight)
    units = _unit_sums(dictionary, table)
    return csr_gather_sum(dictionary.word_ptr, dictionary.word_units, units, entry_weight) - repeats


def _unit_sums(dictionary: FactoredDictionary, table: Tensor) -> Tensor:
    units, m = dictionary.unit_rows.shape
    bounds = torch.arange(units + 1, dtype=torch.int32, device=table.device) * m
    return csr_gather_sum(bounds, dictionary.unit_rows.reshape(-1), table)


def _check_decoding(
    row_logits: Tensor,
    dictionary: FactoredDictionary,
    mode: str,
    edge_weight: float,
    pos_weight: float,
    temperature: float,
) -> None:
    if mode not in DECODE_MODES:
        raise ValueError(f"mode must be one of {DECODE_MODES}, got {mode!r}.")
    if row_logits.ndim != 2 or not row_logits.is_floating_point():
        raise ValueError(
            f"row_logits must be a floating-point tensor [B, v], got {row_logits.dtype} {tuple(row_logits.shape)}."
        )
    for name, value in {"pos_weight": pos_weight, "temperature": temperature}.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value}.")
    if not (math.isfinite(edge_weight) and edge_weight >= 0):
        raise ValueError(f"edge_weight must be finite and at least 0, got {edge_weight}.")
    if len(dictionary) == 0:
        raise ValueError("dictionary must hold at least one word, got none.")
