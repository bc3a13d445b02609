"""`evaluate`: what a SCAR adapter is worth on a labelled dataset."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

from torch import nn

from ..metrics import ce_recovered
from ..training.labels import LabelLevel, rows_of
from .collecting import Collected, collect
from .detection import ConceptEvaluation, Scores, detect, warn_of_single_class
from .language_modeling import CrossEntropies, cross_entropies, predicts_text
from .reconstruction import LatentSample
from .subject import Reading, Subject


@dataclass(frozen=True, kw_only=True)
class LayerEvaluation:
    """One layer's coder. None: the adapter is compact, or it was not asked for."""

    nmse: float | None = None
    """Mean over tokens of mean((y - x)^2) / mean(x^2)."""
    explained_variance: float | None = None
    """Share of the activations' variance that reconstructions explain."""
    l0: float | None = None
    """Mean number of latents that are not 0."""
    dead_fraction: float | None = None
    """Share of latents that are 0 on every token."""
    ce_inserted: float | None = None
    """Cross-entropy of the next token with reconstructions in place of activations, nats per token."""
    ce_ablated: float | None = None
    """The same with the mean activation in their place."""
    ce_recovered: float | None = None
    """(ablated - inserted) / (ablated - clean)."""
    concepts: dict[str, ConceptEvaluation]
    """Detection by this layer's scores."""


