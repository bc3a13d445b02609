"""The head's loss: linear layer and multi-label cross-entropy, forward and backward, beside dense targets."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases.tfree.inputs import DTYPES, default_dtype, random_tensor, text_inputs
from benchmarks.harness import Call, Case, Options, register
from benchmarks.peers import dense_bce, dense_targets
from shared_kernels import fused_linear_bce

SIZES = {"cpu": {"v8k": (1024, 512, 8000)}, "cuda": {"v8k": (8192, 4096, 8000), "v32k": (8192, 4096, 32000)}}
QUICK = (16, 8, 80)
POS_WEIGHT = 300.0
CLASSIC_HEAD = 128_256  # vocabulary of the softmax head that this one replaces


def _register(kind: str) -> None:
    name = f"tfree.head_loss.{kind}"

    @register(name, devices=tuple(device for device, sizes in SIZES.items() if kind in sizes))
    def build(options: Options) -> Case:
        N, D, V = QUICK if options.quick else SIZES[options.device][kind]
        dtype = default_dtype(options)
        words, flat = text_inputs(N, V, 8, options)
        positive_ptr, positive_rows = words.active_rows()
        x = random_tensor(N, D, dtype=dtype, device=options.device).requires_grad_()
        head = random_tensor(V, D, dtype=dtype, device=options.device, scale=D**-0.5, seed=1).requires_grad_()
        row_weight = torch.ones(N, device=options.device)
        row_weight[::7] = 0.0  # padding
        targets = dense_targets(flat, DTYPES[dtype])
        scale = 100.0 / (N * V)

        def ours() -> Tensor:
            return fused_linear_bce(
                x, head, positive_ptr, positive_rows, pos_weight=POS_WEIGHT, row_weight=row_weight, scale=scale
            )

        item = x.element_size()
        return Case(
            name=name,
            ours=_with_gradients(ours, x, head),
            peers={
                "dense BCEWithLogits": _with_gradients(
                    lambda: dense_bce(x, head, targets, POS_WEIGHT, row_weight, scale), x, head
                )
            },
            others={
                "three matrix products alone": lambda: _three_products(x.detach(), head.detach()),
                "Liger linear CE, same V": _liger(x, head),
                "Liger linear CE, V=128256": None if options.quick else _liger_classic(x, dtype, options),
            },
            rtol=1e-5 if dtype == "float32" else 3e-2,
            flops=6.0 * N * D * V,
            bytes=(2 * N * D + 2 * V * D) * item,
            size={"N": N, "D": D, "V": V},
            dtype=dtype,
            note="forward and both gradients; dense targets are made outside the clock",
        )


def _with_gradients(loss: Callable[[], Tensor], x: Tensor, head: Tensor) -> Call:
    def call() -> list[Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, (x, head))]

    return call


def _three_products(x: Tensor, head: Tensor) -> list[Tensor]:
    z = x @ head.T
    return [z @ head, z.T @ x]


def _liger(x: Tensor, head: Tensor) -> Call | None:
    """Liger's chunked softmax head on CUDA, with class targets; None where it is not installed or cannot run."""
    if not x.is_cuda:
        return None
    try:
        liger = importlib.import_module("liger_kernel.transformers")
    except ImportError:
        return None
    loss = liger.LigerFusedLinearCrossEntropyLoss()
    classes = torch.arange(x.shape[0], device=x.device) % head.shape[0]
    return _with_gradients(lambda: loss(head, x, classes), x, head)


def _liger_classic(x: Tensor, dtype: str, options: Options) -> Call | None:
    if options.device != "cuda":
        return None
    D = x.shape[1]
    head = random_tensor(CLASSIC_HEAD, D, dtype=dtype, device=options.device, scale=D**-0.5).requires_grad_()
    return _liger(x, head)


for _kind in ("v8k", "v32k"):
    _register(_kind)
