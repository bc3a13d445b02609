"""How much attention each query pays to chosen keys, without the attention maps."""

from .op import attn_column_mass as attn_column_mass

__all__ = ["attn_column_mass"]
