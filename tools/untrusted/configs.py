"""Configs as MONAI reads them: parsed, walked through by id, and the text of an expression as it comes to ``eval()``.

JSON and YAML must leave no choice to a reader. MONAI builds an expression by replacing text in text, so that keys and
quotes become code: what is judged is that result, letter by letter.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from .container import Finding, Member, suffix
from .policy import GLOBALS, words
from .syntax import UNPARSABLE, Import, bindings

yaml: Any = None
with contextlib.suppress(ImportError):  # MONAI needs it, this program does not
    import yaml  # type: ignore[no-redef]

YAML = words(".yaml .yml")
CONFIGS = YAML | {".json"}
MAX_DEPTH, MAX_EXPRESSION, MAX_DIGITS = 64, 10_000, 30


def parse_json(text: str) -> Any:
    """Parse JSON of which every reader makes the same: no key twice, no NaN, no number that takes forever."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(
                f"key {max(keys, key=keys.count)!r} stands twice: MONAI takes the last, a reader the first"
            )
        return dict(pairs)

    def number(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, object_pairs_hook=unique, parse_int=number, parse_constant=constant)


def parse_yaml(text: str) -> Any:
    """Parse YAML without tags, aliases and keys that stand twice."""
    if yaml is None:
        raise ValueError("YAML cannot be judged without PyYAML: pip install pyyaml, or convert it to JSON")
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, (yaml.TagToken, yaml.AliasToken)):
                raise ValueError(f"a tag or an alias in line {token.start_mark.line + 1}: write it out")
        nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
        while nodes:
            node = nodes.pop()
            if isinstance(node, yaml.MappingNode):
                keys = [str(key.value) for key, _ in node.value]
                if len(set(keys)) < len(keys):
                    raise ValueError(f"key {max(keys, key=keys.count)!r} stands twice: MONAI takes the last")
                nodes += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                nodes += node.value
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())}") from error


def read_documents(members: dict[str, Member]) -> tuple[dict[str, Any], list[Finding]]:
    """Parse all JSON and YAML, wherever it lies, as a macro or a command may name any of it."""
    documents, found = dict[str, Any](), list[Finding]()
    for name, member in members.items():
        if suffix(name) in CONFIGS:
            try:
                text = member.read().decode()
                documents[name] = (parse_yaml if suffix(name) in YAML else parse_json)(text)
                deepest = max(path.count("::") for path, *_ in walk(documents[name]))
                if deepest >= MAX_DEPTH:
                    found.append(Finding(name, f"is nested {deepest} deep"))
            except (ValueError, RecursionError) as error:
                documents.pop(name, None)
                deep = isinstance(error, RecursionError)
                found.append(Finding(name, "is nested too deep" if deep else f"cannot be judged: {error}"))
    return documents, found


def walk(content: Any) -> Iterator[tuple[str, str, Any, dict]]:
    """Yield (id, key, value, the dict that holds it) of all that a config holds; ids as MONAI makes them.

    A key may be a path itself ("train#net#_target_" of an overlay): the key is then its last part.
    """
    stack: list[tuple[str, str, Any, dict]] = [("", "", content, {})]
    while stack:
        path, _, value, _ = item = stack.pop()
        yield item
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, part in pairs:
            name = str(name).replace("#", "::")
            name = name.removeprefix("+") if not path else name
            holder = value if isinstance(value, dict) and "::" not in name else {}
            stack.append((f"{path}::{name}" if path else name, name.rpartition("::")[2], part, holder))


def listed(value: Any) -> list[Any]:
    """A value that may stand for a list of one."""
    return value if isinstance(value, list) else [value]


def absolute(value: str, path: str) -> str:
    """A string of a config as MONAI has it once relative ids are absolute: keys become a part of its text."""
    value, here = value.replace("#", "::"), path.split("::")
    for prefix in sorted(set(re.findall(r"[@%]::+", value)), reverse=True):
        up = prefix[1:].count("::")
        value = value.replace(prefix, prefix[0] + "".join(f"{part}::" for part in here[: max(len(here) - up, 0)]))
    return value


def as_evaluated(value: str, path: str) -> str:
    """The text that MONAI hands to eval() for an expression, with what stands for the references spliced in.

    It is a replacement of text, quotes and all, also within strings: only the result tells what is run.
    """
    value = absolute(value, path)
    for reference in sorted(re.findall(r"@\w*(?:::\w*)*", value), key=len, reverse=True):
        value = value.replace(reference, f"__local_refs['{reference[1:]}']")
    return value[1:]


def parse_expression(value: str, path: str) -> ast.AST:
    """Parse a ``$`` string as MONAI does -> an import statement, or the expression."""
    text = as_evaluated(value, path)
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"is an expression of {len(text)} characters")
    try:
        first = ast.parse(text).body[:1]
        if first and isinstance(first[0], Import):
            return first[0]
        return ast.parse(text.lstrip(" \t"), mode="eval").body
    except UNPARSABLE as error:
        raise ValueError(f"cannot be parsed ({error})") from error


def expressions(documents: dict[str, Any]) -> Iterator[tuple[str, ast.AST]]:
    """Yield (id, parsed) of all expressions that can be parsed."""
    for content in documents.values():
        for path, _, value, _ in walk(content):
            if isinstance(value, str) and value.startswith("$"):
                with contextlib.suppress(ValueError):
                    yield path, parse_expression(value, path)


def imports(documents: dict[str, Any]) -> dict[str, set[str]]:
    """The names of expressions that are modules, or parts of them; overlays use what another file imports."""
    found = {name: {origin} for name, origin in GLOBALS.items()}
    for _, node in expressions(documents):
        if isinstance(node, Import):
            for name, origin in bindings(node):
                found.setdefault(name, set()).add(origin)
    return found
