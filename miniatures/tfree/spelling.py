"""A byte model of how words are spelled: what a word outside the dictionary costs in a proper code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

END = 256
"""Symbol after the last byte of a word."""
SYMBOLS = 257


class SpellingModel:
    """Interpolated byte trigrams (Witten-Bell), with an end symbol, over the distinct words of a text.

    Every byte string has a probability above zero and the probabilities of all strings sum to one.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._counts: tuple[dict[tuple[int, ...], Counter[int]], ...] = ({}, {}, {})
        for word in words:
            symbols = [END, END, *_bytes(word), END]
            for position in range(2, len(symbols)):
                for order, table in enumerate(self._counts):
                    context = tuple(symbols[position - order : position])
                    table.setdefault(context, Counter())[symbols[position]] += 1
        self._totals = tuple({context: row.total() for context, row in table.items()} for table in self._counts)

    def bits(self, word: str) -> float:
        """Code length of a word with its end symbol, in bits."""
        symbols = [END, END, *_bytes(word), END]
        return -sum(math.log2(self._probability(symbols[i - 2 : i], symbols[i])) for i in range(2, len(symbols)))

    def _probability(self, context: list[int], symbol: int) -> float:
        probability = 1.0 / SYMBOLS
        for order, table in enumerate(self._counts):
            key = tuple(context[2 - order :])
            row = table.get(key)
            if row is None:
                break
            kinds, total = len(row), self._totals[order][key]
            probability = (row[symbol] + kinds * probability) / (total + kinds)
        return probability


def _bytes(word: str) -> bytes:
    return word.encode("utf-8", "surrogatepass")
