"""Rows of ids to batches: what transformers does to single sequences, without its cost per sequence and per id."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import PaddingStrategy, TensorType

from .inputs_tfree import Inputs


def pad_rows(
    tokenizer: PreTrainedTokenizer,
    ids: Inputs,
    *,
    add_special_tokens: bool = True,
    padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_tensors: str | TensorType | None = None,
    return_attention_mask: bool | None = None,
    verbose: bool = True,
    **_: Any,
) -> BatchEncoding:
    """Pad ids that are neither pairs nor to be truncated. Options as in `_encode_plus`; see `is_plain_call`."""
    rows = [tokenizer.build_inputs_with_special_tokens(row) if add_special_tokens else row for row in ids.first]
    for row in rows:
        tokenizer._eventual_warn_about_too_long_sequence(row, max_length, verbose)
    if return_attention_mask is None:
        return_attention_mask = "attention_mask" in tokenizer.model_input_names
    names = ("input_ids", "attention_mask") if return_attention_mask else ("input_ids",)
    is_padded = padding_strategy != PaddingStrategy.DO_NOT_PAD and bool(rows)

    if is_padded and return_tensors in ("pt", "np"):
        longest = max(map(len, rows))
        width = max_length if padding_strategy == PaddingStrategy.MAX_LENGTH and max_length is not None else longest
        multiple = pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        if longest <= width:
            arrays = _padded_arrays(rows, width, tokenizer.pad_token_id, padding_side or tokenizer.padding_side)
            tensors = map(torch.from_numpy, arrays) if return_tensors == "pt" else arrays
            return BatchEncoding(dict(zip(names, tensors, strict=False)))

    data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    data = {name: data[name] for name in names}
    if is_padded:
        data = tokenizer.pad(
            data,
            padding=padding_strategy.value,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        ).data
    if not ids.is_batched:
        data = {name: values[0] for name, values in data.items()}
    return BatchEncoding(data, tensor_type=return_tensors, prepend_batch_axis=not ids.is_batched)


def _padded_arrays(
    rows: Sequence[Sequence[int]], width: int, pad_id: int, padding_side: str
) -> tuple[np.ndarray, np.ndarray]:
    """Write rows of at most `width` ids into one array: ids and mask, int64 `[B, width]` each."""
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if padding_side == "left" else slice(len(row))
        ids[index, where] = row
        mask[index, where] = 1
    return ids, mask
