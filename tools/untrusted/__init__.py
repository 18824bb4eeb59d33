"""Inspect a foreign bundle before anything parses, imports, unpacks or runs it.

    python tools/verify.py --untrusted some_bundle.zip                          # tells what it would do
    python tools/verify.py --untrusted some_bundle.zip --allow network,dynamic  # what you grant its Python code
    python -I fetch.pyz --look some_bundle.zip                                  # the same, by Python 3.11 alone

A bundle is code: MONAI evaluates the ``$`` strings of its configs, calls what ``_target_`` names and imports its
``scripts/``. Configs must keep to an allow-list. Python is read for what reaches beyond arithmetic and files; that is
refused until granted by ``--allow``, and is no sandbox: code may hide what it does.

`policy` says what is allowed. The `container` is judged first, then every ``check_<what>(bundle)`` yields what it
finds, refusals and notes: `files`, `weights`, `expressions` and `components` of `configs`, `code`. Nothing here needs
more than the standard library (and PyYAML, where a bundle has YAML).
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .code import check_python
from .components import check_components, check_strings
from .configs import imports, read_documents
from .container import DAMAGED, NOTE, Bundle, Check, Finding, read_folder, read_zip
from .expressions import check_expressions
from .files import check_files, check_large_files, check_logging, check_metadata
from .policy import GRANTS
from .weights import check_weights

CHECKS: list[Check] = [check_files, check_expressions, check_components, check_strings, check_logging]
CHECKS += [check_metadata, check_large_files, check_weights, check_python]


def attempt(check: Check, bundle: Bundle) -> list[Finding]:
    """Run a check; one that cannot even run has found something that it was not made for."""
    try:
        return list(check(bundle))
    except Exception as error:
        return [Finding("", f"{check.__name__} cannot judge this bundle ({type(error).__name__}: {str(error)[:200]})")]


def examine(path: Path) -> list[Finding]:
    """All that is to be told of a bundle, in a zip or a folder."""
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            members, found = read_folder(path)
        else:
            try:
                members, found = read_zip(stack.enter_context(zipfile.ZipFile(path)))
            except DAMAGED as error:
                return [Finding("", f"is no zip, or a damaged one: {error}")]
        if not found:  # a container that lies is not read further
            documents, found = read_documents(members)
            bundle = Bundle(members, documents, imports(documents))
            found += [finding for check in CHECKS for finding in attempt(check, bundle)]
        return list(dict.fromkeys(found))


def inspect(path: Path, allowed: Collection[str] = ()) -> list[str]:
    """Judge a bundle -> reasons to refuse it, one a line; none if there is none.

    Args:
        path: a zip or a folder.
        allowed: grants, see `policy.GRANTS`; also ``torchscript``, and packages that are not known here.
    """
    return [sentence(finding) for finding in examine(path) if refuses(finding, allowed)]


def refuses(finding: Finding, allowed: Collection[str]) -> bool:
    """Whether a finding is a reason to refuse its bundle."""
    return finding.needs != NOTE and finding.needs not in allowed


def sentence(finding: Finding) -> str:
    """One finding in one line, without what a terminal would obey."""
    text = f"{finding.member}: {finding.text}" if finding.member else finding.text
    how = f"; read it, then grant it: --allow {finding.needs}" if finding.needs not in ("", NOTE) else ""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join((text + how).split()))


def look(paths: Sequence[Path], allowed: Collection[str] = ()) -> int:
    """Print all that is found in bundles -> exit code: 1 if one of them is refused, else 0."""
    refused = 0
    for path in paths:
        problems = 0
        for finding in examine(path):
            if refuses(finding, allowed):
                problems += 1
                print(f"REFUSED {sentence(finding)}")
            else:
                print(f"{'note   ' if finding.needs == NOTE else 'allowed'} {sentence(finding._replace(needs=NOTE))}")
        passed = "nothing to refuse; that is no proof of good will"
        print(f"{path}: {f'refused, {problems} reasons' if problems else passed}", flush=True)
        refused |= bool(problems)
    return refused


# The option ``--allow`` of what calls this.
ALLOW: dict[str, Any] = {
    "metavar": "GRANT[,GRANT]",
    "type": lambda text: frozenset(re.findall(r"[^\s,]+", text)),
    "default": frozenset(),
    "help": f"what a foreign bundle's Python code may do: {', '.join(GRANTS)}, torchscript, or the name of a package",
}
