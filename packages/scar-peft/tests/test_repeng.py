"""The rule "add" beside the control vectors of repeng, which are the same for every token."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import scar_peft

repeng = pytest.importorskip("repeng", reason="repeng is not installed (it needs numpy 1)")

LAYER = 1
STRENGTH = 0.7


def test_add_is_a_control_vector_of_the_length_that_the_token_has():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.3, **sizes)).eval()
    controlled = repeng.ControlModel(copy.deepcopy(base), [LAYER])
    config = scar_peft.ScarConfig(layers=[LAYER], site="block", n_latents=64, k=8, skip_first_token=False)
    steered = get_peft_model(base, config).eval().requires_grad_(False)
    ids = torch.tensor([[5]])
    plain = steered(ids, output_hidden_states=True)

    direction = scar_peft.scar_layers(steered)[0].weights().decoder[:, 0]
    norm = plain.hidden_states[LAYER + 1].norm()
    controlled.set_raw_control({LAYER: STRENGTH * norm * direction / direction.norm()})
    with scar_peft.steering(steered, concept=STRENGTH, rule="add"):
        ours = steered(ids).logits
    assert not torch.allclose(ours, plain.logits, atol=1e-3)
    torch.testing.assert_close(ours, controlled(ids).logits, rtol=1e-5, atol=1e-5)
