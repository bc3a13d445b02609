"""Makes adapters small, and exchanges their weights in place."""

from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import nn

from .coder import CoderWeights
from .config import ScarConfig
from .layer import ScarLayer, scar_layers

_SEMANTICS = (
    *("layers", "site", "concepts", "compact"),
    *("activation", "concept_gate", "k", "normalize", "norm_eps"),
)
"""What two adapters must have in common for their weights to be exchanged."""


def compact(model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Keep only the concepts' rows of an adapter: 48 KB instead of 805 MB at d = 4096, n = 24576 and one concept.

    What is left detects and steers as before in mode "residual" with the gates "relu", "threshold" and "open". There is
    no way back: save the full adapter first if it is needed.

    Args:
        model: any model that holds the adapter; changed in place.
        adapter_name: which one.

    Returns:
        The model.

    Raises:
        ValueError: the adapter reconstructs, or its gate needs all latents.

    Example:
        >>> compact(model).save_pretrained("scripture-scar")
    """
    layers = scar_layers(model, adapter_name)
    config = layers[0].config(adapter_name)
    if config.mode == "reconstruct" or config.gate == "topk":
        raise ValueError(
            f'a compact adapter cannot have mode="reconstruct" or gate="topk", got mode="{config.mode}" and '
            f'gate="{config.gate}". Set model.peft_config["{adapter_name}"].mode = "residual" or another gate first.'
        )
    for layer in layers:
        layer.set_weights(adapter_name, _concept_rows(layer.weights(adapter_name), len(config.concepts)))
    config.compact = True
    return model


def swap_weights(model: nn.Module, adapter_name: str, source: str | Path, *, revision: str | None = None) -> None:
    """Exchange an adapter's weights for those of another of the same shape, in place: nothing is compiled again.

    Args:
        model: any model that holds the adapter.
        adapter_name: which one.
        source: what `save_pretrained` wrote, or a repository.
        revision: commit, branch or tag of the repository.

    Raises:
        ValueError: the other adapter has other layers, concepts, sizes or semantics; nothing is changed then.
    """
    options = {} if revision is None else {"revision": revision}
    layers = scar_layers(model, adapter_name)
    config, other = layers[0].config(adapter_name), PeftConfig.from_pretrained(str(source), **options)
    _check_alike(config, other)
    tensors = load_peft_weights(str(source), device="cpu", **options)
    names = {module: _below_wrapper(name) for name, module in model.named_modules()}
    found = [(layer, _of_layer(tensors, names[layer])) for layer in layers]
    for layer, weights in found:
        for name, old, new in zip(CoderWeights._fields, layer.weights(adapter_name), weights, strict=True):
            if old.shape != new.shape:
                raise ValueError(f"{name} in source must have the shape {tuple(old.shape)}, got {tuple(new.shape)}.")
    with torch.no_grad():
        for layer, weights in found:
            for old, new in zip(layer.weights(adapter_name), weights, strict=True):
                old.copy_(new)
    config.calibration, config.metrics = other.calibration, other.metrics


def _concept_rows(weights: CoderWeights, count: int) -> CoderWeights:
    return CoderWeights(
        weights.encoder[:count], weights.decoder[:, :count], weights.pre_bias, weights.latent_bias[:count]
    )


def _check_alike(config: ScarConfig, other: PeftConfig) -> None:
    if not isinstance(other, ScarConfig):
        raise ValueError(f"source must hold a SCAR adapter, got {type(other).__name__}.")
    for name in _SEMANTICS:
        wanted, got = getattr(config, name), getattr(other, name)
        if wanted != got:
            raise ValueError(f"{name} in source must be {wanted!r}, got {got!r}: load it as an adapter.")


def _of_layer(tensors: dict[str, torch.Tensor], path: str) -> CoderWeights:
    """The tensors of the layer at `path`."""
    found = {_below_wrapper(key): tensor for key, tensor in tensors.items()}
    names = [f"{path}.{name}" for name in ScarLayer.adapter_layer_names]
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"source must hold {missing[0]}, got {sorted(found)}.")
    return CoderWeights(*(found[name] for name in names))


def _below_wrapper(name: str) -> str:
    """A name below the model itself: saved files and PEFT models put "base_model.model." in front."""
    return name.removeprefix("base_model.model.")
