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

_CHUNK_ELEMENTS = 1 << 19
"""Numbers of `x` worked on at a time, so that later passes find them in the cache. Changes speed, never the result."""

_TINY = 1e-30
"""Stands in for the square of a length of 0."""


class Settings(NamedTuple):
    """What is done to all rows alike."""

    rule: str
    activation: str
    threshold: float
    eps: float
    normalize: bool


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
    if _is_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return scar_scores_eager(x, encoder, encoder_sum, bias, eps=eps, normalize=normalize)
    rows, encoder = _flat(x), _prepare(x, encoder, encoder_sum, normalize)
    bias = _cast(bias, encoder.dtype)
    parts = [_score(part, encoder, bias, eps, normalize).pre for part in _chunks(rows, encoder, bias)]
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

    - `"scale"`: std a max(h_c, 0), which makes a positive latent (1 + a) h_c;
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
    if _is_autocast(x):
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
    rows, encoder = _flat(x), _prepare(x, encoder, encoder_sum, normalize)
    dtype, N, C = encoder.dtype, rows.shape[0], bias.shape[0]
    bias, decoder, strength = _cast(bias, dtype), _cast(decoder, dtype), _cast(strength, dtype)
    settings = Settings(rule, activation, threshold, eps, normalize)
    if rule in ("add", "add_gated"):
        length = torch.linalg.vector_norm(decoder, dim=1)
        strength = strength * (length / length.square().clamp(min=_TINY))  # 0 for a decoder row of zeros
    if 1 < strength.shape[0] < N:
        strength = strength.repeat_interleave(N // strength.shape[0], 0)
    if is_open is not None:
        is_open = is_open.reshape(N, C)
    parts = _chunks(rows, encoder, bias, decoder, strength)
    if len(parts) == 1:
        y, pre = _steer(rows, encoder, bias, decoder, strength, is_open, settings)
    else:
        y, pre, start = torch.empty_like(rows), rows.new_empty(N, C, dtype=dtype), 0
        for part in parts:
            own = slice(start, start + part.shape[0])
            a = strength[own] if strength.shape[0] > 1 else strength
            opened = None if is_open is None else is_open[own]
            _, pre[own] = _steer(part, encoder, bias, decoder, a, opened, settings, y[own])
            start = own.stop
    return (y, pre) if x.ndim == 2 else (y.view_as(x), pre.view(*x.shape[:-1], C))


def sum_dtype(x: Tensor, encoder: Tensor) -> torch.dtype:
    """float32, or float64 if an argument has it."""
    return torch.float64 if torch.float64 in (x.dtype, encoder.dtype) else torch.float32


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)  # asking for the type takes 4 microseconds


def _chunks(rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Consecutive rows; all of them at once under a compiler, which fuses the passes, and where gradients are due."""
    if torch.compiler.is_compiling() or rows.numel() <= _CHUNK_ELEMENTS:
        return (rows,)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (rows, *others)):
        return (rows,)
    return rows.split(max(1, _CHUNK_ELEMENTS // rows.shape[1]))


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _prepare(x: Tensor, encoder: Tensor, encoder_sum: Tensor, normalize: bool) -> Tensor:
    """The encoder in the dtype of the sums, each row less its mean.

    Then a constant added to x changes no score, so what rounding leaves of the mean of x does not either.
    """
    dtype = sum_dtype(x, encoder)
    if not normalize:
        return _cast(encoder, dtype)
    return torch.sub(_cast(encoder, dtype), _cast(encoder_sum, dtype).unsqueeze(1), alpha=1.0 / x.shape[-1])


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call that does nothing takes a microsecond


def _score(rows: Tensor, encoder: Tensor, bias: Tensor, eps: float, normalize: bool) -> Scores:
    x = _cast(rows, encoder.dtype)
    if not normalize:
        return Scores(x, F.linear(x, encoder, bias), None, None)
    d = x.shape[1]
    total = x.detach().sum(1, keepdim=True)  # any number near the mean would do: its gradient is that of `encoder`
    centered = torch.sub(x, total, alpha=1.0 / d)
    spread = torch.linalg.vector_norm(centered, dim=1, keepdim=True)  # has a gradient at 0, unlike std
    root = max(1, d - 1) ** 0.5
    pre = torch.addcdiv(bias, F.linear(centered, encoder), spread + eps * root, value=root)
    return Scores(x, pre, total, spread)


def _steer(
    rows: Tensor,
    encoder: Tensor,
    bias: Tensor,
    decoder: Tensor,
    strength: Tensor,
    is_open: Tensor | None,
    settings: Settings,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Steered rows, in `out` if there is one, and their pre-activations."""
    scores = _score(rows, encoder, bias, settings.eps, settings.normalize)
    factors, unit = _factors(scores, strength, is_open, settings)
    in_place = out if rows.dtype == decoder.dtype else None
    if factors.shape[1] == 1:
        y = torch.addcmul(scores.x, factors, decoder, value=unit, out=in_place)
    else:
        y = torch.addmm(scores.x, factors, decoder, alpha=unit, out=in_place)
    if out is not None and in_place is None:
        return out.copy_(y), scores.pre
    return _cast(y, rows.dtype), scores.pre


def _factors(scores: Scores, a: Tensor, is_open: Tensor | None, settings: Settings) -> tuple[Tensor, float]:
    """How much of each decoder row is added, `[N, C]`, and the unit of these factors.

    For the rules that add, the strengths `a` are per length of the decoder row.
    """
    rule, activation, threshold, _, _ = settings
    if rule == "add":
        return a * _length(scores), 1.0
    if rule == "add_gated":
        s, rises = _latents(scores.pre, "sigmoid", threshold, is_open), a.relu()
        # a s, or a - a s where a > 0; with a slope of s at 0
        return torch.addcmul(rises, s, torch.sub(a, rises, alpha=2.0)) * _length(scores), 1.0
    h = _latents(scores.pre, activation, threshold, is_open)
    if rule == "scale" and activation == "tanh":
        h = h.relu()  # a negative latent is not a concept that is on
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
