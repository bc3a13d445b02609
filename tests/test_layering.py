"""Who may import whom."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from tests.support.imports import imports_of
from tests.support.tree import DISTRIBUTIONS, IMPORT_NAMES, Distribution

REMOTE_MAY_IMPORT = {"huggingface_hub", "numpy", "safetensors", "torch", "transformers"}
SLUG_MAY_IMPORT = {"ledits": {"PIL", "diffusers"}}
NEEDS_AN_EXTRA = {
    *("PIL", "accelerate", "captum", "datasets", "diffusers", "inseq", "kernels"),
    *("matplotlib", "peft", "sklearn", "triton", "trl", "yaml"),
}
REMOTE_FILES = [path for each in DISTRIBUTIONS for path in sorted(each.remote.glob("*.py"))]

by_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda each: each.name)
by_remote_file = pytest.mark.parametrize("path", REMOTE_FILES, ids=lambda path: path.name)


def needed_by(distribution: Distribution) -> set[str]:
    """What a distribution's own requirements bring along."""
    project = tomllib.loads((distribution.project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.split(r"[^\w-]", each)[0].replace("-", "_") for each in project.get("dependencies", [])}


def sources(distribution: Distribution) -> list[Path]:
    return sorted(distribution.package.rglob("*.py"))


def may_import(path: Path) -> set[str]:
    """Modules whose presence a remote file may count on."""
    extra = SLUG_MAY_IMPORT.get(path.stem.rpartition("_")[2], set())
    return set(sys.stdlib_module_names) | REMOTE_MAY_IMPORT | extra


@by_remote_file
def test_remote_code_needs_only_what_every_user_has(path):
    for each in imports_of(path):
        if each.level == 0 and each.top not in may_import(path):
            assert each.in_try, f"line {each.line} imports {each.module} outside `try: ... except ImportError`"


@by_remote_file
def test_remote_code_names_its_siblings_so_that_transformers_copies_them(path):
    written = {each.module for each in imports_of(path) if each.level}
    assert all(each.level <= 1 for each in imports_of(path))
    assert written == set(get_relative_imports(path)), "transformers' regular expression sees other siblings"
    assert all((path.parent / f"{name}.py").is_file() for name in written)


@by_remote_file
def test_transformers_finds_no_import_in_remote_code_that_may_be_missing(path):
    assert set(get_imports(path)) <= may_import(path)


@by_distribution
def test_remote_folders_are_flat_and_their_files_carry_the_slug(distribution):
    files = [path for path in distribution.remote.rglob("*.py") if path.name != "__init__.py"]
    assert {path.parent for path in files} <= {distribution.remote}
    slug = distribution.import_name.partition("_")[0]
    assert all(f"_{slug}" in path.stem for path in files)


@by_distribution
def test_packages_know_each_other_only_through_the_optional_kernels(distribution):
    for path in sources(distribution):
        for each in imports_of(path):
            if each.level == 0 and each.top in IMPORT_NAMES - {distribution.import_name}:
                assert each.top == "shared_kernels", f"{path.name} imports {each.module}"
                assert path.stem.startswith("kernels_"), f"{path.name} imports shared_kernels"
                assert each.in_try, f"{path.name} needs shared_kernels"


@by_distribution
def test_optional_dependencies_are_imported_late_or_in_try(distribution):
    optional = NEEDS_AN_EXTRA - needed_by(distribution)
    for path in sources(distribution):
        for each in imports_of(path):
            is_kernel = path.name == "kernel.py" and each.top == "triton"
            is_integration = path.parent.name == "integrations" and each.top == path.stem
            if each.level == 0 and each.top in optional and not (is_kernel or is_integration):
                assert each.in_try or each.in_function, f"{path.name}, line {each.line} imports {each.module}"


@by_distribution
def test_packages_import_neither_tests_nor_tools(distribution):
    tops = {each.top for path in sources(distribution) for each in imports_of(path) if each.level == 0}
    assert not tops & {"benchmarks", "conftest", "miniatures", "tests", "tools"}
