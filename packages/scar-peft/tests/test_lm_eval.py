"""The file for the lm-eval harness: what is in it, and that the harness steers with it as it says."""

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import normalize
from transformers import LlamaConfig, LlamaForCausalLM

import scar_peft
from scar_peft.lm_eval import export_lm_eval, token_norms
from tests.support.atman_tokenizers import byte_level

STEERING = {"rude": -0.5, "formal": 0.25}
ONE_TOKEN = torch.tensor([[7]])


def tiny_model(site: str = "block", layers: tuple[int, ...] = (1,), vocab_size: int = 32) -> PeftModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    adapter = scar_peft.ScarConfig(
        layers=list(layers),
        site=site,
        concepts=["rude", "formal"],
        n_latents=24,
        k=4,
        skip_first_token=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(LlamaForCausalLM(config), adapter).eval()


@pytest.mark.parametrize(("site", "end"), [("block", ""), ("mlp", ".mlp")])
def test_modules_are_named_as_the_harness_finds_them(tmp_path, site, end):
    model = tiny_model(site, (0, 2))
    entries = export_lm_eval(model, tmp_path / "steer.pt", STEERING, token_norm=2.0)
    assert sorted(entries) == [f"layers.0{end}", f"layers.2{end}"]
    assert entries.keys() <= dict(LlamaForCausalLM(model.config).base_model.named_modules()).keys()


def test_the_vector_is_the_sum_of_the_concepts_unit_directions(tmp_path):
    model = tiny_model()
    (layer,) = scar_peft.scar_layers(model)
    columns = normalize(layer.weights("default").decoder.detach(), dim=0)
    export_lm_eval(model, tmp_path / "steer.pt", STEERING, token_norm={1: 3.0})
    (entry,) = torch.load(tmp_path / "steer.pt", weights_only=True).values()
    torch.testing.assert_close(entry["steering_vector"], -0.5 * columns[:, 0] + 0.25 * columns[:, 1])
    assert entry["steering_coefficient"] == 3.0
    assert (entry["action"], entry["bias"], entry["head_index"]) == ("add", None, None)


def test_strengths_may_differ_by_layer(tmp_path):
    model = tiny_model(layers=(0, 2))
    entries = export_lm_eval(model, tmp_path / "steer.pt", {"rude": {0: 1.0, 2: -2.0}}, token_norm={0: 1.0, 2: 1.0})
    assert [float(entries[f"layers.{i}"]["steering_vector"].norm()) for i in (0, 2)] == pytest.approx([1.0, 2.0])


def test_norms_leave_out_padding_and_first_tokens():
    model = tiny_model()
    ids = torch.tensor([[5, 9, 9, 0], [5, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    counted = torch.cat([states[0, 1:3], states[1, 1:]]).norm(dim=-1)
    found = token_norms(model, input_ids=ids, attention_mask=mask)
    assert found == {1: pytest.approx(float(counted.median()))}


def test_norms_are_those_of_unsteered_tokens():
    model = tiny_model()
    plain = token_norms(model, input_ids=ONE_TOKEN)
    model.set_steering("rude", 5.0, rule="add")
    assert token_norms(model, input_ids=ONE_TOKEN) == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "steer.bin"}, r'path must end in ".pt"'),
        (
            {"steering": {"old": 1.0}},
            r"steering must name concepts of the adapter, \['formal', 'rude'\], got \['old'\]",
        ),
        ({"steering": {"rude": [1.0, 2.0]}}, r'steering\["rude"\] must be one number'),
        ({"token_norm": 0.0}, "token_norm must be positive and finite, got 0.0"),
        ({"token_norm": {0: 1.0}}, r"token_norm must hold layer 1, got layers \[0\]"),
    ],
)
def test_what_the_harness_cannot_do_is_refused(tmp_path, arguments, message):
    arguments = {"path": "steer.pt", "steering": STEERING, "token_norm": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        export_lm_eval(tiny_model(), tmp_path / arguments.pop("path"), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_steers_a_token_of_that_norm_as_the_adapter_does(tmp_path):
    from lm_eval.models.hf_steered import SteeredModel

    tokenizer = byte_level()
    model = tiny_model(vocab_size=len(tokenizer))
    base = LlamaForCausalLM(model.config)
    base.load_state_dict({k: v for k, v in model.get_base_model().state_dict().items() if "scar" not in k})
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    norms = token_norms(model, input_ids=ONE_TOKEN)
    export_lm_eval(model, tmp_path / "steer.pt", STEERING, token_norm=norms)
    harness = SteeredModel(str(tmp_path / "base"), str(tmp_path / "steer.pt"), device="cpu", dtype="float32")
    with torch.no_grad():
        wanted = model(ONE_TOKEN, steering=STEERING, rule="add").logits
        assert not torch.allclose(wanted, model(ONE_TOKEN).logits)
    torch.testing.assert_close(harness._model_call(ONE_TOKEN), wanted, rtol=1e-5, atol=1e-5)
