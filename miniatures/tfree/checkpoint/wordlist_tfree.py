"""The dictionary of a tokenizer as a file: what is accepted, how it is read, how it is written."""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Sequence

from .words_tfree import Ruleset, is_one_word, structural_words


WORDS_FILE = "tfree_words.json"
MAX_WORDS = 4_000_000
MAX_WORD_CHARACTERS = 4096
MAX_FILE_BYTES = 1 << 29


def read_words(path: str) -> list[str]:
    """Read a dictionary file: a JSON list of strings.

    Raises:
        ValueError: the file is missing, too large, or not a list of strings; the message names file and entry.
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


def check_word_types(words: object, name: str) -> None:
    """Raise ValueError unless `words` is a list of strings of acceptable number and lengths."""
    if not isinstance(words, (list, tuple)):
        raise ValueError(f"{name} must be a list of words, got {type(words).__name__}.")
    if not 1 <= len(words) <= MAX_WORDS:
        raise ValueError(f"{name} must hold between 1 and {MAX_WORDS} words, got {len(words)}.")
    if set(map(type, words)) != {str}:
        index = next(i for i, word in enumerate(words) if type(word) is not str)
        raise ValueError(f"{name} must hold strings only, but entry {index} is {words[index]!r}.")
    if max(map(len, words)) > MAX_WORD_CHARACTERS:
        index = next(i for i, word in enumerate(words) if len(word) > MAX_WORD_CHARACTERS)
        raise ValueError(
            f"{name} must hold words of at most {MAX_WORD_CHARACTERS} characters, but entry {index} "
            f"has {len(words[index])}."
        )


def check_words(words: Sequence[str], name: str, ruleset: Ruleset, special_tokens: Collection[str]) -> None:
    """Raise ValueError unless every entry is one word of the ruleset, and none occurs twice or is special."""
    if len(set(words)) != len(words):
        seen: set[str] = set()
        repeated = [word for word in words if word in seen or seen.add(word)]
        raise ValueError(f"{name} must not repeat words, but {_shown(repeated)} occur more than once.")
    reserved = {*special_tokens, *structural_words(ruleset)}
    if taken := [word for word in words if word in reserved]:
        raise ValueError(f"{name} must not hold special or structural tokens, got {_shown(taken)}.")
    if several := [word for word in words if not is_one_word(word, ruleset)]:
        raise ValueError(
            f"{name} must hold single words under ruleset {ruleset!r}, but these are empty, spacing, or split into "
            f"several: {_shown(several)}."
        )


def _shown(words: Sequence[str]) -> str:
    return ", ".join(map(ascii, words[:5])) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def write_words(words: Sequence[str], path: str) -> None:
    """Write a dictionary file in one step: after a failure the previous file is still there, whole."""
    text = json.dumps(list(words), ensure_ascii=True, separators=(",\n", ": "))
    write_atomically(path, lambda file_path: _write_text(file_path, text + "\n"))


def _write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: str, write: Callable[[str], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it over `path`."""
    handle, temporary = tempfile.mkstemp(prefix=".tfree_", dir=os.path.dirname(path) or ".")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
