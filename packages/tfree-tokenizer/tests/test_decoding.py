"""Word scores in every mode against dense 0/1 matrices in float64."""

import math

import pytest
import torch

from tfree_tokenizer import HashSpec, build_factored_dictionary, dictionary_scores, dictionary_topk, word_pattern
from tfree_tokenizer.remote.decoding_tfree import sum_active_rows

SPEC = HashSpec(hash_vocab_size=40, num_hashes=4, hash_scheme="md5")
WORDS = ["house", "Houses", None, "aaaa", "tree", "<|ws|>", "naïve", "x", "internationalization", "ab"]
MODES = ["mean", "contrast", "loglik"]


@pytest.fixture
def dictionary():
    return build_factored_dictionary(WORDS, SPEC, {5})


def dense_scores(z, mode, edge_weight, pos_weight, temperature):
    p, scores = z.sigmoid(), torch.full((z.shape[0], len(WORDS)), torch.finfo(z.dtype).min, dtype=z.dtype)
    for i, word in enumerate(WORDS):
        if word is None:
            continue
        pattern = word_pattern(word, SPEC)
        size = pattern.num_trigrams * 4
        s = p[:, list(pattern.inner)].sum(1) + edge_weight * p[:, list(pattern.edge)].sum(1)
        if mode == "mean":
            scores[:, i] = s / size
        elif mode == "contrast":
            scores[:, i] = s / size + (s - p.sum(1)) / max(40 - size, 1)
        else:
            scores[:, i] = (z[:, list(pattern.active)] - math.log(pos_weight)).sum(1)
        scores[:, i] /= temperature
    return scores


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("edge_weight", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("mode", MODES)
def test_scores_equal_the_dense_definition(dictionary, mode, edge_weight, batch):
    z = torch.randn(batch, 40, dtype=torch.float64) * 3
    settings = {"mode": mode, "edge_weight": edge_weight, "pos_weight": 30.0, "temperature": 0.5}
    expected = dense_scores(z, **settings)
    torch.testing.assert_close(dictionary_scores(z, dictionary, **settings), expected, rtol=1e-12, atol=1e-12)
    differentiable = dictionary_scores(z.requires_grad_(), dictionary, **settings)
    torch.testing.assert_close(differentiable, expected, rtol=1e-12, atol=1e-12)
    single = dictionary_scores(z.detach().float(), dictionary, **settings)
    torch.testing.assert_close(single.double()[:, :2], expected[:, :2], rtol=1e-5, atol=1e-5)


def test_scores_are_differentiable(dictionary):
    z = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([i for i, word in enumerate(WORDS) if word is not None])
    for mode in MODES:
        assert torch.autograd.gradcheck(
            lambda x, mode=mode: dictionary_scores(x, dictionary, mode=mode, edge_weight=0.7)[:, keep], (z,)
        )


def test_every_row_of_a_batch_is_scored_by_its_own_logits(dictionary):
    z = torch.randn(5, 40)
    together = dictionary_scores(z, dictionary)
    alone = torch.cat([dictionary_scores(row[None], dictionary) for row in z])
    torch.testing.assert_close(together, alone)


def test_order_of_the_dictionary_does_not_matter():
    z = torch.randn(2, 40, dtype=torch.float64)
    words = [word for word in WORDS if word is not None]
    order = [3, 1, 4, 0, 8, 5, 7, 2, 6]
    shuffled = [words[i] for i in order]
    a = dictionary_scores(z, build_factored_dictionary(words, SPEC, {words.index("<|ws|>")}))
    b = dictionary_scores(z, build_factored_dictionary(shuffled, SPEC, {shuffled.index("<|ws|>")}))
    torch.testing.assert_close(a[:, order], b, rtol=1e-12, atol=1e-12)


def test_a_pattern_larger_than_the_table_stays_finite():
    spec = HashSpec(hash_vocab_size=8, num_hashes=4)
    long = build_factored_dictionary(["internationalization", "no"], spec)
    assert dictionary_scores(torch.randn(1, 8), long, mode="contrast").isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_topk_equals_a_full_sort_with_exact_log_probabilities(dictionary, mode):
    z = torch.randn(3, 40, dtype=torch.float64)
    scores = dictionary_scores(z, dictionary, mode=mode)
    values, words, total = dictionary_topk(z, dictionary, 4, mode=mode)
    expected = scores.sort(1, descending=True)
    assert torch.equal(words, expected.indices[:, :4])
    torch.testing.assert_close(values, expected.values[:, :4])
    torch.testing.assert_close(total, scores.logsumexp(1))


def test_topk_leaves_masked_words_out(dictionary):
    z = torch.randn(2, 40)
    mask = torch.ones(len(WORDS), dtype=torch.bool)
    best = dictionary_scores(z, dictionary).argmax(1)
    mask[best] = False
    _, words, total = dictionary_topk(z, dictionary, 3, word_mask=mask)
    assert not set(words.ravel().tolist()) & set(best.tolist())
    allowed = dictionary_scores(z, dictionary).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(total, allowed.logsumexp(1))


def test_summing_active_rows_counts_each_row_once(dictionary):
    table = torch.randn(40, 3, dtype=torch.float64)
    sums = sum_active_rows(dictionary, table)
    for i, word in enumerate(WORDS):
        rows = [] if word is None else list(word_pattern(word, SPEC).active)
        torch.testing.assert_close(sums[i], table[rows].sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "mode must be one of"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be finite and above 0"),
        ({"pos_weight": float("nan")}, "pos_weight must be finite and above 0"),
        ({"edge_weight": -0.1}, "edge_weight must be finite and at least 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(dictionary, settings, message):
    with pytest.raises(ValueError, match=message):
        dictionary_scores(torch.randn(1, 40), dictionary, **settings)
    with pytest.raises(ValueError, match=message):
        dictionary_topk(torch.randn(1, 40), dictionary, 1, **settings)


def test_wrong_shapes_are_refused(dictionary):
    with pytest.raises(ValueError, match=r"row_logits must be a floating-point tensor \[B, v\]"):
        dictionary_scores(torch.randn(40), dictionary)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 10\]"):
        dictionary_topk(torch.randn(1, 40), dictionary, 11)
