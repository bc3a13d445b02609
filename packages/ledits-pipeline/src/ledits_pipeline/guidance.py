"""How the edits of one step become one change of the model's output."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import attention_masks, grow, noise_masks


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """Which implicit masks limit the edits of a step."""

    attention: bool = True
    """Use M1."""

    noise: bool = True
    """Use M2; with `attention`, their intersection."""

    dilate: int = 0
    """Positions by which masks grow in every direction."""

    quantile_dtype: torch.dtype | None = None
    """What quantiles are computed in; None: the dtype of the states. `"diffusers"` mode: float32."""


def guide(
    unconditional: Tensor,
    edits: Tensor,
    *,
    scales: Tensor,
    thresholds: Sequence[float],
    rule: MaskRule,
    attention: Tensor | None = None,
    user_masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The change of the raw model output that the edits of one step ask for: sum_e scale_e (o_e - o) U_e M_e.

    Args:
        unconditional: `[B, C, h, w]`, float32 or wider.
        edits: `[E, B, C, h, w]`, the predictions for the active edits.
        scales: `[E]`, signed strengths.
        thresholds: lambda, one per edit.
        rule: which masks.
        attention: `[E, B, gh, gw]`, needed if `rule.attention`.
        user_masks: `[E or 1, B or 1, 1, h, w]` in [0, 1].

    Returns:
        The change `[B, C, h, w]` and the masks `[E, B, h, w]` bool.
    """
    directions = (edits - unconditional) * scales[:, None, None, None, None]
    if user_masks is not None:
        directions = directions * user_masks
    size = (edits.shape[-2], edits.shape[-1])
    masks = torch.ones((*edits.shape[:2], *size), dtype=torch.bool, device=edits.device)
    if rule.attention and attention is not None:
        masks = attention_masks(attention, thresholds, size, quantile_dtype=rule.quantile_dtype)
    if rule.noise:
        masks = masks & noise_masks(directions, thresholds, quantile_dtype=rule.quantile_dtype)
    if rule.dilate:
        masks = grow(masks, rule.dilate)
    return (directions * masks[:, :, None]).sum(dim=0), masks


def rescale(output: Tensor, edits: Tensor, phi: float) -> Tensor:
    """Pull the spread of the guided output towards that of the edit predictions (Lin et al. 2023, section 3.4).

    Args:
        output: `[B, C, h, w]`, the guided output.
        edits: `[E, B, C, h, w]`, the predictions it was guided by.
        phi: share of the rescaled output, 0 changes nothing.
    """
    axes = (1, 2, 3)
    ratio = edits.mean(dim=0).std(dim=axes, keepdim=True) / output.std(dim=axes, keepdim=True)
    return phi * output * ratio + (1.0 - phi) * output
