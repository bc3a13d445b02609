"""The sparse coder against its definition, on rows that are easy and rows that are not."""

import math

import numpy as np
import pytest
import torch

from scar_peft.coder import (
    ACTIVATIONS,
    CoderWeights,
    activate,
    concept_pre_activations,
    decode,
    encode,
    fold_concepts,
    kept_latents,
    latents_of,
    pre_activations,
    reconstruct,
    standardize,
)
from tests.support import scar

D, N_LATENTS, ROWS = 11, 23, 7
EXACT = {"rtol": 1e-9, "atol": 1e-9}
by_activation = pytest.mark.parametrize("activation", ["topk", "topk-sigmoid", "topk-tanh"])


def case(d=D, n=N_LATENTS, rows=ROWS, dtype=torch.float64):
    book = scar.random_weights(d, n)
    xs = np.random.default_rng(1).normal(size=(rows, d)) * 3 + 1
    return book, xs, CoderWeights(*(torch.tensor(each, dtype=dtype) for each in book)), torch.tensor(xs, dtype=dtype)


def test_standardize_golden():
    values, mean, std = standardize(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), eps=0.0)
    assert (mean.item(), std.item()) == (2.5, pytest.approx(1.2909944487, abs=1e-10))
    assert values.tolist() == pytest.approx([-1.1618950, -0.3872983, 0.3872983, 1.1618950], abs=1e-7)
    shrunk = standardize(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)).values
    assert shrunk.tolist() == pytest.approx([-1.1618860, -0.3872953, 0.3872953, 1.1618860], abs=1e-7)


def test_without_normalization_rows_stay_as_they_are():
    values, mean, std = standardize(torch.tensor([[5.0, 1.0]]), normalize=False)
    assert (values.tolist(), mean.tolist(), std.tolist()) == ([[5.0, 1.0]], [[0.0]], [[1.0]])


@by_activation
@pytest.mark.parametrize("always", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 5, N_LATENTS - 3])
def test_matches_the_definition(activation, always, k):
    book, xs, weights, x = case()
    latents = encode(x, weights, k=k, activation=activation, always=always)
    rows = reconstruct(x, weights, k=k, activation=activation, always=always)
    for i, each in enumerate(xs):
        token = scar.code_token(each, book, k, activation, always)
        np.testing.assert_allclose(pre_activations(x, weights)[i].numpy(), token.pre, **EXACT)
        np.testing.assert_allclose(latents[i].numpy(), token.latents, **EXACT)
        np.testing.assert_allclose(rows[i].numpy(), token.reconstruction, **EXACT)


def test_matches_the_definition_without_normalization():
    book, xs, weights, x = case()
    rows = reconstruct(x, weights, k=4, normalize=False)
    expected = [scar.code_token(each, book, 4, normalize=False).reconstruction for each in xs]
    np.testing.assert_allclose(rows.numpy(), np.stack(expected), **EXACT)


def test_leading_axes_are_free():
    _, _, weights, x = case(rows=12)
    flat = reconstruct(x, weights, k=4)
    assert torch.equal(reconstruct(x.view(2, 3, 2, D), weights, k=4).view(12, D), flat)
    assert reconstruct(x[0], weights, k=4).shape == (D,)
    assert reconstruct(x[:0], weights, k=4).shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    _, _, weights, x = case()
    narrow = CoderWeights(*(each.to(dtype) for each in weights))
    latents = encode(x.to(dtype), narrow, k=5)
    assert latents.dtype == torch.float32
    wide = encode(x.to(dtype).float(), CoderWeights(*(each.float() for each in narrow)), k=5)
    assert torch.equal(latents, wide)


def test_half_precision_statistics_do_not_overflow():
    x = torch.full((4096,), 4.0, dtype=torch.float16) * torch.tensor([1.0, -1.0], dtype=torch.float16).repeat(2048)
    assert standardize(x).std.item() == pytest.approx(4.0, rel=1e-3)


def test_autocast_changes_nothing():
    _, _, weights, x = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reconstruct(x, weights, k=5)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, reconstruct(x, weights, k=5))


