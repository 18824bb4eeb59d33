"""Files in and out: atomic writing, and the lists of cases.

A case is a dict of file paths with a ``name`` and a ``seed``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Case = dict[str, Any]

# What MONAI has readers for; other files in a folder of images (notes, tables) are passed over.
IMAGES: tuple[str, ...] = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".npy", ".npz")
IMAGES += (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif")


class CaseError(ValueError):
    """A case's input is unusable; the message names file, cause and fix."""


def unwrap(error: BaseException) -> BaseException:
    """The error that MONAI's transforms and config parser have wrapped in RuntimeErrors."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes its place in one step, on failure nothing is left.

    Example:
        >>> with atomic_path("out/report.json") as tmp:  # doctest: +SKIP
        ...     tmp.write_text("{}")
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}; free space or choose another --output_dir"
        raise OSError(error.errno, message) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON atomically, indented by 4 as MONAI's zoo wants it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=4, allow_nan=False) + "\n", encoding="utf-8")


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stem(path: str | os.PathLike) -> str:
    """Case id of a file: its name without the file type, so that ``1.2.840.nii.gz`` is case ``1.2.840``."""
    return Path(path).name.removesuffix(".gz").rpartition(".")[0] or Path(path).name


def case_seed(seed: int, name: str) -> int:
    """Seed of one case: depends on the run's seed and the case's name alone, not on order, batch or machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")


def stamped(root: Path, settings: Mapping[str, Any]) -> int:
    """How many generated cases a folder's stamp ``phantoms.json`` promises; refuses a folder of other settings."""
    path = root / "phantoms.json"
    if not path.exists():
        return 0
    held = json.loads(path.read_text(encoding="utf-8"))
    count = int(held.pop("num_cases", 0))
    if held != dict(settings):
        raise ValueError(f"{root} holds {held}, asked for {dict(settings)}: name another folder, or delete this one")
    return count


def stamp(root: Path, settings: Mapping[str, Any], num_cases: int) -> None:
    """Say, when all cases of a generated folder are written, what they are."""
    write_json(root / "phantoms.json", {**settings, "num_cases": num_cases})


def list_cases(
    dataset_dir: str | os.PathLike,
    folders: Mapping[str, str] | None = None,
    *,
    optional: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    num_samples: int = 1,
    seed: int = 0,
    strict: bool = True,
) -> list[Case]:
    """List the cases of a folder or of a datalist JSON.

    Args:
        dataset_dir: a folder that holds one folder per key, files paired by name without file type; or a JSON file, a
            list of ``{key: path}`` (or a dict with such a list under "training", "validation" or "test", or a dict
            ``{name: {key: path}}``), paths relative to the file.
        folders: key -> folder name, e.g. ``{"image": "CT", "layout": "SEG"}``.
        optional: keys that a case, or the whole data set, may lack.
        texts: key -> folder of ``.txt`` files whose content joins the cases of their names, e.g.
            ``{"report": "REPORT"}``; in a datalist the key holds the text itself. A case may lack it.
        names: foreign key of a datalist -> ours, e.g. ``{"ct": "image"}``; of two for one key the first counts.
        num_samples: how many differently seeded samples of every case.
        seed: the run's seed.
        strict: raise for bad cases at once; else they carry an ``error``, which `CaseStream` reports at its end.

    Returns:
        cases ``{key: path, "name": str, "seed": int}``, sorted by name.
    """
    folders = dict(folders or {"image": "CT", "layout": "SEG"})
    root = Path(dataset_dir).absolute()  # side-cars shall be valid anywhere
    if root.suffix == ".json":
        found, errors = _read_datalist(root, folders, names or {})
    elif root.is_dir():
        found, errors = _read_folders(root, folders, optional)
    else:
        raise FileNotFoundError(
            f"dataset_dir {root} does not exist: give a folder with {_wanted(folders)} or a .json list"
        )
    for key, folder in (texts or {}).items() if root.is_dir() else ():
        for name, case in found.items():
            try:
                if (path := root / folder / f"{name}.txt").is_file():
                    case[key] = read_text(path)
            except CaseError as error:
                errors.setdefault(name, str(error))
    for name, case in found.items():
        missing = [k for k in folders if k not in case and k not in optional]
        missing += [f"{k} ({case[k]} is not a file)" for k in folders if k in case and not os.path.isfile(case[k])]
        if missing:
            lack = f"case {name} in {root} lacks {', '.join(missing)}: add the file or remove the case"
            errors.setdefault(name, lack)
    if not found:
        raise FileNotFoundError(f"dataset_dir {root} holds no case: expected {_wanted(folders)}, files of equal names")
    if strict and errors:
        raise CaseError("\n".join(errors.values()))
    listed = [{**found[name], "name": name} for name in sorted(found)]
    return seeded([{**c, "error": errors[c["name"]]} if c["name"] in errors else c for c in listed], num_samples, seed)


