"""Triton kernels of `atman_attention` and `atman_suffix_attention`. No validation: op.py has done it.

The query heads that share a key head are packed into the rows of one tile. Scores are kept in units of log2, so that
weights are powers of two.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, next_power_of_2, on_device_of

MODES = {"shift_min": 0, "log_additive": 1, "multiply": 2}
PLAIN = 3
"""The mode without factors."""

LARGEST_D = 256

_SHIFT = tl.constexpr(MODES["shift_min"])
_LOG = tl.constexpr(MODES["log_additive"])
_MULTIPLY = tl.constexpr(MODES["multiply"])
_LOG2_E = tl.constexpr(math.log2(math.e))
_INFINITY = tl.constexpr(float("inf"))
_SEGMENTS_AT_ONCE = tl.constexpr(256)
_MOST_PACKED_HEADS = 16


class Config(NamedTuple):
    """A tile of BLOCK_M packed rows times BLOCK_N keys, for heads of up to `D` columns of up to `itemsize` bytes."""

    itemsize: int
    D: int
    BLOCK_M: int
    BLOCK_N: int
    STAGES: int
    num_warps: int


DENSE_CONFIGS = (  # smaller: mask and bias need registers, too
    Config(itemsize=2, D=64, BLOCK_M=32, BLOCK_N=64, STAGES=2, num_warps=4),
    Config(itemsize=2, D=128, BLOCK_M=32, BLOCK_N=32, STAGES=2, num_warps=4),
    Config(itemsize=2, D=256, BLOCK_M=32, BLOCK_N=16, STAGES=2, num_warps=4),
    Config(itemsize=4, D=64, BLOCK_M=32, BLOCK_N=32, STAGES=2, num_warps=4),
    Config(itemsize=4, D=128, BLOCK_M=32, BLOCK_N=16, STAGES=2, num_warps=4),
    Config(itemsize=4, D=256, BLOCK_M=16, BLOCK_N=16, STAGES=1, num_warps=4),
)
SUFFIX_CONFIGS = (
    Config(itemsize=2, D=64, BLOCK_M=64, BLOCK_N=64, STAGES=3, num_warps=4),
    Config(itemsize=2, D=128, BLOCK_M=64, BLOCK_N=32, STAGES=2, num_warps=4),
    Config(itemsize=2, D=256, BLOCK_M=64, BLOCK_N=16, STAGES=2, num_warps=8),
    Config(itemsize=4, D=64, BLOCK_M=32, BLOCK_N=32, STAGES=2, num_warps=4),
    Config(itemsize=4, D=128, BLOCK_M=16, BLOCK_N=32, STAGES=2, num_warps=4),
    Config(itemsize=4, D=256, BLOCK_M=16, BLOCK_N=16, STAGES=1, num_warps=4),
)


def pick(configs: tuple[Config, ...], itemsize: int, D: int) -> Config:
    """The tile for heads of D columns of that many bytes."""
    return next(config for config in configs if itemsize <= config.itemsize and D <= config.D)


class Rule(NamedTuple):
    """How scores are made and changed."""

    mode: str | None
    scale: float
    softcap: float | None
    window: int | None


@triton.jit
def _dot(a, b, INTERPRET: tl.constexpr):
    if INTERPRET:  # the interpreter computes with the raw bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tanh(x):
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))  # the quotient loses small ones


@triton.jit
def _logits(
    q,  # [BLOCK_M, BLOCK_D]
    first,
    in_reach,  # [BLOCK_N], of the keys from `first` on
    live,  # [BLOCK_M]
    key_ptr,
    key_stride,
    bias_ptr,
    bias_rows,
    bias_stride,
    scale,
    softcap,
    D,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Scores `[BLOCK_M, BLOCK_N]`, in units of log2, before they are manipulated."""
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key_ptr += tl.cast(first, tl.int64) * key_stride
    inside = in_reach[None, :] & (d < D)[:, None]
    k = tl.load(key_ptr + n[None, :] * key_stride + d[:, None], mask=inside, other=0.0)  # [BLOCK_D, BLOCK_N]
    s = _dot(q, k, INTERPRET) * scale
    if SOFTCAP:
        s = _tanh(s) * softcap
    if bias_ptr is not None:
        bias_ptr += tl.cast(first, tl.int64) * bias_stride
        places = bias_rows[:, None] + n[None, :] * bias_stride
        bias = tl.load(bias_ptr + places, mask=live[:, None] & in_reach[None, :], other=0.0)
        s += bias.to(tl.float32) * _LOG2_E
    return s


