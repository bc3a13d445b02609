"""`csr_gather_sum`: check the arguments, pick an implementation, define the gradient."""

from typing import Any

import torch
from torch import Tensor

from .._checks import check_bounds, check_indices, check_matrix, check_one_device, check_vector
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import csr_gather_sum_eager


def csr_gather_sum(
    indptr: Tensor,
    indices: Tensor,
    table: Tensor,
    weights: Tensor | None = None,
    *,
    impl: Implementation = "auto",
) -> Tensor:
    """Sum the table rows that each row of a CSR matrix lists: `y[r] = sum_e weights[e] * table[indices[e]]`.

    The product of a sparse and a dense matrix, for bags of words, trigrams or latents. The gradients to `table` and
    `weights` are sums in a fixed order: the same bits every time.

    Args:
        indptr: `[R + 1]`, int32 or int64, where each row's entries start; from 0 to nnz, never decreasing.
        indices: `[nnz]`, int32 or int64, each in `[0, C)`. Repeats count every time.
        table: `[C, D]`, floating point.
        weights: `[nnz]` in the dtype of `table`; None means ones.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[R, D]` in the dtype of `table`; half precision is summed in float32. A row without entries is zero.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.

    Example:
        >>> table = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
        >>> csr_gather_sum(torch.tensor([0, 2, 3]), torch.tensor([0, 0, 1]), table)
        tensor([[ 2.,  4.],
                [10., 20.]])
    """
    check_bounds("indptr", indptr)
    check_indices("indices", indices, "[nnz]")
    check_matrix("table", table, "[C, D]")
    if weights is not None:
        check_vector("weights", weights, indices.shape[0], "entry of indices", (table.dtype,))
    device = check_one_device(table=table, indptr=indptr, indices=indices, weights=weights)
    if choose(impl, "csr_gather_sum", device, table.dtype) == "eager":
        return csr_gather_sum_eager(indptr, indices, table, weights)
    return _csr_gather_sum(indptr, indices, table, weights)


@torch.library.custom_op(f"{NAMESPACE}::csr_gather_sum", mutates_args=())
def _csr_gather_sum(indptr: Tensor, indices: Tensor, table: Tensor, weights: Tensor | None) -> Tensor:
    from . import kernel

    indptr, indices, table = indptr.contiguous(), indices.contiguous(), table.contiguous()
    weights = None if weights is None else weights.contiguous()
    out = table.new_empty(indptr.shape[0] - 1, table.shape[1])
    return kernel.gather_sum(indptr, indices, weights, table, out)


@_csr_gather_sum.register_fake
def _(indptr: Tensor, _indices: Tensor, table: Tensor, _weights: Tensor | None) -> Tensor:
    return table.new_empty(indptr.shape[0] - 1, table.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::csr_gather_sum_grad_table", mutates_args=())
def _grad_table(grad: Tensor, indptr: Tensor, indices: Tensor, weights: Tensor | None, columns: int) -> Tensor:
    """The same sum over the transposed matrix: every table row collects the gradients of the rows that list it."""
    from . import kernel

    bounds, order = kernel.transpose(indices.contiguous(), columns)
    rows = kernel.row_of_entry(indptr, indices.numel())[order]
    factors = None if weights is None else weights[order]
    out = grad.new_empty(columns, grad.shape[1])
    return kernel.gather_sum(bounds, rows, factors, grad.contiguous(), out)


@_grad_table.register_fake
def _(grad: Tensor, _indptr: Tensor, _indices: Tensor, _weights: Tensor | None, columns: int) -> Tensor:
    return grad.new_empty(columns, grad.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::csr_gather_sum_grad_weights", mutates_args=())
def _grad_weights(grad: Tensor, indptr: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    from . import kernel

    indptr, indices, table = indptr.contiguous(), indices.contiguous(), table.contiguous()
    return kernel.gather_sum_grad_weights(indptr, indices, table, grad.contiguous(), table.new_empty(indices.shape[0]))


@_grad_weights.register_fake
def _(_grad: Tensor, _indptr: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(indices.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    indptr, indices, table, weights = inputs
    ctx.save_for_backward(indptr, indices, None if weights is None else table, weights)
    ctx.columns = table.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indptr, indices, table, weights = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_table = _grad_table(grad, indptr, indices, weights, ctx.columns) if needs[2] else None
    grad_weights = _grad_weights(grad, indptr, indices, table) if needs[3] else None
    return None, None, grad_table, grad_weights


_csr_gather_sum.register_autograd(_backward, setup_context=_setup_context)
