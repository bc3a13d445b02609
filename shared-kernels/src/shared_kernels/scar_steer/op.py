"""`scar_scores` and `scar_steer`: check the arguments, pick an implementation, define the gradient."""

import torch
from torch import Tensor

from .._checks import check_one_device
from .._dispatch import Implementation, choose
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
        eps: added to the std, at least 0.
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
    raise NotImplementedError


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

    - `"scale"`: std a h, which makes the latent (1 + a) h. What is off stays off.
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
    raise NotImplementedError


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
    _check_per_concept("encoder_sum", encoder_sum, encoder)
    _check_per_concept("bias", bias, encoder)
    if not x.device == encoder.device == encoder_sum.device == bias.device:
        check_one_device(x=x, encoder=encoder, encoder_sum=encoder_sum, bias=bias)
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps}.")


def _check_per_concept(name: str, tensor: Tensor, encoder: Tensor) -> None:
    if tensor.shape != encoder.shape[:1]:
        raise ValueError(
            f"{name} must have the shape {tuple(encoder.shape[:1])}, one number per row of encoder, "
            f"got {tuple(tensor.shape)}."
        )
    _check_dtype(name, tensor, encoder)


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
    C, N = encoder.shape[0], x.shape[:-1].numel()
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
