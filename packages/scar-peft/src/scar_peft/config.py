"""`ScarConfig`: what `adapter_config.json` of a SCAR adapter holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ._version import __version__
from .peft_type import SCAR
from .remote.settings_scar import ELEMENTWISE, GATES, MODES, POSITIONS, RULES, ConceptSettings, Gate
from .remote.sites_scar import SITES
from .remote.strengths_scar import read_amount

MAX_LATENTS = 1 << 24
MAX_CONCEPTS = 1 << 16
LATENTS_PER_DIMENSION = 6
"""n over d in the published adapter."""
LATENTS_PER_KEPT = 12
"""n over k in the published adapter."""


@dataclass
class ScarConfig(PeftConfig):
    """Configuration of a SCAR adapter: a sparse coder on one activation of one or several layers.

    Latents 0 to C - 1 carry the C concepts. Symbols follow Haerle et al. 2024 (arXiv 2411.07122): d hidden size, n
    latents, k of them kept.

    Raises:
        ValueError: a field is out of its range; the message names it.

    Example:
        >>> ScarConfig(layers=[25], site="mlp", concepts=["toxicity"], task_type="CAUSAL_LM")
    """

    layers: list[int] | int = field(default_factory=list)
    """Indices of the blocks that get a coder each; negative ones count from the end."""

    site: str = "mlp"
    """Which output of the block: "mlp" (feed-forward part, the paper's), "block" (residual stream behind the block,
    where concepts of whole texts are easiest to read) or "attn"."""

    concepts: list[str] = field(default_factory=lambda: ["concept"])
    """Names of the concepts; concept c is latent c."""

    n_latents: int | None = None
    """n. None: six times the hidden size, as in the published adapter."""

    k: int | None = None
    """Latents that TopK keeps. None: a twelfth of `n_latents`, as in the published adapter."""

    activation: str = "topk"
    """"topk" (then relu), "topk-sigmoid", "topk-tanh", or "relu" (no selection)."""

    concept_gate: str = "relu"
    """"relu": concept latents bypass TopK, which keeps k others. "topk": they compete, as in published weights."""

    normalize: bool = True
    """Whether each activation is standardized before it is encoded."""

    norm_eps: float = 1e-5
    """Added to the standard deviation in the encoder; the decoder multiplies without it."""

    mode: str = "residual"
    """"residual" adds the concepts' change to the activation; "reconstruct" replaces it by the coder's output, as the
    original does, which costs perplexity even at neutral strength."""

    gate: str | None = None
    """When a concept counts as on in residual steering: "relu", "threshold", "topk" or "open". None: what the coder
    does itself where that needs no full encoding, else "relu"."""

    gate_threshold: dict[int, float] | float | None = None
    """tau of the gate "threshold", for all layers or by layer."""

    steering_rule: str = "add_gated"
    """Meaning of a strength where a request names no rule: "scale", "set", "add" or "add_gated"."""

    steering_positions: str = "all"
    """Which tokens are steered: "all", "generated" or "prompt"."""

    skip_first_token: bool | None = None
    """Whether a sequence's first token, whose norm is often huge, is left alone. None: for "add" and "add_gated"."""

    default_steering: dict[str, Any] | None = None
    """Strengths by concept that hold from loading on, so that programs steer that know nothing of this package."""

    calibration: dict[str, Any] = field(default_factory=dict)
    """By concept: the score's threshold, and its mean and standard deviation in both classes."""

    metrics: dict[str, Any] = field(default_factory=dict)
    """What evaluation found, for the model card."""

    label_source: str | None = None
    """Where the labels came from, for the model card."""

    license: str | None = None
    """Licence of the adapter's weights, for the model card."""

    compact: bool = False
    """Whether only the concepts' rows are stored: enough to detect and to steer in mode "residual"."""

    hidden_size: int | None = None
    """d; filled when the adapter meets its first model."""

    target_modules: str | list[str] | None = None
    """Expression of the targets' names; follows from `layers` and `site`."""

    exclude_modules: str | list[str] | None = None
    """Unused; peft asks every configuration for it."""

    modules_to_save: list[str] | None = None
    """Further modules that are trained and stored; peft adds the heads of classifiers."""

    scar_version: str = __version__
    """Version that wrote the configuration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SCAR
        self.layers = [self.layers] if isinstance(self.layers, int) else list(self.layers)
        self.concepts = [self.concepts] if isinstance(self.concepts, str) else list(self.concepts)
        if isinstance(self.gate_threshold, Mapping):  # JSON has no integer keys
            self.gate_threshold = {int(layer): float(value) for layer, value in self.gate_threshold.items()}
        self._check_names()
        self._check_numbers()
        if self.default_steering is not None:
            self.default_steering = _checked_steering(self.default_steering)

    def _check_names(self) -> None:
        choices: dict[str, Sequence[str | None]] = {
            "site": SITES,
            "activation": tuple(ELEMENTWISE),
            "concept_gate": ("relu", "topk"),
            "mode": MODES,
            "gate": (None, *GATES),
            "steering_rule": RULES,
            "steering_positions": POSITIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(f'"{each}"' for each in allowed if each)
                raise ValueError(f"{name} must be one of {listed}, got {getattr(self, name)!r}.")
        if not self.concepts or not all(isinstance(name, str) and name for name in self.concepts):
            raise ValueError(f"concepts must hold at least one name, each not empty, got {self.concepts!r}.")
        if len(set(self.concepts)) < len(self.concepts):
            raise ValueError(f"concepts must differ, got {self.concepts!r}.")
        if unknown := sorted(set(self.default_steering or {}) - set(self.concepts)):
            raise ValueError(f"default_steering must name concepts of the adapter, {self.concepts}, got {unknown}.")

    def _check_numbers(self) -> None:
        assert isinstance(self.layers, list)
        if not self.layers or not all(isinstance(i, int) and not isinstance(i, bool) for i in self.layers):
            raise ValueError(f"layers must hold at least one block index, got {self.layers!r}.")
        if not (isinstance(self.norm_eps, (int, float)) and math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise ValueError(f"norm_eps must be finite and not negative, got {self.norm_eps}.")
        for name, value, most in (("n_latents", self.n_latents, MAX_LATENTS), ("k", self.k, MAX_LATENTS)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
                raise ValueError(f"{name} must lie in [1, {most}], got {value!r}.")
        if len(self.concepts) > MAX_CONCEPTS:
            raise ValueError(f"concepts must be at most {MAX_CONCEPTS}, got {len(self.concepts)}.")
        if self.n_latents is not None:
            self._check_latents(self.n_latents)
        taus = self.gate_threshold.values() if isinstance(self.gate_threshold, dict) else [self.gate_threshold]
        if any(tau is not None and not math.isfinite(tau) for tau in taus):
            raise ValueError(f"gate_threshold must be finite, got {self.gate_threshold}.")
        if self.gate == "threshold" and self.gate_threshold is None:
            raise ValueError('gate_threshold must be given for gate="threshold"; `calibrate` measures it.')
        if self.compact and (self.mode == "reconstruct" or self.gate == "topk"):
            raise ValueError(
                'mode="reconstruct" and gate="topk" need all latents, and a compact adapter holds its concepts only. '
                "Load the full adapter."
            )

    def _check_latents(self, n: int) -> None:
        if n < len(self.concepts):
            raise ValueError(f"n_latents must be at least the number of concepts {len(self.concepts)}, got {n}.")
        if self.k is not None and self.k > n - self.always_kept:
            of = "the latents that are not concepts" if self.always_kept else "the number of latents"
            raise ValueError(f"k must lie in [1, {n - self.always_kept}] ({of}), got {self.k}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; a model card that peft has just left blank there is filled in."""
        super().save_pretrained(save_directory, **kwargs)
        if (Path(save_directory) / "README.md").is_file():
            from .card import write_card

            write_card(self, Path(save_directory))

    @property
    def always_kept(self) -> int:
        """How many of the first latents bypass TopK."""
        return len(self.concepts) if self.concept_gate == "relu" and self.activation != "relu" else 0

    @property
    def kept(self) -> int:
        """k, once `n_latents` is known: without a selection, all latents."""
        assert self.n_latents is not None
        return self.n_latents if self.activation == "relu" else self.k or 0

    @property
    def own_gate(self) -> Gate:
        """What decides in the coder itself whether a concept is on."""
        if self.concept_gate == "topk" and self.activation != "relu":
            return "topk"
        return "relu" if ELEMENTWISE[self.activation] == "relu" else "open"

    @property
    def resolved_gate(self) -> Gate:
        """The gate of residual steering: as asked for, else the coder's own where that needs no full encoding."""
        if self.gate is not None:
            return self.gate  # type: ignore[return-value]
        return "relu" if self.own_gate == "topk" else self.own_gate

    def fill_sizes(self, hidden_size: int) -> None:
        """Set what follows from the model's hidden size.

        Raises:
            ValueError: the adapter was made for another hidden size, or its sizes do not fit each other.
        """
        if self.hidden_size not in (None, hidden_size):
            raise ValueError(
                f"hidden_size of the adapter is {self.hidden_size}, but the model's is {hidden_size}: "
                "it was trained for another model."
            )
        self.hidden_size = hidden_size
        if self.n_latents is None:
            self.n_latents = max(LATENTS_PER_DIMENSION * hidden_size, len(self.concepts) + 1)
        if self.k is None:
            self.k = max(1, min(self.n_latents // LATENTS_PER_KEPT, self.n_latents - self.always_kept))
        self._check_latents(self.n_latents)

    def threshold_at(self, layer: int) -> float | None:
        """The threshold tau of one layer."""
        return self.gate_threshold.get(layer) if isinstance(self.gate_threshold, dict) else self.gate_threshold

    def concept_settings(self, layer: int) -> ConceptSettings:
        """How one layer reads and steers.

        Raises:
            ValueError: the gate "threshold" is asked for, and this layer has none.
        """
        gate, tau = self.resolved_gate, self.threshold_at(layer)
        if gate == "threshold" and tau is None:
            raise ValueError(f"gate_threshold must hold layer {layer}, got {self.gate_threshold}.")
        return ConceptSettings(
            concepts=tuple(self.concepts),
            activation=ELEMENTWISE[self.activation],  # type: ignore[arg-type]
            gate=gate,
            gate_threshold=tau,
            normalize=self.normalize,
            norm_eps=self.norm_eps,
            rule=self.steering_rule,  # type: ignore[arg-type]
            mode=self.mode,  # type: ignore[arg-type]
            positions=self.steering_positions,  # type: ignore[arg-type]
            skip_first_token=self.skip_first_token,
        )


def _checked_steering(steering: Mapping[str, Any]) -> dict[str, Any]:
    """Strengths by concept, with integers for layers, which JSON turns into strings."""
    checked: dict[str, Any] = {}
    for concept, strength in steering.items():
        by_layer = isinstance(strength, Mapping)
        checked[concept] = {int(layer): each for layer, each in strength.items()} if by_layer else strength
        for amount in checked[concept].values() if by_layer else [strength]:
            try:
                read_amount(concept, amount, layer=0)
            except ValueError as error:
                raise ValueError(f"default_{error}") from None
    return checked
