"""Text to ids. Many texts are one pass of numpy; a short text takes the regular expression and a dict.

Both ways give the same ids.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from .characters_tfree import Ruleset
from .items_tfree import BORDER_CLASS, LINE_BREAK_CLASS, SPACE_CLASS, Items, find_items
from .words_tfree import NO_SPACE, cut_word, line_packs, pack, space_packs, split_unmarked, structural_words
from .wordtable_tfree import Keys, WordTable, ranges, utf8_starts

CHUNK_CHARACTERS = 1 << 18
"""Texts are encoded together up to this length, so that the arrays of a pass stay in the cache."""


@dataclass(frozen=True)
class Fixed:
    """A stretch of a text whose ids are given, such as a special token."""

    start: int
    end: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """The ids of one text."""

    ids: np.ndarray
    """int64 [N]."""

    spans: np.ndarray | None
    """int64 [N, 2], the characters an id stands for: none for a missing space, for a byte the one it belongs to."""


class WordLookup:
    """Turns texts into ids for one dictionary.

    Args:
        words: the dictionary; the id of a word is `first_word_id` + its position.
        first_structural_id: id of the first structural word, that is the number of special tokens before it.
        ruleset: "v1" or "v2".
        max_word_bytes: longer words are cut.
        hidden: positions in `words` that stand for special tokens now, so that plain text never becomes their ids.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        first_structural_id: int,
        ruleset: Ruleset,
        max_word_bytes: int | None,
        hidden: Collection[int] = (),
    ) -> None:
        markers = {word: index for index, word in enumerate(structural_words(ruleset), first_structural_id)}
        self.first_byte_id = first_structural_id + len(markers)
        self.first_word_id = self.first_byte_id + 512
        self._words, self.ruleset, self._max_word_bytes = words, ruleset, max_word_bytes
        self._hidden = np.array(sorted(hidden), dtype=np.int64)
        self._no_space = markers[NO_SPACE]
        self._spaces = {size: markers[name] for size, name in space_packs(ruleset).items()}
        self._lines = {size: markers[name] for size, name in line_packs().items()}
        self._ids: dict[str, int] | None = None
        self._table: WordTable | None = None

    def spell(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word's bytes."""
        data = word.encode("utf-8", "surrogatepass")
        return *(self.first_byte_id + byte for byte in data[:-1]), self.first_byte_id + 256 + data[-1]

    def encode_short(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens, by regular expression and dict."""
        words = split_unmarked(text, self.ruleset, self._max_word_bytes)
        ids = list(map(self._known_ids().get, words))
        return self._spell_unknown(words, ids) if None in ids else cast("list[int]", ids)

    def encode(
        self, texts: Sequence[str], fixed: Sequence[Sequence[Fixed]] | None = None, *, with_spans: bool = False
    ) -> list[Encoded]:
        """Return the ids of every text, by numpy.

        Args:
            texts: any strings.
            fixed: for every text the stretches whose ids are given, in order and without overlap. None: there are none.
            with_spans: also say which characters every id stands for.
        """
        encoded: list[Encoded] = []
        for first, last in _chunks(texts):
            joined = _join(texts[first:last], None if fixed is None else fixed[first:last])
            encoded += self._encode(joined, with_spans)
        return encoded

    def _known_ids(self) -> dict[str, int]:
        """Everything `split_unmarked` yields that is a single id."""
        if self._ids is None:
            ids = dict(zip(self._words, range(self.first_word_id, self.first_word_id + len(self._words)), strict=True))
            for position in self._hidden:
                del ids[self._words[position]]
            ids[""] = self._no_space
            ids.update((" " * size, index) for size, index in self._spaces.items())
            ids.update(("\n" * size, index) for size, index in self._lines.items())
            self._ids = ids
        return self._ids

    def _spell_unknown(self, words: Sequence[str], ids: list[int | None]) -> list[int]:
        out: list[int] = []
        known = 0
        for _ in range(ids.count(None)):
            unknown = ids.index(None, known)
            out += cast("list[int]", ids[known:unknown])
            word = words[unknown]
            if word[0] == " ":
                out += pack(len(word), self._spaces)
            elif word[0] == "\n":
                out += pack(len(word), self._lines)
            else:
                out += self.spell(word)
            known = unknown + 1
        return out + cast("list[int]", ids[known:])

    def _encode(self, joined: "_Joined", with_spans: bool) -> list[Encoded]:
        """Count the ids of every item, which tells where they go; then write them kind by kind."""
        data, characters = _bytes_of(joined.text)
        items = self._items(joined)
        words = np.flatnonzero(
            (items.kind != SPACE_CLASS) & (items.kind != LINE_BREAK_CLASS) & (items.kind != BORDER_CLASS)
        )
        spaces, lines = (items.kind == SPACE_CLASS).nonzero()[0], (items.kind == LINE_BREAK_CLASS).nonzero()[0]
        borders = (items.kind == BORDER_CLASS).nonzero()[0]
        first_byte, end_byte = items.start.take(words), items.end.take(words)
        if characters is not None:
            first_byte, end_byte = characters.take(first_byte), characters.take(end_byte)
        num_bytes = end_byte - first_byte
        found = self._find(data, first_byte, num_bytes)

        length = items.end - items.start
        counts = np.empty(len(length), dtype=np.int64)
        counts[words] = np.where(found >= 0, 1, num_bytes)
        counts[spaces] = _count_packs(length.take(spaces), self._spaces)
        counts[lines] = _count_packs(length.take(lines), self._lines)
        counts[borders] = joined.border_counts()

        out = _Output(items, counts, with_spans)
        out.put(out.position.take(items.glued) - 1, self._no_space, items.start.take(items.glued), 0)
        out.put(out.position.take(words), found + self.first_word_id, items.start.take(words), length.take(words))
        unknown = (found < 0).nonzero()[0]
        self._put_bytes(out, words.take(unknown), data, characters, first_byte.take(unknown), num_bytes.take(unknown))
        out.put_packs(spaces, length.take(spaces), self._spaces)
        out.put_packs(lines, length.take(lines), self._lines)
        return joined.texts_of(out, borders)

    def _items(self, joined: "_Joined") -> Items:
        items = find_items(joined.text, joined.borders, self.ruleset)
        limit = self._max_word_bytes
        if limit is None:
            return items
        is_long = (
            (4 * (items.end - items.start) > limit) & (items.kind != SPACE_CLASS) & (items.kind != LINE_BREAK_CLASS)
        )
        cuts: list[int] = []
        for row in is_long.nonzero()[0]:
            start = int(items.start[row])
            for part in cut_word(joined.text[start : items.end[row]], limit)[:-1]:
                start += len(part)
                cuts.append(start)
        return find_items(joined.text, joined.borders, self.ruleset, cuts) if cuts else items

    def _find(self, data: np.ndarray, first_byte: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
        if self._table is None:
            self._table = WordTable(self._words)
        found = self._table.find(Keys(data, first_byte, num_bytes))
        if len(self._hidden):
            found[np.isin(found, self._hidden)] = -1
        return found

    def _put_bytes(
        self,
        out: "_Output",
        rows: np.ndarray,
        data: np.ndarray,
        characters: np.ndarray | None,
        first_byte: np.ndarray,
        num_bytes: np.ndarray,
    ) -> None:
        """Spell the words of `rows`."""
        source = ranges(first_byte, num_bytes)
        ids = data.take(source) + np.int64(self.first_byte_id)
        ids[np.cumsum(num_bytes) - 1] += 256
        start = source if characters is None else np.searchsorted(characters, source, side="right") - 1
        out.put(ranges(out.position.take(rows), num_bytes), ids, start, 1)


@dataclass(frozen=True)
class _Joined:
    """Texts as one string, with a border character at both ends and wherever a text ends or ids are given."""

    text: str
    borders: np.ndarray
    """int64 [B], offsets of the border characters."""

    fixed: list[Fixed | None]
    """What stands at each border; None where a text begins or ends."""

    text_ends: list[int]
    """Number of the border after each text."""

    origins: list[int]
    """Where in its text the segment after each border but the last begins."""

    def border_counts(self) -> np.ndarray | int:
        """Return how many ids stand at each border."""
        if len(self.fixed) == len(self.text_ends) + 1:
            return 0
        return np.array([0 if fixed is None else len(fixed.ids) for fixed in self.fixed], dtype=np.int64)

    def texts_of(self, out: "_Output", borders: np.ndarray) -> list[Encoded]:
        """Fill in the given ids and cut the output into texts."""
        position = out.position.take(borders)
        if out.spans is not None:
            shift = np.array([*self.origins, 0]) - self.borders - 1
            segment = np.searchsorted(position, np.arange(len(out.ids)), side="right") - 1
            out.spans += shift.take(segment)[:, None]
        for fixed, where in zip(self.fixed, position, strict=True):
            if fixed is not None:
                out.ids[where : where + len(fixed.ids)] = fixed.ids
                if out.spans is not None:
                    out.spans[where : where + len(fixed.ids)] = fixed.start, fixed.end
        edges = [0, *position.take(self.text_ends).tolist()]
        return [
            Encoded(out.ids[first:last], None if out.spans is None else out.spans[first:last])
            for first, last in itertools.pairwise(edges)
        ]


def _join(texts: Sequence[str], fixed: Sequence[Sequence[Fixed]] | None) -> _Joined:
    segments: list[str] = []
    at_borders: list[Fixed | None] = [None]
    text_ends: list[int] = []
    origins: list[int] = []
    for index, text in enumerate(texts):
        origin = 0
        for stretch in fixed[index] if fixed is not None else ():
            segments.append(text[origin : stretch.start])
            origins.append(origin)
            at_borders.append(stretch)
            origin = stretch.end
        segments.append(text[origin:])
        origins.append(origin)
        text_ends.append(len(at_borders))
        at_borders.append(None)
    lengths = np.fromiter(map(len, segments), dtype=np.int64, count=len(segments))
    borders = np.zeros(len(segments) + 1, dtype=np.int64)
    np.cumsum(lengths + 1, out=borders[1:])
    return _Joined("\0".join(["", *segments, ""]), borders, at_borders, text_ends, origins)


class _Output:
    """The ids being written, and the characters they stand for."""

    def __init__(self, items: Items, counts: np.ndarray, with_spans: bool) -> None:
        """Make room for `counts` `[M]` ids per item, and one more before each glued item."""
        total = counts.copy()
        total[items.glued] += 1
        ends = total.cumsum()
        self.position = ends - counts
        """int64 [M], where the ids of each item begin."""
        self.ids = np.empty(ends[-1], dtype=np.int64)
        self.spans = np.zeros((ends[-1], 2), dtype=np.int64) if with_spans else None
        self._starts = items.start

    def put(self, where: np.ndarray, ids: np.ndarray | int, start: np.ndarray, length: np.ndarray | int) -> None:
        """Write ids and the characters they stand for."""
        self.ids[where] = ids
        if self.spans is not None:
            self.spans[where, 0] = start
            self.spans[where, 1] = start + length

    def put_packs(self, rows: np.ndarray, length: np.ndarray, packs: dict[int, int]) -> None:
        """Write runs of spacing: as many of the longest pack as fit, then at most one of each shorter one."""
        if not len(rows):
            return
        where, start = self.position.take(rows), self._starts.take(rows)
        (longest, longest_id), *shorter = packs.items()
        repeats = length // longest
        if repeats.any():
            inside = ranges(np.zeros_like(repeats), repeats)
            self.put(
                np.repeat(where, repeats) + inside, longest_id, np.repeat(start, repeats) + inside * longest, longest
            )
            where, start = where + repeats, start + repeats * longest
        for size, index in shorter:
            has = (length & size).nonzero()[0]
            if not len(has):
                continue
            self.put(where.take(has), index, start.take(has), size)
            where[has] += 1
            start[has] += size


def _count_packs(length: np.ndarray, packs: dict[int, int]) -> np.ndarray:
    """Return how many packs `pack` writes for each length; sizes are powers of two."""
    longest, *shorter = packs
    count = length // longest
    for size in shorter if len(length) else ():
        count += (length & size) != 0
    return count


def _bytes_of(text: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the UTF-8 bytes of a text and where its characters begin; None: every character is one byte."""
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    return data, None if text.isascii() else utf8_starts(data)


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of texts of about `CHUNK_CHARACTERS` together."""
    first = size = 0
    for index, text in enumerate(texts):
        if size and size + len(text) > CHUNK_CHARACTERS:
            yield first, index
            first, size = index, 0
        size += len(text)
    if first < len(texts):
        yield first, len(texts)
