"""`hash_embedding_bag`: check the arguments, pick an implementation, define the gradient."""

from typing import Any

import torch
from torch import Tensor

from .._checks import check_bounds, check_indices, check_matrix, check_one_device
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import hash_embedding_bag_eager


def hash_embedding_bag(
    word_ptr: Tensor,
    word_units: Tensor,
    unit_rows: Tensor,
    table: Tensor,
    *,
    impl: Implementation = "auto",
) -> Tensor:
    """Embed words as sums of hash-table rows: `e[w] = sum over units u of w, sum over i, table[unit_rows[u, i]]`.

    Words share units (trigrams) and a text repeats its words, so the rows of each unit in use are summed once. Pass
    distinct words and copy the result to their places to save the rest of the repetition. The gradient is dense and
    a sum in a fixed order: the same bits every time.

    Args:
        word_ptr: `[W + 1]`, int32 or int64, where each word's units start; from 0 to nnz, never decreasing.
        word_units: `[nnz]`, int32 or int64, each in `[0, U)`. Repeats count every time.
        unit_rows: `[U, m]`, int32 or int64, each in `[0, V)`. Repeats count every time.
        table: `[V, D]`, floating point.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[W, D]` in the dtype of `table`; half precision is summed in float32. A word without units is zero.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.

    Example:
        >>> table = torch.tensor([[1.0], [10.0], [100.0]])
        >>> unit_rows = torch.tensor([[0, 1], [1, 2]])
        >>> hash_embedding_bag(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1]), unit_rows, table)
        tensor([[ 11.],
                [121.]])
    """
    check_bounds("word_ptr", word_ptr)
    check_indices("word_units", word_units, "[nnz]")
    check_indices("unit_rows", unit_rows, "[U, m]")
    check_matrix("table", table, "[V, D]")
    device = check_one_device(table=table, word_ptr=word_ptr, word_units=word_units, unit_rows=unit_rows)
    if choose(impl, "hash_embedding_bag", device, table.dtype) == "eager":
        return hash_embedding_bag_eager(word_ptr, word_units, unit_rows, table)
    return _hash_embedding_bag(word_ptr, word_units, unit_rows, table)


@torch.library.custom_op(f"{NAMESPACE}::hash_embedding_bag", mutates_args=())
def _hash_embedding_bag(word_ptr: Tensor, word_units: Tensor, unit_rows: Tensor, table: Tensor) -> Tensor:
    from . import kernel

    out = table.new_empty(word_ptr.shape[0] - 1, table.shape[1])
    return kernel.embed(word_ptr.contiguous(), word_units, unit_rows.contiguous(), table.contiguous(), out)


@_hash_embedding_bag.register_fake
def _(word_ptr: Tensor, _word_units: Tensor, _unit_rows: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(word_ptr.shape[0] - 1, table.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::hash_embedding_bag_grad_table", mutates_args=())
def _grad_table(grad: Tensor, word_ptr: Tensor, word_units: Tensor, unit_rows: Tensor, rows: int) -> Tensor:
    from . import kernel

    out = grad.new_empty(rows, grad.shape[1])
    return kernel.grad_table(grad.contiguous(), word_ptr.contiguous(), word_units, unit_rows.contiguous(), out)


@_grad_table.register_fake
def _(grad: Tensor, _word_ptr: Tensor, _word_units: Tensor, _unit_rows: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    word_ptr, word_units, unit_rows, table = inputs
    ctx.save_for_backward(word_ptr, word_units, unit_rows)
    ctx.rows = table.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[3]
    return None, None, None, _grad_table(grad, *ctx.saved_tensors, ctx.rows) if needed else None


_hash_embedding_bag.register_autograd(_backward, setup_context=_setup_context)
