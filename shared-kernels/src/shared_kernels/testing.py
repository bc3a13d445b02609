"""Helpers for tests of operators: tolerances, memory that shows when it is not written, and random cases."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor


def tolerances(dtype: torch.dtype, terms: int) -> dict[str, float]:
    """`rtol` and `atol` for a sum of `terms` numbers of magnitude one that is rounded to `dtype` at the end.

    They depend on the dtype and the length of the sum only: sums are formed in float32 (float64 for float64), whose
    rounding errors add up like a random walk.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    length = math.sqrt(max(terms, 1))
    relative = 2 * torch.finfo(dtype).eps + 4 * torch.finfo(accumulator).eps * length
    return {"rtol": relative, "atol": relative * length}


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Inside, `empty`, `empty_like` and `new_empty` return NaN (or the largest integer): what nobody writes shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.dtype.is_floating_point:
                return tensor.fill_(math.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return call

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


def random_csr(rows: int, columns: int, longest: int, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    """Bounds and indices of a CSR matrix with 0 to `longest` entries per row; indices may repeat."""
    counts = torch.randint(0, longest + 1, (rows,))
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return indptr.to(dtype), torch.randint(0, max(columns, 1), (int(indptr[-1]),)).to(dtype)


def random_sets(rows: int, columns: int, longest: int, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    """Bounds and indices of a CSR matrix whose rows list 0 to `longest` distinct indices."""
    sets = [torch.randperm(columns)[: int(torch.randint(0, min(longest, columns) + 1, ()))] for _ in range(rows)]
    indptr = torch.tensor([0, *(each.numel() for each in sets)]).cumsum(0)
    return indptr.to(dtype), torch.cat([*sets, torch.zeros(0, dtype=torch.int64)]).to(dtype)


class DictionaryCase(NamedTuple):
    """The arguments of `decode_scores` that describe the words."""

    word_ptr: Tensor
    word_units: Tensor
    word_edges: Tensor
    unit_rows: Tensor
    correction_ptr: Tensor
    correction_rows: Tensor
    correction_kinds: Tensor


def random_dictionary(
    words: int, units: int, rows: int, m: int, longest: int, dtype: torch.dtype = torch.int32
) -> DictionaryCase:
    """Words of 0 to `longest` distinct units, up to two of them edge units, with the corrections that they need."""
    word_ptr, word_units = random_sets(words, units, longest)
    unit_rows = torch.randint(0, rows, (units, m))
    counts = word_ptr.diff()
    word_edges = torch.minimum(torch.randint(0, 3, (words,)), counts)
    corrections = [
        _corrections(unit_rows[word_units[start:stop].long()], int(edges))
        for start, stop, edges in zip(word_ptr[:-1], word_ptr[1:], word_edges, strict=True)
    ]
    correction_ptr = torch.tensor([0, *(len(each) for each in corrections)]).cumsum(0)
    flat = torch.tensor([pair for each in corrections for pair in each], dtype=torch.int64).view(-1, 2)
    return DictionaryCase(
        word_ptr.to(dtype),
        word_units.to(dtype),
        word_edges.to(torch.uint8),
        unit_rows.to(dtype),
        correction_ptr.to(dtype),
        flat[:, 0].to(dtype),
        flat[:, 1].to(torch.uint8),
    )


def _corrections(rows_of_units: Tensor, edges: int) -> list[tuple[int, int]]:
    """(row, kind) of every surplus occurrence in a word whose last `edges` units are edge units."""
    border = rows_of_units.shape[0] - edges
    inner, edge = (part.flatten().tolist() for part in (rows_of_units[:border], rows_of_units[border:]))
    found, in_inner, in_edge = [], set(), set()
    for row in inner:
        if row in in_inner:
            found.append((row, 0))
        in_inner.add(row)
    for row in edge:
        if row in in_edge:
            found.append((row, 1))
        elif row in in_inner:
            found.append((row, 2))
        in_edge.add(row)
    return found
