"""`AtManConfig`: how strongly, how widely and where attention is suppressed, and how relevance is reported."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Mode = Literal["shift_min", "log_additive", "multiply", "shift_min_all"]
Granularity = Literal["token", "word", "sentence", "paragraph", "delimiter", "auto"]
Postprocess = Literal["none", "absolute", "square"]
Site = Literal["decoder", "encoder", "cross", "vision"]

IMAGE_KAPPA = 0.7
"""Similarity threshold for prompts with images when `kappa` is not given."""


@dataclass(frozen=True, kw_only=True)
class AtManConfig:
    """Settings of an explanation.

    Symbols follow the AtMan paper (Deiseroth et al., 2023, arXiv 2301.08110), but for `factor`, which is the remaining
    share as in the authors' code: the paper multiplies scores by 1 - f.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    factor: float | None = None
    """f: what remains of the attention to a unit. 1 changes nothing, above 1 amplifies. None: 0.1, and 0.01 for
    `mode="log_additive"`, which needs a stronger hand."""

    mode: Mode = "shift_min"
    """How a score s is changed, m being the least score that the row sees. "shift_min": m + (s - m) f.
    "log_additive": s + log f. "multiply": s f, which raises the weight of keys with negative scores.
    "shift_min_all": as the original code, m over future keys too; slower, and no key-value cache is exact under it."""

    granularity: Granularity = "token"
    """What is suppressed at once. "auto": paragraphs or sentences first, then the tokens of the `keep` best."""

    delimiter: str | tuple[str, ...] | None = None
    """Units end with one of these texts; implies `granularity="delimiter"`."""

    overlap: Literal["complete", "partial"] = "complete"
    """Tokens that a character span covers partly: suppressed wholly, or by the covered share."""

    units: Literal["all", "text", "image"] = "all"
    """Which units of a prompt with images are scored."""

    tiles: tuple[int, int] | None = None
    """Rows and columns of image tiles. None: what `granularity` says, every patch for "token"."""

    include_special: bool = False
    """Whether special tokens are units. A first token that everything attends to dominates the others."""

    exclude: tuple[int, ...] = ()
    """Columns (token positions of the prompt) that are in no unit."""

    kappa: float | None = None
    """Cosine similarity of input embeddings from which other columns are suppressed, too. None: no others, and 0.7
    for image units."""

    scale_by_similarity: bool = True
    """Whether similar columns are suppressed in proportion to their similarity, or wholly."""

    max_similar: int | None = None
    """Most columns that are suppressed together with a token, the most similar ones. None: no limit."""

    neighbourhood: int = 0
    """Image patches up to so many rows and columns away are suppressed, too: 1 gives 3 x 3 patches."""

    layers: tuple[int, ...] | None = None
    """Layers in which attention is changed, counted from 0 in every site. None: all."""

    heads: tuple[int, ...] | None = None
    """Query heads in which attention is changed. None: all."""

    sites: tuple[Site, ...] | None = None
    """Which attention is changed. None: the decoder's own of causal and vision-language models, encoder and
    cross-attention of encoder-decoders, the vision encoder of image classifiers."""

    delta: Literal["logprob", "logit"] = "logprob"
    """Relevance is the loss of log-probability (nats), or of the raw logit."""

    temperature: float = 1.0
    """Divides logits before the softmax."""

    target_granularity: Literal["token", "complete"] = "token"
    """One row of scores per target token, or their sum."""

    attribute_target: bool = False
    """Whether target tokens are units, too, for the target tokens after them."""

    postprocess: Postprocess = "none"
    """Applied to every score; the original code squares, which hides the sign."""

    normalize: bool = False
    """Whether every row of scores is mapped to [0, 1]."""

    max_tokens_per_batch: int | None = None
    """Positions computed in one forward pass. Memory and speed only. None: 1024 on CPU, 16384 elsewhere."""

    batch_size: int | None = None
    """Most units scored in one forward pass. Memory and speed only. None: what the token budget allows."""

    max_new_tokens: int = 1
    """Length of the target when none is given."""

    keep: int = 3
    """How many coarse units "auto" looks into."""

    show_progress: bool | None = None
    """None: a progress bar for runs of more than a few seconds, on a terminal or in a notebook."""

    def __post_init__(self) -> None:
        for name in ("delimiter", "tiles", "exclude", "layers", "heads", "sites"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, (str, tuple)):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.sites, str):
            object.__setattr__(self, "sites", (self.sites,))
        for name in ("exclude", "layers", "heads", "tiles"):
            _check_integers(name, getattr(self, name))
        for name in ("layers", "heads", "sites"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} must not be empty, which would change no attention; None means all.")
        if self.delimiter is not None:
            object.__setattr__(self, "granularity", "delimiter")
        self._check_choices()
        check_factor("factor", self.factor)
        if self.kappa is not None and not -1.0 <= self.kappa <= 1.0:
            raise ValueError(f"kappa must lie in [-1, 1] (a cosine similarity), got {self.kappa}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}.")
        if self.neighbourhood < 0:
            raise ValueError(f"neighbourhood must not be negative, got {self.neighbourhood}.")
        for name in ("max_similar", "max_tokens_per_batch", "batch_size", "max_new_tokens", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.tiles is not None and (len(self.tiles) != 2 or min(self.tiles) < 1):
            raise ValueError(f"tiles must be (rows, columns), each at least 1, got {self.tiles}.")
        if self.granularity == "delimiter" and not self.delimiter:
            raise ValueError('granularity="delimiter" needs a delimiter, got none; pass for example delimiter="\\n".')

    def _check_choices(self) -> None:
        choices = {
            "mode": Mode,
            "granularity": Granularity,
            "overlap": Literal["complete", "partial"],
            "units": Literal["all", "text", "image"],
            "delta": Literal["logprob", "logit"],
            "target_granularity": Literal["token", "complete"],
            "postprocess": Postprocess,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}.")
        for site in self.sites or ():
            if site not in get_args(Site):
                raise ValueError(f"sites must be among {get_args(Site)}, got {site!r}.")

    @property
    def suppression_factor(self) -> float:
        """`factor`, or the default of `mode`."""
        if self.factor is not None:
            return self.factor
        return 0.01 if self.mode == "log_additive" else 0.1

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AtManConfig":
        """Build settings from `to_dict`'s result.

        Raises:
            ValueError: a key is unknown.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"AtManConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**settings)


def with_settings(config: AtManConfig | None, settings: dict[str, Any]) -> AtManConfig:
    """Single settings over those of a configuration; over the defaults, if there is none."""
    config = AtManConfig() if config is None else config
    if not isinstance(config, AtManConfig):
        raise ValueError(f"config must be an AtManConfig, got {type(config).__name__}; see AtManConfig.from_dict.")
    return AtManConfig.from_dict({**config.to_dict(), **settings}) if settings else config


def _check_integers(name: str, values: object) -> None:
    if values is not None and not (isinstance(values, tuple) and all(type(value) is int for value in values)):
        raise ValueError(f"{name} must be a list or tuple of integers, got {values!r}.")


def check_factor(name: str, value: float | None) -> None:
    """Refuse factors that are negative, infinite or not a number."""
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative (0 removes, 1 keeps, 2 doubles), got {value!r}.")
