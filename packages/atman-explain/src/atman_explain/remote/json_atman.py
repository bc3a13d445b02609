"""JSON that may come from anywhere: read size-capped and strictly, checked entry by entry, written whole or not at all.

Every check takes a value and the name to call it by in the message of its ValueError.
"""

import json
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 1 << 28
MAX_ENTRIES = 1 << 22
MAX_CHARACTERS = 1 << 26
MAX_DEPTH = 8


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file of at most `MAX_FILE_BYTES`.

    Raises:
        ValueError: the file is missing, too large or damaged, or repeats a key; the message names the file.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}.") from error
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{name}: must be at most {MAX_FILE_BYTES} bytes.")
    try:
        return json.loads(data, object_pairs_hook=_distinct_keys)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from error


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {repeated[:60]!r} must not occur twice.")
    return values


def write_json(values: Any, path: str | os.PathLike[str]) -> None:
    """Write a JSON file in one step: after a failure the previous file is still there, whole."""
    path = Path(path)
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))  # ASCII, so that lone surrogates survive
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text + "\n")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_record(value: Any, name: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object with exactly these keys, but for optional ones."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {type(value).__name__}.")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{name} must have the key {missing[0]!r}.")
    if unknown := [key for key in value if key not in keys and key not in optional]:
        raise ValueError(f"{name} must not have the key {_shown(unknown[0])}.")
    return value


def check_list(value: Any, name: str, length: int | None = None) -> list[Any]:
    """A list of at most `MAX_ENTRIES` entries, or of exactly `length`."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list, got {type(value).__name__}.")
    if len(value) > MAX_ENTRIES:
        raise ValueError(f"{name} must have at most {MAX_ENTRIES} entries, got {len(value)}.")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must have {length} entries, got {len(value)}.")
    return list(value)


def check_text(value: Any, name: str) -> str:
    """A string of at most `MAX_CHARACTERS`."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}.")
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"{name} must have at most {MAX_CHARACTERS} characters, got {len(value)}.")
    return value


def check_integer(value: Any, name: str, low: int, high: int) -> int:
    """An integer in [low, high]."""
    if type(value) is not int:  # True is an int, too
        raise ValueError(f"{name} must be an integer, got {_shown(value)}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {_shown(value)}.")
    return value


def check_integers(value: Any, name: str, low: int, high: int, length: int | None = None) -> tuple[int, ...]:
    """A list of integers in [low, high]."""
    return tuple(check_integer(x, f"{name}[{i}]", low, high) for i, x in enumerate(check_list(value, name, length)))


def check_number(value: Any, name: str, limit: float) -> float:
    """A finite number in [-limit, limit]."""
    if type(value) not in (int, float) or not abs(value) <= limit:  # also refuses NaN
        raise ValueError(f"{name} must be a number in [-{limit:.3g}, {limit:.3g}], got {_shown(value)}.")
    return float(value)


def check_booleans(value: Any, name: str) -> tuple[bool, ...]:
    """A list of true and false."""
    values = check_list(value, name)
    for i, x in enumerate(values):
        if not isinstance(x, bool):
            raise ValueError(f"{name}[{i}] must be true or false, got {_shown(x)}.")
    return tuple(values)


def check_plain(value: Any, name: str, depth: int = 0) -> Any:
    """Any JSON value of at most `MAX_DEPTH` levels, copied; tuples become lists."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{name} must be at most {MAX_DEPTH} levels deep.")
    if isinstance(value, dict):
        return {check_text(key, f"{name} key"): check_plain(x, f"{name}.{key}", depth + 1) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [check_plain(x, f"{name}[{i}]", depth + 1) for i, x in enumerate(check_list(value, name))]
    if value is None or isinstance(value, (str, bool)):
        return value
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, a text, a list or an object, got {_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    text = f"{type(value).__name__} of {value.bit_length()} bits" if type(value) is int and abs(value) > 1 << 64 else ""
    return text or (repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__)[:60]
