"""Passes with suppression inside the vision tower: a patch loses attention where other patches read it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .batches_atman import tiled
from .configuration_atman import AtManConfig
from .errors_atman import UnsupportedModelError
from .hook_atman import AttentionCall, Intervention, active, in_this_thread, only_heads
from .images_atman import Grid, locate_images, patch_grids
from .observing_atman import plain_inputs, target_rows
from .passages_atman import Passage, RunSettings, Suppression, forward_rows, pack
from .prompts_atman import EncodedPrompt, ImageColumns

_MERGED_ORDER = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # patches of one token follow each other


def check_vision_settings(config: AtManConfig) -> None:
    """Refuse what means nothing where only patches of images are.

    Raises:
        ValueError: another site is asked for as well, or units that are text.
    """
    if config.sites != ("vision",):
        raise ValueError(
            f'sites must not join "vision" with others, got {config.sites}: patches in the vision tower are other '
            "columns than image tokens in the decoder."
        )
    for name, is_text in (
        ("units", config.units == "text"),
        ("attribute_target", config.attribute_target),
        ("exclude", bool(config.exclude)),
        ("delimiter", config.delimiter is not None),
    ):
        if is_text:
            raise ValueError(
                f'{name}={getattr(config, name)!r} is about text, but with sites=("vision",) all units are patches of '
                "images."
            )


def locate_patches(model: PreTrainedModel, prompt: EncodedPrompt) -> EncodedPrompt:
    """Number the patches that the vision tower of a model sees: of all images of a prompt, row by row.

    Raises:
        ValueError: there is no image, or the prompt does not fit its images.
        UnsupportedModelError: the grid of patches is unknown.
    """
    if not locate_images(model, prompt).images:
        raise ValueError('sites=("vision",) needs images, got a prompt without; pass images=.')
    images: list[ImageColumns] = []
    start = 0
    for rows, cols in _known_grids(model, prompt.model_inputs):
        images.append(ImageColumns(columns=tuple(range(start, start + rows * cols)), grid=(rows, cols)))
        start += rows * cols
    return replace(prompt, images=tuple(images))


@dataclass(frozen=True)
class _Plain:
    """A passage, and what its plain run showed."""

    passage: Passage
    inputs: dict[str, Any]
    """Of one row."""
    readouts: Tensor
    """[M]"""
    columns: int
    """Keys that the tower has for this row, class tokens among them."""
    places: Tensor
    """[n], the column of every patch."""
    features: Tensor
    """[n, D], every patch as it enters the last layer of the tower."""


class VisionPasses:
    """A few passages of one vision-language model; columns are the patches of their images, row by row.

    Args:
        model: in eval mode, switched to AtMan's attention.
        passages: what to run.
        config: which layers are manipulated.
        settings: how to run them.

    Raises:
        UnsupportedModelError: the attention of the model's tower does not have one key per patch.
    """

    is_causal = False

    def __init__(
        self, model: PreTrainedModel, passages: Sequence[Passage], config: AtManConfig, settings: RunSettings
    ) -> None:
        self._model = model
        self._settings = settings
        self._modules = self._tower_modules(passages[0])
        self._chosen = {id(module) for module in _layers(self._modules, config)}
        self._plain = [self._run_plainly(passage) for passage in passages]
        self.baseline = [each.readouts for each in self._plain]

    def embeds(self, passage: int) -> Tensor:
        """Features [n, D] of a passage's patches."""
        return self._plain[passage].features

    def run(self, items: Sequence[Suppression]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of every item and its read-outs [M], passage by passage."""
        for number, plain in enumerate(self._plain):
            mine = [index for index, item in enumerate(items) if item.passage == number]
            length = plain.passage.length + plain.columns
            most = self._settings.most_items([plain.passage], self._model.config.get_text_config().vocab_size)
            for group in pack([length] * len(mine), tokens=self._settings.tokens, most=most):
                chosen = [mine[each] for each in group]
                factors = torch.stack([items[index].factors() for index in chosen])  # [R, n]
                yield from zip(chosen, self._run(plain, factors), strict=True)

    def _run(self, plain: _Plain, factors: Tensor) -> Tensor:
        """Read-outs [R, M] under factors [R, n]."""
        in_tower = factors.new_ones(len(factors), plain.columns)
        in_tower[:, plain.places] = factors
        patches = _SuppressedPatches(self._chosen, in_tower.flatten(), self._settings)
        with active(patches):
            return self._read(plain.passage, tiled(plain.inputs, len(factors)), len(factors))

    def _run_plainly(self, passage: Passage) -> _Plain:
        seen: dict[str, Tensor] = {}

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen["features"] = hidden.reshape(-1, hidden.shape[-1])

        inputs = plain_inputs(passage, self._model)
        counter = _KeyCounter()
        handle = self._modules[-1].register_forward_pre_hook(in_this_thread(look), with_kwargs=True)
        try:
            with active(counter):
                readouts = self._read(passage, inputs, 1)
        finally:
            handle.remove()
        (columns, *others) = {counter.keys[id(module)] for module in self._modules}
        if others:
            raise _unsupported(self._model, "has layers with different keys")
        places = _patch_places(self._model, passage.model_inputs, columns)
        features = seen["features"]
        return _Plain(passage, inputs, readouts[0], columns, places, features[places.to(features.device)])

    def _read(self, passage: Passage, inputs: Mapping[str, Any], rows: int) -> Tensor:
        """Read-outs [R, M] of R equal rows."""
        logits = self._logits(passage, inputs)
        targets = torch.tensor(passage.target_ids, device=logits.device)
        return self._settings.readout(logits, targets.expand(rows, -1))

    def _logits(self, passage: Passage, inputs: Mapping[str, Any]) -> Tensor:
        """Logits [R, M, V] of the rows that predict the target."""
        return forward_rows(self._model, target_rows(passage, self._model), **inputs)

    def _tower_modules(self, passage: Passage) -> tuple[nn.Module, ...]:
        """The self-attention modules of the model's tower, in the order of their first call."""
        counter = _KeyCounter()
        with active(counter):
            self._logits(passage, plain_inputs(passage, self._model))
        inside = {id(module) for module in self._model.get_decoder().modules()}
        modules = tuple(m for m in counter.called if id(m) not in inside and counter.is_self[id(m)])
        if not modules:
            raise _unsupported(self._model, "does not call attention through transformers' interface")
        return modules


class _SuppressedPatches(Intervention):
    """Deals factors out to the keys of a tower's calls, in the order in which the tower takes its patches.

    Some towers take all images as one batch, some call attention once per image or window: either way each layer gets
    every patch once.
    """

    def __init__(self, modules: Collection[int], factors: Tensor, settings: RunSettings) -> None:
        self.modules = modules
        self._factors = factors
        self._settings = settings
        self._dealt = dict.fromkeys(modules, 0)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention with suppressed patches, [B, H, Tq, Dv]."""
        rows, keys = call.key.shape[0], call.key.shape[2]
        start = self._dealt[id(call.module)]
        self._dealt[id(call.module)] = end = start + rows * keys
        wide = torch.float64 if call.key.dtype == torch.float64 else torch.float32
        self._factors = self._factors.to(call.key.device, wide)
        out = call.attend(self._factors[start:end].view(rows, keys), self._settings.mode)
        return out if self._settings.heads is None else only_heads(out, call.attend(), self._settings.heads, dim=1)


class _KeyCounter(Intervention):
    """Leaves attention as it is and counts the keys that each module gets."""

    def __init__(self) -> None:
        self.modules = None
        self.called: list[nn.Module] = []
        self.keys: dict[int, int] = {}
        self.is_self: dict[int, bool] = {}
        """Whether queries and keys are as many."""

    def attend(self, call: AttentionCall) -> Tensor:
        name, keys = id(call.module), call.key.shape[2]
        if name not in self.keys:
            self.called.append(call.module)
        self.keys[name] = self.keys.get(name, 0) + call.key.shape[0] * keys
        self.is_self[name] = self.is_self.get(name, True) and call.query.shape[2] == keys
        return call.attend()


def _layers(modules: Sequence[nn.Module], config: AtManConfig) -> list[nn.Module]:
    for layer in config.layers or ():
        if not -len(modules) <= layer < len(modules):
            raise ValueError(f'layers must lie in [0, {len(modules)}) of site "vision", got {layer}.')
    return [modules[layer] for layer in (range(len(modules)) if config.layers is None else config.layers)]


def _known_grids(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Grid]:
    grids = patch_grids(model.config, inputs)
    if grids is None or ("image_grid_thw" in inputs and model.config.model_type not in _MERGED_ORDER):
        raise _unsupported(model, "takes patches in an order that is not known")
    return grids


def _patch_places(model: PreTrainedModel, inputs: Mapping[str, Tensor], columns: int) -> Tensor:
    """The tower's column of every patch; patches counted image by image and row by row."""
    grids = _known_grids(model, inputs)
    patches = sum(rows * cols for rows, cols in grids)
    if columns - patches not in (0, len(grids)) or model.config.model_type == "llama4":
        raise _unsupported(model, f"has {columns} keys for {patches} patches")
    leading = int(columns > patches)  # a class token before the patches of each image
    places = []
    end = 0
    for grid in grids:
        order = torch.arange(grid[0] * grid[1])
        if "image_grid_thw" in inputs:
            order = _merged_order(model.config.vision_config, grid).argsort()
        places.append(end + leading + order)
        end += leading + len(order)
    return torch.cat(places)


def _merged_order(config: PreTrainedConfig, grid: Grid) -> Tensor:
    """Patches of one image as Qwen's towers take them: those of a token together, and those of a window."""
    rows, cols, side = *grid, config.spatial_merge_size
    order = torch.arange(rows * cols).view(rows // side, side, cols // side, side).transpose(1, 2)
    order = order.reshape(-1, side * side)  # [tokens, patches]
    if hasattr(config, "fullatt_block_indexes"):
        from transformers.vision_utils import get_vision_window_index

        sizes = torch.tensor([[1, rows, cols]])
        order = order[get_vision_window_index(sizes, side, config.window_size, config.patch_size)[0]]
    return order.flatten()


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f'sites=("vision",) is not available for {type(model).__name__}, whose vision tower {reason}; leave sites out '
        "to suppress image tokens in the language model."
    )
