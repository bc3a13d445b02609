"""Triton kernels of `decode_scores` and `decode_topk`. No validation: op.py has done it.

Row values `x` are probabilities, or logits less log(pos_weight); op.py forms them, so all gradients end at `x`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, on_device_of

MODES = {"mean": 0, "contrast": 1, "loglik": 2}
LARGEST_BLOCK_K = 64
"""Most words that one block hands on; `decode_topk` sorts all scores if more are wanted."""

TOPK_WORDS = 1024
TOPK_WARPS = 8

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_CONTRAST = tl.constexpr(MODES["contrast"])
_LOGLIK = tl.constexpr(MODES["loglik"])
_NO_WORD = tl.constexpr(2**31 - 1)


class Config(NamedTuple):
    """A tile of BLOCK_W words (or units) times BLOCK_B rows, for batches of at most `batch` rows."""

    batch: int
    BLOCK_W: int
    BLOCK_B: int
    num_warps: int


CONFIGS = (
    Config(batch=1, BLOCK_W=128, BLOCK_B=1, num_warps=4),
    Config(batch=2**62, BLOCK_W=64, BLOCK_B=8, num_warps=4),
)


def pick(batch: int) -> Config:
    """The tile for a batch of that many rows."""
    return next(config for config in CONFIGS if batch <= config.batch)


class Dictionary(NamedTuple):
    """The candidate words, as `decode_scores` takes them, contiguous."""

    word_ptr: Tensor  # [W + 1]
    word_units: Tensor  # [nnz]
    word_edges: Tensor  # [W] uint8
    unit_rows: Tensor  # [U, m]
    correction_ptr: Tensor  # [W + 1]
    correction_rows: Tensor  # [nc]
    correction_kinds: Tensor  # [nc] uint8


class Rule(NamedTuple):
    """How row values become scores."""

    mode: str
    edge_weight: float
    temperature: float


@triton.jit
def decode_units_kernel(
    x_ptr,  # [V, B]
    unit_rows_ptr,  # [U, m]
    out_ptr,  # [U, B]
    U,
    B,
    m,
    BLOCK_U: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program sums the m rows of BLOCK_U units for BLOCK_B rows of the batch."""
    u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (u < U)[:, None] & (b < B)[None, :]
    total = tl.zeros([BLOCK_U, BLOCK_B], dtype=tl.float32)
    for i in range(m):
        rows = tl.load(unit_rows_ptr + u * m + i, mask=u < U, other=0).to(tl.int64)
        total += tl.load(x_ptr + rows[:, None] * B + b[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + u[:, None] * B + b[None, :], total, mask=inside)


@triton.jit
def _scores_of(
    w,  # [BLOCK_W] words
    b,  # [BLOCK_B] rows of the batch
    x_ptr,
    units_ptr,
    totals_ptr,
    word_ptr_ptr,
    word_units_ptr,
    word_edges_ptr,
    correction_ptr_ptr,
    correction_rows_ptr,
    correction_kinds_ptr,
    W,
    B,
    V,
    m,
    edge_weight,
    inverse_temperature,
    MODE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Scores `[BLOCK_W, BLOCK_B]`; those of words from W on are arbitrary."""
    in_batch = (b < B)[None, :]
    start = tl.load(word_ptr_ptr + w, mask=w < W, other=0).to(tl.int64)
    n = tl.load(word_ptr_ptr + w + 1, mask=w < W, other=0).to(tl.int64) - start
    border = n - tl.load(word_edges_ptr + w, mask=w < W, other=0).to(tl.int64)
    s = tl.zeros([BLOCK_W, BLOCK_B], dtype=tl.float32)
    for j in range(tl.max(n, axis=0)):
        live = j < n
        unit = tl.load(word_units_ptr + start + j, mask=live, other=0).to(tl.int64)
        value = tl.load(units_ptr + unit[:, None] * B + b[None, :], mask=live[:, None] & in_batch, other=0.0)
        if MODE != _LOGLIK:
            value *= tl.where(j < border, 1.0, edge_weight)[:, None]
        s += value

    start = tl.load(correction_ptr_ptr + w, mask=w < W, other=0).to(tl.int64)
    corrections = tl.load(correction_ptr_ptr + w + 1, mask=w < W, other=0).to(tl.int64) - start
    for j in range(tl.max(corrections, axis=0)):
        live = j < corrections
        row = tl.load(correction_rows_ptr + start + j, mask=live, other=0).to(tl.int64)
        value = tl.load(x_ptr + row[:, None] * B + b[None, :], mask=live[:, None] & in_batch, other=0.0)
        if MODE != _LOGLIK:
            kind = tl.load(correction_kinds_ptr + start + j, mask=live, other=0).to(tl.int32)
            value *= tl.where(kind == 0, 1.0, tl.where(kind == 1, edge_weight, 0.0))[:, None]
        s -= value

    if MODE != _LOGLIK:
        active = (n * m).to(tl.float32)
        mean = s / tl.maximum(active, 1.0)[:, None]
        if MODE == _CONTRAST:
            total = tl.load(totals_ptr + b, mask=b < B, other=0.0)
            idle = tl.maximum(V - active, 1.0)
            mean += (s - total[None, :]) / idle[:, None]
        s = mean
    return tl.where((n == 0)[:, None], _LOWEST, s * inverse_temperature)


@triton.jit
def decode_words_kernel(
    x_ptr,  # [V, B]
    units_ptr,  # [U, B]
    totals_ptr,  # [B]
    word_ptr_ptr,  # [W + 1]
    word_units_ptr,  # [nnz]
    word_edges_ptr,  # [W]
    correction_ptr_ptr,  # [W + 1]
    correction_rows_ptr,  # [nc]
    correction_kinds_ptr,  # [nc]
    out_ptr,  # [B, W]
    W,
    B,
    V,
    m,
    edge_weight,
    inverse_temperature,
    MODE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program scores BLOCK_W words for BLOCK_B rows of the batch."""
    w = tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    s = _scores_of(
        w,
        b,
        x_ptr,
        units_ptr,
        totals_ptr,
        word_ptr_ptr,
        word_units_ptr,
        word_edges_ptr,
        correction_ptr_ptr,
        correction_rows_ptr,
        correction_kinds_ptr,
        W,
        B,
        V,
        m,
        edge_weight,
        inverse_temperature,
        MODE,
        BLOCK_W,
        BLOCK_B,
    )
    tl.store(out_ptr + b[None, :] * W + w[:, None], s, mask=(w < W)[:, None] & (b < B)[None, :])


@triton.jit
def decode_topk_kernel(
    x_ptr,  # [V, B]
    units_ptr,  # [U, B]
    totals_ptr,  # [B]
    word_ptr_ptr,  # [W + 1]
    word_units_ptr,  # [nnz]
    word_edges_ptr,  # [W]
    correction_ptr_ptr,  # [W + 1]
    correction_rows_ptr,  # [nc]
    correction_kinds_ptr,  # [nc]
    word_mask_ptr,  # [W] uint8, or None
    values_ptr,  # [B, blocks, k]
    indices_ptr,  # [B, blocks, k] int32
    logsumexp_ptr,  # [B, blocks]
    W,
    B,
    V,
    m,
    k,
    edge_weight,
    inverse_temperature,
    MODE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program reduces BLOCK_W words of one row of the batch to their k best and their logsumexp.

    The best is taken k times, the lowest index among equals, so ties fall as in a stable sort.
    """
    block = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    w = block * BLOCK_W + tl.arange(0, BLOCK_W)
    scores = _scores_of(
        w,
        row + tl.arange(0, 1),
        x_ptr,
        units_ptr,
        totals_ptr,
        word_ptr_ptr,
        word_units_ptr,
        word_edges_ptr,
        correction_ptr_ptr,
        correction_rows_ptr,
        correction_kinds_ptr,
        W,
        B,
        V,
        m,
        edge_weight,
        inverse_temperature,
        MODE,
        BLOCK_W,
        1,
    )
    s = tl.where(w < W, tl.sum(scores, axis=1), float("-inf"))
    if word_mask_ptr is not None:
        allowed = tl.load(word_mask_ptr + w, mask=w < W, other=0)
        s = tl.where(allowed != 0, s, float("-inf"))

    largest = tl.max(s, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    place = row * tl.num_programs(0) + block
    total = tl.sum(tl.exp(s - shift), axis=0)  # at least 1, unless there is no word; NaN stays NaN
    tl.store(logsumexp_ptr + place, largest + tl.log(tl.where(total < 1.0, 1.0, total)))

    index = tl.where(w < W, w.to(tl.int32), _NO_WORD)
    s = tl.where(s != s, float("inf"), s)  # NaN first, as torch.sort has it
    for j in range(k):
        best = tl.max(s, axis=0)
        chosen = tl.min(tl.where(s == best, index, _NO_WORD), axis=0)
        tl.store(values_ptr + place * k + j, best)
        tl.store(indices_ptr + place * k + j, chosen)
        taken = index == chosen
        s = tl.where(taken, float("-inf"), s)
        index = tl.where(taken, _NO_WORD, index)


def scores(x: Tensor, words: Dictionary, rule: Rule, out: Tensor) -> Tensor:
    """Fill `out` `[B, W]` with the scores under row values `x` `[B, V]`."""
    B, W = out.shape
    if out.numel() == 0:
        return out
    config = pick(B)
    arguments, numbers = _arguments(x, words, rule)
    with on_device_of(x):
        decode_words_kernel[(triton.cdiv(W, config.BLOCK_W), triton.cdiv(B, config.BLOCK_B))](
            *arguments,
            out,
            W,
            *numbers,
            MODE=MODES[rule.mode],
            BLOCK_W=config.BLOCK_W,
            BLOCK_B=config.BLOCK_B,
            num_warps=config.num_warps,
            **LAUNCH_OPTIONS,
        )
    return out


def topk(x: Tensor, words: Dictionary, rule: Rule, word_mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best words of every row of `x` `[B, V]`: values, indices and logsumexp."""
    B, W = x.shape[0], words.word_edges.shape[0]
    blocks = triton.cdiv(W, TOPK_WORDS)
    values = torch.empty(B, blocks, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(B, blocks, k, dtype=torch.int32, device=x.device)
    logsumexp = torch.empty(B, blocks, dtype=torch.float32, device=x.device)
    if B:
        arguments, (batch, *numbers) = _arguments(x, words, rule)
        mask = None if word_mask is None else word_mask.contiguous().view(torch.uint8)
        with on_device_of(x):
            decode_topk_kernel[(blocks, B)](
                *arguments,
                mask,
                values,
                indices,
                logsumexp,
                W,
                batch,
                *numbers[:2],
                k,
                *numbers[2:],
                MODE=MODES[rule.mode],
                BLOCK_W=TOPK_WORDS,
                num_warps=TOPK_WARPS,
                **LAUNCH_OPTIONS,
            )
    best, order = values.view(B, blocks * k).sort(dim=1, descending=True, stable=True)
    chosen = indices.view(B, blocks * k).gather(1, order[:, :k])
    return best[:, :k].contiguous(), chosen.long(), logsumexp.logsumexp(1)


def _arguments(x: Tensor, words: Dictionary, rule: Rule) -> tuple[tuple[Tensor, ...], tuple[int | float, ...]]:
    """The leading pointers and the trailing numbers that the two word kernels share; sums the units on the way."""
    (B, V), (U, m) = x.shape, words.unit_rows.shape
    rows = x.T.contiguous()  # [V, B]
    units = torch.empty(U, B, dtype=torch.float32, device=x.device)
    config = pick(B)
    if units.numel():
        with on_device_of(x):
            decode_units_kernel[(triton.cdiv(U, config.BLOCK_W), triton.cdiv(B, config.BLOCK_B))](
                rows,
                words.unit_rows,
                units,
                U,
                B,
                m,
                BLOCK_U=config.BLOCK_W,
                BLOCK_B=config.BLOCK_B,
                num_warps=config.num_warps,
                **LAUNCH_OPTIONS,
            )
    lists = (words.word_ptr, words.word_units, words.word_edges)
    corrections = (words.correction_ptr, words.correction_rows, words.correction_kinds)
    return (rows, units, x.sum(1), *lists, *corrections), (B, V, m, rule.edge_weight, 1.0 / rule.temperature)


def _cases() -> tuple[AotCase, ...]:
    cases = []
    for index in ("i32", "i64"):
        units = {"x_ptr": "*fp32", "unit_rows_ptr": f"*{index}", "out_ptr": "*fp32", "U": "i32", "B": "i32", "m": "i32"}
        row_values = {"x_ptr": "*fp32", "units_ptr": "*fp32", "totals_ptr": "*fp32"}
        lists = dict.fromkeys(("word_ptr_ptr", "word_units_ptr"), f"*{index}")
        lists |= dict.fromkeys(("correction_ptr_ptr", "correction_rows_ptr"), f"*{index}")
        lists |= {"word_edges_ptr": "*u8", "correction_kinds_ptr": "*u8"}
        numbers = dict.fromkeys(("W", "B", "V", "m"), "i32")
        numbers |= {"edge_weight": "fp32", "inverse_temperature": "fp32"}
        for config in CONFIGS:
            tile = {"BLOCK_U": config.BLOCK_W, "BLOCK_B": config.BLOCK_B}
            cases.append(AotCase(decode_units_kernel, units, tile, config.num_warps))
            for mode in MODES.values():
                tile = {"MODE": mode, "BLOCK_W": config.BLOCK_W, "BLOCK_B": config.BLOCK_B}
                signature = {**row_values, **lists, "out_ptr": "*fp32", **numbers}
                cases.append(AotCase(decode_words_kernel, signature, tile, config.num_warps))
        outputs = {"values_ptr": "*fp32", "indices_ptr": "*i32", "logsumexp_ptr": "*fp32", "k": "i32"}
        for mode in MODES.values():
            tile = {"MODE": mode, "BLOCK_W": TOPK_WORDS}
            masked = {**row_values, **lists, "word_mask_ptr": "*u8", **outputs, **numbers}
            cases.append(AotCase(decode_topk_kernel, masked, tile, TOPK_WARPS))
        unmasked = {**row_values, **lists, **outputs, **numbers}
        cases.append(AotCase(decode_topk_kernel, unmasked, {**tile, "word_mask_ptr": None}, TOPK_WARPS))
    return tuple(cases)


AOT_CASES = _cases()
