"""Prompts and targets in all their forms, text, ids or batches, turned into ids that know their place in the text."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .placing_atman import Placed, decode, place_expanded, place_ids, place_text, tokenizer_of
from .sequences_atman import mapping_rows, sequences

_seam_was_reported = False


@dataclass(frozen=True, kw_only=True)
class ImageColumns:
    """Where the patches of one image stand in the model's input sequence."""

    columns: tuple[int, ...]
    """Column of every patch, row by row."""

    grid: tuple[int, int]
    """Rows and columns of patches."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """One prompt without padding: ids, and for each the piece of text it stands for."""

    input_ids: tuple[int, ...]
    """`[P]` ids, special tokens included."""

    text: str | None = None
    """The prompt as given, or decoded from the ids that were given. None: ids without a tokenizer."""

    tokens: tuple[str, ...]
    """`[P]` texts to show; `<id>` without a tokenizer. The bytes of one character all show that character."""

    spans: tuple[tuple[int, int], ...] | None = None
    """`[P]` characters of `text`, end exclusive; empty for what is not in the text. None: unknown."""

    word_ids: tuple[int | None, ...] | None = None
    """`[P]` numbers of the tokenizer's words. None: unknown."""

    special: tuple[bool, ...]
    """`[P]` True for the start, end, padding and control tokens, and for what a processor put around an image; False
    for the places of its patches."""

    images: tuple[ImageColumns, ...] = ()
    """One entry per image; empty until a model has told where they are."""

    model_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs of this one row, batch dimension first."""


def encode_prompts(processor: Any, prompt: Any, *, images: Any = None) -> tuple[list[EncodedPrompt], bool]:
    """Encode one prompt or a batch of prompts, each on its own, without padding.

    Args:
        processor: a tokenizer, a processor that has one, or None if every prompt consists of ids.
        prompt: a text, a list or 1-D tensor of ids; a list of those or a 2-D tensor; or a mapping with `input_ids`,
            whose padding is taken off and whose other tensors are kept. A mapping with one row is a single prompt.
        images: an image or a list of them for a single prompt; a list with an entry per prompt for a batch.

    Returns:
        The prompts, and whether a single one was given.

    Raises:
        ValueError: a prompt is empty, is neither text nor ids, needs a tokenizer, or does not fit its images.
    """
    tokenizer = tokenizer_of(processor)
    if isinstance(prompt, Mapping):
        if images is not None:
            raise ValueError(
                "images must be None if prompt is a mapping; put the processor's tensors into the mapping."
            )
        rows = mapping_rows(prompt, "prompt")
        is_single = len(rows) == 1
        return [_prompt_from_ids(processor, ids, inputs) for ids, inputs in rows], is_single
    items, is_single = sequences(prompt, "prompt")
    if processor is None and images is not None:
        raise ValueError("images need a processor that takes them, got processor=None; pass the model's processor.")
    if tokenizer is None and any(isinstance(item, str) for item in items):
        raise ValueError("prompt is text, which needs a tokenizer, got processor=None; pass a tokenizer or token ids.")
    pictures = _images_by_prompt(images, len(items), is_single)
    return [_encode_prompt(processor, item, row) for item, row in zip(items, pictures, strict=True)], is_single


def encode_targets(
    processor: Any, target: Any, prompts: Sequence[EncodedPrompt], is_single: bool, *, check_seam: bool = True
) -> list[tuple[int, ...]]:
    """Encode the continuation of every prompt, without special tokens and apart from its prompt.

    Warns once per process if a tokenizer would cut prompt and target differently when given both as one text.

    Args:
        processor: as for `encode_prompts`.
        target: a text or ids for a single prompt; a list with an entry per prompt for a batch.
        prompts: what `encode_prompts` returned.
        is_single: likewise.
        check_seam: False for models that read the prompt and write the target in different places.

    Raises:
        ValueError: a target is empty, is neither text nor ids, or their number is not that of the prompts.
    """
    tokenizer = tokenizer_of(processor)
    if isinstance(target, Mapping):
        rows = [ids for ids, _ in mapping_rows(target, "target")]
        items, is_one = list[str | tuple[int, ...]](rows), len(rows) == 1
    else:
        items, is_one = sequences(target, "target")
    if is_one and not is_single and len(prompts) > 1:
        raise ValueError(f"target is a single one but prompt is a batch of {len(prompts)}; give a list of targets.")
    if len(items) != len(prompts):
        raise ValueError(f"target has {len(items)} entries but prompt has {len(prompts)}; give one target per prompt.")
    return [_encode_target(tokenizer, *pair, check_seam) for pair in zip(items, prompts, strict=True)]


def token_texts(processor: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of every id on its own, or its name if it has none; `<id>` if there is no tokenizer to ask."""
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        return tuple(f"<{index}>" for index in ids)
    return tuple(_token_text(tokenizer, index) for index in ids)


def image_token_ids(processor: Any) -> frozenset[int]:
    """Return the ids that keep places for the patches of images."""
    tokenizer = tokenizer_of(processor)
    found = {getattr(part, "image_token_id", None) for part in (processor, tokenizer)}
    around = {getattr(tokenizer, role, None) for role in ("boi_token_id", "eoi_token_id")}
    return frozenset(index for index in found - around if isinstance(index, int))


