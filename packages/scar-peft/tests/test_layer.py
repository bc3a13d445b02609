"""What an adapter does to activations: nothing at neutral strength, else exactly what the rules say."""

from itertools import product

import numpy as np
import pytest
import torch

from scar_peft import record_scores, rules, scar_layers, steering
from tests.support import scar as book
from tests.support import scar_models as tiny

SITES = ["block", "mlp", "attn"]
DTYPES = [torch.float32, torch.bfloat16]
OTHERS = {"bert": (tiny.bert, "SEQ_CLS"), "t5": (tiny.t5, "SEQ_2_SEQ_LM")}
FAMILIES = {**{name: (make, "CAUSAL_LM") for name, make in tiny.CAUSAL.items()}, **OTHERS}
RULES = ["scale", "set", "add", "add_gated"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_logits_are_those_of_the_base_bit_for_bit(family, dtype):
    make, task = FAMILIES[family]
    base = tiny.built(make).to(dtype)
    inputs = tiny.inputs_for(base)
    expected = base(**inputs).logits
    for site in SITES:
        model = tiny.adapted(base, site=site, task_type=task)
        assert torch.equal(model(**inputs).logits, expected)
        steered = model(**inputs, steering={"a": 1.0, "b": [0.5, -0.5, 1.0]}).logits
        assert steered.dtype == expected.dtype
        assert (steered - expected).abs().amax(dim=tuple(range(1, expected.ndim))).min() > 1e-4  # every row
        model.set_steering({"a": 0.0, "b": [0.0, 0.0, 0.0]})
        assert torch.equal(model(**inputs).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(**inputs, steering={"a": 1.0}).logits, expected)
        base = model.unload()


@pytest.mark.parametrize("order", ["adapter first", "hidden states first"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_hidden_states_are_what_the_next_block_reads(family, order):
    base = tiny.built(tiny.CAUSAL[family])
    if order == "hidden states first":  # transformers adds hooks of its own when they are first asked for
        base(tiny.some_ids(), output_hidden_states=True)
    model = tiny.adapted(base, layers=[0, 1])
    blocks = [layer.get_base_layer() for layer in scar_layers(model)]
    with tiny.outputs_of(blocks[0]) as first, tiny.outputs_of(blocks[1]) as second:
        states = model(tiny.some_ids(), steering={"a": 2.0}, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], first[0])
    assert torch.equal(states[2], second[0])
    neutral = model(tiny.some_ids(), output_hidden_states=True).hidden_states
    assert not torch.allclose(states[1], neutral[1])


@pytest.mark.parametrize("concept_gate", ["relu", "topk"])
@pytest.mark.parametrize("activation", ["topk", "topk-sigmoid", "topk-tanh", "relu"])
def test_residual_steering_is_the_rule_in_float64(activation, concept_gate):
    fields = {"activation": activation, "concept_gate": concept_gate, "gate_threshold": 0.4}
    model = tiny.adapted(tiny.built().double(), layers=[1], skip_first_token=False, **fields)
    (layer,) = scar_layers(model)
    config = layer.config()
    strength = torch.tensor([[0.7, -1.3], [-0.4, 0.9], [2.0, 0.0]], dtype=torch.float64)
    for rule, gate in product(RULES, [None, "relu", "threshold", "topk", "open"]):
        config.gate = gate
        x, y = tiny.before_and_after(model, layer, steering=dict(zip("ab", strength.T, strict=True)), rule=rule)
        expected = rules.steer_residual(
            x,
            layer.weights(),
            strength[:, None],
            concepts=2,
            rule=rule,
            activation=activation,
            gate=config.resolved_gate,
            threshold=0.4,
            k=config.kept,
            always=config.always_kept,
        )
        assert x.dtype == torch.float64
        assert (y - expected).abs().max() <= 1e-9, (rule, gate)


@pytest.mark.parametrize("concept_gate", ["relu", "topk"])
@pytest.mark.parametrize("activation", ["topk", "topk-sigmoid", "topk-tanh", "relu"])
def test_reconstruct_steering_is_the_rule_in_float64(activation, concept_gate):
    fields = {"activation": activation, "concept_gate": concept_gate, "gate": "threshold", "gate_threshold": 0.4}
    model = tiny.adapted(tiny.built().double(), layers=[1], skip_first_token=False, mode="reconstruct", **fields)
    (layer,) = scar_layers(model)
    config = layer.config()
    with model.disable_adapter(), tiny.outputs_of(layer.get_base_layer()) as seen:
        tiny.logits(model)
    for rule in RULES:
        _, y = tiny.before_and_after(model, layer, steering={"a": 0.7, "b": -1.3}, rule=rule)
        expected = rules.steer_reconstruct(
            seen[0],
            layer.weights(),
            [0.7, -1.3],
            concepts=2,
            rule=rule,
            activation=activation,
            gate=config.own_gate,  # the gate of residual steering has no say
            k=config.kept,
            always=config.always_kept,
        )
        assert (y - expected).abs().max() <= 1e-9, rule


@pytest.mark.parametrize("activation", ["topk", "topk-sigmoid"])
@pytest.mark.parametrize("concept_gate", ["relu", "topk"])
def test_reconstruct_is_the_published_formula(concept_gate, activation):
    model = tiny.adapted(tiny.built().double(), layers=[1], activation=activation, concept_gate=concept_gate)
    (layer,) = scar_layers(model)
    config, weights = layer.config(), as_arrays(layer)
    for scale in (1.0, 0.0, -3.0):
        request = {"steering": {"a": scale - 1.0}, "rule": "scale", "mode": "reconstruct"}
        x, y = tiny.before_and_after(model, layer, **request)
        expected = [book.original_hook(row, weights, 8, 0, scale, activation, config.always_kept) for row in rows(x)]
        np.testing.assert_allclose(rows(y), expected, rtol=0, atol=1e-9)


def test_residual_with_the_exact_gate_is_the_published_formula_without_the_coder_error():
    model = tiny.adapted(tiny.built().double(), layers=[1], concept_gate="topk", gate="topk")
    (layer,) = scar_layers(model)
    weights = as_arrays(layer)
    x, y = tiny.before_and_after(model, layer, steering={"a": -4.0}, rule="scale")
    assert not torch.equal(x, y)
    for row, steered in zip(rows(x), rows(y), strict=True):
        error = book.original_hook(row, weights, 8, 0, 1.0) - row
        np.testing.assert_allclose(steered, book.original_hook(row, weights, 8, 0, -3.0) - error, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gate", ["relu", "threshold", "topk", "open"])
def test_modes_differ_by_the_coder_error_whatever_the_strength(gate):
    """With a gate that is the coder's own."""
    fields = {
        "relu": {"activation": "topk"},
        "threshold": {"activation": "relu", "gate": "threshold", "gate_threshold": 0.0},
        "topk": {"concept_gate": "topk", "gate": "topk"},
        "open": {"activation": "topk-sigmoid"},
    }[gate]
    model = tiny.adapted(tiny.built().double(), layers=[1], skip_first_token=False, **fields)
    (layer,) = scar_layers(model)
    for rule in RULES:
        differences = []
        for strength in (-2.0, -0.5, 3.0):
            request = {"steering": {"a": strength, "b": -strength}, "rule": rule}
            _, residual = tiny.before_and_after(model, layer, **request)
            _, reconstructed = tiny.before_and_after(model, layer, **request, mode="reconstruct")
            differences.append(reconstructed - residual)
        assert differences[0].abs().max() > 0.1
        for other in differences[1:]:
            torch.testing.assert_close(other, differences[0], rtol=0, atol=1e-9)


def test_concepts_superpose():
    model = tiny.adapted(tiny.built().double(), layers=[1])
    (layer,) = scar_layers(model)
    x, a = tiny.before_and_after(model, layer, steering={"a": 0.7}, rule="add")
    _, b = tiny.before_and_after(model, layer, steering={"b": -2.0}, rule="scale")
    with steering(model, {"b": -2.0}, rule="scale"):
        _, both = tiny.before_and_after(model, layer, steering={"a": 0.7}, rule="add")
    torch.testing.assert_close(both - x, (a - x) + (b - x), rtol=0, atol=1e-9)


def test_scaling_again_is_no_scaling_twice():
    model = tiny.adapted()
    model.set_steering("a", -1.0, rule="scale")
    once = tiny.logits(model)
    model.set_steering("a", -1.0, rule="scale")
    assert torch.equal(tiny.logits(model), once)
    model.set_steering("a", scale=0.0)
    assert torch.equal(tiny.logits(model), once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_constant_rows_stay_finite(rule, dtype):
    model = tiny.adapted(tiny.built().to(dtype), layers=[1], skip_first_token=False)
    (layer,) = scar_layers(model)
    target = layer.get_base_layer()
    handle = target.register_forward_hook(lambda m, a, output: constant_rows(output), prepend=True)
    x, y = tiny.before_and_after(model, layer, steering={"a": 1.5, "b": -1.0}, rule=rule)
    handle.remove()
    assert y.isfinite().all()
    if rule in ("scale", "set"):
        assert torch.equal(x[:, 1:], y[:, 1:])
        assert not torch.equal(x[:, 0], y[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gate", ["relu", "topk", "open"])
def test_what_is_not_finite_is_never_hidden(gate, value):
    model = tiny.adapted(layers=[1], gate=gate, skip_first_token=False)
    (layer,) = scar_layers(model)
    target = layer.get_base_layer()

    def spoil(module, args, output):
        output = output.clone()
        output[0, 2, 3] = value
        return output

    handle = target.register_forward_hook(spoil, prepend=True)
    for rule in RULES:
        with record_scores(model) as record:
            _, y = tiny.before_and_after(model, layer, steering={"a": 1.0}, rule=rule)
        assert not y[0, 2].isfinite().any()
        assert y[0, 1].isfinite().all()
        assert not record.scores["a"][0, 2].isfinite()
    handle.remove()


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)])
def test_no_tokens_pass_through(shape):
    model = tiny.adapted(site="mlp")
    target = scar_layers(model)[0].get_base_layer()
    with record_scores(model), steering(model, a=1.0):
        assert target(torch.zeros(shape)).shape == shape


def test_permuted_rows_give_permuted_logits():
    model, order = tiny.adapted(), torch.tensor([2, 0, 1])
    strength = torch.tensor([0.5, -1.0, 2.0])
    straight = tiny.logits(model, steering={"a": strength})
    permuted = tiny.logits(model, tiny.some_ids()[order], steering={"a": strength[order]})
    torch.testing.assert_close(permuted, straight[order], rtol=1e-5, atol=1e-6)


def test_a_zero_decoder_column_has_no_direction():
    model = tiny.adapted()
    for layer in scar_layers(model):
        layer.weights().decoder[:, 0] = 0.0
    expected = tiny.logits(model)
    for rule in RULES:
        assert torch.equal(tiny.logits(model, steering={"a": 3.0}, rule=rule), expected)


@pytest.mark.parametrize("how", ["in place", "parameter", "data of a parameter", "loaded"])
def test_changed_weights_count_at_once(how):
    model = tiny.adapted(layers=[1])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = tiny.logits(model, steering={"a": 1.0})
    (layer,) = scar_layers(model)
    new = torch.randn(32, 96)
    if how == "in place":
        layer.weights().decoder.copy_(new)
    elif how == "parameter":
        layer.scar_decoder["default"] = torch.nn.Parameter(new, requires_grad=False)
    elif how == "data of a parameter":
        layer.weights().decoder.data = new
    else:
        state = {name: new if "scar_decoder" in name else each for name, each in model.state_dict().items()}
        model.load_state_dict(state)
    assert not torch.allclose(tiny.logits(model, steering={"a": 1.0}), before)


def test_weights_made_in_inference_mode_work():
    with torch.inference_mode():
        model = tiny.adapted()
        inside = tiny.logits(model, steering={"a": 1.0})
    assert torch.equal(tiny.logits(model, steering={"a": 1.0}), inside)


def as_arrays(layer):
    return book.Weights(*(each.numpy() for each in layer.weights()))


def constant_rows(output):
    output = output.clone()
    output[:, 1] = 0.0
    output[:, 2:] = 1.5
    return output


def rows(x):
    return x.reshape(-1, x.shape[-1]).numpy()
