"""Coloured text set in lines: which word stands where. Pure layout; whoever draws it says how wide a text is."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_WORDS = re.compile(r"\n|[^\S\n]*\S+|[^\S\n]+")


@dataclass
class Box:
    """A stretch of one line in one color. Lengths are in points."""

    text: str
    strength: float | None
    """In [-1, 1]; NaN: not computed; None: not scored."""
    x: float
    width: float


def set_lines(
    pieces: Iterable[tuple[str, float | None]], line_width: float, width_of: Callable[[str], float]
) -> list[list[Box]]:
    """Break pieces of text into lines, between words where there are any.

    Args:
        pieces: texts with their strengths; line breaks in them begin a line.
        line_width: no box ends beyond it, unless a single character does.
        width_of: the width of a text.

    Returns:
        Lines of boxes; neighbouring words of a piece share a box.
    """
    lines: list[list[Box]] = [[]]
    x = 0.0
    for text, strength in pieces:
        box: Box | None = None
        for word in _words(text, line_width, width_of):
            width = width_of(word)
            if word == "\n" or (x + width > line_width and lines[-1]):
                lines.append([])
                x, box = 0.0, None
                if word == "\n":
                    continue
            if box is None:
                box = Box("", strength, x, 0.0)
                lines[-1].append(box)
            box.text += word
            box.width += width
            x += width
    return lines


def _words(text: str, line_width: float, width_of: Callable[[str], float]) -> Iterator[str]:
    for word in _WORDS.findall(text):
        if word == "\n" or width_of(word) <= line_width:
            yield word
            continue
        start = 0
        for end in range(1, len(word) + 1):
            if end - start > 1 and width_of(word[start:end]) > line_width:
                yield word[start : end - 1]
                start = end - 1
        yield word[start:]
