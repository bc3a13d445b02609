"""An independent judge of text: naive Bayes over words and character n-grams, trained on pages of its own."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

WORD = re.compile(r"[^\W\d_]+")
NGRAMS = (1, 2, 3, 4)
SMOOTHING = 0.1


class Judge:
    """Tells which of several groups a short text belongs to."""

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Count features in the texts of each group."""
        self.groups = tuple(texts)
        counts = [Counter(feature for text in texts[group] for feature in features(text)) for group in self.groups]
        vocabulary = set().union(*counts)
        totals = [sum(count.values()) + SMOOTHING * len(vocabulary) for count in counts]
        self._log_probabilities = {
            feature: tuple(
                math.log((count[feature] + SMOOTHING) / total) for count, total in zip(counts, totals, strict=True)
            )
            for feature in vocabulary
        }

    def log_likelihoods(self, text: str) -> dict[str, float]:
        """Group -> log-likelihood of the text; features that no group has are left out."""
        sums = [0.0] * len(self.groups)
        for feature in features(text):
            for i, value in enumerate(self._log_probabilities.get(feature, ())):
                sums[i] += value
        return dict(zip(self.groups, sums, strict=True))

    def group_of(self, text: str) -> str | None:
        """The likeliest group; None for a text without a known feature."""
        found = self.log_likelihoods(text)
        return max(found, key=lambda group: found[group]) if any(found.values()) else None

    def shares(self, texts: Sequence[str]) -> dict[str, float]:
        """Group -> share of the texts that are told to be of it."""
        told = Counter(self.group_of(text) for text in texts)
        return {group: told[group] / len(texts) for group in self.groups}


def features(text: str) -> Iterator[str]:
    """Words as they are written, and runs of one to four characters of each word with its borders."""
    for word in WORD.findall(text):
        yield f"={word}"
        bordered = f" {word} "
        for length in NGRAMS:
            for start in range(len(bordered) - length + 1):
                yield bordered[start : start + length]
