"""Classification of images: by a head, or by texts that the image is held against (CLIP, SigLIP)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batches_atman import tiled
from .classifying_atman import Task, head_facts, head_runner
from .errors_atman import UnsupportedModelError
from .hook_atman import active, in_this_thread
from .observing_atman import Observer, further_inputs
from .passages_atman import agree
from .prompts_atman import EncodedPrompt, ImageColumns

_MOST_LEADING = 16  # class tokens and registers before the patches


def reads_images(model: PreTrainedModel) -> bool:
    """Whether a model classifies images by a head."""
    return bool(model.main_input_name == "pixel_values")


def compares_texts(model: PreTrainedModel) -> bool:
    """Whether a model holds images against texts, as CLIP does."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def is_sigmoid(model: PreTrainedModel) -> bool:
    """Whether a model of images and texts judges every text on its own, as SigLIP does."""
    return hasattr(model, "logit_bias")


def image_task(model: PreTrainedModel, processor: Any, inputs: Any) -> Task:
    """Prepare an image for a model with a classification head.

    Raises:
        ValueError: `inputs` is no image, or several.
        UnsupportedModelError: the model's attention does not have one key per patch, or the model has no such head.
    """
    pixels = _pixels(model, processor, inputs)

    run = head_runner(model, lambda n: model(**tiled(pixels, n)))
    logits, columns = _observe(model, pixels, run)
    return Task(run=run, **columns, **head_facts(model, logits))


def text_image_task(
    model: PreTrainedModel, processor: Any, inputs: Any, label: Any, candidates: Sequence[str] | None
) -> Task:
    """Prepare an image and texts for a model that compares them; the texts are the classes.

    Args:
        model: CLIP, SigLIP or another of their kind.
        processor: for image and texts. None: `inputs` holds all tensors.
        inputs: the image, or a mapping with its tensors and perhaps the texts' `input_ids`.
        label: the text, if there are no candidates.
        candidates: texts to choose from.

    Raises:
        ValueError: image or texts are missing.
        UnsupportedModelError: the model does not compare them by the cosine of their features.
    """
    pixels = _pixels(model, processor, inputs)
    texts, names = _texts(model, processor, inputs, label, candidates)
    plain = model(**pixels, **texts)
    compare = _comparison(model, plain)

    def run(n: int) -> Tensor:
        found = model.get_image_features(**tiled(pixels, n))
        return compare(found if isinstance(found, Tensor) else found.pooler_output)

    logits, columns = _observe(model, pixels, run)
    if not agree(logits, plain.logits_per_image[0], model.dtype):
        raise _no_cosine(model)
    has_alternatives = len(names) > 1 or (candidates is not None and is_sigmoid(model))
    return Task(run=run, logits=logits, names=names, has_alternatives=has_alternatives, **columns)


def _comparison(model: PreTrainedModel, plain: Any) -> Callable[[Tensor], Tensor]:
    """What turns features of images [n, D] into logits [n, K]; the texts are run once."""
    texts, scale = getattr(plain, "text_embeds", None), getattr(model, "logit_scale", None)
    if texts is None or scale is None:
        raise _no_cosine(model)
    wide = torch.float64 if texts.dtype == torch.float64 else torch.float32
    texts, scale = texts.to(wide), scale.to(texts.device, wide).exp()
    bias = model.logit_bias.to(texts.device, wide) if is_sigmoid(model) else 0.0

    def compare(features: Tensor) -> Tensor:
        features = features.to(texts.device, wide)
        return features / features.norm(dim=-1, keepdim=True) @ texts.T * scale + bias

    return compare


def _no_cosine(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} does not compare image and text by the cosine of their features, as CLIP and "
        "SigLIP do."
    )


def _pixels(model: PreTrainedModel, processor: Any, inputs: Any) -> dict[str, Tensor]:
    """The tensors of one image, on the model's device."""
    if isinstance(inputs, Tensor) and processor is None:
        inputs = {"pixel_values": inputs[None] if inputs.ndim == 3 else inputs}
    elif not isinstance(inputs, Mapping):
        if processor is None:
            raise ValueError(
                f"inputs is {type(inputs).__name__}, which needs a processor, got processor=None; pass the model's "
                "image processor, or pixel_values."
            )
        inputs = processor(images=inputs, return_tensors="pt")
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    tensors = {name: torch.as_tensor(inputs[name]) for name in names if name in inputs}
    if "pixel_values" not in tensors:
        raise ValueError(f"inputs must be an image or a mapping with 'pixel_values', got {sorted(inputs)}.")
    shape = list(tensors["pixel_values"].shape)
    if shape[0] != 1:
        raise ValueError(f"inputs must be one image, got pixel_values of shape {shape}; explain images one by one.")
    return further_inputs(tensors, model)


