"""Documents -> text windows of about equal bytes, cut at line borders: the same text for every contender and step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from miniatures.data.text import TextDocument


@dataclass(frozen=True)
class Segment:
    """A stretch of one document."""

    text: str
    ends_document: bool
    """An end-of-text token follows."""


@dataclass(frozen=True)
class Window:
    """What one row of a batch holds."""

    segments: tuple[Segment, ...]
    leads: bool
    """An end-of-text token stands before the first segment, so that its first word is predicted, too."""

    @property
    def text(self) -> str:
        """All segments in one string."""
        return "".join(segment.text for segment in self.segments)


def training_windows(documents: Sequence[TextDocument], *, window_bytes: int, seed: int) -> list[Window]:
    """Shuffle the documents, join them, and cut the stream into windows of at most about `window_bytes`.

    A single line longer than that is cut in front of a space. A window that begins inside a document leads with an
    end-of-text token half the time, so that a model learns to start with and without one.
    """
    generator = random.Random(f"windows {seed}")
    documents = list(documents)
    generator.shuffle(documents)
    windows: list[Window] = []
    segments: list[Segment] = []
    filled, starts_document = 0, True
    for document in documents:
        pieces = line_pieces(document.text, window_bytes)
        if not segments:
            starts_document = True
        for number, piece in enumerate(pieces):
            size = len(piece.encode())
            if segments and filled + size > window_bytes:
                windows.append(Window(tuple(segments), starts_document or generator.random() < 0.5))
                segments, filled, starts_document = [], 0, number == 0
            is_last = number == len(pieces) - 1
            if segments and not segments[-1].ends_document:
                segments[-1] = Segment(segments[-1].text + piece, is_last)
            else:
                segments.append(Segment(piece, is_last))
            filled += size
    if segments:
        windows.append(Window(tuple(segments), starts_document or generator.random() < 0.5))
    return windows


def held_out_windows(documents: Sequence[TextDocument], *, window_bytes: int, total_bytes: int) -> list[Window]:
    """Windows of single documents, all led by an end-of-text token, until `total_bytes` are reached."""
    windows: list[Window] = []
    taken = 0
    ordered = sorted(documents, key=lambda item: hashlib.sha256(f"{item.source}/{item.page}".encode()).digest())
    for document in ordered:  # the same mixed order of pages in every language
        text = ""
        for piece in line_pieces(document.text, window_bytes):
            if text and len((text + piece).encode()) > window_bytes:
                windows.append(Window((Segment(text, False),), True))
                taken += len(text.encode())
                text = ""
            text += piece
            if taken >= total_bytes:
                return windows
        if text:
            windows.append(Window((Segment(text, False),), True))
            taken += len(text.encode())
    return windows


def line_pieces(text: str, limit: int) -> list[str]:
    """Cut text after every line break, and lines of more than `limit` bytes in front of a space. The parts join back.

    Raises:
        ValueError: `limit` may not hold a single character.
    """
    if limit < 4:
        raise ValueError(f"limit must be at least 4 (the bytes of one character), got {limit}.")
    pieces = []
    for line in text.split("\n"):
        line += "\n"
        while len(line.encode()) > limit:
            head = line.encode()[:limit].decode(errors="ignore")
            cut = head.rfind(" ") if " " in head.strip() else len(head)
            pieces.append(line[:cut])
            line = line[cut:]
        pieces.append(line)
    pieces[-1] = pieces[-1].removesuffix("\n")
    return [piece for piece in pieces if piece]


def step_windows(windows: Sequence[Window], *, step: int, batch_windows: int, seed: int) -> list[Window]:
    """The windows of one training step: every epoch goes through all of them in a new seeded order."""
    per_epoch = max(1, len(windows) // batch_windows)
    epoch, position = divmod(step, per_epoch)
    order = list(range(len(windows)))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return [windows[i] for i in order[position * batch_windows : (position + 1) * batch_windows]]
