"""Every operator at benchmark shapes, forward and gradient, against its `reference.py` on the same device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.atman.attention import MODES, dense_inputs, suffix_inputs
from benchmarks.cases.scar.coder import selection
from benchmarks.cases.scar.inputs import steer_inputs
from benchmarks.cases.tfree.inputs import DTYPES, dictionary_inputs, random_tensor, text_inputs
from benchmarks.harness import Options
from shared_kernels import (
    atman_attention,
    atman_suffix_attention,
    csr_gather_sum,
    decode_scores,
    decode_topk,
    fused_linear_bce,
    hash_embedding_bag,
    mix32_rows,
    sae_encode_topk,
    scar_scores,
    scar_steer,
    topk_select,
    topk_sparse_decode,
)
from shared_kernels.atman_attention.reference import atman_attention_reference
from shared_kernels.csr_gather_sum.reference import csr_gather_sum_reference
from shared_kernels.decode_scores.reference import decode_scores_reference, decode_topk_reference
from shared_kernels.fused_linear_bce.reference import fused_linear_bce_reference
from shared_kernels.hash_embedding_bag.reference import hash_embedding_bag_reference
from shared_kernels.mix32_rows.reference import mix32_rows_reference
from shared_kernels.scar_steer.eager import RULES
from shared_kernels.scar_steer.reference import scar_scores_reference, scar_steer_reference
from shared_kernels.sparse_coder.reference import (
    sae_encode_topk_reference,
    topk_select_reference,
    topk_sparse_decode_reference,
)
from tfree_tokenizer import FactoredDictionary

TOLERANCE = {"float32": 3e-5, "bfloat16": 2e-2}  # of the largest entry; TF32 products (3e-4) do not pass as float32
CHECKED_COLUMNS = 128  # the reference gathers [nnz, columns] in float64, so it sees the first and last columns only
CHECKED_WORDS = 300
CHECKED_ROWS, CHECKED_HEADS = 2, 4  # the last rows and the first heads: the reference takes them one by one

Pairs = Iterator[tuple[str, Tensor, Tensor]]


@dataclass(frozen=True)
class Check:
    """One operator in one dtype: pairs of (what, ours, reference)."""

    op: str
    dtype: str
    pairs: Callable[[str, Options], Pairs]

    def run(self, options: Options) -> dict[str, float]:
        """Largest difference of every output and gradient, over the allowed one; above 1 is wrong."""
        margins = {}
        for what, ours, reference in self.pairs(self.dtype, options):
            margins[what] = _margin(ours, reference, TOLERANCE[self.dtype])
        return margins


def _margin(ours: Tensor, reference: Tensor, tolerance: float) -> float:
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    if ours.shape != reference.shape:
        return float("inf")
    scale = max(float(reference.abs().max()), 1e-30) if reference.numel() else 1.0
    worst = float((ours - reference).abs().max()) / (tolerance * scale) if reference.numel() else 0.0
    return worst if worst == worst else float("inf")


def _sizes(options: Options) -> tuple[int, int, int, int]:
    """N words, width D, table V, m rows per trigram."""
    if options.quick:
        return 12, 24, 80, 4
    return (8192, 4096, 8000, 8) if options.device == "cuda" else (1024, 512, 8000, 8)


def _columns(D: int) -> Tensor:
    half = min(CHECKED_COLUMNS, D) // 2
    return torch.cat([torch.arange(half), torch.arange(D - half, D)])


def _check_gather(dtype: str, options: Options) -> Pairs:
    N, D, V, m = _sizes(options)
    _, flat = text_inputs(N, V, m, options)
    indptr = torch.cat([flat.offsets, flat.offsets.new_tensor([flat.rows.numel()])]).int()
    columns = _columns(D).to(options.device)
    table = random_tensor(V, D, dtype=dtype, device=options.device).requires_grad_()
    weights = random_tensor(flat.rows.numel(), dtype=dtype, device=options.device, seed=1).requires_grad_()
    gradient = random_tensor(N, D, dtype=dtype, device=options.device, seed=2)
    gradient[:, CHECKED_COLUMNS // 2 : D - CHECKED_COLUMNS // 2] = 0  # the gradient of `weights` sums over columns
    out = csr_gather_sum(indptr, flat.rows.int(), table, weights)
    got = torch.autograd.grad(out, (table, weights), gradient)
    small = table.detach()[:, columns].double().requires_grad_()
    factors = weights.detach().double().requires_grad_()
    want = csr_gather_sum_reference(indptr, flat.rows, small, factors)
    want_table, want_weights = torch.autograd.grad(want, (small, factors), gradient[:, columns].double())
    yield "output", out[:, columns], want
    yield "gradient of table", got[0][:, columns], want_table
    yield "gradient of weights", got[1], want_weights


def _check_embedding(dtype: str, options: Options) -> Pairs:
    N, D, V, m = _sizes(options)
    words, _ = text_inputs(N, V, m, options)
    columns = _columns(D).to(options.device)
    table = random_tensor(V, D, dtype=dtype, device=options.device).requires_grad_()
    gradient = random_tensor(N, D, dtype=dtype, device=options.device, seed=2)
    out = hash_embedding_bag(words.word_ptr, words.word_units, words.unit_rows, table)
    (got,) = torch.autograd.grad(out, table, gradient)
    small = table.detach()[:, columns].double().requires_grad_()
    want = hash_embedding_bag_reference(words.word_ptr, words.word_units, words.unit_rows, small)
    (want_table,) = torch.autograd.grad(want, small, gradient[:, columns].double())
    yield "output", out[:, columns], want
    yield "gradient of table", got[:, columns], want_table


def _check_loss(dtype: str, options: Options) -> Pairs:
    N, D, V, m = _sizes(options)
    words, _ = text_inputs(N, V, m, options)
    positive_ptr, positive_rows = words.active_rows()
    x = random_tensor(N, D, dtype=dtype, device=options.device).requires_grad_()
    head = random_tensor(V, D, dtype=dtype, device=options.device, scale=D**-0.5, seed=1).requires_grad_()
    row_weight = torch.linspace(0, 2, N, device=options.device)
    settings: dict[str, Any] = {"pos_weight": 300.0, "row_weight": row_weight, "scale": 100.0 / (N * V)}
    loss = fused_linear_bce(x, head, positive_ptr, positive_rows, **settings)
    got = torch.autograd.grad(loss, (x, head))
    x64, head64 = (t.detach().double().requires_grad_() for t in (x, head))
    want = fused_linear_bce_reference(x64, head64, positive_ptr, positive_rows, **settings)
    want_x, want_head = torch.autograd.grad(want, (x64, head64))
    yield "loss", loss, want
    yield "gradient of x", got[0], want_x
    yield "gradient of weight", got[1], want_head


def _check_scores(dtype: str, options: Options) -> Pairs:
    _, _, V, m = _sizes(options)
    dictionary, _ = dictionary_inputs(200 if options.quick else 200_000, V, m, options.device)
    z = random_tensor(8 if not options.quick else 2, V, dtype=dtype, device=options.device, scale=2.0)
    chosen = torch.linspace(0, len(dictionary) - 1, min(CHECKED_WORDS, len(dictionary)), device=options.device).long()
    words = dictionary.select(chosen).to("cpu")
    for mode in ("mean", "contrast", "loglik"):
        settings: dict[str, Any] = {"mode": mode, "edge_weight": 0.8, "pos_weight": 30.0, "temperature": 0.5}
        scores = decode_scores(z, *dictionary.tensors(), **settings)
        want = decode_scores_reference(
            z.cpu().double(), words.word_ptr, words.word_units, words.word_edges, words.unit_rows, **settings
        )
        yield f"{mode} scores", scores[:, chosen], want
        yield f"{mode} gradient of z", *_score_gradients(z, words, settings)
        k = min(50, len(dictionary))
        values, indices, total = decode_topk(z, *dictionary.tensors(), k=k, **settings)
        want_values, _, want_total = decode_topk_reference(scores.double(), k)
        yield f"{mode} top-k values", values, want_values
        yield f"{mode} scores of the top-k words", scores.gather(1, indices), want_values
        yield f"{mode} logsumexp", total, want_total


def _score_gradients(z: Tensor, words: FactoredDictionary, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Gradient of a weighted sum of the scores of a few words: ours, and the reference's on the CPU in float64."""
    weights = torch.linspace(-1, 1, len(words), dtype=torch.float64)
    ours, reference = z.clone().requires_grad_(), z.cpu().double().requires_grad_()
    scores = decode_scores(ours, *words.to(str(z.device)).tensors(), **settings)
    want = decode_scores_reference(
        reference, words.word_ptr, words.word_units, words.word_edges, words.unit_rows, **settings
    )
    (got,) = torch.autograd.grad((scores * weights.to(z.device, scores.dtype)).sum(), ours)
    (expected,) = torch.autograd.grad((want * weights).sum(), reference)
    return got, expected