@dataclass(frozen=True, kw_only=True)
class ScarEvaluation:
    """What `evaluate` found."""

    texts: int
    """Texts with tokens."""
    tokens: int
    """Their tokens."""
    ce_clean: float | None
    """Cross-entropy of the model without the adapter, nats per token."""
    layers: dict[int, LayerEvaluation]
    """By the block's index."""
    concepts: dict[str, ConceptEvaluation]
    """Detection by the scores' mean over layers, which is what `record_scores` gives."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def to_metrics(self) -> dict[str, Any]:
        """The form of `ScarConfig.metrics`: means over layers, and numbers by concept; what is unknown is left out."""
        names = ("nmse", "explained_variance", "l0", "dead_fraction", "ce_recovered")
        whole = {name: _mean([getattr(layer, name) for layer in self.layers.values()]) for name in names}
        concepts = {name: _known(asdict(each)) for name, each in self.concepts.items()}
        for name, numbers in concepts.items():
            found = _mean([layer.concepts[name].fms for layer in self.layers.values()])
            numbers.update(_known({"fms": found}))
        return {**_known(whole), "concepts": concepts}


def evaluate(
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
    cross_entropy_texts: int = 256,
    monosemanticity_rows: int = 2000,
    monosemanticity_of: Literal["texts", "tokens"] | None = None,
    progress_bar: bool = True,
) -> ScarEvaluation:
    """Measure an adapter on texts that it was not trained on: detection, reconstruction, and what insertion costs.

    Scores are those of `record_scores`. F1 is at the calibrated threshold where `calibrate` has left one; otherwise
    half of the texts, by a hash of their number, choose the threshold and the others are judged. Memory grows by 8
    bytes per token, layer and concept. A compact adapter is judged by its detection only.

    Args:
        model: a model with a SCAR adapter, peft's or any module tree with SCAR layers. Its state is left as it was.
        dataset: rows with a text and labels: a `datasets.Dataset`, a list of dicts or an iterable of dicts.
        text_column: where the text is.
        label_columns: one column per concept in the order of the adapter's concepts, or one column for all. None:
            columns named like the concepts. -1 and None are unlabelled.
        label_level: what a label is about: "sequence", "token" or "span".
        label_threshold: from where a float label counts as positive.
        processing_class: the model's tokenizer. None: loaded from where the model came from.
        adapter_name: which adapter. None: the active one.
        batch_size: texts per forward pass. Changes memory and speed; results only by rounding.
        max_length: longer texts are cut to so many tokens.
        skip_first_token: leave a text's first token, often of huge norm and the same in all classes, out of
            reconstruction and of tokens' detection. Scores of whole texts hold it, as those of `record_scores` do.
        cross_entropy_texts: so many first texts measure the cost of insertion; 0 leaves it out, as do models that
            predict no text.
        monosemanticity_rows: so many first texts, or random tokens, measure FMS@1 with 4 n bytes each; 0: not measured.
        monosemanticity_of: "texts", by the mean of their latents, as in the paper, or "tokens". None: what labels are
            about. Where many latents tell whole texts apart perfectly, FMS is 0.5 for any coder, and tokens say more.
        progress_bar: show progress.

    Raises:
        ValueError: there is no adapter, a column is missing, a label is out of range, or no text has tokens.
        ImportError: scikit-learn, which FMS needs, is missing.

    Example:
        >>> found = evaluate(model, test_texts, label_columns=["toxicity"], processing_class=tokenizer)
        >>> found.concepts["toxicity"].sequence_auroc
        >>> model.peft_config["default"].metrics = found.to_metrics()  # for the model card

    Sources: arXiv 2411.07122 (detection), arXiv 2506.19382 (FMS).
    """
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
    if monosemanticity_of not in (None, "texts", "tokens"):
        raise ValueError(f'monosemanticity_of must be "texts", "tokens" or None, got {monosemanticity_of!r}.')
    if monosemanticity_rows and not subject.config.compact:
        _require_trees()
    rows = rows_of(dataset)
    found = collect(
        subject,
        rows,
        reading,
        skip_first_token=skip_first_token,
        sampled_rows=monosemanticity_rows,
        samples_texts=(monosemanticity_of or ("texts" if label_level == "sequence" else "tokens")) == "texts",
    )
    warn_of_single_class(found.mean_scores, subject.config.concepts)
    losses = None
    if found.statistics and cross_entropy_texts and predicts_text(model):
        losses = _losses(subject, rows, reading, found, cross_entropy_texts, skip_first_token)
    return ScarEvaluation(
        texts=len(found.mean_scores.texts),
        tokens=len(found.mean_scores.pos),
        ce_clean=losses.clean if losses else None,
        layers={i: _layer(subject, found, losses, i, skip_first_token) for i in subject.layers},
        concepts=_concepts(subject, found.mean_scores, skip_first_token, calibrated=True, sample=None),
    )


def _losses(
    subject: Subject, rows: Any, reading: Reading, found: Collected, count: int, skip_first_token: bool
) -> CrossEntropies:
    texts = subject.reader(reading).tokenize(list(islice(rows, count)), subject.tokenizer, reading.max_length)
    return cross_entropies(
        subject,
        [text.input_ids for text in texts],
        {i: each.mean for i, each in found.statistics.items()},
        skip_first_token=skip_first_token,
        batch_size=reading.batch_size,
        progress_bar=reading.progress_bar,
    )


def _layer(
    subject: Subject, found: Collected, losses: CrossEntropies | None, index: int, skip_first_token: bool
) -> LayerEvaluation:
    # Thresholds are calibrated for the mean over layers.
    calibrated, sample = len(subject.layers) == 1, found.samples.get(index)
    concepts = _concepts(subject, found.scores[index], skip_first_token, calibrated, sample)
    numbers: dict[str, float] = {}
    if statistics := found.statistics.get(index):
        names = ("nmse", "explained_variance", "l0", "dead_fraction")
        numbers = {name: getattr(statistics, name) for name in names}
    if losses is not None:
        inserted, ablated = losses.inserted[index], losses.ablated[index]
        recovered = ce_recovered(losses.clean, inserted, ablated)
        numbers.update(ce_inserted=inserted, ce_ablated=ablated, ce_recovered=recovered)
    return LayerEvaluation(concepts=concepts, **numbers)


def _concepts(
    subject: Subject, scores: Scores, skip_first_token: bool, calibrated: bool, sample: LatentSample | None
) -> dict[str, ConceptEvaluation]:
    found = {}
    for c, name in enumerate(subject.config.concepts):
        thresholds = subject.config.calibration.get(name, {}) if calibrated else {}
        held = sample.fms(c) if sample is not None else None
        found[name] = detect(
            scores,
            c,
            thresholds=thresholds,
            skip_first_token=skip_first_token,
            fms=None if held is None else held.fms[1],
        )
    return found


def _require_trees() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            "FMS needs decision trees from scikit-learn: pip install scar-peft[evaluation], "
            "or pass monosemanticity_rows=0."
        )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _known(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if value is not None and not math.isnan(value)}
