"""A sparse coder in PyTorch: encode and select, decode, and their gradients, without a dense matrix of latents.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GPU_SHARES = ((1, 0.8), (2, 0.4), (4, 0.2), (8, 0.1), (16, 0.05), (2**62, 0.005))
_GATHER_SHARES = {
    ("cpu", "sum"): ((4, 0.4), (64, 0.16), (2**62, 0.25)),
    ("cpu", "product"): ((4, 0.4), (16, 0.2), (2**62, 0.12)),
    ("cpu", "columns"): ((32, 0.02), (128, 0.1), (2**62, 0.25)),
    **{("cuda", work): _GPU_SHARES for work in ("sum", "product", "columns")},
}
"""Per device kind and work: up to so many rows, the largest share of latents that is gathered; denser is multiplied.
Measured on an AMD EPYC; those of GPUs are inferred from their bandwidth and speed in bfloat16."""

_TRANSPOSED_TABLE_ROWS = 64
"""From so many rows on, a table that lies in memory column by column is worth turning around to be gathered from."""

_SLICE_COLUMNS = 32
"""A table is gathered from in slices of so many columns, if each entry of it is used often: a slice stays in cache."""

_CACHED_ELEMENTS = 1 << 21
"""So many numbers stay in a cache that is shared: products with large tables are formed in such pieces."""

_CHUNK_ROWS, _CHUNK_ELEMENTS = 256, 1 << 23
"""Rows that are selected from at a time, and pre-activations that are formed at a time, for as many rows at least."""

_SAMPLE_STRIDE = 8
_LEAST_SAMPLED = 512
"""A row at least this long is thinned by a bound on its k-th largest number, which every eighth number provides."""


def topk_select_eager(pre: Tensor, k: int, *, always: int = 0) -> tuple[Tensor, Tensor]:
    """Take the first `always` numbers of every row and the k largest of the others.

    Args:
        pre: `[N, n]`, floating point. NaN counts as larger than any number.
        k: how many; all if there are fewer.
        always: how many come first unconditionally.

    Returns:
        Values and int32 indices, `[N, always + min(k, n - always)]`, in the order of the indices. The lower index wins
        a tie.
    """
    n = pre.shape[1]
    with torch.no_grad():
        indices = _select(pre.detach(), min(k, n - always), always)
    return pre.gather(1, indices.long()), indices


def topk_sparse_decode_eager(
    indices: Tensor,
    values: Tensor,
    rows: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum a few scaled rows of a table for every output row: `(sum_j values_j rows[indices_j] + bias) * scale + shift`.

    Args:
        indices: `[N, K]`, int32 or int64, each in `[0, n)`, distinct within a row.
        values: `[N, K]`, floating point.
        rows: `[n, d]`, floating point. Fastest if a row is contiguous.
        scale: `[N]`.
        shift: `[N]`.
        bias: `[d]`.

    Returns:
        `[N, d]` in the dtype of `rows`. Sums are formed in float32, or in float64 if `values` or `rows` is.
    """
    sums = sum_dtype(torch.promote_types(values.dtype, rows.dtype))
    with torch.autocast(rows.device.type, enabled=False):
        out: Tensor = _Decode.apply(indices.to(torch.int32), values.to(sums), rows.to(sums))
    if bias is not None:
        out = out + bias.to(sums)
    if scale is not None and shift is not None:
        out = torch.addcmul(shift.to(sums)[:, None], out, scale.to(sums)[:, None])
    elif scale is not None:
        out = out * scale.to(sums)[:, None]
    elif shift is not None:
        out = out + shift.to(sums)[:, None]
    return out.to(rows.dtype)


