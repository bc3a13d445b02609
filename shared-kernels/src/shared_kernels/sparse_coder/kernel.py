"""Triton kernels of the sparse coder, and the matrix products between them. No validation: op.py has done it."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import LAUNCH_OPTIONS, AotCase, on_device_of
from ..csr_gather_sum import kernel as csr
from .eager import is_gathered, most_gathered, scattered


class RowConfig(NamedTuple):
    """One program per row, BLOCK numbers at a time, for rows of at most `columns`."""

    columns: int
    BLOCK: int
    num_warps: int


class Tile(NamedTuple):
    """A tile of BLOCK_E entries times BLOCK_D columns, for tables of at most `columns` columns."""

    columns: int
    BLOCK_E: int
    BLOCK_D: int
    num_warps: int


SELECT_CONFIGS = (RowConfig(1024, BLOCK=1024, num_warps=4), RowConfig(2**62, BLOCK=4096, num_warps=16))
STANDARDIZE_CONFIGS = (RowConfig(1024, BLOCK=1024, num_warps=4), RowConfig(2**62, BLOCK=4096, num_warps=8))
TILES = (
    Tile(64, BLOCK_E=32, BLOCK_D=64, num_warps=2),
    Tile(512, BLOCK_E=32, BLOCK_D=128, num_warps=4),
    Tile(2**62, BLOCK_E=16, BLOCK_D=512, num_warps=8),
)
MERGE_BLOCK, MERGE_WARPS = 512, 4

_BUSY_PROGRAMS = 256
"""With fewer programs than this, the entries of a row are split among several."""

_CHUNK_LOGITS = 1 << 26
"""Pre-activations that exist at a time."""


def pick(configs, columns: int):
    """The row of a table of configurations for so many columns."""
    return next(config for config in configs if columns <= config.columns)


class Epilogue(NamedTuple):
    """What happens to a sum of rows: (sum + bias) * scale + shift."""

    scale: Tensor | None  # [N]
    shift: Tensor | None  # [N]
    bias: Tensor | None  # [d]

    def contiguous(self) -> "Epilogue":
        return Epilogue(*(None if each is None else each.contiguous() for each in self))


@triton.jit
def _ordered_key(x):
    """A uint32 that is ordered like x: equal for the two zeros, largest for NaN, never 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits | (-2147483648))
    return tl.where(x != x, -1, bits).to(tl.uint32, bitcast=True)


@triton.jit
def topk_select_fwd_kernel(
    pre_ptr,  # [N, n]
    values_ptr,  # [N, always + k]
    indices_ptr,  # [N, always + k] int32
    n,
    k,
    always,
    BLOCK: tl.constexpr,
):
    """One program owns one row. It finds the k-th largest key two bits at a time, by counting, and writes in order."""
    r = tl.program_id(0).to(tl.int64)
    pre_row = pre_ptr + r * n
    values_row = values_ptr + r * (always + k)
    indices_row = indices_ptr + r * (always + k)
    lanes = tl.arange(0, BLOCK)

    for first in range(0, always, BLOCK):
        columns = first + lanes
        inside = columns < always
        tl.store(values_row + columns, tl.load(pre_row + columns, mask=inside), mask=inside)
        tl.store(indices_row + columns, columns, mask=inside)

    kth = tl.full([], 0, tl.uint32)  # the largest key, so far to its leading bits, that k numbers reach
    for step in range(16):
        unit = tl.full([], 1, tl.uint32) << (30 - 2 * step)
        one, two, three = kth + unit, kth + 2 * unit, kth + 3 * unit
        reach_one = tl.zeros([BLOCK], tl.int32)
        reach_two = tl.zeros([BLOCK], tl.int32)
        reach_three = tl.zeros([BLOCK], tl.int32)
        for first in range(always, n, BLOCK):
            columns = first + lanes
            inside = columns < n
            key = _ordered_key(tl.load(pre_row + columns, mask=inside, other=0.0).to(tl.float32))
            reach_one += (inside & (key >= one)).to(tl.int32)
            reach_two += (inside & (key >= two)).to(tl.int32)
            reach_three += (inside & (key >= three)).to(tl.int32)
        steps = (tl.sum(reach_one) >= k).to(tl.uint32)
        steps += (tl.sum(reach_two) >= k).to(tl.uint32)
        steps += (tl.sum(reach_three) >= k).to(tl.uint32)
        kth += steps * unit

    larger = tl.zeros([BLOCK], tl.int32)
    for first in range(always, n, BLOCK):
        columns = first + lanes
        inside = columns < n
        key = _ordered_key(tl.load(pre_row + columns, mask=inside, other=0.0).to(tl.float32))
        larger += (inside & (key > kth)).to(tl.int32)
    ties_wanted = k - tl.sum(larger)

    ties = 0
    written = always
    for first in range(always, n, BLOCK):
        columns = first + lanes
        inside = columns < n
        value = tl.load(pre_row + columns, mask=inside, other=0.0)
        key = _ordered_key(value.to(tl.float32))
        is_tie = (inside & (key == kth)).to(tl.int32)
        is_kept = inside & ((key > kth) | ((is_tie > 0) & (ties + tl.cumsum(is_tie, 0) <= ties_wanted)))
        place = written + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        tl.store(values_row + place, value, mask=is_kept)
        tl.store(indices_row + place, columns, mask=is_kept)
        ties += tl.sum(is_tie)
        written += tl.sum(is_kept.to(tl.int32))


