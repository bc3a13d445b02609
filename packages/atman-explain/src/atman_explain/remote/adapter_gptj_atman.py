"""GPT-J, the paper's language model: rotary embedding of a part of each head, scores over the root of the head size."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.gptj.modeling_gptj import GPTJAttention

from .adapters_atman import attend_causally, boolean_masks, patched_forward


@contextlib.contextmanager
def adapt_gptj(model: PreTrainedModel) -> Iterator[None]:
    """Send the attention of a GPT-J model through AtMan's within this context."""
    modules = [module for module in model.modules() if isinstance(module, GPTJAttention)]
    with boolean_masks(model.config), patched_forward(modules, _forward):
        yield


def _forward(
    module: GPTJAttention,
    hidden_states: Tensor,  # [B, Tq, D]
    layer_past: Cache | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    projections = module.q_proj, module.k_proj, module.v_proj
    query, key, value = (_heads(project(hidden_states), module.num_attention_heads) for project in projections)
    waves = module.embed_positions.to(query.device)[position_ids][:, None].to(query.dtype)  # [B, 1, Tq, R]
    query, key = _rotated(query, waves), _rotated(key, waves)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    out = attend_causally(
        module,
        query,
        key,
        value,
        attention_mask,
        scale=module.head_dim**-0.5,
        dropout=module.attn_dropout.p,
    )
    return module.resid_dropout(module.out_proj(out)), None


def _heads(projected: Tensor, heads: int) -> Tensor:
    """From [B, T, H D] to [B, H, T, D]."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotated(states: Tensor, waves: Tensor) -> Tensor:
    """Turn each pair of neighboring features among the first R by its position's angle; `waves` is [sines, cosines]."""
    turned, rest = states.split([waves.shape[-1], states.shape[-1] - waves.shape[-1]], dim=-1)
    sine, cosine = waves.chunk(2, dim=-1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)
