"""The tensors and word lists of an original T-FREE checkpoint, read without unpickling anything."""

import pickle
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .json_files import parse_json, read_text
from .remote.patterns_tfree import HashSpec, is_special_word, trigram_rows, word_trigrams

TRANSFORMER_FILE = Path("transformer") / "transformer.pt"
TOKENIZER_FILE = Path("tokenizer") / "tokenizer.pt"
MAX_DICTIONARY_BYTES = 1 << 30
MAX_COUNT = 2**63 - 1

_VERIFIED_WORDS = 20_000
_VERIFIED_TRIGRAMS = 512
_DAMAGE = (
    RuntimeError, ValueError, KeyError, AttributeError, TypeError, IndexError, EOFError, OSError, AssertionError,
    OverflowError, struct.error,
)  # fmt: skip


class PickledObjectsError(ValueError):
    """A file holds objects that only unpickling could restore, which is never done."""


def load_tensors(path: Path) -> Any:
    """Map a file that `torch.save` wrote into memory. Nothing in it is executed.

    Raises:
        PickledObjectsError: it holds more than tensors, plain containers, numbers and strings.
        ValueError: it is missing, truncated or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: is missing; an original checkpoint has {TRANSFORMER_FILE} and {TOKENIZER_FILE}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise PickledObjectsError(
            f"{path}: holds pickled objects{what}, which could run any code when loaded; they are never unpickled."
        ) from error
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: is truncated or damaged: {reason}") from error


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Load the transformer's tensors by their original names, memory-mapped.

    Raises:
        ValueError: the file is no plain dict of floating-point tensors; names file and tensor.
    """
    path = folder / TRANSFORMER_FILE
    weights = load_tensors(path)
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path}: must hold a dict of tensors, got {type(weights).__name__}.")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: must map names to tensors, but {name!r} is {type(tensor).__name__}.")
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise ValueError(f"{path}: tensor {name} must be dense floating point, got {tensor.dtype} {tensor.layout}.")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{path}: tensor {name} is larger than what the file stores of it.")
    return weights


def load_tokenizer(folder: Path) -> tuple[list[str] | None, Tensor | None]:
    """Load word list and hash table of `tokenizer.pt`.

    Returns:
        the words in the order of the original's dictionary, and its rows per trigram, int [2**24, m]; None for either
        that the file does not hold.

    Raises:
        PickledObjectsError: see `load_tensors`.
        ValueError: the file is damaged, or holds something else under one of the two names.
    """
    path = folder / TOKENIZER_FILE
    content = load_tensors(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a dict, got {type(content).__name__}.")
    words, table = content.get("words"), content.get("trigram_to_vocab")
    if words is not None and not (isinstance(words, list) and set(map(type, words)) == {str}):
        raise ValueError(f"{path}: key words must be a list of strings.")
    if table is not None and not (isinstance(table, Tensor) and table.ndim == 2 and not table.is_floating_point()):
        raise ValueError(f"{path}: key trigram_to_vocab must be a whole-number tensor [trigrams, m].")
    return words, table


def verify_rows(table: Tensor, words: Sequence[str], spec: HashSpec, path: Path) -> int:
    """Compare a sample of the original's table rows with the "md5" rule.

    Args:
        table: `trigram_to_vocab`, int [trigrams, m].
        words: where the sample of trigrams comes from.
        spec: the rule.
        path: for the message.

    Returns:
        How many trigrams were compared.

    Raises:
        ValueError: a row differs; names the trigram.
    """
    if table.shape[1] != spec.num_hashes:
        raise ValueError(
            f"{path}: trigram_to_vocab has {table.shape[1]} rows per trigram, vocab_population is {spec.num_hashes}."
        )
    plain = [word for word in words[:_VERIFIED_WORDS] if word and not is_special_word(word)]
    trigrams = np.unique([number for word in plain for number in word_trigrams(word)]).astype(np.int64)
    trigrams = trigrams[trigrams < table.shape[0]]
    trigrams = trigrams[np.linspace(0, len(trigrams) - 1, min(len(trigrams), _VERIFIED_TRIGRAMS)).astype(np.int64)]
    ours = np.sort(trigram_rows(trigrams, spec), axis=1)
    theirs = np.sort(table[torch.from_numpy(trigrams)].numpy().astype(np.int64), axis=1)
    for number, expected, found in zip(trigrams.tolist(), ours, theirs, strict=True):
        if not np.array_equal(expected, found):
            raise ValueError(
                f"{path}: trigram_to_vocab[{number}] (trigram {number.to_bytes(3, 'little')!r}) must be "
                f"{expected.tolist()} by the md5 rule, got {found.tolist()}. The file belongs to another vocab_size, "
                "vocab_population or vocab_population_partial_lowercase."
            )
    return len(trigrams)


def read_dictionary(path: Path) -> list[str]:
    """Read a word list: JSON (`.json`) or one word, a tab and its count per line.

    JSON may be a list of words, a list of [word, count], or an object word -> count. With counts the most frequent
    word comes first; words of equal count keep their order.

    Raises:
        ValueError: the file is damaged or an entry is not a word with a count; names file and entry.
    """
    text = read_text(path, MAX_DICTIONARY_BYTES)
    if path.suffix.lower() == ".json":
        values = parse_json(text, path)
        if isinstance(values, list) and values and all(isinstance(word, str) for word in values):
            return values
        counted = list(_json_counts(values, path))
    else:
        counted = list(_line_counts(text, path))
    if not counted:
        raise ValueError(f"{path}: must hold at least one word, got none.")
    return [word for word, _ in sorted(counted, key=lambda entry: -entry[1])]


def _json_counts(values: Any, path: Path) -> Iterator[tuple[str, int]]:
    if not isinstance(values, (list, dict)):
        raise ValueError(f"{path}: must be a JSON list or object of words, got {type(values).__name__}.")
    for i, entry in enumerate(values.items() if isinstance(values, dict) else values):
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{path}: entry {i} must be [word, count], got {str(entry)[:80]!r}.")
        yield entry[0], _checked_count(entry[1], f"{path}: entry {i}")


def _line_counts(text: str, path: Path) -> Iterator[tuple[str, int]]:
    lines = text.split("\n")  # not splitlines: a carriage return is a word
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        word, tab, count = line.rpartition("\t")  # the last tab: a tab is a word too
        if not tab or not word or not re.fullmatch(r"[0-9]{1,19}", count.strip()):
            raise ValueError(f"{path}: line {number} must be a word, a tab and a count, got {line[:80]!r}.")
        yield word, _checked_count(int(count), f"{path}: line {number}")


def _checked_count(count: Any, where: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
        raise ValueError(f"{where}: the count must be a whole number in [0, 2**63), got {count!r}.")
    return count
