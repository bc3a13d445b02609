"""Explanations as matplotlib figures, drawn without pyplot: no window, no display, no global state."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from .display_atman import blend, hexadecimal, probability, shorten, target_text, visible
from .explanation_atman import Explanation
from .metrics_atman import area_under_curve
from .overlay_atman import overlay_map, ramp_colors, to_picture

GREY, INK = "#6b6b6b", "#1a1a1a"
_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Emoji")
_LINE_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f")
_UNKNOWN = (0.85, 0.85, 0.85)


def plot_top(explanation: Explanation, k: int = 10, target: int | None = None) -> Any:
    """Draw the units of greatest effect as bars: red ones support the target, blue ones oppose it.

    Args:
        explanation: of any granularity.
        k: how many.
        target: index of the target; None sums over all targets.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    scores = explanation.relevance(target).tolist()
    known = [u for u, score in enumerate(scores) if not math.isnan(score)]
    ranked = sorted(known, key=lambda u: -abs(scores[u]))[:k]
    names = [shorten(visible(explanation.units[u].text).strip() or "·", 36) for u in ranked]
    values = [scores[u] for u in ranked]
    figure = new_figure(7.0, 1.1 + 0.3 * max(len(ranked), 1))
    axes = _axes(figure, f"{target_text(explanation, target)}   {probability(explanation, target)}")
    bars = axes.barh(range(len(values)), values, 0.72, color=[hexadecimal(blend(math.copysign(1, v))) for v in values])
    axes.bar_label(bars, [f"{value:+.2f}" for value in values], padding=3, fontsize=9, color=GREY)
    axes.set_yticks(range(len(names)), names, fontsize=10, parse_math=False, family=fonts())
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.axvline(0, color="#b0b0b0", linewidth=0.8, zorder=0)
    axes.set_xlabel(f"relevance ({explanation.score_unit})", fontsize=10, color=GREY)
    return figure


def plot_curves(
    curves: Mapping[str, Sequence[float]], *, action: str = "removed", quantity: str = "probability"
) -> Any:
    """Draw deletion or insertion curves, one line per method, with the area under each in the legend.

    Args:
        curves: name to values, as from `deletion_curve` or `insertion_curve`.
        action: what happens along the axis: units "removed" or "inserted".
        quantity: what the values are.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    if not curves:
        raise ValueError("curves must hold at least one curve.")
    figure = new_figure(6.0, 3.8)
    axes = _axes(figure, f"units {action}, most relevant first")
    for i, (name, values) in enumerate(curves.items()):
        label = f"{visible(name)} (area {area_under_curve(values):.3f})"
        color, x = _LINE_COLORS[i % len(_LINE_COLORS)], np.linspace(0, 100, len(values))
        axes.plot(x, list(values), label=label, color=color, linewidth=1.8, marker="o", markersize=3)
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=min(0.0, *(min(values) for values in curves.values())))
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_xlabel(f"% of units {action}", fontsize=10, color=GREY)
    axes.set_ylabel(quantity, fontsize=10, color=GREY)
    for text in axes.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
    return figure


def plot_overlay(
    explanation: Explanation, image: Any, i: int = 0, target: int | None = None, alpha: float = 0.6
) -> Any:
    """Draw a picture beside the same picture with the relevance of its regions painted over it.

    Args:
        explanation: of a prompt with images.
        image: the picture the model saw: a PIL image, or an array [H, W, 3] of bytes.
        i: index of the image in the prompt.
        target: index of the target; None sums over all targets.
        alpha: opacity of the strongest region.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib or Pillow is missing.
    """
    values = explanation.image_map(i, target)
    picture = to_picture(image)
    height = min(4.0 * picture.height / picture.width, 6.0)
    figure = new_figure(2 * height * picture.width / picture.height + 1.2, height + 0.4)
    figure.set_layout_engine("constrained")
    title = f"{target_text(explanation, target)}   {probability(explanation, target)}"
    shown = ((picture, "picture"), (overlay_map(values, picture, alpha=alpha), title))
    for axes, (pixels, name) in zip(figure.subplots(1, 2), shown, strict=True):
        axes.imshow(pixels)
        axes.set_title(name, fontsize=11, color=INK, parse_math=False, family=fonts())
        axes.axis("off")
    draw = drawing()
    most = float(values.nan_to_num(0.0).clamp(min=0.0).max())
    scale = draw.ScalarMappable(
        draw.Normalize(0.0, most or 1.0), draw.ListedColormap(ramp_colors(np.linspace(0, 1, 256)))
    )
    bar = figure.colorbar(scale, ax=figure.axes, shrink=0.8, aspect=30)
    bar.set_label(f"supports ({explanation.score_unit})", fontsize=9, color=GREY)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=GREY)
    return figure


def new_figure(width: float, height: float) -> Any:
    """Make a Figure of so many inches that also shows itself in notebooks that never imported pyplot."""
    figure = drawing().Figure(figsize=(width, height), dpi=100, facecolor="white", layout=None)
    figure._repr_png_ = partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def _axes(figure: Any, title: str) -> Any:
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12, color=INK, loc="left", parse_math=False, family=fonts())
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=9)
    return axes


def strength_colors(rows: list[list[float]]) -> np.ndarray:
    """Color of every strength in [-1, 1] on white, for imshow: [rows, columns, 3]; grey where it is NaN."""
    return np.array([[_UNKNOWN if math.isnan(x) else [c / 255 for c in blend(x)] for x in row] for row in rows])


@cache
def fonts() -> list[str]:
    """Installed fonts in the order in which a glyph is looked for."""
    installed = set(drawing().font_names())
    return [name for name in _FONTS if name in installed]


def drawing() -> SimpleNamespace:
    """What is used of matplotlib, imported late: most sessions never draw."""
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties, fontManager
        from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
        from matplotlib.path import Path
        from matplotlib.textpath import text_to_path
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install atman-explain[plot].") from error
    return SimpleNamespace(
        FancyBboxPatch=FancyBboxPatch,
        Figure=Figure,
        FontProperties=FontProperties,
        ListedColormap=ListedColormap,
        Normalize=Normalize,
        Path=Path,
        PathPatch=PathPatch,
        Rectangle=Rectangle,
        ScalarMappable=ScalarMappable,
        font_names=fontManager.get_font_names,
        text_to_path=text_to_path,
    )
