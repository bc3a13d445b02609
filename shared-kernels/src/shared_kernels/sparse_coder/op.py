"""`topk_select`, `topk_sparse_decode` and `sae_encode_topk`: check the arguments, pick an implementation."""

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import check_matrix, check_one_device
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import (
    sae_encode_topk_eager,
    standardize,
    topk_select_eager,
    topk_sparse_decode_eager,
)


def topk_select(pre: Tensor, k: int, *, always: int = 0, impl: Implementation = "auto") -> tuple[Tensor, Tensor]:
    """Take the first `always` numbers of every row and the k largest of the others, in the order of their indices.

    The same selection every time and from every implementation: of equal numbers the one with the lower index is taken,
    and NaN counts as larger than any number, so it is kept and shows. Differentiable in `pre`.

    Args:
        pre: `[N, n]`, floating point: the pre-activations of a sparse coder.
        k: how many of the numbers after the first `always`, in `[1, n]`; all of them if there are fewer.
        always: how many come first whatever their size, in `[0, n]`: the latents that carry concepts.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        Values in the dtype of `pre` and int32 indices, both `[N, always + min(k, n - always)]`.

    Raises:
        ValueError: an argument does not fit the others; the message names it.

    Example:
        >>> topk_select(torch.tensor([[0.1, 5.0, 3.0, 5.0, 4.0]]), 2, always=1)
        (tensor([[0.1000, 5.0000, 5.0000]]), tensor([[0, 1, 3]], dtype=torch.int32))
    """
    check_matrix("pre", pre, "[N, n]")
    _check_counts(k, always, pre.shape[1])
    if choose(impl, "topk_select", pre.device, pre.dtype) == "eager":
        return topk_select_eager(pre, k, always=always)
    return _topk_select(pre, k, always)


