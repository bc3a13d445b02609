"""Fitting the decode temperature: the one number that turns scores into probabilities."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_GRID = 25
_ROUNDS = 3
_POSITIONS_PER_BLOCK = 64


@torch.no_grad()
def fit_temperature(model: Any, batches: Iterable[dict[str, Tensor]], max_positions: int) -> tuple[float, float]:
    """Search the temperature that gives held-out words the highest likelihood.

    Args:
        model: a `TFreeForCausalLM`; its mode and configuration are left as they are.
        batches: dicts with `input_ids` and optionally `attention_mask`.
        max_positions: how many predictions to use at most.

    Returns:
        The temperature and the mean negative log-likelihood at it, in nats.

    Raises:
        ValueError: the batches hold no word of the dictionary to predict.
    """
    was_training, model_temperature = model.training, model.config.decode_temperature
    model.eval()
    model.config.decode_temperature = 1.0
    try:
        states, targets = _predictions(model, batches, max_positions)
        low, high = -3.0, 3.0  # log10 of the temperature
        for _ in range(_ROUNDS):  # each round narrows the range to two steps of the grid
            grid = torch.logspace(low, high, _GRID, dtype=torch.float64)
            losses = _mean_losses(model, states, targets, grid)
            best, step = int(losses.argmin()), (high - low) / (_GRID - 1)
            low, high = low + (best - 1) * step, low + (best + 1) * step
    finally:
        model.config.decode_temperature = model_temperature
        model.train(was_training)
    return float(grid[best]), float(losses[best])


def _predictions(model: Any, batches: Iterable[dict[str, Tensor]], max_positions: int) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and the dictionary words [N] that follow them."""
    is_word = model.is_word_id()
    states, targets, left = [], [], max_positions
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.to(model.device)
        hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        counted = mask[:, :-1].bool() & mask[:, 1:].bool() & is_word[ids[:, 1:]]
        states.append(hidden[:, :-1][counted][:left])
        targets.append(ids[:, 1:][counted][:left])
        left -= targets[-1].numel()
        if left <= 0:
            break
    if left == max_positions:
        raise ValueError("batches hold no dictionary word to predict; give held-out text of at least two words.")
    return torch.cat(states), torch.cat(targets)


def _mean_losses(model: Any, states: Tensor, targets: Tensor, temperatures: Tensor) -> Tensor:
    """Mean negative log-likelihood at every temperature: float64, one block of positions in memory at a time."""
    is_word = model.is_word_id()
    column = is_word.long().cumsum(0) - 1
    total = torch.zeros_like(temperatures)
    for rows, words in zip(states.split(_POSITIONS_PER_BLOCK), targets.split(_POSITIONS_PER_BLOCK), strict=True):
        scores = model.word_logits(model.lm_head(rows)[None])[0][:, is_word]
        own = scores.gather(1, column[words][:, None]).squeeze(1)
        for i, temperature in enumerate(temperatures.tolist()):
            total[i] += float(((scores / temperature).logsumexp(1) - own / temperature).sum(dtype=torch.float64))
    return total / targets.numel()
