"""Concept scores of a labelled dataset, and how well they detect the concepts."""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..metrics import Threshold, auroc, best_balanced_threshold, best_f1_threshold, f1_score
from ..training.activations import ActivationRows
from ..training.sampler import is_held_out

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class ConceptEvaluation:
    """How well scores detect one concept. NaN: one class is missing."""

    token_auroc: float
    """Latents of single tokens; the first of a text left out, unless asked for."""
    token_auroc_pre: float
    """The same by pre-activations, which also rank tokens on which the concept is off."""
    token_f1: float
    """Latents above `token_threshold`."""
    token_threshold: float
    """From calibration; else chosen on half of the texts, and F1 is that of the others."""
    sequence_auroc: float
    """Mean latent of a text, all tokens: `record_scores(...).pooled("mean")`."""
    sequence_auroc_max: float
    """Greatest latent of a text."""
    sequence_auroc_last: float
    """Latent of a text's last token."""
    sequence_f1: float
    """Mean latents above `sequence_threshold`."""
    sequence_threshold: float
    """As `token_threshold`."""
    positive_texts: int
    """Texts of the concept, of those that are labelled."""
    negative_texts: int
    """Texts without it."""
    fms: float | None = None
    """FMS@1, of single layers only."""


@dataclass
class ScoreTable:
    """Scores of all tokens of a dataset: 8 bytes per token, layer and concept."""

    latent: list[Tensor] = field(default_factory=list)
    """[N, C] float32."""
    pre: list[Tensor] = field(default_factory=list)
    """[N, C] float32."""
    labels: list[Tensor] = field(default_factory=list)
    """[N, C] int8, -1 where unlabelled."""
    seq_id: list[Tensor] = field(default_factory=list)
    """[N], number of the text."""
    pos: list[Tensor] = field(default_factory=list)
    """[N], position in the text."""

    def add(self, latent: Tensor, pre: Tensor, rows: ActivationRows) -> None:
        """Append the scores of some rows."""
        for column, values in zip(
            (self.latent, self.pre, self.labels, self.seq_id, self.pos),
            (latent, pre, rows.labels, rows.seq_id, rows.pos),
            strict=True,
        ):
            column.append(values)

    def merged(self) -> "Scores":
        """The whole table.

        Raises:
            ValueError: no text had a token.
        """
        if not self.latent:
            raise ValueError("dataset must hold at least one text with tokens, got none.")
        columns = (self.latent, self.pre, self.labels, self.seq_id, self.pos)
        latent, pre, labels, seq_id, pos = (torch.cat(each) for each in columns)
        order = (seq_id.long() * (int(pos.max()) + 1) + pos).argsort()
        return Scores(latent[order], pre[order], labels[order], seq_id[order], pos[order])


@dataclass(frozen=True)
class Scores:
    """A finished `ScoreTable`, in the order of texts and of tokens in them."""

    latent: Tensor
    pre: Tensor
    labels: Tensor
    seq_id: Tensor
    pos: Tensor

    @property
    def texts(self) -> Tensor:
        """Numbers of the texts, ascending [S]."""
        return self.seq_id.unique()

    def pooled(self, how: str) -> Tensor:
        """One latent per text and concept [S, C]: "mean", "max" or "last"."""
        _, index = self.seq_id.unique(return_inverse=True)
        if how == "last":
            ends = torch.cat([index[1:] != index[:-1], torch.ones(1, dtype=torch.bool)])
            return self.latent[ends]
        reduce = {"mean": "mean", "max": "amax"}[how]
        shape = (int(index[-1]) + 1, self.latent.shape[1])
        start = self.latent.new_zeros(shape)
        index = index[:, None].expand_as(self.latent)
        return start.scatter_reduce(0, index, self.latent, reduce, include_self=False)

    def sequence_labels(self) -> Tensor:
        """A text is positive if any of its tokens is, unlabelled if all are [S, C]."""
        _, index = self.seq_id.unique(return_inverse=True)
        start = torch.full((int(index[-1]) + 1, self.labels.shape[1]), -1, dtype=self.labels.dtype)
        return start.scatter_reduce(0, index[:, None].expand_as(self.labels), self.labels, "amax")


