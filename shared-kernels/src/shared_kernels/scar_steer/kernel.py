"""Triton kernels of `scar_steer` and `scar_scores`. No validation: op.py has done it.

One program owns one row and walks its columns a block at a time, more than once: after the first time they are in the
cache, as are the few rows of encoder and decoder that all programs share.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, on_device_of

RULES = {"scale": 0, "set": 1, "add": 2, "add_gated": 3}
NO_RULE = -1
"""The kernels score, and steer nothing."""
ACTIVATIONS = {"relu": 0, "sigmoid": 1, "tanh": 2}

_SCALE = tl.constexpr(RULES["scale"])
_ADD = tl.constexpr(RULES["add"])
_ADD_GATED = tl.constexpr(RULES["add_gated"])
_NO_RULE = tl.constexpr(NO_RULE)
_RELU = tl.constexpr(ACTIVATIONS["relu"])
_TANH = tl.constexpr(ACTIVATIONS["tanh"])
_SIGMOID = tl.constexpr(ACTIVATIONS["sigmoid"])


class Config(NamedTuple):
    """BLOCK_D columns at a time, for rows of at most `columns` columns."""

    columns: int
    BLOCK_D: int
    num_warps: int


CONFIGS = (
    Config(columns=256, BLOCK_D=256, num_warps=1),
    Config(columns=1024, BLOCK_D=1024, num_warps=2),
    Config(columns=2**62, BLOCK_D=4096, num_warps=8),
)


def pick(columns: int) -> Config:
    """The block for rows of that many columns."""
    return next(config for config in CONFIGS if columns <= config.columns)


class Rule(NamedTuple):
    """How the kernels score and steer."""

    rule: str | None
    activation: str
    threshold: float
    eps: float
    normalize: bool


@triton.jit
def _block(ptr, first, d, BLOCK_D: tl.constexpr):
    """Columns `first` and following of a row, in float32; 0 where it ends."""
    cols = first + tl.arange(0, BLOCK_D)
    return tl.load(ptr + cols, mask=cols < d, other=0.0).to(tl.float32)


@triton.jit
def _centered(ptr, first, d, mean, BLOCK_D: tl.constexpr):
    """The same less the mean."""
    cols = first + tl.arange(0, BLOCK_D)
    x = tl.load(ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
    return tl.where(cols < d, x - mean, 0.0)


@triton.jit
def _statistics(x_ptr, d, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean, unbiased std and length of a row."""
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    squares = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, d, BLOCK_D):
        x = _block(x_ptr, first, d, BLOCK_D)
        sums += x
        squares += x * x
    length = tl.sqrt(tl.sum(squares, axis=0))
    mean = 0.0
    std = 1.0
    if NORMALIZE:
        mean = tl.sum(sums, axis=0) / d
        squares = tl.zeros([BLOCK_D], dtype=tl.float32)
        for first in range(0, d, BLOCK_D):
            u = _centered(x_ptr, first, d, mean, BLOCK_D)
            squares += u * u
        std = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(d - 1, 1))
    return mean, std, length


@triton.jit
def _encoder_block(encoder_ptr, shift, c, first, d, BLOCK_D: tl.constexpr):
    """Row c of the encoder less its mean, so that what rounding left of the mean in x adds nothing to the scores."""
    return _centered(encoder_ptr + c * d, first, d, shift, BLOCK_D)


@triton.jit
def _encoder_mean(encoder_sum_ptr, c, d, NORMALIZE: tl.constexpr):
    shift = 0.0
    if NORMALIZE:
        shift = tl.load(encoder_sum_ptr + c) / d
    return shift


@triton.jit
def _reciprocal(length):
    """1 / length, 0 for a length of 0. A NaN stays one."""
    return tl.where(length == 0.0, 0.0, 1.0 / tl.where(length == 0.0, 1.0, length))


@triton.jit
def _value(pre, is_closed, ACTIVATION: tl.constexpr):
    """Latent and its slope; both 0 where it is closed."""
    if ACTIVATION == _RELU:
        h = tl.where(pre <= 0.0, 0.0, pre)  # unlike maximum, keeps NaN
        slope = tl.where(pre > 0.0, 1.0, 0.0)
    elif ACTIVATION == _SIGMOID:
        h = 1.0 / (1.0 + tl.exp(-pre))
        slope = h * (1.0 - h)
    else:
        t = tl.exp(-2.0 * tl.abs(pre))
        h = (1.0 - t) / (1.0 + t)
        slope = 1.0 - h * h
        h = tl.where(pre < 0.0, -h, h)
    return tl.where(is_closed, 0.0, h), tl.where(is_closed, 0.0, slope)


