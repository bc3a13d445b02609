"""Triton kernel of `fused_linear_bce`: the elementwise step between the matrix products. No validation here."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, on_device_of
from .eager import Problem


class Config(NamedTuple):
    """BLOCK_V logits, or BLOCK_P positives, at a time, for heads of at most `columns` rows."""

    columns: int
    BLOCK_V: int
    BLOCK_P: int
    num_warps: int


CONFIGS = (
    Config(columns=1024, BLOCK_V=256, BLOCK_P=64, num_warps=2),
    Config(columns=2**62, BLOCK_V=2048, BLOCK_P=128, num_warps=8),
)


def pick(columns: int) -> Config:
    """The block sizes for a head of that many rows."""
    return next(config for config in CONFIGS if columns <= config.columns)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], to full precision: the rounding error of 1 + e is divided out again."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def fused_linear_bce_step_kernel(
    z_ptr,  # [n, V] float32 logits of the chunk
    dz_ptr,  # [n, V] gradients, may be z_ptr; None if nobody needs them
    losses_ptr,  # [n] float32
    positive_ptr_ptr,  # [n + 1] of the chunk
    positive_rows_ptr,  # [P] of the whole problem
    positive_dz_ptr,  # [P] float32 scratch
    row_weight_ptr,  # [n] of the chunk, or None
    V,
    pos_weight,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program owns one row: its positives' logits first, then every logit as a negative, then the positives' fix.

    The barriers keep the three passes apart, because different threads touch the same logits in them.
    """
    n = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + n * V
    start = tl.load(positive_ptr_ptr + n).to(tl.int64)
    stop = tl.load(positive_ptr_ptr + n + 1).to(tl.int64)
    weight = 1.0
    if row_weight_ptr is not None:
        weight = tl.load(row_weight_ptr + n).to(tl.float32)

    surplus = tl.zeros([BLOCK_P], dtype=tl.float32)
    for first in range(start, stop, BLOCK_P):
        entries = first + tl.arange(0, BLOCK_P)
        live = entries < stop
        columns = tl.load(positive_rows_ptr + entries, mask=live, other=0).to(tl.int64)
        z = tl.load(z_row + columns, mask=live, other=0.0).to(tl.float32)
        e = tl.exp(-tl.abs(z))
        softplus_of_minus_z = tl.maximum(-z, 0.0) + _log1p(e)
        surplus += tl.where(live, (pos_weight - 1.0) * softplus_of_minus_z - z, 0.0)
        if dz_ptr is not None:
            sigmoid_of_minus_z = tl.where(z >= 0.0, e, 1.0) / (1.0 + e)
            tl.store(positive_dz_ptr + entries, -pos_weight * weight * sigmoid_of_minus_z, mask=live)

    tl.debug_barrier()
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        inside = columns < V
        z = tl.load(z_row + columns, mask=inside, other=0.0).to(tl.float32)
        e = tl.exp(-tl.abs(z))
        total += tl.where(inside, tl.maximum(z, 0.0) + _log1p(e), 0.0)
        if dz_ptr is not None:
            dz = weight * tl.where(z >= 0.0, 1.0, e) / (1.0 + e)
            tl.store(dz_ptr + n * V + columns, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(losses_ptr + n, tl.sum(total, axis=0) + tl.sum(surplus, axis=0))

    if dz_ptr is not None:
        tl.debug_barrier()
        for first in range(start, stop, BLOCK_P):
            entries = first + tl.arange(0, BLOCK_P)
            live = entries < stop
            columns = tl.load(positive_rows_ptr + entries, mask=live, other=0).to(tl.int64)
            dz = tl.load(positive_dz_ptr + entries, mask=live, other=0.0)
            tl.store(dz_ptr + n * V + columns, dz.to(dz_ptr.dtype.element_ty), mask=live)


class Step:
    """The `LogitsStep` on a GPU; keeps the scratch that all chunks share."""

    def __init__(self, problem: Problem, needs_gradient: bool) -> None:
        self.needs_gradient = needs_gradient
        self.positive_dz = torch.empty(problem.positive_rows.shape[0], dtype=torch.float32, device=problem.x.device)

    def __call__(self, z: Tensor, dz: Tensor, start: int, problem: Problem) -> Tensor:
        n, V = z.shape
        losses = torch.empty(n, dtype=torch.float32, device=z.device)
        config = pick(V)
        with on_device_of(z):
            fused_linear_bce_step_kernel[(n,)](
                z,
                dz if self.needs_gradient else None,
                losses,
                problem.positive_ptr[start:],
                problem.positive_rows,
                self.positive_dz,
                None if problem.row_weight is None else problem.row_weight[start:],
                V,
                problem.pos_weight,
                BLOCK_V=config.BLOCK_V,
                BLOCK_P=config.BLOCK_P,
                num_warps=config.num_warps,
                **LAUNCH_OPTIONS,
            )
        return losses


def _case(dz: str | None, row_weight: str | None, index: str, config: Config) -> AotCase:
    signature = {"z_ptr": "*fp32", "losses_ptr": "*fp32", "positive_ptr_ptr": f"*{index}"}
    signature |= {"positive_rows_ptr": f"*{index}", "positive_dz_ptr": "*fp32", "V": "i32", "pos_weight": "fp32"}
    constexprs: dict[str, int | None] = {"BLOCK_V": config.BLOCK_V, "BLOCK_P": config.BLOCK_P}
    for name, kind in (("dz_ptr", dz), ("row_weight_ptr", row_weight)):
        if kind is None:
            constexprs[name] = None
        else:
            signature[name] = kind
    return AotCase(fused_linear_bce_step_kernel, signature, constexprs, config.num_warps)


AOT_CASES = tuple(
    _case(dz, row_weight, index, config)
    for dz, row_weight, index in (
        ("*bf16", "*fp32", "i32"),
        ("*fp16", None, "i64"),
        ("*fp32", "*fp32", "i32"),
        ("*fp32", None, "i32"),
        (None, "*fp32", "i32"),
    )
    for config in CONFIGS
)
