"""T-FREE for Hugging Face transformers: whole words as sparse trigram patterns.

Importing this package is cheap: every name below is loaded on first use. The auto classes of transformers know the
model type "tfree" as soon as they are loaded after, or were loaded before, this import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import auto_registration
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .conversion import convert_original_checkpoint as convert_original_checkpoint
    from .dictionary_building import build_dictionary as build_dictionary
    from .loading import load_pretrained as load_pretrained
    from .registration import register as register
    from .remote.configuration_tfree import TFreeConfig as TFreeConfig
    from .remote.decoding_tfree import dictionary_scores as dictionary_scores
    from .remote.decoding_tfree import dictionary_topk as dictionary_topk
    from .remote.dictionary_tfree import FactoredDictionary as FactoredDictionary
    from .remote.dictionary_tfree import build_factored_dictionary as build_factored_dictionary
    from .remote.losses_tfree import dictionary_loss as dictionary_loss
    from .remote.losses_tfree import embed_words as embed_words
    from .remote.losses_tfree import multilabel_loss as multilabel_loss
    from .remote.modeling_tfree import TFreeForCausalLM as TFreeForCausalLM
    from .remote.modeling_tfree import TFreeForSequenceClassification as TFreeForSequenceClassification
    from .remote.modeling_tfree import TFreeModel as TFreeModel
    from .remote.patterns_tfree import HashSpec as HashSpec
    from .remote.patterns_tfree import WordPattern as WordPattern
    from .remote.patterns_tfree import fingerprint_words as fingerprint_words
    from .remote.patterns_tfree import mix32_rows as mix32_rows
    from .remote.patterns_tfree import special_rows as special_rows
    from .remote.patterns_tfree import trigram_rows as trigram_rows
    from .remote.patterns_tfree import word_pattern as word_pattern
    from .remote.patterns_tfree import word_trigrams as word_trigrams
    from .remote.tokenization_tfree import TFreeTokenizer as TFreeTokenizer
    from .remote.words_tfree import expects_space as expects_space
    from .remote.words_tfree import join_words as join_words
    from .remote.words_tfree import split_words as split_words
    from .remote.words_tfree import structural_words as structural_words

_NAMES = {
    "conversion": ("convert_original_checkpoint",),
    "dictionary_building": ("build_dictionary",),
    "loading": ("load_pretrained",),
    "registration": ("register",),
    "remote.configuration_tfree": ("TFreeConfig",),
    "remote.decoding_tfree": ("dictionary_scores", "dictionary_topk"),
    "remote.dictionary_tfree": ("FactoredDictionary", "build_factored_dictionary"),
    "remote.losses_tfree": ("dictionary_loss", "embed_words", "multilabel_loss"),
    "remote.modeling_tfree": ("TFreeForCausalLM", "TFreeForSequenceClassification", "TFreeModel"),
    "remote.patterns_tfree": (
        "HashSpec",
        "WordPattern",
        "fingerprint_words",
        "mix32_rows",
        "special_rows",
        "trigram_rows",
        "word_pattern",
        "word_trigrams",
    ),
    "remote.tokenization_tfree": ("TFreeTokenizer",),
    "remote.words_tfree": ("expects_space", "join_words", "split_words", "structural_words"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_REGISTERED = frozenset(name for name in _HOME if name.startswith("TFree"))

__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605 (computed, so that a name has one home)


def __getattr__(name: str) -> Any:
    """Load the module that defines `name`, and keep the value for the next access."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    if name in _REGISTERED:
        importlib.import_module(f"{__name__}.registration").register()
    return value


def __dir__() -> list[str]:
    return __all__


auto_registration.install()
