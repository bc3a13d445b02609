"""The token heat map: the prompt set like text, every unit on the color of its score, one panel per target."""

import math
from functools import lru_cache
from typing import Any

from torch import Tensor

from .display_atman import (
    blend,
    greatest,
    hexadecimal,
    is_signed,
    mapped_images,
    probability,
    prompt_pieces,
    target_text,
    text_color,
)
from .explanation_atman import Explanation
from .flow_atman import set_lines
from .plotting_atman import GREY, INK, drawing, fonts, new_figure, strength_colors

MAX_PANELS = 6
MAX_LINES = 40
_WIDTH, _MARGIN, _LINE, _SIZE, _MAP = 612.0, 18.0, 22.0, 12.0, 140.0  # all lengths are in points
_HEADING, _GAP, _FOOT = 28.0, 12.0, 40.0


def plot_tokens(explanation: Explanation, target: int | None = None) -> Any:
    """Draw the prompt as a heat map: red units support the target, blue ones oppose it, hatched ones are unknown.

    A dotted line marks units that have the score of a larger one.

    Args:
        explanation: of any granularity.
        target: index of the only target to draw; None draws one panel for each of the first six.

    Returns:
        A matplotlib Figure; every panel has the maps of the prompt's images below its text.

    Raises:
        ImportError: matplotlib is missing.
    """
    shown = list(range(len(explanation.targets)))[:MAX_PANELS] if target is None else [target]
    scores = {t: explanation.relevance(t).tolist() for t in shown}
    scale = greatest(score for row in scores.values() for score in row)
    panels = [_Panel(explanation, t, scores[t], scale) for t in shown]
    height = _MARGIN + sum(panel.height for panel in panels) + _FOOT
    figure = new_figure(_WIDTH / 72, height / 72)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(height, 0))  # y runs down, as reading does
    page.axis("off")
    y = _MARGIN
    for panel in panels:
        panel.draw(page, y)
        y += panel.height
    _draw_scale(page, y + 8.0, scale, explanation)
    if target is None and len(explanation.targets) > MAX_PANELS:
        _write(page, _MARGIN, y + 12.0, f"… {len(explanation.targets) - MAX_PANELS} more targets", size=10.0)
    return figure


class _Panel:
    """One target: a heading, the coloured prompt, the maps of images. Laid out first, as the page grows with it."""

    def __init__(self, explanation: Explanation, target: int, scores: list[float], scale: float) -> None:
        self.heading = (target_text(explanation, target), probability(explanation, target))
        pieces = prompt_pieces(explanation)
        self.strengths = [None if piece.unit is None else scores[piece.unit] / scale for piece in pieces]
        coarse = explanation.is_coarse or (False,) * len(explanation.units)
        self.is_coarse = [piece.unit is not None and coarse[piece.unit] for piece in pieces]
        lines = set_lines((piece.text for piece in pieces), _WIDTH - 2 * _MARGIN, _text_width)
        self.omitted = max(0, len(lines) - MAX_LINES)
        self.lines = lines[:MAX_LINES] if pieces else []
        self.maps = [explanation.image_map(i, target) / scale for i in mapped_images(explanation)]
        rows = len(self.lines) + bool(self.omitted)
        self.height = _HEADING + rows * _LINE + (_MAP + _GAP) * bool(self.maps) + _GAP

    def draw(self, page: Any, y: float) -> None:
        name, baseline = self.heading
        _write(page, _MARGIN, y + 8.0, name, size=13.0, weight="bold", color=INK)
        _write(page, _WIDTH - _MARGIN, y + 8.0, baseline, size=11.0, ha="right")
        y += _HEADING
        for line in self.lines:
            for box in line:
                x, strength = _MARGIN + box.x, self.strengths[box.piece]
                _draw_box(page, x, y, box.width, box.text, strength)
                if self.is_coarse[box.piece]:
                    page.plot([x, x + box.width], [y + _LINE - 2.0] * 2, ":", color=INK, linewidth=0.9, zorder=3)
            y += _LINE
        if self.omitted:
            _write(page, _MARGIN, y + _LINE / 2, f"… {self.omitted} more lines", size=11.0)
            y += _LINE
        x = _MARGIN
        for values in self.maps:
            width = min(_MAP * values.shape[1] / values.shape[0], _WIDTH - 2 * _MARGIN)
            if x + width <= _WIDTH - _MARGIN:
                _draw_map(page, values, x, y + _GAP / 2, width)
            x += width + _GAP


