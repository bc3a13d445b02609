"""Steering by the rule "add" as a file for the `steered` model type of the lm-eval harness.

The harness adds one fixed vector to every token. The rule "add" pushes each token by a share of that token's own norm,
so the file stands for it only as far as tokens have the norm that it was made with. For the exact rules set
`default_steering` in the adapter's configuration, `import scar_peft` in the process that runs the harness, and give it
the adapter: `--model hf --model_args pretrained=...,peft=...`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .layer import ScarLayer, scar_layers
from .remote.strengths_scar import Strength, check_request, read_amount


def export_lm_eval(
    model: nn.Module,
    path: str | os.PathLike[str],
    steering: Mapping[str, Strength],
    *,
    token_norm: float | Mapping[int, float],
    adapter_name: str = "default",
) -> dict[str, dict[str, Any]]:
    """Write a steering file for `lm_eval --model steered --model_args pretrained=...,steer_path=...`.

    Args:
        model: any model that holds the adapter.
        path: file to write, ending in ".pt".
        steering: strengths of the rule "add" by concept, one number each, or one by layer index.
        token_norm: norm of an ordinary token at the adapter's site, for all layers or by layer; see `token_norms`.
        adapter_name: which adapter.

    Returns:
        What was written: by the module's name below the base model, the vector (sum of strength times unit direction),
        and the norm as its coefficient.

    Raises:
        ValueError: an unknown concept, a strength per row, a norm that is not positive, or a file name that the harness
            does not read.

    Example:
        >>> norms = token_norms(model, **tokenizer(texts, return_tensors="pt", padding=True))
        >>> export_lm_eval(model, "detox.pt", {"toxicity": -0.5}, token_norm=norms)
    """
    if Path(path).suffix != ".pt":
        raise ValueError(f'path must end in ".pt", by which the harness tells the format, got {os.fspath(path)!r}.')
    layers = scar_layers(model, adapter_name)
    check_request(steering, rule="add", mode=None, positions=None, known=layers[0].config(adapter_name).concepts)
    names = _names_below_base(model)
    entries = {
        names[layer.get_base_layer()]: {
            "steering_vector": _direction(layer, adapter_name, steering),
            "steering_coefficient": _norm_at(token_norm, layer.layer_index),
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for layer in layers
    }
    torch.save(entries, path)
    return entries


@torch.no_grad()
def token_norms(model: nn.Module, adapter_name: str = "default", **batch: Any) -> dict[int, float]:
    """Measure the median norm of a token at the site of each layer of an adapter.

    Args:
        model: any model that holds the adapter.
        adapter_name: which adapter.
        **batch: arguments of one forward pass, such as `input_ids` and `attention_mask` [B, L].

    Returns:
        By the block's index. Padding and first tokens, whose norm is often huge, do not count if others are there.

    Example:
        >>> token_norms(model, **tokenizer(["some text", "more text"], return_tensors="pt", padding=True))
    """
    norms: dict[int, Tensor] = {}
    handles = [
        layer.get_base_layer().register_forward_hook(_keep_norms(norms, layer.layer_index), prepend=True)
        for layer in scar_layers(model, adapter_name)
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {index: float(each[_counts(each, batch.get("attention_mask"))].median()) for index, each in norms.items()}


def _keep_norms(norms: dict[int, Tensor], index: int) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        norms[index] = hidden.float().norm(dim=-1)

    return keep


def _counts(norms: Tensor, mask: Tensor | None) -> Tensor:
    real = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask.bool().to(norms.device)
    inner = real & (real.cumsum(-1) > 1)
    return inner if bool(inner.any()) else real


def _names_below_base(model: Any) -> dict[nn.Module, str]:
    """Names as the harness looks them up: below `base_model` of the language model that it loads itself."""
    language_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {module: name for name, module in language_model.base_model.named_modules()}


def _direction(layer: ScarLayer, adapter_name: str, steering: Mapping[str, Strength]) -> Tensor:
    concepts = layer.config(adapter_name).concepts
    columns = layer.weights(adapter_name).decoder.detach().float().cpu()  # [d, n]
    total = torch.zeros(columns.shape[0])
    for concept, strength in steering.items():
        amount = read_amount(concept, strength, layer.layer_index)
        if isinstance(amount, tuple):
            raise ValueError(f'steering["{concept}"] must be one number, because the harness steers all rows alike.')
        total += (amount or 0.0) * torch.nn.functional.normalize(columns[:, concepts.index(concept)], dim=0)
    return total


def _norm_at(token_norm: float | Mapping[int, float], index: int) -> float:
    if isinstance(token_norm, Mapping) and index not in token_norm:
        raise ValueError(f"token_norm must hold layer {index}, got layers {sorted(token_norm)}.")
    norm = float(token_norm[index] if isinstance(token_norm, Mapping) else token_norm)
    if not 0 < norm < float("inf"):
        raise ValueError(f"token_norm must be positive and finite, got {norm}.")
    return norm
