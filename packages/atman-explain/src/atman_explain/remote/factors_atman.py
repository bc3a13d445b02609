"""Which column gets which factor when a unit is suppressed: its own, similar ones, neighboring patches."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_NORM_FLOOR = 1e-8


def cosine_similarities(embeds: Tensor, rows: Sequence[int] | Tensor) -> Tensor:
    """Cosine similarities of some rows of a matrix to all of them.

    Args:
        embeds: [T, D], input embeddings as they enter the model, without position embedding.
        rows: n row numbers.

    Returns:
        [n, T] float32 (float64 for float64) in [-1, 1]. Norms are floored at 1e-8, so a zero row is similar to none.
    """
    wide = embeds if embeds.dtype == torch.float64 else embeds.float()
    unit = F.normalize(wide, dim=-1, eps=_NORM_FLOOR)
    return (unit[rows] @ unit.T).clamp(-1.0, 1.0)


def conceptual_factors(
    similarities: Tensor,
    factor: float,
    kappa: float,
    *,
    scale_by_similarity: bool = True,
    max_similar: int | None = None,
) -> Tensor:
    """Factors of all columns when a token is suppressed together with what is similar to it.

    f_j = f + (1 - f)(1 - max(S_j, 0)) where S_j >= kappa, which is f for an identical token and 1 for an orthogonal
    or opposite one; 1 elsewhere. The token itself must be set to f by the caller: two columns can both have S = 1.

    Args:
        similarities: [..., T], cosine similarity S of the token to every column.
        factor: f of the token itself.
        kappa: least similarity that counts.
        scale_by_similarity: False gives f to every similar column.
        max_similar: at most so many columns, the most similar first, ties by position; the token counts as one.

    Returns:
        [..., T], dtype of `similarities`.

    Source: Deiseroth et al. 2023, "AtMan", section 3.3 (correlated token attention manipulation), written for the
    remaining factor.
    """
    is_similar = similarities >= kappa
    if scale_by_similarity:
        similar = factor + (1.0 - factor) * (1.0 - similarities.clamp(min=0.0))
    else:
        similar = torch.full_like(similarities, factor)
    if max_similar is not None and max_similar < similarities.shape[-1]:
        order = torch.sort(similarities, dim=-1, descending=True, stable=True).indices
        is_chosen = torch.zeros_like(is_similar).scatter_(-1, order[..., :max_similar], True)
        is_similar &= is_chosen
    return torch.where(is_similar, similar, torch.ones_like(similarities))


def neighboring_patches(patch: int, grid: tuple[int, int], reach: int) -> list[int]:
    """Patches at most `reach` rows and columns away from a patch of a row-major grid, itself included."""
    rows, columns = grid
    row, column = divmod(patch, columns)
    return [
        r * columns + c
        for r in range(max(0, row - reach), min(rows, row + reach + 1))
        for c in range(max(0, column - reach), min(columns, column + reach + 1))
    ]
