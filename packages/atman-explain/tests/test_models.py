"""Explanations of every kind of causal model against the method's definition, run row by row."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from atman_explain import AtMan, Explanation, explain, suppress_scores
from atman_explain.remote import routes_atman
from tests.support.atman import (
    FAMILIES,
    MODES,
    PROMPT,
    TARGET,
    manipulate,
    padded,
    plain_logprobs,
    reference_factors,
    reference_readouts,
    reference_scores,
    tiny_model,
)

FACTORS = (0.0, 0.1, 0.9, 1.0, 3.0)
P = len(PROMPT)
T = P + len(TARGET) - 1
CHUNKS = ([0], [1, 2, 3], [9, 11], [10, 5], [8])  # first, neighbouring, last, unordered
EXACT = {"rtol": 0.0, "atol": 1e-10}


class IgnoresPositions(LlamaForCausalLM):
    """A model that counts positions by itself, so that no suffix of a row can be run alone."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    return tiny_model(family)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def only_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test fails if whole rows are run, or if anything is warned about."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("whole rows were run")

    monkeypatch.setattr(routes_atman, "BatchPasses", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def explained(model: PreTrainedModel, **settings: Any) -> Explanation:
    return explain(model, None, list(PROMPT), target=list(TARGET), **settings)


def close(one: Tensor, other: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(one, other, **(EXACT | tolerance))


# The reference itself.


@pytest.mark.parametrize(("mode", "weight"), [("multiply", 0.450), ("log_additive", 0.013), ("shift_min", 0.119)])
def test_reference_gives_the_published_weights_for_a_negative_score(mode: str, weight: float) -> None:
    scores, factors = torch.tensor([[-2.0, 0.0]]).double(), torch.tensor([0.1, 1.0]).double()
    changed = manipulate(scores, factors, mode, torch.ones(1, 2, dtype=torch.bool))
    assert changed.softmax(-1)[0, 0].item() == pytest.approx(weight, abs=5e-4)
    close(suppress_scores(scores, factors, mode), changed)  # type: ignore[arg-type]


def test_reference_agrees_with_the_untouched_model_when_nothing_is_suppressed(model: PreTrainedModel) -> None:
    ones = torch.ones(2, T, dtype=torch.float64)
    expected = plain_logprobs(model, PROMPT, TARGET)
    tolerance = FAMILIES["gemma2"].tolerance if model.config.model_type == "gemma2" else 1e-10
    close(reference_readouts(model, PROMPT, TARGET, ones)[1], expected, atol=tolerance)


def test_reference_factors_of_conceptual_suppression() -> None:
    embeds = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [3.0, 4.0]])
    expected = torch.tensor([0.1, 0.1, 1.0, 1.0, 0.46], dtype=torch.float64)  # S = 1, 1, 0, -1, 0.6
    close(reference_factors(embeds, [0], 0.1, kappa=-1.0), expected)


# Every architecture.


