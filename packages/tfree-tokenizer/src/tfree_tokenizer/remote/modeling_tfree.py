"""T-FREE language models: words in, words out, with a Llama body between two small hashed tables.

Unusual about them: the embedding sums a few rows per word; a word that the dictionary lacks is spelled in byte ids but
remains one position; the head predicts rows, and words are scored against its output.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaModel, LlamaPreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from .calibration_tfree import fit_temperature
from .configuration_tfree import NUM_BYTE_IDS, TFreeConfig
from .decoding_tfree import dictionary_scores, dictionary_topk, sum_active_rows
from .dictionary_tfree import build_factored_dictionary, select_csr
from .embedding_tfree import StoredDictionary, TFreeEmbedding
from .kernels_tfree import fused_linear_bce
from .losses_tfree import composed_softmax_loss, multilabel_scale, sample_words
from .saving_tfree import staged_folder
from .spelling_tfree import WordsInIds, copy_logits, final_positions, seen_spelled_words, word_positions, words_before


class TFreePreTrainedModel(LlamaPreTrainedModel):
    """Loading, saving and initialization shared by the T-FREE models."""

    config: TFreeConfig
    config_class = TFreeConfig
    _can_compile_fullgraph = False  # which ids form a word is decided on the host

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StoredDictionary):
            module.reset(self.config)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Load as every transformers model does, from safetensors only unless `use_safetensors` says otherwise.

        Raises:
            ValueError: the stored dictionary is damaged or missing; names the repository or folder.
        """
        kwargs.setdefault("use_safetensors", True)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        stored = model.get_input_embeddings().dictionary
        if stored.word_ptr.device.type != "meta":
            try:
                stored.get()
            except ValueError as error:
                raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save as every transformers model does, with the code that loads it; a failed save changes nothing."""
        if push_to_hub:  # the upload looks for changed files in the folder itself
            super().save_pretrained(save_directory, *args, push_to_hub=True, **kwargs)
            return
        with staged_folder(save_directory) as staged:
            super().save_pretrained(staged, *args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Shorten the dictionary to its first ids; the tables keep their size, which does not depend on it.

        Raises:
            ValueError: `new_num_tokens` is larger than now (words are needed, not a number), or cuts byte ids.
        """
        config, embedding = self.config, self.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == config.vocab_size:
            return embedding
        least = 1 if config.first_byte_id is None else config.first_byte_id + NUM_BYTE_IDS
        if not least <= new_num_tokens <= config.vocab_size:
            raise ValueError(
                f"new_num_tokens must lie in [{least}, {config.vocab_size}], got {new_num_tokens}: ids are words. "
                "After tokenizer.add_tokens(...) call model.set_dictionary(tokenizer) instead."
            )
        kept = torch.arange(new_num_tokens, device=embedding.dictionary.word_ptr.device)
        self._store(embedding.dictionary.get().select(kept), fingerprint=None)
        return embedding

    def set_dictionary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read and write another tokenizer's ids from now on. Weights are untouched; nothing needs retraining.

        Args:
            tokenizer: a `TFreeTokenizer` with the model's rule set.

        Raises:
            ValueError: the tokenizer splits words by another rule set.
        """
        config = self.config
        if tokenizer.ruleset != config.ruleset:
            raise ValueError(f"tokenizer has ruleset {tokenizer.ruleset!r}, the model was made for {config.ruleset!r}.")
        words: list[str | bytes | None] = list(tokenizer.words_by_id())
        first = tokenizer.first_byte_id
        words[first + 256 : first + NUM_BYTE_IDS] = [bytes([byte]) for byte in range(256)]
        dictionary = build_factored_dictionary(words, config.hash_spec, tokenizer.special_word_ids())
        config.first_byte_id = first
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        self._store(dictionary.to(self.device), fingerprint=tokenizer.dictionary_fingerprint)

    def check_dictionary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError, naming both fingerprints, unless the model reads exactly this tokenizer's ids."""
        mine, other = self.config.dictionary_fingerprint, tokenizer.dictionary_fingerprint
        if mine != other:
            raise ValueError(
                f"model and tokenizer disagree about the words behind the ids: the model has dictionary {mine}, the "
                f"tokenizer {other}. Call model.set_dictionary(tokenizer) or load the tokenizer that belongs to it."
            )

    def _store(self, dictionary: Any, fingerprint: str | None) -> None:
        self.get_input_embeddings().dictionary.replace(dictionary)
        config = self.config
        config.vocab_size = len(dictionary)
        config.dictionary_nnz = dictionary.word_units.shape[0]
        config.dictionary_units = dictionary.unit_rows.shape[0]
        config.dictionary_corrections = dictionary.correction_rows.shape[0]
        config.dictionary_fingerprint = fingerprint


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
        starts = None if position_ids is None or past else _document_starts(position_ids)
        if attention_mask is not None and attention_mask.ndim == 4:
            seen = _check_prepared_mask(attention_mask, words.is_final, past + length)
            if known_positions is None and past == 0:
                position_ids = word_positions(seen, starts)
            return super().forward(None, attention_mask, position_ids, inputs_embeds=embeds, **rest)
        attention_mask = _hide_inside(attention_mask, words.is_final, past + length)
        is_kept = attention_mask.bool()
        positions = word_positions(is_kept, starts)[:, -length:] if known_positions is None else known_positions
        if self._may_compact(rest):
            return self._forward_compacted(embeds, is_kept, positions, rest)
        if known_positions is None and starts is not None and _joins_documents(is_kept, starts):
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


