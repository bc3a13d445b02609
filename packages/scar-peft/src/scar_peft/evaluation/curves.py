"""`steering_curve`: what strengths do to generated texts, by a measure that knows nothing of the adapter."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from ..contexts import evaluation_mode, input_device
from ..layer import scar_layers
from ..remote.steering_scar import steering
from .language_modeling import token_losses
from .subject import Subject, base_model

Measure = Callable[[list[str]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class SteeringPoint:
    """What one strength does; means over prompts."""

    strength: float
    """As `steering` takes it."""
    measure: float
    """Mean of the measure over continuations."""
    perplexity: float
    """Of the continuations under the model without the adapter: how far from its own style they are."""
    first_diverging_token: float
    """Mean index of the first generated token that differs from the unsteered continuation; one that is equal
    throughout counts with its length."""
    changed_share: float
    """Share of continuations that differ at all."""


@dataclass(frozen=True, kw_only=True)
class SteeringCurve:
    """A concept's steering, strength by strength."""

    concept: str
    rule: str
    """Meaning of the strengths."""
    mode: str
    prompts: int
    max_new_tokens: int
    unsteered: SteeringPoint
    """The model without the adapter."""
    points: list[SteeringPoint]
    """In the order of the strengths asked for."""
    continuations: dict[float, list[str]]
    """Texts by strength."""

    def to_dict(self) -> dict[str, Any]:
        """All fields but the texts as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "continuations"}

    def to_rows(self) -> list[dict[str, Any]]:
        """The form of `ScarConfig.metrics["steering"]`: a row per strength."""
        return [{"concept": self.concept, "rule": self.rule, **asdict(point)} for point in self.points]


def steering_curve(
    model: nn.Module,
    prompts: Sequence[str],
    concept: str,
    strengths: Sequence[float],
    rule: str | None = None,
    *,
    measure: Measure,
    mode: str | None = None,
    processing_class: Any = None,
    adapter_name: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    max_length: int = 512,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> SteeringCurve:
    """Generate continuations at several strengths and measure what changes, and at which cost.

    Other concepts of the model are neutral meanwhile, and its state is left as it was. Every strength starts from the
    same random state, so that with sampling, too, differences come from steering.

    Args:
        model: a causal language model with a SCAR adapter.
        prompts: texts to continue; the same for all strengths.
        concept: what to steer.
        strengths: as `steering` takes them.
        rule: what they mean: "scale", "set", "add" or "add_gated". None: the adapter's own.
        measure: takes continuations (without their prompts) and gives a number for each, such as their toxicity by an
            independent classifier.
        mode: "residual" or "reconstruct". None: the adapter's own.
        processing_class: the model's tokenizer. None: loaded from where the model came from.
        adapter_name: which adapter. None: the active one.
        max_new_tokens: length of continuations; they may end earlier.
        batch_size: prompts at a time.
        max_length: of prompts; the end of longer ones is kept.
        generation: further arguments of `generate`. None: greedy.
        seed: of sampling.
        progress_bar: show progress.

    Raises:
        ValueError: there is no adapter or prompt, a prompt has no tokens, the concept or the rule is unknown, a
            strength is not finite, or `measure` does not give one number per text.

    Example:
        >>> curve = steering_curve(
        ...     model, prompts, "toxicity", [-1.0, -0.5, 0.0], measure=classify, processing_class=tokenizer
        ... )
        >>> [point.measure for point in curve.points]

    Sources: arXiv 2411.07122 (32 greedy tokens), arXiv 2506.19382 (first diverging token).
    """
    subject = Subject.of(model, processing_class, adapter_name)
    strengths = [float(strength) for strength in strengths]
    _check(subject, prompts, concept, strengths, max_new_tokens, batch_size)
    ids = _prompt_ids(subject.tokenizer, prompts, max_length)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, **(generation or {})}
    neutral = dict.fromkeys(_all_concepts(model))

    def run(strength: float | None, bar: Any) -> "_Written":
        torch.manual_seed(seed)
        if strength is None:
            with base_model(model):
                rows = _generate(subject, ids, batch_size, settings, bar)
        else:
            with evaluation_mode(model), steering(model, {**neutral, concept: strength}, rule=rule, mode=mode):
                rows = _generate(subject, ids, batch_size, settings, bar)
        texts = subject.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return _Written(rows, texts, _perplexity(subject, ids, rows, batch_size))

    total = (len(strengths) + 1) * math.ceil(len(ids) / batch_size)
    with tqdm(total=total, desc="steering", unit="batch", disable=not progress_bar) as bar, _random_state(model):
        plain = run(None, bar)
        written = [run(strength, bar) for strength in strengths]
    return SteeringCurve(
        concept=concept,
        rule=rule or subject.config.steering_rule,
        mode=mode or subject.config.mode,
        prompts=len(ids),
        max_new_tokens=settings["max_new_tokens"],
        unsteered=_point(0.0, plain, plain, measure),
        points=[_point(a, each, plain, measure) for a, each in zip(strengths, written, strict=True)],
        continuations={a: each.texts for a, each in zip(strengths, written, strict=True)},
    )


@contextmanager
def _random_state(model: nn.Module) -> Iterator[None]:
    """Random numbers that are drawn inside leave no trace."""
    device = input_device(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _all_concepts(model: nn.Module) -> list[str]:
    layers = scar_layers(model)
    return [name for each in layers for a in each.adapters_here() for name in each.concept_settings(a).concepts]


class _Written(NamedTuple):
    rows: list[list[int]]
    texts: list[str]
    perplexity: float


def _point(strength: float, written: _Written, plain: _Written, measure: Measure) -> SteeringPoint:
    values = [float(value) for value in measure(list(written.texts))]
    if len(values) != len(written.texts) or any(math.isnan(value) for value in values):
        raise ValueError(
            f"measure must give one number per text, got {len(values)} for {len(written.texts)} texts"
            f"{', some of them nan' if any(map(math.isnan, values)) else ''}."
        )
    diverging = [_first_difference(a, b) for a, b in zip(written.rows, plain.rows, strict=True)]
    return SteeringPoint(
        strength=strength,
        measure=sum(values) / len(values),
        perplexity=written.perplexity,
        first_diverging_token=sum(diverging) / len(diverging),
        changed_share=sum(a != b for a, b in zip(written.rows, plain.rows, strict=True)) / len(diverging),
    )


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _generate(
    subject: Subject, ids: list[list[int]], batch_size: int, settings: Mapping[str, Any], bar: Any
) -> list[list[int]]:
    """New tokens of every prompt, up to and with the one that ends it."""
    model: Any = subject.model
    ends = _end_tokens(model, settings)
    rows: list[list[int]] = []
    for first in range(0, len(ids), batch_size):
        part = ids[first : first + batch_size]
        length = max(map(len, part))
        pad = subject.tokenizer.pad_token_id or 0
        device = input_device(model)
        tokens = torch.tensor([[pad] * (length - len(row)) + row for row in part], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in part], device=device)
        with torch.no_grad():
            out = model.generate(input_ids=tokens, attention_mask=mask, **{"pad_token_id": pad, **settings})
        rows += [_until_end(row[length:], ends) for row in out.tolist()]
        bar.update()
    return rows


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    last = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: last + 1]


def _end_tokens(model: Any, settings: Mapping[str, Any]) -> set[int]:
    end = settings.get("eos_token_id", model.generation_config.eos_token_id)
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _perplexity(subject: Subject, prompts: list[list[int]], rows: list[list[int]], batch_size: int) -> float:
    """Of all continuations together under the model without the adapter; NaN if they are empty."""
    total, count = 0.0, 0
    with base_model(subject.model):
        for first in range(0, len(rows), batch_size):
            part = [(p, r) for p, r in zip(prompts[first:], rows[first : first + batch_size], strict=False) if r]
            losses = token_losses(subject.model, [[*p, *r] for p, r in part]) if part else []
            for (_, row), each in zip(part, losses, strict=True):
                total, count = total + float(each[-len(row) :].double().sum()), count + len(row)
    return math.exp(min(total / count, 700.0)) if count else float("nan")


def _prompt_ids(tokenizer: Any, prompts: Sequence[str], max_length: int) -> list[list[int]]:
    ids = [list(row)[-max_length:] for row in tokenizer(list(prompts))["input_ids"]]
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise ValueError(f"prompts must have at least one token each, those of indices {empty[:5]} have none.")
    return ids


def _check(
    subject: Subject,
    prompts: Sequence[str],
    concept: str,
    strengths: Sequence[float],
    max_new_tokens: int,
    batch_size: int,
) -> None:
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("prompts must be a list of at least one text.")
    if concept not in subject.config.concepts:
        raise ValueError(f"concept must be one of {subject.config.concepts}, got {concept!r}.")
    if not strengths or not all(map(math.isfinite, strengths)):
        raise ValueError(f"strengths must hold at least one number, all of them finite, got {strengths}.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
