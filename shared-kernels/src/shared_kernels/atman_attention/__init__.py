"""Attention whose scores are manipulated per key: dense, and over suffixes of shared prompts."""

from .op import atman_attention as atman_attention
from .op import atman_suffix_attention as atman_suffix_attention

__all__ = ["atman_attention", "atman_suffix_attention"]
