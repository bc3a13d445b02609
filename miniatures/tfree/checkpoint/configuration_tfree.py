"""Configuration of the T-FREE models: a Llama body, a hashed embedding and head, and the dictionary that decodes."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedTokenizerBase

from .dictionary_tfree import MAX_WORDS
from .patterns_tfree import HashSpec

NUM_BYTE_IDS = 512  # 256 bytes inside a spelled word, then 256 bytes that end one

_CHOICES = {
    "objective": ("bce", "dictionary_ce"),
    "ruleset": ("v1", "v2"),
    "decode_mode": ("mean", "contrast", "loglik"),
    "loss_normalization": ("all", "active", "sum"),
    "embedding_aggregation": ("sum", "mean"),
}
_CAPS = {  # what a configuration file may ask for before anything is allocated
    "vocab_size": MAX_WORDS,
    "dictionary_nnz": 64 * MAX_WORDS,
    "dictionary_units": (1 << 24) + MAX_WORDS,
    "dictionary_corrections": 64 * MAX_WORDS,
    "sampled_words": MAX_WORDS,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 14,
    "max_position_embeddings": 1 << 28,
}
_MAY_BE_ZERO = {"dictionary_nnz", "dictionary_units", "dictionary_corrections", "sampled_words", "num_hidden_layers"}


@strict
class TFreeConfig(LlamaConfig):
    """Configuration of `TFreeModel` and `TFreeForCausalLM`.

    The fields of `LlamaConfig` describe the body. `vocab_size` is the number of ids that the tokenizer emits
    (special and structural words, 512 byte ids, dictionary words), not the number of rows of the embedding.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    model_type = "tfree"
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | {"embed_tokens": "replicate"}
    """Tensor parallelism splits the layers; every process holds the small tables whole."""

    vocab_size: int = 1024
    """Number of ids."""

    rms_norm_eps: float = 1e-5
    """Epsilon of the norms (the released checkpoints' value)."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    hash_vocab_size: int = 8000
    """v: rows of the embedding table and of the head."""

    num_hashes: int = 10
    """m: rows that one trigram switches on."""

    num_lowercase: int = 0
    """k: how many of them are shared with the lower-cased trigram."""

    hash_scheme: str = "mix32"
    """"mix32" for new models, "md5" for the released checkpoints."""

    hash_seed: int = 0
    """Seed of "mix32"."""

    ruleset: str = "v1"
    """Word-splitting rules of the tokenizer that the model was trained with."""

    first_byte_id: int | None = None
    """Id of byte 0 inside a spelled word; the 512 byte ids follow it. None: no ids spell words in bytes."""

    embedding_aggregation: str = "sum"
    """How a trigram's m rows are combined: "sum" (default) or "mean"."""

    embedding_normalization: bool = False
    """Divide a word's embedding by its number of trigrams."""

    objective: str = "bce"
    """"bce": the paper's multi-label loss. "dictionary_ce": softmax over the dictionary's summed row logits."""

    loss_pos_weight: int | float = 300.0
    """pw: weight of the ones in "bce"."""

    loss_scale: int | float = 100.0
    """s: factor of "bce"."""

    loss_normalization: str = "active"
    """"bce" divides by: "all" positions times v, "active" (counted) positions times v, or nothing ("sum")."""

    sampled_words: int = 0
    """"dictionary_ce" in training: expected number of dictionary words in the softmax. 0: all of them."""

    decode_mode: str | None = None
    """How words are scored: "mean", "contrast", "loglik". None: "contrast" for "bce", "loglik" for "dictionary_ce"."""

    decode_temperature: int | float | None = None
    """Divides the scores; fitted by `calibrate_decode`. None: 0.06 for "bce", m for "dictionary_ce"."""

    decode_edge_weight: int | float = 1.0
    """w_e: weight of the rows of border trigrams in "mean" and "contrast". Below 0.8 damps edge artefacts."""

    copy_spelled_words: bool = True
    """Let the model repeat words of its context that the dictionary does not hold."""

    dictionary_nnz: int = 0
    """Size of the stored dictionary: units of all words together. Written by `set_dictionary`."""

    dictionary_units: int = 0
    """Size of the stored dictionary: distinct trigrams. Written by `set_dictionary`."""

    dictionary_corrections: int = 0
    """Size of the stored dictionary: corrections. Written by `set_dictionary`."""

    dictionary_fingerprint: str | None = None
    """sha256 of the word list that the ids stand for. None: no tokenizer was given; every id is a placeholder word."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.decode_mode is None:
            self.decode_mode = "contrast" if self.objective == "bce" else "loglik"
        if self.decode_temperature is None:
            self.decode_temperature = 0.06 if self.objective == "bce" else float(self.num_hashes)
        super().__post_init__(**kwargs)
        self._check_values()

    @property
    def hash_spec(self) -> HashSpec:
        """The hash that turns trigrams into rows."""
        return HashSpec(
            hash_vocab_size=self.hash_vocab_size,
            num_hashes=self.num_hashes,
            num_lowercase=self.num_lowercase,
            hash_scheme=self.hash_scheme,
            hash_seed=self.hash_seed,
        )

    @property
    def decode_pos_weight(self) -> float:
        """The pos_weight that shifted the row logits in training: `loss_pos_weight` for "bce", 1 otherwise."""
        return self.loss_pos_weight if self.objective == "bce" else 1.0

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> "TFreeConfig":
        """Make the configuration of a model that reads and writes a tokenizer's ids.

        Args:
            tokenizer: a `TFreeTokenizer`. Its ids, rule set and special tokens are taken over.
            **kwargs: all other fields, among them `hash_vocab_size`, `num_hashes` and the sizes of the body.
        """
        taken = {
            "vocab_size": len(tokenizer),
            "ruleset": tokenizer.ruleset,
            "first_byte_id": tokenizer.first_byte_id,
            "dictionary_fingerprint": tokenizer.dictionary_fingerprint,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return cls(**(taken | kwargs))

    def _check_values(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        for name, cap in _CAPS.items():
            value, least = getattr(self, name), 0 if name in _MAY_BE_ZERO else 1
            if isinstance(value, bool) or not least <= value <= cap:
                raise ValueError(f"{name} must lie in [{least}, {cap}], got {value!r}.")
        for name in ("loss_pos_weight", "loss_scale", "decode_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and above 0, got {value!r}.")
        if not (math.isfinite(self.decode_edge_weight) and self.decode_edge_weight >= 0):
            raise ValueError(f"decode_edge_weight must be finite and at least 0, got {self.decode_edge_weight!r}.")
        if self.first_byte_id is not None and not 0 <= self.first_byte_id <= self.vocab_size - NUM_BYTE_IDS:
            raise ValueError(
                f"first_byte_id must lie in [0, {self.vocab_size - NUM_BYTE_IDS}] (vocab_size - {NUM_BYTE_IDS}), "
                f"got {self.first_byte_id}."
            )
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False: T-FREE's embedding and head are separate tables.")
        self.hash_spec  # noqa: B018  raises on an impossible hash


TFreeConfig.register_for_auto_class()
