"""`steering=` and `return_concept_scores=` for forward passes and `generate`."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .recording_scar import ConceptScores, Recorder, record_scores
from .steering_scar import steering as steering_block

REQUEST = ("steering", "rule", "mode", "positions")
"""Keyword arguments that say how to steer."""


def steered_forward(layers: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `forward`, steered and scored as `steering=` and `return_concept_scores=` in `kwargs` say.

    Scores are the output's `concept_scores`, a `ConceptScores`.
    """
    wants_scores = kwargs.pop("return_concept_scores", False)
    with _steering(layers, kwargs), record_scores(layers) if wants_scores else nullcontext() as record:
        output = forward(*args, **kwargs)
    if record is not None:
        if not isinstance(output, Mapping):
            raise ValueError("return_concept_scores=True needs return_dict=True, so that the output has a place for them.")
        output["concept_scores"] = record.scores  # type: ignore[index]
    return output


def steered_generate(
    layers: nn.Module, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `generate`, steered and scored as `steering=` and `return_concept_scores=` in `kwargs` say.

    With scores it returns the dictionary of `return_dict_in_generate=True`, whose `concept_scores` [B, prompt + new] belong
    to its `sequences`. The last token of a sequence is never read by the model, so it has none.
    """
    if not kwargs.pop("return_concept_scores", False):
        with _steering(layers, kwargs):
            return generate(*args, **kwargs)
    kwargs["return_dict_in_generate"] = True
    with _steering(layers, kwargs), record_scores(layers) as record:
        output = generate(*args, **kwargs)
    # A prompt of embeddings has no tokens in the output's sequences.
    ids, embeddings = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")), kwargs.get("inputs_embeds")
    unseen = embeddings.shape[1] if embeddings is not None and ids is None else 0
    config = kwargs.get("generation_config") or getattr(layers, "generation_config", None)
    end = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    output["concept_scores"] = _of_sequences(record, output, unseen, end)
    return output


def _steering(layers: nn.Module, kwargs: dict[str, Any]) -> Any:
    request = {name: kwargs.pop(name) for name in REQUEST if name in kwargs}
    return steering_block(layers, **request) if any(value is not None for value in request.values()) else nullcontext()


def _of_sequences(record: Recorder, output: Any, unseen: int, end: int | list[int] | None) -> ConceptScores:
    """Scores of the returned sequences: a beam search changes the rows that they go through at every pass."""
    sequences: Tensor = output["sequences"]
    beams: Tensor | None = getattr(output, "beam_indices", None)
    passes, length = record.passes, unseen + sequences.shape[1]
    if beams is None:
        scores = record.reordered([torch.arange(sequences.shape[0])] * passes, length)
        return scores if end is None else _without_end(scores, sequences, end, record.prompt)
    beams = beams.cpu()
    # The prompt is read once for all beams of a request; each later pass reads what the one before has chosen.
    rows = [beams[:, 0].clamp(min=0), *(beams[:, step] for step in range(1, min(passes, beams.shape[1])))]
    rows += [torch.full_like(beams[:, 0], -1)] * (passes - len(rows))
    return record.reordered(rows, length)


def _without_end(scores: ConceptScores, sequences: Tensor, end: int | list[int], prompt: int) -> ConceptScores:
    """Scores without those of the padding that follows a sequence's end while other rows go on."""
    length = scores.is_scored.shape[1]
    tokens = torch.nn.functional.pad(sequences, (length - sequences.shape[1], 0), value=-1)
    ends = torch.isin(tokens, torch.as_tensor(end, device=tokens.device))
    ends[:, :prompt] = False
    has_ended = (ends.cumsum(-1) - ends.int() > 0).to(scores.is_scored.device)
    is_scored = scores.is_scored & ~has_ended
    return ConceptScores({name: each.where(is_scored, 0.0) for name, each in scores.items()}, is_scored)
