"""`load_pretrained`: what fits together loads, what does not is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tests.support.tfree as tiny_models
from tests.support.audit import no_unpickling


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = tiny_models.tiny_tfree(seed=4)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture
def load() -> Callable[..., Any]:
    from tfree_tokenizer.loading import load_pretrained

    return load_pretrained


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saved_model_loads_with_its_tokenizer_and_gives_the_same_logits(saved, load):
    with no_unpickling():
        tokenizer, model = load(saved)
    ids = tokenizer("the house is small, Zwetschge", return_tensors="pt")["input_ids"]
    first = tiny_models.tiny_tfree(seed=4)[0]
    assert torch.equal(model(ids).logits, first(ids).logits)
    assert tokenizer.dictionary_words == tiny_models.WORDS


def test_options_reach_the_model(saved, load):
    assert load(saved, dtype="bfloat16")[1].dtype == torch.bfloat16


def test_sharded_weights_load(saved, load, tmp_path):
    tokenizer, model = load(saved)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(load(tmp_path)[1].lm_head.weight, model.lm_head.weight)


def test_a_repository_on_the_hub_loads_at_a_revision(saved, load, hub, repo_id):
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id)
    commit = api.upload_folder(repo_id=repo_id, folder_path=saved).oid
    assert load(repo_id, revision=commit)[1].config.dictionary_fingerprint == load(saved)[0].dictionary_fingerprint


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tfree_words.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, load, name):
    (folder / name).unlink()
    with pytest.raises(OSError, match=f"checkpoint has no {name}"):
        load(folder)


def test_a_repository_without_tokenizer_files_says_so(saved, load, hub, repo_id):
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=saved, ignore_patterns=["tokenizer_config.json"])
    with pytest.raises(OSError, match=f"{repo_id} has no tokenizer_config.json"):
        load(repo_id)


def test_a_folder_that_does_not_exist_is_not_taken_for_a_repository(load, tmp_path):
    with pytest.raises(OSError, match="neither a folder nor the name of a repository"):
        load(tmp_path / "nowhere")


def test_other_weight_formats_are_refused(folder, load):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with no_unpickling(), pytest.raises(OSError, match=r"has no model\.safetensors"):
        load(folder)
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        load(folder, use_safetensors=False)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_truncated_weights_are_named(folder, load, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: is truncated or damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tfree_words.json", '["the", "house"'),
        ("tfree_words.json", '["the", 3]'),
        ("tfree_words.json", '{"the": 1}'),
        ("tfree_words.json", '["the", "the"]'),
        ("tfree_words.json", '["two words"]'),
        ("tfree_words.json", "[]"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"ruleset": "v3"}'),
        ("tokenizer_config.json", '{"ruleset": '),
        ("tokenizer_config.json", '{"max_word_bytes": -1}'),
        ("tokenizer_config.json", '{"base_special_tokens": 3}'),
        ("config.json", '{"model_type": "tfree", "vocab_size": NaN}'),
        ("config.json", '{"model_type": "tfree", "hidden_size": 1e999}'),
        ("config.json", '{"model_type": "tfree", "model_type": "tfree"}'),
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", "null"),
        ("config.json", ""),
        ("config.json", "[" * 100_000),
    ],
)
def test_a_damaged_text_file_is_named(folder, load, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", -16),
        ("hidden_size", True),
        ("hidden_size", "16"),
        ("hidden_size", 1 << 40),
        ("intermediate_size", 1 << 40),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("vocab_size", 10**12),
        ("vocab_size", 3),
        ("hash_vocab_size", 1),
        ("num_hashes", 0),
        ("num_lowercase", 99),
        ("hash_scheme", "sha1"),
        ("objective", "mse"),
        ("decode_temperature", -1.0),
        ("dictionary_nnz", -1),
        ("dictionary_nnz", 10**15),
        ("dictionary_fingerprint", None),
        ("first_byte_id", 10**6),
        ("tie_word_embeddings", True),
    ],
)
def test_an_impossible_number_in_the_configuration_is_named(folder, load, field, value):
    edit(folder / "config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"config\.json: .*{field}"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 3, r"no weight file holds tensor model\.layers\.2\..* config\.json"),
        ("num_hidden_layers", 1, r"model\.safetensors: tensor model\.layers\.1\..* has no place"),
        ("intermediate_size", 33, r"model\.safetensors: tensor .*gate_proj.weight must have shape \[33, 16\]"),
        ("hidden_size", 17, r"config\.json: .*hidden size \(17\) is not a multiple of the number of attention heads"),
        ("hash_vocab_size", 128, r"model\.safetensors: tensor .* must have shape \[128, 16\]"),
        ("dictionary_nnz", 5, r"model\.safetensors: tensor .*word_units must have shape \[5\]"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_names_the_tensor(folder, load, field, value, message):
    edit(folder / "config.json", **{field: value})
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_another_tokenizers_words_are_refused_with_both_fingerprints(folder, load):
    words = json.loads((folder / "tfree_words.json").read_text())
    (folder / "tfree_words.json").write_text(json.dumps(words[::-1]))
    fingerprint = json.loads((folder / "config.json").read_text())["dictionary_fingerprint"]
    with pytest.raises(ValueError, match=rf"config\.json: dictionary_fingerprint .*{fingerprint}") as raised:
        load(folder)
    assert len(set(re.findall("[0-9a-f]{64}", str(raised.value)))) == 2


def test_a_damaged_dictionary_tensor_is_named(folder, load):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.dictionary.unit_rows"][0, 0] = 10**6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint: .*unit_rows must lie in \[0, 64\)"):
        load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", "a/model.safetensors", 3])
def test_an_index_cannot_point_outside_the_folder(folder, load, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map must name safetensors files in the same folder"):
        load(folder)


def test_nothing_of_the_folders_own_code_runs(folder, load):
    (folder / "modeling_tfree.py").write_text("raise SystemExit('this must not run')")
    (folder / "tokenization_tfree.py").write_text("raise SystemExit('this must not run')")
    assert load(folder)[1].config.model_type == "tfree"


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
FIELDS = [
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "hash_vocab_size",
    "num_hashes",
    "num_lowercase",
    "hash_seed",
    "ruleset",
    "first_byte_id",
    "decode_mode",
    "decode_temperature",
    "decode_edge_weight",
    "loss_pos_weight",
    "dictionary_units",
    "rms_norm_eps",
    "eos_token_id",
    "rope_parameters",
    "head_dim",
    "pad_token_id",
]


@settings(max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(field=st.sampled_from(FIELDS), value=anything)
def test_any_value_of_a_field_is_accepted_or_refused_by_file(folder, field, value):
    from tfree_tokenizer.loading import find_config

    before = (folder / "config.json").read_text()
    edit(folder / "config.json", **{field: value})
    problem = ""
    try:
        find_config(folder)
    except ValueError as error:
        problem = str(error)
    (folder / "config.json").write_text(before)
    assert not problem or problem.startswith(f"{folder / 'config.json'}: ")