@triton.jit
def _factor(pre, a, is_closed, std, length, decoder_length, RULE: tl.constexpr, ACTIVATION: tl.constexpr):
    """Compute k, and its derivatives with respect to pre, a, std and the length of the row."""
    if RULE < _ADD:
        by_length = 0.0 * a
        if RULE == _SCALE and ACTIVATION == _TANH:
            is_closed = is_closed | (pre <= 0.0)  # a negative latent is not a concept that is on
        h, slope = _value(pre, is_closed, ACTIVATION)
        if RULE == _SCALE:
            by_a = std * h
            by_pre = std * a * slope
            by_std = a * h
        else:
            by_a = std
            by_pre = -std * slope
            by_std = a - h
        k = std * by_std
    else:
        by_std = 0.0 * a
        by_a = length * _reciprocal(decoder_length)
        by_pre = 0.0 * a
        if RULE == _ADD_GATED:
            s, slope = _value(pre, is_closed, _SIGMOID)
            by_pre = a * by_a * tl.where(a > 0.0, -slope, slope)
            by_a *= tl.where(a > 0.0, 1.0 - s, s)
        k = a * by_a
        by_length = k * _reciprocal(length)
    return k, by_pre, by_a, by_std, by_length


@triton.jit
def _is_closed(pre, threshold, is_open_ptr, place):
    is_closed = pre <= threshold  # not so for NaN, which counts as open in order not to be hidden
    if is_open_ptr is not None:
        is_closed = tl.load(is_open_ptr + place) == 0
    return is_closed


@triton.jit
def _row_length(ptr, d, BLOCK_D: tl.constexpr):
    squares = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, d, BLOCK_D):
        values = _block(ptr, first, d, BLOCK_D)
        squares += values * values
    return tl.sqrt(tl.sum(squares, axis=0))


