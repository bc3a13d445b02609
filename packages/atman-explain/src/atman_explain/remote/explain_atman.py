"""`AtMan` and `explain`: from a prompt and a target to the relevance of every unit of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .configuration_atman import AtManConfig
from .errors_atman import ExplanationInterrupted
from .explanation_atman import Explanation, Target
from .passages_atman import Passage, Readout, Suppression, pack
from .prompts_atman import EncodedPrompt, encode_prompts, encode_targets, token_texts
from .routes_atman import Passes, Router
from .switching_atman import atman_implementation, base_model, evaluation_mode
from .unit_factors_atman import UnitFactors
from .units_atman import Unit, split_units, target_units

_PROGRESS_DELAY = 3.0  # seconds before a progress bar appears


class AtMan:
    """Explains one model, as often as you like.

    A unit's relevance is the loss of the target's log-probability, in nats, when attention to the unit is suppressed:
    positive supports the target, negative speaks against it. Forward passes only; weights and state of the model are
    left as they were.

    Args:
        model: a transformers model with attention; PEFT and `torch.compile` wrappers are looked through.
        processor: its tokenizer, or its processor if it takes images. None: prompts and targets are lists of ids.
        config: settings; see `AtManConfig`.
        **settings: single settings, over those of `config`.

    Raises:
        ValueError: a setting is out of range or unknown.
        UnsupportedModelError: the model's attention cannot be reached.

    Example:
        >>> atman = AtMan(model, tokenizer, granularity="word")
        >>> atman.explain("Oslo is the capital of", target=" Norway").top(1)

    Source: Deiseroth et al. 2023, "AtMan: Understanding Transformer Predictions Through Memory Efficient Attention
    Manipulation", section 3.
    """

    def __init__(
        self, model: nn.Module, processor: Any = None, config: AtManConfig | None = None, **settings: Any
    ) -> None:
        self.model = model
        self.processor = processor
        self.config = _with_settings(config or AtManConfig(), settings)
        self._router = Router(base_model(model))

    def explain(
        self,
        prompt: Any,
        *,
        target: Any = None,
        images: Any = None,
        spans: Sequence[tuple[int, int]] | None = None,
        chunks: Sequence[Sequence[int]] | None = None,
        **settings: Any,
    ) -> Any:
        """Score how much every unit of a prompt supports a target.

        Args:
            prompt: a text, a list of token ids, or what the processor returned; a list of these, a 2-D tensor or a
                padded encoding for several prompts.
            target: text or ids that continue the prompt; for several prompts a list. None: what the model generates
                greedily, at most `max_new_tokens`.
            images: the prompt's image or images; for several prompts a list of those.
            spans: units as character ranges (start, end) of the prompt.
            chunks: units as lists of token positions of the prompt.
            **settings: single settings for this call.

        Returns:
            An `Explanation`; for several prompts a list of them.

        Raises:
            ValueError: bad input; the message names the argument.
            UnsupportedModelError: this model, or this way of explaining it, is not supported.
            ExplanationInterrupted: interrupted from the keyboard; `partial` holds what was computed.
        """
        config = _with_settings(self.config, settings)
        model = self._router.model
        prompts, is_single = encode_prompts(self.processor, prompt, images=images)
        with atman_implementation(model), evaluation_mode(model):
            prompts = self._router.locate_images(prompts)
            if target is None:
                targets = [self._router.generate(each, config.max_new_tokens) for each in prompts]
            else:
                targets = encode_targets(self.processor, target, prompts, is_single)
            passages = [
                Passage(prompt_ids=each.input_ids, target_ids=ids, model_inputs=each.model_inputs)
                for each, ids in zip(prompts, targets, strict=True)
            ]
            units = [self._split(each, config, spans, chunks) for each in prompts]
            work = [_Work(*each, self._texts(each[1])) for each in zip(prompts, passages, units, strict=True)]
            explanations = self._run(work, config)
        return explanations[0] if is_single else explanations

    def _split(
        self,
        prompt: EncodedPrompt,
        config: AtManConfig,
        spans: Sequence[tuple[int, int]] | None,
        chunks: Sequence[Sequence[int]] | None,
        granularity: str | None = None,
    ) -> list[Unit]:
        if granularity is None:
            granularity = _coarse_granularity(prompt) if config.granularity == "auto" else config.granularity
        units = split_units(
            prompt,
            granularity=granularity,
            delimiter=config.delimiter,
            spans=spans,
            chunks=chunks,
            overlap=config.overlap,
            units=config.units,
            tiles=config.tiles,
            include_special=config.include_special,
            exclude=config.exclude,
            tokenizer=getattr(self.processor, "tokenizer", self.processor),
        )
        if not units:
            raise ValueError(
                "prompt has no unit to score: all its tokens are special or excluded; pass include_special=True, or "
                "fewer columns in exclude."
            )
        return units

    def _texts(self, passage: Passage) -> tuple[str, ...]:
        return token_texts(self.processor, passage.target_ids)

    def _run(self, work: Sequence["_Work"], config: AtManConfig) -> list[Explanation]:
        for each in work:
            self._router.check_length(each.passage)
            if config.attribute_target:
                each.units += target_units(
                    each.passage.target_ids, each.target_texts, first_column=len(each.passage.prompt_ids)
                )
        tokens = self._router.token_budget(config)
        total = sum(len(each.units) for each in work)
        shows = None if config.show_progress is None else not config.show_progress
        delay = _PROGRESS_DELAY if config.show_progress is None else 0.0
        bar = tqdm(total=total, desc="AtMan", unit="unit", disable=shows, delay=delay, leave=False)
        try:
            with bar:
                lengths = [each.passage.length for each in work]
                for group in pack(lengths, tokens=tokens):
                    self._run_group([work[index] for index in group], config, tokens, bar)
        except KeyboardInterrupt:
            partial = [each.explanation(config) for each in work if each.baseline is not None]
            raise ExplanationInterrupted(partial) from None
        return [each.explanation(config) for each in work]

    def _run_group(self, group: Sequence["_Work"], config: AtManConfig, tokens: int, bar: Any) -> None:
        readout = Readout(config.delta, config.temperature)
        passes = self._router.open([each.passage for each in group], config, readout, tokens)
        for each, baseline in zip(group, passes.baseline, strict=True):
            each.begin(baseline)
        self._score(group, passes, config, bar)
        if config.granularity == "auto":
            for each in group:
                fine = self._split(each.prompt, config, None, None, granularity="token")
                each.refine(fine, config.keep)
                bar.total += sum(each.is_open())
            self._score(group, passes, config, bar)

    def _score(self, group: Sequence["_Work"], passes: Passes, config: AtManConfig, bar: Any) -> None:
        items: list[Suppression] = []
        places: list[tuple[_Work, int, int]] = []
        for number, each in enumerate(group):
            factors = UnitFactors(each.units, passes.embeds(number), each.prompt.images, config)
            for index, is_open in enumerate(each.is_open()):
                start = factors.start(index) if is_open else each.passage.length
                if is_open and start < passes.embeds(number).shape[0]:
                    items.append(Suppression(number, _Later(factors, index), start))
                    places.append((each, index, start))
                elif is_open:
                    each.readouts[index] = each.baseline  # every factor is 1
                    bar.update()
        for item, readouts in passes.run(items):
            each, index, start = places[item]
            each.record(index, readouts, start if passes.is_causal else 0)
            bar.update()


def explain(
    model: nn.Module,
    processor: Any,
    prompt: Any,
    *,
    target: Any = None,
    images: Any = None,
    config: AtManConfig | None = None,
    **settings: Any,
) -> Any:
    """Score how much every unit of a prompt supports a target; see `AtMan` and `AtMan.explain` for the arguments.

    Example:
        >>> explain(model, tokenizer, "Oslo is the capital of", target=" Norway").top(3)
    """
    own = {name: settings.pop(name) for name in ("spans", "chunks") if name in settings}
    return AtMan(model, processor, config, **settings).explain(prompt, target=target, images=images, **own)


@dataclass(frozen=True)
class _Later:
    factors: UnitFactors
    index: int

    def __call__(self) -> Tensor:
        return self.factors.row(self.index)


@dataclass
class _Work:
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
        self.baseline = baseline.cpu()
        self.readouts = torch.full((len(self.units), len(baseline)), torch.nan, dtype=self.baseline.dtype)

    def is_open(self) -> list[bool]:
        return self.readouts.isnan().any(1).tolist()

    def record(self, index: int, readouts: Tensor, start: int) -> None:
        if readouts.isnan().any():
            raise ValueError(
                f"The model's logits are NaN when the unit {self.units[index].text!r} is suppressed; check the model's "
                "dtype, or use a factor nearer to 1."
            )
        assert self.baseline is not None
        untouched = max(0, start - self.passage.first_row)  # rows before the unit never see it
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


def _coarse_granularity(prompt: EncodedPrompt) -> str:
    """Paragraphs, if there are several; else sentences, if there are; else tokens."""
    for granularity in ("paragraph", "sentence"):
        if prompt.text is not None and len(split_units(prompt, granularity=granularity, units="text")) > 1:
            return granularity
    return "token"


def _with_settings(config: AtManConfig, settings: dict[str, Any]) -> AtManConfig:
    return AtManConfig.from_dict({**config.to_dict(), **settings}) if settings else config
