"""Stateless modules for `kernels.kernelize`: each one's `forward` replaces that of a module with the same attributes.

A module of a model names its replacement with `@use_kernel_forward_from_hub("HashEmbeddingBag")`, and a mapping to
`LayerRepository` or `LocalLayerRepository` says where to find it. Modules here have no state and no constructor of
their own: weights and settings are the attributes of the module whose forward they take over.
"""

from torch import Tensor, nn

from .csr_gather_sum.op import csr_gather_sum
from .fused_linear_bce.op import fused_linear_bce
from .hash_embedding_bag.op import hash_embedding_bag


class CsrGatherSum(nn.Module):
    """Needs `weight` `[C, D]`."""

    weight: Tensor
    can_torch_compile = True
    has_backward = True

    def forward(self, indptr: Tensor, indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """`csr_gather_sum` of the rows of `weight`."""
        return csr_gather_sum(indptr, indices, self.weight, weights)


class HashEmbeddingBag(nn.Module):
    """Needs `weight` `[V, D]`, the hash table."""

    weight: Tensor
    can_torch_compile = True
    has_backward = True

    def forward(self, word_ptr: Tensor, word_units: Tensor, unit_rows: Tensor) -> Tensor:
        """`hash_embedding_bag` of the rows of `weight`."""
        return hash_embedding_bag(word_ptr, word_units, unit_rows, self.weight)


class FusedLinearBCE(nn.Module):
    """Needs `weight` `[V, D]`, the head, and `pos_weight`, a float."""

    weight: Tensor
    pos_weight: float
    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        x: Tensor,
        positive_ptr: Tensor,
        positive_rows: Tensor,
        row_weight: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """`fused_linear_bce` of the head `weight`."""
        return fused_linear_bce(
            x,
            self.weight,
            positive_ptr,
            positive_rows,
            pos_weight=self.pos_weight,
            row_weight=row_weight,
            scale=scale,
        )
