"""`fused_linear_bce` in PyTorch: logits and gradients chunk by chunk, so no `[N, V]` tensor outlives its chunk.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 64 << 20
"""Size of the float32 logits of one chunk. Changes memory and speed, never the loss beyond rounding."""

_CHUNK_MULTIPLE = 128
"""Rows per chunk are a multiple of this, if there are that many: matrix products run in such tiles."""

_BLOCK_ELEMENTS = 1 << 18
"""Elementwise work runs on this many logits at a time, so that its scratch stays in the cache."""


class Problem(NamedTuple):
    """The inputs, in one dtype."""

    x: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    row_weight: Tensor | None  # [N], in the dtype of the sums
    positive_ptr: Tensor  # [N + 1]
    positive_rows: Tensor  # [P]
    pos_weight: float
    chunk_rows: int


class Solution(NamedTuple):
    """Losses and gradients in the dtype of the sums; a gradient that nobody needs is None."""

    losses: Tensor  # [N], before row_weight
    grad_x: Tensor | None  # [N, D], of the sum of the weighted losses
    grad_weight: Tensor | None  # [V, D]


class LogitsStep(Protocol):
    """Turns the logits of one chunk into losses and gradients."""

    def __call__(self, z: Tensor, dz: Tensor, start: int, problem: Problem) -> Tensor:
        """Return the losses of rows `start` and following; leave their weighted gradients in `dz`, which may be `z`."""


def fused_linear_bce_eager(
    x: Tensor,
    weight: Tensor,
    positive_ptr: Tensor,
    positive_rows: Tensor,
    *,
    pos_weight: float,
    row_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Weighted multi-label loss of a linear head, without the dense target and without all logits at once.

    loss = scale * sum_n row_weight[n] * [ sum_c softplus(z[n, c])
           + sum_{c in P_n} (pos_weight * softplus(-z[n, c]) - softplus(z[n, c])) ],   z = x @ weight.T

    Args:
        x: `[N, D]`, floating point.
        weight: `[V, D]`, the head.
        positive_ptr: `[N + 1]`, int32 or int64, bounds of each row's positives in `positive_rows`.
        positive_rows: `[P]`, int32 or int64, each in `[0, V)`; no repeats within a row.
        pos_weight: factor of the positive terms.
        row_weight: `[N]`, or None for ones.
        scale: number or 0-dim tensor.
        chunk_rows: rows of `x` per chunk; None takes about 64 MiB of logits. Under `torch.compile` there is one
            chunk, since the bounds of the others are data.

    Returns:
        0-dim tensor, float32 (float64 for float64 inputs). Its gradients were formed along the way.
    """
    problem = prepare(x, weight, row_weight, positive_ptr, positive_rows, pos_weight, chunk_rows)
    if torch.compiler.is_compiling():
        problem = problem._replace(chunk_rows=max(1, x.shape[0]))
    with torch.autocast(x.device.type, enabled=False):
        return _FusedLinearBCE.apply(*problem, torch.is_grad_enabled()) * scale


