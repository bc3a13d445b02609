"""Triton kernel of `attn_column_mass`. No validation: op.py has done it.

A running softmax that keeps two numbers per query and head, the sum of all weights and that of the wanted ones. Scores
are in units of log2, so that weights are powers of two.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, next_power_of_2, on_device_of

_LOG2_E = tl.constexpr(math.log2(math.e))
_INFINITY = tl.constexpr(float("inf"))

_BUSY_PROGRAMS = 256
"""With fewer programs than this, the heads are split among several."""


class Config(NamedTuple):
    """A tile of BLOCK_M queries times BLOCK_N keys, for heads of up to `D` columns of up to `itemsize` bytes."""

    itemsize: int
    D: int
    BLOCK_M: int
    BLOCK_N: int
    STAGES: int
    num_warps: int


CONFIGS = (  # a mask needs registers, too
    Config(itemsize=2, D=64, BLOCK_M=64, BLOCK_N=32, STAGES=2, num_warps=4),
    Config(itemsize=2, D=128, BLOCK_M=64, BLOCK_N=32, STAGES=2, num_warps=4),
    Config(itemsize=2, D=256, BLOCK_M=64, BLOCK_N=32, STAGES=2, num_warps=8),
    Config(itemsize=4, D=64, BLOCK_M=32, BLOCK_N=32, STAGES=2, num_warps=4),
    Config(itemsize=4, D=128, BLOCK_M=32, BLOCK_N=16, STAGES=2, num_warps=4),
    Config(itemsize=4, D=256, BLOCK_M=16, BLOCK_N=16, STAGES=1, num_warps=4),
)


def pick(itemsize: int, D: int) -> Config:
    """The tile for heads of D columns of that many bytes."""
    return next(config for config in CONFIGS if itemsize <= config.itemsize and D <= config.D)


@triton.jit
def attn_column_mass_fwd_kernel(
    q_ptr,
    k_ptr,
    weight_ptr,  # [rows, K]
    lse_ptr,  # [rows, H, Q] or None
    bias_ptr,  # [rows, H, Q, K] by its strides, or None
    out_ptr,  # [splits, rows, Q]
    H,
    Q,
    K,
    D,
    heads_per_split,
    q_row,
    q_head,
    q_query,
    k_row,
    k_head,
    k_key,
    bias_row,
    bias_head,
    bias_query,
    bias_key,
    scale,  # with the factor that makes natural scores those of log2
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program owns BLOCK_M queries of one row and adds up the mass of one split of the heads."""
    r = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    first_query = tl.program_id(0) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    m = first_query + rows
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    live = m < Q
    begin = split * heads_per_split
    end = tl.minimum(begin + heads_per_split, H)

    mass = tl.zeros([BLOCK_M], tl.float32)
    for head in range(begin, end):
        h = tl.cast(head, tl.int64)
        q_tile = q_ptr + r * q_row + h * q_head + tl.cast(first_query, tl.int64) * q_query
        q_inside = live[:, None] & (d < D)[None, :]
        q = tl.load(q_tile + rows[:, None] * q_query + d[None, :], mask=q_inside, other=0.0)  # [BLOCK_M, BLOCK_D]
        if INTERPRET:  # the interpreter computes with the raw bits of bfloat16
            q = q.to(tl.float32)
        if lse_ptr is not None:
            largest = tl.load(lse_ptr + (r * H + h) * Q + m, mask=live, other=0.0) * _LOG2_E
            total = tl.where(largest == -_INFINITY, 0.0, 1.0)
        else:
            largest = tl.full([BLOCK_M], -_INFINITY, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
        wanted = tl.zeros([BLOCK_M], tl.float32)
        for first in tl.range(0, K, BLOCK_N, num_stages=STAGES):
            in_reach = n < K - first
            key = tl.cast(first, tl.int64)
            k_tile = k_ptr + r * k_row + (h // GROUP) * k_head + key * k_key
            k_inside = in_reach[None, :] & (d < D)[:, None]
            k = tl.load(k_tile + n[None, :] * k_key + d[:, None], mask=k_inside, other=0.0)  # [BLOCK_D, BLOCK_N]
            if INTERPRET:
                k = k.to(tl.float32)
            s = tl.dot(q, k, input_precision="ieee") * scale
            if bias_ptr is not None:
                bias_tile = bias_ptr + r * bias_row + h * bias_head + key * bias_key
                bias_tile += tl.cast(first_query, tl.int64) * bias_query
                inside = live[:, None] & in_reach[None, :]
                places = rows[:, None] * bias_query + n[None, :] * bias_key
                bias = tl.load(bias_tile + places, mask=inside, other=0.0)
                s += bias.to(tl.float32) * _LOG2_E
            s = tl.where(in_reach[None, :], s, -_INFINITY)
            column = tl.load(weight_ptr + r * K + first + n, mask=in_reach, other=0.0)

            if lse_ptr is not None:
                shift = tl.where(largest == -_INFINITY, 0.0, largest)
                weights = tl.exp2(s - shift[:, None])
            else:
                new_largest = tl.maximum(largest, tl.max(s, axis=1))
                shift = tl.where(new_largest == -_INFINITY, 0.0, new_largest)  # queries that have seen nothing yet
                weights = tl.exp2(s - shift[:, None])
                kept = tl.exp2(largest - shift)
                largest = new_largest
                total = total * kept + tl.sum(weights, axis=1)
                wanted *= kept
            wanted += tl.sum(weights * column[None, :], axis=1)
        mass += tl.where(total == 0.0, 0.0, wanted / tl.where(total == 0.0, 1.0, total))
    tl.store(out_ptr + (split * tl.num_programs(2) + r) * Q + m, mass / H, mask=live)


def launch(q: Tensor, k: Tensor, weight: Tensor, lse: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """`[rows, Q]` float32. `bias` is expanded to `[rows, H, Q, K]`."""
    (rows, H, Q, D), (Hk, K) = q.shape, k.shape[1:3]
    if rows * Q == 0:
        return torch.empty(rows, Q, dtype=torch.float32, device=q.device)
    q, k = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k))
    config = pick(q.element_size(), D)
    blocks = triton.cdiv(Q, config.BLOCK_M)
    heads_per_split = triton.cdiv(H, min(H, triton.cdiv(_BUSY_PROGRAMS, blocks * rows)))
    splits = triton.cdiv(H, heads_per_split)
    out = torch.empty(splits, rows, Q, dtype=torch.float32, device=q.device)
    with on_device_of(q):
        attn_column_mass_fwd_kernel[(blocks, splits, rows)](
            q,
            k,
            weight,
            lse,
            bias,
            out,
            H,
            Q,
            K,
            D,
            heads_per_split,
            *q.stride()[:3],
            *k.stride()[:3],
            *((0, 0, 0, 0) if bias is None else bias.stride()),
            scale * math.log2(math.e),
            GROUP=H // Hk,
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=max(16, next_power_of_2(D)),
            STAGES=config.STAGES,
            INTERPRET=q.device.type == "cpu",
            num_warps=config.num_warps,
            **LAUNCH_OPTIONS,
        )
    return out[0] if splits == 1 else out.sum(0)


def _case(kind: str, config: Config, *absent: str) -> AotCase:
    """A case without the arguments `absent`; rows of tensors and of heads are aligned, as those of models are."""
    pointers = {"q_ptr": f"*{kind}", "k_ptr": f"*{kind}", "weight_ptr": "*fp32", "out_ptr": "*fp32"}
    optional = {"lse_ptr": "*fp32", "bias_ptr": f"*{kind}"}
    strides = ["q_row", "q_head", "q_query", "k_row", "k_head", "k_key"]
    strides += ["bias_row", "bias_head", "bias_query", "bias_key"]
    numbers = dict.fromkeys(("H", "Q", "K", "D", "heads_per_split", *strides), "i32")
    signature = {**pointers, **optional, **numbers, "scale": "fp32"}
    signature = {name: value for name, value in signature.items() if name not in absent}
    tile = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_D": config.D, "STAGES": config.STAGES}
    constants: dict[str, Any] = {**tile, "GROUP": 1, "INTERPRET": False, **dict.fromkeys(absent)}
    return AotCase(attn_column_mass_fwd_kernel, signature, constants, config.num_warps, aligned=("D", *strides[:6]))


_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

AOT_CASES = (
    *(_case(kind, each, "lse_ptr") for kind in _ITEMSIZE for each in CONFIGS if each.itemsize == _ITEMSIZE[kind]),
    _case("bf16", CONFIGS[0], "lse_ptr", "bias_ptr"),
    _case("bf16", CONFIGS[0], "bias_ptr"),
)
