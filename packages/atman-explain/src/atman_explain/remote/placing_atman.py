"""Ids and where each of them stands in a text, by the tokenizer's account or by decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

Spans = tuple[tuple[int, int], ...]

MOST_BYTES = 4
"""Of a character. Ids that end in the middle of a character are decoded together with as many that follow."""


@dataclass(frozen=True)
class Placed:
    """A row of ids and their places in a text."""

    ids: tuple[int, ...]

    spans: Spans | None = None
    """Characters, end exclusive; empty for what is not in the text, in order of the ids. None: unknown."""

    word_ids: tuple[int | None, ...] | None = None
    """The tokenizer's numbers of words. None: unknown."""

    inserted: frozenset[int] = frozenset()
    """Positions of ids that a processor put around an image."""


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, or a tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """Return the text of ids as it is, without the tidying that some tokenizers do by default."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    try:
        return str(tokenizer.decode(list(ids), **options))
    except (IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"ids must be the tokenizer's own, but it cannot decode {list(ids)[:9]}: {error}") from error


def place_text(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> Placed:
    """Encode a text."""
    try:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    except (NotImplementedError, TypeError, ValueError):  # no offsets; whatever else is wrong comes up again
        encoded = tokenizer(text, add_special_tokens=add_special_tokens)
    offsets = encoded.get("offset_mapping")
    try:
        word_ids = tuple(encoded.word_ids())
    except (AttributeError, ValueError):  # as a slow tokenizer's
        word_ids = None
    return Placed(tuple(encoded["input_ids"]), None if offsets is None else _in_order(offsets), word_ids)


def place_ids(tokenizer: Any, ids: tuple[int, ...]) -> tuple[str, Placed]:
    """Return a text for ids that were given without one, and their places in it.

    It is the text that a plain call turns into these ids, if there is one.
    """
    for skip in (True, False):
        text = decode(tokenizer, ids, skip_special_tokens=skip)
        placed = place_text(tokenizer, text, add_special_tokens=skip)
        if placed.ids == ids:
            return text, placed
    if placed.spans is None:
        return text, Placed(ids)
    return _decode_in_steps(tokenizer, ids)


def place_expanded(plain: Placed, ids: tuple[int, ...]) -> Placed:
    """Carry places over to a processor's ids, which have many in the place of one image token."""
    origins: list[int | None] = [None] * len(ids)
    for block in SequenceMatcher(None, plain.ids, ids, autojunk=False).get_matching_blocks():
        origins[block.b : block.b + block.size] = range(block.a, block.a + block.size)
    spans = word_ids = None
    if plain.spans is not None:
        spans = _in_order([(0, 0) if origin is None else plain.spans[origin] for origin in origins])
    if plain.word_ids is not None:
        word_ids = tuple(None if origin is None else plain.word_ids[origin] for origin in origins)
    return Placed(ids, spans, word_ids, frozenset(at for at, origin in enumerate(origins) if origin is None))


def _in_order(offsets: Sequence[tuple[int, int]]) -> Spans:
    """Move empty spans behind what precedes them.

    Tokenizers put what is not in the text at 0, and some (GPT-2's) take the space off tokens of nothing but space.
    """
    spans: list[tuple[int, int]] = []
    for start, end in offsets:
        before = spans[-1][1] if spans else 0
        spans.append((start, end) if start < end else (before, max(before, end)))
    return tuple(spans)


def _decode_in_steps(tokenizer: Any, ids: tuple[int, ...]) -> tuple[str, Placed]:
    """Decode id by id, each behind the one before it, since spaces and characters may depend on it."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = first = done = 0
    for end in range(1, len(ids) + 1):
        before, both = decode(tokenizer, ids[first:done]), decode(tokenizer, ids[first:end])
        if both.endswith("\ufffd") and end < len(ids) and end - done < MOST_BYTES:
            continue
        piece = both[len(before) :] if both.startswith(before) else decode(tokenizer, ids[done:end])
        pieces.append(piece)
        spans += [(length, length + len(piece))] * (end - done)
        length += len(piece)
        first, done = done, end
    return "".join(pieces), Placed(ids, tuple(spans))
