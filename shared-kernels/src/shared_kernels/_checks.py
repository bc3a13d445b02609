"""Argument checks that several operators share. Every message names the argument, the rule and what arrived."""

import torch
from torch import Tensor


def check_one_device(**tensors: Tensor | None) -> torch.device:
    """All given tensors are on one device, which is returned."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in given.items())
    for name, tensor in given.items():
        if tensor.device != device:
            raise ValueError(
                f"{name} must be on the device of {first} ({device}), got {tensor.device}; move one with .to()."
            )
    return device


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    """`tensor` is a floating-point matrix; `shape` spells its axes."""
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}.")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}.")


def check_indices(name: str, tensor: Tensor, shape: str) -> None:
    """`tensor` is an integer vector, or a matrix if `shape` has two axes."""
    if tensor.ndim != 1 + shape.count(","):
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}.")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}.")


def check_bounds(name: str, bounds: Tensor, rows: int | None = None, of: str = "") -> None:
    """`bounds` holds one more number than there are rows; `of` names the argument that says how many these are."""
    check_indices(name, bounds, "[rows + 1]")
    if bounds.shape[0] < 1:
        raise ValueError(f"{name} must hold one more number than there are rows, got none.")
    if rows is not None and bounds.shape[0] != rows + 1:
        raise ValueError(f"{name} must hold {rows + 1} numbers, one more than {of} has rows, got {bounds.shape[0]}.")


def check_vector(name: str, tensor: Tensor, length: int, of: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """`tensor` is a vector as long as `of` says, in one of `dtypes`."""
    if tensor.shape != (length,):
        raise ValueError(f"{name} must have the shape {(length,)}, one number per {of}, got {tuple(tensor.shape)}.")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}.")


def check_no_gradient(op: str, **tensors: Tensor | None) -> None:
    """No given tensor asks for a gradient; `op` has none."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, got requires_grad=True: {op} has no backward pass. Call it under "
                f"torch.no_grad(), or pass {name}.detach()."
            )
