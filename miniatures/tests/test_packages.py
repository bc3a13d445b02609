"""Downloads: what is checked before a file is trusted, and what a person reads when something is missing."""

import hashlib
import json
import os

import pytest

from miniatures.data import packages
from miniatures.data.packages import PackageError, read_pins, unpacked

APT_GET = """#!/bin/sh
for last; do :; done
echo called >> "$APT_LOG"
if [ "$APT_FAILS" = yes ]; then echo "E: Version was not found" >&2; exit 100; fi
printf content > "${last%%=*}_1.0_all.deb"
"""
DPKG = """#!/bin/sh
mkdir -p "$3" && cp "$2" "$3/file"
"""
SHA256 = hashlib.sha256(b"content").hexdigest()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A cache, one pinned package, and stand-ins for apt-get and dpkg; gives the log of apt-get's calls."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"apt-get": APT_GET, "dpkg": DPKG}.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MINIATURES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("APT_LOG", str(tmp_path / "log"))
    pin_packages(monkeypatch, {"some-text": {"version": "4:1.0", "sha256": SHA256}}, tmp_path)
    return tmp_path / "log"


def pin_packages(monkeypatch, table, folder):
    pins = folder / "pins.json"
    pins.write_text(json.dumps(table))
    monkeypatch.setattr(packages, "read_pins", lambda: read_pins(pins))


def test_a_package_is_downloaded_once_and_leaves_nothing_half_done(archive, tmp_path):
    first = unpacked("some-text")
    assert (first / "file").read_text() == "content"
    assert unpacked("some-text") == first
    assert archive.read_text().splitlines() == ["called"]
    assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == ["archives", "packages"]


def test_another_checksum_is_refused_and_nothing_is_unpacked(archive, tmp_path, monkeypatch):
    pin_packages(monkeypatch, {"some-text": {"version": "4:1.0", "sha256": "0" * 64}}, tmp_path)
    with pytest.raises(PackageError, match=rf"some-text: sha256 of version 4:1.0 must be 0+, got {SHA256}"):
        unpacked("some-text")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_version_that_is_gone_names_the_package_and_the_command_that_helps(archive, monkeypatch):
    monkeypatch.setenv("APT_FAILS", "yes")
    with pytest.raises(PackageError, match=r"some-text: version 4:1.0 could not.*packages --update"):
        unpacked("some-text")


def test_a_machine_without_apt_is_told_what_to_do(archive, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=r"apt-get was not found.*Debian or Ubuntu"):
        unpacked("some-text")


def test_an_unknown_package_is_refused(archive):
    with pytest.raises(ValueError, match=r"name must be a pinned package, one of \['some-text'\], got 'other'"):
        unpacked("other")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a/../b": {"version": "1", "sha256": SHA256}}, "is no Debian package name"),
        ({"ab": {"version": "1 2", "sha256": SHA256}}, "is no Debian package name"),
        ({"ab": {"version": "1", "sha256": "ff"}}, "64 hexadecimal digits"),
        ({"ab": {"version": "1"}}, "must have the fields version and sha256"),
    ],
)
def test_a_pin_of_another_form_is_refused(table, message, tmp_path):
    path = tmp_path / "pins.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        read_pins(path)


def test_every_committed_pin_is_well_formed():
    assert {"libreoffice-help-de", "debian-reference-fr", "bible-kjv-text"} <= set(read_pins())
