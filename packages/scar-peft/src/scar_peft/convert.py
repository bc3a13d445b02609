"""An original SCAR or G-SAE checkpoint -> an adapter: names, layout and defaults translated, numbers kept."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .checkpoint_files import CONFIG_FILE, PREFIX, Place, read_json, read_tensors
from .checkpoint_settings import CheckpointSettings, read_settings
from .coder import CoderWeights
from .config import ScarConfig
from .layer import scar_layers
from .remote.sites_scar import hidden_size

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.get_logger(__name__)

LICENSE = "cc-by-nc-sa-4.0"
"""Under which the original weights are published."""

_TIED_DECODER = "decoder.linear.weight"


def from_scar_checkpoint(
    source: str | os.PathLike[str],
    base_model: nn.Module | str,
    *,
    compact: bool = False,
    layers: Sequence[int] | None = None,
    site: str | None = None,
    concepts: Sequence[str] | None = None,
    settings: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    task_type: str | None = "CAUSAL_LM",
    license: str | None = LICENSE,  # noqa: A002  the model card's word
    **download: Any,
) -> "PeftModel":
    """Make an adapter of a published SCAR model, of the original trainer's files, or of G-SAE weights.

    Of a published model, which holds the whole language model, only the files with the sparse coder are downloaded.
    Nothing is unpickled. The adapter steers as the original does, by the rule "scale", and starts neutral.

    Args:
        source: repository on the Hub, folder, or one file of weights (`.safetensors`, or `.pth` of the trainer).
        base_model: the language model that the sparse coder was trained on, or its name. It gets the adapter.
        compact: keep only the concepts' rows: some kilobytes, but no reconstruction and no gate "topk".
        layers: the one block that was coded. None: what the checkpoint says.
        site: "mlp" or "block". None: what the checkpoint says.
        concepts: names of the first latents. None: those of the data set that the settings name, else "toxicity".
        settings: what stands in for `config.json`: the JSON file that the trainer was started with, or its content.
        adapter_name: name in the PEFT model.
        task_type: PEFT's name for what the base model does.
        license: of the weights, for the model card.
        **download: for `hf_hub_download`: `revision`, `token`, `cache_dir`, ...

    Returns:
        The PEFT model, with an adapter that is not trainable.

    Raises:
        ValueError: a file is missing, damaged or unsafe, a setting is out of range, tensors do not fit the settings, or
            the base model does not fit the checkpoint.

    Example:
        >>> model = from_scar_checkpoint("AIML-TUDA/SCAR", base_model)
        >>> model.set_steering("toxicity", scale=-100)

    Source: Härle et al. 2024, "SCAR"; Härle et al. 2025, "Measuring and Guiding Monosemanticity".
    """
    place = Place(os.fspath(source), download)
    values, where = _read_settings_file(place, settings)
    stated = read_settings(values, where, layer=_only(layers), site=site, concepts=concepts)
    _warn_of_steering(values, where)
    if isinstance(base_model, str):
        base_model = _load_base(base_model)
    _check_base(base_model, stated, place.source)  # before gigabytes are read
    arguments, weights = convert_tensors(read_tensors(place), stated, compact=compact)
    if stated.k is not None:
        _tell_gate(place.source, compact)
    config = ScarConfig(
        task_type=task_type,
        inference_mode=True,
        license=license,
        label_source=_label_source(stated, place),
        **arguments,
    )
    return _attach(base_model, config, weights, adapter_name)


def convert_tensors(
    tensors: Mapping[str, Tensor], settings: CheckpointSettings, *, compact: bool = False
) -> tuple[dict[str, Any], CoderWeights]:
    """Translate tensors of the original layout.

    Args:
        tensors: `pre_bias` [d], `latent_bias` [n], `encoder.weight` [n, d], `decoder.weight` [d, n]; or, for the last,
            `decoder.linear.weight` [n, d] of old trainers. The prefix "SAE." may stand before each.
        settings: what the checkpoint says about itself.
        compact: keep only the concepts' rows.

    Returns:
        Arguments for `ScarConfig`, and the weights in the dtype they have; with `compact` C stands for n.

    Raises:
        ValueError: a tensor is missing, unknown, of the wrong shape or dtype, or not finite; names it.

    Example:
        >>> arguments, weights = convert_tensors(load_file("sae.safetensors"), read_settings(config))
        >>> model = get_peft_model(base, ScarConfig(**arguments))
    """
    d, n = settings.hidden_size, settings.n_latents
    found = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if _TIED_DECODER in found and "decoder.weight" not in found:
        found["decoder.weight"] = found.pop(_TIED_DECODER).T
    shapes = {"pre_bias": (d,), "latent_bias": (n,), "encoder.weight": (n, d), "decoder.weight": (d, n)}
    if unknown := sorted(found.keys() - shapes.keys()):
        raise ValueError(f"tensors must be {sorted(shapes)}, got {unknown} as well: another kind of sparse coder.")
    for name, shape in shapes.items():
        _check_tensor(name, found.get(name), shape)
    keep = len(settings.concepts) if compact else n
    weights = CoderWeights(
        encoder=found["encoder.weight"][:keep],
        decoder=found["decoder.weight"][:, :keep],
        pre_bias=found["pre_bias"],
        latent_bias=found["latent_bias"][:keep],
    )
    return _config_arguments(settings, compact), weights


def _config_arguments(settings: CheckpointSettings, compact: bool) -> dict[str, Any]:
    selection = {} if settings.k is None else {"k": settings.k}
    return {
        "layers": [settings.layer],
        "site": settings.site,
        "concepts": list(settings.concepts),
        "n_latents": settings.n_latents,
        "activation": settings.activation,
        "concept_gate": "topk",  # the original's concept latents compete with all others
        "normalize": True,  # whatever the files say: the published classes pass True
        "steering_rule": "scale",
        "compact": compact,
        **selection,
    }


def _check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise ValueError(f"tensors must hold {name} {list(shape)}, and do not.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"tensor {name} must have shape {list(shape)} by the settings, got {list(tensor.shape)}.")
    if not tensor.is_floating_point():
        raise ValueError(f"tensor {name} must be floating point, got {tensor.dtype}.")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"tensor {name} must be finite, and holds NaN or infinite values.")


def _read_settings_file(place: Place, settings: Mapping[str, Any] | str | os.PathLike[str] | None) -> tuple[Any, str]:
    if isinstance(settings, Mapping):
        return settings, "settings"
    path = Path(settings) if settings is not None else place.find(CONFIG_FILE)
    if path is None or not path.is_file():
        missing = f"{place.source} has no {CONFIG_FILE}" if settings is None else f"settings {path} is no file"
        raise ValueError(f"{missing}; pass settings=, the JSON file that the trainer was started with or its content.")
    return read_json(path), str(path)


def _only(layers: Sequence[int] | None) -> int | None:
    if layers is not None and len(layers) != 1:
        raise ValueError(f"layers must name one block, because the checkpoint holds one sparse coder, got {layers}.")
    return None if layers is None else layers[0]


def _warn_of_steering(values: Mapping[str, Any], where: str) -> None:
    if values.get("mod_features") is not None:
        logger.warning(
            f"{where}: mod_features and what belongs to it are left aside, so the adapter starts neutral. Use "
            "model.set_steering(concept, scale=...), where scale is the original's mod_scaling."
        )


def _label_source(settings: CheckpointSettings, place: Place) -> str | None:
    origin = None if os.path.exists(place.source) else f"weights converted from {place.source}"
    return "; ".join(filter(None, (settings.label_source, origin))) or None


def _tell_gate(source: str, compact: bool) -> None:
    remedy = "" if compact else ' For the original\'s choice set model.peft_config[adapter_name].gate = "topk".'
    logger.warning_once(
        f"{source}: the original steers a token where the concept is among its k largest latents; the adapter steers "
        f'where the concept is above 0 (gate "relu"), which is more tokens but needs no other latents.{remedy}'
    )


def _load_base(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype="auto")


def _check_base(base_model: nn.Module, settings: CheckpointSettings, source: str) -> None:
    size = hidden_size(base_model)
    if size != settings.hidden_size:
        named = f", {settings.base_model}" if settings.base_model else ""
        raise ValueError(
            f"base_model must have the hidden size of {source}, {settings.hidden_size}, got {size}; pass the model "
            f"that it was trained on{named}."
        )


def _attach(base_model: nn.Module, config: ScarConfig, weights: CoderWeights, adapter_name: str) -> "PeftModel":
    from peft import get_peft_model

    model = get_peft_model(base_model, config, adapter_name=adapter_name)
    (layer,) = scar_layers(model, adapter_name)
    with torch.no_grad():
        for target, tensor in zip(layer.weights(adapter_name), weights, strict=True):
            target.copy_(tensor)
    return model
