"""Held-out questions: what the trained model answers, by the stock `generate`, and how often it is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from miniatures.captioner.questions import KINDS, NOTHING, Question, ask
from miniatures.captioner.scenes import Composer, Picture

HELD_OUT_SEED = 2**31
"""Training seeds are small numbers; pictures of this one are never trained on."""
LONGEST_ANSWER = 12
"""Tokens; four names of two words with three "and" are eleven, and the end."""


def held_out_questions(compose: Composer, pictures: int, *, first: int = 0) -> Iterator[tuple[Picture, list[Question]]]:
    """New pictures with every question about them."""
    for index in range(first, first + pictures):
        yield compose(HELD_OUT_SEED, index), _ask(compose(HELD_OUT_SEED, index), index)


def _ask(picture: Picture, index: int) -> list[Question]:
    return ask(picture, np.random.default_rng([HELD_OUT_SEED, index, 1]))


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: list[Picture], prompts: list[str]
) -> list[str]:
    """The model's greedy answers, one prompt and one picture each."""
    images = [[Image.fromarray(picture.pixels)] for picture in pictures]
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True).to(model.device, model.dtype)
    written = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    return processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    compose: Composer,
    *,
    pictures: int,
    batch_pictures: int = 16,
) -> dict[str, Any]:
    """Share of held-out questions answered word for word, by kind, with the number of questions."""
    right: dict[str, list[bool]] = {kind: [] for kind in (*KINDS, "what (nothing)")}
    material = list(held_out_questions(compose, pictures))
    for start in range(0, len(material), batch_pictures):
        pairs = [(picture, one) for picture, asked in material[start : start + batch_pictures] for one in asked]
        answers = answer(model, processor, [picture for picture, _ in pairs], [one.prompt for _, one in pairs])
        for (_, one), given in zip(pairs, answers, strict=True):
            kind = "what (nothing)" if one.answer == NOTHING else one.kind
            right[kind].append(given == one.answer)
    return {
        "pictures": pictures,
        "accuracy": {kind: sum(values) / len(values) for kind, values in right.items()},
        "questions": {kind: len(values) for kind, values in right.items()},
    }
