"""One sampling step with edit guidance: how strongly each edit acts where, and the masked, affine step itself."""

from .op import edit_magnitude as edit_magnitude
from .op import edit_step as edit_step

__all__ = ["edit_magnitude", "edit_step"]
