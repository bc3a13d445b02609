"""How trainings and evaluations put what they made in its place: whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START, END = "<!-- results -->", "<!-- /results -->"
"""Between these marks of a README stand its tables."""


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a new folder to write to; without an error it takes the place of `out`, which is never half written."""
    aside, previous = out.with_name(out.name + ".partial"), out.with_name(out.name + ".previous")
    for folder in (aside, previous):
        shutil.rmtree(folder, ignore_errors=True)
    yield aside
    if out.exists():
        os.replace(out, previous)
    os.replace(aside, out)
    shutil.rmtree(previous, ignore_errors=True)


def insert(text: str, tables: str) -> str:
    """Put tables between the marks of a text.

    Raises:
        ValueError: the marks are missing.
    """
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"text must contain {START} and {END}, the place of the tables.")
    return pattern.sub(lambda _: f"{START}\n{tables}\n{END}", text)
