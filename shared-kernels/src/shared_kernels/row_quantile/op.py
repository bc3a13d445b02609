"""`row_quantile`: check the arguments, pick an implementation."""

import torch
from torch import Tensor

from .._checks import check_no_gradient, check_one_device
from .._dispatch import Implementation, choose
from .._ns import NAMESPACE
from .eager import row_quantile_eager


def row_quantile(S: Tensor, q: Tensor | float, *, impl: Implementation = "auto") -> Tensor:
    """Find the number below which a share q of each row lies, exactly: linear interpolation as in `torch.quantile`.

    Where a mask shall keep the largest numbers, `S >= row_quantile(S, q)[:, None]` keeps a share 1 - q of each row; the
    comparison holds for a number that is the quantile, since nothing is rounded in between. Has no gradient.

    Args:
        S: `[R, n]`, float32 or float64, n at least 1 and at most 2**24.
        q: in [0, 1]; a number, or floating point `[R]`, one per row. A tensor is not checked, which would wait for the
            device; what lies outside counts as 0 or 1.
        impl: `"triton"`, `"eager"` (PyTorch), or `"auto"`: Triton on a GPU, PyTorch elsewhere.

    Returns:
        `[R]` in the dtype of `S`. A row with a NaN has the quantile NaN, which no comparison holds for. It may be NaN
        between infinite numbers, too.

    Raises:
        ValueError: an argument does not fit, or requires a gradient; the message names it.

    Example:
        >>> row_quantile(torch.tensor([[3.0, 1.0, 2.0, 4.0], [0.0, 0.0, 8.0, 0.0]]), 0.75)
        tensor([3.2500, 2.0000])
    """
    _check(S, q)
    levels = q if isinstance(q, Tensor) else None
    check_no_gradient("row_quantile", S=S, q=levels)
    device = check_one_device(S=S, q=levels)
    if choose(impl, "row_quantile", device, S.dtype) == "eager":
        return row_quantile_eager(S, q)
    return _row_quantile(S, levels, 0.0 if isinstance(q, Tensor) else float(q))


def _check(S: Tensor, q: Tensor | float) -> None:
    if S.ndim != 2 or not 1 <= S.shape[1] <= 1 << 24:
        raise ValueError(f"S must have the shape [R, n] with n in [1, {1 << 24}], got {tuple(S.shape)}.")
    if S.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"S must be torch.float32 or torch.float64, got {S.dtype}; fewer bits would put other numbers level with "
            f"the quantile. Convert it with .float()."
        )
    if not isinstance(q, Tensor):
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q must lie in [0, 1], got {q}.")
    elif q.shape != S.shape[:1] or not q.dtype.is_floating_point:
        raise ValueError(
            f"q must be a number, or floating point with the shape {tuple(S.shape[:1])}, one per row of S, got "
            f"{q.dtype} {tuple(q.shape)}."
        )


@torch.library.custom_op(f"{NAMESPACE}::row_quantile", mutates_args=())
def _row_quantile(S: Tensor, levels: Tensor | None, level: float) -> Tensor:
    from . import kernel

    levels = None if levels is None else levels.float().contiguous()
    return kernel.launch(S.contiguous(), levels, level, S.new_empty(S.shape[0]))


@_row_quantile.register_fake
def _(S: Tensor, _levels: Tensor | None, _level: float) -> Tensor:
    return S.new_empty(S.shape[0])
