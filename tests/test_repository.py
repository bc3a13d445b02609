"""Rules that hold for every file of the repository."""

import re

import pytest

from tests.support.tree import ROOT, repository_files
from tools import sync_remote

LARGEST_FILE = 12 * 2**20  # bytes; the committed miniature may take this much
LARGEST_TOTAL = 40 * 2**20
FILES = repository_files()
TEXT_SUFFIXES = {"", ".cff", ".json", ".jinja", ".md", ".py", ".toml", ".txt", ".yml", ".yaml"}

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w+|/opt/(?:wheels|pypi)")
INDEX_HOST = re.compile(r"--(?:extra-)?index-url|--find[-]links|download\.pytorch\.org/whl|pypi\.org/simp[l]e")
PICKLES = r"(?:pickle|cPickle|dill|joblib|cloudpickle|shelve|marshal)"
UNPICKLER = re.compile(
    rf"\b{PICKLES}\.(?!UnpicklingError\b)\w+|^\s*from\s+{PICKLES}\s+import\s+(?!UnpicklingError$)"
    r"|allow_pickle\s*=\s*True|weights_only\s*=\s*False|torch\.load\((?![^#]*weights_only=True)",
    re.MULTILINE,
)


def texts(*folders: str) -> dict[str, str]:
    """The text files below `folders` (all, if none are named), by relative path."""
    chosen = [path for path in FILES if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 2**20]
    names = {path.relative_to(ROOT).as_posix(): path for path in chosen}
    return {name: path.read_text("utf-8") for name, path in names.items() if name.startswith(folders or "")}


def offenders(pattern: re.Pattern[str], found: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, match[0]) for name, text in found.items() for match in pattern.finditer(text)]


def test_no_file_is_large_and_all_together_are_small():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in FILES}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}
    assert sum(sizes.values()) < LARGEST_TOTAL


def test_no_file_names_a_place_on_the_machine_it_was_written_on():
    assert offenders(MACHINE_PATH, texts()) == []


def test_no_file_says_where_packages_come_from():
    assert offenders(INDEX_HOST, texts()) == []


def test_nothing_we_publish_can_unpickle():
    found = texts("benchmarks/", "examples/", "miniatures/", "packages/", "shared-kernels/", "tools/")
    assert offenders(UNPICKLER, {name: text for name, text in found.items() if "/tests/" not in name}) == []


@pytest.mark.parametrize(
    "line",
    ["pickle.load(file)", "    from dill import loads", "np.load(path, allow_pickle=True)", "torch.load(path)"],
)
def test_the_scan_for_unpickling_finds(line):
    assert UNPICKLER.search(line)


@pytest.mark.parametrize("line", ["torch.load(path, weights_only=True, mmap=True)", "except pickle.UnpicklingError:"])
def test_a_safe_load_is_allowed(line):
    assert not UNPICKLER.search(line)


def test_every_copy_of_a_kernel_source_is_up_to_date():
    assert sync_remote.drift() == ""


def test_every_distribution_carries_the_license():
    licenses = [path.read_text() for path in FILES if path.name == "LICENSE"]
    assert len(licenses) >= 3
    assert len(set(licenses)) == 1
