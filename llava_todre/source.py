"""Which code computes answers, and whether it has changed.

Comments, docstrings and layout do not count, nor do modules that the answers do not need.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


@cache
def digests(*modules: str, alone: str = "") -> dict[str, str]:
    """Return a hash of every module that some modules need, themselves included, by its name.

    Args:
        modules: of this package, without its name: ``vlm``, ``model.load``.
        alone: one more, which counts without what it needs.
    """
    found: dict[str, str] = {}
    waiting = [f"{PACKAGE.name}.{name}" for name in modules]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name], needed = _read(name)
        waiting += needed
    prefix = f"{PACKAGE.name}."
    if alone:
        found[prefix + alone] = _read(prefix + alone)[0]
    return {name.removeprefix(prefix): found[name] for name in sorted(found)}


def what_changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the names of what two descriptions of a run do not have in common.

    Args:
        before: by name; what is itself a mapping is compared by its names.
        after: as ``before``.
    """
    parts = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{key} ({', '.join(names[:3])}{more})")
        else:
            parts.append(key)
    return ", ".join(parts)


@cache
def _file(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def _read(module: str) -> tuple[str, list[str]]:
    """Return the hash of a module and the modules of this package that it imports."""
    file = _file(module)
    assert file is not None, f"no module {module}"
    tree = ast.parse(file.read_bytes())
    needed = [name for name in _imported(tree) if name.split(".")[0] == PACKAGE.name]
    parents = module.split(".")[:-1]
    needed += [".".join(parents[: end + 1]) for end in range(len(parents))]
    digest = hashlib.sha256(ast.dump(_Bare().visit(tree)).encode()).hexdigest()[:16]
    return digest, [name for name in needed if _file(name) is not None]


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield the names that may be modules, wherever they are imported; not those for types only."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from _imported(child)


class _Bare(ast.NodeTransformer):
    """Takes docstrings away, those of attributes too."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node
