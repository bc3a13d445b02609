"""What a supervised coder is trained for: to reconstruct rows, and to have concept c speak through latent c.

    loss = mean over rows of [ nmse(y, x) + concept_weight * sum_c BCE(sigmoid(pre_c), label_c) ]

The cross-entropy is on the pre-activation, before selection, and formed from logits: the value is that of
sigmoid-then-cross-entropy, and its gradient does not vanish where a float32 sigmoid is exactly 0 or 1.

Sources: arXiv 2411.07122 (one concept), arXiv 2506.19382 (several).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .coder import CoderWeights, check_weights, decode, latents_of, pre_activations, standardize, working_dtype


class ScarLoss(NamedTuple):
    """The training loss and its parts, each a scalar: a mean over rows, 0 without rows."""

    loss: Tensor
    """reconstruction + concept_weight * concept; the one to differentiate."""
    reconstruction: Tensor
    """Normalized mean squared error."""
    concept: Tensor
    """Binary cross-entropy, summed over concepts, in nats."""
    l1: Tensor
    """sum |h| / ||x||, to watch sparsity; detached."""


def reconstruction_loss(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Normalized mean squared error of every row, in the units of x: mean((y - x)^2) / mean(x^2).

    1 is the error of predicting 0. It is defined as 0 for a row of zeros; NaN stays NaN.

    Args:
        reconstruction: y, [..., d].
        x: [..., d].

    Returns:
        [...], float32 or float64.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> reconstruction_loss(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor(0.2000)

    Source: arXiv 2411.07122.
    """
    if reconstruction.shape != x.shape:
        raise ValueError(f"reconstruction must have the shape of x {list(x.shape)}, got {list(reconstruction.shape)}.")
    dtype = working_dtype(reconstruction, x)
    reconstruction, x = reconstruction.to(dtype), x.to(dtype)
    error, power = (reconstruction - x).square().mean(-1), x.square().mean(-1)
    is_zero = power == 0
    return error / torch.where(is_zero, 1.0, power) * ~is_zero  # the product, unlike a selection, keeps a NaN


def concept_loss(
    pre: Tensor,
    labels: Tensor,
    *,
    pos_weight: float | Tensor = 1.0,
    ignore_index: int = -1,
    unlabelled_as_negative: bool = False,
    soft_labels: bool = False,
) -> Tensor:
    """Binary cross-entropy of every row, from logits, summed over concepts.

    sum_c [ pos_weight_c label_c softplus(-pre_c) + (1 - label_c) softplus(pre_c) ]

    Args:
        pre: pre-activations, [..., n] with n >= C; the first C are used.
        labels: [..., C], 0 or 1, bool or number; `ignore_index` where nothing is known.
        pos_weight: of positive labels, a number or [C]; changes this loss and no other.
        ignore_index: a label that adds nothing.
        unlabelled_as_negative: read `ignore_index` as 0 instead, as the original training did.
        soft_labels: also take labels between 0 and 1.

    Returns:
        [...], float32 or float64, in nats.

    Raises:
        ValueError: shapes do not fit, or a label is neither 0, 1 nor `ignore_index`.

    Example:
        >>> concept_loss(torch.tensor([0.5]), torch.tensor([1]))
        tensor(0.4741)

    Source: arXiv 2411.07122; arXiv 2506.19382 for C > 1.
    """
    if labels.dim() != pre.dim() or labels.shape[:-1] != pre.shape[:-1] or not 1 <= labels.shape[-1] <= pre.shape[-1]:
        raise ValueError(
            f"labels must have shape {[*pre.shape[:-1], 'C']} with C in [1, {pre.shape[-1]}], one column per concept, "
            f"got {list(labels.shape)}."
        )
    is_unknown = labels == ignore_index
    check_labels(labels, is_unknown, soft_labels)
    dtype = working_dtype(pre)
    target = torch.where(is_unknown, torch.zeros((), dtype=dtype, device=labels.device), labels.to(dtype))
    logits = pre[..., : labels.shape[-1]].to(dtype)
    weight = _pos_weight(pos_weight, labels.shape[-1], logits)
    each = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    if not unlabelled_as_negative:
        each = torch.where(is_unknown, torch.zeros_like(each), each)
    return each.sum(-1)


