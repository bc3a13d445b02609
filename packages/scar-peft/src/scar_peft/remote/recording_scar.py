"""Concept scores of the tokens that a model reads anyway, without a second pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad as _pad

from .hook_scar import RECORDERS, SteeringHook
from .passes_scar import Pass
from .pooling_scar import POOLINGS, pool
from .steering_scar import steering_layers

Kind = Literal["latent", "pre"]
Pooling = Literal["mean", "max", "last"]


@dataclass(frozen=True, eq=False, repr=False)
class ConceptScores(Mapping[str, Tensor]):
    """Scores of every token for every concept: `scores["toxicity"]` is [B, L] float32."""

    scores: dict[str, Tensor]
    """[B, L] by concept; 0 where `is_scored` is False."""

    is_scored: Tensor
    """[B, L]: False for padding, as far as the model was given a mask, and for tokens that it has not read."""

    def __getitem__(self, concept: str) -> Tensor:
        if concept not in self.scores:
            raise KeyError(f"concept must be one of {sorted(self.scores)}, got {concept!r}.")
        return self.scores[concept]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        rows, columns = self.is_scored.shape
        return f"ConceptScores({', '.join(self.scores)}: {rows} sequences of {columns} tokens)"

    def pooled(self, how: Pooling = "mean", attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """One score per sequence [B]: the mean, the largest or the last over its scored tokens; 0 if there are none.

        Args:
            how: "mean" (the original's sequence score), "max" or "last".
            attention_mask: [B, L], 1 for tokens that count; those that were not scored never do.
        """
        counts = self.is_scored
        if attention_mask is not None:
            if attention_mask.shape != counts.shape:
                raise ValueError(
                    f"attention_mask must have the shape of the scores {tuple(counts.shape)}, "
                    f"got {tuple(attention_mask.shape)}."
                )
            counts = counts & attention_mask.to(counts.device).bool()
        if how not in POOLINGS:
            raise ValueError(f"how must be one of {', '.join(POOLINGS)}, got {how!r}.")
        return {name: pool(scores, counts, how) for name, scores in self.scores.items()}


class _Part(NamedTuple):
    """What one layer has scored in one pass."""

    place: Pass
    scores: Tensor
    """[B, L, C]."""
    is_real: Tensor
    """[B, L]: False for padding."""
    start: int
    """Column of the pass's first token."""


class Recorder:
    """What passes leave behind while `record_scores` is open."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._parts: dict[tuple[int, str], list[_Part]] = {}
        self._names: dict[tuple[int, str], tuple[str, ...]] = {}

    def add(self, layer: SteeringHook, place: Pass, hidden: Tensor) -> None:
        """Keep the scores of one layer in one pass; a block that gradient checkpointing computes again adds nothing."""
        for adapter in layer.adapters_in_use():
            key = (layer.layer_index, adapter)
            self._names[key] = layer.concept_settings(adapter).concepts
            parts = self._parts.setdefault(key, [])
            if parts and parts[-1].place is place:
                continue
            scores = layer.scores(adapter, hidden, self._kind).float()
            mask = place.is_real(scores.shape[1])
            if mask is None or mask.shape != scores.shape[:2]:
                mask = torch.ones(scores.shape[:2], dtype=torch.bool)
            parts.append(_Part(place, scores, mask.to(scores.device), int(place.past)))

    @property
    def ends(self) -> list[int]:
        """The column behind the last token of every pass so far."""
        parts = next(iter(self._parts.values()), [])
        return [part.start + part.scores.shape[1] for part in parts]

    @property
    def scores(self) -> ConceptScores:
        """Mean over layers. Passes that go on from a cache are parts of one sequence, as in `generate`; what a pass
        reads again takes the place of what was found before.

        Raises:
            RuntimeError: nothing has run yet.
            ValueError: the passes had different numbers of rows.
        """
        per_layer = list(self.layers.values())
        is_scored = per_layer[0].is_scored
        found: dict[str, list[Tensor]] = {}
        for scores in per_layer:
            for name, each in scores.items():
                found.setdefault(name, []).append(each.to(is_scored.device))
        return ConceptScores({name: torch.stack(each).mean(0) for name, each in found.items()}, is_scored)

    @property
    def layers(self) -> dict[int, ConceptScores]:
        """Scores by the block's index; adapters that share a concept are averaged."""
        if not self._parts:
            raise RuntimeError("no scores are recorded. Run the model inside `with record_scores(model) as record:`.")
        found: dict[int, ConceptScores] = {}
        for index in sorted({layer for layer, _ in self._parts}):
            columns: dict[str, list[Tensor]] = {}
            for key in [key for key in self._parts if key[0] == index]:
                whole, is_scored = _joined(self._parts[key])
                for concept, name in enumerate(self._names[key]):
                    columns.setdefault(name, []).append(whole[..., concept])
            scores = {name: torch.stack(each).mean(0).where(is_scored, 0.0) for name, each in columns.items()}
            found[index] = ConceptScores(scores, is_scored)
        return found

    def pooled(self, how: Pooling = "mean", attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """`scores.pooled(...)`."""
        return self.scores.pooled(how, attention_mask)

    def reordered(self, rows: list[Tensor], length: int) -> ConceptScores:
        """Scores of the sequences that a search kept, from those of its rows at each pass.

        Args:
            rows: for every pass, which of its rows each kept sequence went through [R]; -1 where it had ended.
            length: tokens of a sequence, the last of which the model has not read.
        """
        for parts in self._parts.values():
            for number, part in enumerate(parts):
                chosen = rows[number].to(part.scores.device)
                row, has_run = chosen.clamp(min=0), (chosen >= 0)[:, None]
                parts[number] = part._replace(scores=part.scores[row], is_real=part.is_real[row] & has_run)
        found = self.scores
        read = min(found.is_scored.shape[1], length - 1)  # an assistant's last guesses may have been read and refused
        scores = {name: _pad(each[:, :read], (0, length - read)) for name, each in found.items()}
        return ConceptScores(scores, _pad(found.is_scored[:, :read], (0, length - read)))


@contextmanager
def record_scores(model: nn.Module, kind: Kind = "latent") -> Iterator[Recorder]:
    """Keep the concept scores of every token that the model reads in the block.

    Args:
        model: any model that holds SCAR layers, a pipeline's model included.
        kind: "latent" (what steering acts on, 0 where the concept is off) or "pre" (before activation and gate: what
            the concept loss is trained on, the better one to rank tokens by).

    Yields:
        A recorder: `.scores["concept"]` [B, L] float32, `.scores.is_scored`, `.pooled("mean")`, `.layers[25]`.

    Example:
        >>> with record_scores(model) as record:
        ...     model(**batch)
        >>> record.scores["scripture"].shape
    """
    if kind not in ("latent", "pre"):
        raise ValueError(f'kind must be "latent" or "pre", got {kind!r}.')
    recorder = Recorder(kind)
    layers = steering_layers(model)
    before = RECORDERS.get()
    token = RECORDERS.set({**before, **{layer: (*before.get(layer, ()), recorder) for layer in layers}})
    for layer in layers:
        layer.refresh()
    try:
        yield recorder
    finally:
        RECORDERS.reset(token)
        for layer in layers:
            layer.refresh()


def _joined(parts: list[_Part]) -> tuple[Tensor, Tensor]:
    """Scores [B, L, C] and which columns hold real tokens [B, L]. A pass replaces all from its first column on."""
    scores, is_real = parts[0].scores[:, :0], parts[0].is_real[:, :0]
    for part in parts:
        if part.start == 0:
            scores, is_real = part.scores, part.is_real
            continue
        if part.scores.shape[0] != scores.shape[0]:
            rows = f"{scores.shape[0]} and {part.scores.shape[0]}"
            raise ValueError(f"passes of one sequence must have the same number of rows, got {rows}.")
        unread = (0, max(0, part.start - scores.shape[1]))
        scores = torch.cat([_pad(scores, (0, 0, *unread))[:, : part.start], part.scores], dim=1)
        is_real = torch.cat([_pad(is_real, unread)[:, : part.start], part.is_real], dim=1)
    return scores, is_real
