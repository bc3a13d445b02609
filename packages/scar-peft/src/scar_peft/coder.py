"""The sparse coder as functions of plain tensors: standardize a row, encode it, keep the top k, decode it.

    z   = (x - mean(x)) / (sd(x) + eps)          sd is the unbiased standard deviation over the hidden axis
    pre = E (z - b_pre) + b_lat                  pre-activations
    h   = act(pre) where kept, else 0            latents; kept are the k largest pre-activations
    y   = (D h + b_pre) * sd(x) + mean(x)        reconstruction, scaled back without eps

Every function takes any leading axes, computes in float32 (in float64 if any argument is float64), also inside
autocast, and is differentiable. These are the definitions; fast paths are held against them.

Sources: arXiv 2411.07122 (the supervised coder, `topk`), arXiv 2506.19382 (several concepts, `topk-sigmoid`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .remote.rows_scar import FoldedConcepts
from .remote.settings_scar import ELEMENTWISE

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, function) for name, function in ELEMENTWISE.items()
}


class CoderWeights(NamedTuple):
    """The four tensors of a coder with n latents over hidden size d; concept c is latent c."""

    encoder: Tensor
    """E, [n, d]."""
    decoder: Tensor
    """D, [d, n]; the columns have any length."""
    pre_bias: Tensor
    """b_pre, [d]: subtracted before the encoder and added after the decoder."""
    latent_bias: Tensor
    """b_lat, [n]."""


class Standardized(NamedTuple):
    """A row in units of its own mean and spread, and what is needed to undo that."""

    values: Tensor
    """z, [..., d]."""
    mean: Tensor
    """[..., 1]."""
    std: Tensor
    """[..., 1], unbiased, without eps."""


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype to compute in: float64 if any tensor is, else float32.

    Example:
        >>> working_dtype(torch.zeros(2, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


def standardize(x: Tensor, *, eps: float = 1e-5, normalize: bool = True) -> Standardized:
    """Express every row in units of its own mean and standard deviation: z = (x - mean) / (sd + eps).

    A constant row has sd = 0 and z = 0. NaN and infinity spread over their row.

    Args:
        x: [..., d], floating point, d >= 2.
        eps: added to sd here, and nowhere else.
        normalize: False gives z = x, mean 0 and sd 1.

    Returns:
        Float32, or float64 if x is: values [..., d], mean [..., 1], std [..., 1].

    Raises:
        ValueError: x is not floating point, or has fewer than two features.

    Example:
        >>> standardize(torch.tensor([1.0, 2.0, 3.0, 4.0])).std
        tensor([1.2910])

    Source: arXiv 2411.07122, and the code that goes with it for the unbiased sd.
    """
    _check_eps(eps)
    centered, mean, std = _center(x, normalize)
    return Standardized(centered / (std + eps) if normalize else centered, mean, std)


def pre_activations(x: Tensor, weights: CoderWeights, *, eps: float = 1e-5, normalize: bool = True) -> Tensor:
    """Compute what every latent sees: pre = E (z - b_pre) + b_lat.

    Args:
        x: [..., d], floating point.
        weights: of hidden size d.
        eps: as for `standardize`.
        normalize: as for `standardize`.

    Returns:
        [..., n], float32 or float64.

    Raises:
        ValueError: shapes do not fit; the message names the argument.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.eye(2), torch.tensor([0.5, 0.0]), torch.tensor([0.0, 1.0]))
        >>> pre_activations(torch.tensor([1.0, 2.0]), weights, normalize=False)
        tensor([0.5000, 3.0000])
    """
    check_weights(weights, x)
    dtype = working_dtype(x, *weights)
    encoder, _, pre_bias, latent_bias = (each.to(dtype) for each in weights)
    return linear(standardize(x.to(dtype), eps=eps, normalize=normalize).values - pre_bias, encoder, latent_bias)


def kept_latents(pre: Tensor, k: int, *, always: int = 0) -> Tensor:
    """Mark the k largest pre-activations of every row; of equal ones, those of lowest index.

    The values may be negative: selection comes before the activation. NaN counts as largest, so that it is never lost.

    Args:
        pre: [..., n].
        k: how many to keep, in [1, n]; all, if fewer than k remain beside `always`.
        always: so many first latents are kept in any case and do not count; k are kept among the others.

    Returns:
        Bool [..., n].

    Raises:
        ValueError: k or always is out of range.

    Example:
        >>> kept_latents(torch.tensor([0.0, 3.0, -1.0, 3.0]), 1)
        tensor([False,  True, False, False])
    """
    n = pre.shape[-1]
    _check_selection(n, k, always)
    # Stable: among equal values the lowest index comes first, which topk does not promise.
    order = pre[..., always:].detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    kept = torch.zeros_like(pre, dtype=torch.bool)
    kept[..., :always] = True
    kept[..., always:].scatter_(-1, order, True)
    return kept


def activate(pre: Tensor, activation: str) -> Tensor:
    """Apply a coder's element-wise function, without its selection.

    Args:
        pre: any shape.
        activation: "topk" and "relu" are max(0, pre), "topk-sigmoid" is 1 / (1 + exp(-pre)), "topk-tanh" is tanh.

    Raises:
        ValueError: the activation is unknown.

    Example:
        >>> activate(torch.tensor([-1.0, 2.0]), "topk")
        tensor([0., 2.])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}.")
    return ACTIVATIONS[activation](pre)


