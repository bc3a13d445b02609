"""Coloured text set in lines: which word stands where. Pure layout; whoever draws it says how wide a text is."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")


@dataclass
class Box:
    """A stretch of one line in one color. Lengths are those of `width_of`."""

    text: str
    piece: int
    """Index of the piece that the text is from."""
    x: float
    width: float


def set_lines(pieces: Iterable[str], line_width: float, width_of: Callable[[str], float]) -> list[list[Box]]:
    """Break pieces of text into lines: at line breaks, else between words, else, for a long word, anywhere.

    Args:
        pieces: texts that follow each other; a word may consist of several.
        line_width: no box ends beyond it, unless a single character does.
        width_of: the width of a text.

    Returns:
        Lines of boxes. Spaces at which a line was broken are dropped.
    """
    setter = _Setter(line_width, width_of)
    for index, text in enumerate(pieces):
        for part in _PARTS.findall(text):
            setter.add(index, part)
    setter.end_word()
    return setter.lines


class _Setter:
    def __init__(self, line_width: float, width_of: Callable[[str], float]) -> None:
        self.lines: list[list[Box]] = [[]]
        self._line_width, self._width_of = line_width, width_of
        self._x = 0.0
        self._space: list[tuple[int, str]] = []  # between the last word and `_word`
        self._word: list[tuple[int, str]] = []

    def add(self, piece: int, part: str) -> None:
        if part == "\n":
            self.end_word()
            self._break_line()
        elif part.isspace():
            self.end_word()
            self._space.append((piece, part))
        else:
            self._word.append((piece, part))

    def end_word(self) -> None:
        if not self._word:
            return
        width = sum(self._width_of(part) for _, part in self._space + self._word)
        if self._x + width > self._line_width and self.lines[-1]:
            self._break_line()
        for piece, part in self._space + self._word:
            self._put(piece, part)
        self._space, self._word = [], []

    def _put(self, piece: int, part: str) -> None:
        width = self._width_of(part)
        if self._x + width > self._line_width and len(part) > 1:
            for character in part:
                if self._x + self._width_of(character) > self._line_width and self.lines[-1]:
                    self._break_line()
                self._place(piece, character, self._width_of(character))
        else:
            self._place(piece, part, width)

    def _place(self, piece: int, part: str, width: float) -> None:
        line = self.lines[-1]
        if line and line[-1].piece == piece:
            line[-1].text += part
            line[-1].width += width
        else:
            line.append(Box(part, piece, self._x, width))
        self._x += width

    def _break_line(self) -> None:
        self.lines.append([])
        self._x, self._space = 0.0, []
