"""Sets how strongly concepts are pushed: until told otherwise, or inside a `with` block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from transformers.utils import logging

from .hook_scar import OVERRIDES, SteeringHook, _Override
from .strengths_scar import NOTHING, Strength, Wish, Wishes, check_request, read_amount, scale_to_strength

logger = logging.get_logger(__name__)


def steering_layers(model: nn.Module) -> list[SteeringHook]:
    """The layers of `model` that detect and steer.

    Raises:
        ValueError: there are none.
    """
    found = [module for module in model.modules() if isinstance(module, SteeringHook)]
    if not found:
        raise ValueError(
            f"model must hold SCAR layers, got a {type(model).__name__} without any. "
            "Add an adapter with get_peft_model or PeftModel.from_pretrained."
        )
    return found


def set_steering(
    model: nn.Module,
    steering: str | Mapping[str, Strength] | None = None,
    strength: Strength = None,
    *,
    scale: float | None = None,
    rule: str | None = None,
    mode: str | None = None,
    positions: str | None = None,
) -> None:
    """Steer from now on, until the next call; concepts that are not named stay as they are.

    Args:
        model: any model that holds SCAR layers.
        steering: a concept's name, or strengths by name; None makes every concept neutral again.
        strength: of the one concept that `steering` names: a number, one number per row of the batch, or either by
            layer index. None is neutral.
        scale: instead of `strength`: the factor of the rule "scale" as the original counts it (1 changes nothing).
        rule: "scale", "set", "add" or "add_gated". None: the adapter's own.
        mode: "residual" or "reconstruct". None: the adapter's own.
        positions: "all", "generated" or "prompt". None: the adapter's own.

    Raises:
        ValueError: an unknown concept, rule, mode or position; a strength that is not finite.

    Example:
        >>> set_steering(model, "toxicity", -1.0)
        >>> set_steering(model, {"toxicity": -1.0, "formal": 0.5}, rule="add")
        >>> set_steering(model, None)
    """
    if isinstance(steering, str):
        if scale is not None:
            strength, rule = scale_to_strength(scale), "scale"
        request: Mapping[str, Strength] = {steering: strength}
    elif scale is not None or strength is not None:
        raise ValueError("strength and scale need the name of one concept, as in set_steering(model, 'toxicity', -1.0).")
    else:
        request = steering or {}
    start = NOTHING if steering is None else None
    for layer, override in _overrides(model, request, rule, mode, positions, start).items():
        for adapter, wishes in override.wishes.items():
            layer.keep(adapter, wishes, override.plans[adapter])


@contextmanager
def steering(
    model: nn.Module,
    steering: Mapping[str, Strength] | None = None,
    *,
    rule: str | None = None,
    mode: str | None = None,
    positions: str | None = None,
    **concepts: Strength,
) -> Iterator[None]:
    """Steer inside a `with` block, in this thread or task; what held before holds again behind it, errors or not.

    Args:
        model: any model that holds SCAR layers, a pipeline's model included.
        steering: strengths by concept; also as keyword arguments. Blocks inside blocks change what they name.
        rule: "scale", "set", "add" or "add_gated". None: the adapter's own.
        mode: "residual" or "reconstruct". None: the adapter's own.
        positions: "all", "generated" or "prompt". None: the adapter's own.

    Raises:
        ValueError: as `set_steering`.

    Example:
        >>> with steering(model, toxicity=-1.0, rule="add"):
        ...     pipe("...")
    """
    overrides = _overrides(model, {**(steering or {}), **concepts}, rule, mode, positions)
    token = OVERRIDES.set({**OVERRIDES.get(), **overrides})
    for layer in overrides:
        layer.refresh()
    try:
        yield
    finally:
        OVERRIDES.reset(token)
        for layer in overrides:
            layer.refresh()


def start_steering(layer: SteeringHook, adapter: str, steering: Mapping[str, Strength]) -> None:
    """Give a new adapter of one layer its first strengths."""
    concepts = layer.concept_settings(adapter).concepts
    wishes = NOTHING.updated(_changes(layer, concepts, steering, None, None), None)
    layer.keep(adapter, wishes, layer.plan_for(adapter, wishes))


def _changes(
    layer: SteeringHook, concepts: Sequence[str], request: Mapping[str, Strength], rule: str | None, positions: str | None
) -> dict[str, Wish | None]:
    """What a request wants of these concepts at a layer."""
    changes: dict[str, Wish | None] = {}
    for concept in [name for name in request if name in concepts]:
        amount = read_amount(concept, request[concept], layer.layer_index)
        changes[concept] = None if amount is None else Wish(amount=amount, rule=rule, positions=positions)
    return changes


def _overrides(
    model: nn.Module,
    request: Mapping[str, Strength],
    rule: str | None,
    mode: str | None,
    positions: str | None,
    start: Wishes | None = None,
) -> dict[SteeringHook, _Override]:
    """What the request makes of every layer's wishes, or of `start`. Changes nothing, so that an error changes nothing."""
    layers = steering_layers(model)
    names = {adapter: layer.concept_settings(adapter).concepts for layer in layers for adapter in layer.adapters_here()}
    known = [name for concepts in names.values() for name in concepts]
    check_request(request, rule=rule, mode=mode, positions=positions, known=known)
    for concept in request:
        if len(holders := [adapter for adapter, concepts in names.items() if concept in concepts]) > 1:
            logger.warning_once(f'the adapters {holders} share the concept "{concept}": strengths apply to each of them.')
    found = {}
    for layer in layers:
        wishes = {}
        for adapter in layer.adapters_here():
            changes = _changes(layer, names[adapter], request, rule, positions)
            wishes[adapter] = (layer.wishes(adapter) if start is None else start).updated(changes, mode)
        plans = {adapter: layer.plan_for(adapter, each) for adapter, each in wishes.items()}
        found[layer] = _Override(wishes, plans)
    return found
