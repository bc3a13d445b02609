"""Models whose attention does not go through transformers' interface: one adapter for each kind."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .hook_atman import IMPLEMENTATION, AttentionCall, dispatch

Adapter = Callable[[PreTrainedModel], AbstractContextManager[None]]
"""Patches the attention of a model so that it goes through `dispatch`, and undoes that on exit."""

_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(model_type: str, adapter: Adapter) -> None:
    """Teach AtMan a kind of model that computes attention on its own.

    Args:
        model_type: `config.model_type` of the models.
        adapter: takes a model and returns a context manager, in which every attention module forms its output by
            `dispatch(AttentionCall(...))`; both are in `hook_atman`.
    """
    _ADAPTERS[model_type] = adapter


def find_adapter(model: PreTrainedModel) -> Adapter | None:
    """The adapter for a model, if it has one: a registered one, or ours where the class needs it."""
    model_type = model.config.model_type
    if model_type in _ADAPTERS or model._can_set_attn_implementation():
        return _ADAPTERS.get(model_type)
    return _built_in(model_type)


def _built_in(model_type: str) -> Adapter | None:
    """Our own adapters, each imported with its models only."""
    if model_type == "blip":
        from .adapter_blip_atman import adapt_blip

        return adapt_blip
    if model_type == "bloom":
        from .adapter_bloom_atman import adapt_bloom

        return adapt_bloom
    if model_type == "falcon":
        from .adapter_falcon_atman import adapt_falcon

        return adapt_falcon
    if model_type == "gptj":
        from .adapter_gptj_atman import adapt_gptj

        return adapt_gptj
    return None


@contextlib.contextmanager
def patched_forward(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Give modules another `forward` within this context.

    Args:
        modules: of one kind.
        forward: a function of the module and of what the module's own `forward` takes.
    """
    with contextlib.ExitStack() as undo:
        for module in modules:
            undo.callback(_restore_forward, module, vars(module).get("forward"))  # accelerate patches it, too
            module.forward = MethodType(forward, module)
        yield


def _restore_forward(module: nn.Module, former: Callable[..., Any] | None) -> None:
    del module.forward
    if former is not None:
        module.forward = former


@contextlib.contextmanager
def boolean_masks(config: PreTrainedConfig) -> Iterator[None]:
    """Let a model make AtMan's masks within this context: True where a row sees a key."""
    former = config._attn_implementation
    config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation_internal = former


def attend_causally(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal self-attention of a patched module.

    Args:
        module: whose attention it is.
        query: [B, H, Tq, D].
        key: [B, Hk, Tk, D], with what the cache held.
        value: [B, Hk, Tk, D].
        mask: bool [B, 1, Tq, Tk]; None: no padding and nothing in the cache.
        scale: of the scores.
        bias: float, broadcastable to [B, H, Tq, Tk]: position bias.
        dropout: of attention weights.

    Returns:
        [B, Tq, H D].

    Raises:
        ValueError: the module is in training mode and has dropout.
    """
    if dropout and module.training:
        raise ValueError(
            f"Attention dropout must be 0 where AtMan computes attention, got {dropout} in {type(module).__name__}: "
            "call model.eval() first."
        )
    is_causal = mask is None and query.shape[2] > 1
    if is_causal:  # behind the queries is the empty end of a static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        bias = None if bias is None else bias[..., : query.shape[2]]
    call = AttentionCall(
        module=module, query=query, key=key, value=value, visible=mask, bias=bias, is_causal=is_causal, scale=scale
    )
    return dispatch(call).transpose(1, 2).flatten(2)
