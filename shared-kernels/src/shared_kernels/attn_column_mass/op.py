"""`attn_column_mass`: check the arguments, pick an implementation."""

import math

import torch
from torch import Tensor

from .._checks import check_no_gradient, check_one_device
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import attn_column_mass_eager

_LARGEST_D = 256


def attn_column_mass(
    q: Tensor,
    k: Tensor,
    column_weight: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    attn_mask: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Measure how much attention each query pays to chosen keys, such as an image's pixels to the tokens of a word.

    The mean over the heads of sum_c weight_c P[query, c], where P = softmax(scale q k^T) are the probabilities of the
    attention that q and k belong to. No map `[H, Q, K]` is formed in memory. Has no gradient.

    Args:
        q: `[rows, H, Q, D]`, floating point, as it enters the attention.
        k: `[rows, Hk, K, D]`, in the dtype of `q`; H is a multiple of Hk, whose heads are shared by H // Hk query heads
            each. The kernel takes D up to 256, others run in PyTorch.
        column_weight: `[rows, K]`, floating point: 1 for the keys that count, 0 for the others, or any number.
        scale: of the scores; None stands for D**-0.5.
        lse: `[rows, H, Q]`, float32 or float64: log(sum(exp(scores))) of each query, which attention functions compute
            anyway. With it the softmax is not computed again, and `k`, `column_weight` and `attn_mask` need to hold
            only the keys that have a weight.
        attn_mask: as in `scaled_dot_product_attention`: bool, which keys a query sees, or floating point, added to the
            scores; broadcastable to `[rows, H, Q, K]`.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[rows, Q]`, float32, or float64 for float64 arguments. 0 for a query that sees no key.

    Raises:
        ValueError: an argument does not fit the others, or requires a gradient; the message names it.

    Example:
        >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)  # attention to all 5 keys alike
        >>> attn_column_mass(q, k, torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]]))
        tensor([[0.4000, 0.4000, 0.4000]])

    Source: Brack et al. 2023, "LEDITS++", section 3, the mask from cross-attention.
    """
    _check(q, k, column_weight, scale, lse, attn_mask)
    given = {"q": q, "k": k, "column_weight": column_weight, "lse": lse, "attn_mask": attn_mask}
    check_no_gradient("attn_column_mass", **given)
    check_one_device(**given)
    chosen = choose(impl, "attn_column_mass", q.device, q.dtype)
    if chosen == "triton" and q.shape[3] > _LARGEST_D:
        if impl == "triton":
            raise ValueError(
                f'impl="triton" needs q with {_LARGEST_D} columns at most, got {q.shape[3]}; pass impl="eager".'
            )
        chosen = "eager"
    if chosen == "eager":
        return attn_column_mass_eager(q, k, column_weight, scale=scale, lse=lse, attn_mask=attn_mask)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return _attn_column_mass(q, k, column_weight, lse, attn_mask, scale)


def _check(
    q: Tensor, k: Tensor, column_weight: Tensor, scale: float | None, lse: Tensor | None, attn_mask: Tensor | None
) -> None:
    for name, tensor, shape in (("q", q, "[rows, H, Q, D]"), ("k", k, "[rows, Hk, K, D]")):
        if tensor.ndim != 4 or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be floating point with the shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}."
            )
    (rows, H, Q, D), (k_rows, Hk, K, k_D) = q.shape, k.shape
    if k.dtype != q.dtype:
        raise ValueError(f"k must have the dtype of q ({q.dtype}), got {k.dtype}.")
    if (k_rows, k_D) != (rows, D) or D < 1:
        raise ValueError(f"k must have the {rows} rows and the {D} columns of q, one at least, got {tuple(k.shape)}.")
    if Hk < 1 or H < 1 or H % Hk:
        raise ValueError(f"k must have a number of heads that divides that of q ({H}), got {Hk}.")
    if column_weight.shape != (rows, K) or not column_weight.dtype.is_floating_point:
        raise ValueError(
            f"column_weight must be floating point with the shape {(rows, K)}, one number per key, got "
            f"{column_weight.dtype} {tuple(column_weight.shape)}."
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    if lse is not None and (lse.shape != (rows, H, Q) or lse.dtype not in (torch.float32, torch.float64)):
        raise ValueError(
            f"lse must be torch.float32 or torch.float64 with the shape {(rows, H, Q)}, got {lse.dtype} "
            f"{tuple(lse.shape)}."
        )
    if attn_mask is not None:
        own, wanted = attn_mask.shape, (rows, H, Q, K)
        fits = len(own) <= 4 and all(n == 1 or n == m for n, m in zip(own, wanted[4 - len(own) :], strict=True))
        if not fits or not (attn_mask.dtype == torch.bool or attn_mask.dtype.is_floating_point):
            raise ValueError(
                f"attn_mask must be torch.bool or floating point, broadcastable to {wanted}, got {attn_mask.dtype} "
                f"{tuple(own)}."
            )


@torch.library.custom_op(f"{NAMESPACE}::attn_column_mass", mutates_args=())
def _attn_column_mass(
    q: Tensor, k: Tensor, column_weight: Tensor, lse: Tensor | None, attn_mask: Tensor | None, scale: float
) -> Tensor:
    from . import kernel

    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    weight = column_weight.float().contiguous()
    return kernel.launch(q, k, weight, None if lse is None else lse.float().contiguous(), attn_mask, scale)


@_attn_column_mass.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape[0], q.shape[2], dtype=torch.float32, device=q.device)
