"""Data index of Siamese-Diffusion: JSON Lines of mask (``source``), image (``target``) and prompt.

It is the reference's format: its ``prompt.json`` files work here, and ours work there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .io import IMAGES, Case, CaseError, atomic_path, list_cases, seeded, stem

KEYS = {"source": "mask", "target": "image", "prompt": "prompt"}  # theirs -> ours


def build_prompts(
    dataset_dir: str | os.PathLike, prompt: str = "A photo of a polyp.", images: str = "images", masks: str = "masks"
) -> str:
    """Write ``prompt.json`` for a folder of images and one of masks, paired by name without file type.

    Args:
        dataset_dir: folder that holds both; the index comes beside them.
        prompt: text of every case.
        images: name of the folder of images.
        masks: name of the folder of masks.

    Returns:
        Path of the index, whose paths are relative to itself.
    """
    root = Path(dataset_dir)
    found = {folder: _files(root / folder) for folder in (images, masks)}
    lacks = [
        f"{root / folder} lacks {', '.join(missing[:5]) + (f' and {len(missing) - 5} more' if missing[5:] else '')}"
        for folder, other in ((images, masks), (masks, images))
        if (missing := sorted(found[other].keys() - found[folder].keys()))
    ]
    if lacks:
        raise CaseError(f"{'; '.join(lacks)}: images and masks pair by name, add the files or remove their partners")
    if not found[masks]:
        raise CaseError(f"{root / images} and {root / masks} hold no image files: put pairs of equal names there")
    lines = [
        json.dumps({"source": f"{masks}/{mask}", "target": f"{images}/{found[images][name]}", "prompt": prompt}) + "\n"
        for name, mask in found[masks].items()
    ]
    with atomic_path(root / "prompt.json") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return str(root / "prompt.json")


def read_prompts(path: str | os.PathLike, *, optional: Sequence[str] = ()) -> list[Case]:
    """Read an index: JSON Lines as the reference writes them, or one JSON array.

    Args:
        path: the index; its files are looked for beside it, then, as the reference does, in the working directory.
        optional: ``("image",)`` where entries may do without a target, to synthesise.

    Returns:
        cases ``{"name", "mask", "image", "prompt"}`` in the order of the file, named as their masks.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: write it with build_prompts, or name another index") from None
    except ValueError as error:
        raise CaseError(f"{path} is not text in UTF-8: {error}") from error
    cases: dict[str, Case] = {}
    for place, entry in _entries(text, path):
        case = _case(entry, path.parent, place, optional)
        if case["name"] in cases:
            raise CaseError(f"{place}: a case {case['name']} has been named before: rename one of the two masks")
        cases[case["name"]] = case
    if not cases:
        raise CaseError(f"{path} is empty: expected one object of {', '.join(KEYS)} on each line")
    return list(cases.values())


def list_prompts(
    dataset_dir: str | os.PathLike,
    *,
    prompt: str = "A photo of a polyp.",
    optional: Sequence[str] = (),
    num_samples: int = 1,
    seed: int = 0,
    strict: bool = True,
) -> list[Case]:
    """List cases by an index, or from folders that have none.

    Args:
        dataset_dir: an index; a folder with ``prompt.json``; one with ``masks`` and ``images``, files paired by name;
            or, where images are optional, a folder of masks.
        prompt: text of every case of folders without an index; an index has its own.
        optional: as in `read_prompts`.
        num_samples: how many differently seeded samples of every case.
        seed: the run's seed.
        strict: raise for bad cases of a folder at once; else they carry an ``error``, which `CaseStream` reports at its
            end. A bad index is refused in any case.

    Returns:
        cases ``{"name", "mask", "image", "prompt", "seed"}``.
    """
    root = Path(dataset_dir).absolute()
    index = root if root.suffix == ".json" else root / "prompt.json"
    if index == root or index.is_file():
        return seeded(read_prompts(index, optional=optional), num_samples, seed)
    masks = "masks" if "image" not in optional or (root / "masks").is_dir() else "."
    folders = {"mask": masks, "image": "images"}
    cases = list_cases(root, folders, optional=optional, num_samples=num_samples, seed=seed, strict=strict)
    return [{"prompt": prompt, **case} for case in cases]


def _files(folder: Path) -> dict[str, str]:
    """Image files of a folder, sorted: name without file type -> name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: images and masks lie in one folder each, pairs by name")
    found: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.name.lower().endswith(IMAGES) and not file.name.startswith(".") and file.is_file():
            if stem(file) in found:
                raise CaseError(f"{folder} holds {found[stem(file)]} and {file.name} for one case: keep one")
            found[stem(file)] = file.name
    return found


def _entries(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Each entry behind its place, which errors name."""
    array = text.lstrip().startswith("[")
    # Not splitlines: a prompt may hold other characters that break lines.
    for i, part in enumerate([text] if array else text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            content = json.loads(part)
        except ValueError as error:
            raise CaseError(f"{path}{'' if array else f', line {i}'}: broken JSON ({error})") from error
        entries, kind = (content, "entry") if array else ([content], "line")
        yield from ((f"{path}, {kind} {k}", entry) for k, entry in enumerate(entries, start=i))


def _case(entry: Any, root: Path, place: str, optional: Sequence[str]) -> Case:
    given = {k: v for k, v in entry.items() if v is not None} if isinstance(entry, dict) else {}
    if wrong := [k for k, key in KEYS.items() if not isinstance(given.get(k, "" if key in optional else None), str)]:
        raise CaseError(f"{place}: lacks {', '.join(wrong)}, expected texts under {', '.join(KEYS)}")
    case = {"name": stem(given["source"])} | {key: given[k] for k, key in KEYS.items() if k in given}
    for key in [key for key in ("mask", "image") if key in case]:
        file = next((base / case[key] for base in (root, Path()) if (base / case[key]).is_file()), None)
        if file is None:
            raise CaseError(f"{place}: {case[key]} is neither beside the index nor in the working directory")
        case[key] = str(file.absolute())
    return case
