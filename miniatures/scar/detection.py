"""An adapter and labelled texts -> how well its latents tell the concepts, and what else in the coder does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

import scar_peft
from miniatures.scar.data import CONCEPTS, LabelledText, as_rows
from scar_peft import ScarConfig
from scar_peft.coder import CoderWeights, latents_of, pre_activations
from scar_peft.evaluation import evaluate
from scar_peft.metrics import fms
from scar_peft.training import LabelReader
from scar_peft.training.activations import ActivationRows, activation_windows

TREE_WORDS, TREE_DEPTH = 6000, 8
"""For the FMS of words: rows to train on and to test on, and depth of the decision tree."""
CROSS_ENTROPY_TEXTS = 48


@dataclass(frozen=True)
class Coded:
    """Words as a coder sees them."""

    latents: Tensor
    """[N, n]."""
    labels: Tensor
    """bool [N, C]."""
    text: Tensor
    """[N], number of the text."""

    def pooled(self) -> Coded:
        """One row per text: the means over its words."""
        texts, index = self.text.unique(return_inverse=True)
        sums = torch.zeros(len(texts), self.latents.shape[1]).index_add_(0, index, self.latents)
        labels = torch.zeros(len(texts), self.labels.shape[1], dtype=torch.bool)
        labels[index] = self.labels
        return Coded(sums / index.bincount()[:, None], labels, texts)

    def sample(self, rows: int) -> Coded:
        """At most so many rows, always the same ones."""
        chosen = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))[:rows]
        return Coded(self.latents[chosen], self.labels[chosen], self.text[chosen])


def read_activations(model: Any, tokenizer: Any, texts: Sequence[LabelledText], layer: int) -> ActivationRows:
    """Run the model over texts up to a block and keep what leaves it, one row per word."""
    reader = LabelReader(concepts=CONCEPTS, columns=CONCEPTS)
    windows = activation_windows(model, tokenizer, as_rows(texts), reader, {layer: model.model.layers[layer]})
    return ActivationRows.cat([rows for _, rows in windows])


@torch.no_grad()
def encode_rows(weights: CoderWeights, config: ScarConfig, rows: ActivationRows, *, selected: bool = True) -> Coded:
    """All latents of all rows; with `selected=False` the pre-activations, before the selection."""
    (acts,) = rows.acts.values()
    form = {"k": config.k, "activation": config.activation, "always": config.always_kept}
    parts = [pre_activations(x, weights, eps=config.norm_eps) for x in acts.float().split(4096)]
    if selected:
        parts = [latents_of(part, **form) for part in parts]
    return Coded(torch.cat(parts), rows.labels == 1, rows.seq_id)


def best_latents(coded: Coded) -> list[int]:
    """For each concept, the latent that ranks its words best; no latent twice."""
    chosen: list[int] = []
    for scores in latent_auroc(coded):
        order = scores.argsort(descending=True).tolist()
        chosen.append(next(latent for latent in order if latent not in chosen))
    return chosen


@torch.no_grad()
def with_first_latents(weights: CoderWeights, chosen: Sequence[int]) -> CoderWeights:
    """The same coder with the chosen latents in front, so that they are read and steered as concepts."""
    order = [*chosen, *(latent for latent in range(len(weights.encoder)) if latent not in set(chosen))]
    return CoderWeights(weights.encoder[order], weights.decoder[:, order], weights.pre_bias, weights.latent_bias[order])


def latent_auroc(coded: Coded) -> Tensor:
    """AUROC of every latent for every concept, float64 [C, n]; equal values count one half."""
    ranks = torch.cat([torch.from_numpy(rankdata(part, axis=0)) for part in coded.latents.split(128, 1)], 1)
    positives = coded.labels.T.double()  # [C, N]
    count = positives.sum(1, keepdim=True)
    return (positives @ ranks - count * (count + 1) / 2) / (count * (len(coded.labels) - count))


def rivals(weights: CoderWeights, config: ScarConfig, train: ActivationRows, test: ActivationRows) -> dict[str, Any]:
    """For each concept, how its latent compares with those that stand for no concept, on held-out text.

    A latent counts in either direction, because it may as well be off where the concept is. The other concepts' latents
    are left out: that of German is of course off in scripture.
    """
    known, seen = encode_rows(weights, config, train), encode_rows(weights, config, test)
    words, texts = latent_auroc(seen), latent_auroc(seen.pooled())
    raw_words = latent_auroc(encode_rows(weights, config, test, selected=False))
    few, many = known.sample(TREE_WORDS), seen.sample(TREE_WORDS)
    found = {}
    for c, concept in enumerate(config.concepts):
        own = [c, *range(len(config.concepts), len(weights.encoder))]
        by_word, by_text, by_raw_word = (
            torch.maximum(each[c], 1 - each[c])[own].sort(descending=True).values for each in (words, texts, raw_words)
        )
        tree = fms(few.latents[:, own], few.labels[:, c], many.latents[:, own], many.labels[:, c], max_depth=TREE_DEPTH)
        found[concept] = {
            "best_latent": float(by_word[0]),
            "second_best": float(by_word[1]),
            "best_latent_pre": float(by_raw_word[0]),
            "second_best_pre": float(by_raw_word[1]),
            "best_latent_sequences": float(by_text[0]),
            "second_best_sequences": float(by_text[1]),
            "stump_accuracy": tree.accs_0,
            "stump_accuracy_without_best": tree.accs_p[1],
            "fms_tokens": tree.fms[1],
        }
    return found


def detection(
    adapted: Any, tokenizer: Any, texts: Sequence[LabelledText], train: ActivationRows, test: ActivationRows
) -> dict[str, Any]:
    """All measures of detection and reconstruction of one adapter.

    Args:
        adapted: model with the full adapter, its dictionary extended by the words of the texts.
        tokenizer: for that dictionary.
        texts: held-out texts in mixed order: the cost of insertion is measured on the first ones.
        train: activations of the texts that the adapter was trained on.
        test: activations of held-out texts.
    """
    measured = evaluate(
        adapted,
        as_rows(texts),
        processing_class=tokenizer,
        cross_entropy_texts=CROSS_ENTROPY_TEXTS,
        progress_bar=False,
    ).to_metrics()
    layer = scar_peft.scar_layers(adapted)[0]
    for concept, found in rivals(layer.weights(), layer.config(), train, test).items():
        measured["concepts"][concept].update(found)
    return measured
