"""Scoring: the units of prompts, suppressed one by one in passes of a model, and what comes of it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .configuration_atman import AtManConfig
from .errors_atman import ExplanationInterrupted
from .explanation_atman import Explanation, Target
from .passages_atman import Passage, Suppression
from .prompts_atman import EncodedPrompt
from .routes_atman import Passes
from .unit_factors_atman import UnitFactors
from .units_atman import Unit, split_units

_PROGRESS_DELAY = 3.0  # seconds before a progress bar appears


@dataclass
class Work:
    """One prompt on its way to an explanation."""

    prompt: EncodedPrompt
    passage: Passage
    units: list[Unit]
    target_texts: tuple[str, ...]
    baseline: Tensor | None = None
    readouts: Tensor = field(default_factory=lambda: torch.empty(0))  # [U, M], NaN where not computed yet
    is_coarse: list[bool] | None = None

    def begin(self, baseline: Tensor) -> None:
        if baseline.isnan().any():
            raise ValueError(
                f"The model's logits for the target {self.target_texts} are NaN before anything is suppressed; check "
                "the model's weights and dtype."
            )
        if baseline.isinf().any():
            raise ValueError(
                f"target has a token of probability 0, whose loss nothing can raise: {self.target_texts} have the "
                f"read-outs {baseline.tolist()}."
            )
        self.baseline = baseline.cpu()
        self.readouts = torch.full((len(self.units), len(baseline)), torch.nan, dtype=self.baseline.dtype)

    def is_open(self) -> list[bool]:
        return self.readouts.isnan().any(1).tolist()

    def record(self, index: int, readouts: Tensor, untouched: int) -> None:
        """Keep a unit's read-outs [M]; the first few, of rows that never see it, are the plain ones."""
        if readouts.isnan().any():
            raise ValueError(
                f"The model's logits are NaN when the unit {self.units[index].text!r} is suppressed; check the model's "
                "dtype, or use a factor nearer to 1."
            )
        assert self.baseline is not None
        self.readouts[index] = torch.cat([self.baseline[:untouched], readouts.cpu()[untouched:]])

    def refine(self, fine: Sequence[Unit], keep: int) -> None:
        """Replace the best coarse units by the fine ones inside them."""
        assert self.baseline is not None
        gains = (self.baseline - self.readouts).sum(1)
        best = set(gains.topk(min(keep, len(self.units))).indices.tolist())
        inside = {column for index in best for column in self.units[index].columns}
        kept = [(unit, self.readouts[index], True) for index, unit in enumerate(self.units) if index not in best]
        unknown = torch.full_like(self.baseline, torch.nan)
        kept += [(unit, unknown, False) for unit in fine if set(unit.columns) <= inside]
        kept.sort(key=lambda each: each[0].columns[0])
        self.units = [unit for unit, _, _ in kept]
        self.readouts = torch.stack([readouts for _, readouts, _ in kept])
        self.is_coarse = [is_coarse for _, _, is_coarse in kept]

    def explanation(self, config: AtManConfig) -> Explanation:
        assert self.baseline is not None
        texts, ids = self.target_texts, self.passage.target_ids
        targets = tuple(Target(text=text, id=index) for text, index in zip(texts, ids, strict=True))
        found = Explanation(
            scores=(self.baseline - self.readouts).T,
            units=tuple(self.units),
            targets=targets,
            baseline_logprobs=self.baseline,
            prompt=self.prompt.text,
            prompt_ids=self.prompt.input_ids,
            tokens=self.prompt.tokens,
            config=replace(config, postprocess="none", target_granularity="token", normalize=False).to_dict(),
            is_coarse=None if self.is_coarse is None else tuple(self.is_coarse),
            grids=tuple(image.grid for image in self.prompt.images),
            special=self.prompt.special,
        )
        if config.postprocess != "none":
            found = found.absolute() if config.postprocess == "absolute" else found.squared()
        if config.target_granularity == "complete":
            found = found.total()
        return found.normalized() if config.normalize else found


