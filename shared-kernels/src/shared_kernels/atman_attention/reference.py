"""What `atman_attention` and `atman_suffix_attention` mean. Slow and exact; the tests judge the others by this file."""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["shift_min", "log_additive", "multiply", "shift_min_all"]


def atman_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    *,
    mode: Mode = "shift_min",
    scale: float | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`[B, H, Tq, Dv]` float64, one row of one head at a time."""
    (B, H, Tq, D), (Hk, Tk) = query.shape, key.shape[1:3]
    shown = torch.ones(B, H, Tq, Tk, dtype=torch.bool) if visible is None else visible.expand(B, H, Tq, Tk)
    biases = torch.zeros(B, H, Tq, Tk) if bias is None else bias.expand(B, H, Tq, Tk)
    out = torch.zeros(B, H, Tq, value.shape[3], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(Tq)).tolist():
        group = h // (H // Hk)
        s = key[b, group].double() @ query[b, h, i].double() * (D**-0.5 if scale is None else scale)  # [Tk]
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        s = s + biases[b, h, i].double()
        position = Tk - Tq + i
        sees = [
            bool(shown[b, h, i, j])
            and not (is_causal and j > position)
            and not (window is not None and j <= position - window)
            for j in range(Tk)
        ]
        f = [1.0] * Tk if factors is None else factors[b].tolist()
        sink = -math.inf if sinks is None else float(sinks[h])
        weights = _weights(s.tolist(), f, sees, mode, sink)
        out[b, h, i] = torch.tensor(weights, dtype=torch.float64) @ value[b, group].double()
    return out


def atman_suffix_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    factors: Tensor | None,
    *,
    cu_seqlens: Tensor,
    prefix_start: Tensor,
    prefix_length: Tensor,
    **settings: object,
) -> Tensor:
    """`[S, H, Dv]` float64: the last rows of dense causal attention over each prefix and segment."""
    out = torch.zeros(*query.shape[:2], value.shape[2], dtype=torch.float64)
    for r, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        own, shared = slice(start, stop), slice(int(prefix_start[r]), int(prefix_start[r]) + int(prefix_length[r]))
        keys, values = torch.cat([prefix_key[shared], key[own]]), torch.cat([prefix_value[shared], value[own]])
        f = None if factors is None else torch.cat([torch.ones(shared.stop - shared.start), factors[own]])[None]
        rows, keys, values = (each.transpose(0, 1)[None] for each in (query[own], keys, values))
        dense = atman_attention_reference(rows, keys, values, f, is_causal=True, **settings)  # type: ignore[arg-type]
        out[own] = dense[0].transpose(0, 1)
    return out


def _weights(s: list[float], f: list[float], sees: list[bool], mode: Mode, sink: float) -> list[float]:
    """Softmax weights of one row's manipulated scores; zeros if it sees nothing."""
    seen = [j for j in range(len(s)) if sees[j]]
    if not seen:
        return [0.0] * len(s)
    if mode == "multiply":
        changed = [s[j] * f[j] for j in seen]
    elif mode == "log_additive":
        is_emptied = all(f[j] == 0 for j in seen)
        changed = [s[j] if is_emptied else s[j] + math.log(f[j]) if f[j] > 0 else -math.inf for j in seen]
    else:
        m = min(s) if mode == "shift_min_all" else min(s[j] for j in seen)
        changed = [m + (s[j] - m) * f[j] for j in seen]
    largest = max(*changed, sink)
    exponentials = [math.exp(each - largest) for each in changed]
    total = sum(exponentials) + math.exp(sink - largest)
    weights = [0.0] * len(s)
    for j, each in zip(seen, exponentials, strict=True):
        weights[j] = each / total
    return weights
