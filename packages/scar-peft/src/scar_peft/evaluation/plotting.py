"""Steering curves as matplotlib figures, drawn without pyplot: no window, no display, no global state."""

import io
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from .curves import SteeringCurve

_GREY, _INK = "#6b6b6b", "#1a1a1a"
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#7f7f7f")


def plot_curve(curves: SteeringCurve | Sequence[SteeringCurve], *, quantity: str = "measure") -> Any:
    """Draw what strengths do beside what they cost: the measure, and the perplexity of the texts.

    The dotted line is the model without the adapter.

    Args:
        curves: one curve, or several that share a scale of strengths.
        quantity: what the measure is, such as "toxicity".

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: there is no curve.
        ImportError: matplotlib is missing.

    Example:
        >>> plot_curve(curve, quantity="toxicity").savefig("steering.png")
    """
    curves = [curves] if isinstance(curves, SteeringCurve) else list(curves)
    if not curves:
        raise ValueError("curves must hold at least one curve.")
    figure = _figure()(figsize=(9.0, 3.6), dpi=100, facecolor="white", layout="constrained")
    figure._repr_png_ = partial(_png, figure)
    left, right = figure.subplots(1, 2)
    for i, curve in enumerate(curves):
        points = sorted(curve.points, key=lambda point: point.strength)
        strengths = [point.strength for point in points]
        style: dict[str, Any] = {"color": _COLORS[i % len(_COLORS)], "linewidth": 1.8, "marker": "o", "markersize": 4}
        label = f"{curve.concept} ({curve.rule}, {curve.mode})"
        left.plot(strengths, [point.measure for point in points], label=label, **style)
        right.plot(strengths, [point.perplexity for point in points], label=label, **style)
        for axes, value in ((left, curve.unsteered.measure), (right, curve.unsteered.perplexity)):
            axes.axhline(value, color=style["color"], linewidth=1.0, linestyle=":")
    _finish(left, f"{quantity} of continuations")
    _finish(right, "perplexity without the adapter")
    costs = [point.perplexity for curve in curves for point in (*curve.points, curve.unsteered)]
    if all(map(math.isfinite, costs)) and max(costs) > 10 * min(costs):
        right.set_yscale("log")
    for text in left.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
    return figure


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=11, color=_INK, loc="left", parse_math=False)
    axes.set_xlabel("strength", fontsize=10, color=_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.grid(color="#e4e4e4", linewidth=0.8)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install scar-peft[plot].") from error
    return Figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()
