"""What `decode_scores` and `decode_topk` mean. Slow, short and exact; implementations are judged against this file.

Sets are rebuilt here from the units, so the correction lists of a dictionary are judged as well.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor


def decode_scores_reference(
    z: Tensor,
    word_ptr: Tensor,
    word_units: Tensor,
    word_edges: Tensor,
    unit_rows: Tensor,
    *,
    mode: Literal["mean", "contrast", "loglik"],
    edge_weight: float = 1.0,
    pos_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """`[B, W]` scores of every word under every row of logits `z` `[B, V]`, in float64."""
    z = z.double()
    p = torch.sigmoid(z)
    V, m = z.shape[1], unit_rows.shape[1]
    bounds = word_ptr.tolist()
    scores = torch.full((z.shape[0], len(bounds) - 1), torch.finfo(torch.float32).min, dtype=torch.float64)
    for w, (start, stop) in enumerate(pairwise(bounds)):
        n = stop - start
        if n == 0:
            continue
        border = stop - int(word_edges[w])
        inner = sorted(set(unit_rows[word_units[start:border].long()].flatten().tolist()))
        edge = sorted(set(unit_rows[word_units[border:stop].long()].flatten().tolist()))
        if mode == "loglik":
            scores[:, w] = (z[:, sorted({*inner, *edge})] - math.log(pos_weight)).sum(1)
        else:
            s = p[:, inner].sum(1) + edge_weight * p[:, edge].sum(1)
            scores[:, w] = s / (n * m)
            if mode == "contrast":
                scores[:, w] += (s - p.sum(1)) / max(V - n * m, 1)
        scores[:, w] /= temperature
    return scores


def decode_topk_reference(scores: Tensor, k: int, word_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of `[B, W]` scores (lower index first among equals) and the logsumexp of every row."""
    if word_mask is not None:
        scores = scores.masked_fill(~word_mask, -math.inf)
    values, indices = torch.sort(scores, dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k], scores.logsumexp(1)
