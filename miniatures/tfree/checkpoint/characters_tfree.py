"""What every code point is to the word splitter: one byte per code point, built on first use.

The low four bits hold the kind of the character. The flags above say whether neighbors of the same kind form one word
(`RUN`), and whether a space is expected beside it.
"""

import re
import unicodedata
from functools import lru_cache
from typing import Literal

import numpy as np

Ruleset = Literal["v1", "v2"]

OTHER, LETTER, SPACE, LINE_BREAK = 0, 1, 2, 3
MARK, JOINER, PICTURE, SKIN_TONE, TAG, REGION = 4, 5, 6, 7, 8, 9
BORDER = 10  # never in the table: stands between two texts, and where a special token was cut out
KIND_BITS = 15

NO_SPACE_AFTER, NO_SPACE_BEFORE, SPACELESS, RUN = 16, 32, 64, 128

_AFTER_V1 = "#$=-+*/'\"\\(<[]~^&@%_\n "
_BEFORE_V1 = ".,:;?!=-+*/'\"\\)>]~^&@%_\n 1234567890"
_BLANKS_V2 = "\t\r\u00a0\u3000"

CODE_POINTS = 0x110000

# Scripts written without spaces, by block: Thai, Lao, Myanmar, Khmer, then East Asian blocks with their punctuation.
_SPACELESS_BLOCKS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),
    (0x116D0, 0x116FF),
    (0x2E80, 0x2FFF), (0x3001, 0x312F), (0x3190, 0x9FFF), (0xF900, 0xFAFF), (0xFE30, 0xFE4F),
    (0xFF01, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF9F), (0x16FE0, 0x18DFF), (0x1AFF0, 0x1B2FF), (0x20000, 0x3FFFF),
)  # fmt: skip
# Where emoji live. Wider than the emoji property on purpose: an arrow only behaves like an emoji next to a joiner.
_PICTURE_BLOCKS = (
    (0x00A9, 0x00A9), (0x00AE, 0x00AE), (0x203C, 0x203C), (0x2049, 0x2049), (0x2122, 0x2122), (0x2139, 0x2139),
    (0x2190, 0x21FF), (0x2300, 0x23FF), (0x24C2, 0x24C2), (0x25A0, 0x27BF), (0x2900, 0x297F), (0x2B00, 0x2BFF),
    (0x1F000, 0x1FAFF),
)  # fmt: skip


@lru_cache(maxsize=2)
def spaces_around(ruleset: Ruleset) -> tuple[frozenset[str], frozenset[str]]:
    """Return the characters after which, and those before which, no space is expected."""
    blanks = "" if ruleset == "v1" else _BLANKS_V2
    return frozenset(_AFTER_V1 + blanks), frozenset(_BEFORE_V1 + blanks)


@lru_cache(maxsize=2)
def character_table(ruleset: Ruleset) -> np.ndarray:
    """Return kind and flags of every code point, uint8 `[0x110000]`, read-only.

    Source: arXiv 2406.19223 for v1; v2 adds marks, emoji sequences and scripts without spaces.
    """
    table = np.zeros(CODE_POINTS, dtype=np.uint8)
    if ruleset == "v2":
        _set_blocks(table, _PICTURE_BLOCKS, PICTURE)
    _set_letters(table)
    table[ord(" ")], table[ord("\n")] = SPACE | RUN, LINE_BREAK | RUN
    if ruleset == "v2":
        _set_clusters(table)
    no_space_after, no_space_before = spaces_around(ruleset)
    table[[ord(c) for c in no_space_after]] |= NO_SPACE_AFTER
    table[[ord(c) for c in no_space_before]] |= NO_SPACE_BEFORE
    table.flags.writeable = False
    return table


@lru_cache(maxsize=2)
def character_bytes(ruleset: Ruleset) -> bytes:
    """Return `character_table` as bytes, of which single ones are quicker to get at."""
    return character_table(ruleset).tobytes()


def _set_blocks(table: np.ndarray, blocks: tuple[tuple[int, int], ...], kind: int) -> None:
    for first, last in blocks:
        table[first : last + 1] = kind


def _set_letters(table: np.ndarray) -> None:
    """Letters are what `re` calls a word character, less decimal digits and the underscore."""
    everything = np.arange(CODE_POINTS, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    for run in re.finditer(r"[^\W\d_]+", everything):
        table[run.start() : run.end()] = LETTER | RUN


def _set_clusters(table: np.ndarray) -> None:
    """Overwrite the kinds that only v2 knows, later lines winning over earlier ones."""
    for first, last in _SPACELESS_BLOCKS:
        block = table[first : last + 1]
        block[block == LETTER | RUN] = OTHER  # a cluster of its own instead of a part of a run
        block |= SPACELESS
    for first, last in ((0x0300, 0x3FFFF), (0xE0000, 0xE0FFF)):  # no mark lies outside (Unicode 17)
        names = [unicodedata.category(chr(c)) for c in range(first, last + 1)]
        marks = np.flatnonzero(np.array([name[0] == "M" for name in names])) + first
        table[marks] = MARK | (table[marks] & SPACELESS)
    table[0x200C], table[0x200D] = MARK, JOINER
    table[0x1F3FB : 0x1F3FF + 1] = SKIN_TONE
    table[0x1F1E6 : 0x1F1FF + 1] = REGION
    table[0xE0020 : 0xE007F + 1] = TAG
