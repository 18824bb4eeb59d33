"""Evaluation of images made from masks: do they look real, show the lesion where the mask says, and help a segmenter?

Several methods stand side by side, each with the spread of its repeats, beside what other real pairs get. The numbers
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

import torch
import torch.nn.functional as F
from torch import nn

from .downstream import dice_scores, train_segmenter
from .evaluation import Loader, cohort_metrics, describe, extract, finite, show, summary, table, write_report
from .io import CaseError, list_synthetic, unwrap
from .metrics import Extractor, RandomConvFeatures, nearest_training_distance
from .workflow import versions

logger = logging.getLogger(__name__)

Cases = Sequence[Mapping[str, Any]]
Tensors = tuple[torch.Tensor, torch.Tensor]
Reader = Callable[[Mapping[str, Any]], Tensors]

TWICE = "copy-paste"

NOTES = (
    "FID, KID, MMD, density, coverage, diversity and nearest features depend on the extractor and the image size, FID "
    "also on the number of cases: compare columns made alike, and not with published values of another network.",
    "The first column is what other real pairs get: no generator can be expected to do better.",
    "Nearest ratio: distance of an image to its nearest real one, over the median distance of a real image to its "
    "nearest other. Near 0 means a copy, if the real pairs are those the model was trained on.",
    "Diversity: mean distance between two images of the cohort, over that of the real ones. Below 1: too much alike.",
    "Mask agreement: Dice of a segmenter trained on the real pairs, between what it finds in an image and the mask the "
    "image was made from. Low when the lesion is elsewhere, or does not look like one.",
    f"Downstream: Dice and IoU on the held-out pairs. '{TWICE}' has the real pairs twice: epochs are fixed, so a set "
    "twice as large is trained twice as long, and only what is gained beyond that arm is due to new pairs.",
    "± is the standard deviation over repeats (n): over folders in the first table; in the second over trainings of "
    "the segmenter, and over folders as well where a cohort has several.",
)


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
    """Compare cohorts of synthetic pairs with real ones, each other, and by what they add to a segmenter's training.

    Writes `<name>.json` and `<name>.md`. Whatever is wrong with a file is found before the first segmenter is trained;
    the real pairs and one folder are in memory at a time.

    Args:
        real: cases {"image": path, "mask": path} that the generators were trained on.
        held_out: real cases of other patients, or none: then there is no downstream part, and one half of the real
            cases stands in for other real pairs.
        cohorts: name -> folders that inference runs wrote; several are repeats, of a model trained with other seeds.
        output_dir: folder of the report, made if missing.
        load: case, real or synthetic -> the same with "image" (C, H, W) in [-1, 1] and "mask" (1, H, W) in {0, 1}.
        extractor: images (N, C, H, W) in [-1, 1] -> features (N, F), by default `RandomConvFeatures()`.
        image_size: (H, W) to which pairs are brought; by default all must be loaded in the first real one's size.
        seeds: of the segmenters, one training each. A folder among several takes one of them in turn, a folder alone
            takes all.
        epochs: how often a segmenter sees each pair of its set.
        segment: whether to train segmenters; without, there is neither mask agreement nor a downstream part.
        name: stem of the report.

    Returns:
        what the JSON holds. A number that cannot be computed is None, and "reasons" says why.
    """
    found = _list(cohorts)
    if not real or not found or not seeds:
        raise ValueError(f"nothing to compare: {len(real)} real cases, {len(found)} cohorts, {len(seeds)} seeds")
    extractor = RandomConvFeatures() if extractor is None else extractor
    size = tuple(image_size) if image_size else tuple(_read(real[0], load, None, True)[0].shape[1:])
    read: Reader = partial(_read, load=load, size=size, resize=bool(image_size))
    reasons: dict[str, str] = {}

    # What the images look like.
    look = partial(_look, read=read, extractor=extractor)
    training = look("real", real)
    reference: dict[str, dict[str, Any]] = {}
    if held_out:
        metrics = _compare(training, look("held-out", held_out), reasons, "reference/held-out")
        reference["held-out"] = {"cases": len(held_out), "metrics": metrics}
    elif len(real) > 1:
        first, second = ({space: x[i::2] for space, x in training.items()} for i in (0, 1))
        metrics = _compare(first, second, reasons, "reference/real, other half")
        reference["real, other half"] = {"cases": len(real) // 2, "metrics": metrics}
    rows: dict[str, list[dict[str, Any]]] = {}
    for cohort, folders in found.items():
        rows[cohort] = []
        for folder, cases in folders:
            metrics = _compare(training, look(folder, cases), reasons, f"cohorts/{cohort}/folders/*")
            rows[cohort].append({"folder": folder, "cases": len(cases), "metrics": metrics})

    # What a segmenter makes of them.
    runs: dict[str, list[dict[str, Any]]] = {}
    if segment:
        runs = _segment(real, held_out, found, reference, rows, read, seeds, epochs)
    why = "segmenters were not asked for" if not segment else "" if held_out else "no held-out pairs were given"
    if why:
        reasons["downstream"] = why
    for path, row in _paths(reference, rows):
        if "mask_agreement" not in row["metrics"]:
            row["metrics"]["mask_agreement"] = None
            reasons[f"{path}/metrics/mask_agreement"] = "the segmenter knows these pairs" if segment else why

    result = {
        "name": name,
        "counts": {
            "real": len(real),
            "held_out": len(held_out or ()),
            "cohorts": {cohort: [row["cases"] for row in repeats] for cohort, repeats in rows.items()},
        },
        "settings": {
            "image_size": list(size),
            "extractor": describe(extractor),
            "seeds": list(seeds),
            "epochs": epochs,
        },
        "versions": versions(),
        "reference": reference,
        "cohorts": {
            cohort: {"folders": repeats, "summary": _summaries([row["metrics"] for row in repeats])}
            for cohort, repeats in rows.items()
        },
        "downstream": {arm: {**_summaries(scores, ("dice", "iou")), "runs": scores} for arm, scores in runs.items()},
        "notes": list(NOTES),
    }
    for path, reason in list(reasons.items()):
        reasons |= {f"{path.replace('folders/*/metrics', 'summary')}/{key}": reason for key in ("mean", "std")}
    result = {**finite(result, reasons), "reasons": reasons}
    write_report(result, _markdown(result), output_dir)
    return result
