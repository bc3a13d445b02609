"""What an explanation costs: passes, positions, rows of the head and memory, counted and not timed."""

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from atman_explain import AtMan, explain
from atman_explain.remote import passages_atman, routes_atman
from atman_explain.remote.decoder_atman import DecoderPasses
from tests.support.atman import FAMILIES, PROMPT, TARGET, VOCAB, padded, tiny_model

P, M = len(PROMPT), len(TARGET)
T = P + M - 1
SUFFIXES = sum(T - min(column, P - 1) for column in range(P))  # of every prompt token; target rows are always there


@dataclass
class Counted:
    """What went through a model."""

    passes: list[int] = field(default_factory=list)
    """Positions of every forward pass of the decoder."""
    head_rows: list[int] = field(default_factory=list)
    """Rows of every call of the head."""

    @property
    def positions(self) -> int:
        return sum(self.passes)


def count(model: PreTrainedModel) -> Counted:
    """Watch what goes through a model from now on."""
    counted = Counted()

    def of_decoder(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        given = given if given is not None else kwargs.get("input_ids", args[0] if args else None)
        counted.passes.append(given.shape[0] * given.shape[1])

    def of_head(_: nn.Module, args: tuple[Any, ...]) -> None:
        counted.head_rows.append(args[0].shape[:-1].numel())

    model.get_decoder().register_forward_pre_hook(of_decoder, with_kwargs=True)
    model.get_output_embeddings().register_forward_pre_hook(of_head)
    return counted


@pytest.fixture
def atman() -> AtMan:
    """Of a model that it knows already, so that nothing has to be found out."""
    atman = AtMan(tiny_model("llama"))
    atman.explain(list(PROMPT), target=list(TARGET))
    return atman


@pytest.fixture
def counted(atman: AtMan) -> Counted:
    return count(atman.model)  # type: ignore[arg-type]


# Passes and positions.


def test_every_unit_costs_its_suffix(atman: AtMan, counted: Counted) -> None:
    atman.explain(list(PROMPT), target=list(TARGET))
    assert counted.passes == [T, SUFFIXES]


def test_target_units_cost_the_target_rows(atman: AtMan, counted: Counted) -> None:
    atman.explain(list(PROMPT), target=list(TARGET), attribute_target=True)
    assert counted.passes == [T, SUFFIXES + (M - 1) * M]


def test_a_prompt_costs_half_of_whole_rows(atman: AtMan, counted: Counted) -> None:
    prompt = list(range(1, 41))
    atman.explain(prompt, target=[3])
    assert counted.positions == 40 + 40 * 41 // 2


def test_units_of_several_columns_start_at_their_first(atman: AtMan, counted: Counted) -> None:
    atman.explain(list(PROMPT), target=list(TARGET), chunks=[[0, 5], [10, 4], [11]])
    assert counted.positions == T + T + (T - 4) + (T - P + 1)


def test_similar_tokens_move_the_start(atman: AtMan, counted: Counted) -> None:
    atman.explain(list(PROMPT), target=list(TARGET), chunks=[[4], [11]], kappa=0.999)  # the tokens of columns 0 and 2
    assert counted.positions == T + T + (T - 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_finding_out_about_a_model_costs_a_plain_run_and_half_a_row(name: str) -> None:
    model = tiny_model(name)
    counted = count(model)
    explain(model, None, list(PROMPT), target=list(TARGET))
    assert counted.passes == [T, T, T - T // 2, SUFFIXES]


def test_factor_one_costs_no_suppressed_pass(atman: AtMan, counted: Counted) -> None:
    atman.explain(list(PROMPT), target=list(TARGET), factor=1.0)
    assert counted.passes == [T]


def test_whole_rows_cost_what_they_say(atman: AtMan, counted: Counted) -> None:
    atman.explain(list(PROMPT), target=list(TARGET), mode="shift_min_all")
    assert counted.passes == [T, P * T]


def test_short_prompts_share_passes(atman: AtMan, counted: Counted) -> None:
    prompts = [[each, each + 1, each + 2] for each in range(1, 21)]
    atman.explain(prompts, target=[[5]] * 20)
    assert counted.passes == [60, 20 * (3 + 2 + 1)]


def test_padding_costs_nothing(atman: AtMan, counted: Counted) -> None:
    atman.explain(padded(PROMPT, side="left", length=50), target=list(TARGET))
    assert counted.passes == [T, SUFFIXES]


def test_passes_count_their_own_positions(atman: AtMan, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[DecoderPasses] = []

    def keep(*args: Any, **kwargs: Any) -> DecoderPasses:
        opened.append(DecoderPasses(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(routes_atman, "DecoderPasses", keep)
    counted = count(atman.model)  # type: ignore[arg-type]
    atman.explain(list(PROMPT), target=list(TARGET))
    assert [each.num_positions for each in opened] == [counted.positions] == [T + SUFFIXES]


# Budgets.


@pytest.mark.parametrize("budget", [1, T, 20, 50, 100_000])
@pytest.mark.parametrize("mode", ["shift_min", "shift_min_all"])
def test_passes_stay_within_the_budget(atman: AtMan, counted: Counted, mode: str, budget: int) -> None:
    atman.explain(list(PROMPT), target=list(TARGET), mode=mode, max_tokens_per_batch=budget)
    work = SUFFIXES if mode == "shift_min" else P * T
    assert sum(counted.passes[1:]) == work
    assert max(counted.passes[1:]) <= max(budget, T)
    if budget >= T:
        assert len(counted.passes) - 1 <= math.ceil(work / (budget - T + 1))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("mode", ["shift_min", "shift_min_all"])
def test_passes_hold_at_most_a_batch_of_units(atman: AtMan, counted: Counted, mode: str, batch_size: int) -> None:
    atman.explain(list(PROMPT), target=list(TARGET), mode=mode, batch_size=batch_size)
    assert len(counted.passes) - 1 == math.ceil(P / batch_size)
    assert max(counted.head_rows[1:]) == M * min(batch_size, P)


def test_prompts_are_taken_in_groups_within_the_budget(atman: AtMan, counted: Counted) -> None:
    atman.explain([list(PROMPT)] * 4, target=[[1]] * 4, max_tokens_per_batch=2 * P)
    plain = [each for each in counted.passes if each == 2 * P]
    assert len(plain) >= 2 and max(counted.passes) == 2 * P
    assert counted.positions == 4 * (P + P * (P + 1) // 2)


@pytest.mark.parametrize("mode", ["shift_min", "shift_min_all"])
def test_logits_of_one_pass_are_bounded(
    atman: AtMan, counted: Counted, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passages_atman, "LOGITS_BUDGET", 4 * M * VOCAB)
    atman.explain(list(PROMPT), target=list(TARGET), mode=mode)
    assert max(counted.head_rows) == 4 * M


# The head.


@pytest.mark.parametrize("name", FAMILIES)
def test_only_target_rows_reach_the_head(name: str) -> None:
    model = tiny_model(name)
    counted = count(model)
    explain(model, None, list(PROMPT), target=list(TARGET))
    assert counted.head_rows == [M, M, M, P * M]


def test_only_target_rows_reach_the_head_of_whole_rows(atman: AtMan, counted: Counted) -> None:
    atman.explain(list(PROMPT), target=list(TARGET), mode="shift_min_all")
    assert counted.head_rows == [M, P * M]


# Memory.


class Memory(TorchDispatchMode):
    """Watches tensors come and go: bytes that live at most at a time, and elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.largest = 0
        self._live = 0
        self._owners: Counter[int] = Counter()  # tensors per storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))} - self._owners.keys()
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in given:  # else a view of a parameter
                self._watch(tensor)
        return out

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self._owners[place]:
            self._live += size
            self.peak = max(self.peak, self._live)
            self.largest = max(self.largest, size // tensor.element_size())
        self._owners[place] += 1
        weakref.finalize(tensor, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._owners[place] -= 1
        if not self._owners[place]:
            del self._owners[place]
            self._live -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def watched(length: int, **settings: Any) -> Memory:
    """The memory that an explanation of a long prompt takes."""
    model = tiny_model("llama", max_position_embeddings=1024).float()
    prompt = (torch.arange(length) % (VOCAB - 1) + 1).tolist()
    with Memory() as memory:
        explain(model, None, prompt, target=[3], **settings)
    return memory


@pytest.mark.parametrize("mode", ["shift_min", "shift_min_all"])
def test_memory_does_not_grow_with_the_number_of_units(mode: str) -> None:
    few = watched(64, mode=mode, max_tokens_per_batch=256, chunks=[[each] for each in range(8)])
    many = watched(64, mode=mode, max_tokens_per_batch=256)
    assert many.peak <= 1.02 * few.peak


def test_kept_keys_and_values_do_not_depend_on_the_number_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Spied(DecoderPasses):
        def run(self, items: Any) -> Any:
            yield from super().run(items)
            sizes.append(sum(key.numel() + value.numel() for key, value in self._kept.values()))

    monkeypatch.setattr(routes_atman, "DecoderPasses", Spied)
    model = tiny_model("llama")
    for chunks in ([[0]], [[each] for each in range(P)]):
        explain(model, None, list(PROMPT), target=list(TARGET), chunks=chunks, batch_size=2)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    assert sizes == [2 * T * model.config.num_hidden_layers * model.config.num_key_value_heads * head_dim] * 2


@pytest.mark.parametrize("mode", ["shift_min", "log_additive", "shift_min_all"])
def test_no_tensor_holds_all_scores_of_a_layer(mode: str) -> None:
    length = 1024
    memory = watched(length, mode=mode, chunks=[[0], [100]], batch_size=1)
    scores = 4 * length * length
    assert memory.largest <= scores // 2
    assert memory.peak < 4 * 2 * scores  # bytes of two such tensors in float32
