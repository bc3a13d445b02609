"""Configuration files of original checkpoints: what is read from them, and what is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.original_tfree import OriginalModel

TRANSFORMER, TOKENIZER = "transformer/transformer_config.yaml", "tokenizer/tokenizer_config.yaml"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return OriginalModel().save(tmp_path / "original", with_tokenizer=False)


@pytest.fixture
def read_settings() -> Callable[..., Any]:
    from tfree_tokenizer import original_settings

    return original_settings.read_settings


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (TRANSFORMER, "mlp_type", "simple_gelu"),
        (TRANSFORMER, "norm", "layer"),
        (TRANSFORMER, "bias_terms", True),
        (TRANSFORMER, "do_classic_tokenization", True),
        (TRANSFORMER, "weight_tying", True),
        (TRANSFORMER, "rotary_percentage", 0.25),
        (TOKENIZER, "do_classic_tokenization", True),
        (TOKENIZER, "lowercase", True),
        (TOKENIZER, "entire_words", True),
        (TOKENIZER, "initialize", "orthogonal"),
    ],
)
def test_an_unsupported_setting_is_named(source, read_settings, file, key, value):
    edit(source / file, **{key: value})
    with pytest.raises(ValueError, match=rf"{file}: {key}: {value!r} is not supported"):
        read_settings(source)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (TRANSFORMER, "num_attention_heads", 0),
        (TRANSFORMER, "num_attention_heads", True),
        (TRANSFORMER, "num_attention_heads", None),
        (TRANSFORMER, "rotary_embedding_base", "fast"),
        (TRANSFORMER, "rotary_embedding_base", -1),
        (TRANSFORMER, "sequence_length", 1 << 40),
        (TOKENIZER, "vocab_size", 0),
        (TOKENIZER, "vocab_size", None),
        (TOKENIZER, "vocab_population", 1 << 20),
        (TOKENIZER, "vocab_population", None),
        (TOKENIZER, "vocab_population_partial_lowercase", 6),
        (TOKENIZER, "word_edge_weight", -0.5),
        (TOKENIZER, "end_of_text", "</s>"),
    ],
)
def test_an_impossible_setting_is_named(source, read_settings, file, key, value):
    edit(source / file, **{key: value})
    with pytest.raises(ValueError, match=rf"_config\.yaml: .*{key}"):
        read_settings(source)


@pytest.mark.parametrize("file", [TRANSFORMER, TOKENIZER])
@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"a": NaN}', '{"a": 1, "a": 2}', "a: [", '{"a":' * 5000 + "1" + "}" * 5000, "- a", "\x00"]
)
def test_a_damaged_configuration_file_is_named(source, read_settings, file, text):
    (source / file).write_text(text)
    with pytest.raises(ValueError, match=file):
        read_settings(source)


def test_a_configuration_may_be_plain_yaml_or_nested(source, read_settings):
    expected = read_settings(source)
    values = json.loads((source / TRANSFORMER).read_text())
    (source / TRANSFORMER).write_text(json.dumps({"architecture": values}))
    lines = [f"{key}: {json.dumps(value)}" for key, value in json.loads((source / TOKENIZER).read_text()).items()]
    (source / TOKENIZER).write_text("\n".join(lines))
    settings = read_settings(source)
    assert replace(settings, sizes={}) == replace(expected, sizes={})
    assert settings.sizes["hidden_size"][0].endswith(": architecture.hidden_size")


def test_keys_that_contradict_each_other_are_named(source, read_settings):
    edit(source / TRANSFORMER, body={"num_heads": 4})
    with pytest.raises(ValueError, match=r"keys num_attention_heads, body\.num_heads must agree"):
        read_settings(source)


def test_yaml_cannot_construct_objects(source, read_settings, tmp_path):
    (source / TOKENIZER).write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path / 'trace'}']")
    with pytest.raises(ValueError, match=TOKENIZER):
        read_settings(source)
    assert not (tmp_path / "trace").exists()


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = values | st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=5), values, max_size=2)
KEYS = ["num_attention_heads", "rope_theta", "mlp_type", "norm", "bias_terms", "vocab_size", "vocab_population", "seed"]


@settings(
    max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), anything, max_size=3), file=st.sampled_from([TRANSFORMER, TOKENIZER])
)
def test_any_value_is_read_or_refused_by_file(source, read_settings, changes, file):
    before = (source / file).read_text()
    edit(source / file, **changes)
    try:
        problem = f"{read_settings(source).num_attention_heads} heads"
    except ValueError as error:
        problem = str(error)
    (source / file).write_text(before)
    assert "_config.yaml: " in problem or problem.endswith(" heads")


@settings(
    max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(text=st.text(max_size=60) | st.text("{}[]:,-&*!|'\"\n ab1", max_size=60))
def test_any_text_is_read_or_refused_by_file(source, read_settings, text):
    (source / TOKENIZER).write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=TOKENIZER):  # no text that is this short holds all that is needed
        read_settings(source)
