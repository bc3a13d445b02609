"""The many forms in which sequences are passed, brought into one: texts and rows of ids without padding."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_MODEL_INPUTS = frozenset(
    {"input_ids", "attention_mask", "labels", "length", "offset_mapping", "special_tokens_mask"}
)
"""Keys of an encoded batch that are not handed on: they describe the prompt alone, without the target that follows."""


def sequences(value: Any, name: str) -> tuple[list[str | tuple[int, ...]], bool]:
    """Tell one text or row of ids from a batch of them; True if it is one."""
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{name} must not be empty, got ''.")
        return [value], True
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim not in (1, 2):
            raise ValueError(f"{name} must be a 1-D or 2-D tensor of token ids, got shape {tuple(value.shape)}.")
        is_row = value.ndim == 1
    elif isinstance(value, (list, tuple, range)):
        is_row = len(value) > 0 and not _is_nested(value[0])
    else:
        raise ValueError(f"{name} must be text, token ids, or a list of those, got {type(value).__name__}.")
    if len(value) == 0:
        raise ValueError(f"{name} must not be empty, got {value!r}.")
    if is_row:
        return [_id_row(value, name)], True
    return [_sequence(item, f"{name}[{index}]") for index, item in enumerate(value)], False


def _is_nested(item: Any) -> bool:
    return isinstance(item, (str, list, tuple, range, Mapping)) or getattr(item, "ndim", 0) > 0


def _sequence(item: Any, name: str) -> str | tuple[int, ...]:
    if isinstance(item, Mapping):
        raise ValueError(f"{name} must be text or token ids, got a mapping; apply the chat template to messages first.")
    if isinstance(item, str) and item:
        return item
    return _id_row(item, name)


def _id_row(values: Any, name: str) -> tuple[int, ...]:
    values = _plain(values)
    if not isinstance(values, (list, tuple, range)) or len(values) == 0:
        raise ValueError(f"{name} must not be empty, and be text or a row of token ids, got {values!r}.")
    return tuple(_token_id(value, f"{name}[{index}]") for index, value in enumerate(values))


def _token_id(value: Any, name: str) -> int:
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 0:
        raise ValueError(f"{name} must be a token id, an integer of at least 0, got {value!r}.")
    return operator.index(value)


def mapping_rows(encoded: Mapping[str, Any], name: str) -> list[tuple[tuple[int, ...], dict[str, Tensor]]]:
    """Cut an encoded batch into rows without padding, each with its part of the other tensors."""
    if "input_ids" not in encoded:
        raise ValueError(f"{name} must have the key 'input_ids' if it is a mapping, got {sorted(encoded)}.")
    given, is_row = sequences(encoded["input_ids"], f"{name}['input_ids']")
    rows = [row for row in given if not isinstance(row, str)]
    if len(rows) < len(given):
        raise ValueError(f"{name}['input_ids'] must be token ids, got text.")
    masks = _mask_rows(encoded.get("attention_mask"), rows, name)
    others = {key: value for key, value in encoded.items() if key not in NO_MODEL_INPUTS and value is not None}
    tensors = {key: _as_tensor(value, key, name) for key, value in others.items()}
    if is_row:
        tensors = {key: value[None] if value.shape == (len(rows[0]),) else value for key, value in tensors.items()}
    parts = {key: _split(value, masks, len(rows[0]), f"{name}[{key!r}]") for key, value in tensors.items()}
    return [
        (row[kept], {key: values[index] for key, values in parts.items()})
        for index, (row, kept) in enumerate(zip(rows, masks, strict=True))
    ]


def _mask_rows(mask: Any, rows: list[tuple[int, ...]], name: str) -> list[slice]:
    """Return which part of every row is not padding."""
    if mask is None:
        return [slice(0, len(row)) for row in rows]
    mask = _plain(mask)
    mask = [_plain(row) for row in mask] if len(mask) and _is_nested(mask[0]) else [mask]
    has_numbers = not any(_is_nested(value) for row in mask for value in row)
    if [len(row) for row in mask] != [len(row) for row in rows] or not has_numbers:
        raise ValueError(f"{name}['attention_mask'] must have the shape of {name}['input_ids'].")
    return [_kept(row, f"{name}['attention_mask'][{index}]") for index, row in enumerate(mask)]


def _plain(values: Any) -> Any:
    return values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values


def _kept(mask: Sequence[int], name: str) -> slice:
    kept = [index for index, value in enumerate(mask) if value]
    if not kept:
        raise ValueError(f"{name} must keep at least one token, got only padding.")
    if kept[-1] - kept[0] + 1 != len(kept):
        raise ValueError(f"{name} must be 0 at the start or the end only, got zeros between tokens.")
    return slice(kept[0], kept[-1] + 1)


def _as_tensor(value: Any, key: str, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}[{key!r}] must be a tensor, got {type(value).__name__}.") from error


def _split(value: Tensor, kept: Sequence[slice], length: int, name: str) -> list[Tensor]:
    """Cut a tensor into the rows of a batch; what belongs to the tokens, `[B, length]`, also loses the padding."""
    batch = len(kept)
    if value.shape == (batch, length):
        return [value[index : index + 1, part] for index, part in enumerate(kept)]
    if batch == 1:
        return [value]
    if value.ndim > 0 and len(value) == batch:
        return list(value.split(1))
    raise ValueError(
        f"{name} must have a first dimension of {batch} to be cut into prompts, got shape {tuple(value.shape)}; "
        "explain the prompts one by one."
    )
