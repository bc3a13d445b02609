"""Inputs that several T-FREE cases share: words of running text, dictionaries, and their patterns."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.corpus import WORD, corpus, word_list
from benchmarks.harness import Options
from benchmarks.peers import FlatPatterns, flat_patterns
from tfree_tokenizer import FactoredDictionary, HashSpec, build_factored_dictionary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def running_words(count: int, texts: tuple[str, ...] = ()) -> list[str]:
    """The first `count` words of running prose, repeats and all; frequent words fill up what a short text lacks."""
    words = WORD.findall(corpus("prose", texts).measured)
    return (words * (count // len(words) + 1))[:count]


@lru_cache(maxsize=4)
def dictionary_inputs(W: int, V: int, m: int, device: str) -> tuple[FactoredDictionary, FlatPatterns]:
    """A dictionary of W distinct words in our factored form, and in flat lists for the peers."""
    return _both_forms(word_list(W), V, m, device)


def text_inputs(N: int, V: int, m: int, options: Options) -> tuple[FactoredDictionary, FlatPatterns]:
    """N words of running text in both forms, one entry per occurrence."""
    return _both_forms(running_words(N, options.texts), V, m, options.device)


def random_tensor(*shape: int, dtype: str, device: str, scale: float = 1.0, seed: int = 0) -> Tensor:
    """The same normal numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, DTYPES[dtype])


def default_dtype(options: Options) -> str:
    """What one computes in on this device."""
    return "bfloat16" if options.device == "cuda" else "float32"


def _both_forms(words: list[str], V: int, m: int, device: str) -> tuple[FactoredDictionary, FlatPatterns]:
    factored = build_factored_dictionary(words, HashSpec(hash_vocab_size=V, num_hashes=m))
    return factored.to(device), flat_patterns(words, V, m, device)
