"""Components: what ``_target_`` lets MONAI call, the arguments by which that looks up more, and plain strings."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .configs import absolute, listed, parse_expression, walk
from .container import METADATA, NOTE, Bundle, Finding, leads_out
from .expressions import DOTTED, forbidden, names_danger
from .policy import CLASSES, FETCHING, FOLDERS, LOOK_UP, LOOKED_UP, SETTINGS


def target_problem(value: Any, holder: dict, imported: dict[str, set[str]], path: str) -> str:
    """Why MONAI must not call what a ``_target_`` names -> reason, or none."""
    if not isinstance(value, str) or value[:1] in ("@", "%"):
        return "must be the name itself, not a reference"
    if value.startswith("$"):
        node = parse_expression(value, path)
        dotted = ast.unparse(node)
        root = dotted.split(".")[0]
        if not re.fullmatch(r"\w+(\.\w+)+", dotted) or root not in imported:
            return "computes what to call, which could be the name of anything"
        return next(filter(None, (uncallable(f"{o}{dotted.removeprefix(root)}", holder) for o in imported[root])), "")
    if "." not in value:
        ours = re.fullmatch(r"[A-Z]\w*", value) and value not in CLASSES
        return "" if ours else f"{value} is no class of MONAI that a config may use: write its full path, if it is one"
    if not DOTTED.fullmatch(value):
        return f"{value[:60]!r} is no dotted path"
    return uncallable(value, holder)


def uncallable(path: str, holder: dict) -> str:
    """Why a component, with the settings it has, must not call something -> reason, or none."""
    setting, safe = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}.get(path, ("", False))
    if holder.get(setting, False) is not safe:
        return f"{path} runs code unless {setting} is {safe}"
    return forbidden(path)


def component_problem(bundle: Bundle, path: str, value: Any, holder: dict) -> str:
    """The same, of a component in a bundle, which may name only scripts of its own."""
    try:
        problem = target_problem(value, holder, bundle.imported, path)
    except ValueError as error:
        return str(error)
    if not problem and value.startswith("scripts.") and not has_module(bundle, value):
        return f"{value} is not in this bundle: another one's scripts would run"
    return problem


def argument_problem(bundle: Bundle, name: str, key: str, value: Any, holder: dict) -> str:
    """Why an item of a config, by its key, must not have a value -> reason, or none."""
    if key == "_mode_":
        looks_up = str(holder.get("_target_", "?LoadImage")).rpartition(".")[2].lstrip("?") in LOOK_UP
        if value != "default" and (value != "callable" or looks_up):
            return f"_mode_ {value!r} is not for this component: debug stops in a debugger"
    elif key == "_debug_" and value is not False:
        return "_debug_ stops in a debugger"
    elif key in SETTINGS and value is not SETTINGS[key] and name.startswith("configs/"):
        return f"must be {str(SETTINGS[key]).lower()}, written out"
    elif key in LOOKED_UP:
        return next(filter(None, (looked_up(bundle, item) for item in listed(value))), "")
    elif key in FOLDERS and isinstance(value, str) and value[:1] not in "$@%" and leads_out(value):
        return f"{value!r} is outside of the bundle: what is written there may do harm"
    return ""


def check_components(bundle: Bundle) -> Iterator[Finding]:
    """Every ``_target_`` is of an allowed package, and arguments that name code are plain and allowed."""
    for name, content in bundle.documents.items():
        for path, key, value, holder in walk(content):
            if key == "_target_":
                problem = component_problem(bundle, path, value, holder)
            else:
                problem = argument_problem(bundle, name, key, value, holder)
            if problem:
                yield Finding(name, f"{path}: {problem}")
            elif key == "_target_" and value.rpartition(".")[2] in FETCHING:
                yield Finding(name, f"{path}: {value} may download a network from a hub, and run its code", NOTE)
            elif key == "pretrained" and value is True:
                yield Finding(name, f"{path}: weights may be downloaded", NOTE)


def looked_up(bundle: Bundle, value: Any) -> str:
    """Why MONAI must not look up a class by this string -> reason, or none."""
    if not isinstance(value, str):
        return ""
    if value.startswith("@"):
        path = value[1:].replace("#", "::")
        ends = [v for content in bundle.documents.values() for p, _, v, _ in walk(content) if p == path]
        if not ends or any(isinstance(v, (str, list)) for v in ends):
            return f"{value} must be the name itself, not a reference"
        return ""
    if value[:1] in ("$", "%"):
        return f"{value[:60]!r} computes a name that is looked up: write the name"
    if value in dir(builtins) or not re.fullmatch(r"\w+(\.\w+)*", value):
        return f"{value!r} is no class to look up"
    return forbidden(value) if "." in value else ""


def has_module(bundle: Bundle, dotted: str) -> bool:
    """Whether the module of a dotted path below ``scripts`` lies in the bundle."""
    stems = {str(Path(name).with_suffix("")).removesuffix("/__init__") for name, _ in bundle.named(".py")}
    return dotted.rpartition(".")[0].replace(".", "/") in stems


def check_strings(bundle: Bundle) -> Iterator[Finding]:
    """Macros stay in the bundle; plain strings name nothing that a class could look up; addresses are told."""
    for name, content in bundle.documents.items():
        for path, _, value, _ in walk(content):
            if not isinstance(value, str):
                continue
            macro = re.match(r"%(.*\.(?:json|ya?ml))(?=::|$)", absolute(value, path), re.IGNORECASE)
            if macro and (leads_out(macro[1]) or not any(f"/{n}".endswith(f"/{macro[1]}") for n in bundle.documents)):
                yield Finding(name, f"{path}: the macro {value!r} reads a file that is not in the bundle")
            if names_danger(value):
                yield Finding(name, f"{path}: {value!r} may be looked up, and is not for configs")
            if re.match(r"(?i)(https?|ftp|s3|gs|file|hf)://", value) and name != METADATA:
                yield Finding(name, f"{path}: the address {value[:100]}", NOTE)
