"""Fresh interpreters for tests, where some packages can be made to look as if they were not installed."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("atman_explain", "ledits_pipeline", "scar_peft", "shared_kernels", "tfree_tokenizer")

# Returning None, rather than raising, is what a missing package looks like to the libraries' own probes.
_HIDE = """
from importlib.machinery import PathFinder
_find = PathFinder.find_spec
def _find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {hidden!r} else _find(name, path, target)
PathFinder.find_spec = staticmethod(_find_spec)
"""


def run_python(
    code: str, *arguments: str, hidden: Sequence[str] = (), cwd: Path | None = None, timeout: float = 110
) -> str:
    """Run `code` in a new interpreter, without the `hidden` packages, and return what it printed.

    Raises:
        AssertionError: it failed; the message holds its output.
    """
    prelude = _HIDE.format(hidden=set(hidden)) if hidden else ""
    command = [sys.executable, "-c", prelude + code, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
