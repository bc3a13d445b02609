"""What a Python file imports, and where in it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """`module` is the dotted name as written, `level` the number of leading dots."""

    module: str
    level: int
    line: int
    in_try: bool
    in_function: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports_of(path: Path) -> list[Import]:
    """Every import statement of the file, at any depth; those for type checkers only are left out."""
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), in_try=False, in_function=False))


def _walk(node: ast.AST, in_try: bool, in_function: bool) -> Iterator[Import]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, 0, node.lineno, in_try, in_function)
    if isinstance(node, ast.ImportFrom):
        yield Import(node.module or "", node.level, node.lineno, in_try, in_function)
    in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    guarded = node.body if isinstance(node, ast.Try) and _catches_import_error(node) else []
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, in_try or child in guarded, in_function)


def _catches_import_error(node: ast.Try) -> bool:
    caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
    return "ImportError" in caught or "ModuleNotFoundError" in caught
