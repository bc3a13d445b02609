"""Passes over whole rows: exact for every causal model, also where a column changes rows before it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .hook_atman import active
from .observing_atman import Observation, target_rows
from .passages_atman import Passage, RunSettings, Suppression, agree, forward_rows, pack
from .replaying_atman import repeat, replayed
from .suppressing_atman import SuppressedColumns


class BatchPasses:
    """A few passages of one causal model, run again from their first column on.

    Args:
        model: in eval mode, switched to AtMan's attention.
        passages: what to run.
        observed: their plain runs.
        chosen: attention modules that are manipulated.
        settings: how to run them.
    """

    is_causal = True

    def __init__(
        self,
        model: PreTrainedModel,
        passages: Sequence[Passage],
        observed: Sequence[Observation],
        *,
        chosen: Sequence[nn.Module],
        settings: RunSettings,
    ) -> None:
        self._model = model
        self._passages = passages
        self._observed = observed
        self._chosen = {id(module) for module in chosen}
        self._settings = settings
        self.baseline = [each.readouts for each in observed]
        self.num_positions = 0
        self._is_replayed = [self._can_replay(number) for number in range(len(passages))]

    def embeds(self, passage: int) -> Tensor:
        """Input embeddings [T, D] of a passage."""
        return self._observed[passage].input.embeds

    def run(self, items: Sequence[Suppression]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of every item and its read-outs [M], in an order of its own choice."""
        for number, passage in enumerate(self._passages):
            mine = [index for index, item in enumerate(items) if item.passage == number]
            most = self._settings.most_items([passage], self._model.config.get_text_config().vocab_size)
            if passage.model_inputs and not self._is_replayed[number]:
                most = 1  # what images need besides is not known
            for group in pack([passage.length] * len(mine), tokens=self._settings.tokens, most=most):
                chosen = [mine[each] for each in group]
                factors = torch.stack([items[index].factors() for index in chosen])
                yield from zip(chosen, self._run(number, factors), strict=True)

    def _run(self, number: int, factors: Tensor) -> Tensor:
        """Read-outs [n, M] of a passage under factors [n, T]."""
        self.num_positions += factors.numel()
        wide = torch.float64 if self._model.dtype == torch.float64 else torch.float32
        with active(SuppressedColumns(self._chosen, factors.to(wide), self._settings.mode, self._settings.heads)):
            return (
                self._replay(number, len(factors)) if self._is_replayed[number] else self._rerun(number, len(factors))
            )

    def _rerun(self, number: int, times: int) -> Tensor:
        """Read-outs [n, M] of the model's own inputs, n times."""
        return self._read(number, times, **tiled(self._observed[number].inputs, times))

    def _replay(self, number: int, times: int) -> Tensor:
        """Read-outs [n, M] of what entered the decoder, n times."""
        entered = self._observed[number].entered
        with replayed(self._model.get_decoder(), entered, times):
            return self._read(number, times, inputs_embeds=repeat(entered["inputs_embeds"], times), use_cache=False)

    def _can_replay(self, number: int) -> bool:
        """Whether images need not be encoded again for every row: all that they do is in the decoder's input."""
        observed = self._observed[number]
        if not self._passages[number].model_inputs or observed.entered.get("inputs_embeds") is None:
            return False
        try:
            return agree(self._replay(number, 1)[0], observed.readouts, self._model.dtype)
        except (TypeError, ValueError):  # the model insists on ids
            return False

    def _read(self, number: int, times: int, **inputs: Any) -> Tensor:
        passage = self._passages[number]
        logits = forward_rows(self._model, target_rows(passage, self._model), **inputs)
        targets = torch.tensor(passage.target_ids, device=logits.device)
        return self._settings.readout(logits, targets.expand(times, -1)).cpu()


def tiled(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The inputs of one row, as those of a batch of equal rows."""
    return {
        name: value.repeat(times, *(1,) * (value.ndim - 1)) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
