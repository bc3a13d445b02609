"""One plain pass of a model, watched: which attention modules it calls, and what enters its decoder."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .decoder_atman import DecoderInput
from .errors_atman import UnsupportedModelError
from .hook_atman import AttentionCall, Intervention, active
from .passages_atman import Passage, Readout, forward_rows


@dataclass(frozen=True)
class Observation:
    """What a plain pass showed."""

    readouts: Tensor
    """[M]"""
    input: DecoderInput
    modules: tuple[nn.Module, ...]
    """The decoder's attention modules, in the order of their first call."""


class Observer(Intervention):
    """Leaves attention as it is and keeps a list of who was called, and with how many queries and keys."""

    def __init__(self) -> None:
        self.modules = None
        self.called: list[nn.Module] = []
        self.lengths: list[tuple[int, int]] = []
        """Queries and keys of the first call of every module in `called`."""

    def attend(self, call: AttentionCall) -> Tensor:
        if not any(call.module is module for module in self.called):
            self.called.append(call.module)
            self.lengths.append((call.query.shape[2], call.key.shape[2]))
        return call.attend()


def observe_decoder(model: PreTrainedModel, passage: Passage, readout: Readout) -> Observation:
    """Run a causal model on a passage, plainly, and watch.

    Raises:
        UnsupportedModelError: no attention module of the decoder came by.
    """
    decoder = model.get_decoder()
    observer = Observer()
    with active(observer), _seen_inputs(decoder) as seen:
        logits = forward_rows(model, target_rows(passage, model), **plain_inputs(passage, model))
    inside = {id(module) for module in decoder.modules()}
    modules = tuple(module for module in observer.called if id(module) in inside)
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
    return Observation(readout(logits[0], targets), DecoderInput(embeds[0], position_ids), modules)


def plain_inputs(passage: Passage, model: PreTrainedModel) -> dict[str, Any]:
    """The inputs of a causal model for one passage, on its device; vision-language processors may add others."""
    ids = torch.tensor([passage.ids], device=model.device)
    extra = {name: tensor.to(model.device) for name, tensor in passage.model_inputs.items()}
    for name, tensor in extra.items():
        if tensor.is_floating_point():
            extra[name] = tensor.to(model.dtype)
        elif tensor.ndim == 2 and tensor.shape == (1, len(passage.prompt_ids)):  # one value per token: the target's too
            extra[name] = nn.functional.pad(tensor, (0, passage.length - tensor.shape[1]))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, **extra}


def target_rows(passage: Passage, model: PreTrainedModel) -> Tensor:
    """The rows [M] of a causal model that predict the target."""
    return torch.arange(passage.first_row, passage.length, device=model.device)


@contextlib.contextmanager
def _seen_inputs(decoder: nn.Module) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}

    def look(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
