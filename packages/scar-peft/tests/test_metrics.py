"""Metrics against hand-computed cases and scikit-learn."""

import math

import pytest
import torch

from scar_peft import metrics
from scar_peft.metrics import (
    auroc,
    balanced_accuracy,
    best_balanced_threshold,
    best_f1_threshold,
    ce_recovered,
    dead_share,
    explained_variance,
    f1_score,
    graded_correlation,
    l0,
    nmse,
    pool,
)


def random_case(levels, length):
    labels = torch.randint(2, (length,))
    labels[0], labels[1] = 0, 1
    return torch.randint(levels, (length,)).double() + labels, labels


def test_auroc_by_hand():
    assert auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auroc([1.0, 1.0], [0, 1]) == 0.5
    assert auroc([2.0, 1.0], [0, 1]) == 0.0
    assert auroc([0.0, 0.0, 1.0], [0, 1, 1]) == 0.75
    assert auroc([-math.inf, math.inf], [False, True]) == 1.0


@pytest.mark.parametrize("levels", [3, 1000], ids=["many-ties", "few-ties"])
@pytest.mark.parametrize("length", [2, 7, 200])
def test_detection_metrics_equal_scikit_learn(levels, length):
    peer = pytest.importorskip("sklearn.metrics")
    scores, labels = random_case(levels, length)
    assert auroc(scores, labels) == pytest.approx(peer.roc_auc_score(labels, scores), abs=1e-12)
    for threshold in scores.unique().tolist():
        found = (scores > threshold).numpy()
        assert f1_score(scores, labels, threshold) == pytest.approx(peer.f1_score(labels, found, zero_division=0))
        expected = peer.balanced_accuracy_score(labels, found)
        assert balanced_accuracy(scores, labels, threshold) == pytest.approx(expected)


@pytest.mark.parametrize("levels", [1, 3, 1000])
@pytest.mark.parametrize("length", [2, 7, 200])
def test_no_threshold_is_better_than_the_best(levels, length):
    scores, labels = random_case(levels, length)
    every = [scores.min().item() - 1, *scores.tolist()]
    cut, value = best_f1_threshold(scores, labels)
    assert f1_score(scores, labels, cut) == pytest.approx(value)
    assert value == pytest.approx(max(f1_score(scores, labels, each) for each in every))
    cut, value = best_balanced_threshold(scores, labels)
    assert balanced_accuracy(scores, labels, cut) == pytest.approx(value)
    assert value == pytest.approx(max(balanced_accuracy(scores, labels, each) for each in every))


def test_thresholds_lie_between_scores_even_where_floats_are_dense():
    high = math.nextafter(1.0, 2.0)
    assert 1.0 <= best_f1_threshold([1.0, high], [0, 1]).threshold < high
    assert best_f1_threshold([0.0, 1.0], [0, 1]).threshold == 0.5
    assert best_f1_threshold([3.0, 3.0], [1, 1]) == (2.0, 1.0)
    assert best_f1_threshold([1e300], [1]).threshold < 1e300


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_one_class_has_no_auroc(labels):
    with pytest.warns(UserWarning, match="auroc is nan: labels hold no (positive|negative) example"):
        assert math.isnan(auroc([1.0, 2.0], labels))
    with pytest.warns(UserWarning, match="balanced_accuracy is nan: labels hold one class only"):
        assert math.isnan(balanced_accuracy([1.0, 2.0], labels, 0.0))


def test_graded_correlation_by_hand():
    result = graded_correlation([1.0, 2.0, 9.0, 3.0], [0.0, 0.04, 0.051, 1.0], bins=20)
    assert result.counts == [2, 1, *[0] * 17, 1]
    assert result.means[:2] == [1.5, 9.0]
    assert math.isnan(result.means[2])
    assert result.centers[:2] == pytest.approx([0.025, 0.075])
    expected = torch.corrcoef(torch.tensor([[1.5, 9.0, 3.0], [0.025, 0.075, 0.975]]))[0, 1]
    assert result.bins == pytest.approx(expected.item(), abs=1e-6)
    expected = torch.corrcoef(torch.tensor([[1.0, 2.0, 9.0, 3.0], [0.0, 0.04, 0.051, 1.0]]))[0, 1]
    assert result.examples == pytest.approx(expected.item(), abs=1e-6)


