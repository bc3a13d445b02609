"""What was asked for: one value per edit for everything, checked before any model runs."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """The settings of E simultaneous edits, one entry each."""

    scales: tuple[float, ...]
    """s_e, negative where the direction is reversed."""

    warmups: tuple[int, ...]
    """First step on which the edit acts, counted from 0 over the kept steps."""

    cooldowns: tuple[int | None, ...]
    """First step on which it no longer acts; None: it acts to the end."""

    thresholds: tuple[float, ...]
    """lambda: the share of positions that a mask leaves out."""

    def __len__(self) -> int:
        return len(self.scales)

    def active(self, step: int) -> tuple[int, ...]:
        """Which edits act on this step."""
        ends = (math.inf if c is None else c for c in self.cooldowns)
        return tuple(e for e, (w, c) in enumerate(zip(self.warmups, ends, strict=True)) if w <= step < c)

    def first_active(self, steps: int) -> int:
        """The first step on which any edit acts; `steps` if none does."""
        return next((k for k in range(steps) if self.active(k)), steps)


def plan_edits(
    count: int,
    *,
    reverse_editing_direction: Any = False,
    edit_guidance_scale: Any = 5.0,
    edit_warmup_steps: Any = 0,
    edit_cooldown_steps: Any = None,
    edit_threshold: Any = 0.9,
) -> EditPlan:
    """Spread the arguments over `count` edits: a single value holds for all, a sequence has one entry per edit."""
    reverse = _spread("reverse_editing_direction", reverse_editing_direction, count, _as_bool)
    scales = _spread("edit_guidance_scale", edit_guidance_scale, count, _as_number)
    return EditPlan(
        scales=tuple(-s if r else s for s, r in zip(scales, reverse, strict=True)),
        warmups=_spread("edit_warmup_steps", edit_warmup_steps, count, _as_steps),
        cooldowns=_spread("edit_cooldown_steps", edit_cooldown_steps, count, _as_optional_steps),
        thresholds=_spread("edit_threshold", edit_threshold, count, _as_share),
    )


def _spread(name: str, value: Any, count: int, convert: Any) -> tuple[Any, ...]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise ValueError(
                f"{name} has {len(value)} entries for {count} editing prompts; give one each, or one value for all."
            )
        return tuple(convert(name, entry) for entry in value)
    return (convert(name, value),) * count


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must hold finite numbers, got {value!r}.")
    return float(value)


def _as_share(name: str, value: Any) -> float:
    number = _as_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1] (0: everything, 1: only the maximum), got {value}.")
    return number


def _as_steps(name: str, value: Any) -> int:
    number = _as_number(name, value)
    if number < 0 or number != int(number):
        raise ValueError(f"{name} must hold whole numbers of steps, at least 0, got {value}.")
    return int(number)


def _as_optional_steps(name: str, value: Any) -> int | None:
    return None if value is None else _as_steps(name, value)


def _as_bool(name: str, value: Any) -> bool:
    if value not in (False, True):
        raise ValueError(f"{name} must hold booleans, got {value!r}.")
    return bool(value)