def mean_over_layers(parts: list[Scores]) -> Scores:
    """Scores as `record_scores` gives them for an adapter of several layers."""
    latent, pre = (torch.stack([getattr(each, name) for each in parts]).mean(0) for name in ("latent", "pre"))
    first = parts[0]
    return Scores(latent, pre, first.labels, first.seq_id, first.pos)


def detect(
    scores: Scores, concept: int, *, thresholds: dict[str, float], skip_first_token: bool, fms: float | None = None
) -> ConceptEvaluation:
    """Evaluate one concept.

    Args:
        scores: of the dataset.
        concept: its number.
        thresholds: from calibration: "threshold" of sequences, "token_threshold"; may be empty.
        skip_first_token: leave out tokens at position 0 where tokens are judged.
        fms: what is known already.
    """
    used = scores.pos > 0 if skip_first_token else torch.ones_like(scores.pos, dtype=torch.bool)
    token = _Labelled(scores.latent[used, concept], scores.labels[used, concept], scores.seq_id[used])
    pre = _Labelled(scores.pre[used, concept], scores.labels[used, concept], scores.seq_id[used])
    labels = scores.sequence_labels()[:, concept]
    mean, largest, last = (
        _Labelled(scores.pooled(how)[:, concept], labels, scores.texts) for how in ("mean", "max", "last")
    )
    token_threshold, token_f1 = token.f1(thresholds.get("token_threshold"))
    sequence_threshold, sequence_f1 = mean.f1(thresholds.get("threshold"))
    return ConceptEvaluation(
        token_auroc=token.auroc(),
        token_auroc_pre=pre.auroc(),
        token_f1=token_f1,
        token_threshold=token_threshold,
        sequence_auroc=mean.auroc(),
        sequence_auroc_max=largest.auroc(),
        sequence_auroc_last=last.auroc(),
        sequence_f1=sequence_f1,
        sequence_threshold=sequence_threshold,
        positive_texts=int((labels == 1).sum()),
        negative_texts=int((labels == 0).sum()),
        fms=fms,
    )


class _Labelled:
    """Scores with a label of one concept, and to which text they belong."""

    def __init__(self, scores: Tensor, labels: Tensor, texts: Tensor) -> None:
        known = labels >= 0
        self.scores, self.labels, self.texts = scores[known], labels[known], texts[known]

    def auroc(self) -> float:
        if not self._has_both(self.labels):
            return NAN
        return auroc(self.scores, self.labels)

    def f1(self, threshold: float | None) -> tuple[float, float]:
        """Threshold and F1; without a threshold, half of the texts choose it and the others are judged."""
        if threshold is not None:
            return threshold, f1_score(self.scores, self.labels, threshold) if self._has_both(self.labels) else NAN
        chooses = is_for_fitting(self.texts)
        if not self._has_both(self.labels[chooses]) or not self._has_both(self.labels[~chooses]):
            return NAN, NAN
        threshold = best_threshold(self.scores[chooses], self.labels[chooses], "f1").threshold
        return threshold, f1_score(self.scores[~chooses], self.labels[~chooses], threshold)

    @staticmethod
    def _has_both(labels: Tensor) -> bool:
        return bool((labels == 1).any() and (labels == 0).any())


def best_threshold(scores: Tensor, labels: Tensor, criterion: str) -> Threshold:
    """The threshold that is best by "f1" or "balanced_accuracy"."""
    return best_f1_threshold(scores, labels) if criterion == "f1" else best_balanced_threshold(scores, labels)


def is_for_fitting(texts: Tensor) -> Tensor:
    """Which texts choose thresholds and fit trees: half of them, by a hash of their number [N] -> bool [N].

    Not by their parity: datasets often alternate between classes.
    """
    numbers, index = texts.unique(return_inverse=True)
    return torch.tensor([is_held_out(int(number), 0.5) for number in numbers], dtype=torch.bool)[index]


def warn_of_single_class(scores: Scores, concepts: list[str]) -> None:
    """Warn of concepts that have one class only."""
    labels = scores.labels
    for c, concept in enumerate(concepts):
        if not ((labels[:, c] == 1).any() and (labels[:, c] == 0).any()):
            warnings.warn(f"labels of {concept!r} hold one class only: its AUROC and F1 are nan.", stacklevel=4)
