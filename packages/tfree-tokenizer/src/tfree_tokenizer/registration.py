"""Tells transformers' auto classes about T-FREE."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .remote.configuration_tfree import TFreeConfig
from .remote.modeling_tfree import TFreeForCausalLM, TFreeForSequenceClassification, TFreeModel
from .remote.tokenization_tfree import TFreeTokenizer


def register() -> None:
    """Make `AutoConfig`, `AutoTokenizer` and the `AutoModel...` classes load T-FREE without `trust_remote_code`.

    Calling it again changes nothing. Using any T-FREE class through `tfree_tokenizer` calls it.

    Example:
        >>> import tfree_tokenizer
        >>> tfree_tokenizer.register()
    """
    AutoConfig.register("tfree", TFreeConfig, exist_ok=True)
    AutoTokenizer.register(TFreeConfig, tokenizer_class=TFreeTokenizer, exist_ok=True)
    AutoModel.register(TFreeConfig, TFreeModel, exist_ok=True)
    AutoModelForCausalLM.register(TFreeConfig, TFreeForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(TFreeConfig, TFreeForSequenceClassification, exist_ok=True)
