"""Evaluation of images made from masks: do they look real, show the lesion where the mask says, and help a segmenter?

Several methods stand side by side, each with the spread of its repeats, next to what other real pairs get. The numbers
themselves are `metrics` and `downstream`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .downstream import dice_scores, iou_scores, train_segmenter
from .evaluation import Loader, cohort_metrics, describe, extract, finite, show, summary, table, write_report
from .io import CaseError, list_synthetic, unwrap
from .metrics import Extractor, RandomConvFeatures, nearest_training_distance
from .workflow import versions

logger = logging.getLogger(__name__)

HELD_OUT, TWICE = "held-out", "copy-paste"

NOTES = (
    "FID, KID, MMD, density, coverage, diversity and nearest features depend on the extractor, the image size and, FID "
    "above all, on the number of cases: compare columns made alike, and not with published values of another network.",
    f"'{HELD_OUT}' is what other real pairs get, and so what a perfect generator would.",
    "Nearest ratio: distance of an image to its nearest real one, over the median distance of a real image to its "
    "nearest other. Near 0 means a copy, if the real pairs are those the model was trained on.",
    "Diversity: mean distance between the features of two images, over that of the real ones. Below 1: too much alike.",
    "Mask agreement: Dice between what a segmenter trained on the real pairs finds in an image and the mask it was "
    "made from. Low where the lesion lies elsewhere, or does not look like one.",
    f"Downstream: Dice and IoU on the held-out pairs. '{TWICE}' has the real pairs twice: epochs are fixed, so a set "
    "twice as large is trained on twice as long, and only what comes on top of that arm is due to new pairs.",
    "± is the (population) standard deviation over n repeats: in the first table over folders; in the second over "
    "trainings of the segmenter, each on another folder where a cohort has several.",
)

Cases = Sequence[Mapping[str, Any]]
Pairs = tuple[torch.Tensor, torch.Tensor]
Reader = Callable[[Mapping[str, Any]], Pairs]
Row = dict[str, Any]
"""One folder: {"folder": path, None for real pairs; "cases": what lies in it; "metrics": name -> number}."""


def evaluate_images(
    real: Cases,
    held_out: Cases | None,
    cohorts: Mapping[str, Sequence[str | Path]],
    output_dir: str | Path,
    *,
    load: Loader,
    extractor: Extractor | None = None,
    image_size: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 30,
    segment: bool = True,
    name: str = "evaluation",
) -> dict[str, Any]:
    """Compare cohorts of synthetic pairs with real ones, with each other, and by what they teach a segmenter.

    Writes `<name>.json` and `<name>.md`. Every file is looked at before the first segmenter is trained; in memory are
    the real pairs and one folder at a time.

    Args:
        real: cases {"image": path, "mask": path} that the generators were trained on.
        held_out: likewise, unknown to them; without, there is no downstream part.
        cohorts: name -> folders that inference runs wrote; several are repeats, of a model trained with other seeds.
        output_dir: folder of the report, made if missing.
        load: case, real or synthetic -> the same with "image" (C, H, W) in [-1, 1] and "mask" (1, H, W) in {0, 1}.
        extractor: images (N, C, H, W) in [-1, 1] -> features (N, F), by default `RandomConvFeatures()`.
        image_size: (H, W) to which all pairs are resized; by default they must be loaded in one size.
        seeds: of segmenters. A set of pairs gets one for each seed; among several folders, each takes one, in turn.
        epochs: how often a segmenter sees each pair of its set.
        segment: whether to train segmenters; without, there is neither mask agreement nor a downstream part.
        name: stem of the report.

    Returns:
        what the JSON holds. A number that cannot be computed is None, and "reasons" says why.
    """
    rows = _list(cohorts)
    if not real or not rows or not seeds:
        raise ValueError(f"nothing to compare: {len(real)} real pairs, {len(rows)} cohorts, {len(seeds)} seeds")
    if held_out:
        rows = {HELD_OUT: [{"folder": None, "cases": held_out}], **rows}
    extractor = extractor or RandomConvFeatures()
    shape = _read(real[0], load, image_size)[0].shape
    read = partial(_read, load=load, image_size=image_size, shape=shape)

    reasons = {} if held_out else dict.fromkeys((f"cohorts/{HELD_OUT}", "downstream"), "no held-out pairs were given")
    logger.info(f"features of {len(real)} real pairs and of {sum(map(len, rows.values()))} sets beside them")
    known = _look(real, read, extractor)
    for cohort, repeats in rows.items():
        for row in repeats:
            row["metrics"], missing = _compare(known, _look(row["cases"], read, extractor))
            for metric, reason in missing.items():
                reasons |= _because(cohort, metric, reason)
    if segment:
        runs = _segment(real, held_out, rows, read, seeds, epochs)
    else:
        runs, reason = {}, "segmenters were not asked for"
        reasons["downstream"] = reason
        for cohort, repeats in rows.items():
            reasons |= _because(cohort, "mask_agreement", reason)
            for row in repeats:
                row["metrics"]["mask_agreement"] = math.nan

    for row in (row for repeats in rows.values() for row in repeats):
        row["cases"] = len(row["cases"])
    result = {
        "name": name,
        "counts": {"real": len(real), "held_out": len(held_out or ())},
        "settings": {
            "image_size": list(shape[1:]),
            "extractor": describe(extractor),
            "seeds": list(seeds),
            "epochs": epochs,
        },
        "versions": versions(),
        "cohorts": {
            cohort: {"folders": repeats, "summary": _summaries([row["metrics"] for row in repeats])}
            for cohort, repeats in rows.items()
        },
        "downstream": {
            arm: {"runs": tests, "summary": _summaries(tests, ("dice", "iou"))} for arm, tests in runs.items()
        },
        "notes": list(NOTES),
    }
    result = {**finite(result, reasons), "reasons": reasons}
    write_report(result, _markdown(result), output_dir)
    return result


def _list(cohorts: Mapping[str, Sequence[str | Path]]) -> dict[str, list[Row]]:
    """The folders of each cohort with their cases, or an error that names the folder that has none."""
    rows: dict[str, list[Row]] = {}
    for cohort, folders in cohorts.items():
        if cohort in (HELD_OUT, TWICE):
            raise ValueError(f"a cohort cannot be called {cohort!r}, the report has one of that name: rename it")
        if isinstance(folders, (str, Path)) or not folders:
            raise ValueError(f"cohort {cohort!r} needs a list of folders, got {folders!r}")
        rows[cohort] = [{"folder": str(folder), "cases": list_synthetic(folder)} for folder in folders]
        for row in rows[cohort]:
            if not row["cases"]:
                raise ValueError(f"cohort {cohort!r}: {row['folder']} holds no synthetic case: run inference into it")
            lacking = next((case for case in row["cases"] if not {"image", "mask"} <= set(case)), None)
            if lacking:
                raise ValueError(f"cohort {cohort!r}: {row['folder']} holds a case without image and mask: {lacking}")
    return rows


def _read(
    case: Mapping[str, Any],
    load: Loader,
    image_size: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
) -> Pairs:
    """Image (C, H, W) and mask (1, H, W) of one case, as promised; errors name the file."""
    for key in ("image", "mask"):
        if key not in case:
            raise ValueError(f"case {dict(case)} has no '{key}': every case needs file paths under 'image' and 'mask'")
        if not Path(case[key]).is_file():
            raise ValueError(f"{key} file not found: {case[key]}")
    files = f"{case['image']}, {case['mask']}"
    try:
        loaded = load(case)
        image, mask = (torch.as_tensor(np.asarray(loaded[key]), dtype=torch.float32) for key in ("image", "mask"))
    except Exception as error:
        cause = unwrap(error)
        raise cause if isinstance(cause, CaseError) else ValueError(f"cannot read {files}: {cause}") from error
    if image.ndim != 3 or mask.shape != (1, *image.shape[1:]):
        shapes = f"{tuple(image.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"expected image (C, H, W) and mask (1, H, W), got {shapes}: {files}")
    if not (image.abs() <= 1.001).all() or not ((mask == 0) | (mask == 1)).all():  # not: NaN is no number in range
        raise ValueError(f"image must be loaded in [-1, 1] and mask as 0 and 1, scale and threshold in load: {files}")
    if image_size:
        image = F.interpolate(image[None], tuple(image_size), mode="area")[0]  # as MONAI's Resize
        mask = F.interpolate(mask[None], tuple(image_size), mode="nearest")[0]
    if shape and image.shape != shape:
        shapes = f"{tuple(image.shape)}, the first real image as {tuple(shape)}"
        raise ValueError(f"{case['image']} is loaded as {shapes}: resize in load, or set image_size")
    return image, mask


def _pairs(cases: Cases, read: Reader) -> Pairs:
    """Images (N, C, H, W) and masks (N, 1, H, W) of all cases."""
    images, masks = zip(*map(read, cases), strict=True)
    return torch.stack(images), torch.stack(masks)


def _look(cases: Cases, read: Reader, extractor: Extractor) -> dict[str, torch.Tensor]:
    """Features (N, F), and voxels as thumbnails (N, C, 32, 32), one image in memory at a time."""
    seen: dict[str, list[torch.Tensor]] = {"features": [], "voxels": []}
    for case in cases:
        image = read(case)[0][None]
        seen["features"].append(extract(extractor, image))
        seen["voxels"].append(F.interpolate(image, (32, 32), mode="area")[0])
    return {space: torch.stack(x) for space, x in seen.items()}


def _compare(
    real: Mapping[str, torch.Tensor], synthetic: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Likeness, copies and diversity of images as `_look` sees them; and the reasons of what is missing, by metric."""
    noted: dict[str, str] = {}
    metrics = cohort_metrics(real["features"], synthetic["features"], noted)
    for space in ("features", "voxels"):
        ratio = nearest_training_distance(synthetic[space], real[space]).ratio
        metrics[f"nearest_{space}_min_ratio"] = float(ratio.min())
        metrics[f"nearest_{space}_median_ratio"] = float(ratio.median())
    apart, real_apart = (F.pdist(x["features"].double()).mean() for x in (synthetic, real))
    metrics["diversity"] = float(apart / real_apart)
    return metrics, {path.removeprefix("metrics/"): reason for path, reason in noted.items()}


