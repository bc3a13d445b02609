"""The training loss and its gradients against those worked out by hand."""

import math

import numpy as np
import pytest
import torch

from scar_peft.coder import CoderWeights, encode, reconstruct
from scar_peft.losses import concept_loss, reconstruction_loss, scar_loss
from tests.support import scar

D, N_LATENTS, ROWS, K = 9, 20, 8, 5
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def case(C=1, unknown=False):
    rng = np.random.default_rng(2)
    xs = rng.normal(size=(ROWS, D)) * 2 + 0.5
    labels = rng.integers(-1 if unknown else 0, 2, size=(ROWS, C))
    book = scar.random_weights(D, N_LATENTS)
    weights = CoderWeights(*(torch.tensor(each, requires_grad=True) for each in book))
    return book, xs, labels, weights, torch.tensor(xs), torch.tensor(labels)


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("activation", ["topk", "topk-sigmoid", "topk-tanh"])
@pytest.mark.parametrize("settings", [{}, {"concept_weight": 0.3, "pos_weight": 2.5}, {"always": 1}], ids=str)
@pytest.mark.parametrize("unknown", [False, True], ids=["all-labelled", "some-unlabelled"])
def test_loss_and_gradients_match_the_definition(C, activation, settings, unknown):
    book, xs, labels, weights, x, y = case(C, unknown)
    expected, gradients = scar.losses(xs, labels, book, K, activation, **settings)
    found = scar_loss(x, y, weights, k=K, activation=activation, **settings)
    assert [each.item() for each in found] == pytest.approx(list(expected), rel=1e-9, abs=1e-9)
    found.loss.backward()
    for name, tensor, gradient in zip(weights._fields, weights, gradients, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), gradient, **EXACT, err_msg=name)


def test_pos_weight_scales_only_the_concept_loss():
    *_, weights, x, y = case(C=3)
    plain, weighted = (scar_loss(x, y, weights, k=K, pos_weight=w) for w in (1.0, 10.0))
    assert plain.reconstruction == weighted.reconstruction
    assert weighted.concept > plain.concept
    decoder = [torch.autograd.grad(each.loss, weights.decoder, retain_graph=True)[0] for each in (plain, weighted)]
    assert torch.equal(*decoder)


def test_pos_weight_can_differ_between_concepts():
    pre, labels = torch.tensor([[0.3, -0.2]]), torch.tensor([[1, 1]])
    both = concept_loss(pre, labels, pos_weight=torch.tensor([2.0, 0.0]))
    assert both.item() == pytest.approx(2 * concept_loss(pre[:, :1], labels[:, :1]).item())


def test_concept_weight_zero_trains_an_unsupervised_coder():
    *_, weights, x, y = case()
    loss = scar_loss(x, y, weights, k=K, concept_weight=0.0)
    assert loss.loss == loss.reconstruction


def test_parts_agree_with_the_functions_they_are_made_of():
    *_, weights, x, y = case()
    loss = scar_loss(x, y, weights, k=K)
    assert loss.reconstruction == reconstruction_loss(reconstruct(x, weights, k=K), x).mean()
    latents = encode(x, weights, k=K)
    assert loss.l1.item() == pytest.approx((latents.abs().sum(-1) / x.norm(dim=-1)).mean().item())
    assert not loss.l1.requires_grad


def test_golden_values():
    half = torch.tensor([0.5], dtype=torch.float64)
    assert concept_loss(half, torch.tensor([1])).item() == pytest.approx(0.4740769842, abs=1e-10)
    assert reconstruction_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])).item() == 0.5


def test_unknown_labels_add_nothing_or_count_as_negative():
    pre = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    labels = torch.tensor([[1, -1], [-1, 0]])
    assert concept_loss(pre, labels).tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(3))])
    negative = concept_loss(pre, torch.tensor([[1, 0], [0, 0]]))
    assert torch.equal(concept_loss(pre, labels, unlabelled_as_negative=True), negative)
    renamed = torch.tensor([[1, -100], [-100, 0]])
    assert torch.equal(concept_loss(pre, renamed, ignore_index=-100), concept_loss(pre, labels))


def test_an_unknown_label_has_no_gradient():
    pre = torch.tensor([[1.0, -2.0]], requires_grad=True)
    concept_loss(pre, torch.tensor([[1, -1]])).sum().backward()
    assert pre.grad[0, 0] < 0
    assert pre.grad[0, 1] == 0


def test_soft_labels_are_taken_on_request():
    pre = torch.tensor([[0.3]], dtype=torch.float64)
    on, off = (concept_loss(pre, torch.tensor([[y]])).item() for y in (1, 0))
    soft = concept_loss(pre, torch.tensor([[0.25]]), soft_labels=True).item()
    assert soft == pytest.approx(0.25 * on + 0.75 * off, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float32])
