"""Errors that a caller may want to tell apart.

NotImplementedError
  UnsupportedModelError        this model's attention cannot be reached
KeyboardInterrupt
  ExplanationInterrupted       carries what was computed so far
"""

from typing import Any


class UnsupportedModelError(NotImplementedError):
    """The attention of this model cannot be manipulated, or not at the asked site."""


class ExplanationInterrupted(KeyboardInterrupt):
    """An explanation was interrupted. `partial` holds the explanations so far, scores not computed being NaN."""

    def __init__(self, partial: Any) -> None:
        super().__init__("The explanation was interrupted; the exception's `partial` holds the scores so far.")
        self.partial = partial