def topk_sparse_decode(
    indices: Tensor,
    values: Tensor,
    rows: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Decode a few latents per row: `y_i = (sum_j values_ij * rows[indices_ij] + bias) * scale_i + shift_i`.

    Whether the table rows that are needed are gathered, or all of them are multiplied with a matrix that is zero
    elsewhere, is decided by a table of measured crossings; the result differs by rounding only. Differentiable in all
    floating-point arguments; the gradients are sums in a fixed order: the same bits every time.

    Args:
        indices: `[N, K]`, int32 or int64, each in `[0, n)`, distinct within a row as those of `topk_select`. Not
            checked: that would wait for the device.
        values: `[N, K]`, floating point.
        rows: `[n, d]`, floating point, the decoder with a latent per row. The transpose of a `[d, n]` matrix may be
            given, but small N are decoded several times faster if memory holds one latent after the other.
        scale: `[N]`, floating point, such as the standard deviations that `sae_encode_topk` returns.
        shift: `[N]`, floating point, such as the means.
        bias: `[d]`, floating point.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[N, d]` in the dtype of `rows`. Half precision is summed in float32.

    Raises:
        ValueError: an argument does not fit the others; the message names it.

    Example:
        >>> table = torch.tensor([[1.0, 2.0], [10.0, 20.0], [0.5, 0.0]])
        >>> topk_sparse_decode(torch.tensor([[0, 2]]), torch.tensor([[3.0, 2.0]]), table, bias=torch.ones(2))
        tensor([[5., 7.]])
    """
    _check_decode(indices, values, rows, scale, shift, bias)
    device = check_one_device(rows=rows, indices=indices, values=values, scale=scale, shift=shift, bias=bias)
    dtype = torch.promote_types(values.dtype, rows.dtype)
    if choose(impl, "topk_sparse_decode", device, dtype) == "eager":
        return topk_sparse_decode_eager(indices, values, rows, scale=scale, shift=shift, bias=bias)
    return _decode(indices, values, rows, scale, shift, bias)


def sae_encode_topk(
    x: Tensor,
    encoder: Tensor,
    latent_bias: Tensor,
    pre_bias: Tensor,
    k: int,
    *,
    always: int = 0,
    eps: float = 1e-5,
    normalize: bool = True,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encode rows with a sparse coder and keep its largest pre-activations.

    With z = (x - mean) / (std + eps) per row and pre = encoder @ (z - pre_bias) + latent_bias, keeps of each row what
    `topk_select` says: the first `always` pre-activations, then the k largest of the others. Differentiable in all
    floating-point arguments; no gradient passes through an `[N, n]` matrix unless k is a large share of n, and the one
    to `pre_bias` needs none to x. Gradients are sums in a fixed order: the same bits every time.

    Args:
        x: `[N, d]`, floating point.
        encoder: `[n, d]`, floating point.
        latent_bias: `[n]`, floating point.
        pre_bias: `[d]`, floating point.
        k: how many of the latents after the first `always` are kept, in `[1, n]`; all of them if there are fewer.
        always: how many latents are kept without counting to k, in `[0, n]`.
        eps: added to the standard deviation, not negative; does not enter the one that is returned.
        normalize: False takes z = x, mean 0 and standard deviation 1.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        values, the raw pre-activations (before any activation function), and int32 indices, both `[N, always + min(k, n
        - always)]`, in the order of the indices; mean and unbiased standard deviation, `[N]`. All but the indices in
        float32, or in float64 if `x` or `encoder` is. The product is formed in the dtype of `encoder`.

    Raises:
        ValueError: an argument does not fit the others; the message names it.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> values, indices, mean, std = sae_encode_topk(x, torch.eye(4), torch.zeros(4), torch.zeros(4), 1)
        >>> indices.item(), round(values.item(), 4), mean.item(), round(std.item(), 4)
        (3, 1.1619, 2.5, 1.291)

    Source: Haerle et al. 2024, "SCAR", section 3.
    """
    _check_encode(x, encoder, latent_bias, pre_bias, eps)
    _check_counts(k, always, encoder.shape[0])
    device = check_one_device(x=x, encoder=encoder, latent_bias=latent_bias, pre_bias=pre_bias)
    dtype = torch.promote_types(x.dtype, encoder.dtype)
    if choose(impl, "sae_encode_topk", device, dtype) == "eager":
        return sae_encode_topk_eager(x, encoder, latent_bias, pre_bias, k, always=always, eps=eps, normalize=normalize)
    if normalize and not (torch.is_grad_enabled() and x.requires_grad):
        z, mean, std = _standardize(x, eps)
    else:  # PyTorch has the gradient, and nothing to fuse without normalization
        z, mean, std = standardize(x.float(), eps, normalize)
    values, indices = _encode(z, encoder, latent_bias, pre_bias, k, always)
    return values, indices, mean, std


def _check_counts(k: int, always: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, {n}] (the number of latents), got {k}.")
    if not 0 <= always <= n:
        raise ValueError(f"always must lie in [0, {n}] (the number of latents), got {always}.")


def _check_float_vector(name: str, tensor: Tensor | None, length: int, of: str) -> None:
    if tensor is not None and (tensor.shape != (length,) or not tensor.dtype.is_floating_point):
        raise ValueError(
            f"{name} must be floating point with the shape {(length,)}, one number per {of}, got {tensor.dtype} "
            f"{tuple(tensor.shape)}."
        )


def _check_decode(
    indices: Tensor, values: Tensor, rows: Tensor, scale: Tensor | None, shift: Tensor | None, bias: Tensor | None
) -> None:
    check_matrix("values", values, "[N, K]")
    check_matrix("rows", rows, "[n, d]")
    if indices.shape != values.shape:
        raise ValueError(f"indices must have the shape of values {tuple(values.shape)}, got {tuple(indices.shape)}.")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be int32 or int64, got {indices.dtype}.")
    if values.shape[1] > rows.shape[0]:
        raise ValueError(
            f"indices must name distinct rows, so {rows.shape[0]} per row at most, got {values.shape[1]} columns."
        )
    _check_float_vector("scale", scale, values.shape[0], "row of values")
    _check_float_vector("shift", shift, values.shape[0], "row of values")
    _check_float_vector("bias", bias, rows.shape[1], "column of rows")


def _check_encode(x: Tensor, encoder: Tensor, latent_bias: Tensor, pre_bias: Tensor, eps: float) -> None:
    check_matrix("x", x, "[N, d]")
    check_matrix("encoder", encoder, "[n, d]")
    if encoder.shape[1] != x.shape[1]:
        raise ValueError(f"encoder must have the {x.shape[1]} columns of x, got {encoder.shape[1]}.")
    _check_float_vector("latent_bias", latent_bias, encoder.shape[0], "row of encoder")
    _check_float_vector("pre_bias", pre_bias, x.shape[1], "column of x")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}.")


@torch.library.custom_op(f"{NAMESPACE}::topk_select", mutates_args=())
def _topk_select(pre: Tensor, k: int, always: int) -> tuple[Tensor, Tensor]:
    from . import kernel

    return kernel.select(pre.contiguous(), min(k, pre.shape[1] - always), always)


@_topk_select.register_fake
def _(pre: Tensor, k: int, always: int) -> tuple[Tensor, Tensor]:
    K = always + min(k, pre.shape[1] - always)
    return pre.new_empty(pre.shape[0], K), pre.new_empty(pre.shape[0], K, dtype=torch.int32)


def _keep_indices(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.columns = inputs[0].shape[1]


def _select_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    zeros = torch.zeros(grad.shape[0], ctx.columns, dtype=grad.dtype, device=grad.device)
    return zeros.scatter(1, indices.long(), grad), None, None


_topk_select.register_autograd(_select_backward, setup_context=_keep_indices)


@torch.library.custom_op(f"{NAMESPACE}::sparse_coder_standardize", mutates_args=())
def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.standardize(x.contiguous(), eps)


@_standardize.register_fake
def _(x: Tensor, _eps: float) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return z, z.new_empty(x.shape[0]), z.new_empty(x.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::sae_encode_topk", mutates_args=())
def _encode(
    z: Tensor, encoder: Tensor, latent_bias: Tensor, pre_bias: Tensor, k: int, always: int
) -> tuple[Tensor, Tensor]:
    """Selected pre-activations, float32, of rows that are standardized already."""
    from . import kernel

    return kernel.encode(z, encoder, latent_bias, pre_bias, min(k, encoder.shape[0] - always), always)


@_encode.register_fake
def _(
    z: Tensor, encoder: Tensor, _latent_bias: Tensor, _pre_bias: Tensor, k: int, always: int
) -> tuple[Tensor, Tensor]:
    K = always + min(k, encoder.shape[0] - always)
    return z.new_empty(z.shape[0], K), z.new_empty(z.shape[0], K, dtype=torch.int32)


def _setup_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, encoder, latent_bias, pre_bias, _, _ = inputs
    ctx.save_for_backward(output[1], z, encoder, pre_bias)
    ctx.mark_non_differentiable(output[1])
    ctx.latent_bias_dtype = latent_bias.dtype


def _encode_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    indices, z, encoder, pre_bias = ctx.saved_tensors
    needs_z, needs_encoder, *needs_bias = ctx.needs_input_grad[:4]
    n = encoder.shape[0]
    grad_z = _decode(indices, grad, encoder, None, None, None) if needs_z else None
    grad_encoder = grad_bias = grad_pre_bias = None
    if needs_encoder:
        grad_encoder = _column_sums(indices, grad, z - pre_bias.float(), n).to(encoder.dtype)
    if any(needs_bias):
        per_latent = _column_sums(indices, grad, z.new_ones(z.shape[0], 1), n).squeeze(1)
        grad_bias = per_latent.to(ctx.latent_bias_dtype)
        grad_pre_bias = -(per_latent @ encoder.float()).to(pre_bias.dtype) if needs_bias[1] else None
    return grad_z, grad_encoder, grad_bias, grad_pre_bias, None, None


_encode.register_autograd(_encode_backward, setup_context=_setup_encode)


@torch.library.custom_op(f"{NAMESPACE}::topk_sparse_decode", mutates_args=())
def _decode(
    indices: Tensor,
    values: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    from . import kernel

    return kernel.decode(indices, values, rows, kernel.Epilogue(scale, shift, bias))


@_decode.register_fake
def _(indices: Tensor, _values: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(indices.shape[0], rows.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::sparse_coder_row_products", mutates_args=())
def _row_products(indices: Tensor, grad: Tensor, rows: Tensor) -> Tensor:
    """`[N, K]` float32: products of grad_i with rows[indices_ij]."""
    from . import kernel

    return kernel.row_products(indices, grad, rows)


@_row_products.register_fake
def _(indices: Tensor, _grad: Tensor, rows: Tensor) -> Tensor:
    return torch.empty(indices.shape, dtype=torch.float32, device=rows.device)


@torch.library.custom_op(f"{NAMESPACE}::sparse_coder_column_sums", mutates_args=())
def _column_sums(indices: Tensor, values: Tensor, source: Tensor, n: int) -> Tensor:
    """`[n, d]` float32: row c sums values_ij * source_i over the entries with indices_ij = c, in the order of i."""
    from . import kernel

    return kernel.column_sums(indices, values, source, n)


@_column_sums.register_fake
def _(_indices: Tensor, _values: Tensor, source: Tensor, n: int) -> Tensor:
    return torch.empty(n, source.shape[1], dtype=torch.float32, device=source.device)


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    ctx.save_for_backward(*inputs)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, values, rows, scale, shift, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad = grad.float()
    grad_scale = grad_shift = grad_bias = None
    if needs[3]:
        unscaled = _decode(indices, values.float(), rows, None, None, bias)
        grad_scale = (grad * unscaled).sum(1).to(scale.dtype)
    if needs[4]:
        grad_shift = grad.sum(1).to(shift.dtype)
    if scale is not None:
        grad = grad * scale.float()[:, None]
    if needs[5]:
        grad_bias = grad.sum(0).to(bias.dtype)
    grad_values = _row_products(indices, grad, rows).to(values.dtype) if needs[1] else None
    grad_rows = _column_sums(indices, values, grad, rows.shape[0]).to(rows.dtype) if needs[2] else None
    return None, grad_values, grad_rows, grad_scale, grad_shift, grad_bias


_decode.register_autograd(_decode_backward, setup_context=_setup_decode)
