"""Rows through a whole coder, by the operators for large ones."""

from typing import NamedTuple

from torch import Tensor

from .coder import CoderWeights, activate
from .config import ScarConfig
from .remote.kernels_coder_scar import sae_encode_topk, topk_sparse_decode


class Coded(NamedTuple):
    """Some rows, coded."""

    values: Tensor
    """Pre-activations that the coder keeps [N, K]; those of concepts that bypass the selection come first."""
    indices: Tensor
    """Their latents [N, K]."""
    latents: Tensor
    """[N, K]."""
    reconstruction: Tensor
    """[N, d]."""


def encode_kept(x: Tensor, weights: CoderWeights, config: ScarConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre-activations [N, K] of the kept latents, which these are, and mean and std [N] of rows [N, d]."""
    return sae_encode_topk(
        x.to(weights.encoder.dtype),
        weights.encoder,
        weights.latent_bias,
        weights.pre_bias,
        config.kept,
        always=config.always_kept,
        eps=config.norm_eps,
        normalize=config.normalize,
    )


def code(x: Tensor, weights: CoderWeights, config: ScarConfig) -> Coded:
    """Run rows [N, d] through a coder of at least float32; quick if its decoder's columns lie in one piece each."""
    values, indices, mean, std = encode_kept(x, weights, config)
    latents = activate(values, config.activation)
    columns = weights.decoder.T.contiguous()
    rows = topk_sparse_decode(indices, latents, columns, scale=std, shift=mean, bias=weights.pre_bias)
    return Coded(values, indices, latents, rows)
