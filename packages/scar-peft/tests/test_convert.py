"""The converter on synthetic checkpoints of the published layout and of trainers' files, beside the original hook."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import scar_peft
from scar_peft.checkpoint_files import PickledObjectsError
from scar_peft.checkpoint_settings import read_settings
from scar_peft.convert import LICENSE, convert_tensors, from_scar_checkpoint
from tests.support.scar import Weights, original_hook, random_weights, replacement_hook

D, N, K, LAYER = 16, 40, 12, 1
SETTINGS = {
    "model_type": "llama3_SAE",
    "base_model_name": "user/tiny-llama",
    "hook_block_num": LAYER,
    "site": "mlp",
    "n_inputs": D,
    "n_latents": N,
    "activation": "topk",
    "activation_k": K,
    "normalize": False,  # not what the published class does
    "tied": False,
    "mod_features": None,
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tensors_of(weights: Weights, prefix: str = "") -> dict[str, torch.Tensor]:
    named = {
        "pre_bias": weights.pre_bias,
        "latent_bias": weights.latent_bias,
        "encoder.weight": weights.encoder,
        "decoder.weight": weights.decoder,
    }
    return {prefix + name: torch.tensor(value, dtype=torch.float32) for name, value in named.items()}


def published(folder: Path, weights: Weights, **changes: object) -> Path:
    """A folder as on the Hub: the language model in one shard, which is not there, and the sparse coder in another."""
    folder.mkdir(exist_ok=True)
    ours = tensors_of(weights, "SAE.")
    save_file(ours, folder / "model-00002-of-00002.safetensors")
    names = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}
    index = {"weight_map": names | dict.fromkeys(ours, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(SETTINGS | changes))
    return folder


def in_float32(weights: Weights) -> Weights:
    return Weights(*(each.astype(np.float32).astype(np.float64) for each in weights))


@pytest.fixture
def weights() -> Weights:
    return in_float32(random_weights(D, N, seed=3))


def activations(model: LlamaForCausalLM, site: str, **steering: object) -> tuple[np.ndarray, np.ndarray]:
    """What the steered module makes of its output [tokens, D], and that output."""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output.reshape(-1, D).numpy()})

    block = model.model.layers[LAYER]
    target = block if site == "block" else block.mlp
    handles = [
        target.register_forward_hook(keep("before"), prepend=True),
        target.register_forward_hook(keep("after")),
    ]
    with torch.no_grad(), scar_peft.steering(model, **steering):
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen["after"], seen["before"]


@pytest.mark.parametrize("scale", [1.0, 0.0, -100.0, 50.0])
def test_reconstruct_mode_is_the_original_hook(tmp_path, weights, scale):
    base = tiny_llama().double()
    from_scar_checkpoint(published(tmp_path, weights), base).double()
    after, before = activations(base, "mlp", toxicity=scale - 1.0, rule="scale", mode="reconstruct")
    wanted = [original_hook(x, weights, K, 0, scale) for x in before]
    np.testing.assert_allclose(after, wanted, rtol=1e-9, atol=1e-9)


def test_a_latent_that_is_set_is_the_originals_replacement(tmp_path, weights):
    base = tiny_llama().double()
    from_scar_checkpoint(published(tmp_path, weights), base).double()
    after, before = activations(base, "mlp", toxicity=4.0, rule="set", mode="reconstruct")
    np.testing.assert_allclose(after, [replacement_hook(x, weights, K, 0, 4.0) for x in before], rtol=1e-9, atol=1e-9)


def test_several_concepts_with_sigmoid_behind_the_block_are_the_original_hook(tmp_path, weights):
    base = tiny_llama().double()
    folder = published(tmp_path, weights, site="block", activation="topk-sigmoid")
    from_scar_checkpoint(folder, base, concepts=["rude", "formal", "old"]).double()
    after, before = activations(base, "block", old=-21.0, mode="reconstruct")
    wanted = [original_hook(x, weights, K, 2, -20.0, "topk-sigmoid") for x in before]
    np.testing.assert_allclose(after, wanted, rtol=1e-9, atol=1e-9)


def test_a_converted_adapter_starts_neutral_and_is_not_trainable(tmp_path, weights):
    base = tiny_llama()
    with torch.no_grad():
        before = base(IDS).logits
        model = from_scar_checkpoint(published(tmp_path, weights), base)
        assert torch.equal(model(IDS).logits, before)
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.ndim and parameter.is_leaf)


def test_its_configuration_has_the_originals_meaning(tmp_path, weights):
    config = from_scar_checkpoint(published(tmp_path, weights), tiny_llama()).peft_config["default"]
    assert (config.layers, config.site, config.n_latents, config.k) == ([LAYER], "mlp", N, K)
    assert (config.concept_gate, config.steering_rule, config.normalize) == ("topk", "scale", True)
    assert config.resolved_gate == "relu"
    assert config.concepts == ["toxicity"]
    assert config.license == LICENSE == "cc-by-nc-sa-4.0"


def test_the_gate_that_differs_from_the_original_is_told(tmp_path, weights, caplog):
    caplog.set_level("WARNING", logger="scar_peft")
    model = from_scar_checkpoint(published(tmp_path, weights), tiny_llama())
    assert 'steers where the concept is above 0 (gate "relu")' in caplog.text
    assert caplog.text.count("above 0") == 1
    model.peft_config["default"].gate = "topk"
    with torch.no_grad(), scar_peft.steering(model, toxicity=-1.0):
        model(IDS)


def test_only_the_shard_with_the_sparse_coder_is_downloaded(tmp_path, weights, hub, repo_id):
    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=published(tmp_path, weights))
    HfApi().upload_file(path_or_fileobj=b"x" * 100, path_in_repo="model-00001-of-00002.safetensors", repo_id=repo_id)
    del hub.requests[:]
    model = from_scar_checkpoint(repo_id, tiny_llama(), revision="main")
    assert any("model-00002-of-00002" in path for _, path in hub.requests)
    assert not any("model-00001-of-00002" in path for _, path in hub.requests)
    assert f"weights converted from {repo_id}" in model.peft_config["default"].label_source


def test_compact_keeps_the_concepts_and_steers_alike(tmp_path, weights):
    folder = published(tmp_path, weights)
    full, small = from_scar_checkpoint(folder, tiny_llama()), from_scar_checkpoint(folder, tiny_llama(), compact=True)
    (layer,) = scar_peft.scar_layers(small)
    assert [tuple(each.shape) for each in layer.weights("default")] == [(1, D), (D, 1), (D,), (1,)]
    with torch.no_grad():
        steered = [model(IDS, steering={"toxicity": 50.0}).logits for model in (full, small)]
        assert not torch.allclose(steered[0], full(IDS).logits)
    torch.testing.assert_close(*steered)


def test_a_gsae_checkpoint_of_the_trainer_is_read_with_its_settings(tmp_path, weights, no_unpickling):
    path = tmp_path / "state_dict.pth"
    rest = {"rng_state": {"np_rng_state": np.random.get_state()}}  # what the trainer saves beside it
    torch.save({"models_state_dict": [tensors_of(weights)], **rest}, path)
    settings = {"ds_path": f"d/llama3-RTP_split-B{LAYER}-block", "k": K, "n_inputs": D, "n_latents": N}
    (tmp_path / "gsae.json").write_text(json.dumps(settings | {"activation": "topk-sigmoid"}))
    concepts = ["rude", "formal", "old"]
    model = from_scar_checkpoint(tmp_path, tiny_llama(), settings=tmp_path / "gsae.json", concepts=concepts)
    config = model.peft_config["default"]
    assert (config.site, config.activation, config.concepts) == ("block", "topk-sigmoid", concepts)
    (layer,) = scar_peft.scar_layers(model)
    np.testing.assert_array_equal(layer.weights("default").decoder.detach().numpy(), weights.decoder)


def test_the_tied_decoder_of_old_trainers_is_transposed(weights):
    tensors = tensors_of(weights)
    tensors["decoder.linear.weight"] = tensors.pop("decoder.weight").T.contiguous()
    _, found = convert_tensors(tensors, read_settings(SETTINGS))
    np.testing.assert_array_equal(found.decoder.numpy(), weights.decoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SAE.threshold": torch.ones(N)}, r"tensors must be .*, got \['threshold'\] as well"),
        ({"SAE.pre_bias": None}, r"tensors must hold pre_bias \[16\], and do not"),
        ({"SAE.latent_bias": torch.zeros(N + 1)}, r"latent_bias must have shape \[40\] by the settings, got \[41\]"),
        ({"SAE.pre_bias": torch.zeros(D, dtype=torch.int64)}, "pre_bias must be floating point, got torch.int64"),
        ({"SAE.pre_bias": torch.full((D,), torch.nan)}, "pre_bias must be finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(weights, changes, message):
    tensors = {name: value for name, value in (tensors_of(weights, "SAE.") | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_tensors(tensors, read_settings(SETTINGS))


def test_another_base_model_is_refused_with_both_sizes(tmp_path, weights):
    folder = published(tmp_path, weights, n_inputs=D + 4)
    with pytest.raises(ValueError, match=r"hidden size of .*, 20, got 16; pass the model that .* user/tiny-llama"):
        from_scar_checkpoint(folder, tiny_llama())


def test_two_layers_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match=r"layers must name one block, .*, got \[1, 2\]"):
        from_scar_checkpoint(published(tmp_path, weights), tiny_llama(), layers=[1, 2])


def test_steering_in_the_published_configuration_is_left_aside_aloud(tmp_path, weights, caplog):
    caplog.set_level("WARNING", logger="scar_peft")
    from_scar_checkpoint(published(tmp_path, weights, mod_features=0, mod_scaling=-100), tiny_llama())
    assert "mod_features and what belongs to it are left aside" in caplog.text


def test_files_that_would_have_to_be_unpickled_are_refused(tmp_path, weights, no_unpickling):
    torch.save({"models_state_dict": [tensors_of(weights)], "callback": SimpleNamespace()}, tmp_path / "state_dict.pth")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(PickledObjectsError, match=r"holds pickled objects \(types.SimpleNamespace\).*never unpickled"):
        from_scar_checkpoint(tmp_path, tiny_llama())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "config.json",
            '{"n_inputs": 16, "n_inputs": 16}',
            "config.json: is not valid JSON: key 'n_inputs' must not occur",
        ),
        ("config.json", '{"n_inputs": NaN}', "config.json: is not valid JSON: numbers must be finite, got NaN"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {}}',
            "must name tensors that begin with 'SAE.', and names none",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"SAE.pre_bias": "../x.safetensors"}}',
            "SAE.pre_bias must be in a safetensors file of the same folder, got '../x.safetensors'",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"SAE.pre_bias": "y.safetensors"}}',
            "must hold y.safetensors, which model.safetensors.index.json names, and does not",
        ),
        ("model-00002-of-00002.safetensors", "no", "model-00002-of-00002.safetensors: is truncated or damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, weights, name, content, message):
    (published(tmp_path, weights) / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        from_scar_checkpoint(tmp_path, tiny_llama())


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; pass settings="):
        from_scar_checkpoint(tmp_path, tiny_llama())
    with pytest.raises(ValueError, match=r"must hold model\.safetensors\.index\.json, model\.safetensors or"):
        from_scar_checkpoint(tmp_path, tiny_llama(), settings=SETTINGS)
    with pytest.raises(ValueError, match="source must be a folder, a file or the name of a repository"):
        from_scar_checkpoint("no such/place/there", tiny_llama())
