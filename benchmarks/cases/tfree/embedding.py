"""Word embedding: the sum of a word's table rows, forward and with the gradient of the table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases.tfree.inputs import DTYPES, default_dtype, random_tensor, running_words, text_inputs
from benchmarks.harness import Case, Options, register
from benchmarks.peers import bag_embedding, flat_patterns, multi_hot, original_embedding
from shared_kernels import hash_embedding_bag
from tfree_tokenizer import TFreeConfig, TFreeForCausalLM, TFreeTokenizer

SIZES = {
    "cpu": {"narrow": (4096, 512, 8000, 10), "wide": (1024, 3072, 8000, 10)},
    "cuda": {"narrow": (8192, 4096, 8000, 8), "wide": (8192, 4096, 32000, 8)},
}
QUICK = (64, 16, 80, 8)
RTOL = {"float32": 1e-5, "bfloat16": 2e-2}


def _register(kind: str, backward: bool) -> None:
    name = f"tfree.embed{'.backward' if backward else ''}.{kind}"

    @register(name)
    def build(options: Options) -> Case:
        N, D, V, m = QUICK if options.quick else SIZES[options.device][kind]
        dtype = default_dtype(options)
        words, flat = text_inputs(N, V, m, options)
        table = random_tensor(V, D, dtype=dtype, device=options.device).requires_grad_(backward)
        gradient = random_tensor(N, D, dtype=dtype, device=options.device, seed=1)
        dense = multi_hot(flat, table.dtype)

        def once(embed: Callable[[], Tensor]) -> Callable[[], Tensor]:
            return (lambda: torch.autograd.grad(embed(), table, gradient)[0]) if backward else embed

        touched = torch.unique(flat.rows).numel()
        item = table.element_size()
        return Case(
            name=name,
            ours=once(lambda: hash_embedding_bag(words.word_ptr, words.word_units, words.unit_rows, table)),
            peers={
                "torch embedding_bag": once(lambda: bag_embedding(flat, table)),
                "original gather+sum+index_add": once(lambda: original_embedding(flat, table)),
                "dense multi-hot product": once(lambda: dense @ table),
            },
            rtol=RTOL[dtype],
            bytes=(touched * D + N * D + (V * D if backward else 0)) * item,
            size={"N": N, "D": D, "V": V, "ids": flat.rows.numel()},
            dtype=dtype,
            note=f"{words.word_units.unique().numel()} distinct trigrams in {words.word_units.numel()}; "
            "the dense matrix is made outside the clock",
        )


def _register_layer(backward: bool) -> None:
    name = f"tfree.embed.layer{'.backward' if backward else ''}"

    @register(name)
    def build(options: Options) -> Case:
        N, D, V, m = QUICK if options.quick else SIZES[options.device]["narrow"]
        dtype = default_dtype(options)
        words = running_words(N, options.texts)
        layer, ids = _layer_and_ids(words, D, V, m)
        layer, ids = layer.to(options.device, DTYPES[dtype]), ids.to(options.device)
        table = layer.weight.requires_grad_(backward)
        gradient = random_tensor(N, D, dtype=dtype, device=options.device, seed=1)
        flat = flat_patterns(words, V, m, options.device)

        def once(embed: Callable[[], Tensor]) -> Callable[[], Tensor]:
            return (lambda: torch.autograd.grad(embed(), table, gradient)[0]) if backward else embed

        return Case(
            name=name,
            ours=once(lambda: layer(ids)),
            peers={"torch embedding_bag": once(lambda: bag_embedding(flat, table))},
            rtol=RTOL[dtype],
            bytes=(torch.unique(flat.rows).numel() * D + N * D + (V * D if backward else 0)) * table.element_size(),
            size={"N": N, "D": D, "V": V, "words": torch.unique(ids).numel()},
            dtype=dtype,
            note="model.get_input_embeddings()(ids), which embeds each distinct word once; the peer gets its row lists",
        )


def _layer_and_ids(words: list[str], D: int, V: int, m: int) -> tuple[nn.Embedding, Tensor]:
    """The input layer of a model that knows exactly these words, and the ids of the text."""
    distinct = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = TFreeTokenizer(words=list(distinct))
    config = TFreeConfig.for_tokenizer(
        tokenizer,
        hash_vocab_size=V,
        num_hashes=m,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    model = TFreeForCausalLM(config)
    model.set_dictionary(tokenizer)
    return model.get_input_embeddings(), torch.tensor([tokenizer.first_word_id + distinct[word] for word in words])


for _kind in ("narrow", "wide"):
    for _backward in (False, True):
        _register(_kind, _backward)
for _backward in (False, True):
    _register_layer(_backward)
