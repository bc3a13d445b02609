"""How long one call takes: process time on CPU, events on CUDA, or host time where that is what users feel."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
_FLUSH_BYTES = 2**29  # several times any L2 cache; overwriting it takes longer than the host needs for a few launches
_flush: list[Tensor] = []


def seconds(call: Call, *, setup: Call | None, clock: str, device: str, at_least: float) -> float:
    """Time of one call; short calls are repeated until `at_least` seconds have passed.

    Args:
        call: what is timed.
        setup: runs before every call, outside the clock.
        clock: `"device"` is process time on CPU (others may use the machine) and events on CUDA; `"wall"` is host time
            up to a synchronization; `"self"` takes the seconds that the call returns.
        device: `"cpu"` or `"cuda"`.
        at_least: shortest sample in seconds.
    """
    if clock == "self":
        return float(call())
    if device == "cuda":
        rough = _cuda_wall_seconds(call, setup)
        return rough if clock == "wall" else _event_seconds(call, setup, repeats=int(at_least / max(rough, 1e-6)))
    now = time.perf_counter if clock == "wall" else time.process_time
    total, repeats = 0.0, 0
    while repeats == 0 or total < at_least:
        if setup is not None:
            setup()
        start = now()
        call()
        total += now() - start
        repeats += 1
    return max(total, 1e-9) / repeats


def _event_seconds(call: Call, setup: Call | None, repeats: int) -> float:
    """Median of event-timed calls. Overwriting a large buffer before each empties the L2 cache and hides the launch."""
    if not _flush:
        _flush.append(torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda"))
    pairs = []
    for _ in range(min(50, max(3, repeats))):
        if setup is not None:
            setup()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flush[0].zero_()
        start.record()
        call()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()  # only here: the queue stays full, so the clock sees the device and not the host
    return median(start.elapsed_time(stop) / 1e3 for start, stop in pairs)


def _cuda_wall_seconds(call: Call, setup: Call | None) -> float:
    if setup is not None:
        setup()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start
