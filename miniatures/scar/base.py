"""The T-FREE miniature as the language model that is detected in and steered."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tfree_tokenizer import TFreeForCausalLM, TFreeTokenizer, split_words, structural_words

CHECKPOINT = "miniatures/tfree/checkpoint"
"""Relative to the repository; it becomes the adapter's base_model_name_or_path."""


def load_base(checkpoint: str | Path = CHECKPOINT) -> tuple[Any, Any]:
    """Model in float32, frozen, and tokenizer."""
    model = TFreeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().requires_grad_(False)
    return model, TFreeTokenizer.from_pretrained(checkpoint)


def with_words_of(model: Any, tokenizer: Any, texts: Iterable[str]) -> Any:
    """Extend the model's dictionary by all words of some texts, and return the tokenizer for it.

    A word that the dictionary lacks takes one id for each of its bytes, but is one position of the model, with the
    very hidden state that it has as a dictionary word. With every word known, ids, positions and rows of activations
    are one and the same. Weights stay as they are.
    """
    known = {*tokenizer.dictionary_words, *structural_words(tokenizer.ruleset)}
    new = sorted({word for text in texts for word in split_words(text, tokenizer.ruleset)} - known)
    extended = TFreeTokenizer(words=[*tokenizer.dictionary_words, *new], ruleset=tokenizer.ruleset)
    model.set_dictionary(extended)
    return extended
