"""Steering rules against their definition, and residual against reconstruct mode."""

import math

import numpy as np
import pytest
import torch

from scar_peft.coder import CoderWeights, pre_activations, reconstruct
from scar_peft.rules import RULES, concept_coefficients, open_gates, steer_reconstruct, steer_residual
from tests.support import scar

D, N_LATENTS, ROWS, K, TAU = 10, 24, 9, 8, 0.4
EXACT = {"rtol": 1e-9, "atol": 1e-9}
ACTIVATIONS = ["topk", "topk-sigmoid", "topk-tanh"]
GATES = {"relu": {}, "threshold": {"threshold": TAU}, "topk": {}, "open": {}}
by_rule = pytest.mark.parametrize("rule", RULES)
by_gate = pytest.mark.parametrize("gate", GATES)
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def case(dtype=torch.float64):
    book = scar.random_weights(D, N_LATENTS)
    xs = np.random.default_rng(3).normal(size=(ROWS, D)) * 2 + 1
    return book, xs, CoderWeights(*(torch.tensor(each, dtype=dtype) for each in book)), torch.tensor(xs, dtype=dtype)


def opened(book, x, gate, C, always=0):
    token = scar.code_token(x, book, K, always=always)
    return [
        {"relu": token.pre[c] > 0, "threshold": token.pre[c] > TAU, "topk": c in token.kept, "open": True}[gate]
        for c in range(C)
    ]


@by_rule
@by_gate
@by_activation
@pytest.mark.parametrize("strengths", [[-1.0], [0.7], [-100.0], [0.5, -2.0, 0.0]], ids=str)
def test_residual_matches_the_definition(rule, gate, activation, strengths):
    book, xs, weights, x = case()
    C = len(strengths)
    out = steer_residual(
        x, weights, strengths, concepts=C, rule=rule, activation=activation, gate=gate, k=K, **GATES[gate]
    )
    expected = [scar.steer_token(each, book, strengths, rule, activation, opened(book, each, gate, C)) for each in xs]
    np.testing.assert_allclose(out.numpy(), np.stack(expected), **EXACT)


@by_activation
@pytest.mark.parametrize("scaling", [-100.0, -50.0, -1.0, 0.0, 1.0, 50.0, 100.0])
@pytest.mark.parametrize("always", [0, 2])
def test_reconstruct_is_the_original_hook(activation, scaling, always):
    book, xs, weights, x = case()
    out = steer_reconstruct(x, weights, scaling - 1, k=K, activation=activation, always=always)
    expected = [scar.original_hook(each, book, K, 0, scaling, activation, always) for each in xs]
    np.testing.assert_allclose(out.numpy(), np.stack(expected), **EXACT)


@by_activation
def test_reconstruct_with_set_is_the_original_replacement(activation):
    book, xs, weights, x = case()
    out = steer_reconstruct(x, weights, 1.5, concepts=[3], rule="set", k=K, activation=activation)
    expected = [scar.replacement_hook(each, book, K, 3, 1.5, activation) for each in xs]
    np.testing.assert_allclose(out.numpy(), np.stack(expected), **EXACT)


