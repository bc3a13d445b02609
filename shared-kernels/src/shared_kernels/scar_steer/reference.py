"""What `scar_scores` and `scar_steer` mean. Slow, short and exact; every implementation is judged against this file."""

import torch
from torch import Tensor

ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def scar_scores_reference(
    x: Tensor, encoder: Tensor, encoder_sum: Tensor, bias: Tensor, *, eps: float = 1e-5, normalize: bool = True
) -> Tensor:
    """Scores E z + bias with z = (x - mean) / (std + eps), in float64."""
    dots = x.double() @ encoder.double().T  # [..., C]
    if not normalize:
        return dots + bias.double()
    mean, std = _mean_and_std(x)
    return (dots - mean * encoder_sum.double()) / (std + eps) + bias.double()


def scar_steer_reference(
    x: Tensor,
    encoder: Tensor,
    encoder_sum: Tensor,
    bias: Tensor,
    decoder: Tensor,
    strength: Tensor,
    *,
    rule: str,
    activation: str = "relu",
    threshold: float = 0.0,
    is_open: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Steered rows x + sum_c k_c D_c with the factors k of the rule, and the pre-activations, in float64."""
    pre = scar_scores_reference(x, encoder, encoder_sum, bias, eps=eps, normalize=normalize)
    decoder, C = decoder.double(), bias.shape[0]
    rows = x.shape[:-1].numel()
    a = strength.double().repeat_interleave(rows // max(1, strength.shape[0]), 0).view(pre.shape)
    if is_open is None:
        is_open = ~(pre <= threshold)  # a NaN counts as open, so that it is not hidden
    std = _mean_and_std(x)[1] if normalize else torch.ones_like(x[..., :1], dtype=torch.float64)
    h = torch.where(is_open.view(pre.shape), ACTIVATIONS[activation](pre), 0.0)
    s = torch.where(is_open.view(pre.shape), torch.sigmoid(pre), 0.0)
    length = torch.linalg.vector_norm(decoder, dim=1)
    unit = torch.where(length > 0, 1.0 / length, 0.0).view((1,) * (x.ndim - 1) + (C,))
    pull = a * torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True) * unit
    k = {
        "scale": std * a * h.clamp(min=0),
        "set": std * (a - h),
        "add": pull,
        "add_gated": pull * torch.where(a <= 0, s, 1.0 - s),
    }[rule]
    return x.double() + k @ decoder, pre


def _mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased; the std of a single number is 0."""
    mean = x.double().mean(-1, keepdim=True)
    centered = x.double() - mean
    return mean, torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
