"""What a forward pass says about its tokens: which are padding, and which begin a sequence."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pass(NamedTuple):
    """Arguments of a language model's forward pass that place its tokens."""

    attention_mask: Tensor | None = None
    """[B, all tokens so far], 1 for real tokens."""

    position_ids: Tensor | None = None
    """[B or 1, L]."""

    past_length: int = 0
    """Tokens in the cache, where neither of the above is given."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Pass":
        """Read the keyword arguments of a transformers model."""
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None
        cache = arguments.get("past_key_values")
        has_place = mask is not None or positions is not None
        past = 0 if has_place or not hasattr(cache, "get_seq_length") else int(cache.get_seq_length())
        return cls(mask, positions, past)

    def is_real(self, length: int) -> Tensor | None:
        """Which of the pass's `length` columns hold no padding [B, L]; None if no mask was given."""
        return None if self.attention_mask is None else self.attention_mask[:, -length:].bool()

    def is_first(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Which tokens begin a sequence [B, L]."""
        if self.attention_mask is not None and self.attention_mask.shape[1] >= length:
            real = self.attention_mask.bool()
            return (real & (real.cumsum(-1) == 1))[:, -length:].to(device)
        if self.position_ids is not None:
            return (self.position_ids == 0).expand(batch, -1).to(device)
        columns = torch.arange(self.past_length, self.past_length + length, device=device)
        return (columns == 0).expand(batch, -1)