def _texts(
    model: PreTrainedModel, processor: Any, inputs: Any, label: Any, candidates: Sequence[str] | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors [K, ...] of the texts, and the texts."""
    if isinstance(candidates, str) or (candidates is not None and len(candidates) == 0):
        raise ValueError(f"candidates must be a list of at least one text, got {candidates!r}.")
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        count = len(inputs["input_ids"])
        names = tuple(candidates) if candidates is not None else tuple(f"text {index}" for index in range(count))
        if len(names) != count:
            raise ValueError(f"candidates has {len(names)} texts, but inputs holds the input_ids of {count}.")
        encoded = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    else:
        if candidates is None and not isinstance(label, str):
            raise ValueError(f"label must be a text if there are no candidates to choose from, got {label!r}.")
        if processor is None:
            raise ValueError("label and candidates are texts, which need a processor, got processor=None.")
        names = (label,) if candidates is None else tuple(candidates)
        length = model.config.text_config.max_position_embeddings
        # SigLIP learned from texts that are padded to its full length
        padding = {"padding": "max_length", "max_length": length} if is_sigmoid(model) else {"padding": True}
        encoded = processor(text=list(names), return_tensors="pt", truncation=True, **padding)
    return {name: torch.as_tensor(tensor).to(model.device) for name, tensor in encoded.items()}, names


def _observe(
    model: PreTrainedModel, pixels: dict[str, Tensor], run: Callable[[int], Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Run plainly: logits [C], and the fields of a `Task` that tell patches from other columns.

    Similarity of patches is that of their hidden states as they enter the last layer: colors alone say little.
    """
    observer = Observer()
    with active(observer):
        (logits,) = run(1)
    grid, leading = _locate_patches(model, pixels, observer)
    T = observer.lengths[0][1]
    columns = range(leading, leading + grid[0] * grid[1])
    changeable = torch.zeros(T, dtype=torch.bool)
    changeable[list(columns)] = True
    layers = zip(observer.called, observer.lengths, strict=True)
    features = _input_of([module for module, (queries, keys) in layers if queries == keys][-1], run)  # [T, D]
    prompt = EncodedPrompt(
        input_ids=(), tokens=(), special=(), images=(ImageColumns(columns=tuple(columns), grid=grid),)
    )
    return logits, {
        "prompt": prompt,
        "modules": tuple(observer.called),
        "embeds": features * changeable[:, None].to(features.device),  # a row of zeros is similar to none
        "changeable": changeable,
    }


def _locate_patches(
    model: PreTrainedModel, pixels: dict[str, Tensor], observer: Observer
) -> tuple[tuple[int, int], int]:
    """The grid of patches, and how many other columns stand before them."""
    if not observer.called:
        raise UnsupportedModelError(
            f"{type(model).__name__} ran without calling attention through transformers' interface, so nothing can be "
            "suppressed; a model without attention, or with its own, cannot be explained this way."
        )
    keys = sorted({keys for _, keys in observer.lengths})
    size = getattr(getattr(model.config, "vision_config", model.config), "patch_size", None)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    values = pixels["pixel_values"]
    if "spatial_shapes" in pixels:  # patches come in a row, padded to a fixed length
        rows, columns = pixels["spatial_shapes"][0].tolist()
        patches = values.shape[1]
    elif values.ndim == 4 and height and width:
        rows, columns = values.shape[2] // height, values.shape[3] // width
        patches = rows * columns
    else:
        patches = -1
    leading = keys[0] - patches
    if patches < 1 or len(keys) > 1 or not 0 <= leading <= _MOST_LEADING:
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention with {', '.join(map(str, keys))} keys for an image of shape "
            f"{list(values.shape[1:])} and patch size {size}, but one key per patch is needed: attention within "
            "windows or to merged patches cannot be explained this way."
        )
    return (rows, columns), leading


def _input_of(module: nn.Module, run: Callable[[int], Tensor]) -> Tensor:
    """What enters an attention module in a plain run of one row, [T, D]."""
    seen: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(in_this_thread(look), with_kwargs=True)
    try:
        run(1)
    finally:
        handle.remove()
    return seen[0][0]
