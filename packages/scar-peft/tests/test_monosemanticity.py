"""Stumps and trees against scikit-learn, the score against cases computed by hand."""

import sys

import pytest
import torch

from scar_peft import monosemanticity
from scar_peft.monosemanticity import (
    TreeLevel,
    best_stumps,
    fms,
    fms_from_accuracies,
    smallest_tree,
    tree_levels,
)

peer = pytest.importorskip("sklearn.tree")


def case(rows=120, n=6, noise=1.0):
    labels = (torch.rand(2 * rows) < 0.4).long()
    latents = torch.relu(torch.randn(2 * rows, n))
    latents[:, 3] += noise * labels * torch.rand(2 * rows)
    return latents[:rows], labels[:rows], latents[rows:], labels[rows:]


def sklearn_stump(train, labels, test, truth, column):
    tree = peer.DecisionTreeClassifier(max_depth=1).fit(train[:, [column]], labels)
    return tree.tree_.threshold[0], tree.score(test[:, [column]], truth)


def test_stumps_equal_those_of_scikit_learn():
    data = case()
    stumps = best_stumps(*data)
    for column in range(6):
        threshold, accuracy = sklearn_stump(*data, column)
        assert stumps.threshold[column].item() == pytest.approx(threshold, rel=1e-6)
        assert stumps.test_accuracy[column].item() == pytest.approx(accuracy)


def test_no_threshold_or_direction_beats_the_stump_of_greatest_accuracy():
    train, labels, test, truth = case(rows=25)
    stumps = best_stumps(train, labels, test, truth, criterion="accuracy")
    for column in range(6):
        cuts = [train[:, column].min().item() - 1, *train[:, column].tolist()]
        shares = [((train[:, column] > cut) == (labels == 1)).float().mean().item() for cut in cuts]
        assert stumps.train_accuracy[column].item() == pytest.approx(max(*shares, 1 - min(shares)))
    assert (stumps.criterion == stumps.train_accuracy).all()


def test_a_stump_may_predict_the_concept_below_its_threshold():
    latents = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    stumps = best_stumps(latents, [1, 1, 0, 0], latents, [1, 1, 0, 0])
    assert [each.item() for each in stumps] == [1.5, 0, 1, 0.0, 1.0, 1.0]


def test_a_dead_latent_predicts_the_majority():
    stumps = best_stumps(torch.zeros(5, 1), [1, 1, 1, 0, 0], torch.ones(4, 1) * 0, [1, 0, 0, 0])
    assert (stumps.train_accuracy.item(), stumps.test_accuracy.item()) == (0.6, 0.25)


def test_chunks_change_nothing(monkeypatch):
    data = case()
    whole = best_stumps(*data)
    monkeypatch.setattr(monosemanticity, "_CELLS_PER_CHUNK", 240)
    assert all(torch.equal(a, b) for a, b in zip(best_stumps(*data), whole, strict=True))


def test_levels_are_trees_of_limited_depth():
    data = case()
    levels = tree_levels(*data)
    train, labels, test, truth = data
    assert [each.depth for each in levels] == list(range(1, len(levels) + 1))
    for level in levels[:3]:
        tree = peer.DecisionTreeClassifier(max_depth=level.depth, random_state=0).fit(train, labels)
        assert level.accuracy == pytest.approx(tree.score(test, truth))
        assert level.nodes == tree.tree_.node_count - tree.get_n_leaves()
    full = peer.DecisionTreeClassifier(random_state=0).fit(train, labels)
    assert (levels[-1].depth, levels[-1].nodes) == (full.get_depth(), full.tree_.node_count - full.get_n_leaves())
    assert levels[-1].accuracy == pytest.approx(full.score(test, truth))
    assert len(tree_levels(*data, max_depth=2)) == 2


def test_smallest_tree_is_the_first_that_is_good_enough():
    levels = [TreeLevel(1, 1, 0.8, 0.7), TreeLevel(2, 3, 0.9, 0.9), TreeLevel(3, 7, 0.9, 0.95)]
    assert smallest_tree(levels, 0.9) == levels[1]
    assert smallest_tree(levels, 0.99) is None


