"""Cases whose cost is known, for the tests of the harness; a memory child imports them by name."""

import torch

from benchmarks.harness import Case, Options, register

LARGE = 64 * 2**20  # bytes


@register("sample.allocation", devices=())
def allocation(options: Options) -> Case:
    def large() -> float:
        return float(torch.ones(LARGE // 4).sum()) / LARGE

    def small() -> float:
        return float(torch.ones(8).sum()) / 32

    return Case(name="sample.allocation", ours=small, peers={"large": large, "absent": None}, rtol=1e-6)
