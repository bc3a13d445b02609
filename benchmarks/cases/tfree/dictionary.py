"""Dictionaries: hashing, building, exchanging and holding them; and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache

import numpy as np
import torch

import benchmarks
from benchmarks.corpus import word_list
from benchmarks.harness import Call, Case, Fact, Options, register
from benchmarks.memory import MIB
from benchmarks.peers import OriginalEncoder, flat_patterns, md5_rows, mix32
from shared_kernels import mix32_rows
from tfree_tokenizer import (
    HashSpec,
    TFreeConfig,
    TFreeForCausalLM,
    TFreeTokenizer,
    build_factored_dictionary,
)

V, M = 8000, 10


@lru_cache
def _trigrams(count: int) -> np.ndarray:
    found = [word.encode() for word in word_list(min(count, 200_000))]
    joined = np.frombuffer(b" ".join(found), np.uint8).astype(np.int64)
    return np.unique(joined[:-2] | joined[1:-1] << 8 | joined[2:] << 16)[:count]


@register("tfree.hash")
def hash_rows(options: Options) -> Case:
    """Rows of distinct trigrams under "mix32", beside the released checkpoints' "md5"."""
    numbers = _trigrams(200 if options.quick else 20_000)
    trigrams = torch.from_numpy(numbers).to(options.device)
    return Case(
        name="tfree.hash",
        ours=lambda: mix32_rows(trigrams, table_size=V, num_hashes=M),
        peers={"mix32 in NumPy": lambda: torch.from_numpy(mix32(numbers, V, M))},
        others={"md5, released checkpoints": lambda: md5_rows(numbers.tolist(), V, M)},
        rtol=1e-9,
        bytes=float(8 * len(numbers) + 4 * M * len(numbers)),
        size={"U": len(numbers), "m": M, "V": V},
        dtype="int32",
        memory=False,
    )


@register("tfree.dictionary.build.w100k", devices=("cpu",))
def build_dictionary(options: Options) -> Case:
    """`build_factored_dictionary`, beside flat lists of the same rows."""
    words = word_list(500 if options.quick else 100_000)
    spec, original = HashSpec(hash_vocab_size=V, num_hashes=M), OriginalEncoder(V, M)
    return Case(
        name="tfree.dictionary.build.w100k",
        ours=lambda: build_factored_dictionary(words, spec),
        peers={"flat lists in NumPy": lambda: flat_patterns(words, V, M)},
        others={"original, word by word": lambda: [original.rows_of(word) for word in words]},
        views={
            "ours": lambda factored: list(factored.active_rows()),
            "flat lists in NumPy": lambda flat: [_pointer(flat.union[0], len(words)), flat.union[1]],
        },
        rtol=1e-9,
        size={"W": len(words), "V": V, "m": M},
        dtype="int32",
    )


@register("tfree.dictionary.build.w1m", devices=("cpu",))
def build_large_dictionary(options: Options) -> Case:
    """A million words, by itself: its memory is the point, and the flat lists of the smaller row need 30 times more."""
    words, spec = word_list(500 if options.quick else 1_000_000), HashSpec(hash_vocab_size=V, num_hashes=M)
    return Case(
        name="tfree.dictionary.build.w1m",
        ours=lambda: build_factored_dictionary(words, spec),
        peers={},
        size={"W": len(words), "V": V, "m": M},
        dtype="int32",
    )


def _pointer(word: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([word.new_zeros(1), torch.bincount(word, minlength=count).cumsum(0)])


@register("tfree.set_dictionary", devices=("cpu",))
def set_dictionary(options: Options) -> Case:
    """`model.set_dictionary(tokenizer)` for 100k words; two lists take turns, so that nothing can be kept."""
    words = word_list(500 if options.quick else 100_000)
    tokenizers = [TFreeTokenizer(words=words), TFreeTokenizer(words=words[::-1])]
    config = TFreeConfig.for_tokenizer(
        tokenizers[0],
        hash_vocab_size=V,
        num_hashes=M,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model, original = TFreeForCausalLM(config), OriginalEncoder(V, M)

    def exchange() -> int:
        tokenizers.reverse()
        model.set_dictionary(tokenizers[0])
        return len(words)

    return Case(
        name="tfree.set_dictionary",
        ours=exchange,
        peers={},
        others={"original, word by word": lambda: [original.rows_of(word) for word in words]},
        size={"W": len(words), "V": V, "m": M},
        dtype="int32",
        note="the other contender only looks up the rows of every word, without making any table for decoding",
    )


@register("tfree.dictionary.bytes", devices=("cpu",))
def dictionary_bytes(options: Options) -> list[Fact]:
    """Memory of a dictionary's tensors, beside the original's two int64 indices per row."""
    facts = []
    for count in (500,) if options.quick else (100_000, 1_000_000):
        words = word_list(count)
        tensors = build_factored_dictionary(words, HashSpec(hash_vocab_size=V, num_hashes=M)).tensors()
        rows = flat_patterns(words, V, M).rows.numel()
        sizes = {"ours": sum(t.numel() * t.element_size() for t in tensors), "original's two int64 per row": 16 * rows}
        letters = sum(map(len, words)) / count
        for who, value in sizes.items():
            note = f"{who}; {letters:.1f} letters per word, {rows / count:.0f} rows per word"
            facts.append(
                Fact(name="tfree.dictionary.bytes", value=value / MIB, unit="MiB", size={"W": count}, note=note)
            )
    return facts


@register("tfree.import", devices=("cpu",))
def import_time(_: Options) -> Case:
    """Process time of a first import, each in a new interpreter."""
    return Case(
        name="tfree.import",
        ours=_import("tfree_tokenizer"),
        peers={},
        others={"import torch": _import("torch"), "import transformers": _import("transformers")},
        clock="self",
        memory=False,
        dtype="-",
        note="new interpreter each time, files in the page cache",
    )


def _import(module: str) -> Call:
    program = (
        f"import benchmarks, time; start = time.process_time(); import {module}; print(time.process_time() - start)"
    )

    def call() -> float:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=benchmarks.ROOT, capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    return call
