"""From what a user asks for, {"toxicity": -1.0}, to the strengths that one layer applies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .settings_scar import MODES, POSITIONS, RULES, ConceptSettings

Amount: TypeAlias = float | Sequence[float] | Tensor | None
Strength: TypeAlias = Amount | Mapping[int, Amount]
"""One number, or one per row of the batch, or either by layer index; None is neutral."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted of one concept at one layer. None: the adapter's own setting."""

    amount: float | tuple[float, ...]
    rule: str | None = None
    positions: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is wanted of one layer of one adapter."""

    concepts: Mapping[str, Wish]
    mode: str | None = None

    def updated(self, changes: Mapping[str, Wish | None], mode: str | None) -> "Wishes":
        """These wishes with some replaced, and those of None gone."""
        merged = {**self.concepts, **changes}
        concepts = {name: wish for name, wish in merged.items() if wish is not None}
        return Wishes(concepts=concepts, mode=self.mode if mode is None else mode)


NOTHING = Wishes(concepts={})


@dataclass(frozen=True, eq=False)
class Group:
    """Concepts of one adapter that are changed by the same rule at the same positions."""

    concepts: tuple[int, ...]
    rule: str
    positions: str
    skips_first_token: bool
    values: Tensor
    """Strengths [S, C] of the S equal parts of a batch's rows."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What one adapter does at one layer."""

    mode: str
    groups: tuple[Group, ...]

    @property
    def is_neutral(self) -> bool:
        """Whether activations stay as they are."""
        return self.mode == "residual" and len(self.groups) == 0  # torch.compile cannot negate a tuple


def check_request(
    steering: Mapping[str, Strength], *, rule: str | None, mode: str | None, positions: str | None, known: Sequence[str]
) -> None:
    """Refuse names that do not exist.

    Raises:
        ValueError: an unknown concept, rule, mode or choice of positions; the message lists what there is.
    """
    if unknown := sorted(set(steering) - set(known)):
        raise ValueError(f"steering must name concepts of the adapter, {sorted(set(known))}, got {unknown}.")
    for name, value, allowed in (("rule", rule, RULES), ("mode", mode, MODES), ("positions", positions, POSITIONS)):
        if value is not None and value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    if not steering and not (rule is None and positions is None):
        raise ValueError("rule and positions need strengths to go with, as in steering={'toxicity': -1.0}.")


def check_layers(steering: Mapping[str, Strength], layers: Sequence[int]) -> None:
    """Refuse strengths by layer for layers that are not there.

    Raises:
        ValueError: the message names both.
    """
    for concept, strength in steering.items():
        if isinstance(strength, Mapping) and (unknown := [index for index in strength if index not in layers]):
            raise ValueError(
                f'steering["{concept}"] must name layers of the adapter, {sorted(set(layers))}, got {unknown}.'
            )


def read_amount(concept: str, strength: Strength, layer: int) -> float | tuple[float, ...] | None:
    """The strength of `concept` at a layer: a number, one number per row, or None for neutral.

    Raises:
        ValueError: something else than finite numbers; or rows in more than one dimension.
    """
    if isinstance(strength, Mapping):
        strength = strength.get(layer)
    if strength is None:
        return None
    numbers = _numbers(strength)
    if numbers is None or numbers.ndim > 1 or not numbers.numel():
        got = f"{strength!r}" if numbers is None else f"the shape {tuple(numbers.shape)}"
        raise ValueError(f'steering["{concept}"] must be a number, or one number per row of the batch, got {got}.')
    if not bool(numbers.isfinite().all()):
        raise ValueError(f'steering["{concept}"] must be finite, got {numbers.tolist()}.')
    return tuple(numbers.tolist()) if numbers.ndim else float(numbers)


def make_plan(wishes: Wishes, settings: ConceptSettings, device: torch.device, dtype: torch.dtype) -> Plan:
    """Group one layer's wishes by rule and positions.

    Strengths that change nothing are dropped, so a neutral wish costs nothing and returns activations bit for bit.

    Raises:
        ValueError: the concepts' strengths are for different numbers of rows.
    """
    filled = {
        name: replace(wish, rule=wish.rule or settings.rule, positions=wish.positions or settings.positions)
        for name, wish in wishes.concepts.items()
    }
    kinds: dict[tuple[str, str], list[tuple[int, Wish]]] = {}
    for index, name in enumerate(settings.concepts):
        if name in filled and not _is_neutral(filled[name]):
            wish = filled[name]
            kinds.setdefault((str(wish.rule), str(wish.positions)), []).append((index, wish))
    groups = tuple(
        Group(
            concepts=tuple(index for index, _ in members),
            rule=rule,
            positions=positions,
            skips_first_token=settings.skips_first_token(rule),
            values=_table([wish.amount for _, wish in members], device, dtype),
        )
        for (rule, positions), members in sorted(kinds.items(), key=lambda kind: kind[0])
    )
    return Plan(mode=wishes.mode or settings.mode, groups=groups)


def overwrite(live: Plan, new: Plan) -> bool:
    """Write the strengths of `new` into the tensors of `live`, if both have the same form; else change nothing."""
    if live.mode != new.mode or [_form(group) for group in live.groups] != [_form(group) for group in new.groups]:
        return False
    for old, group in zip(live.groups, new.groups, strict=True):
        old.values.copy_(group.values)
    return True


def parts_of(values: Tensor, batch: int) -> Tensor:
    """`values` [S, C], after checking that a batch of so many rows has S equal parts.

    Raises:
        ValueError: it has not; the message names both sizes.
    """
    if values.shape[0] > 1 and batch % values.shape[0]:
        raise ValueError(
            f"steering must give one strength per row of the batch, got {values.shape[0]} strengths for {batch} rows."
        )
    return values


def _numbers(strength: Any) -> Tensor | None:
    """A tensor of numbers, or None for something else."""
    if isinstance(strength, (bool, str)) or (isinstance(strength, Tensor) and strength.dtype == torch.bool):
        return None
    try:
        return torch.as_tensor(strength, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        return None


def _is_neutral(wish: Wish) -> bool:
    amounts = wish.amount if isinstance(wish.amount, tuple) else (wish.amount,)
    return wish.rule != "set" and all(amount == 0 for amount in amounts)


def _table(amounts: list[float | tuple[float, ...]], device: torch.device, dtype: torch.dtype) -> Tensor:
    rows = {len(amount) for amount in amounts if isinstance(amount, tuple)} - {1}
    if len(rows) > 1:
        raise ValueError(f"steering must give every concept strengths for as many rows, got {sorted(rows)} rows.")
    count = max(rows, default=1)
    columns = [amount if isinstance(amount, tuple) else (amount,) for amount in amounts]
    table = [column * count if len(column) == 1 else column for column in columns]
    with torch.inference_mode(False):  # so that later strengths can be written into it, in any mode
        return torch.tensor(table, dtype=dtype, device=device).T.contiguous()


def _form(group: Group) -> tuple[Any, ...]:
    values = group.values
    return (group.concepts, group.rule, group.positions, group.skips_first_token, values.shape, values.device)


def scale_to_strength(scale: float) -> float:
    """The strength of the rule "scale" that multiplies a latent by `scale`: 0 strength is a factor of 1."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}.")
    return scale - 1.0
