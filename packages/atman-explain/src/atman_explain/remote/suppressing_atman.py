"""The intervention that suppresses columns of whole rows: in batches of explanations, and while a model generates."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .hook_atman import AttentionCall, Intervention, only_heads


class SuppressedColumns(Intervention):
    """Gives every key the factor of its column.

    Args:
        modules: `id` of the attention modules that are changed; None: all.
        factors: [R, C], for R rows of a batch. Column 0 is a row's first token that is no padding; columns after C
            have factor 1. A batch of k R rows repeats every row k times, as beam search and `num_return_sequences` do.
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
        self._padding: Tensor | None = None  # [B], columns before the first token of every row

    def begin(self, attention_mask: Tensor | None) -> None:
        """See how many columns of padding precede every row's first token."""
        padding = None if attention_mask is None else attention_mask.ne(0).to(torch.uint8).argmax(-1)
        self._padding = padding if padding is not None and padding.any() else None

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention with suppressed columns, [B, H, Tq, Dv]."""
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
        wide = torch.float64 if call.key.dtype == torch.float64 else torch.float32
        self.factors = self.factors.to(call.key.device, wide)
        factors = self.factors.repeat_interleave(rows // self.factors.shape[0], dim=0)
        if self._padding is not None and len(self._padding) == rows:
            return self._after_padding(factors, call.first_column, keys)
        known = factors[:, call.first_column : call.first_column + keys]
        return torch.nn.functional.pad(known, (0, keys - known.shape[1]), value=1.0)

    def _after_padding(self, factors: Tensor, first_column: int, keys: int) -> Tensor:
        assert self._padding is not None
        columns = torch.arange(first_column, first_column + keys, device=factors.device)
        columns = columns - self._padding.to(factors.device)[:, None]  # [B, Tk]
        is_known = (columns >= 0) & (columns < factors.shape[1])
        return factors.gather(1, columns.clamp(0, factors.shape[1] - 1)).where(is_known, 1.0)