def _check_suffixes(dtype: str, options: Options) -> Pairs:
    tensors, layout = suffix_inputs(options, dtype)
    query, key, value, prefix_key, prefix_value, factors = (each.cpu() for each in tensors)
    ends, lengths = layout["cu_seqlens"].tolist(), layout["prefix_length"].tolist()
    for mode in MODES:
        out = atman_suffix_attention(*tensors, **layout, mode=mode)
        for segment in {0, len(lengths) // 2, len(lengths) - 1}:
            start, stop, length = ends[segment], ends[segment + 1], lengths[segment]
            rows = slice(max(start, stop - CHECKED_ROWS), stop)
            keys = torch.cat([prefix_key[:length], key[start:stop]]).transpose(0, 1)[None]
            values = torch.cat([prefix_value[:length], value[start:stop]]).transpose(0, 1)[None]
            suppressed = torch.cat([torch.ones(length), factors[start:stop]])[None]
            want = _few_heads(query[rows].transpose(0, 1)[None], keys, values, suppressed, mode)
            yield f"{mode}, segment {segment}", out[rows, : want.shape[1]].transpose(0, 1)[None], want


def _check_attention(dtype: str, options: Options) -> Pairs:
    tensors = dense_inputs(options, dtype)
    for mode in MODES:
        out = atman_attention(*tensors, mode=mode, is_causal=True)
        query, key, value, factors = (each.cpu() for each in tensors)
        want = _few_heads(query[:, :, -CHECKED_ROWS:], key, value, factors, mode)
        yield mode, out[:, : want.shape[1], -CHECKED_ROWS:], want


def _few_heads(query: Tensor, key: Tensor, value: Tensor, factors: Tensor, mode: Any) -> Tensor:
    """Causal attention by definition, of the query heads that share the first few heads of keys."""
    shared = query.shape[1] // key.shape[1]
    heads = max(1, CHECKED_HEADS // shared)
    return atman_attention_reference(
        query[:, : heads * shared], key[:, :heads], value[:, :heads], factors, mode=mode, is_causal=True
    )


def _check_steering(dtype: str, options: Options) -> Pairs:
    for rule in RULES:
        x, *weights = (each.requires_grad_() for each in steer_inputs(options, dtype))
        ours, want = [], []
        for tensors, results in (((x, *weights), ours), (_doubles(x, *weights), want)):
            x_, encoder, bias, decoder, strength = tensors
            op: Callable[..., Any] = scar_steer if results is ours else scar_steer_reference
            y, pre = op(x_, encoder, encoder.sum(1), bias, decoder, strength, rule=rule)
            gradients = torch.autograd.grad([y, pre], tensors, [torch.ones_like(y), torch.ones_like(pre)])
            results += [y, pre, *gradients]
        names = (
            "output",
            "scores",
            *(f"gradient of {each}" for each in ("x", "encoder", "bias", "decoder", "strength")),
        )
        for name, got, expected in zip(names, ours, want, strict=True):
            yield f"{rule} {name}", got, expected


def _check_concept_scores(dtype: str, options: Options) -> Pairs:
    x, encoder, bias, *_ = steer_inputs(options, dtype)
    want = scar_scores_reference(x, encoder, encoder.double().sum(1), bias)
    yield "scores", scar_scores(x, encoder, encoder.sum(1), bias), want
    shifted = x.float() + 100.0 * x.float().std(1, keepdim=True)
    want = scar_scores_reference(shifted, encoder, encoder.double().sum(1), bias)
    yield "scores under a large mean", scar_scores(shifted, encoder, encoder.sum(1), bias), want


def _coder_sizes(options: Options) -> tuple[int, int, int]:
    """N rows, width d, n latents."""
    if options.quick:
        return 6, 24, 96
    return (512, 1024, 8192) if options.device == "cuda" else (64, 512, 3072)


def _check_selection(dtype: str, options: Options) -> Pairs:
    N, _, n = _coder_sizes(options)
    pre = random_tensor(N, n, dtype=dtype, device=options.device).requires_grad_()
    for k, always in ((n // 12, 0), (n // 3, 3)):
        values, indices = topk_select(pre, k, always=always)
        want, want_indices = topk_select_reference(pre, k, always=always)
        yield f"k={k} values", values, want
        yield f"k={k} indices", indices, want_indices
        gradient = random_tensor(*values.shape, dtype=dtype, device=options.device, seed=1)
        yield f"k={k} gradient", *(torch.autograd.grad(each, pre, gradient)[0] for each in (values, want))


def _check_sparse_decode(dtype: str, options: Options) -> Pairs:
    """A few entries per row are gathered, many are multiplied as a dense matrix."""
    N, d, n = _coder_sizes(options)
    shapes = {"scale": (N,), "shift": (N,), "bias": (d,)}
    for k in (max(1, n // 256), n // 3):
        indices = selection(N, n, k, options.device)
        tensors = [
            random_tensor(*shape, dtype=dtype, device=options.device, seed=seed).requires_grad_()
            for seed, shape in enumerate(((N, k), (n, d), *shapes.values()))
        ]
        doubles = _doubles(*tensors)
        ours, want = (
            op(indices, each[0], each[1], **dict(zip(shapes, each[2:], strict=True)))
            for op, each in ((topk_sparse_decode, tensors), (topk_sparse_decode_reference, doubles))
        )
        yield f"k={k} output", ours, want
        gradient = random_tensor(N, d, dtype=dtype, device=options.device, seed=9)
        got = torch.autograd.grad(ours, tensors, gradient)
        expected = torch.autograd.grad(want, doubles, gradient.double())
        for name, one, other in zip(("values", "rows", *shapes), got, expected, strict=True):
            yield f"k={k} gradient of {name}", one, other


def _check_encode(dtype: str, options: Options) -> Pairs:
    """Near ties may fall to either side, so values are compared where they were taken, and in order."""
    N, d, n = _coder_sizes(options)
    shapes = {"x": (N, d), "encoder": (n, d), "latent_bias": (n,), "pre_bias": (d,)}
    tensors = [
        random_tensor(
            *shape, dtype=dtype, device=options.device, scale=d**-0.5 if name == "encoder" else 1.0, seed=seed
        )
        for seed, (name, shape) in enumerate(shapes.items())
    ]
    tensors = [each.requires_grad_() for each in tensors]
    doubles = _doubles(*tensors)
    k = max(1, n // 256)
    values, indices, mean, std = sae_encode_topk(*tensors, k)
    pre, _, want_mean, want_std = sae_encode_topk_reference(*doubles, n)
    want = pre.gather(1, indices.long())
    yield "values", values, want
    yield "values in order", values.sort(descending=True).values, pre.topk(k).values
    yield "mean", mean, want_mean
    yield "deviation", std, want_std
    gradient = random_tensor(N, k, dtype="float32", device=options.device, seed=9)
    got = torch.autograd.grad(values, tensors, gradient)
    for name, ours, expected in zip(shapes, got, torch.autograd.grad(want, doubles, gradient.double()), strict=True):
        yield f"gradient of {name}", ours, expected


def _doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.detach().double().requires_grad_() for each in tensors)


def _check_hash(_: str, options: Options) -> Pairs:
    trigrams = torch.arange(0, 2**24, 2**24 // (50 if options.quick else 5000))
    settings: dict[str, Any] = {"table_size": 8000, "num_hashes": 10, "num_lowercase": 3, "seed": 7}
    yield "rows", mix32_rows(trigrams.to(options.device), **settings), mix32_rows_reference(trigrams, **settings)


_PAIRS: dict[str, Callable[[str, Options], Pairs]] = {
    "hash_embedding_bag": _check_embedding,
    "fused_linear_bce": _check_loss,
    "decode_scores": _check_scores,
    "csr_gather_sum": _check_gather,
    "mix32_rows": _check_hash,
    "atman_suffix_attention": _check_suffixes,
    "atman_attention": _check_attention,
    "scar_steer": _check_steering,
    "scar_scores": _check_concept_scores,
    "topk_select": _check_selection,
    "topk_sparse_decode": _check_sparse_decode,
    "sae_encode_topk": _check_encode,
}
_INTEGER_OPS = {"mix32_rows"}
CHECKS = [
    Check(op, dtype, pairs)
    for op, pairs in _PAIRS.items()
    for dtype in DTYPES
    if dtype == "float32" or op not in _INTEGER_OPS
]
