"""What an adapter's configuration says about steering: names of rules, modes and gates, and one layer's settings."""

import math
from dataclasses import dataclass
from typing import Literal

Rule = Literal["scale", "set", "add", "add_gated"]
Mode = Literal["residual", "reconstruct"]
Gate = Literal["relu", "threshold", "topk", "open"]
Positions = Literal["all", "generated", "prompt"]
Activation = Literal["topk", "topk-sigmoid", "topk-tanh", "relu"]

RULES: tuple[Rule, ...] = ("scale", "set", "add", "add_gated")
MODES: tuple[Mode, ...] = ("residual", "reconstruct")
GATES: tuple[Gate, ...] = ("relu", "threshold", "topk", "open")
POSITIONS: tuple[Positions, ...] = ("all", "generated", "prompt")
ELEMENTWISE = {"topk": "relu", "topk-sigmoid": "sigmoid", "topk-tanh": "tanh", "relu": "relu"}
"""The function behind each activation, once the selection is done."""


@dataclass(frozen=True, kw_only=True)
class ConceptSettings:
    """How one layer of an adapter reads and steers its concepts."""

    concepts: tuple[str, ...]
    """Names; concept c is latent c."""

    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Element-wise function between pre-activations and latents."""

    gate: Gate = "relu"
    """When a concept's latent counts as open: above 0, above `gate_threshold`, among the k largest, or always."""

    gate_threshold: float | None = None
    """tau: the pre-activation above which a latent is open, for the gate "threshold"."""

    normalize: bool = True
    """Whether each row is standardized before it is encoded."""

    norm_eps: float = 1e-5
    """What is added to the standard deviation before dividing by it."""

    rule: Rule = "add_gated"
    """Meaning of a strength, where a request names no rule."""

    mode: Mode = "residual"
    """Whether the sparse coder's own error is kept out of the model's activations, where a request does not say."""

    positions: Positions = "all"
    """Which tokens are steered, where a request does not say."""

    skip_first_token: bool | None = None
    """Whether a sequence's first token is left alone. None: for the rules "add" and "add_gated" only."""

    @property
    def open_above(self) -> float:
        """The pre-activation above which a latent is open, as far as one number can say."""
        if self.gate == "threshold":
            assert self.gate_threshold is not None  # the configuration has checked it
            return self.gate_threshold
        return -math.inf if self.gate == "open" else 0.0

    def skips_first_token(self, rule: str) -> bool:
        """Whether steering by `rule` leaves the first token, whose norm is often huge, as it is."""
        return self.skip_first_token if self.skip_first_token is not None else rule in ("add", "add_gated")
