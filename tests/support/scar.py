"""SCAR by the book: one token at a time, float64 numpy, gradients by hand; shares no code with the package."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EPS = 1e-5


class Weights(NamedTuple):
    """The tensors of a coder as arrays."""

    encoder: np.ndarray  # [n, d]
    decoder: np.ndarray  # [d, n]
    pre_bias: np.ndarray  # [d]
    latent_bias: np.ndarray  # [n]


class Token(NamedTuple):
    """Everything the coder computes for one token."""

    z: np.ndarray  # [d]
    mean: float
    std: float
    pre: np.ndarray  # [n]
    kept: list[int]
    latents: np.ndarray  # [n]
    reconstruction: np.ndarray  # [d]


class Losses(NamedTuple):
    """Means over tokens."""

    loss: float
    reconstruction: float
    concept: float
    l1: float


def random_weights(d: int, n: int, seed: int = 0) -> Weights:
    """Weights of ordinary size, with biases that matter."""
    rng = np.random.default_rng(seed)
    encoder = rng.normal(size=(n, d)) / math.sqrt(d)
    return Weights(encoder, rng.normal(size=(d, n)) / 2, 0.2 * rng.normal(size=d), 0.3 * rng.normal(size=n))


def code_token(
    x: np.ndarray, w: Weights, k: int, activation: str = "topk", always: int = 0, normalize: bool = True
) -> Token:
    """Run one token through the coder."""
    z, mean, std = _standardize(x, normalize)
    pre = np.array(
        [math.fsum(row * (z - w.pre_bias)) + bias for row, bias in zip(w.encoder, w.latent_bias, strict=True)]
    )
    others = sorted(range(always, len(pre)), key=lambda j: (-pre[j], j))
    kept = [*range(always), *others[:k]]
    latents = np.zeros(len(pre))
    for j in kept:
        latents[j] = _act(pre[j], activation)
    return Token(z, mean, std, pre, kept, latents, _decode(latents, w, mean, std))


def losses(
    xs: np.ndarray,
    labels: np.ndarray,
    w: Weights,
    k: int,
    activation: str = "topk",
    always: int = 0,
    concept_weight: float = 1.0,
    pos_weight: float = 1.0,
) -> tuple[Losses, Weights]:
    """The training loss of tokens [N, d] with labels [N, C] (-1: unknown), and its gradient of every weight."""
    grads = Weights(*(np.zeros_like(each) for each in w))
    nmse, bce, l1 = [], [], []
    for x, y in zip(xs, labels, strict=True):
        token = code_token(x, w, k, activation, always)
        residual = token.reconstruction - x
        power = math.fsum(x * x)
        nmse.append(math.fsum(residual * residual) / power)
        bce.append(sum(_bce(token.pre[c], label, pos_weight) for c, label in enumerate(y)))
        l1.append(math.fsum(abs(token.latents)) / math.sqrt(power))
        _add_gradients(grads, token, 2 * residual / power, y, w, activation, concept_weight, pos_weight)
    N = len(xs)
    parts = (sum(nmse) / N, sum(bce) / N)
    means = Losses(parts[0] + concept_weight * parts[1], *parts, sum(l1) / N)
    return means, Weights(*(each / N for each in grads))


def original_hook(
    x: np.ndarray, w: Weights, k: int, feature: int, scaling: float, activation: str = "topk", always: int = 0
) -> np.ndarray:
    """The published module: a token becomes its reconstruction, with one latent scaled where it is positive."""
    token = code_token(x, w, k, activation, always)
    latents = token.latents.copy()
    if latents[feature] > 0:
        latents[feature] *= scaling
    return _decode(latents, w, token.mean, token.std)


def replacement_hook(
    x: np.ndarray, w: Weights, k: int, feature: int, value: float, activation: str = "topk"
) -> np.ndarray:
    """The published module with one latent set to a value on every token."""
    token = code_token(x, w, k, activation)
    latents = token.latents.copy()
    latents[feature] = value
    return _decode(latents, w, token.mean, token.std)


def added_direction(x: np.ndarray, w: Weights, alpha: float, feature: int, share: float = 1.0) -> np.ndarray:
    """The follow-up: alpha times `share` times the token's norm along the feature's decoder column."""
    column = w.decoder[:, feature]
    return x + alpha * share * math.sqrt(math.fsum(x * x)) / math.sqrt(math.fsum(column * column)) * column


def steer_token(
    x: np.ndarray, w: Weights, strengths: Sequence[float], rule: str, activation: str, is_open: Sequence[bool]
) -> np.ndarray:
    """Residual steering of concepts 0, 1, ... at given gates: the token plus one term per concept."""
    z, _, std = _standardize(x, True)
    out = x.copy()
    for c, a in enumerate(strengths):
        pre = math.fsum(w.encoder[c] * (z - w.pre_bias)) + w.latent_bias[c]
        h = _act(pre, activation) if is_open[c] else 0.0
        g = _act(pre, "topk-sigmoid") if is_open[c] else 0.0
        if rule == "scale":
            new = (1 + a) * h if h > 0 else h
            out = out + std * (new - h) * w.decoder[:, c]
        elif rule == "set":
            out = out + std * (a - h) * w.decoder[:, c]
        else:
            share = 1.0 if rule == "add" else (g if a <= 0 else 1 - g)
            out = out + (added_direction(x, w, a, c, share) - x)
    return out


def _standardize(x: np.ndarray, normalize: bool) -> tuple[np.ndarray, float, float]:
    if not normalize:
        return x, 0.0, 1.0
    mean = math.fsum(x) / len(x)
    std = math.sqrt(math.fsum((x - mean) ** 2) / (len(x) - 1))
    return (x - mean) / (std + EPS), mean, std


def _decode(latents: np.ndarray, w: Weights, mean: float, std: float) -> np.ndarray:
    return (w.decoder @ latents + w.pre_bias) * std + mean


def _act(value: float, activation: str) -> float:
    if activation == "topk-sigmoid":
        return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
    return math.tanh(value) if activation == "topk-tanh" else max(value, 0.0)


def _slope(value: float, activation: str) -> float:
    h = _act(value, activation)
    if activation == "topk-sigmoid":
        return h * (1 - h)
    return 1 - h * h if activation == "topk-tanh" else float(value > 0)


def _bce(pre: float, label: float, pos_weight: float) -> float:
    if label < 0:
        return 0.0
    return pos_weight * label * _softplus(-pre) + (1 - label) * _softplus(pre)


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _add_gradients(
    grads: Weights,
    token: Token,
    slope_of_reconstruction: np.ndarray,
    labels: np.ndarray,
    w: Weights,
    activation: str,
    concept_weight: float,
    pos_weight: float,
) -> None:
    scaled = slope_of_reconstruction * token.std  # of D h + b_pre
    of_pre = np.zeros(len(token.pre))
    for j in token.kept:
        of_pre[j] = scaled @ w.decoder[:, j] * _slope(token.pre[j], activation)
    for c, y in enumerate(labels):
        if y >= 0:
            p = _act(token.pre[c], "topk-sigmoid")
            of_pre[c] += concept_weight * (pos_weight * y * (p - 1) + (1 - y) * p)
    grads.encoder[:] += np.outer(of_pre, token.z - w.pre_bias)
    grads.decoder[:] += np.outer(scaled, token.latents)
    grads.pre_bias[:] += scaled - w.encoder.T @ of_pre
    grads.latent_bias[:] += of_pre
