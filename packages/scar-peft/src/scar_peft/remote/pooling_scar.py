"""From scores of tokens to scores of sequences."""

import torch
from torch import Tensor

POOLINGS = ("mean", "max", "last")


def pool(scores: Tensor, mask: Tensor | None = None, kind: str = "mean") -> Tensor:
    """Give sequences one score: the mean, the greatest or the last of their tokens' scores.

    Args:
        scores: [..., L].
        mask: [..., L], not 0 where a token counts; None counts all.
        kind: "mean", "max" or "last".

    Returns:
        [...]; 0 for a sequence without tokens.

    Raises:
        ValueError: the mask has another shape, or the kind is unknown.

    Example:
        >>> pool(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]))
        tensor([2.])
    """
    if kind not in POOLINGS:
        raise ValueError(f"kind must be one of {list(POOLINGS)}, got {kind!r}.")
    counts = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask != 0
    if counts.shape != scores.shape:
        raise ValueError(f"mask must have the shape of scores {list(scores.shape)}, got {list(counts.shape)}.")
    if kind == "mean":
        return torch.where(counts, scores, 0.0).sum(-1) / counts.sum(-1).clamp(min=1)
    if not scores.shape[-1]:
        return scores.new_zeros(scores.shape[:-1])
    if kind == "max":
        best = scores.masked_fill(~counts, float("-inf")).amax(-1)
    else:
        positions = torch.arange(scores.shape[-1], device=scores.device)
        best = scores.gather(-1, torch.where(counts, positions, 0).amax(-1, keepdim=True)).squeeze(-1)
    return torch.where(counts.any(-1), best, 0.0)
