"""One plain pass of a model, watched: which attention modules it calls, and what enters its decoder."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .decoder_atman import DecoderInput
from .errors_atman import UnsupportedModelError
from .hook_atman import AttentionCall, Intervention, active, in_this_thread
from .passages_atman import Passage, Readout, forward_rows


@dataclass(frozen=True)
class Observation:
    """What a plain pass showed."""

    readouts: Tensor
    """[M]"""
    input: DecoderInput
    modules: tuple[nn.Module, ...]
    """The decoder's attention modules, in the order of their first call."""
    inputs: Mapping[str, Any]
    """What the model was given."""
    is_causal: bool = True
    """Whether the decoder is fully described by its input: no row sees a later one, nothing else enters it."""
    has_position_bias: bool = False
    """Whether attention modules add to their scores."""
    entered: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the decoder."""


class Observer(Intervention):
    """Leaves attention as it is and keeps a list of who was called, and with how many queries and keys."""

    def __init__(self) -> None:
        self.modules = None
        self.called: list[nn.Module] = []
        self.lengths: list[tuple[int, int]] = []
        """Queries and keys of the first call of every module in `called`."""
        self.looking_ahead: set[int] = set()
        """`id` of modules some of whose rows see keys behind them."""
        self.has_position_bias = False
        self._mask: Tensor | None = None  # the last one that was looked at; layers share it
        self._looks_ahead = False

    def attend(self, call: AttentionCall) -> Tensor:
        if not any(call.module is module for module in self.called):
            self.called.append(call.module)
            self.lengths.append((call.query.shape[2], call.key.shape[2]))
            if call.visible is None or call.visible is not self._mask:
                self._mask, self._looks_ahead = call.visible, _looks_ahead(call)
            if self._looks_ahead:
                self.looking_ahead.add(id(call.module))
            self.has_position_bias |= call.bias is not None and bool(call.bias.any())
        return call.attend()


def _looks_ahead(call: AttentionCall) -> bool:
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.visible is None:
        return not call.is_causal and queries > 1
    return bool(call.visible.expand(*call.visible.shape[:2], queries, keys).triu(keys - queries + 1).any())


def observe_decoder(model: PreTrainedModel, passage: Passage, readout: Readout) -> Observation:
    """Run a causal model on a passage, plainly, and watch.

    Raises:
        UnsupportedModelError: no attention module of the decoder came by.
    """
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    for uses_cache in (False, True):  # T-FREE leaves out the bytes inside spelled words, unless it fills a cache
        inputs = plain_inputs(passage, model) | {"use_cache": uses_cache}
        observer = Observer()
        with active(observer), _seen_inputs(decoder) as seen:
            logits = forward_rows(model, target_rows(passage, model), **inputs)
        modules = tuple(module for module in observer.called if id(module) in inside)
        calls = zip(observer.called, observer.lengths, strict=True)
        if all(keys == passage.length for module, (_, keys) in calls if id(module) in inside):
            break
    else:
        raise UnsupportedModelError(
            f"{type(model).__name__} attends to other positions than the {passage.length} tokens it is given, so no "
            "token's column is known."
        )
    if not modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} ran without calling attention through transformers' interface, so nothing can be "
            "suppressed; a model without attention, or with its own, cannot be explained this way."
        )
    targets = torch.tensor(passage.target_ids, device=logits.device)
    embeds = seen.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(torch.tensor([passage.ids], device=model.device))
    position_ids = seen.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(passage.length, device=embeds.device)[None]
    is_causal = observer.looking_ahead.isdisjoint(map(id, modules)) and not _has_features(seen)
    return Observation(
        readout(logits[0], targets),
        DecoderInput(embeds[0], position_ids),
        modules,
        inputs,
        is_causal,
        observer.has_position_bias,
        seen,
    )


def _has_features(seen: Mapping[str, Any]) -> bool:
    """Whether a decoder is given features besides its input embeddings, for its inner layers."""
    others = [value for name, value in seen.items() if name not in ("attention_mask", "inputs_embeds")]
    parts = [each for value in others for each in (value if isinstance(value, (list, tuple)) else [value])]
    return any(isinstance(each, Tensor) and each.is_floating_point() for each in parts)


def plain_inputs(passage: Passage, model: PreTrainedModel) -> dict[str, Any]:
    """The inputs of a causal model for one passage, on its device; vision-language processors may add others."""
    ids = torch.tensor([passage.ids], device=model.device)
    extra = further_inputs(passage.model_inputs, model)
    for name, tensor in extra.items():
        if name.endswith("token_type_ids"):  # the target's tokens are text
            extra[name] = nn.functional.pad(tensor, (0, passage.length - tensor.shape[1]))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, **extra}


def further_inputs(model_inputs: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """What a processor made besides ids, on the device of a model and in its precision."""
    dtype = model.dtype
    return {
        name: tensor.to(model.device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model_inputs.items()
    }


def target_rows(passage: Passage, model: PreTrainedModel) -> Tensor:
    """The rows [M] of a causal model that predict the target."""
    return torch.arange(passage.first_row, passage.length, device=model.device)


@contextlib.contextmanager
def _seen_inputs(decoder: nn.Module) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}

    def look(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = decoder.register_forward_pre_hook(in_this_thread(look), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