@lru_cache(maxsize=1 << 14)
def _text_width(text: str) -> float:
    draw = drawing()
    font = draw.FontProperties(family=fonts(), size=_SIZE)
    return float(draw.text_to_path.get_text_width_height_descent(text, font, False)[0])


def _draw_box(page: Any, x: float, y: float, width: float, text: str, strength: float | None) -> None:
    color = GREY
    if strength is not None:
        is_known = not math.isnan(strength)
        fill = hexadecimal(blend(strength)) if is_known else "white"
        color = hexadecimal(text_color(blend(strength))) if is_known else GREY
        frame = drawing().FancyBboxPatch(
            (x - 1.0, y + 1.5),
            width + 2.0,
            _LINE - 3.0,
            boxstyle="round,pad=0,rounding_size=2.5",
            facecolor=fill,
            edgecolor="#c8c8c8",
            hatch=None if is_known else "////",
            linewidth=0.0,
            zorder=1.0 + min(abs(strength), 1.0) if is_known else 1.0,  # strong ones over their neighbours
        )
        page.add_patch(frame)
    if text.strip():
        page.add_patch(_outlines(text, x, y + 0.7 * _LINE, facecolor=color))


def _outlines(text: str, x: float, y: float, **style: Any) -> Any:
    """Text as a shape: drawn as text, its width would depend on the resolution and leave gaps between tokens."""
    draw = drawing()
    font = draw.FontProperties(family=fonts())
    vertices, codes = draw.text_to_path.get_text_path(font, text, ismath=False)
    scale = _SIZE / draw.text_to_path.FONT_SCALE
    points = [(x + scale * across, y - scale * up) for across, up in vertices]
    return draw.PathPatch(draw.Path(points, codes), linewidth=0.0, zorder=3, **style)


def _draw_map(page: Any, values: Tensor, x: float, y: float, width: float) -> None:
    colors = strength_colors(values.tolist())
    page.imshow(colors, extent=(x, x + width, y + _MAP, y), interpolation="nearest", aspect="auto", zorder=2)
    page.add_patch(drawing().Rectangle((x, y), width, _MAP, fill=False, edgecolor="#b0b0b0", linewidth=0.8, zorder=3))


def _draw_scale(page: Any, y: float, scale: float, explanation: Explanation) -> None:
    right, width, height = _WIDTH - _MARGIN - 84.0, 150.0, 8.0
    signed = is_signed(explanation)
    colors = strength_colors([[step / 100 for step in range(-100 if signed else 0, 101)]])
    page.imshow(colors, extent=(right - width, right, y + height, y), aspect="auto", interpolation="nearest", zorder=2)
    low, high = (f"opposes −{scale:.3g}", f"+{scale:.3g} supports") if signed else ("0", f"{scale:.3g}")
    _write(page, right - width - 6.0, y + height / 2, low, size=10.0, ha="right")
    _write(page, right + 6.0, y + height / 2, high, size=10.0, ha="left")
    _write(page, right - width / 2, y + height + 8.0, explanation.score_unit, size=10.0, ha="center")


def _write(page: Any, x: float, y: float, text: str, *, size: float, color: str = GREY, **style: Any) -> None:
    style |= {"family": fonts(), "va": "center_baseline", "parse_math": False, "usetex": False}
    page.text(x, y, text, fontsize=size, color=color, **style)