@pytest.mark.parametrize(
    ("pre", "k", "expected"),
    [
        ([1.0, 3.0, 3.0, 3.0], 2, [False, True, True, False]),
        ([0.0, 0.0, 0.0, 0.0], 1, [True, False, False, False]),
        ([0.0, -0.0, 0.0, -0.0], 3, [True, True, True, False]),
        ([-3.0, -1.0, -2.0, -1.0], 1, [False, True, False, False]),
        ([1.0, 2.0, 3.0, 4.0], 4, [True, True, True, True]),
    ],
    ids=["three-tied-for-two", "all-tied", "signed-zeros", "negative", "k-is-n"],
)
def test_of_equal_pre_activations_the_first_are_kept(pre, k, expected):
    assert kept_latents(torch.tensor(pre), k).tolist() == expected


def test_kept_values_are_those_of_topk():
    pre = torch.randint(4, (50, 30)).double()
    for k in (1, 7, 30):
        kept = kept_latents(pre, k)
        assert (kept.sum(-1) == k).all()
        assert torch.equal(pre[kept].view(50, k).sort(-1, descending=True).values, pre.topk(k).values)


def test_the_first_latents_can_be_kept_beside_the_k_largest():
    pre = torch.tensor([-9.0, -8.0, 1.0, 3.0, 2.0])
    assert kept_latents(pre, 2, always=2).tolist() == [True, True, False, True, True]
    assert kept_latents(pre, 1, always=1).tolist() == [True, False, False, True, False]
    assert kept_latents(pre, 4, always=3).all()  # two are left for four places
    assert kept_latents(pre, 1, always=5).all()


def test_a_kept_negative_pre_activation_is_off_with_relu_and_on_with_sigmoid():
    pre = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    assert latents_of(pre, k=1).tolist() == [0.0, 0.0]
    assert latents_of(pre, k=1, activation="topk-sigmoid").tolist() == pytest.approx([1 / (1 + math.e), 0.0])
    assert latents_of(pre, k=1, activation="topk-tanh").tolist() == pytest.approx([math.tanh(-1), 0.0])


def test_relu_selects_nothing():
    assert latents_of(torch.tensor([-1.0, 2.0, 3.0]), k=None, activation="relu").tolist() == [0.0, 2.0, 3.0]


def test_rows_do_not_see_each_other():
    _, _, weights, x = case()
    together, order = reconstruct(x, weights, k=5), torch.randperm(ROWS)
    torch.testing.assert_close(reconstruct(x[order], weights, k=5), together[order], rtol=1e-14, atol=1e-14)
    alone = torch.stack([reconstruct(row, weights, k=5) for row in x])
    torch.testing.assert_close(alone, together, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("row", [torch.zeros(D), torch.full((D,), 7.5)], ids=["zeros", "constant"])
def test_a_row_without_spread_is_its_own_reconstruction(row):
    _, _, weights, _ = case(dtype=torch.float32)
    row = row.requires_grad_()
    assert standardize(row).values.eq(0).all()
    out = reconstruct(row, weights, k=5)
    assert torch.equal(out, row)
    out.sum().backward()
    assert row.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_row_and_show(bad):
    _, _, weights, x = case()
    x[2, 3] = bad
    out = reconstruct(x, weights, k=5)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4, 5, 6]].isfinite().all()
    assert encode(x, weights, k=5)[2].isnan().any()


