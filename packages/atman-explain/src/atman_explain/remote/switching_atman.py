"""Switching a model to AtMan's attention and back, whatever happens in between."""

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .adapters_atman import find_adapter
from .errors_atman import UnsupportedModelError
from .hook_atman import IMPLEMENTATION, active_interventions


class _Shared:
    """What several contexts need at a time: done by the first one to begin, undone by the last one to end."""

    def __init__(self) -> None:
        self._depth = 0
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self, enter: Callable[[contextlib.ExitStack], object]) -> Iterator[None]:
        with _LOCK:
            if self._depth == 0:
                with contextlib.ExitStack() as undo:
                    enter(undo)
                    self._undo = undo.pop_all()
            self._depth += 1
        try:
            yield
        finally:
            with _LOCK:
                self._depth -= 1
                if self._depth == 0:
                    self._undo.close()


_LOCK = threading.RLock()
_SWITCHED: "weakref.WeakKeyDictionary[nn.Module, _Shared]" = weakref.WeakKeyDictionary()
_EVALUATING: "weakref.WeakKeyDictionary[nn.Module, _Shared]" = weakref.WeakKeyDictionary()
_UNCOMPILED = _Shared()


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model inside wrappers of `torch.compile` and PEFT.

    Raises:
        UnsupportedModelError: it is no transformers model, or one with virtual prompt tokens.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and not isinstance(model, PreTrainedModel):
            config = getattr(model, "active_peft_config", None)
            if getattr(config, "is_prompt_learning", False):
                raise UnsupportedModelError(
                    f"model uses {type(config).__name__}, whose virtual tokens shift every position; merge or disable "
                    "this adapter first."
                )
            model = model.get_base_model()
        elif isinstance(model, PreTrainedModel):
            return model
        else:
            raise UnsupportedModelError(
                f"model must be a transformers model, or one wrapped by PEFT or torch.compile, got "
                f"{type(model).__name__}."
            )


@contextlib.contextmanager
def atman_implementation(model: PreTrainedModel) -> Iterator[None]:
    """Run a model's attention through AtMan's function within this context; nested and concurrent uses share it.

    Raises:
        UnsupportedModelError: the model's class does not call attention through transformers' interface, and no
            adapter knows it.
    """
    with _LOCK:
        switched = _SWITCHED.setdefault(model, _Shared())
    with _UNCOMPILED(_run_uncompiled), switched(lambda undo: _enter(model, undo)):
        yield


def _run_uncompiled(undo: contextlib.ExitStack) -> None:
    # compiled graphs would be made anew for every layout of packed rows
    undo.enter_context(torch.compiler.set_stance("force_eager"))


def _enter(model: PreTrainedModel, undo: contextlib.ExitStack) -> None:
    adapter = find_adapter(model)
    if adapter is not None:
        undo.enter_context(adapter(model))
    elif not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} does not compute attention through transformers' AttentionInterface, so it cannot "
            "be suppressed there; write an adapter and pass it to atman_explain.register_adapter."
        )
    else:
        undo.callback(_restore, _implementations(model))
        model.set_attn_implementation(IMPLEMENTATION)
    undo.callback(model.register_forward_pre_hook(_before_forward, with_kwargs=True).remove)


def _implementations(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """The attention implementation of every configuration in a model, outer ones first."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while pending:
        config = pending.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
            pending += [part for part in parts if isinstance(part, PreTrainedConfig)]
    return [(config, config._attn_implementation) for config in found.values()]


def _restore(implementations: list[tuple[PreTrainedConfig, str | None]]) -> None:
    for config, implementation in implementations:
        # the public setter would change the parts of a configuration along with it
        config._attn_implementation_internal = implementation


def _before_forward(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given |= given.get("kwargs", {})
    wants_weights = given.get("output_attentions")
    if model.config.output_attentions if wants_weights is None else wants_weights:
        raise ValueError(
            "output_attentions=True is not available while AtMan acts on the model, because no attention weights are "
            'formed; ask for them outside, with model.set_attn_implementation("eager").'
        )
    mask = given.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:  # adapters' models do not build masks by our function
        for intervention in active_interventions():
            intervention.begin(mask)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode and without gradients, and put every module back into its own mode afterwards.

    Nested and concurrent uses share the mode: it ends when the last of them does.
    """
    with _LOCK:
        evaluating = _EVALUATING.setdefault(model, _Shared())
    with evaluating(lambda undo: _enter_evaluation(model, undo)), torch.no_grad():
        yield


def _enter_evaluation(model: nn.Module, undo: contextlib.ExitStack) -> None:
    undo.callback(_restore_modes, [(module, module.training) for module in model.modules()])
    model.eval()


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode
