"""The section "scar" in the configuration of a model that carries an adapter's concepts with it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .settings_scar import ELEMENTWISE, GATES, POSITIONS, RULES, ConceptSettings
from .sites_scar import SITES

MAX_CONCEPTS = 1 << 16
MAX_LAYERS = 4096


@dataclass(frozen=True, kw_only=True)
class ScarSection:
    """Which concepts a model detects and steers, where, and how. Always in mode "residual".

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    layers: list[int]
    """Indices of the blocks that hold the concepts' rows."""

    site: str
    """Which output of the block: "mlp", "block" or "attn"."""

    concepts: list[str]
    """Names of the concepts, in the order of the rows."""

    activation: str = "relu"
    """Element-wise function between pre-activations and latents."""

    gate: str = "relu"
    """When a concept counts as on: "relu", "threshold" or "open"."""

    gate_threshold: dict[str, float] | None = None
    """tau of the gate "threshold" by layer."""

    normalize: bool = True
    """Whether each activation is standardized before it is encoded."""

    norm_eps: float = 1e-5
    """What is added to the standard deviation before dividing by it."""

    rule: str = "add_gated"
    """Meaning of a strength where a request names no rule."""

    positions: str = "all"
    """Which tokens are steered where a request does not say."""

    skip_first_token: bool | None = None
    """Whether a sequence's first token is left alone. None: for the rules "add" and "add_gated"."""

    default_steering: dict[str, Any] | None = None
    """Strengths by concept that hold from loading on."""

    calibration: dict[str, Any] | None = None
    """By concept: the score's threshold and what else is known of it. For readers; nothing here uses it."""

    def __post_init__(self) -> None:
        self._check_names()
        if not _all_integers(self.layers) or not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ValueError(f"scar.layers must hold 1 to {MAX_LAYERS} block indices, got {self.layers!r}.")
        if not isinstance(self.norm_eps, float) or not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"scar.norm_eps must be finite and not negative, got {self.norm_eps!r}.")
        if self.gate == "threshold" and sorted(self.gate_threshold or {}) != sorted(map(str, self.layers)):
            raise ValueError(f"scar.gate_threshold must hold the layers {self.layers}, got {self.gate_threshold!r}.")

    def _check_names(self) -> None:
        choices = {
            "site": SITES,
            "activation": tuple(sorted(set(ELEMENTWISE.values()))),
            "gate": tuple(gate for gate in GATES if gate != "topk"),  # the rows of the other latents are not there
            "rule": RULES,
            "positions": POSITIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"scar.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not isinstance(self.concepts, list) or not all(isinstance(name, str) and name for name in self.concepts):
            raise ValueError(f"scar.concepts must be a list of names, got {self.concepts!r}.")
        if not 1 <= len(set(self.concepts)) == len(self.concepts) <= MAX_CONCEPTS:
            raise ValueError(f"scar.concepts must be 1 to {MAX_CONCEPTS} different names, got {self.concepts!r}.")
        if unknown := sorted(set(self.default_steering or {}) - set(self.concepts)):
            raise ValueError(f"scar.default_steering must name concepts, {self.concepts}, got {unknown}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ScarSection":
        """Read the section.

        Raises:
            ValueError: an unknown key, a missing one, or one that is out of its range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"scar must not hold {unknown}; it may hold {sorted(known)}.")
        if missing := sorted({"layers", "site", "concepts"} - set(values)):
            raise ValueError(f"scar must hold {missing}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What is written to `config.json`."""
        return asdict(self)

    def settings_at(self, layer: int) -> ConceptSettings:
        """How one layer reads and steers."""
        return ConceptSettings(
            concepts=tuple(self.concepts),
            activation=self.activation,  # type: ignore[arg-type]
            gate=self.gate,  # type: ignore[arg-type]
            gate_threshold=(self.gate_threshold or {}).get(str(layer)),
            normalize=self.normalize,
            norm_eps=self.norm_eps,
            rule=self.rule,  # type: ignore[arg-type]
            positions=self.positions,  # type: ignore[arg-type]
            skip_first_token=self.skip_first_token,
        )


def _all_integers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in values)
