"""The configuration refuses what a model cannot be, and survives a round trip."""

import json

import pytest

from tfree_tokenizer import TFreeConfig


def test_defaults_follow_the_objective():
    bce, ce = TFreeConfig(), TFreeConfig(objective="dictionary_ce", num_hashes=8)
    assert (bce.decode_mode, bce.decode_temperature, bce.decode_pos_weight) == ("contrast", 0.06, 300.0)
    assert (ce.decode_mode, ce.decode_temperature, ce.decode_pos_weight) == ("loglik", 8.0, 1.0)


def test_save_and_load_keep_every_field(tmp_path):
    config = TFreeConfig(objective="dictionary_ce", num_lowercase=3, decode_temperature=0.125, vocab_size=700)
    config.save_pretrained(tmp_path)
    assert TFreeConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("objective", "mse", "objective must be one of"),
        ("ruleset", "v9", "ruleset must be one of"),
        ("decode_mode", "best", "decode_mode must be one of"),
        ("loss_normalization", "mean", "loss_normalization must be one of"),
        ("vocab_size", -1, "vocab_size must lie in"),
        ("vocab_size", 10**12, "vocab_size must lie in"),
        ("dictionary_nnz", 10**12, "dictionary_nnz must lie in"),
        ("hidden_size", 10**9, "hidden_size must lie in"),
        ("num_hidden_layers", 10**9, "num_hidden_layers must lie in"),
        ("decode_temperature", 0.0, "decode_temperature must be finite and above 0, got 0.0"),
        ("decode_temperature", float("nan"), "decode_temperature must be finite"),
        ("loss_pos_weight", float("inf"), "loss_pos_weight must be finite"),
        ("decode_edge_weight", -1.0, "decode_edge_weight must be finite and at least 0"),
        ("first_byte_id", 600, r"first_byte_id must lie in \[0, 512\]"),
        ("tie_word_embeddings", True, "tie_word_embeddings must be False"),
        ("hash_vocab_size", 5, "hash_vocab_size must lie in"),
        ("hash_vocab_size", 8001, "divisible by num_hashes"),
        ("num_lowercase", 11, r"num_lowercase must lie in \[0, 10\]"),
    ],
)
def test_impossible_values_are_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        TFreeConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("num_hashes", "8"), ("hash_vocab_size", True), ("vocab_size", 3.5)])
def test_values_of_the_wrong_type_are_refused_by_name(name, value):
    with pytest.raises(Exception, match=name):
        TFreeConfig(**{name: value})


def test_a_damaged_file_is_refused_by_field(tmp_path):
    TFreeConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"decode_temperature": -1}))
    with pytest.raises(ValueError, match="decode_temperature"):
        TFreeConfig.from_pretrained(tmp_path)
