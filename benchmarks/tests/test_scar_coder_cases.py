"""The cases of the sparse coder: every peer computes the same, both plans are among them, floors are stated."""

import pytest
import torch

from benchmarks.cases.scar.coder import DECODED_ROWS, KEPT, TRAINING, decoder_rows, selection
from benchmarks.cases.scar.inputs import PUBLISHED, QUICK, coder_of
from benchmarks.harness import REGISTRY, Case, Options, check_equal
from shared_kernels.sparse_coder.eager import most_gathered

OPTIONS = Options(quick=True)
NAMES = [name for name in REGISTRY if name.startswith("scar.coder.")]


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_equal_and_states_its_floor(name):
    case = REGISTRY[name].build(OPTIONS)
    assert isinstance(case, Case)
    assert check_equal(case) and all(margin <= 1 for margin in check_equal(case).values())
    assert case.flops > 0 and case.bytes > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_either_plan_decodes_some_of_the_cases(device):
    most = most_gathered("sum", DECODED_ROWS, PUBLISHED.n, torch.device(device))
    assert min(KEPT) < most < max(KEPT)


def test_a_training_step_on_a_cpu_gathers():
    N, (_, n, k) = TRAINING["cpu"]
    assert all(k <= most_gathered(work, N, n, torch.device("cpu")) for work in ("sum", "product", "columns"))


def test_decoder_rows_are_the_decoder_turned_around():
    rows = decoder_rows(QUICK, "cpu", "float32")
    assert rows.is_contiguous()
    assert torch.equal(rows.T, coder_of(QUICK, "cpu", "float32").decoder)


def test_a_selection_is_distinct_and_in_order():
    indices = selection(5, 30, 7, "cpu")
    assert indices.dtype == torch.int32
    assert (indices.diff(dim=1) > 0).all()