@triton.jit
def scar_steer_fwd_kernel(
    x_ptr,  # [N, d]
    encoder_ptr,  # [C, d] float32, as all that follow
    encoder_sum_ptr,  # [C]
    bias_ptr,  # [C]
    decoder_ptr,  # [C, d]; None without a rule
    strength_ptr,  # [S, C]; None without a rule
    is_open_ptr,  # [N, C] uint8, or None
    y_ptr,  # [N, d] in the dtype of x; None without a rule
    pre_ptr,  # [N, C]
    factor_ptr,  # [N, C] scratch; None without a rule
    statistics_ptr,  # [N, 3]: mean, std, length
    d,
    C,
    rows_per_strength,
    threshold,
    eps,
    RULE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Statistics, scores and factors of one row, then the row and the decoder rows times their factors."""
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * d
    mean, std, length = _statistics(x_ptr, d, NORMALIZE, BLOCK_D)
    tl.store(statistics_ptr + 3 * n, mean)
    tl.store(statistics_ptr + 3 * n + 1, std)
    tl.store(statistics_ptr + 3 * n + 2, length)

    for c in range(C):
        shift = _encoder_mean(encoder_sum_ptr, c, d, NORMALIZE)
        products = tl.zeros([BLOCK_D], dtype=tl.float32)
        for first in range(0, d, BLOCK_D):
            u = _centered(x_ptr, first, d, mean, BLOCK_D)
            products += u * _encoder_block(encoder_ptr, shift, c, first, d, BLOCK_D)
        dot = tl.sum(products, axis=0)
        if NORMALIZE:
            dot /= std + eps
        pre = dot + tl.load(bias_ptr + c)
        tl.store(pre_ptr + n * C + c, pre)
        if RULE != _NO_RULE:
            a = tl.load(strength_ptr + (n // rows_per_strength) * C + c)
            is_closed = _is_closed(pre, threshold, is_open_ptr, n * C + c)
            decoder_length = 1.0
            if RULE >= _ADD:
                decoder_length = _row_length(decoder_ptr + c * d, d, BLOCK_D)
            k, _, _, _, _ = _factor(pre, a, is_closed, std, length, decoder_length, RULE, ACTIVATION)
            tl.store(factor_ptr + n * C + c, k)

    if RULE != _NO_RULE:
        tl.debug_barrier()  # factors were stored by other threads than those that load them
        for first in range(0, d, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            y = _block(x_ptr, first, d, BLOCK_D)
            for c in range(C):
                y += tl.load(factor_ptr + n * C + c) * _block(decoder_ptr + c * d, first, d, BLOCK_D)
            tl.store(y_ptr + n * d + cols, y.to(y_ptr.dtype.element_ty), mask=cols < d)


@triton.jit
def scar_steer_bwd_kernel(
    x_ptr,  # [N, d]
    encoder_ptr,  # [C, d] float32, as all that follow
    encoder_sum_ptr,  # [C]
    bias_ptr,  # [C]
    decoder_ptr,  # [C, d]; None without a rule
    strength_ptr,  # [S, C]; None without a rule
    is_open_ptr,  # [N, C] uint8, or None
    pre_ptr,  # [N, C]
    statistics_ptr,  # [N, 3]: mean, std, length
    grad_y_ptr,  # [N, d] in the dtype of x; None without a rule
    grad_pre_ptr,  # [N, C]
    grad_x_ptr,  # [N, d] in the dtype of x
    slopes_ptr,  # [N, 4, C]: factor, and gradients of pre, strength and factor; without a rule that of pre only
    d,
    C,
    rows_per_strength,
    threshold,
    eps,
    RULE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of one row's factors and scores, then of the row itself."""
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * d
    mean = tl.load(statistics_ptr + 3 * n)
    std = tl.load(statistics_ptr + 3 * n + 1)
    length = tl.load(statistics_ptr + 3 * n + 2)
    slopes_ptr += 4 * n * C

    grad_std = 0.0 * std
    grad_length = 0.0 * std
    for c in range(C):
        place = n * C + c
        pre = tl.load(pre_ptr + place)
        grad_pre = tl.load(grad_pre_ptr + place)
        if RULE != _NO_RULE:
            products = tl.zeros([BLOCK_D], dtype=tl.float32)
            for first in range(0, d, BLOCK_D):
                grad = _block(grad_y_ptr + n * d, first, d, BLOCK_D)
                products += grad * _block(decoder_ptr + c * d, first, d, BLOCK_D)
            direction = tl.sum(products, axis=0)
            a = tl.load(strength_ptr + (n // rows_per_strength) * C + c)
            is_closed = _is_closed(pre, threshold, is_open_ptr, place)
            decoder_length = 1.0
            if RULE >= _ADD:
                decoder_length = _row_length(decoder_ptr + c * d, d, BLOCK_D)
            k, by_pre, by_a, by_std, by_length = _factor(
                pre, a, is_closed, std, length, decoder_length, RULE, ACTIVATION
            )
            grad_pre += direction * by_pre
            grad_std += direction * by_std
            grad_length += direction * by_length
            tl.store(slopes_ptr + c, k)
            tl.store(slopes_ptr + 2 * C + c, direction * by_a)
            tl.store(slopes_ptr + 3 * C + c, direction)
        tl.store(slopes_ptr + C + c, grad_pre)
        if NORMALIZE:
            grad_std -= grad_pre * (pre - tl.load(bias_ptr + c)) / (std + eps)

    tl.debug_barrier()  # slopes were stored by other threads than those that load them
    by_centered = grad_std * _reciprocal(std) / tl.maximum(d - 1, 1)
    by_x = grad_length * _reciprocal(length)
    scale = 1.0
    if NORMALIZE:
        scale = 1.0 / (std + eps)
    for first in range(0, d, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        grad = by_x * _block(x_ptr, first, d, BLOCK_D)
        if NORMALIZE:
            grad += by_centered * _centered(x_ptr, first, d, mean, BLOCK_D)
        if RULE != _NO_RULE:
            grad += _block(grad_y_ptr + n * d, first, d, BLOCK_D)
        for c in range(C):
            shift = _encoder_mean(encoder_sum_ptr, c, d, NORMALIZE)
            weight = scale * tl.load(slopes_ptr + C + c)
            grad += weight * _encoder_block(encoder_ptr, shift, c, first, d, BLOCK_D)
        tl.store(grad_x_ptr + n * d + cols, grad.to(grad_x_ptr.dtype.element_ty), mask=cols < d)


def steer(
    x: Tensor,
    encoder: Tensor,
    encoder_sum: Tensor,
    bias: Tensor,
    decoder: Tensor | None,
    strength: Tensor | None,
    is_open: Tensor | None,
    *,
    rule: Rule,
    y: Tensor | None,
    pre: Tensor,
    statistics: Tensor,
) -> None:
    """Fill `y` `[N, d]`, `pre` `[N, C]` and `statistics` `[N, 3]`. All are contiguous; weights are float32."""
    (N, d), C = x.shape, bias.shape[0]
    if N == 0:
        return
    with on_device_of(x):
        scar_steer_fwd_kernel[(N,)](
            x,
            encoder,
            encoder_sum,
            bias,
            decoder,
            strength,
            None if is_open is None else is_open.view(torch.uint8),
            y,
            pre,
            None if y is None else torch.empty_like(pre),
            statistics,
            d,
            C,
            1 if strength is None else N // strength.shape[0],
            rule.threshold,
            rule.eps,
            **_settings(rule, d),
        )


def steer_backward(
    x: Tensor,
    encoder: Tensor,
    encoder_sum: Tensor,
    bias: Tensor,
    decoder: Tensor | None,
    strength: Tensor | None,
    is_open: Tensor | None,
    pre: Tensor,
    statistics: Tensor,
    grad_y: Tensor | None,
    grad_pre: Tensor,
    *,
    rule: Rule,
    grad_x: Tensor,
    slopes: Tensor,
) -> None:
    """Fill `grad_x` `[N, d]`, and `slopes` `[N, 4, C]` with what the other gradients are products of."""
    (N, d), C = x.shape, bias.shape[0]
    if N == 0:
        return
    with on_device_of(x):
        scar_steer_bwd_kernel[(N,)](
            x,
            encoder,
            encoder_sum,
            bias,
            decoder,
            strength,
            None if is_open is None else is_open.view(torch.uint8),
            pre,
            statistics,
            grad_y,
            grad_pre,
            grad_x,
            slopes,
            d,
            C,
            1 if strength is None else N // strength.shape[0],
            rule.threshold,
            rule.eps,
            **_settings(rule, d),
        )


def _settings(rule: Rule, d: int) -> dict[str, Any]:
    config = pick(d)
    return {
        "RULE": NO_RULE if rule.rule is None else RULES[rule.rule],
        "ACTIVATION": ACTIVATIONS[rule.activation],
        "NORMALIZE": rule.normalize,
        "BLOCK_D": config.BLOCK_D,
        "num_warps": config.num_warps,
        **LAUNCH_OPTIONS,
    }


_FLOATS = ("encoder_ptr", "encoder_sum_ptr", "bias_ptr", "decoder_ptr", "strength_ptr", "pre_ptr", "statistics_ptr")
_NUMBERS = {"d": "i32", "C": "i32", "rows_per_strength": "i32", "threshold": "fp32", "eps": "fp32"}
_OF_RULES = ("decoder_ptr", "strength_ptr", "y_ptr", "factor_ptr", "grad_y_ptr")


def _case(kernel: Any, kind: str, config: Config, rule: Rule, *absent: str) -> AotCase:
    """A case without the arguments `absent`."""
    signature = {**dict.fromkeys(_FLOATS, "*fp32"), "x_ptr": kind, "is_open_ptr": "*u8", **_NUMBERS}
    if kernel is scar_steer_fwd_kernel:
        signature |= {"y_ptr": kind, "factor_ptr": "*fp32"}
    else:
        signature |= {"grad_y_ptr": kind, "grad_x_ptr": kind, "grad_pre_ptr": "*fp32", "slopes_ptr": "*fp32"}
    constexprs: dict[str, Any] = {name: None for name in absent if name in signature}
    signature = {name: value for name, value in signature.items() if name not in constexprs}
    settings = _settings(rule, config.columns)
    constexprs |= {name: settings[name] for name in ("RULE", "ACTIVATION", "NORMALIZE", "BLOCK_D")}
    return AotCase(kernel, signature, constexprs, config.num_warps, aligned=("d",))


def _cases() -> tuple[AotCase, ...]:
    """Every dtype in every row of the table, and every branch."""
    usual = Rule("add_gated", "relu", 0.0, 1e-5, True)
    cases = []
    for kernel in (scar_steer_fwd_kernel, scar_steer_bwd_kernel):
        for config in CONFIGS:
            cases += [_case(kernel, kind, config, usual) for kind in ("*bf16", "*fp16", "*fp32")]
        for rule in (
            usual._replace(rule="scale", activation="tanh"),
            usual._replace(rule="set", activation="sigmoid"),
            usual._replace(rule="scale"),
            usual._replace(rule="add", normalize=False),
        ):
            cases.append(_case(kernel, "*bf16", CONFIGS[-1], rule, "is_open_ptr"))
        for normalize in (True, False):
            rule = usual._replace(rule=None, normalize=normalize)
            cases.append(_case(kernel, "*bf16", CONFIGS[-1], rule, "is_open_ptr", *_OF_RULES))
    return tuple(cases)


AOT_CASES = _cases()