def latents_of(pre: Tensor, *, k: int | None, activation: str = "topk", always: int = 0) -> Tensor:
    """Turn pre-activations into latents: h = act(pre) where kept, else 0.

    Fewer than k latents of "topk" may be positive; a kept negative pre-activation of "topk-sigmoid" is a latent in
    (0, 0.5). The activation "relu" keeps all and ignores k.

    Args:
        pre: [..., n].
        k: how many to keep; see `kept_latents`. May be None for "relu".
        activation: see `activate`.
        always: see `kept_latents`.

    Returns:
        [..., n], dtype of `pre`.

    Raises:
        ValueError: k, always or the activation is out of range.

    Example:
        >>> latents_of(torch.tensor([0.5, 3.0, -1.0]), k=1)
        tensor([0., 3., 0.])
    """
    latents = activate(pre, activation)
    if activation == "relu":
        return latents
    if k is None:
        raise ValueError(f"k must be given for the activation {activation!r}, got None.")
    return torch.where(kept_latents(pre, k, always=always), latents, torch.zeros_like(latents))


def encode(
    x: Tensor,
    weights: CoderWeights,
    *,
    k: int | None,
    activation: str = "topk",
    always: int = 0,
    eps: float = 1e-5,
    normalize: bool = True,
) -> Tensor:
    """Compute the latents of rows: `latents_of(pre_activations(x))`.

    Args:
        x: [..., d], floating point.
        weights: of hidden size d.
        k: see `kept_latents`.
        activation: see `activate`.
        always: see `kept_latents`.
        eps: see `standardize`.
        normalize: see `standardize`.

    Returns:
        h, [..., n], float32 or float64.

    Raises:
        ValueError: shapes do not fit, or a setting is out of range.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
        >>> encode(torch.tensor([1.0, 2.0]), weights, k=1, normalize=False)
        tensor([0., 2.])
    """
    pre = pre_activations(x, weights, eps=eps, normalize=normalize)
    return latents_of(pre, k=k, activation=activation, always=always)


def decode(latents: Tensor, weights: CoderWeights, *, mean: Tensor, std: Tensor) -> Tensor:
    """Turn latents back into rows: (D h + b_pre) * sd + mean.

    Args:
        latents: h, [..., n].
        weights: of n latents.
        mean: [..., 1], from `standardize`.
        std: [..., 1], from `standardize`; eps is not added.

    Returns:
        [..., d], float32 or float64.

    Raises:
        ValueError: latents do not fit the weights.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.eye(2), torch.ones(2), torch.zeros(2))
        >>> decode(torch.tensor([1.0, 0.0]), weights, mean=torch.tensor([5.0]), std=torch.tensor([2.0]))
        tensor([9., 7.])
    """
    check_weights(weights)
    if latents.shape[-1:] != weights.decoder.shape[1:]:
        raise ValueError(
            f"latents must have {weights.decoder.shape[1]} entries per row, as decoder has columns, "
            f"got shape {list(latents.shape)}."
        )
    dtype = working_dtype(latents, mean, std, *weights)
    rows = linear(latents.to(dtype), weights.decoder.to(dtype), weights.pre_bias.to(dtype))
    return rows * std.to(dtype) + mean.to(dtype)


def reconstruct(
    x: Tensor,
    weights: CoderWeights,
    *,
    k: int | None,
    activation: str = "topk",
    always: int = 0,
    eps: float = 1e-5,
    normalize: bool = True,
) -> Tensor:
    """Pass rows through the coder: encode, then decode.

    Arguments and errors are those of `encode`.

    Returns:
        [..., d], float32 or float64.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
        >>> reconstruct(torch.tensor([1.0, 2.0]), weights, k=1, normalize=False)
        tensor([0., 2.])
    """
    latents = encode(x, weights, k=k, activation=activation, always=always, eps=eps, normalize=normalize)
    _, mean, std = standardize(x, eps=eps, normalize=normalize)
    return decode(latents, weights, mean=mean, std=std)


