import math

import pytest
import torch

from shared_kernels import decode_scores, decode_topk
from shared_kernels.decode_scores.eager import decode_scores_eager
from shared_kernels.decode_scores.reference import decode_scores_reference, decode_topk_reference
from shared_kernels.testing import random_dictionary, tolerances

MODES = ["mean", "contrast", "loglik"]
SHAPES = [
    pytest.param(1, 1, 1, 1, 1, 1, id="smallest"),
    pytest.param(23, 40, 30, 4, 7, 3, id="no-power-of-two"),
    pytest.param(140, 30, 64, 3, 4, 9, id="two-blocks-of-words-and-rows"),
    pytest.param(6, 3, 9, 2, 2, 1, id="short-words"),
    pytest.param(5, 20, 8, 4, 9, 2, id="more-rows-than-the-table"),
    pytest.param(3, 5, 8, 2, 0, 2, id="words-without-units"),
    pytest.param(0, 3, 4, 2, 2, 2, id="no-words"),
    pytest.param(4, 6, 8, 2, 3, 0, id="no-batch"),
]
LOWEST = torch.finfo(torch.float32).min


def assert_scores(actual, expected, **tolerance):
    has_units = expected > LOWEST / 2
    torch.testing.assert_close(actual[has_units].double(), expected[has_units], **tolerance)
    assert (actual[~has_units] == torch.finfo(actual.dtype).min).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("W", "U", "V", "m", "longest", "B"), SHAPES)
def test_scores_equal_the_definition_by_sets(run, W, U, V, m, longest, B, mode):
    words = random_dictionary(W, U, V, m, longest)
    z = 3 * torch.randn(B, V)
    for edge_weight in (1.0, 0.8, 0.0) if mode != "loglik" else (0.8,):
        settings = {"mode": mode, "edge_weight": edge_weight, "pos_weight": 30.0, "temperature": 0.5}
        expected = decode_scores_reference(z, *words[:4], **settings)
        actual = run(decode_scores, z, *words, **settings)
        assert actual.dtype == torch.float32
        assert actual.shape == (B, W)
        assert_scores(actual, expected, rtol=1e-4, atol=1e-3 if mode == "loglik" else 1e-4)


def test_lists_may_be_int64(run):
    words, z = random_dictionary(23, 40, 30, 4, 7, torch.int64), torch.randn(2, 30)
    expected = decode_scores_reference(z, *words[:4], mode="contrast", edge_weight=0.8)
    assert_scores(run(decode_scores, z, *words, mode="contrast", edge_weight=0.8), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_float64_logits_are_scored_in_float64(mode):
    words, z = random_dictionary(23, 40, 30, 4, 7), torch.randn(2, 30, dtype=torch.float64)
    settings = {"mode": mode, "edge_weight": 0.8, "pos_weight": 30.0, "temperature": 0.1}
    actual = decode_scores(z, *words, **settings)
    assert actual.dtype == torch.float64
    assert_scores(actual, decode_scores_reference(z, *words[:4], **settings), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_scored_in_float32(run, dtype):
    words, z = random_dictionary(23, 40, 30, 4, 7), torch.randn(2, 30).to(dtype)
    assert torch.equal(
        run(decode_scores, z, *words, mode="contrast"), run(decode_scores, z.float(), *words, mode="contrast")
    )


def test_a_row_in_two_units_counts_once_and_in_both_sets_twice(run):
    rows = torch.tensor([[0, 1], [1, 2], [2, 3]])
    lists = (torch.tensor([0, 3]), torch.tensor([0, 1, 2]), torch.tensor([1], dtype=torch.uint8), rows)
    # inner {0, 1, 2} holds row 1 twice, edge {2, 3} shares row 2
    corrections = (torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0, 2], dtype=torch.uint8))
    z = torch.zeros(1, 8)
    for mode, score in (("mean", (3 + 2 * 0.5) * 0.5 / 6), ("loglik", -4 * math.log(2.0))):
        out = run(decode_scores, z, *lists, *corrections, mode=mode, edge_weight=0.5, pos_weight=2.0)
        assert out.item() == pytest.approx(score, rel=1e-6)


