"""Where the words of a text begin and end, found for all of it at once with numpy.

Characters become classes through a table; comparing the classes of neighbors gives the items, that is words and runs
of spacing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .characters_tfree import (
    BORDER,
    JOINER,
    KIND_BITS,
    LINE_BREAK,
    MARK,
    NO_SPACE_AFTER,
    NO_SPACE_BEFORE,
    PICTURE,
    REGION,
    RUN,
    SKIN_TONE,
    SPACE,
    SPACELESS,
    Ruleset,
    character_bytes,
    character_table,
)
from .words_tfree import word_starts_v2

SPACE_CLASS = SPACE | RUN | NO_SPACE_AFTER | NO_SPACE_BEFORE
LINE_BREAK_CLASS = LINE_BREAK | RUN | NO_SPACE_AFTER | NO_SPACE_BEFORE
BORDER_CLASS = BORDER | NO_SPACE_AFTER | NO_SPACE_BEFORE


@dataclass(frozen=True)
class Items:
    """Words, runs of spaces, runs of line breaks and borders of a text, in order; expected spaces are left out."""

    start: np.ndarray
    """int64 [M], offset of the first character."""

    end: np.ndarray
    """int64 [M]."""

    kind: np.ndarray
    """uint8 [M], class of the first character."""

    glued: np.ndarray
    """int64 [G], the items before which an expected space is missing."""


def find_items(text: str, borders: np.ndarray, ruleset: Ruleset, cuts: Sequence[int] = ()) -> Items:
    """Find the items of a text, the same as `split_words` finds.

    Args:
        text: begins and ends with a border character.
        borders: int64 `[B]`, offsets of the characters that only separate, in order; the first 0, the last the end.
        ruleset: "v1" or "v2".
        cuts: offsets inside words at which to cut them, see `max_word_bytes`.
    """
    has_clusters = ruleset == "v2" and not text.isascii()
    classes = _classes(text, ruleset)
    classes[borders] = BORDER_CLASS
    starts = _cluster_starts(classes, borders) if has_clusters else _run_starts(classes, classes)
    if len(cuts):
        starts[np.asarray(cuts)] = True
    is_expected = _expected_spaces(classes)
    if has_clusters:
        _forbid_between_clusters(is_expected, starts, classes)
    starts &= ~is_expected

    start = starts.nonzero()[0]
    last = start[1:] - 1  # the character before an item
    end = np.empty_like(start)
    np.subtract(start[1:], is_expected.view(np.uint8).take(last), out=end[:-1])
    end[-1] = len(classes)
    kind = classes.take(start)
    forbids = (classes.take(last) & NO_SPACE_AFTER) | (kind[1:] & NO_SPACE_BEFORE)
    if has_clusters:
        forbids |= kind[:-1] & kind[1:] & SPACELESS
    return Items(start, end, kind, (forbids == 0).nonzero()[0] + 1)


def _classes(text: str, ruleset: Ruleset) -> np.ndarray:
    """Return the class of every character, uint8 `[n]`."""
    if text.isascii():
        return np.frombuffer(bytearray(text.encode("ascii").translate(_ascii_classes(ruleset))), dtype=np.uint8)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return character_table(ruleset).take(codes)


@lru_cache(maxsize=2)
def _ascii_classes(ruleset: Ruleset) -> bytes:
    return character_bytes(ruleset)[:256]


def _run_starts(classes: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Mark the characters that do not continue a run, bool `[n]`.

    Args:
        classes: of each character.
        whole: of the character that each one is attached to, or of itself.
    """
    starts = np.empty(len(classes), dtype=bool)
    starts[0] = True
    np.not_equal(classes[1:], whole[:-1], out=starts[1:])
    starts[1:] |= classes[1:] < RUN
    return starts


def _expected_spaces(classes: np.ndarray) -> np.ndarray:
    """Mark the single spaces that go without saying, bool `[n]`. Next to borders and spacing none does."""
    is_expected = np.zeros(len(classes), dtype=bool)
    forbids = (classes[:-2] & NO_SPACE_AFTER) | (classes[2:] & NO_SPACE_BEFORE)
    np.equal(forbids, 0, out=is_expected[1:-1])
    is_expected &= classes == SPACE_CLASS
    return is_expected


def _cluster_starts(classes: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Like `_run_starts`, with marks attached to what they stand after, and emoji sequences in one piece."""
    kinds = classes & KIND_BITS
    is_mark = (kinds == MARK) | (kinds == JOINER)
    if not is_mark.any():
        starts = _run_starts(classes, classes)
    else:
        is_spacing = (kinds == SPACE) | (kinds == LINE_BREAK) | (kinds == BORDER)
        is_mark[1:] &= ~is_spacing[:-1]  # after spacing a mark stands alone
        attached_to = np.maximum.accumulate(np.where(is_mark, 0, np.arange(len(classes))))
        starts = _run_starts(classes, classes.take(attached_to))
        starts &= ~is_mark
    _join_emoji(starts, kinds, borders)
    return starts


def _join_emoji(starts: np.ndarray, kinds: np.ndarray, borders: np.ndarray) -> None:
    """Let the regular expression decide, in place, about the texts in which emoji may be sequences."""
    is_part = (kinds >= SKIN_TONE) & (kinds <= REGION)
    is_part[1:] |= (kinds[:-1] == JOINER) & (kinds[1:] == PICTURE)
    parts = np.flatnonzero(is_part)
    for index in np.unique(np.searchsorted(borders, parts)):
        first, last = borders[index - 1] + 1, borders[index]
        starts[first:last] = False
        starts[first + np.array(word_starts_v2(kinds[first:last].tobytes()))] = True


def _forbid_between_clusters(is_expected: np.ndarray, starts: np.ndarray, classes: np.ndarray) -> None:
    """Take back, in place, the spaces between two words of scripts without spaces."""
    spaces = np.flatnonzero(is_expected[:-1] & (classes[1:] & SPACELESS != 0))
    if len(spaces):
        start = np.flatnonzero(starts)
        word_before = start.take(np.searchsorted(start, spaces) - 1)
        is_expected[spaces] = classes.take(word_before) & SPACELESS == 0
