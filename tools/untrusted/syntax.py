"""Python's syntax, as far as the expressions of configs and the code of ``scripts/`` are judged alike."""

from __future__ import annotations

import ast
from collections.abc import Iterator

Import = ast.Import | ast.ImportFrom
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what the parser raises


def bindings(node: Import) -> Iterator[tuple[str, str]]:
    """Yield (name, what it stands for) of an import."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield alias.asname or alias.name, alias.name
        else:
            yield alias.asname or alias.name, f"{'.' * node.level}{node.module or ''}.{alias.name}"


def unchained(node: ast.AST) -> tuple[ast.AST, list[str]]:
    """Take off a chain of attributes -> what they are of, and their names from there on."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.insert(0, node.attr)
        node = node.value
    return node, attributes


def visible_arguments(called: ast.Call | None) -> int | None:
    """The number of a call's arguments, if there is a call and no ``*`` hides it."""
    if not called or any(isinstance(a, ast.Starred) for a in called.args) or None in [k.arg for k in called.keywords]:
        return None
    return len(called.args) + len(called.keywords)


def unsafe_load(dotted: str, called: ast.Call | None) -> str:
    """torch.load and numpy.load run code unless told not to -> reason, or none."""
    if not called or visible_arguments(called) is None:
        return f"{dotted} is used in a way that hides its arguments"
    settings = {k.arg: getattr(k.value, "value", ...) for k in called.keywords}
    if dotted == "torch.load":
        return "" if settings.get("weights_only") is True else "torch.load runs code unless it has weights_only=True"
    safe = settings.get("allow_pickle", False) is False and len(called.args) < 3
    return "" if safe else "numpy.load with allow_pickle runs code"
