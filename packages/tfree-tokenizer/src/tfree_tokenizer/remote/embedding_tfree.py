"""The input layer: a dictionary kept as buffers of the model, and the hashed table that embeds its words."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_tfree import TFreeConfig
from .dictionary_tfree import FactoredDictionary, build_factored_dictionary, empty_dictionary
from .losses_tfree import embed_words
from .spelling_tfree import WordsInIds, find_words

_BUFFERS = tuple(FactoredDictionary.__dataclass_fields__)


class StoredDictionary(nn.Module):
    """The factored dictionary as integer buffers, saved with the weights. It is small and never trained."""

    def __init__(self, config: TFreeConfig) -> None:
        super().__init__()
        self.table_size = config.hash_vocab_size
        self.is_placeholder = config.dictionary_fingerprint is None and config.dictionary_nnz == 0
        self.is_checked = False
        if self.is_placeholder:
            tensors = placeholder_dictionary(config)
        else:
            tensors = empty_dictionary(
                config.vocab_size,
                config.dictionary_units,
                config.dictionary_nnz,
                config.dictionary_corrections,
                config.num_hashes,
            )
        self.replace(tensors)

    def replace(self, dictionary: FactoredDictionary) -> None:
        """Hold another dictionary from now on."""
        for name in _BUFFERS:
            tensor = getattr(dictionary, name)
            self.register_buffer(name, tensor, persistent=tensor.numel() > 0)  # tools that compare weights trip on 0
        self.is_checked = False

    def get(self) -> FactoredDictionary:
        """Return the dictionary.

        Raises:
            ValueError: the buffers hold none, or do not fit together; checked on the first call only.
        """
        dictionary = FactoredDictionary(*(getattr(self, name) for name in _BUFFERS))
        if not self.is_checked:
            if not dictionary.word_ptr.any():  # made from a configuration alone
                raise ValueError("The model has no dictionary yet: call model.set_dictionary(tokenizer) first.")
            try:
                dictionary.check(self.table_size)
            except ValueError as error:
                raise ValueError(
                    f"The stored dictionary is damaged: {error} Load an intact checkpoint, or call "
                    "model.set_dictionary(tokenizer)."
                ) from error
            self.is_checked = True
        return dictionary

    def reset(self, config: TFreeConfig) -> None:
        """Fill buffers that no checkpoint filled: placeholder words, or zeros that `get` refuses."""
        dictionary = placeholder_dictionary(config) if self.is_placeholder else None
        for name in _BUFFERS:
            buffer = getattr(self, name)
            init.copy_(buffer, torch.zeros_like(buffer) if dictionary is None else getattr(dictionary, name).to(buffer))


class TFreeEmbedding(nn.Embedding):
    """Embeds ids as sums of the rows that their words switch on. `weight` is [v, D], whatever the number of ids."""

    def __init__(self, config: TFreeConfig) -> None:
        super().__init__(config.hash_vocab_size, config.hidden_size)
        self.config = config
        self.dictionary = StoredDictionary(config)

    def find_words(self, input_ids: Tensor) -> WordsInIds:
        """Resolve ids (int64 [B, L]) to words; see `spelling_tfree.find_words`."""
        return find_words(input_ids, self.dictionary.get(), self.config.hash_spec, self.config.first_byte_id)

    def embed(self, words: WordsInIds) -> Tensor:
        """Embed resolved words: [B, L, D]; bytes inside a spelled word repeat the word before them."""
        vectors = embed_words(
            words.dictionary,
            self.weight,
            aggregation=self.config.embedding_aggregation,
            normalization=self.config.embedding_normalization,
        )
        return nn.functional.embedding(words.word, vectors)

    def forward(self, input_ids: Tensor, words: WordsInIds | None = None) -> Tensor:
        """Embed ids (int [B, L] or [L]): [B, L, D] or [L, D]; `words` are those of a context that ends with the ids."""
        if input_ids.ndim == 1:
            return self.forward(input_ids[None])[0]
        return self.embed(words or self.find_words(input_ids))[:, -input_ids.shape[1] :]


def placeholder_dictionary(config: TFreeConfig) -> FactoredDictionary:
    """Give every id a whole-string pattern of its own, for a model that no tokenizer was given to yet."""
    words = [f"<|id:{i}|>" for i in range(config.vocab_size)]
    return build_factored_dictionary(words, config.hash_spec, special=range(len(words)))
