"""Expressions: every ``$`` string of a config keeps to the allow-list of `policy`, in all that it consists of."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Collection, Iterator

from .configs import expressions, parse_expression, walk
from .container import Bundle, Finding
from .policy import (
    CLASSES,
    DANGERS,
    ESCAPES,
    EXPLICIT,
    GLOBALS,
    GUARDED,
    IDIOMS,
    LOADS,
    LOOK_UP,
    LOOKED_UP,
    NAMES,
    NEVER,
    NODES,
    ONLY,
    RULE_NAMES,
    SETTINGS,
)
from .syntax import Import, bindings, unchained, unsafe_load, visible_arguments

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def within(inside: str, parts: Collection[str]) -> bool:
    """Whether a dotted path is one of the parts, or lies below one."""
    return any(inside == part or inside.startswith(f"{part}.") for part in parts)


def forbidden(path: str, *, importing: bool = False) -> str:
    """Why a config may not name something by its dotted path -> reason, or none if it may.

    Args:
        path: e.g. ``torch.optim.Adam``.
        importing: whether a module is meant, which may then hold more than what is allowed.
    """
    parts = path.split(".")
    for number, part in enumerate(parts[1:], 1):
        if part.startswith("_"):
            return f"{part!r} is private, and may lead anywhere"
        if part in ESCAPES and ".".join(parts[: number + 1]) not in EXPLICIT:
            return f"{part!r} leads out of {'.'.join(parts[:number])}"
    package = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in ONLY), "")
    if not package:
        return f"{parts[0]} is not among the packages that a config may use"
    inside, only = path.removeprefix(package).removeprefix("."), ONLY[package]
    if within(inside, NEVER.get(package, ())) or parts[-1] in CLASSES:
        return f"{path} is not for configs"
    above = importing and (not inside or any(part.startswith(f"{inside}.") for part in only))
    if only and not above and not within(inside, only):
        return f"{path} is not among what a config may use of {package}"
    # A package met again within another: by its own rules.
    again = next((n for n in range(1, len(parts)) if GLOBALS.get(parts[n], parts[n]) in GUARDED), 0)
    return forbidden(".".join([GLOBALS.get(parts[again], parts[again]), *parts[again + 1 :]])) if again else ""


def names_danger(text: str) -> bool:
    """Whether a string is the dotted path of something that a class looking up strings must not find."""
    return bool(DOTTED.fullmatch(text) and text.split(".")[0] in DANGERS and forbidden(text))


class Expression:
    """Judges one expression by what it may consist of; `problems` are the reasons against it."""

    def __init__(self, node: ast.AST, imported: dict[str, set[str]], known: Collection[str], modules: Collection[str]):
        self.imported, self.modules = imported, modules
        nodes = list(ast.walk(node))
        self.names = {*known, *(n.arg for n in nodes if isinstance(n, ast.arg))}
        self.names |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.problems = [f"{type(n).__name__} has no place in a config" for n in nodes if not isinstance(n, NODES)]
        places = [n for n in nodes if isinstance(n, (ast.Attribute, ast.Subscript)) and not isinstance(n.ctx, ast.Load)]
        self.problems += [f"assigns to {ast.unparse(n)[:40]}" for n in places]
        if not self.problems:
            self.judge(node)

    def judge(self, node: ast.AST, called: ast.Call | None = None, indexed: bool = False) -> None:
        """Judge a node and all below it; `called` is the call whose function it is."""
        if isinstance(node, (ast.Attribute, ast.Name)):
            self.chain(node, called, indexed)
        elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "__local_refs":
            self.reference(node)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and ("__" in node.value or names_danger(node.value)):
                self.problems.append(f"the string {node.value[:40]!r} may name something that is not for configs")
        elif isinstance(node, ast.Call):
            self.call(node)
        else:
            for part in ast.iter_child_nodes(node):
                self.judge(part, indexed=isinstance(node, ast.Subscript))

    def reference(self, node: ast.Subscript) -> None:
        """References are judged where they lead to, except to an import, which is a module."""
        key = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if not isinstance(key, str) or not key or key in self.modules:
            self.problems.append(f"a reference to {key!r} hands on a module, or everything")

    def chain(self, node: ast.AST, called: ast.Call | None, indexed: bool) -> None:
        """A name with attributes: from a known package by its dotted path, else by each attribute."""
        node, attributes = unchained(node)
        if not isinstance(node, ast.Name):
            self.judge(node)
            self.attributes(attributes, called)
        elif node.id in self.imported:
            for dotted in (".".join([origin, *attributes]) for origin in sorted(self.imported[node.id])):
                self.named(dotted, called, indexed, handed_on=not attributes and "." not in dotted)
        elif node.id in NAMES and not attributes and node.id in ("getattr", "setattr", "type"):
            self.special(node.id, called)
        elif node.id not in NAMES and (node.id not in self.names or node.id in dir(builtins)):
            self.problems.append(f"the name {node.id!r} is not for configs, or unknown")
        else:
            self.attributes(attributes, called)

    def named(self, dotted: str, called: ast.Call | None, indexed: bool, handed_on: bool) -> None:
        """Something of a package."""
        reason = forbidden(dotted)
        if dotted == "os.environ" and indexed:
            reason = ""
        elif handed_on or dotted in ONLY:
            reason = f"{dotted} itself is handed on, so that what is used of it cannot be seen"
        elif dotted == "pathlib.Path.replace":
            reason = f"{dotted} moves a file"
        elif dotted.rpartition(".")[2] in LOOK_UP:
            reason = f"{dotted} looks up classes by strings: write it as a component, with _target_"
        elif dotted in LOADS:
            reason = reason or unsafe_load(dotted, called)
        if reason:
            self.problems.append(reason)

    def attributes(self, attributes: list[str], called: ast.Call | None) -> None:
        """Attributes of something unknown."""
        for attribute in attributes:
            if re.match(r"_[^a-z]", attribute) or attribute in ESCAPES:
                self.problems.append(f"the attribute {attribute!r} may lead anywhere")
        count = visible_arguments(called)
        if attributes[-1:] == ["eval"] and count != 0:
            self.problems.append("eval runs its arguments, and is for networks, without any")
        if attributes[-1:] == ["replace"] and (count is None or count < 2):
            self.problems.append("replace with one argument moves a file, and is for texts, with two")

    def special(self, name: str, called: ast.Call | None) -> None:
        """getattr and setattr with a name in sight; setattr for torch's backends alone; type of one thing."""
        arguments = called.args if called and not called.keywords else []
        if any(isinstance(argument, ast.Starred) for argument in arguments):
            arguments = []
        second = getattr(arguments[1], "value", None) if len(arguments) > 1 else None
        if name == "type" and len(arguments) == 1:
            return
        if name == "getattr" and isinstance(second, str):
            self.judge(ast.Attribute(arguments[0], second, ast.Load()))
        elif name == "setattr" and isinstance(second, str) and len(arguments) == 3:
            if not ast.unparse(arguments[0]).startswith("torch.backends.") or second.startswith("_"):
                self.problems.append("setattr is for torch.backends alone")
        else:
            self.problems.append(f"{name} hides what it works on")

    def call(self, node: ast.Call) -> None:
        """A call: its function, its arguments, and settings that make a harmless function dangerous."""
        self.judge(node.func, called=node)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.judge(argument)
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", ...)
            if keyword.arg in SETTINGS and value is not SETTINGS[keyword.arg]:
                self.problems.append(f"{keyword.arg} must be {SETTINGS[keyword.arg]}")
            if keyword.arg in LOOKED_UP:
                self.problems.append(f"{keyword.arg} is looked up by its name: write a component, with _target_")


