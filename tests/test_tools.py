"""The checks of `make lint` and `make check-sync` can fail."""

import shutil

import pytest

from tests.support.tree import ROOT
from tools import check_docs, sync_remote


@pytest.fixture
def tree(tmp_path):
    """A copy of what sync_remote.py reads and writes."""
    folders = [sync_remote.OPERATORS, *(each.folder for each in sync_remote.VENDORED)]
    for folder in folders:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for copies in (sync_remote.copies, sync_remote.checkpoint_code):
        for path, text in list(copies(tmp_path)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
    return tmp_path


def test_fresh_copies_show_no_drift(tree):
    assert sync_remote.drift(tree) == ""


def test_an_edited_copy_is_shown_as_a_patch(tree):
    path, text = next(sync_remote.copies(tree))
    (tree / path).write_text(text.replace("import torch\n", "import torch  # edited\n"))
    patch = sync_remote.drift(tree)
    assert f"--- a/{path}" in patch
    assert "-import torch  # edited\n+import torch\n" in patch


def test_a_file_beside_a_checkpoint_that_no_package_has_is_drift(tree):
    checkpoint = next(iter(sync_remote.CHECKPOINTS))
    (tree / checkpoint / "stale_tfree.py").write_text("stale = True\n")
    assert "-stale = True\n" in sync_remote.drift(tree)


def test_a_missing_copy_is_drift(tree):
    path, _ = next(sync_remote.copies(tree))
    (tree / path).unlink()
    assert f"+++ b/{path}" in sync_remote.drift(tree)


def test_the_documentation_is_complete():
    checks = (check_docs.missing_names, check_docs.broken_links, check_docs.unknown_targets, check_docs.missing_tests)
    assert [problem for check in checks for problem in check()] == []


def test_links_make_targets_and_test_files_that_do_not_exist_are_reported(tmp_path):
    (tmp_path / "Makefile").write_text("test: venv\n")
    text = "[a](absent.md) [b](README.md#part) `make test` `make absent` `tests/test_absent.py`\n"
    (tmp_path / "README.md").write_text(text)
    assert list(check_docs.missing_tests(tmp_path)) == ["README.md: there is no test file test_absent.py"]
    assert list(check_docs.broken_links(tmp_path)) == ["README.md: the link absent.md leads nowhere"]
    assert list(check_docs.unknown_targets(tmp_path)) == ["README.md: the Makefile has no target absent"]


def test_a_public_name_that_the_readme_leaves_out_is_reported(tmp_path):
    package = tmp_path / "packages/one/src/one_package_for_this_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__all__ = ["__version__", "absent", "present"]\n')
    (tmp_path / "packages/one/README.md").write_text("`present` is here\n")
    assert list(check_docs.missing_names(tmp_path)) == [
        "packages/one/README.md: the public name absent is not mentioned"
    ]
