"""peft's calls on models with SCAR adapters: what peft's own tests ask of every method, and what only this one does."""

import json

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from transformers import BertForTokenClassification

from scar_peft import ScarLayer, ScarModel, scar_layers, set_steering
from tests.support import scar_models as tiny

REQUEST = {"steering": {"a": 1.0, "b": -0.5}}
FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
NAMES = ["scar_encoder", "scar_decoder", "scar_pre_bias", "scar_latent_bias"]


@pytest.fixture
def model():
    return tiny.adapted()


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_bare(base, keys):
    assert set(base.state_dict()) == keys
    assert not any(isinstance(module, ScarLayer) for module in base.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_a_model_has_what_peft_promises(model):
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert isinstance(model.base_model, ScarModel)
    for attribute in ("save_pretrained", "from_pretrained", "push_to_hub", "generate", "set_steering"):
        assert hasattr(model, attribute)
    assert model.active_adapters == ["default"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    path = "base_model.model.model.layers.{}.scar.{}.default"
    assert trainable == {path.format(layer, name) for layer in (1, 2) for name in NAMES}
    assert model.get_nb_trainable_parameters()[0] == 2 * (2 * 96 * 32 + 32 + 96)


def test_modules_of_the_base_keep_names_and_classes():
    base = tiny.built()
    before = {name: type(module) for name, module in base.named_modules()}
    keys = set(base.state_dict())
    model = tiny.adapted(base, site="mlp")
    after = {name: type(module) for name, module in model.get_base_model().named_modules()}
    assert {name: after[name] for name in before} == before
    assert {key for key in model.get_base_model().state_dict() if ".scar." not in key} == keys


def test_status_is_what_peft_expects_of_a_method(model):
    status = get_model_status(model)
    assert status.enabled
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default"]
    assert [layer.name for layer in model.get_layer_status()] == [f"model.model.layers.{i}.scar" for i in (1, 2)]


@pytest.mark.parametrize("name", ["mine", "scar", "car", "a", "scar_", "default_2"])
@pytest.mark.filterwarnings("ignore:Adapter name")
def test_any_adapter_name_round_trips(name, tmp_path):
    model = tiny.adapted(adapter_name=name)
    expected = tiny.logits(model, **REQUEST)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.built(), tmp_path / name, adapter_name=name)
    assert_same(tiny.logits(loaded, **REQUEST), expected)
    assert loaded.active_adapters == [name]
    keys = {f"base_model.model.model.layers.{layer}.scar.{each}" for layer in (1, 2) for each in NAMES}
    assert set(load_file(tmp_path / name / "adapter_model.safetensors")) == keys


@pytest.mark.parametrize("name", ["a.b", "."])
def test_names_that_cannot_be_parameters_are_refused(name):
    base = tiny.built()
    keys = set(base.state_dict())
    with pytest.raises(ValueError, match=r'adapter_name must not be empty or hold "\."'):
        get_peft_model(base, tiny.settings(), adapter_name=name)
    assert_bare(base, keys)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("site", ["block", "mlp", "attn"])
def test_what_is_saved_loads_under_any_name(site, low_cpu_mem_usage, tmp_path):
    model = tiny.adapted(site=site)
    expected = tiny.logits(model, **REQUEST)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    loaded = PeftModel.from_pretrained(
        tiny.built(), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert_same(tiny.logits(loaded, **REQUEST), expected)
    for parameter in loaded.parameters():
        assert not parameter.is_meta
        assert not parameter.requires_grad
    assert loaded.peft_config["other"].inference_mode


def test_loading_low_on_memory_into_a_model_that_has_adapters(model, tmp_path):
    expected = tiny.logits(model, **REQUEST)
    model.save_pretrained(tmp_path)
    other = tiny.adapted(seed=5, concepts=["c"])
    other.load_adapter(tmp_path, adapter_name="loaded", low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in other.parameters())
    other.set_adapter("loaded")
    assert_same(tiny.logits(other, **REQUEST), expected)


def test_configuration_files_hold_what_the_method_needs(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SCAR"
    assert saved["layers"] == [1, 2]
    assert saved["target_modules"] == r"model\.layers\.1|model\.layers\.2"
    assert saved["inference_mode"] is True
    assert saved["hidden_size"] == 32
    assert PeftConfig.from_pretrained(tmp_path).concepts == ["a", "b"]


def test_saving_some_of_the_adapters(model, tmp_path):
    model.add_adapter("second", tiny.settings(concepts=["c"]))
    model.add_adapter("third", tiny.settings(concepts=["d"]))
    model.save_pretrained(tmp_path, selected_adapters=["default", "third"])
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"third"}
    assert {path.name for path in (tmp_path / "third").iterdir()} == FILES - {"README.md"}
    with pytest.raises(ValueError, match="You passed an invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["fourth"])


@pytest.mark.filterwarnings("ignore:Adapter name")
def test_names_that_begin_alike_are_kept_apart(tmp_path):
    names = ["ab", "abc", "a"]
    model = tiny.adapted(adapter_name="ab", seed=0)
    for seed, name in enumerate(names[1:], 1):
        torch.manual_seed(seed)
        model.add_adapter(name, tiny.settings())
        tiny.give_biases(model, name)
    expected = {}
    for name in names:
        model.set_adapter(name)
        expected[name] = tiny.logits(model, **REQUEST)
    model.save_pretrained(tmp_path)
    for name in names:
        loaded = PeftModel.from_pretrained(tiny.built(), tmp_path / name)
        assert_same(tiny.logits(loaded, **REQUEST), expected[name])


def test_several_adapters_are_loaded_and_chosen_from(model, tmp_path):
    expected = tiny.logits(model, **REQUEST)
    model.save_pretrained(tmp_path / "first")
    tiny.adapted(seed=7).save_pretrained(tmp_path / "second")
    loaded = PeftModel.from_pretrained(tiny.built(), tmp_path / "first", adapter_name="first")
    load_result = loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert not load_result.unexpected_keys
    assert not load_result.missing_keys
    assert_same(tiny.logits(loaded, **REQUEST), expected)
    loaded.set_adapter("second")
    assert not torch.allclose(tiny.logits(loaded, **REQUEST), expected)
    loaded.set_adapter("first")
    assert_same(tiny.logits(loaded, **REQUEST), expected)


def test_adapters_on_different_layers_and_sites(tmp_path):
    model = tiny.adapted(layers=[0], site="mlp", adapter_name="first")
    torch.manual_seed(3)
    model.add_adapter("second", tiny.settings(layers=[0, 2], site="block", concepts=["c"]))
    model.base_model.set_adapter(["first", "second"])
    assert {(layer.layer_index, layer.site) for layer in scar_layers(model)} == {(0, "mlp"), (0, "block"), (2, "block")}
    both = tiny.logits(model, steering={"a": 1.0, "c": 1.0})
    model.delete_adapter("first")
    assert not torch.allclose(tiny.logits(model, steering={"c": 1.0}), both)
    assert [layer.site for layer in scar_layers(model)] == ["block", "block"]


def test_auto_classes_load_base_and_adapter(tmp_path):
    base = tiny.built()
    base.save_pretrained(tmp_path / "base")
    model = tiny.adapted(base)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    expected = tiny.logits(model, **REQUEST)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_same(tiny.logits(loaded, **REQUEST), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_generate_takes_keywords_and_positions(dtype):
    model = tiny.adapted(tiny.built().to(dtype))
    ids = tiny.some_ids()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **REQUEST}
    by_name = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert by_name.shape == (3, 13)
    assert torch.equal(model.generate(ids, **options), by_name)
    assert torch.equal(model.generate(inputs=ids, **options), by_name)


def test_dtypes_of_adapters_on_a_half_precision_base():
    assert {p.dtype for p in parameters(get_peft_model(half(), tiny.settings()))} == {torch.float32}
    kept = get_peft_model(half(), tiny.settings(), autocast_adapter_dtype=False)
    assert {p.dtype for p in parameters(kept)} == {torch.bfloat16}
    assert tiny.logits(kept, **REQUEST).dtype == torch.bfloat16
    assert tiny.logits(kept, steering={"a": 1.0}, mode="reconstruct").isfinite().all()


def test_half_precision_steering_is_close_to_full():
    full, low = tiny.adapted(), tiny.adapted(half())
    for mode in ("residual", "reconstruct"):
        difference = (tiny.logits(low, **REQUEST, mode=mode).float() - tiny.logits(full, **REQUEST, mode=mode)).abs()
        assert difference.mean() < 0.05


def test_deleting_the_active_adapter_activates_another(model):
    expected = tiny.logits(model, **REQUEST)
    model.add_adapter("second", tiny.settings(concepts=["c"]))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert "second" not in model.peft_config
    assert not any("second" in name for name, _ in model.named_parameters())
    assert_same(tiny.logits(model, **REQUEST), expected)
    with pytest.raises(ValueError, match=r"steering must name concepts of the adapter, \['a', 'b'\], got \['c'\]"):
        model.set_steering("c", 1.0)


def test_deleting_an_inactive_adapter_changes_nothing(model):
    expected = tiny.logits(model, **REQUEST)
    model.add_adapter("second", tiny.settings())
    model.set_steering("a", 2.0)
    model.delete_adapter("second")
    model.set_steering(None)
    assert model.active_adapters == ["default"]
    assert_same(tiny.logits(model, **REQUEST), expected)


def test_deleting_what_is_not_there_is_an_error(model):
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")


def test_deleting_the_last_adapter_leaves_the_base_as_it_was():
    base = tiny.built()
    keys, expected = set(base.state_dict()), tiny.logits(base)
    model = tiny.adapted(base)
    model.delete_adapter("default")
    assert_bare(base, keys)
    assert torch.equal(tiny.logits(base), expected)
    assert torch.equal(tiny.logits(model.unload()), expected)


def test_an_adapter_can_come_back_after_the_last_was_deleted(tmp_path):
    model = tiny.adapted()
    expected = tiny.logits(model, **REQUEST)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert_same(tiny.logits(model, **REQUEST), expected)


@pytest.mark.parametrize("site", ["block", "mlp", "attn"])
def test_unloading_leaves_the_base_as_it_was(site):
    base = tiny.built()
    keys, expected = set(base.state_dict()), tiny.logits(base)
    model = tiny.adapted(base, site=site)
    model.set_steering("a", 1.0)
    assert not torch.equal(tiny.logits(model), expected)
    bare = model.unload()
    assert bare is base
    assert_bare(base, keys)
    assert torch.equal(tiny.logits(base), expected)
    assert not hasattr(base, "peft_config")
    again = tiny.adapted(base, site=site)
    assert not torch.equal(tiny.logits(again, **REQUEST), expected)


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_before_anything_changes(model, call):
    model.set_steering("a", 1.0)
    expected = tiny.logits(model)
    with pytest.raises(
        ValueError, match=r"SCAR adapters depend on the activation and cannot be merged; use unload\(\)"
    ):
        getattr(model, call)()
    with pytest.raises(ValueError, match="cannot be merged"):
        scar_layers(model)[0].merge()
    assert torch.equal(tiny.logits(model), expected)


def test_disabled_adapters_give_the_base_and_come_back(model):
    base = tiny.logits(model)
    model.set_steering(REQUEST["steering"])
    expected = tiny.logits(model)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
        assert torch.equal(tiny.logits(model, steering={"a": 5.0}), base)
    assert torch.equal(tiny.logits(model), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(tiny.logits(model), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(tiny.logits(model), expected)


def test_embeddings_may_come_instead_of_tokens(model):
    ids = tiny.some_ids()
    with torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(ids), **REQUEST).logits
    assert torch.equal(found, tiny.logits(model, **REQUEST))


def test_device_map_on_one_device(tmp_path):
    tiny.built().save_pretrained(tmp_path / "base")
    model = tiny.adapted()
    model.save_pretrained(tmp_path / "adapter")
    base = type(tiny.built()).from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    for device_map in ({"": "cpu"}, "auto"):
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", device_map=device_map).eval()
        assert_same(tiny.logits(loaded, **REQUEST), tiny.logits(model, **REQUEST))
        base = loaded.unload()


def test_an_adapter_on_a_dispatched_model():
    from accelerate import dispatch_model

    base = tiny.built()
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    device_map = dict.fromkeys([*names, "model.rotary_emb"], "cpu")
    base = dispatch_model(base, device_map, main_device="cpu", force_hooks=True)
    assert hasattr(base.model.layers[1], "_hf_hook")
    found = tiny.logits(tiny.adapted(base), **REQUEST)
    assert torch.equal(found, tiny.logits(tiny.adapted(), **REQUEST))


@pytest.mark.parametrize("order", ["LoRA first", "SCAR first"])
@pytest.mark.parametrize("site", ["block", "mlp"])
def test_lora_and_scar_on_one_model(order, site, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(9)
    with_lora = get_peft_model(tiny.built(), lora).eval()
    with_lora.save_pretrained(tmp_path)
    plain = tiny.logits(with_lora)
    lora_keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    base = tiny.built()
    torch.manual_seed(1)
    if order == "LoRA first":
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
        inject_adapter_in_model(tiny.settings(site=site), base, adapter_name="concepts")
    else:
        inject_adapter_in_model(tiny.settings(site=site), base, adapter_name="concepts")
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    assert_same(tiny.logits(model), plain)
    if order == "LoRA first":
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "adapter_model.safetensors")) == lora_keys
    set_steering(base, "a", 2.0)
    assert not torch.allclose(tiny.logits(model), plain)
    with model.disable_adapter():
        assert not torch.allclose(tiny.logits(model), plain)
    set_steering(base, None)
    assert_same(tiny.logits(model), plain)
    keys = get_peft_model_state_dict(base, adapter_name="concepts") if order == "LoRA first" else {}
    assert not any("lora" in key for key in keys)


def test_other_methods_beside_it_are_refused_by_peft(model):
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'SCAR' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny.built(), tiny.settings(), mixed=True)


def test_sequence_classifiers_keep_their_trained_heads(tmp_path):
    base = tiny.built(tiny.bert)
    model = tiny.adapted(base, task_type="SEQ_CLS")
    ids = tiny.some_ids()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trainable)
    expected = tiny.logits(model, ids, **REQUEST)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.built(tiny.bert), tmp_path).eval()
    assert_same(tiny.logits(loaded, ids, **REQUEST), expected)


