"""`results.json` -> the tables of `README.md` and `steering.png`: `python -m miniatures.scar.report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniatures.outputs import insert
from miniatures.scar.figure import draw_curves
from miniatures.scar.steered import AWAY, OFF, ON, TOWARDS
from miniatures.scar.summary import bars, detected, mean_curve, runs_of
from miniatures.tfree.evaluate import mean_and_sd

HERE = Path(__file__).parent
MEASURES = {
    "token_auroc": "word AUROC of the concept's latent",
    "token_auroc_pre": "... of its pre-activation",
    "sequence_auroc": "sequence AUROC of the concept's latent",
    "best_latent": "best of all latents, word AUROC",
    "second_best": "second-best latent, word AUROC",
    "best_latent_pre": "best of all pre-activations, word AUROC",
    "second_best_pre": "second-best pre-activation, word AUROC",
    "second_best_sequences": "second-best latent, sequence AUROC",
    "stump_accuracy": "accuracy of the best latent alone, words",
    "stump_accuracy_without_best": "the same, that latent removed",
    "fms_tokens": "FMS@1, words",
    "fms": "FMS@1, sequences",
    "token_f1": "F1 of the concept's latent, words",
    "sequence_f1": "F1 of the concept's latent, sequences",
}
CODER = {
    "nmse": "nmse",
    "explained_variance": "explained variance",
    "l0": "L0",
    "dead_fraction": "share of dead latents",
    "ce_recovered": "cross-entropy recovered",
}
MOST = 9999
"""Larger perplexities are not told apart."""
KINDS = {True: "conditioned", False: "unconditioned"}


def tables(results: dict[str, Any]) -> str:
    """All tables in Markdown."""
    parts = [_detection_table(results), _coder_table(results), _base_table(results)]
    parts += [_crossed_table(results), _bars_table(results)]
    for title, rules in (("towards", TOWARDS), ("away", AWAY)):
        parts += [_curve_table(results, rule, title) for rule in rules]
    return "\n\n".join(parts)


def main() -> None:
    """Command line."""
    readme = HERE / "README.md"
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    readme.write_text(insert(readme.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
    draw_curves(results, HERE / "steering.png")


def _detection_table(results: dict[str, Any]) -> str:
    head = ["held-out text", *(f"{concept}, {kind}" for concept in ON for kind in KINDS.values())]
    rows = [
        [name, *(_spread(detected(results, concept, key, conditioned=kind)) for concept in ON for kind in KINDS)]
        for key, name in MEASURES.items()
    ]
    return _table(head, rows)


def _coder_table(results: dict[str, Any]) -> str:
    rows = [
        [name, *(_spread([run["detection"][key] for run in runs_of(results, kind)]) for kind in KINDS)]
        for key, name in CODER.items()
    ]
    return _table(["coder, held-out text", *KINDS.values()], rows)


def _base_table(results: dict[str, Any]) -> str:
    groups = list(results["judge"])
    rows = [
        [
            f"{group} prompts, unsteered",
            *(f"{100 * point['shares'][each]:.0f}" for each in groups),
            f"{point['perplexity']:.1f}",
        ]
        for group, point in results["base"].items()
    ]
    own = [f"{100 * results['judge'][group]:.1f}" for group in groups]
    head = ["judged to be, %", *groups, "perplexity"]
    return _table(head, [["held-out text of its own kind", *own, ""], *rows])


def _crossed_table(results: dict[str, Any]) -> str:
    crossed = [(source, target, value) for source, row in results["crossed"].items() for target, value in row.items()]
    head = [
        "unsteered continuations behind other prompts",
        *(f"{target} behind {source}" for source, target, _ in crossed),
    ]
    return _table(head, [["perplexity", *(f"{value:.0f}" for _, _, value in crossed)]])


def _bars_table(results: dict[str, Any]) -> str:
    by_concept = bars(results)
    rows = [
        [same[0].name, *(f"{bar.found}: {'holds' if bar.holds else '**fails**'}" for bar in same)]
        for same in zip(*by_concept.values(), strict=True)
    ]
    return _table(["bar, worst of three seeds", *by_concept], rows)


def _curve_table(results: dict[str, Any], rule: str, title: str) -> str:
    strengths = (TOWARDS if title == "towards" else AWAY)[rule]
    head = [f"`{rule}`, {title}: share of the concept, % / perplexity", "neutral", *(f"{s:g}" for s in strengths)]
    rows = []
    for concept, group in ON.items():
        prompts = OFF if title == "towards" else group
        for kind, mode in ((True, "residual"), (False, "residual"), (True, "reconstruct")):
            points = mean_curve(results, concept, prompts, rule, conditioned=kind, mode=mode)
            name = f"{concept}, {KINDS[kind]}" + (", reconstruct, one seed" if mode == "reconstruct" else "")
            rows.append([name, *(_cell(*point, with_sd=mode == "residual") for point in points)])
    return _table(head, rows)


def _cell(share: float, sd: float, perplexity: float, *, with_sd: bool) -> str:
    spread = f" ± {100 * sd:.0f}" if with_sd and sd else ""
    return f"{100 * share:.0f}{spread} / {f'{perplexity:.0f}' if perplexity < MOST else f'> {MOST}'}"


def _spread(values: Sequence[float]) -> str:
    mean, sd = mean_and_sd(values)
    return f"{mean:.4f} ± {sd:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    main()
