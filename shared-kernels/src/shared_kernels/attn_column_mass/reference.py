"""What `attn_column_mass` means. Slow, short and exact; every implementation is judged against this file."""

import torch
from torch import Tensor


def attn_column_mass_reference(
    q: Tensor,
    k: Tensor,
    column_weight: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """`[rows, Q]` float64: mean over the heads of sum_c weight_c softmax(scale q k^T)_c; 0 where no key is seen."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ keys.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)  # [rows, H, Q, K]
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask.double()
    normalizer = scores.logsumexp(-1) if lse is None else lse.double()
    weights = (scores - normalizer.unsqueeze(-1)).exp().masked_fill(normalizer.isneginf().unsqueeze(-1), 0.0)
    return (weights * column_weight.double()[:, None, None]).sum(-1).mean(1)
