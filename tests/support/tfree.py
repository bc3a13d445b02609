"""A T-FREE model that is small enough to build in every test."""

import torch

from tfree_tokenizer import TFreeConfig, TFreeForCausalLM, TFreeTokenizer

WORDS = ["the", "house", "is", "small", "House", "Haus", "das", "ist", "klein", ".", ","]


def tiny_tfree(seed: int = 0, **fields: object) -> tuple[TFreeForCausalLM, TFreeTokenizer]:
    """A model in eval mode with random weights, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = TFreeTokenizer(words=WORDS)
    body = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tables = {"hash_vocab_size": 64, "num_hashes": 4}
    config = TFreeConfig.for_tokenizer(tokenizer, **(body | tables | fields))
    model = TFreeForCausalLM(config).eval()
    model.set_dictionary(tokenizer)
    return model, tokenizer
