"""transformers' own calls for adapters, on models without any PEFT wrapper."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scar_peft import ScarLayer, record_scores, scar_layers, set_steering, steering
from tests.support import scar_models as tiny

STRENGTHS = {"a": 1.0, "b": -0.5}


@pytest.fixture
def folder(tmp_path):
    """A saved adapter."""
    tiny.adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def expected():
    return tiny.logits(tiny.adapted(), steering=STRENGTHS)


def steered(model):
    with steering(model, STRENGTHS):
        return tiny.logits(model)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", ["block", "mlp", "attn"])
def test_load_adapter_loads_every_tensor(site, tmp_path):
    model = tiny.adapted(site=site)
    expected = tiny.logits(model, steering=STRENGTHS)
    model.save_pretrained(tmp_path)
    base = tiny.built()
    neutral = tiny.logits(base)
    base.load_adapter(tmp_path)
    assert torch.equal(tiny.logits(base), neutral)
    assert_same(steered(base), expected)
    for layer, original in zip(scar_layers(base), scar_layers(model), strict=True):
        for found, wanted in zip(layer.weights(), original.weights(), strict=True):
            assert torch.equal(found, wanted)
    assert not any(parameter.is_meta for parameter in base.parameters())


def test_load_adapter_works_on_a_half_precision_base(folder):
    base = tiny.built().to(torch.bfloat16)
    base.load_adapter(folder)
    loaded = PeftModel.from_pretrained(tiny.built().to(torch.bfloat16), folder)
    difference = (steered(base) - tiny.logits(loaded, steering=STRENGTHS)).abs().max()
    assert difference < 0.3


def test_from_pretrained_of_an_adapter_folder(tmp_path, expected):
    base = tiny.built()
    base.save_pretrained(tmp_path / "base")
    model = tiny.adapted(base)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert_same(steered(loaded), expected)


def test_add_set_disable_enable_and_delete(expected):
    base = tiny.built()
    keys, neutral = set(base.state_dict()), tiny.logits(base)
    torch.manual_seed(1)
    base.add_adapter(tiny.settings(), adapter_name="first")
    tiny.give_biases(base, "first")
    assert_same(steered(base), expected)
    base.add_adapter(tiny.settings(concepts=["c"], layers=[0]), adapter_name="second")
    assert base.active_adapters() == ["second"]
    set_steering(base, "c", 2.0)
    second = tiny.logits(base)
    assert not torch.equal(second, neutral)
    base.set_adapter("first")
    assert torch.equal(tiny.logits(base), neutral)
    assert_same(steered(base), expected)
    base.set_adapter(["first", "second"])
    assert not torch.equal(tiny.logits(base), neutral)
    base.disable_adapters()
    assert torch.equal(steered(base), neutral)
    base.enable_adapters()
    assert not torch.equal(steered(base), neutral)
    base.delete_adapter("second")
    assert torch.equal(tiny.logits(base), neutral)
    base.delete_adapter("first")
    assert set(base.state_dict()) == keys
    assert not any(isinstance(module, ScarLayer) for module in base.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_adapter_state_and_saving(folder, tmp_path, expected):
    base = tiny.built()
    base.load_adapter(folder, adapter_name="mine")
    base.set_adapter("mine")
    state = base.get_adapter_state_dict()
    stored = load_file(folder / "adapter_model.safetensors")
    assert {f"base_model.model.{key}" for key in state} == set(stored)
    base.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(again) == set(stored)
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    assert_same(tiny.logits(PeftModel.from_pretrained(tiny.built(), tmp_path / "again"), steering=STRENGTHS), expected)


def test_two_adapters_under_names_of_their_own(folder, tmp_path, expected):
    other = tiny.adapted(seed=6, concepts=["c", "d"])
    other.save_pretrained(tmp_path / "other")
    base = tiny.built()
    base.load_adapter(folder, adapter_name="first")
    base.load_adapter(tmp_path / "other", adapter_name="second")
    base.set_adapter("first")
    assert_same(steered(base), expected)
    base.set_adapter("second")
    with steering(base, c=1.0):
        assert_same(tiny.logits(base), tiny.logits(other, steering={"c": 1.0}))
    with pytest.raises(ValueError, match="Adapter with name first already exists"):
        base.load_adapter(folder, adapter_name="first")


def test_lora_loads_after_scar_with_its_own_keys(folder, tmp_path, expected):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with_lora = get_peft_model(tiny.built(), lora).eval()
    with_lora.save_pretrained(tmp_path / "lora")
    base = tiny.built()
    base.load_adapter(folder, adapter_name="concepts")
    base.load_adapter(tmp_path / "lora", adapter_name="lora")
    base.set_adapter(["concepts", "lora"])
    assert_same(tiny.logits(base), tiny.logits(with_lora))
    assert not torch.allclose(steered(base), tiny.logits(with_lora))
    base.set_adapter("concepts")
    assert_same(steered(base), expected)


def test_scores_and_generation_without_a_wrapper(folder):
    model, base = tiny.adapted(), tiny.built()
    base.load_adapter(folder)
    ids = tiny.some_ids()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with steering(base, a=[8.0, 0.0, -8.0], rule="add"), record_scores(base) as record:
        found = base.generate(ids, **options)
    request = {"steering": {"a": [8.0, 0.0, -8.0]}, "rule": "add"}
    wanted = model.generate(input_ids=ids, **options, **request, return_concept_scores=True)
    assert torch.equal(found, wanted.sequences)
    torch.testing.assert_close(record.scores["a"], wanted.concept_scores["a"][:, :-1], rtol=1e-4, atol=1e-5)


def test_a_model_inside_another_module_is_steered(folder):
    base = tiny.built()
    base.load_adapter(folder)
    shell = torch.nn.ModuleDict({"inner": base})
    neutral = tiny.logits(base)
    with steering(shell, a=1.0):
        assert not torch.equal(tiny.logits(base), neutral)
