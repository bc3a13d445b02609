"""`scar_scores` and `scar_steer` in PyTorch: few passes over the rows, a chunk that fits the cache at a time.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Literal["scale", "set", "add", "add_gated"]
Activation = Literal["relu", "sigmoid", "tanh"]

RULES = ("scale", "set", "add", "add_gated")
ACTIVATIONS = ("relu", "sigmoid", "tanh")

_CHUNK_ELEMENTS = 1 << 17
"""Numbers of `x` worked on at a time, so that later passes find them in the cache. Changes speed, never the result."""

_TINY = 1e-30
"""Stands in for the square of a length of 0."""


class Scoring(NamedTuple):
    """How rows become pre-activations; tensors in the dtype of the sums."""

    encoder: Tensor  # [C, d]; with normalization, each row less its mean
    bias: Tensor  # [C]
    eps: float
    normalize: bool


class Steering(NamedTuple):
    """How pre-activations become factors of the decoder's rows."""

    decoder: Tensor  # [C, d], in the dtype of the sums
    rule: str
    activation: str
    threshold: float


class Scores(NamedTuple):
    """Rows in the dtype of the sums, and what was found in them; without normalization there are no statistics."""

    x: Tensor  # [N, d]
    pre: Tensor  # [N, C]
    total: Tensor | None  # [N, 1], d times the mean
    spread: Tensor | None  # [N, 1], length of the centered row: sqrt(d - 1) times the std


