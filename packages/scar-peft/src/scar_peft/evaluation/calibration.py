"""`calibrate`: thresholds and statistics of an adapter's scores, measured once and kept in its configuration."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..training.labels import LabelLevel
from .collecting import collect
from .detection import Scores, best_threshold
from .subject import Reading, Subject

CRITERIA = ("f1", "balanced_accuracy")


def calibrate(
    model: nn.Module,
    dataset: Any,
    *,
    text_column: str = "text",
    label_columns: Sequence[str] | str | None = None,
    label_level: LabelLevel = "sequence",
    label_threshold: float = 0.5,
    processing_class: Any = None,
    adapter_name: str | None = None,
    batch_size: int = 16,
    max_length: int = 512,
    skip_first_token: bool = True,
    criterion: str = "f1",
    progress_bar: bool = True,
) -> dict[str, dict[str, float]]:
    """Measure where an adapter's scores separate the classes, and write that into its configuration.

    Fills `config.calibration` by concept: "threshold" for `record_scores(model).pooled("mean")` (above it, a text is of
    the concept), "token_threshold" for single tokens, and mean and standard deviation of the pooled score in both
    classes: "mean_positive", "std_positive", "mean_negative", "std_negative". Fills `config.gate_threshold` by layer
    with tau, the mean k-th largest pre-activation, for the gate "threshold" (not for compact adapters and the
    activation "relu", which select nothing). `save_pretrained` keeps all of it.

    Args:
        model: a model with a SCAR adapter.
        dataset: labelled texts that the adapter was not trained on; see `evaluate`, also for what follows.
        text_column: see `evaluate`.
        label_columns: see `evaluate`.
        label_level: see `evaluate`.
        label_threshold: see `evaluate`.
        processing_class: see `evaluate`.
        adapter_name: see `evaluate`.
        batch_size: see `evaluate`.
        max_length: see `evaluate`.
        skip_first_token: leave first tokens out of tau and of the token threshold.
        criterion: what thresholds maximize: "f1" or "balanced_accuracy".
        progress_bar: show progress.

    Returns:
        The new `config.calibration`.

    Raises:
        ValueError: as `evaluate`; the criterion is unknown; a concept has one class only.

    Example:
        >>> calibrate(model, validation_texts, label_columns=["toxicity"], processing_class=tokenizer)
        >>> model.save_pretrained("adapter")
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {list(CRITERIA)}, got {criterion!r}.")
    subject = Subject.of(model, processing_class, adapter_name)
    reading = Reading(
        text_column=text_column,
        label_columns=label_columns,
        label_level=label_level,
        label_threshold=label_threshold,
        batch_size=batch_size,
        max_length=max_length,
        progress_bar=progress_bar,
    )
    config = subject.config
    collected = collect(subject, dataset, reading, skip_first_token=skip_first_token)
    scores = collected.mean_scores
    found = {name: _calibration(scores, c, name, criterion, skip_first_token) for c, name in enumerate(config.concepts)}
    config.calibration = copy.deepcopy(found)
    if collected.statistics and config.activation != "relu":
        config.gate_threshold = {i: each.mean_kth for i, each in collected.statistics.items()}
    return found


def _calibration(scores: Scores, concept: int, name: str, criterion: str, skip_first_token: bool) -> dict[str, float]:
    labels, pooled = scores.sequence_labels()[:, concept], scores.pooled("mean")[:, concept]
    if not ((labels == 1).any() and (labels == 0).any()):
        raise ValueError(f"labels of {name!r} must hold texts of both classes to calibrate its scores.")
    used = scores.labels[:, concept] >= 0
    if skip_first_token and (used & (scores.pos > 0)).any():
        used = used & (scores.pos > 0)
    tokens, token_labels = scores.latent[used, concept], scores.labels[used, concept]
    known = labels >= 0
    return {
        "threshold": best_threshold(pooled[known], labels[known], criterion).threshold,
        "token_threshold": best_threshold(tokens, token_labels, criterion).threshold,
        **_moments(pooled[labels == 1], "positive"),
        **_moments(pooled[labels == 0], "negative"),
    }


def _moments(values: Tensor, name: str) -> dict[str, float]:
    """Mean and unbiased standard deviation; that of a single value is 0."""
    wide = values.double()
    std = wide.std() if len(wide) > 1 else torch.zeros(())
    return {f"mean_{name}": float(wide.mean()), f"std_{name}": float(std)}
