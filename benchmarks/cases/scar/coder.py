"""The sparse coder itself: encode and select, decode by k, a whole reconstruction, a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases.scar.inputs import (
    Coder,
    Shape,
    coder_of,
    original_steer,
    rows_of,
    shape_of,
    standardized,
)
from benchmarks.cases.tfree.inputs import default_dtype, random_tensor
from benchmarks.harness import Case, Options, register
from benchmarks.scar_peers import sae_lens_coder, sparsify_decode, sparsify_encoder
from shared_kernels import sae_encode_topk, topk_sparse_decode
from shared_kernels.sparse_coder.eager import is_gathered

ROWS = (1, 16, 256)
DECODED_ROWS = 256
KEPT = (32, 128, 512, 2048, 8192)  # dense from 8192 on on a CPU, from 128 on on a GPU
TRAINING = {"cpu": (2048, Shape(512, 3072, 256)), "cuda": (2048, Shape(4096, 24576, 2048))}
QUICK_TRAINING = (40, Shape(16, 96, 8))
LARGEST_CONTRIBUTIONS = 1 << 30  # entries of the [N * k, d] tensor in the gradient of eai-sparsify
RTOL = 1e-3
NEAR_TIES = "near ties may fall to either side, so the tolerance is wide"


@lru_cache(maxsize=1)
def decoder_rows(shape: Shape, device: str, dtype: str) -> Tensor:
    """The decoder [n, d] with the latents one after another in memory."""
    return coder_of(shape, device, dtype).decoder.T.clone(memory_format=torch.contiguous_format)


def selection(N: int, n: int, k: int, device: str) -> Tensor:
    """Distinct latents per row, in order, [N, k] int32."""
    scores = torch.rand(N, n, generator=torch.Generator().manual_seed(0))
    return scores.topk(k, sorted=False).indices.sort(1).values.int().to(device)


def reconstruct(x: Tensor, coder: Coder, rows: Tensor) -> Tensor:
    """The operators as a layer calls them."""
    values, indices, mean, std = sae_encode_topk(x, coder.encoder, coder.latent_bias, coder.pre_bias, coder.k)
    return topk_sparse_decode(indices, values.relu(), rows, scale=std, shift=mean, bias=coder.pre_bias)


def _register_encode(N: int) -> None:
    name = f"scar.coder.encode_select.n{N}"

    @register(name)
    def build(options: Options) -> Case:
        shape = shape_of(options)
        d, n, k = shape
        coder, x = coder_of(shape, options.device, "float32"), rows_of(N, d, options, "float32")

        def peer(is_sorted: bool) -> Callable[[], Tensor]:
            def call() -> Tensor:
                z, _, _ = standardized(x)
                pre = (z - coder.pre_bias) @ coder.encoder.T + coder.latent_bias
                return pre.topk(k, sorted=is_sorted).values

            return call

        peers = {"original, sorted topk": peer(True), "original, unsorted topk": peer(False)}
        return Case(
            name=name,
            ours=lambda: sae_encode_topk(x, coder.encoder, coder.latent_bias, coder.pre_bias, k)[0],
            peers=peers,
            others={"the matrix product alone": lambda: x @ coder.encoder.T},
            views=dict.fromkeys(("ours", *peers), lambda values: values.sort(descending=True).values),
            rtol=1e-4,
            flops=2.0 * N * d * n,
            bytes=4.0 * d * n,
            size={"N": N, "D": d, "n": n, "k": k},
        )


def _register_decode(k: int) -> None:
    name = f"scar.coder.decode.k{k}"

    @register(name)
    def build(options: Options) -> Case:
        shape, dtype = shape_of(options), default_dtype(options)
        (d, n, _), N = shape, DECODED_ROWS
        kept = max(1, k * n // 24576)
        decoder = coder_of(shape, options.device, dtype).decoder
        rows = decoder_rows(shape, options.device, dtype)
        indices = selection(N, n, kept, options.device)
        wide = indices.long()
        values = random_tensor(N, kept, dtype=dtype, device=options.device, seed=6)
        theirs = sparsify_decode()
        return Case(
            name=name,
            ours=lambda: topk_sparse_decode(indices, values, rows),
            peers={
                "dense": lambda: F.linear(values.new_zeros(N, n).scatter_(1, wide, values), decoder),
                "F.embedding_bag": lambda: F.embedding_bag(wide, rows, per_sample_weights=values, mode="sum"),
                "eai-sparsify": None if theirs is None else lambda: theirs(wide, values, rows.T),
                "COO matrix, as sae-lens": _coo_product(wide, values, rows) if dtype == "float32" else None,
            },
            rtol=1e-4 if dtype == "float32" else 3e-2,
            flops=2.0 * N * kept * d,
            bytes=float(min(n, N * kept) * d * values.element_size()),
            size={"N": N, "D": d, "n": n, "k": kept},
            dtype=dtype,
            note="our plan: " + ("gathered" if is_gathered("sum", N, kept, rows) else "dense"),
        )


def _coo_product(indices: Tensor, values: Tensor, rows: Tensor) -> Callable[[], Tensor]:
    (N, k), n = indices.shape, rows.shape[0]
    entry_rows = torch.arange(N, device=indices.device).repeat_interleave(k)

    def call() -> Tensor:
        places = torch.stack([entry_rows, indices.flatten()])
        latents = torch.sparse_coo_tensor(places, values.flatten(), (N, n), check_invariants=False)
        return torch.sparse.mm(latents, rows)

    return call


def _register_reconstruct(N: int) -> None:
    name = f"scar.coder.reconstruct.n{N}"

    @register(name)
    def build(options: Options) -> Case:
        shape = shape_of(options)
        d, n, k = shape
        coder, x = coder_of(shape, options.device, "float32"), rows_of(N, d, options, "float32")
        rows = decoder_rows(shape, options.device, "float32")
        theirs = sae_lens_coder(coder.encoder, rows, coder.pre_bias, coder.latent_bias, k)
        return Case(
            name=name,
            ours=torch.inference_mode()(lambda: reconstruct(x, coder, rows)),
            peers={
                "original": torch.inference_mode()(lambda: original_steer(x, coder, 1.0)),
                "ours, decoder [d, n] in memory": torch.inference_mode()(
                    lambda: reconstruct(x, coder, coder.decoder.T)
                ),
            },
            others={
                "sae-lens TopKSAE, rows not standardized": None
                if theirs is None
                else torch.inference_mode()(lambda: theirs(x))
            },
            rtol=RTOL,
            flops=2.0 * N * d * (n + k),
            bytes=4.0 * d * (n + min(n, N * k)),
            size={"N": N, "D": d, "n": n, "k": k},
            note=NEAR_TIES,
        )


@register("scar.coder.train_step")
def train_step(options: Options) -> Case:
    """Forward, loss and all four gradients; the first latent is a labelled concept."""
    N, shape = QUICK_TRAINING if options.quick else TRAINING[options.device]
    d, n, k = shape
    frozen = coder_of(shape, options.device, "float32")
    *weights, decoder = (each.clone().requires_grad_() for each in (*frozen[:4], frozen.decoder))
    coder = Coder(*weights, k)
    rows = decoder_rows(shape, options.device, "float32").clone().requires_grad_()
    parameters = (coder.encoder, rows, coder.pre_bias, coder.latent_bias)
    x = rows_of(N, d, options, "float32")
    labels = (torch.arange(N, device=options.device) % 3 == 0).float()

    def ours() -> list[Tensor]:
        """The concept takes part in the selection, so its pre-activation is computed beside it."""
        z, _, _ = standardized(x)
        concept = (z - coder.pre_bias) @ coder.encoder[0] + coder.latent_bias[0]
        return _gradients(_loss(reconstruct(x, coder, rows), x, concept, labels), parameters)

    def ours_bypassed() -> list[Tensor]:
        """The concept is always kept, as in new adapters, and comes with the selection."""
        weights = (coder.encoder, coder.latent_bias, coder.pre_bias)
        values, indices, mean, std = sae_encode_topk(x, *weights, k - 1, always=1)
        out = topk_sparse_decode(indices, values.relu(), rows, scale=std, shift=mean, bias=coder.pre_bias)
        return _gradients(_loss(out, x, values[:, 0], labels), parameters)

    def original() -> list[Tensor]:
        z, mean, std = standardized(x)
        pre = F.linear(z - coder.pre_bias, coder.encoder) + coder.latent_bias
        values, indices = pre.topk(k, dim=-1)
        latents = torch.zeros_like(pre).scatter(-1, indices, values.relu())
        out = (F.linear(latents, decoder) + coder.pre_bias) * std + mean
        own = (coder.encoder, decoder, coder.pre_bias, coder.latent_bias)
        loss, encoder, turned, *biases = _gradients(_loss(out, x, pre[:, 0], labels), own)
        return [loss, encoder, turned.T, *biases]

    theirs = sparsify_encoder() if N * k * d <= LARGEST_CONTRIBUTIONS else None
    return Case(
        name="scar.coder.train_step",
        ours=ours,
        peers={"original": original},
        others={
            "ours, concept bypasses the selection": ours_bypassed,
            "eai-sparsify encoder, no concept": None if theirs is None else _sparsify_step(theirs, coder, rows, x),
        },
        rtol=RTOL,
        flops=2.0 * N * d * (n + 4 * k),
        bytes=4.0 * (4 * n * d + 2 * N * d),
        size={"N": N, "D": d, "n": n, "k": k},
        note=f"loss and four gradients; {NEAR_TIES}",
    )


def _sparsify_step(encode: Callable[..., Any], coder: Coder, rows: Tensor, x: Tensor) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        z, mean, std = standardized(x)
        values, indices, _ = encode(z - coder.pre_bias, coder.encoder, coder.latent_bias, coder.k, "topk")
        total = F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")
        loss = _errors((total + coder.pre_bias) * std + mean, x).mean()
        return _gradients(loss, (coder.encoder, rows, coder.pre_bias, coder.latent_bias))

    return call


def _errors(out: Tensor, x: Tensor) -> Tensor:
    return (out - x).square().mean(1) / x.square().mean(1)


def _loss(out: Tensor, x: Tensor, concept: Tensor, labels: Tensor) -> Tensor:
    return (_errors(out, x) + F.binary_cross_entropy_with_logits(concept, labels, reduction="none")).mean()


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


for _N in ROWS:
    _register_encode(_N)
for _k in KEPT:
    _register_decode(_k)
for _N in ROWS:
    _register_reconstruct(_N)
