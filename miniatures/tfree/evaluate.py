"""Scored text -> bits per byte, word accuracy, tokens per word: the same measures for every contender."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORD_OR_SYMBOL = re.compile(r"[^\W\d_]+|[^\s]")
"""A run of letters, one digit or one symbol: T-FREE's words (ruleset v2, scripts with spaces) without white space."""


@dataclass(frozen=True)
class ScoredText:
    """One text and what a model said about each of its units (sub-word pieces or words) in turn."""

    text: str
    spans: list[tuple[int, int]]
    """Characters that a unit stands for; empty for a marker between two characters."""
    bits: list[float]
    """Code length of each unit given all before it."""
    right: list[bool]
    """Whether the unit was the model's first choice, given the true units before it."""

    def __post_init__(self) -> None:
        if not len(self.spans) == len(self.bits) == len(self.right):
            counts = (len(self.spans), len(self.bits), len(self.right))
            raise ValueError(f"spans, bits and right must have one entry per unit, got {counts}.")


def bits_per_byte(texts: Iterable[ScoredText]) -> float:
    """Total code length over total UTF-8 bytes."""
    texts = list(texts)
    return sum(sum(scored.bits) for scored in texts) / sum(len(scored.text.encode()) for scored in texts)


def word_accuracy(texts: Iterable[ScoredText]) -> float:
    """Share of words that a model gets right as its first choice, given the true text before each unit.

    A word (`WORD_OR_SYMBOL`) counts as right when every unit that covers any of the text from the end of the previous
    word to its own end is right: the spaces and markers before a word are part of predicting it.
    """
    hits = [hit for scored in texts for hit in word_hits(scored)]
    return sum(hits) / len(hits)


def word_hits(scored: ScoredText) -> list[bool]:
    """One truth value per word of the text; see `word_accuracy`."""
    hits = []
    previous_end, first = 0, 0
    for match in WORD_OR_SYMBOL.finditer(scored.text):
        while (
            first < len(scored.spans)
            and scored.spans[first][1] <= previous_end
            and not _is_marker(scored.spans[first], previous_end)
        ):
            first += 1
        hit, unit = True, first
        while unit < len(scored.spans) and scored.spans[unit][0] < match.end():
            hit = hit and scored.right[unit]
            unit += 1
        hits.append(hit)
        previous_end = match.end()
    return hits


def _is_marker(span: tuple[int, int], position: int) -> bool:
    return span == (position, position)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def escape_share(words: Iterable[str], dictionary: frozenset[str]) -> float:
    """Share of a text's words outside the dictionary, kept within (0, 1) by half a count on either side."""
    total = outside = 0
    for word in words:
        total += 1
        outside += word not in dictionary
    return (outside + 0.5) / (total + 1.0)


def escaped_bits(word_bits: float, *, in_dictionary: bool, escape_probability: float) -> float:
    """Code length of a word with an explicit escape.

    Args:
        word_bits: -log2 of the softmax over the dictionary for a word in it, else the bits of its spelling.
        in_dictionary: which of the two it is.
        escape_probability: probability that a word is spelled.
    """
    choice = 1.0 - escape_probability if in_dictionary else escape_probability
    return word_bits - math.log2(choice)


def dictionary_word_spans(text: str, units: Sequence[str], widths: Sequence[int | None]) -> list[tuple[int, int]]:
    """Find where each T-FREE word stands in the text.

    Args:
        text: what was encoded.
        units: the words in order; structural ones by any name.
        widths: characters that a structural word stands for; None for a word of the text itself.

    Raises:
        ValueError: the words do not spell the text.
    """
    spans, position = [], 0
    for unit, width in zip(units, widths, strict=True):
        if width is None and not text.startswith(unit, position):
            position += 1  # the one space that two neighboring words imply
            if not text.startswith(" " + unit, position - 1):
                raise ValueError(f"units must spell the text; at character {position} it does not go on with {unit!r}.")
        end = position + (len(unit) if width is None else width)
        spans.append((position, end))
        position = end
    if position != len(text):
        raise ValueError(f"units must spell the text of {len(text)} characters, but end after {position}.")
    return spans