def sae_encode_topk_eager(
    x: Tensor,
    encoder: Tensor,
    latent_bias: Tensor,
    pre_bias: Tensor,
    k: int,
    *,
    always: int = 0,
    eps: float = 1e-5,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre-activations `encoder @ (z - pre_bias) + latent_bias` of the standardized rows z, and of these a selection.

    Args:
        x: `[N, d]`, floating point.
        encoder: `[n, d]`.
        latent_bias: `[n]`.
        pre_bias: `[d]`.
        k: how many of the latents after the first `always` are kept; all if there are fewer.
        always: how many latents are kept without counting to k.
        eps: added to the standard deviation.
        normalize: False takes z = x, mean 0 and standard deviation 1.

    Returns:
        Pre-activations and int32 indices `[N, always + min(k, n - always)]` as of `topk_select_eager`, mean `[N]` and
        unbiased standard deviation `[N]`; all but the indices in float32, or float64 if `x` or `encoder` is.
    """
    sums = sum_dtype(torch.promote_types(x.dtype, encoder.dtype))
    with torch.autocast(x.device.type, enabled=False):
        z, mean, std = standardize(x.to(sums), eps, normalize)
        weights = (each.to(sums) for each in (encoder, latent_bias, pre_bias))
        values, indices = _Encode.apply(z, *weights, min(k, encoder.shape[0] - always), always)
    return values, indices, mean, std


def standardize(x: Tensor, eps: float, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with mean 0 and standard deviation 1, and what these were; a constant row becomes zero."""
    N, d = x.shape
    if not normalize:
        return x, x.new_zeros(N), x.new_ones(N)
    mean = x.mean(1)
    centered = x - mean[:, None]
    # the gradient of a norm at zero is zero, that of a square root is not
    std = torch.linalg.vector_norm(centered, dim=1) / max(d - 1, 1) ** 0.5
    return centered / (std[:, None] + eps), mean, std


def is_gathered(work: str, N: int, K: int, rows: Tensor) -> bool:
    """Whether K of the rows of a table are gathered for each of N rows; else all of them enter a matrix product.

    `work` is "sum" for sums of table rows, "product" for products with them, and "columns" for sums by table row.
    """
    if rows.stride(1) != 1 and rows.shape[1] > 1 and N < _TRANSPOSED_TABLE_ROWS:
        return False
    return most_gathered(work, N, rows.shape[0], rows.device) >= K


def most_gathered(work: str, N: int, n: int, device: torch.device) -> float:
    """The crossing of the two plans: the most entries per row for which n table rows are gathered from."""
    shares = _GATHER_SHARES["cpu" if device.type == "cpu" else "cuda", work]
    return n * next(share for rows, share in shares if rows >= N)


def scattered(indices: Tensor, values: Tensor, n: int) -> Tensor:
    """The dense matrix `[N, n]`."""
    return values.new_zeros(indices.shape[0], n).scatter_(1, indices.long(), values)


class _Decode(torch.autograd.Function):
    """Sums of scaled rows."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values, rows)
        return _weighted_rows(indices, values, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, values, rows = ctx.saved_tensors
        grad = grad.contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            grad_values = _row_products(indices, grad, rows) if ctx.needs_input_grad[1] else None
            grad_rows = _column_sums(indices, values, grad, rows.shape[0]) if ctx.needs_input_grad[2] else None
        return None, grad_values, grad_rows


class _Encode(torch.autograd.Function):
    """Selected pre-activations of rows that are standardized already."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, encoder: Tensor, latent_bias: Tensor, pre_bias: Tensor, k: int, always: int
    ) -> tuple[Tensor, Tensor]:
        inputs = z - pre_bias
        chunk = max(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(1, encoder.shape[0]))
        parts = [_encode_chunk(part, encoder, latent_bias, k, always) for part in inputs.split(chunk)]
        values, indices = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(indices, inputs, encoder)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        indices, inputs, encoder = ctx.saved_tensors
        needs_z, needs_encoder, *needs_bias = ctx.needs_input_grad[:4]
        n = encoder.shape[0]
        grad = grad.contiguous()
        grad_z = grad_encoder = grad_bias = grad_pre_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if needs_z:
                grad_z = _weighted_rows(indices, grad, encoder)
            if needs_encoder:
                grad_encoder = _column_sums(indices, grad, inputs, n)
            if any(needs_bias):
                # in float64: a sum over a whole batch
                grad_bias = torch.bincount(indices.flatten(), grad.flatten().double(), minlength=n).to(grad.dtype)
                grad_pre_bias = -(grad_bias @ encoder) if needs_bias[1] else None
        return grad_z, grad_encoder, grad_bias, grad_pre_bias, None, None


