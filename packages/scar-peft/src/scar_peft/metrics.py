"""How well scores detect a concept, how well a coder reconstructs, and how much a language model loses by it.

Scores and labels are flat lists; everything is computed in float64 on the device of the scores. A row is predicted
positive if its score is *above* the threshold.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import reconstruction_loss
from .monosemanticity import (
    Monosemanticity,
    Stumps,
    TreeLevel,
    best_stumps,
    fms,
    fms_from_accuracies,
    smallest_tree,
    tree_levels,
)
from .remote.pooling_scar import pool

__all__ = [
    "GradedCorrelation",
    "Monosemanticity",
    "Stumps",
    "Threshold",
    "TreeLevel",
    "auroc",
    "balanced_accuracy",
    "best_balanced_threshold",
    "best_f1_threshold",
    "best_stumps",
    "ce_recovered",
    "dead_share",
    "explained_variance",
    "f1_score",
    "fms",
    "fms_from_accuracies",
    "graded_correlation",
    "l0",
    "nmse",
    "pool",
    "smallest_tree",
    "tree_levels",
]


class Threshold(NamedTuple):
    """Where to cut scores, and how good that is."""

    threshold: float
    """A row is positive if its score is above."""
    value: float
    """F1 or balanced accuracy on the scores that the threshold was chosen on."""


class GradedCorrelation(NamedTuple):
    """How a score follows a grade in [0, 1]."""

    examples: float
    """Pearson's correlation over single examples."""
    bins: float
    """The same over the means of the bins that hold any."""
    centers: list[float]
    """Middle of every bin, [bins]."""
    means: list[float]
    """Mean score of every bin; NaN where it is empty."""
    counts: list[int]
    """Examples in every bin."""


def auroc(scores: Tensor | Sequence[float], labels: Tensor | Sequence[int]) -> float:
    """Measure how well scores rank positives above negatives: the probability that a random pair is in order.

    AUROC = P(s+ > s-) + P(s+ = s-) / 2, from mid-ranks. NaN, with a warning, if there is one class only.

    Args:
        scores: [N], not NaN.
        labels: [N], 0 or 1.

    Raises:
        ValueError: lengths differ, a score is NaN, or a label is neither 0 nor 1.

    Example:
        >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
        0.75
    """
    values, marks = _scores_and_labels(scores, labels)
    positives, negatives = int(marks.sum()), int((~marks).sum())
    if not positives or not negatives:
        missing = "positive" if positives == 0 else "negative"
        warnings.warn(f"auroc is nan: labels hold no {missing} example.", stacklevel=2)
        return float("nan")
    _, level, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    middle = counts.cumsum(0).double() - (counts - 1) / 2  # mean rank of a level, from 1
    above = middle[level[marks]].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def f1_score(scores: Tensor | Sequence[float], labels: Tensor | Sequence[int], threshold: float) -> float:
    """Harmonic mean of precision and recall: 2 TP / (2 TP + FP + FN). 0 if nothing is positive or found.

    Args:
        scores: [N], not NaN.
        labels: [N], 0 or 1.
        threshold: scores above are positive.

    Raises:
        ValueError: as for `auroc`.

    Example:
        >>> f1_score([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.3)
        0.8
    """
    values, marks = _scores_and_labels(scores, labels)
    found = values > threshold
    right, total = int((found & marks).sum()), int(found.sum() + marks.sum())
    return 2 * right / total if total else 0.0


def balanced_accuracy(scores: Tensor | Sequence[float], labels: Tensor | Sequence[int], threshold: float) -> float:
    """Mean of the shares of positives and of negatives that are recognized. NaN, with a warning, with one class only.

    Args:
        scores: [N], not NaN.
        labels: [N], 0 or 1.
        threshold: scores above are positive.

    Raises:
        ValueError: as for `auroc`.

    Example:
        >>> balanced_accuracy([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.3)
        0.75
    """
    values, marks = _scores_and_labels(scores, labels)
    if marks.all() or not marks.any():
        warnings.warn("balanced_accuracy is nan: labels hold one class only.", stacklevel=2)
        return float("nan")
    found = values > threshold
    return float((found[marks].double().mean() + (~found[~marks]).double().mean()) / 2)