@triton.jit
def sparse_coder_standardize_fwd_kernel(
    x_ptr,  # [N, d]
    z_ptr,  # [N, d] float32
    mean_ptr,  # [N] float32
    std_ptr,  # [N] float32
    d,
    eps,
    BLOCK: tl.constexpr,
):
    """One program owns one row: its mean, its deviation from it, the standardized row."""
    r = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        columns = first + lanes
        total += tl.load(x_ptr + r * d + columns, mask=columns < d, other=0.0).to(tl.float32)
    mean = tl.sum(total) / d

    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        columns = first + lanes
        x = tl.load(x_ptr + r * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        centered = tl.where(columns < d, x - mean, 0.0)
        squares += centered * centered
    std = tl.sqrt(tl.sum(squares) / tl.maximum(d - 1, 1))
    tl.store(mean_ptr + r, mean)
    tl.store(std_ptr + r, std)

    for first in range(0, d, BLOCK):
        columns = first + lanes
        x = tl.load(x_ptr + r * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(z_ptr + r * d + columns, (x - mean) / (std + eps), mask=columns < d)


@triton.jit
def _finish(total, r, columns, d, scale_ptr, shift_ptr, bias_ptr):
    """(total + bias) * scale + shift for some columns of row r."""
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + r).to(tl.float32)
    if shift_ptr is not None:
        total += tl.load(shift_ptr + r).to(tl.float32)
    return total


@triton.jit
def topk_sparse_decode_fwd_kernel(
    indices_ptr,  # [N, K]
    values_ptr,  # [N, K]
    rows_ptr,  # [n, d]
    scale_ptr,  # [N] or None
    shift_ptr,  # [N] or None
    bias_ptr,  # [d] or None
    out_ptr,  # [N, d]; with several splits [splits, N, d] float32, to be merged
    K,
    d,
    entries_per_split,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """One program owns BLOCK_D columns of one output row and walks one split of its entries, BLOCK_E at a time.

    Rows are the fast axis of the grid, so all rows of one column slice run before the next: the slice stays in L2.
    """
    r = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2).to(tl.int64)
    inside = columns < d
    start = tl.program_id(2) * entries_per_split
    stop = tl.minimum(start + entries_per_split, K)

    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_E):
        entries = first + tl.arange(0, BLOCK_E)
        live = entries < stop
        latents = tl.load(indices_ptr + r * K + entries, mask=live, other=0).to(tl.int64)
        weights = tl.load(values_ptr + r * K + entries, mask=live, other=0.0).to(tl.float32)
        places = latents[:, None] * d + columns[None, :]  # [BLOCK_E, BLOCK_D]
        rows = tl.load(rows_ptr + places, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weights[:, None] * rows, axis=0)

    if not IS_SPLIT:
        total = _finish(total, r, columns, d, scale_ptr, shift_ptr, bias_ptr)
    out_row = out_ptr + (split * tl.num_programs(0) + r) * d
    tl.store(out_row + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def topk_sparse_decode_merge_kernel(
    parts_ptr,  # [splits, N, d] float32
    scale_ptr,  # [N] or None
    shift_ptr,  # [N] or None
    bias_ptr,  # [d] or None
    out_ptr,  # [N, d]
    splits,
    d,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK columns of one output row and adds their parts up."""
    r = tl.program_id(0).to(tl.int64)
    N = tl.num_programs(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + (split * N + r) * d + columns, mask=inside, other=0.0)
    total = _finish(total, r, columns, d, scale_ptr, shift_ptr, bias_ptr)
    tl.store(out_ptr + r * d + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sparse_coder_products_bwd_kernel(
    indices_ptr,  # [N, K]
    grad_ptr,  # [N, d]
    rows_ptr,  # [n, d]
    out_ptr,  # [N, K] float32
    K,
    d,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_E entries of one row: the products of their table rows with the row's gradient."""
    r = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    live = entries < K
    latents = tl.load(indices_ptr + r * K + entries, mask=live, other=0).to(tl.int64)
    products = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = columns < d
        grad = tl.load(grad_ptr + r * d + columns, mask=inside, other=0.0).to(tl.float32)
        places = latents[:, None] * d + columns[None, :]
        rows = tl.load(rows_ptr + places, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products += tl.sum(rows * grad[None, :], axis=1)
    tl.store(out_ptr + r * K + entries, products, mask=live)


def select(pre: Tensor, k: int, always: int) -> tuple[Tensor, Tensor]:
    """Values and int32 indices `[N, always + k]`; at least k numbers follow the first `always`."""
    N, n = pre.shape
    values = pre.new_empty(N, always + k)
    indices = torch.empty(N, always + k, dtype=torch.int32, device=pre.device)
    if values.numel():
        config = pick(SELECT_CONFIGS, n)
        with on_device_of(pre):
            topk_select_fwd_kernel[(N,)](
                pre, values, indices, n, k, always, BLOCK=config.BLOCK, num_warps=config.num_warps, **LAUNCH_OPTIONS
            )
    return values, indices


def standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Standardized rows `[N, d]`, their means and their standard deviations `[N]`, in float32."""
    N, d = x.shape
    z = torch.empty(N, d, dtype=torch.float32, device=x.device)
    mean, std = z.new_empty(N), z.new_empty(N)
    if z.numel():
        config = pick(STANDARDIZE_CONFIGS, d)
        with on_device_of(x):
            sparse_coder_standardize_fwd_kernel[(N,)](
                x, z, mean, std, d, eps, BLOCK=config.BLOCK, num_warps=config.num_warps, **LAUNCH_OPTIONS
            )
    return z, mean, std


def encode(
    z: Tensor, encoder: Tensor, latent_bias: Tensor, pre_bias: Tensor, k: int, always: int
) -> tuple[Tensor, Tensor]:
    """Selected pre-activations, float32, and their indices, a chunk of rows at a time."""
    inputs = z - pre_bias.float()
    chunks = inputs.split(max(1, _CHUNK_LOGITS // encoder.shape[0]))
    with torch.autocast(z.device.type, enabled=False):
        parts = [select(_product(chunk, encoder.T).add_(latent_bias), k, always) for chunk in chunks]
    values, indices = (torch.cat(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True))
    return values, indices


def decode(indices: Tensor, values: Tensor, rows: Tensor, epilogue: Epilogue) -> Tensor:
    """`[N, d]` in the dtype of `rows`: sums of table rows, gathered or multiplied, after the epilogue."""
    (N, K), d = indices.shape, rows.shape[1]
    epilogue = epilogue.contiguous()
    if is_gathered("sum", N, K, rows):
        return _decode_gathered(indices.contiguous(), values.contiguous(), rows.contiguous(), epilogue)
    with torch.autocast(rows.device.type, enabled=False):
        total = _product(scattered(indices, values, rows.shape[0]), rows)
    return _merge(total.view(1, N, d), epilogue, rows.new_empty(N, d))


def row_products(indices: Tensor, grad: Tensor, rows: Tensor) -> Tensor:
    """`[N, K]` float32: products of grad_i with rows[indices_ij]."""
    (N, K), d = indices.shape, rows.shape[1]
    if not is_gathered("product", N, K, rows):
        with torch.autocast(rows.device.type, enabled=False):
            return _product(grad, rows.T).gather(1, indices.long())
    out = torch.empty(N, K, dtype=torch.float32, device=rows.device)
    if out.numel():
        tile = pick(TILES, d)
        with on_device_of(rows):
            sparse_coder_products_bwd_kernel[(N, triton.cdiv(K, tile.BLOCK_E))](
                indices.contiguous(),
                grad.contiguous(),
                rows.contiguous(),
                out,
                K,
                d,
                BLOCK_E=tile.BLOCK_E,
                BLOCK_D=tile.BLOCK_D,
                num_warps=tile.num_warps,
                **LAUNCH_OPTIONS,
            )
    return out


def column_sums(indices: Tensor, values: Tensor, source: Tensor, n: int) -> Tensor:
    """`[n, d]` float32: row c sums values_ij * source_i over the entries with indices_ij = c, in the order of i."""
    N, K = indices.shape
    if most_gathered("columns", N, n, source.device) < K:
        with torch.autocast(source.device.type, enabled=False):
            return _product(scattered(indices, values.to(source.dtype), n).T, source)
    bounds, order = csr.transpose(indices.reshape(-1), n)
    out = torch.empty(n, source.shape[1], dtype=torch.float32, device=source.device)
    return csr.gather_sum(bounds, order // max(K, 1), values.reshape(-1)[order], source.contiguous(), out)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product in float32; `a` takes the dtype of `b`."""
    if b.dtype == torch.float32 or not b.is_cuda or torch.version.hip is not None:
        return torch.mm(a.float(), b.float())
    return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)


def _decode_gathered(indices: Tensor, values: Tensor, rows: Tensor, epilogue: Epilogue) -> Tensor:
    (N, K), d = indices.shape, rows.shape[1]
    out = rows.new_empty(N, d)
    if out.numel() == 0:
        return out
    tile = pick(TILES, d)
    slices = triton.cdiv(d, tile.BLOCK_D)
    splits = min(triton.cdiv(_BUSY_PROGRAMS, N * slices), triton.cdiv(max(K, 1), 2 * tile.BLOCK_E))
    entries_per_split = triton.cdiv(K, splits)
    is_split = splits > 1
    target = torch.empty(splits, N, d, dtype=torch.float32, device=rows.device) if is_split else out
    with on_device_of(rows):
        topk_sparse_decode_fwd_kernel[(N, slices, splits)](
            indices,
            values,
            rows,
            *(Epilogue(None, None, None) if is_split else epilogue),
            target,
            K,
            d,
            entries_per_split,
            BLOCK_E=tile.BLOCK_E,
            BLOCK_D=tile.BLOCK_D,
            IS_SPLIT=is_split,
            num_warps=tile.num_warps,
            **LAUNCH_OPTIONS,
        )
    return _merge(target, epilogue, out) if is_split else out


def _merge(parts: Tensor, epilogue: Epilogue, out: Tensor) -> Tensor:
    """Add the parts `[splits, N, d]` up, and finish."""
    if out.numel():
        (splits, N, d) = parts.shape
        with on_device_of(out):
            topk_sparse_decode_merge_kernel[(N, triton.cdiv(d, MERGE_BLOCK))](
                parts, *epilogue, out, splits, d, BLOCK=MERGE_BLOCK, num_warps=MERGE_WARPS, **LAUNCH_OPTIONS
            )
    return out


def _select_cases(kind: str) -> list[AotCase]:
    signature = {"pre_ptr": kind, "values_ptr": kind, "indices_ptr": "*i32", "n": "i32", "k": "i32", "always": "i32"}
    return [AotCase(topk_select_fwd_kernel, signature, {"BLOCK": c.BLOCK}, c.num_warps) for c in SELECT_CONFIGS]


def _standardize_cases(kind: str) -> list[AotCase]:
    signature = {"x_ptr": kind, "z_ptr": "*fp32", "mean_ptr": "*fp32", "std_ptr": "*fp32", "d": "i32", "eps": "fp32"}
    return [
        AotCase(sparse_coder_standardize_fwd_kernel, signature, {"BLOCK": c.BLOCK}, c.num_warps)
        for c in STANDARDIZE_CONFIGS
    ]


def _tile_cases(index: str, value: str, rows: str) -> list[AotCase]:
    """Decode without and with splits, and the products of the backward pass, in every tile."""
    cases = []
    entries = {"indices_ptr": index, "rows_ptr": rows, "K": "i32", "d": "i32"}
    epilogue = {"scale_ptr": "*fp32", "shift_ptr": "*fp32", "bias_ptr": rows}
    for tile in TILES:
        blocks = {"BLOCK_E": tile.BLOCK_E, "BLOCK_D": tile.BLOCK_D}
        sums = {**entries, "values_ptr": value, "entries_per_split": "i32"}
        whole = {**sums, **epilogue, "out_ptr": rows}
        nothing = dict.fromkeys(epilogue)
        cases += [
            AotCase(topk_sparse_decode_fwd_kernel, whole, {**blocks, "IS_SPLIT": False}, tile.num_warps),
            AotCase(
                topk_sparse_decode_fwd_kernel,
                {**sums, "out_ptr": "*fp32"},
                {**nothing, **blocks, "IS_SPLIT": True},
                tile.num_warps,
            ),
            AotCase(
                sparse_coder_products_bwd_kernel,
                {**entries, "grad_ptr": "*fp32", "out_ptr": "*fp32"},
                blocks,
                tile.num_warps,
            ),
        ]
    merge = {"parts_ptr": "*fp32", **epilogue, "out_ptr": rows, "splits": "i32", "d": "i32"}
    return [*cases, AotCase(topk_sparse_decode_merge_kernel, merge, {"BLOCK": MERGE_BLOCK}, MERGE_WARPS)]


AOT_CASES = (
    *_select_cases("*fp32"),
    *_select_cases("*bf16"),
    *_select_cases("*fp16"),
    *_standardize_cases("*fp32"),
    *_standardize_cases("*bf16"),
    *_standardize_cases("*fp16"),
    *_tile_cases("*i32", "*fp32", "*fp32"),
    *_tile_cases("*i32", "*fp32", "*bf16"),
    *_tile_cases("*i64", "*fp16", "*fp16"),
)
