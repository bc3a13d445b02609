"""Columns of a prompt's text put together by word, sentence, paragraph or delimiter."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from .placing_atman import Spans, tokenizer_of
from .prompts_atman import EncodedPrompt
from .segments_atman import delimiter_spans, text_spans

Delimiters = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Group = tuple[list[int], tuple[int, int] | None]
"""Columns, and their characters if those are more than the columns' own."""


def known_spans(prompt: EncodedPrompt, argument: str) -> tuple[Spans, str]:
    """Return where every token is in the text, and the text.

    Raises:
        ValueError: the tokenizer did not tell; names the argument that needs to know.
    """
    if prompt.spans is None or prompt.text is None:
        raise ValueError(
            f"{argument} needs to know where every token is in the text, which this prompt's tokenizer does not tell; "
            "use a fast tokenizer, or pass chunks= (lists of token indices)."
        )
    return prompt.spans, prompt.text


def visible_span(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """Return a token's characters without the space around them, which many tokens carry; a token of space keeps it."""
    piece = text[slice(*span)]
    if not (core := piece.strip()):
        return span
    start = span[0] + len(piece) - len(piece.lstrip())
    return start, start + len(core)


def word_groups(prompt: EncodedPrompt, columns: Iterable[int], apart: set[int]) -> list[list[int]]:
    """Put the columns of each word together; those in `apart` stay alone."""
    if prompt.word_ids is None:
        known_spans(prompt, "granularity='word'")
    groups: list[list[int]] = []
    for column in columns:
        is_next = bool(groups) and groups[-1][-1] == column - 1 and apart.isdisjoint((column, column - 1))
        if is_next and not _begins_word(prompt, column):
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups


def _begins_word(prompt: EncodedPrompt, column: int) -> bool:
    """Tell whether a token begins a word, by the tokenizer's account or because a space comes before it.

    Both, because some tokenizers count a whole text as one word. A space of its own belongs to the word that follows.
    """
    words = prompt.word_ids
    if words is not None and (words[column] is None or words[column] != words[column - 1]):
        return True
    if prompt.spans is None or prompt.text is None:
        return False
    text, span, before = prompt.text, prompt.spans[column], prompt.spans[column - 1]
    if not text[slice(*before)].strip():
        return False
    start, _ = visible_span(text, span)
    is_character_of_its_own = start >= before[1]  # and not a further byte of the one before
    return is_character_of_its_own and (not text[slice(*span)].strip() or text[start - 1 : start].isspace())


def segment_groups(prompt: EncodedPrompt, columns: Iterable[int], apart: set[int], granularity: str) -> list[Group]:
    """Put the columns that begin in each sentence or paragraph together; those in `apart` end one and stay alone."""
    spans, text = known_spans(prompt, f"granularity={granularity!r}")
    borders = {border for column in apart if spans[column][0] < spans[column][1] for border in spans[column]}
    starts = sorted({0, *borders, *(start for start, _ in text_spans(text, granularity))} - {len(text)})
    ends = [*starts[1:], len(text)]
    groups: dict[tuple[int, int], Group] = {}
    for column in columns:
        if column in apart:
            groups[-1, column] = ([column], None)
            continue
        number = bisect_right(starts, visible_span(text, spans[column])[0]) - 1
        groups.setdefault((0, number), ([], (starts[number], ends[number])))[0].append(column)
    return list(groups.values())


def delimiter_groups(
    prompt: EncodedPrompt, columns: Iterable[int], delimiter: Delimiters | None, processor: Any
) -> list[list[int]]:
    """Put the columns up to each delimiter together, the delimiter included.

    A string is looked for in the text if that is known, so that it is also found in the middle of a token, which then
    ends the chunk; otherwise, like ids, among the tokens.
    """
    texts, rows = _texts_or_ids(delimiter)
    if texts and prompt.spans is not None and prompt.text is not None:
        text = prompt.text
        starts = [start for start, _ in delimiter_spans(text, texts)]
        numbers = [bisect_right(starts, visible_span(text, span)[0]) for span in prompt.spans]
    else:
        chunks = delimiter_chunks(prompt.input_ids, rows or _ids_of(texts, processor))
        numbers = [number for number, (start, end) in enumerate(chunks) for _ in range(start, end)]
    groups: dict[int, list[int]] = {}
    for column in columns:
        groups.setdefault(numbers[column], []).append(column)
    return list(groups.values())


def delimiter_chunks(ids: Sequence[int], delimiters: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Cut ids into chunks, each ending with a delimiter, apart from the last; `(start, end)`, end exclusive."""
    ordered = sorted(map(tuple, delimiters), key=len, reverse=True)  # the longest wins where several begin
    row, chunks, start, position = tuple(ids), [], 0, 0
    while position < len(row):
        length = next((len(one) for one in ordered if row[position : position + len(one)] == one), 0)
        position += length or 1
        if length:
            chunks.append((start, position))
            start = position
    return [*chunks, (start, len(row))] if start < len(row) else chunks


def _texts_or_ids(delimiter: Any) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return the delimiters as texts or as rows of ids, whichever was given."""
    several = list(delimiter) if isinstance(delimiter, (list, tuple)) else [delimiter]
    if several and all(isinstance(one, int) and not isinstance(one, bool) for one in several):
        several = [tuple(several)]
    if not several or any(not isinstance(one, (str, list, tuple)) or not one for one in several):
        raise ValueError(f"delimiter must be a string, token ids, or a list of those, none empty, got {delimiter!r}.")
    texts = [one for one in several if isinstance(one, str)]
    if texts and len(texts) < len(several):
        raise ValueError(f"delimiter must be all strings or all token ids, got {delimiter!r}.")
    return texts, [] if texts else [tuple(one) for one in several]


def _ids_of(texts: list[str], processor: Any) -> list[tuple[int, ...]]:
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        raise ValueError(f"delimiter={texts[0]!r} needs a tokenizer; give the delimiter as token ids.")
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
