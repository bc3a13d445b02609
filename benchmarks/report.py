"""Runs cases and writes rows: one JSON line per case at once, and the table for people."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import REGISTRY, Case, Fact, Options, UnequalResultsError, compare, floor_seconds
from benchmarks.machine import measure_limits, processor, revision, versions
from benchmarks.memory import measure_apart, peaks

HEADER = (
    f"{'case':<30}{'size':<26}{'ours':>10}  {'peer':<34}{'time':>10}  {'ours/peer [range]':<24}{'x floor':>8}  peak MiB"
)


class Recorder:
    """Appends one JSON object per line, flushed at once: a run that is cut off keeps what it has."""

    def __init__(self, path: str | Path | None) -> None:
        self._file = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def describe_run(options: Options) -> dict[str, Any]:
    """What every line of this run carries: machine, versions, revision and the speed limits measured now."""
    return {
        "device": options.device,
        "processor": processor(options.device),
        "threads": torch.get_num_threads(),
        "quick": options.quick,
        "versions": versions(),
        "revision": revision(),
        "limits": measure_limits(options.device, options.quick),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_case(name: str, options: Options, run: Mapping[str, Any], *, memory: bool = True) -> list[dict[str, Any]]:
    """Lines of one case. An exception becomes a line of kind "error", unequal results one of kind "red"."""
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    try:
        built = REGISTRY[name].build(options)
        if not isinstance(built, Case):
            return [_fact_line(fact, run) for fact in built]
        return [_case_line(built, options, run, memory)]
    except UnequalResultsError as error:
        return [{"kind": "red", "case": name, "message": str(error), **run}]
    except Exception as error:  # noqa: BLE001  one broken case must not cost the others their rows
        message = f"{type(error).__name__}: {error}"
        return [{"kind": "error", "case": name, "message": message, "traceback": traceback.format_exc(), **run}]


def _case_line(case: Case, options: Options, run: Mapping[str, Any], memory: bool) -> dict[str, Any]:
    result = compare(case, options)
    floor = floor_seconds(case, run["limits"])
    apart = _memory(case, options) if memory and case.memory and not options.quick else {}
    return {
        "kind": "case",
        "case": case.name,
        "size": dict(case.size),
        "dtype": case.dtype,
        "clock": case.clock,
        "note": case.note,
        "floor": floor,
        "x_floor": result["median"]["ours"] / floor if floor else None,
        "others": list(case.others),
        "apart": apart,
        **result,
        **run,
    }


def _memory(case: Case, options: Options) -> dict[str, Any]:
    if options.device == "cuda":  # its allocator counts exactly, so no new process is needed
        return {name: peaks(case, call, options.device) for name, call in case.contenders().items()}
    return dict(measure_apart(case.name, options))


def _fact_line(fact: Fact, run: Mapping[str, Any]) -> dict[str, Any]:
    line = {"kind": "fact", "case": fact.name, "size": dict(fact.size), "value": fact.value, "unit": fact.unit}
    return {**line, "note": fact.note, **run}


def print_line(line: Mapping[str, Any], show: Callable[[str], Any] = print) -> None:
    """Print the table rows of one JSON line: one per contender, or the reason why there is none."""
    name, size = line["case"], " ".join(f"{k}={short(v)}" for k, v in line.get("size", {}).items())
    if line["kind"] in ("red", "error", "skipped"):
        show(f"{name:<30}{line['kind'].upper()}: {line['message']}")
    elif line["kind"] == "fact":
        show(f"{name:<30}{size:<26}{short(line['value']):>10} {line['unit']}  {line['note']}")
    else:
        for row in case_rows(line):
            show(
                f"{name:<30}{size:<26}{row['ours']:>10}  {row['peer']:<34}{row['time']:>10}  "
                f"{row['ratio']:<24}{row['floor']:>8}  {row['peak']}"
            )


def case_rows(line: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table cells of a "case" line as text, one dictionary per contender."""
    ours = duration(line["median"]["ours"])
    floor = f"{line['x_floor']:.3g}" if line["x_floor"] else "-"
    rows = []
    for name, (middle, low, high) in line["ratios"].items():
        rows.append(
            {
                "ours": ours,
                "peer": ("~ " if name in line["others"] else "") + name,
                "time": duration(line["median"][name]),
                "ratio": f"{middle:.3g} [{low:.3g}, {high:.3g}]",
                "floor": floor,
                "peak": f"{_peak(line, 'ours')} / {_peak(line, name)}" if line["apart"] else "",
            }
        )
    blank = {"ours": ours, "time": "", "ratio": "", "floor": floor, "peak": ""}
    rows += [{**blank, "peer": f"{name}: peer not installed"} for name in line["missing"]]
    if not rows:
        rows = [{**blank, "peer": "", "peak": _peak(line, "ours") if line["apart"] else ""}]
    return rows


def short(value: Any) -> str:
    """200000 -> 200k, 0.01234 -> 0.0123, text unchanged."""
    if isinstance(value, int) and not isinstance(value, bool):
        for unit, letter in ((10**6, "M"), (10**3, "k")):
            if value >= 10 * unit or (value >= unit and value % unit == 0):
                return f"{value / unit:.4g}{letter}"
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(value: float) -> str:
    """Seconds as text with a unit that keeps three digits readable."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _peak(line: Mapping[str, Any], contender: str) -> str:
    apart = line["apart"].get(contender, {})
    return f"{apart['peak_mib']:.0f}" if "peak_mib" in apart else "?"
