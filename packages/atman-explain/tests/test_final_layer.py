"""The last layer is run on the rows that are read, and on all rows where that is not possible."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atman_explain import explain
from atman_explain.remote.final_layer_atman import find_final_layer
from tests.support.atman import FAMILIES, PROMPT, TARGET, reference_scores, tiny_model

P, M = len(PROMPT), len(TARGET)
T = P + M - 1
SUFFIXES = sum(T - min(column, P - 1) for column in range(P))


def rows_of_calls(module: nn.Module) -> list[int]:
    """Rows of every later call of a module."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    return rows


def test_only_target_rows_reach_the_last_mlp() -> None:
    model = tiny_model("llama")
    first, last = (rows_of_calls(model.model.layers[n].mlp) for n in (0, -1))
    explain(model, None, list(PROMPT), target=list(TARGET))
    assert first == [T, T, T - T // 2, SUFFIXES]
    assert last == [T, M, M, P * M]


class Stubborn(nn.Module):
    """An MLP that insists on all rows, or silently computes something else for some of them."""

    def __init__(self, inner: nn.Module, first: nn.Module, raises: bool) -> None:
        super().__init__()
        self.inner = inner
        self.raises = raises
        self.calls = rows_of_calls(first)

    def forward(self, states: Tensor) -> Tensor:
        if states.shape[1] == self.calls[-1]:
            return self.inner(states)
        if self.raises:
            raise RuntimeError("shape mismatch")
        return torch.zeros_like(states)


@pytest.mark.parametrize("raises", [True, False])
def test_a_layer_that_needs_all_rows_gets_them(raises: bool) -> None:
    model = tiny_model("llama")
    expected = reference_scores(model, PROMPT, TARGET)
    first, last = model.model.layers[0], model.model.layers[-1]
    last.mlp = Stubborn(last.mlp, first.mlp, raises)
    rows = rows_of_calls(first.mlp)
    scores = explain(model, None, list(PROMPT), target=list(TARGET)).scores
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-10)
    assert rows[-1] == SUFFIXES  # still packed


def test_an_error_in_the_last_layer_is_passed_on() -> None:
    model = tiny_model("llama")
    calls: list[Any] = []

    def trap(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise ValueError("broken")

    model.model.layers[-1].mlp.register_forward_hook(trap)
    with pytest.raises(ValueError, match="broken"):
        explain(model, None, list(PROMPT), target=list(TARGET))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_is_found(name: str) -> None:
    model = tiny_model(name)
    attentions = [
        each for name, each in model.named_modules() if name.endswith(("attn", "attention", "self_attention"))
    ]
    layer = find_final_layer(model, attentions[-1])
    assert layer is not None and any(each is attentions[-1] for each in layer.modules())
    assert find_final_layer(model, attentions[0]) is None
