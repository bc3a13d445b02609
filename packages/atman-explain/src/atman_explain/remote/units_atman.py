"""Units, the groups of columns whose attention is suppressed together: tokens, words, sentences, spans, image tiles."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from .prompts_atman import EncodedPrompt, image_token_ids
from .textgroups_atman import Delimiters, delimiter_groups, known_spans, segment_groups, visible_span, word_groups
from .textgroups_atman import delimiter_chunks as delimiter_chunks

GRANULARITIES = ("token", "word", "sentence", "paragraph", "delimiter")
OVERLAPS = ("complete", "partial")
TILES = {"word": (6, 6), "sentence": (3, 3), "paragraph": (1, 1)}
"""Tiles per image that match a granularity of text; every patch is a unit for the others."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Columns that are suppressed together, and what a reader calls them."""

    text: str
    """What to show."""

    columns: tuple[int, ...]
    """Positions in the model's input sequence."""

    span: tuple[int, int] | None = None
    """Characters of the prompt, end exclusive. None: not text, or unknown."""

    kind: Literal["text", "image", "target"] = "text"
    """Part of the prompt's text, of an image, or of the target."""

    image: int | None = None
    """Number of the image."""

    box: tuple[int, int, int, int] | None = None
    """Row, column, height and width in the image's patch grid."""

    shares: tuple[float, ...] | None = None
    """Fraction of every column's characters that the unit covers. None: all of them."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Another name for `columns`."""
        return self.columns


def split_units(
    prompt: EncodedPrompt,
    *,
    granularity: str = "token",
    delimiter: Delimiters | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    chunks: Sequence[Sequence[int]] | None = None,
    overlap: str = "complete",
    units: str = "all",
    tiles: tuple[int, int] | None = None,
    include_special: bool = False,
    exclude: Sequence[int] = (),
    tokenizer: Any = None,
) -> list[Unit]:
    """Cut a prompt into units.

    Without `spans` or `chunks` every column is in exactly one unit, apart from special and excluded ones.

    Args:
        prompt: an encoded prompt.
        granularity: "token", "word", "sentence", "paragraph" or "delimiter".
        delimiter: a chunk of text ends with it: a string, token ids, or a list of either. Goes before `granularity`.
        spans: characters of the prompt, end exclusive; one unit each and nothing else.
        chunks: columns; one unit each and nothing else. They must not overlap and need not cover the prompt.
        overlap: for tokens that a span covers in part: "complete" takes them whole, "partial" by the covered fraction.
        units: "all", or only those of the "text" or of the images, "image".
        tiles: rows and columns of tiles per image. None: every patch for tokens, 6 x 6 for words, 3 x 3 for sentences,
            one for paragraphs. Never more than there are patches.
        include_special: make a unit of every start, end and control token too.
        exclude: columns that are in no unit; negative ones count from the end.
        tokenizer: cuts a delimiter into tokens if the prompt's characters are unknown.

    Raises:
        ValueError: an argument is outside its choices or the prompt, the tokenizer does not tell where its tokens are
            in the text, or no unit is left.
    """
    _check_choices(granularity, delimiter, spans, chunks, overlap, units)
    omitted = _columns(exclude, len(prompt.input_ids), "exclude")
    if spans is not None or chunks is not None:
        found = _span_units(prompt, spans, overlap) if spans is not None else _chunk_units(prompt, chunks or ())
        found = [part for unit in found if (part := _without(unit, omitted)) is not None]
    else:
        if not include_special:
            omitted |= {column for column, is_special in enumerate(prompt.special) if is_special}
        granularity = "delimiter" if delimiter is not None else granularity
        found = [] if units == "image" else _text_units(prompt, granularity, delimiter, omitted, tokenizer)
        if units != "text":
            found += [part for unit in _image_units(prompt, granularity, tiles) if (part := _without(unit, omitted))]
        found.sort(key=lambda unit: unit.columns[0])
    if not found:
        raise ValueError(
            f"units={units!r} leaves no unit of the {len(prompt.input_ids)} tokens: all are special or excluded, or "
            "there is no image; see include_special and exclude."
        )
    return found


