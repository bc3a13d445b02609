"""Explanations in the layout of inseq 0.7."""

import math
from typing import Any

import torch
from torch import Tensor

from .explanation_atman import Explanation


def to_sequence_output(explanation: Explanation) -> Any:
    """Convert to inseq's result for decoder-only models; see `Explanation.to_inseq`."""
    try:
        from inseq.data.attribution import CoarseFeatureAttributionSequenceOutput
        from inseq.utils.typing import TokenWithId
    except ImportError as error:
        raise ImportError("to_inseq() needs inseq: pip install atman-explain[inseq].") from error
    targets, P, M = explanation.targets, len(explanation.prompt_ids), len(explanation.targets)
    if any(target.id is None for target in targets):
        raise ValueError("targets must be single tokens for inseq, got a sum; convert the explanation before total().")
    source = [TokenWithId(text, id_) for text, id_ in zip(explanation.tokens, explanation.prompt_ids, strict=True)]
    rows = torch.zeros(P + M, M, dtype=explanation.scores.dtype)
    scores = explanation.scores.detach().cpu()
    for u, unit in enumerate(explanation.units):
        if not unit.columns or max(unit.columns) >= P + M:
            raise ValueError(f"units must be tokens of prompt or target for inseq, but unit {u} is {unit.text!r}.")
        for column, share in zip(unit.columns, unit.shares or [1.0] * len(unit.columns), strict=True):
            rows[column] += scores[:, u] * share
    is_later = torch.arange(P + M)[:, None] >= P + torch.arange(M)  # inseq's mark for tokens not written yet
    return CoarseFeatureAttributionSequenceOutput(
        source=source,
        target=source + [TokenWithId(target.text, target.id) for target in targets],
        source_attributions=None,
        target_attributions=rows.masked_fill(is_later, math.nan),
        step_scores=_step_scores(explanation),
        attr_pos_start=P,
    )


def _step_scores(explanation: Explanation) -> dict[str, Tensor]:
    outputs = explanation.baseline_logprobs.detach().cpu()
    return {"logit": outputs} if explanation.config.get("delta") == "logit" else {"probability": outputs.exp()}