def scar_loss(
    x: Tensor,
    labels: Tensor,
    weights: CoderWeights,
    *,
    k: int | None,
    activation: str = "topk",
    always: int = 0,
    eps: float = 1e-5,
    normalize: bool = True,
    concept_weight: float = 1.0,
    pos_weight: float | Tensor = 1.0,
    ignore_index: int = -1,
    unlabelled_as_negative: bool = False,
    soft_labels: bool = False,
) -> ScarLoss:
    """Compute the training loss of a coder on rows with concept labels.

    loss = mean_i [ nmse_i + concept_weight * bce_i ]; rows without labels count in the mean with bce = 0.

    Args:
        x: [..., d], activations of the frozen model.
        labels: [..., C]; see `concept_loss`.
        weights: of hidden size d and at least C latents.
        k: how many latents to keep; see `kept_latents` in `coder`.
        activation: "topk", "topk-sigmoid", "topk-tanh" or "relu".
        always: so many first latents bypass the selection; C for coders with the concept gate "relu".
        eps: added to the standard deviation when encoding.
        normalize: False codes rows as they are.
        concept_weight: 0 trains an unsupervised coder.
        pos_weight: see `concept_loss`.
        ignore_index: see `concept_loss`.
        unlabelled_as_negative: see `concept_loss`.
        soft_labels: see `concept_loss`.

    Returns:
        Four scalars, float32 or float64.

    Raises:
        ValueError: shapes do not fit, or a setting or label is out of range.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
        >>> scar_loss(torch.tensor([[0.5, 0.1]]), torch.tensor([[1]]), weights, k=2, normalize=False).loss
        tensor(0.4741)

    Source: arXiv 2411.07122; arXiv 2506.19382 for C > 1. `pos_weight` leaves the reconstruction as it is, which the
    original code's gradient hook did not.
    """
    if not 0.0 <= concept_weight < float("inf"):
        raise ValueError(f"concept_weight must be at least 0 and finite, got {concept_weight}.")
    check_weights(weights, x)
    x = x.to(working_dtype(x, *weights))
    pre = pre_activations(x, weights, eps=eps, normalize=normalize)
    latents = latents_of(pre, k=k, activation=activation, always=always)
    _, mean, std = standardize(x, eps=eps, normalize=normalize)
    reconstruction = _mean(reconstruction_loss(decode(latents, weights, mean=mean, std=std), x))
    concept = _mean(
        concept_loss(
            pre,
            labels,
            pos_weight=pos_weight,
            ignore_index=ignore_index,
            unlabelled_as_negative=unlabelled_as_negative,
            soft_labels=soft_labels,
        )
    )
    return ScarLoss(reconstruction + concept_weight * concept, reconstruction, concept, _mean(_l1(latents, x)))


def check_labels(labels: Tensor, is_unknown: Tensor, soft_labels: bool) -> None:
    """Raise a ValueError unless every known label is 0 or 1, or in [0, 1] if they are soft. Free while compiling."""
    if torch.compiler.is_compiling():
        return
    is_right = (labels >= 0) & (labels <= 1) if soft_labels else (labels == 0) | (labels == 1)
    wrong = labels[~(is_right | is_unknown)]
    if wrong.numel():
        allowed = "lie in [0, 1]" if soft_labels else "be 0 or 1"
        hint = "" if soft_labels else "; binarize them, or set soft_labels=True for labels between"
        raise ValueError(f"labels must {allowed}, or be ignore_index where unknown, got {wrong[0].item()}{hint}.")


def _pos_weight(pos_weight: float | Tensor, C: int, like: Tensor) -> Tensor:
    weight = torch.as_tensor(pos_weight, dtype=like.dtype, device=like.device)
    if weight.shape not in {(), (C,)}:
        raise ValueError(f"pos_weight must be a number or have shape [{C}], one per concept, got {list(weight.shape)}.")
    if not torch.compiler.is_compiling() and not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError(f"pos_weight must be at least 0 and finite, got {pos_weight}.")
    return weight


def _l1(latents: Tensor, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x.detach(), dim=-1)
    is_zero = norm == 0
    return latents.detach().abs().sum(-1) / torch.where(is_zero, 1.0, norm) * ~is_zero


def _mean(rows: Tensor) -> Tensor:
    return rows.sum() / max(rows.numel(), 1)
