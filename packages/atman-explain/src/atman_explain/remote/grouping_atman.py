"""Which units belong together: by the text they stand in, or as the caller says."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from .explanation_atman import Explanation
from .segments_atman import text_spans
from .units_atman import Unit


def group_by_text(explanation: Explanation, granularity: str) -> list[list[int]]:
    """List the indices of the text units of every word, sentence or paragraph; other units stay alone."""
    if granularity not in ("word", "sentence", "paragraph"):
        raise ValueError(f'groups must be "word", "sentence", "paragraph" or lists of units, got {granularity!r}.')
    text = explanation.prompt
    if text is None:
        raise ValueError(
            f"groups={granularity!r} needs the prompt's text, but only ids were given; pass lists of units."
        )
    starts = [start for start, _ in text_spans(text, granularity)]
    groups: dict[tuple[str, int], list[int]] = {}
    for index, unit in enumerate(explanation.units):
        if unit.kind != "text":
            groups["alone", index] = [index]
            continue
        if unit.span is None:
            raise ValueError(f"groups={granularity!r} needs the place of unit {index} ({unit.text!r}) in the text.")
        covered = text[slice(*unit.span)]
        first = unit.span[0] + len(covered) - len(covered.lstrip())  # the space before a word belongs to it
        groups.setdefault(("text", bisect_right(starts, first)), []).append(index)
    return list(groups.values())


def join_units(explanation: Explanation, groups: Sequence[Sequence[int]]) -> tuple[Unit, ...]:
    """Make one unit of every group of unit indices."""
    total = len(explanation.units)
    if not groups:
        raise ValueError("groups must hold at least one list of units.")
    for i, members in enumerate(groups):
        if not members or len(set(members)) < len(members):
            raise ValueError(f"groups[{i}] must hold at least one unit, each once, got {list(members)}.")
        if min(members) < 0 or max(members) >= total:
            raise ValueError(f"groups[{i}] must hold unit indices in [0, {total}), got {list(members)}.")
        if len({(explanation.units[u].kind, explanation.units[u].image) for u in members}) > 1:
            raise ValueError(f"groups[{i}] must hold units of one kind and one image, got {list(members)}.")
    return tuple(_join([explanation.units[u] for u in sorted(members)], explanation.prompt) for members in groups)


def _join(units: list[Unit], prompt: str | None) -> Unit:
    if len(units) == 1:
        return units[0]
    span = _joint_span([unit.span for unit in units], prompt)
    return Unit(
        text=" … ".join(unit.text for unit in units) if span is None or prompt is None else prompt[slice(*span)],
        columns=tuple(sorted({column for unit in units for column in unit.columns})),
        span=span,
        kind=units[0].kind,
        image=units[0].image,
        box=_joint_box([unit.box for unit in units if unit.box is not None]),
    )


def _joint_span(spans: list[tuple[int, int] | None], prompt: str | None) -> tuple[int, int] | None:
    """The stretch of text that units make up, if nothing but space lies between them."""
    known = sorted(span for span in spans if span is not None)
    if prompt is None or len(known) < len(spans):
        return None
    between = [prompt[end:start] for (_, end), (start, _) in pairwise(known)]
    return None if any(text.strip() for text in between) else (known[0][0], max(end for _, end in known))


def _joint_box(boxes: list[tuple[int, int, int, int]]) -> tuple[int, int, int, int] | None:
    """The rectangle that image units fill, if they fill one."""
    if not boxes:
        return None
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(row + height for row, _, height, _ in boxes), max(box[1] + box[3] for box in boxes)
    is_filled = (bottom - top) * (right - left) == sum(height * width for _, _, height, width in boxes)
    return (top, left, bottom - top, right - left) if is_filled else None
