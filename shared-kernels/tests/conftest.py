"""One fixture runs a test on every implementation and device; interpreter tests need a process of their own."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shared_kernels.testing import nan_filled_empty

PLACES = [
    pytest.param(("eager", "cpu"), id="eager"),
    pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.triton),
    pytest.param(("eager", "cuda"), id="eager-on-gpu", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-on-gpu", marks=pytest.mark.gpu),
]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_interpreter = pytest.mark.skip(reason="needs a process started with TRITON_INTERPRET=1")
    needs_gpu = pytest.mark.skip(reason="needs a GPU, and no TRITON_INTERPRET")
    for item in items:
        if item.get_closest_marker("triton") and not INTERPRETS:
            item.add_marker(needs_interpreter)
        if item.get_closest_marker("gpu") and (INTERPRETS or not torch.cuda.is_available()):
            item.add_marker(needs_gpu)


@pytest.fixture(params=["eager", pytest.param("triton", id="interpreter", marks=pytest.mark.triton)])
def impl(request: pytest.FixtureRequest) -> str:
    """The implementation, without poisoned memory: `torch.compile` cannot look into that."""
    return request.param


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """`run(op, *args, **kwargs)`: the operator on one implementation and device, with CPU tensors in and out."""
    impl, device = request.param

    def move(value: Any, to: str) -> Any:
        return value.to(to) if isinstance(value, torch.Tensor) else value

    def call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args = tuple(move(each, device) for each in args)
        out = op(*args, **{name: move(each, device) for name, each in kwargs.items()}, impl=impl)
        return tuple(move(each, "cpu") for each in out) if isinstance(out, tuple) else move(out, "cpu")

    call.impl = impl
    with nan_filled_empty():
        yield call
