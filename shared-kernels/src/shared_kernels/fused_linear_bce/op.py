"""`fused_linear_bce`: check the arguments, pick an implementation, define the gradient."""

from typing import Any

import torch
from torch import Tensor

from .._checks import check_bounds, check_indices, check_matrix, check_one_device
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import Problem, fused_linear_bce_eager, prepare, solve, weighted_sum


def fused_linear_bce(
    x: Tensor,
    weight: Tensor,
    positive_ptr: Tensor,
    positive_rows: Tensor,
    *,
    pos_weight: float,
    row_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Compute the multi-label loss of a linear head without its dense target and without all its logits at once.

    With z = x @ weight.T and P_n the positives of row n,
    loss = scale * sum_n row_weight[n] * [sum_c softplus(z_nc) + sum_{c in P_n} (pos_weight softplus(-z_nc) -
    softplus(z_nc))], which is `binary_cross_entropy_with_logits` on multi-hot targets, summed. The gradients to `x`
    and `weight` are formed in the same pass, a chunk of rows at a time, and only if they are needed.

    Args:
        x: `[N, D]`, floating point.
        weight: `[V, D]`, the head.
        positive_ptr: `[N + 1]`, int32 or int64, where each row's positives start; from 0 to P, never decreasing.
        positive_rows: `[P]`, int32 or int64, each in `[0, V)`, without repeats inside a row.
        pos_weight: factor of the positive terms, at least 0.
        row_weight: `[N]`, 0 for rows that do not count; None means ones. Differentiable.
        scale: factor of the loss, a number or a 0-dim tensor. Differentiable.
        chunk_rows: rows per chunk; None takes about 64 MiB of logits. Changes memory and speed, never the result.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        0-dim tensor, float32, or float64 for float64 inputs. All sums are formed in that dtype, those of the gradient
        to `weight` included.

    Raises:
        ValueError: an argument does not fit the others; the message names it.

    Example:
        >>> x, head = torch.zeros(1, 4), torch.zeros(3, 4)
        >>> fused_linear_bce(x, head, torch.tensor([0, 1]), torch.tensor([2]), pos_weight=1.0)  # 3 log 2
        tensor(2.0794)

    Source: Deiseroth et al. 2024, "T-FREE", section 3.2.
    """
    _check(x, weight, positive_ptr, positive_rows, pos_weight, row_weight, chunk_rows)
    device = check_one_device(
        x=x, weight=weight, positive_ptr=positive_ptr, positive_rows=positive_rows, row_weight=row_weight
    )
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if choose(impl, "fused_linear_bce", device, dtype) == "eager":
        return fused_linear_bce_eager(
            x,
            weight,
            positive_ptr,
            positive_rows,
            pos_weight=pos_weight,
            row_weight=row_weight,
            scale=scale,
            chunk_rows=chunk_rows,
        )
    problem = prepare(x, weight, row_weight, positive_ptr, positive_rows, pos_weight, chunk_rows)
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (problem.x, problem.weight)]
    return _fused_linear_bce(*problem, *wants)[0] * scale


def _check(
    x: Tensor,
    weight: Tensor,
    positive_ptr: Tensor,
    positive_rows: Tensor,
    pos_weight: float,
    row_weight: Tensor | None,
    chunk_rows: int | None,
) -> None:
    check_matrix("x", x, "[N, D]")
    check_matrix("weight", weight, "[V, D]")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"weight must have the {x.shape[1]} columns of x, got {weight.shape[1]}.")
    check_bounds("positive_ptr", positive_ptr, x.shape[0], "x")
    check_indices("positive_rows", positive_rows, "[P]")
    if not 0.0 <= pos_weight < float("inf"):
        raise ValueError(f"pos_weight must be finite and at least 0, got {pos_weight}.")
    if row_weight is not None and (row_weight.shape != x.shape[:1] or not row_weight.dtype.is_floating_point):
        raise ValueError(
            f"row_weight must be floating point with the shape {tuple(x.shape[:1])}, one number per row of x, "
            f"got {row_weight.dtype} {tuple(row_weight.shape)}."
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1 or None, got {chunk_rows}.")


@torch.library.custom_op(f"{NAMESPACE}::fused_linear_bce", mutates_args=())
def _fused_linear_bce(
    x: Tensor,
    weight: Tensor,
    row_weight: Tensor | None,
    positive_ptr: Tensor,
    positive_rows: Tensor,
    pos_weight: float,
    chunk_rows: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total, losses per row, gradient to x, gradient to weight; a gradient that nobody needs is empty."""
    from . import kernel

    row_weight = None if row_weight is None else row_weight.contiguous()
    problem = Problem(
        x, weight, row_weight, positive_ptr.contiguous(), positive_rows.contiguous(), pos_weight, chunk_rows
    )
    with torch.autocast(x.device.type, enabled=False):
        solution = solve(problem, needs_x, needs_weight, kernel.Step(problem, needs_x or needs_weight))
        total = weighted_sum(solution.losses, row_weight)
    grads = (solution.grad_x, solution.grad_weight)
    grad_x, grad_weight = (total.new_empty(0) if grad is None else grad for grad in grads)
    return total, solution.losses, grad_x, grad_weight


@_fused_linear_bce.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    _row_weight: Tensor | None,
    _positive_ptr: Tensor,
    _positive_rows: Tensor,
    _pos_weight: float,
    _chunk_rows: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    grad_x = float32(*x.shape) if needs_x else float32(0)
    grad_weight = float32(*weight.shape) if needs_weight else float32(0)
    return float32(), float32(x.shape[0]), grad_x, grad_weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, row_weight, *_, needs_x, needs_weight = inputs
    _, losses, grad_x, grad_weight = output
    ctx.save_for_backward(
        grad_x if needs_x else None, grad_weight if needs_weight else None, None if row_weight is None else losses
    )
    ctx.input_dtype = x.dtype


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients are there already; they are scaled in float32 and then rounded."""
    scaled = [None if saved is None else saved * grad for saved in ctx.saved_tensors]
    grad_x, grad_weight = (None if g is None else g.to(ctx.input_dtype) for g in scaled[:2])
    return grad_x, grad_weight, scaled[2], None, None, None, None, None, None


_fused_linear_bce.register_autograd(_backward, setup_context=_setup_context)
