"""Check that the documentation is complete: public names, links, and commands that exist.

python tools/check_docs.py     exit with 1, and list what is missing
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("packages/*", "shared-kernels")
PAGES = (
    "*.md",
    "benchmarks/*.md",
    "docs/*.md",
    "packages/*/*.md",
    "shared-kernels/*.md",
    "miniatures/*.md",
    "miniatures/*/*.md",
)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:|#)([^)#\s]+)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"\bmake ([a-z][a-z-]*)(?=[`\s])")


def pages(root: Path = ROOT) -> list[Path]:
    """The Markdown files that people read."""
    return sorted(page for pattern in PAGES for page in root.glob(pattern))


def public_names(package: Path) -> list[str]:
    """`__all__` of the one package below `package`/src, found by importing it: it is lazy, so this costs nothing."""
    (init,) = package.glob("src/*/__init__.py")
    sys.path.insert(0, str(init.parents[1]))
    try:
        return [name for name in __import__(init.parent.name).__all__ if not name.startswith("__")]
    finally:
        sys.path.pop(0)


def missing_names(root: Path = ROOT) -> Iterator[str]:
    """Public names that their package's README does not show as code."""
    for package in sorted(folder for pattern in PACKAGES for folder in root.glob(pattern)):
        readme = package / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        for name in public_names(package):
            if not re.search(rf"\b{name}\b", text):
                yield f"{readme.relative_to(root)}: the public name {name} is not mentioned"


def broken_links(root: Path = ROOT) -> Iterator[str]:
    """Relative links of the pages that lead nowhere."""
    for page in pages(root):
        for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            if not (page.parent / target).exists():
                yield f"{page.relative_to(root)}: the link {target} leads nowhere"


def unknown_targets(root: Path = ROOT) -> Iterator[str]:
    """`make` targets that a page tells people to run and the Makefile does not have."""
    known = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in pages(root):
        code = re.findall(r"`make [^`]+`|^\$ make .*$|^make .*$", page.read_text(encoding="utf-8"), re.MULTILINE)
        for target in sorted({name for line in code for name in MAKE.findall(f"{line} ")} - known):
            yield f"{page.relative_to(root)}: the Makefile has no target {target}"


def missing_tests(root: Path = ROOT) -> Iterator[str]:
    """Test files that a page names and that are nowhere in the repository."""
    folders = ("tests", "shared-kernels/tests", "packages/*/tests", "benchmarks/tests", "miniatures/tests")
    known = {path.name for pattern in folders for path in root.glob(f"{pattern}/**/test_*.py")}
    for page in pages(root):
        named = set(re.findall(r"`(?:[\w./-]+/)?(test_\w+\.py)`", page.read_text(encoding="utf-8")))
        for name in sorted(named - known):
            yield f"{page.relative_to(root)}: there is no test file {name}"


def main() -> int:
    problems = [*missing_names(), *broken_links(), *unknown_targets(), *missing_tests()]
    print("\n".join(problems) or "the documentation is complete")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
