"""Scores of all words of a dictionary under multi-label logits, and the best of them."""

from .op import decode_scores as decode_scores
from .op import decode_topk as decode_topk

__all__ = ["decode_scores", "decode_topk"]