def target_units(target_ids: Sequence[int], texts: Sequence[str], first_column: int) -> list[Unit]:
    """Return one unit for every target token that later ones can see, so for all but the last.

    Args:
        target_ids: `[M]`.
        texts: of the target tokens.
        first_column: where the first target token stands.
    """
    inputs = range(first_column, first_column + len(target_ids) - 1)
    return [Unit(text=text, columns=(column,), kind="target") for column, text in zip(inputs, texts, strict=False)]


def find_spans(text: str, phrase: str, occurrence: int | None = None) -> list[tuple[int, int]]:
    """Return the characters of a phrase in a text: of all its occurrences, or of one, counted from 0.

    Raises:
        ValueError: the phrase is not there, or not that often.
    """
    if not phrase:
        raise ValueError("phrase must not be empty, got ''.")
    spans: list[tuple[int, int]] = []
    while (start := text.find(phrase, spans[-1][1] if spans else 0)) >= 0:
        spans.append((start, start + len(phrase)))
    if not spans:
        raise ValueError(f"{phrase!r} was not found in the prompt; capitals and spaces must agree.")
    if occurrence is None:
        return spans
    if not 0 <= occurrence < len(spans):
        raise ValueError(f"occurrence must lie in [0, {len(spans) - 1}] for {phrase!r}, got {occurrence}.")
    return [spans[occurrence]]


