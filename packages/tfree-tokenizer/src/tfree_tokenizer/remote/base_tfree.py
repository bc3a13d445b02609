"""Loading, saving and dictionaries of the T-FREE models."""

import os
from typing import Any

import torch
from torch import nn
from transformers import LlamaPreTrainedModel, PreTrainedTokenizerBase

from .configuration_tfree import NUM_BYTE_IDS, TFreeConfig
from .dictionary_tfree import FactoredDictionary, build_factored_dictionary
from .embedding_tfree import StoredDictionary
from .head_tfree import ComposedHead
from .saving_tfree import staged_folder


class TFreePreTrainedModel(LlamaPreTrainedModel):
    """Loading, saving and initialization shared by the T-FREE models."""

    config: TFreeConfig
    config_class = TFreeConfig
    _can_compile_fullgraph = False  # which ids form a word is decided on the host

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, StoredDictionary):
            module.reset(self.config)
        elif not isinstance(module, ComposedHead):
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

    def _store(self, dictionary: FactoredDictionary, fingerprint: str | None) -> None:
        self.get_input_embeddings().dictionary.replace(dictionary)
        config = self.config
        config.vocab_size = len(dictionary)
        config.dictionary_nnz = dictionary.word_units.shape[0]
        config.dictionary_units = dictionary.unit_rows.shape[0]
        config.dictionary_corrections = dictionary.correction_rows.shape[0]
        config.dictionary_fingerprint = fingerprint
