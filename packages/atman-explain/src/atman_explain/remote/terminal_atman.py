"""An explanation as text: a table for logs, the coloured prompt for terminals of 256 colours."""

import math
import os

from .display_atman import (
    Color,
    blend,
    display_width,
    greatest,
    probability,
    prompt_pieces,
    shorten,
    target_text,
    text_color,
    visible,
)
from .explanation_atman import Explanation

MAX_UNITS = 10
MAX_TARGETS = 20
BAR = 24
NAME = 32
_RESET = "\x1b[0m"
_LEVELS = (0, 95, 135, 175, 215, 255)  # of each channel in the 6 x 6 x 6 cube of the palette
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def render_text(explanation: Explanation) -> str:
    """Render a table of the strongest units, without control sequences; and what supports each of several targets."""
    count = len(explanation.targets)
    of = "all targets" if count > 1 else "target"
    lines = [
        f"{len(explanation.units)} units, {of} {target_text(explanation, None)}, p = {probability(explanation, None)}"
    ]
    lines += _strongest(explanation)
    if count > 1:
        lines += ["", "each target, and what supports it most"]
        lines += [_target_line(explanation, t) for t in range(min(count, MAX_TARGETS))]
        lines += [f"… {count - MAX_TARGETS} more"] * (count > MAX_TARGETS)
    return "\n".join(lines)


def _strongest(explanation: Explanation) -> list[str]:
    scores = explanation.relevance().tolist()
    known = [u for u, score in enumerate(scores) if not math.isnan(score)]
    ranked = sorted(known, key=lambda u: -abs(scores[u]))[:MAX_UNITS]
    scale = greatest(scores)
    lines = [f"{explanation.score_unit:>10}  {'unit':<{NAME}}"]
    lines += [_unit_line(explanation, u, scores[u], scale) for u in ranked]
    hidden = len(known) - len(ranked)
    lines += [f"{'':>10}  … {hidden} more"] * (hidden > 0)
    lines += [f"{'':>10}  {len(scores) - len(known)} not computed"] * (len(known) < len(scores))
    return [line.rstrip() for line in lines]


def _unit_line(explanation: Explanation, unit: int, score: float, scale: float) -> str:
    name = shorten(visible(explanation.units[unit].text), NAME - 2)
    name = f'"{name}"' + " " * (NAME - 2 - display_width(name))
    mark = "~" if explanation.is_coarse is not None and explanation.is_coarse[unit] else " "
    return f"{score:>+10.4f} {mark}{name}{_bar(abs(score) / scale)}" + (" opposes" if score < 0 else "")


def _bar(share: float) -> str:
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _target_line(explanation: Explanation, target: int) -> str:
    name = shorten(target_text(explanation, target), 20)
    best = ", ".join(
        f'"{shorten(visible(unit.text), 16)}" {score:+.2f}' for unit, score in explanation.top(3, target) if score > 0
    )
    space = " " * max(0, 20 - display_width(name))
    return f"  {name}{space} {probability(explanation, target):>8}  {best or 'nothing'}"


def render_ansi(explanation: Explanation, target: int | None) -> str:
    """Render the prompt with coloured backgrounds; plain text if the environment has a non-empty NO_COLOR."""
    if os.environ.get("NO_COLOR"):  # no-color.org
        return render_text(explanation)
    scores = explanation.relevance(target).tolist()
    scale = greatest(scores)
    heading = f"target {target_text(explanation, target)}, p = {probability(explanation, target)}; "
    ends = [_colored(f" {sign}{scale:.3g} ", strength) for sign, strength in (("-", -1.0), ("+", 1.0))]
    text = "".join(
        visible(piece.text, newline="↵\n") if piece.unit is None else _piece(piece.text, scores[piece.unit] / scale)
        for piece in prompt_pieces(explanation)
    )
    return f"{heading}{ends[0]} opposes, {ends[1]} supports ({explanation.score_unit})\n{text}{_RESET}"


def _piece(text: str, strength: float) -> str:
    """Color a piece of text; line breaks stay outside, as a terminal would fill the rest of the line."""
    lines = visible(text, newline="↵\n").split("\n")
    return "\n".join(_colored(line, strength) if line else "" for line in lines)


def _colored(text: str, strength: float) -> str:
    if math.isnan(strength):
        return f"\x1b[2m{text}{_RESET}"
    background = _palette_color(blend(strength))
    if background == (255, 255, 255):  # next to nothing: the terminal's own colours
        return text
    ink = 16 if text_color(background) == (0, 0, 0) else 231
    return f"\x1b[38;5;{ink};48;5;{_palette_index(background)}m{text}{_RESET}"


def _palette_color(color: Color) -> Color:
    red, green, blue = (min(_LEVELS, key=lambda level: abs(level - channel)) for channel in color)
    return red, green, blue


def _palette_index(color: Color) -> int:
    red, green, blue = (_LEVELS.index(channel) for channel in color)
    return 16 + 36 * red + 6 * green + blue
