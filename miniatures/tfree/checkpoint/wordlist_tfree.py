"""The dictionary of a tokenizer as a file: what is accepted, how it is read, how it is written."""

import json
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from .characters_tfree import Ruleset
from .items_tfree import BORDER_CLASS, LINE_BREAK_CLASS, SPACE_CLASS, find_items
from .words_tfree import structural_words

WORDS_FILE = "tfree_words.json"
MAX_WORDS = 4_000_000
MAX_WORD_CHARACTERS = 4096
MAX_FILE_BYTES = 1 << 29
_CHUNK_CHARACTERS = 1 << 20


def read_words(path: str) -> list[str]:
    """Read a dictionary file: a JSON list of strings.

    Raises:
        ValueError: the file is missing, too large, or no list of acceptable strings; the message names file and entry.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path} must be at most {MAX_FILE_BYTES} bytes, got {size}.")
        with open(path, encoding="utf-8") as file:
            words = json.load(file)
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a JSON list of words, but it cannot be read: {error}.") from error
    check_word_types(words, path)
    return words


def write_words(words: Sequence[str], path: str) -> None:
    """Write a dictionary file in one step: after a failure the previous file is still there, whole."""
    text = json.dumps(list(words), ensure_ascii=True, separators=(",\n", ": "))  # a word per line
    handle, temporary = tempfile.mkstemp(prefix=".saving-", dir=os.path.dirname(path) or ".")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_word_types(words: object, name: str) -> None:
    """Raise ValueError unless `words` is a list of strings of acceptable number and lengths."""
    if not isinstance(words, (list, tuple)):
        raise ValueError(f"{name} must be a list of words, got {type(words).__name__}.")
    if not 1 <= len(words) <= MAX_WORDS:
        raise ValueError(f"{name} must hold between 1 and {MAX_WORDS} words, got {len(words)}.")
    if set(map(type, words)) != {str}:
        index = next(i for i, word in enumerate(words) if type(word) is not str)
        raise ValueError(f"{name} must hold strings only, but entry {index} is {_shortened(repr(words[index]))}.")
    if max(map(len, words)) > MAX_WORD_CHARACTERS:
        index = next(i for i, word in enumerate(words) if len(word) > MAX_WORD_CHARACTERS)
        raise ValueError(
            f"{name} must hold words of at most {MAX_WORD_CHARACTERS} characters, but entry {index} "
            f"has {len(words[index])}."
        )


def check_words(
    words: Sequence[str], name: str, ruleset: Ruleset, max_word_bytes: int | None, special_tokens: Collection[str]
) -> None:
    """Raise ValueError unless every entry is one word of the ruleset, and none is repeated or special."""
    reserved = {*special_tokens, *structural_words(ruleset)}
    distinct = set(words)
    if taken := sorted(distinct & reserved):
        raise ValueError(f"{name} must not hold special or structural tokens, got {_shown(taken)}.")
    if len(distinct) < len(words):
        seen: set[str] = set()
        repeated = [word for word in words if word in seen or seen.add(word)]  # type: ignore[func-returns-value]
        raise ValueError(f"{name} must not repeat words, but these occur again: {_shown(repeated)}.")
    if several := list(_not_single(words, ruleset)):
        raise ValueError(
            f"{name} must hold single words under ruleset {ruleset!r}, but these are empty, spacing, or split into "
            f"several: {_shown(several)}."
        )
    if max_word_bytes is not None:
        long = [
            word
            for word in words
            if 4 * len(word) > max_word_bytes and len(word.encode("utf-8", "surrogatepass")) > max_word_bytes
        ]
        if long:
            raise ValueError(
                f"{name} must hold words of at most max_word_bytes = {max_word_bytes} bytes: {_shown(long)}."
            )


def _not_single(words: Sequence[str], ruleset: Ruleset) -> Iterator[str]:
    """Yield the entries that are not exactly one word, found with one pass over many words."""
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words)) + 1
    ends = np.cumsum(lengths)
    first = 0
    while first < len(words):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _CHUNK_CHARACTERS)))
        borders = np.concatenate(([0], ends[first:last] - before))
        kinds = find_items("\0".join(["", *words[first:last], ""]), borders, ruleset).kind
        at_borders = (kinds == BORDER_CLASS).nonzero()[0]
        inside = kinds.take(at_borders[:-1] + 1)  # the first item of each entry
        is_single = (np.diff(at_borders) == 2) & (inside != SPACE_CLASS) & (inside != LINE_BREAK_CLASS)
        for index in (~is_single).nonzero()[0].tolist():
            yield words[first + index]
        first = last


def _shown(words: Sequence[str]) -> str:
    listed = ", ".join(_shortened(ascii(word)) for word in words[:5])
    return listed + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