@by_rule
@by_gate
@by_activation
@pytest.mark.parametrize("always", [0, 2])
def test_reconstruct_minus_residual_does_not_depend_on_the_strength(rule, gate, activation, always):
    _, _, weights, x = case()
    settings = {"concepts": 2, "rule": rule, "activation": activation, "gate": gate, "k": K, "always": always}
    differences = [
        steer_reconstruct(x, weights, s, **settings, **GATES[gate])
        - steer_residual(x, weights, s, **settings, **GATES[gate])
        for s in ([0.0, 0.0], [-3.0, 2.0], [0.3, -0.4], [40.0, -40.0])
    ]
    for each in differences[1:]:
        torch.testing.assert_close(each, differences[0], rtol=1e-9, atol=1e-9)
    if gate == "topk":
        error = reconstruct(x, weights, k=K, activation=activation, always=always) - x
        torch.testing.assert_close(differences[0], error, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", [-100.0, 0.0, 100.0])
def test_residual_with_the_exact_gate_is_the_original_hook_minus_its_error(scaling):
    book, xs, weights, x = case()
    out = steer_residual(x, weights, scaling - 1, gate="topk", k=K)
    for i, each in enumerate(xs):
        error = scar.code_token(each, book, K).reconstruction - each
        np.testing.assert_allclose(out[i].numpy(), scar.original_hook(each, book, K, 0, scaling) - error, **EXACT)


@by_activation
def test_concepts_that_bypass_the_selection_need_no_full_encode(activation):
    _, _, weights, x = case()
    gate = "relu" if activation == "topk" else "open"
    short = steer_residual(x, weights, [-2.0, 3.0], concepts=2, activation=activation, gate=gate)
    whole = steer_residual(x, weights, [-2.0, 3.0], concepts=2, activation=activation, gate="topk", k=K, always=2)
    torch.testing.assert_close(short, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["scale", "add", "add_gated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_strength_zero_changes_no_bit(rule, dtype):
    _, _, weights, x = case(dtype)
    x = torch.randn(200, D).to(dtype) * 30
    assert torch.equal(steer_residual(x, weights, 0.0, rule=rule), x)


def test_scale_does_nothing_to_a_latent_that_is_off():
    _, _, weights, x = case()
    is_off = pre_activations(x, weights)[:, 0] <= 0
    out = steer_residual(x, weights, 100.0)
    assert is_off.any()
    assert not is_off.all()
    assert torch.equal(out[is_off], x[is_off])
    assert (out[~is_off] != x[~is_off]).any(-1).all()


def test_norm_relative_add_golden():
    weights = CoderWeights(torch.eye(2), torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.zeros(2), torch.zeros(2))
    assert steer_residual(torch.tensor([3.0, 4.0]), weights, 0.4, rule="add").tolist() == [3.0, 6.0]


def test_gated_add_pushes_up_where_off_and_down_where_on():
    pre, is_open = torch.tensor([2.0, -2.0]), torch.tensor([True, False])
    g = 1 / (1 + math.exp(-2))
    settings = {"rule": "add_gated", "activation": "topk", "is_open": is_open, "std": torch.ones(1)}
    rest = {"norm": torch.tensor([3.0]), "decoder_norm": torch.tensor([2.0, 2.0])}
    up, down = (concept_coefficients(pre, torch.tensor(a), **settings, **rest) for a in (1.0, -1.0))
    assert up.tolist() == pytest.approx([1.5 * (1 - g), 1.5])
    assert down.tolist() == pytest.approx([-1.5 * g, 0.0])


@by_rule
def test_concepts_superpose(rule):
    _, _, weights, x = case()
    both = steer_residual(x, weights, [0.5, -0.8], concepts=[0, 5], rule=rule)
    first, second = (steer_residual(x, weights, a, concepts=[c], rule=rule) for a, c in ((0.5, 0), (-0.8, 5)))
    torch.testing.assert_close(both, first + second - x, rtol=1e-12, atol=1e-12)


@by_rule
def test_a_strength_per_row_is_that_row_alone(rule):
    _, _, weights, x = case()
    strengths = torch.linspace(-2, 2, ROWS).double()[:, None].repeat(1, 2)
    together = steer_residual(x, weights, strengths, concepts=2, rule=rule)
    alone = torch.stack([steer_residual(x[i], weights, strengths[i], concepts=2, rule=rule) for i in range(ROWS)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@by_rule
def test_all_latents_can_be_concepts(rule):
    book, xs, weights, x = case()
    strengths = [0.1] * N_LATENTS
    out = steer_residual(x, weights, strengths, concepts=N_LATENTS, rule=rule)
    expected = [
        scar.steer_token(each, book, strengths, rule, "topk", opened(book, each, "relu", N_LATENTS)) for each in xs
    ]
    np.testing.assert_allclose(out.numpy(), np.stack(expected), **EXACT)


@pytest.mark.parametrize("rule", ["scale", "set"])
@pytest.mark.parametrize("value", [0.0, 7.5], ids=["zeros", "constant"])
def test_a_row_without_spread_is_not_scaled_or_set(rule, value):
    _, _, weights, _ = case()
    x = torch.full((1, D), value, dtype=torch.float64)
    assert torch.equal(steer_residual(x, weights, 5.0, rule=rule), x)
    assert torch.equal(steer_reconstruct(x, weights, 5.0, rule=rule, k=K), x)


@by_rule
def test_a_decoder_column_of_zeros_steers_nothing(rule):
    _, _, weights, x = case()
    weights.decoder[:, 0] = 0
    weights.decoder.requires_grad_()
    out = steer_residual(x, weights, 2.0, rule=rule)
    assert torch.equal(out.detach(), x)
    out.sum().backward()
    assert weights.decoder.grad.isfinite().all()


@by_rule
@by_gate
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_row_and_show(rule, gate, bad):
    _, _, weights, x = case()
    x[4, 1] = bad
    for steer in (steer_residual, steer_reconstruct):
        out = steer(x, weights, -1.0, rule=rule, gate=gate, k=K, **GATES[gate])
        assert not out[4].isfinite().any() if steer is steer_reconstruct else not out[4].isfinite().all()
        assert out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@by_rule
def test_no_rows_come_back_as_no_rows(rule):
    _, _, weights, x = case()
    assert steer_residual(x[:0], weights, 1.0, rule=rule).shape == (0, D)
    assert steer_reconstruct(x[:0], weights, 1.0, rule=rule, k=K).shape == (0, D)


def test_output_has_the_dtype_of_x():
    _, _, weights, x = case(torch.float32)
    for steer in (steer_residual, steer_reconstruct):
        assert steer(x.bfloat16(), weights, -1.0, k=K).dtype == torch.bfloat16


@by_rule
def test_gradients(rule):
    weights = CoderWeights(*(torch.tensor(each) for each in scar.random_weights(4, 3)))
    x, strength = torch.randn(3, 4).double(), torch.tensor([0.4, -0.6], dtype=torch.float64)
    leaves = [each.requires_grad_() for each in (x, strength, *weights)]

    def run(x, strength, *tensors):
        return steer_residual(x, CoderWeights(*tensors), strength, concepts=2, rule=rule)

    assert torch.autograd.gradcheck(run, leaves)


def test_gates_open_by_their_own_rule():
    pre = torch.tensor([0.5, 2.0, -1.0, 3.0])
    assert open_gates(pre, 3, "relu").tolist() == [True, True, False]
    assert open_gates(pre, 3, "threshold", threshold=1.0).tolist() == [False, True, False]
    assert open_gates(pre, 3, "topk", k=2).tolist() == [False, True, False]
    assert open_gates(pre, 3, "topk", k=1, always=1).tolist() == [True, False, False]
    assert open_gates(pre, [2, 3], "open").tolist() == [True, True]
    assert open_gates(torch.tensor([math.nan]), 1, "relu").tolist() == [True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": math.nan}, r"strength must be finite, got nan"),
        ({"strength": [1.0, math.inf], "concepts": 2}, r"strength must be finite"),
        ({"strength": [1.0, 2.0]}, r"strength must be a number, have one entry per concept \(1\).* got shape \[2\]"),
        ({"strength": torch.ones(4, 1)}, r"strength must .* broadcast to \[9, 1\], got shape \[4, 1\]"),
        ({"rule": "multiply"}, r"rule must be one of \['scale', 'set', 'add', 'add_gated'\], got 'multiply'"),
        ({"gate": "sigmoid"}, r"gate must be one of .* got 'sigmoid'"),
        ({"gate": "threshold"}, r'threshold must be given for the gate "threshold", got None; calibrate'),
        ({"gate": "topk", "k": None}, r'k must be given for the gate "topk", got None'),
        ({"concepts": [24]}, r"concepts must be a number in \[1, 24\].* got \[24\]"),
        ({"gate": "topk", "k": 25}, r"k must lie in \[1, 24\]"),
    ],
)
def test_refusals_name_the_argument(settings, message):
    _, _, weights, x = case()
    for steer in (steer_residual, steer_reconstruct):
        arguments = {"strength": 1.0, "k": K, **settings}
        with pytest.raises(ValueError, match=message):
            steer(x, weights, arguments.pop("strength"), **arguments)
