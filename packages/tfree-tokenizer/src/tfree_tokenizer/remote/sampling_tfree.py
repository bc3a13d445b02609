"""Sampling from a stream of the best words, and the probabilities of given words."""

from typing import Any

import torch
from torch import Tensor, nn

from .spelling_tfree import final_positions


@torch.no_grad()
def sample_topk(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int,
    k: int,
    temperature: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Continue sequences as `TFreeForCausalLM.generate_topk` describes."""
    if max_new_tokens < 1 or temperature <= 0:
        raise ValueError(
            f"max_new_tokens must be at least 1 and temperature above 0, got {max_new_tokens} and {temperature}."
        )
    kwargs: dict[str, Any] = {"use_cache": True, "past_key_values": None, "next_sequence_length": None}
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    eos = torch.tensor(_as_list(model.config.eos_token_id), dtype=torch.long, device=input_ids.device)
    pad = model.config.pad_token_id if model.config.pad_token_id is not None else int(eos[0]) if len(eos) else 0
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        inputs = model.prepare_inputs_for_generation(input_ids, attention_mask=mask, **kwargs)
        hidden = model.model(**{name: value for name, value in inputs.items() if name != "logits_to_keep"})
        log_probs, ids, _ = model.decode_topk(model.lm_head(hidden.last_hidden_state[:, -1]), k)
        choice = torch.multinomial((log_probs / temperature).softmax(1), 1, generator=generator)
        new = torch.where(finished, pad, ids.gather(1, choice).squeeze(1))
        input_ids, mask = torch.cat([input_ids, new[:, None]], 1), nn.functional.pad(mask, (0, 1), value=1)
        kwargs |= {"past_key_values": hidden.past_key_values, "next_sequence_length": 1}
        finished |= torch.isin(new, eos)
        if bool(finished.all()):
            break
    return input_ids


@torch.no_grad()
def word_log_probabilities(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Score given words as `TFreeForCausalLM.score` describes."""
    logits = model(input_ids, attention_mask=attention_mask, use_cache=False).logits
    per_id = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)  # [B, L - 1]
    per_id = nn.functional.pad(per_id, (1, 0))
    if attention_mask is not None:
        visible = attention_mask.bool()
        follows = nn.functional.pad(visible[:, :-1], (1, 0))
        per_id = per_id.masked_fill(~(visible & follows), 0.0)
    return _sum_over_spelled(per_id, final_positions(input_ids, model.config.first_byte_id))


def _sum_over_spelled(per_id: Tensor, is_final: Tensor) -> Tensor:
    """Collect the values of a spelled word's ids at its last id."""
    word = is_final.long().cumsum(1) - is_final.long()  # [B, L], number of words finished before
    sums = torch.zeros_like(per_id).scatter_add(1, word, per_id).clamp(min=torch.finfo(per_id.dtype).min)
    return torch.where(is_final, sums.gather(1, word), 0.0)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
