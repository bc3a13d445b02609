"""What the sparse coder operators mean. Slow, short and exact; every implementation is judged against this file."""

import torch
from torch import Tensor


def topk_select_reference(pre: Tensor, k: int, *, always: int = 0) -> tuple[Tensor, Tensor]:
    """The first `always` numbers of every row, then the k largest others in the order of their indices."""
    n = pre.shape[1]
    columns = []
    for row in pre.detach():
        # stable, so the lower index wins a tie; NaN counts as the largest
        order = row[always:].sort(descending=True, stable=True).indices[:k]
        columns.append(torch.cat([torch.arange(always), always + order.sort().values.cpu()]))
    width = always + min(k, n - always)
    indices = torch.stack(columns).to(pre.device) if columns else torch.zeros(0, width, dtype=torch.int64)
    return pre.gather(1, indices), indices.to(torch.int32)


def topk_sparse_decode_reference(
    indices: Tensor,
    values: Tensor,
    rows: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y_i = (sum_j values_ij * rows[indices_ij] + bias) * scale_i + shift_i, in float64."""
    out = (values.double()[:, :, None] * rows.double()[indices.long()]).sum(1)  # [N, d]
    if bias is not None:
        out = out + bias.double()
    if scale is not None:
        out = out * scale.double()[:, None]
    if shift is not None:
        out = out + shift.double()[:, None]
    return out


def sae_encode_topk_reference(
    x: Tensor,
    encoder: Tensor,
    latent_bias: Tensor,
    pre_bias: Tensor,
    k: int,
    *,
    always: int = 0,
    eps: float = 1e-5,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Selected entries of encoder @ (z - pre_bias) + latent_bias, z the standardized row; in float64."""
    z = x.double()
    mean, std = torch.zeros_like(z[:, 0]), torch.ones_like(z[:, 0])
    if normalize:
        mean = z.mean(1)
        centered = z - mean[:, None]
        std = torch.linalg.vector_norm(centered, dim=1) / max(x.shape[1] - 1, 1) ** 0.5
        z = centered / (std[:, None] + eps)
    pre = (z - pre_bias.double()) @ encoder.double().T + latent_bias.double()
    return *topk_select_reference(pre, k, always=always), mean, std
