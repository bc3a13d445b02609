"""A sparse coder: encode and keep the largest latents, decode these, with gradients that are sums in a fixed order."""

from .op import sae_encode_topk as sae_encode_topk
from .op import topk_select as topk_select
from .op import topk_sparse_decode as topk_sparse_decode

__all__ = ["sae_encode_topk", "topk_select", "topk_sparse_decode"]