@triton.jit
def _seen(
    first,
    in_reach,  # [BLOCK_N], of the keys from `first` on
    live,  # [BLOCK_M]
    position,  # [BLOCK_M], counted as keys are
    window,
    visible_ptr,
    visible_rows,
    visible_stride,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which keys the rows may see, `[BLOCK_M, BLOCK_N]`."""
    n = tl.arange(0, BLOCK_N)
    seen = in_reach[None, :] & live[:, None]
    if CAUSAL:
        seen = seen & (n[None, :] <= (position - first)[:, None])
    if WINDOW:
        seen = seen & (n[None, :] > (position - first - window)[:, None])
    if visible_ptr is not None:
        visible_ptr += tl.cast(first, tl.int64) * visible_stride
        places = visible_rows[:, None] + n[None, :] * visible_stride
        seen = seen & (tl.load(visible_ptr + places, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _sweep_minimum(
    lowest,
    q,
    live,
    position,
    begin,
    end,
    window,
    key_ptr,
    key_stride,
    visible_ptr,
    visible_rows,
    visible_stride,
    bias_ptr,
    bias_rows,
    bias_stride,
    scale,
    softcap,
    D,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The least of `lowest` and the visible scores of keys begin to end."""
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = tl.arange(0, BLOCK_N)
        in_reach = n < end - first
        s = _logits(
            q,
            first,
            in_reach,
            live,
            key_ptr,
            key_stride,
            bias_ptr,
            bias_rows,
            bias_stride,
            scale,
            softcap,
            D,
            SOFTCAP,
            BLOCK_N,
            BLOCK_D,
            INTERPRET,
        )
        seen = _seen(
            first, in_reach, live, position, window, visible_ptr, visible_rows, visible_stride, CAUSAL, WINDOW, BLOCK_N
        )
        lowest = tl.minimum(lowest, tl.min(tl.where(seen, s, _INFINITY), axis=1))
    return lowest


@triton.jit
def _sweep_remains(
    remains,
    live,
    position,
    begin,
    end,
    window,
    factors_ptr,
    visible_ptr,
    visible_rows,
    visible_stride,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """1 for rows that see a key of keys begin to end whose factor is not 0, else `remains`."""
    for first in range(begin, end, BLOCK_N):
        n = tl.arange(0, BLOCK_N)
        in_reach = n < end - first
        f = tl.load(factors_ptr + first + n, mask=in_reach, other=0.0)
        seen = _seen(
            first, in_reach, live, position, window, visible_ptr, visible_rows, visible_stride, CAUSAL, WINDOW, BLOCK_N
        )
        remains = tl.maximum(remains, tl.max((seen & (f > 0.0)[None, :]).to(tl.int32), axis=1))
    return remains


@triton.jit
def _manipulate(s, f, lowest, remains, MODE: tl.constexpr):
    if MODE == _SHIFT:
        s = tl.where((f == 1.0)[None, :], s, lowest[:, None] + (s - lowest[:, None]) * f[None, :])
    elif MODE == _LOG:
        log_f = tl.where(f > 0.0, tl.log2(tl.where(f > 0.0, f, 1.0)), -_INFINITY)
        s += tl.where((remains > 0)[:, None], log_f[None, :], 0.0)
    elif MODE == _MULTIPLY:
        s *= f[None, :]
    return s


@triton.jit
def _sweep_softmax(
    largest,
    total,
    sums,
    lowest,
    remains,
    q,
    live,
    position,
    begin,
    end,
    window,
    key_ptr,
    key_stride,
    value_ptr,
    value_stride,
    factors_ptr,
    visible_ptr,
    visible_rows,
    visible_stride,
    bias_ptr,
    bias_rows,
    bias_stride,
    scale,
    softcap,
    D,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add keys begin to end to a running softmax: largest score, sum of weights, weighted sum of values."""
    d = tl.arange(0, BLOCK_D)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = tl.arange(0, BLOCK_N)
        in_reach = n < end - first
        s = _logits(
            q,
            first,
            in_reach,
            live,
            key_ptr,
            key_stride,
            bias_ptr,
            bias_rows,
            bias_stride,
            scale,
            softcap,
            D,
            SOFTCAP,
            BLOCK_N,
            BLOCK_D,
            INTERPRET,
        )
        if factors_ptr is not None:
            f = tl.load(factors_ptr + first + n, mask=in_reach, other=1.0)
            s = _manipulate(s, f, lowest, remains, MODE)
        seen = _seen(
            first, in_reach, live, position, window, visible_ptr, visible_rows, visible_stride, CAUSAL, WINDOW, BLOCK_N
        )
        s = tl.where(seen, s, -_INFINITY)

        new_largest = tl.maximum(largest, tl.max(s, axis=1))
        shift = tl.where(new_largest == -_INFINITY, 0.0, new_largest)  # rows that have seen nothing yet
        weights = tl.exp2(s - shift[:, None])
        kept = tl.exp2(largest - shift)
        largest = new_largest
        total = total * kept + tl.sum(weights, axis=1)
        tile_ptr = value_ptr + tl.cast(first, tl.int64) * value_stride
        v = tl.load(
            tile_ptr + n[:, None] * value_stride + d[None, :], mask=in_reach[:, None] & (d < D)[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_D]
        if not INTERPRET:
            weights = weights.to(v.dtype)
        sums = sums * kept[:, None] + _dot(weights, v, INTERPRET)
    return largest, total, sums


@triton.jit
def atman_attention_kernel(
    query_ptr,  # [B, H, Tq, D]
    key_ptr,  # [B, Hk, Tk, D]
    value_ptr,  # [B, Hk, Tk, D]
    factors_ptr,  # [B, Tk] float32, or None
    visible_ptr,  # [B, H, Tq, Tk] uint8, or None
    bias_ptr,  # [B, H, Tq, Tk], or None
    sinks_ptr,  # [H], or None
    out_ptr,  # [B, H, Tq, D]
    H,
    Tq,
    Tk,
    D,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    visible_batch,
    visible_head,
    visible_row,
    visible_column,
    bias_batch,
    bias_head,
    bias_row,
    bias_column,
    out_batch,
    out_head,
    out_row,
    scale,
    softcap,
    window,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key head
    PACKED: tl.constexpr,  # query heads per program, a divisor of GROUP
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program owns PACKED heads of BLOCK_M // PACKED query rows; for shift_min it reads the keys twice."""
    ROWS: tl.constexpr = BLOCK_M // PACKED
    packs = H // PACKED
    batch = (tl.program_id(1) // packs).to(tl.int64)
    first_head = (tl.program_id(1) % packs) * PACKED
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    first_row = tl.program_id(0) * ROWS
    row = first_row + m // PACKED
    head = (first_head + m % PACKED).to(tl.int64)
    live = (m < ROWS * PACKED) & (row < Tq)
    position = Tk - Tq + row

    inside = live[:, None] & (d < D)[None, :]
    query_ptr += batch * query_batch + head[:, None] * query_head + row.to(tl.int64)[:, None] * query_row
    q = tl.load(query_ptr + d[None, :], mask=inside, other=0.0)
    key_ptr += batch * key_batch + (first_head // GROUP).to(tl.int64) * key_head
    value_ptr += batch * value_batch + (first_head // GROUP).to(tl.int64) * value_head
    visible_rows = batch * visible_batch + head * visible_head + row.to(tl.int64) * visible_row
    bias_rows = batch * bias_batch + head * bias_head + row.to(tl.int64) * bias_row
    if factors_ptr is not None:
        factors_ptr += batch * Tk

    begin, end = 0, Tk
    if CAUSAL:
        end = tl.minimum(Tk, tl.maximum(Tk - Tq + first_row + ROWS, 0))
    if WINDOW:
        begin = tl.maximum(Tk - Tq + first_row - window + 1, 0)

    lowest = tl.full([BLOCK_M], _INFINITY, dtype=tl.float32)
    remains = tl.zeros([BLOCK_M], dtype=tl.int32)
    if MODE == _SHIFT:
        lowest = _sweep_minimum(
            lowest,
            q,
            live,
            position,
            begin,
            end,
            window,
            key_ptr,
            key_row,
            visible_ptr,
            visible_rows,
            visible_column,
            bias_ptr,
            bias_rows,
            bias_column,
            scale,
            softcap,
            D,
            SOFTCAP,
            CAUSAL,
            WINDOW,
            BLOCK_N,
            BLOCK_D,
            STAGES,
            INTERPRET,
        )
    lowest = tl.where(lowest == _INFINITY, 0.0, lowest)  # rows that see nothing
    if MODE == _LOG:
        remains = _sweep_remains(
            remains,
            live,
            position,
            begin,
            end,
            window,
            factors_ptr,
            visible_ptr,
            visible_rows,
            visible_column,
            CAUSAL,
            WINDOW,
            BLOCK_N,
        )

    largest, total = _start(sinks_ptr, head, live, BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    largest, total, sums = _sweep_softmax(
        largest,
        total,
        sums,
        lowest,
        remains,
        q,
        live,
        position,
        begin,
        end,
        window,
        key_ptr,
        key_row,
        value_ptr,
        value_row,
        factors_ptr,
        visible_ptr,
        visible_rows,
        visible_column,
        bias_ptr,
        bias_rows,
        bias_column,
        scale,
        softcap,
        D,
        MODE,
        SOFTCAP,
        CAUSAL,
        WINDOW,
        BLOCK_N,
        BLOCK_D,
        STAGES,
        INTERPRET,
    )
    out = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr += batch * out_batch + head[:, None] * out_head + row.to(tl.int64)[:, None] * out_row
    tl.store(out_ptr + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _start(sinks_ptr, head, live, BLOCK_M: tl.constexpr):
    """The running softmax before its first key: empty, or one weight of 1 for the sink."""
    largest = tl.full([BLOCK_M], -_INFINITY, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sinks_ptr is not None:
        largest = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * _LOG2_E
        total += 1.0
    return largest, total


@triton.jit
def atman_suffix_attention_kernel(
    query_ptr,  # [S, H, D]
    key_ptr,  # [S, Hk, D]
    value_ptr,  # [S, Hk, D]
    prefix_key_ptr,  # [N, Hk, D]
    prefix_value_ptr,  # [N, Hk, D]
    factors_ptr,  # [S] float32, or None
    bounds_ptr,  # [R + 1]
    block_ends_ptr,  # [R] int32, one more than the last block of each segment
    prefix_start_ptr,  # [R]
    prefix_length_ptr,  # [R]
    sinks_ptr,  # [H], or None
    out_ptr,  # [S, H, D]
    R,
    D,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    prefix_key_row,
    prefix_key_head,
    prefix_value_row,
    prefix_value_head,
    out_row,
    out_head,
    scale,
    softcap,
    window,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One program owns PACKED heads of BLOCK_M // PACKED rows of one segment; surplus programs own none."""
    ROWS: tl.constexpr = BLOCK_M // PACKED
    block = tl.program_id(0)
    segment = 0
    for first in range(0, R, _SEGMENTS_AT_ONCE):
        r = first + tl.arange(0, _SEGMENTS_AT_ONCE)
        ends = tl.load(block_ends_ptr + r, mask=r < R, other=2147483647)
        segment += tl.sum((ends <= block).to(tl.int32), axis=0)
    if segment >= R:
        return
    start = tl.load(bounds_ptr + segment).to(tl.int64)
    length = (tl.load(bounds_ptr + segment + 1).to(tl.int64) - start).to(tl.int32)
    prefix = tl.load(prefix_length_ptr + segment).to(tl.int32)
    prefix_start = tl.load(prefix_start_ptr + segment).to(tl.int64)
    blocks_before = tl.load(block_ends_ptr + segment - 1, mask=segment > 0, other=0)

    first_head = tl.program_id(1) * PACKED
    key_head_index = (first_head // GROUP).to(tl.int64)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    first_row = (block - blocks_before) * ROWS
    row = first_row + m // PACKED
    head = (first_head + m % PACKED).to(tl.int64)
    live = (m < ROWS * PACKED) & (row < length)
    inside = live[:, None] & (d < D)[None, :]
    query_ptr += (start + row)[:, None] * query_row + head[:, None] * query_head
    q = tl.load(query_ptr + d[None, :], mask=inside, other=0.0)
    key_ptr += start * key_row + key_head_index * key_head
    value_ptr += start * value_row + key_head_index * value_head
    prefix_key_ptr += prefix_start * prefix_key_row + key_head_index * prefix_key_head
    prefix_value_ptr += prefix_start * prefix_value_row + key_head_index * prefix_value_head
    if factors_ptr is not None:
        factors_ptr += start

    end = tl.minimum(first_row + ROWS, length)  # own keys up to the diagonal
    begin, prefix_begin = 0, 0
    if WINDOW:
        begin = tl.maximum(first_row - window + 1, 0)
        prefix_begin = tl.maximum(prefix + first_row - window + 1, 0)

    lowest = tl.full([BLOCK_M], _INFINITY, dtype=tl.float32)
    remains = tl.zeros([BLOCK_M], dtype=tl.int32)
    if MODE == _SHIFT:
        lowest = _sweep_minimum(
            lowest,
            q,
            live,
            prefix + row,
            prefix_begin,
            prefix,
            window,
            prefix_key_ptr,
            prefix_key_row,
            None,
            0,
            0,
            None,
            0,
            0,
            scale,
            softcap,
            D,
            SOFTCAP,
            False,
            WINDOW,
            BLOCK_N,
            BLOCK_D,
            STAGES,
            INTERPRET,
        )
        lowest = _sweep_minimum(
            lowest,
            q,
            live,
            row,
            begin,
            end,
            window,
            key_ptr,
            key_row,
            None,
            0,
            0,
            None,
            0,
            0,
            scale,
            softcap,
            D,
            SOFTCAP,
            True,
            WINDOW,
            BLOCK_N,
            BLOCK_D,
            STAGES,
            INTERPRET,
        )
    lowest = tl.where(lowest == _INFINITY, 0.0, lowest)
    if MODE == _LOG:
        if WINDOW:  # a prefix key always remains, if the row sees one
            remains = ((prefix > 0) & (row < window - 1)).to(tl.int32)
        else:
            remains += (prefix > 0).to(tl.int32)
        remains = _sweep_remains(remains, live, row, begin, end, window, factors_ptr, None, 0, 0, True, WINDOW, BLOCK_N)

    largest, total = _start(sinks_ptr, head, live, BLOCK_M)
    sums = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    largest, total, sums = _sweep_softmax(
        largest,
        total,
        sums,
        lowest,
        remains,
        q,
        live,
        prefix + row,
        prefix_begin,
        prefix,
        window,
        prefix_key_ptr,
        prefix_key_row,
        prefix_value_ptr,
        prefix_value_row,
        None,
        None,
        0,
        0,
        None,
        0,
        0,
        scale,
        softcap,
        D,
        MODE,
        SOFTCAP,
        False,
        WINDOW,
        BLOCK_N,
        BLOCK_D,
        STAGES,
        INTERPRET,
    )
    largest, total, sums = _sweep_softmax(
        largest,
        total,
        sums,
        lowest,
        remains,
        q,
        live,
        row,
        begin,
        end,
        window,
        key_ptr,
        key_row,
        value_ptr,
        value_row,
        factors_ptr,
        None,
        0,
        0,
        None,
        0,
        0,
        scale,
        softcap,
        D,
        MODE,
        SOFTCAP,
        True,
        WINDOW,
        BLOCK_N,
        BLOCK_D,
        STAGES,
        INTERPRET,
    )
    out = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr += (start + row)[:, None] * out_row + head[:, None] * out_head
    tl.store(out_ptr + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    visible: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    rule: Rule,
    out: Tensor,
) -> Tensor:
    """Fill `out` `[B, H, Tq, D]`. `visible` and `bias` are expanded to `[B, H, Tq, Tk]`, `factors` is float32."""
    (B, H, Tq, D), (Hk, Tk) = query.shape, key.shape[1:3]
    if out.numel() == 0:
        return out
    settings, packed = _settings(DENSE_CONFIGS, query, H // Hk, rule)
    query, key, value = (_with_dense_rows(each) for each in (query, key, value))
    visible = None if visible is None else visible.view(torch.uint8)
    rows = settings["BLOCK_M"] // packed
    with on_device_of(query):
        atman_attention_kernel[(triton.cdiv(Tq, rows), B * (H // packed))](
            query,
            key,
            value,
            None if factors is None else factors.contiguous(),
            visible,
            bias,
            sinks,
            out,
            H,
            Tq,
            Tk,
            D,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *((0, 0, 0, 0) if visible is None else visible.stride()),
            *((0, 0, 0, 0) if bias is None else bias.stride()),
            *out.stride()[:3],
            *_numbers(rule),
            CAUSAL=is_causal,
            **settings,
        )
    return out


def suffix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    factors: Tensor | None,
    cu_seqlens: Tensor,
    prefix_start: Tensor,
    prefix_length: Tensor,
    sinks: Tensor | None,
    rule: Rule,
    out: Tensor,
) -> Tensor:
    """Fill `out` `[S, H, D]`; `factors` is float32."""
    (S, H, D), Hk, R = query.shape, key.shape[1], prefix_start.shape[0]
    if out.numel() == 0 or R == 0:
        return out
    settings, packed = _settings(SUFFIX_CONFIGS, query, H // Hk, rule)
    query, key, value, prefix_key, prefix_value = (
        _with_dense_rows(each) for each in (query, key, value, prefix_key, prefix_value)
    )
    cu_seqlens, prefix_start, prefix_length = (
        each.to(query.device) for each in (cu_seqlens, prefix_start, prefix_length)
    )
    rows = settings["BLOCK_M"] // packed
    blocks = (cu_seqlens.diff() + (rows - 1)) // rows
    with on_device_of(query):
        atman_suffix_attention_kernel[(S // rows + R, H // packed)](  # as many blocks as S and R allow: no host sync
            query,
            key,
            value,
            prefix_key,
            prefix_value,
            None if factors is None else factors.contiguous(),
            cu_seqlens.contiguous(),
            blocks.cumsum(0).int(),
            prefix_start.contiguous(),
            prefix_length.contiguous(),
            sinks,
            out,
            R,
            D,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *prefix_key.stride()[:2],
            *prefix_value.stride()[:2],
            *out.stride()[:2],
            *_numbers(rule),
            **settings,
        )
    return out


def _settings(configs: tuple[Config, ...], query: Tensor, group: int, rule: Rule) -> tuple[dict[str, Any], int]:
    """Compile-time arguments and launch options, and how many query heads a program takes."""
    D = query.shape[-1]
    config = pick(configs, query.element_size(), D)
    packed = max(heads for heads in range(1, min(group, _MOST_PACKED_HEADS) + 1) if group % heads == 0)
    return {
        "MODE": PLAIN if rule.mode is None else MODES[rule.mode],
        "SOFTCAP": rule.softcap is not None,
        "WINDOW": rule.window is not None,
        "GROUP": group,
        "PACKED": packed,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_D": max(16, next_power_of_2(D)),
        "STAGES": config.STAGES,
        "INTERPRET": query.device.type == "cpu",
        "num_warps": config.num_warps,
        **LAUNCH_OPTIONS,
    }, packed


def _numbers(rule: Rule) -> tuple[float, float, int]:
    """Scale and softcap such that `tanh(scale * dot) * softcap`, or `scale * dot`, is in units of log2; the window."""
    if rule.softcap is None:
        return rule.scale * math.log2(math.e), 0.0, rule.window or 0
    return rule.scale / rule.softcap, rule.softcap * math.log2(math.e), rule.window or 0


def _with_dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
_FEATURES = {"SOFTCAP": True, "WINDOW": True, "GROUP": 2, "PACKED": 2, "INTERPRET": False}


def _dense_signature(kind: str) -> dict[str, str]:
    """Types of the run-time arguments, every optional one present."""
    pointers = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "bias_ptr", "sinks_ptr", "out_ptr"), f"*{kind}")
    pointers |= {"factors_ptr": "*fp32", "visible_ptr": "*u8"}
    tensors = [("query", 3), ("key", 3), ("value", 3), ("out", 3), ("visible", 4), ("bias", 4)]
    axes = ("batch", "head", "row", "column")
    strides = [f"{name}_{axis}" for name, count in tensors for axis in axes[:count]]
    return {**pointers, **dict.fromkeys(("H", "Tq", "Tk", "D", "window", *strides), "i32"), **_SCALES}


def _suffix_signature(kind: str) -> dict[str, str]:
    tensors = ("query", "key", "value", "prefix_key", "prefix_value", "out")
    pointers = dict.fromkeys([f"{name}_ptr" for name in tensors] + ["sinks_ptr"], f"*{kind}")
    lists = dict.fromkeys(("bounds_ptr", "block_ends_ptr", "prefix_start_ptr", "prefix_length_ptr"), "*i32")
    strides = [f"{name}_{axis}" for name in tensors for axis in ("row", "head")]
    numbers = dict.fromkeys(("R", "D", "window", *strides), "i32")
    return {**pointers, "factors_ptr": "*fp32", **lists, **numbers, **_SCALES}


_SCALES = {"scale": "fp32", "softcap": "fp32"}


def _case(kernel: Any, signature: dict[str, str], config: Config, *absent: str, **constants: Any) -> AotCase:
    """A case without the arguments `absent`; rows of tensors and of heads are aligned, as those of models are."""
    signature = {name: kind for name, kind in signature.items() if name not in absent}
    tile = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_D": config.D, "STAGES": config.STAGES}
    aligned = tuple(name for name in signature if name == "D" or name.endswith(("_batch", "_head", "_row")))
    constants = {**tile, **_FEATURES, **constants, **dict.fromkeys(absent)}
    return AotCase(kernel, signature, constants, config.num_warps, aligned)


def _cases() -> tuple[AotCase, ...]:
    """All features at once need the most registers; the other modes differ from shift_min by leaving a sweep out."""
    dense = partial(_case, atman_attention_kernel, CAUSAL=True)
    suffix = partial(_case, atman_suffix_attention_kernel)
    cases = []
    for kind, itemsize in _TYPES.items():
        for make, signature, configs in (
            (dense, _dense_signature(kind), DENSE_CONFIGS),
            (suffix, _suffix_signature(kind), SUFFIX_CONFIGS),
        ):
            rows = [config for config in configs if config.itemsize == itemsize]
            cases += [make(signature, config, MODE=MODES["shift_min"]) for config in rows]
            cases += [make(signature, rows[0], MODE=mode) for mode in list(MODES.values())[1:] if kind == "bf16"]
    bare = {"MODE": PLAIN, "SOFTCAP": False, "WINDOW": False}
    optional = ("factors_ptr", "sinks_ptr", "visible_ptr", "bias_ptr")
    cases.append(dense(_dense_signature("bf16"), DENSE_CONFIGS[0], *optional, **{**bare, "CAUSAL": False}))
    cases.append(suffix(_suffix_signature("bf16"), SUFFIX_CONFIGS[0], *optional[:2], **bare))
    return tuple(cases)


AOT_CASES = _cases()
