"""What `fused_linear_bce` means. Slow, short and exact; every implementation is judged against this file."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def fused_linear_bce_reference(
    x: Tensor,
    weight: Tensor,
    positive_ptr: Tensor,
    positive_rows: Tensor,
    *,
    pos_weight: float,
    row_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Loss = scale * sum_n row_weight[n] * BCEWithLogits(x[n] @ weight.T, multi-hot of P_n), in float64."""
    z = x.double() @ weight.double().T  # [N, V]
    target = torch.zeros_like(z)
    bounds = positive_ptr.tolist()
    for n, (start, stop) in enumerate(pairwise(bounds)):
        target[n, positive_rows[start:stop].long()] = 1.0
    weight_of_ones = torch.tensor(float(pos_weight), dtype=torch.float64, device=x.device)
    losses = F.binary_cross_entropy_with_logits(z, target, pos_weight=weight_of_ones, reduction="none").sum(1)
    if row_weight is not None:
        losses = losses * row_weight.double()
    return losses.sum() * scale
