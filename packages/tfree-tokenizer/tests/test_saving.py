"""A failed save leaves the previous save intact, and a new save leaves no weights of the old one behind."""

import pytest
import torch

from tfree_tokenizer import TFreeConfig, TFreeForCausalLM
from tfree_tokenizer.remote.saving_tfree import staged_folder


@pytest.fixture
def model():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return TFreeForCausalLM(TFreeConfig(vocab_size=20, hash_vocab_size=32, num_hashes=4, **sizes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_save_changes_nothing(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_failed_first_save_leaves_no_folder(tmp_path):
    target = tmp_path / "new"

    def interrupted_save():
        with staged_folder(target) as staged:
            (staged / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_save()
    assert not target.exists()


def test_shards_of_an_earlier_save_disappear(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*.safetensors*")] == ["model.safetensors"]
    loaded = TFreeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)
