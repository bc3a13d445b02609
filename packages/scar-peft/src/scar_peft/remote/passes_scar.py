"""What a forward pass says about its tokens: which are padding, which begin a sequence, and what was read before."""

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

    past: int | Tensor = 0
    """Tokens that were read in earlier passes, as far as this one goes on from them."""

    shape: tuple[int, int] | None = None
    """B and L, where the arguments tell."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Pass":
        """Read the arguments of a transformers model's forward pass."""
        tokens = next((arguments[name] for name in _TOKENS if isinstance(arguments.get(name), Tensor)), None)
        shape = None if tokens is None or tokens.ndim < 2 else (tokens.shape[0], tokens.shape[1])
        past = _past(arguments.get("past_key_values"))
        positions = arguments.get("position_ids")
        positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None
        return cls(_mask_of_tokens(arguments.get("attention_mask"), past), positions, past, shape)

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
        return (torch.arange(length, device=device) + self.past == 0).expand(batch, -1)

    def is_generated(self, length: int, prompt: int | None, device: torch.device) -> bool | Tensor:
        """Which of `length` tokens are not of the prompt [L]. Its length unknown, it is what is read with no cache."""
        if prompt is None:
            return self.past > 0
        return torch.arange(length, device=device) + self.past >= prompt


_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _past(cache: Any) -> int | Tensor:
    """Length of a cache now: static caches count in a tensor, which the pass itself will change."""
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return length.clone() if isinstance(length, Tensor) else length


def _mask_of_tokens(mask: Any, past: int | Tensor) -> Tensor | None:
    """[B, all tokens so far] of a mask by tokens, or of the first pass's mask by queries and keys."""
    if isinstance(mask, Mapping):  # by kind of layer
        mask = next((each for each in mask.values() if isinstance(each, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4 and isinstance(past, int) and past == 0:
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1)  # whether a token is seen by itself
        return own if own.dtype == torch.bool else own == 0
    return mask if mask.ndim == 2 else None
