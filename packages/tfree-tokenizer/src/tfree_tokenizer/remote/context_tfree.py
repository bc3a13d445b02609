"""What an id can see: masks, positions and documents of sequences that spell words in bytes."""

from typing import Any

import torch
from torch import Tensor, nn

from .spelling_tfree import WordsInIds, words_before


def whole_context(input_ids: Tensor, past_key_values: Any, context_ids: Tensor | None) -> Tensor:
    """All ids so far: `context_ids`, or what a cache that this model filled remembers, and `input_ids`."""
    if context_ids is not None:
        return context_ids
    past, seen = cache_length(past_key_values), getattr(past_key_values, "context_ids", None)
    if not past or seen is None or seen.shape[0] != input_ids.shape[0] or seen.shape[1] < past:
        return input_ids
    return torch.cat([seen[:, :past], input_ids], 1)


def cache_length(past_key_values: Any) -> int:
    """Ids that a cache holds; 0 without one."""
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


def document_starts(position_ids: Tensor) -> Tensor:
    """Mark the positions that do not rise, where a packed document begins: bool [B, L]."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return starts


def joins_documents(is_counted: Tensor, starts: Tensor) -> bool:
    """Whether a row holds counted words on both sides of a start."""
    return bool((is_counted & (words_before(is_counted) > words_before(is_counted, starts))).any())


def hide_inside(attention_mask: Tensor | None, is_final: Tensor, length: int) -> Tensor:
    """Mask [B, length] in which bytes inside spelled words of the last ids are 0."""
    if attention_mask is None:
        attention_mask = torch.ones(is_final.shape[0], length, dtype=torch.long, device=is_final.device)
    hidden = attention_mask.clone()
    columns = min(is_final.shape[1], length)
    hidden[:, length - columns : length] *= is_final[:, -columns:].to(hidden.dtype)
    return hidden


def check_prepared_mask(attention_mask: Tensor, is_final: Tensor, length: int) -> Tensor:
    """Refuse a 4-D mask that shows bytes inside words; return which ids are visible to themselves: bool [B, L]."""
    visible = attention_mask
    if visible.dtype != torch.bool:
        visible = visible > torch.finfo(visible.dtype).min / 2
    columns = visible[..., length - is_final.shape[1] : length]
    if bool((columns & ~is_final[:, None, None]).any()):
        raise ValueError(
            "attention_mask (4-D) must hide the bytes inside spelled words; pass a 2-D mask, or build the 4-D one from "
            "a mask that is 0 there."
        )
    rows = visible.shape[-2]
    return visible[:, 0, :, length - rows : length].diagonal(dim1=1, dim2=2)


def predicting_contexts(
    hidden: Tensor, words: WordsInIds | None, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What each id can be predicted from.

    Returns:
        bool [B, L], whether a visible word of its document stands before it, and int64 [B, L], which document of its
        row it belongs to.
    """
    visible = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if words is not None:
        visible = words.is_final[:, -hidden.shape[1] :]
    if attention_mask is not None and attention_mask.ndim == 2:
        visible = visible & attention_mask[:, -hidden.shape[1] :].bool()
    if position_ids is None:
        return words_before(visible) > 0, torch.zeros_like(visible, dtype=torch.long)
    starts = document_starts(position_ids).expand(visible.shape)
    return words_before(visible, starts) > 0, starts.long().cumsum(1)


def unshift_labels(
    hidden: Tensor,
    input_ids: Tensor | None,
    shift_labels: Tensor,
    has_context: Tensor,
    document: Tensor,
    loss_weights: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """Put targets that stand under the states that predict them one place on, where labels stand: all [B, L + 1]."""
    if shift_labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"shift_labels must have the shape of input_ids {tuple(hidden.shape[:2])}, got {tuple(shift_labels.shape)}."
        )
    return (
        torch.cat([hidden, hidden[:, -1:]], 1),
        None if input_ids is None else nn.functional.pad(input_ids, (0, 1)),
        nn.functional.pad(shift_labels, (1, 0), value=-100),
        nn.functional.pad(has_context, (0, 1), value=True),
        torch.cat([document, document[:, -1:]], 1),
        None if loss_weights is None else nn.functional.pad(loss_weights, (1, 0)),
    )
