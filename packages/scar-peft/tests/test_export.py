"""The export for `trust_remote_code`: what it writes, that it equals the adapter, and what it refuses."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import scar_peft
from scar_peft.export import export_remote_code
from scar_peft.remote.modeling_scar import steered_class
from scar_peft.remote.section_scar import ScarSection

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
STEERING = {"rude": torch.tensor([-1.0, 2.0]), "formal": 0.5}
TRUSTED = {"trust_remote_code": True}
SECTION = {"layers": [1], "site": "mlp", "concepts": ["rude", "formal"]}


def tiny(family: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=3, n_head=2, n_positions=32))
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def adapted(family: str = "llama", **fields: object) -> PeftModel:
    values = {"layers": [0, 2], "site": "block", "concepts": ["rude", "formal"], "n_latents": 24, "k": 4}
    config = scar_peft.ScarConfig(task_type="CAUSAL_LM", **values | fields)
    return get_peft_model(tiny(family), config).eval()


def exported(model: torch.nn.Module, folder: Path, **options: object) -> torch.nn.Module:
    export_remote_code(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder, **TRUSTED, **options).eval()


@pytest.mark.parametrize(
    ("family", "site"), [("llama", "block"), ("gpt2", "mlp"), ("gemma2", "attn"), ("qwen3", "block")]
)
def test_it_equals_the_adapter_with_and_without_steering(tmp_path, family, site):
    model = adapted(family, site=site)
    loaded = exported(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        steered = loaded(IDS, steering=STEERING).logits
        torch.testing.assert_close(steered, model(IDS, steering=STEERING).logits, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(steered, model(IDS).logits, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "topk-sigmoid", "steering_rule": "scale"},
        {"gate": "threshold", "gate_threshold": {0: 0.1, 2: -0.2}, "steering_rule": "set"},
        {"concept_gate": "topk", "steering_rule": "add", "skip_first_token": False},
        {"normalize": False, "activation": "relu"},
    ],
)
def test_settings_travel_along(tmp_path, fields):
    model = adapted(**fields)
    loaded = exported(model, tmp_path)
    with torch.no_grad():
        wanted = model(IDS, steering=STEERING).logits
        torch.testing.assert_close(loaded(IDS, steering=STEERING).logits, wanted, rtol=1e-5, atol=1e-6)


def test_it_generates_and_scores_like_the_adapter(tmp_path):
    model = adapted()
    loaded = exported(model, tmp_path)
    request = {"steering": {"rude": 3.0}, "rule": "add", "return_concept_scores": True}
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    wanted, found = (each.generate(input_ids=IDS, **options, **request) for each in (model, loaded))
    assert torch.equal(found.sequences, wanted.sequences)
    for concept in ("rude", "formal"):
        torch.testing.assert_close(found.concept_scores[concept], wanted.concept_scores[concept])


def test_steering_holds_until_it_is_set_again_or_the_block_ends(tmp_path):
    loaded = exported(adapted(), tmp_path)
    with torch.no_grad():
        plain = loaded(IDS).logits
        with loaded.steering(rude=2.0, rule="add"):
            inside = loaded(IDS).logits
        assert torch.equal(loaded(IDS).logits, plain)
        loaded.set_steering("rude", 2.0, rule="add")
        assert torch.equal(loaded(IDS).logits, inside)
        loaded.set_steering(None)
        assert torch.equal(loaded(IDS).logits, plain)
    assert not torch.equal(inside, plain)


def test_scores_come_from_the_same_pass(tmp_path):
    model = adapted()
    loaded = exported(model, tmp_path)
    with torch.no_grad(), loaded.record_scores("pre") as record, scar_peft.record_scores(model, "pre") as wanted:
        loaded(IDS)
        model(IDS)
    torch.testing.assert_close(record.scores["formal"], wanted.scores["formal"], rtol=1e-5, atol=1e-6)
    assert record.scores["formal"].shape == IDS.shape


def test_default_steering_holds_from_loading_on_and_is_saved_again(tmp_path):
    model = adapted(default_steering={"rude": {0: 2.0}, "formal": -1.0})
    loaded = exported(model, tmp_path / "first")
    loaded.set_steering(None)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", **TRUSTED).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(loaded(IDS).logits, model(IDS).logits)


def test_saving_what_was_loaded_writes_the_same_files(tmp_path):
    loaded = exported(adapted(), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir() if path.name != "README.md"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()} == first
    assert {"modeling_scar.py", "hook_scar.py", "ops_scar_scar_steer.py"} <= first.keys()


def test_the_configuration_is_the_base_models_with_one_section_more(tmp_path):
    export_remote_code(adapted(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_scar.LlamaForCausalLM"}
    assert config["scar"]["concepts"] == ["rude", "formal"]


def test_only_the_concepts_rows_are_written(tmp_path):
    model = adapted()
    export_remote_code(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rows = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".concepts." in name}
    assert rows == {
        f"model.layers.{layer}.concepts.{name}": shape
        for layer in (0, 2)
        for name, shape in [("encoder", (2, 16)), ("encoder_sum", (2,)), ("bias", (2,)), ("decoder", (2, 16))]
    }
    assert tensors.keys() - rows == set(tiny().state_dict())


def test_without_trust_it_is_the_plain_model(tmp_path):
    export_remote_code(adapted(), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    assert type(plain) is LlamaForCausalLM
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, tiny().eval()(IDS).logits)


def test_rows_stay_in_float32_in_a_model_of_less(tmp_path):
    loaded = exported(adapted(), tmp_path, dtype="bfloat16")
    assert {row.dtype for row in loaded.model.layers[0].concepts.parameters()} == {torch.float32}
    assert loaded(IDS, steering={"rude": 1.0}).logits.dtype == torch.bfloat16


def test_copies_and_pickles_of_the_model_steer(tmp_path):
    loaded = exported(adapted(), tmp_path)
    loaded.set_steering("rude", 2.0)
    with torch.no_grad():
        wanted = loaded(IDS).logits
        for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert torch.equal(twin(IDS).logits, wanted)
            twin.set_steering(None)
            assert torch.equal(loaded(IDS).logits, wanted)


def test_the_adapter_stays_as_it_was(tmp_path):
    model = adapted()
    with torch.no_grad():
        before = model(IDS, steering=STEERING).logits
        export_remote_code(model, tmp_path)
        assert torch.equal(model(IDS, steering=STEERING).logits, before)
    assert not hasattr(model.config, "scar")


def test_a_plain_configuration_makes_a_plain_model():
    model = steered_class("LlamaForCausalLM")(LlamaConfig(**SIZES))
    assert model.state_dict().keys() == tiny().state_dict().keys()
    with pytest.raises(ValueError, match="model must hold SCAR layers"):
        model.set_steering("rude", 1.0)


def test_an_adapter_that_needs_all_latents_is_refused(tmp_path):
    for fields in ({"mode": "reconstruct"}, {"gate": "topk"}):
        with pytest.raises(ValueError, match='mode must be "residual" and gate must not be "topk"'):
            export_remote_code(adapted(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_further_adapters_are_refused(tmp_path):
    model = adapted()
    lora = LoraConfig(target_modules=["q_proj"])
    inject_adapter_in_model(lora, model.get_base_model(), adapter_name="lora")
    with pytest.raises(ValueError, match="model must have no further adapters; merge or unload them first"):
        export_remote_code(model, tmp_path / "out")


def test_other_kinds_of_model_are_refused(tmp_path):
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES))
    model = get_peft_model(base, scar_peft.ScarConfig(layers=[1], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="causal language model of transformers itself, got LlamaForSequenceClass"):
        export_remote_code(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "topk"}, "scar.gate must be one of relu, threshold, open, got 'topk'"),
        ({"site": "head"}, "scar.site must be one of block, mlp, attn, got 'head'"),
        ({"concepts": ["rude", "rude"]}, "scar.concepts must be 1 to 65536 different names"),
        ({"concepts": "rude"}, "scar.concepts must be a list of names, got 'rude'"),
        ({"layers": [True]}, r"scar.layers must hold 1 to 4096 block indices, got \[True\]"),
        ({"norm_eps": float("nan")}, "scar.norm_eps must be finite and not negative, got nan"),
        ({"gate": "threshold"}, r"scar.gate_threshold must hold the layers \[1\], got None"),
        ({"default_steering": {"old": 1.0}}, r"scar.default_steering must name concepts, .*, got \['old'\]"),
        ({"colour": 1}, r"scar must not hold \['colour'\]; it may hold"),
    ],
)
def test_a_bad_section_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        ScarSection.from_dict(SECTION | changes)


def test_a_section_without_its_essentials_is_refused():
    with pytest.raises(ValueError, match=r"scar must hold \['concepts', 'site'\]"):
        ScarSection.from_dict({"layers": [1]})
