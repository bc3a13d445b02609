"""Triton kernel of `row_quantile`. No validation: op.py has done it."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, on_device_of


class Config(NamedTuple):
    """One program per row, BLOCK numbers at a time; a row of at most so many stays in registers."""

    BLOCK: int
    num_warps: int


CONFIGS = (Config(BLOCK=1024, num_warps=4), Config(BLOCK=4096, num_warps=8), Config(BLOCK=16384, num_warps=16))
LONG = Config(BLOCK=4096, num_warps=16)
"""For rows that are read again for every two bits."""


def pick(n: int) -> Config:
    """The row of the table for rows of n numbers."""
    return next((config for config in CONFIGS if n <= config.BLOCK), LONG)


@triton.jit
def _ordered_key(x):
    """A uint32 that is ordered like x: equal for the two zeros, largest for NaN, never 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits | (-2147483648))
    return tl.where(x != x, -1, bits).to(tl.uint32, bitcast=True)


@triton.jit
def _number_of(key):
    """The x that `_ordered_key` made this key of."""
    bits = key.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits & 2147483647, ~bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _keys(row_ptr, first, n, BLOCK: tl.constexpr):
    """Keys of BLOCK numbers of a row, and which of them exist."""
    columns = first + tl.arange(0, BLOCK)
    inside = columns < n
    return _ordered_key(tl.load(row_ptr + columns, mask=inside, other=0.0)), inside


@triton.jit
def row_quantile_fwd_kernel(
    s_ptr,  # [R, n]
    levels_ptr,  # [R], or None: all `level`
    out_ptr,  # [R]
    n,
    level,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """One program owns one row. It finds the number at the rank below two bits at a time, by counting smaller ones."""
    r = tl.program_id(0).to(tl.int64)
    row_ptr = s_ptr + r * n
    if levels_ptr is not None:
        level = tl.load(levels_ptr + r)
        level = tl.minimum(tl.maximum(level, 0.0), 1.0)
    rank = level * (n - 1)
    below = rank.to(tl.int32)
    weight = rank - below.to(tl.float32)

    if ONE_BLOCK:
        key, inside = _keys(row_ptr, 0, n, BLOCK)
    found = tl.full([], 0, tl.uint32)  # the largest key, so far to its leading bits, that at most `below` are under
    for step in range(16):
        unit = tl.full([], 1, tl.uint32) << (30 - 2 * step)
        one, two, three = found + unit, found + 2 * unit, found + 3 * unit
        if ONE_BLOCK:
            under_one = tl.sum((inside & (key < one)).to(tl.int32))
            under_two = tl.sum((inside & (key < two)).to(tl.int32))
            under_three = tl.sum((inside & (key < three)).to(tl.int32))
        else:
            lanes_one = tl.zeros([BLOCK], tl.int32)
            lanes_two = tl.zeros([BLOCK], tl.int32)
            lanes_three = tl.zeros([BLOCK], tl.int32)
            for first in range(0, n, BLOCK):
                key, inside = _keys(row_ptr, first, n, BLOCK)
                lanes_one += (inside & (key < one)).to(tl.int32)
                lanes_two += (inside & (key < two)).to(tl.int32)
                lanes_three += (inside & (key < three)).to(tl.int32)
            under_one, under_two, under_three = tl.sum(lanes_one), tl.sum(lanes_two), tl.sum(lanes_three)
        steps = (under_one <= below).to(tl.uint32)
        steps += (under_two <= below).to(tl.uint32)
        steps += (under_three <= below).to(tl.uint32)
        found += steps * unit

    # signed keys from here on: they have minima and maxima everywhere
    largest = -2147483648
    following = 2147483647  # the least key above `found`
    reached = 0  # how many are not above it
    for first in range(0, n, BLOCK):
        if not ONE_BLOCK:
            key, inside = _keys(row_ptr, first, n, BLOCK)
        signed = (key ^ 0x80000000).to(tl.int32, bitcast=True)
        largest = tl.maximum(largest, tl.max(tl.where(inside, signed, -2147483648)))
        following = tl.minimum(following, tl.min(tl.where(inside & (key > found), signed, 2147483647)))
        reached += tl.sum((inside & (key <= found)).to(tl.int32))
    lower = _number_of(found)
    upper = _number_of(tl.cast(following, tl.uint32, bitcast=True) ^ 0x80000000)
    upper = tl.where((reached > below + 1) | (weight == 0.0), lower, upper)
    gap = tl.where(upper == lower, 0.0, upper - lower)  # also between infinite ones
    out = tl.where(weight < 0.5, lower + weight * gap, upper - (1.0 - weight) * gap)
    tl.store(out_ptr + r, tl.where(largest == 2147483647, float("nan"), out))


def launch(S: Tensor, levels: Tensor | None, level: float, out: Tensor) -> Tensor:
    """Fill `out` `[R]` with the quantiles of the rows of `S`, at their `levels`, or all at `level`."""
    R, n = S.shape
    if R:
        config = pick(n)
        with on_device_of(S):
            row_quantile_fwd_kernel[(R,)](
                S,
                levels,
                out,
                n,
                level,
                BLOCK=config.BLOCK,
                ONE_BLOCK=n <= config.BLOCK,
                num_warps=config.num_warps,
                **LAUNCH_OPTIONS,
            )
    return out


def _case(config: Config, one_block: bool, *absent: str) -> AotCase:
    signature = {"s_ptr": "*fp32", "levels_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "level": "fp32"}
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    constants: dict[str, Any] = {"BLOCK": config.BLOCK, "ONE_BLOCK": one_block, **dict.fromkeys(absent)}
    return AotCase(row_quantile_fwd_kernel, signature, constants, config.num_warps, aligned=("n",))


AOT_CASES = (
    *(_case(config, True) for config in CONFIGS),
    _case(LONG, False),
    _case(CONFIGS[0], True, "levels_ptr"),
)
