"""`compact` and `swap_weights`: small adapters, and other weights in place."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from scar_peft import compact, record_scores, scar_layers, set_steering, steering, swap_weights
from tests.support import scar_models as tiny

RULES = ["scale", "set", "add", "add_gated"]


def scores(model, kind="latent"):
    with torch.no_grad(), record_scores(model, kind) as record:
        model(input_ids=tiny.some_ids())
    return record.scores


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "topk-sigmoid"},
        {"activation": "topk-tanh"},
        {"activation": "relu"},
        {"concept_gate": "topk"},
        {"gate": "threshold", "gate_threshold": {1: 0.2, 2: 0.4}},
        {"normalize": False},
    ],
    ids=str,
)
def test_compact_adapters_detect_and_steer_as_before(fields, tmp_path):
    model = tiny.adapted(**fields)
    wanted = [tiny.logits(model, steering={"a": 1.0, "b": [0.5, 0.0, -2.0]}, rule=rule) for rule in RULES]
    wanted_scores = scores(model), scores(model, "pre")
    assert compact(model) is model
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.built(), tmp_path).eval()
    for adapter in (model, loaded):
        assert adapter.peft_config["default"].compact
        for rule, expected in zip(RULES, wanted, strict=True):
            found = tiny.logits(adapter, steering={"a": 1.0, "b": [0.5, 0.0, -2.0]}, rule=rule)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for kind, expected in zip(("latent", "pre"), wanted_scores, strict=True):
            torch.testing.assert_close(scores(adapter, kind)["a"], expected["a"], rtol=1e-5, atol=1e-5)


def test_compact_adapters_are_small(tmp_path):
    model = tiny.adapted()
    model.save_pretrained(tmp_path / "full")
    compact(model).save_pretrained(tmp_path / "small")
    shapes = {key.rsplit(".", 1)[1]: tuple(t.shape) for key, t in tensors(tmp_path / "small").items()}
    concepts, d = 2, 32
    assert shapes == {
        "scar_encoder": (concepts, d),
        "scar_decoder": (d, concepts),
        "scar_pre_bias": (d,),
        "scar_latent_bias": (concepts,),
    }
    assert numbers(tmp_path / "full") == 2 * (2 * 96 * d + d + 96)
    assert numbers(tmp_path / "small") == 2 * (2 * concepts * d + d + concepts)


def test_one_published_concept_takes_48_kilobytes():
    d = 4096
    assert round((2 * d + d + 1) * 4 / 1024) == 48


def test_compact_adapters_cannot_reconstruct():
    model = compact(tiny.adapted())
    expected = tiny.logits(model, steering={"a": 1.0})
    with pytest.raises(ValueError, match=r"a compact adapter holds its concepts only\. Load the full adapter"):
        tiny.logits(model, steering={"a": 1.0}, mode="reconstruct")
    with pytest.raises(ValueError, match="a compact adapter holds its concepts only"):
        set_steering(model, "a", 1.0, mode="reconstruct")
    assert torch.equal(tiny.logits(model, steering={"a": 1.0}), expected)


@pytest.mark.parametrize("fields", [{"mode": "reconstruct"}, {"concept_gate": "topk", "gate": "topk"}], ids=str)
def test_adapters_that_need_all_latents_stay_as_they_are(fields):
    model = tiny.adapted(**fields)
    expected = tiny.logits(model, steering={"a": 1.0})
    with pytest.raises(ValueError, match=r"a compact adapter cannot have mode=\"reconstruct\" or gate=\"topk\""):
        compact(model)
    assert torch.equal(tiny.logits(model, steering={"a": 1.0}), expected)
    assert scar_layers(model)[0].weights().encoder.shape == (96, 32)


def test_unknown_adapters_are_named():
    with pytest.raises(ValueError, match='model must hold SCAR layers of the adapter "other"'):
        compact(tiny.adapted(), "other")


def test_swapped_weights_are_those_of_the_other_adapter(tmp_path):
    other = tiny.adapted(seed=8, calibration={"a": {"threshold": 0.5}}, metrics={"auroc": 1.0})
    other.save_pretrained(tmp_path)
    model = tiny.adapted()
    storage = [each.data_ptr() for layer in scar_layers(model) for each in layer.weights()]
    tiny.logits(model, steering={"a": 1.0})  # something is folded already
    swap_weights(model, "default", tmp_path)
    assert [each.data_ptr() for layer in scar_layers(model) for each in layer.weights()] == storage
    wanted = tiny.logits(other, steering={"a": 1.0})
    torch.testing.assert_close(tiny.logits(model, steering={"a": 1.0}), wanted, rtol=1e-5, atol=1e-5)
    assert model.peft_config["default"].calibration == {"a": {"threshold": 0.5}}
    assert model.peft_config["default"].metrics == {"auroc": 1.0}


def test_swapping_keeps_strengths_and_works_on_any_module_tree(tmp_path):
    other = tiny.adapted(seed=8)
    other.save_pretrained(tmp_path)
    model = tiny.adapted()
    model.set_steering("a", 1.0)
    swap_weights(model.get_base_model(), "default", tmp_path)
    wanted = tiny.logits(other, steering={"a": 1.0})
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", ["mlp", "attn"])
def test_layers_of_an_encoder_decoder_are_told_apart(site, tmp_path):
    """Their sites have numbers in their names too."""
    fields = {"task_type": "SEQ_2_SEQ_LM", "site": site, "layers": [0, 1, 2]}
    other = tiny.adapted(tiny.built(tiny.t5), seed=8, **fields)
    other.save_pretrained(tmp_path)
    model = tiny.adapted(tiny.built(tiny.t5), **fields)
    swap_weights(model, "default", tmp_path)
    for found, wanted in zip(scar_layers(model), scar_layers(other), strict=True):
        assert all(torch.equal(*pair) for pair in zip(found.weights(), wanted.weights(), strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [0, 1]}, r"layers in source must be \[1, 2\], got \[0, 1\]: load it as an adapter"),
        ({"site": "mlp"}, "site in source must be 'block', got 'mlp'"),
        ({"concepts": ["a", "c"]}, r"concepts in source must be \['a', 'b'\], got \['a', 'c'\]"),
        ({"activation": "relu"}, "activation in source must be 'topk', got 'relu'"),
        ({"concept_gate": "topk"}, "concept_gate in source must be 'relu', got 'topk'"),
        ({"k": 7}, "k in source must be 8, got 7"),
        ({"normalize": False}, "normalize in source must be True, got False"),
        ({"n_latents": 64}, r"encoder in source must have the shape \(96, 32\), got \(64, 32\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_changes(fields, message, tmp_path):
    tiny.adapted(seed=8, **fields).save_pretrained(tmp_path)
    model = tiny.adapted()
    expected = tiny.logits(model, steering={"a": 1.0})
    with pytest.raises(ValueError, match=message):
        swap_weights(model, "default", tmp_path)
    assert torch.equal(tiny.logits(model, steering={"a": 1.0}), expected)


def test_compact_and_full_are_not_mixed_up(tmp_path):
    compact(tiny.adapted(seed=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compact in source must be False, got True"):
        swap_weights(tiny.adapted(), "default", tmp_path)
    swap_weights(compact(tiny.adapted()), "default", tmp_path)


def test_other_methods_and_missing_tensors_are_refused(tmp_path):
    get_peft_model(tiny.built(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="source must hold a SCAR adapter, got LoraConfig"):
        swap_weights(tiny.adapted(), "default", tmp_path / "lora")
    tiny.adapted(seed=8).save_pretrained(tmp_path / "half")
    from safetensors.torch import save_file

    kept = {key: tensor for key, tensor in tensors(tmp_path / "half").items() if "layers.2" not in key}
    save_file(kept, tmp_path / "half" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"source must hold model\.layers\.2\.scar\.scar_encoder"):
        swap_weights(tiny.adapted(), "default", tmp_path / "half")


def test_swapping_inside_a_block_keeps_its_strengths(tmp_path):
    other = tiny.adapted(seed=8)
    other.save_pretrained(tmp_path)
    model = tiny.adapted()
    with steering(model, a=1.0):
        swap_weights(model, "default", tmp_path)
        found = tiny.logits(model)
    torch.testing.assert_close(found, tiny.logits(other, steering={"a": 1.0}), rtol=1e-5, atol=1e-5)


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def numbers(folder):
    return sum(tensor.numel() for tensor in tensors(folder).values())
