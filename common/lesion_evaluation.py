"""Evaluation of lesions put into CTs: are they where and as asked, does the CT around them stay, do they help?

A check that cannot fail shows nothing. So real lesions stand beside synthetic ones, the same places before a lesion
was painted beside the patches, and shuffled CT values beside those that were asked for. Numbers of patches and of the
segmenter are `metrics` and `downstream`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from numpy.typing import ArrayLike
from scipy import ndimage, stats

from .downstream import dice_scores, train_segmenter
from .evaluation import (
    Loader,
    cohort_metrics,
    describe,
    extract,
    finite,
    read_volume,
    show,
    summary,
    table,
    write_report,
)
from .io import CaseError, list_synthetic, stem
from .lesion_boxes import LESION, Box, components
from .lesion_geometry import AIR, cover, crop_start, resample, to_unit, working_grid
from .lesion_reports import LesionReport, cavity_of, described, read_reports
from .lesion_words import DENSITY, FLUID, LUNGS, OUTWARD, VALUE, is_hollow, organ_id
from .metrics import Extractor, RandomConvFeatures
from .workflow import versions

logger = logging.getLogger(__name__)

NEAR_MM = 3.0  # a lesion may lie so far outside the organ that an organ map shows
# Words that say how dense a lesion is by comparison with its solid organ, in order.
ORDER = (FLUID, "hypodense lesion", "isodense lesion", "hyperdense lesion")
SEEN = 32  # pixels of a slice that features are taken of
CHANNELS = (16, 32, 64, 128)  # of the downstream segmenter

NOTES = (
    f"Inside: share of the lesion's voxels in its organ, or within {NEAR_MM:g} mm; 'protruding' ones are to leave it, "
    "and are told apart. Size: extent of the mask along left-right, front-back, feet-head. Fill: mask over box.",
    "HU change: mean inside the lesion, after less before. Contrast: mean inside the lesion less the organ's median. "
    f"Rank correlation: of the contrast with the order of the words ({', '.join(ORDER)}), in solid organs other than "
    "lungs; 0 says that words do nothing, and real lesions show what a perfect painter would get.",
    "CT value error: mean distance of the lesion's mean HU from the one asked for; 'shuffled': from others'.",
    "Seam: mean step between neighbours, one changed and the other not, after over before. 1 is no seam.",
    "Outside: largest change farther than the rim from any lesion. Anything but 0 means a CT that was not asked for.",
    "FID and KID are of three slices through the middle of each lesion's box and a little around it, stretched to one "
    "size, mean over planes; they depend on the extractor and the number of lesions. 'before' are the same places "
    "without the lesion, 'real halves' half of the real ones against the rest: a good painter comes near the latter, "
    "one that paints nothing gets the former.",
    "Downstream: Dice on held-out lesions of a small 3-D U-Net that sees CT and organ, for equally many steps; ± over "
    "trainings.",
)

Case = dict[str, Any]
Patch = torch.Tensor
"""(3, S, A, L) around a lesion: CT in [-1, 1], organ in {-1, 1}, lesion in {0, 1}."""


def evaluate_lesions(
    real: Sequence[Mapping[str, Any]],
    synthetic_dir: str | Path,
    output_dir: str | Path,
    *,
    spacing: float | Sequence[float],
    size: Sequence[int],
    held_out: Sequence[Mapping[str, Any]] = (),
    load: Loader | None = None,
    extractor: Extractor | None = None,
    rim_mm: float = 12.0,
    few: int = 12,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 400,
    name: str = "evaluation",
) -> dict[str, Any]:
    """Compare a folder of CTs with painted lesions with what was asked, with their originals, and with real lesions.

    Writes `<name>.json` and `<name>.md`.

    Args:
        real: cases {"image", "organs", "label", "report"} with a lesion.
        synthetic_dir: what an inference run wrote: images, labels, side-cars.
        output_dir: folder of the report, made if missing.
        spacing: of the working grid, mm; boxes of side-cars are in its voxels.
        size: voxels (S, A, L) of a patch, at least 16 each.
        held_out: further real cases, for the downstream test; without, or with no steps, there is none.
        load: case -> the same with tensors (1, *S), of real cases and of originals; by default files are as they are.
        extractor: slices (N, 1, H, W) in [-1, 1] -> features (N, F), by default `RandomConvFeatures()`.
        rim_mm: how far from a lesion the CT may change.
        few: how many real cases the downstream segmenter has.
        seeds: of its trainings.
        steps: of each training.
        name: stem of the two files.

    Returns:
        what the JSON holds. A number that cannot be computed is None, and "reasons" says why.
    """
    asked = list_lesions(synthetic_dir)
    if not real or not asked:
        raise ValueError(f"nothing to compare: {len(real)} real cases, {len(asked)} synthetic in {synthetic_dir}")
    extractor = extractor or RandomConvFeatures()
    see = Patcher(spacing, size)
    rows: dict[str, list[Case]] = {"real": [], "synthetic": []}
    outside: list[Case] = []
    for i, case in enumerate(real, 1):
        logger.info("real case %d of %d: %s", i, len(real), case.get("image"))
        rows["real"].append(_real_row(case, load, see))
    for i, case in enumerate(asked, 1):
        logger.info("synthetic case %d of %d: %s", i, len(asked), case["image"])
        lesions, kept = _synthetic_rows(case, load, see, rim_mm)
        rows["synthetic"] += lesions
        outside.append(kept)
    if not rows["synthetic"]:
        raise ValueError(f"no label in {synthetic_dir} holds a lesion (value {LESION}): nothing to evaluate")
    tests = [_real_row(case, load, see)["patch"] for case in held_out] if steps and held_out else []
    patches = {cohort: [row.pop("patch") for row in found] for cohort, found in rows.items()}
    before = [row.pop("before") for row in rows["synthetic"]]

    reasons: dict[str, str] = {}
    downstream: dict[str, Any] = {}
    if tests:
        parts = (patches["real"][:few], patches["synthetic"], tests)
        downstream = lesion_downstream(*map(torch.stack, parts), seeds=seeds, steps=steps)
    else:
        reasons["downstream"] = "no held-out cases, or no steps, were given"
    result = {
        "name": name,
        "counts": {
            "real": len(real), "synthetic": len(asked), "lesions": len(rows["synthetic"]),
            "missing": sum(case["missing"] for case in outside), "held_out": len(tests),
        },
        "settings": {
            "spacing": np.asarray(spacing).tolist(), "size": list(size), "extractor": describe(extractor),
            "rim_mm": rim_mm, "few": few, "seeds": list(seeds), "steps": steps,
        },
        "versions": versions(),
        "lesions": {cohort: _summaries(found) for cohort, found in rows.items()},
        "density": {cohort: _by_word(found) for cohort, found in rows.items()},
        "control": {cohort: _control(found) for cohort, found in rows.items()},
        "surroundings": {
            "seam_ratio": summary([case["seam"] for case in outside]),
            "outside_max_hu": float(np.fmax.reduce([case["outside"] for case in outside])),
        },
        "patches": _patches(patches["real"], patches["synthetic"], before, extractor, reasons),
        "downstream": downstream,
        "cases": {**rows, "surroundings": outside},
        "notes": list(NOTES),
    }  # fmt: skip
    result = {**finite(result, reasons), "reasons": reasons}
    write_report(result, _markdown(result), output_dir)
    return result


# --------------------------------------------------------------------------------------------------------- the cases


def list_lesions(synthetic_dir: str | Path) -> list[Case]:
    """What an inference run wrote, with what its side-cars say was asked.

    Returns:
        cases {"name", "image", "label", "original", "organs", "asked"}; "original" and "organs" are paths or None,
        "asked" holds a pair of report and box (voxels of the working grid, or None) for each lesion.
    """
    cases = []
    for outputs in list_synthetic(synthetic_dir):
        if not {"image", "label"} <= set(outputs):
            raise ValueError(f"{synthetic_dir} holds a case without image and label, only {outputs}: synthesise both")
        path = Path(outputs["label"])
        sidecar = path.with_name(stem(path).rpartition("_")[0] + ".json")
        made_by = json.loads(sidecar.read_text(encoding="utf-8"))["made_by"]
        told = (made_by.get("record") or {}).get("reports")
        if not told:
            raise ValueError(f"{sidecar} does not say which lesions were made: was it written by lesion inference?")
        asked = []
        for entry in told:
            (report,) = read_reports({"lesions": [{k: v for k, v in entry.items() if k != "box"}]}, str(sidecar))
            box = entry.get("box")
            asked.append((report, Box(tuple(box["start"]), tuple(box["size"])) if box else None))
        case = made_by["case"]
        files = {"original": case.get("image"), "organs": outputs.get("organs", case.get("organs"))}
        cases.append({"name": sidecar.stem, "image": outputs["image"], "label": str(path), **files, "asked": asked})
    return cases


def _read(case: Mapping[str, Any], key: str) -> MetaTensor:
    volume = read_volume(case, key)
    if volume.ndim != 4 or len(volume) != 1:
        raise CaseError(f"{case.get(key)} has shape {tuple(volume.shape)}, expected one volume (1, X, Y, Z)")
    return volume


def _grids_agree(volumes: Sequence[MetaTensor], name: str) -> None:
    if any(v.shape != volumes[0].shape or not np.allclose(v.affine, volumes[0].affine, atol=1e-2) for v in volumes):
        shapes = ", ".join(str(tuple(volume.shape)) for volume in volumes)
        raise CaseError(f"{name}: CT, label, organ map and original must lie on one grid, got shapes {shapes}")


def _real_row(case: Mapping[str, Any], load: Loader | None, see: Patcher) -> Case:
    """All that one real case tells."""
    name, loaded = str(case.get("name", case.get("image"))), load(case) if load else case
    image, label, organs = (_read(loaded, key) for key in ("image", "label", "organs"))
    _grids_agree((image, label, organs), name)
    hu, values = image.numpy()[0].astype(np.float32), organs.numpy()[0].astype(np.int64)
    found = components(label.numpy()[0] == LESION, 1)
    if not found:
        raise CaseError(f"{name}: the label holds no lesion (value {LESION}): leave the case out")
    mask = found[0].in_volume(hu.shape)
    overlap = dict(enumerate(np.bincount(values[mask]).tolist()))
    report = described(read_reports(case["report"], name), overlap)
    row = measure_lesion(report, mask, hu, image.affine, values)
    return {"name": name, **row, "patch": see(hu, label.numpy()[0] > 0, mask, image.affine)}


def _synthetic_rows(case: Case, load: Loader | None, see: Patcher, rim_mm: float) -> tuple[list[Case], Case]:
    """All that one synthetic CT tells: of each lesion, and of what lies around."""
    image, label = _read(case, "image"), _read(case, "label")
    files = {"image": case["original"], "organs": case["organs"]}
    given: Mapping[str, Any] = {key: path for key, path in files.items() if path and Path(path).is_file()}
    given = load({**given, "name": case["name"]}) if load and "image" in given else given
    old, organs = (_read(given, key) if key in given else None for key in ("image", "organs"))
    _grids_agree([v for v in (image, label, old, organs) if v is not None], case["name"])
    hu, lesions = image.numpy()[0].astype(np.float32), label.numpy()[0] == LESION
    before = None if old is None else old.numpy()[0].astype(np.float32)
    values = None if organs is None else organs.numpy()[0].astype(np.int64)
    spacing = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
    organ = label.numpy()[0] > 0
    rows, kept = [], {"name": case["name"], "missing": 0, "seam": math.nan, "outside": math.nan}
    for report, box in case["asked"]:
        mask = lesions if box is None else lesions & see.near(box, hu.shape, image.affine)
        if not mask.any():
            kept["missing"] += 1
            continue
        row = measure_lesion(report, mask, hu, image.affine, values, before)
        row["fill"] = row["volume_mm3"] / see.volume(box) if box else row["fill"]
        now, then = (None if x is None else see(x, organ, mask, image.affine) for x in (hu, before))
        rows.append({"name": case["name"], **row, "patch": now, "before": then})
    if before is not None:
        kept["seam"] = seam_ratio(before, hu, spacing)
        kept["outside"] = outside_change(before, hu, lesions, spacing, rim_mm)
    return rows, kept


class Patcher:
    """Sees lesions as networks do: what lies around them, on the working grid.

    Args:
        spacing: of the working grid, mm.
        size: voxels (S, A, L) of a patch.
    """

    def __init__(self, spacing: float | Sequence[float], size: Sequence[int]) -> None:
        if len(size) != 3 or min(size) < 16:
            raise ValueError(f"size must be three sides of at least 16 voxels, got {tuple(size)}")
        self.spacing, self.size = spacing, tuple(size)

    def __call__(self, hu: np.ndarray, organ: np.ndarray, mask: np.ndarray, affine: ArrayLike) -> Patch:
        """What lies around a lesion (X, Y, Z)."""
        grid = working_grid(hu.shape, affine, self.spacing)
        start, extent = cover(mask, affine, grid)
        # A lesion that were always in the middle could be found without a look at it.
        aside = [(7 * a) % (side // 4) - side // 8 for a, side in zip(start, self.size, strict=True)]
        middle = [a + n // 2 + s for a, n, s in zip(start, extent, aside, strict=True)]
        crop = grid.crop(crop_start(middle, self.size, grid.shape), self.size)
        seen = resample(torch.from_numpy(hu)[None], affine, crop, "linear", AIR)
        labels = torch.from_numpy(np.stack([organ, mask]).astype(np.uint8))
        there = resample(labels, affine, crop, "nearest").float()
        return torch.cat([2 * to_unit(seen) - 1, 2 * there[:1] - 1, there[1:]])

    def near(self, box: Box, shape: Sequence[int], affine: ArrayLike) -> np.ndarray:
        """Voxels of a file (X, Y, Z) in a box of the working grid, or next to it."""
        grid = working_grid(shape, affine, self.spacing)
        matrix = np.linalg.inv(grid.affine) @ np.asarray(affine)
        axes = np.ix_(*(np.arange(n) for n in shape))
        inside = np.ones(tuple(shape), dtype=bool)
        for row, start, size in zip(matrix, box.start, box.size, strict=False):
            place = sum(axis * step for axis, step in zip(axes, row[:3], strict=True)) + row[3]
            inside &= (place > start - 1.6) & (place < start + size + 0.6)
        return inside

    def volume(self, box: Box) -> float:
        """Cubic millimetres of a box."""
        return box.voxels * float(np.prod(np.broadcast_to(self.spacing, 3)))


# ------------------------------------------------------------------------------------------------------- the numbers


def measure_lesion(
    report: LesionReport,
    mask: np.ndarray,
    after: np.ndarray,
    affine: ArrayLike,
    organs: np.ndarray | None = None,
    before: np.ndarray | None = None,
) -> Case:
    """Is one lesion where and as its report says?

    Args:
        report: what was asked for.
        mask: the lesion (X, Y, Z), not empty.
        after: CT with it (X, Y, Z) in HU.
        affine: of all, axes R, A, S.
        organs: label map (X, Y, Z), TotalSegmentator's v1 numbers.
        before: CT without it.

    Returns:
        what is known; a number that is not, is NaN.
    """
    spacing = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    held = Box.of(mask)
    achieved = [float(n * s) for n, s in zip(held.size, spacing, strict=True)]
    asked = list(report.size_mm or [math.nan] * 3)
    inside = organ_hu = math.nan
    if organs is not None:
        organ = np.isin(organs, [organ_id(name) for name in report.organs or (report.organ,)])
        around = tuple(slice(max(0, a - m), a + n + m) for a, n, m in _margins(held, NEAR_MM / spacing))
        far = ndimage.distance_transform_edt(~np.pad(organ[around], 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
        inside = float((far[mask[around]] <= NEAR_MM).mean()) if organ[around].any() else 0.0
        healthy = organ & ~mask if before is None else organ
        organ_hu = float(np.median((after if before is None else before)[healthy])) if healthy.any() else math.nan
    hu = float(after[mask].mean())
    value = report.attributes.get(VALUE, "").removesuffix("HU")
    return {
        "organ": report.organ,
        "lesion": report.lesion,
        "density": report.attributes.get(DENSITY, ""),
        "protruding": cavity_of(report) == OUTWARD,
        "volume_mm3": float(mask.sum() * np.prod(spacing)),
        "asked_mm": asked,
        "achieved_mm": achieved,
        "size_error_mm": [a - b for a, b in zip(achieved, asked, strict=True)],
        "fill": float(mask.sum()) / held.voxels,
        "inside": inside,
        "hu": hu,
        "change": hu - float(before[mask].mean()) if before is not None else math.nan,
        "contrast": hu - organ_hu,
        "ct_value": float(value) if value else math.nan,
    }


def _margins(box: Box, margin: np.ndarray) -> list[tuple[int, int, int]]:
    return [(a, n, int(m) + 1) for a, n, m in zip(box.start, box.size, np.ceil(margin), strict=True)]


def seam_ratio(before: np.ndarray, after: np.ndarray, spacing: Sequence[float], least: float = 0.5) -> float:
    """Steps between a changed voxel and an unchanged neighbour, over those of the original; 1 is no seam.

    Args:
        before: CT (X, Y, Z) in HU.
        after: with the lesion.
        spacing: mm.
        least: HU; less is no change.

    Returns:
        NaN where nothing has changed.
    """
    changed = np.abs(after - before) > least
    steps: dict[str, list[np.ndarray]] = {"after": [], "before": []}
    for axis, distance in enumerate(spacing):
        rim = np.diff(changed, axis=axis)  # of booleans: where they differ
        for key, image in (("after", after), ("before", before)):
            steps[key].append(np.abs(np.diff(image, axis=axis)[rim]) / distance)
    new, old = (np.concatenate(steps[key]) for key in ("after", "before"))
    return float(new.mean() / max(old.mean(), 1e-6)) if new.size else math.nan


def outside_change(
    before: np.ndarray, after: np.ndarray, lesions: np.ndarray, spacing: Sequence[float], rim_mm: float
) -> float:
    """Largest change in HU farther than ``rim_mm`` from any lesion (X, Y, Z); 0 where the CT has stayed as it was."""
    change = np.abs(after - before)
    if not change.any():
        return 0.0
    held = Box.of(change > 0)
    if lesions.any():
        # The distance is needed where something has changed, and must see the lesions.
        held = Box.of((change > 0) | lesions)
        far = ndimage.distance_transform_edt(~lesions[held.slices], sampling=spacing) > rim_mm
        return float((change[held.slices] * far).max())
    return float(change.max())


def _summaries(rows: Sequence[Case]) -> Case:
    """Place and size of all lesions, mean and spread."""
    kept = [row["inside"] for row in rows if not row["protruding"]]
    out: Case = {
        "inside": summary(kept),
        "inside_protruding": summary([row["inside"] for row in rows if row["protruding"]]),
        "fill": summary([row["fill"] for row in rows]),
    }
    for axis, side in enumerate(("left-right", "front-back", "feet-head")):
        out[f"size error {side} (mm)"] = summary([row["size_error_mm"][axis] for row in rows])
    errors = [abs(error) for row in rows for error in row["size_error_mm"]]
    out["size error, absolute (mm)"] = summary(errors)
    out["achieved over asked"] = summary([a / b for row in rows for a, b in zip(row["achieved_mm"], row["asked_mm"])])
    return out


def _by_word(rows: Sequence[Case]) -> dict[str, Case]:
    """HU by density word; a hollow organ's own HU are those of what fills it, so its lesions are told apart."""
    words: dict[str, list[Case]] = {}
    for row in sorted(rows, key=lambda row: ORDER.index(row["density"]) if row["density"] in ORDER else len(ORDER)):
        words.setdefault(row["density"] + " (hollow organ)" * is_hollow(row["organ"]), []).append(row)
    return {
        word: {key: summary([row[key] for row in found]) for key in ("change", "contrast", "hu")}
        for word, found in words.items()
    }


