"""One case in, one honest row out: equal results first, contenders turn by turn, ratios within a round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.clocks import Call, seconds


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one run is about."""

    device: str = "cpu"
    """`"cpu"` or `"cuda"`."""

    quick: bool = False
    """Tiny sizes and few rounds: shows that everything works, says nothing about speed."""

    texts: tuple[str, ...] = ()
    """Text files to read prose from, instead of what the corpus finds on this machine."""

    rounds: int = 9
    """Most rounds per case. Slow cases take fewer, never fewer than five (three when quick)."""


@dataclass(kw_only=True)
class Case:
    """Programs that do the same work on the same inputs."""

    name: str
    """Dotted name; `--only` selects by substring."""

    ours: Call
    """Returns a tensor, a string, a number, or a sequence of them."""

    peers: Mapping[str, Call | None]
    """Programs whose result must equal ours. None: the peer is not installed."""

    rtol: float = 1e-5
    """Allowed difference, relative to the largest entry of our result."""

    flops: float = 0.0
    """Floating-point operations that cannot be avoided."""

    bytes: float = 0.0
    """Bytes that cannot avoid being moved."""

    size: Mapping[str, Any] = field(default_factory=dict)
    """Sizes for the table, by letter."""

    setup: Call | None = None
    """Runs before every timed call, outside the clock."""

    others: Mapping[str, Call | None] = field(default_factory=dict)
    """Programs timed beside ours that compute something else; their names say what. Shown with "~"."""

    views: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """By contender: what of its result is compared, where only a part is common to all."""

    clock: str = "device"
    """`"device"`, `"wall"` or `"self"`: see `benchmarks.clocks`."""

    limit: str = "bandwidth"
    """Which measured limit the byte floor uses: `"bandwidth"` or, when the data stays in L2, `"cache_bandwidth"`."""

    dtype: str = "float32"
    memory: bool = True
    """Measure peaks, each contender in a process of its own."""

    note: str = ""

    def contenders(self) -> dict[str, Call]:
        """Everything that is timed, by name; what is not installed is left out."""
        return {"ours": self.ours} | {n: f for n, f in (*self.peers.items(), *self.others.items()) if f is not None}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A single number that has no contender, such as the size of a table."""

    name: str
    value: float
    unit: str
    size: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


Builder = Callable[[Options], Case | list[Fact]]


@dataclass(frozen=True)
class Entry:
    """A registered case: how to build it, and on which devices it says something."""

    build: Builder
    devices: tuple[str, ...]


REGISTRY: dict[str, Entry] = {}


class UnequalResultsError(AssertionError):
    """A contender's result differs from ours, so no speed is reported for the case."""


def register(name: str, devices: tuple[str, ...] = ("cpu", "cuda")) -> Callable[[Builder], Builder]:
    """Add a builder of a case to the table, under the name of the case."""

    def add(builder: Builder) -> Builder:
        if name in REGISTRY:
            raise ValueError(f"name must be new, but a case called {name!r} is registered already.")
        REGISTRY[name] = Entry(builder, devices)
        return builder

    return add


def compare(case: Case, options: Options) -> dict[str, Any]:
    """Check that all peers agree with ours, then time everything in turn.

    Returns:
        `first_call` of ours in wall seconds, with whatever is compiled or loaded on first use; `margin` per peer
        (largest difference over the allowed one); `samples` in seconds and their `median` per contender; `ratios`
        ours / contender as `[median, second lowest, second highest]`; `missing`: contenders that are not installed.

    Raises:
        UnequalResultsError: some peer's result differs from ours; the message names it.
    """
    start = time.perf_counter()
    _fresh(case, case.ours)
    first_call = time.perf_counter() - start
    margin = check_equal(case)
    contenders = case.contenders()
    at_least = 0.0 if options.quick else 0.03
    once = {name: timed(call, case, options, 0.0) for name, call in contenders.items()}
    rounds = _rounds(sum(max(t, at_least) for t in once.values()), options)

    gc.collect()  # what building the inputs left behind must not be collected inside a sample
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(timed(contenders[name], case, options, at_least))
    return {
        "first_call": first_call,
        "margin": margin,
        "samples": samples,
        "median": {name: median(values) for name, values in samples.items()},
        "ratios": {name: ratio(samples["ours"], values) for name, values in samples.items() if name != "ours"},
        "missing": [n for n, f in (*case.peers.items(), *case.others.items()) if f is None],
    }


def check_equal(case: Case) -> dict[str, float]:
    """Largest difference of every peer from ours, over the allowed difference; above 1 raises `UnequalResultsError`."""
    want = _seen(case, "ours", _fresh(case, case.ours))
    margins = {}
    for name, call in case.peers.items():
        if call is None or case.clock == "self":
            continue
        margins[name] = _difference(want, _seen(case, name, _fresh(case, call)), case.rtol)
        if not margins[name] <= 1.0:  # also catches NaN
            raise UnequalResultsError(f"{case.name}: {name} differs from ours by {margins[name]:.3g} x the tolerance.")
    return margins


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """`[median, second lowest, second highest]` of ours / theirs, formed per round (extremes below five rounds)."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    inset = 1 if len(ratios) >= 5 else 0
    return [median(ratios), ratios[inset], ratios[-1 - inset]]


def timed(call: Call, case: Case, options: Options, at_least: float) -> float:
    """Seconds of one call by the case's clock, with the case's setup outside of it."""
    return seconds(call, setup=case.setup, clock=case.clock, device=options.device, at_least=at_least)


def floor_seconds(case: Case, limits: Mapping[str, float]) -> float:
    """The time that the unavoidable work needs at this run's measured speed limits; 0 when the case states none."""
    bandwidth = limits.get(case.limit, limits["bandwidth"])
    return max(case.flops / limits["flops"], case.bytes / bandwidth)


def _rounds(one_round: float, options: Options) -> int:
    fewest, budget = (3, 0.5) if options.quick else (5, 20.0)
    return max(fewest, min(options.rounds, int(budget / max(one_round, 1e-9))))


def _fresh(case: Case, call: Call) -> Any:
    if case.setup is not None:
        case.setup()
    return call()


def _seen(case: Case, name: str, result: Any) -> Any:
    return case.views[name](result) if name in case.views else result


def _difference(want: Any, got: Any, rtol: float) -> float:
    """Largest |want - got| over rtol * max|want|, in float64; structures that do not match count as infinite."""
    if isinstance(want, Tensor) or isinstance(got, Tensor):
        want, got = torch.as_tensor(want), torch.as_tensor(got)
        if want.shape != got.shape:
            return float("inf")
        want, got = want.detach().to("cpu", torch.float64), got.detach().to("cpu", torch.float64)
        if want.numel() == 0:
            return 0.0
        scale = rtol * max(float(want.abs().max()), 1e-30)
        return float((want - got).abs().max()) / scale
    if isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
        if len(want) != len(got):
            return float("inf")
        return max((_difference(a, b, rtol) for a, b in zip(want, got, strict=True)), default=0.0)
    if isinstance(want, float) or isinstance(got, float):
        return abs(want - got) / (rtol * max(abs(want), 1e-30))
    return 0.0 if want == got else float("inf")
