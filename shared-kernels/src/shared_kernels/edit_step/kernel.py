"""Triton kernels of `edit_magnitude` and `edit_step`. No validation: op.py has done it.

One program owns BLOCK_P pixels of one picture, with all channels, and walks the edits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, next_power_of_2, on_device_of

PREDICTIONS = {"epsilon": 0, "v_prediction": 1, "sample": 2, "flow_prediction": 3}

_EPSILON = tl.constexpr(PREDICTIONS["epsilon"])
_V = tl.constexpr(PREDICTIONS["v_prediction"])
_FLOW = tl.constexpr(PREDICTIONS["flow_prediction"])


class Config(NamedTuple):
    """Pixels of one program, for latents of up to `channels`."""

    channels: int
    BLOCK_P: int
    num_warps: int


CONFIGS = (
    Config(channels=4, BLOCK_P=128, num_warps=4),
    Config(channels=16, BLOCK_P=64, num_warps=4),
    Config(channels=64, BLOCK_P=32, num_warps=4),
    Config(channels=2**62, BLOCK_P=16, num_warps=8),
)


def pick(channels: int) -> Config:
    """The row of the table for latents of so many channels."""
    return next(config for config in CONFIGS if channels <= config.channels)


@triton.jit
def edit_magnitude_fwd_kernel(
    outputs_ptr,  # [(1 + E) * B, C, pixels]
    scale_ptr,  # [E]
    user_mask_ptr,  # [E, B, h, w] by its strides, or None
    out_ptr,  # [E, B, pixels]
    E,
    B,
    C,
    pixels,
    w,
    mask_edit,
    mask_batch,
    mask_row,
    mask_column,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    live = p < pixels
    inside = (c < C)[:, None] & live[None, :]
    places = c[:, None] * pixels + p[None, :]  # [BLOCK_C, BLOCK_P]
    size = tl.cast(C, tl.int64) * pixels
    o = tl.load(outputs_ptr + b * size + places, mask=inside, other=0.0).to(tl.float32)
    for e in range(E):
        row = (tl.cast(e + 1, tl.int64) * B + b) * size
        d = tl.load(outputs_ptr + row + places, mask=inside, other=0.0).to(tl.float32) - o
        total = tl.sum(tl.abs(d), axis=0) * tl.abs(tl.load(scale_ptr + e))
        if user_mask_ptr is not None:
            at = tl.cast(e, tl.int64) * mask_edit + b * mask_batch + (p // w) * mask_row + (p % w) * mask_column
            total *= tl.load(user_mask_ptr + at, mask=live, other=0.0)
        tl.store(out_ptr + (tl.cast(e, tl.int64) * B + b) * pixels + p, total, mask=live)


@triton.jit
def edit_step_fwd_kernel(
    x_ptr,  # [B, C, pixels]
    outputs_ptr,  # [(1 + E) * B, C, pixels]
    scale_ptr,  # [E]
    coefficients_ptr,  # [6]
    residual_ptr,  # [B, C, pixels] or None
    previous_ptr,  # [B, C, pixels] or None
    magnitude_ptr,  # [E, B, pixels] or None
    magnitude_threshold_ptr,  # [E, B] or None
    mass_ptr,  # [E, B, gh, gw] or None
    mass_threshold_ptr,  # [E, B] or None
    active_ptr,  # [E] uint8 or None
    user_mask_ptr,  # [E, B, h, w] by its strides, or None
    next_ptr,  # [B, C, pixels]
    m0_ptr,  # [B, C, pixels]
    masks_ptr,  # [E, B, pixels] uint8
    E,
    B,
    C,
    pixels,
    h,
    w,
    gh,
    gw,
    mask_edit,
    mask_batch,
    mask_row,
    mask_column,
    PREDICTION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    live = p < pixels
    inside = (c < C)[:, None] & live[None, :]
    places = c[:, None] * pixels + p[None, :]  # [BLOCK_C, BLOCK_P]
    size = tl.cast(C, tl.int64) * pixels
    o = tl.load(outputs_ptr + b * size + places, mask=inside, other=0.0).to(tl.float32)

    guided = o
    for e in range(E):
        own = tl.cast(e, tl.int64) * B + b
        mask = live
        if active_ptr is not None:
            mask = mask & (tl.load(active_ptr + e + 0 * p) != 0)
        acting = (c < C)[:, None] & mask[None, :]
        if magnitude_ptr is not None:
            magnitude = tl.load(magnitude_ptr + own * pixels + p, mask=live, other=0.0)
            mask = mask & (magnitude >= tl.load(magnitude_threshold_ptr + own))
        if mass_ptr is not None:
            cell = (p // w) * gh // h * gw + (p % w) * gw // w
            mass = tl.load(mass_ptr + own * gh * gw + cell, mask=live, other=0.0)
            mask = mask & (mass >= tl.load(mass_threshold_ptr + own))
        tl.store(masks_ptr + own * pixels + p, mask.to(tl.uint8), mask=live)
        weight = tl.where(mask, tl.load(scale_ptr + e), 0.0)
        if user_mask_ptr is not None:
            at = tl.cast(e, tl.int64) * mask_edit + b * mask_batch + (p // w) * mask_row + (p % w) * mask_column
            weight *= tl.load(user_mask_ptr + at, mask=live, other=0.0)
        row = (own + B) * size
        edited = tl.load(outputs_ptr + row + places, mask=acting, other=0.0).to(tl.float32)
        # an inactive row may hold anything, and 0 times NaN is NaN
        guided += tl.where(acting, edited - o, 0.0) * weight[None, :]

    sigma = tl.load(coefficients_ptr + 1)
    x = tl.load(x_ptr + b * size + places, mask=inside, other=0.0)
    if PREDICTION == _EPSILON:
        m0 = (x - sigma * guided) / tl.load(coefficients_ptr)
    elif PREDICTION == _V:
        m0 = tl.load(coefficients_ptr) * x - sigma * guided
    elif PREDICTION == _FLOW:
        m0 = x - sigma * guided
    else:
        m0 = guided
    x_next = tl.load(coefficients_ptr + 2) * x + tl.load(coefficients_ptr + 3) * m0
    if previous_ptr is not None:
        previous = tl.load(previous_ptr + b * size + places, mask=inside, other=0.0)
        x_next += tl.load(coefficients_ptr + 4) * previous
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + b * size + places, mask=inside, other=0.0)
        x_next += tl.load(coefficients_ptr + 5) * residual
    tl.store(next_ptr + b * size + places, x_next, mask=inside)
    tl.store(m0_ptr + b * size + places, m0, mask=inside)


def magnitude(outputs: Tensor, scale: Tensor, user_mask: Tensor | None, out: Tensor) -> Tensor:
    """Fill `out` `[E, B, h, w]`; `user_mask` is expanded to it."""
    E, B, h, w = out.shape
    C = outputs.shape[1]
    if out.numel() == 0:
        return out
    grid, tile = _tiling(B, C, h * w)
    with on_device_of(outputs):
        edit_magnitude_fwd_kernel[grid](outputs, scale, user_mask, out, E, B, C, h * w, w, *_strides(user_mask), **tile)
    return out


def step(
    x: Tensor,
    outputs: Tensor,
    scale: Tensor,
    coefficients: Tensor,
    residual: Tensor | None,
    previous: Tensor | None,
    magnitude: Tensor | None,
    magnitude_threshold: Tensor | None,
    mass: Tensor | None,
    mass_threshold: Tensor | None,
    active: Tensor | None,
    *,
    user_mask: Tensor | None,
    prediction_type: str,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill `out`: next state, data prediction and masks; `user_mask` is expanded to the masks."""
    (B, C, h, w), E = x.shape, scale.shape[0]
    x_next, m0, masks = out
    if x_next.numel() == 0:
        return
    gh, gw = (1, 1) if mass is None else mass.shape[2:]
    grid, tile = _tiling(B, C, h * w)
    with on_device_of(x):
        edit_step_fwd_kernel[grid](
            x,
            outputs,
            scale,
            coefficients,
            residual,
            previous,
            magnitude,
            magnitude_threshold,
            mass,
            mass_threshold,
            None if active is None else active.view(torch.uint8),
            user_mask,
            x_next,
            m0,
            masks.view(torch.uint8),
            E,
            B,
            C,
            h * w,
            h,
            w,
            gh,
            gw,
            *_strides(user_mask),
            PREDICTION=PREDICTIONS[prediction_type],
            **tile,
        )


