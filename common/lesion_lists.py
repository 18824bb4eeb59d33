"""Cases of LesionDiffusion (2503.00741): a CT, and what is known of it already: organ map, label, report.

They come as a folder, as a JSON list, or as the reference's text lists, in which line i of every list is the same case.
Nothing there says so but the paths themselves: they are compared, since its own tools write rows in another order.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.transforms import Transform

from .io import Case, CaseError, list_cases, read_text, seeded, stem
from .lesion_reports import read_reports
from .lesion_words import organ_id
from .transforms import CheckCased, Data

logger = logging.getLogger(__name__)

FOLDERS = {"image": "CT", "organs": "ORGANS", "label": "LABEL"}
REPORTS = "REPORT"
# Key -> the middle of a list's name; where a scan exists with and without its lesion, "coarseg" is of that with it.
LISTS = {"image": "img", "label": "label", "report": "type", "organs": "seg", "lesion_organs": "coarseg"}
SPLITS = ("train", "val")


def list_lesion_cases(
    dataset_dir: str | os.PathLike,
    *,
    split: str | None = None,
    need: Sequence[str] = ("image",),
    num_samples: int = 1,
    seed: int = 0,
    strict: bool = True,
) -> list[Case]:
    """List cases, whichever of three ways they are given.

    Args:
        dataset_dir: a folder with ``CT/`` and, if there are any, ``ORGANS/``, ``LABEL/`` and ``REPORT/*.json``, paired
            by name; or a JSON list of ``{"image", "organs", "label", "report"}``, a report as path or as it is; or a
            folder with the reference's ``{train,val}_{img,label,type,seg}_list.txt``. Paths are relative to the list.
        split: ``"train"`` or ``"val"`` of the reference's lists; None takes both, one after the other.
        need: keys that every case must have.
        num_samples: how many differently seeded samples of every case.
        seed: the run's seed.
        strict: raise for bad cases at once; else they carry an ``error``, which `CaseStream` reports at its end.

    Returns:
        cases ``{"name", "seed", "image", ...}``, rows of text lists in their order, others sorted by name. A report is
        a path, or what the list holds.
    """
    if unknown := set(need) - {*FOLDERS, "report"}:
        raise ValueError(f"need names {', '.join(sorted(unknown))}, expected some of {', '.join(FOLDERS)}, report")
    root = Path(dataset_dir).absolute()
    if root.is_dir() and any(root.glob("*_img_list.txt")):
        cases = _read_lists(root, split, need)
    elif split is not None:
        raise ValueError(f"{root} has no lists like train_img_list.txt, so it has no split {split!r}: leave it out")
    else:
        cases = _read_cases(root, need)
    if strict and (errors := [case["error"] for case in cases if "error" in case]):
        raise CaseError("\n".join(errors))
    return seeded(cases, num_samples, seed)


def _read_cases(root: Path, need: Sequence[str]) -> list[Case]:
    """Cases of a folder or a JSON list, each with its report."""
    cases = list_cases(root, FOLDERS, optional=[key for key in FOLDERS if key not in need], strict=False)
    reports = {stem(path): path for path in sorted((root / REPORTS).glob("*.json"))}
    for name in sorted(reports.keys() - {case["name"] for case in cases}):
        logger.warning(f"{reports[name]} is passed over: there is no CT of that name")
    for case in cases:
        if case["name"] in reports:
            case["report"] = str(reports[case["name"]])
        elif isinstance(report := case.get("report"), str):
            case["report"] = str(root.parent / report)
            if not os.path.isfile(case["report"]):
                case.setdefault("error", f"report of {case['name']}: {case['report']} is not a file; correct {root}")
        if "report" in need and "report" not in case:
            where = f"{REPORTS}/{case['name']}.json" if root.is_dir() else '"report" of its entry'
            case.setdefault("error", f"case {case['name']} in {root} lacks a report: write one, {where}")
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# The reference's lists


def _read_lists(root: Path, split: str | None, need: Sequence[str]) -> list[Case]:
    """Cases of one split's lists, or of both."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    listed = {part: root / f"{part}_img_list.txt" for part in SPLITS}
    images = {part: _lines(file) for part, file in listed.items() if file.is_file()}
    # A case is called the same, and so drawn from the same seed, whether one split is asked for or both.
    names = iter(_names([str(root / line) for lines in images.values() for line in lines]))
    named = {part: [next(names) for _ in lines] for part, lines in images.items()}
    return [
        {"name": name, **case}
        for part in (images if split is None else [split])
        for name, case in zip(named.get(part, []), _read_split(root, part, need))
    ]


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in read_text(file).splitlines()]


def _read_split(root: Path, split: str, need: Sequence[str]) -> list[Case]:
    """Cases of the lists of one split, in the order of their lines; what is wrong with a line is its ``error``."""
    files = {key: root / f"{split}_{middle}_list.txt" for key, middle in LISTS.items()}
    if lacking := [str(files[key]) for key in LISTS if key in ("image", *need) and not files[key].is_file()]:
        raise FileNotFoundError(f"{', '.join(lacking)} does not exist: every case needs {', '.join(need)}")
    rows = {key: _lines(file) for key, file in files.items() if file.is_file()}
    if len({len(lines) for lines in rows.values()}) > 1:
        lengths = ", ".join(f"{files[key].name} has {len(lines)} lines" for key, lines in rows.items())
        raise CaseError(f"lists in {root} differ in length: {lengths}; line i of every list must be the same case")
    errors: dict[int, list[str]] = {}
    for key, lines in rows.items():
        for i, line in enumerate(lines):
            if not (root / line).is_file():
                what = f"{root / line} is not a file; paths are relative to the list" if line else "empty"
                errors.setdefault(i, []).append(f"{files[key]}, line {i + 1}: {what}")
        for i in mismatches(rows["image"], lines):
            errors.setdefault(i, []).append(
                f"{files[key]}, line {i + 1}: {lines[i]} looks like another case than {rows['image'][i]} in "
                f"{files['image'].name}: put the rows in one order; if they do belong together, give a JSON list"
            )
    cases = [{key: str(root / lines[i]) for key, lines in rows.items()} for i in range(len(rows["image"]))]
    return [{**case, "error": "\n".join(errors[i])} if i in errors else case for i, case in enumerate(cases)]


def mismatches(images: Sequence[str], others: Sequence[str]) -> list[int]:
    """Rows of two lists of paths that look like different cases.

    A path says of which case it is by those of its words and numbers that not all paths of its list have. Where these
    are the same in most rows of both lists, the other rows are wrong. Where the two lists name cases in different ways,
    a row is wrong if another row would fit it better.

    Example:
        >>> mismatches(["a/liver_1/ct.nii", "a/liver_2/ct.nii"], ["b/liver_2/label.nii", "b/liver_1/label.nii"])
        [0, 1]
    """
    left, right = _marks(images), _marks(others)
    unlike = [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    if len(unlike) <= len(left) / 2:
        return unlike
    return [i for i in unlike if max(len(left[i] & other) for other in right) > len(left[i] & right[i])]


def _marks(paths: Sequence[str]) -> list[set[str]]:
    """What tells each path of a list from the others: words and numbers, without leading zeros."""
    words = [{word.lstrip("0") or "0" for word in re.findall(r"[^\W_]+", path.lower())} for path in paths]
    count = Counter(word for found in words for word in found)
    return [{word for word in found if count[word] < len(paths)} for found in words]


def _names(paths: Sequence[str]) -> list[str]:
    """Names of cases after what their paths do not share: files are often called alike, ``liver_1/raw.nii.gz``."""
    parts = [[*Path(path).parts[:-1], stem(path)] for path in paths]
    count = Counter(part for found in parts for part in set(found))
    names: list[str] = []
    for found in parts:
        name = "_".join(part for part in found if count[part] < len(paths)) or found[-1]
        further = (f"{name}_{number}" for number in range(2, len(paths) + 2))
        names.append(next(free for free in [name, *further] if free not in names))
    return names


# ---------------------------------------------------------------------------------------------------------------------
# What only opened files show


class CheckLesiond(Transform):
    """Refuses a loaded case whose parts do not belong together, naming the file and the way out.

    The published code resizes a label that is up to three voxels larger than its CT, and where anything fails takes
    another case at random.

    Args:
        need: keys that must be there.
    """

    def __init__(self, need: Sequence[str] = ("image", "organs", "label", "report")) -> None:
        self.need = tuple(need)
        self.check = CheckCased(tuple(FOLDERS))

    def __call__(self, data: Data) -> dict:
        """Check, and hand on unchanged."""
        if missing := [key for key in self.need if key not in data]:
            raise CaseError(f"case {data.get('name', '')} lacks {', '.join(missing)}: add them, or leave the case out")
        for key in ("organs", "label"):
            if key in data:
                self.check.check_grid(data, key, "image")
        if "label" in data:
            self.check_label(data)
        if "report" in data and "organs" in data:
            self.check_report(data)
        return dict(data)

    def check_label(self, data: Data) -> None:
        """0 background, 1 organ, 2 lesion; the lesion is what a case is there for."""
        name = _file(data, "label")
        found = set(torch.unique(torch.as_tensor(data["label"])).tolist())
        if not found <= {0, 1, 2}:
            raise CaseError(f"{name} holds {sorted(found)[:8]}: a label has 0 background, 1 organ, 2 lesion")
        if 2 not in found:
            raise CaseError(f"{name} holds no lesion: mark it by 2 (1 is the organ), or leave the case out")

    def check_report(self, data: Data) -> None:
        """A lesion's organs are in the organ map."""
        report, name = data["report"], _file(data, "organs")
        present = set(torch.unique(torch.as_tensor(data["organs"])).int().tolist())
        for said in read_reports(report, "" if isinstance(report, str) else str(data.get("name", ""))):
            if missing := [organ for organ in said.organs or (said.organ,) if organ_id(organ) not in present]:
                where = report if isinstance(report, str) else f"the report of {data.get('name', 'the case')}"
                raise CaseError(
                    f"{where} speaks of {', '.join(missing)}, but {name} has none: correct the report or the organ map "
                    "(numbers of TotalSegmentator's v1; its version 2 finds no heart chambers)"
                )


def _file(data: Data, key: str) -> str:
    return str(getattr(data[key], "meta", {}).get("filename_or_obj", key))
