"""AtMan for Hugging Face transformers: what an output rests on, found by suppressing attention; forward passes only."""

from ._version import __version__ as __version__

__all__ = ["__version__"]
