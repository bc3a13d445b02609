"""Triton kernels of `csr_gather_sum`. No validation: op.py has done it."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, on_device_of


class Config(NamedTuple):
    """A tile of BLOCK_E entries times BLOCK_D columns, for tables of at most `columns` columns."""

    columns: int
    BLOCK_E: int
    BLOCK_D: int
    num_warps: int


CONFIGS = (
    Config(columns=16, BLOCK_E=16, BLOCK_D=16, num_warps=1),
    Config(columns=128, BLOCK_E=16, BLOCK_D=128, num_warps=2),
    Config(columns=512, BLOCK_E=8, BLOCK_D=512, num_warps=8),
    Config(columns=2**62, BLOCK_E=4, BLOCK_D=1024, num_warps=8),
)


def pick(columns: int) -> Config:
    """The tile for a table of that many columns."""
    return next(config for config in CONFIGS if columns <= config.columns)


@triton.jit
def csr_gather_sum_fwd_kernel(
    indptr_ptr,  # [R + 1]
    indices_ptr,  # [nnz]
    weights_ptr,  # [nnz] or None
    table_ptr,  # [C, D], rows table_stride apart
    out_ptr,  # [R, D], rows out_stride apart
    D,
    table_stride,
    out_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_D columns of one output row and walks its entries, BLOCK_E at a time.

    Rows are the fast axis of the grid, so all rows of one column slice run before the next: the slice stays in L2.
    """
    r = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    start = tl.load(indptr_ptr + r).to(tl.int64)
    stop = tl.load(indptr_ptr + r + 1).to(tl.int64)

    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(start, stop, BLOCK_E):
        entries = first + tl.arange(0, BLOCK_E)
        live = entries < stop
        rows = tl.load(indices_ptr + entries, mask=live, other=0).to(tl.int64)
        places = rows[:, None] * table_stride + cols[None, :]  # [BLOCK_E, BLOCK_D]
        values = tl.load(table_ptr + places, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if weights_ptr is not None:
            factors = tl.load(weights_ptr + entries, mask=live, other=0.0).to(tl.float32)
            values *= factors[:, None]
        total += tl.sum(values, axis=0)

    tl.store(out_ptr + r * out_stride + cols, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def csr_gather_sum_bwd_weights_kernel(
    indptr_ptr,  # [R + 1]
    indices_ptr,  # [nnz]
    table_ptr,  # [C, D]
    grad_ptr,  # [R, D]
    out_ptr,  # [nnz]
    D,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns the entries of one CSR row: the products of their table rows with the row's gradient."""
    r = tl.program_id(0).to(tl.int64)
    start = tl.load(indptr_ptr + r).to(tl.int64)
    stop = tl.load(indptr_ptr + r + 1).to(tl.int64)

    for first in range(start, stop, BLOCK_E):
        entries = first + tl.arange(0, BLOCK_E)
        live = entries < stop
        rows = tl.load(indices_ptr + entries, mask=live, other=0).to(tl.int64)
        products = tl.zeros([BLOCK_E], dtype=tl.float32)
        for first_col in range(0, D, BLOCK_D):
            cols = first_col + tl.arange(0, BLOCK_D)
            inside = cols < D
            grad = tl.load(grad_ptr + r * D + cols, mask=inside, other=0.0).to(tl.float32)
            places = rows[:, None] * D + cols[None, :]
            values = tl.load(table_ptr + places, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
            products += tl.sum(values * grad[None, :], axis=1)
        tl.store(out_ptr + entries, products.to(out_ptr.dtype.element_ty), mask=live)


def gather_sum(indptr: Tensor, indices: Tensor, weights: Tensor | None, table: Tensor, out: Tensor) -> Tensor:
    """Fill `out` `[R, D]` with the CSR sums. Table and output may be column slices of wider matrices."""
    rows, D = out.shape
    if out.numel():
        config = pick(D)
        grid = (rows, triton.cdiv(D, config.BLOCK_D))
        with on_device_of(table):
            csr_gather_sum_fwd_kernel[grid](
                indptr,
                indices,
                weights,
                table,
                out,
                D,
                table.stride(0),
                out.stride(0),
                BLOCK_E=config.BLOCK_E,
                BLOCK_D=config.BLOCK_D,
                num_warps=config.num_warps,
                **LAUNCH_OPTIONS,
            )
    return out


def gather_sum_grad_weights(indptr: Tensor, indices: Tensor, table: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    """Fill `out` `[nnz]` with the products of each entry's table row and its CSR row's gradient."""
    rows, D = grad.shape
    if out.numel():
        config = pick(D)
        with on_device_of(table):
            csr_gather_sum_bwd_weights_kernel[(rows,)](
                indptr,
                indices,
                table,
                grad,
                out,
                D,
                BLOCK_E=config.BLOCK_E,
                BLOCK_D=config.BLOCK_D,
                num_warps=config.num_warps,
                **LAUNCH_OPTIONS,
            )
    return out


def row_of_entry(indptr: Tensor, nnz: int) -> Tensor:
    """`[nnz]` int64: the CSR row that each entry belongs to. Launches only, no synchronization."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return rows.repeat_interleave(indptr.diff(), output_size=nnz)


def transpose(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Entries grouped by column: `[columns + 1]` bounds, `[nnz]` entry order. Entries from `columns` on drop out."""
    in_order, order = torch.sort(indices, stable=True)
    every_column = torch.arange(columns + 1, dtype=indices.dtype, device=indices.device)
    return torch.searchsorted(in_order, every_column), order


def _cases(table: str, out: str, bounds: str, indices: str) -> list[AotCase]:
    cases = []
    plain = {"indptr_ptr": bounds, "indices_ptr": indices, "table_ptr": table, "out_ptr": out, "D": "i32"}
    sums = {**plain, "table_stride": "i32", "out_stride": "i32"}
    for config in CONFIGS:
        tile = {"BLOCK_E": config.BLOCK_E, "BLOCK_D": config.BLOCK_D}
        weighted = {**sums, "weights_ptr": table}
        cases.append(AotCase(csr_gather_sum_fwd_kernel, weighted, tile, config.num_warps))
        cases.append(AotCase(csr_gather_sum_fwd_kernel, sums, {"weights_ptr": None, **tile}, config.num_warps))
        products = {**plain, "grad_ptr": out}
        cases.append(AotCase(csr_gather_sum_bwd_weights_kernel, products, tile, config.num_warps))
    return cases


AOT_CASES = (
    *_cases("*fp32", "*fp32", "*i32", "*i32"),
    *_cases("*bf16", "*bf16", "*i32", "*i32"),
    *_cases("*fp16", "*fp16", "*i64", "*i64"),
    *_cases("*fp32", "*bf16", "*i32", "*i64"),  # from unit sums to words, in hash_embedding_bag
)
