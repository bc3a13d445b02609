"""The word embedding and the two training objectives, as functions of plain tensors (T-FREE sections 3.1, 3.2)."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .decoding_tfree import sum_active_rows
from .dictionary_tfree import FactoredDictionary
from .kernels_tfree import hash_embedding_bag

LOSS_NORMALIZATIONS = ("all", "active", "sum")
_LOGITS_PER_CHUNK = 1 << 24  # 64 MiB of float32; above it the softmax is recomputed chunk by chunk in the backward pass


def embed_words(
    dictionary: FactoredDictionary, table: Tensor, *, aggregation: str = "sum", normalization: bool = False
) -> Tensor:
    """Embed words: e(w) = sum over the trigrams t of w, sum over the m rows r of t, of table[r], repeats included.

    Args:
        dictionary: W words.
        table: E, float [v, D].
        aggregation: "sum", or "mean" to divide by m.
        normalization: divide by the word's number of trigrams.

    Returns:
        [W, D] in the dtype of `table`; zero for an entry that is no word.

    Source: Deiseroth et al. 2024, "T-FREE", section 3.1.
    """
    sums = hash_embedding_bag(dictionary.word_ptr, dictionary.word_units, dictionary.unit_rows, table)
    if aggregation == "mean":
        sums = sums / dictionary.unit_rows.shape[1]
    if normalization:
        sums = sums / dictionary.num_trigrams.clamp(min=1)[:, None].to(sums.dtype)
    return sums


def multilabel_loss(
    row_logits: Tensor,
    positive_ptr: Tensor,
    positive_rows: Tensor,
    *,
    pos_weight: float = 300.0,
    scale: float = 100.0,
    normalization: str = "active",
    row_weight: Tensor | None = None,
    num_positions: float | Tensor | None = None,
) -> Tensor:
    """The paper's objective: binary cross-entropy of every row of the table against the next word's multi-hot pattern.

    scale / divisor * sum_n l_n [ sum_c softplus(z_nc) + sum_{c in P_n} (pos_weight softplus(-z_nc) - softplus(z_nc)) ]

    Args:
        row_logits: z, float [N, v]; computed in float32 unless float64.
        positive_ptr: int [N + 1], bounds of each position's rows in `positive_rows`.
        positive_rows: int [P], the active rows P_n, no repeats within a position.
        pos_weight: weight of the ones.
        scale: s, factor of the loss.
        normalization: divisor. "all": N v; "active": v sum_n l_n; "sum": 1.
        row_weight: l, [N], 0 ignores a position. None: ones.
        num_positions: replaces N or sum_n l_n in the divisor, to count over several batches.

    Returns:
        0-dim tensor; 0 when every position is ignored.

    Raises:
        ValueError: unknown `normalization`.

    Source: Deiseroth et al. 2024, "T-FREE", section 3.2.
    """
    z = row_logits if row_logits.dtype == torch.float64 else row_logits.float()
    weight = z.new_ones(z.shape[0]) if row_weight is None else row_weight.to(z.dtype)
    position = torch.repeat_interleave(positive_ptr.diff().long())  # [P]
    ones = z[position, positive_rows.long()]
    at_ones = pos_weight * F.softplus(-ones) - F.softplus(ones)
    loss = (weight * F.softplus(z).sum(1)).sum() + (weight[position] * at_ones).sum()
    return loss * multilabel_scale(
        z.shape[0], z.shape[1], scale=scale, normalization=normalization, row_weight=weight, num_positions=num_positions
    )


def multilabel_scale(
    num_rows: int,
    table_size: int,
    *,
    scale: float,
    normalization: str,
    row_weight: Tensor,
    num_positions: float | Tensor | None = None,
) -> Tensor:
    """The factor scale / divisor of `multilabel_loss`: 0-dim tensor, 0 where nothing is counted."""
    if normalization not in LOSS_NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {LOSS_NORMALIZATIONS}, got {normalization!r}.")
    if normalization == "sum":
        return row_weight.new_tensor(scale)
    counted = row_weight.sum() if normalization == "active" else row_weight.new_tensor(float(num_rows))
    if num_positions is not None:
        counted = torch.as_tensor(num_positions, dtype=row_weight.dtype, device=row_weight.device)
    return torch.where(counted > 0, scale / (counted.clamp(min=torch.finfo(counted.dtype).tiny) * table_size), 0.0)


def dictionary_loss(row_logits: Tensor, dictionary: FactoredDictionary, targets: Tensor) -> Tensor:
    """Cross-entropy of the next word in a softmax over the dictionary, with score_w = sum_{c in P_w} z_c / m.

    Args:
        row_logits: z, float [N, v].
        dictionary: W words of distinct patterns; entries without a pattern are left out of the softmax.
        targets: int64 [N], the next words.

    Returns:
        0-dim tensor, mean over positions, in nats.
    """
    z = row_logits if row_logits.dtype == torch.float64 else row_logits.float()
    scores = sum_active_rows(dictionary, z.T.contiguous()).T / dictionary.unit_rows.shape[1]  # [N, W]
    scores = scores.masked_fill(dictionary.num_trigrams == 0, torch.finfo(z.dtype).min)
    return F.cross_entropy(scores, targets)


def composed_softmax_loss(
    hidden: Tensor,
    outputs: Tensor,
    targets: Tensor,
    target_outputs: Tensor,
    output_words: Tensor,
    log_inclusion: Tensor | None = None,
    row_weight: Tensor | None = None,
    is_candidate: Tensor | None = None,
) -> Tensor:
    """`dictionary_loss` from hidden states: a word's score is linear, hidden . (its head rows summed / m).

    The target's own score always takes part; the candidate list supplies all others. A candidate that was drawn with
    probability q stands for 1/q words (its score grows by -log q), which keeps the expected partition sum exact.

    Args:
        hidden: float [N, D].
        outputs: [C, D], output vectors of the candidate words.
        targets: int64 [N], word numbers.
        target_outputs: [N, D], output vectors of the targets.
        output_words: int64 [C], word numbers of the candidates.
        log_inclusion: [C], log q of each candidate. None: all were certain.
        row_weight: [N] factors of the positions. None: ones.
        is_candidate: bool [N, J], at which positions the last J candidates take part. None: everywhere.

    Returns:
        0-dim tensor, SUM over positions, in nats.
    """
    rows_per_chunk = max(1, _LOGITS_PER_CHUNK // max(1, outputs.shape[0]))
    bias = hidden.new_zeros(outputs.shape[0]) if log_inclusion is None else -log_inclusion.to(hidden.dtype)
    total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    weights = hidden.new_ones(hidden.shape[0]) if row_weight is None else row_weight
    if is_candidate is None:
        is_candidate = targets.new_ones(hidden.shape[0], 0, dtype=torch.bool)
    for start in range(0, max(1, hidden.shape[0]), rows_per_chunk):  # once even without positions, for zero gradients
        here = slice(start, start + rows_per_chunk)
        own = (targets[here], target_outputs[here], weights[here], is_candidate[here])
        arguments = (hidden[here], outputs, bias, output_words, *own)
        if hidden.shape[0] <= rows_per_chunk:
            return total + _softmax_chunk(*arguments)
        total = total + checkpoint(_softmax_chunk, *arguments, use_reentrant=False)
    return total


def sample_words(
    num_words: int, first_word: int, expected: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Draw dictionary words for a sampled softmax, frequent words more often, each independently of the others.

    The dictionary is sorted by frequency, so word number `first_word + r` is drawn with probability
    min(1, c / (r + 1)); everything before `first_word` (special and structural words) is always drawn.

    Args:
        num_words: W, all words.
        first_word: number of the most frequent dictionary word.
        expected: expected number of drawn dictionary words.
        device: where the result lives.

    Returns:
        int64 [C] word numbers and float32 [C] log-probabilities of having been drawn.
    """
    ranked = num_words - first_word
    rank = torch.arange(ranked, device=device)
    probability = (_inclusion_constant(ranked, expected) / (rank + 1)).clamp(max=1.0)
    drawn = (torch.rand(ranked, device=device) < probability).nonzero().squeeze(1)
    words = torch.cat([torch.arange(first_word, device=device), drawn + first_word])
    return words, torch.cat([probability.new_zeros(first_word), probability[drawn].log()])


@lru_cache(maxsize=16)
def _inclusion_constant(num_words: int, expected: int) -> float:
    rank = torch.arange(1, num_words + 1, dtype=torch.float64)
    low, high = 0.0, float(num_words)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle / rank).clamp(max=1).sum() < expected else (low, middle)
    return high


def _softmax_chunk(
    hidden: Tensor,
    outputs: Tensor,
    bias: Tensor,
    output_words: Tensor,
    targets: Tensor,
    target_outputs: Tensor,
    row_weight: Tensor,
    is_candidate: Tensor,
) -> Tensor:
    own = (hidden * target_outputs).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))  # [n]
    others = (hidden @ outputs.T).to(own.dtype) + bias.to(own.dtype)  # [n, C]
    is_left_out = output_words == targets[:, None]
    is_left_out[:, others.shape[1] - is_candidate.shape[1] :] |= ~is_candidate
    others = others.masked_fill(is_left_out, torch.finfo(own.dtype).min)
    partition = torch.logaddexp(others.logsumexp(1), own) if outputs.shape[0] else own
    return ((partition - own) * row_weight.to(own.dtype)).sum()