def test_decimal_borders_belong_to_the_bin_above():
    grades = [i / 20 for i in range(21)]
    assert graded_correlation(grades, grades).counts == [*[1] * 19, 2]


def test_bins_can_be_capped():
    result = graded_correlation([1.0, 5.0, 2.0], [0.1, 0.2, 0.9], bins=2, per_bin=1)
    assert result.counts == [1, 1]
    assert result.means == [1.0, 2.0]


def test_a_constant_score_has_no_correlation():
    result = graded_correlation([1.0, 1.0], [0.1, 0.9])
    assert math.isnan(result.examples)
    assert math.isnan(result.bins)


def test_reconstruction_metrics_by_hand():
    assert nmse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) == 0.5
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert explained_variance(x, x) == 1.0
    assert explained_variance(x.mean(0).expand(2, 2), x) == 0.0
    assert math.isnan(explained_variance(x[:1], x[:1]))
    latents = torch.tensor([[0.0, 2.0, 0.0], [0.0, 3.0, -1.0]])
    assert (l0(latents), dead_share(latents)) == (1.5, pytest.approx(1 / 3))


def test_cross_entropy_recovered_by_hand():
    assert ce_recovered(2.0, 2.5, 4.0) == 0.75
    assert math.isnan(ce_recovered(2.0, 2.5, 2.0))


def test_pooling_counts_masked_tokens_only():
    scores = torch.tensor([[5.0, 1.0, 3.0], [2.0, 4.0, math.nan], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]])
    assert pool(scores, mask).tolist() == [2.0, 3.0, 0.0]
    assert pool(scores, mask, "max").tolist() == [3.0, 4.0, 0.0]
    assert pool(scores, mask, "last").tolist() == [3.0, 4.0, 0.0]
    assert pool(-scores[:1], mask[:1], "max").tolist() == [-1.0]
    assert pool(scores[:1], None, "last").tolist() == [3.0]
    assert pool(scores[:, :0], None, "max").tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([1.0], [0, 1]), r"labels must have one entry per score \(1\), got shape \[2\]"),
        (lambda: auroc([], []), r"scores must be a list of at least one number, got shape \[0\]"),
        (lambda: auroc([1.0, math.nan], [0, 1]), r"scores must not be NaN; entry 1 is"),
        (lambda: auroc([1.0, 2.0], [0, -1]), r"labels must be 0 or 1; leave out what is not labelled"),
        (lambda: best_f1_threshold([1.0], [0]), r"labels must hold at least one positive example"),
        (lambda: best_balanced_threshold([1.0], [1]), r"labels must hold examples of both classes"),
        (lambda: best_f1_threshold([math.inf], [1]), r"scores must be finite to choose a threshold"),
        (lambda: graded_correlation([1.0], [1.5]), r"grades must lie in \[0, 1\]"),
        (lambda: graded_correlation([1.0], [0.5], bins=0), r"bins and per_bin must be at least 1, got 0 and None"),
        (lambda: graded_correlation([math.inf], [0.5]), r"scores must be finite"),
        (lambda: pool(torch.ones(2), torch.ones(3)), r"mask must have the shape of scores \[2\], got \[3\]"),
        (lambda: pool(torch.ones(2), kind="sum"), r"kind must be one of \['mean', 'max', 'last'\], got 'sum'"),
        (lambda: explained_variance(torch.ones(2), torch.ones(3)), r"reconstruction must have the shape of x \[3\]"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_all_names_are_there():
    assert metrics.__all__ == sorted(metrics.__all__)
    assert all(hasattr(metrics, name) for name in metrics.__all__)
