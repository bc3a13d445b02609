"""Finds the modules of a transformers model whose outputs an adapter reads and steers."""

import re
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

Site = Literal["block", "mlp", "attn"]

SITES: tuple[Site, ...] = ("block", "mlp", "attn")

_PATHS: dict[str, tuple[str, ...]] = {
    "block": ("",),
    "mlp": (
        "mlp",
        "feed_forward",
        "ffn",
        "block_sparse_moe",
        "feedforward",
        "layer.2.DenseReluDense",
        "layer.1.DenseReluDense",
        "fc2",  # OPT and BART have no feed-forward module: the output of its last linear
        "output",  # BERT: with the residual and the norm
    ),
    "attn": ("self_attn", "attn", "attention", "self_attention", "layer.0.SelfAttention", "mixer"),
}
"""Where a block keeps what a site names, by the families' own names; the first that exists counts."""


def hidden_size(model: nn.Module) -> int:
    """Width d of the residual stream that the decoder's blocks write to."""
    config = _text_config(model)
    size = getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise ValueError(f"model must have a configuration with hidden_size, got {type(config).__name__} without it.")
    return size


def target_names(model: nn.Module, layers: Iterable[int], site: str) -> dict[int, str]:
    """Names of the modules of `site` in the given blocks of the language model.

    Args:
        model: any transformers model. Of a model with several towers, the decoder's blocks are meant.
        layers: block indices; negative ones count from the end.
        site: "block" (residual stream behind the block), "mlp" (output of its feed-forward part) or "attn".

    Returns:
        The dotted name below `model` of each target, by its non-negative block index in ascending order.

    Raises:
        ValueError: no blocks are found, a layer is outside the model, or the blocks have no such site.
    """
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {site!r}.")
    name, blocks = block_list(model)
    chosen = {_positive(index, len(blocks)) for index in layers}
    if not chosen:
        raise ValueError("layers must name at least one block, got none.")
    return {index: _below(f"{name}.{index}", _path(blocks[index], site)) for index in sorted(chosen)}


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks: the longest list of modules that hold attention, as long as configured."""
    root = _language_model(model)
    wanted = _number_of_blocks(model)
    lists = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _is_block(module[0])
    ]
    fitting = [(name, module) for name, module in lists if len(module) == wanted] or lists
    if not fitting:
        raise ValueError(f"model must hold a list of transformer blocks, and none was found in {type(model).__name__}.")
    found = max((module for _, module in fitting), key=len)
    return next(name for name, module in model.named_modules() if module is found), found


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The innermost ancestor of the module `name` that has a configuration: what takes masks and positions."""
    parts = name.split(".")
    ancestors = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    with_config = [each for each in ancestors if hasattr(each, "config") and hasattr(each, "get_input_embeddings")]
    return with_config[-1] if with_config else model


def regular_expression(names: Iterable[str]) -> str:
    """An expression that matches these module names and no others."""
    return "|".join(re.escape(name) for name in names)


def _positive(index: int, count: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int):
        raise ValueError(f"layers must be integers, got {index!r}.")
    if not -count <= index < count:
        raise ValueError(
            f"layers must lie in [-{count}, {count - 1}], because the model has {count} blocks, got {index}."
        )
    return index % count


def _path(block: nn.Module, site: str) -> str:
    for path in _PATHS[site]:
        try:
            block.get_submodule(path)
        except AttributeError:
            continue
        return path
    names = ", ".join(name for name, _ in block.named_children())
    raise ValueError(
        f'site must exist in the blocks of the model, got "{site}"; {type(block).__name__} holds {names}. '
        f'Use site="block".'
    )


def _below(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name


def _is_block(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_modules()]
    return any("attn" in name.lower() or "attention" in name.lower() for name in names)


def _language_model(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _number_of_blocks(model: nn.Module) -> int | None:
    config = _text_config(model)
    for name in ("num_decoder_layers", "num_hidden_layers"):
        if isinstance(count := getattr(config, name, None), int):
            return count
    return None
