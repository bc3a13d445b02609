"""Triton kernels of `hash_embedding_bag`. No validation: op.py has done it.

The sums of the units in use are formed once, in float32, for a slice of columns that fits a small buffer; the words
are CSR sums over that buffer. The gradient runs the same two steps backwards over the transposed lists.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, on_device_of
from ..csr_gather_sum.kernel import gather_sum, row_of_entry, transpose

BUFFER_ELEMENTS = 1 << 24
"""float32 numbers in the buffer of unit sums: 64 MiB, about what the L2 cache of a large GPU holds."""

SLICE_COLUMNS = 128
"""Column slices are multiples of this."""


class Config(NamedTuple):
    """A tile of BLOCK_M rows times BLOCK_D columns, for slices of at most `columns` columns."""

    columns: int
    BLOCK_M: int
    BLOCK_D: int
    num_warps: int


CONFIGS = (
    Config(columns=128, BLOCK_M=16, BLOCK_D=128, num_warps=2),
    Config(columns=2**62, BLOCK_M=8, BLOCK_D=512, num_warps=8),
)


def pick(columns: int) -> Config:
    """The tile for a slice of that many columns."""
    return next(config for config in CONFIGS if columns <= config.columns)


class UsedUnits(NamedTuple):
    """The units that occur, without a count on the host: `units` has room for all that could occur."""

    units: Tensor  # [room] int64; past `number` they are arbitrary
    number: Tensor  # [1] int64: how many are in use
    position: Tensor  # [nnz] int64: where each entry's unit stands in `units`


@triton.jit
def hash_embedding_bag_units_kernel(
    units_ptr,  # [room]
    number_ptr,  # [1]
    unit_rows_ptr,  # [U, m]
    table_ptr,  # [V, D] or a column slice of it, rows table_stride apart
    out_ptr,  # [room, D], rows out_stride apart
    m,
    D,
    table_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program sums BLOCK_D columns of the m rows of one unit in use."""
    slot = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_use = slot < tl.load(number_ptr)
    inside = cols < tl.where(in_use, D, 0)
    unit = tl.load(units_ptr + slot, mask=in_use, other=0).to(tl.int64)

    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, tl.where(in_use, m, 0), BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        live = i < m
        rows = tl.load(unit_rows_ptr + unit * m + i, mask=live, other=0).to(tl.int64)
        places = rows[:, None] * table_stride + cols[None, :]  # [BLOCK_M, BLOCK_D]
        values = tl.load(table_ptr + places, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(values, axis=0)

    tl.store(out_ptr + slot * out_stride + cols, total, mask=inside)


def embed(word_ptr: Tensor, word_units: Tensor, unit_rows: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Fill `out` `[W, D]` with the embedding sums."""
    if out.numel() == 0 or word_units.numel() == 0:
        return out.zero_()
    used = _units_in_use(word_units, unit_rows.shape[0])
    for columns, sums in _slices(used.units.shape[0], table):
        _sum_units(used, unit_rows, table[:, columns], sums)
        gather_sum(word_ptr, used.position, None, sums, out[:, columns])
    return out


def grad_table(grad: Tensor, word_ptr: Tensor, word_units: Tensor, unit_rows: Tensor, out: Tensor) -> Tensor:
    """Fill `out` `[V, D]` with the gradient to the table."""
    if out.numel() == 0 or word_units.numel() == 0:
        return out.zero_()
    used = _units_in_use(word_units, unit_rows.shape[0])
    room, m, rows = used.units.shape[0], unit_rows.shape[1], out.shape[0]
    unit_bounds, order = transpose(used.position, room)
    word_of_entry = row_of_entry(word_ptr, word_units.shape[0])[order]
    slots = torch.arange(room, device=grad.device)[:, None]
    # rows of slots that are not in use get a number past the table, which `transpose` drops
    used_rows = torch.where(slots < used.number, unit_rows[used.units], rows).view(-1)
    row_bounds, order = transpose(used_rows, rows)
    slot_of_entry = order // m
    for columns, sums in _slices(room, out):
        gather_sum(unit_bounds, word_of_entry, None, grad[:, columns], sums)
        gather_sum(row_bounds, slot_of_entry, None, sums, out[:, columns])
    return out


def _units_in_use(word_units: Tensor, units: int) -> UsedUnits:
    entries = word_units.long()
    room = min(units, entries.shape[0])
    occurs = torch.zeros(units, dtype=torch.int64, device=entries.device).scatter_(0, entries, 1)
    rank = occurs.cumsum(0)
    slot = torch.where(occurs > 0, rank - 1, room)  # all others meet in one slot too many
    used = torch.zeros(room + 1, dtype=torch.int64, device=entries.device)
    used.scatter_(0, slot, torch.arange(units, device=entries.device))
    return UsedUnits(used[:room], rank[-1:], rank[entries] - 1)


def _slices(room: int, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Column slices of the table, each with a float32 buffer `[room, columns of the slice]`."""
    D = table.shape[1]
    width = max(SLICE_COLUMNS, BUFFER_ELEMENTS // room // SLICE_COLUMNS * SLICE_COLUMNS)
    buffer = torch.empty(room, min(width, D), dtype=torch.float32, device=table.device)
    for start in range(0, D, width):
        stop = min(start + width, D)
        yield slice(start, stop), buffer[:, : stop - start]


def _sum_units(used: UsedUnits, unit_rows: Tensor, table: Tensor, out: Tensor) -> None:
    room, D = out.shape
    config = pick(D)
    with on_device_of(table):
        hash_embedding_bag_units_kernel[(room, triton.cdiv(D, config.BLOCK_D))](
            used.units,
            used.number,
            unit_rows,
            table,
            out,
            unit_rows.shape[1],
            D,
            table.stride(0),
            out.stride(0),
            BLOCK_M=config.BLOCK_M,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
            **LAUNCH_OPTIONS,
        )


def _case(dtype: str, index: str, config: Config) -> AotCase:
    lists = {"units_ptr": "*i64", "number_ptr": "*i64", "unit_rows_ptr": f"*{index}"}
    numbers = {"m": "i32", "D": "i32", "table_stride": "i32", "out_stride": "i32"}
    signature = {**lists, "table_ptr": f"*{dtype}", "out_ptr": "*fp32", **numbers}
    tile = {"BLOCK_M": config.BLOCK_M, "BLOCK_D": config.BLOCK_D}
    return AotCase(hash_embedding_bag_units_kernel, signature, tile, config.num_warps)


AOT_CASES = tuple(
    _case(dtype, index, config)
    for dtype, index in (("fp32", "i32"), ("bf16", "i32"), ("fp16", "i64"))
    for config in CONFIGS
)
