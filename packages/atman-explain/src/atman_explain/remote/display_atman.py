"""What all pictures of an explanation share: the prompt cut into coloured pieces, harmless text, colours, labels."""

import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from .explanation_atman import Explanation

Color = tuple[int, int, int]
SUPPORTS: Color = (214, 39, 40)
OPPOSES: Color = (31, 99, 210)
WHITE: Color = (255, 255, 255)
_JOINERS = "\u200c\u200d"  # of scripts and emoji, harmless


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt, harmless to show."""

    text: str
    """Line breaks are marked and kept."""
    unit: int | None
    """Index of the unit it is. None: text that was not scored."""


def prompt_pieces(explanation: Explanation) -> list[Piece]:
    """Cut the prompt, and the target tokens that are units, into pieces in reading order; images are left out.

    Space around the text of a unit is a piece of its own, so that colours end with the words.
    """
    units = explanation.units
    order = sorted((u for u in range(len(units)) if units[u].kind != "image"), key=lambda u: units[u].columns[:1])
    is_placed = all(units[u].span is not None for u in order if units[u].kind == "text")
    if explanation.prompt is not None and is_placed:
        pieces = _pieces_of_text(explanation, explanation.prompt, order)
    else:
        pieces = _pieces_of_tokens(explanation, order)
    parts = [part for text, unit in pieces for part in _without_margins(text, unit)]
    return [Piece(visible(text, newline="↵\n", dots=unit is not None), unit) for text, unit in parts]


def _without_margins(text: str, unit: int | None) -> list[tuple[str, int | None]]:
    inner = text.strip()
    if unit is None or not inner:
        return [(text, unit)]
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return [part for part in ((before, None), (inner, unit), (after, None)) if part[0]]


def _pieces_of_text(explanation: Explanation, prompt: str, order: list[int]) -> Iterator[tuple[str, int | None]]:
    end = 0
    for u in order:
        unit = explanation.units[u]
        start, stop = unit.span or (len(prompt), len(prompt))
        if start > end:
            yield prompt[end:start], None
        yield unit.text, u
        end = max(end, stop)
    if end < len(prompt):
        yield prompt[end:], None


def _pieces_of_tokens(explanation: Explanation, order: list[int]) -> Iterator[tuple[str, int | None]]:
    owner = {column: u for u in reversed(order) for column in explanation.units[u].columns}
    columns = [(owner.get(column), text) for column, text in enumerate(explanation.tokens)]
    shown = set()
    for (u, _), group in groupby(columns, key=lambda pair: (pair[0], pair[1] if pair[0] is None else "")):
        texts = [text for _, text in group]
        if u is None:  # a run of the same token is the place of an image, or padding
            yield (texts[0] if len(texts) == 1 else f"{texts[0]}×{len(texts)}"), None
        else:
            shown.add(u)
            yield "".join(texts), u
    yield from ((explanation.units[u].text, u) for u in order if u not in shown)


def mapped_images(explanation: Explanation) -> list[int]:
    """Indices of the images of which there is a map."""
    return sorted({unit.image for unit in explanation.units if unit.box is not None and unit.image is not None})


def is_signed(explanation: Explanation) -> bool:
    """Whether scores below zero mean anything; post-processing takes the signs away."""
    return explanation.config.get("postprocess", "none") == "none" and not explanation.config.get("normalize")


def visible(text: str, newline: str = "↵", dots: bool = True) -> str:
    """Replace characters that would move the cursor, hide, or turn text around.

    Args:
        text: anything, such as a token.
        newline: stands for a line break.
        dots: show the spaces of a text that has nothing else.
    """
    marks = {"\n": newline, "\t": "→", " ": "·" if dots and not text.strip(" ") else " "}
    return "".join(marks.get(character) or _harmless(character) for character in text)


def _harmless(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS:
        return f"\\u{ord(character):04x}"
    return character


def shorten(text: str, most: int) -> str:
    """Cut a text to so many characters, the last being an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def display_width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(c) or c in _JOINERS else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def greatest(scores: Iterable[float]) -> float:
    """Size of the largest score, for a scale that is symmetric about 0; 1 if there is none."""
    return max((abs(score) for score in scores if math.isfinite(score)), default=0.0) or 1.0


def blend(strength: float, background: Color = WHITE, opacity: float = 0.9) -> Color:
    """Mix the color of a score into a background: red supports, blue opposes.

    Args:
        strength: in [-1, 1], the score over the greatest score.
        background: 0 to 255 each.
        opacity: of strength 1.
    """
    share = min(abs(strength), 1.0) * opacity
    ink = SUPPORTS if strength > 0 else OPPOSES
    red, green, blue = (round(share * i + (1 - share) * b) for i, b in zip(ink, background, strict=True))
    return red, green, blue


def luminance(color: Color) -> float:
    """Relative luminance in [0, 1] as defined by WCAG 2."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def text_color(background: Color) -> Color:
    """Black or white, whichever contrasts more."""
    return (0, 0, 0) if luminance(background) > 0.179 else WHITE


def target_text(explanation: Explanation, target: int | None) -> str:
    """The explained text as shown to people, in quotes; None stands for all targets."""
    targets = explanation.targets if target is None else (explanation.targets[target],)
    return f'"{shorten(visible("".join(each.text for each in targets)), 60)}"'


def probability(explanation: Explanation, target: int | None) -> str:
    """How likely a target is without suppression, such as "p = 67.0 %"; all targets together for None.

    An explanation of logits has no probabilities: "logit 7.31".
    """
    outputs = explanation.baseline_logprobs
    output = float(outputs.sum() if target is None else outputs[target])
    return f"logit {output:.4g}" if explanation.config.get("delta") == "logit" else format_probability(output)


def format_probability(logprob: float) -> str:
    """Show a log-probability (nats) as a percentage of two or three digits."""
    if math.isnan(logprob):
        return "p unknown"
    percent = 100 * math.exp(min(logprob, 0.0))
    if percent >= 99.95:
        return "p > 99.9 %" if logprob < 0 else "p = 100 %"
    return f"p = {percent:.1f} %" if percent >= 0.1 else f"p = {percent:.1e} %"


def hexadecimal(color: Color) -> str:
    """Write a color as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*color)
