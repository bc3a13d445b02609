"""One pass over a labelled dataset: concept scores of all tokens, and statistics of the coders."""

from dataclasses import dataclass
from typing import Any

from .detection import Scores, ScoreTable, mean_over_layers
from .reconstruction import CoderStatistics, LatentSample
from .subject import Reading, Subject


@dataclass(frozen=True)
class Collected:
    """What the pass has found, by layer."""

    scores: dict[int, Scores]
    statistics: dict[int, CoderStatistics]
    """Empty for a compact adapter, and where no token was counted."""
    samples: dict[int, LatentSample]
    """Empty unless asked for."""

    @property
    def mean_scores(self) -> Scores:
        """Scores as `record_scores` gives them."""
        return mean_over_layers(list(self.scores.values()))


def collect(
    subject: Subject,
    dataset: Any,
    reading: Reading,
    *,
    skip_first_token: bool,
    sampled_rows: int = 0,
    samples_texts: bool = True,
) -> Collected:
    """Run the model on the dataset.

    Args:
        subject: adapter and model.
        dataset: rows with a text and labels.
        reading: how they are read.
        skip_first_token: keep each text's first token out of statistics and samples; it always has scores.
        sampled_rows: keep all latents of so many texts or tokens.
        samples_texts: texts, by the mean over their tokens; else tokens.

    Raises:
        ValueError: no text has tokens, or what reading raises.
    """
    layers, config = subject.layers, subject.config
    is_whole = not config.compact
    tables = {i: ScoreTable() for i in layers}
    statistics = {i: CoderStatistics(layers[i].weights(subject.adapter), config) for i in layers if is_whole}
    samples = {i: LatentSample(sampled_rows, samples_texts) for i in layers if is_whole and sampled_rows}
    for window in subject.windows(dataset, reading):
        for i, acts in window.acts.items():
            tables[i].add(subject.scores(i, acts, "latent"), subject.scores(i, acts, "pre"), window)
        counted = window.take(window.pos > 0) if skip_first_token else window
        for i, each in statistics.items():
            each.add(counted, i, samples.get(i))
    has_rows = any(each.rows for each in statistics.values())
    scores = {i: table.merged() for i, table in tables.items()}
    return Collected(scores, statistics if has_rows else {}, samples if has_rows else {})
