"""The head as trainers expect it: one output vector per id."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_tfree import NUM_BYTE_IDS
from .decoding_tfree import sum_active_rows


class ComposedHead(nn.Linear):
    """The output vector of every id, composed from the head's rows: what `get_output_embeddings` shows to trainers.

    With objective "dictionary_ce" a word's logit is linear in the hidden state, so this is an ordinary output layer
    [ids, D], differentiable with respect to `lm_head`. The 512 byte ids share the weight of one word of score zero.
    """

    def __init__(self, model: Any) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate parameters
        self._owner = (model,)  # in a tuple, so that the model does not become a submodule of its own head
        self.in_features = model.config.hidden_size

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Number of ids."""
        return int(self._owner[0].config.vocab_size)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Output vectors, float [ids, D].

        Raises:
            ValueError: the objective is "bce", whose word scores are not linear.
        """
        (model,) = self._owner
        config = model.config
        if config.objective != "dictionary_ce":
            raise ValueError(
                f"objective {config.objective!r} has no output vector per id; train through the model's own loss, or "
                "with TFreeConfig(objective='dictionary_ce')."
            )
        dictionary = model.get_input_embeddings().dictionary.get()
        outputs = sum_active_rows(dictionary, model.head_weight()) / config.decode_temperature
        return outputs * model.is_word_id()[:, None].to(outputs.dtype)

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """Float [ids]: 0 for words, -log 512 for byte ids."""
        (model,) = self._owner
        return torch.where(model.is_word_id(), 0.0, -math.log(NUM_BYTE_IDS)).to(model.dtype)