def read_text(path: str | os.PathLike) -> str:
    """A text file's content, in UTF-8 with or without its mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except ValueError as error:
        raise CaseError(f"{path} is not text in UTF-8 ({error}): save it anew in UTF-8") from error


def seeded(cases: Sequence[Case], num_samples: int = 1, seed: int = 0) -> list[Case]:
    """Cases with their own ``seed``; of several samples of each, the names tell which."""
    return [
        {**case, "name": name if num_samples == 1 else f"{name}_s{k}", "seed": case_seed(seed, f"{name}/{k}")}
        for case in cases
        for name in [case["name"]]
        for k in range(num_samples)
    ]


def list_synthetic(output_dir: str | os.PathLike) -> list[Case]:
    """List what an inference run wrote, by its side-cars: ``{"image", "layout", ..., "reference"}`` for each case."""
    cases = []
    for path in sorted(Path(output_dir).glob("*.json")):
        made_by = json.loads(path.read_text(encoding="utf-8")).get("made_by")
        if isinstance(made_by, dict) and "outputs" in made_by:
            case = {stem(file).rpartition("_")[2]: str(path.parent / file) for file in made_by["outputs"]}
            reference = made_by["case"].get("image")
            cases.append({**case, "reference": reference} if reference else case)
    return cases


def _wanted(folders: Mapping[str, str]) -> str:
    return ", ".join(f"{folder}/ ({key})" for key, folder in folders.items())


def _read_folders(root: Path, folders: Mapping[str, str], optional: Sequence[str]) -> tuple[dict, dict]:
    found: dict[str, Case] = {}
    errors: dict[str, str] = {}
    for key, folder in folders.items():
        if not (root / folder).is_dir():
            if key in optional:
                continue
            raise FileNotFoundError(f"{root} has no folder {folder}/ ({key}): expected {_wanted(folders)}")
        for path in sorted((root / folder).iterdir()):
            if path.name.startswith(".") or not path.is_file():
                continue
            if not path.name.lower().endswith(IMAGES):
                logger.warning(f"{path} is passed over: not the name of an image file")
                continue
            case = found.setdefault(stem(path), {})
            if key in case:
                errors[stem(path)] = f"two files for case {stem(path)}: {case[key]} and {path}; keep one"
            case[key] = str(path)
    return found, errors


def _read_datalist(path: Path, folders: Mapping[str, str], names: Mapping[str, str]) -> tuple[dict, dict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"datalist {path} does not exist") from None
    except ValueError as error:
        raise CaseError(f"datalist {path} is not valid JSON ({error})") from error
    if isinstance(content, dict) and content and all(isinstance(entry, dict) for entry in content.values()):
        content = [{"name": name, **entry} for name, entry in content.items()]
    if isinstance(content, dict):
        content = next((content[k] for k in ("training", "validation", "test") if k in content), None)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise CaseError(f"datalist {path} must be a list of {{{', '.join(folders)}}} objects")
    found: dict[str, Case] = {}
    errors: dict[str, str] = {}
    for entry in content:
        item = {ours: entry[theirs] for theirs, ours in reversed(list(names.items())) if theirs in entry} | {
            k: v for k, v in entry.items() if k not in names
        }
        case = {k: str(path.parent / str(v)) if k in folders else v for k, v in item.items() if v is not None}
        name = str(case.get("name") or next((stem(case[k]) for k in folders if k in case), f"case_{len(found)}"))
        if name != Path(name).name:
            errors[name] = f"datalist {path} names a case {name!r}: a name becomes a file name, use no slashes"
        if name in found:
            errors[name] = f'datalist {path} names case {name} twice: give each entry a different "name"'
        found[name] = case
    return found, errors
