"""`results.json` -> the tables of `README.md`: `python -m miniatures.captioner.report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from miniatures.outputs import insert

HERE = Path(__file__).parent
COLUMNS = {
    "precision": "mAP",
    "precision_iq": "mAP_IQ",
    "recall": "mAR",
    "recall_iq": "mAR_IQ",
    "average_precision": "ranking AP",
}
"""Measures by the names that the paper's table gives them; `ranking AP` is ours."""
POWER = "squared"
"""The paper's; `results.json` holds absolute scores, too."""
TITLES = {"what": "“what is at the ...?”, the name", "list": "“what do you see?”, one name of the list"}


def tables(results: dict[str, Any]) -> str:
    """Markdown of the comparison by kind of question, and of the choice of kappa."""
    parts = []
    for kind, found in results["kinds"].items():
        methods = {
            name.removesuffix(f", {POWER}"): summary
            for name, summary in found["methods"].items()
            if name.endswith(f", {POWER}")
        }
        head = f"{TITLES[kind]}: {found['explained']} of {results['pictures']} pictures"
        parts.append(_table(head, methods, {**COLUMNS, "seconds": "CPU s"}))
    kappa = results["kappa"]
    by_kappa = {f"{value}": summary for value, summary in kappa["summaries"].items()}
    parts.append(_table(f"kappa, {kappa['pictures']} training pictures", by_kappa, COLUMNS))
    return "\n\n".join(parts)


def main() -> None:
    """Command line."""
    readme = HERE / "README.md"
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    readme.write_text(insert(readme.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")


def _table(head: str, rows: dict[str, dict[str, float]], columns: dict[str, str]) -> str:
    lines = [f"| {head} | {' | '.join(columns.values())} |", "| --- |" + " --- |" * len(columns)]
    for name, summary in rows.items():
        cells = [f"{summary[key]:.2f}" if key == "seconds" else f"{100 * summary[key]:.1f}" for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
