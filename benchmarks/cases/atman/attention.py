"""The attention operator alone: packed suffixes behind a shared prefix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from atman_explain.remote.kernels_atman import atman_suffix_attention
from benchmarks.cases.atman.inputs import FACTOR
from benchmarks.cases.tfree.inputs import default_dtype, random_tensor
from benchmarks.harness import Case, Options, register

SHAPES = {"cpu": (256, 8, 4, 32, 1024), "cuda": (1024, 32, 8, 128, 16384)}  # T, H, Hk, D, tokens of a pass
QUICK = (12, 4, 2, 8, 40)
RTOL = {"float32": 1e-5, "bfloat16": 2e-2}
MODES: tuple[Literal["shift_min", "log_additive", "multiply"], ...] = ("shift_min", "log_additive", "multiply")


def suffix_inputs(options: Options, dtype: str, D: int | None = None) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments of a pass over the longest suffixes of a prompt, as many as it holds."""
    T, H, Hk, usual_D, tokens = QUICK if options.quick else SHAPES[options.device]
    D = D or usual_D
    starts, rows = [], 0
    for start in range(T):
        if rows + T - start <= tokens:
            starts.append(start)
            rows += T - start
    lengths = torch.tensor([T - start for start in starts])
    ends = F.pad(lengths.cumsum(0), (1, 0))
    factors = torch.ones(rows)
    factors[ends[:-1]] = FACTOR
    shapes = ((rows, H, D), (rows, Hk, D), (rows, Hk, D), (T, Hk, D), (T, Hk, D))
    tensors = [random_tensor(*shape, dtype=dtype, device=options.device, seed=n) for n, shape in enumerate(shapes)]
    layout = {
        "cu_seqlens": ends.int(),
        "prefix_start": torch.zeros(len(starts), dtype=torch.int32),
        "prefix_length": torch.tensor(starts, dtype=torch.int32),
    }
    return (*tensors, factors.to(options.device)), {n: each.to(options.device) for n, each in layout.items()}


def dense_inputs(options: Options, dtype: str, D: int | None = None) -> tuple[Tensor, ...]:
    """Two rows of a batch of as many heads: query, key, value and factors, a random one suppressed in four keys."""
    T, H, Hk, usual_D, _ = QUICK if options.quick else SHAPES[options.device]
    D = D or usual_D
    shapes = ((2, H, T, D), (2, Hk, T, D), (2, Hk, T, D))
    tensors = [random_tensor(*shape, dtype=dtype, device=options.device, seed=n) for n, shape in enumerate(shapes)]
    is_suppressed = torch.rand(2, T, generator=torch.Generator().manual_seed(0)) < 0.25
    return (*tensors, torch.where(is_suppressed, FACTOR, 1.0).to(options.device))


def _register(mode: Literal["shift_min", "log_additive", "multiply"]) -> None:
    name = f"atman.suffix_attention.{mode}"

    @register(name)
    def build(options: Options) -> Case:
        dtype = default_dtype(options)
        tensors, layout = suffix_inputs(options, dtype)
        (S, H, D), T, R = tensors[0].shape, tensors[3].shape[0], layout["prefix_length"].numel()
        rows = layout["cu_seqlens"].diff().double()
        keys = float((rows * layout["prefix_length"] + rows * (rows + 1) / 2).sum())
        return Case(
            name=name,
            ours=lambda: atman_suffix_attention(*tensors, **layout, mode=mode),
            peers={"segment by segment, every score": lambda: _by_definition(tensors, layout, mode)},
            others={"SDPA, segment by segment, no factors": lambda: _plain(tensors, layout)},
            rtol=RTOL[dtype],
            flops=4.0 * keys * H * D,
            bytes=float(sum(each.numel() * each.element_size() for each in (*tensors[:5], tensors[0]))),
            size={"S": S, "R": R, "T": T, "H": H, "D": D},
            dtype=dtype,
            memory=options.device == "cuda",
        )


def _segments(tensors: tuple[Tensor, ...], layout: dict[str, Tensor]) -> Any:
    """Queries, keys, values and factors of every segment, with its prefix: [heads, rows, D] and [keys]."""
    query, key, value, prefix_key, prefix_value, factors = tensors
    lengths = layout["prefix_length"].tolist()
    for (start, stop), length in zip(pairwise(layout["cu_seqlens"].tolist()), lengths, strict=True):
        keys = torch.cat([prefix_key[:length], key[start:stop]])
        values = torch.cat([prefix_value[:length], value[start:stop]])
        heads = (query[start:stop].transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1))
        yield *heads, F.pad(factors[start:stop], (length, 0), value=1.0)


def _by_definition(tensors: tuple[Tensor, ...], layout: dict[str, Tensor], mode: str) -> Tensor:
    parts = []
    for q, k, v, f in _segments(tensors, layout):
        groups, (n, T) = q.shape[0] // k.shape[0], (q.shape[1], k.shape[1])
        visible = torch.ones(n, T, dtype=torch.bool, device=q.device).tril(T - n)
        scores = (q @ k.repeat_interleave(groups, 0).mT).float() * q.shape[-1] ** -0.5
        if mode == "shift_min":
            lowest = scores.masked_fill(~visible, torch.inf).amin(-1, keepdim=True)
            scores = lowest + (scores - lowest) * f
        else:
            scores = scores * f if mode == "multiply" else scores + f.log()
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype)
        parts.append((weights @ v.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(parts)


def _plain(tensors: tuple[Tensor, ...], layout: dict[str, Tensor]) -> Tensor:
    parts = []
    for q, k, v, _ in _segments(tensors, layout):
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        parts.append(F.scaled_dot_product_attention(q[None], k[None], v[None], visible, enable_gqa=True)[0])
    return torch.cat([part.transpose(0, 1) for part in parts])


for _mode in MODES:
    _register(_mode)
