"""Bloom: linear position bias (ALiBi), and the residual added inside the attention module."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.bloom.modeling_bloom import BloomAttention

from .adapters_atman import attend_causally, boolean_masks, patched_forward
from .errors_atman import UnsupportedModelError


@contextlib.contextmanager
def adapt_bloom(model: PreTrainedModel) -> Iterator[None]:
    """Send the attention of a Bloom model through AtMan's within this context.

    Raises:
        UnsupportedModelError: the model is set to repeat the slices of its training.
    """
    if model.config.slow_but_exact and model.config.pretraining_tp > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has slow_but_exact=True, which computes the attention's output in slices; load it "
            "with slow_but_exact=False."
        )
    modules = [module for module in model.modules() if isinstance(module, BloomAttention)]
    with boolean_masks(model.config), patched_forward(modules, _forward):
        yield


def _forward(
    module: BloomAttention,
    hidden_states: Tensor,  # [B, Tq, D]
    residual: Tensor,  # [B, Tq, D]
    alibi: Tensor,  # [B H, 1, Tk]
    attention_mask: Tensor | None,
    layer_past: Cache | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    query, key, value = module._reshape(module.query_key_value(hidden_states))  # [B, H, Tq, D]
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    out = attend_causally(
        module,
        query,
        key,
        value,
        attention_mask,
        scale=module.inv_norm_factor,
        bias=alibi.unflatten(0, (-1, module.num_heads)),
        dropout=module.attention_dropout.p,
    )
    return residual + F.dropout(module.dense(out), module.hidden_dropout, module.training), None
