"""A coder of the published shape with random weights, rows to code, and the original's formulas in full."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.tfree.inputs import DTYPES, random_tensor
from benchmarks.harness import Options

EPS = 1e-5
RTOL = {"float32": 1e-5, "bfloat16": 2e-2}


class Shape(NamedTuple):
    """Hidden size, latents, and latents that are kept."""

    d: int
    n: int
    k: int


PUBLISHED = Shape(d=4096, n=24576, k=2048)
QUICK = Shape(d=32, n=192, k=16)


def shape_of(options: Options) -> Shape:
    """The published one, or the one that shows that it runs."""
    return QUICK if options.quick else PUBLISHED


class Coder(NamedTuple):
    """Weights as a checkpoint has them. The first latent is a concept that every row carries."""

    encoder: Tensor  # [n, d]
    decoder: Tensor  # [d, n]
    pre_bias: Tensor  # [d]
    latent_bias: Tensor  # [n]
    k: int

    def concept(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first latent as `scar_steer` takes it: encoder, its sum, folded bias, decoder."""
        encoder = self.encoder[:1].float().contiguous()
        bias = self.latent_bias[:1].float() - encoder @ self.pre_bias.float()
        return encoder, encoder.sum(1), bias, self.decoder[:, :1].T.float().contiguous()


@lru_cache(maxsize=1)
def coder_of(shape: Shape, device: str, dtype: str) -> Coder:
    """Random weights as training starts with them, D = E^T, but with biases."""
    d, n, k = shape
    encoder = (torch.rand(n, d, generator=torch.Generator().manual_seed(0)) * 2 - 1) * d**-0.5
    latent_bias = random_tensor(n, dtype="float32", device="cpu", scale=0.1, seed=1)
    latent_bias[0] = 4.0  # far above the k-th largest, so that TopK and ReLU agree on it
    tensors = (encoder, encoder.T.contiguous(), random_tensor(d, dtype="float32", device="cpu", scale=0.1, seed=2))
    return Coder(*(each.to(device, DTYPES[dtype]) for each in (*tensors, latent_bias)), k)


def rows_of(N: int, d: int, options: Options, dtype: str) -> Tensor:
    """Activations [N, d] with a mean."""
    return random_tensor(N, d, dtype=dtype, device=options.device, scale=2.0, seed=3) + 0.5


def steer_inputs(options: Options, dtype: str, d: int | None = None) -> tuple[Tensor, ...]:
    """Rows [N, d], and encoder, bias, decoder and strengths of a few concepts, without a coder around them."""
    d = d or shape_of(options).d
    N, C, S = (12, 3, 4) if options.quick else (4096 if options.device == "cuda" else 64, 3, 16)
    shapes = {"encoder": (C, d), "bias": (C,), "decoder": (C, d), "strength": (S, C)}
    scales = {"encoder": d**-0.5, "decoder": d**-0.5}
    weights = [
        random_tensor(*shape, dtype="float32", device=options.device, scale=scales.get(name, 1.0), seed=n)
        for n, (name, shape) in enumerate(shapes.items())
    ]
    return rows_of(N, d, options, dtype), *weights


def standardized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows less their mean over their std, these means and stds."""
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (std + EPS), mean, std


def original_encode(x: Tensor, coder: Coder, activation: str = "relu") -> tuple[Tensor, Tensor, Tensor]:
    """Latents [N, n], means and stds: every latent, TopK in order, activation, scatter."""
    z, mean, std = standardized(x)
    pre = (z - coder.pre_bias) @ coder.encoder.T + coder.latent_bias
    values, indices = pre.topk(coder.k, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, indices, getattr(torch, activation)(values)), mean, std


def original_steer(x: Tensor, coder: Coder, multiplier: float) -> Tensor:
    """The reconstruction with the first latent times `multiplier` where it is above 0, all latents decoded."""
    latents, mean, std = original_encode(x, coder)
    steered = latents.clone()
    steered[:, 0] = torch.where(steered[:, 0] > 0, multiplier * steered[:, 0], steered[:, 0])
    return (steered @ coder.decoder.T + coder.pre_bias) * std + mean


def original_gated_add(x: Tensor, coder: Coder, alpha: float) -> Tensor:
    """Rows plus a share of their length along the first decoder column, more where the first latent is low."""
    latent = original_encode(x, coder, "sigmoid")[0][:, :1]
    column = coder.decoder[:, 0]
    gate = latent if alpha <= 0 else 1 - latent
    return x + alpha * gate * x.norm(dim=-1, keepdim=True) / column.norm() * column