def _control(rows: Sequence[Case]) -> Case:
    """Does the lesion's density follow the words, and the CT value asked for?"""
    ordered = [
        (ORDER.index(row["density"]), row["contrast"])
        for row in rows
        if row["density"] in ORDER
        and not (is_hollow(row["organ"]) or row["organ"] in LUNGS)
        and math.isfinite(row["contrast"])
    ]
    rank = math.nan
    if len({word for word, _ in ordered}) > 1 and len(ordered) > 2:
        rank = float(stats.spearmanr(*zip(*ordered, strict=True)).statistic)
    told = [(row["hu"], row["ct_value"]) for row in rows if math.isfinite(row["ct_value"])]
    error, shuffled = math.nan, math.nan
    if told:
        gaps = np.abs(np.subtract.outer(*np.array(told).T))
        error = float(np.diag(gaps).mean())
        shuffled = float(gaps[~np.eye(len(gaps), dtype=bool)].mean()) if len(told) > 1 else math.nan
    return {"rank correlation": rank, "lesions in it": len(ordered), "CT value error": error, "shuffled": shuffled}


def _patches(
    real: Sequence[Patch],
    synthetic: Sequence[Patch],
    before: Sequence[Patch | None],
    extractor: Extractor,
    reasons: dict[str, str],
) -> dict[str, Case]:
    """FID and KID of patches against those of real lesions."""
    seen = [[_features(p, extractor) for p in found if p is not None] for found in (real, synthetic, before)]
    halves = (seen[0][::2], seen[0][1::2])
    cohorts = {"synthetic": (seen[0], seen[1]), "before": (seen[0], seen[2]), "real halves": halves}
    keys, out = ("fid", "kid_mean", "kid_std"), {}
    for cohort, (ours, theirs) in cohorts.items():
        if min(len(ours), len(theirs)) < 2:
            out[cohort] = dict.fromkeys(keys)
            reasons |= {f"patches/{cohort}/{key}": "fewer than two lesions to compare" for key in keys}
            continue
        a, b = torch.stack(ours), torch.stack(theirs)
        planes = [cohort_metrics(a[:, plane], b[:, plane], {}, only=keys) for plane in range(3)]
        out[cohort] = {key: float(np.mean([row[key] for row in planes])) for key in keys if key in planes[0]}
    return out


