"""T-FREE language models: words in, words out, with a Llama body between two small hashed tables.

Unusual about them: the embedding sums a few rows per word; a word that the dictionary lacks is spelled in byte ids but
remains one position; the head predicts rows, and words are scored against its output.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .base_tfree import TFreePreTrainedModel
from .body_tfree import TFreeModel
from .calibration_tfree import fit_temperature
from .configuration_tfree import NUM_BYTE_IDS, TFreeConfig
from .context_tfree import (
    cache_length,
    document_starts,
    hide_inside,
    predicting_contexts,
    unshift_labels,
    whole_context,
)
from .decoding_tfree import dictionary_scores, dictionary_topk, sum_active_rows
from .dictionary_tfree import select_csr
from .head_tfree import ComposedHead
from .kernels_tfree import fused_linear_bce
from .losses_tfree import composed_softmax_loss, multilabel_scale, sample_words
from .sampling_tfree import sample_topk, word_log_probabilities
from .spelling_tfree import WordsInIds, copy_logits, final_positions, seen_spelled_words, word_positions


class TFreeForCausalLM(TFreePreTrainedModel, GenerationMixin):
    """T-FREE language model: next-word logits over the ids of its tokenizer."""

    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: TFreeConfig) -> None:
        super().__init__(config)
        self.model = TFreeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.hash_vocab_size, bias=False)
        self.word_head = ComposedHead(self)  # without parameters; PEFT looks for the output layer among the modules
        self.post_init()

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.config.vocab_size

    def get_output_embeddings(self) -> ComposedHead:
        """Show the head as one output vector per id. The trained table is `lm_head`."""
        return self.word_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
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
            has_context, document = predicting_contexts(hidden, words, attention_mask, position_ids)
            taught: tuple[Any, ...] = (words, hidden, input_ids, labels, has_context, document, loss_weights)
            if shift_labels is not None:
                taught = (None, *unshift_labels(hidden, input_ids, shift_labels, has_context, document, loss_weights))
            loss = self._loss(num_items_in_batch, *taught)
        if not is_training_step or output_word_logits or output_hash_logits:
            kept = hidden[
                :, slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            ]
            hash_logits = self.lm_head(kept)
            if not is_training_step or output_word_logits:
                is_tail = isinstance(logits_to_keep, int)
                starts = None
                if position_ids is not None and context is not None and context is input_ids and context_ids is None:
                    starts = document_starts(position_ids).expand_as(context)
                logits = self.word_logits(hash_logits, words if is_tail else None, context, starts)
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
        starts: Tensor | None = None,
    ) -> Tensor:
        """Turn row logits [B, K, v] into scores of all ids [B, K, ids].

        With `context_ids` [B, C >= K] and their resolved `words`, the words that they spell are offered byte by byte,
        each in its own packed document only (bool `starts` [B, C]: where these begin).
        """
        B, K, v = hash_logits.shape
        flat = hash_logits.reshape(B * K, v)
        settings = self.decode_settings()
        scores = dictionary_scores(flat, self.model.embed_tokens.dictionary.get(), **settings)
        floor = torch.finfo(scores.dtype).min
        logits = scores.masked_fill(~self.is_word_id(), floor).view(B, K, -1)
        first_byte = self.config.first_byte_id
        if words is None or context_ids is None or first_byte is None:
            return logits
        if not (words.spelled and self.config.copy_spelled_words):
            return logits
        numbers = words.numbers[words.numbers >= self.config.vocab_size][:-1]  # the last one is the empty word
        spelled = words.dictionary.select(torch.searchsorted(words.numbers, numbers))
        spelled_scores = dictionary_scores(flat, spelled, **settings).view(B, K, -1)
        return copy_logits(logits, spelled_scores, words, context_ids, first_byte, floor, starts)

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
        num_items_in_batch: float | Tensor | None,
        words: WordsInIds | None,
        hidden: Tensor,
        input_ids: Tensor | None,
        labels: Tensor,
        has_context: Tensor,
        document: Tensor,
        loss_weights: Tensor | None,
    ) -> Tensor:
        if labels.shape != hidden.shape[:2]:
            raise ValueError(
                f"labels must have the shape of input_ids {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}."
            )
        target_ids = labels if input_ids is None else torch.where(labels == -100, input_ids, labels)
        if words is None or input_ids is None or not torch.equal(target_ids, input_ids):
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
            attention_mask = hide_inside(attention_mask, is_final, length)
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
        return sample_topk(
            self,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            k=k,
            temperature=temperature,
            generator=generator,
        )

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probability, in nats, of every word given the words before it.

        Returns:
            float32 [B, L]: at the last id of each word after the first; 0 elsewhere and on padding. A word that neither
            the dictionary nor the context before it holds has the smallest finite number.
        """
        return word_log_probabilities(self, input_ids, attention_mask)

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
        TFreePreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = TFreeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


TFreeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
TFreeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
