"""`edit_magnitude` and `edit_step` in PyTorch: all edits at once, scalars read where that is free.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def edit_magnitude_eager(outputs: Tensor, scale: Tensor, *, user_mask: Tensor | None = None) -> Tensor:
    """How strongly each edit pulls where: the sum over channels of |d_e|, d_e = (o_e - o_0) scale_e user_mask_e.

    Args:
        outputs: `[(1 + E) * B, C, h, w]`, the model's outputs: without a prompt for B pictures, then edit by edit.
        scale: `[E]`, float32 or float64, negative where a concept is removed.
        user_mask: broadcastable to `[E, B, h, w]`, not negative, in the dtype of `scale`.

    Returns:
        `[E, B, h, w]` in the dtype of `scale`.
    """
    rows = outputs.unflatten(0, (1 + scale.shape[0], -1))  # [1 + E, B, C, h, w]
    d = rows[1:] - rows[0].to(scale.dtype)
    magnitude = d.abs_().sum(2).mul_(scale.abs().view(-1, 1, 1, 1))
    return magnitude if user_mask is None else magnitude.mul_(user_mask)


def edit_step_eager(
    x: Tensor,
    outputs: Tensor,
    scale: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: Prediction,
    residual: Tensor | None = None,
    previous: Tensor | None = None,
    magnitude: Tensor | None = None,
    magnitude_threshold: Tensor | None = None,
    mass: Tensor | None = None,
    mass_threshold: Tensor | None = None,
    user_mask: Tensor | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Guide, predict the data, and step: `x_next = a x + b m0 + c previous + g residual`.

    m0 is the data prediction of o_0 + sum_e mask_e (o_e - o_0) scale_e user_mask_e; mask_e holds where `mass` and
    `magnitude`, as far as given, reach their thresholds.

    Args:
        x: `[B, C, h, w]`, float32 or float64, the noisy latents.
        outputs: `[(1 + E) * B, C, h, w]`, the model's outputs: without a prompt for B pictures, then edit by edit.
        scale: `[E]`.
        coefficients: `[6]`, alpha and sigma of x, then a, b, c, g.
        prediction_type: what the model's outputs are.
        residual: `[B, C, h, w]`.
        previous: `[B, C, h, w]`, the data prediction of the step before.
        magnitude: `[E, B, h, w]`, from `edit_magnitude_eager`.
        magnitude_threshold: `[E, B]`.
        mass: `[E, B, gh, gw]`, attention per cell of a grid over the picture.
        mass_threshold: `[E, B]`.
        user_mask: broadcastable to `[E, B, h, w]`.
        active: `[E]` bool; other edits do nothing, whatever their outputs hold.

    Returns:
        x_next and m0, `[B, C, h, w]` in the dtype of `x`, and the masks, `[E, B, h, w]` bool.
    """
    E, (B, _, h, w) = scale.shape[0], x.shape
    rows = outputs.unflatten(0, (1 + E, B))
    masks = None
    if mass is not None and mass_threshold is not None:
        masks = _on_pixels(mass >= mass_threshold[..., None, None], h, w)
    if magnitude is not None and magnitude_threshold is not None:
        is_large = magnitude >= magnitude_threshold[..., None, None]
        masks = is_large if masks is None else masks & is_large
    if masks is None:
        masks = torch.ones(E, B, h, w, dtype=torch.bool, device=x.device)
    if active is not None:
        masks = masks & active.view(E, 1, 1, 1)
    weights = masks * scale.view(E, 1, 1, 1)
    if user_mask is not None:
        weights = weights * user_mask
    o = _guided(rows, weights, active)
    alpha, sigma, a, b, c, g = _elements(coefficients)
    m0 = _data_prediction(x, o, alpha, sigma, prediction_type)
    x_next = _add(x * a, m0, b)
    if previous is not None:
        x_next = _add(x_next, previous, c)
    if residual is not None:
        x_next = _add(x_next, residual, g)
    return x_next, m0, masks


def _guided(rows: Tensor, weights: Tensor, active: Tensor | None) -> Tensor:
    """`[B, C, h, w]`: the model's output `rows[0]` and what each edit adds to it."""
    o = rows[0].to(weights.dtype)
    guided = o.clone()
    flags = [True] * len(weights) if active is None else _elements(active)
    for row, weight, flag in zip(rows[1:], weights, flags, strict=True):  # one pass over the sum per edit
        if flag is False:
            continue
        d = row - o
        if isinstance(flag, Tensor):  # an inactive row may hold anything, and 0 times NaN is NaN
            d = torch.where(flag, d, 0.0)
        guided.addcmul_(d, weight.unsqueeze(1))
    return guided


def _elements(vector: Tensor) -> Any:
    """Its numbers, or where reading them would wait for a device or break a graph, tensors that hold one each."""
    reads = vector.device.type == "cpu" and not torch.compiler.is_compiling()
    return vector.tolist() if reads else vector.unbind()


def _data_prediction(x: Tensor, o: Tensor, alpha: Any, sigma: Any, prediction_type: str) -> Tensor:
    if prediction_type == "sample":
        return o
    if prediction_type == "v_prediction":
        return _add(x * alpha, o, -sigma)
    difference = _add(x.clone(), o, -sigma)
    return difference.div_(alpha) if prediction_type == "epsilon" else difference


def _add(total: Tensor, term: Tensor, factor: Any) -> Tensor:
    """Add to `total`, in place, the term times a number or a tensor that holds one."""
    return total.addcmul_(term, factor) if isinstance(factor, Tensor) else total.add_(term, alpha=factor)


def _on_pixels(grid: Tensor, h: int, w: int) -> Tensor:
    """`[E, B, h, w]`: the cell of the grid that each pixel lies in."""
    E, B, gh, gw = grid.shape
    if h % gh == 0 and w % gw == 0:
        return grid[:, :, :, None, :, None].expand(E, B, gh, h // gh, gw, w // gw).reshape(E, B, h, w)
    rows, columns = (torch.arange(n, device=grid.device) * cells // n for n, cells in ((h, gh), (w, gw)))
    return grid.index_select(2, rows).index_select(3, columns)
