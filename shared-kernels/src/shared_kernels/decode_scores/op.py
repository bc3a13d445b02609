"""`decode_scores` and `decode_topk`: check the arguments, pick an implementation, define the gradient."""

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import check_bounds, check_indices, check_matrix, check_one_device, check_vector
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import Mode, decode_scores_eager, decode_topk_eager

_MODES = ("mean", "contrast", "loglik")


def decode_scores(
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
    impl: Implementation = "auto",
) -> Tensor:
    """Score every word of a dictionary against the multi-label logits that predict its table rows.

    A word w has n units (trigrams) of m rows. inner(w) and edge(w) are the sets of rows of its inner and its edge
    units, p = sigmoid(z), and s = sum of p over inner(w) + edge_weight * sum of p over edge(w). The score, divided by
    `temperature`, is

    - `"mean"`: s / (n m),
    - `"contrast"`: s / (n m) + (s - sum of all p) / max(V - n m, 1),
    - `"loglik"`: the sum of z - log(pos_weight) over the union of inner(w) and edge(w).

    The rows of each unit are summed once for all words. Differentiable in `z`; the gradient is a sum in a fixed order.

    Args:
        z: `[B, V]` logits, floating point.
        word_ptr: `[W + 1]`, int32 or int64, where each word's units start in `word_units`.
        word_units: `[nnz]`, each in `[0, U)`. Distinct within a word, inner units first, then edge units.
        word_edges: `[W]` uint8, how many of a word's last units are edge units.
        unit_rows: `[U, m]`, int32 or int64, each in `[0, V)`.
        correction_ptr: `[W + 1]`, where each word's entries start in the next two.
        correction_rows: `[nc]`, rows that the units of a word hold more than once, one entry per surplus.
        correction_kinds: `[nc]` uint8: 0 for a repeat inside inner(w), 1 inside edge(w), 2 for a row in both sets.
        mode: the score, see above.
        edge_weight: weight of edge(w); does not enter `"loglik"`.
        pos_weight: the training loss's weight of positives; enters `"loglik"` only.
        temperature: above 0.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[B, W]` float32, float64 for float64 logits. A word without units gets the smallest finite number.

    Raises:
        ValueError: an argument does not fit the others; the message names it.

    Example:
        >>> z = torch.tensor([[0.0, 2.0, -1.0]])
        >>> none = torch.zeros(0, dtype=torch.int32)
        >>> words = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.uint8)
        >>> rows = torch.tensor([[0, 1], [1, 2]])
        >>> decode_scores(z, *words, rows, torch.zeros(3, dtype=torch.int32), none, none.byte(), mode="loglik")
        tensor([[2., 1.]])

    Source: Deiseroth et al. 2024, "T-FREE", section 3.3, for `"mean"`; `"loglik"` is the independent-Bernoulli
    log-likelihood of a word's rows, up to a constant.
    """
    words = (word_ptr, word_units, word_edges, unit_rows, correction_ptr, correction_rows, correction_kinds)
    _check(z, *words, mode, edge_weight, pos_weight, temperature)
    if choose(impl, "decode_scores", z.device, z.dtype) == "eager":
        return decode_scores_eager(
            z, *words, mode=mode, edge_weight=edge_weight, pos_weight=pos_weight, temperature=temperature
        )
    return _decode_scores(_row_values(z, mode, pos_weight), *words, mode, float(edge_weight), float(temperature))


