"""Sums of the table rows that each row of a CSR matrix lists."""

from .op import csr_gather_sum as csr_gather_sum

__all__ = ["csr_gather_sum"]
