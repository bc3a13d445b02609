"""JSON lines of a benchmark run -> Markdown tables: `python tools/bench_report.py FILE [FILE ...] > table.md`.

Where a case was run more than once, its last line counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import case_rows, duration, short

Line = Mapping[str, Any]
CASE_COLUMNS = ("case", "size", "ours", "peer", "time", "ours / peer [range]", "x floor", "peak MiB, ours / peer")


def read_lines(paths: Iterable[Path]) -> dict[tuple[str, str], list[Line]]:
    """Lines by (device, case); a later run of a case replaces an earlier one.

    Raises:
        ValueError: a line is not a JSON object with "kind" and "case"; the message names file and line.
    """
    found: dict[tuple[str, str], list[Line]] = {}
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                key = line.get("device", ""), line["case"]
                same_run = line["kind"] == "fact" and found.get(key, [{}])[0].get("started") == line.get("started")
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: must be a line that benchmarks wrote ({error}).") from error
            found[key] = [*found[key], line] if same_run else [line]
    return found


def markdown(lines: Iterable[Line]) -> str:
    """The tables of one run: machine, cases, single numbers, curves, and what failed."""
    lines = list(lines)
    parts = [_machine(lines)] if lines else []
    cases = [line for line in lines if line["kind"] == "case"]
    if cases:
        parts.append(_table(CASE_COLUMNS, (row for line in cases for row in _case_cells(line))))
    facts = [line for line in lines if line["kind"] == "fact"]
    if facts:
        cells = ([line["case"], _size(line), f"{short(line['value'])} {line['unit']}", line["note"]] for line in facts)
        parts.append(_table(("number", "size", "value", "of"), cells))
    curves = [line for line in lines if line["kind"] == "curve"]
    if curves:
        parts.append(_table(("curve", "axis", "slope [range]", "expected", "time by size"), map(_curve_cells, curves)))
    failed = [line for line in lines if line["kind"] in ("red", "error", "skipped")]
    parts += [f"- **{line['case']}** {line['kind']}: {line['message']}" for line in failed]
    return "\n\n".join(parts) + "\n"


def _machine(lines: list[Line]) -> str:
    run = next((line for line in lines if "processor" in line), {})
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    limits = run.get("limits", {})
    measured = f"{limits.get('flops', 0) / 1e9:.0f} GFLOP/s, {limits.get('bandwidth', 0) / 1e9:.1f} GB/s"
    machine = f"{run.get('processor', '?')}, {run.get('threads', '?')} thread(s), revision {run.get('revision', '?')}"
    return f"{machine}. Limits measured in this run: {measured}. Versions: {versions}."


def _case_cells(line: Line) -> Iterable[list[str]]:
    for row in case_rows(line):
        yield [
            line["case"],
            _size(line),
            row["ours"],
            row["peer"],
            row["time"],
            row["ratio"],
            row["floor"],
            row["peak"],
        ]


def _curve_cells(line: Line) -> list[str]:
    middle, low, high = line["slope"]
    points = ", ".join(f"{short(n)}: {duration(t)}" for n, t in zip(line["sizes"], line["seconds"], strict=True))
    return [line["case"], line["axis"], f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{line['expected']:.1f}", points]


def _size(line: Line) -> str:
    return " ".join(f"{key}={short(value)}" for key, value in line["size"].items())


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    table = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables of every device found in the files."""
    parser = argparse.ArgumentParser(description="JSON lines of a benchmark run -> Markdown tables.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    found = read_lines(parser.parse_args(arguments).files)
    for device in sorted({device for device, _ in found}):
        print(markdown(line for (where, _), lines in found.items() if where == device for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
