"""One seed of the experiment: train, explain held-out prompts by every method, measure."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from atman_explain import average_precision, explain
from benchmarks.retrieval.methods import METHODS
from benchmarks.retrieval.task import Prompts, accuracy, draw_prompts, train_model

HELD_OUT = 10_000  # added to a seed: prompts that training has not drawn


@dataclass(frozen=True)
class Result:
    """What one seed gave."""

    seed: int
    accuracy: float
    methods: dict[str, dict[str, float]]
    """For every method its "map", "top1" and "deletion"."""


def run_seed(seed: int, count: int, methods: Iterable[str] = METHODS) -> Result:
    """Train a model and measure methods on `count` held-out prompts."""
    model = train_model(seed)
    prompts = draw_prompts(count, torch.Generator().manual_seed(HELD_OUT + seed))
    scores = {name: METHODS[name](model, prompts).double() for name in methods}
    return Result(seed, accuracy(model, prompts), {name: measure(model, prompts, s) for name, s in scores.items()})


def measure(model: LlamaForCausalLM, prompts: Prompts, scores: Tensor) -> dict[str, float]:
    """Mean average precision and top-1 of the evidence, and the answer's probability without the top token."""
    candidates = scores[:, 1:-1]  # the first and the last token are never evidence, and large for their own reasons
    relevant = torch.zeros_like(candidates, dtype=torch.bool)
    relevant[torch.arange(len(candidates)), prompts.evidence - 1] = True
    best = candidates.argmax(1) + 1
    precisions = [average_precision(row, hits) for row, hits in zip(candidates, relevant, strict=True)]
    return {
        "map": sum(precisions) / len(precisions),
        "top1": (best == prompts.evidence).double().mean().item(),
        "deletion": _probability_without(model, prompts, best),
    }


def _probability_without(model: LlamaForCausalLM, prompts: Prompts, columns: Tensor) -> float:
    """Mean probability of the answer when no row attends to one token."""
    found = [
        explain(model, None, ids, target=[answer], chunks=[[column]], mode="log_additive", factor=0.0)
        for ids, answer, column in zip(prompts.ids.tolist(), prompts.answers.tolist(), columns.tolist(), strict=True)
    ]
    return sum((each.baseline_logprobs - each.scores[:, 0]).exp().item() for each in found) / len(found)