def test_baseline_is_that_of_the_untouched_model(family: str, model: PreTrainedModel) -> None:
    expected = plain_logprobs(model, PROMPT, TARGET)
    close(explained(model).baseline_logprobs, expected, atol=FAMILIES[family].tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_scores_equal_the_definition(model: PreTrainedModel, mode: str) -> None:
    atman = AtMan(model, mode=mode)
    rows = torch.ones(len(FACTORS), P, T, dtype=torch.float64)
    for index, factor in enumerate(FACTORS):
        rows[index, range(P), range(P)] = factor
    plain = torch.ones(1, T, dtype=torch.float64)
    readouts = reference_readouts(model, PROMPT, TARGET, torch.cat([plain, rows.flatten(0, 1)]), mode=mode)
    expected = (readouts[0] - readouts[1:]).view(len(FACTORS), P, len(TARGET)).transpose(1, 2)
    for index, factor in enumerate(FACTORS):
        found = atman.explain(list(PROMPT), target=list(TARGET), factor=factor)
        close(found.scores, expected[index])
        assert found.scores.any() != (factor == 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_units_of_several_columns_and_of_the_target(model: PreTrainedModel, mode: str) -> None:
    found = explained(model, chunks=CHUNKS, attribute_target=True, mode=mode)
    columns = [*CHUNKS, [P], [P + 1]]
    assert [unit.columns for unit in found.units] == [tuple(sorted(each)) for each in columns]
    assert [unit.kind for unit in found.units] == ["text"] * len(CHUNKS) + ["target"] * 2
    close(found.scores, reference_scores(model, PROMPT, TARGET, columns, mode=mode))
    earlier = found.scores[[0, 0, 1], [-2, -1, -1]]  # targets that the unit comes after
    assert earlier.tolist() == [0.0] * 3 and found.scores[[1, 2], [-2, -1]].all()


@pytest.mark.parametrize(
    "concept",
    [{"kappa": 0.1, "attribute_target": True}, {"kappa": -0.2, "max_similar": 4, "factor": 3.0}],
    ids=str,
)
def test_similar_tokens_are_suppressed_along(model: PreTrainedModel, concept: dict[str, Any]) -> None:
    columns = [*CHUNKS, [P], [P + 1]] if concept.pop("attribute_target", False) else CHUNKS
    found = explained(model, chunks=CHUNKS, attribute_target=len(columns) > len(CHUNKS), **concept)
    close(found.scores, reference_scores(model, PROMPT, TARGET, columns, **concept))


def test_only_some_layers_and_heads(model: PreTrainedModel) -> None:
    found = explained(model, layers=(1,), heads=(0, 3))
    close(found.scores, reference_scores(model, PROMPT, TARGET, layers=(1,), heads=(0, 3)))


def test_no_whole_row_is_run(model: PreTrainedModel, only_packed: None) -> None:
    found = explained(model, kappa=0.1, attribute_target=True, chunks=CHUNKS)
    assert found.scores.isfinite().all()


@pytest.mark.parametrize(("side", "budget"), [("left", 16), ("right", 1024)])
def test_padded_prompts_of_different_lengths(model: PreTrainedModel, side: str, budget: int) -> None:
    prompts = [PROMPT[:5], [11], PROMPT, PROMPT[4:]]
    targets = [[3], [6, 1], list(TARGET), [2, 2]]
    batch = padded(*prompts, side=side, length=P + 2)
    found = explain(model, None, batch, target=targets, max_tokens_per_batch=budget, batch_size=5)
    for each, prompt, target in zip(found, prompts, targets, strict=True):
        assert each.prompt_ids == tuple(prompt)
        close(each.scores, reference_scores(model, prompt, target))


# One architecture.


@pytest.mark.parametrize(
    "concept",
    [
        {"kappa": 0.1},
        {"kappa": 0.05, "scale_by_similarity": False},
        {"kappa": -1.0, "scale_by_similarity": False, "max_similar": 3},
        {"kappa": -0.2, "max_similar": 4, "mode": "log_additive"},
        {"kappa": 0.1, "mode": "shift_min_all", "factor": 0.0},
    ],
    ids=str,
)
def test_reach_of_conceptual_suppression(llama: PreTrainedModel, concept: dict[str, Any]) -> None:
    found = explained(llama, chunks=CHUNKS, **concept)
    close(found.scores, reference_scores(llama, PROMPT, TARGET, CHUNKS, **concept))
    alone = {name: value for name, value in concept.items() if name in ("factor", "mode")}
    assert not torch.allclose(found.scores, reference_scores(llama, PROMPT, TARGET, CHUNKS, **alone), atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", [{"layers": (0,)}, {"layers": (1,)}, {"heads": (0, 3)}], ids=str)
def test_where_attention_is_changed(llama: PreTrainedModel, where: dict[str, Any], mode: str) -> None:
    found = explained(llama, mode=mode, **where)
    close(found.scores, reference_scores(llama, PROMPT, TARGET, mode=mode, **where))
    assert not torch.allclose(found.scores, reference_scores(llama, PROMPT, TARGET, mode=mode), atol=1e-3)


@pytest.mark.parametrize("mode", ["shift_min", "shift_min_all"])
@pytest.mark.parametrize(
    "budget",
    [
        {"batch_size": 1},
        {"batch_size": 3, "max_tokens_per_batch": 30},
        {"batch_size": 64, "max_tokens_per_batch": 100_000},
        {"max_tokens_per_batch": 1},
    ],
    ids=str,
)
def test_budgets_do_not_change_the_scores(llama: PreTrainedModel, budget: dict[str, int], mode: str) -> None:
    close(explained(llama, mode=mode, **budget).scores, reference_scores(llama, PROMPT, TARGET, mode=mode))


def test_order_of_units_does_not_matter(llama: PreTrainedModel) -> None:
    order = [3, 0, 4, 1, 2]
    found = explained(llama, chunks=[CHUNKS[index] for index in order])
    close(found.scores, explained(llama, chunks=CHUNKS).scores[:, order])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("readout", [{"delta": "logit"}, {"temperature": 2.5}, {"delta": "logit", "temperature": 0.5}])
def test_readouts(llama: PreTrainedModel, readout: dict[str, Any], mode: str) -> None:
    close(explained(llama, mode=mode, **readout).scores, reference_scores(llama, PROMPT, TARGET, mode=mode, **readout))


def test_postprocessing_comes_before_the_sum_over_targets(llama: PreTrainedModel) -> None:
    scores = explained(llama).scores
    squared = explained(llama, postprocess="square", target_granularity="complete")
    close(squared.scores, scores.square().sum(0, keepdim=True))
    close(explained(llama, postprocess="absolute").scores, scores.abs())
    normal = explained(llama, normalize=True).scores
    assert normal.amin(1).tolist() == [0.0] * len(TARGET) and normal.amax(1).tolist() == [1.0] * len(TARGET)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", [{}, {"kappa": -1.0}, {"chunks": CHUNKS}, {"heads": (1,)}], ids=str)
def test_factor_one_scores_exactly_zero(llama: PreTrainedModel, mode: str, extra: dict[str, Any]) -> None:
    assert not explained(llama, factor=1.0, mode=mode, attribute_target=True, **extra).scores.any()


@pytest.mark.parametrize("factor", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_of_one_token_is_one_unit(llama: PreTrainedModel, mode: str, factor: float) -> None:
    found = explain(llama, None, [9], target=[4, 8], mode=mode, factor=factor)
    assert found.scores.shape == (2, 1)
    close(found.scores, reference_scores(llama, [9], [4, 8], mode=mode, factor=factor))


def test_all_columns_as_one_unit_of_removed_keys(llama: PreTrainedModel) -> None:
    """Every row keeps its attention when all that it sees is removed."""
    found = explained(llama, chunks=[range(P)], factor=0.0, mode="log_additive")
    close(found.scores, reference_scores(llama, PROMPT, TARGET, [range(P)], factor=0.0, mode="log_additive"))
    assert found.scores[0, 0].abs() < 1e-10 < found.scores[2, 0].abs()


def test_target_is_generated_greedily_when_none_is_given(llama: PreTrainedModel) -> None:
    ids = torch.tensor([PROMPT])
    expected = llama.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    found = explain(llama, None, list(PROMPT), max_new_tokens=3)
    assert [target.id for target in found.targets] == expected[0, P:].tolist()
    assert [target.id for target in explain(llama, None, list(PROMPT)).targets] == expected[0, P : P + 1].tolist()
    close(found.scores, reference_scores(llama, PROMPT, expected[0, P:].tolist()))


def test_generated_target_stops_before_the_end_of_sequence() -> None:
    ends = tiny_model("llama")
    ids = torch.tensor([PROMPT])
    free = ends.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, P:]
    last = free[2].item()
    assert last not in free[:2].tolist()
    ends.generation_config.eos_token_id = last
    found = explain(ends, None, list(PROMPT), max_new_tokens=4)
    assert [target.id for target in found.targets] == free[:2].tolist()


def test_negative_layers_count_from_the_end(llama: PreTrainedModel) -> None:
    close(explained(llama, layers=(-1,)).scores, explained(llama, layers=(1,)).scores)


# Models on which suffixes are not exact.


@pytest.fixture
def stubborn() -> PreTrainedModel:
    torch.manual_seed(0)
    return IgnoresPositions(tiny_model("llama").config).double().eval()


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:2]], ids=["long", "two tokens"])
def test_a_model_without_exact_suffixes_falls_back_with_a_warning(
    stubborn: PreTrainedModel, prompt: Sequence[int]
) -> None:
    with pytest.warns(UserWarning, match="IgnoresPositions gives other results .* whole rows are run for every unit"):
        found = explain(stubborn, None, list(prompt), target=list(TARGET), attribute_target=True)
    columns = [[column] for column in range(len(prompt) + len(TARGET) - 1)]
    close(found.scores, reference_scores(stubborn, prompt, TARGET, columns))


