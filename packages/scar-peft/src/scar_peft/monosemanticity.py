"""How far a concept is held by one latent alone: stumps, decision trees and the monosemanticity score FMS.

A stump predicts the majority class on either side of one threshold on one latent; it is the root of a decision tree.
Source of the score: arXiv 2506.19382.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CRITERIA = ("gini", "accuracy")
_CELLS_PER_CHUNK = 1 << 22  # sorted values and counts of so many entries stay below 200 MB
_AS_GOOD_AS_PERFECT = 1 - 1e-3


class Stumps(NamedTuple):
    """For each of n latents, the best cut on training rows, and how it does on test rows."""

    threshold: Tensor
    """[n] float64; a row is above if its latent is greater."""
    above: Tensor
    """[n] int64, the class predicted above; 0 in a draw."""
    below: Tensor
    """[n] int64, the class predicted below."""
    criterion: Tensor
    """[n] float64, what the cut maximizes on training rows: accuracy, or minus the Gini impurity that is left."""
    train_accuracy: Tensor
    """[n] float64."""
    test_accuracy: Tensor
    """[n] float64."""


class TreeLevel(NamedTuple):
    """A decision tree cut off at some depth."""

    depth: int
    """Decisions on the longest path."""
    nodes: int
    """Decisions in all."""
    accuracy: float
    """On test rows."""
    f1: float
    """On test rows."""


@dataclass(frozen=True)
class Monosemanticity:
    """The score of one concept and what it is made of; all accuracies are on test rows."""

    latent: int
    """The best single latent."""
    accs_0: float
    """Accuracy of its stump."""
    accs_p: dict[int, float]
    """p -> accuracy of the best stump after the p best latents are removed."""
    accs_cum: list[float]
    """Accuracy of the decision tree cut off at depth 1, 2, ..."""
    local_disentanglement: dict[int, float]
    """p -> 2 (accs_0 - accs_p), clipped to [0, 1]: no other latents hold the concept as well."""
    global_disentanglement: float
    """1 - mean_d(accs_cum_d - accs_0), clipped to [0, 1]: no other latents add to it."""
    fms: dict[int, float]
    """p -> accs_0 (local + global) / 2."""

    def to_dict(self) -> dict[str, Any]:
        """The fields; keys of inner mappings are strings, as JSON has them."""
        return {
            name: {str(p): value for p, value in field.items()} if isinstance(field, dict) else field
            for name, field in asdict(self).items()
        }


def best_stumps(
    train_latents: Tensor,
    train_labels: Tensor | Sequence[int],
    test_latents: Tensor,
    test_labels: Tensor | Sequence[int],
    *,
    criterion: str = "gini",
) -> Stumps:
    """Find the best threshold of every latent on training rows and its accuracy on test rows.

    Thresholds lie midway between neighboring values; either side predicts its majority, so that the direction is free.

    Args:
        train_latents: [N, n].
        train_labels: [N], 0 or 1.
        test_latents: [M, n].
        test_labels: [M], 0 or 1.
        criterion: what the threshold maximizes: "gini" as decision trees, or "accuracy".

    Raises:
        ValueError: shapes do not fit, latents are not finite, or a label is neither 0 nor 1.

    Example:
        >>> latents = torch.tensor([[0.0, 5.0], [1.0, 1.0], [4.0, 5.0], [6.0, 1.0]])
        >>> best_stumps(latents, [0, 0, 1, 1], latents, [0, 0, 1, 1]).threshold[0].item()
        2.5
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {list(CRITERIA)}, got {criterion!r}.")
    train_labels, test_labels = _checked(train_latents, train_labels, test_latents, test_labels)
    width = max(1, _CELLS_PER_CHUNK // len(train_labels))
    chunks = [
        _stumps(train.double(), train_labels, test.double(), test_labels, criterion)
        for train, test in zip(train_latents.split(width, 1), test_latents.split(width, 1), strict=True)
    ]
    return Stumps(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def fms_from_accuracies(accs_0: float, accs_p: float, accs_cum: Sequence[float]) -> tuple[float, float, float]:
    """Compute FMS@p of one concept: accs_0 (local + global) / 2.

    local = 2 (accs_0 - accs_p) and global = 1 - mean_d(accs_cum_d - accs_0), both clipped to [0, 1].

    Args:
        accs_0: accuracy of the best single latent.
        accs_p: accuracy of the best single latent after the p best are removed.
        accs_cum: accuracy of the decision tree at depth 1, 2, ...; at least one.

    Returns:
        FMS@p, local, global.

    Raises:
        ValueError: an accuracy is not in [0, 1], or `accs_cum` is empty.

    Example:
        >>> fms_from_accuracies(1.0, 0.5, [1.0, 1.0])
        (1.0, 1.0, 1.0)

    Source: arXiv 2506.19382.
    """
    if not accs_cum or not all(0 <= each <= 1 for each in (accs_0, accs_p, *accs_cum)):
        raise ValueError(
            "accs_0, accs_p and accs_cum must hold accuracies in [0, 1], at least one each, "
            f"got {accs_0}, {accs_p} and {list(accs_cum)}."
        )
    local = min(max(2 * (accs_0 - accs_p), 0.0), 1.0)
    overall = min(max(1 - sum(each - accs_0 for each in accs_cum) / len(accs_cum), 0.0), 1.0)
    return accs_0 * (local + overall) / 2, local, overall


def fms(
    train_latents: Tensor,
    train_labels: Tensor | Sequence[int],
    test_latents: Tensor,
    test_labels: Tensor | Sequence[int],
    *,
    removed: Sequence[int] = (1,),
    max_depth: int | None = None,
    seed: int = 0,
) -> Monosemanticity:
    """Measure how monosemantic a coder is for one concept: FMS@p. The score of a coder is the mean over concepts.

    Latents are ranked by the Gini impurity that their stump leaves on training rows; accs_p is that of number p + 1.

    Args:
        train_latents: [N, n]; sequences pooled to their mean, or tokens.
        train_labels: [N], 0 or 1.
        test_latents: [M, n].
        test_labels: [M], 0 or 1.
        removed: the values of p, each in [1, n - 1].
        max_depth: of the decision tree; None grows it until training rows are pure. Depths after the first at which
            the accuracy is 0.999 do not count.
        seed: of the tree, which chooses among equally good splits.

    Raises:
        ValueError: as `best_stumps`, or p is out of range.
        ImportError: scikit-learn is missing.

    Example:
        >>> latents = torch.tensor([[0.0, 5.0], [1.0, 1.0], [4.0, 5.0], [6.0, 1.0]])
        >>> fms(latents, [0, 0, 1, 1], latents, [0, 0, 1, 1]).fms
        {1: 1.0}

    Source: arXiv 2506.19382, and `utils/FMS_Tree_SVM.py` of its code.
    """
    n = train_latents.shape[-1]
    if not removed or not all(1 <= p < n for p in removed):
        raise ValueError(f"removed must hold numbers in [1, {n - 1}] (one latent must be left), got {list(removed)}.")
    levels = tree_levels(train_latents, train_labels, test_latents, test_labels, max_depth=max_depth, seed=seed)
    stumps = best_stumps(train_latents, train_labels, test_latents, test_labels)
    best = stumps.criterion.sort(descending=True, stable=True).indices
    accuracy = stumps.test_accuracy[best]
    accs_0, accs_cum = float(accuracy[0]), _until_perfect([each.accuracy for each in levels])
    accs_p = {p: float(accuracy[p]) for p in removed}
    scores = {p: fms_from_accuracies(accs_0, each, accs_cum) for p, each in accs_p.items()}
    return Monosemanticity(
        latent=int(best[0]),
        accs_0=accs_0,
        accs_p=accs_p,
        accs_cum=accs_cum,
        local_disentanglement={p: local for p, (_, local, _) in scores.items()},
        global_disentanglement=next(iter(scores.values()))[2],
        fms={p: score for p, (score, _, _) in scores.items()},
    )


def tree_levels(
    train_latents: Tensor,
    train_labels: Tensor | Sequence[int],
    test_latents: Tensor,
    test_labels: Tensor | Sequence[int],
    *,
    max_depth: int | None = None,
    seed: int = 0,
) -> list[TreeLevel]:
    """Grow a decision tree (Gini) and judge it on test rows, cut off at depth 1, 2, ... up to its own depth.

    Args:
        train_latents: [N, n].
        train_labels: [N], 0 or 1.
        test_latents: [M, n].
        test_labels: [M], 0 or 1.
        max_depth: None grows it until training rows are pure.
        seed: chooses among equally good splits.

    Raises:
        ValueError: as `best_stumps`.
        ImportError: scikit-learn is missing.

    Example:
        >>> latents = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> tree_levels(latents, [0, 1, 1, 0], latents, [0, 1, 1, 0])[-1]
        TreeLevel(depth=2, nodes=2, accuracy=1.0, f1=1.0)
    """
    train_labels, test_labels = _checked(train_latents, train_labels, test_latents, test_labels)
    tree = _grown_tree(train_latents, train_labels, max_depth, seed)
    rows, truth = test_latents.cpu().float().numpy(), test_labels.cpu().numpy() == 1
    node, inner = np.zeros(len(rows), dtype=np.int64), [0]
    levels: list[TreeLevel] = []
    for depth in range(1, max(tree.max_depth, 1) + 1):
        inner = [each for each in inner if tree.children_left[each] >= 0]
        nodes = len(inner) + (levels[-1].nodes if levels else 0)
        is_inner = tree.children_left[node] >= 0
        goes_left = rows[np.arange(len(rows)), tree.feature[node].clip(min=0)] <= tree.threshold[node]
        down = np.where(goes_left, tree.children_left[node], tree.children_right[node])
        node = np.where(is_inner, down, node)
        found = tree.value[node, 0].argmax(-1) == 1
        total = int(found.sum() + truth.sum())
        f1 = 2 * int((found & truth).sum()) / total if total else 0.0
        levels.append(TreeLevel(depth, nodes, float((found == truth).mean()), f1))
        inner = [child for each in inner for child in (tree.children_left[each], tree.children_right[each])]
    return levels


def smallest_tree(levels: Sequence[TreeLevel], f1: float) -> TreeLevel | None:
    """Pick the first level that reaches an F1, or None: how many decisions detecting the concept takes.

    Example:
        >>> smallest_tree([TreeLevel(1, 1, 0.8, 0.7), TreeLevel(2, 3, 0.9, 0.9)], 0.8).depth
        2
    """
    return next((each for each in levels if each.f1 >= f1), None)


def _stumps(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, criterion: str) -> Stumps:
    values, order = train.sort(dim=0)  # [N, n]
    N = len(values)
    below = labels[order].cumsum(0).double()  # positives at or below the cut after row i
    size = torch.arange(1, N + 1, dtype=torch.float64, device=train.device)[:, None]
    above, rest = below[-1] - below, N - size
    is_cut = torch.cat([values[:-1] < values[1:], torch.ones_like(values[:1], dtype=torch.bool)])
    right = (torch.maximum(below, size - below) + torch.maximum(above, rest - above)) / N
    if criterion == "gini":
        left = below * (size - below) / size + above * (rest - above) / rest.clamp(min=1)
        quality = -2 * left / N
    else:
        quality = right
    best = quality.masked_fill(~is_cut, float("-inf")).argmax(0, keepdim=True)  # [1, n]
    low, high = values.gather(0, best)[0], values.gather(0, (best + 1).clamp(max=N - 1))[0]
    middle = low + (high - low) / 2
    threshold = torch.where(middle < high, middle, low)
    class_below = (2 * below > size).gather(0, best)[0]
    class_above = (2 * above > rest).gather(0, best)[0]
    predicted = torch.where(test > threshold, class_above, class_below)
    accuracy = (predicted == (truth == 1)[:, None]).double().mean(0)
    quality, right = quality.gather(0, best)[0], right.gather(0, best)[0]
    return Stumps(threshold, class_above.long(), class_below.long(), quality, right, accuracy)


def _grown_tree(latents: Tensor, labels: Tensor, max_depth: int | None, seed: int) -> Any:
    try:
        from sklearn.tree import DecisionTreeClassifier
    except ImportError as error:
        raise ImportError("Decision trees need scikit-learn: pip install scar-peft[evaluation].") from error
    if not labels.any() or labels.all():
        raise ValueError("train_labels must hold both classes to grow a tree.")
    model = DecisionTreeClassifier(criterion="gini", max_depth=max_depth, random_state=seed)
    return model.fit(latents.cpu().float().numpy(), labels.cpu().numpy()).tree_


def _until_perfect(accuracies: list[float]) -> list[float]:
    end = next((i for i, each in enumerate(accuracies) if each >= _AS_GOOD_AS_PERFECT), len(accuracies) - 1)
    return accuracies[: end + 1]


def _checked(
    train_latents: Tensor,
    train_labels: Tensor | Sequence[int],
    test_latents: Tensor,
    test_labels: Tensor | Sequence[int],
) -> tuple[Tensor, Tensor]:
    checked = []
    for name, latents, labels in (("train", train_latents, train_labels), ("test", test_latents, test_labels)):
        if latents.dim() != 2 or not latents.numel() or latents.shape[1] != train_latents.shape[-1]:
            raise ValueError(
                f"{name}_latents must have shape [rows, latents], with rows and as many latents as in training, "
                f"got {list(latents.shape)}."
            )
        if not latents.isfinite().all():
            raise ValueError(f"{name}_latents must be finite.")
        marks = torch.as_tensor(labels).to(latents.device)
        if marks.shape != latents.shape[:1]:
            raise ValueError(
                f"{name}_labels must have one entry per row ({len(latents)}), got shape {list(marks.shape)}."
            )
        if not ((marks == 0) | (marks == 1)).all():
            raise ValueError(f"{name}_labels must be 0 or 1; leave out what is not labelled.")
        checked.append(marks.long())
    return checked[0], checked[1]