def test_a_batch_scores_like_its_rows_one_by_one(run):
    words, z = random_dictionary(30, 20, 25, 3, 6), torch.randn(9, 25)
    batch = run(decode_scores, z, *words, mode="contrast")
    for b in range(9):
        row = run(decode_scores, z[b : b + 1], *words, mode="contrast")
        torch.testing.assert_close(batch[b : b + 1], row, **tolerances(torch.float32, 18))


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_equals_that_of_the_definition(run, mode):
    words = random_dictionary(23, 40, 30, 4, 7)
    settings = {"mode": mode, "edge_weight": 0.8, "pos_weight": 30.0, "temperature": 0.5}
    z = torch.randn(3, 30, requires_grad=True)
    grad = torch.randn(3, 23)
    actual, expected = (
        torch.autograd.grad(scores, z, grad.to(scores.dtype))[0]
        for scores in (run(decode_scores, z, *words, **settings), decode_scores_reference(z, *words[:4], **settings))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_has_the_same_bits_every_time(run):
    words, z = random_dictionary(60, 9, 12, 3, 5), torch.randn(2, 12, requires_grad=True)
    grad = torch.randn(2, 60)
    first, second = (torch.autograd.grad(run(decode_scores, z, *words, mode="contrast"), z, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_agrees_with_finite_differences(mode):
    words, z = random_dictionary(6, 8, 9, 2, 4), torch.randn(2, 9, dtype=torch.float64, requires_grad=True)

    def function(z):
        return decode_scores_eager(z, *words, mode=mode, edge_weight=0.5).clamp_min(-1e9)

    assert torch.autograd.gradcheck(function, (z,))


@pytest.fixture
def small_blocks(run, monkeypatch):
    """Both implementations cut these small dictionaries into several blocks."""
    from shared_kernels.decode_scores import eager

    monkeypatch.setattr(eager, "_BLOCK_SCORES", 32)
    if run.impl == "triton":
        from shared_kernels.decode_scores import kernel

        monkeypatch.setattr(kernel, "TOPK_WORDS", 16)
        monkeypatch.setattr(kernel, "LARGEST_BLOCK_K", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 8, 20])
def test_topk_equals_a_full_stable_sort_with_ties(run, k, masked):
    words = random_dictionary(50, 6, 8, 2, 2)  # few patterns, hence many equal scores
    mask = torch.rand(50) < 0.6 if masked else None
    z = torch.randn(3, 8)
    settings = {"mode": "contrast", "edge_weight": 0.5, "temperature": 0.1}
    values, indices, logsumexp = run(decode_topk, z, *words, k, word_mask=mask, **settings)
    scores = run(decode_scores, z, *words, **settings)
    assert scores[0].unique().numel() < 40
    expected = decode_topk_reference(scores, k, mask)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(logsumexp, expected[2], **tolerances(torch.float32, 50))


@pytest.mark.usefixtures("small_blocks")
def test_topk_of_hardly_any_allowed_words_fills_up_with_masked_ones_in_order(run):
    words, mask = random_dictionary(40, 9, 12, 2, 3), torch.zeros(40, dtype=torch.bool)
    mask[33] = True
    values, indices, logsumexp = run(decode_topk, torch.randn(1, 12), *words, 4, mode="mean", word_mask=mask)
    assert indices.tolist() == [[33, 0, 1, 2]]
    assert values[0, 1:].eq(-math.inf).all()
    torch.testing.assert_close(logsumexp, values[:, 0])


@pytest.mark.usefixtures("small_blocks")
def test_logits_that_are_not_a_number_do_not_pass_unnoticed(run):
    words, z = random_dictionary(40, 9, 12, 2, 3), torch.full((1, 12), math.nan)
    _, indices, logsumexp = run(decode_topk, z, *words, 4, mode="mean")
    assert indices.shape == (1, 4)
    assert indices.lt(40).all()
    assert logsumexp.isnan().all()


def test_the_order_of_the_dictionary_does_not_matter(run):
    words, z = random_dictionary(20, 30, 25, 3, 6), torch.randn(2, 25)
    order = torch.randperm(20)
    shuffled = _reordered(words, order)
    original = run(decode_scores, z, *words, mode="contrast", edge_weight=0.5)
    actual = run(decode_scores, z, *shuffled, mode="contrast", edge_weight=0.5)
    torch.testing.assert_close(actual, original[:, order])


def _reordered(words, order):
    def pick(bounds, *lists):
        parts = [slice(int(bounds[w]), int(bounds[w + 1])) for w in order]
        new_bounds = torch.tensor([0, *(part.stop - part.start for part in parts)]).cumsum(0).to(bounds.dtype)
        return new_bounds, *(torch.cat([each[part] for part in parts]) for each in lists)

    word_ptr, word_units = pick(words.word_ptr, words.word_units)
    corrections = pick(words.correction_ptr, words.correction_rows, words.correction_kinds)
    return word_ptr, word_units, words.word_edges[order], words.unit_rows, *corrections


@pytest.mark.triton
def test_the_operators_are_well_registered():
    from shared_kernels.decode_scores.op import _decode_scores, _decode_topk

    words, x = random_dictionary(5, 6, 8, 2, 3), torch.rand(2, 8, requires_grad=True)
    torch.library.opcheck(_decode_scores, (x, *words, "contrast", 0.5, 1.0))
    torch.library.opcheck(_decode_topk, (x.detach(), *words, None, 2, "mean", 0.5, 1.0))


def test_a_compiled_graph_has_no_breaks_and_the_same_gradient(impl):
    words, z = random_dictionary(12, 9, 10, 2, 4), torch.randn(2, 10, requires_grad=True)

    def function(z):
        return decode_scores(z, *words, mode="contrast", edge_weight=0.5, impl=impl).clamp_min(-9.0).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z), torch.autograd.grad(function(z), z))


