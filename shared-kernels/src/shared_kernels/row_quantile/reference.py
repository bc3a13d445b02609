"""What `row_quantile` means. Slow, short and exact; every implementation is judged against this file."""

import math

import torch
from torch import Tensor


def row_quantile_reference(S: Tensor, q: Tensor | float) -> Tensor:
    """`[R]` float64: the number at rank q * (n - 1) of each sorted row, between two ranks by linear interpolation.

    The rank is rounded to the dtype of `S`, as `torch.quantile` does. A row with a NaN has no quantile but NaN.
    """
    R, n = S.shape
    ranks = torch.as_tensor(q, dtype=S.dtype).expand(R) * (n - 1)
    out = []
    for row, rank in zip(S.tolist(), ranks.tolist(), strict=True):
        if any(math.isnan(each) for each in row):
            out.append(math.nan)
            continue
        lower, upper = (sorted(row)[rounded(rank)] for rounded in (math.floor, math.ceil))
        out.append(lower + (rank - math.floor(rank)) * (upper - lower))
    return torch.tensor(out, dtype=torch.float64)
