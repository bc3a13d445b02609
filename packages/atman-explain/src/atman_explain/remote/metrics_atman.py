"""How good an explanation is: against marked evidence, or by what removing the best units does to the output.

Evidence metrics follow the evaluation of arXiv 2301.08110 and its code (`openimages_eval.py` of Aleph-Alpha/AtMan);
deletion and insertion curves follow Petsiuk et al. 2018, "RISE", arXiv 1806.07421, section 4.2.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def average_precision(scores: Tensor | Sequence[float], relevant: Tensor | Sequence[bool]) -> float:
    """Measure how far at the top the relevant units are ranked: 1 if all of them come first.

    The sum over score levels, from the highest down, of precision times the rise of recall. Units of equal score make
    up one level and enter together, so that the result does not depend on their order; it is not interpolated and
    equals `sklearn.metrics.average_precision_score`.

    Args:
        scores: [N], higher ranks first.
        relevant: [N], which units are evidence; at least one.

    Raises:
        ValueError: lengths differ, a score is not finite, or nothing is relevant.

    Example:
        >>> average_precision([3.0, 2.0, 1.0], [True, False, True])
        0.8333333333333333
    """
    values, marks = _vector(scores, "scores"), _vector(relevant, "relevant")
    if values.shape != marks.shape:
        raise ValueError(f"relevant must have one entry per score ({len(values)}), got {len(marks)}.")
    if not ((marks == 0) | (marks == 1)).all():
        raise ValueError("relevant must hold true and false only.")
    if not marks.any():
        raise ValueError("relevant must mark at least one unit; without evidence there is no precision.")
    order = values.argsort(descending=True, stable=True)
    found = marks[order].cumsum(0)
    is_last_of_level = torch.cat([values[order].diff() != 0, torch.ones(1, dtype=torch.bool)])
    precision = (found / torch.arange(1, len(values) + 1))[is_last_of_level]
    recall = (found / found[-1])[is_last_of_level]
    return float((precision * recall.diff(prepend=recall.new_zeros(1))).sum())


def soft_precision(relevance: Tensor, mask: Tensor) -> float:
    """Share of an image's relevance that lies on the marked object: sum(x y) / sum(x).

    Args:
        relevance: x, [H, W], not negative, such as the sum over target tokens of squared scores.
        mask: y, [H, W], in [0, 1]: how much of each patch the object covers.

    Returns:
        A number in [0, 1]; 0 if there is no relevance at all.

    Source: `openimages_eval.py` of Aleph-Alpha/AtMan.
    """
    x, y = _map_and_mask(relevance, mask)
    total = x.sum()
    return float((x * y).sum() / total) if total > 0 else 0.0


def soft_recall(relevance: Tensor, mask: Tensor) -> float:
    """Share of the marked object that is relevant: sum(x / max(x) y) / sum(y).

    Args:
        relevance: x, [H, W], not negative, such as the sum over target tokens of squared scores.
        mask: y, [H, W], in [0, 1]: how much of each patch the object covers.

    Returns:
        A number in [0, 1]; 0 if there is no relevance at all.

    Source: `openimages_eval.py` of Aleph-Alpha/AtMan.
    """
    x, y = _map_and_mask(relevance, mask)
    return float((x / x.max() * y).sum() / y.sum()) if x.max() > 0 else 0.0


def interquartile_mean(values: Tensor | Sequence[float]) -> float:
    """Average the middle half of some values, so that a few odd ones do not matter.

    A quarter of the values is left out at either end. Where a quarter of N is no whole number, the values at the two
    borders count in part: with 9 values, two are left out at either end and the next ones count 3/4.

    Example:
        >>> interquartile_mean([1, 3, 5, 7, 9, 11, 13, 15, 100])
        9.0
    """
    ordered = _vector(values, "values").sort().values
    N = len(ordered)
    ends = torch.arange(1, N + 1, dtype=ordered.dtype)
    # Value i covers [i, i + 1) of the axis; its weight is what of that lies in [N/4, 3N/4].
    weights = (ends.clamp(max=0.75 * N) - (ends - 1).clamp(min=0.25 * N)).clamp(min=0)
    return float((weights * ordered).sum() / (0.5 * N))


def deletion_curve(evaluate: Callable[[list[int]], float], order: Sequence[int]) -> list[float]:
    """Remove units one by one, the most relevant first, and record the output: a good explanation makes it fall fast.

    Args:
        evaluate: takes the indices of the units to remove and gives, say, the probability of the target.
        order: [N], unit indices, most relevant first.

    Returns:
        [N + 1] values: nothing removed, one unit removed, ..., all removed.

    Raises:
        ValueError: an index is repeated or negative, or `evaluate` gives a number that is not finite.
    """
    order = _order(order)
    return [_evaluated(evaluate, order[:n]) for n in range(len(order) + 1)]


def insertion_curve(evaluate: Callable[[list[int]], float], order: Sequence[int]) -> list[float]:
    """Remove all units, put them back one by one, the most relevant first: a good explanation makes it rise fast.

    Args:
        evaluate: takes the indices of the units to remove and gives, say, the probability of the target.
        order: [N], unit indices, most relevant first.

    Returns:
        [N + 1] values: all removed, all but one removed, ..., nothing removed.

    Raises:
        ValueError: an index is repeated or negative, or `evaluate` gives a number that is not finite.
    """
    order = _order(order)
    return [_evaluated(evaluate, order[n:]) for n in range(len(order) + 1)]


def area_under_curve(values: Tensor | Sequence[float]) -> float:
    """Area under evenly spaced values by the trapezoidal rule, the axis running from 0 to 1.

    Raises:
        ValueError: there are fewer than two values, or one is not finite.
    """
    curve = _vector(values, "values")
    if len(curve) < 2:
        raise ValueError(f"values must hold at least two points, got {len(curve)}.")
    return float(torch.trapezoid(curve) / (len(curve) - 1))


def _vector(values: Tensor | Sequence[float] | Sequence[bool], name: str) -> Tensor:
    vector = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if vector.dim() != 1 or not len(vector):
        raise ValueError(f"{name} must be a list of at least one number, got shape {list(vector.shape)}.")
    if not vector.isfinite().all():
        raise ValueError(f"{name} must be finite; entry {int((~vector.isfinite()).nonzero()[0])} is not.")
    return vector


def _map_and_mask(relevance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (torch.as_tensor(each).detach().to("cpu", torch.float64) for each in (relevance, mask))
    if not (x.numel() and x.isfinite().all() and (x >= 0).all()):
        raise ValueError("relevance must hold finite numbers of at least 0; square or clip the scores first.")
    if y.shape != x.shape:
        raise ValueError(f"mask must have the shape of relevance {list(x.shape)}, got {list(y.shape)}.")
    if not ((y >= 0) & (y <= 1)).all() or not y.any():
        raise ValueError("mask must lie in [0, 1] and mark something.")
    return x, y


def _order(order: Sequence[int]) -> list[int]:
    indices = [int(index) for index in order]
    if not indices or min(indices) < 0 or len(set(indices)) < len(indices):
        raise ValueError(f"order must hold at least one unit index, none negative, none twice, got {indices[:20]}.")
    return indices


def _evaluated(evaluate: Callable[[list[int]], float], removed: list[int]) -> float:
    value = float(evaluate(list(removed)))
    if not math.isfinite(value):
        raise ValueError(f"evaluate must return a finite number, got {value} with {len(removed)} units removed.")
    return value
