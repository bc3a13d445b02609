"""Settings of a training run."""

import math
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .labels import LabelLevel

_FREE_TO_CHANGE = frozenset(
    {
        "eval_steps",
        "harvest_batch_size",
        "log_steps",
        "output_dir",
        "progress_bar",
        "save_steps",
        "save_total_limit",
        "shard_tokens",
        "store_dir",
    }
)


@dataclass(frozen=True)
class ScarTrainingArguments:
    """How the coders of an adapter are trained.

    The defaults are those of the SCAR paper, arXiv 2411.07122; whatever goes beyond it is off. The paper's learning
    rate and number of epochs are meant for a hundred thousand texts; small data wants a larger rate.
    """

    output_dir: str | Path
    """Folder of the checkpoints and, unless told otherwise, of the activations."""

    _: KW_ONLY

    store: Literal["disk", "stream"] = "disk"
    """`"disk"`: activations are computed once and kept. `"stream"`: they go from the model into a buffer in memory,
    and are computed again in each epoch; needs `max_steps`."""

    store_dir: str | Path | None = None
    """Folder of the activations, visible to all processes. None: `activations` in `output_dir`."""

    harvest_batch_size: int = 16
    """Texts per forward pass of the language model. Changes memory and speed; activations only by rounding."""

    max_length: int = 512
    """Longer texts are cut to so many tokens."""

    drop_sink_tokens: bool = True
    """Leave out the tokens that the tokenizer adds and the first token of each text, whose activation is huge and tells
    nothing about the text. The original trained on them."""

    shard_tokens: int = 65536
    """Rows per file of the store; a killed harvest loses at most so many."""

    label_level: LabelLevel = "sequence"
    """What a label is about: the text, its tokens, or spans of its characters."""

    label_threshold: float = 0.5
    """From where a float label counts as positive."""

    soft_labels: bool = False
    """Keep float labels in [0, 1] as targets instead."""

    unlabelled_as_negative: bool = False
    """Count a missing label (-1 or None) as 0, as the original did. Off: such tokens train the reconstruction only."""

    num_epochs: float = 100.0
    """Passes over the training rows; may be a fraction."""

    max_steps: int | None = None
    """Number of steps; overrides `num_epochs`."""

    batch_tokens: int = 2048
    """Rows per step over all processes; a multiple of their number."""

    buffer_tokens: int = 1 << 18
    """Rows in the memory of a process. From a store, one half is shuffled together while the other half is read."""

    learning_rate: float = 1e-5
    """Of Adam, with its usual moments and no weight decay."""

    warmup_steps: int = 0
    """The learning rate rises linearly over so many first steps."""

    lr_decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to 0 after the warm-up."""

    max_grad_norm: float | None = 1.0
    """Longer gradients are scaled down to this norm, each layer's coder by itself. None: never."""

    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients travel between processes. `"bfloat16"`, on GPUs, halves the traffic and rounds."""

    concept_weight: float = 1.0
    """Weight of the labels beside the reconstruction. 0 trains an unsupervised coder, for comparison."""

    pos_weight: float = 1.0
    """Weight of positive labels in the concept loss; the reconstruction is left alone."""

    balance_classes: bool = False
    """Multiply `pos_weight` by negatives / positives of each concept, so that both classes weigh the same."""

    auxk: int = 0
    """So many dead latents per row also reconstruct what the others left over. 0: off."""

    auxk_weight: float = 1 / 32
    """Weight of that loss."""

    dead_after_tokens: int = 1 << 20
    """A latent that was 0 on so many rows in succession is dead."""

    unit_norm_decoder: bool = False
    """Scale the decoder's columns to norm 1 after every step."""

    validation_share: float = 0.1
    """Share of the texts that is held out, unless an evaluation set is given. 0: none."""

    eval_steps: int | None = None
    """Validate after every so many steps. None: every 5 epochs. The last step is always validated."""

    log_steps: int = 50
    """Average the losses over so many steps for the log."""

    save_steps: int | None = 1000
    """Write a checkpoint every so many steps, and one at the end. None: never."""

    save_total_limit: int = 2
    """Keep so many of the latest checkpoints."""

    seed: int = 0
    """Of the order of the rows."""

    progress_bar: bool = True
    """Show progress and the size of the store."""

    def __post_init__(self) -> None:
        self._check_choices()
        counts = ("harvest_batch_size", "max_length", "shard_tokens", "batch_tokens", "buffer_tokens", "log_steps")
        for name in (*counts, "save_total_limit", "dead_after_tokens"):
            _check(name, getattr(self, name), "be at least 1", getattr(self, name) >= 1)
        for name in ("max_steps", "eval_steps", "save_steps"):
            value = getattr(self, name)
            _check(name, value, "be None or at least 1", value is None or value >= 1)
        for name in ("warmup_steps", "auxk"):
            _check(name, getattr(self, name), "be at least 0", getattr(self, name) >= 0)
        for name in ("concept_weight", "pos_weight", "auxk_weight"):
            value = getattr(self, name)
            _check(name, value, "be at least 0 and finite", value >= 0 and math.isfinite(value))
        for name in ("learning_rate", "num_epochs"):
            value = getattr(self, name)
            _check(name, value, "be positive and finite", value > 0 and math.isfinite(value))
        _check(
            "max_grad_norm",
            self.max_grad_norm,
            "be None or positive",
            self.max_grad_norm is None or self.max_grad_norm > 0,
        )
        _check("label_threshold", self.label_threshold, "lie in [0, 1]", 0 <= self.label_threshold <= 1)
        _check("validation_share", self.validation_share, "lie in [0, 1)", 0 <= self.validation_share < 1)
        if self.store == "stream" and (self.max_steps is None or self.balance_classes):
            raise ValueError(
                'store="stream" needs max_steps and no balance_classes: it cannot count the tokens beforehand.'
            )
        if self.buffer_tokens < self.batch_tokens:
            raise ValueError(
                f"buffer_tokens must be at least batch_tokens ({self.batch_tokens}), got {self.buffer_tokens}."
            )

    def _check_choices(self) -> None:
        choices = {
            "store": ("disk", "stream"),
            "label_level": ("sequence", "token", "span"),
            "lr_decay": ("none", "linear", "cosine"),
            "grad_dtype": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

    def what_shapes_the_weights(self) -> dict[str, Any]:
        """The fields that must be equal when a run is continued."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE_TO_CHANGE}

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        factor = {"none": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[self.lr_decay]
        return self.learning_rate * factor


def _check(name: str, value: Any, rule: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} must {rule}, got {value!r}.")
