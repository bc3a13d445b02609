"""`scar_scores` and `scar_steer`: check the arguments, pick an implementation, define the gradient."""

from typing import Any

import torch
from torch import Tensor

from .._checks import check_one_device
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import ACTIVATIONS, RULES, Activation, Rule, scar_scores_eager, scar_steer_eager, sum_dtype

_WEIGHT_DTYPES = (torch.float32, torch.float64)


def scar_scores(
    x: Tensor,
    encoder: Tensor,
    encoder_sum: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    normalize: bool = True,
    impl: Implementation = "auto",
) -> Tensor:
    """Score how strongly rows carry a few concepts: the pre-activations of these latents of a sparse coder.

    pre = E (x - mean) / (std + eps) + bias with each row's own mean and unbiased std. That is the coder's
    pre-activation when `bias` is its latent bias minus E times what it subtracts from its input, at the cost of C of
    its latents.

    Args:
        x: `[..., d]`, floating point.
        encoder: `[C, d]`, float32 or float64, the concepts' rows of the encoder.
        encoder_sum: `[C]`, `encoder.sum(1)`, which keeps the rounding of a large mean out of the scores. Whoever scores
            often computes it once. Not checked; it gets no gradient, `encoder` gets all of it.
        bias: `[C]`.
        eps: added to the std, above 0.
        normalize: False takes the mean as 0 and the std as 1, without eps.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[..., C]`, float32, or float64 for float64 arguments. A row without spread scores `bias`.

    Raises:
        ValueError: an argument does not fit the others; the message names it.

    Example:
        >>> x, encoder = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.eye(4)[:2]
        >>> scar_scores(x, encoder, encoder.sum(1), torch.zeros(2))
        tensor([-1.1619, -0.3873])

    Source: Haerle et al. 2024, "SCAR", section 2.
    """
    _check_scoring(x, encoder, encoder_sum, bias, eps)
    if choose(impl, "scar_scores", x.device, sum_dtype(x, encoder)) == "eager":
        return scar_scores_eager(x, encoder, encoder_sum, bias, eps=eps, normalize=normalize)
    rows, no = x.reshape(-1, x.shape[-1]), None
    pre = _scar_steer(rows, encoder, encoder_sum, bias, no, no, no, None, "relu", 0.0, eps, normalize)[1]
    return pre.view(*x.shape[:-1], pre.shape[1])