@pytest.mark.parametrize(
    ("accs_0", "accs_p", "accs_cum", "expected"),
    [
        (1.0, 0.5, [1.0], (1.0, 1.0, 1.0)),
        (0.9, 0.9, [0.9, 0.9], (0.45, 0.0, 1.0)),
        (0.8, 0.7, [0.8, 0.9, 1.0], (0.8 * (0.2 + 0.9) / 2, 0.2, 0.9)),
        (0.9, 0.2, [0.9], (0.9, 1.0, 1.0)),  # 2 (0.9 - 0.2) is clipped
        (0.6, 0.7, [0.5], (0.3, 0.0, 1.0)),  # -0.2 and 1.1 are clipped
    ],
)
def test_score_by_hand(accs_0, accs_p, accs_cum, expected):
    assert fms_from_accuracies(accs_0, accs_p, accs_cum) == pytest.approx(expected)


def test_a_concept_of_one_latent_is_monosemantic():
    labels = torch.arange(80) % 2
    latents = torch.rand(80, 5)
    latents[:, 2] = labels + 0.1 * torch.rand(80)
    result = fms(latents[:40], labels[:40], latents[40:], labels[40:])
    assert (result.latent, result.accs_0, result.accs_cum) == (2, 1.0, [1.0])
    assert result.fms[1] == pytest.approx((min(2 * (1 - result.accs_p[1]), 1) + 1) / 2)
    assert result.fms[1] > 0.7


def test_a_concept_that_is_held_twice_is_not():
    labels = torch.arange(80) % 2
    latents = torch.rand(80, 5)
    latents[:, [1, 3]] = labels[:, None] + 0.1 * torch.rand(80, 2)
    result = fms(latents[:40], labels[:40], latents[40:], labels[40:], removed=(1, 2))
    assert (result.accs_p[1], result.fms[1]) == (1.0, 0.5)
    assert result.fms[2] > result.fms[1]


def test_accuracies_are_those_of_refitted_roots():
    """Removing the root and fitting again is what the definition says; ranking once gives the same."""
    train, labels, test, truth = case()
    result = fms(train, labels, test, truth, removed=(1, 3))
    left, expected = list(range(6)), []
    for _ in range(4):
        tree = peer.DecisionTreeClassifier(max_depth=1).fit(train[:, left], labels)
        expected.append(tree.score(test[:, left], truth))
        left.pop(tree.tree_.feature[0])
    assert result.accs_0 == pytest.approx(expected[0])
    assert result.accs_p == {1: pytest.approx(expected[1]), 3: pytest.approx(expected[3])}
    assert result.accs_cum == [each.accuracy for each in tree_levels(train, labels, test, truth)]


def test_result_is_json():
    result = fms(*case()).to_dict()
    assert result["fms"].keys() == {"1"}
    assert result["latent"] == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a, b, c, d: best_stumps(a, b, c[:, :2], d),
            r"test_latents must have shape \[rows, latents\].* got \[120, 2\]",
        ),
        (lambda a, b, c, d: best_stumps(a[:0], b[:0], c, d), r"train_latents must have shape .* got \[0, 6\]"),
        (
            lambda a, b, c, d: best_stumps(a, b[:5], c, d),
            r"train_labels must have one entry per row \(120\), got shape \[5\]",
        ),
        (lambda a, b, c, d: best_stumps(a, b, c, d - 1), r"test_labels must be 0 or 1"),
        (lambda a, b, c, d: best_stumps(a / 0, b, c, d), r"train_latents must be finite"),
        (lambda a, b, c, d: best_stumps(a, b, c, d, criterion="entropy"), r"criterion must be one of .* got 'entropy'"),
        (lambda a, b, c, d: fms(a, b, c, d, removed=(6,)), r"removed must hold numbers in \[1, 5\].* got \[6\]"),
        (lambda a, b, c, d: tree_levels(a, b * 0, c, d), r"train_labels must hold both classes to grow a tree"),
        (
            lambda a, b, c, d: fms_from_accuracies(1.2, 0.5, [1.0]),
            r"accs_0, accs_p and accs_cum must hold .* got 1.2, 0.5",
        ),
        (lambda a, b, c, d: fms_from_accuracies(1.0, 0.5, []), r"at least one each, got 1.0, 0.5 and \[\]"),
    ],
)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(*case())


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.tree", None)
    with pytest.raises(ImportError, match=r"Decision trees need scikit-learn: pip install scar-peft\[evaluation\]"):
        fms(*case())
