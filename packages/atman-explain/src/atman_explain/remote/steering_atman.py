"""Steering: run and generate with parts of the prompt weakened or strengthened."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_atman import AtManConfig, Mode, check_factor
from .hook_atman import active, active_interventions
from .prompts_atman import EncodedPrompt, encode_prompts
from .routes_atman import Router
from .suppressing_atman import SuppressedColumns
from .switching_atman import atman_implementation, base_model
from .units_atman import columns_of_span, find_spans, overlap_factor


class Steering(SuppressedColumns):
    """Factors of prompts that a model reads, and then continues with factor 1."""


@contextlib.contextmanager
def steer(
    model: nn.Module,
    processor: Any = None,
    prompt: Any = None,
    weights: Mapping[Any, float] | None = None,
    *,
    factors: Any = None,
    images: Any = None,
    mode: Mode = "shift_min",
    overlap: Literal["complete", "partial"] = "complete",
    occurrence: int | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[None]:
    """Weaken or strengthen parts of a prompt for every forward pass in this context, `generate` included.

    New tokens have factor 1. Caches, beams, several returned sequences and padding on either side are fine. Contexts
    can be nested: factors multiply. A thread started inside does not inherit the context: start it with
    `contextvars.copy_context().run`.

    Args:
        model: a transformers model with attention, in eval mode or without attention dropout.
        processor: its tokenizer or processor; not needed with ids and `factors`.
        prompt: the prompt that the model is going to read, or a list of prompts, one per row of the batch.
        weights: factors of parts of the prompt, by text ("soccer": all occurrences) or characters ((0, 6)): 0 removes
            as far as `mode` can, 1 changes nothing, 3 strengthens. Parts that share a token multiply.
        factors: instead of `weights`: one factor per token, [P] or [rows, P].
        images: the prompt's images, where it has some.
        mode: how scores are changed; see `AtManConfig`. "log_additive" multiplies attention weights by the factor.
        overlap: tokens that a part covers partly get its factor ("complete") or a share of it ("partial").
        occurrence: which occurrence of a text is meant, counted from 0. None: all.
        layers: layers in which attention is changed. None: all.
        heads: query heads in which attention is changed. None: all.

    Raises:
        ValueError: a factor is negative or not finite, a text is not in the prompt, or a setting is unknown.
        UnsupportedModelError: the model's attention cannot be reached.

    Example:
        >>> with steer(model, tokenizer, prompt, {"soccer": 0.0, "math": 3.0}, mode="log_additive"):
        ...     out = model.generate(**tokenizer(prompt, return_tensors="pt"))

    Source: docs.aleph-alpha.com, "Attention manipulation".
    """
    config = AtManConfig(mode=mode, overlap=overlap, layers=_as_tuple(layers), heads=_as_tuple(heads))
    base = base_model(model)
    rows = _factor_rows(factors) if weights is None else None
    prompts: list[EncodedPrompt] = []
    if prompt is not None:
        prompts, _ = encode_prompts(processor, prompt, images=images)
    if weights is not None:
        if not prompts:
            raise ValueError("weights need the prompt that they are parts of; pass prompt=.")
        rows = _stack([_weighted(each, weights, overlap, occurrence) for each in prompts])
    assert rows is not None
    with atman_implementation(base):
        modules = Router(base).steered_modules(config, prompts[0].input_ids if prompts else (0,))
        with active(_combined(Steering(modules, rows, config.mode, config.heads))):
            yield


def _weighted(prompt: EncodedPrompt, weights: Mapping[Any, float], overlap: str, occurrence: int | None) -> Tensor:
    """Factors [P] of one prompt, float64."""
    row = torch.ones(len(prompt.input_ids), dtype=torch.float64)
    for part, factor in weights.items():
        check_factor(f"weights[{part!r}]", factor)
        for span in find_spans(prompt.text or "", part, occurrence) if isinstance(part, str) else [part]:
            columns, shares = columns_of_span(prompt, span, overlap)
            for column, share in zip(columns, shares or (1.0,) * len(columns), strict=True):
                row[column] *= overlap_factor(factor, share)
    return row


def _factor_rows(factors: Any) -> Tensor:
    if factors is None:
        raise ValueError('weights or factors must be given, for example weights={"soccer": 0.0}.')
    rows = torch.as_tensor(factors, dtype=torch.float64)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(f"factors must be [P] or [rows, P], one per token of the prompt, got {list(rows.shape)}.")
    if not (rows.isfinite() & (rows >= 0)).all():
        raise ValueError("factors must be finite and not negative, got negative, infinite or NaN ones.")
    return rows


def _stack(rows: Sequence[Tensor]) -> Tensor:
    longest = max(map(len, rows))
    return torch.stack([F.pad(row, (0, longest - len(row)), value=1.0) for row in rows])


def _combined(steering: Steering) -> Steering:
    """Multiply with the factors of the steering around this one, if it acts on the same model."""
    outer = next((each for each in active_interventions() if isinstance(each, Steering)), None)
    if outer is None or not set(outer.modules or ()) & set(steering.modules or ()):
        return steering
    if (outer.mode, outer.modules, outer.heads) != (steering.mode, steering.modules, steering.heads):
        raise ValueError(
            f"mode, layers and heads of nested steer contexts must be the same, got mode={steering.mode!r} inside "
            f"{outer.mode!r}."
        )
    longest = max(outer.factors.shape[1], steering.factors.shape[1])
    one, other = (F.pad(f, (0, longest - f.shape[1]), value=1.0) for f in (outer.factors, steering.factors))
    if one.shape[0] != other.shape[0] and 1 not in (one.shape[0], other.shape[0]):
        raise ValueError(f"Nested steer contexts have {one.shape[0]} and {other.shape[0]} rows of factors.")
    return Steering(steering.modules, one.to(other.device, other.dtype) * other, steering.mode, steering.heads)


def _as_tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
