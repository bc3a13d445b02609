"""`steering=` and `return_concept_scores=` for forward passes and `generate`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .hook_scar import PROMPT
from .recording_scar import ConceptScores, Recorder, record_scores
from .steering_scar import steering as steering_block

REQUEST = ("steering", "rule", "mode", "positions")
"""Keyword arguments that say how to steer."""


def steered_forward(
    layers: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `forward`, steered and scored as `steering=` and `return_concept_scores=` in `kwargs` say.

    Scores are the output's `concept_scores`, a `ConceptScores`.
    """
    wants_scores = kwargs.pop("return_concept_scores", False)
    with _steering(layers, kwargs), record_scores(layers) if wants_scores else nullcontext() as record:
        output = forward(*args, **kwargs)
    if record is not None:
        if not isinstance(output, Mapping):
            raise ValueError(
                "return_concept_scores=True needs return_dict=True, so that the output has a place for them."
            )
        output["concept_scores"] = record.scores  # type: ignore[index]
    return output


def steered_generate(
    layers: nn.Module, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `generate`, steered and scored as `steering=` and `return_concept_scores=` in `kwargs` say.

    With scores it returns the dictionary of `return_dict_in_generate=True`, whose `concept_scores` [B, prompt + new]
    belong to its `sequences`. The last token of a sequence is never read by the model, so it has none.
    """
    prompt = _prompt(layers, args, kwargs)
    length = 1 if prompt is None else prompt.shape[1]
    if not kwargs.pop("return_concept_scores", False):
        with _steering(layers, kwargs), _prompt_of(length):
            return generate(*args, **kwargs)
    kwargs["return_dict_in_generate"] = True
    with _steering(layers, kwargs), _prompt_of(length), record_scores(layers) as record:
        output = generate(*args, **kwargs)
    config = kwargs.get("generation_config") or getattr(layers, "generation_config", None)
    end = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    unseen = length if prompt is not None and prompt.ndim == 3 else 0  # embeddings have no tokens in the output
    scores = _of_sequences(record, output, length, unseen + output["sequences"].shape[1])
    if end is not None and getattr(output, "beam_indices", None) is None:
        scores = _without_end(scores, output["sequences"], end, length)
    output["concept_scores"] = scores
    return output


def _steering(layers: nn.Module, kwargs: dict[str, Any]) -> Any:
    request = {name: kwargs.pop(name) for name in REQUEST if name in kwargs}
    return steering_block(layers, **request) if any(value is not None for value in request.values()) else nullcontext()


@contextmanager
def _prompt_of(length: int) -> Iterator[None]:
    token = PROMPT.set(length)
    try:
        yield
    finally:
        PROMPT.reset(token)


def _prompt(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Tokens [B, L] or embeddings [B, L, d] that `generate` goes on from, if it does not begin by itself."""
    if model.config.is_encoder_decoder:
        given = [kwargs.get("decoder_input_ids"), kwargs.get("decoder_inputs_embeds")]
    else:
        given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    return next((tokens for tokens in given if tokens is not None), None)


def _of_sequences(record: Recorder, output: Any, prompt: int, length: int) -> ConceptScores:
    """Scores of the returned sequences: a beam search changes the rows that they go through at every pass."""
    ends = record.ends
    beams: Tensor | None = getattr(output, "beam_indices", None)
    if beams is None:
        return record.reordered([torch.arange(output["sequences"].shape[0])] * len(ends), length)
    beams = beams.cpu()
    # All beams of a request read the same prompt, in one pass or more; each later pass reads what the one before chose.
    rows = [beams[:, 0].clamp(min=0)] * max(1, sum(end <= prompt for end in ends))
    rows += [beams[:, step] for step in range(1, min(len(ends) - len(rows) + 1, beams.shape[1]))]
    rows += [torch.full_like(beams[:, 0], -1)] * (len(ends) - len(rows))
    return record.reordered(rows, length)


def _without_end(scores: ConceptScores, sequences: Tensor, end: int | list[int], prompt: int) -> ConceptScores:
    """Scores without those of the padding that follows a sequence's end while other rows go on."""
    missing = scores.is_scored.shape[1] - sequences.shape[1]
    ends = torch.nn.functional.pad(torch.isin(sequences, torch.as_tensor(end, device=sequences.device)), (missing, 0))
    ends[:, :prompt] = False
    has_ended = (ends.cumsum(-1) - ends.int() > 0).to(scores.is_scored.device)
    is_scored = scores.is_scored & ~has_ended
    return ConceptScores({name: each.where(is_scored, 0.0) for name, each in scores.items()}, is_scored)
