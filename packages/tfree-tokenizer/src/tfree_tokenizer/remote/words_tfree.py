"""Text to words and back, losslessly: `join_words(split_words(text)) == text` for every string.

A word is a run of letters or one other character. Spaces are left out wherever the two neighboring words tell that one
belongs there; every other spacing is spelled with the structural words of `structural_words`.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Literal, TypeVar

import numpy as np

from .characters_tfree import (
    JOINER,
    KIND_BITS,
    LETTER,
    LINE_BREAK,
    MARK,
    NO_SPACE_AFTER,
    NO_SPACE_BEFORE,
    PICTURE,
    REGION,
    SKIN_TONE,
    SPACE,
    SPACELESS,
    TAG,
    Ruleset,
    character_bytes,
    character_table,
    spaces_around,
)

SpecialSyntax = Literal["registered", "any"]
PackName = TypeVar("PackName", str, int)

NO_SPACE = "<|no_ws|>"
_PACK_SIZES = {"v1": (4, 2, 1), "v2": (16, 8, 4, 2, 1)}
_LINE_PACK_SIZES = (4, 2, 1)


@lru_cache(maxsize=2)
def structural_words(ruleset: Ruleset = "v1") -> tuple[str, ...]:
    """Return the words that stand for spacing, in the order of their ids.

    Raises:
        ValueError: the ruleset is neither `"v1"` nor `"v2"`.
    """
    check_ruleset(ruleset)
    spaces, lines = space_packs(ruleset), line_packs()
    small = [spaces[size] for size in sorted(spaces) if size <= 4]
    large = [spaces[size] for size in sorted(spaces) if size > 4]
    return NO_SPACE, *small, *(lines[size] for size in sorted(lines)), *large


def space_packs(ruleset: Ruleset) -> dict[int, str]:
    """Return the words for runs of spaces by length, longest first."""
    return {size: "<|ws|>" if size == 1 else f"<|{size}<-ws->|>" for size in _PACK_SIZES[ruleset]}


def line_packs() -> dict[int, str]:
    """Return the words for runs of line breaks by length, longest first."""
    return {size: "<|\n|>" if size == 1 else f"<|{size}<-\n->|>" for size in _LINE_PACK_SIZES}


def expects_space(left: str, right: str, ruleset: Ruleset = "v1") -> bool:
    """Tell whether a single space between two neighboring words goes without saying.

    Depends on the two words alone. Next to a special word, or at the ends of a text, no space is ever expected; that is
    the caller's knowledge. False when either word is empty.
    """
    after, before = spaces_around(ruleset)
    if not left or not right or left[-1] in after or right[0] in before:
        return False
    return not (ruleset == "v2" and is_spaceless(left[0]) and is_spaceless(right[0]))


def is_spaceless(character: str) -> bool:
    """Tell whether a character belongs to a script that is written without spaces between words (ruleset v2)."""
    return character > "\u0dff" and bool(character_bytes("v2")[ord(character)] & SPACELESS)


def split_words(
    text: str,
    ruleset: Ruleset = "v1",
    *,
    special_tokens: Collection[str] = (),
    special_syntax: SpecialSyntax = "registered",
    max_word_bytes: int | None = None,
) -> list[str]:
    """Split a text into words, structural words appearing as marker strings such as `<|no_ws|>`.

    Args:
        text: any string, lone surrogates included.
        ruleset: `"v1"` as published, or `"v2"` for marks, emoji, scripts without spaces, tabs and long indents.
        special_tokens: strings kept whole, the longest first where several fit.
        special_syntax: `"any"` also keeps whatever looks like `<|...|>` whole, as the original does.
        max_word_bytes: longer words (UTF-8) are cut between code points. None: never.

    Returns:
        The words. Marker strings cannot be mistaken for text unless `special_syntax` is `"any"`.

    Raises:
        ValueError: unknown ruleset or syntax, an empty special token, or `max_word_bytes` below 4.

    Example:
        >>> split_words("1a a1 1 a")
        ['1', '<|no_ws|>', 'a', 'a', '1', '<|ws|>', '1', 'a']
    """
    check_ruleset(ruleset)
    checked_max_word_bytes(max_word_bytes)
    finder = SpecialFinder(special_tokens, special_syntax)
    words: list[str] = []
    for piece, is_special in finder.pieces(text):
        if is_special:
            words.append(piece)
        else:
            words += split_plain(piece, ruleset, max_word_bytes)
    return words


def join_words(
    words: Iterable[str],
    ruleset: Ruleset = "v1",
    *,
    special_tokens: Collection[str] = (),
    special_syntax: SpecialSyntax = "registered",
) -> str:
    """Undo `split_words`; give the same ruleset, special tokens and syntax."""
    check_ruleset(ruleset)
    finder = SpecialFinder(special_tokens, special_syntax)
    spacing = spacing_of_markers(ruleset)
    pieces: list[str] = []
    left = ""  # the word a space could follow; empty where none is expected
    for word in words:
        if word in spacing:
            pieces.append(spacing[word])
            left = ""
        elif finder.is_special(word):
            pieces.append(word)
            left = ""
        else:
            if expects_space(left, word, ruleset):
                pieces.append(" ")
            pieces.append(word)
            left = word
    return "".join(pieces)


@lru_cache(maxsize=2)
def spacing_of_markers(ruleset: Ruleset) -> dict[str, str]:
    """Return what every structural word stands for in the text."""
    spaces = {marker: " " * size for size, marker in space_packs(ruleset).items()}
    lines = {marker: "\n" * size for size, marker in line_packs().items()}
    return {NO_SPACE: "", **spaces, **lines}


class SpecialFinder:
    """Finds special tokens in a text, from the left, the longest first. Time is linear in the text for `"any"` too."""

    def __init__(self, special_tokens: Collection[str] = (), special_syntax: SpecialSyntax = "registered") -> None:
        check_special_syntax(special_syntax)
        if isinstance(special_tokens, str) or "" in special_tokens:
            raise ValueError("special_tokens must be a collection of strings that are not empty.")
        self.tokens = frozenset(special_tokens)
        self.any_syntax = special_syntax == "any"
        self._lengths = sorted({len(token) for token in self.tokens}, reverse=True)
        # Only where one of these two-letter beginnings stands, tokens are looked up by length in a set.
        beginnings = sorted({re.escape(token[:2]) for token in self.tokens}, key=len, reverse=True)
        self._beginning = re.compile("|".join(beginnings))

    def is_special(self, word: str) -> bool:
        """Tell whether a word is one of the tokens, or looks like one under `"any"`."""
        return word in self.tokens or (self.any_syntax and word.startswith("<|") and word.endswith("|>"))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return start and end of every special token, from left to right."""
        if not self.any_syntax:
            return list(self._registered(text, 0, len(text)))
        spans: list[tuple[int, int]] = []
        position = 0
        for start, end in (*_bracketed(text), (len(text), len(text))):
            if text.startswith("<|", position, start) and text.endswith("|>", position, start):
                spans.append((position, start))  # the original keeps such a remainder whole: "<|>", or one with LF
            else:
                spans += self._registered(text, position, start)
            if start < end:
                spans.append((start, end))
            position = end
        return spans

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the text in order as (piece, is it special); plain pieces are never empty."""
        position = 0
        for start, end in self.spans(text):
            if position < start:
                yield text[position:start], False
            yield text[start:end], True
            position = end
        if position < len(text):
            yield text[position:], False

    def _registered(self, text: str, position: int, stop: int) -> Iterator[tuple[int, int]]:
        if not self.tokens:
            return
        while found := self._beginning.search(text, position, stop):
            start = found.start()
            for length in self._lengths:
                if start + length <= stop and text[start : start + length] in self.tokens:
                    yield start, start + length
                    position = start + length
                    break
            else:
                position = start + 1


def _bracketed(text: str) -> Iterator[tuple[int, int]]:
    r"""Yield the matches of `<\|.*?\|>`. The expression itself takes quadratic time on `"<|<|<|..."`."""
    start = text.find("<|")
    while start >= 0:
        end = text.find("|>", start + 2)
        if end < 0:
            return
        line_break = text.find("\n", start + 2, end)
        if line_break < 0:
            yield start, end + 2
            start = text.find("<|", end + 2)
        else:
            start = text.find("<|", line_break + 1)


def split_plain(text: str, ruleset: Ruleset, max_word_bytes: int | None) -> list[str]:
    """Split a text that holds no special token into words and marker strings."""
    return _with_markers(split_unmarked(text, ruleset, max_word_bytes), ruleset)


def split_unmarked(text: str, ruleset: Ruleset, max_word_bytes: int | None) -> list[str]:
    """Split plain text, spacing left as runs of spaces or line breaks, and '' where an expected space is missing."""
    if ruleset == "v1" or text.isascii():
        return _split_runs(text, ruleset, max_word_bytes)
    return _split_clusters(text, max_word_bytes)


def _split_runs(text: str, ruleset: Ruleset, max_word_bytes: int | None) -> list[str]:
    """Split where words are runs of letters or single characters: under v1, and ASCII under v2 too."""
    words = _run_pattern(ruleset, text.isascii()).findall(text)
    # Only runs of letters are long enough to be cut, and between two of their letters a space is always expected.
    return words if max_word_bytes is None else _with_cuts(words, max_word_bytes)


@lru_cache(maxsize=3)
def _run_pattern(ruleset: Ruleset, is_ascii: bool) -> re.Pattern[str]:
    """One pass: '' where an expected space is missing, and no match for a space that is expected."""
    after, before = ("".join(sorted(map(re.escape, characters))) for characters in spaces_around(ruleset))
    expected_space = f"(?: (?<=[^{after}] )(?=[^{before}]))?+"
    letter = "A-Za-z" if is_ascii else r"^\W\d_"  # a set of characters is quicker than a property of theirs
    return re.compile(rf"{expected_space}((?<=[^{after}])(?=[^{before}])|[{letter}]++| ++|\n++|.)", re.DOTALL)


@lru_cache(maxsize=1)
def _pattern_v2() -> re.Pattern[bytes]:
    """Runs over the kinds of the characters, one byte each, see `character_table`."""
    kinds = {
        name: re.escape(bytes([kind])).decode("latin-1")
        for name, kind in {
            "L": LETTER, "S": SPACE, "N": LINE_BREAK, "M": MARK, "J": JOINER,
            "P": PICTURE, "E": SKIN_TONE, "T": TAG, "R": REGION,
        }.items()
    }  # fmt: skip
    emoji = "[PE][MJET]*(?:(?<=J)P[MJET]*)*"
    template = f"S+|N+|L[LMJ]*|{emoji}|RR?[MJ]*|[^SN][MJ]*"
    return re.compile("".join(kinds.get(letter, letter) for letter in template).encode("latin-1"), re.DOTALL)


def word_starts_v2(kinds: bytes) -> list[int]:
    """Return where words, runs of spaces and runs of line breaks begin, from the kinds of the characters."""
    return [found.start() for found in _pattern_v2().finditer(kinds)]


def _split_clusters(text: str, max_word_bytes: int | None) -> list[str]:
    """Split under v2: '' where an expected space is missing; a single expected space is left out."""
    classes = character_table("v2").take(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4"))
    starts = word_starts_v2((classes & KIND_BITS).tobytes())
    class_of = classes.tobytes()
    atoms = [text[start:end] for start, end in itertools.pairwise([*starts, len(text)])]
    if max_word_bytes is not None and 4 * max(map(len, atoms), default=0) > max_word_bytes:
        atoms = [part for atom in atoms for part in cut_word(atom, max_word_bytes)]

    words: list[str] = []
    left_first = left_last = NO_SPACE_AFTER  # classes of the ends of the word before, or what forbids a space
    end, space_waits = 0, False
    for atom in atoms:
        start, end = end, end + len(atom)
        if atom == " ":
            space_waits = True  # until the word after it is known
            continue
        first = class_of[start]
        forbids = (left_last & NO_SPACE_AFTER) | (first & NO_SPACE_BEFORE) | (left_first & first & SPACELESS)
        if space_waits and forbids:
            words.append(" ")
        elif not space_waits and not forbids:
            words.append("")
        words.append(atom)
        left_first, left_last, space_waits = first, class_of[end - 1], False
    return [*words, " "] if space_waits else words


def _with_cuts(words: list[str], max_word_bytes: int) -> list[str]:
    if 4 * max(map(len, words), default=0) <= max_word_bytes:
        return words
    cut: list[str] = []
    for word in words:
        for part in cut_word(word, max_word_bytes):
            cut += part, ""
        cut.pop()
    return cut


def cut_word(word: str, max_word_bytes: int) -> list[str]:
    """Cut a word between code points into parts of at most `max_word_bytes` bytes of UTF-8, filled from the left.

    Runs of spacing stay whole.
    """
    if word[:1] in ("", " ", "\n") or len(word.encode("utf-8", "surrogatepass")) <= max_word_bytes:
        return [word]
    parts: list[str] = []
    start = size = 0
    for index, character in enumerate(word):
        width = len(character.encode("utf-8", "surrogatepass"))
        if size + width > max_word_bytes:
            parts.append(word[start:index])
            start, size = index, 0
        size += width
    return [*parts, word[start:]]


def _with_markers(words: Sequence[str], ruleset: Ruleset) -> list[str]:
    spaces, lines = space_packs(ruleset), line_packs()
    marked: list[str] = []
    for word in words:
        if not word:
            marked.append(NO_SPACE)
        elif word[0] == " ":
            marked += pack(len(word), spaces)
        elif word[0] == "\n":
            marked += pack(len(word), lines)
        else:
            marked.append(word)
    return marked


def pack(length: int, packs: dict[int, PackName]) -> list[PackName]:
    """Write a run as few packs, the longest first: 9 becomes 4, 4, 1."""
    packed: list[PackName] = []
    for size, marker in packs.items():
        packed.extend(repeat(marker, length // size))
        length %= size
    return packed


def is_one_word(text: str, ruleset: Ruleset = "v1") -> bool:
    """Tell whether a string is exactly one word that is neither a space nor a line break."""
    return text[:1] not in ("", " ", "\n") and len(split_plain(text, ruleset, None)) == 1


def check_ruleset(ruleset: str) -> None:
    """Raise ValueError unless the ruleset is known."""
    if ruleset not in _PACK_SIZES:
        raise ValueError(f'ruleset must be "v1" or "v2", got {ruleset!r}.')


def check_special_syntax(special_syntax: str) -> None:
    """Raise ValueError unless the syntax is known."""
    if special_syntax not in ("registered", "any"):
        raise ValueError(f'special_syntax must be "registered" or "any", got {special_syntax!r}.')


def checked_max_word_bytes(limit: object) -> int | None:
    """Return the limit if it leaves room for every code point: four bytes at least, or None for no limit."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 4:
        raise ValueError(f"max_word_bytes must be None or an integer of at least 4, got {limit!r}.")
    return limit
