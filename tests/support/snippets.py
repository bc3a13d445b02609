"""Code blocks of Markdown pages, run as a reader would run them: from top to bottom, in one session per page.

`python` blocks are executed; those written as `>>>` sessions must print what they show. In `console` blocks the lines
that start with `python`, `tfree` or `atman-explain`, after `$ ` or not, are executed. A block after the comment
`<!-- not run: reason -->` is left out.
"""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"(?P<skip><!-- not run: [^>]+ -->\s*)?^```(?P<language>\w+)\n(?P<code>.*?)^```", re.M | re.S)
RUN = ("python ", "tfree ", "atman-explain ")


@dataclass(frozen=True)
class Snippet:
    """One block; `line` is where its code starts in the page."""

    language: str
    code: str
    line: int


def snippets(text: str) -> list[Snippet]:
    """The blocks of a page that have to work."""
    return [
        Snippet(match["language"], match["code"], text.count("\n", 0, match.start("code")) + 1)
        for match in BLOCK.finditer(text)
        if match["language"] in ("python", "console") and not match["skip"]
    ]


def run_page(page: Path, folder: Path) -> int:
    """Run every snippet of the page inside `folder`, and return how many there were.

    Raises:
        Exception: whatever the snippet raised, with a traceback that names the page and its line.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    found = snippets(page.read_text(encoding="utf-8"))
    with contextlib.chdir(folder):
        for each in found:
            if each.language == "console":
                _run_commands(each)
            elif each.code.startswith(">>>"):
                _run_session(each, page, names)
            else:
                padding = "\n" * (each.line - 1)  # so that tracebacks show the page's line numbers
                exec(compile(padding + each.code, str(page), "exec"), names)
    return len(found)


def _run_commands(snippet: Snippet) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line in snippet.code.splitlines():
        command = line.removeprefix("$ ")
        if command.startswith(RUN):
            done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _run_session(snippet: Snippet, page: Path, names: dict[str, Any]) -> None:
    session = doctest.DocTestParser().get_doctest(snippet.code, names, page.name, str(page), snippet.line - 1)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    out = io.StringIO()
    runner.run(session, out=out.write, clear_globs=False)
    names.update(session.globs)
    assert not runner.failures, out.getvalue()