def prepare(
    x: Tensor,
    weight: Tensor,
    row_weight: Tensor | None,
    positive_ptr: Tensor,
    positive_rows: Tensor,
    pos_weight: float,
    chunk_rows: int | None,
) -> Problem:
    """Bring the inputs to one dtype, as autocast has it, and choose the chunk."""
    device = x.device.type
    common = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and common != torch.float64:
        common = torch.get_autocast_dtype(device)
    if row_weight is not None:
        row_weight = row_weight.to(_sum_dtype(common))
    if chunk_rows is None:
        chunk_rows = max(1, _CHUNK_BYTES // (4 * max(1, weight.shape[0])))
        chunk_rows = max(chunk_rows // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE, min(chunk_rows, _CHUNK_MULTIPLE))
    return Problem(
        x.to(common), weight.to(common), row_weight, positive_ptr, positive_rows, float(pos_weight), chunk_rows
    )


def solve(problem: Problem, needs_x: bool, needs_weight: bool, step: LogitsStep) -> Solution:
    """Walk the chunks: logits, `step`, and the two products that carry its gradients to `x` and `weight`."""
    (N, D), V, device = problem.x.shape, problem.weight.shape[0], problem.x.device
    sums = _sum_dtype(problem.x.dtype)
    # on a CPU a product of half precision is rounded to half precision, so there it is formed in float32
    products = sums if device.type == "cpu" else problem.x.dtype
    head = problem.weight.to(products)
    grad_x = torch.empty(N, D, dtype=sums, device=device) if needs_x else None
    grad_weight = torch.zeros(V, D, dtype=sums, device=device) if needs_weight else None
    losses = torch.empty(N, dtype=sums, device=device)
    logits = torch.empty(min(N, problem.chunk_rows) if products == sums else 0, V, dtype=sums, device=device)
    for start in range(0, N, problem.chunk_rows):
        stop = min(start + problem.chunk_rows, N)
        rows = problem.x[start:stop].to(products)
        losses[start:stop], dz = _take_step(rows, head, logits[: stop - start], start, problem, step)
        if grad_x is not None:
            grad_x[start:stop] = _multiply(dz, head, sums)
        if grad_weight is not None:
            _add_product(grad_weight, dz.T, rows)
    return Solution(losses, grad_x, grad_weight)


def weighted_sum(losses: Tensor, row_weight: Tensor | None) -> Tensor:
    """0-dim sum of the weighted losses, formed in float64."""
    weighted = losses if row_weight is None else losses * row_weight
    return weighted.sum(dtype=torch.float64).to(losses.dtype)


class _FusedLinearBCE(torch.autograd.Function):
    """The loss before `scale`; the gradients stay in the dtype of the sums until the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        row_weight: Tensor | None,
        positive_ptr: Tensor,
        positive_rows: Tensor,
        pos_weight: float,
        chunk_rows: int,
        wants_gradients: bool,
    ) -> Tensor:
        needs_x, needs_weight, needs_row_weight = (wants_gradients and need for need in ctx.needs_input_grad[:3])
        problem = Problem(x, weight, row_weight, positive_ptr, positive_rows, pos_weight, chunk_rows)
        solution = solve(problem, needs_x, needs_weight, _logits_step)
        ctx.save_for_backward(solution.grad_x, solution.grad_weight, solution.losses if needs_row_weight else None)
        ctx.input_dtype = x.dtype
        return weighted_sum(solution.losses, row_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_row_weight = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        grad_x, grad_weight = (None if g is None else g.to(ctx.input_dtype) for g in (grad_x, grad_weight))
        return grad_x, grad_weight, grad_row_weight, None, None, None, None, None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _take_step(
    rows: Tensor, head: Tensor, logits: Tensor, start: int, problem: Problem, step: LogitsStep
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of a chunk of logits; `logits` is its buffer, unless the gradients have another dtype."""
    if rows.dtype == logits.dtype:
        torch.mm(rows, head.T, out=logits)
        return step(logits, logits, start, problem), logits
    z = _multiply(rows, head.T, logits.dtype)
    dz = torch.empty_like(z, dtype=rows.dtype)
    return step(z, dz, start, problem), dz


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in `dtype`. Half precision is kept in float32 from the accumulator on where the device can do so."""
    if a.dtype != dtype and a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`; in slices of rows if the product has another dtype and has to be formed beside it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    rows = max(1, _CHUNK_BYTES // (4 * max(1, total.shape[1])))
    for part, factor in zip(total.split(rows), a.split(rows), strict=True):
        part.add_(_multiply(factor, b, total.dtype))


def _logits_step(z: Tensor, dz: Tensor, start: int, problem: Problem) -> Tensor:
    n, V = z.shape
    bounds, columns = problem.positive_ptr[start : start + n + 1], problem.positive_rows
    if not torch.compiler.is_compiling():  # then this chunk has all of them
        columns = columns[int(bounds[0]) : int(bounds[-1])]
    row = torch.arange(n, device=z.device).repeat_interleave(bounds.diff(), output_size=columns.shape[0])
    slots = row * V + columns
    flat = z.view(-1)
    z_positive = flat.index_select(0, slots)  # [P of this chunk]
    losses = _softplus_sums_then_sigmoid(z)
    # softplus(z) = z + softplus(-z); logsigmoid, because F.softplus rounds to the identity above 20
    losses.index_add_(0, row, (1.0 - problem.pos_weight) * F.logsigmoid(z_positive) - z_positive)
    flat.index_copy_(0, slots, -problem.pos_weight * torch.sigmoid(-z_positive))
    if problem.row_weight is not None:
        z.mul_(problem.row_weight[start : start + n, None])
    if dz is not z:
        dz.copy_(z)
    return losses


def _softplus_sums_then_sigmoid(z: Tensor) -> Tensor:
    """Return sum_c softplus(z[n, c]) per row and leave sigmoid(z) in `z`.

    softplus(z) = max(z, 0) - log(1 - t) with t = min(s, 1 - s), s = sigmoid(z): exact for either sign. The logarithm
    is the dearest step, so four of them are taken at once through (1 - a)(1 - b) = 1 - (a + b - a b), which keeps a
    small t to full precision where that product itself would round to one. t <= 1/2, so four factors are >= 1/16.
    """
    if torch.compiler.is_compiling():  # a compiler fuses the plain formula
        sums = -F.logsigmoid(-z).sum(1)
        z.sigmoid_()
        return sums
    n, V = z.shape
    quarter = -(-V // 4)
    block = max(1, _BLOCK_ELEMENTS // max(1, V))
    one = torch.ones((), dtype=z.dtype, device=z.device)
    sums = torch.empty(n, dtype=z.dtype, device=z.device)
    scratch = torch.zeros(min(n, block), 4 * quarter, dtype=z.dtype, device=z.device)  # padding columns stay 0
    for start in range(0, n, block):
        part = z[start : start + block]
        padded = scratch[: part.shape[0]]
        t = padded[:, :V]
        torch.clamp_min(part, 0, out=t)
        sums[start : start + block] = t.sum(1)
        part.sigmoid_()
        torch.sub(one, part, out=t)
        torch.minimum(t, part, out=t)
        a, b = padded[:, : 2 * quarter], padded[:, 2 * quarter :]
        pairs = torch.addcmul(a + b, a, b, value=-1)
        a, b = pairs[:, :quarter], pairs[:, quarter:]
        fours = torch.addcmul(a + b, a, b, value=-1)
        sums[start : start + block] -= torch.log1p(fours.neg_()).sum(1)
    return sums
