"""Inversions in files: tensors as safetensors, everything else as JSON that is checked before it is believed."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .inversion import MODES, LEditsInversion, SourceCondition
from .solver import PREDICTIONS, SOLVERS, Schedule

TENSOR_FILE = "inversion.safetensors"
JSON_FILE = "inversion.json"
EXTRA = "extra."
FORMAT_VERSION = 1
MAX_STEPS = 10_000
MAX_SIDE = 65_536
MAX_TEXT = 100_000


def save_inversion(inversion: LEditsInversion, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write an inversion into a folder, which is made if needed.

    Args:
        inversion: what `invert` returned.
        directory: where to.
        dtype: what the stored maps are rounded to; None keeps them. Half precision gives up exact reconstruction.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    maps = inversion.maps if dtype is None else inversion.maps.to(dtype)
    tensors = {"init_latents": inversion.init_latents, "maps": maps}
    tensors |= {EXTRA + name: value for name, value in inversion.row_extras.items()}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / TENSOR_FILE)
    schedule = inversion.schedule
    values = {
        "version": FORMAT_VERSION,
        "mode": inversion.mode,
        "family": inversion.family,
        "timesteps": schedule.timesteps.tolist(),
        "alphas": list(schedule.alphas),
        "sigmas": list(schedule.sigmas),
        "prediction": schedule.prediction,
        "solver": schedule.solver,
        "eta": schedule.eta,
        "size": list(inversion.size),
        "skip": inversion.skip,
        "crop": None if inversion.crop is None else list(inversion.crop),
        "condition": asdict(inversion.condition),
        "model_hash": inversion.model_hash,
    }
    (folder / JSON_FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_inversion(directory: str | Path) -> LEditsInversion:
    """Read what `save_inversion` wrote; tensors come back on the CPU, float32 or wider.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file does not hold what it should; the message names the key.
    """
    folder = Path(directory)
    for name in (JSON_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; it is written by LEditsInversion.save_pretrained.")
    values = _read_json(folder / JSON_FILE)
    _check_keys("inversion.json", values, _FIELDS)
    schedule = _schedule(values)
    tensors = load_file(folder / TENSOR_FILE)
    extras = {name.removeprefix(EXTRA): tensors.pop(name) for name in sorted(tensors) if name.startswith(EXTRA)}
    if set(tensors) != {"init_latents", "maps"}:
        raise ValueError(f'{TENSOR_FILE} must hold "init_latents" and "maps", got {sorted(tensors)}.')
    first, maps = tensors["init_latents"], tensors["maps"]
    if first.ndim != 4 or maps.shape != (len(schedule), *first.shape):
        raise ValueError(
            f"maps must have shape [{len(schedule)}, B, C, h, w] over init_latents [B, C, h, w], "
            f"got {tuple(maps.shape)} and {tuple(first.shape)}."
        )
    return LEditsInversion(
        mode=values["mode"],
        family=values["family"],
        schedule=schedule,
        init_latents=first.to(torch.promote_types(first.dtype, torch.float32)),
        maps=maps.to(torch.promote_types(first.dtype, torch.float32)),
        size=_pair(values["size"]),
        skip=values["skip"],
        crop=None if values["crop"] is None else _pair(values["crop"]),
        condition=_condition(values["condition"], first.shape[0]),
        row_extras=extras,
        model_hash=values["model_hash"],
    )


def _schedule(values: dict[str, Any]) -> Schedule:
    steps = len(values["timesteps"])
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"timesteps must hold 1 to {MAX_STEPS} numbers, got {steps}.")
    for name in ("alphas", "sigmas"):
        if len(values[name]) != steps + 1:
            raise ValueError(f"{name} must hold one number more than timesteps, {steps + 1}, got {len(values[name])}.")
    whole = all(isinstance(t, int) for t in values["timesteps"])
    timesteps = torch.tensor(values["timesteps"], dtype=torch.int64 if whole else torch.float32)
    names = ("prediction", "solver", "eta")
    return Schedule(timesteps, tuple(values["alphas"]), tuple(values["sigmas"]), *(values[name] for name in names))


def _condition(values: dict[str, Any], batch: int) -> SourceCondition:
    _check_keys("condition", values, _CONDITION_FIELDS)
    for name in ("source_prompt", "negative_prompt", "negative_prompt_2"):
        if values[name] is not None and len(values[name]) not in ({0, batch} if name == "source_prompt" else {batch}):
            raise ValueError(f"{name} must hold one text for each of {batch} pictures, got {len(values[name])}.")
        values[name] = None if values[name] is None else tuple(values[name])
    return SourceCondition(**values | {"crops_coords_top_left": _pair(values["crops_coords_top_left"])})


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _read_json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"{path.name} names a key twice.")
        return found

    def refuse(constant: str) -> float:
        raise ValueError(f"{path.name} must hold finite numbers, got {constant}.")

    values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold an object, got {type(values).__name__}.")
    return values


def _check_keys(where: str, values: Any, fields: dict[str, tuple[str, Callable[[Any], bool]]]) -> None:
    if not isinstance(values, dict) or set(values) != set(fields):
        given = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"{where} must hold exactly the keys {sorted(fields)}, got {given}.")
    for name, (rule, is_valid) in fields.items():
        if not is_valid(values[name]):
            raise ValueError(f"{name} in {where} must be {rule}, got {values[name]!r}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, float) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 < v <= MAX_SIDE for v in value)
    )


def _is_offset(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and abs(v) <= MAX_SIDE for v in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_STEPS + 1 and all(_is_number(v) for v in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(v) for v in value)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "version": (str(FORMAT_VERSION), lambda v: v == FORMAT_VERSION and not isinstance(v, bool)),
    "mode": (f"one of {list(MODES)}", lambda v: v in MODES),
    "family": ("a text", _is_text),
    "timesteps": ("a list of finite numbers", _are_numbers),
    "alphas": ("a list of finite numbers", _are_numbers),
    "sigmas": ("a list of finite numbers", _are_numbers),
    "prediction": (f"one of {list(PREDICTIONS)}", lambda v: v in PREDICTIONS),
    "solver": (f"one of {list(SOLVERS)}", lambda v: v in SOLVERS),
    "eta": ("a number in [0, 1]", lambda v: _is_number(v) and 0 <= v <= 1),
    "size": (f"two sizes in [1, {MAX_SIDE}]", _is_size),
    "skip": ("a number in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1),
    "crop": (f"null or two sizes in [1, {MAX_SIDE}]", lambda v: v is None or _is_size(v)),
    "condition": ("an object", lambda v: isinstance(v, dict)),
    "model_hash": ("a text", _is_text),
}
_CONDITION_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "source_prompt": ("a list of texts", _are_texts),
    "source_guidance_scale": ("a number", _is_number),
    "negative_prompt": ("null or a list of texts", lambda v: v is None or _are_texts(v)),
    "negative_prompt_2": ("null or a list of texts", lambda v: v is None or _are_texts(v)),
    "clip_skip": ("null or a whole number", lambda v: v is None or (type(v) is int and 0 <= v < 1000)),
    "control_scale": ("a number", _is_number),
    "guidance_scale": ("null or a number", lambda v: v is None or _is_number(v)),
    "crops_coords_top_left": ("two whole numbers", _is_offset),
}
