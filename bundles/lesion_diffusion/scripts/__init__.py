"""Makes the repository's ``common/`` importable as ``scripts.common``; in a release zip it lies right here."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "common" / "__init__.py").is_file():
    if not (_here.parents[2] / "common" / "__init__.py").is_file():
        raise ImportError("shared code not found: use a release zip or keep bundles/<name> inside the repository")
    __path__.append(str(_here.parents[2]))  # in a checkout, <repo>/common becomes scripts.common
