"""Pinned Debian packages: download, check against sha256, unpack into a cache folder. Nothing is installed.

`python -m miniatures.data.packages` fetches every pinned package; `--update` moves the pins to what the machine's
package sources offer now.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PINS_FILE = Path(__file__).with_name("pins.json")
UPDATE_COMMAND = "python -m miniatures.data.packages --update"


class PackageError(RuntimeError):
    """A Debian package could not be had; the message says which one and what to do."""


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One Debian package at one version."""

    name: str
    version: str
    sha256: str


def cache_folder() -> Path:
    """Folder for downloads: `$MINIATURES_CACHE`, or `miniatures/.cache` beside this code."""
    configured = os.environ.get("MINIATURES_CACHE")
    return Path(configured) if configured else Path(__file__).resolve().parents[1] / ".cache"


def read_pins(path: Path = PINS_FILE) -> dict[str, Pin]:
    """Pinned packages by name.

    Raises:
        ValueError: an entry lacks a field or its name, version or checksum is not of the expected form.
    """
    pins = {}
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        if not isinstance(entry, dict) or set(entry) != {"version", "sha256"}:
            raise ValueError(f"{path.name}: {name} must have the fields version and sha256, got {entry!r}.")
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name) or not re.fullmatch(r"[\w.:~+-]+", entry["version"]):
            raise ValueError(f"{path.name}: {name}={entry['version']} is no Debian package name and version.")
        if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
            raise ValueError(f"{path.name}: sha256 of {name} must be 64 hexadecimal digits, got {entry['sha256']!r}.")
        pins[name] = Pin(name=name, version=entry["version"], sha256=entry["sha256"])
    return pins


def unpacked(name: str) -> Path:
    """Folder with the files of a pinned package, downloaded and checked on first use.

    Raises:
        ValueError: the package is not pinned.
        PackageError: no apt or dpkg, version not offered, or checksum mismatch.
    """
    pins = read_pins()
    if name not in pins:
        raise ValueError(f"name must be a pinned package, one of {sorted(pins)}, got {name!r}.")
    pin = pins[name]
    folder = cache_folder() / "packages" / f"{pin.name}_{_plain(pin.version)}"
    if folder.is_dir():
        return folder
    archive = _archive(pin)
    with _scratch() as scratch:
        _run(["dpkg", "-x", str(archive), str(scratch / "root")], "dpkg could not unpack", pin)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _move_into_place(scratch / "root", folder)
    return folder


def update_pins(names: Iterable[str], path: Path = PINS_FILE) -> dict[str, Pin]:
    """Pin the versions that the machine's package sources offer now, and write `pins.json`."""
    pins = {}
    for name in sorted(names):
        listing = _output(["apt-cache", "policy", name])
        match = re.search(r"Candidate: (\S+)", listing)
        if match is None or match[1] == "(none)":
            raise PackageError(f"{name} is not offered by this machine's package sources. Run apt-get update first.")
        archive = _download(name, match[1], checksum=None)
        pins[name] = Pin(name=name, version=match[1], sha256=_sha256(archive))
    table = {pin.name: {"version": pin.version, "sha256": pin.sha256} for pin in pins.values()}
    _write_atomically(path, json.dumps(table, indent=2) + "\n")
    return pins


def _archive(pin: Pin) -> Path:
    cached = _archive_path(pin.name, pin.version)
    if cached.is_file() and _sha256(cached) == pin.sha256:
        return cached
    return _download(pin.name, pin.version, checksum=pin.sha256)


def _download(name: str, version: str, *, checksum: str | None) -> Path:
    with _scratch() as scratch:
        command = ["apt-get", "download", "-q", f"{name}={version}"]
        done = _call(command, cwd=scratch)
        found = sorted(scratch.glob("*.deb"))
        if done.returncode or len(found) != 1:
            raise PackageError(
                f"{name}: version {version} could not be downloaded ({done.stderr.strip() or done.returncode}). "
                f"If the archive has moved on, run apt-get update and then {UPDATE_COMMAND}."
            )
        if checksum is not None and (arrived := _sha256(found[0])) != checksum:
            raise PackageError(f"{name}: sha256 of version {version} must be {checksum}, got {arrived}.")
        target = _archive_path(name, version)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(found[0], target)
    return target


def _archive_path(name: str, version: str) -> Path:
    return cache_folder() / "archives" / f"{name}_{_plain(version)}.deb"


def _plain(version: str) -> str:
    return version.replace(":", "-")


def _run(command: list[str], what: str, pin: Pin) -> None:
    done = _call(command)
    if done.returncode:
        raise PackageError(f"{pin.name}: {what} version {pin.version} ({done.stderr.strip()}).")


def _output(command: list[str]) -> str:
    return _call(command).stdout


def _call(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise PackageError(
            f"{command[0]} was not found: the miniatures' data come from Debian packages, "
            "so fetch them on a Debian or Ubuntu machine (a container will do) and copy the cache folder."
        )
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder inside the cache, so that finished files move out of it by a rename."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incoming-", dir=cache_folder()) as name:
        yield Path(name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move_into_place(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError:
        if not target.is_dir():  # another process may have unpacked the same package meanwhile
            raise


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    """Command line: fetch all pinned packages, or update the pins."""
    parser = argparse.ArgumentParser(prog="python -m miniatures.data.packages", description=__doc__)
    parser.add_argument("--update", action="store_true", help="pin what the package sources offer now")
    parser.add_argument("names", nargs="*", help="packages; default: all pinned ones")
    options = parser.parse_args(arguments)
    names = options.names or list(read_pins())
    if options.update:
        update_pins({*read_pins(), *names})
    for name in names:
        print(name, unpacked(name))


if __name__ == "__main__":
    main()