class ComposedHead(nn.Linear):
    """The output vector of every id, composed from the head's rows: what `get_output_embeddings` shows to trainers.

    With objective "dictionary_ce" a word's logit is linear in the hidden state, so this is an ordinary output layer
    [ids, D], differentiable with respect to `lm_head`. The 512 byte ids share the weight of one word of score zero.
    """

    def __init__(self, model: "TFreeForCausalLM") -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "_model", model)
        self.in_features, self.out_features = model.config.hidden_size, model.config.vocab_size

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Output vectors, float [ids, D].

        Raises:
            ValueError: the objective is "bce", whose word scores are not linear.
        """
        config = self._model.config
        if config.objective != "dictionary_ce":
            raise ValueError(
                f"objective {config.objective!r} has no output vector per id; train through the model's own loss, or "
                "with TFreeConfig(objective='dictionary_ce')."
            )
        dictionary = self._model.get_input_embeddings().dictionary.get()
        outputs = sum_active_rows(dictionary, self._model.head_weight()) / config.decode_temperature
        return outputs * self._model.is_word_id()[:, None].to(outputs.dtype)

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """Float [ids]: 0 for words, -log 512 for byte ids."""
        is_word = self._model.is_word_id()
        return torch.where(is_word, 0.0, -torch.tensor(float(NUM_BYTE_IDS)).log().item()).to(self._model.dtype)


class TFreeForCausalLM(TFreePreTrainedModel, GenerationMixin):
    """T-FREE language model: next-word logits over the ids of its tokenizer."""

    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: TFreeConfig) -> None:
        super().__init__(config)
        self.model = TFreeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.hash_vocab_size, bias=False)
        self.post_init()

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.config.vocab_size

    def get_output_embeddings(self) -> ComposedHead:
        """Show the head as one output vector per id. The trained table is `lm_head`."""
        return ComposedHead(self)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace `lm_head`, an nn.Linear from D to v."""
        self.lm_head = new_embeddings

    def head_weight(self) -> Tensor:
        """The effective head [v, D], also when an adapter wraps `lm_head`."""
        if type(self.lm_head) is nn.Linear:
            return self.lm_head.weight
        size, dtype = self.config.hidden_size, self.dtype
        return self.lm_head(torch.eye(size, dtype=dtype, device=self.device)).T

    def is_word_id(self) -> Tensor:
        """Tell words from byte ids, which are no words by themselves: bool [ids]."""
        ids = torch.arange(self.config.vocab_size, device=self.device)
        first = self.config.first_byte_id
        return (
            torch.ones_like(ids, dtype=torch.bool) if first is None else (ids < first) | (ids >= first + NUM_BYTE_IDS)
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        context_ids: Tensor | None = None,
        loss_weights: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        output_word_logits: bool | None = None,
        output_hash_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next word at every position.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, context_ids: as for
                `TFreeModel.forward`.
            labels: int64 [B, L], shifted inside; -100 ignores a word (at its last id; bytes before it do not matter).
            logits_to_keep: only the last so many positions get logits (0: all), or an index of positions.
            loss_weights: float [B, L], factor of each label.
            num_items_in_batch: counted labels of all accumulated batches, replaces this batch's count.
            output_word_logits: return logits beside a loss. Default: only without labels.
            output_hash_logits: add `hash_logits`, the head's row logits [B, K, v].
            **kwargs: `shift_labels`, int64 [B, L], replaces `labels` where the caller has shifted them: the id that
                follows each position, as sequence-parallel training passes. The rest goes to the body.

        Returns:
            `loss` (nats for "dictionary_ce") and `logits` float32 [B, K, ids], scores divided by the temperature.
        """
        context = words = None
        if input_ids is not None and inputs_embeds is None and input_ids.shape[-1]:
            context = whole_context(input_ids, past_key_values, context_ids)
            words = self.model.embed_tokens.find_words(context)
        shift_labels = kwargs.pop("shift_labels", None)  # not named above: Trainer asks for every named "label"
        is_training_step = labels is not None or shift_labels is not None
        if is_training_step and use_cache is None:
            use_cache = False
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            context_ids=context_ids,
            words=words,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = hash_logits = None
        if is_training_step:
            has_context, document = _contexts(hidden, words, attention_mask, position_ids)
            taught = (words, hidden, input_ids, labels, has_context, document, loss_weights)
            if shift_labels is not None:
                taught = (None, *_unshift(hidden, input_ids, shift_labels, has_context, document, loss_weights))
            loss = self._loss(*taught, num_items_in_batch)
        if not is_training_step or output_word_logits or output_hash_logits:
            kept = hidden[
                :, slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            ]
            hash_logits = self.lm_head(kept)
            if not is_training_step or output_word_logits:
                is_tail = isinstance(logits_to_keep, int)
                logits = self.word_logits(hash_logits, words if is_tail else None, context)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if output_hash_logits:
            result["hash_logits"] = hash_logits
        return result

    def word_logits(
        self,
        hash_logits: Tensor,
        words: WordsInIds | None = None,
        context_ids: Tensor | None = None,
    ) -> Tensor:
        """Turn row logits [B, K, v] into scores of all ids [B, K, ids].

        With `context_ids` [B, C >= K] and their resolved `words`, the words that they spell are offered byte by byte.
        """
        B, K, v = hash_logits.shape
        flat = hash_logits.reshape(B * K, v)
        settings = self.decode_settings()
        scores = dictionary_scores(flat, self.model.embed_tokens.dictionary.get(), **settings)
        floor = torch.finfo(scores.dtype).min
        logits = scores.masked_fill(~self.is_word_id(), floor).view(B, K, -1)
        if words is None or not words.spelled or not self.config.copy_spelled_words:
            return logits
        numbers = words.numbers[words.numbers >= self.config.vocab_size][:-1]  # the last one is the empty word
        spelled = words.dictionary.select(torch.searchsorted(words.numbers, numbers))
        spelled_scores = dictionary_scores(flat, spelled, **settings).view(B, K, -1)
        return copy_logits(logits, spelled_scores, words, context_ids, self.config.first_byte_id, floor)

    def decode_settings(self) -> dict[str, Any]:
        """The arguments of `dictionary_scores` that the configuration fixes."""
        config = self.config
        return {
            "mode": config.decode_mode,
            "edge_weight": config.decode_edge_weight,
            "pos_weight": config.decode_pos_weight,
            "temperature": config.decode_temperature,
        }

    def _loss(
        self,
        words: WordsInIds | None,
        hidden: Tensor,
        input_ids: Tensor | None,
        labels: Tensor,
        has_context: Tensor,
        document: Tensor,
        loss_weights: Tensor | None,
        num_items_in_batch: float | Tensor | None,
    ) -> Tensor:
        if labels.shape != hidden.shape[:2]:
            raise ValueError(
                f"labels must have the shape of input_ids {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}."
            )
        target_ids = labels if input_ids is None else torch.where(labels == -100, input_ids, labels)
        if words is None or not torch.equal(target_ids, input_ids):
            words = self.model.embed_tokens.find_words(target_ids.clamp(min=0) if input_ids is None else target_ids)
        counted = (words.is_final & (labels != -100) & has_context)[:, 1:]
        states, targets = hidden[:, :-1][counted], words.word[:, 1:][counted]  # [N, D], [N]
        weight = states.new_ones(targets.shape, dtype=torch.float32)
        if loss_weights is not None:
            weight = loss_weights[:, 1:][counted].float()
        if self.config.objective == "bce":
            slots = int(words.is_final[:, 1:].sum())
            return self._bce_loss(states, targets, words, weight, slots, num_items_in_batch)
        is_seen = seen_spelled_words(words, document, counted)
        return self._dictionary_loss(states, targets, words, is_seen, weight, num_items_in_batch)

    def _bce_loss(
        self,
        states: Tensor,
        targets: Tensor,
        words: WordsInIds,
        weight: Tensor,
        slots: int,
        num_items_in_batch: float | Tensor | None,
    ) -> Tensor:
        config = self.config
        scale = multilabel_scale(
            slots,
            config.hash_vocab_size,
            scale=config.loss_scale,
            normalization=config.loss_normalization,
            row_weight=weight,
            num_positions=num_items_in_batch,
        )
        pointer, rows = words.dictionary.active_rows()
        pointer, rows = select_csr(pointer, targets, rows)
        return fused_linear_bce(
            states,
            self.head_weight(),
            pointer,
            rows,
            pos_weight=config.loss_pos_weight,
            row_weight=weight,
            scale=scale,
        )

    def _dictionary_loss(
        self,
        states: Tensor,
        targets: Tensor,
        words: WordsInIds,
        is_seen: Tensor,
        weight: Tensor,
        num_items_in_batch: float | Tensor | None,
    ) -> Tensor:
        config, head = self.config, self.head_weight()
        batch_outputs = sum_active_rows(words.dictionary, head) / config.num_hashes  # [words of the batch, D]
        candidates, log_inclusion = self._candidate_words()
        dictionary = self.model.embed_tokens.dictionary.get().select(candidates)
        outputs = sum_active_rows(dictionary, head) / config.num_hashes  # [C, D]
        is_spelled = words.numbers >= config.vocab_size
        is_spelled[-1] = False  # the empty word
        total = composed_softmax_loss(
            states,
            torch.cat([outputs, batch_outputs[is_spelled]]),
            words.numbers[targets],
            batch_outputs[targets],
            torch.cat([candidates, words.numbers[is_spelled]]),
            torch.cat([log_inclusion, log_inclusion.new_zeros(int(is_spelled.sum()))]),
            weight,
            is_seen,
        )
        counted = weight.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(total)
        return total / counted.clamp(min=1e-8)

    def _candidate_words(self) -> tuple[Tensor, Tensor]:
        """Word ids of the training softmax and the logarithm of each one's probability of being among them."""
        config, is_word = self.config, self.is_word_id()
        if not (self.training and config.sampled_words):
            candidates = is_word.nonzero().squeeze(1)
            return candidates, torch.zeros(candidates.shape, device=candidates.device)
        first_word = 0 if config.first_byte_id is None else config.first_byte_id + NUM_BYTE_IDS
        candidates, log_inclusion = sample_words(config.vocab_size, first_word, config.sampled_words, self.device)
        return candidates[is_word[candidates]], log_inclusion[is_word[candidates]]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        context_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hide bytes inside spelled words from attention and pass the whole context on."""
        past = cache_length(past_key_values)
        if next_sequence_length is None:  # the ids are new ones only, else they are all ids
            context_ids = whole_context(input_ids, past_key_values, context_ids)
        context = input_ids if context_ids is None else context_ids
        length = past + (input_ids.shape[1] if next_sequence_length is None else next_sequence_length)
        if attention_mask is not None:
            length = attention_mask.shape[1]
        context = context[:, :length]  # a prompt read in chunks lies ahead
        is_final = final_positions(context, self.config.first_byte_id)
        if not bool(is_final.all()) and (attention_mask is None or attention_mask.ndim == 2):
            attention_mask = _hide_inside(attention_mask, is_final, length)
            kwargs["position_ids"] = word_positions(attention_mask.bool())
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if inputs.get("input_ids") is not None:
            inputs["context_ids"] = context
        return inputs

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kw: Any
    ) -> Any:
        """Let every chunk of a chunked prefill see the ids before it, in case it begins inside a spelled word."""
        if getattr(generation_config, "prefill_chunk_size", None) is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kw)
        model_kwargs["context_ids"] = input_ids
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kw)
        finally:
            model_kwargs.pop("context_ids", None)

    @torch.no_grad()
    def decode_topk(self, hash_logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Find the k best words for row logits [B, v] in a stream, never holding the scores of all words.

        Returns:
            log-probabilities [B, k] in descending order, ids int64 [B, k], and the logsumexp of all scores [B].
        """
        scores, ids, total = dictionary_topk(
            hash_logits,
            self.model.embed_tokens.dictionary.get(),
            k,
            word_mask=self.is_word_id(),
            **self.decode_settings(),
        )
        return scores - total[:, None], ids, total

    @torch.no_grad()
    def generate_topk(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 32,
        k: int = 50,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample from the k best words without ever forming a row over the whole dictionary.

        For very large dictionaries; `generate` offers everything else. Words that only the context spells are not
        offered. Rows that reached `eos_token_id` go on with `pad_token_id`.

        Args:
            input_ids: int64 [B, L], left-padded where rows differ in length.
            attention_mask: [B, L].
            max_new_tokens: words to add, at least 1.
            k: 1 is greedy.
            temperature: flattens (> 1) or sharpens the distribution of the k words.
            generator: source of randomness.

        Returns:
            int64 [B, L + n].
        """
        if max_new_tokens < 1 or temperature <= 0:
            raise ValueError(
                f"max_new_tokens must be at least 1 and temperature above 0, got {max_new_tokens} and {temperature}."
            )
        kwargs: dict[str, Any] = {"use_cache": True, "past_key_values": None, "next_sequence_length": None}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        eos = torch.tensor(_as_list(self.config.eos_token_id), dtype=torch.long, device=input_ids.device)
        pad = self.config.pad_token_id if self.config.pad_token_id is not None else int(eos[0]) if len(eos) else 0
        finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            inputs = self.prepare_inputs_for_generation(input_ids, attention_mask=mask, **kwargs)
            hidden = self.model(**{name: value for name, value in inputs.items() if name != "logits_to_keep"})
            log_probs, ids, _ = self.decode_topk(self.lm_head(hidden.last_hidden_state[:, -1]), k)
            choice = torch.multinomial((log_probs / temperature).softmax(1), 1, generator=generator)
            new = torch.where(finished, pad, ids.gather(1, choice).squeeze(1))
            input_ids, mask = torch.cat([input_ids, new[:, None]], 1), nn.functional.pad(mask, (0, 1), value=1)
            kwargs |= {"past_key_values": hidden.past_key_values, "next_sequence_length": 1}
            finished |= torch.isin(new, eos)
            if bool(finished.all()):
                break
        return input_ids

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probability, in nats, of every word given the words before it.

        Returns:
            float32 [B, L]: at the last id of each word after the first; 0 elsewhere and on padding. A word that neither
            the dictionary nor the context before it holds has the smallest finite number.
        """
        logits = self(input_ids, attention_mask=attention_mask, use_cache=False).logits
        per_id = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)  # [B, L - 1]
        per_id = nn.functional.pad(per_id, (1, 0))
        if attention_mask is not None:
            visible = attention_mask.bool()
            follows = nn.functional.pad(visible[:, :-1], (1, 0))
            per_id = per_id.masked_fill(~(visible & follows), 0.0)
        return _sum_over_spelled(per_id, final_positions(input_ids, self.config.first_byte_id))

    def calibrate_decode(self, batches: Iterable[dict[str, Tensor]], *, max_positions: int = 4096) -> float:
        """Fit the decode temperature to held-out text, so that probabilities mean what they say.

        Args:
            batches: dicts with `input_ids` [B, L] and optionally `attention_mask`.
            max_positions: how many next-word predictions to use at most.

        Returns:
            The mean negative log-likelihood in nats of the words at the new `config.decode_temperature`.
        """
        temperature, nll = fit_temperature(self, batches, max_positions)
        self.config.decode_temperature = temperature
        return nll


class TFreeForSequenceClassification(GenericForSequenceClassification, TFreePreTrainedModel):
    """Classifies a text from the hidden state of its last word."""

    def __init__(self, config: TFreeConfig) -> None:
        TFreePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = TFreeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


def _contexts(
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
    starts = _document_starts(position_ids).expand(visible.shape)
    return words_before(visible, starts) > 0, starts.long().cumsum(1)


def _unshift(
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


def whole_context(input_ids: Tensor, past_key_values: Any, context_ids: Tensor | None) -> Tensor:
    """All ids so far: `context_ids`, or what a cache that this model filled remembers, and `input_ids`."""
    if context_ids is not None:
        return context_ids
    past, seen = cache_length(past_key_values), getattr(past_key_values, "context_ids", None)
    if not past or seen is None or seen.shape[0] != input_ids.shape[0] or seen.shape[1] < past:
        return input_ids
    return torch.cat([seen[:, :past], input_ids], 1)


def cache_length(past_key_values: Any) -> int:
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


def _document_starts(position_ids: Tensor) -> Tensor:
    """Mark the positions that do not rise, where a packed document begins: bool [B, L]."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return starts


def _joins_documents(is_counted: Tensor, starts: Tensor) -> bool:
    """Whether a row holds counted words on both sides of a start."""
    return bool((is_counted & (words_before(is_counted) > words_before(is_counted, starts))).any())


def _hide_inside(attention_mask: Tensor | None, is_final: Tensor, length: int) -> Tensor:
    """Mask [B, length] in which bytes inside spelled words of the last ids are 0."""
    if attention_mask is None:
        attention_mask = torch.ones(is_final.shape[0], length, dtype=torch.long, device=is_final.device)
    hidden = attention_mask.clone()
    columns = min(is_final.shape[1], length)
    hidden[:, length - columns : length] *= is_final[:, -columns:].to(hidden.dtype)
    return hidden


def _check_prepared_mask(attention_mask: Tensor, is_final: Tensor, length: int) -> Tensor:
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


def _sum_over_spelled(per_id: Tensor, is_final: Tensor) -> Tensor:
    """Collect the values of a spelled word's ids at its last id."""
    word = is_final.long().cumsum(1) - is_final.long()  # [B, L], number of words finished before
    sums = torch.zeros_like(per_id).scatter_add(1, word, per_id).clamp(min=torch.finfo(per_id.dtype).min)
    return torch.where(is_final, sums.gather(1, word), 0.0)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


TFreeModel.register_for_auto_class("AutoModel")
TFreeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
TFreeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