def test_the_fallback_is_remembered(stubborn: PreTrainedModel) -> None:
    atman = AtMan(stubborn)
    with pytest.warns(UserWarning, match="whole rows"):
        atman.explain(list(PROMPT), target=list(TARGET))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = atman.explain(list(PROMPT[2:]), target=list(TARGET))
    close(found.scores, reference_scores(stubborn, PROMPT[2:], TARGET))


@pytest.mark.parametrize("first", [[9], [9, 4]])
def test_a_short_first_prompt_does_not_hide_that_suffixes_are_not_exact(
    stubborn: PreTrainedModel, first: list[int]
) -> None:
    atman = AtMan(stubborn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        atman.explain(first, target=[4])
        found = atman.explain(list(PROMPT), target=list(TARGET))
        together = AtMan(stubborn).explain([first, list(PROMPT)], target=[[4], list(TARGET)])
    close(found.scores, reference_scores(stubborn, PROMPT, TARGET))
    close(together[1].scores, reference_scores(stubborn, PROMPT, TARGET))


def test_whole_rows_prove_nothing_about_suffixes(stubborn: PreTrainedModel) -> None:
    atman = AtMan(stubborn)
    atman.explain(list(PROMPT), target=list(TARGET), mode="shift_min_all")
    with pytest.warns(UserWarning, match="whole rows"):
        found = atman.explain(list(PROMPT), target=list(TARGET))
    close(found.scores, reference_scores(stubborn, PROMPT, TARGET))


@pytest.mark.parametrize("side", ["left", "right"])
def test_whole_rows_of_several_padded_prompts(llama: PreTrainedModel, side: str) -> None:
    rows, targets = [list(PROMPT), list(PROMPT[3:8])], [list(TARGET), [30]]
    found = explain(llama, None, padded(*rows, side=side), target=targets, mode="shift_min_all", kappa=0.1)
    for each, row, target in zip(found, rows, targets, strict=True):
        close(each.scores, reference_scores(llama, row, target, mode="shift_min_all", kappa=0.1))
