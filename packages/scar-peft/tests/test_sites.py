"""Where an adapter's targets are, in models of many families."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

from scar_peft.remote.sites_scar import block_list, hidden_size, owner_of, regular_expression, target_names
from tests.support import scar_models as tiny
from tests.support import vlm

SITES = ["block", "mlp", "attn"]
NAMES = {
    "llama": ("model.layers.1", "model.layers.1.mlp", "model.layers.1.self_attn"),
    "gpt2": ("transformer.h.1", "transformer.h.1.mlp", "transformer.h.1.attn"),
    "opt": ("model.decoder.layers.1", "model.decoder.layers.1.fc2", "model.decoder.layers.1.self_attn"),
    "bert": ("bert.encoder.layer.1", "bert.encoder.layer.1.output", "bert.encoder.layer.1.attention"),
    "t5": ("decoder.block.1", "decoder.block.1.layer.2.DenseReluDense", "decoder.block.1.layer.0.SelfAttention"),
}
MAKERS = {**tiny.CAUSAL, "bert": tiny.bert, "t5": tiny.t5}
OWNERS = {"llama": "model", "gpt2": "transformer", "opt": "model.decoder", "bert": "bert", "t5": "decoder"}


@pytest.mark.parametrize("family", NAMES)
def test_targets_of_a_family(family):
    model = MAKERS[family]()
    found = tuple(target_names(model, [1], site)[1] for site in SITES)
    assert found == NAMES[family]
    assert hidden_size(model) == 32
    for name in found:
        assert owner_of(model, name) is model.get_submodule(OWNERS[family])


def test_experts_are_one_feed_forward_part():
    sizes = {"num_local_experts": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = MixtralForCausalLM(MixtralConfig(**tiny._BODY, **sizes)).eval()
    assert target_names(model, [0], "mlp") == {0: "model.layers.0.mlp"}
    adapted = tiny.adapted(model, site="mlp")
    neutral = tiny.logits(adapted)
    assert not torch.equal(tiny.logits(adapted, steering={"a": [1.0, 0.0, -1.0]}), neutral)


def test_layers_come_in_order_and_count_from_both_ends():
    assert list(target_names(tiny.llama(), [-1, 0], "block")) == [0, 2]


@pytest.mark.parametrize(
    ("layers", "site", "message"),
    [
        ([3], "block", r"layers must lie in \[-3, 2\], because the model has 3 blocks, got 3"),
        ([1.0], "block", r"layers must be integers, got 1\.0"),
        ([True], "block", "layers must be integers, got True"),
        ([], "block", "layers must name at least one block, got none"),
        ([0], "head", "site must be one of block, mlp, attn, got 'head'"),
    ],
)
def test_bad_targets_are_named(layers, site, message):
    with pytest.raises(ValueError, match=message):
        target_names(tiny.llama(), layers, site)


def test_models_without_blocks_or_widths_are_refused():
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="model must hold a list of transformer blocks, and none was found in Sequential"
    ):
        target_names(plain, [0], "block")
    with pytest.raises(ValueError, match="model must have a configuration with hidden_size, got NoneType without it"):
        hidden_size(plain)


def test_a_tower_of_the_decoders_depth_is_not_taken_for_it():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = LlamaConfig(**tiny._BODY)
            self.vision, self.language = tiny.llama().model, tiny.llama().model

        def get_decoder(self):
            return self.language

    name, blocks = block_list(Towers())
    assert (name, len(blocks)) == ("language.layers", 3)


def test_expressions_match_their_names_only():
    import re

    expression = regular_expression(["model.layers.1", "model.layers.2"])
    matches = [
        name for name in ("model.layers.1", "model.layers.10", "modelxlayers.1") if re.fullmatch(expression, name)
    ]
    assert matches == ["model.layers.1"]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "idefics3"])
def test_language_models_that_see_are_steered_in_their_language_part(family):
    seeing = getattr(vlm, family)(torch.float32)
    inputs = dict(seeing.encode(seeing.prompt, vlm.picture()))
    with torch.no_grad():
        expected = seeing.model(**inputs).logits
        model = tiny.adapted(seeing.model, layers=[0, 1])
        assert not any(
            part in name for part in vlm.TOWERS for name in target_names(seeing.model, [0], "block").values()
        )
        assert torch.equal(model(**inputs).logits, expected)
        output = model(**inputs, steering={"a": 2.0}, return_concept_scores=True)
    assert not torch.equal(output.logits, expected)
    assert output.concept_scores["a"].shape == expected.shape[:2]
