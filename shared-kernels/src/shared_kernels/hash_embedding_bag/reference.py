"""What `hash_embedding_bag` means. Slow, short and exact; every implementation is judged against this file."""

from itertools import pairwise

import torch
from torch import Tensor


def hash_embedding_bag_reference(word_ptr: Tensor, word_units: Tensor, unit_rows: Tensor, table: Tensor) -> Tensor:
    """e[w] = sum over units u of word w, sum over i, of table[unit_rows[u, i]]; repeats count, float64 sums."""
    bounds = word_ptr.tolist()
    rows = unit_rows.long()[word_units.long()]  # [nnz, m]
    values = table.double()[rows].sum(1)  # [nnz, D]
    words = [values[start:stop].sum(0) for start, stop in pairwise(bounds)]
    return torch.stack(words).to(table.dtype) if words else table.new_zeros(0, table.shape[1])
