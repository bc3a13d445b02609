"""`csr_gather_sum` in PyTorch: one `embedding_bag` forward, one over the transposed CSR for the gradient.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WEIGHT_GRADIENT_ELEMENTS = 1 << 20
"""Entries times columns gathered at once for the gradient of `weights`. Changes memory, never the result."""


def csr_gather_sum_eager(indptr: Tensor, indices: Tensor, table: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum the table rows that each CSR row lists; gradients to `table` and `weights` are deterministic.

    Args:
        indptr: `[R + 1]`, int32 or int64, starts at 0, ends at nnz, never decreases.
        indices: `[nnz]`, int32 or int64, each in `[0, C)`. Repeats count every time.
        table: `[C, D]`, floating point.
        weights: `[nnz]` factors in the dtype of `table`, or None for ones.

    Returns:
        `[R, D]` in the dtype of `table`.
    """
    return _CsrGatherSum.apply(indptr.to(indices.dtype), indices, table, weights)


class _CsrGatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indptr: Tensor, indices: Tensor, table: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(indptr, indices, table if weights is not None else None, weights)
        ctx.columns = table.shape[0]
        return _gather_sum(indptr, indices, table, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indptr, indices, table, weights = ctx.saved_tensors
        row_of_entry = _row_of_entry(indptr, indices)
        grad_table = grad_weights = None
        if ctx.needs_input_grad[2]:
            entry_ptr, order = _transpose(indices, ctx.columns)
            factors = None if weights is None else weights[order]
            grad_table = _gather_sum(entry_ptr, row_of_entry[order], grad.contiguous(), factors)
        if ctx.needs_input_grad[3]:
            grad_weights = _entry_products(table, indices, grad, row_of_entry).to(weights.dtype)
        return None, None, grad_table, grad_weights


def _gather_sum(indptr: Tensor, indices: Tensor, table: Tensor, weights: Tensor | None) -> Tensor:
    if table.stride(1) != 1:  # embedding_bag is 25 times slower then; .contiguous() may keep a transposed column
        table = table.clone(memory_format=torch.contiguous_format)
    return F.embedding_bag(
        indices, table, indptr, mode="sum", per_sample_weights=weights, include_last_offset=True
    )  # [R, D]


def _row_of_entry(indptr: Tensor, indices: Tensor) -> Tensor:
    rows = torch.arange(indptr.numel() - 1, dtype=indices.dtype, device=indices.device)
    return rows.repeat_interleave(indptr.diff(), output_size=indices.numel())  # [nnz]


def _transpose(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Entries grouped by table row: `[C + 1]` bounds and the `[nnz]` entry order. Stable, so sums have one order."""
    in_order, order = torch.sort(indices, stable=True)
    every_row = torch.arange(columns + 1, dtype=indices.dtype, device=indices.device)
    return torch.searchsorted(in_order, every_row).to(indices.dtype), order


def _entry_products(table: Tensor, indices: Tensor, grad: Tensor, row_of_entry: Tensor) -> Tensor:
    """`table[indices[e]] . grad[row_of_entry[e]]` for every entry, a block of entries at a time."""
    block = max(1, _WEIGHT_GRADIENT_ELEMENTS // max(1, table.shape[1]))
    products = []
    for i, r in zip(indices.split(block), row_of_entry.split(block), strict=True):
        values, grads = table.index_select(0, i), grad.index_select(0, r)
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()  # so that products are rounded once, at the end
        products.append((values * grads).sum(1))
    return torch.cat(products)
