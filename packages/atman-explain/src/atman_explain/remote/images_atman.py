"""Where a prompt's images are: the columns of their tokens, and the grid that these form on the picture."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .errors_atman import UnsupportedModelError
from .prompts_atman import EncodedPrompt, ImageColumns

Grid = tuple[int, int]
"""Rows and columns."""

_RESAMPLERS = ("perceiver_config", "qformer_config", "projector_patch_to_query_dict")
_ANYRES = ("llava_next", "llava_next_video")


def locate_images(model: PreTrainedModel, prompt: EncodedPrompt) -> EncodedPrompt:
    """Find the image columns of a prompt that a vision-language model reads.

    A picture may enter a model as several images. Idefics3, SmolVLM and InternVL: its parts, row by row, and then the
    whole picture, if it was cut. LLaVA-NeXT: the whole picture, then its parts put together. Where image tokens stand
    for no place, an image is a single row of them.

    Raises:
        ValueError: there are pictures but no image tokens in the prompt, or not as many as the pictures need, or image
            tokens but no pictures.
        UnsupportedModelError: the model reads pictures, but not as columns of its input sequence.
    """
    config = model.config
    image_id = _image_token_id(config)
    columns = [column for column, index in enumerate(prompt.input_ids) if index == image_id]
    if not any("pixel" in name or "image" in name for name in prompt.model_inputs):
        if columns:
            raise ValueError(
                f"prompt has {len(columns)} image tokens ({prompt.tokens[columns[0]]!r}) but no image came with it; "
                "pass images=, or the processor's whole output as prompt."
            )
        return prompt
    if image_id is None or getattr(config.get_text_config(), "cross_attention_layers", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no images as part of its input sequence, so their patches cannot be "
            "suppressed there; give a prompt without images."
        )
    if not columns:
        raise ValueError(
            f"images were given but prompt has no image token (id {image_id}); put the processor's image token into "
            "the text, once per image."
        )
    images = tuple(
        ImageColumns(columns=tuple(columns[place] for place in places), grid=grid)
        for grid, places in _layouts(model, prompt.model_inputs, columns)
    )
    return replace(prompt, images=images)


def patch_grids(config: PreTrainedConfig, inputs: Mapping[str, Tensor]) -> list[Grid] | None:
    """Patches of every image as the vision tower sees it; None if the model's inputs do not tell.

    Args:
        config: of the whole model.
        inputs: what the processor made of the pictures of one prompt.
    """
    if "image_grid_thw" in inputs:
        return [(h, w) for t, h, w in inputs["image_grid_thw"].tolist() for _ in range(t)]
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if patch is None or pixels is None or pixels.ndim not in (4, 5):
        return None
    height, width = (patch, patch) if isinstance(patch, int) else patch
    if sizes is not None and pixels.ndim == 4:
        return [(h // height, w // width) for h, w in sizes.tolist()]
    return [(pixels.shape[-2] // height, pixels.shape[-1] // width)] * count_images(pixels)


def count_images(pixels: Tensor) -> int:
    """Number of images in `pixel_values`, [n, 3, H, W] or [1, n, 3, H, W] filled up with zeros."""
    images = pixels.flatten(0, -4)
    return int(images.flatten(1).any(1).sum()) if pixels.ndim == 5 else len(images)


def _image_token_id(config: PreTrainedConfig) -> int | None:
    return next(
        (i for n in ("image_token_id", "image_token_index") if (i := getattr(config, n, None)) is not None), None
    )


def _layouts(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], columns: Sequence[int]
) -> list[tuple[Grid, Sequence[int]]]:
    """Grid of every image, and its patches' places among the image tokens of the prompt."""
    config, total = model.config, len(columns)
    if config.model_type in _ANYRES:
        return _anyres_layouts(config, inputs["image_sizes"], total)
    is_resampled = any(hasattr(config, name) for name in _RESAMPLERS)
    count = _count_pictures(inputs)
    grids = patch_grids(config, inputs) if count and not is_resampled else None
    if grids is not None:
        patches = sum(rows * cols for rows, cols in grids)
        if total == patches + len(grids):
            return _placed(grids, leading=1)  # a class token before the patches of each image
        for merged in range(1, max(max(grid) for grid in grids) + 1):
            coarse = [(math.ceil(rows / merged), math.ceil(cols / merged)) for rows, cols in grids]
            if total == sum(rows * cols for rows, cols in coarse):
                return _placed(coarse)  # a token stands for merged x merged patches, at the border for fewer
        if "image_grid_thw" in inputs or "image_sizes" in inputs:
            raise _mismatch(total, count, patches)
    if count and total % count:
        raise _mismatch(total, count, None)
    side = math.isqrt(total // count) if count else 0
    if grids is None and not is_resampled and count and side * side * count == total:
        return _placed([(side, side)] * count)  # a square picture's feature map
    warnings.warn(
        f"Where the image tokens of {type(model).__name__} lie in the picture is unknown, so each image is shown as a "
        "single row of patches.",
        stacklevel=5,
    )
    lengths = [total // count] * count if count else _runs(columns)
    return _placed([(1, length) for length in lengths])


def _count_pictures(inputs: Mapping[str, Tensor]) -> int:
    """Number of images; 0 if the inputs do not tell, or join the parts of a picture in a way of their own."""
    if "image_grid_thw" in inputs:
        return len(inputs["image_grid_thw"])
    pixels = inputs.get("pixel_values")
    joins_parts = "image_sizes" in inputs and pixels is not None and pixels.ndim != 4
    return 0 if pixels is None or pixels.ndim not in (4, 5) or joins_parts else count_images(pixels)


def _placed(grids: Sequence[Grid], leading: int = 0) -> list[tuple[Grid, Sequence[int]]]:
    layouts: list[tuple[Grid, Sequence[int]]] = []
    end = 0
    for rows, cols in grids:
        start, end = end + leading, end + leading + rows * cols
        layouts.append(((rows, cols), range(start, end)))
    return layouts


def _anyres_layouts(config: Any, sizes: Tensor, total: int) -> list[tuple[Grid, Sequence[int]]]:
    """LLaVA-NeXT: a small picture, and one of its parts without their padding, with a token after every row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    layouts: list[tuple[Grid, Sequence[int]]] = []
    end = 0
    for size in sizes.tolist():
        parts = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tower.image_size)
        _, rows, cols = unpad_image(torch.empty(1, parts[0] * side, parts[1] * side, device="meta"), size).shape
        layouts.append(((side, side), range(end, end + side * side)))
        end += side * side
        layouts.append(((rows, cols), [end + row * (cols + 1) + col for row in range(rows) for col in range(cols)]))
        end += rows * (cols + 1)
    if end != total:
        raise _mismatch(total, len(sizes), end)
    return layouts


def _runs(columns: Sequence[int]) -> list[int]:
    """Lengths of the runs of neighboring columns."""
    starts = [0, *(n for n, (one, other) in enumerate(pairwise(columns), 1) if other > one + 1), len(columns)]
    return [end - start for start, end in pairwise(starts)]


def _mismatch(total: int, count: int, needed: int | None) -> ValueError:
    needs = f"{needed} patches" if needed is not None else "equally many tokens each"
    return ValueError(
        f"prompt has {total} image tokens but its {count} images have {needs}; put one image token per image into the "
        "text, and let the processor multiply it."
    )
