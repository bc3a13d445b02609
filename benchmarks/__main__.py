"""`python -m benchmarks [--only NAME] [--quick] [--device cpu|cuda] --json FILE`: the table of ratios."""

from __future__ import annotations

import argparse
import sys

import torch

import benchmarks.cases  # noqa: F401  fills the registry
from benchmarks.harness import REGISTRY, Options
from benchmarks.report import HEADER, Recorder, describe_run, print_line, run_case


def main(arguments: list[str] | None = None) -> int:
    """Run the selected cases. Returns 1 when a contender's result was unequal or a case failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios of speed and memory to peers.")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="cases whose name contains NAME")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: a check, not a measurement")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per case")
    parser.add_argument("--text", action="append", default=[], metavar="FILE", help="prose to use instead of our own")
    parser.add_argument("--no-memory", action="store_true", help="skip the child processes that measure peaks")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    chosen = parser.parse_args(arguments)

    names = [name for name, entry in REGISTRY.items() if chosen.device in entry.devices]
    names = [name for name in names if not chosen.only or any(part in name for part in chosen.only)]
    if not names:
        parser.error(f"--only must match a case, got {chosen.only}; see --list.")
    if chosen.list:
        print("\n".join(names))
        return 0
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing was run")
        return 0
    torch.set_num_threads(1)
    options = Options(device=chosen.device, quick=chosen.quick, texts=tuple(chosen.text))
    return 0 if run_all(names, options, chosen.json, memory=not chosen.no_memory) else 1


def run_all(names: list[str], options: Options, json_path: str | None, *, memory: bool = True) -> bool:
    """Print and record every named case; True when none of them was red or failed."""
    recorder = Recorder(json_path)
    run = describe_run(options)
    limits = ", ".join(f"{key} {value:.3g}" for key, value in run["limits"].items())
    print(f"{run['processor']}, {run['threads']} thread(s), revision {run['revision']}; measured limits: {limits}")
    print(HEADER, flush=True)
    fine = True
    for name in names:
        for line in run_case(name, options, run, memory=memory):
            recorder.write(line)
            print_line(line)
            fine = fine and line["kind"] in ("case", "fact")
        sys.stdout.flush()
    recorder.close()
    return fine


if __name__ == "__main__":
    sys.exit(main())
