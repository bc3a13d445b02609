"""Everything worth knowing from a GPU in one call under ten minutes: `python -m benchmarks.gpu --out DIR`.

In this order: speed limits of this run, correctness of every operator at benchmark shapes, the table of ratios with the
most valuable rows first, scaling curves, and a profile of the two rows farthest from their floor. Lines are written as
they come, a failure in one case is recorded and the run goes on, and what no longer fits before the deadline is listed
as skipped. Without a GPU it says so and ends; `--device cpu --quick` walks through the same steps on tiny sizes, in
Triton's interpreter when TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

if os.environ.get("TRITON_INTERPRET") == "1":  # before the kernels are imported
    os.environ.setdefault("SHARED_KERNELS_BACKEND", "triton")

from benchmarks.correctness import CHECKS
from benchmarks.harness import REGISTRY, Case, Options
from benchmarks.report import HEADER, Recorder, describe_run, duration, print_line, run_case
from benchmarks.scaling import CURVES, print_curve, try_curve

TIMED = (  # most valuable first
    "scar.steer.scale.n1",
    "scar.steer.scale.n16",
    "scar.steer.scale.n256",
    "tfree.embed.narrow",
    "tfree.embed.layer",
    "tfree.decode.w1m.b8",
    "tfree.head_loss.v8k",
    "atman.suffix_attention.shift_min",
    "atman.explain.t512",
    "tfree.embed.backward.narrow",
    "tfree.embed.layer.backward",
    "tfree.topk.w200k.b8",
    "tfree.embed.wide",
    "tfree.head_loss.v32k",
    "tfree.decode.w200k.b1",
    "tfree.decode.w200k.b8",
    "atman.explain.t128",
    "tfree.embed.backward.wide",
    "tfree.topk.w200k.b1",
    "tfree.decode.w50k.b1",
    "tfree.decode.w50k.b8",
    "tfree.decode.edges.w50k.b1",
    "tfree.hash",
    "atman.suffix_attention.log_additive",
    "atman.suffix_attention.multiply",
    "atman.peers",
    "scar.steer.add_gated.n1",
    "scar.steer.add_gated.n256",
    "scar.steer.detect.n1",
    "scar.steer.detect.n256",
)
OP_OF_CASE = {
    "tfree.embed": "hash_embedding_bag",
    "tfree.head": "fused_linear_bce",
    "tfree.decode": "decode_scores",
    "tfree.topk": "decode_scores",
    "tfree.hash": "mix32_rows",
    "atman": "atman_suffix_attention",
    "scar.steer": "scar_steer",
}
PHASE_ENDS = {"correctness": 90 / 540, "timing": 330 / 540, "scaling": 480 / 540, "profile": 1.0}  # of the deadline
PROFILED = 2


class Clock:
    """Seconds since the start, and whether a phase may still begin another case."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.start = deadline, time.monotonic()

    def passed(self) -> float:
        return time.monotonic() - self.start

    def may_start(self, phase: str) -> bool:
        return self.passed() < self.deadline * PHASE_ENDS[phase]


