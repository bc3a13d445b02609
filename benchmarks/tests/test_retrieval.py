"""The retrieval experiment: its task is what it says, and AtMan finds the evidence."""

import pytest
import torch

from benchmarks.retrieval.experiment import measure, run_seed
from benchmarks.retrieval.task import (
    BOS,
    FACTS,
    FILLERS,
    FIRST_ANSWER,
    FIRST_FACT,
    FIRST_KEY,
    VALUES,
    draw_prompts,
    train_model,
)


@pytest.fixture
def prompts():
    return draw_prompts(50, torch.Generator().manual_seed(3))


def test_exactly_one_fact_answers_the_question(prompts):
    for ids, answer, evidence in zip(
        prompts.ids.tolist(), prompts.answers.tolist(), prompts.evidence.tolist(), strict=True
    ):
        assert len(ids) == 1 + FACTS + FILLERS + 1
        assert ids[0] == BOS
        facts = {
            column: divmod(index - FIRST_FACT, VALUES) for column, index in enumerate(ids) if 0 < index < FIRST_KEY
        }
        asked = [column for column, (key, _) in facts.items() if key == ids[-1] - FIRST_KEY]
        assert asked == [evidence]
        assert facts[evidence][1] == answer - FIRST_ANSWER


def test_knowing_the_evidence_is_perfect_and_knowing_nothing_is_not(prompts):
    model = train_model(0, steps=1)
    right = torch.zeros(prompts.ids.shape, dtype=torch.float64)
    right[torch.arange(len(right)), prompts.evidence] = 1.0
    assert measure(model, prompts, right)["map"] == measure(model, prompts, right)["top1"] == 1.0
    assert measure(model, prompts, torch.zeros_like(right))["map"] == pytest.approx(1 / (FACTS + FILLERS))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_atman_finds_the_evidence_and_integrated_gradients_less_so(seed):
    pytest.importorskip("captum")
    names = ("AtMan shift_min, f = 0.1", "captum Integrated Gradients 50, sum", "random")
    result = run_seed(seed, 100, names)
    atman, gradients, chance = (result.methods[name]["map"] for name in names)
    assert result.accuracy >= 0.98
    assert atman >= 0.95
    assert atman >= gradients + 0.05
    assert chance < 0.4
