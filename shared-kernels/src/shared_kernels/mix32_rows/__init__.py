"""Table rows of trigrams by arithmetic hashing."""

from .op import mix32_rows as mix32_rows

__all__ = ["mix32_rows"]