def columns_of_span(
    prompt: EncodedPrompt, span: tuple[int, int], overlap: str = "complete"
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """Return the columns of the tokens that a span of characters touches, and the fraction it covers of each.

    The space before a word, which many tokens carry, counts for nothing: a span of a whole word covers it whole.

    Args:
        prompt: an encoded prompt whose characters are known.
        span: start and end, exclusive.
        overlap: "complete" counts every touched token as covered.

    Returns:
        Columns, and fractions or None if all are 1.

    Raises:
        ValueError: the span is empty, outside the text, or touches no token.
    """
    _check_choice("overlap", overlap, OVERLAPS)
    places, text = known_spans(prompt, "spans")
    start, end = span
    if not 0 <= start < end <= len(text):
        raise ValueError(f"spans must satisfy 0 <= start < end <= {len(text)}, the length of the prompt, got {span}.")
    visible = [visible_span(text, place) for place in places]
    covered = {
        column: (min(end, last) - max(start, first)) / (last - first)
        for column, (first, last) in enumerate(visible)
        if max(start, first) < min(end, last)
    }
    if not covered:
        raise ValueError(f"spans must touch a token, got {span}, which is {text[start:end]!r} in the prompt.")
    is_whole = overlap == "complete" or all(share == 1 for share in covered.values())
    return tuple(covered), None if is_whole else tuple(covered.values())


def overlap_factor(factor: float, share: float) -> float:
    """Return the factor of a token of which a unit covers only a share: 2.0 over half a token is 1.5."""
    return 1.0 + (factor - 1.0) * share


def _check_choices(granularity: str, delimiter: Any, spans: Any, chunks: Any, overlap: str, units: str) -> None:
    _check_choice("granularity", granularity, GRANULARITIES)
    _check_choice("overlap", overlap, OVERLAPS)
    _check_choice("units", units, ("all", "text", "image"))
    given = [
        name for name, value in (("delimiter", delimiter), ("spans", spans), ("chunks", chunks)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"only one of delimiter, spans and chunks can be given, got {' and '.join(given)}.")
    if granularity == "delimiter" and not given:
        raise ValueError('granularity="delimiter" needs delimiter, a string, token ids, or a list of those.')


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _columns(values: Iterable[Any], count: int, name: str) -> set[int]:
    columns = set()
    for value in values:
        column = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else count
        if not -count <= column < count:
            raise ValueError(f"{name} must hold columns in [-{count}, {count - 1}], got {value!r}.")
        columns.add(column % count)
    return columns


def _without(unit: Unit, omitted: set[int]) -> Unit | None:
    if omitted.isdisjoint(unit.columns):
        return unit
    kept = [index for index, column in enumerate(unit.columns) if column not in omitted]
    shares = None if unit.shares is None else tuple(unit.shares[index] for index in kept)
    columns = tuple(unit.columns[index] for index in kept)
    return Unit(**{**vars(unit), "columns": columns, "shares": shares}) if kept else None


def _span_units(prompt: EncodedPrompt, spans: Sequence[tuple[int, int]], overlap: str) -> list[Unit]:
    _, text = known_spans(prompt, "spans")
    found = []
    for start, end in spans:
        columns, shares = columns_of_span(prompt, (start, end), overlap)
        found.append(Unit(text=text[start:end], columns=columns, span=(start, end), shares=shares))
    return found


def _chunk_units(prompt: EncodedPrompt, chunks: Sequence[Sequence[int]]) -> list[Unit]:
    if not chunks or any(isinstance(chunk, (int, str)) for chunk in chunks):
        raise ValueError(f"chunks must be lists of columns, such as [[0, 1], [4]], got {chunks!r}.")
    seen: set[int] = set()
    found = []
    for index, chunk in enumerate(chunks):
        columns = _columns(chunk, len(prompt.input_ids), f"chunks[{index}]")
        if not columns:
            raise ValueError(f"chunks[{index}] must not be empty.")
        if twice := sorted(seen & columns):
            raise ValueError(
                f"chunks must not overlap, got the tokens {twice} in chunks[{index}] and in one before it."
            )
        seen |= columns
        found.append(_text_unit(prompt, sorted(columns)))
    return found


def _text_units(
    prompt: EncodedPrompt, granularity: str, delimiter: Delimiters | None, omitted: set[int], processor: Any
) -> list[Unit]:
    pictured = _image_columns(prompt, processor)
    apart = {column for column, is_special in enumerate(prompt.special) if is_special} | pictured
    columns = [column for column in range(len(prompt.input_ids)) if column not in omitted | pictured]
    if granularity == "token":
        groups = [[column] for column in columns]
    elif granularity == "word":
        groups = word_groups(prompt, columns, apart)
    elif granularity == "delimiter":
        groups = delimiter_groups(prompt, columns, delimiter, processor)
    else:
        return [_text_unit(prompt, *group) for group in segment_groups(prompt, columns, apart, granularity)]
    return [_text_unit(prompt, group) for group in groups]


def _image_columns(prompt: EncodedPrompt, processor: Any) -> set[int]:
    """Return the columns of image patches, and of the same token in between, such as the ends of rows."""
    patches = {column for image in prompt.images for column in image.columns}
    placeholders = {prompt.input_ids[column] for column in patches} | image_token_ids(processor)
    return {column for column, index in enumerate(prompt.input_ids) if index in placeholders}


def _text_unit(prompt: EncodedPrompt, columns: Sequence[int], span: tuple[int, int] | None = None) -> Unit:
    if span is None and prompt.spans is not None:
        span = (prompt.spans[columns[0]][0], prompt.spans[columns[-1]][1])
    if len(columns) == 1 or span is None or prompt.text is None:
        text = "".join(prompt.tokens[column] for column in columns)
    else:
        text = prompt.text[slice(*span)]
    return Unit(text=text, columns=tuple(columns), span=span)


def _image_units(prompt: EncodedPrompt, granularity: str, tiles: tuple[int, int] | None) -> list[Unit]:
    if tiles is not None and (len(tiles) != 2 or min(tiles) < 1):
        raise ValueError(f"tiles must be two numbers of at least 1, rows and columns, got {tiles}.")
    found = []
    for number, image in enumerate(prompt.images):
        count = tiles or TILES.get(granularity, image.grid)
        found += [_tile_unit(image.columns, image.grid[1], number, box) for box in _boxes(image.grid, count)]
    return found


def _boxes(grid: tuple[int, int], tiles: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    rows, columns = ([i * size // n for i in range(n + 1)] for size, n in zip(grid, map(min, grid, tiles), strict=True))
    return [
        (top, left, bottom - top, right - left) for top, bottom in pairwise(rows) for left, right in pairwise(columns)
    ]


def _tile_unit(columns: tuple[int, ...], width: int, number: int, box: tuple[int, int, int, int]) -> Unit:
    row, column, rows, count = box
    places = (columns[r * width + c] for r in range(row, row + rows) for c in range(column, column + count))
    name = f"{row},{column}" if (rows, count) == (1, 1) else f"{row}:{row + rows},{column}:{column + count}"
    return Unit(text=f"image {number} [{name}]", columns=tuple(sorted(places)), kind="image", image=number, box=box)
