"""What every launch and every ahead-of-time compilation of a kernel has in common. Needs no Triton."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAUNCH_OPTIONS = {"enable_fp_fusion": True}
"""Stated at every launch, because Triton 3.10 flips the default."""


class AotCase(NamedTuple):
    """One specialization of a kernel that `shared_kernels.aot` compiles."""

    kernel: Any
    """The `@triton.jit` function."""

    signature: dict[str, str]
    """Triton type of each run-time argument, such as "*fp32" or "i32"; pointers count as 16-byte aligned."""

    constexprs: dict[str, Any]
    """Value of each compile-time argument; None for an optional pointer that is absent."""

    num_warps: int

    aligned: tuple[str, ...] = ()
    """Integer arguments taken as multiples of 16, as Triton finds strides and sizes to be when it launches."""


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one, where launches go."""
    if tensor.device.type == "cuda":
        return torch.cuda.device_of(tensor)
    if tensor.device.type == "xpu":
        return torch.xpu.device_of(tensor)
    return nullcontext()  # the interpreter


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()