@pytest.mark.parametrize("concepts", [1, 3, N_LATENTS, [4], [7, 0, 2]])
@pytest.mark.parametrize("normalize", [True, False])
def test_folded_concepts_score_like_the_whole_coder(concepts, normalize):
    _, _, weights, x = case()
    folded = fold_concepts(weights, concepts)
    rows = list(range(concepts)) if isinstance(concepts, int) else concepts
    whole = pre_activations(x, weights, normalize=normalize)[:, rows]
    torch.testing.assert_close(concept_pre_activations(x, folded, normalize=normalize), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(folded.decoder, weights.decoder.T[rows])


def test_a_large_mean_costs_the_folded_score_no_accuracy():
    book, _, weights, _ = case(d=64, dtype=torch.float32)
    x = (torch.randn(ROWS, 64) + 100).float()
    folded = concept_pre_activations(x, fold_concepts(weights, 3))
    whole = pre_activations(x, weights)[:, :3]
    exact = np.stack([scar.code_token(each.double().numpy(), book, 1).pre[:3] for each in x])
    scale = np.abs(exact).max()
    np.testing.assert_allclose(folded.numpy(), whole.numpy(), rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(folded.numpy(), exact, rtol=0, atol=2e-5 * scale)


def test_the_folded_sum_serves_kernels_that_do_not_center():
    _, _, weights, x = case()
    encoder, encoder_sum, bias, _ = fold_concepts(weights, 2)
    _, mean, std = standardize(x)
    by_sum = (x @ encoder.T - mean * encoder_sum) / (std + 1e-5) + bias
    torch.testing.assert_close(by_sum, concept_pre_activations(x, fold_concepts(weights, 2)), rtol=1e-11, atol=1e-11)


def test_gradients_of_every_weight():
    _, _, weights, x = case(d=4, n=6, rows=3)
    leaves = [each.requires_grad_() for each in (x, *weights)]

    def run(x, *tensors):
        return reconstruct(x, CoderWeights(*tensors), k=3, always=1)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, x: encode(x, w, k=0), r"k must lie in \[1, 23\] \(the number of latents\), got 0\."),
        (lambda w, x: encode(x, w, k=24), r"k must lie in \[1, 23\] .* got 24"),
        (lambda w, x: encode(x, w, k=None), r"k must be given for the activation 'topk', got None"),
        (lambda w, x: encode(x, w, k=3, always=24), r"always must lie in \[0, 23\] .* got 24"),
        (lambda w, x: encode(x, w, k=3, activation="gelu"), r"activation must be one of .*'topk'.* got 'gelu'"),
        (lambda w, x: encode(x[:, :5], w, k=3), r"x must have 11 features, as encoder has columns, got shape \[7, 5\]"),
        (lambda w, x: encode(x.long(), w, k=3), r"x must be floating point, got torch.int64"),
        (lambda w, x: encode(x, w, k=3, eps=-1.0), r"eps must be at least 0 and finite, got -1.0"),
        (lambda w, x: encode(x, w._replace(encoder=w.encoder[0]), k=3), r"encoder must have shape \[latents, hidden\]"),
        (
            lambda w, x: encode(x, w._replace(decoder=w.encoder), k=3),
            r"decoder must have shape \[11, 23\] to fit .*\[23, 11\]",
        ),
        (lambda w, x: encode(x, w._replace(pre_bias=w.latent_bias), k=3), r"pre_bias must have shape \[11\]"),
        (lambda w, x: encode(x, w._replace(latent_bias=w.pre_bias), k=3), r"latent_bias must have shape \[23\]"),
        (lambda w, x: decode(x, w, mean=x[:, :1], std=x[:, :1]), r"latents must have 23 entries per row"),
        (lambda w, x: fold_concepts(w, 24), r"concepts must be a number in \[1, 23\] .* got 24"),
        (lambda w, x: fold_concepts(w, 0), r"concepts must be a number .* got 0"),
        (lambda w, x: fold_concepts(w, [1, 1]), r"concepts must be .* got \[1, 1\]"),
        (
            lambda w, x: concept_pre_activations(x[:, :3], fold_concepts(w, 1)),
            r"x must have 11 features, as the concepts",
        ),
        (lambda w, x: standardize(x[:, :1]), r"x must have at least two features"),
    ],
)
def test_refusals_name_the_argument(call, message):
    _, _, weights, x = case()
    with pytest.raises(ValueError, match=message):
        call(weights, x)


def test_all_activations_have_a_name():
    x = torch.linspace(-2, 2, 5)
    assert all(torch.equal(activate(x, name), function(x)) for name, function in ACTIVATIONS.items())
