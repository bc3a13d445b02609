"""States that a model is in for a while, and leaves as it was, whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .layer import ScarLayer


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, no module is in training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, SCAR adapters neither steer nor score; parameters keep whether they need gradients."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, ScarLayer)]
    active = [layer for layer in layers if not layer.disable_adapters]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()} if active else {}
    for layer in active:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
        for name, parameter in model.named_parameters() if active else ():
            parameter.requires_grad_(flags[name])


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its token ids."""
    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    embeddings = get_embeddings() if get_embeddings else model
    tensor = next(embeddings.parameters(), None)
    return tensor.device if tensor is not None else torch.device("cpu")