def _because(cohort: str, metric: str, reason: str) -> dict[str, str]:
    """The reason, for every place where the report lacks this metric."""
    places = (f"folders/*/metrics/{metric}", f"summary/{metric}/mean", f"summary/{metric}/std")
    return {f"cohorts/{cohort}/{place}": reason for place in places}


def _segment(
    real: Cases,
    held_out: Cases | None,
    rows: Mapping[str, Sequence[Row]],
    read: Reader,
    seeds: Sequence[int],
    epochs: int,
) -> dict[str, list[dict[str, Any]]]:
    """Train each segmenter once; note mask agreement in the rows, and return the tests on held-out pairs by arm."""
    known, test = _pairs(real, read), _pairs(held_out, read) if held_out else None
    runs: dict[str, list[dict[str, Any]]] = {}

    def train(arm: str, seed: int, *sets: Pairs, folder: str | None = None) -> nn.Module:
        """A segmenter that has seen these sets, and has been tested."""
        images, masks = map(torch.cat, zip(*sets, strict=True))
        start = time.perf_counter()
        network = train_segmenter(images, masks, epochs=epochs, seed=seed)
        seconds = time.perf_counter() - start
        logger.info(f"segmenter of '{arm}', seed {seed}: {epochs} epochs of {len(images)} pairs in {seconds:.1f} s")
        if test:
            dice = dice_scores(network, *test)
            scores = {"dice": float(dice.mean()), "iou": float(iou_scores(dice).mean())}
            runs.setdefault(arm, []).append({"seed": seed, "folder": folder, "pairs": len(images), **scores})
        return network

    on_real = {seed: train("real", seed, known) for seed in seeds}
    if test:
        for seed in seeds:
            train(f"real + {TWICE}", seed, known, known)
    for cohort, repeats in rows.items():
        for i, row in enumerate(repeats):
            new, turn = _pairs(row["cases"], read), seeds if len(repeats) == 1 else [seeds[i % len(seeds)]]
            agreement = [float(dice_scores(on_real[seed], *new).mean()) for seed in turn]
            row["metrics"]["mask_agreement"] = float(np.mean(agreement))
            if test and cohort != HELD_OUT:
                for seed in turn:
                    train(f"real + {cohort}", seed, known, new, folder=row["folder"])
    return runs


