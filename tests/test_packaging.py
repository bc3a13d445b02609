"""What the built distributions contain. `make wheels` installs them; here they are only opened."""

import ast
import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.tree import DISTRIBUTIONS, ROOT, Distribution

pytest.importorskip("hatchling")

by_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda each: each.name)


def build(distribution: Distribution, target: str, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    subprocess.run(command, cwd=distribution.project, check=True, capture_output=True, timeout=60)
    (built,) = out.iterdir()
    return built


def version_of(distribution: Distribution) -> str:
    tree = ast.parse((distribution.package / "_version.py").read_text())
    return next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))


@by_distribution
def test_the_wheel_holds_the_package_its_types_and_its_license_and_no_tests(distribution, tmp_path):
    wheel = build(distribution, "wheel", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        license_text = archive.read(f"{info}/licenses/LICENSE").decode()
    assert f"{distribution.import_name}/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {distribution.import_name, info}
    assert not [name for name in names if name.rpartition("/")[2].startswith(("test_", "conftest"))]
    assert license_text == (ROOT / "LICENSE").read_text()
    on_disk = {path.relative_to(distribution.package.parent).as_posix() for path in distribution.package.rglob("*.py")}
    assert on_disk == {name for name in names if name.endswith(".py")}


@by_distribution
def test_the_metadata_states_ranges_the_version_and_the_python_floor(distribution, tmp_path):
    with zipfile.ZipFile(build(distribution, "wheel", tmp_path)) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(path))
    assert metadata["Name"] == distribution.name
    assert metadata["Version"] == version_of(distribution)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert not [each for each in metadata.get_all("Requires-Dist") if "==" in each.partition(";")[0]]
    assert metadata.get_payload().strip(), "the README is the page of the package index"


@by_distribution
def test_the_source_distribution_can_build_the_same_wheel(distribution, tmp_path):
    with tarfile.open(build(distribution, "sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", f"src/{distribution.import_name}/py.typed"} <= names


@by_distribution
def test_the_version_leads_the_changelog(distribution):
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"### {distribution.name} {version_of(distribution)}" in changelog
