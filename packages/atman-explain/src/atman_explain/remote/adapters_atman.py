"""Models whose attention does not go through transformers' interface: one adapter for each kind."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from transformers import PreTrainedModel

Adapter = Callable[[PreTrainedModel], AbstractContextManager[None]]
"""Patches the attention of a model so that it goes through `dispatch`, and undoes that on exit."""

_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(model_type: str, adapter: Adapter) -> None:
    """Teach AtMan a kind of model that computes attention on its own.

    Args:
        model_type: `config.model_type` of the models.
        adapter: takes a model and returns a context manager, in which every attention module forms its output by
            `dispatch(AttentionCall(...))`.
    """
    _ADAPTERS[model_type] = adapter


def find_adapter(model: PreTrainedModel) -> Adapter | None:
    """The adapter for a model, if there is one."""
    return _ADAPTERS.get(model.config.model_type)
