"""The two configuration files of an original T-FREE checkpoint -> the settings that a converted model needs.

Keys are found by the form of their name at any depth, sizes are taken from the tensors and only compared here, so that
files of older and newer training runs are read alike. What the converted model could not do is refused by name.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .json_files import MAX_CONFIG_BYTES, parse_json, read_text
from .remote.patterns_tfree import HashSpec

TRANSFORMER_CONFIG = Path("transformer") / "transformer_config.yaml"
TOKENIZER_CONFIG = Path("tokenizer") / "tokenizer_config.yaml"
MAX_SEQUENCE_LENGTH = 1 << 28
_MAX_DEPTH = 8
_MAX_KEYS = 10_000

_HEADS = r"(?:n|num)?_?(?:attention|attn)?_?(?:num_)?heads?"
_LAYERS = r"(?:n|num)_(?:hidden_)?layers?|layers"
_HIDDEN = r"hidden_size|hidden_dim|d_model"
_VOCAB = r"vocab_size"
_LENGTH = r"(?:max_)?sequence_length|max_position_embeddings"
_THETA = r"(?:rope|rotary)(?:_embedding)?_(?:theta|base)"
_EPS = r"(?:rms_?norm|layer_?norm|norm)_eps(?:ilon)?"
_AGGREGATION = r"embedding_\w*aggregation|aggregation"
_NORMALIZATION = r"embedding_\w*normali[sz]ation"


@dataclass(frozen=True, kw_only=True)
class OriginalSettings:
    """What the configuration files of an original checkpoint say, checked."""

    hash_spec: HashSpec
    """Rows of the table, rows per trigram and lower-case sharing; the scheme is "md5"."""

    num_attention_heads: int
    rope_theta: float
    rms_norm_eps: float
    sequence_length: int

    end_of_text: str
    """The special word that ends a document."""

    word_edge_weight: float
    embedding_aggregation: str
    embedding_normalization: bool

    sizes: dict[str, tuple[str, int]]
    """Sizes that the tensors must have: "hidden_size", "num_hidden_layers" -> (file and key, value)."""


class SettingsFile:
    """One configuration file as flat keys. Every message names file and key."""

    def __init__(self, path: Path) -> None:
        """Read JSON text, or YAML that holds nothing but plain values.

        Raises:
            ValueError: the file is missing, too large, damaged, or nested too deeply.
        """
        self.path = path
        text = read_text(path, MAX_CONFIG_BYTES)
        values = parse_json(text, path) if text.lstrip().startswith("{") else _parse_yaml(text, path)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: must hold keys and values, got {type(values).__name__}.")
        self.values = dict(_flatten(values, path))

    def integer(self, names: str, low: int, high: int, default: int | None = None) -> int | None:
        """The whole number under a key whose last part matches `names`; `default` without one."""
        key, value = self._find(names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{self.path}: {key} must be a whole number in [{low}, {high}], got {value!r}.")
        return value

    def number(self, names: str, low: float, high: float, default: float) -> float:
        """The finite number in [low, high] under a key that matches `names`; `default` without one."""
        key, value = self._find(names)
        if value is None:
            return default
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-5 as a string
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not low <= number <= high:
            raise ValueError(f"{self.path}: {key} must be a number in [{low:g}, {high:g}], got {value!r}.")
        return number

    def text(self, names: str, default: str) -> str:
        """The string under a key that matches `names`; `default` without one."""
        key, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ValueError(f"{self.path}: {key} must be a string, got {value!r}.")
        return value

    def refuse(self, names: str, is_supported: Callable[[Any], bool], supported: str) -> None:
        """Raise ValueError, naming the key, for every value under `names` that is not supported."""
        for key, value in self.matches(names):
            if not is_supported(value):
                raise ValueError(f"{self.path}: {key}: {value!r} is not supported; only {supported} can be converted.")

    def matches(self, names: str) -> list[tuple[str, Any]]:
        """All keys whose last part matches `names` and whose value is not null."""
        return [
            (key, value)
            for key, value in self.values.items()
            if value is not None and re.fullmatch(names, key.rpartition(".")[2].lower())
        ]

    def _find(self, names: str) -> tuple[str, Any]:
        found = self.matches(names)
        if not found:
            return "", None
        if any(value != found[0][1] for _, value in found):
            raise ValueError(f"{self.path}: keys {', '.join(key for key, _ in found)} must agree, got {dict(found)}.")
        return found[0]


def read_settings(folder: Path, num_attention_heads: int | None = None) -> OriginalSettings:
    """Read and check both configuration files of an original checkpoint.

    Args:
        folder: the checkpoint.
        num_attention_heads: overrides, or stands in for, what the transformer's file says.

    Raises:
        ValueError: a file is damaged, a value impossible, or a setting not supported; names file and key.
    """
    body, words = SettingsFile(folder / TRANSFORMER_CONFIG), SettingsFile(folder / TOKENIZER_CONFIG)
    _refuse_unsupported(body, words)
    heads = num_attention_heads or body.integer(_HEADS, 1, 1 << 14)
    if heads is None:
        raise ValueError(
            f"{body.path}: must say the number of attention heads (num_attention_heads), got keys "
            f"{sorted(body.values)[:40]}. Give num_attention_heads."
        )
    aggregation = body.text(_AGGREGATION, "sum")
    if aggregation not in ("sum", "mean"):
        raise ValueError(f"{body.path}: the embedding's aggregation must be 'sum' or 'mean', got {aggregation!r}.")
    return OriginalSettings(
        hash_spec=_hash_spec(words),
        num_attention_heads=heads,
        rope_theta=body.number(_THETA, 1.0, 1e12, 10_000.0),
        rms_norm_eps=body.number(_EPS, 1e-12, 1.0, 1e-5),
        sequence_length=body.integer(_LENGTH, 1, MAX_SEQUENCE_LENGTH)
        or words.integer(_LENGTH, 1, MAX_SEQUENCE_LENGTH, 4096)
        or 4096,
        end_of_text=_end_of_text(words),
        word_edge_weight=words.number("word_edge_weight", 0.0, 1e6, 1.0),
        embedding_aggregation=aggregation,
        embedding_normalization=any(value is True for _, value in body.matches(_NORMALIZATION)),
        sizes=_sizes(body),
    )


def _refuse_unsupported(body: SettingsFile, words: SettingsFile) -> None:
    def is_off(value: Any) -> bool:
        return value is False or value == 0 or str(value).lower() in ("false", "none", "")

    def names(part: str) -> Callable[[Any], bool]:
        return lambda value: part in re.sub(r"\W|_", "", str(value).lower())

    body.refuse("mlp_type|mlp", names("swiglu"), "'swiglu'")
    body.refuse("norm|norm_type", names("rms"), "'rms'")
    body.refuse("(?:use_|mlp_|attention_)?bias(?:_terms)?", is_off, "false")
    body.refuse("weight_tying|tie_(?:word_)?embeddings|tied_embeddings", is_off, "false")
    body.refuse("(?:rotary|rope)_(?:percentage|percent|pct)", lambda value: value == 1, "1")
    for file in (body, words):
        file.refuse("do_classic_tokenization", is_off, "false (T-FREE)")
    words.refuse("lowercase", is_off, "false")
    words.refuse("entire_words", is_off, "false (words hashed by their trigrams)")
    words.refuse("initialize", lambda value: "orthogonal" not in str(value).lower(), "hashing")


def _hash_spec(words: SettingsFile) -> HashSpec:
    values = {
        "vocab_size": words.integer(_VOCAB, 1, 2**31 - 1),
        "vocab_population": words.integer("vocab_population", 1, 1024),
    }
    for key, value in values.items():
        if value is None:
            raise ValueError(f"{words.path}: {key} is missing.")
    try:
        return HashSpec(
            hash_vocab_size=values["vocab_size"] or 0,
            num_hashes=values["vocab_population"] or 0,
            num_lowercase=words.integer("vocab_population_partial_lowercase", 0, 1024, 0) or 0,
            hash_scheme="md5",
        )
    except ValueError as error:
        raise ValueError(
            f"{words.path}: vocab_size, vocab_population and vocab_population_partial_lowercase do not fit: {error}"
        ) from error


def _end_of_text(words: SettingsFile) -> str:
    token = words.text("end_of_text", "<|endoftext|>")
    if not re.fullmatch(r"<\|[\w ./:-]{1,100}\|>", token):
        raise ValueError(f"{words.path}: end_of_text must be a name between <| and |>, got {token!r}.")
    return token


def _sizes(body: SettingsFile) -> dict[str, tuple[str, int]]:
    bounds = {"hidden_size": (_HIDDEN, 1 << 17), "num_hidden_layers": (_LAYERS, 4096), "vocab_size": (_VOCAB, 2**31)}
    sizes = {}
    for name, (names, high) in bounds.items():
        value = body.integer(names, 1, high)
        if value is not None:
            sizes[name] = (f"{body.path}: {body.matches(names)[0][0]}", value)
    return sizes


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml  # a dependency of transformers; needed only for files that are not JSON

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is neither JSON nor plain YAML: {' '.join(str(error).split())}.") from error


def _flatten(values: dict[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Yield nested keys as `outer.inner`; an explicit stack and two caps keep hostile files from growing."""
    waiting, count = [("", values, 0)], 0
    while waiting:
        prefix, mapping, depth = waiting.pop(0)
        count += len(mapping)
        if depth >= _MAX_DEPTH or count > _MAX_KEYS:
            raise ValueError(f"{path}: must hold at most {_MAX_KEYS} keys, at most {_MAX_DEPTH} levels deep.")
        for key, value in mapping.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value, depth + 1))
            else:
                yield f"{prefix}{key}", value
