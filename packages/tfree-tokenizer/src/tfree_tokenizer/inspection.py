"""What a tokenizer makes of a text, for people: its tokens one by one, and how many of which kind."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np

from .remote.patterns_tfree import HashSpec, word_pattern
from .remote.words_tfree import Ruleset, split_words, structural_words

if TYPE_CHECKING:  # its import takes seconds, and splitting needs no tokenizer
    from .remote.tokenization_tfree import TFreeTokenizer

TokenKind = Literal["word", "spelled", "marker", "special"]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One word of a text, or its spacing: one position of the model."""

    text: str
    """The word; spacing as its marker, such as `<|no_ws|>`."""

    ids: tuple[int, ...]
    """One id, or one per byte of a spelled word. Empty when no dictionary was given."""

    kind: TokenKind
    """"word" of the dictionary, "spelled" in bytes, "marker" of spacing, or "special"."""

    def rows(self, spec: HashSpec) -> list[int]:
        """Rows of the embedding table that the token switches on, repeats included."""
        is_whole = True if self.kind in ("marker", "special") else None
        return [int(row) for row in word_pattern(self.text, spec, is_whole).rows]


@dataclass(frozen=True, kw_only=True)
class TextStatistics:
    """Counts of a text. Statistics of several texts add up."""

    num_bytes: int = 0
    """UTF-8 bytes."""

    num_words: int = 0
    """Stretches between white space, whatever the tokenizer does."""

    num_tokens: int = 0
    """Positions of the model; a spelled word is one."""

    num_ids: int = 0
    """Length of `input_ids`; a spelled word has one per byte."""

    num_spelled: int = 0
    """Tokens that the dictionary lacks."""

    num_markers: int = 0
    """Tokens that stand for spacing."""

    def __add__(self, other: "TextStatistics") -> "TextStatistics":
        return TextStatistics(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def list_tokens(text: str, tokenizer: "TFreeTokenizer") -> list[Token]:
    """Encode a text and say what every id stands for."""
    words, whole = tokenizer.words_by_id(), tokenizer.special_word_ids()
    first, first_marker = tokenizer.first_byte_id, _first_marker(tokenizer)
    tokens: list[Token] = []
    inside: list[int] = []
    for index in _encode(text, tokenizer).tolist():
        if first <= index < first + 256:
            inside.append(index)
            continue
        word = words[index]
        if word is None:
            data = bytes((i - first) % 256 for i in (*inside, index))
            tokens.append(Token(text=data.decode("utf-8", "surrogatepass"), ids=(*inside, index), kind="spelled"))
        else:
            is_marker = first_marker <= index < first
            kind: TokenKind = "marker" if is_marker else "special" if index in whole else "word"
            tokens.append(Token(text=word, ids=(index,), kind=kind))
        inside = []
    return tokens


def list_words(text: str, ruleset: Ruleset) -> list[Token]:
    """Split a text without any dictionary."""
    markers = set(structural_words(ruleset))
    words = split_words(text, ruleset)
    return [Token(text=word, ids=(), kind="marker" if word in markers else "word") for word in words]


def measure_text(text: str, tokenizer: "TFreeTokenizer | None", ruleset: Ruleset = "v1") -> TextStatistics:
    """Count the tokens of a text.

    Args:
        text: any string.
        tokenizer: None counts words and spacing only; nothing is spelled then.
        ruleset: of the splitting without a tokenizer.
    """
    num_bytes, num_words = len(text.encode("utf-8", "surrogatepass")), len(text.split())
    if tokenizer is None:
        kinds = [token.kind for token in list_words(text, ruleset)]
        return TextStatistics(
            num_bytes=num_bytes, num_words=num_words, num_tokens=len(kinds), num_ids=len(kinds),
            num_markers=kinds.count("marker"),
        )  # fmt: skip
    ids, first = _encode(text, tokenizer), tokenizer.first_byte_id
    num_inside = int(((ids >= first) & (ids < first + 256)).sum())
    return TextStatistics(
        num_bytes=num_bytes,
        num_words=num_words,
        num_tokens=len(ids) - num_inside,
        num_ids=len(ids),
        num_spelled=int(((ids >= first + 256) & (ids < first + 512)).sum()),
        num_markers=int(((ids >= _first_marker(tokenizer)) & (ids < first)).sum()),
    )


def _encode(text: str, tokenizer: "TFreeTokenizer") -> np.ndarray:
    """Ids of a text of any length, int64 [N]."""
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def _first_marker(tokenizer: "TFreeTokenizer") -> int:
    """The ids of spacing end where those of bytes begin."""
    return tokenizer.first_byte_id - len(structural_words(tokenizer.ruleset))