def best_f1_threshold(scores: Tensor | Sequence[float], labels: Tensor | Sequence[int]) -> Threshold:
    """Find the threshold of greatest F1; of several, the highest.

    Thresholds lie midway between neighboring scores, and below the lowest one.

    Args:
        scores: [N], finite.
        labels: [N], 0 or 1, with at least one positive.

    Raises:
        ValueError: as for `auroc`, a score is infinite, or there is no positive.

    Example:
        >>> best_f1_threshold([0.0, 0.5, 0.25, 1.0], [0, 0, 1, 1])
        Threshold(threshold=0.125, value=0.8)
    """
    cuts, right, found, positives, _ = _cuts(scores, labels)
    if not positives:
        raise ValueError("labels must hold at least one positive example to choose a threshold.")
    return _best(cuts, 2 * right / (found + positives))


def best_balanced_threshold(scores: Tensor | Sequence[float], labels: Tensor | Sequence[int]) -> Threshold:
    """Find the threshold of greatest balanced accuracy; of several, the highest.

    Args:
        scores: [N], finite.
        labels: [N], 0 or 1, of both classes.

    Raises:
        ValueError: as for `auroc`, a score is infinite, or a class is missing.

    Example:
        >>> best_balanced_threshold([0.0, 0.5, 0.25, 1.0], [0, 0, 1, 1])
        Threshold(threshold=0.75, value=0.75)
    """
    cuts, right, found, positives, negatives = _cuts(scores, labels)
    if not positives or not negatives:
        raise ValueError("labels must hold examples of both classes to choose a threshold.")
    return _best(cuts, (right / positives + (negatives - (found - right)) / negatives) / 2)


def graded_correlation(
    scores: Tensor | Sequence[float],
    grades: Tensor | Sequence[float],
    *,
    bins: int = 20,
    per_bin: int | None = None,
) -> GradedCorrelation:
    """Correlate a score with a graded label, such as toxicity, over examples and over bins of equal width.

    Args:
        scores: [N], finite.
        grades: [N], in [0, 1].
        bins: how many; 20 are bins of 0.05, as in the paper.
        per_bin: use so many examples of every bin at most, the first ones; 100 in the paper. None uses all.

    Returns:
        Correlations are NaN if the scores, or the grades, are all the same.

    Raises:
        ValueError: lengths differ, or values are out of range.

    Example:
        >>> graded_correlation([1.0, 2.0, 3.0], [0.1, 0.5, 0.9], bins=2).examples
        1.0

    Source: arXiv 2411.07122, evaluation of detection.
    """
    values, levels = _vector(scores, "scores"), _vector(grades, "grades")
    _check_length(values, levels, "grades")
    if bins < 1 or (per_bin is not None and per_bin < 1):
        raise ValueError(f"bins and per_bin must be at least 1, got {bins} and {per_bin}.")
    if not values.isfinite().all():
        raise ValueError("scores must be finite.")
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError("grades must lie in [0, 1].")
    # A decimal border such as 0.15 belongs to the bin above it, whatever its binary rounding.
    which = (levels * bins + 1e-9).long().clamp(max=bins - 1)
    members = [(which == b).nonzero().squeeze(1)[:per_bin] for b in range(bins)]
    used = torch.cat(members)
    means = torch.stack([values[each].mean() if len(each) else values.new_tensor(float("nan")) for each in members])
    centers = (torch.arange(bins, dtype=torch.float64, device=values.device) + 0.5) / bins
    filled = ~means.isnan()
    return GradedCorrelation(
        _pearson(values[used], levels[used]),
        _pearson(means[filled], centers[filled]),
        centers.tolist(),
        means.tolist(),
        [len(each) for each in members],
    )


def nmse(reconstruction: Tensor, x: Tensor) -> float:
    """Mean over rows of the normalized squared error mean((y - x)^2) / mean(x^2); NaN without rows.

    Args:
        reconstruction: y, [..., d].
        x: [..., d].

    Raises:
        ValueError: shapes differ.

    Example:
        >>> nmse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        0.5
    """
    return float(reconstruction_loss(reconstruction.double(), x.double()).mean())


