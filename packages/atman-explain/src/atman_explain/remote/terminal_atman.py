"""An explanation as text: a table for logs, the coloured prompt for terminals of 256 colours."""

import math
import os

from .display_atman import (
    display_width,
    greatest,
    is_signed,
    probability,
    prompt_pieces,
    shorten,
    target_text,
    visible,
)
from .explanation_atman import Explanation

MAX_UNITS = 10
MAX_TARGETS = 20
BAR = 24
NAME = 32
_RESET = "\x1b[0m"
_SUPPORTS = ((16, 224), (16, 217), (16, 210), (16, 203), (231, 160))  # ink and background from the palette
_OPPOSES = ((16, 189), (16, 153), (16, 111), (16, 69), (231, 26))
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def render_text(explanation: Explanation) -> str:
    """Render a table of the strongest units, without control sequences; and what supports each of several targets."""
    count = len(explanation.targets)
    of = "all targets" if count > 1 else "target"
    lines = [f"{len(explanation.units)} units, {of} {target_text(explanation, None)}, {probability(explanation, None)}"]
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
    lines = [f"{explanation.score_unit:>10} {'token':>6}  unit"]
    lines += [_unit_line(explanation, u, scores[u], scale) for u in ranked]
    hidden = len(known) - len(ranked)
    lines += [f"{'':>19}… {hidden} more"] * (hidden > 0)
    lines += [f"{'':>19}{len(scores) - len(known)} not computed"] * (len(known) < len(scores))
    return [line.rstrip() for line in lines]


def _unit_line(explanation: Explanation, unit: int, score: float, scale: float) -> str:
    name = shorten(visible(explanation.units[unit].text), NAME - 2)
    name = f'"{name}"' + " " * (NAME - 2 - display_width(name))
    mark = "~" if explanation.is_coarse is not None and explanation.is_coarse[unit] else " "
    place = f"{columns[0]:>6}" if (columns := explanation.units[unit].columns) else " " * 6
    return f"{score:>+10.4f} {place} {mark}{name}{_bar(abs(score) / scale)}" + (" opposes" if score < 0 else "")


def _bar(share: float) -> str:
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _target_line(explanation: Explanation, target: int) -> str:
    name = shorten(target_text(explanation, target), 20)
    best = ", ".join(
        f'"{shorten(visible(unit.text), 16)}" {score:+.3g}' for unit, score in explanation.top(3, target) if score > 0
    )
    space = " " * max(0, 20 - display_width(name))
    return f"  {name}{space} {probability(explanation, target):>12}  {best or 'nothing'}"


def render_ansi(explanation: Explanation, target: int | None) -> str:
    """Render the prompt with coloured backgrounds; plain text if the environment has a non-empty NO_COLOR.

    Faint text was not computed; underlined text has the score of a larger unit.
    """
    if os.environ.get("NO_COLOR"):  # no-color.org
        return render_text(explanation)
    scores = explanation.relevance(target).tolist()
    scale = greatest(scores)
    heading = f"target {target_text(explanation, target)}, {probability(explanation, target)}; "
    low, high = _colored(f" -{scale:.3g} ", -1.0), _colored(f" +{scale:.3g} ", 1.0)
    legend = f"{low} opposes, {high} supports" if is_signed(explanation) else f"0 to {high}"
    coarse = explanation.is_coarse or (False,) * len(scores)
    text = "".join(
        piece.text if piece.unit is None else _piece(piece.text, scores[piece.unit] / scale, coarse[piece.unit])
        for piece in prompt_pieces(explanation)
    )
    return f"{heading}{legend} ({explanation.score_unit})\n{text}"


def _piece(text: str, strength: float, is_coarse: bool) -> str:
    """Color a piece of text; line breaks stay outside, as a terminal would fill the rest of the line."""
    return "\n".join(_colored(line, strength, is_coarse) if line else "" for line in text.split("\n"))


def _colored(text: str, strength: float, is_underlined: bool = False) -> str:
    codes = ["4"] if is_underlined else []
    step = 0 if math.isnan(strength) else round(abs(strength) * len(_SUPPORTS))
    if math.isnan(strength):
        codes.append("2")
    elif step:
        ink, background = (_SUPPORTS if strength > 0 else _OPPOSES)[step - 1]
        codes.append(f"38;5;{ink};48;5;{background}")
    return f"\x1b[{';'.join(codes)}m{text}{_RESET}" if codes else text  # next to nothing: the terminal's own colours
