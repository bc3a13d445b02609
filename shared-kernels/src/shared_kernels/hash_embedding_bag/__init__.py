"""Word embeddings as sums of hash-table rows, factored through the units that words share."""

from .op import hash_embedding_bag as hash_embedding_bag

__all__ = ["hash_embedding_bag"]