def _token_text(tokenizer: Any, index: int) -> str:
    try:
        return decode(tokenizer, [index]) or tokenizer.convert_ids_to_tokens(index) or f"<{index}>"
    except ValueError:  # models may have more rows than the tokenizer has tokens
        return f"<{index}>"


def _encode_prompt(processor: Any, item: str | tuple[int, ...], images: list[Any]) -> EncodedPrompt:
    if not isinstance(item, str):
        if images:
            raise ValueError("images need a prompt that is text, got token ids; pass the processor's output as prompt.")
        return _prompt_from_ids(processor, item, {})
    plain = place_text(tokenizer_of(processor), item)
    if not images:
        return _prompt(processor, plain, item, {})
    if processor is tokenizer_of(processor):
        raise ValueError(f"images need a processor that takes them, got the tokenizer {type(processor).__name__}.")
    ((ids, inputs),) = mapping_rows(processor(text=item, images=images, return_tensors="pt"), "prompt")
    return _prompt(processor, place_expanded(plain, ids), item, inputs)


def _prompt_from_ids(processor: Any, ids: tuple[int, ...], inputs: dict[str, Tensor]) -> EncodedPrompt:
    tokenizer = tokenizer_of(processor)
    text, placed = (None, Placed(ids)) if tokenizer is None else place_ids(tokenizer, ids)
    return _prompt(processor, placed, text, inputs)


def _prompt(processor: Any, placed: Placed, text: str | None, inputs: dict[str, Tensor]) -> EncodedPrompt:
    if not placed.ids:
        raise ValueError(f"prompt must not be empty, got {text!r}, which has no tokens.")
    control, patches = _special_ids(processor), image_token_ids(processor)
    return EncodedPrompt(
        input_ids=placed.ids,
        text=text,
        tokens=_texts_in_place(processor, placed, text),
        spans=placed.spans,
        word_ids=placed.word_ids,
        special=tuple(
            index not in patches and (index in control or column in placed.inserted)
            for column, index in enumerate(placed.ids)
        ),
        model_inputs=inputs,
    )


def _texts_in_place(processor: Any, placed: Placed, text: str | None) -> tuple[str, ...]:
    """Return what to show for every token: its part of the text, which shows more than the token does alone."""
    if placed.spans is None or text is None:
        return token_texts(processor, placed.ids)
    tokenizer = tokenizer_of(processor)
    pairs = zip(placed.spans, placed.ids, strict=True)
    return tuple(text[start:end] or _token_text(tokenizer, index) for (start, end), index in pairs)


def _special_ids(processor: Any) -> frozenset[int]:
    """Return the ids of control tokens. The unknown token stands for text, unless it has another role as well."""
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        return frozenset()
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
    named = {getattr(tokenizer, role, None) for role in roles}
    unknown = {getattr(tokenizer, "unk_token_id", None)} - named
    return frozenset((added | set(tokenizer.all_special_ids)) - unknown)


def _encode_target(
    tokenizer: Any, item: str | tuple[int, ...], prompt: EncodedPrompt, check_seam: bool
) -> tuple[int, ...]:
    if not isinstance(item, str):
        return item
    if tokenizer is None:
        raise ValueError("target is text, which needs a tokenizer, got processor=None; pass a tokenizer or token ids.")
    ids = _plain_ids(tokenizer, item)
    if not ids:
        raise ValueError(f"target must not be empty, got {item!r}, which has no tokens.")
    if check_seam and prompt.text is not None:
        _check_seam(tokenizer, prompt.text, item, ids)
    return ids


def _check_seam(tokenizer: Any, text: str, target: str, target_ids: tuple[int, ...]) -> None:
    global _seam_was_reported
    if _seam_was_reported:
        return
    before, together = _plain_ids(tokenizer, text), _plain_ids(tokenizer, text + target)
    if before + target_ids == together:
        return
    implies_space = not text[-1].isspace() and not target[0].isspace()  # as most tokenizers do that cut whole words
    if implies_space and before + target_ids == _plain_ids(tokenizer, f"{text} {target}"):
        return
    _seam_was_reported = True
    remedy = "move the border, for example a space from the end of the prompt to the start of the target"
    if before + _plain_ids(tokenizer, target.lstrip()) == together:
        remedy = f"pass target={target.lstrip()!r}, whose ids follow the prompt as they would in one text"
    elif together[: len(before)] == before:
        remedy = f"pass target={list(together[len(before) :])} to explain the ids of the joined text"
    warnings.warn(
        f"The tokenizer gives {list(target_ids)} for the target {target!r}, but cuts it differently when it "
        f"follows the prompt. The target's own ids are used; {remedy}. This is reported once.",
        stacklevel=4,
    )


def _plain_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _images_by_prompt(images: Any, count: int, is_single: bool) -> list[list[Any]]:
    if images is None:
        return [[] for _ in range(count)]
    if is_single:
        return [_image_list(images)]
    if not isinstance(images, (list, tuple)) or len(images) != count:
        given = len(images) if isinstance(images, (list, tuple)) else type(images).__name__
        raise ValueError(f"images must be a list with an entry for each of the {count} prompts, got {given}.")
    return [_image_list(row) for row in images]


def _image_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]
