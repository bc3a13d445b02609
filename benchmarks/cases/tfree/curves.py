"""What of T-FREE is measured at growing size; `benchmarks.scaling` turns each entry into a curve."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases.tfree.inputs import default_dtype, dictionary_inputs, random_tensor, text_inputs
from benchmarks.cases.tfree.text import tokenizer_for
from benchmarks.corpus import corpus
from benchmarks.harness import Call, Options
from shared_kernels import decode_scores, fused_linear_bce, hash_embedding_bag

M = 10


def _tokenize(size: int, options: Options) -> Call:
    tokenizer = tokenizer_for("code", options.quick)
    text = corpus("code").measured
    documents = [(text * (size // len(text) + 1))[i : i + 4000] for i in range(0, size, 4000)]
    return lambda: tokenizer(documents)["input_ids"]


def _embed(N: int, options: Options, V: int = 8000) -> Call:
    words, _ = text_inputs(N, V, M, options)
    table = random_tensor(V, _width(options), dtype=default_dtype(options), device=options.device)
    return lambda: hash_embedding_bag(words.word_ptr, words.word_units, words.unit_rows, table)


def _embed_rows(V: int, options: Options) -> Call:
    return _embed(256 if options.quick else 4096, options, V)


def _head(N: int, options: Options) -> Call:
    D, V = _width(options), 8000
    words, _ = text_inputs(N, V, M, options)
    positive_ptr, positive_rows = words.active_rows()
    x = random_tensor(N, D, dtype=default_dtype(options), device=options.device).requires_grad_()
    head = random_tensor(V, D, dtype=default_dtype(options), device=options.device, scale=D**-0.5).requires_grad_()

    def call() -> Any:
        loss = fused_linear_bce(
            x, head, positive_ptr, positive_rows, pos_weight=300.0, row_weight=None, scale=1.0 / (N * V)
        )
        return torch.autograd.grad(loss, (x, head))

    return call


def _decode(W: int, options: Options, V: int = 8000, B: int = 8) -> Call:
    factored, _ = dictionary_inputs(W, V, M, options.device)
    z = random_tensor(B, V, dtype="float32", device=options.device)
    return lambda: decode_scores(z, *factored.tensors(), mode="contrast")


def _decode_rows(V: int, options: Options) -> Call:
    return _decode(1000 if options.quick else 100_000, options, V)


def _decode_batch(B: int, options: Options) -> Call:
    return _decode(1000 if options.quick else 100_000, options, B=B)


def _width(options: Options) -> int:
    return 16 if options.quick else 4096 if options.device == "cuda" else 512


CURVES: dict[str, dict[str, Any]] = {
    "tfree.tokenize": {
        "axis": "bytes",
        "smallest": {"cpu": 250_000},  # text is the CPU's work
        "quick_smallest": 8000,
        "expected": 1.0,
        "make": _tokenize,
    },
    "tfree.embed": {
        "axis": "N",
        "smallest": {"cpu": 1024, "cuda": 2048},
        "quick_smallest": 64,
        "expected": 1.0,
        "make": _embed,
    },
    "tfree.embed.table": {
        "axis": "V",
        "smallest": {"cpu": 4000, "cuda": 4000},
        "quick_smallest": 1000,
        "expected": 0.0,
        "make": _embed_rows,
    },
    "tfree.head": {
        "axis": "N",
        "smallest": {"cpu": 64, "cuda": 1024},
        "quick_smallest": 4,
        "expected": 1.0,
        "make": _head,
    },
    "tfree.decode": {
        "axis": "W",
        "smallest": {"cpu": 25_000, "cuda": 62_500},
        "quick_smallest": 500,
        "expected": 1.0,
        "make": _decode,
    },
    "tfree.decode.table": {
        "axis": "V",
        "smallest": {"cpu": 4000, "cuda": 4000},
        "quick_smallest": 1000,
        "expected": 0.0,
        "make": _decode_rows,
    },
    "tfree.decode.batch": {
        "axis": "B",
        "smallest": {"cpu": 4, "cuda": 4},
        "quick_smallest": 1,
        "expected": 1.0,
        "make": _decode_batch,
    },
}
