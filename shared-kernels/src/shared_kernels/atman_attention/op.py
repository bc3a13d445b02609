"""`atman_attention` and `atman_suffix_attention`: check the arguments, pick an implementation."""

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import check_bounds, check_one_device, check_vector
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import MODES, Mode, atman_attention_eager, atman_suffix_attention_eager, check_suffix_mode

_LARGEST_D = 256
_FACTOR_DTYPES = (torch.float32, torch.float64)


def atman_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    *,
    mode: Mode = "shift_min",
    scale: float | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Attend with scores that are weakened or strengthened per key.

    The scores s = scale * query . key are soft-capped (c tanh(s / c)), get `bias` added, are manipulated, masked, and
    enter a softmax, to which `sinks` adds one logit per head. The factor f of a key acts as `mode` says; m is the least
    score that the row may see:

    - `"shift_min"`: m + (s - m) f. f = 0 makes a key the row's weakest, it does not remove it.
    - `"log_additive"`: s + log f. f = 0 removes a key; a row that would lose all its keys keeps them as they were.
    - `"multiply"`: s f. Raises the weight of a suppressed key whose score is negative.
    - `"shift_min_all"`: as `"shift_min"`, m taken over masked and future keys, too; PyTorch only.

    Scores are float32, float64 for float64 arguments. The PyTorch implementation is differentiable, and `"auto"` takes
    it where a gradient is wanted.

    Args:
        query: `[B, H, Tq, D]`, floating point.
        key: `[B, Hk, Tk, D]`; H is a multiple of Hk, whose heads are shared by H // Hk query heads each.
        value: `[B, Hk, Tk, Dv]`. The kernels take Dv = D up to 256 columns, others run in PyTorch.
        factors: `[B, Tk]`, float32 or float64; 1 leaves a key as it is. None: plain attention. Must be finite and not
            negative, which is not checked: that would wait for the device.
        mode: see above.
        scale: of the scores; None stands for D**-0.5.
        visible: bool, broadcastable to `[B, H, Tq, Tk]`: which keys a row may see. None: all.
        bias: floating point, finite, broadcastable to `[B, H, Tq, Tk]`.
        is_causal: row i sees the keys up to Tk - Tq + i, so the last row sees all.
        window: with `is_causal`, a row sees the last `window` of its keys at most, itself included.
        softcap: c, above 0.
        sinks: `[H]`, floating point.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[B, H, Tq, Dv]` in the dtype of `query`. A row that sees no key is zero.

    Raises:
        ValueError: an argument does not fit the others, or the implementation that was named; the message names it.

    Example:
        >>> query, key = torch.ones(1, 1, 1, 1), torch.tensor([-2.0, 0.0]).view(1, 1, 2, 1)
        >>> value, factors = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), torch.tensor([[0.1, 1.0]])
        >>> for mode in ("shift_min", "log_additive", "multiply"):
        ...     print(round(atman_attention(query, key, value, factors, mode=mode).item(), 3))
        0.119
        0.013
        0.45

    Source: Deiseroth et al. 2023, "AtMan", section 3.
    """
    _check_dense(query, key, value, factors, visible, bias, sinks)
    _check_rule(mode, scale, softcap, window)
    if window is not None and not is_causal:
        raise ValueError(f"window must be None unless is_causal, got {window}; put another window into visible.")
    tensors = (query, key, value, factors, bias, sinks)
    if _choose(impl, "atman_attention", tensors, None if factors is None else mode) == "eager":
        return atman_attention_eager(
            query,
            key,
            value,
            factors,
            mode=mode,
            scale=scale,
            visible=visible,
            bias=bias,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    return _attention(query, key, value, factors, visible, bias, sinks, mode, scale, softcap, window, is_causal)


def atman_suffix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    factors: Tensor | None,
    *,
    cu_seqlens: Tensor,
    prefix_start: Tensor,
    prefix_length: Tensor,
    mode: Mode = "shift_min",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Attend in packed segments, each of which continues a stored prefix.

    Segment r are rows `cu_seqlens[r]` to `cu_seqlens[r + 1]` of the packed tensors. Each sees the whole prefix, rows
    `prefix_start[r]` to `prefix_start[r] + prefix_length[r]` of the prefix buffer, and its segment up to itself: the
    last rows of causal `atman_attention` over both, which explains the arguments not listed here.

    Args:
        query: `[S, H, D]`, floating point, the rows of all segments.
        key: `[S, Hk, D]`; H is a multiple of Hk.
        value: `[S, Hk, Dv]`.
        prefix_key: `[N, Hk, D]`, the keys of one or several prompts. Never copied by the kernel.
        prefix_value: `[N, Hk, Dv]`.
        factors: `[S]`, float32 or float64, of the segments' own keys; those of a prefix count as 1. None: plain
            attention. Must be finite and not negative, which is not checked.
        cu_seqlens: `[R + 1]`, int32 or int64, from 0 to S. Segments may be empty.
        prefix_start: `[R]`, int32 or int64.
        prefix_length: `[R]`, int32 or int64. That prefixes lie in the buffer is not checked.
        mode: `"shift_min"`, `"log_additive"` or `"multiply"`.
        window: a row sees its last `window` keys at most, itself included; row i stands at prefix_length + i.

    Returns:
        `[S, H, Dv]` in the dtype of `query`.

    Raises:
        ValueError: an argument does not fit the others, or the implementation that was named; the message names it.
    """
    _check_packed(query, key, value, prefix_key, prefix_value, factors, sinks)
    check_suffix_mode(mode)
    _check_segments(cu_seqlens, prefix_start, prefix_length)
    _check_rule(mode, scale, softcap, window)
    tensors = (query, key, value, prefix_key, prefix_value, factors, sinks)
    if _choose(impl, "atman_suffix_attention", tensors, None if factors is None else mode) == "eager":
        return atman_suffix_attention_eager(
            query,
            key,
            value,
            prefix_key,
            prefix_value,
            factors,
            cu_seqlens=cu_seqlens,
            prefix_start=prefix_start,
            prefix_length=prefix_length,
            mode=mode,
            scale=scale,
            softcap=softcap,
            window=window,
            sinks=sinks,
        )
    scale = query.shape[2] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    lists = (cu_seqlens, prefix_start, prefix_length)
    return _suffix_attention(
        query, key, value, prefix_key, prefix_value, factors, *lists, sinks, mode, scale, softcap, window
    )


def _check_heads(query: Tensor, key: Tensor, value: Tensor, layout: str) -> None:
    """`layout` spells the axes of `query`; its head axis is named H, its last one D."""
    axes = layout[1:-1].split(", ")
    heads = axes.index("H")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != len(axes):
            raise ValueError(f"{name} must have {len(axes)} axes, as {layout}, got {tuple(tensor.shape)}.")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}.")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query ({query.dtype}), got {tensor.dtype}.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have as many columns as query ({query.shape[-1]}), got {key.shape[-1]}.")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value must have the shape {(*key.shape[:-1], 'Dv')}, as key, got {tuple(value.shape)}.")
    H, Hk = query.shape[heads], key.shape[heads]
    if Hk == 0 or H % Hk:
        raise ValueError(f"key must have a number of heads that divides that of query ({H}), got {Hk}.")


def _check_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    visible: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> None:
    _check_heads(query, key, value, "[B, H, T, D]")
    B, H, Tq, _ = query.shape
    Tk = key.shape[2]
    if key.shape[0] != B:
        raise ValueError(f"key must have the batch of query ({B}), got {key.shape[0]}.")
    if factors is not None:
        if factors.shape != (B, Tk):
            raise ValueError(f"factors must have the shape {(B, Tk)}, one number per key, got {tuple(factors.shape)}.")
        if factors.dtype not in _FACTOR_DTYPES:
            raise ValueError(f"factors must be float32 or float64, got {factors.dtype}.")
    for name, mask in (("visible", visible), ("bias", bias)):
        if mask is not None and not _broadcasts(mask, (B, H, Tq, Tk)):
            raise ValueError(f"{name} must be broadcastable to {(B, H, Tq, Tk)}, got {tuple(mask.shape)}.")
    if visible is not None and visible.dtype != torch.bool:
        raise ValueError(f"visible must be torch.bool, got {visible.dtype}; additive masks go into bias if finite.")
    if bias is not None and not bias.dtype.is_floating_point:
        raise ValueError(f"bias must be floating point, got {bias.dtype}.")
    _check_sinks(sinks, H)
    check_one_device(query=query, key=key, value=value, factors=factors, visible=visible, bias=bias, sinks=sinks)


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    if tensor.ndim > len(shape):
        return False
    sizes = zip(tensor.shape, shape[len(shape) - tensor.ndim :], strict=True)
    return all(own == 1 or own == wanted for own, wanted in sizes)  # not `in`, which compilers take for identity


def _check_sinks(sinks: Tensor | None, H: int) -> None:
    if sinks is not None and (sinks.shape != (H,) or not sinks.dtype.is_floating_point):
        raise ValueError(
            f"sinks must be floating point with the shape {(H,)}, one number per head, got {sinks.dtype} "
            f"{tuple(sinks.shape)}."
        )


def _check_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    factors: Tensor | None,
    sinks: Tensor | None,
) -> None:
    _check_heads(query, key, value, "[S, H, D]")
    S, H, _ = query.shape
    if key.shape[0] != S:
        raise ValueError(f"key must have the rows of query ({S}), got {key.shape[0]}.")
    for name, tensor, own in (("prefix_key", prefix_key, key), ("prefix_value", prefix_value, value)):
        if tensor.ndim != 3 or tensor.shape[1:] != own.shape[1:]:
            wanted = ("N", *own.shape[1:])
            raise ValueError(f"{name} must have the shape {wanted}, got {tuple(tensor.shape)}.")
        if tensor.dtype != own.dtype:
            raise ValueError(f"{name} must have the dtype of query ({own.dtype}), got {tensor.dtype}.")
    if prefix_key.shape[0] != prefix_value.shape[0]:
        raise ValueError(
            f"prefix_value must have the rows of prefix_key ({prefix_key.shape[0]}), got {prefix_value.shape[0]}."
        )
    if factors is not None:
        check_vector("factors", factors, S, "row of query", _FACTOR_DTYPES)
    _check_sinks(sinks, H)
    check_one_device(
        query=query,
        key=key,
        value=value,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        factors=factors,
        sinks=sinks,
    )


def _check_segments(cu_seqlens: Tensor, prefix_start: Tensor, prefix_length: Tensor) -> None:
    check_bounds("cu_seqlens", cu_seqlens)
    R = cu_seqlens.shape[0] - 1
    integers = (torch.int32, torch.int64)
    check_vector("prefix_start", prefix_start, R, "segment", integers)
    check_vector("prefix_length", prefix_length, R, "segment", integers)


def _check_rule(mode: str, scale: float | None, softcap: float | None, window: int | None) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and above 0, got {softcap}.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")


def _choose(impl: Implementation, op: str, tensors: tuple[Tensor | None, ...], mode: str | None) -> str:
    """The implementation for these tensors, of which the first and the third are query and value."""
    query, value = tensors[0], tensors[2]
    assert query is not None
    assert value is not None
    chosen = choose(impl, op, query.device, query.dtype)
    if chosen == "eager":
        return chosen
    D, Dv = query.shape[-1], value.shape[-1]
    obstacle = None
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        obstacle = "has no backward pass, got an argument that requires a gradient"
    elif Dv != D or D > _LARGEST_D:
        obstacle = f"needs as many columns in value as in query, {_LARGEST_D} at most, got {Dv} and {D}"
    elif mode == "shift_min_all":
        obstacle = 'computes visible keys only, got mode="shift_min_all"'
    if obstacle is None:
        return chosen
    if impl == "triton":
        raise ValueError(f'impl="triton" {obstacle}; pass impl="eager" to {op}.')
    return "eager"


@torch.library.custom_op(f"{NAMESPACE}::atman_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    visible: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    mode: str,
    scale: float,
    softcap: float | None,
    window: int | None,
    is_causal: bool,
) -> Tensor:
    from . import kernel

    shape = (*query.shape[:3], key.shape[2])
    return kernel.attention(
        query,
        key,
        value,
        None if factors is None else factors.float(),
        None if visible is None else visible.expand(shape),
        None if bias is None else bias.expand(shape),
        sinks,
        is_causal,
        kernel.Rule(None if factors is None else mode, scale, softcap, window),
        _empty_like_rows(query),
    )


def _empty_like_rows(query: Tensor) -> Tensor:
    """`[B, H, Tq, D]`, with the heads of a row side by side, as what follows attention in a model wants them."""
    B, H, Tq, D = query.shape
    return query.new_empty(B, Tq, H, D).transpose(1, 2)


@_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return _empty_like_rows(query)


@torch.library.custom_op(f"{NAMESPACE}::atman_suffix_attention", mutates_args=())
def _suffix_attention(
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
    mode: str,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    from . import kernel

    return kernel.suffix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        None if factors is None else factors.float(),
        cu_seqlens,
        prefix_start,
        prefix_length,
        sinks,
        kernel.Rule(None if factors is None else mode, scale, softcap, window),
        query.new_empty(query.shape),
    )


@_suffix_attention.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)
