"""`ScarConfig`: what it refuses, what it fills in, and that JSON gives it back."""

import pytest
import torch
from peft import PeftConfig, get_peft_model

from scar_peft import ScarConfig
from tests.support import scar_models as tiny


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": []}, r"layers must hold at least one block index, got \[\]"),
        ({"layers": ["1"]}, r"layers must hold at least one block index, got \['1'\]"),
        ({"layers": [True]}, "layers must hold at least one block index"),
        ({"site": "head"}, 'site must be one of "block", "mlp", "attn", got \'head\''),
        ({"activation": "gelu"}, 'activation must be one of "topk", "topk-sigmoid", "topk-tanh", "relu", got \'gelu\''),
        ({"concept_gate": "open"}, 'concept_gate must be one of "relu", "topk", got \'open\''),
        ({"mode": "replace"}, 'mode must be one of "residual", "reconstruct", got \'replace\''),
        ({"gate": "step"}, 'gate must be one of "relu", "threshold", "topk", "open", got \'step\''),
        ({"steering_rule": "push"}, 'steering_rule must be one of "scale", "set", "add", "add_gated", got \'push\''),
        (
            {"steering_positions": "last"},
            'steering_positions must be one of "all", "generated", "prompt", got \'last\'',
        ),
        ({"concepts": []}, r"concepts must hold at least one name, each not empty, got \[\]"),
        ({"concepts": ["a", ""]}, "concepts must hold at least one name, each not empty"),
        ({"concepts": ["a", "a"]}, r"concepts must differ, got \['a', 'a'\]"),
        ({"n_latents": 0}, r"n_latents must lie in \[1, 16777216\], got 0"),
        ({"k": 0}, r"k must lie in \[1, 16777216\], got 0"),
        ({"k": 95}, r"k must lie in \[1, 94\] \(the latents that are not concepts\), got 95"),
        ({"k": 97, "concept_gate": "topk"}, r"k must lie in \[1, 96\] \(the number of latents\), got 97"),
        ({"n_latents": 1}, "n_latents must be at least the number of concepts 2, got 1"),
        ({"norm_eps": -1.0}, "norm_eps must be finite and not negative, got -1.0"),
        ({"norm_eps": float("nan")}, "norm_eps must be finite and not negative, got nan"),
        ({"gate": "threshold"}, 'gate_threshold must be given for gate="threshold"'),
        ({"gate_threshold": float("inf")}, "gate_threshold must be finite, got inf"),
        ({"compact": True, "mode": "reconstruct"}, 'mode="reconstruct" and gate="topk" need all latents'),
        ({"compact": True, "gate": "topk"}, 'mode="reconstruct" and gate="topk" need all latents'),
        (
            {"default_steering": {"c": 1.0}},
            r"default_steering must name concepts of the adapter, \['a', 'b'\], got \['c'\]",
        ),
        ({"default_steering": {"a": float("nan")}}, r'default_steering\["a"\] must be finite, got'),
        ({"default_steering": {"a": {1: "x"}}}, r'default_steering\["a"\] must be a number, or one number per row'),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.settings(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [3]}, r"layers must lie in \[-3, 2\], because the model has 3 blocks, got 3"),
        ({"layers": [-4]}, r"layers must lie in \[-3, 2\], because the model has 3 blocks, got -4"),
        ({"layers": [2, -1]}, r"layers must name different blocks, got \[2, -1\]"),
        (
            {"hidden_size": 64},
            "hidden_size of the adapter is 64, but the model's is 32: it was trained for another model",
        ),
        ({"gate": "threshold", "gate_threshold": {1: 0.5}}, "gate_threshold must hold layer 2"),
        (
            {"default_steering": {"a": {7: 1.0}}},
            r'steering\["a"\] must name layers of the adapter, \[1, 2\], got \[7\]',
        ),
        ({"n_latents": 8, "k": 7}, r"k must lie in \[1, 6\]"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_changes(fields, message):
    base = tiny.built()
    keys, expected = set(base.state_dict()), tiny.logits(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, tiny.settings(**fields))
    assert set(base.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert torch.equal(tiny.logits(base), expected)


def test_a_missing_site_lists_what_the_blocks_hold():
    base = tiny.built()
    for block in base.model.layers:
        block.feed_it_forward = block.mlp
        del block.mlp
    message = (
        'got "mlp"; LlamaDecoderLayer holds self_attn, input_layernorm, post_attention_layernorm, feed_it_forward.'
    )
    with pytest.raises(ValueError, match=message):
        tiny.adapted(base, site="mlp")


def test_sizes_of_the_published_adapter_are_the_defaults():
    config = ScarConfig(layers=25)
    config.fill_sizes(4096)
    assert (config.n_latents, config.k, config.layers, config.site) == (24576, 2048, [25], "mlp")


def test_a_narrow_model_gets_a_coder_that_fits():
    config = ScarConfig(layers=0, concepts=[f"concept {number}" for number in range(40)])
    config.fill_sizes(4)
    assert (config.n_latents, config.k) == (41, 1)


def test_negative_layers_count_from_the_end():
    model = tiny.adapted(layers=[-1, 0])
    assert model.peft_config["default"].layers == [0, 2]


@pytest.mark.parametrize(
    ("fields", "gates"),
    [
        ({}, ("relu", "relu")),
        ({"activation": "topk-sigmoid"}, ("open", "open")),
        ({"activation": "relu"}, ("relu", "relu")),
        ({"concept_gate": "topk"}, ("topk", "relu")),
        ({"concept_gate": "topk", "activation": "topk-sigmoid"}, ("topk", "relu")),
        ({"concept_gate": "topk", "gate": "topk"}, ("topk", "topk")),
        ({"gate": "threshold", "gate_threshold": 1.0}, ("relu", "threshold")),
    ],
)
def test_the_gate_is_the_coders_own_where_that_is_cheap(fields, gates):
    config = tiny.settings(**fields)
    assert (config.own_gate, config.resolved_gate) == gates


def test_json_gives_the_configuration_back(tmp_path):
    config = tiny.settings(
        gate="threshold",
        gate_threshold={1: 0.25, 2: 0.5},
        default_steering={"a": {1: -1.0}, "b": 0.5},
        calibration={"a": {"threshold": 0.3}},
        metrics={"a": {"auroc": 0.99}},
        license="mit",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ScarConfig)
    assert loaded.peft_type == "SCAR"
    assert loaded.to_dict() == config.to_dict()
    assert loaded.gate_threshold == {1: 0.25, 2: 0.5}
    assert loaded.default_steering == {"a": {1: -1.0}, "b": 0.5}