def test_a_compiled_topk_has_no_breaks(impl):
    words, z = random_dictionary(12, 9, 10, 2, 4), torch.randn(2, 10)

    def function(z):
        return decode_topk(z, *words, 3, mode="loglik", impl=impl)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(z), function(z))


def test_an_exported_program_takes_another_batch():
    words = random_dictionary(12, 9, 10, 2, 4)

    class Module(torch.nn.Module):
        def forward(self, z):
            return decode_scores(z, *words, mode="contrast")

    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(Module(), (torch.randn(3, 10),), dynamic_shapes=shapes)
    z = torch.randn(5, 10)
    torch.testing.assert_close(program.module()(z), decode_scores(z, *words, mode="contrast"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(8)}, r"z must have the shape \[B, V\], got \(8,\)"),
        (
            {"word_edges": torch.zeros(3, dtype=torch.uint8)},
            r"word_edges must have the shape \(5,\), one number per word",
        ),
        ({"word_edges": torch.zeros(5)}, "word_edges must be torch.uint8, got torch.float32"),
        ({"correction_ptr": torch.zeros(2).int()}, "correction_ptr must hold 6 numbers"),
        ({"mode": "best"}, r"mode must be one of \('mean', 'contrast', 'loglik'\), got 'best'"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"pos_weight": -2.0}, "pos_weight must be finite and above 0, got -2.0"),
        ({"edge_weight": math.inf}, "edge_weight must be finite, got inf"),
        ({"k": 6}, r"k must lie in \[1, 5\] \(the number of words\), got 6"),
        ({"k": 0}, r"k must lie in \[1, 5\] \(the number of words\), got 0"),
        ({"word_mask": torch.ones(5)}, "word_mask must be torch.bool, got torch.float32"),
        ({"word_mask": torch.ones(4).bool()}, r"word_mask must have the shape \(5,\), one number per word, got \(4,\)"),
    ],
)
def test_an_error_names_the_argument(change, message):
    arguments = {"z": torch.zeros(1, 8), **random_dictionary(5, 6, 8, 2, 3)._asdict(), "k": 2, "mode": "mean"}
    with pytest.raises(ValueError, match=message):
        decode_topk(**(arguments | change))
