import os
import subprocess
import sys

import pytest
import torch

from shared_kernels import _dispatch, csr_gather_sum

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be on a machine: with Triton or not, interpreting or not, with the switch set."""

    def set_up(triton=True, interprets=False, switch="auto"):
        monkeypatch.setattr(_dispatch, "_HAS_TRITON", triton)
        monkeypatch.setattr(_dispatch, "_INTERPRETS", interprets)
        monkeypatch.setattr(_dispatch, "BACKEND", switch)

    return set_up


@pytest.mark.parametrize(
    ("triton", "switch", "device", "chosen"),
    [
        (True, "auto", CUDA, "triton"),
        (True, "auto", torch.device("xpu"), "triton"),
        (True, "auto", CPU, "eager"),
        (False, "auto", CUDA, "eager"),
        (True, "torch", CUDA, "eager"),
        (True, "triton", CUDA, "triton"),
    ],
)
def test_auto_means_triton_on_gpus_unless_the_switch_says_otherwise(machine, triton, switch, device, chosen):
    machine(triton=triton, switch=switch)
    assert _dispatch.choose("auto", "op", device, torch.float32) == chosen


def test_the_argument_wins_over_the_switch(machine):
    machine(switch="torch")
    assert _dispatch.choose("triton", "op", CUDA, torch.float32) == "triton"
    machine(switch="triton")
    assert _dispatch.choose("eager", "op", CUDA, torch.float32) == "eager"


def test_interpreted_kernels_run_on_the_cpu_when_asked_for(machine):
    machine(interprets=True)
    assert _dispatch.choose("triton", "op", CPU) == "triton"
    assert _dispatch.choose("auto", "op", CPU) == "eager"


@pytest.mark.parametrize(
    ("impl", "switch", "triton", "message"),
    [
        ("triton", "auto", True, 'impl="triton" needs tensors on a GPU and the package triton, got no tensor on a GPU'),
        ("triton", "auto", False, 'got no installed package triton; pass impl="eager"'),
        ("auto", "triton", True, "SHARED_KERNELS_BACKEND=triton needs tensors on a GPU"),
    ],
)
def test_asking_for_triton_where_it_cannot_run_is_an_error(machine, impl, switch, triton, message):
    machine(triton=triton, switch=switch)
    table = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=message):
        csr_gather_sum(torch.tensor([0, 1]), torch.tensor([0]), table, impl=impl)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match='impl must be "auto", "triton" or "eager", got \'torch\''):
        csr_gather_sum(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(2, 3), impl="torch")


def test_float64_falls_back_with_one_warning_and_is_refused_by_name(machine, monkeypatch):
    machine()
    monkeypatch.setattr(_dispatch, "_already_warned", set())
    with pytest.warns(
        UserWarning, match="op: the Triton kernels sum in float32, so torch.float64 runs in PyTorch"
    ) as seen:
        assert [_dispatch.choose("auto", "op", CUDA, torch.float64) for _ in range(2)] == ["eager", "eager"]
    assert len(seen) == 1
    with pytest.raises(ValueError, match='impl="triton" sums in float32, got a torch'):
        _dispatch.choose("triton", "op", CUDA, torch.float64)


@pytest.mark.parametrize("value", ["auto", "triton", "torch"])
def test_the_switch_is_read(value):
    assert _dispatch.read_switch({"SHARED_KERNELS_BACKEND": value}) == value


def test_the_switch_is_auto_by_default():
    assert _dispatch.read_switch({}) == "auto"


def test_any_other_value_of_the_switch_fails_at_import():
    command = [sys.executable, "-c", "import shared_kernels._dispatch"]
    environ = {**os.environ, "SHARED_KERNELS_BACKEND": "cuda"}
    done = subprocess.run(command, check=False, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert 'ValueError: SHARED_KERNELS_BACKEND must be "auto", "triton" or "torch", got \'cuda\'.' in done.stderr