def fold_concepts(weights: CoderWeights, concepts: int | Sequence[int]) -> FoldedConcepts:
    """Extract the few rows that scoring and steering concepts needs, with the pre-bias folded into their bias.

    pre_c = E_c . (x - mean) / (sd + eps) + (b_lat_c - E_c . b_pre). Fold once per change of the weights.

    Args:
        weights: a coder.
        concepts: the number of concepts C (then they are the first C latents), or the indices of their latents.

    Returns:
        Float32 or float64 tensors; the sums are formed in float64.

    Raises:
        ValueError: a concept is not a latent of the coder, or comes twice.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.eye(2), torch.tensor([0.5, 0.0]), torch.zeros(2))
        >>> fold_concepts(weights, 1).bias
        tensor([-0.5000])
    """
    check_weights(weights)
    rows = concept_indices(concepts, weights.encoder.shape[0])
    dtype = working_dtype(*weights)
    encoder = weights.encoder[rows].double()
    bias = weights.latent_bias[rows].double() - encoder @ weights.pre_bias.double()
    decoder = weights.decoder[:, rows].T.to(dtype)
    return FoldedConcepts(encoder.to(dtype), encoder.sum(1).to(dtype), bias.to(dtype), decoder)


def concept_pre_activations(x: Tensor, folded: FoldedConcepts, *, eps: float = 1e-5, normalize: bool = True) -> Tensor:
    """Compute the pre-activations of concepts alone, equal to those of the whole coder.

    Rows are centered before the product: E . x - mean sum(E) would cancel badly where the mean is large.

    Args:
        x: [..., d], floating point.
        folded: C concepts of hidden size d.
        eps: see `standardize`.
        normalize: see `standardize`.

    Returns:
        [..., C], float32 or float64.

    Raises:
        ValueError: x does not have d features.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.eye(2), torch.tensor([0.5, 0.0]), torch.zeros(2))
        >>> concept_pre_activations(torch.tensor([1.0, 2.0]), fold_concepts(weights, 1), normalize=False)
        tensor([0.5000])
    """
    _check_floating(x)
    _check_eps(eps)
    d = folded.encoder.shape[1]
    if x.shape[-1:] != (d,):
        raise ValueError(f"x must have {d} features, as the concepts have, got shape {list(x.shape)}.")
    dtype = working_dtype(x, *folded)
    centered, _, std = _center(x.to(dtype), normalize)
    scale = std + eps if normalize else std
    return linear(centered, folded.encoder.to(dtype)) / scale + folded.bias.to(dtype)


def concept_indices(concepts: int | Sequence[int], n: int) -> list[int]:
    """List the latents of concepts, given their number (the first ones) or their indices.

    Raises:
        ValueError: there is none, one is outside [0, n), or one comes twice.

    Example:
        >>> concept_indices(2, 10)
        [0, 1]
    """
    indices = list(range(concepts)) if isinstance(concepts, int) else [int(each) for each in concepts]
    if not indices or min(indices) < 0 or max(indices) >= n or len(set(indices)) < len(indices):
        raise ValueError(
            f"concepts must be a number in [1, {n}] (the number of latents), or different indices in [0, {n}), "
            f"got {concepts!r}."
        )
    return indices


def check_weights(weights: CoderWeights, x: Tensor | None = None) -> None:
    """Raise a ValueError that names the tensor if the four do not fit each other, or x does not fit them."""
    encoder, decoder, pre_bias, latent_bias = weights
    if encoder.dim() != 2:
        raise ValueError(f"encoder must have shape [latents, hidden], got {list(encoder.shape)}.")
    n, d = encoder.shape
    expected = {"decoder": [d, n], "pre_bias": [d], "latent_bias": [n]}
    for (name, shape), tensor in zip(expected.items(), (decoder, pre_bias, latent_bias), strict=True):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} to fit an encoder of {n} latents and hidden size {d}, "
                f"got {list(tensor.shape)}."
            )
    if x is None:
        return
    _check_floating(x)
    if x.shape[-1:] != (d,):
        raise ValueError(f"x must have {d} features, as encoder has columns, got shape {list(x.shape)}.")


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x matrix^T + bias in the dtype of x, also inside autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, matrix, bias)


def _center(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Centered rows, mean and unbiased standard deviation; x, 0 and 1 without normalization."""
    _check_floating(x)
    if x.dim() == 0 or (normalize and x.shape[-1] < 2):
        raise ValueError(f"x must have at least two features to have a spread, got shape {list(x.shape)}.")
    x = x.to(working_dtype(x))
    if not normalize:
        return x, x.new_zeros(*x.shape[:-1], 1), x.new_ones(*x.shape[:-1], 1)
    mean = x.mean(-1, keepdim=True)
    centered = x - mean
    # The norm has the gradient 0 at a constant row, where the square root of a sum of squares has NaN.
    std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5
    return centered, mean, std


def _check_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}.")


def _check_selection(n: int, k: int, always: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, {n}] (the number of latents), got {k}.")
    if not 0 <= always <= n:
        raise ValueError(f"always must lie in [0, {n}] (the number of latents), got {always}.")


def _check_eps(eps: float) -> None:
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be at least 0 and finite, got {eps}.")
