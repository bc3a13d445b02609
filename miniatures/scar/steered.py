"""Steering curves: continuations at several strengths, told apart by the judge, with their perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import scar_peft
from miniatures.data.text import TextDocument
from miniatures.scar.data import prompts_of
from miniatures.scar.judge import Judge
from miniatures.scar.writing import Writer, Written

ON = {"scripture": "scripture", "german": "de"}
"""Concept -> the group that has it."""
OFF = "en"
"""The group that has neither."""
TOWARDS: dict[str, tuple[float, ...]] = {
    "add": (0.25, 0.5, 0.75, 1.0, 1.5),
    "add_gated": (0.25, 0.5, 0.75, 1.0, 1.5),
    "set": (1.0, 2.0, 4.0, 6.0, 8.0),
    "scale": (1.0, 9.0, 49.0, 99.0),
}
"""Rule -> strengths that should bring the concept into text without it."""
AWAY: dict[str, tuple[float, ...]] = {
    "add": (-0.25, -0.5, -0.75, -1.0, -1.5),
    "add_gated": (-0.25, -0.5, -0.75, -1.0, -1.5),
    "set": (0.0, -2.0, -4.0, -6.0, -8.0),
    "scale": (-1.0, -3.0, -5.0, -7.0, -9.0),
}
"""Rule -> strengths that should take the concept out of text with it."""
PROMPT_LENGTH = 12
TRIAL_SEEDS = (101, 102)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One curve to measure."""

    concept: str
    group: str
    """Of the prompts."""
    rule: str
    strengths: tuple[float, ...]
    """In the order in which they move away from neutral; neutral is not among them."""


Point = dict[str, Any]
"""Strength (None: neutral), share of continuations that the judge tells to be of the concept's group, shares of all
groups, and the continuations' perplexity per word under the unsteered model."""


def plans() -> list[Plan]:
    """All curves of one adapter in one mode."""
    found = []
    for concept, group in ON.items():
        for rule, strengths in TOWARDS.items():
            found.append(Plan(concept=concept, group=OFF, rule=rule, strengths=strengths))
        for rule, strengths in AWAY.items():
            found.append(Plan(concept=concept, group=group, rule=rule, strengths=strengths))
    return found


def steady_prompts(writer: Writer, judge: Judge, documents: Sequence[TextDocument], group: str, count: int) -> Tensor:
    """Prompts of a group that the unsteered model continues in kind, at two tries: int64 [count, PROMPT_LENGTH].

    The model now and then falls from a manual into scripture all by itself. The tries use other random numbers than the
    measurement does.
    """
    ids = writer.prompt_ids(prompts_of(documents, group), PROMPT_LENGTH)
    keeps = torch.ones(len(ids), dtype=torch.bool)
    for seed in TRIAL_SEEDS:
        texts = writer.write(ids, seed=seed).texts
        keeps &= torch.tensor([judge.group_of(text) == group for text in texts])
    if int(keeps.sum()) < count:
        raise ValueError(
            f"count must be at most {int(keeps.sum())}, the prompts of {group!r} that stay so, got {count}."
        )
    return ids[keeps][:count]


def measure_base(writer: Writer, judge: Judge, prompts: dict[str, Tensor]) -> dict[str, Point]:
    """The unsteered point of every group of prompts."""
    return {group: _points(writer, judge, writer.write(ids), [None])[0] for group, ids in prompts.items()}


def measure_crossed(writer: Writer, prompts: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Perplexity of unsteered continuations moved behind the prompts of another group, by prompts and continuations.

    What a change of text costs in itself, were it written by the unsteered model.
    """
    written = {group: writer.write(ids) for group, ids in prompts.items()}
    found: dict[str, dict[str, float]] = {}
    for source, target in ((OFF, "scripture"), (OFF, "de"), ("scripture", OFF), ("de", OFF)):
        own = written[target]
        ids = torch.cat([prompts[source], own.ids[:, PROMPT_LENGTH:]], 1)
        nats = writer.nats_per_word(Written(own.texts, ids, own.is_new))
        found.setdefault(source, {})[target] = math.exp(float(nats.nanmean()))
    return found


def measure_curve(
    writer: Writer, judge: Judge, model: Any, prompts: dict[str, Tensor], plan: Plan, *, mode: str = "residual"
) -> list[Point]:
    """Write and judge at every strength of a plan. In mode "reconstruct" the first point is neutral strength."""
    strengths: list[float | None] = list(plan.strengths)
    amounts = list(plan.strengths)
    if mode == "reconstruct" and plan.rule != "set":
        strengths, amounts = [None, *strengths], [0.0, *amounts]
    steered = scar_peft.steering(model, {plan.concept: torch.tensor(amounts)}, rule=plan.rule, mode=mode)
    written = writer.write(prompts[plan.group], copies=len(amounts), steered=steered)
    points = _points(writer, judge, written, strengths)
    return [{**point, "share": point["shares"][ON[plan.concept]]} for point in points]


def _points(writer: Writer, judge: Judge, written: Written, strengths: Sequence[float | None]) -> list[Point]:
    nats = writer.nats_per_word(written).view(len(strengths), -1)
    each = len(written.texts) // len(strengths)
    return [
        {
            "strength": strength,
            "shares": judge.shares(written.texts[i * each : (i + 1) * each]),
            "perplexity": math.exp(float(nats[i].nanmean())),
        }
        for i, strength in enumerate(strengths)
    ]
