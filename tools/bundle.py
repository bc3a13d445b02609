"""Writes the modules that a pipeline needs into one file: diffusers copies that file to its cache, and no other."""

import ast
from collections.abc import Iterator
from pathlib import Path


def bundle(entry: Path) -> str:
    """The module `entry` and the siblings it imports, as the text of one module, in the order of their needs.

    Relative imports go, other top-level imports are merged at the top, and the docstring of `entry` stays one; those of
    the others become comments.

    Raises:
        ValueError: two modules define one name, or a sibling is imported under another name.
    """
    order = _modules(entry)
    imports: dict[tuple[int, str], set[str]] = {}
    owners: dict[str, str] = {}
    bodies = []
    for path in order:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in _defined(tree):
            if owners.setdefault(name, path.name) != path.name:
                raise ValueError(f"{path.name} and {owners[name]} both define {name}; one file needs distinct names.")
        for node in tree.body:
            _collect(node, imports)
        bodies.append(_body(path, tree))
    if taken := sorted(owners.keys() & {_bound(each) for names in imports.values() for each in names}):
        raise ValueError(f"the modules define {taken}, which others of them import.")
    docstring = ast.get_docstring(ast.parse(order[-1].read_text(encoding="utf-8")), clean=False)
    return f'"""{docstring}"""\n\n' + _import_block(imports) + "\n\n" + "\n\n\n".join(bodies) + "\n"


def _modules(entry: Path) -> list[Path]:
    """`entry` and its siblings: what a module imports at its top comes before it, what its functions import may not."""
    order: list[Path] = []
    late: list[Path] = []

    def visit(path: Path, above: tuple[Path, ...] = ()) -> None:
        if path in order or path in above:
            return
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                visit(path.with_name(f"{node.module}.py"), (*above, path))
        order.append(path)
        late.extend(path.with_name(f"{node.module}.py") for node in _relative(tree))

    visit(entry)
    while missing := [path for path in late if path not in order]:
        order.remove(entry)
        visit(missing[0])
        order.append(entry)
    return order


def _relative(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if any(alias.asname not in (None, alias.name) for alias in node.names):
                raise ValueError(f"line {node.lineno} renames what it imports from {node.module}; one file cannot.")
            yield node


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for each in targets if isinstance(each, ast.Name))


def _collect(node: ast.stmt, imports: dict[tuple[int, str], set[str]]) -> None:
    """Note what a top-level statement imports from elsewhere: `import x` under (0, x), `from x import` under (1, x)."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            imports.setdefault((0, alias.name), set()).add(ast.unparse(alias))
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
        imports.setdefault((1, node.module), set()).update(ast.unparse(alias) for alias in node.names)


def _bound(alias: str) -> str:
    return alias.rpartition(" as ")[2].partition(".")[0]


def _import_block(imports: dict[tuple[int, str], set[str]]) -> str:
    lines = []
    for (is_from, module), names in sorted(imports.items()):
        if is_from:
            lines += [f"from {module} import (", *(f"    {name}," for name in sorted(names)), ")"]
        else:
            lines += [f"import {name}" for name in sorted(names)]
    return "\n".join(lines)


def _body(path: Path, tree: ast.Module) -> str:
    """A module's text without its docstring, its top-level imports, and relative imports anywhere."""
    lines = path.read_text(encoding="utf-8").splitlines()
    gone: set[int] = set()
    docstring = ast.get_docstring(tree)
    for node in (*tree.body[: docstring is not None], *_relative(tree), *tree.body):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if (is_import or node is tree.body[0]) and node.end_lineno is not None:
            gone.update(range(node.lineno, node.end_lineno + 1))
    kept = "\n".join(line for number, line in enumerate(lines, 1) if number not in gone).strip("\n")
    title = "\n".join(f"# {line}".rstrip() for line in f"{path.name}: {docstring or ''}".splitlines())
    return f"{title}\n\n{kept}"
