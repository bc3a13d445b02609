"""The AtMan cases: peers that compute the same do so in float64, floors count what is run, every case is equal."""

import copy
from dataclasses import replace

import pytest
import torch

from atman_explain import AtMan
from benchmarks.atman_peers import one_by_one, whole_rows
from benchmarks.cases.atman.attention import QUICK as QUICK_ATTENTION
from benchmarks.cases.atman.attention import suffix_inputs
from benchmarks.cases.atman.curves import CURVES
from benchmarks.cases.atman.inputs import (
    FACTOR,
    QUICK,
    SHAPES,
    columns_of,
    factors_of,
    floor_flops,
    model_of,
    naive_flops,
    prompt_of,
    similar_factors,
)
from benchmarks.harness import REGISTRY, Case, Options, check_equal
from benchmarks.tune import candidates
from shared_kernels.atman_attention.kernel import SUFFIX_CONFIGS

OPTIONS = Options(quick=True)
NAMES = [name for name in REGISTRY if name.startswith("atman.") and "cpu" in REGISTRY[name].devices]


@pytest.fixture
def model():
    return copy.deepcopy(model_of(QUICK)).double()  # the cases share theirs


@pytest.mark.parametrize("mode", ["shift_min", "log_additive", "multiply"])
def test_the_plain_way_and_whole_rows_give_what_the_package_gives(model, mode):
    ids, target = prompt_of(QUICK)
    factors = factors_of(QUICK, columns_of(QUICK, QUICK.T))
    want = AtMan(model, None, factor=FACTOR, mode=mode).explain(ids, target=[target]).scores[0]
    assert want.abs().max() > 0.1  # else anything would be equal
    for got in (
        one_by_one(model, ids, target, factors, mode),
        whole_rows(model, ids, target, factors, batch=5, mode=mode),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_units_of_several_tokens_and_similar_ones_are_the_package_s(model):
    ids, target = prompt_of(QUICK)
    units = columns_of(QUICK, 3)
    atman = AtMan(model, None, factor=FACTOR)
    want = atman.explain(ids, target=[target], chunks=units).scores[0]
    torch.testing.assert_close(one_by_one(model, ids, target, factors_of(QUICK, units)), want)
    embeds = model.get_input_embeddings()(torch.tensor(ids))
    factors = similar_factors(embeds, 0.1)
    assert (factors != 1).sum() > 2 * len(ids)
    want = atman.explain(ids, target=[target], kappa=0.1).scores[0]
    torch.testing.assert_close(one_by_one(model, ids, target, factors), want, rtol=0, atol=1e-5)


def test_one_by_one_restores_the_model(model):
    ids, target = prompt_of(QUICK)
    before = model.config._attn_implementation, model(torch.tensor([ids])).logits
    one_by_one(model, ids, target, factors_of(QUICK, [[0]]))
    assert model.config._attn_implementation == before[0]
    assert torch.equal(model(torch.tensor([ids])).logits, before[1])


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_equal_and_states_its_floor(name):
    case = REGISTRY[name].build(OPTIONS)
    assert isinstance(case, Case)
    assert all(margin <= 1 for margin in check_equal(case).values())
    assert case.flops > 0 or name == "atman.inseq"
    if name != "atman.inseq":  # which takes a minute to import
        assert all(call is not None for call in case.peers.values())


def test_the_floor_of_one_column_is_a_plain_pass_and_a_suffix():
    shape = replace(QUICK, layers=1)
    D, V, T = shape.hidden, shape.V, shape.T
    head, row = 2 * D * V, 2 * (2 * D * D + 3 * D * shape.inner)  # of the row that predicts: query, output, MLP
    keys_and_values = 2 * D * D  # of one row, two query heads for each
    rest = row + head + 4 * T * D
    factors = factors_of(shape, [[T - 3]])
    assert floor_flops(shape, factors) == (T + 3) * keys_and_values + 2 * rest


@pytest.mark.parametrize(("name", "least", "most"), [("t48", 3, 6), ("t128", 3, 6), ("t256", 2, 4)])
def test_what_can_be_saved_is_what_the_method_promises(name, least, most):
    shape = SHAPES["cpu"][name]
    factors = factors_of(shape, columns_of(shape, shape.T))
    assert least < naive_flops(shape, shape.T) / floor_flops(shape, factors) < most


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_runs_at_its_smallest_and_largest_size(name):
    smallest = CURVES[name]["quick_smallest"]
    for size in (smallest, 16 * smallest):
        CURVES[name]["make"](size, OPTIONS)()


def test_a_pass_of_suffixes_fills_its_budget():
    tensors, layout = suffix_inputs(OPTIONS, "float32")
    T, _, _, _, budget = QUICK_ATTENTION
    assert layout["cu_seqlens"][-1] == len(tensors[0]) == len(tensors[-1]) <= budget
    assert (layout["cu_seqlens"].diff() + layout["prefix_length"] == T).all()
    assert (tensors[-1] != 1).sum() == len(layout["prefix_length"])


def test_tuning_leaves_the_limits_of_a_row_alone():
    row = SUFFIX_CONFIGS[0]
    tried = list(candidates(row, limits=2))
    assert tried[0] == row and len(tried) > 4
    assert {each[:2] for each in tried} == {row[:2]}