def decode_topk(
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
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k best words of every row of logits without a `[B, W]` tensor; not differentiable.

    Words are scored block by block as in `decode_scores`, which explains the arguments not listed here.

    Args:
        k: how many, in `[1, W]`. The Triton kernel streams up to 64 and sorts all scores beyond.
        word_mask: `[W]` bool, False for words that must not be chosen: they score minus infinity.

    Returns:
        `values` `[B, k]` in descending order, `indices` `[B, k]` int64, the lower index first among equal scores, and
        `logsumexp` `[B]` over all words: `values - logsumexp[:, None]` are log-probabilities over the dictionary.

    Raises:
        ValueError: an argument does not fit the others; the message names it.
    """
    words = (word_ptr, word_units, word_edges, unit_rows, correction_ptr, correction_rows, correction_kinds)
    _check(z, *words, mode, edge_weight, pos_weight, temperature)
    W = word_edges.shape[0]
    if not 1 <= k <= W:
        raise ValueError(f"k must lie in [1, {W}] (the number of words), got {k}.")
    if word_mask is not None:
        check_vector("word_mask", word_mask, W, "word", (torch.bool,))
        check_one_device(z=z, word_mask=word_mask)
    z = z.detach()
    if choose(impl, "decode_topk", z.device, z.dtype) == "eager":
        return decode_topk_eager(
            z,
            *words,
            k,
            mode=mode,
            edge_weight=edge_weight,
            pos_weight=pos_weight,
            temperature=temperature,
            word_mask=word_mask,
        )
    x = _row_values(z, mode, pos_weight)
    return _decode_topk(x, *words, word_mask, k, mode, float(edge_weight), float(temperature))


def _check(
    z: Tensor,
    word_ptr: Tensor,
    word_units: Tensor,
    word_edges: Tensor,
    unit_rows: Tensor,
    correction_ptr: Tensor,
    correction_rows: Tensor,
    correction_kinds: Tensor,
    mode: str,
    edge_weight: float,
    pos_weight: float,
    temperature: float,
) -> None:
    check_matrix("z", z, "[B, V]")
    check_bounds("word_ptr", word_ptr)
    check_indices("word_units", word_units, "[nnz]")
    W = word_ptr.shape[0] - 1
    check_vector("word_edges", word_edges, W, "word", (torch.uint8,))
    check_indices("unit_rows", unit_rows, "[U, m]")
    check_bounds("correction_ptr", correction_ptr, W, "the dictionary")
    check_indices("correction_rows", correction_rows, "[nc]")
    check_vector(
        "correction_kinds", correction_kinds, correction_rows.shape[0], "entry of correction_rows", (torch.uint8,)
    )
    check_one_device(
        z=z,
        word_ptr=word_ptr,
        word_units=word_units,
        word_edges=word_edges,
        unit_rows=unit_rows,
        correction_ptr=correction_ptr,
        correction_rows=correction_rows,
        correction_kinds=correction_kinds,
    )
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {_MODES}, got {mode!r}.")
    if not math.isfinite(edge_weight):
        raise ValueError(f"edge_weight must be finite, got {edge_weight}.")
    for name, value in (("pos_weight", pos_weight), ("temperature", temperature)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above 0, got {value}.")


def _row_values(z: Tensor, mode: Mode, pos_weight: float) -> Tensor:
    """What is summed, `[B, V]` float32: autograd takes the gradient from here to the logits."""
    return z.float() - math.log(pos_weight) if mode == "loglik" else torch.sigmoid(z.float())


@torch.library.custom_op(f"{NAMESPACE}::decode_scores", mutates_args=())
def _decode_scores(
    x: Tensor,
    word_ptr: Tensor,
    word_units: Tensor,
    word_edges: Tensor,
    unit_rows: Tensor,
    correction_ptr: Tensor,
    correction_rows: Tensor,
    correction_kinds: Tensor,
    mode: str,
    edge_weight: float,
    temperature: float,
) -> Tensor:
    from . import kernel

    words = (word_ptr, word_units, word_edges, unit_rows, correction_ptr, correction_rows, correction_kinds)
    dictionary = kernel.Dictionary(*(each.contiguous() for each in words))
    out = x.new_empty(x.shape[0], word_edges.shape[0])
    return kernel.scores(x, dictionary, kernel.Rule(mode, edge_weight, temperature), out)


@_decode_scores.register_fake
def _(x: Tensor, _word_ptr: Tensor, _word_units: Tensor, word_edges: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], word_edges.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::decode_scores_grad_rows", mutates_args=())
def _grad_rows(
    grad: Tensor,
    word_ptr: Tensor,
    word_units: Tensor,
    word_edges: Tensor,
    unit_rows: Tensor,
    correction_ptr: Tensor,
    correction_rows: Tensor,
    correction_kinds: Tensor,
    mode: str,
    edge_weight: float,
    temperature: float,
    rows: int,
) -> Tensor:
    """Gradient `[B, rows]` to the row values: the same sums over the transposed lists, in a fixed order."""
    m = unit_rows.shape[1]
    per_sum, per_total = _score_slopes(word_ptr, m, rows, mode, temperature)
    sum_grads = (grad.float() * per_sum).T.clone(memory_format=torch.contiguous_format)  # [W, B]
    word_of_unit, word_of_correction = _entry_words(word_ptr, word_units), _entry_words(correction_ptr, correction_rows)
    unit_factors = correction_factors = None
    if mode != "loglik":
        places = torch.arange(word_units.shape[0], device=grad.device)
        is_edge = places >= word_ptr[1:][word_of_unit] - word_edges[word_of_unit]
        unit_factors = torch.where(is_edge, edge_weight, 1.0)
        correction_factors = torch.tensor([1.0, edge_weight, 0.0], device=grad.device)[correction_kinds.int()]
    unit_grads = _transposed_sum(word_units, word_of_unit, unit_factors, sum_grads, unit_rows.shape[0])  # [U, B]
    unit_of_row = torch.arange(unit_rows.numel(), device=grad.device) // max(m, 1)
    grad_x = _transposed_sum(unit_rows.reshape(-1), unit_of_row, None, unit_grads, rows)  # [rows, B]
    grad_x -= _transposed_sum(correction_rows, word_of_correction, correction_factors, sum_grads, rows)
    return (grad_x.T - (grad.float() * per_total).sum(1, keepdim=True)).contiguous()


@_grad_rows.register_fake
def _(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], arguments[-1])


def _score_slopes(word_ptr: Tensor, m: int, rows: int, mode: str, temperature: float) -> tuple[Tensor, Tensor]:
    """`[W]` factors of a word's sum and, with a minus sign, of the total in its score; 0 for words without units."""
    unit_counts = word_ptr.diff()
    active = (unit_counts * m).float()
    alive = (unit_counts > 0) / temperature
    idle_inverse = alive / (rows - active).clamp_min(1) if mode == "contrast" else torch.zeros_like(active)
    own = alive if mode == "loglik" else alive / active.clamp_min(1)
    return own + idle_inverse, idle_inverse


def _entry_words(bounds: Tensor, entries: Tensor) -> Tensor:
    from ..csr_gather_sum import kernel as csr

    return csr.row_of_entry(bounds, entries.shape[0])


def _transposed_sum(indices: Tensor, source: Tensor, factors: Tensor | None, table: Tensor, columns: int) -> Tensor:
    """`out[c]` = sum of `table[source[e]]`, times `factors[e]`, over the entries e with `indices[e] == c`."""
    from ..csr_gather_sum import kernel as csr

    bounds, order = csr.transpose(indices.contiguous(), columns)
    out = table.new_empty(columns, table.shape[1])
    return csr.gather_sum(bounds, source[order], None if factors is None else factors[order], table, out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    x, *rest = inputs
    ctx.save_for_backward(*rest[:7])
    ctx.settings = (*rest[7:], x.shape[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _grad_rows(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 10


_decode_scores.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::decode_topk", mutates_args=())
def _decode_topk(
    x: Tensor,
    word_ptr: Tensor,
    word_units: Tensor,
    word_edges: Tensor,
    unit_rows: Tensor,
    correction_ptr: Tensor,
    correction_rows: Tensor,
    correction_kinds: Tensor,
    word_mask: Tensor | None,
    k: int,
    mode: str,
    edge_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    words = (word_ptr, word_units, word_edges, unit_rows, correction_ptr, correction_rows, correction_kinds)
    dictionary = kernel.Dictionary(*(each.contiguous() for each in words))
    rule = kernel.Rule(mode, edge_weight, temperature)
    if k <= kernel.LARGEST_BLOCK_K:
        return kernel.topk(x, dictionary, rule, word_mask, k)
    scores = kernel.scores(x, dictionary, rule, x.new_empty(x.shape[0], word_edges.shape[0]))
    if word_mask is not None:
        scores = scores.masked_fill_(~word_mask, -math.inf)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), order[:, :k].contiguous(), scores.logsumexp(1)


@_decode_topk.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, k = x.shape[0], arguments[8]
    return x.new_empty(B, k), torch.empty(B, k, dtype=torch.int64, device=x.device), x.new_empty(B)
