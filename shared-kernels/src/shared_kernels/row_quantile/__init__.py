"""Exact quantiles of rows, without sorting them."""

from .op import row_quantile as row_quantile

__all__ = ["row_quantile"]
