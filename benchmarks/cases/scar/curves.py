"""What of SCAR is measured at growing size; `benchmarks.scaling` turns each entry into a curve."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.cases.scar.coder import decoder_rows, reconstruct, selection
from benchmarks.cases.scar.inputs import Shape, coder_of, rows_of
from benchmarks.cases.tfree.inputs import default_dtype, random_tensor
from benchmarks.harness import Call, Options
from shared_kernels import scar_steer, topk_sparse_decode

D = {False: 1024, True: 32}  # hidden size, by quick
N = {False: 64, True: 8}  # rows, where something else grows
LATENTS_PER_DIMENSION = 6
KEPT_SHARE = 12  # n / k


def _shape(n: int, k: int, options: Options) -> Shape:
    return Shape(D[options.quick], n, k)


def _usual(options: Options) -> Shape:
    n = LATENTS_PER_DIMENSION * D[options.quick]
    return _shape(n, n // KEPT_SHARE, options)


def _steer(rows: int, options: Options) -> Call:
    shape = _usual(options)
    concept = coder_of(shape, options.device, "float32").concept()
    x = rows_of(rows, shape.d, options, "float32")
    strength = x.new_full((1, 1), -1.0)
    return lambda: scar_steer(x, *concept, strength, rule="scale")


def _reconstruct(shape: Shape, rows: int, options: Options) -> Call:
    coder, x = coder_of(shape, options.device, "float32"), rows_of(rows, shape.d, options, "float32")
    decoder = decoder_rows(shape, options.device, "float32")
    return lambda: reconstruct(x, coder, decoder)


def _by_rows(rows: int, options: Options) -> Call:
    return _reconstruct(_usual(options), rows, options)


def _by_latents(n: int, options: Options) -> Call:
    return _reconstruct(_shape(n, n // KEPT_SHARE, options), N[options.quick], options)


def _by_kept(k: int, options: Options, rows: int) -> Call:
    """Decoding alone: encoding does not depend on k."""
    shape, dtype = _usual(options), default_dtype(options)
    decoder = decoder_rows(shape, options.device, dtype)
    kept = min(k, shape.n)
    indices = selection(rows, shape.n, kept, options.device)
    values = random_tensor(rows, kept, dtype=dtype, device=options.device, seed=6)
    return lambda: topk_sparse_decode(indices, values, decoder)


CURVES: dict[str, dict[str, Any]] = {
    "scar.steer": {
        "axis": "N",
        "smallest": {"cpu": 64, "cuda": 4096},
        "quick_smallest": 2,
        "expected": 1.0,
        "make": _steer,
    },
    "scar.reconstruct": {
        "axis": "N",
        "smallest": {"cpu": 16, "cuda": 1024},
        "quick_smallest": 2,
        "expected": 1.0,
        "make": _by_rows,
    },
    "scar.reconstruct.latents": {
        "axis": "n",
        "smallest": {"cpu": 1536, "cuda": 6144},
        "quick_smallest": 24,
        "expected": 1.0,
        "make": _by_latents,
    },
    "scar.decode.kept": {  # a few rows: latents are gathered
        "axis": "k",
        "smallest": {"cpu": 16, "cuda": 16},
        "quick_smallest": 2,
        "expected": 1.0,
        "make": partial(_by_kept, rows=4),
    },
}
