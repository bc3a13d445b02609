"""`hash_embedding_bag` in PyTorch: sum the rows of each unit once, then the units of each word.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMD_COLUMNS = 8
"""`embedding_bag` on one column costs twelve times as much as on eight, so narrow tables are padded to this width."""


def hash_embedding_bag_eager(word_ptr: Tensor, word_units: Tensor, unit_rows: Tensor, table: Tensor) -> Tensor:
    """Embed words as sums of table rows, with a dense and deterministic gradient to `table`.

    Words share units (trigrams) and units repeat between words, so every unit in use is summed once.

    Args:
        word_ptr: `[W + 1]`, int32 or int64, bounds of each word in `word_units`.
        word_units: `[nnz]`, int32 or int64, each in `[0, U)`. Repeats count every time.
        unit_rows: `[U, m]`, int32 or int64, each in `[0, V)`. Repeats count every time.
        table: `[V, D]`, floating point.

    Returns:
        `[W, D]` in the dtype of `table`. A word without units is zero.
    """
    return _HashEmbeddingBag.apply(word_ptr.to(word_units.dtype), word_units, unit_rows.to(word_units.dtype), table)


class _HashEmbeddingBag(torch.autograd.Function):
    @staticmethod
    def forward(ctx, word_ptr, word_units, unit_rows, table):
        used_rows, position = _units_in_use(word_units, unit_rows)  # [u, m], [nnz]
        flat_rows = used_rows.reshape(-1)
        unit_sums = _gather_sum(_even_bounds(used_rows), flat_rows, _sum_dtype(table))  # [u, D]
        ctx.save_for_backward(word_ptr, position, used_rows)
        ctx.table_rows, ctx.table_dtype = table.shape[0], table.dtype
        return _gather_sum(word_ptr, position, unit_sums).to(table.dtype)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.needs_input_grad[3]:
            return None, None, None, None
        word_ptr, position, used_rows = ctx.saved_tensors
        units, m = used_rows.shape
        words = torch.arange(word_ptr.numel() - 1, dtype=position.dtype, device=position.device)
        word_of_entry = words.repeat_interleave(word_ptr.diff(), output_size=position.numel())
        entry_ptr, order = _transpose(position, units)
        grad_units = _gather_sum(entry_ptr, word_of_entry[order], _sum_dtype(grad.contiguous()))  # [u, D]
        entry_ptr, order = _transpose(used_rows.reshape(-1), ctx.table_rows)
        unit_of_entry = order.div(max(m, 1), rounding_mode="floor").to(position.dtype)
        return None, None, None, _gather_sum(entry_ptr, unit_of_entry, grad_units).to(ctx.table_dtype)


def _units_in_use(word_units: Tensor, unit_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the units that occur, and for every entry its unit's position among them."""
    if torch.compiler.is_compiling():  # how many units occur is data: a traced graph computes one sum per entry
        position = torch.arange(word_units.numel(), dtype=word_units.dtype, device=word_units.device)
        return unit_rows.index_select(0, word_units), position
    occurs = torch.zeros(unit_rows.shape[0], dtype=word_units.dtype, device=word_units.device)
    occurs[word_units] = 1
    position = (occurs.cumsum(0, dtype=word_units.dtype) - 1).index_select(0, word_units)
    return unit_rows.index_select(0, occurs.nonzero().squeeze(1)), position


def _sum_dtype(values: Tensor) -> Tensor:
    """Half precision is summed in float32 over both levels and rounded once, at the end."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _even_bounds(rows: Tensor) -> Tensor:
    units, m = rows.shape
    return torch.arange(units + 1, dtype=rows.dtype, device=rows.device) * m


def _gather_sum(indptr: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    columns = table.shape[1]
    if columns < _SIMD_COLUMNS:
        table = F.pad(table, (0, _SIMD_COLUMNS - columns))
    sums = F.embedding_bag(indices, table, indptr, mode="sum", include_last_offset=True)
    return sums if columns >= _SIMD_COLUMNS else sums[:, :columns].contiguous()


def _transpose(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Entries grouped by value: `[columns + 1]` bounds and the entry order. Stable, so sums have one order."""
    in_order, order = torch.sort(indices, stable=True)
    every_value = torch.arange(columns + 1, dtype=indices.dtype, device=indices.device)
    return torch.searchsorted(in_order, every_value).to(indices.dtype), order
