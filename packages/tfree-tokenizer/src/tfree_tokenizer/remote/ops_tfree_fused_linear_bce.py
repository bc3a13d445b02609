"""`fused_linear_bce` in PyTorch: logits and gradients chunk by chunk, so no `[N, V]` tensor outlives its chunk.

Self-contained on purpose: this file is copied verbatim next to models on the Hub.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 64 << 20
"""Size of the logits of one chunk. Changes memory and speed, never the loss beyond rounding."""

_BLOCK_ELEMENTS = 1 << 18
"""Elementwise work runs on this many logits at a time, so that its scratch stays in the cache."""

_FOLD = 4
"""Columns whose log terms are multiplied into one before the logarithm, the dearest step, is taken."""


def fused_linear_bce_eager(
    x: Tensor,
    weight: Tensor,
    positive_ptr: Tensor,
    positive_rows: Tensor,
    *,
    pos_weight: float,
    row_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Weighted multi-label loss of a linear head, without the dense target and without all logits at once.

    loss = scale * sum_n row_weight[n] * [ sum_c softplus(z[n, c])
           + sum_{c in P_n} (pos_weight * softplus(-z[n, c]) - softplus(z[n, c])) ],   z = x @ weight.T

    Args:
        x: `[N, D]`, floating point.
        weight: `[V, D]`, the head.
        positive_ptr: `[N + 1]`, int32 or int64, bounds of each row's positives in `positive_rows`.
        positive_rows: `[P]`, int32 or int64, each in `[0, V)`; no repeats within a row.
        pos_weight: factor of the positive terms.
        row_weight: `[N]`, or None for ones.
        scale: number or 0-dim tensor.
        chunk_rows: rows of `x` per chunk; None takes about 64 MiB of logits. Under `torch.compile` there is one
            chunk, since the bounds of the others are data.

    Returns:
        0-dim tensor, float32 (float64 for float64 inputs). Its gradients were formed along the way.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    common = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(common), weight.to(common)
    sums = torch.float64 if common == torch.float64 else torch.float32
    if row_weight is not None:
        row_weight = row_weight.to(sums)
    if chunk_rows is None:
        chunk_rows = max(1, _CHUNK_BYTES // (4 * max(1, weight.shape[0])))
    if torch.compiler.is_compiling():
        chunk_rows = max(1, x.shape[0])
    wants = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        total = _FusedLinearBCE.apply(
            x, weight, row_weight, positive_ptr, positive_rows, float(pos_weight), chunk_rows, wants
        )
    return total * scale


class _FusedLinearBCE(torch.autograd.Function):
    """The unscaled loss; dx and dweight are kept in the accumulation dtype until the backward pass scales them."""

    @staticmethod
    def forward(ctx, x, weight, row_weight, positive_ptr, positive_rows, pos_weight, chunk_rows, wants):
        sums = torch.float64 if x.dtype == torch.float64 else torch.float32
        on_gpu = x.device.type != "cpu"
        needs_x, needs_weight = (wants and need for need in ctx.needs_input_grad[:2])
        product_dtype = x.dtype if on_gpu else sums  # a CPU multiplies half precision no faster than float32
        head = weight.to(product_dtype)
        (N, D), V = x.shape, weight.shape[0]
        grad_x = torch.empty(N, D, dtype=sums, device=x.device) if needs_x else None
        grad_weight = torch.zeros(V, D, dtype=sums, device=x.device) if needs_weight else None
        losses = torch.empty(N, dtype=sums, device=x.device)
        logits = torch.empty(min(N, chunk_rows), V, dtype=sums, device=x.device)
        starts = range(0, N, chunk_rows)
        bounds = [0, positive_rows.numel()] if len(starts) == 1 else _host_bounds(positive_ptr, chunk_rows)
        for chunk, start in enumerate(starts):
            stop = min(start + chunk_rows, N)
            rows = x[start:stop].to(product_dtype)
            z = _multiply(rows, head.T, logits[: stop - start])
            columns = positive_rows[bounds[chunk] : bounds[chunk + 1]]
            counts = positive_ptr[start : stop + 1].diff()
            losses[start:stop] = _loss_and_gradient_of_logits(z, counts, columns, pos_weight)
            if row_weight is not None and (needs_x or needs_weight):
                z.mul_(row_weight[start:stop, None])
            dz = z.to(product_dtype)
            if needs_x:
                _multiply(dz, head, grad_x[start:stop])
            if needs_weight:
                _multiply_add(dz.T, rows, grad_weight)
        ctx.save_for_backward(grad_x, grad_weight, losses if ctx.needs_input_grad[2] else None)
        ctx.input_dtype = x.dtype
        weighted = losses if row_weight is None else losses * row_weight
        return weighted.sum(dtype=torch.float64).to(sums)

    @staticmethod
    def backward(ctx, grad):
        scaled = [None if saved is None else saved * grad for saved in ctx.saved_tensors]
        grad_x, grad_weight = (None if g is None else g.to(ctx.input_dtype) for g in scaled[:2])
        return grad_x, grad_weight, scaled[2], None, None, None, None, None


def _host_bounds(positive_ptr: Tensor, chunk_rows: int) -> list[int]:
    """Where each chunk's positives start, and where the last one's end."""
    return [*positive_ptr[:-1:chunk_rows].tolist(), int(positive_ptr[-1])]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return out.copy_(torch.mm(a, b, out_dtype=out.dtype))  # half precision in, float32 out: GPU only


def _multiply_add(a: Tensor, b: Tensor, total: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


def _loss_and_gradient_of_logits(z: Tensor, counts: Tensor, columns: Tensor, pos_weight: float) -> Tensor:
    """Loss of every row; `z` `[n, V]` becomes the gradient of that loss with respect to `z`, in place."""
    n, V = z.shape
    row = torch.arange(n, device=z.device).repeat_interleave(counts, output_size=columns.numel())
    slots = row * V + columns
    flat = z.view(-1)
    z_positive = flat.index_select(0, slots)  # [P of this chunk]
    losses = _softplus_sums_then_sigmoid(z)
    # softplus(z) = z + softplus(-z); logsigmoid, because F.softplus rounds to the identity above 20
    losses.index_add_(0, row, (1.0 - pos_weight) * F.logsigmoid(z_positive) - z_positive)
    flat.index_copy_(0, slots, -pos_weight * torch.sigmoid(-z_positive))
    return losses


def _softplus_sums_then_sigmoid(z: Tensor) -> Tensor:
    """Return sum_c softplus(z[n, c]) per row and leave sigmoid(z) in `z`.

    softplus(z) = max(z, 0) - log(1 - t) with t = min(s, 1 - s), s = sigmoid(z): exact for either sign. The logarithms
    of a few columns are taken at once through 1 - (a + b - a b) = (1 - a)(1 - b), which keeps small t to full
    precision where the product (1 - a)(1 - b) itself would round to one. t <= 1/2, so four factors are >= 1/16.
    """
    n, V = z.shape
    quarter = -(-V // _FOLD)
    block = max(1, _BLOCK_ELEMENTS // max(1, V))
    sums = torch.empty(n, dtype=z.dtype, device=z.device)
    scratch = torch.zeros(min(n, block), quarter * _FOLD, dtype=z.dtype, device=z.device)  # padding columns stay 0
    one = torch.ones((), dtype=z.dtype, device=z.device)
    for start in range(0, n, block):
        part = z[start : start + block]
        padded = scratch[: part.shape[0]]
        t = padded[:, :V]
        torch.clamp_min(part, 0, out=t)
        sums[start : start + block] = t.sum(1)
        part.sigmoid_()
        torch.sub(one, part, out=t)
        torch.minimum(t, part, out=t)
        a, b = padded[:, : 2 * quarter], padded[:, 2 * quarter :]
        pairs = torch.addcmul(a + b, a, b, value=-1)
        a, b = pairs[:, :quarter], pairs[:, quarter:]
        fours = torch.addcmul(a + b, a, b, value=-1)
        sums[start : start + block] -= torch.log1p(fours.neg_()).sum(1)
    return sums
