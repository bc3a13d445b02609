"""The intervention that suppresses columns of whole rows: in batches of explanations, and while a model generates."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .hook_atman import AttentionCall, Intervention, only_heads


class SuppressedColumns(Intervention):
    """Gives every key the factor of its column.

    Args:
        modules: `id` of the attention modules that are changed; None: all.
        factors: [R, C], for R rows of a batch. Columns after C have factor 1. A batch of k R rows repeats every row
            k times, as beam search and `num_return_sequences` do.
        mode: how scores are changed.
        heads: query heads that are changed; None: all.
    """

    def __init__(
        self, modules: Collection[int] | None, factors: Tensor, mode: str, heads: Sequence[int] | None = None
    ) -> None:
        self.modules = modules
        self.factors = factors
        self.mode = mode
        self.heads = heads
        self.num_calls = 0

    def attend(self, call: AttentionCall) -> Tensor:
        self.num_calls += 1
        out = call.attend(self._of_keys(call), self.mode)
        return out if self.heads is None else only_heads(out, call.attend(), self.heads, dim=1)

    def _of_keys(self, call: AttentionCall) -> Tensor:
        """The factors [B, Tk] of a call's keys."""
        rows, keys = call.key.shape[0], call.key.shape[2]
        if rows % self.factors.shape[0]:
            raise ValueError(
                f"The model runs a batch of {rows} rows, but factors were given for {self.factors.shape[0]}; give one "
                "row of factors per prompt."
            )
        if self.factors.device != call.key.device:
            self.factors = self.factors.to(call.key.device)
        known = self.factors[:, call.first_column : call.first_column + keys]
        padded = torch.nn.functional.pad(known, (0, keys - known.shape[1]), value=1.0)
        return padded.repeat_interleave(rows // padded.shape[0], dim=0)
