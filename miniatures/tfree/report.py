"""Results of the comparison -> tables, a picture and samples in `README.md`.

`python -m miniatures.tfree.report` does it again from `results.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miniatures.outputs import insert
from miniatures.tfree.evaluate import mean_and_sd

TITLES = {"tfree-dictionary_ce": "T-FREE, dictionary_ce", "tfree-bce": "T-FREE, bce", "bpe": "byte-level BPE"}
MEASURES = (
    ("bits_per_byte", "bits per byte", 1.0, 3),
    ("word_accuracy", "top-1 word accuracy, %", 100.0, 1),
    ("tokens_per_word", "tokens per white-space word", 1.0, 2),
)

Result = dict[str, Any]


def write_report(results: list[Result], folder: Path) -> None:
    """Put tables and samples between the markers of `README.md` in `folder`, and draw `comparison.png` beside it.

    Raises:
        ValueError: `README.md` lacks the markers.
    """
    page = folder / "README.md"
    text = insert(page.read_text(encoding="utf-8"), report(results))
    draw(results, folder / "comparison.png")
    partial = page.with_name(page.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, page)


def report(results: list[Result]) -> str:
    """Markdown: one table over all models, one for each measure by language, and samples of the first seed."""
    models = list(dict.fromkeys(result["model"] for result in results))
    groups = list(results[0]["held_out"])
    sizes = _table(
        "",
        models,
        {
            "parameters": lambda r: f"{r[0]['parameters']:,}",
            "of these in embedding and head": lambda r: f"{r[0]['vocabulary_parameters']:,}",
            "training, kB of text/s": lambda r: _spread(r, lambda x: x["training"]["bytes_per_second"] / 1e3, 1),
            "bits per byte": lambda r: _spread(r, lambda x: _average(x, groups, "bits_per_byte"), 3),
            "top-1 word accuracy, %": lambda r: _spread(r, lambda x: 100 * _average(x, groups, "word_accuracy"), 1),
        },
        results,
    )
    parts = ["![Bits per byte and word accuracy by language](comparison.png)", sizes]
    for measure, title, factor, digits in MEASURES:
        rows = {group: _cell(group, measure, factor, digits) for group in groups}
        parts.append(_table(title, models, rows, results))
    parts.append("Continuations sampled with top-p 0.9, seed 0:")
    parts.append("\n".join(_samples(result) for result in results if result["seed"] == results[0]["seed"]))
    return "\n\n".join(parts)


def draw(results: list[Result], path: Path) -> None:
    """Bars with standard deviations: bits per byte and word accuracy, by language and model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(result["model"] for result in results))
    groups = list(results[0]["held_out"])
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (measure, title) in zip(
        figure.subplots(1, 2),
        (("bits_per_byte", "bits per byte (lower is better)"), ("word_accuracy", "top-1 word accuracy")),
        strict=True,
    ):
        for number, model in enumerate(models):
            of_model = [result for result in results if result["model"] == model]
            spread = [mean_and_sd([result["held_out"][group][measure] for result in of_model]) for group in groups]
            places = [place + (number - (len(models) - 1) / 2) * 0.27 for place in range(len(groups))]
            axes.bar(places, [mean for mean, _ in spread], 0.25, yerr=[sd for _, sd in spread], label=TITLES[model])
        axes.set_xticks(range(len(groups)), groups)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _table(title: str, models: list[str], rows: dict[str, Callable[[list[Result]], str]], results: list[Result]) -> str:
    lines = [f"| {title} | " + " | ".join(TITLES[model] for model in models) + " |", "| --- |" + " --- |" * len(models)]
    for name, cell in rows.items():
        cells = [cell([result for result in results if result["model"] == model]) for model in models]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(group: str, measure: str, factor: float, digits: int) -> Callable[[list[Result]], str]:
    return lambda results: _spread(results, lambda one: factor * one["held_out"][group][measure], digits)


def _spread(results: list[Result], value: Callable[[Result], float], digits: int) -> str:
    mean, sd = mean_and_sd([value(result) for result in results])
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if sd > 1e-9 else f"{mean:.{digits}f}"


def _average(result: Result, groups: list[str], measure: str) -> float:
    return sum(result["held_out"][group][measure] for group in groups) / len(groups)


def _samples(result: Result) -> str:
    lines = [f"- {TITLES[result['model']]}"]
    lines += [f"  - {' / '.join(text.splitlines())}" for text in result["samples"].values()]
    return "\n".join(lines)


if __name__ == "__main__":
    here = Path(__file__).parent
    write_report(json.loads((here / "results.json").read_text(encoding="utf-8")), here)