def _tiling(B: int, C: int, pixels: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and the compile-time arguments and launch options."""
    config = pick(C)
    tile = {"BLOCK_C": next_power_of_2(C), "BLOCK_P": config.BLOCK_P, "num_warps": config.num_warps, **LAUNCH_OPTIONS}
    return (triton.cdiv(pixels, config.BLOCK_P), B), tile


def _strides(user_mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if user_mask is None else user_mask.stride()


_STRIDES = ("mask_edit", "mask_batch", "mask_row", "mask_column")
_FLOATS = {
    edit_magnitude_fwd_kernel: ("scale_ptr", "user_mask_ptr", "out_ptr"),
    edit_step_fwd_kernel: (
        "x_ptr",
        "scale_ptr",
        "coefficients_ptr",
        "residual_ptr",
        "previous_ptr",
        "magnitude_ptr",
        "magnitude_threshold_ptr",
        "mass_ptr",
        "mass_threshold_ptr",
        "user_mask_ptr",
        "next_ptr",
        "m0_ptr",
    ),
}
_OPTIONAL = (
    "residual_ptr",
    "previous_ptr",
    "magnitude_ptr",
    "magnitude_threshold_ptr",
    "mass_ptr",
    "mass_threshold_ptr",
    "active_ptr",
    "user_mask_ptr",
)


def _case(kernel: Any, kind: str, config: Config, *absent: str, **constants: Any) -> AotCase:
    """A case without the arguments `absent`."""
    signature = {"outputs_ptr": f"*{kind}", **dict.fromkeys(_FLOATS[kernel], "*fp32")}
    numbers = ["E", "B", "C", "pixels", "w", *_STRIDES]
    if kernel is edit_step_fwd_kernel:
        signature |= {"active_ptr": "*u8", "masks_ptr": "*u8"}
        numbers += ["h", "gh", "gw"]
    constants |= {name: None for name in absent if name in signature}
    signature = {name: value for name, value in signature.items() if name not in constants}
    signature |= dict.fromkeys(numbers, "i32")
    constants |= {"BLOCK_C": min(config.channels, 128), "BLOCK_P": config.BLOCK_P}
    aligned = tuple(name for name in ("pixels", "h", "w") if name in signature)
    return AotCase(kernel, signature, constants, config.num_warps, aligned)


def _cases() -> tuple[AotCase, ...]:
    """Every dtype in every row of the table; every prediction; nothing optional."""
    cases = []
    for kind in ("bf16", "fp16", "fp32"):
        for config in CONFIGS:
            cases.append(_case(edit_magnitude_fwd_kernel, kind, config))
            cases.append(_case(edit_step_fwd_kernel, kind, config, PREDICTION=PREDICTIONS["epsilon"]))
    bare = [_case(edit_step_fwd_kernel, "bf16", CONFIGS[0], *_OPTIONAL, PREDICTION=i) for i in PREDICTIONS.values()]
    cases += bare
    cases.append(_case(edit_magnitude_fwd_kernel, "bf16", CONFIGS[0], "user_mask_ptr"))
    return tuple(cases)


AOT_CASES = _cases()
