"""A text cut into words, sentences, paragraphs or chunks, in time linear in its length."""

import re
from collections.abc import Sequence
from itertools import pairwise

# Both alternatives take whatever they begin with, so that no character is looked at twice.
_BREAK = re.compile(r"(?P<marks>[.!?…。！？｡]+)(?P<closers>[\"'”’»›)\]}」』】）]*)(?P<space>\s*)|(?P<blank>\s+)")
_ABBREVIATIONS = frozenset({"approx", "bzw", "ca", "cf", "dr", "fig", "mr", "mrs", "ms", "nr", "prof", "st", "vs"})
_LONGEST_WORD = 16
"""How far back a mark looks for an abbreviation."""


def text_spans(text: str, granularity: str) -> list[tuple[int, int]]:
    """Cut a text into words, sentences or paragraphs; `(start, end)` of each, which tile the text.

    The space behind a piece belongs to it, and space at the start of the text to the first piece. A sentence ends with
    a mark and space, with an East Asian mark, or with an empty line; not with abbreviations, initials or the numbers of
    a list. Paragraphs end with empty lines, words with space.
    """
    cut = {"word": _word_ends, "sentence": _sentence_ends, "paragraph": _paragraph_ends}[granularity]
    begin = len(text) - len(text.lstrip())
    return _tiles([end for end in cut(text) if begin < end < len(text)], text)


def delimiter_spans(text: str, delimiters: Sequence[str]) -> list[tuple[int, int]]:
    """Cut a text behind each delimiter; `(start, end)` of each piece."""
    ordered = sorted(delimiters, key=len, reverse=True)  # the longest wins where several begin
    ends = [found.end() for found in re.finditer("|".join(map(re.escape, ordered)), text)]
    return _tiles([end for end in ends if end < len(text)], text)


def _tiles(ends: list[int], text: str) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends, len(text)]))


def _word_ends(text: str) -> list[int]:
    return [found.end() for found in re.finditer(r"\s+", text)]


def _paragraph_ends(text: str) -> list[int]:
    return [found.end() for found in re.finditer(r"\s+", text) if _is_blank_line(found[0])]


def _sentence_ends(text: str) -> list[int]:
    ends: list[int] = []
    for found in _BREAK.finditer(text):
        space = found["blank"] or found["space"] or ""
        if _is_blank_line(space) or (found["marks"] and _ends_sentence(text, found, ends[-1] if ends else 0)):
            ends.append(found.end())
    return ends


def _is_blank_line(space: str) -> bool:
    return space.count("\n") > 1 or "\u2029" in space


def _ends_sentence(text: str, found: re.Match[str], start: int) -> bool:
    marks, following = found["marks"], text[found.end() : found.end() + 1]
    if marks[-1] in "。！？｡":
        return True
    if not found["space"] or (found["closers"] and following.islower()):
        return False
    return marks != "." or not _is_abbreviation(text, found.start(), start)


def _is_abbreviation(text: str, dot: int, start: int) -> bool:
    before = text[max(start, dot - _LONGEST_WORD) : dot]
    word = "" if not before or before[-1].isspace() else before.split()[-1].lstrip("([{\"'“‘«")
    if word.isdigit():
        return not text[start : dot - len(word)].strip()  # the number of an item of a list
    return (len(word) == 1 and word.isalpha()) or "." in word or word.lower() in _ABBREVIATIONS
