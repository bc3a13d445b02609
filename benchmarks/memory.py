"""Peak memory and first call of each contender, in a process of its own.

Allocators keep freed pages, so growth inside a used process reads as 0; here a new process builds the inputs and forks
once per contender. `VmHWM` is read after writing 5 to /proc/self/clear_refs, because `ru_maxrss` survives `exec` and
starts at the parent's peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import ROOT
from benchmarks.harness import REGISTRY, Case, Options

MIB = 2**20
_MARK = "measured "  # other lines on stdout come from the libraries
MODULES = ("benchmarks.cases", "benchmarks.scaling")


def measure_apart(
    name: str, options: Options, *, modules: Sequence[str] = MODULES, timeout: float = 1800.0
) -> dict[str, dict[str, float | str]]:
    """Build case `name`, which one of `modules` registers, in a new process and call every contender in a fork of it.

    Returns:
        By contender `peak_mib`, `held_mib` and `first_call_ms` of the first call and `second_peak_mib` of the one after
        it (what is left when tables and caches exist), or `error`, for example where the memory did not suffice. A case
        that cannot be built gives the error under "ours".
    """
    command = [sys.executable, "-m", "benchmarks.memory", name, "--device", options.device]
    command += ["--quick"] if options.quick else []
    command += [argument for path in options.texts for argument in ("--text", path)]
    command += [argument for module in modules for argument in ("--module", module)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"ours": {"error": f"no result within {timeout:.0f} s"}}
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return {"ours": {"error": f"exit status {done.returncode}: {last[0]}"[:300]}}
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            found.update(json.loads(line.removeprefix(_MARK)))
    return found


def peaks(case: Case, call: Callable[[], Any], device: str) -> dict[str, float]:
    """Growth in MiB over what was held before: a call's peak, what stays with its result, and a second call's peak."""
    _warm_libraries(device)
    if case.setup is not None:
        case.setup()
    before = _start_peak(device)
    start = time.process_time()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    first_call = time.process_time() - start
    first = _peak(device) - before
    held = torch.cuda.memory_allocated() if device == "cuda" else resident_bytes()
    held -= before
    del result
    if case.setup is not None:
        case.setup()
    again = _start_peak(device)
    call()
    return {
        "peak_mib": first / MIB,
        "held_mib": held / MIB,
        "second_peak_mib": (_peak(device) - again) / MIB,
        "first_call_ms": first_call * 1e3,
    }


def _start_peak(device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # pages the allocator keeps would hide the growth
    with open("/proc/self/clear_refs", "w", encoding="ascii") as switch:
        switch.write("5")
    return _status_bytes("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Resident set of this process after freed pages went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; peak memory needs a Linux kernel.")


def _warm_libraries(device: str) -> None:
    """Pay for code that torch generates on first use, so that it is not charged to the first contender."""
    x = torch.randn(8, 16, device=device, requires_grad=True)
    F.softplus(x @ x.T).sum().backward()
    F.embedding_bag(torch.tensor([[0, 1]], device=device), x.detach(), mode="sum")


def _print_forked(name: str, case: Case, call: Callable[[], Any], device: str) -> None:
    """Measure one contender in a fork, so that none sees the pages that another one freed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            print(_MARK + json.dumps({name: peaks(case, call, device)}), flush=True)
            status = 0
        finally:
            os._exit(status)  # without the parent's exit handlers
    _, status = os.waitpid(child, 0)
    if status != 0:
        print(_MARK + json.dumps({name: {"error": f"wait status {status}"}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("case")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--module", action="append", default=[])
    arguments = parser.parse_args()
    for module in arguments.module:
        importlib.import_module(module)  # fills the registry

    torch.set_num_threads(1)
    options = Options(device=arguments.device, quick=arguments.quick, texts=tuple(arguments.text))
    case = REGISTRY[arguments.case].build(options)
    assert isinstance(case, Case), "facts have no contenders"
    for name, call in case.contenders().items():
        _print_forked(name, case, call, arguments.device)


if __name__ == "__main__":
    main()
