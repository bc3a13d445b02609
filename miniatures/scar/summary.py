"""`results.json` -> means over seeds, curves, and whether the bars set in advance hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from miniatures.scar.steered import OFF, ON, Point
from miniatures.tfree.evaluate import mean_and_sd

SLACK = 0.03
"""A curve that turns back by no more still counts as monotone."""


class Bar(NamedTuple):
    """Something asked for in advance, and what was found for one concept."""

    name: str
    found: str
    """In the worst of the seeds."""
    holds: bool
    """With every seed."""


def bars(results: dict[str, Any]) -> dict[str, list[Bar]]:
    """The bars by concept."""
    return {concept: [*_detection_bars(results, concept), *_curve_bars(results, concept)] for concept in ON}


def turn_back(values: Sequence[float]) -> float:
    """How far a curve that should not fall does fall below an earlier value at most."""
    return max(earlier - later for i, earlier in enumerate(values) for later in values[i:])


def detected(results: dict[str, Any], concept: str, measure: str, *, conditioned: bool) -> list[float]:
    """A measure of every seed."""
    return [run["detection"]["concepts"][concept][measure] for run in runs_of(results, conditioned)]


def curve_points(
    results: dict[str, Any], run: dict[str, Any], concept: str, group: str, rule: str, mode: str
) -> list[Point]:
    """One curve with its neutral point in front."""
    wanted = (concept, group, rule, mode)
    keys = ("concept", "group", "rule", "mode")
    (curve,) = (curve for curve in run["curves"] if tuple(curve[key] for key in keys) == wanted)
    points = list(curve["points"])
    if points[0]["strength"] is None:
        return points
    base = results["base"][group]
    return [{"strength": None, **base, "share": base["shares"][ON[concept]]}, *points]


def mean_curve(
    results: dict[str, Any], concept: str, group: str, rule: str, *, conditioned: bool, mode: str = "residual"
) -> list[tuple[float, float, float]]:
    """Neutral and every strength: mean share over the seeds, its deviation, and the geometric mean of perplexities."""
    runs = [run for run in runs_of(results, conditioned) if any(curve["mode"] == mode for curve in run["curves"])]
    curves = [curve_points(results, run, concept, group, rule, mode) for run in runs]
    found = []
    for points in zip(*curves, strict=True):
        mean, sd = mean_and_sd([point["share"] for point in points])
        nats, _ = mean_and_sd([math.log(point["perplexity"]) for point in points])
        found.append((mean, sd, math.exp(nats)))
    return found


def shares(results: dict[str, Any], concept: str, group: str, rule: str) -> list[list[float]]:
    """A curve of each seed of the conditioned adapters, neutral first."""
    return [
        [point["share"] for point in curve_points(results, run, concept, group, rule, "residual")]
        for run in runs_of(results, True)
    ]


def runs_of(results: dict[str, Any], conditioned: bool) -> list[dict[str, Any]]:
    """Runs with or without labels, one per seed."""
    return [run for run in results["runs"] if run["conditioned"] is conditioned]


def _detection_bars(results: dict[str, Any], concept: str) -> list[Bar]:
    own = min(detected(results, concept, "token_auroc", conditioned=True))
    rival = max(detected(results, concept, "best_latent", conditioned=False))
    second = max(detected(results, concept, "second_best", conditioned=True))
    return [
        Bar("word AUROC > 0.95", f"{own:.4f}", own > 0.95),
        Bar("... > best unconditioned latent + 0.2", f"{own:.3f} - {rival:.3f} = {own - rival:.3f}", own > rival + 0.2),
        Bar("second-best latent < 0.75", f"{second:.3f}", second < 0.75),
    ]


def _curve_bars(results: dict[str, Any], concept: str) -> list[Bar]:
    rises = shares(results, concept, OFF, "add")
    falls = shares(results, concept, ON[concept], "scale")
    low, high = max(curve[0] for curve in rises), min(curve[-1] for curve in rises)
    back = max(map(turn_back, rises))
    up = Bar(
        "`add` from prompts without the concept: <= 0.05, monotone (slack 0.03), >= 0.9",
        f"{low:.3f} to {high:.3f}, turns back by {back:.3f}",
        low <= 0.05 and high >= 0.9 and back <= SLACK,
    )
    high, low = min(curve[0] for curve in falls), max(curve[-1] for curve in falls)
    back = max(turn_back([-share for share in curve]) for curve in falls)
    down = Bar(
        "`scale` from prompts with the concept: >= 0.95, monotone (slack 0.03), <= 0.05",
        f"{high:.3f} to {low:.3f}, turns back by {back:.3f}",
        high >= 0.95 and low <= 0.05 and back <= SLACK,
    )
    return [up, down]
