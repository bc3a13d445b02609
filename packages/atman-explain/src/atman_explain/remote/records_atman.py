"""Explanations as JSON records: what is written, and what is accepted from anywhere."""

import math
from typing import Any

import torch
from torch import Tensor

from .explanation_atman import Explanation, Target
from .json_atman import (
    MAX_CHARACTERS,
    MAX_ENTRIES,
    check_booleans,
    check_integer,
    check_integers,
    check_list,
    check_number,
    check_plain,
    check_record,
    check_text,
)
from .units_atman import Unit

FORMAT = "atman-explanation"
VERSION = 1
MAX_SCORES = 1 << 23
MAX_ID = 1 << 62
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_KINDS = ("text", "image", "target")
_KEYS = (
    "format", "version", "dtype", "scores", "baseline_logprobs", "targets", "units", "is_coarse", "prompt",
    "prompt_ids", "tokens", "special", "grids", "config",
)  # fmt: skip

Grids = tuple[tuple[int, int], ...]


def explanation_to_dict(explanation: Explanation) -> dict[str, Any]:
    """Give an explanation as plain JSON values; raises ValueError for infinite scores."""
    wide = explanation.scores.dtype == torch.float64
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "float64" if wide else "float32",
        "scores": [_numbers(row, f"scores[{i}]") for i, row in enumerate(explanation.scores)],
        "baseline_logprobs": _numbers(explanation.baseline_logprobs, "baseline_logprobs"),
        "targets": [{"text": target.text, "id": target.id} for target in explanation.targets],
        "units": [_unit_to_dict(unit) for unit in explanation.units],
        "is_coarse": None if explanation.is_coarse is None else list(explanation.is_coarse),
        "prompt": explanation.prompt,
        "prompt_ids": list(explanation.prompt_ids),
        "tokens": list(explanation.tokens),
        "special": list(explanation.special),
        "grids": [list(grid) for grid in explanation.grids],
        "config": check_plain(explanation.config, "config"),
    }


def _numbers(row: Tensor, name: str) -> list[float | None]:
    values = row.tolist()
    if math.inf in values or -math.inf in values:
        raise ValueError(f"{name} must not be infinite to be written as JSON.")
    return [None if value != value else value for value in values]


def _unit_to_dict(unit: Unit) -> dict[str, Any]:
    values: dict[str, Any] = {"text": unit.text, "columns": list(unit.columns), "kind": unit.kind}
    for name in ("span", "image", "box", "shares"):
        value = getattr(unit, name)
        if value is not None:
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


def explanation_from_dict(values: Any) -> Explanation:
    """Build an explanation from JSON values; raises ValueError naming the first entry that is not as it must be."""
    values = check_record(values, "explanation", _KEYS)
    if values["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT!r}, got {check_text(values['format'], 'format')[:60]!r}.")
    check_integer(values["version"], "version", 1, VERSION)
    if values["dtype"] not in list(_DTYPES):
        raise ValueError(f"dtype must be one of {list(_DTYPES)}, got {check_text(values['dtype'], 'dtype')[:60]!r}.")
    dtype, grids = _DTYPES[values["dtype"]], _grids(values["grids"])
    targets, units = _targets(values["targets"]), _units(values["units"], grids)
    if len(targets) * len(units) > MAX_SCORES:
        raise ValueError(f"scores must have at most {MAX_SCORES} entries, got {len(targets)} x {len(units)}.")
    rows = check_list(values["scores"], "scores", len(targets))
    scores = [_row(row, f"scores[{i}]", len(units), dtype) for i, row in enumerate(rows)]
    coarse, prompt, tokens = values["is_coarse"], values["prompt"], check_list(values["tokens"], "tokens")
    return Explanation(
        scores=torch.stack(scores) if scores else torch.empty(0, len(units), dtype=dtype),
        units=units,
        targets=targets,
        baseline_logprobs=_row(values["baseline_logprobs"], "baseline_logprobs", len(targets), dtype),
        prompt=None if prompt is None else check_text(prompt, "prompt"),
        prompt_ids=check_integers(values["prompt_ids"], "prompt_ids", 0, MAX_ID),
        tokens=tuple(check_text(token, f"tokens[{i}]") for i, token in enumerate(tokens)),
        config=_config(values["config"]),
        is_coarse=None if coarse is None else check_booleans(coarse, "is_coarse"),
        grids=grids,
        special=check_booleans(values["special"], "special"),
    )


def _config(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"config must be an object, got {type(value).__name__}.")
    return check_plain(value, "config")


def _grids(value: Any) -> Grids:
    pairs = [check_integers(x, f"grids[{i}]", 1, MAX_ENTRIES, 2) for i, x in enumerate(check_list(value, "grids"))]
    if sum(rows * columns for rows, columns in pairs) > MAX_ENTRIES:
        raise ValueError(f"grids must have at most {MAX_ENTRIES} patches in all.")
    return tuple((rows, columns) for rows, columns in pairs)


def _targets(values: Any) -> tuple[Target, ...]:
    targets = []
    for i, value in enumerate(check_list(values, "targets")):
        name = f"targets[{i}]"
        value = check_record(value, name, ("text", "id"))
        id_ = None if value["id"] is None else check_integer(value["id"], f"{name}.id", 0, MAX_ID)
        targets.append(Target(text=check_text(value["text"], f"{name}.text"), id=id_))
    return tuple(targets)


def _units(values: Any, grids: Grids) -> tuple[Unit, ...]:
    units = tuple(_unit(value, f"units[{i}]", grids) for i, value in enumerate(check_list(values, "units")))
    if sum(len(unit.columns) for unit in units) > MAX_ENTRIES:
        raise ValueError(f"units must have at most {MAX_ENTRIES} columns in all.")
    return units


def _unit(value: Any, name: str, grids: Grids) -> Unit:
    value = check_record(value, name, ("text", "columns", "kind"), optional=("span", "image", "box", "shares"))
    if value["kind"] not in _KINDS:
        raise ValueError(f"{name}.kind must be one of {list(_KINDS)}, got {check_text(value['kind'], name)[:60]!r}.")
    columns = check_integers(value["columns"], f"{name}.columns", 0, MAX_ID)
    known: dict[str, Any] = {}
    if "span" in value:
        known["span"] = check_integers(value["span"], f"{name}.span", 0, MAX_CHARACTERS, 2)
    if "shares" in value:
        shares = check_list(value["shares"], f"{name}.shares", len(columns))
        known["shares"] = tuple(check_number(share, f"{name}.shares[{i}]", 1.0) for i, share in enumerate(shares))
    if "image" in value:
        known["image"] = check_integer(value["image"], f"{name}.image", 0, len(grids) - 1)
    if "box" in value:
        known["box"] = _box(value["box"], f"{name}.box", grids[known["image"]] if "image" in known else None)
    return Unit(text=check_text(value["text"], f"{name}.text"), columns=columns, kind=value["kind"], **known)


def _box(value: Any, name: str, grid: tuple[int, int] | None) -> tuple[int, ...]:
    row, column, height, width = box = check_integers(value, name, 0, MAX_ENTRIES, 4)
    if grid is None or row + height > grid[0] or column + width > grid[1]:
        raise ValueError(f"{name} must lie in the patch grid of the unit's image ({grid}), got {list(box)}.")
    return box


def _row(values: Any, name: str, length: int, dtype: torch.dtype) -> Tensor:
    limit, values = torch.finfo(dtype).max, check_list(values, name, length)
    numbers = [math.nan if x is None else check_number(x, f"{name}[{i}]", limit) for i, x in enumerate(values)]
    return torch.tensor(numbers, dtype=dtype)
