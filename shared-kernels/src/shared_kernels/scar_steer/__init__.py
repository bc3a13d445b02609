"""Concept latents of a sparse coder: their scores, and activations steered along their decoder directions."""

from .op import scar_scores as scar_scores
from .op import scar_steer as scar_steer

__all__ = ["scar_scores", "scar_steer"]
