"""An original T-FREE checkpoint -> a folder that `from_pretrained` loads: weights renamed, word list filtered."""

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .original_files import (
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    PickledObjectsError,
    load_tokenizer,
    load_weights,
    read_dictionary,
    verify_rows,
)
from .original_settings import OriginalSettings, read_settings
from .remote.configuration_tfree import TFreeConfig
from .remote.dictionary_tfree import MAX_WORDS
from .remote.modeling_tfree import TFreeForCausalLM
from .remote.patterns_tfree import is_special_word
from .remote.tokenization_tfree import CHAT_TEMPLATE, CHAT_TOKENS, END_OF_TEXT, TFreeTokenizer
from .remote.wordlist_tfree import MAX_WORD_CHARACTERS
from .remote.words_tfree import SpecialSyntax, is_one_word, structural_words

MAX_SPECIAL_WORDS = 1024

_EMBEDDING, _FINAL_NORM, _HEAD = "transformer.embeddings.embedding.weight", "transformer.norm.weight", "lm_head.weight"
_LAYER = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.dense": "self_attn.o_proj",
    "mlp.dense_in": "mlp.gate_proj",
    "mlp.swiglu": "mlp.up_proj",
    "mlp.dense_out": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
_UNUSED_PACK = re.compile(r"<\|[0-9]+<-\s*(?:ws|\n)\s*->\|>")
_RECOMPUTED = re.compile(r"rotary|rope|inv_freq")  # tables that a transformer computes from its configuration
_MAX_LAYERS = 4096
_MOST_WORDS = MAX_WORDS - 2 * MAX_SPECIAL_WORDS  # special, spacing and byte ids come on top


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion wrote, and what it left out."""

    folder: Path
    num_parameters: int

    num_words: int
    """Words of the dictionary that became ids."""

    special_words: tuple[str, ...]
    """Words between `<|` and `|>` that became special tokens, hashed from their whole string."""

    dropped_words: dict[str, int]
    """Reason -> number of dictionary entries that no id was made for."""

    rows_verified: int
    """Trigrams whose rows in the original's own table were compared with the hash rule."""

    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = (
            f"{self.folder}: {self.num_parameters:,} parameters, {self.num_words:,} words, "
            f"{len(self.special_words)} special tokens; rows of {self.rows_verified:,} trigrams verified."
        )
        left_out = [f"  left out: {count:,} {reason}" for reason, count in self.dropped_words.items()]
        return "\n".join([first, *left_out, *(f"  note: {note}" for note in self.notes)])


def convert_original_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dictionary: str | os.PathLike[str] | Sequence[str] | None = None,
    max_words: int | None = None,
    dtype: torch.dtype | str | None = None,
    special_syntax: SpecialSyntax = "any",
    num_attention_heads: int | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> ConversionReport:
    """Convert a checkpoint of the original T-FREE code to a folder for `from_pretrained`.

    Nothing is unpickled: the original's files are read as tensors, plain lists and text only.

    Args:
        source: folder with `transformer/transformer.pt`, `transformer/transformer_config.yaml`,
            `tokenizer/tokenizer_config.yaml` and, where `dictionary` is not given, `tokenizer/tokenizer.pt`.
        target: folder to write: configuration, tokenizer, sharded safetensors and the model's code. It appears under
            this name only when it is complete.
        dictionary: words to decode with: a JSON or tab-separated file of (word, count), or the words themselves, best
            first. None: the list inside `tokenizer.pt`. It can be exchanged later with `model.set_dictionary`.
        max_words: keep only so many words, the first ones.
        dtype: of the written weights, for example "bfloat16". None: as stored.
        special_syntax: "any" reads whatever looks like `<|...|>` as one word, as the original does.
        num_attention_heads: overrides, or stands in for, what the configuration file says.
        max_shard_size: of one safetensors file.
        overwrite: replace what `target` holds, once the conversion has succeeded.

    Returns:
        Counts of what was converted, verified and left out. Printing it gives a summary.

    Raises:
        FileExistsError: `target` is not empty and `overwrite` is False.
        ValueError: a file is missing, damaged, unsafe or does not fit the others, or a setting is not supported; names
            the file and the key or tensor.

    Example:
        >>> report = convert_original_checkpoint("tfree-7b", "out", dictionary="counts.json", max_words=600_000)

    Source: Deiseroth et al. 2024, "T-FREE"; layout of the released checkpoints.
    """
    source, target = Path(source), Path(target)
    _check_arguments(source, target, max_words, num_attention_heads, overwrite)
    dtype = _resolve_dtype(dtype)
    settings = read_settings(source, num_attention_heads)
    words, rows_verified, notes = _read_words(source, settings, dictionary)
    tokenizer, dropped = _make_tokenizer(words, settings, max_words, special_syntax)
    weights = load_weights(source)
    config = _make_config(source, weights, settings, tokenizer)
    model = _make_model(config, weights, tokenizer, dtype)
    _write(target, model, tokenizer, max_shard_size)
    return ConversionReport(
        folder=target,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_words=len(tokenizer.dictionary_words),
        special_words=tuple(tokenizer.base_special_tokens),
        dropped_words=dict(dropped),
        rows_verified=rows_verified,
        notes=tuple(notes),
    )


