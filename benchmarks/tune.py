"""Tries launch settings of the Triton kernels on a GPU and prints the winners as rows of their tables of settings.

`python -m benchmarks.tune [--only OP] [--out FILE]`. The tables in `shared_kernels/<op>/kernel.py` are literals, so
that no user waits for tuning; this regenerates them for a new kind of device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases.atman.attention import dense_inputs, suffix_inputs
from benchmarks.cases.scar.coder import selection
from benchmarks.cases.scar.inputs import steer_inputs
from benchmarks.cases.tfree.inputs import dictionary_inputs, random_tensor, text_inputs
from benchmarks.clocks import Call, seconds
from benchmarks.harness import Options
from benchmarks.machine import processor, versions
from benchmarks.report import duration
from shared_kernels import (
    atman_attention,
    atman_suffix_attention,
    csr_gather_sum,
    decode_scores,
    fused_linear_bce,
    hash_embedding_bag,
    sae_encode_topk,
    scar_steer,
    topk_select,
    topk_sparse_decode,
)

MOST_COLUMNS = 4096  # what an open-ended row of a table is tuned at
MOST_WARPS, MOST_STAGES = 8, 4
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 4096
OPTIONS = Options(device="cuda")


def _gather(columns: int) -> Call:
    _, flat = text_inputs(8192, 8000, 8, OPTIONS)
    indptr = torch.cat([flat.offsets, flat.offsets.new_tensor([flat.rows.numel()])]).int()
    table = random_tensor(8000, min(columns, MOST_COLUMNS), dtype="bfloat16", device="cuda")
    return lambda: csr_gather_sum(indptr, flat.rows.int(), table)


def _embed(columns: int) -> Call:
    words, _ = text_inputs(8192, 8000, 8, OPTIONS)
    table = random_tensor(8000, min(columns, MOST_COLUMNS), dtype="bfloat16", device="cuda")
    return lambda: hash_embedding_bag(words.word_ptr, words.word_units, words.unit_rows, table)


def _loss(columns: int) -> Call:
    V = min(columns, 8000)
    words, _ = text_inputs(8192, V, 8, OPTIONS)
    pointer, rows = words.active_rows()
    x = random_tensor(8192, 1024, dtype="bfloat16", device="cuda").requires_grad_()
    head = random_tensor(V, 1024, dtype="bfloat16", device="cuda", scale=0.03).requires_grad_()
    return lambda: fused_linear_bce(x, head, pointer, rows, pos_weight=300.0, row_weight=None, scale=1.0)


def _scores(batch: int) -> Call:
    dictionary, _ = dictionary_inputs(200_000, 8000, 10, "cuda")
    z = random_tensor(min(batch, 8), 8000, dtype="float32", device="cuda")
    return lambda: decode_scores(z, *dictionary.tensors(), mode="contrast")


def _suffixes(itemsize: int, columns: int) -> Call:
    tensors, layout = suffix_inputs(OPTIONS, _dtype(itemsize), columns)
    return lambda: atman_suffix_attention(*tensors, **layout)


def _dense(itemsize: int, columns: int) -> Call:
    tensors = dense_inputs(OPTIONS, _dtype(itemsize), columns)
    return lambda: atman_attention(*tensors, is_causal=True)


def _steering(columns: int) -> Call:
    x, encoder, bias, decoder, strength = steer_inputs(OPTIONS, "bfloat16", min(columns, MOST_COLUMNS))
    total = encoder.sum(1)
    return lambda: scar_steer(x, encoder, total, bias, decoder, strength, rule="add_gated")


def _select(columns: int) -> Call:
    n = min(columns, 24576)
    pre = random_tensor(2048, n, dtype="float32", device="cuda")
    return lambda: topk_select(pre, n // 12)


def _standardize(columns: int) -> Call:
    """One latent, so that the rows are what takes time."""
    d = min(columns, MOST_COLUMNS)
    x = random_tensor(8192, d, dtype="bfloat16", device="cuda")
    weights = [random_tensor(*shape, dtype="bfloat16", device="cuda") for shape in ((1, d), (1,), (d,))]
    return lambda: sae_encode_topk(x, *weights, 1)


def _sparse_decode(columns: int) -> Call:
    n, k = 24576, 64
    rows = random_tensor(n, min(columns, MOST_COLUMNS), dtype="bfloat16", device="cuda")
    values = random_tensor(2048, k, dtype="float32", device="cuda")
    indices = selection(2048, n, k, "cuda")
    return lambda: topk_sparse_decode(indices, values, rows)


def _dtype(itemsize: int) -> str:
    return "bfloat16" if itemsize == 2 else "float32"


class Workload(NamedTuple):
    """What one table of a kernel is tuned on."""

    make: Callable[..., Call]
    """From the limits of a row to a call that uses it."""
    op: str
    table: str = "CONFIGS"
    limits: int = 1
    """Fields, the first ones, that say for what a row is."""


WORKLOADS = {
    "csr_gather_sum": Workload(_gather, "csr_gather_sum"),
    "hash_embedding_bag": Workload(_embed, "hash_embedding_bag"),
    "fused_linear_bce": Workload(_loss, "fused_linear_bce"),
    "decode_scores": Workload(_scores, "decode_scores"),
    "atman_suffix_attention": Workload(_suffixes, "atman_attention", "SUFFIX_CONFIGS", limits=2),
    "atman_attention": Workload(_dense, "atman_attention", "DENSE_CONFIGS", limits=2),
    "scar_steer": Workload(_steering, "scar_steer"),
    "topk_select": Workload(_select, "sparse_coder", "SELECT_CONFIGS"),
    "sae_encode_topk": Workload(_standardize, "sparse_coder", "STANDARDIZE_CONFIGS"),
    "topk_sparse_decode": Workload(_sparse_decode, "sparse_coder", "TILES"),
}


def candidates(config: Any, limits: int = 1) -> Iterator[Any]:
    """The row as it is, and with one block size, the warps or the stages halved or doubled; its limits stay."""
    yield config
    ranges = {"num_warps": (1, MOST_WARPS), "STAGES": (1, MOST_STAGES)}
    for name in config._fields[limits:]:
        smallest, largest = ranges.get(name, (SMALLEST_BLOCK, LARGEST_BLOCK))
        for value in (getattr(config, name) // 2, getattr(config, name) * 2):
            if smallest <= value <= largest:
                yield config._replace(**{name: value})


def tune_row(kernel: Any, workload: Workload, index: int) -> list[tuple[float, Any]]:
    """Seconds of every candidate for row `index` of the kernel's table, fastest first; one that fails is left out."""
    table = getattr(kernel, workload.table)
    call = workload.make(*table[index][: workload.limits])
    timed = []
    try:
        for config in candidates(table[index], workload.limits):
            setattr(kernel, workload.table, (*table[:index], config, *table[index + 1 :]))
            try:
                call()  # compiles
                timed.append((seconds(call, setup=None, clock="device", device="cuda", at_least=0.05), config))
            except Exception as error:  # noqa: BLE001  too much shared memory, for example
                print(f"  {config}: {type(error).__name__}: {str(error)[:80]}")
    finally:
        setattr(kernel, workload.table, table)
    return sorted(timed, key=lambda pair: pair[0])


def main(arguments: list[str] | None = None) -> int:
    """Tune the chosen operators and print rows to paste; says so and ends where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description="Launch settings of the kernels.")
    parser.add_argument("--only", action="append", choices=sorted(WORKLOADS), metavar="OP")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all timings as JSON")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: nothing was tuned")
        return 0
    found: dict[str, Any] = {"processor": processor("cuda"), "versions": versions(), "rows": []}
    for name in chosen.only or WORKLOADS:
        workload = WORKLOADS[name]
        kernel = import_module(f"shared_kernels.{workload.op}.kernel")
        print(f"shared_kernels/{workload.op}/kernel.py, {workload.table}")
        for index, row in enumerate(getattr(kernel, workload.table)):
            timed = tune_row(kernel, workload, index)
            if not timed:
                continue
            old = [duration(time) for time, config in timed if config == row]
            print(f"    {timed[0][1]},  # {duration(timed[0][0])}, was {old}", flush=True)
            timings = [{"seconds": time, **config._asdict()} for time, config in timed]
            found["rows"].append({"op": name, "row": index, "timings": timings})
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