def explained_variance(reconstruction: Tensor, x: Tensor) -> float:
    """Share of the variance of the rows that the reconstruction explains: 1 - sum (y - x)^2 / sum (x - mean row)^2.

    Args:
        reconstruction: y, [..., d].
        x: [..., d].

    Returns:
        At most 1; 0 is as good as the mean row. NaN if all rows are equal.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> explained_variance(torch.tensor([[0.0], [4.0]]), torch.tensor([[0.0], [2.0]]))
        -1.0
    """
    if reconstruction.shape != x.shape:
        raise ValueError(f"reconstruction must have the shape of x {list(x.shape)}, got {list(reconstruction.shape)}.")
    rows = x.double().reshape(-1, x.shape[-1])
    total = (rows - rows.mean(0)).square().sum()
    return float(1 - (reconstruction.double() - x.double()).square().sum() / total) if total > 0 else float("nan")


def l0(latents: Tensor) -> float:
    """Mean number of latents per row that are not 0.

    Example:
        >>> l0(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
        1.5
    """
    return float((latents != 0).sum(-1).double().mean())


def dead_share(latents: Tensor) -> float:
    """Share of latents that are 0 on every row.

    Example:
        >>> dead_share(torch.tensor([[0.0, 2.0], [0.0, 3.0]]))
        0.5
    """
    return float((latents.reshape(-1, latents.shape[-1]) == 0).all(0).double().mean())


def ce_recovered(clean: float, inserted: float, ablated: float) -> float:
    """Share of a language model's cross-entropy that survives replacing activations by their reconstruction.

    (ablated - inserted) / (ablated - clean): 1 if the coder costs nothing, 0 if it is as bad as the mean activation.

    Args:
        clean: cross-entropy of the model as it is, in nats per token.
        inserted: with the reconstruction in place of the activation.
        ablated: with the mean activation in its place.

    Returns:
        NaN if ablation does not change the cross-entropy.

    Example:
        >>> ce_recovered(2.0, 2.5, 4.0)
        0.75
    """
    return (ablated - inserted) / (ablated - clean) if ablated != clean else float("nan")


def _cuts(scores: Tensor | Sequence[float], labels: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Thresholds from high to low, true positives and positives found at each, and the sizes of the classes."""
    values, marks = _scores_and_labels(scores, labels)
    if not values.isfinite().all():
        raise ValueError("scores must be finite to choose a threshold.")
    levels, level, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    right = torch.zeros_like(levels).index_add_(0, level, marks.double()).flip(0).cumsum(0)
    found = counts.flip(0).cumsum(0).double()
    upper, lower = levels.flip(0)[:-1], levels.flip(0)[1:]
    middle = lower + (upper - lower) / 2
    cuts = torch.where(middle < upper, middle, lower)
    lowest = torch.minimum(levels[:1] - 1, torch.nextafter(levels[:1], torch.full_like(levels[:1], float("-inf"))))
    return torch.cat([cuts, lowest]), right, found, int(marks.sum()), int((~marks).sum())


def _best(cuts: Tensor, values: Tensor) -> Threshold:
    first = int(values.argmax())
    return Threshold(float(cuts[first]), float(values[first]))


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = (each - each.mean() if len(each) else each for each in (a, b))
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def _scores_and_labels(scores: Tensor | Sequence[float], labels: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
    values = _vector(scores, "scores")
    marks = torch.as_tensor(labels).to(values.device)
    _check_length(values, marks, "labels")
    if values.isnan().any():
        raise ValueError(f"scores must not be NaN; entry {int(values.isnan().nonzero()[0])} is.")
    if not ((marks == 0) | (marks == 1)).all():
        raise ValueError("labels must be 0 or 1; leave out what is not labelled.")
    return values, marks == 1


def _vector(values: Tensor | Sequence[float], name: str) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64).detach()
    if vector.dim() != 1 or not len(vector):
        raise ValueError(f"{name} must be a list of at least one number, got shape {list(vector.shape)}.")
    return vector


def _check_length(values: Tensor, others: Tensor, name: str) -> None:
    if others.shape != values.shape:
        raise ValueError(f"{name} must have one entry per score ({len(values)}), got shape {list(others.shape)}.")
