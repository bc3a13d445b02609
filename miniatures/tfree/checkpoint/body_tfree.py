"""The body: ids to hidden states, one position for every word however its ids spell it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from .base_tfree import TFreePreTrainedModel
from .configuration_tfree import TFreeConfig
from .context_tfree import (
    cache_length,
    check_prepared_mask,
    document_starts,
    hide_inside,
    joins_documents,
    whole_context,
)
from .embedding_tfree import TFreeEmbedding
from .spelling_tfree import WordsInIds, word_positions


class TFreeModel(TFreePreTrainedModel, LlamaModel):
    """The embedding and the Llama body: ids to hidden states."""

    def __init__(self, config: TFreeConfig) -> None:
        super(LlamaModel, self).__init__(config)  # LlamaModel's own would allocate a table of vocab_size rows
        self.padding_idx = None
        self.vocab_size = config.vocab_size
        self.embed_tokens = TFreeEmbedding(config)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        context_ids: Tensor | None = None,
        words: WordsInIds | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Run the body.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, past + L], or a prepared 4-D mask.
            position_ids: int64 [B, L]. A restart begins a packed document.
            past_key_values: cache of earlier positions.
            inputs_embeds: [B, L, D] instead of `input_ids`.
            use_cache: whether to return a cache.
            context_ids: int64 [B, C >= L], all ids so far, when `input_ids` continues a cache and may hold the end of
                a spelled word; `position_ids` then number words. Default: what the cache remembers.
            words: all ids so far, already resolved.

        Raises:
            ValueError: no id at all, packed documents that spell words while a cache is asked for, or a 4-D mask that
                lets bytes inside a spelled word be seen.
        """
        rest = {"past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
        if input_ids is None or inputs_embeds is not None:
            return super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **rest)
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids must hold at least one id per row, got an empty sequence.")
        context = whole_context(input_ids, past_key_values, context_ids)
        if words is None:
            words = self.embed_tokens.find_words(context)
        embeds = self.embed_tokens(input_ids, words)  # called, not bypassed: adapters and sharding hook into modules
        if bool(words.is_final.all()):
            outputs = super().forward(None, attention_mask, position_ids, inputs_embeds=embeds, **rest)
        else:
            known_positions = position_ids if context_ids is not None else None
            outputs = self._forward_spelled(embeds, words, attention_mask, position_ids, known_positions, rest)
        cache = past_key_values if past_key_values is not None else getattr(outputs, "past_key_values", None)
        if cache is not None:
            cache.context_ids = context  # so that a plain loop of forward calls, too, sees whole words
        return outputs

    def _forward_spelled(
        self,
        embeds: Tensor,
        words: WordsInIds,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        known_positions: Tensor | None,
        rest: dict[str, Any],
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Run the body on ids of which some are inside words: hide those, and number words where ids were numbered."""
        length, past = embeds.shape[1], cache_length(rest["past_key_values"])
        starts = None if position_ids is None or past else document_starts(position_ids)
        if attention_mask is not None and attention_mask.ndim == 4:
            seen = check_prepared_mask(attention_mask, words.is_final, past + length)
            if known_positions is None and past == 0:
                position_ids = word_positions(seen, starts)
            return super().forward(None, attention_mask, position_ids, inputs_embeds=embeds, **rest)
        attention_mask = hide_inside(attention_mask, words.is_final, past + length)
        is_kept = attention_mask.bool()
        positions = word_positions(is_kept, starts)[:, -length:] if known_positions is None else known_positions
        if self._may_compact(rest):
            return self._forward_compacted(embeds, is_kept, positions, rest)
        if known_positions is None and starts is not None and joins_documents(is_kept, starts):
            raise ValueError(
                "position_ids restart, so the rows hold packed documents, and input_ids spell words in bytes: they are "
                "then kept apart only with use_cache=False, output_attentions=False and output_hidden_states=False."
            )
        return super().forward(None, attention_mask, positions, inputs_embeds=embeds, **rest)

    def _may_compact(self, rest: dict[str, Any]) -> bool:
        uses_cache = self.config.use_cache if rest["use_cache"] is None else rest["use_cache"]
        wants_layers = any(
            rest.get(name, getattr(self.config, name, False)) for name in ("output_hidden_states", "output_attentions")
        )
        return not uses_cache and rest["past_key_values"] is None and not wants_layers

    def _forward_compacted(
        self, embeds: Tensor, kept: Tensor, position_ids: Tensor, rest: dict[str, Any]
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Run the body on the words alone: bytes inside spelled words are gathered away and filled in afterwards."""
        order = torch.sort((~kept).to(torch.uint8), dim=1, stable=True).indices[:, : max(1, int(kept.sum(1).max()))]
        outputs = super().forward(
            None,
            None,  # words come first and attention is causal, so what pads a row on the right is never seen
            position_ids.gather(1, order),
            inputs_embeds=embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2])),
            **rest,
        )
        back = (kept.long().cumsum(1) - 1).clamp(min=0)  # the last word at or before each id
        hidden = outputs[0].gather(1, back[..., None].expand(-1, -1, embeds.shape[2]))
        if isinstance(outputs, tuple):
            return (hidden, *outputs[1:])
        outputs.last_hidden_state = hidden
        return outputs


TFreeModel.register_for_auto_class("AutoModel")