def test_labels_have_any_dtype(dtype):
    pre, labels = torch.tensor([[0.3, -1.0]]), torch.tensor([[1, 0]])
    assert torch.equal(concept_loss(pre, labels.to(dtype)), concept_loss(pre, labels))


def test_a_saturated_wrong_logit_keeps_its_gradient():
    """Sigmoid first, as in the original code, gives exactly 1 in float32, and the gradient is lost."""
    pre = torch.tensor([[30.0]], requires_grad=True)
    concept_loss(pre, torch.tensor([[0]])).sum().backward()
    assert pre.grad.item() == pytest.approx(1.0)
    saturated = torch.tensor([[30.0]], requires_grad=True)
    torch.nn.functional.binary_cross_entropy(saturated.sigmoid(), torch.zeros(1, 1)).backward()
    assert saturated.grad.item() == 0.0


def test_a_row_of_zeros_has_no_error():
    x = torch.zeros(2, 3)
    x[1] = 1.0
    rows = torch.ones(2, 3, requires_grad=True)
    loss = reconstruction_loss(rows, x)
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert rows.grad.isfinite().all()


def test_zero_and_constant_rows_train_without_nan():
    *_, weights, x, y = case()
    x[0], x[1] = 0.0, 3.0
    loss = scar_loss(x, y, weights, k=K)
    loss.loss.backward()
    assert all(each.isfinite() for each in loss)
    assert all(each.grad.isfinite().all() for each in weights)


def test_nan_and_infinity_show():
    for bad in (math.nan, math.inf):
        x = torch.tensor([[bad, 1.0]])
        assert reconstruction_loss(torch.zeros(1, 2), x).isnan().all()
    assert reconstruction_loss(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)).isnan().all()
    assert concept_loss(torch.tensor([[math.nan]]), torch.tensor([[1]])).isnan().all()


def test_no_rows_have_no_loss():
    *_, weights, x, y = case()
    loss = scar_loss(x[:0], y[:0], weights, k=K)
    loss.loss.backward()
    assert [each.item() for each in loss] == [0.0] * 4


def test_leading_axes_are_free():
    *_, weights, x, y = case(C=3)
    flat = scar_loss(x, y, weights, k=K)
    shaped = scar_loss(x.view(2, 4, D), y.view(2, 4, 3), weights, k=K)
    torch.testing.assert_close(shaped.loss, flat.loss, rtol=1e-14, atol=0)


def test_low_precision_is_computed_in_float32():
    *_, weights, x, y = case()
    loss = scar_loss(x.bfloat16(), y, CoderWeights(*(each.detach().bfloat16() for each in weights)), k=K)
    assert loss.loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w, x, y: scar_loss(x, y + 1, w, k=K),
            r"labels must be 0 or 1, or be ignore_index .* got 2; binarize them",
        ),
        (lambda w, x, y: scar_loss(x, y * 0.5, w, k=K), r"labels must be 0 or 1.* got 0\.5; .*soft_labels=True"),
        (lambda w, x, y: scar_loss(x, y * 0 - 2, w, k=K), r"labels must be 0 or 1.* got -2"),
        (
            lambda w, x, y: scar_loss(x, y * 0 + 1.5, w, k=K, soft_labels=True),
            r"labels must lie in \[0, 1\].* got 1\.5",
        ),
        (
            lambda w, x, y: scar_loss(x, y[:3], w, k=K),
            r"labels must have shape \[8, 'C'\] with C in \[1, 20\].* got \[3, 3\]",
        ),
        (lambda w, x, y: scar_loss(x, y[:, 0], w, k=K), r"labels must have shape .* one column per concept, got \[8\]"),
        (
            lambda w, x, y: scar_loss(x, y, w, k=K, pos_weight=torch.ones(2)),
            r"pos_weight must .* have shape \[3\].* got \[2\]",
        ),
        (
            lambda w, x, y: scar_loss(x, y, w, k=K, pos_weight=-1.0),
            r"pos_weight must be at least 0 and finite, got -1.0",
        ),
        (
            lambda w, x, y: scar_loss(x, y, w, k=K, concept_weight=-1.0),
            r"concept_weight must be at least 0 .* got -1.0",
        ),
        (lambda w, x, y: scar_loss(x[:, :4], y, w, k=K), r"x must have 9 features"),
        (
            lambda w, x, y: reconstruction_loss(x, x[:2]),
            r"reconstruction must have the shape of x \[2, 9\], got \[8, 9\]",
        ),
    ],
)
def test_refusals_name_the_argument(call, message):
    *_, weights, x, y = case(C=3)
    with pytest.raises(ValueError, match=message):
        call(weights, x, y)
