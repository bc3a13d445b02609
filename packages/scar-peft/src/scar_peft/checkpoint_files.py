"""Reads the files of an original checkpoint, from a folder or the Hub: JSON, safetensors, and tensors of `torch.save`.

Nothing in them is executed, and of a published model of many gigabytes only the parts with the sparse coder are read.
"""

import json
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
TRAINER_FILE = "state_dict.pth"
PREFIX = "SAE."
"""How the names of the sparse coder's tensors begin inside a published model."""

_MAX_JSON_BYTES = 1 << 26
_SHARD_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")


class PickledObjectsError(ValueError):
    """A file holds objects that only unpickling could restore, which is never done."""


@dataclass(frozen=True)
class Place:
    """A folder, a repository on the Hub, or a single file of weights."""

    source: str
    download: Mapping[str, Any]
    """Arguments of `hf_hub_download`, such as `revision`."""

    def find(self, name: str) -> Path | None:
        """Where a file is on this machine, downloaded if need be; None if the place has none of that name."""
        if os.path.isfile(self.source):
            path = Path(self.source).parent / name
            return path if path.is_file() else None
        if os.path.isdir(self.source):
            path = Path(self.source) / name
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.source, name, **self.download))
        except LocalEntryNotFoundError:  # offline, and not in the cache
            raise
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise ValueError(
                f"source must be a folder, a file or the name of a repository, and {self.source!r} is none of them."
            ) from error


def read_tensors(place: Place) -> dict[str, Tensor]:
    """Read the sparse coder's tensors by their names without prefix, memory-mapped.

    Raises:
        PickledObjectsError: see the class.
        ValueError: there are no weights, or they are damaged; names the file.
    """
    if os.path.isfile(place.source):
        return _tensors_of(Path(place.source))
    if index := place.find(INDEX_FILE):
        tensors: dict[str, Tensor] = {}
        for name in _shards(index):
            tensors |= _tensors_of(_must_find(place, name))
        return tensors
    path = place.find(WEIGHTS_FILE) or place.find(TRAINER_FILE)
    if path is None:
        raise ValueError(f"{place.source} must hold {INDEX_FILE}, {WEIGHTS_FILE} or {TRAINER_FILE}, and has none.")
    return _tensors_of(path)


def read_json(path: Path) -> Any:
    """Read a JSON file strictly: no repeated keys, no NaN, no infinite numbers.

    Raises:
        ValueError: it is too large, damaged, or breaks these rules; names the file.
    """
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{path}: must be at most {_MAX_JSON_BYTES} bytes, got {size}.")
    try:
        return json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_distinct_keys,
            parse_constant=_finite_float,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {repeated!r} must not occur twice.")
    return values


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"numbers must be finite, got {text}.")
    return value


def _shards(index: Path) -> list[str]:
    """Names of the files that hold the sparse coder."""
    values = read_json(index)
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{index}: weight_map must map tensors to files.")
    wanted = {name: file for name, file in files.items() if name.startswith(PREFIX)}
    if not wanted:
        raise ValueError(f"{index}: must name tensors that begin with {PREFIX!r}, and names none: no SCAR checkpoint.")
    for name, file in wanted.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise ValueError(f"{index}: {name} must be in a safetensors file of the same folder, got {file!r}.")
    return sorted(set(wanted.values()))


def _must_find(place: Place, name: str) -> Path:
    path = place.find(name)
    if path is None:
        raise ValueError(f"{place.source} must hold {name}, which {INDEX_FILE} names, and does not.")
    return path


def _tensors_of(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if path.suffix in (".pth", ".pt"):
        return _from_trainer(path)
    raise ValueError(f"{path}: must be a .safetensors or .pth file.")


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            ours = [name for name in names if name.startswith(PREFIX)] or names
            return {name.removeprefix(PREFIX): file.get_tensor(name) for name in ours}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is truncated or damaged: {error}") from error


def _from_trainer(path: Path) -> dict[str, Tensor]:
    content = _load(path)
    models = content.get("models_state_dict") if isinstance(content, dict) else None
    tensors = models[0] if isinstance(models, list) and models else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f'{path}: must hold tensors by name, or a list of such under "models_state_dict".')
    return {str(name).removeprefix("module.").removeprefix(PREFIX): value for name, value in tensors.items()}


def _load(path: Path) -> Any:
    reconstruct = np.empty(0).__reduce__()[0]
    arrays: list[
        Any
    ] = [  # the trainer saves NumPy's random state too; these rebuild arrays of numbers and can do nothing else
        *((reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        *(np.ndarray, np.dtype, type(np.dtype(np.uint32))),
    ]
    try:
        with torch.serialization.safe_globals(arrays):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise PickledObjectsError(
            f"{path}: holds pickled objects{what}, which could run any code when loaded; they are never unpickled. "
            "Save the tensors of its models_state_dict[0] as a safetensors file where you trust it."
        ) from error
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: is truncated or damaged: {reason}") from error
