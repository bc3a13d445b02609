"""Texts with special tokens in them to ids, whichever way is faster for their length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .lookup_tfree import Encoded, Fixed, WordLookup
from .words_tfree import SpecialFinder, SpecialSyntax

NUMPY_FROM = {"runs": 5000, "clusters": 1000}
"""Characters from which numpy is faster than a regular expression and a dict, under simple rules and those of v2."""


@dataclass(frozen=True)
class Located:
    """Ids, and what they stand for."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """Characters of each id."""

    words: list[int]
    """Number of the word of each id, all bytes of a spelled word having the same."""


class TextEncoder:
    """Encodes texts for one set of special tokens.

    Args:
        lookup: encodes the text between them.
        special_ids: id of every special token that is looked for in texts.
        special_syntax: "any" also takes whatever looks like `<|...|>` for one word, spelled if it has no id.
    """

    def __init__(self, lookup: WordLookup, special_ids: Mapping[str, int], special_syntax: SpecialSyntax) -> None:
        self.lookup = lookup
        self._special_ids = dict(special_ids)
        self._finder = SpecialFinder(self._special_ids, special_syntax)

    def encode(self, texts: Sequence[str], *, split_special_tokens: bool = False) -> list[list[int]]:
        """Return the ids of every text; special tokens are plain text if they shall be split."""
        fixed = None if split_special_tokens else self._fixed(texts)
        rules = "runs" if self.lookup.ruleset == "v1" or all(map(str.isascii, texts)) else "clusters"
        if sum(map(len, texts)) >= NUMPY_FROM[rules]:
            return [encoded.ids.tolist() for encoded in self.lookup.encode(texts, fixed)]
        if fixed is None:
            return [self.lookup.encode_short(text) for text in texts]
        return [list(self._in_pieces(text, stretches)) for text, stretches in zip(texts, fixed, strict=True)]

    def locate(self, texts: Sequence[str], *, split_special_tokens: bool = False) -> list[Located]:
        """Like `encode`, with the characters and words that the ids stand for."""
        fixed = None if split_special_tokens else self._fixed(texts)
        return [self._located(encoded) for encoded in self.lookup.encode(texts, fixed, with_spans=True)]

    def _located(self, encoded: Encoded) -> Located:
        first = self.lookup.first_byte_id
        ends_word = (encoded.ids < first) | (encoded.ids >= first + 256)
        words: np.ndarray = np.cumsum(ends_word) - ends_word
        spans = [] if encoded.spans is None else [(start, end) for start, end in encoded.spans.tolist()]
        return Located(encoded.ids.tolist(), spans, words.tolist())

    def _fixed(self, texts: Sequence[str]) -> list[list[Fixed]] | None:
        """Find the special tokens of every text; None if there are none at all."""
        spans = [self._finder.spans(text) for text in texts]
        if not any(spans):
            return None
        return [
            [Fixed(start, end, self._ids_of(text[start:end])) for start, end in found]
            for text, found in zip(texts, spans, strict=True)
        ]

    def _ids_of(self, token: str) -> tuple[int, ...]:
        index = self._special_ids.get(token)
        return self.lookup.spell(token) if index is None else (index,)

    def _in_pieces(self, text: str, fixed: Sequence[Fixed]) -> Iterator[int]:
        position = 0
        for stretch in fixed:
            yield from self.lookup.encode_short(text[position : stretch.start])
            yield from stretch.ids
            position = stretch.end
        yield from self.lookup.encode_short(text[position:])