def scar_steer(
    x: Tensor,
    encoder: Tensor,
    encoder_sum: Tensor,
    bias: Tensor,
    decoder: Tensor,
    strength: Tensor,
    *,
    rule: Rule,
    activation: Activation = "relu",
    threshold: float = 0.0,
    is_open: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool = True,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Move rows along the decoder directions of a few concept latents, and score them on the way.

    y = x + sum_c k_c D_c. The latent h is the activation of the pre-activation of `scar_scores` where it is open,
    else 0. With strength a, `rule` says k:

    - `"scale"`: std a max(h, 0), which makes a positive latent (1 + a) h. What is off stays off.
    - `"set"`: std (a - h), which makes the latent a.
    - `"add"`: a |x| / |D|, a share of the row's length.
    - `"add_gated"`: the same times g for a <= 0 and times 1 - g for a > 0, where g is sigmoid(pre) where open, else 0:
      takes off where the concept is, adds where it is not.

    Args:
        x: `[..., d]`, floating point; N rows.
        encoder: `[C, d]`; this, `encoder_sum`, `bias`, `eps` and `normalize` are those of `scar_scores`.
        decoder: `[C, d]`, the concepts' columns of the decoder. One of zeros has no direction and changes nothing.
        strength: `[S, C]`; S divides N, and row i takes strength[i // (N // S)].
        rule: see above.
        activation: `"relu"`, `"sigmoid"` or `"tanh"`.
        threshold: a latent is open where its pre-activation is larger; -inf opens all.
        is_open: bool, N * C entries in the order of the rows; which latents are open, instead of `threshold`.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        y, of the shape and dtype of `x`, and the pre-activations `[..., C]`, float32, or float64 for float64 arguments.
        Half precision is computed in float32 and rounded once, so a row that nothing is added to keeps its values.
        Differentiable in `x`, `encoder`, `bias`, `decoder` and `strength`.

    Raises:
        ValueError: an argument does not fit the others; the message names it.

    Example:
        >>> x, decoder, none = torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
        >>> y, pre = scar_steer(x, none, none.sum(1), torch.zeros(1), decoder, torch.tensor([[0.4]]), rule="add")
        >>> y  # by 0.4 of its length, 5
        tensor([3., 6.])

    Source: Haerle et al. 2024, "SCAR", section 2; the rules that add: Haerle et al. 2025, "Measuring and Guiding
    Monosemanticity".
    """
    _check_scoring(x, encoder, encoder_sum, bias, eps)
    _check_steering(x, encoder, decoder, strength, is_open, rule, activation, threshold)
    if choose(impl, "scar_steer", x.device, sum_dtype(x, encoder)) == "eager":
        return scar_steer_eager(
            x,
            encoder,
            encoder_sum,
            bias,
            decoder,
            strength,
            rule=rule,
            activation=activation,
            threshold=threshold,
            is_open=is_open,
            eps=eps,
            normalize=normalize,
        )
    rows, settings = x.reshape(-1, x.shape[-1]), (rule, activation, threshold, eps, normalize)
    if is_open is not None:
        is_open = is_open.reshape(rows.shape[0], bias.shape[0])
    y, pre, _ = _scar_steer(rows, encoder, encoder_sum, bias, decoder, strength, is_open, *settings)
    return y.view(x.shape), pre.view(*x.shape[:-1], pre.shape[1])


def _check_scoring(x: Tensor, encoder: Tensor, encoder_sum: Tensor, bias: Tensor, eps: float) -> None:
    if x.ndim < 1 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point with the shape [..., d], got {x.dtype} {tuple(x.shape)}.")
    d = x.shape[-1]
    if d < 1:
        raise ValueError(f"x must have at least one column, got the shape {tuple(x.shape)}.")
    if encoder.ndim != 2 or encoder.shape[1] != d:
        raise ValueError(f"encoder must have the shape [C, {d}], d as in x, got {tuple(encoder.shape)}.")
    if encoder.dtype not in _WEIGHT_DTYPES:
        raise ValueError(f"encoder must be torch.float32 or torch.float64, got {encoder.dtype}; convert it with .to().")
    shape = (encoder.shape[0],)
    for name, tensor in (("encoder_sum", encoder_sum), ("bias", bias)):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have the shape {shape}, one number per row of encoder, got {tuple(tensor.shape)}."
            )
        _check_dtype(name, tensor, encoder)
    if not x.device == encoder.device == encoder_sum.device == bias.device:
        check_one_device(x=x, encoder=encoder, encoder_sum=encoder_sum, bias=bias)
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps must be finite and above 0, got {eps}.")


def _check_dtype(name: str, tensor: Tensor, encoder: Tensor) -> None:
    if tensor.dtype != encoder.dtype:
        raise ValueError(f"{name} must have the dtype of encoder ({encoder.dtype}), got {tensor.dtype}.")


def _check_steering(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    strength: Tensor,
    is_open: Tensor | None,
    rule: str,
    activation: str,
    threshold: float,
) -> None:
    C, N = encoder.shape[0], x.numel() // x.shape[-1]
    if decoder.shape != encoder.shape:
        raise ValueError(
            f"decoder must have the shape {tuple(encoder.shape)}, one row per row of encoder, got "
            f"{tuple(decoder.shape)}; columns of a decoder are rows here."
        )
    _check_dtype("decoder", decoder, encoder)
    if strength.ndim != 2 or strength.shape[1] != C or strength.shape[0] < 1 or N % strength.shape[0]:
        raise ValueError(
            f"strength must have the shape [S, {C}], one number per row of encoder, with S a divisor of the {N} rows "
            f"of x, got {tuple(strength.shape)}."
        )
    _check_dtype("strength", strength, encoder)
    if is_open is not None and (is_open.dtype != torch.bool or is_open.numel() != N * C):
        raise ValueError(
            f"is_open must be torch.bool with {N} x {C} entries, one per row of x and concept, got {is_open.dtype} "
            f"{tuple(is_open.shape)}."
        )
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}.")
    if threshold != threshold:
        raise ValueError("threshold must be a number, got nan.")
    if not x.device == decoder.device == strength.device or (is_open is not None and is_open.device != x.device):
        check_one_device(x=x, decoder=decoder, strength=strength, is_open=is_open)


@torch.library.custom_op(f"{NAMESPACE}::scar_steer", mutates_args=())
def _scar_steer(
    x: Tensor,
    encoder: Tensor,
    encoder_sum: Tensor,
    bias: Tensor,
    decoder: Tensor | None,
    strength: Tensor | None,
    is_open: Tensor | None,
    rule: str | None,
    activation: str,
    threshold: float,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steered rows `[N, d]`, empty without a rule; pre-activations `[N, C]`; mean, std and length of the rows."""
    from . import kernel

    tensors = _contiguous(x, encoder, encoder_sum, bias, decoder, strength, is_open)
    y, pre, statistics = _outputs(x, bias, rule)
    settings = kernel.Rule(rule, activation, threshold, eps, normalize)
    kernel.steer(*tensors, rule=settings, y=None if rule is None else y, pre=pre, statistics=statistics)
    return y, pre, statistics


@_scar_steer.register_fake
def _(
    x: Tensor,
    _encoder: Tensor,
    _encoder_sum: Tensor,
    bias: Tensor,
    _decoder: Tensor | None,
    _strength: Tensor | None,
    _is_open: Tensor | None,
    rule: str | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, bias, rule)


def _outputs(x: Tensor, bias: Tensor, rule: str | None) -> tuple[Tensor, Tensor, Tensor]:
    N, d = x.shape
    return x.new_empty(0 if rule is None else N, d), bias.new_empty(N, bias.shape[0]), bias.new_empty(N, 3)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if each is None else each.contiguous() for each in tensors]


@torch.library.custom_op(f"{NAMESPACE}::scar_steer_backward", mutates_args=())
def _scar_steer_backward(
    grad_y: Tensor | None,
    grad_pre: Tensor,
    x: Tensor,
    encoder: Tensor,
    encoder_sum: Tensor,
    bias: Tensor,
    decoder: Tensor | None,
    strength: Tensor | None,
    is_open: Tensor | None,
    pre: Tensor,
    statistics: Tensor,
    rule: str | None,
    activation: str,
    threshold: float,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and `[N, 4, C]` factors k and gradients of pre, strength and k (without a rule, of pre)."""
    from . import kernel

    tensors = _contiguous(x, encoder, encoder_sum, bias, decoder, strength, is_open)
    found = _contiguous(pre, statistics, grad_y, grad_pre)
    grad_x, slopes = _gradients(x, bias)
    settings = kernel.Rule(rule, activation, threshold, eps, normalize)
    kernel.steer_backward(*tensors, *found, rule=settings, grad_x=grad_x, slopes=slopes)
    return grad_x, slopes


@_scar_steer_backward.register_fake
def _(
    _grad_y: Tensor | None,
    _grad_pre: Tensor,
    x: Tensor,
    _encoder: Tensor,
    _encoder_sum: Tensor,
    bias: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return _gradients(x, bias)


def _gradients(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(x.shape[0], 4, bias.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.rule, ctx.activation, ctx.threshold, ctx.eps, ctx.normalize = inputs
    _, pre, statistics = output
    ctx.save_for_backward(*tensors, pre, statistics)
    ctx.mark_non_differentiable(statistics)


def _backward(ctx: Any, grad_y: Tensor, grad_pre: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, _encoder, _encoder_sum, _bias, decoder, strength, *_rest, statistics = ctx.saved_tensors
    settings = (ctx.rule, ctx.activation, ctx.threshold, ctx.eps, ctx.normalize)
    steers, needs = ctx.rule is not None, ctx.needs_input_grad
    grad_x, slopes = _scar_steer_backward(grad_y if steers else None, grad_pre, *ctx.saved_tensors, *settings)
    factor, of_pre, of_strength, direction = slopes.unbind(1)  # each [N, C]
    grads: list[Tensor | None] = [grad_x if needs[0] else None, None, None, None, None, None]
    if needs[1]:
        mean, std, _length = statistics.split(1, dim=1)
        grads[1] = (of_pre / (std + ctx.eps) if ctx.normalize else of_pre).T @ (x.float() - mean)
    if needs[3]:
        grads[3] = of_pre.sum(0)
    if steers and needs[4]:
        grads[4] = factor.T @ grad_y.float()
        if ctx.rule in ("add", "add_gated"):  # they divide by the length of the decoder row
            square = decoder.square().sum(1)
            share = (factor * direction).sum(0) / torch.where(square > 0, square, torch.inf)
            grads[4] -= share[:, None] * decoder
    if steers and needs[5]:
        S, C = strength.shape
        grads[5] = of_strength.reshape(S, x.shape[0] // S, C).sum(1)
    return *grads, None, None, None, None, None, None


_scar_steer.register_autograd(_backward, setup_context=_setup_context)
