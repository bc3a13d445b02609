"""The steering cases: every contender is equal, and the original's formulas are the package's definition."""

import pytest
import torch

from benchmarks.cases.scar.inputs import QUICK, coder_of, original_encode, original_gated_add, original_steer, rows_of
from benchmarks.harness import REGISTRY, Case, Options, check_equal
from shared_kernels.scar_steer.reference import scar_steer_reference

OPTIONS = Options(quick=True)
NAMES = [name for name in REGISTRY if name.startswith("scar.steer.")]


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_equal_and_states_its_floor(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes seconds, and is not ours to test
    case = REGISTRY[name].build(OPTIONS)
    assert isinstance(case, Case)
    assert all(margin <= 1 for margin in check_equal(case).values())
    assert case.peers
    assert case.flops > 0
    assert case.bytes > 0


def test_the_original_without_its_error_is_the_definition():
    coder = coder_of(QUICK, "cpu", "float32")
    coder = type(coder)(*(each.double() for each in coder[:4]), coder.k)
    x = rows_of(20, QUICK.d, OPTIONS, "float32").double()
    latents = original_encode(x, coder)[0]
    assert (latents[:, 0] > 0).all()
    assert ((latents != 0).sum(1) <= QUICK.k).all()
    concept = [each.double() for each in coder.concept()]
    error = original_steer(x, coder, 1.0) - x
    for multiplier in (-5.0, 0.0, 3.0):
        strength = torch.full((1, 1), multiplier - 1, dtype=torch.float64)
        want, _ = scar_steer_reference(x, *concept, strength, rule="scale")
        torch.testing.assert_close(original_steer(x, coder, multiplier) - error, want, rtol=1e-6, atol=1e-6)
    for alpha in (-0.5, 0.5):
        want, _ = scar_steer_reference(x, *concept, torch.full((1, 1), alpha), rule="add_gated")
        torch.testing.assert_close(original_gated_add(x, coder, alpha), want, rtol=1e-6, atol=1e-6)
