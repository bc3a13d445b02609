"""Steering curves and text colored by concept score, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniatures.scar.steered import AWAY, OFF, ON, TOWARDS
from miniatures.scar.summary import mean_curve

GROUNDS = {"scripture": "#e07a7a", "german": "#7a9ae0"}
WIDTH, LINE, MARGIN = 1000, 20.0, 10.0  # pixels
COLORS = {True: "#c44e52", False: "#8c8c8c"}
NAMES = {True: "conditioned", False: "unconditioned, best latent"}


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """For every rule and concept: share of the concept, and perplexity below it, by strength.

    Left of neutral, prompts with the concept are steered away from it; right of it, prompts without it towards it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * len(ON), len(TOWARDS), sharex="col", height_ratios=[2, 1] * len(ON))
    for c, (concept, group) in enumerate(ON.items()):
        for r, rule in enumerate(TOWARDS):
            shares, perplexities = axes[2 * c, r], axes[2 * c + 1, r]
            for strengths, prompts in ((AWAY[rule], group), (TOWARDS[rule], OFF)):
                for conditioned, color in COLORS.items():
                    points = mean_curve(results, concept, prompts, rule, conditioned=conditioned)
                    _draw(shares, perplexities, strengths, points, color, NAMES[conditioned])
            shares.set_ylim(-0.04, 1.04)
            perplexities.set_yscale("log")
            perplexities.set_ylim(9, 1500)
            if rule == "scale":
                shares.set_xscale("symlog", linthresh=10)
            shares.grid(alpha=0.3)
            perplexities.grid(alpha=0.3)
            if c == 0:
                shares.set_title(f"rule “{rule}”")
            if r == 0:
                shares.set_ylabel(f"continuations judged\nto be {concept}")
                perplexities.set_ylabel("perplexity")
    for panel in axes[-1]:
        panel.set_xlabel("strength")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[: len(NAMES)], labels[: len(NAMES)], loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def draw_scores(text: str, spans: Sequence[tuple[int, int]], scores: dict[str, Sequence[float]], path: Path) -> None:
    """Write a text with each word on a ground of its strongest concept's color, as strong as the score.

    Args:
        text: lines of text.
        spans: where the words stand in it.
        scores: concept -> score in [0, 1] of each word.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 100, 1), dpi=100)
    renderer = FigureCanvasAgg(figure).get_renderer()
    x, y, end = MARGIN, MARGIN, 0
    placed = []
    for i, (start, stop) in enumerate(spans):
        if "\n" in text[end:stop]:
            x, y = MARGIN, y + 1.3 * LINE
        end = stop
        if not (word := text[start:stop].strip()):
            continue
        concept = max(scores, key=lambda name: scores[name][i])
        ground = {"facecolor": GROUNDS[concept], "alpha": scores[concept][i], "edgecolor": "none", "pad": 1.5}
        drawn = figure.text(0, 0, word, fontsize=9, bbox=ground, transform=None)
        extent = drawn.get_window_extent(renderer).width
        if x + extent > WIDTH - MARGIN:
            x, y = MARGIN, y + LINE
        placed.append((drawn, x, y))
        x += extent + 5
    height = y + LINE + MARGIN
    figure.set_size_inches(WIDTH / 100, height / 100)
    for drawn, x, y in placed:
        drawn.set_position((x, height - y - 0.7 * LINE))
    figure.savefig(path, pil_kwargs={"optimize": True})


def _draw(
    shares: Any,
    perplexities: Any,
    strengths: Sequence[float],
    points: Sequence[tuple[float, float, float]],
    color: str,
    name: str,
) -> None:
    mean, sd, perplexity = zip(*points, strict=True)
    x = [0.0, *strengths]
    if strengths[0] == 0.0:  # "set": 0 is a value, not neutral
        x, mean, sd, perplexity = x[1:], mean[1:], sd[1:], perplexity[1:]
    shares.plot(x, mean, "o-", color=color, label=name, markersize=3)
    low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
    shares.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    perplexities.plot(x, perplexity, "o-", color=color, markersize=3)
