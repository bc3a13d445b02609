"""A dictionary as arrays: which word is the byte string at each of many places of a text, for all places at once.

An open-addressing hash table over the UTF-8 bytes of the words. Words are read eight bytes (a lane) at a time. A hash
only proposes a word; every hit is confirmed byte by byte, so that no text can pass for a word it is not.
"""

from collections.abc import Sequence

import numpy as np


LANE = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)
_FOLD = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


class LaneReader:
    """Bytes that can be read eight at a time from any offset."""

    def __init__(self, data: np.ndarray) -> None:
        """Keep a copy of `data`, uint8 `[n]`, with room to read past its end."""
        padded = np.zeros((len(data) // LANE + 2) * LANE, dtype=np.uint8)
        padded[: len(data)] = data
        self._lanes = padded.view("<u8")

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the first up to eight bytes from each start as uint64, zeros beyond `lengths` (at least 1)."""
        lane = starts >> 3
        shift = ((starts & 7) << 3).astype(np.uint64)
        value = self._lanes.take(lane) >> shift
        value |= self._lanes.take(lane + 1) << (np.uint64(64) - shift)  # a shift by 64 gives 0 in numpy
        unused = np.maximum(LANE - lengths, 0).astype(np.uint64) << np.uint64(3)
        return (value << unused) >> unused


class WordTable:
    """The words of a dictionary, found by their bytes.

    Args:
        words: distinct and not empty; the position in this list is what `find` returns.
    """

    def __init__(self, words: Sequence[str]) -> None:
        data, self._starts, self._lengths = _bytes_of(words)
        self._reader = LaneReader(data)
        self._longest = int(self._lengths.max(initial=0))
        hashes = _hashes(self._reader, self._starts, self._lengths)
        # At most a quarter full: three of four unknown words meet an empty slot at once.
        bits = max(4, (4 * len(words) - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._mask = (1 << bits) - 1
        self._words, self._slot_hashes = self._fill(hashes)

    def _fill(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place all words at once; where several want a slot, the first (the most frequent) gets it."""
        words = np.full(self._mask + 1, -1, dtype=np.int32)  # word of each slot
        waiting = np.arange(len(hashes), dtype=np.int32)
        slots = (hashes >> self._shift).astype(np.int64)
        while len(waiting):
            free = words.take(slots) < 0
            # Assigned in reverse, the earliest of several writers of a slot is the one that remains.
            words[slots[free][::-1]] = waiting[free][::-1]
            lost = np.flatnonzero(words.take(slots) != waiting)
            waiting, slots = waiting[lost], (slots[lost] + 1) & self._mask
        slot_hashes = np.zeros(len(words), dtype=np.uint64)
        used = np.flatnonzero(words >= 0)
        slot_hashes[used] = hashes[words[used]]
        return words, slot_hashes

    def find(self, reader: LaneReader, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the word at each place, int32 `[n]`, -1 where the dictionary does not hold it.

        Args:
            reader: the text's bytes.
            starts: int64 `[n]`, byte offsets.
            lengths: int64 `[n]`, in bytes, at least 1.
        """
        found = np.full(len(starts), -1, dtype=np.int32)
        rows = np.flatnonzero(lengths <= self._longest)
        starts, lengths = starts.take(rows), lengths.take(rows)
        hashes = _hashes(reader, starts, lengths)
        slots = (hashes >> self._shift).astype(np.int64)
        while len(rows):
            candidates = self._words.take(slots)
            same = self._slot_hashes.take(slots) == hashes
            same &= self._equal(candidates, reader, starts, lengths)
            found[rows] = np.where(same, candidates, -1)
            # An empty slot ends the search, another word in the slot does not.
            on = np.flatnonzero(~same & (candidates >= 0))
            rows, starts, lengths, hashes = (x.take(on) for x in (rows, starts, lengths, hashes))
            slots = (slots.take(on) + 1) & self._mask
        return found

    def _equal(
        self, candidates: np.ndarray, reader: LaneReader, starts: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """Compare lengths, and bytes where equal hashes and lengths do not already prove them equal: bool `[n]`.

        Up to one lane, the hash is a bijection of the bytes.
        """
        same = self._lengths.take(candidates) == lengths
        rows = np.flatnonzero(same & (lengths > LANE) & (candidates >= 0))
        offset = 0
        while len(rows):
            left = lengths.take(rows) - offset
            word = candidates.take(rows)
            theirs = self._reader.read(self._starts.take(word) + offset, left)
            differs = theirs != reader.read(starts.take(rows) + offset, left)
            same[rows[differs]] = False
            rows = rows[~differs & (left > LANE)]
            offset += LANE
        return same


def _hashes(reader: LaneReader, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hash the bytes at each place: uint64 `[n]`. Two byte strings of at most one lane never share a hash."""
    hashes = reader.read(starts, lengths) * _MIX
    rows = np.flatnonzero(lengths > LANE)
    offset = LANE
    while len(rows):
        left = lengths.take(rows) - offset
        partial = hashes.take(rows)
        partial ^= partial >> _HALF
        hashes[rows] = (partial * _FOLD + reader.read(starts.take(rows) + offset, left)) * _MIX
        rows = rows.take(np.flatnonzero(left > LANE))
        offset += LANE
    hashes ^= hashes >> _HALF
    hashes *= _FOLD
    return hashes


def utf8_starts(data: np.ndarray) -> np.ndarray:
    """Return the offset of the first byte of every character of UTF-8 `data`, int64 `[characters]`."""
    return np.flatnonzero((data & 0xC0) != 0x80)


def _bytes_of(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the UTF-8 bytes of all words in one piece, the start of each word, and its length."""
    data = np.frombuffer("".join(words).encode("utf-8", "surrogatepass"), dtype=np.uint8)
    ends = np.cumsum(np.fromiter(map(len, words), dtype=np.int64, count=len(words)))
    edges = np.append(utf8_starts(data), len(data)).take(np.append(0, ends))
    return data, edges[:-1], np.diff(edges).astype(np.int32)
