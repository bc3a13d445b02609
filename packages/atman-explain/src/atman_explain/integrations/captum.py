"""AtMan as an attribution algorithm of captum: token ids in, one score per id out."""

from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor, nn

from ..remote.configuration_atman import AtManConfig, with_settings
from ..remote.explain_atman import AtMan
from ..remote.explanation_atman import Explanation

_INTEGERS = (torch.int32, torch.int64)
Ids = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


class AtManAttribution(PerturbationAttribution):
    """Attributes the next tokens of a language model to the tokens that it reads, by suppressing attention to them.

    An id's score is the log-probability, in nats, that the target loses when attention to the id's position is
    suppressed: positive supports the target. Larger units, such as words, give each of their positions the unit's
    score. Positions in no unit have 0: padding, and special tokens if there is a processor that knows them.

    Args:
        forward_func: a transformers model with attention, as for `AtMan`. Attribution is to the encoder's input of an
            encoder-decoder.
        processor: its tokenizer, or its processor. None: all ids are taken for text, and units can only be tokens.
        config: settings; see `AtManConfig`.
        **settings: single settings, over those of `config`.

    Raises:
        ValueError: a setting is out of range or unknown.
        UnsupportedModelError: the model's attention cannot be reached.

    Example:
        >>> atman = AtManAttribution(model, tokenizer)
        >>> atman.attribute(input_ids, target=next_ids, additional_forward_args=attention_mask)
    """

    def __init__(
        self, forward_func: nn.Module, processor: Any = None, config: AtManConfig | None = None, **settings: Any
    ) -> None:
        super().__init__(forward_func)
        self._atman = AtMan(forward_func, processor, config, **settings)

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor],
        target: Ids | None = None,
        additional_forward_args: Tensor | tuple[Tensor | None] | None = None,
        **settings: Any,
    ) -> Any:
        """Score every id of a batch.

        Args:
            inputs: [B, P] token ids; or a tuple of one such tensor.
            target: the id that comes next, for all rows or one for each, [B]; or [B, M] ids of continuations, whose
                scores are summed. None: what the model generates, at most `max_new_tokens`.
            additional_forward_args: the attention mask [B, P], 0 for padding at the start or the end of a row.
            **settings: single settings for this call.

        Returns:
            [B, P] scores on the device of `inputs`, float32 (float64 for float64 models); in a tuple if `inputs` is.

        Raises:
            ValueError: bad input; the message names the argument.
        """
        ids = _only(inputs)
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in _INTEGERS or not ids.numel():
            raise ValueError(
                f"inputs must be a tensor [B, P] of token ids, or a tuple of it alone, got {_show(inputs)}."
            )
        mask = _mask(additional_forward_args, ids)
        if with_settings(self._atman.config, settings).attribute_target:
            raise ValueError("attribute_target must be False for captum, got True: the target is no part of inputs.")
        found = self._atman.explain(
            {"input_ids": ids, "attention_mask": mask},
            target=None if target is None else _continuations(target, len(ids)),
            **settings | {"target_granularity": "complete"},
        )
        explanations = [found] if isinstance(found, Explanation) else found
        starts = mask.bool().int().argmax(1).tolist()
        scores = [_spread(*each, ids.shape[1]) for each in zip(explanations, starts, strict=True)]
        result = torch.stack(scores).to(ids.device)
        return (result,) if isinstance(inputs, tuple) else result


def _only(values: Any) -> Any:
    """The value, or what a tuple of one holds."""
    return values[0] if isinstance(values, tuple) and len(values) == 1 else values


def _mask(given: Any, ids: Tensor) -> Tensor:
    mask = _only(given)
    if mask is None:
        return torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ValueError(
            f"additional_forward_args must be an attention mask of the shape {list(ids.shape)} of inputs, or a tuple "
            f"of it alone, got {_show(given)}."
        )
    return mask


def _continuations(target: Ids, batch: int) -> list[list[int]]:
    try:
        ids = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)  # what is no tensor at all is refused like one of a wrong shape
    if ids.dtype not in _INTEGERS or not ids.numel():
        raise ValueError(f"target must be a token id, or a tensor [B] or [B, M] of ids, got {_show(target)}.")
    if ids.numel() == 1:
        ids = ids.reshape(1, 1).expand(batch, 1)
    ids = ids[:, None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != batch:
        raise ValueError(
            f"target must have a row for each of the {batch} rows of inputs, got {_show(target)}; pass [B] next ids "
            "or [B, M] continuations."
        )
    return ids.tolist()


def _spread(explanation: Explanation, start: int, length: int) -> Tensor:
    """Scores [length] of positions, of which the prompt's begin at `start`."""
    scores = explanation.relevance()
    result = scores.new_zeros(length)
    for score, unit in zip(scores, explanation.units, strict=True):
        for column, share in zip(unit.columns, unit.shares or [1.0] * len(unit.columns), strict=True):
            result[start + column] += score * share
    return result


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of the shape {list(value.shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else repr(value)
