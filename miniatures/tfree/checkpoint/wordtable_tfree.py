"""A dictionary as arrays: which word is the byte string at each of many places of a text, for all places at once.

An open-addressing hash table over the UTF-8 bytes of the words. Words are read eight bytes (a lane) at a time. A hash
only proposes a word; every hit is confirmed byte by byte, so that no text can pass for a word it is not.
"""

from collections.abc import Sequence

import numpy as np

LANE = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)
_FOLD = np.uint64(0xD6E8FEB86659FD93)
_LANE_MIX = np.uint64(0xBF58476D1CE4E5B9)
_HALF = np.uint64(32)
_WINDOW = np.arange(8)  # after the first slot, so many are looked at together: a round costs more than its few rows


class Keys:
    """Byte strings, given as places in a larger piece of bytes, in the form in which they are compared."""

    def __init__(self, data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Read the strings.

        Args:
            data: uint8 `[n]`.
            starts: int64 `[K]`, offsets into `data`.
            lengths: int64 `[K]`, in bytes, at least 1.
        """
        padded = np.zeros((len(data) // LANE + 2) * LANE, dtype=np.uint8)
        padded[: len(data)] = data
        lanes = padded.view("<u8")
        self.lengths = lengths
        number = (lengths - 1) >> 3
        ends = number.cumsum()
        self.more_start = ends - number
        """int64 [K], where the lanes after the first begin in `more`."""
        self.more_row = np.arange(len(lengths)).repeat(number)
        """int64 [R], string of each of them."""
        self.more_column = np.arange(len(self.more_row)) - self.more_start.take(self.more_row)
        """int64 [R], number among those of its string."""
        offset = LANE + LANE * self.more_column
        self.more = _read(lanes, starts.take(self.more_row) + offset, lengths.take(self.more_row) - offset)
        """uint64 [R]."""
        self.hashes = _read(lanes, starts, lengths) * _MIX
        """uint64 [K]. Strings of equal length and at most one lane never share one: every step is a bijection."""
        if len(self.more):
            mixed = (self.more ^ (self.more >> _HALF)) * (_LANE_MIX * (offset.astype(np.uint64) | np.uint64(1)))
            long = number.nonzero()[0]
            self.hashes[long] += np.add.reduceat(mixed ^ (mixed >> _HALF), self.more_start.take(long))
        self.hashes ^= self.hashes >> _HALF
        self.hashes *= _FOLD

    def equal(self, other: "Keys", rows: np.ndarray) -> np.ndarray:
        """Compare every string with one of `other` that has an equal hash, byte by byte.

        Args:
            other: the strings to compare with.
            rows: int `[K]`, which of them, or -1 for none.

        Returns:
            bool `[K]`.
        """
        same = (rows >= 0) & (other.lengths.take(rows) == self.lengths)
        if len(self.more):
            lanes = (same.take(self.more_row)).nonzero()[0]
            mine = self.more_row.take(lanes)
            theirs = other.more_start.take(rows.take(mine)) + self.more_column.take(lanes)
            differs = (other.more.take(theirs) != self.more.take(lanes)).nonzero()[0]
            same[mine.take(differs)] = False
        return same


class WordTable:
    """The words of a dictionary, found by their bytes.

    Args:
        words: distinct and not empty; the position in this list is what `find` returns.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._keys = Keys(*_places(words))
        # At most a quarter full, so that runs of used slots are short.
        bits = max(4, (4 * len(words) - 1).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._words = np.full(self._mask + 1, -1, dtype=np.int32)
        self._hashes = np.zeros(self._mask + 1, dtype=np.uint64)
        waiting = np.arange(len(words), dtype=np.int32)
        slots = self._first_slots(self._keys.hashes)
        while len(waiting):
            free = (self._words.take(slots) < 0).nonzero()[0]
            # Of several words that want a slot, the one written last remains: the earliest, so the most frequent.
            self._words[slots[free][::-1]] = waiting[free][::-1]
            lost = (self._words.take(slots) != waiting).nonzero()[0]
            waiting, slots = waiting.take(lost), (slots.take(lost) + 1) & self._mask
        used = (self._words >= 0).nonzero()[0]
        self._hashes[used] = self._keys.hashes.take(self._words.take(used))

    def find(self, keys: Keys) -> np.ndarray:
        """Return the word that each key is, int32 `[K]`, -1 where the dictionary does not hold it."""
        slots = self._first_slots(keys.hashes)
        words = self._words.take(slots)
        found = np.where(self._hashes.take(slots) == keys.hashes, words, -1)
        is_right = keys.equal(self._keys, found)
        found[~is_right] = -1
        rows = ((words >= 0) & ~is_right).nonzero()[0]  # another word is in the slot, so the search goes on
        slots = slots.take(rows) + 1
        while len(rows):
            window = (slots[:, None] + _WINDOW) & self._mask  # [rows, 8]
            words = self._words.take(window)
            proposed = (self._hashes.take(window) == keys.hashes.take(rows)[:, None]) & (words >= 0)
            column = proposed.argmax(axis=1)  # 0 if there is none
            candidates = np.full(len(found), -1, dtype=np.int32)
            has = proposed.any(axis=1).nonzero()[0]
            candidates[rows.take(has)] = words[has, column.take(has)]
            is_right = keys.equal(self._keys, candidates)
            found = np.where(is_right, candidates, found)
            # An empty slot ends the search; after a wrong proposal it goes on behind that one.
            step = np.full(len(rows), len(_WINDOW))
            step[has] = column.take(has) + 1
            is_open = (words >= 0).all(axis=1)
            is_open[has] = True
            on = (is_open & ~is_right.take(rows)).nonzero()[0]
            rows, slots = rows.take(on), (slots + step).take(on)
        return found

    def _first_slots(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> self._shift).astype(np.int64)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ... of each range, one after the other."""
    ends = lengths.cumsum()
    return (starts - ends + lengths).repeat(lengths) + np.arange(ends[-1] if len(ends) else 0)


def utf8_starts(data: np.ndarray) -> np.ndarray:
    """Return the offset of the first byte of every character of UTF-8 `data`, int64 `[characters]`."""
    return ((data & 0xC0) != 0x80).nonzero()[0]


def _read(lanes: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the first up to eight bytes from each start as uint64, zeros beyond `lengths` (at least 1)."""
    lane = starts >> 3
    shift = ((starts & 7) << 3).astype(np.uint64)
    value = lanes.take(lane) >> shift
    value |= lanes.take(lane + 1) << (np.uint64(64) - shift)  # a shift by 64 gives 0 in numpy
    unused = np.maximum(LANE - lengths, 0).astype(np.uint64) << np.uint64(3)
    return (value << unused) >> unused


def _places(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the UTF-8 bytes of all words in one piece, the start of each word, and its length."""
    data = np.frombuffer("".join(words).encode("utf-8", "surrogatepass"), dtype=np.uint8)
    ends = np.cumsum(np.fromiter(map(len, words), dtype=np.int64, count=len(words)))
    edges = np.append(utf8_starts(data), len(data)).take(np.append(0, ends))
    return data, edges[:-1], np.diff(edges)
