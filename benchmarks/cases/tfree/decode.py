"""Decoding: scores of every dictionary word from the head's logits, and the best k of them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases.tfree.inputs import dictionary_inputs, random_tensor
from benchmarks.harness import Call, Case, Options, register
from benchmarks.peers import FlatPatterns, csr_scores, dense_scores, original_scores, score_matrix
from shared_kernels import decode_scores, decode_topk
from tfree_tokenizer import FactoredDictionary

WORDS = {"w50k": 50_000, "w200k": 200_000, "w1m": 1_000_000}
V, M = 8000, 10
QUICK_WORDS, QUICK_V, QUICK_M = 200, 160, 8
DAMPED_EDGES = 0.8  # the models' default is 1, which takes less work
K = 50
DENSE_BYTES = 2 * 2**30  # a dense matrix above this is left out: 200k words would take 6.4 GB


def _inputs(words: str, B: int, options: Options) -> tuple[FactoredDictionary, FlatPatterns, Tensor]:
    v, m = (QUICK_V, QUICK_M) if options.quick else (V, M)
    W = QUICK_WORDS if options.quick else WORDS[words]
    factored, flat = dictionary_inputs(W, v, m, options.device)
    z = random_tensor(B, v, dtype="float32", device=options.device, scale=2.0)
    return factored, flat, z


def _register_scores(words: str, B: int, edge_weight: float = 1.0) -> None:
    name = f"tfree.decode{'' if edge_weight == 1.0 else '.edges'}.{words}.b{B}"

    @register(name, devices=("cuda",) if words == "w1m" else ("cpu", "cuda"))
    def build(options: Options) -> Case:
        factored, flat, z = _inputs(words, B, options)
        matrix = score_matrix(flat, edge_weight, z.dtype)
        narrow = score_matrix(flat, edge_weight, z.dtype, torch.int32)
        W, v = matrix.shape
        peers: dict[str, Call | None] = {
            "flat torch CSR product": lambda: csr_scores(z, matrix, flat),
            "the same, int32 indices": lambda: csr_scores(z, narrow, flat),
            "original gather+index_add": lambda: original_scores(z, flat, edge_weight),
        }
        if W * v * 4 <= DENSE_BYTES:
            dense = matrix.to_dense()
            peers["dense [W, V] product"] = lambda: dense_scores(z, dense, flat)
        return Case(
            name=name,
            ours=lambda: decode_scores(z, *factored.tensors(), mode="contrast", edge_weight=edge_weight),
            peers=peers,
            rtol=1e-4,
            bytes=_compulsory_bytes(factored, z) + 4 * B * W,
            size={"W": W, "B": B, "V": v, "rows": flat.rows.numel()},
            note=f'mode "contrast", edge weight {edge_weight}',
        )


def _register_topk(words: str, B: int) -> None:
    name = f"tfree.topk.{words}.b{B}"

    @register(name)
    def build(options: Options) -> Case:
        factored, flat, z = _inputs(words, B, options)
        matrix = score_matrix(flat, 1.0, z.dtype, torch.int32)
        k = min(K, len(factored))

        def ours() -> list[Tensor]:
            values, _, logsumexp = decode_topk(z, *factored.tensors(), k=k, mode="contrast")
            return [values, logsumexp]

        def scores_then_topk(scores: Tensor) -> list[Tensor]:
            return [scores.topk(k).values, scores.logsumexp(1)]

        return Case(
            name=name,
            ours=ours,
            peers={
                "flat CSR int32, then topk": lambda: scores_then_topk(csr_scores(z, matrix, flat)),
                "our scores, then topk": lambda: scores_then_topk(
                    decode_scores(z, *factored.tensors(), mode="contrast")
                ),
            },
            rtol=1e-4,
            bytes=_compulsory_bytes(factored, z),
            size={"W": len(factored), "B": B, "k": k},
            note="values and logsumexp are compared; words of equal score may come in either order",
        )


def _compulsory_bytes(factored: FactoredDictionary, z: Tensor) -> float:
    """Every dictionary tensor once, the logits once."""
    return float(sum(t.numel() * t.element_size() for t in factored.tensors()) + z.numel() * z.element_size())


for _words, _B in (("w50k", 1), ("w50k", 8), ("w200k", 1), ("w200k", 8), ("w1m", 8)):
    _register_scores(_words, _B)
_register_scores("w50k", 1, DAMPED_EDGES)
for _words, _B in (("w200k", 1), ("w200k", 8)):
    _register_topk(_words, _B)
