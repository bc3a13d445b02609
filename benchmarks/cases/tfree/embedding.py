"""Word embedding: the sum of a word's table rows, forward and with the gradient of the table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases.tfree.inputs import default_dtype, random_tensor, text_inputs
from benchmarks.harness import Case, Options, register
from benchmarks.peers import bag_embedding, multi_hot, original_embedding
from shared_kernels import hash_embedding_bag

SIZES = {
    "cpu": {"narrow": (4096, 512, 8000, 10), "wide": (1024, 3072, 8000, 10)},
    "cuda": {"narrow": (8192, 4096, 8000, 8), "wide": (8192, 4096, 32000, 8)},
}
QUICK = (64, 16, 80, 8)
RTOL = {"float32": 1e-5, "bfloat16": 2e-2}


def _register(kind: str, backward: bool) -> None:
    name = f"tfree.embed{'.backward' if backward else ''}.{kind}"

    @register(name)
    def build(options: Options) -> Case:
        N, D, V, m = QUICK if options.quick else SIZES[options.device][kind]
        dtype = default_dtype(options)
        words, flat = text_inputs(N, V, m, options)
        table = random_tensor(V, D, dtype=dtype, device=options.device).requires_grad_(backward)
        gradient = random_tensor(N, D, dtype=dtype, device=options.device, seed=1)
        dense = multi_hot(flat, table.dtype)

        def once(embed: Callable[[], Tensor]) -> Callable[[], Tensor]:
            return (lambda: torch.autograd.grad(embed(), table, gradient)[0]) if backward else embed

        touched = torch.unique(flat.rows).numel()
        item = table.element_size()
        return Case(
            name=name,
            ours=once(lambda: hash_embedding_bag(words.word_ptr, words.word_units, words.unit_rows, table)),
            peers={
                "torch embedding_bag": once(lambda: bag_embedding(flat, table)),
                "original gather+sum+index_add": once(lambda: original_embedding(flat, table)),
                "dense multi-hot product": once(lambda: dense @ table),
            },
            rtol=RTOL[dtype],
            bytes=(touched * D + N * D + (V * D if backward else 0)) * item,
            size={"N": N, "D": D, "V": V, "ids": flat.rows.numel()},
            dtype=dtype,
            note=f"{words.word_units.unique().numel()} distinct trigrams in {words.word_units.numel()}; "
            "the dense matrix is made outside the clock",
        )


for _kind in ("narrow", "wide"):
    for _backward in (False, True):
        _register(_kind, _backward)
