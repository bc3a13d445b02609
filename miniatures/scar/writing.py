"""Prompts -> sampled continuations, and how likely the unsteered model finds them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Written:
    """Continuations of prompts."""

    texts: list[str]
    """The new words alone."""
    ids: Tensor
    """Prompt and new words, int64 [N, L]."""
    is_new: Tensor
    """bool [N, L]: words of the continuation, up to the end of the text."""


class Writer:
    """Samples from a T-FREE model many rows at a time.

    `generate` would add up the head's rows for every word anew in each step. Here that is done once: the head of a
    model with objective "dictionary_ce" is linear. Words outside the dictionary are not offered.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Take a `TFreeForCausalLM`; adapters may be added to it later."""
        self.model, self.tokenizer = model, tokenizer
        with torch.no_grad():
            self._outputs = model.get_output_embeddings().weight.T.contiguous()  # [D, ids]
            self._is_word = model.is_word_id()

    def prompt_ids(self, prompts: Sequence[str], length: int) -> Tensor:
        """First words of the prompts, int64 [N, length]; only of those with so many words, all in the dictionary."""
        rows = [self.tokenizer.encode(prompt, add_special_tokens=False)[:length] for prompt in prompts]
        rows = [row for row in rows if len(row) == length and bool(self._is_word[row].all())]
        return torch.tensor(rows, dtype=torch.long).view(-1, length)

    @torch.no_grad()
    def write(
        self,
        prompt_ids: Tensor,
        *,
        copies: int = 1,
        new_words: int = 24,
        temperature: float = 0.7,
        top_k: int = 40,
        seed: int = 0,
        steered: AbstractContextManager[None] | None = None,
    ) -> Written:
        """Continue every prompt.

        Args:
            prompt_ids: int64 [N, L], without padding.
            copies: write so many continuations of each prompt, all first ones in front. They share their random
                numbers, so that only what steers them makes them differ.
            new_words: at most so many for each.
            temperature: of the sampling.
            top_k: words to choose from in each step.
            seed: of the sampling.
            steered: entered for the time of writing.
        """
        generator = torch.Generator().manual_seed(seed)
        end = self.tokenizer.eos_token_id
        ids = step = prompt_ids.repeat(copies, 1)
        cache, is_over = None, torch.zeros(len(ids), dtype=torch.bool)
        with steered or nullcontext():
            for _ in range(new_words):
                outputs = self.model.model(step, past_key_values=cache, use_cache=True)
                cache = outputs.past_key_values
                logits, words = self._logits(outputs.last_hidden_state[:, -1]).topk(top_k)
                draws = torch.rand(len(prompt_ids), 1, generator=generator).repeat(copies, 1)
                reached = (logits / temperature).softmax(-1).cumsum(-1)
                chosen = torch.searchsorted(reached, draws).clamp(max=top_k - 1)
                step = torch.where(is_over[:, None], end, words.gather(1, chosen))
                is_over |= step[:, 0] == end
                ids = torch.cat([ids, step], 1)
        length = prompt_ids.shape[1]
        is_new = (ids[:, length:] != end).long().cumprod(1).bool()
        texts = [self.tokenizer.decode(row[length:][new]) for row, new in zip(ids, is_new, strict=True)]
        return Written(texts, ids, torch.cat([torch.zeros_like(ids[:, :length], dtype=torch.bool), is_new], 1))

    @torch.no_grad()
    def nats_per_word(self, written: Written, *, rows: int = 64) -> Tensor:
        """Mean negative log-likelihood of the words of each continuation, float [N]; NaN where it has none.

        Under the model as it is when this is called, with its whole distribution, not the sharper one sampled from.
        """
        found = []
        for ids, is_new in zip(written.ids.split(rows), written.is_new.split(rows), strict=True):
            hidden = self.model.model(ids[:, :-1], use_cache=False).last_hidden_state
            chosen = is_new[:, 1:]
            losses = torch.nn.functional.cross_entropy(
                self._logits(hidden[chosen]), ids[:, 1:][chosen], reduction="none"
            )
            sums = torch.zeros(chosen.shape).masked_scatter(chosen, losses).sum(1)
            found.append(sums / chosen.sum(1))
        return torch.cat(found)

    def _logits(self, hidden: Tensor) -> Tensor:
        return (hidden @ self._outputs).masked_fill(~self._is_word, torch.finfo(hidden.dtype).min)
