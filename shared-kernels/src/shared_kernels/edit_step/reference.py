"""What `edit_magnitude` and `edit_step` mean. Slow and exact; every implementation is judged against this file."""

import torch
from torch import Tensor


def edit_magnitude_reference(outputs: Tensor, scale: Tensor, *, user_mask: Tensor | None = None) -> Tensor:
    """`[E, B, h, w]` float64: sum over the channels of |d_e|, d_e = (o_e - o_0) scale_e user_mask_e."""
    E = scale.shape[0]
    rows = outputs.double().unflatten(0, (1 + E, -1))  # [1 + E, B, C, h, w]
    d = (rows[1:] - rows[0]) * scale.double().view(E, 1, 1, 1, 1)
    if user_mask is not None:
        d = d * user_mask.double().expand(d[:, :, 0].shape).unsqueeze(2)
    return d.abs().sum(2)


def edit_step_reference(
    x: Tensor,
    outputs: Tensor,
    scale: Tensor,
    coefficients: Tensor,
    *,
    prediction_type: str,
    residual: Tensor | None = None,
    previous: Tensor | None = None,
    magnitude: Tensor | None = None,
    magnitude_threshold: Tensor | None = None,
    mass: Tensor | None = None,
    mass_threshold: Tensor | None = None,
    user_mask: Tensor | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Next state and data prediction, float64, and masks, one edit of one picture at a time."""
    E, (B, _, h, w) = scale.shape[0], x.shape
    alpha, sigma, a, b, c, g = coefficients.double()
    rows = outputs.double().unflatten(0, (1 + E, B))
    o = rows[0].clone()
    masks = torch.zeros(E, B, h, w, dtype=torch.bool)
    for e in range(E):
        if active is not None and not active[e]:
            continue
        for i in range(B):
            mask = torch.ones(h, w, dtype=torch.bool)
            if mass is not None and mass_threshold is not None:
                gh, gw = mass.shape[2:]
                chosen = mass[e, i] >= mass_threshold[e, i]
                mask &= torch.tensor([[bool(chosen[y * gh // h, z * gw // w]) for z in range(w)] for y in range(h)])
            if magnitude is not None and magnitude_threshold is not None:
                mask &= magnitude[e, i] >= magnitude_threshold[e, i]
            masks[e, i] = mask
            weight = scale[e].double() * mask
            if user_mask is not None:
                weight = weight * user_mask.double().expand(E, B, h, w)[e, i]
            o[i] += (rows[1 + e, i] - rows[0, i]) * weight
    state = x.double()
    m0 = {
        "epsilon": (state - sigma * o) / alpha,
        "v_prediction": alpha * state - sigma * o,
        "sample": o,
        "flow_prediction": state - sigma * o,
    }[prediction_type]
    x_next = a * state + b * m0
    if previous is not None:
        x_next = x_next + c * previous.double()
    if residual is not None:
        x_next = x_next + g * residual.double()
    return x_next, m0, masks