def _check_arguments(
    source: Path, target: Path, max_words: int | None, num_attention_heads: int | None, overwrite: bool
) -> None:
    if not source.is_dir():
        raise ValueError(f"source must be the folder of an original checkpoint, but {source} is none.")
    for name, value in {"max_words": max_words, "num_attention_heads": num_attention_heads}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be None or at least 1, got {value!r}.")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"target must be a folder, but {target} is a file.")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"target must not be the source or hold it, got {target}.")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"target {target} is not empty. Choose another folder, or overwrite it explicitly.")


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if resolved is None and dtype is None:
        return None
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as 'bfloat16', got {dtype!r}.")
    return resolved


def _read_words(
    source: Path, settings: OriginalSettings, dictionary: str | os.PathLike[str] | Sequence[str] | None
) -> tuple[list[str], int, list[str]]:
    """Words in order, how many trigrams were verified, and notes for the report."""
    path = source / TOKENIZER_FILE
    given: list[str] | None = None
    if isinstance(dictionary, (str, os.PathLike)):
        given = read_dictionary(Path(dictionary))
    elif dictionary is not None:
        given = list(dictionary)
        if not given or set(map(type, given)) != {str}:
            raise ValueError("dictionary must be a file or a sequence of strings that is not empty.")
    if given is not None and not path.is_file():
        return given, 0, [f"{TOKENIZER_FILE} is absent, so its rows were not verified."]
    try:
        words, table = load_tokenizer(source)
    except PickledObjectsError as error:
        if given is None:
            raise PickledObjectsError(
                f"{error} Give dictionary: a JSON or tab-separated file of (word, count), such as `tfree "
                "build-dictionary` writes from text."
            ) from error
        return given, 0, [f"{TOKENIZER_FILE} holds pickled objects and was not used, so its rows were not verified."]
    used = words if given is None else given
    if used is None:
        raise ValueError(f"{path}: key words is missing. Give dictionary, a file of (word, count).")
    if table is None:
        return used, 0, [f"{TOKENIZER_FILE} has no trigram_to_vocab, so its rows were not verified."]
    return used, verify_rows(table, words or used, settings.hash_spec, path), []


def _make_tokenizer(
    words: Sequence[str], settings: OriginalSettings, max_words: int | None, special_syntax: SpecialSyntax
) -> tuple[TFreeTokenizer, Counter[str]]:
    """Sort the original's list into special tokens, dictionary words and entries that never occur in its texts."""
    end, structural, dropped = settings.end_of_text, set(structural_words("v1")), Counter[str]()
    special = dict.fromkeys((end, END_OF_TEXT, *CHAT_TOKENS))
    kept: list[str] = []
    for word in dict.fromkeys(words):
        if word in structural:
            dropped["spacing words, which have ids of their own"] += 1
        elif word in special:
            continue
        elif _UNUSED_PACK.fullmatch(word):
            dropped["spacing packs that the splitting rules never produce"] += 1
        elif is_special_word(word):
            _sort_special(word, special, dropped)
        elif len(word) > MAX_WORD_CHARACTERS:
            dropped[f"words of more than {MAX_WORD_CHARACTERS} characters"] += 1
        elif not is_one_word(word, "v1"):
            dropped["entries that the splitting rules never produce as one word"] += 1
        else:
            kept.append(word)
    if repeated := len(words) - len(set(words)):
        dropped["repeated entries"] = repeated
    limit = min(max_words or _MOST_WORDS, _MOST_WORDS)
    if len(kept) > limit:
        dropped["words beyond max_words"] = len(kept) - limit
    tokenizer = TFreeTokenizer(
        words=kept[:limit],
        base_special_tokens=list(special),
        eos_token=end,
        pad_token=end,
        special_syntax=special_syntax,
        chat_template=CHAT_TEMPLATE.replace(END_OF_TEXT, end),
        model_max_length=settings.sequence_length,
    )
    return tokenizer, dropped


def _sort_special(word: str, special: dict[str, None], dropped: Counter[str]) -> None:
    if not (word.startswith("<|") and word.endswith("|>")) or len(word) < 5 or "\n" in word:
        dropped["entries that the splitting rules never produce as one word"] += 1
    elif len(special) >= MAX_SPECIAL_WORDS:
        dropped[f"special words beyond the first {MAX_SPECIAL_WORDS}"] += 1
    else:
        special[word] = None