def _summaries(
    tables: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """A summary of each column over the repeats that have a value."""
    return {
        key: summary([math.nan if row[key] is None else row[key] for row in tables]) for key in columns or tables[0]
    }


def _markdown(result: Mapping[str, Any]) -> str:
    """The report people read: a table of the images, a column for each cohort; one of the segmenters, a row each."""
    counts, settings, cohorts = result["counts"], result["settings"], result["cohorts"]

    def cell(cohort: Mapping[str, Any], metric: str) -> str:
        folders = cohort["folders"]
        return show(cohort["summary"][metric] if len(folders) > 1 else folders[0]["metrics"][metric])

    sizes = [", ".join(str(row["cases"]) for row in cohort["folders"]) for cohort in cohorts.values()]
    metrics = next(iter(cohorts.values()))["summary"]
    lines = [
        f"# {result['name']}\n",
        f"Against {counts['real']} real pairs, image size {settings['image_size']}; features by "
        f"{settings['extractor']}.\n",
        *table(
            ["images", *cohorts],
            [["pairs", *sizes], *([metric, *(cell(c, metric) for c in cohorts.values())] for metric in metrics)],
        ),
    ]
    if result["downstream"]:
        rows = [
            [arm, str(tests["runs"][0]["pairs"]), show(tests["summary"]["dice"]), show(tests["summary"]["iou"])]
            for arm, tests in result["downstream"].items()
        ]
        tested = f"{settings['epochs']} epochs on, tested on {counts['held_out']} held-out pairs"
        lines += table([tested, "pairs", "Dice", "IoU"], rows)
    else:
        lines.append(f"No downstream part: {result['reasons']['downstream']}.\n")
    return "\n".join([*lines, *(f"- {note}" for note in result["notes"])]) + "\n"
