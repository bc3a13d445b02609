"""Falcon in its three layouts (own, shared and grouped keys), with rotary embedding or linear position bias (ALiBi)."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from .adapters_atman import attend_causally, boolean_masks, patched_forward


@contextlib.contextmanager
def adapt_falcon(model: PreTrainedModel) -> Iterator[None]:
    """Send the attention of a Falcon model through AtMan's within this context."""
    modules = [module for module in model.modules() if isinstance(module, FalconAttention)]
    # transformers adds the bias to the mask, and eager attention once more to the scores (seen in 5.23)
    times = 2 if model.config._attn_implementation == "eager" else 1
    with boolean_masks(model.config), patched_forward(modules, partial(_forward, times=times)):
        yield


def _forward(
    module: FalconAttention,
    hidden_states: Tensor,  # [B, Tq, D]
    alibi: Tensor | None,  # [B, H, 1, Tk]
    attention_mask: Tensor | None,
    layer_past: Cache | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    *,
    times: int,
    **_unused: Any,
) -> tuple[Tensor, None]:
    split = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (each.transpose(1, 2) for each in split)  # [B, H or 1, Tq, D]
    if alibi is None:
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    if attention_mask is not None and attention_mask.dtype != torch.bool:  # the position bias is in it
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    out = attend_causally(
        module,
        query,
        key,
        value,
        attention_mask,
        scale=module.inv_norm_factor,
        bias=None if alibi is None else alibi * (times * module.inv_norm_factor),
        dropout=0.0 if alibi is None else module.attention_dropout.p,
    )
    return module.dense(out), None