def scar_scores_eager(
    x: Tensor, encoder: Tensor, encoder_sum: Tensor, bias: Tensor, *, eps: float = 1e-5, normalize: bool = True
) -> Tensor:
    """Pre-activations of a few latents: E (x - mean) / (std + eps) + bias, with the unbiased std of each row.

    Args:
        x: `[..., d]`, floating point.
        encoder: `[C, d]`, rows of the encoder.
        encoder_sum: `[C]`, their sums.
        bias: `[C]`, with what the coder subtracts from its input folded in.
        eps: added to the std.
        normalize: False takes the mean as 0 and the std as 1, without eps.

    Returns:
        `[..., C]`, float32, or float64 for float64 arguments.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return scar_scores_eager(x, encoder, encoder_sum, bias, eps=eps, normalize=normalize)
    rows = _flat(x)
    scoring = _prepare(rows, encoder, encoder_sum, bias, eps, normalize)
    parts = [_score(part, scoring).pre for part in _chunks(rows, encoder, bias)]
    pre = parts[0] if len(parts) == 1 else torch.cat(parts)
    return pre if x.ndim == 2 else pre.view(*x.shape[:-1], pre.shape[1])


def scar_steer_eager(
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
) -> tuple[Tensor, Tensor]:
    """Move every row along the decoder rows of a few latents: y = x + sum_c k_c D_c.

    A latent h_c is the activation of its pre-activation where it is open, else 0. With strength a, `rule` says k_c:

    - `"scale"`: std a h_c, which makes the latent (1 + a) h_c;
    - `"set"`: std (a - h_c), which makes it a;
    - `"add"`: a |x| / |D_c|;
    - `"add_gated"`: the same times g for a <= 0, else times 1 - g; g = sigmoid(pre) where open, else 0.

    Args:
        x: `[..., d]`, floating point; N rows.
        encoder: `[C, d]`; this, `encoder_sum`, `bias`, `eps` and `normalize` are those of `scar_scores_eager`.
        decoder: `[C, d]`, columns of the decoder. A row of zeros has no direction and changes nothing.
        strength: `[S, C]`; S divides N, and row i takes strength[i // (N // S)].
        activation: `"relu"`, `"sigmoid"` or `"tanh"`.
        threshold: a latent is open where its pre-activation is larger; -inf opens all.
        is_open: bool, N * C entries; which latents are open, instead of `threshold`.

    Returns:
        y, of the shape and dtype of `x`, and the pre-activations `[..., C]`, float32 (float64 for float64 arguments).
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
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
    rows, dtype = _flat(x), sum_dtype(x, encoder)
    N, C = rows.shape[0], bias.shape[0]
    scoring = _prepare(rows, encoder, encoder_sum, bias, eps, normalize)
    steering = Steering(_cast(decoder, dtype), rule, activation, threshold)
    strength = _cast(strength, dtype)
    if rule in ("add", "add_gated"):
        length = torch.linalg.vector_norm(steering.decoder, dim=1)
        strength = strength * (length / length.square().clamp(min=_TINY))  # 0 for a decoder row of zeros
    if 1 < strength.shape[0] < N:
        strength = strength.repeat_interleave(N // strength.shape[0], 0)
    if is_open is not None:
        is_open = is_open.reshape(N, C)
    parts = _chunks(rows, encoder, bias, decoder, strength)
    if len(parts) == 1:
        y, pre = _steer(rows, strength, is_open, scoring, steering)
    else:
        y, pre = torch.empty_like(rows), rows.new_empty(N, C, dtype=dtype)
        start = 0
        for part in parts:
            own = slice(start, start + part.shape[0])
            a = strength[own] if strength.shape[0] > 1 else strength
            y[own], pre[own] = _steer(part, a, None if is_open is None else is_open[own], scoring, steering)
            start = own.stop
    return (y, pre) if x.ndim == 2 else (y.view_as(x), pre.view(*x.shape[:-1], C))


def sum_dtype(x: Tensor, encoder: Tensor) -> torch.dtype:
    """float32, or float64 if an argument has it."""
    return torch.float64 if torch.float64 in (x.dtype, encoder.dtype) else torch.float32


def _chunks(rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Consecutive rows; all of them at once under a compiler, which fuses the passes, and where gradients are due."""
    if rows.numel() <= _CHUNK_ELEMENTS or torch.compiler.is_compiling():
        return (rows,)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (rows, *others)):
        return (rows,)
    return rows.split(max(1, _CHUNK_ELEMENTS // rows.shape[1]))


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _prepare(rows: Tensor, encoder: Tensor, encoder_sum: Tensor, bias: Tensor, eps: float, normalize: bool) -> Scoring:
    dtype = sum_dtype(rows, encoder)
    encoder, bias = _cast(encoder, dtype), _cast(bias, dtype)
    if normalize:  # then a constant in x adds nothing to the scores, so what rounding left of the mean does not either
        encoder = torch.sub(encoder, _cast(encoder_sum, dtype).unsqueeze(1), alpha=1.0 / rows.shape[1])
    return Scoring(encoder, bias, eps, normalize)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call that does nothing takes a microsecond


def _score(rows: Tensor, scoring: Scoring) -> Scores:
    encoder, bias, eps, normalize = scoring
    x, d = _cast(rows, encoder.dtype), rows.shape[1]
    if not normalize:
        return Scores(x, F.linear(x, encoder, bias), None, None)
    total = x.detach().sum(1, keepdim=True)  # any number near the mean would do: its gradient is that of `encoder`
    centered = torch.sub(x, total, alpha=1.0 / d)
    spread = torch.linalg.vector_norm(centered, dim=1, keepdim=True)  # has a gradient at 0, unlike std
    root = max(1, d - 1) ** 0.5
    pre = torch.addcdiv(bias, F.linear(centered, encoder), spread + eps * root, value=root)
    return Scores(x, pre, total, spread)


def _steer(
    rows: Tensor, strength: Tensor, is_open: Tensor | None, scoring: Scoring, steering: Steering
) -> tuple[Tensor, Tensor]:
    """Steered rows and their pre-activations."""
    scores = _score(rows, scoring)
    factors, unit = _factors(scores, strength, is_open, steering)
    if factors.shape[1] == 1:
        y = torch.addcmul(scores.x, factors, steering.decoder, value=unit)
    else:
        y = torch.addmm(scores.x, factors, steering.decoder, alpha=unit)
    return _cast(y, rows.dtype), scores.pre


def _factors(scores: Scores, a: Tensor, is_open: Tensor | None, steering: Steering) -> tuple[Tensor, float]:
    """How much of each decoder row is added, `[N, C]`, and the unit of these factors.

    For the rules that add, the strengths `a` are per length of the decoder row.
    """
    _, rule, activation, threshold = steering
    if rule == "add":
        return a * _length(scores), 1.0
    if rule == "add_gated":
        s, rises = _latents(scores.pre, "sigmoid", threshold, is_open), a.relu()
        # a s, or a - a s where a > 0; with a slope of s at 0
        return torch.addcmul(rises, s, torch.sub(a, rises, alpha=2.0)) * _length(scores), 1.0
    h = _latents(scores.pre, activation, threshold, is_open)
    k = a * h if rule == "scale" else a - h
    if scores.spread is None:
        return k, 1.0
    return k * scores.spread, max(1, scores.x.shape[1] - 1) ** -0.5


def _length(scores: Scores) -> Tensor:
    """|x| `[N, 1]`, from the statistics where no gradient is due: that of hypot at 0 is NaN."""
    x, total, spread = scores.x, scores.total, scores.spread
    if total is None or spread is None or (torch.is_grad_enabled() and x.requires_grad):
        return torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.hypot(spread, total * x.shape[1] ** -0.5)


def _latents(pre: Tensor, activation: str, threshold: float, is_open: Tensor | None) -> Tensor:
    """Activations where open, else 0. A NaN stays one: factors of 0 do not hide it."""
    h = pre.relu() if activation == "relu" else pre.sigmoid() if activation == "sigmoid" else pre.tanh()
    if is_open is not None:
        return torch.where(is_open, h, 0.0)
    if threshold == 0.0:
        return h if activation == "relu" else h * pre.detach().relu().sign()  # cheaper than a comparison
    never_closes = threshold < 0.0 if activation == "relu" else threshold == float("-inf")
    return h if never_closes else h * (pre > threshold)
