"""The pages people read run as written."""

import pytest

from tests.support.snippets import run_page, snippets
from tests.support.tree import ROOT
from tools.check_docs import pages

PAGES = [page for page in pages() if snippets(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_snippet_of_the_page_runs(page, tmp_path, monkeypatch):
    (tmp_path / "miniatures").symlink_to(ROOT / "miniatures")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run_page(page, tmp_path) > 0


def test_a_snippet_sees_the_names_of_the_ones_before_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\na = 1\n```\ntext\n```python\nassert a == 1\n```\n")
    assert run_page(page, tmp_path) == 2


def test_a_failing_snippet_names_the_line_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\na = 1\nb = a / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as failure:
        run_page(page, tmp_path)
    assert (failure.traceback[-1].path, failure.traceback[-1].lineno) == (page, 4)


def test_a_session_must_print_what_it_shows(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> 1 + 1\n2\n```\n")
    assert run_page(page, tmp_path) == 1
    page.write_text("```python\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run_page(page, tmp_path)


def test_a_command_must_succeed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ pip install nothing\n$ python -c 'print(1)'\n1\n```\n")
    assert run_page(page, tmp_path) == 1
    page.write_text("```console\n$ python -c 'raise SystemExit(3)'\n```\n")
    with pytest.raises(AssertionError, match="SystemExit"):
        run_page(page, tmp_path)


def test_a_marked_block_and_other_languages_are_left_out(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n\n```json\n{\n```\n")
    assert run_page(page, tmp_path) == 0