def _make_config(
    source: Path, weights: dict[str, Tensor], settings: OriginalSettings, tokenizer: TFreeTokenizer
) -> TFreeConfig:
    path = source / TRANSFORMER_FILE
    num_layers = _count_layers(weights, path)
    hash_vocab_size, hidden_size = _matrix(weights, _EMBEDDING, path)
    intermediate_size, _ = _matrix(weights, "transformer.layers.0.mlp.dense_in.weight", path)
    actual = {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "vocab_size": hash_vocab_size}
    for name, (where, value) in settings.sizes.items():
        if value != actual[name]:
            raise ValueError(f"{where} is {value}, but the tensors of {TRANSFORMER_FILE} have {actual[name]}.")
    spec, heads = settings.hash_spec, settings.num_attention_heads
    if hash_vocab_size != spec.hash_vocab_size:
        raise ValueError(
            f"{path}: {_EMBEDDING} has {hash_vocab_size} rows, but vocab_size of the tokenizer's configuration is "
            f"{spec.hash_vocab_size}."
        )
    if hidden_size % heads or hidden_size // heads % 2:
        raise ValueError(
            f"{path}: a hidden size of {hidden_size} does not split into {heads} attention heads of even size; "
            "num_attention_heads must fit."
        )
    return TFreeConfig.for_tokenizer(
        tokenizer,
        hash_vocab_size=hash_vocab_size,
        num_hashes=spec.num_hashes,
        num_lowercase=spec.num_lowercase,
        hash_scheme=spec.hash_scheme,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        max_position_embeddings=settings.sequence_length,
        rms_norm_eps=settings.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        embedding_aggregation=settings.embedding_aggregation,
        embedding_normalization=settings.embedding_normalization,
        decode_edge_weight=settings.word_edge_weight,
    )


def _count_layers(weights: dict[str, Tensor], path: Path) -> int:
    found = {int(match[1]) for name in weights if (match := re.match(r"transformer\.layers\.([0-9]{1,6})\.", name))}
    if not found or found != set(range(len(found))) or len(found) > _MAX_LAYERS:
        raise ValueError(
            f"{path}: must hold transformer.layers.0 to .n-1 with n at most {_MAX_LAYERS}, got layers "
            f"{sorted(found)[:20]}."
        )
    return len(found)


def _matrix(weights: dict[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    if name not in weights:
        raise ValueError(f"{path}: tensor {name} is missing.")
    if weights[name].ndim != 2:
        raise ValueError(f"{path}: tensor {name} must be a matrix, got shape {tuple(weights[name].shape)}.")
    return weights[name].shape[0], weights[name].shape[1]


def _make_model(
    config: TFreeConfig, weights: dict[str, Tensor], tokenizer: TFreeTokenizer, dtype: torch.dtype | None
) -> TFreeForCausalLM:
    """Build the model around the mapped tensors themselves, so that memory holds little beyond what is permuted."""
    names, path = _name_map(config.num_hidden_layers), TRANSFORMER_FILE
    unexpected = sorted(name for name in weights.keys() - names.keys() if not _RECOMPUTED.search(name))
    if unexpected:
        why = " (bias_terms are not supported)" if any(name.endswith(".bias") for name in unexpected) else ""
        raise ValueError(f"{path}: tensors {unexpected[:5]} have no place in a T-FREE model{why}.")
    with torch.device("meta"):
        model = TFreeForCausalLM(config).eval()
    expected = model.state_dict()
    state = {}
    for name, new_name in names.items():
        if name not in weights:
            raise ValueError(f"{path}: tensor {name} is missing.")
        tensor, shape = weights[name], expected[new_name].shape
        if tensor.shape != shape:
            raise ValueError(f"{path}: tensor {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: tensor {name} must be finite, but holds NaN or infinite numbers.")
        if ".attention.query." in name or ".attention.key." in name:
            tensor = rotate_half_order(tensor, config.num_attention_heads)
        state[new_name] = tensor.to(dtype or tensor.dtype)
    model.load_state_dict(state, assign=True, strict=False)  # the dictionary's buffers come next
    model.set_dictionary(tokenizer)
    return model


def _name_map(num_layers: int) -> dict[str, str]:
    names = {_EMBEDDING: "model.embed_tokens.weight", _FINAL_NORM: "model.norm.weight", _HEAD: "lm_head.weight"}
    for layer in range(num_layers):
        for old, new in _LAYER.items():
            names[f"transformer.layers.{layer}.{old}.weight"] = f"model.layers.{layer}.{new}.weight"
    return names


def rotate_half_order(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the outputs of a query or key projection from interleaved rotary pairs to two halves.

    Within a head of size d, outputs (0, 1), (2, 3), ... that rotate together become (0, d/2), (1, d/2 + 1), ...

    Args:
        weight: [H d, D].
        num_heads: H.
    """
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write(target: Path, model: TFreeForCausalLM, tokenizer: TFreeTokenizer, max_shard_size: str) -> None:
    """Write into a temporary folder beside `target` and move it there when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    fresh, previous = temporary / "new", temporary / "previous"
    try:
        fresh.mkdir()  # unlike the temporary folder, with the permissions that every new folder gets
        model.save_pretrained(fresh, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(fresh)
        if target.exists():
            target.rename(previous)
        try:
            fresh.rename(target)
        except OSError:
            if previous.exists():
                previous.rename(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
