"""A linear head and its multi-label loss in one, chunk by chunk."""

from .op import fused_linear_bce as fused_linear_bce

__all__ = ["fused_linear_bce"]