def split_prompt(
    prompt: EncodedPrompt,
    config: AtManConfig,
    processor: Any,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    chunks: Sequence[Sequence[int]] | None = None,
    granularity: str | None = None,
) -> list[Unit]:
    """Cut a prompt as the settings say; `granularity` goes before theirs, whose "auto" gives the coarse units."""
    has_patches_only = config.sites == ("vision",)
    if has_patches_only and (spans is not None or chunks is not None):
        raise ValueError('spans and chunks are units of text; with sites=("vision",) all units are patches, see tiles.')
    if granularity is None:
        granularity = _coarse_granularity(prompt, config) if config.granularity == "auto" else config.granularity
    return split_units(
        prompt,
        granularity=granularity,
        delimiter=config.delimiter,
        spans=spans,
        chunks=chunks,
        overlap=config.overlap,
        units="image" if has_patches_only else config.units,
        tiles=config.tiles,
        include_special=config.include_special or has_patches_only,
        exclude=config.exclude,
        tokenizer=getattr(processor, "tokenizer", processor),
    )


def _coarse_granularity(prompt: EncodedPrompt, config: AtManConfig) -> str:
    """Paragraphs, if there are several; else sentences, if there are; else tokens. Sentences, too, to cut an image."""
    if prompt.images and (config.units == "image" or config.sites == ("vision",)):
        return "sentence"
    for granularity in ("paragraph", "sentence"):
        if prompt.spans is not None and len(split_units(prompt, granularity=granularity, units="text")) > 1:
            return granularity
    return "sentence" if prompt.images and prompt.spans is not None else "token"


@contextlib.contextmanager
def progress(work: Sequence[Work], config: AtManConfig) -> Iterator[Any]:
    """A progress bar over all units. An interruption from the keyboard hands on what was computed until then."""
    total = sum(len(each.units) for each in work)
    shows = None if config.show_progress is None else not config.show_progress
    delay = _PROGRESS_DELAY if config.show_progress is None else 0.0
    try:
        with logging.tqdm(total=total, desc="AtMan", unit="unit", disable=shows, delay=delay, leave=False) as bar:
            yield bar
    except KeyboardInterrupt:
        partial = [each.explanation(config) for each in work if each.baseline is not None]
        raise ExplanationInterrupted(partial) from None


def score(group: Sequence[Work], passes: Passes, config: AtManConfig, processor: Any, bar: Any) -> None:
    """Score all units of a few prompts; with `granularity="auto"` the best of them again, token by token."""
    for each, baseline in zip(group, passes.baseline, strict=True):
        each.begin(baseline)
    _score_open(group, passes, config, bar)
    if config.granularity == "auto":
        single = replace(config, tiles=None)  # tiles are what the first round was about
        for each in group:
            each.refine(split_prompt(each.prompt, single, processor, granularity="token"), config.keep)
            if not bar.disable:
                bar.total += sum(each.is_open())
        _score_open(group, passes, config, bar)


def _score_open(group: Sequence[Work], passes: Passes, config: AtManConfig, bar: Any) -> None:
    items: list[Suppression] = []
    places: list[tuple[Work, int, int]] = []
    for number, each in enumerate(group):
        embeds = passes.embeds(number)
        factors = UnitFactors(each.units, embeds, each.prompt.images, config)
        for index in (index for index, is_open in enumerate(each.is_open()) if is_open):
            start = factors.start(index)
            untouched = max(0, start - each.passage.first_row) if passes.is_causal else 0
            if start < len(embeds):
                items.append(Suppression(number, _Later(factors, index), start))
                places.append((each, index, untouched))
            else:
                each.record(index, passes.baseline[number], untouched)  # every factor is 1
                bar.update()
    for item, readouts in passes.run(items):
        each, index, untouched = places[item]
        each.record(index, readouts, untouched)
        bar.update()


@dataclass(frozen=True)
class _Later:
    factors: UnitFactors
    index: int

    def __call__(self) -> Tensor:
        return self.factors.row(self.index)