def test_token_classifiers_and_feature_extractors():
    base = tiny.built(lambda: BertForTokenClassification(tiny.bert().config))
    model = tiny.adapted(base, task_type="TOKEN_CLS")
    assert not torch.equal(tiny.logits(model, **REQUEST), tiny.logits(model))
    body = tiny.adapted(tiny.built().model, task_type="FEATURE_EXTRACTION")
    with torch.no_grad():
        states = [body(input_ids=tiny.some_ids(), **request).last_hidden_state for request in ({}, REQUEST)]
    assert not torch.equal(*states)


def test_decoders_of_encoder_decoders_are_meant():
    model = tiny.adapted(tiny.built(tiny.t5), task_type="SEQ_2_SEQ_LM")
    names = [name for name, module in model.named_modules() if isinstance(module, ScarLayer)]
    assert names == [f"base_model.model.decoder.block.{index}.scar" for index in (1, 2)]
    ids = tiny.some_ids()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    neutral = model.generate(input_ids=ids, **options)
    steered = model.generate(input_ids=ids, **options, steering={"a": [5.0, -5.0, 0.0]}, rule="add")
    assert not torch.equal(steered[0], neutral[0])
    assert torch.equal(steered[2], neutral[2])


def test_an_adapter_of_another_width_is_refused_by_both_sizes(tmp_path):
    tiny.adapted().save_pretrained(tmp_path)
    base = tiny.llama(hidden_size=48)
    keys = set(base.state_dict())
    with pytest.raises(ValueError, match="hidden_size of the adapter is 32, but the model's is 48"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_bare(base, keys)


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path):
    tiny.adapted(layers=[2]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers must lie in \[-2, 1\], because the model has 2 blocks, got 2"):
        PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), tmp_path)


def test_adapter_weights_load_by_state_dict_into_a_model_of_the_same_form(model):
    twin = tiny.adapted(seed=4)
    assert not torch.allclose(tiny.logits(twin, **REQUEST), tiny.logits(model, **REQUEST))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(twin, **REQUEST), tiny.logits(model, **REQUEST))


def half():
    return tiny.built().to(torch.bfloat16)


def parameters(model):
    return [parameter for name, parameter in model.named_parameters() if "scar_" in name]
