"""Texts to token ids, each distinct text encoded once and alone, and the text columns that an edit's mask looks at."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers
from torch import Tensor

from .adapters import PromptRequest

logger = logging.get_logger(__name__)


def tokenize(tokenizer: Any, texts: Sequence[str], *, max_length: int | None = None, warn: bool = True) -> list[Any]:
    """One padded row of ids `[1, L]` per text."""
    length = max_length or tokenizer.model_max_length
    rows = []
    for text in texts:
        row = tokenizer(
            text, padding="max_length", max_length=length, truncation=True, return_length=True, return_tensors="pt"
        )
        if warn and row["attention_mask"].all():
            _warn_if_cut(tokenizer, text, length)
        rows.append(row)
    return rows


def _warn_if_cut(tokenizer: Any, text: str, length: int) -> None:
    whole = tokenizer(text)["input_ids"]
    if len(whole) > length:
        lost = tokenizer.decode(whole[length - 1 : -1])
        logger.warning(f"The text encoder reads {length} tokens; this part of the prompt was cut off: {lost!r}")


def encode_once(rows: Sequence[Any], encode: Callable[[Any], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Encode every distinct row alone, so that a prompt's bits do not depend on its neighbours; each `[n, ...]`."""
    known: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
    keys = [tuple(row["input_ids"].flatten().tolist()) for row in rows]
    for key, row in zip(keys, rows, strict=True):
        if key not in known:
            known[key] = encode(row)
    return tuple(torch.cat(parts) for parts in zip(*(known[key] for key in keys), strict=True))


@contextmanager
def lora_scaled(encoders: Sequence[Any], scale: float | None) -> Iterator[None]:
    """For the block, LoRA weights of the text encoders count `scale`; None changes nothing."""
    present = [encoder for encoder in encoders if encoder is not None and scale is not None]
    for encoder in present:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in present:
            unscale_lora_layers(encoder, scale)


def clip_token_weights(
    request: PromptRequest, tokens: Sequence[Any] | None, rows: int, length: int, device: torch.device
) -> Tensor | None:
    """`[rows, length]`: 1 for each prompt's own tokens, which follow the start token; or for the given spans."""
    if not request.wants_tokens:
        return None
    weights = torch.zeros(rows, length)
    for row in range(rows):
        weights[row, list(_columns(request, tokens, row, length))] = 1.0
    return weights.to(device)


def _columns(request: PromptRequest, tokens: Sequence[Any] | None, row: int, length: int) -> Sequence[int]:
    if request.token_spans is not None:
        return request.token_spans[row]
    if tokens is None:
        return range(1, length)  # embeddings alone do not say where the padding starts
    if request.as_diffusers:
        # diffusers asks for the length of the padded row wherever the tokenizer reports that one
        return range(1, 1 + int(tokens[row]["length"]) - 2)
    return range(1, 1 + int(tokens[row]["attention_mask"].sum()) - 2)
