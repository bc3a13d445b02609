"""What eai-sparsify and sae-lens offer for a sparse coder: few lines around them, None where not installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sparsify_decode() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """`f(indices, values, decoder [d, n])` of eai-sparsify: its Triton kernel on a GPU, `embedding_bag` elsewhere."""
    utils = _module("sparsify.utils")
    if utils is None:
        return None
    return utils.decoder_impl if torch.cuda.is_available() else utils.eager_decode


def sparsify_encoder() -> Callable[..., Any] | None:
    """`f(input, weight, bias, k, "topk")` of eai-sparsify; its gradient holds an [N * k, d] tensor."""
    module = _module("sparsify.fused_encoder")
    return None if module is None else module.fused_encoder


def sae_lens_coder(
    encoder: Tensor, rows: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int
) -> Callable[[Tensor], Tensor] | None:
    """The TopKSAE of sae-lens with encoder and decoder rows [n, d] and these biases, without normalization."""
    sae_lens = _module("sae_lens")
    if sae_lens is None:
        return None
    n, d = encoder.shape
    settings = {"dtype": "float32", "device": str(encoder.device), "normalize_activations": "none"}
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=d, d_sae=n, k=k, apply_b_dec_to_input=True, **settings))
    with torch.no_grad():
        for own, given in ((sae.W_enc, encoder.T), (sae.W_dec, rows), (sae.b_enc, latent_bias), (sae.b_dec, pre_bias)):
            own.copy_(given)
    return sae


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
