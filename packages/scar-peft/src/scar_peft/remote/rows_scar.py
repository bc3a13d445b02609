"""The weights that a few concepts need."""

from typing import NamedTuple

from torch import Tensor


class FoldedConcepts(NamedTuple):
    """What scoring and steering C concepts needs of a coder: C rows instead of n."""

    encoder: Tensor
    """Rows of E, [C, d]."""
    encoder_sum: Tensor
    """Their sums, [C]: E_c . x - mean encoder_sum_c = E_c . (x - mean), for kernels that do not center rows."""
    bias: Tensor
    """b_lat - E b_pre, [C]."""
    decoder: Tensor
    """Columns of D as rows, [C, d]."""