def _features(patch: Patch, extractor: Extractor) -> torch.Tensor:
    """Features (3, F) of slices through a lesion's box and a little around it, stretched to one size.

    Of whole patches, whose anatomy differs more than lesions do, they would not tell a lesion from none.
    """
    box = Box.of((patch[2] > 0).numpy() if patch[2].any() else np.ones(patch.shape[1:], dtype=bool))
    around = tuple(slice(max(0, a - n // 6 - 1), a + n + n // 6 + 1) for a, n in zip(box.start, box.size, strict=True))
    near = patch[:1, *around]
    slices = [near.select(axis, near.shape[axis] // 2)[None] for axis in (1, 2, 3)]
    return torch.stack([extract(extractor, F.interpolate(x, (SEEN, SEEN), mode="bilinear")) for x in slices])


def lesion_downstream(
    real: Patch,
    synthetic: Patch,
    test: Patch,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 400,
    batch_size: int = 4,
    channels: Sequence[int] = CHANNELS,
) -> dict[str, Case]:
    """Do synthetic lesions help? A small 3-D U-Net learns from few real ones, and from both; Dice on other real ones.

    Args:
        real: patches (N, 3, S, A, L).
        synthetic: likewise, of any number.
        test: likewise, unknown to the others.
        seeds: of trainings.
        steps: of each training, whatever the size of its set.
        batch_size: patches in a step.
        channels: of the U-Net's levels.

    Returns:
        arm -> {"runs": mean Dice of each seed, "dice": their summary, "gain": over "real" with the same seed}.
    """
    arms = {"real": real, "real + synthetic": torch.cat([real, synthetic]), "synthetic": synthetic}
    runs: dict[str, list[float]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm, patches in arms.items():
            logger.info("segmenter of %s lesions, seed %d", arm, seed)
            epochs = max(1, round(steps / math.ceil(len(patches) / batch_size)))
            how: Case = {"epochs": epochs, "batch_size": batch_size, "channels": channels, "seed": int(seed)}
            network = train_segmenter(patches[:, :2], patches[:, 2:], **how)
            runs[arm].append(float(dice_scores(network, test[:, :2], test[:, 2:]).mean()))
    gains = {arm: [a - b for a, b in zip(found, runs["real"], strict=True)] for arm, found in runs.items()}
    return {arm: {"runs": found, "dice": summary(found), "gain": summary(gains[arm])} for arm, found in runs.items()}


# -------------------------------------------------------------------------------------------------------- the report


def _markdown(result: Mapping[str, Any]) -> str:
    """The report people read."""
    counts, lesions, control = result["counts"], result["lesions"], result["control"]
    around = result["surroundings"]
    lines = [
        f"# {result['name']}\n",
        f"{counts['lesions']} lesions in {counts['synthetic']} synthetic CTs, {counts['missing']} asked for missing, "
        f"against {counts['real']} real ones. Features by {result['settings']['extractor']}.\n",
        *_side_by_side("place and size", lesions),
        *_side_by_side("does density follow the words?", control),
        *table(["surroundings", "value"], [[key, show(value)] for key, value in around.items()]),
    ]
    rows = [
        [word, cohort, *(show(found[key]) for key in ("change", "contrast", "hu"))]
        for cohort, words in result["density"].items()
        for word, found in words.items()
    ]
    lines += table(["density", "cohort", "HU change", "contrast to organ", "HU"], rows)
    keys = ("fid", "kid_mean", "kid_std")
    rows = [[cohort, *(show(row[key]) for key in keys)] for cohort, row in result["patches"].items()]
    lines += table(["patches against real ones", *keys], rows)
    if result["downstream"]:
        rows = [[arm, show(row["dice"]), show(row["gain"])] for arm, row in result["downstream"].items()]
        lines += table(["segmenter learns from", "Dice on held-out lesions", "gain over real alone"], rows)
    return "\n".join([*lines, *(f"- {note}" for note in result["notes"])]) + "\n"


def _side_by_side(title: str, cohorts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table with a column for each cohort."""
    names = list(next(iter(cohorts.values())))
    return table([title, *cohorts], [[key, *(show(row[key]) for row in cohorts.values())] for key in names])