def import_problems(node: Import, scripts: bool) -> list[str]:
    """Reasons against an import of a config, some of them empty; `scripts` tells whether the bundle has its own."""
    origins = [origin for _, origin in bindings(node)]
    problems = [forbidden(origin, importing=True) for origin in origins]
    if not scripts and any(origin.split(".")[0] == "scripts" for origin in origins):
        problems.append("scripts is not in this bundle: another one's would run")
    if isinstance(node, ast.ImportFrom) and "*" in [alias.name for alias in node.names]:
        problems.append("imports everything, under names not in sight")
    return problems


def check_expressions(bundle: Bundle) -> Iterator[Finding]:
    """Every ``$`` string keeps to the allow-list."""
    modules = {path for path, node in expressions(bundle.documents) if isinstance(node, Import)}
    modules |= {path.rpartition("::")[0] for path in modules} - {""}
    scripts = any(name.startswith("scripts/") for name in bundle.members)
    for name, content in bundle.documents.items():
        known = RULE_NAMES.get(name, frozenset())
        known |= {key for _, key, _, _ in walk(content) if known}
        for path, _, value, _ in walk(content):
            if not isinstance(value, str) or not value.startswith("$") or any(i.fullmatch(value) for i in IDIOMS):
                continue
            try:
                node = parse_expression(value, path)
                if isinstance(node, Import):
                    problems = import_problems(node, scripts)
                else:
                    problems = Expression(node, bundle.imported, known, modules).problems
            except ValueError as error:
                problems = [str(error)]
            for problem in dict.fromkeys(filter(None, problems)):
                yield Finding(name, f"{path} {value[:80]!r}: {problem}")
