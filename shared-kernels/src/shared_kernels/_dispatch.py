"""Which implementation runs: the argument `impl` decides, and the environment says what its "auto" means."""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from typing import Literal

import torch

Implementation = Literal["auto", "triton", "eager"]

_CPU = torch.device("cpu")
_GPU_TYPES = ("cuda", "xpu")  # ROCm devices are of type "cuda", too
_SWITCH = "SHARED_KERNELS_BACKEND"
_already_warned: set[str] = set()


def read_switch(environ: Mapping[str, str]) -> Literal["auto", "triton", "torch"]:
    """The value of SHARED_KERNELS_BACKEND: what `impl="auto"` means in this process."""
    value = environ.get(_SWITCH, "auto")
    if value not in ("auto", "triton", "torch"):
        raise ValueError(f'{_SWITCH} must be "auto", "triton" or "torch", got {value!r}.')
    return value  # type: ignore[return-value]


BACKEND = read_switch(os.environ)
# Triton itself reads this variable when a kernel is decorated, so a later change would not count there either.
_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(
    impl: Implementation, op: str, device: torch.device, dtype: torch.dtype | None = None
) -> Literal["triton", "eager"]:
    """Pick the implementation of `op` for tensors on `device`; `dtype` is that of its floating-point argument.

    Raises:
        ValueError: `impl` is unknown, or names Triton for a dtype that its kernels do not compute in.
        RuntimeError: `impl` names Triton where Triton cannot run.
    """
    if impl not in ("auto", "triton", "eager"):
        raise ValueError(f'impl must be "auto", "triton" or "eager", got {impl!r}.')
    asked = impl
    if asked == "auto":
        # the comparison comes first because asking for the type takes microseconds
        on_gpu = BACKEND == "auto" and _HAS_TRITON and device != _CPU and device.type in _GPU_TYPES
        asked = "triton" if on_gpu or BACKEND == "triton" else "eager"
    if asked == "eager":
        return "eager"
    if not (_HAS_TRITON and (device.type in _GPU_TYPES or _INTERPRETS)):
        where = f'impl="{impl}"' if impl == "triton" else f"{_SWITCH}=triton"
        missing = "no tensor on a GPU" if _HAS_TRITON else "no installed package triton"
        raise RuntimeError(
            f'{where} needs tensors on a GPU and the package triton, got {missing}; pass impl="eager", or set '
            f"TRITON_INTERPRET=1 before Python starts to interpret kernels on the CPU."
        )
    if dtype == torch.float64:
        if impl == "triton":
            raise ValueError(f'impl="triton" sums in float32, got a {dtype} argument; pass impl="eager" to {op}.')
        _warn_once(f"{op}: the Triton kernels sum in float32, so {dtype} runs in PyTorch.")
        return "eager"
    return "triton"


def _warn_once(message: str) -> None:
    if message not in _already_warned:
        _already_warned.add(message)
        warnings.warn(message, stacklevel=4)
