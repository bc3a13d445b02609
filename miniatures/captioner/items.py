"""Right answers -> items: which tokens of an answer speak about which object of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from miniatures.captioner.answering import answer
from miniatures.captioner.questions import Question
from miniatures.captioner.saliency import Case, make_case
from miniatures.captioner.scenes import NAMES, Picture

EXPLAINED = ("what", "list")
"""The kinds of question that the committed model has learned: a lucky guess has nothing to explain."""
BATCH_PICTURES = 16

Material = list[tuple[Picture, list[Question]]]
"""Pictures with their questions."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that a right answer says about one object."""

    number: int
    """Of the picture."""
    picture: Picture
    question: Question
    tokens: range
    """Which tokens of the answer say it."""
    object: int
    """Which object of the picture it is about."""
    case: Case

    @property
    def shares(self) -> Tensor:
        """Part of every patch that the object covers: [144]."""
        return torch.from_numpy(self.picture.shares()[self.object].ravel())


def right_items(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, material: Material
) -> dict[str, list[Item]]:
    """At most one item of each kind and picture, from the questions that the model answers right.

    Pictures take turns in which of their objects they ask about first.
    """
    items: dict[str, list[Item]] = {kind: [] for kind in EXPLAINED}
    for start in range(0, len(material), BATCH_PICTURES):
        part = material[start : start + BATCH_PICTURES]
        part = [(picture, [one for one in asked if one.kind in EXPLAINED and one.about]) for picture, asked in part]
        pairs = [(picture, one) for picture, asked in part for one in asked]
        given = iter(answer(model, processor, [picture for picture, _ in pairs], [one.prompt for _, one in pairs]))
        for number, (picture, asked) in enumerate(part, start):
            right = [one for one, text in zip(asked, given, strict=False) if one.answer == text]
            for kind in EXPLAINED:
                of_kind = [one for one in right if one.kind == kind]
                if of_kind:
                    question = of_kind[number % len(of_kind)]
                    items[kind].append(_item(model, processor, number, picture, question))
    return items


def _item(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, number: int, picture: Picture, question: Question
) -> Item:
    chosen = question.about[number % len(question.about)]
    case = make_case(model, processor, picture, question.prompt, question.answer)
    tokens = range(len(case.answer_ids))
    if question.kind == "list":
        lengths = [len(NAMES[thing].split()) for thing in picture.things]
        first = sum(lengths[:chosen]) + chosen  # an "and" before each but the first
        tokens = range(first, first + lengths[chosen])
    return Item(number=number, picture=picture, question=question, tokens=tokens, object=chosen, case=case)
