"""What the numbers were taken on: versions, git revision, and the two speed limits measured in the same run."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from statistics import median
from typing import Any

import torch

from benchmarks import ROOT

PACKAGES = ("torch", "transformers", "tokenizers", "triton", "numpy", "liger_kernel")


def versions() -> dict[str, str]:
    """Versions of everything that is timed; a package that is absent is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def revision() -> str:
    """The commit of the tree, with "+" when files differ from it, or "unknown" outside a repository."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def measure_limits(device: str, quick: bool = False) -> dict[str, float]:
    """Speed limits of this machine, now: `flops` per second of a matrix product and bytes per second of a copy.

    CPU: float32 1024^3 product and 64 MiB copy, process time. CUDA: bfloat16 8192^3 product, 4 GiB copy, and
    `cache_bandwidth`, a 16 MiB copy repeated inside the L2 cache. A copy counts bytes read and bytes written.
    """
    if device == "cuda":
        return _cuda_limits()
    n, megabytes = (256, 8) if quick else (1024, 64)
    a, b = torch.randn(n, n), torch.randn(n, n)
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    product = _best(lambda: a @ b, time.process_time, 3 if quick else 9)
    copy = _best(lambda: target.copy_(source), time.process_time, 3 if quick else 9)
    return {"flops": 2 * n**3 / product, "bandwidth": 2 * source.numel() * 4 / copy}


def _cuda_limits() -> dict[str, float]:
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    large = torch.empty(2**29, device="cuda")
    small = torch.empty(2**22, device="cuda")
    large_target, small_target = torch.empty_like(large), torch.empty_like(small)
    product = _cuda_seconds(lambda: a @ b, 10)
    copy = _cuda_seconds(lambda: large_target.copy_(large), 10)
    cached = _cuda_seconds(lambda: small_target.copy_(small), 200)
    launch = _cuda_seconds(small_target[:1].zero_, 200)
    return {
        "flops": 2 * n**3 / product,
        "bandwidth": 2 * large.numel() * 4 / copy,
        "cache_bandwidth": 2 * small.numel() * 4 / cached,
        "launch_seconds": launch,
    }


def _cuda_seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / repeats)
    return median(times[1:])


def _best(call: Callable[[], Any], clock: Callable[[], float], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = clock()
        call()
        times.append(clock() - start)
    return max(min(times[1:]), 1e-9)


def _git(*arguments: str) -> str:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
