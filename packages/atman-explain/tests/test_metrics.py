"""Metrics against hand-computed cases and an installed peer."""

import math

import pytest
import torch

from atman_explain.remote.metrics_atman import (
    area_under_curve,
    average_precision,
    deletion_curve,
    insertion_curve,
    interquartile_mean,
    soft_precision,
    soft_recall,
)


def test_average_precision_by_hand():
    assert average_precision([0.9, 0.8, 0.1], [True, False, True]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([1.0, 2.0, 3.0], [False, False, True]) == 1.0


def test_equal_scores_enter_together_in_any_order():
    assert average_precision([1.0, 1.0, 0.0], [True, False, False]) == 0.5
    assert average_precision([1.0, 1.0, 0.0], [False, True, False]) == 0.5


@pytest.mark.parametrize("levels", [3, 1000], ids=["many-ties", "few-ties"])
def test_average_precision_equals_scikit_learn(levels):
    peer = pytest.importorskip("sklearn.metrics")
    for length in (1, 2, 7, 100):
        scores = torch.randint(levels, (length,)).double() - levels / 2
        relevant = torch.rand(length) < 0.3
        relevant[0] = True
        expected = peer.average_precision_score(relevant.numpy(), scores.numpy())
        assert average_precision(scores, relevant) == pytest.approx(expected, abs=1e-12)


def test_soft_precision_and_recall_by_hand():
    relevance = torch.tensor([[4.0, 2.0], [0.0, 2.0]])
    mask = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    assert soft_precision(relevance, mask) == pytest.approx((4 + 1) / 8)
    assert soft_recall(relevance, mask) == pytest.approx((1 + 0.25) / 1.5)


def test_no_relevance_is_neither_precise_nor_complete():
    assert soft_precision(torch.zeros(2, 2), torch.ones(2, 2)) == 0.0
    assert soft_recall(torch.zeros(2, 2), torch.ones(2, 2)) == 0.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, 8, 4, 38, 8, 6, 9, 7, 7, 3, 1, 6], 6.5),  # 12 values: 5 6 6 7 7 8
        ([1, 3, 5, 7, 9, 11, 13, 15, 17], 9.0),  # 9 values: 5 and 13 count 3/4
        ([1, 2, 3, 30], 2.5),
        ([0, 1, 5], (0.25 * 0 + 1 + 0.25 * 5) / 1.5),  # the outer ones count 1/4
        ([4], 4.0),
    ],
)
def test_interquartile_mean_by_hand(values, expected):
    assert interquartile_mean(values) == pytest.approx(expected)
    assert interquartile_mean(values[::-1]) == pytest.approx(expected)


def test_curves_remove_and_insert_in_order():
    weights = [0.5, 0.2, 0.3]

    def evaluate(removed):
        return 1.0 - sum(weights[index] for index in removed)

    assert deletion_curve(evaluate, [0, 2, 1]) == pytest.approx([1.0, 0.5, 0.2, 0.0])
    assert insertion_curve(evaluate, [0, 2, 1]) == pytest.approx([0.0, 0.5, 0.8, 1.0])


def test_area_runs_from_0_to_1():
    assert area_under_curve([1.0, 0.0]) == 0.5
    assert area_under_curve([1.0, 0.5, 0.2, 0.0]) == pytest.approx((0.75 + 0.35 + 0.1) / 3)
    assert area_under_curve(torch.full((11,), 0.25)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average_precision([1.0, 2.0], [True]), r"relevant must have one entry per score \(2\), got 1"),
        (lambda: average_precision([1.0, math.nan], [True, False]), "scores must be finite; entry 1 is not"),
        (lambda: average_precision([1.0], [False]), "relevant must mark at least one unit"),
        (lambda: average_precision([1.0], [2.0]), "relevant must hold true and false only"),
        (lambda: average_precision([], []), "scores must be a list of at least one number"),
        (lambda: soft_precision(-torch.ones(2, 2), torch.ones(2, 2)), "relevance must hold finite numbers"),
        (lambda: soft_recall(torch.ones(2, 2), torch.ones(2, 3)), r"mask must have the shape of relevance \[2, 2\]"),
        (lambda: soft_recall(torch.ones(2, 2), torch.zeros(2, 2)), r"mask must lie in \[0, 1\] and mark something"),
        (lambda: interquartile_mean([]), "values must be a list of at least one number"),
        (lambda: deletion_curve(lambda _: 0.0, [1, 1]), "order must hold at least one unit index, none negative"),
        (lambda: deletion_curve(lambda _: 0.0, []), "order must hold at least one unit index"),
        (
            lambda: insertion_curve(lambda _: math.nan, [0]),
            "evaluate must return a finite number, got nan with 1 units",
        ),
        (lambda: area_under_curve([1.0]), "values must hold at least two points, got 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
