"""What `csr_gather_sum` means. Slow, short and exact; every implementation is judged against this file."""

from itertools import pairwise

import torch
from torch import Tensor


def csr_gather_sum_reference(indptr: Tensor, indices: Tensor, table: Tensor, weights: Tensor | None = None) -> Tensor:
    """y[r] = sum over e in [indptr[r], indptr[r + 1]) of weights[e] * table[indices[e]], accumulated in float64."""
    values = table.double()[indices.long()]  # [nnz, D]
    if weights is not None:
        values = values * weights.double()[:, None]
    bounds = indptr.tolist()
    rows = [values[start:stop].sum(0) for start, stop in pairwise(bounds)]
    return torch.stack(rows).to(table.dtype) if rows else table.new_zeros(0, table.shape[1])
