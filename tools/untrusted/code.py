"""Python code: what reaches beyond arithmetic and files is refused until granted, and every writing line is told.

This is no sandbox: code may hide what it does. It tells a reader where to look.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from .container import NOTE, Bundle, Finding
from .policy import (
    BUILTINS,
    BY_NAME,
    DUNDERS,
    GRANTS,
    GUARDED,
    HARMLESS,
    LIBRARIES,
    LOADS,
    NEEDED_FOR,
    SETTINGS,
    STDLIB,
    WRITERS,
    WRITING,
)
from .syntax import UNPARSABLE, Import, bindings, unchained, unsafe_load


def grant_for(dotted: str, own: Collection[str] = ()) -> str:
    """The grant that naming something in Python code needs -> its name, or none.

    A module reached through another (``torch.serialization.os.system``) counts like itself; the bundle's `own` do not.
    """
    parts = dotted.split(".")
    for start in (start for start, part in enumerate(parts) if start == 0 or part not in own):
        path = ".".join(parts[start:])
        if HARMLESS.match(path):
            return ""
        for grant, pattern in NEEDED_FOR.items():
            if pattern.match(path):
                return grant
    return ""


class Code:
    """Reads one Python file: `needs` tells which grant each line needs, `writes` the lines that change files."""

    def __init__(self, source: bytes, own: Collection[str] = ()):
        self.needs: list[tuple[str, int, str]] = []
        self.writes: set[int] = set()
        self.origins: dict[str, set[str]] = {}
        self.own = own
        tree = ast.parse(source)
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        nodes = list(ast.walk(tree))
        for node in nodes:
            if isinstance(node, Import):
                self.imports(node)
        for node in nodes:
            if isinstance(node, ast.Name):
                self.name(node)
            elif isinstance(node, ast.Attribute):
                self.attribute(node)
            elif isinstance(node, ast.Call):
                self.call(node)

    def need(self, grant: str, node: ast.AST, what: str) -> None:
        """Note that a line needs a grant."""
        self.needs += [(grant, getattr(node, "lineno", 0), what)] if grant else []

    def imports(self, node: Import) -> None:
        """What is imported, and under which names; a package that is not known needs a grant of its own name."""
        for name, origin in bindings(node):
            if origin.startswith(".") or origin.split(".")[0] == "scripts":
                origin = f"scripts.{origin.lstrip('.')}"
            root = origin.split(".")[0]
            known = root in STDLIB | LIBRARIES | {"scripts"} or any(
                grant_for(part, self.own) for part in (root, origin)
            )
            self.need(grant_for(origin, self.own) if origin not in LOADS else "pickle", node, origin)
            self.need("" if known else root, node, f"{root} is not known here")
            if name == "*" and root != "scripts":
                self.need("dynamic", node, f"everything of {origin.removesuffix('.*')}")
            bound = name if isinstance(node, ast.ImportFrom) or "." not in name else root
            self.origins.setdefault(bound, set()).add(
                root if bound == root and isinstance(node, ast.Import) else origin
            )

    def chains(self, node: ast.AST) -> list[str]:
        """The dotted paths that a name with attributes may stand for."""
        node, attributes = unchained(node)
        name = node.id if isinstance(node, ast.Name) else ""
        origins = sorted(self.origins.get(name, {name} & GUARDED))  # one from elsewhere is what its name says
        return [".".join([origin, *attributes]) for origin in origins]

    def name(self, node: ast.Name) -> None:
        """A builtin that runs text, or a module handed on, of which nobody sees what is used."""
        if node.id in BUILTINS and not self.is_argument(node):
            self.need("dynamic", node, node.id)
        alone = not isinstance(self.parents[node], ast.Attribute) and isinstance(node.ctx, ast.Load)
        if alone and node.id in ("getattr", "setattr") and not self.is_called(node):
            self.need("dynamic", node, f"{node.id} handed on")
        if alone and set(self.chains(node)) & GUARDED and not is_first_of_getattr(self.parents[node], node):
            self.need("dynamic", node, f"{node.id} handed on")

    def attribute(self, node: ast.Attribute) -> None:
        """Something of a module, or a name that tells what it does whatever it belongs to."""
        chains = self.chains(node)
        for dotted in chains:
            if dotted in WRITERS:
                self.writes.add(node.lineno)
            if dotted not in LOADS or not self.is_called(node):
                self.need(grant_for(dotted, self.own), node, dotted)
        if not chains:
            self.need(grant_for(node.attr) if node.attr in BY_NAME else "", node, f".{node.attr}")
        if leads_anywhere(node.attr) and not ast.unparse(node.value).startswith("super("):
            self.need("dynamic", node, f".{node.attr}")
        if node.attr in WRITING and self.is_called(node) and not chains:
            self.writes.add(node.lineno)

    def is_argument(self, node: ast.Name) -> bool:
        """Whether a name is an argument of a function around it."""
        above: ast.AST | None = node
        while above := self.parents.get(above):  # type: ignore[arg-type]
            if isinstance(above, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                inside = {argument.arg for argument in ast.walk(above.args) if isinstance(argument, ast.arg)}
                if node.id in inside:
                    return True
        return False

    def is_called(self, node: ast.AST) -> bool:
        """Whether a node is the function of a call."""
        call = self.parents.get(node)
        return isinstance(call, ast.Call) and call.func is node

    def call(self, node: ast.Call) -> None:
        """Calls whose arguments decide."""
        for dotted in self.chains(node.func):
            if dotted in LOADS and unsafe_load(dotted, node):
                self.need("pickle", node, f"{dotted} that may unpickle")
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", ...)
            if keyword.arg in SETTINGS and isinstance(value, bool) and value is not SETTINGS[keyword.arg]:
                self.need("pickle", node, f"{keyword.arg}={value}")
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("getattr", "setattr") and len(node.args) > 1:
            second = getattr(node.args[1], "value", None)
            self.need("dynamic" if leads_anywhere(str(second)) else "", node, f".{second}")
            for dotted in self.chains(node.args[0]):
                if isinstance(second, str):
                    self.need(grant_for(f"{dotted}.{second}"), node, f"{dotted}.{second}")
                elif dotted.split(".")[0] != "scripts" and (dotted.split(".")[0] == dotted or dotted.islower()):
                    self.need("dynamic", node, f"{name} of {dotted} by a computed name")
        opens = 1 if name == "open" else 0 if getattr(node.func, "attr", "") == "open" else None
        if opens is not None:
            modes = [*node.args[opens : opens + 1], *(k.value for k in node.keywords if k.arg == "mode")]
            if modes and not re.fullmatch(r"r[bt]?", str(getattr(modes[0], "value", "?"))):
                self.writes.add(node.lineno)


def leads_anywhere(attribute: str) -> bool:
    """Whether an attribute leads from any object to all others."""
    return attribute.startswith("__") and attribute.strip("_") in DUNDERS


def is_first_of_getattr(call: ast.AST, node: ast.AST) -> bool:
    """Whether a module is what getattr or setattr is asked of: `Code.call` judges that."""
    return (
        isinstance(call, ast.Call)
        and getattr(call.func, "id", "") in ("getattr", "setattr", "hasattr")
        and (call.args[:1] == [node])
    )


def check_python(bundle: Bundle) -> Iterator[Finding]:
    """Python code keeps to arithmetic and files; what reaches further is refused until granted."""
    files = dict(bundle.named(".py"))
    if files:
        lines = sum(member.read().count(b"\n") for member in files.values())
        yield Finding("scripts", f"{len(files)} Python files, {lines} lines, run with your rights: read them", NOTE)
    own = {Path(name).stem for name in files} - sys.stdlib_module_names - GUARDED
    for name, member in files.items():
        try:
            code = Code(member.read(), own)
        except UNPARSABLE as error:
            yield Finding(name, f"cannot be parsed, so it cannot be judged: {error}")
            continue
        for grant in dict.fromkeys(grant for grant, _, _ in code.needs):
            spots = sorted({(line, what) for needed, line, what in code.needs if needed == grant})
            places = ", ".join(f"{what} (line {line})" for line, what in spots[:4])
            more = f" and {len(spots) - 4} more" if len(spots) > 4 else ""
            does = GRANTS.get(grant, "uses a package unknown here")
            yield Finding(name, f"{does}: {places}{more}", grant)
        if code.writes:
            yield Finding(
                name, f"writes, moves or deletes files: line {', '.join(map(str, sorted(code.writes)))}", NOTE
            )
