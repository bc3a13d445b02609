"""How cost grows with size: five sizes a factor two apart, and the slope of log time on log size of the largest three.

`python -m benchmarks.scaling [--only NAME] [--quick] [--device cpu|cuda] [--json FILE]`
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.cases.atman import curves as atman_curves
from benchmarks.cases.scar import curves as scar_curves
from benchmarks.cases.tfree import curves as tfree_curves
from benchmarks.harness import REGISTRY, Call, Case, Entry, Options, timed
from benchmarks.memory import measure_apart
from benchmarks.report import Recorder, describe_run, duration, short

FITTED = 3  # overhead flattens the small sizes
SIZES = 5


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One program at growing size."""

    name: str

    axis: str
    """What grows, as the table calls it."""

    smallest: Mapping[str, int]
    """The first of the five sizes, by device; a device that is absent says nothing here."""

    quick_smallest: int

    expected: float
    """Slope that the method promises: 1 for linear, 0 for flat."""

    make: Callable[[int, Options], Call]
    """Builds the inputs of one size, outside the clock."""

    is_landmark: bool = False
    """A peer's curve: shown beside ours, held to nothing."""

    def sizes(self, options: Options) -> list[int]:
        smallest = self.quick_smallest if options.quick else self.smallest[options.device]
        return [smallest * 2**i for i in range(SIZES)]


_SETTINGS = tfree_curves.CURVES | atman_curves.CURVES | scar_curves.CURVES
CURVES = {name: Curve(name=name, **settings) for name, settings in _SETTINGS.items()}


def measure_curve(curve: Curve, options: Options, *, memory: bool = True, rounds: int = 5) -> dict[str, Any]:
    """Time every size in turn and fit the slope within each round.

    Returns:
        `sizes`, `samples` in seconds by size, `seconds` (medians), `slope` as `[median, lowest, highest]` over rounds,
        `expected`, and `peak_mib` by size where it was measured.
    """
    sizes = curve.sizes(options)
    cases = [_case(curve, size, options) for size in sizes]
    at_least = 0.002 if options.quick else 0.03
    for case in cases:
        case.ours()
    samples: list[list[float]] = [[] for _ in sizes]
    for turn in range(2 if options.quick else rounds):
        for i in list(range(SIZES))[:: 1 if turn % 2 == 0 else -1]:
            samples[i].append(timed(cases[i].ours, cases[i], options, at_least))
    slopes = [fitted_slope(sizes, [s[turn] for s in samples]) for turn in range(len(samples[0]))]
    del cases
    gc.collect()
    with_memory = memory and not options.quick
    peaks = [measure_apart(_name(curve, size), options).get("ours", {}) for size in sizes] if with_memory else []
    return {
        "kind": "curve",
        "case": curve.name,
        "axis": curve.axis,
        "sizes": sizes,
        "samples": samples,
        "seconds": [median(s) for s in samples],
        "slope": [median(slopes), min(slopes), max(slopes)],
        "expected": curve.expected,
        "peak_mib": [peak.get("peak_mib") for peak in peaks],
    }


def fitted_slope(sizes: list[int], times: list[float]) -> float:
    """Least-squares slope of log time on log size over the three largest sizes."""
    x = [math.log(size) for size in sizes[-FITTED:]]
    y = [math.log(time) for time in times[-FITTED:]]
    center = sum(x) / len(x)
    return sum((a - center) * b for a, b in zip(x, y, strict=True)) / sum((a - center) ** 2 for a in x)


def print_curve(line: Mapping[str, Any]) -> None:
    """One table row: time at every size, slope with its range, peak memory."""
    if line["kind"] != "curve":
        print(f"{line['case']:<28}{line['kind'].upper()}: {line['message']}")
        return
    points = "  ".join(f"{short(n)}: {duration(t)}" for n, t in zip(line["sizes"], line["seconds"], strict=True))
    middle, low, high = line["slope"]
    peaks = "/".join("?" if peak is None else f"{peak:.0f}" for peak in line["peak_mib"])
    slope = f"slope {middle:.2f} [{low:.2f}, {high:.2f}] expected {line['expected']:.1f}"
    print(f"{line['case']:<28}{line['axis']:<8}{slope:<44}{points}{'  MiB ' + peaks if peaks else ''}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure the selected curves; a curve that fails is reported and the run goes on. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="Growth of cost with size.")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--no-memory", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was run")
        return 0
    torch.set_num_threads(1)
    options = Options(device=chosen.device, quick=chosen.quick)
    run, recorder, fine = describe_run(options), Recorder(chosen.json), True
    for name, curve in CURVES.items():
        if (chosen.only and not any(part in name for part in chosen.only)) or chosen.device not in curve.smallest:
            continue
        line = try_curve(curve, options, run, memory=not chosen.no_memory)
        recorder.write(line)
        print_curve(line)
        fine = fine and line["kind"] == "curve"
    recorder.close()
    return 0 if fine else 1


def try_curve(curve: Curve, options: Options, run: Mapping[str, Any], *, memory: bool) -> dict[str, Any]:
    """Line of one curve, or a line of kind "error" when it raised."""
    try:
        return {**measure_curve(curve, options, memory=memory), **run}
    except Exception as error:  # noqa: BLE001  one broken curve must not cost the others their rows
        return {"kind": "error", "case": curve.name, "message": f"{type(error).__name__}: {error}", **run}


def _name(curve: Curve, size: int) -> str:
    return f"scaling.{curve.name}.{size}"


def _case(curve: Curve, size: int, options: Options) -> Case:
    return Case(name=_name(curve, size), ours=curve.make(size, options), peers={})


def _register_sizes() -> None:
    """Let the memory child find every size by name; no device is listed, so the table of ratios leaves them out."""
    for curve in CURVES.values():
        for smallest in {curve.quick_smallest, *curve.smallest.values()}:
            for size in (smallest * 2**i for i in range(SIZES)):
                REGISTRY[_name(curve, size)] = Entry(partial(_case, curve, size), ())


_register_sizes()

if __name__ == "__main__":
    sys.exit(main())
