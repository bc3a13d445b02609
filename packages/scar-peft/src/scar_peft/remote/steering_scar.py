"""Sets how strongly concepts are pushed: until told otherwise, or inside a `with` block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn
from transformers.utils import logging

from .hook_scar import OVERRIDES, SteeringHook, _Override
from .strengths_scar import NOTHING, Strength, Wish, check_layers, check_request, read_amount, scale_to_strength

logger = logging.get_logger(__name__)


def steering_layers(model: nn.Module) -> list[SteeringHook]:
    """The layers of `model` that detect and steer.

    Raises:
        ValueError: there are none.
    """
    found: list[SteeringHook] = [module for module in model.modules() if isinstance(module, SteeringHook)]
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
            if strength is not None or rule not in (None, "scale"):
                raise ValueError(
                    'scale must be given without a strength and with no rule but "scale": it stands for both.'
                )
            strength, rule = scale_to_strength(scale), "scale"
        request: Mapping[str, Strength] = {steering: strength}
    elif scale is not None or strength is not None:
        raise ValueError(
            "strength and scale need the name of one concept, as in set_steering(model, 'toxicity', -1.0)."
        )
    else:
        request = steering or {}
    change = _Change(request, rule, mode, positions, forgets=steering is None)
    here, later = _overrides(model, change, temporary=True), _overrides(model, change, temporary=False)
    inside = OVERRIDES.get()
    if any(layer in inside for layer in here):  # a `steering` block is open, whose end must not undo this
        OVERRIDES.set({**inside, **here})
    for layer, override in later.items():
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
    change = _Change({**(steering or {}), **concepts}, rule, mode, positions)
    overrides = _overrides(model, change, temporary=True)
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
    wishes = NOTHING.updated(_Change(steering).at(layer, adapter), None)
    layer.keep(adapter, wishes, layer.plan_for(adapter, wishes))


class _Change(NamedTuple):
    """What a request changes."""

    steering: Mapping[str, Strength]
    rule: str | None = None
    mode: str | None = None
    positions: str | None = None
    forgets: bool = False
    """Whether nothing of what was wanted before stays."""

    def at(self, layer: SteeringHook, adapter: str) -> dict[str, Wish | None]:
        """The changes of one adapter at one layer."""
        changes: dict[str, Wish | None] = {}
        for concept in [name for name in self.steering if name in layer.concept_settings(adapter).concepts]:
            amount = read_amount(concept, self.steering[concept], layer.layer_index)
            wish = None if amount is None else Wish(amount=amount, rule=self.rule, positions=self.positions)
            changes[concept] = wish
        return changes

    def check(self, layers: Sequence[SteeringHook]) -> None:
        """Refuse names that no adapter of these layers has; warn of those that several have."""
        held: dict[str, set[str]] = {}
        for layer in layers:
            for adapter in layer.adapters_here():
                for concept in layer.concept_settings(adapter).concepts:
                    held.setdefault(concept, set()).add(adapter)
        check_request(self.steering, rule=self.rule, mode=self.mode, positions=self.positions, known=list(held))
        check_layers(self.steering, [layer.layer_index for layer in layers])
        in_use = {adapter for layer in layers for adapter in layer.adapters_in_use()}
        for concept in self.steering:
            if len(sharing := sorted(held[concept] & in_use)) > 1:
                logger.warning_once(
                    f'the adapters {sharing} share the concept "{concept}": strengths apply to each of them.'
                )


def _overrides(model: nn.Module, change: _Change, *, temporary: bool) -> dict[SteeringHook, _Override]:
    """What a request makes of every layer's wishes. Changes nothing yet, so that an error changes nothing.

    Args:
        model: any module tree.
        change: the request.
        temporary: whether it comes on top of what holds in this thread only.
    """
    layers = steering_layers(model)
    change.check(layers)
    found = {}
    for layer in layers:
        wishes = {}
        for adapter in layer.adapters_here():
            before = NOTHING if change.forgets else layer.wishes(adapter, temporary=temporary)
            wishes[adapter] = before.updated(change.at(layer, adapter), change.mode)
        found[layer] = _Override(wishes, {name: layer.plan_for(name, each) for name, each in wishes.items()})
    return found
