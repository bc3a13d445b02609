"""Reads JSON and text that may come from anywhere, size-capped and strictly; writes a file whole or not at all."""

import json
import math
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 1 << 24


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_CONFIG_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing, larger than `max_bytes`, damaged, repeats a key, or holds NaN or an infinite
            number; the message names the file.
    """
    return parse_json(read_text(path, max_bytes), path)


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_CONFIG_BYTES) -> str:
    """Read a UTF-8 file; lone surrogates survive.

    Raises:
        ValueError: the file is missing, larger than `max_bytes`, or not UTF-8; the message names the file.
    """
    try:
        size = os.path.getsize(path)
        if size > max_bytes:
            raise ValueError(f"{os.fspath(path)}: must be at most {max_bytes} bytes, got {size}.")
        with open(path, encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: is not UTF-8 at byte {error.start}.") from error


def parse_json(text: str, path: str | os.PathLike[str]) -> Any:
    """Parse JSON text; `path` is for the message of the ValueError."""
    try:
        return json.loads(
            text, object_pairs_hook=_distinct_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{os.fspath(path)}: is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {repeated!r} must not occur twice.")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"numbers must be finite, got {name}.")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"numbers must be finite, got {text}.")
    return value


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file in one step: after a failure the previous file is still there, whole."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
