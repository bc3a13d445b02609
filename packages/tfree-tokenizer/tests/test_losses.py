"""Embedding and objectives in float64 against loops and dense multi-hot targets."""

import math

import pytest
import torch
import torch.nn.functional as F

from tfree_tokenizer import (
    HashSpec,
    build_factored_dictionary,
    dictionary_loss,
    embed_words,
    multilabel_loss,
    word_pattern,
)
from tfree_tokenizer.remote.losses_tfree import composed_softmax_loss, sample_words

SPEC = HashSpec(hash_vocab_size=48, num_hashes=4, num_lowercase=1, hash_scheme="md5")
WORDS = ["house", "Houses", "aaaa", "tree", "<|ws|>", "naïve", "x", "internationalization"]


@pytest.fixture
def dictionary():
    return build_factored_dictionary(WORDS, SPEC, {4})


def multi_hot(words=WORDS):
    target = torch.zeros(len(words), 48, dtype=torch.float64)
    for i, word in enumerate(words):
        target[i, list(word_pattern(word, SPEC).active)] = 1
    return target


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("normalization", [False, True])
def test_embedding_is_the_double_loop_and_so_is_its_gradient(dictionary, aggregation, normalization):
    table = torch.randn(48, 5, dtype=torch.float64, requires_grad=True)
    expected = []
    for word in WORDS:
        pattern = word_pattern(word, SPEC)
        total = sum(table[int(row)] for row in pattern.rows)
        total = total / 4 if aggregation == "mean" else total
        expected.append(total / pattern.num_trigrams if normalization else total)
    weights = torch.randn(len(WORDS), 5, dtype=torch.float64)
    ours = embed_words(dictionary, table, aggregation=aggregation, normalization=normalization)
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad((torch.stack(expected) * weights).sum(), table)
    (got,) = torch.autograd.grad((ours * weights).sum(), table)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def dense_loss(z, target, pos_weight, weight, divisor, scale):
    each = F.binary_cross_entropy_with_logits(z, target, pos_weight=torch.tensor(pos_weight), reduction="none")
    return scale * (each * weight[:, None]).sum() / divisor


@pytest.mark.parametrize("normalization", ["all", "active", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_multilabel_loss_is_dense_bce(dictionary, normalization, weighted):
    z = torch.randn(len(WORDS), 48, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(WORDS), dtype=torch.float64) if weighted else torch.ones(len(WORDS), dtype=torch.float64)
    divisor = {"all": z.numel(), "active": float(weight.sum()) * 48, "sum": 1.0}[normalization]
    expected = dense_loss(z, multi_hot(), 300.0, weight, divisor, 100.0)
    ours = multilabel_loss(
        z, *dictionary.active_rows(), pos_weight=300.0, scale=100.0, normalization=normalization, row_weight=weight
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, z)[0], torch.autograd.grad(expected, z)[0], rtol=1e-10, atol=1e-12
    )


def test_multilabel_loss_of_nothing_is_zero_with_zero_gradient(dictionary):
    z = torch.randn(len(WORDS), 48, requires_grad=True)
    loss = multilabel_loss(z, *dictionary.active_rows(), row_weight=torch.zeros(len(WORDS)))
    loss.backward()
    assert loss.item() == 0.0
    assert z.grad.abs().max() == 0.0


def test_unknown_normalization_is_refused(dictionary):
    with pytest.raises(ValueError, match="normalization must be one of"):
        multilabel_loss(torch.randn(len(WORDS), 48), *dictionary.active_rows(), normalization="mean")


def test_dictionary_loss_is_a_softmax_over_summed_rows(dictionary):
    z = torch.randn(6, 48, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 3, 7, 4, 1])
    expected = F.cross_entropy(z @ multi_hot().T / 4, targets)
    ours = dictionary_loss(z, dictionary, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, z)[0], torch.autograd.grad(expected, z)[0], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("chunk", [None, 3])
def test_composed_softmax_equals_dictionary_loss(dictionary, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr("tfree_tokenizer.remote.losses_tfree._LOGITS_PER_CHUNK", chunk * len(WORDS))
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(48, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 3, 7, 4, 1, 2])
    expected = dictionary_loss(hidden @ head.T, dictionary, targets) * 7
    outputs = multi_hot() @ head / 4
    ours = composed_softmax_loss(hidden, outputs, targets, outputs[targets], torch.arange(len(WORDS)))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, (hidden, head))
    for got, want in zip(torch.autograd.grad(ours, (hidden, head)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_sampled_words_keep_the_expected_partition_sum():
    scores = torch.linspace(2, -2, 400, dtype=torch.float64)
    estimates, sizes = [], []
    for _ in range(400):
        words, log_inclusion = sample_words(400, 10, 60)
        estimates.append(float((scores[words] - log_inclusion).exp().sum()))
        sizes.append(len(words) - 10)
    exact = float(scores.exp().sum())
    assert abs(sum(sizes) / 400 - 60) < 2
    assert abs(sum(estimates) / 400 - exact) < 4 * torch.tensor(estimates).std().item() / math.sqrt(400)