def _encode_chunk(inputs: Tensor, encoder: Tensor, bias: Tensor, k: int, always: int) -> tuple[Tensor, Tensor]:
    n, d = encoder.shape
    # a sixth to a third quicker than at once; a single row uses each latent once
    is_cut = inputs.shape[0] > 1 and not torch.compiler.is_compiling()
    latents = max(1, _CACHED_ELEMENTS // max(1, d)) if is_cut else n
    pieces = zip(bias.split(latents), encoder.split(latents), strict=True)
    parts = [torch.addmm(b, inputs, rows.T) for b, rows in pieces]
    pre = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    indices = _select(pre, k, always)
    return pre.gather(1, indices.long()), indices


def _select(pre: Tensor, k: int, always: int) -> Tensor:
    """`[N, always + k]` int32, in the order of the indices."""
    N = pre.shape[0]
    first = torch.arange(always, dtype=torch.int32, device=pre.device).expand(N, always)
    if k == 0 or N == 0:
        return torch.cat([first, first.new_zeros(N, k)], 1)
    if torch.compiler.is_compiling() or pre.device.type != "cpu":
        rest = _largest_by_sort(pre[:, always:], k)
    else:
        rest = torch.cat([_largest(part.contiguous(), k) for part in pre[:, always:].split(_CHUNK_ROWS)])
    return torch.cat([first, rest + always], 1) if always else rest


def _largest_by_sort(pre: Tensor, k: int) -> Tensor:
    order = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return order.sort(1).values.to(torch.int32)


def _largest(pre: Tensor, k: int) -> Tensor:
    """Indices of the numbers that are not below the k-th largest of their row; where that is not k, by sorting."""
    N, n = pre.shape
    candidates, places = _thin_out(pre, k) if n >= _LEAST_SAMPLED and 4 * k <= n else (pre, None)
    W = candidates.shape[1]
    least = candidates.topk(k, sorted=False).values.amin(1, keepdim=True)
    kept = torch.lt(candidates, least).logical_not_().view(-1).nonzero().squeeze(1)
    is_odd = torch.searchsorted(kept, torch.arange(0, N * W + 1, W)).diff() != k  # ties, NaN, too high a bound
    if is_odd.any():
        indices = torch.empty(N, k, dtype=torch.int32)
        indices[is_odd] = _largest_by_sort(pre[is_odd], k)
        if not is_odd.all():
            indices[~is_odd] = _largest(pre[~is_odd], k)
        return indices
    flat = kept if places is None else places.view(-1).index_select(0, kept)
    return (flat.view(N, k) - torch.arange(0, N * n, n)[:, None]).to(torch.int32)


def _thin_out(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The numbers that a sample puts among the k largest, and then some: values and flat places `[N, W]`, W > k.

    A row that has fewer is filled up with minus infinity.
    """
    N, n = pre.shape
    sample = pre[:, ::_SAMPLE_STRIDE]
    m, share = sample.shape[1], k / n
    spread = 4.0 * math.sqrt(m * share * (1.0 - share))  # four standard deviations: one row in thirty thousand
    rank = min(m, int(m * share + spread) + 2)
    bound = sample.topk(rank, sorted=False).values.amin(1, keepdim=True)
    flat = torch.lt(pre, bound).logical_not_().view(-1).nonzero().squeeze(1).to(torch.int32)
    bounds = torch.searchsorted(flat, torch.arange(0, N * n + 1, n, dtype=torch.int32), out_int32=True)
    counts = bounds.diff()
    rank_in_row = torch.arange(max(int(counts.max()), k + 1), dtype=torch.int32)
    entries = (bounds[:-1, None] + rank_in_row).clamp_(max=flat.shape[0] - 1)
    places = flat.index_select(0, entries.view(-1)).view_as(entries)
    values = pre.view(-1).index_select(0, places.view(-1)).view_as(places)
    return values.masked_fill_(rank_in_row >= counts[:, None], -math.inf), places


def _weighted_rows(indices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """`[N, d]`: sums over j of values_ij * rows[indices_ij]."""
    (N, K), (n, d) = indices.shape, rows.shape
    if values.numel() == 0 or d == 0:
        return values.new_zeros(N, d)
    if not is_gathered("sum", N, K, rows):
        return scattered(indices, values, n) @ rows
    starts = torch.arange(0, N * K, K, dtype=torch.int32, device=rows.device)
    return _bag(indices.reshape(-1), starts, values.reshape(-1), rows)


def _column_sums(indices: Tensor, values: Tensor, source: Tensor, n: int) -> Tensor:
    """`[n, d]`: row c sums values_ij * source_i over the entries with indices_ij = c, in the order of i."""
    (N, K), d = indices.shape, source.shape[1]
    if values.numel() == 0 or d == 0:
        return source.new_zeros(n, d)
    if most_gathered("columns", N, n, source.device) < K:
        return scattered(indices, values, n).T @ source
    narrow = torch.int16 if n <= 2**15 else torch.int32  # half the digits to sort by
    latents, order = indices.reshape(-1).to(narrow).sort(stable=True)
    order = order.to(torch.int32)
    starts = torch.searchsorted(latents, torch.arange(n, dtype=narrow, device=source.device), out_int32=True)
    entry_rows = torch.arange(N, dtype=torch.int32, device=source.device).repeat_interleave(K)
    return _bag(entry_rows.index_select(0, order), starts, values.reshape(-1).index_select(0, order), source)


def _row_products(indices: Tensor, grad: Tensor, rows: Tensor) -> Tensor:
    """`[N, K]`: products of grad_i with rows[indices_ij]."""
    (N, K), (n, d) = indices.shape, rows.shape
    if indices.numel() == 0 or d == 0:
        return grad.new_zeros(N, K)
    is_sampled = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    if not is_sampled or not is_gathered("product", N, K, rows):
        return (grad @ rows.T).gather(1, indices.long())
    width = d if n * d <= _CACHED_ELEMENTS or 16 * n > N * K else max(1, _CACHED_ELEMENTS // n)
    bounds = torch.arange(0, N * K + 1, K, dtype=torch.int32)
    with warnings.catch_warnings():  # torch calls the layout a beta version, once
        warnings.simplefilter("ignore", UserWarning)
        total = torch.sparse_csr_tensor(bounds, indices.reshape(-1), grad.new_zeros(N * K), (N, n))
    for part, table in zip(grad.split(width, 1), rows.split(width, 1), strict=True):
        total = torch.sparse.sampled_addmm(total, part, table.T)
    return total.values().view(N, K)


def _bag(indices: Tensor, starts: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """Weighted sums of the table rows that each bag lists, a slice of columns at a time if entries are used often."""
    uses = 4 if table.numel() > _CACHED_ELEMENTS else 16  # of an entry, from which on slices pay
    is_sliced = indices.shape[0] >= uses * table.shape[0] and not torch.compiler.is_compiling()
    if not is_sliced and table.stride(1) == 1:
        return F.embedding_bag(indices, table, starts, mode="sum", per_sample_weights=values)
    width = _SLICE_COLUMNS if is_sliced else table.shape[1]
    out = table.new_empty(starts.shape[0], table.shape[1])
    for total, part in zip(out.split(width, 1), table.split(width, 1), strict=True):
        part = part if part.stride(1) == 1 else part.contiguous()
        total.copy_(F.embedding_bag(indices, part, starts, mode="sum", per_sample_weights=values))
    return out


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