def main(arguments: list[str] | None = None) -> int:
    """Run all phases. Returns 1 when an operator was wrong or a case failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="One whole GPU run.")
    parser.add_argument("--deadline", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument("--out", default="out/gpu", metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was run")
        return 0

    clock, folder = Clock(chosen.deadline), Path(chosen.out)
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(folder / "results.jsonl")
    options = Options(device=chosen.device, quick=chosen.quick)
    torch.set_num_threads(1)
    run = _print_machine(options)
    recorder.write({"kind": "machine", "case": "machine", **run})

    wrong = _correctness(clock, options, run, recorder)
    lines = _timing(clock, options, run, recorder, wrong)
    fine = _scaling(clock, options, run, recorder)
    _profiles(clock, options, lines, folder)
    recorder.close()
    failed = [line["case"] for line in lines if line["kind"] in ("red", "error")]
    print(f"\n{clock.passed():.0f} s; wrong operators: {sorted(wrong) or 'none'}; failed cases: {failed or 'none'}")
    return 0 if fine and not wrong and not failed else 1


def _print_machine(options: Options) -> dict[str, Any]:
    run = describe_run(options)
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        run["device_properties"] = str(properties)
        run["cuda"] = torch.version.cuda
        print(f"{properties}\nCUDA {torch.version.cuda}")
    print(f"{run['processor']}; {run['versions']}; revision {run['revision']}")
    print("limits of this run: " + ", ".join(f"{key} {value:.4g}" for key, value in run["limits"].items()), flush=True)
    return run


def _correctness(clock: Clock, options: Options, run: Mapping[str, Any], recorder: Recorder) -> set[str]:
    """Names of the operators that differ from their reference or raise; their cases are not timed."""
    wrong = set()
    _headline(clock, "correctness: largest difference over the allowed one")
    for check in CHECKS:
        line = {"kind": "check", "case": f"{check.op}.{check.dtype}", **run}
        if not clock.may_start("correctness"):
            line |= {"kind": "skipped", "message": "out of time"}
        else:
            start = time.perf_counter()
            try:
                line["margins"] = check.run(options)
                line["wrong"] = [what for what, margin in line["margins"].items() if not margin <= 1.0]
            except Exception as error:  # noqa: BLE001  the other operators still have to be seen
                line |= {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
                line["wrong"] = ["raised"]
            line["wall_seconds"] = time.perf_counter() - start
        recorder.write(line)
        _print_check(line)
        if line.get("wrong"):
            wrong.add(check.op)
        _release(options)
    return wrong


def _print_check(line: Mapping[str, Any]) -> None:
    margins = ", ".join(f"{what} {margin:.2g}" for what, margin in line.get("margins", {}).items())
    verdict = "ok" if "margins" in line else "skipped"
    if line.get("wrong"):
        verdict = "WRONG: " + ", ".join(line["wrong"])
    print(f"{line['case']:<32}{verdict:<10} {margins}{line.get('message', '')}", flush=True)


def _timing(
    clock: Clock, options: Options, run: Mapping[str, Any], recorder: Recorder, wrong: Iterable[str]
) -> list[dict[str, Any]]:
    _headline(clock, "timing")
    print(HEADER)
    lines = []
    for name in (name for name in TIMED if options.device in REGISTRY[name].devices):
        op = next(op for prefix, op in OP_OF_CASE.items() if name.startswith(prefix))
        if op in wrong:
            new: list[dict[str, Any]] = [{"kind": "skipped", "case": name, "message": f"{op} is WRONG: no speed"}]
        elif not clock.may_start("timing"):
            new = [{"kind": "skipped", "case": name, "message": "out of time"}]
        else:
            new = run_case(name, options, run)
        for line in new:
            recorder.write(line)
            print_line(line)
            if "first_call" in line:
                print(f"{'':<30}first call, with compilation: {duration(line['first_call'])}")
        lines += new
        sys.stdout.flush()
        _release(options)
    return lines


def _scaling(clock: Clock, options: Options, run: Mapping[str, Any], recorder: Recorder) -> bool:
    _headline(clock, "scaling")
    fine = True
    for name, curve in CURVES.items():
        if options.device not in curve.smallest:
            continue
        if clock.may_start("scaling"):
            line = try_curve(curve, options, run, memory=False)
        else:
            line = {"kind": "skipped", "case": name, "message": "out of time"}
        recorder.write(line)
        print_curve(line)
        fine = fine and line["kind"] != "error"
        _release(options)
    return fine


def _profiles(clock: Clock, options: Options, lines: list[dict[str, Any]], folder: Path) -> None:
    """Tables of the profiler for the rows that are farthest above their floor."""
    _headline(clock, "profile of the rows farthest from their floor")
    measured = [line for line in lines if line["kind"] == "case" and line["x_floor"]]
    for line in sorted(measured, key=lambda line: -line["x_floor"])[:PROFILED]:
        if not clock.may_start("profile"):
            print(f"{line['case']}: skipped: out of time")
            continue
        try:
            table = _profile(line["case"], options)
        except Exception as error:  # noqa: BLE001  a profile is extra; the run must end well without it
            table = f"{type(error).__name__}: {error}"
        text = f"{line['case']}: {line['x_floor']:.1f} x floor\n{table}\n"
        (folder / f"profile-{line['case']}.txt").write_text(text, encoding="utf-8")
        print(text, flush=True)


def _profile(name: str, options: Options, calls: int = 5) -> str:
    case = REGISTRY[name].build(options)
    assert isinstance(case, Case), "only timed rows are profiled"
    case.ours()
    on_gpu = options.device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as recorded:
        for _ in range(calls):
            case.ours()
        if on_gpu:
            torch.cuda.synchronize()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return str(recorded.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


def _headline(clock: Clock, text: str) -> None:
    print(f"\n[{clock.passed():.0f} s] {text}", flush=True)


def _release(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
