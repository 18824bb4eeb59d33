"""Evaluation of volumes made from reports: is the anatomy as asked, and as in the training set, and are there seams?

The numbers themselves are `anatomy_metrics` and `metrics`. A check that cannot fail shows nothing, so accuracy stands
beside that of shuffled reports, and of real cases which the reader did not learn from.
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
from monai.networks import one_hot

from .anatomy_metrics import (
    SIZE_TOLERANCE,
    AttributeReader,
    Row,
    accuracy_table,
    attribute_accuracy,
    coverage_agreement,
    measure_coverage,
    measure_organs,
    slice_jumps,
    volume_statistics_agreement,
)
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
from .io import CaseError, list_synthetic, stem, unwrap
from .metrics import Extractor, RandomConvFeatures, label_hu_statistics, nearest_training_distance
from .reports import Attributes, parse_report
from .workflow import versions

logger = logging.getLogger(__name__)

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
FOLDS = 5  # of the real cases, for the accuracy of the reader itself
LISTED = 40  # failures that the Markdown report shows

NOTES = (
    "Attributes: what the report asks for, judged by a reader that has learned from the real cases and their reports. "
    "'shuffled': the same volumes against the reports of other ones; an accuracy that is as good there says nothing. "
    f"'real': real cases which the reader did not learn from ({FOLDS} folds), what a perfect generator would get. "
    "'unusual' is all but organs that are asked to be normal, which come out by themselves. "
    f"Tumour size is right within {SIZE_TOLERANCE[0]:g} cm or {SIZE_TOLERANCE[1]:.0%}; site and size are wrong where "
    "there is no tumour; a kidney is right if both are as asked.",
    "Distances of volumes and centres: Wasserstein over the real standard deviation, of cases that have the organ; 0 "
    "is equal, about 1 is as far as a real patient from the mean. Volumes depend on the voxel size in the files.",
    "Coverage ratio: mean share of all voxels, the smaller cohort's over the larger's.",
    "FID and KID are 2.5-D: features of evenly spaced slices in each plane, all cases together. They depend on the "
    "extractor, the number of cases and slices, and the image size: compare rows made with the same ones only.",
    "Slice jumps: between neighbouring axial slices inside the body; 'voxel' is the mean absolute difference of "
    "voxels, 'mean' that of the slices' means, where seams show. Ratios hold for equal distances of slices only.",
    "HU are clipped to the window, which synthetic images cannot leave.",
    "Nearest ratio: distance of a synthetic case to its nearest real case, over the median distance of a real case to "
    "its nearest other. Near 0 means a copy, if the real cases are those the model was trained on.",
)

Case = dict[str, Any]


def evaluate_anatomy(
    real: Sequence[Mapping[str, Any]],
    synthetic_dir: str | Path,
    output_dir: str | Path,
    *,
    names: Sequence[str],
    window: tuple[float, float],
    load: Loader | None = None,
    extractor: Extractor | None = None,
    slices: int = 8,
    name: str = "evaluation",
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a folder of synthetic volumes with what was asked and with real ones; one case in memory at a time.

    Writes `<name>.json` and `<name>.md`.

    Args:
        real: cases {"image": path, "layout": path, "report": text}; the training set, if nearest distances are to show
            memorisation. A case may lack the report.
        synthetic_dir: what an inference run wrote: images in HU, layouts, side-cars that hold the reports.
        output_dir: folder of the report, made if missing.
        names: of the labels, background first; a layout's values are indices into them.
        window: intensities (HU) that become [-1, 1].
        load: real case -> the same with "image" (1, X, Y, Z) in HU and "layout" (1, X, Y, Z) in our labels, on the
            grid of the synthetic ones; by default files are taken as they are.
        extractor: slices (N, 1, H, W) in [-1, 1] -> features (N, F), by default `RandomConvFeatures()`.
        slices: of each volume in each plane that features are taken of.
        name: stem of the two files.
        seed: of shuffling.

    Returns:
        what the JSON holds. A number that cannot be computed is None, and "reasons" says why.
    """
    synthetic = list_prompted(synthetic_dir)
    if not real or not synthetic:
        raise ValueError(f"nothing to compare: {len(real)} real cases, {len(synthetic)} synthetic in {synthetic_dir}")
    if not window[0] < window[1] or slices < 1:
        raise ValueError(f"expected a window (low, high) and slices from 1, got {window} and {slices}")
    extractor = extractor or RandomConvFeatures()
    cohorts: dict[str, list[Case]] = {"real": [], "synthetic": []}
    for cohort, cases in (("real", real), ("synthetic", synthetic)):
        for i, case in enumerate(cases, 1):
            logger.info("%s case %d of %d: %s", cohort, i, len(cases), case.get("image"))
            loaded = _loaded(case, load if cohort == "real" else None)
            cohorts[cohort].append({**_told(case), **_measure(loaded, names, window, extractor, slices)})
    r, s = cohorts["real"], cohorts["synthetic"]

    reasons: dict[str, str] = {}
    planes = _planes(r, s, reasons)
    memorisation = _memorisation(r, s, len(names), reasons)
    attributes, failures = _attributes(r, s, seed, reasons)
    jumps = _jumps(r, s)
    result = {
        "name": name,
        "counts": {
            **{cohort: len(cases) for cohort, cases in cohorts.items()},
            **{
                f"{cohort}_with_report": sum(c["asked"] is not None for c in cases) for cohort, cases in cohorts.items()
            },
            "layout_given": sum(case["layout_given"] for case in s),
        },
        "settings": {
            "names": list(names),
            "window": list(window),
            "slices": slices,
            "extractor": describe(extractor),
            "seed": seed,
        },
        "versions": versions(),
        "metrics": {
            **{f"attributes_{kind}": row["accuracy"] for kind, row in attributes["asked"].items()},
            **{f"{key[:3]}_{plane}": row[key] for plane, row in planes.items() for key in ("fid", "kid_mean")},
            **{f"slice_jump_ratio_{key}": value for key, value in jumps["ratio"].items()},
            **memorisation,
        },
        "attributes": attributes,
        "failures": failures,
        "organs": _organs(r, s),
        "planes": planes,
        "jumps": jumps,
        "labels": {
            cohort: _summaries([case["labels"] for case in cases], names[1:]) for cohort, cases in cohorts.items()
        },
        "cases": {cohort: [_kept(case) for case in cases] for cohort, cases in cohorts.items()},
        "notes": list(NOTES),
    }
    result = {**finite(result, reasons), "reasons": reasons}
    write_report(result, _markdown(result), output_dir)
    return result


# --------------------------------------------------------------------------------------------------------- the cases


def list_prompted(synthetic_dir: str | Path) -> list[Case]:
    """What an inference run wrote, each volume with its layout and what its side-car says was asked.

    Returns:
        cases {"image", "layout", "name", "seed", "report", "layout_given"}; report is None where none was given, and
        layout_given says that the labels were not drawn but brought along.
    """
    cases = []
    for outputs in list_synthetic(synthetic_dir):
        if not {"image", "layout"} <= set(outputs):
            raise ValueError(f"{synthetic_dir} holds a case without image and layout, only {outputs}: synthesise both")
        path = Path(outputs["layout"])
        sidecar = path.with_name(stem(path).rpartition("_")[0] + ".json")
        case = json.loads(sidecar.read_text(encoding="utf-8"))["made_by"]["case"]
        asked = {"name": case.get("name", sidecar.stem), "seed": case.get("seed"), "report": case.get("report")}
        files = {key: outputs[key] for key in ("image", "layout")}
        cases.append({**files, **asked, "layout_given": case.get("layout") is not None})
    return cases


def _loaded(case: Mapping[str, Any], load: Loader | None) -> Mapping[str, Any]:
    """The case as `load` makes it; errors name the files."""
    if load is None:
        return case
    try:
        return load(case)
    except Exception as error:
        cause = unwrap(error)
        files = ", ".join(str(case.get(key)) for key in ("image", "layout"))
        raise cause if isinstance(cause, CaseError) else ValueError(f"cannot read {files}: {cause}") from error


def _told(case: Mapping[str, Any]) -> Case:
    """What is known of a case before it is looked at."""
    report = case.get("report")
    return {
        "image": str(case.get("image")),
        "name": str(case.get("name", case.get("image"))),
        "seed": case.get("seed"),
        "report": report,
        "asked": parse_report(report) if report else None,
        "layout_given": bool(case.get("layout_given")),
    }


def _measure(
    case: Mapping[str, Any], names: Sequence[str], window: tuple[float, float], extractor: Extractor, slices: int
) -> Case:
    """All that one case tells by itself: organs, HU, jumps, features of slices, thumbnails."""
    volume, layout = read_volume(case, "image"), read_volume(case, "layout")
    files = ", ".join(str(x.meta.get("filename_or_obj", case.get("name"))) for x in (volume, layout))
    if volume.shape != layout.shape or volume.ndim != 4 or len(volume) != 1:
        shapes = f"{tuple(volume.shape)} and {tuple(layout.shape)}"
        raise ValueError(f"image and layout must both be (1, X, Y, Z), got {shapes}: {files}")
    affine = np.asarray(layout.affine)
    hu, labels = volume.as_tensor().float().clamp(*window), layout.as_tensor()
    try:
        organs = measure_organs(labels[0], affine, names)
    except ValueError as error:
        raise ValueError(f"{files}: {error}") from error
    scaled = 2 * (hu - window[0]) / (window[1] - window[0]) - 1
    return {
        "organs": organs,
        "coverage": measure_coverage(labels, names),
        "labels": label_hu_statistics(hu, labels, {organ: i for i, organ in enumerate(names) if i}),
        "jumps": {**slice_jumps(hu[0], labels[0]), "slice_mm": float(np.linalg.norm(affine[:3, 2]))},
        **_features(scaled, extractor, slices),
        "voxels": F.interpolate(scaled[None], (32, 32, 32), mode="area")[0],
        "thumbnail": F.interpolate(labels[None].float(), (16, 16, 16), mode="nearest-exact")[0].byte(),
    }


def _features(image: torch.Tensor, extractor: Extractor, slices: int) -> Case:
    """Features (planes, slices, F) of evenly spaced slices of an image (1, X, Y, Z), or why there are none."""
    planes = []
    try:
        for axis in PLANES.values():
            places = ((torch.arange(slices) + 0.5) * image.shape[1 + axis] / slices).long()
            planes.append(torch.stack([extract(extractor, image.select(1 + axis, int(i))[None]) for i in places]))
    except ValueError as error:
        return {"features": None, "no_features": str(error)}
    return {"features": torch.stack(planes)}


def _kept(case: Case) -> Case:
    """What the report tells of a single case."""
    told = {key: case[key] for key in ("image", "name", "seed", "report", "organs", "jumps")}
    return told | {key: case[key] for key in ("nearest", "attributes") if key in case}


# --------------------------------------------------------------------------------------------------------- the parts


def _planes(real: Sequence[Case], synthetic: Sequence[Case], reasons: dict[str, str]) -> dict[str, dict[str, Any]]:
    """FID and KID of the slices of each plane, and their means."""
    keys, result = ("fid", "kid_mean", "kid_std"), {}
    missing = next((case["no_features"] for case in (*real, *synthetic) if case["features"] is None), None)
    for i, plane in enumerate(PLANES):
        noted: dict[str, str] = {}
        if missing:
            result[plane] = dict.fromkeys(keys)
            noted = {f"metrics/{key}": missing for key in keys}
        else:
            r, s = (torch.cat([case["features"][i] for case in cases]) for cases in (real, synthetic))
            result[plane] = cohort_metrics(r, s, noted, only=keys)
        for path, reason in noted.items():
            key = path.removeprefix("metrics/")
            for where in (plane, "mean"):
                reasons |= {f"planes/{where}/{key}": reason, f"metrics/{key[:3]}_{where}": reason}
    known = [row for row in result.values() if row["fid"] is not None]
    result["mean"] = {key: float(np.mean([row[key] for row in known])) if known else None for key in keys}
    return result


def _memorisation(
    real: Sequence[Case], synthetic: Sequence[Case], num_classes: int, reasons: dict[str, str]
) -> dict[str, Any]:
    """Nearest real case of each synthetic one, by features, voxels and labels, noted in the case; and their ratios."""

    def space(cases: Sequence[Case], key: str) -> torch.Tensor:
        x = torch.stack([case.pop(key) for case in cases])
        return one_hot(x, num_classes, dtype=torch.float32) if key == "thumbnail" else x

    metrics: dict[str, Any] = {}
    for key, label in (("features", "features"), ("voxels", "voxels"), ("thumbnail", "layout")):
        ratios = {f"nearest_{label}_min_ratio": math.nan, f"nearest_{label}_median_ratio": math.nan}
        why = next((case["no_features"] for case in (*real, *synthetic) if case[key] is None), None)
        if why is None:
            nearest = nearest_training_distance(space(synthetic, key), space(real, key))
            ratios = dict(zip(ratios, (float(nearest.ratio.min()), float(nearest.ratio.median())), strict=True))
            for case, distance, i, ratio in zip(synthetic, *(x.tolist() for x in nearest[:3]), strict=True):
                found = {"distance": distance, "ratio": ratio, "image": real[i]["image"]}
                case.setdefault("nearest", {})[label] = found
            why = "a single real case has no other, or most real cases are duplicates"
        reasons |= {f"metrics/{ratio}": why for ratio, value in ratios.items() if not math.isfinite(value)}
        metrics |= ratios
    return metrics


def _attributes(
    real: Sequence[Case], synthetic: Sequence[Case], seed: int, reasons: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], list[Row]]:
    """Accuracy as asked, against shuffled reports and of real cases; and what is not as asked."""
    known = [case for case in real if case["asked"] is not None]
    prompted = [case for case in synthetic if case["asked"] is not None and not case["layout_given"]]
    rows: dict[str, list[Row]] = {"asked": [], "shuffled": [], "real": []}
    why = dict.fromkeys(rows, "reports ask for nothing that can be judged")
    failures = []
    if not known:
        why = dict.fromkeys(rows, "no real case has a report to learn from")
    elif not prompted:
        why |= dict.fromkeys(("asked", "shuffled"), "no synthetic case was drawn from a report")
    if known and prompted:
        reader = _fit(known)
        for case in prompted:
            case["attributes"] = attribute_accuracy(case["asked"], reader, case["organs"])
            rows["asked"] += case["attributes"]
            failures += [{"case": case["name"], **row} for row in case["attributes"] if row["right"] is False]
        rows["shuffled"] = _shuffled(prompted, reader, seed)
    if len(known) > 1:
        for fold in range(min(FOLDS, len(known))):
            reader = _fit([case for i, case in enumerate(known) if i % FOLDS != fold])
            for case in known[fold::FOLDS]:
                rows["real"] += attribute_accuracy(case["asked"], reader, case["organs"])
    tables = {column: accuracy_table(of_column) for column, of_column in rows.items()}
    for column, kinds in tables.items():
        empty = [kind for kind, row in kinds.items() if not row["judged"]]
        reasons |= {f"attributes/{column}/{kind}/accuracy": why[column] for kind in empty}
        reasons |= {f"metrics/attributes_{kind}": why[column] for kind in empty if column == "asked"}
    return tables, failures


def _fit(cases: Sequence[Case]) -> AttributeReader:
    return AttributeReader().fit([case["organs"] for case in cases], [case["asked"] for case in cases])


def _shuffled(cases: Sequence[Case], reader: AttributeReader, seed: int) -> list[Row]:
    """Each case against the report of another."""
    if len(cases) < 2:
        return []
    order = np.random.default_rng(seed).permutation(len(cases))  # read as one cycle: nothing stays in its place
    asked: list[Attributes] = [cases[i]["asked"] for i in np.roll(order, 1)]
    pairs = zip(asked, order, strict=True)
    return [row for attributes, i in pairs for row in attribute_accuracy(attributes, reader, cases[i]["organs"])]


def _organs(real: Sequence[Case], synthetic: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """Of each organ: summaries of both cohorts, of the cases that have it, and how far apart they are."""
    measured = {cohort: [c["organs"] for c in cases] for cohort, cases in (("real", real), ("synthetic", synthetic))}
    agreement = volume_statistics_agreement(measured["real"], measured["synthetic"])
    coverage = coverage_agreement(*([case["coverage"] for case in cases] for cases in (real, synthetic)))
    result: dict[str, dict[str, Any]] = {}
    for organ, numbers in agreement.items():
        result[organ] = {**numbers, "coverage_ratio": coverage[organ]}
        for cohort, cases in measured.items():
            there = [case[organ] for case in cases if case[organ]["components"]]
            result[organ][cohort] = {
                key: summary([float(row[key]) for row in there]) for key in ("volume_ml", "components", "largest_share")
            }
    return result


def _jumps(real: Sequence[Case], synthetic: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """Slice jumps of both cohorts, and the synthetic over the real."""
    keys = ("voxel", "mean", "slice_mm")
    result: dict[str, dict[str, Any]] = {
        cohort: {key: summary([case["jumps"][key] for case in cases]) for key in keys}
        for cohort, cases in (("real", real), ("synthetic", synthetic))
    }
    means = {key: (result["synthetic"][key]["mean"], result["real"][key]["mean"]) for key in keys[:2]}
    return {**result, "ratio": {key: s / r if r else math.nan for key, (s, r) in means.items()}}


def _summaries(
    tables: Sequence[Mapping[str, Mapping[str, float]]], labels: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """HU mean and standard deviation inside each label, over the cases that have it."""
    return {label: {key: summary([case[label][key] for case in tables]) for key in ("mean", "std")} for label in labels}


# -------------------------------------------------------------------------------------------------------- the report


def _markdown(result: Mapping[str, Any]) -> str:
    """The report people read: attributes with the failures, organs, cohort metrics, seams, HU, the notes."""
    counts, settings, attributes = result["counts"], result["settings"], result["attributes"]
    lines = [
        f"# {result['name']}\n",
        f"{counts['synthetic']} synthetic against {counts['real']} real cases; {counts['synthetic_with_report']} and "
        f"{counts['real_with_report']} with a report. {counts['layout_given']} synthetic ones brought their labels "
        f"along and are not judged by their reports.\n",
        f"Window {settings['window']}, {settings['slices']} slices in each plane, features by "
        f"{settings['extractor']}.\n",
    ]
    kinds = list(dict.fromkeys(kind for column in attributes.values() for kind in column))
    lines += table(["attributes", *attributes], [[k, *(_share(c.get(k)) for c in attributes.values())] for k in kinds])
    lines += _failures(result["failures"])
    cohorts = ("real", "synthetic")
    header = ["organ", *(f"volume ml, {c}" for c in cohorts), "volume distance", "centre distance", "coverage ratio"]
    header += [f"components, {c}" for c in cohorts] + [f"occurrence, {c}" for c in cohorts]
    rows = [
        [
            organ,
            *(show(row[c]["volume_ml"]) for c in cohorts),
            *(show(row[key]) for key in ("volume_distance", "centre_distance", "coverage_ratio")),
            *(show(row[c]["components"]["mean"]) for c in cohorts),
            *(show(row[f"occurrence_{c}"]) for c in cohorts),
        ]
        for organ, row in result["organs"].items()
    ]
    lines += table(header, rows)
    numbers = {key: value for key, value in result["metrics"].items() if not key.startswith("attributes_")}
    lines += table(["metric", "value"], [[key, show(value)] for key, value in numbers.items()])
    jumps = result["jumps"]
    rows = [[key, *(show(jumps[c][key]) for c in cohorts), show(jumps["ratio"].get(key))] for key in jumps["real"]]
    lines += table(["slice jumps, HU", *cohorts, "ratio"], rows)
    keys = ("mean", "std")
    rows = [
        [organ, *(show(result["labels"][cohort][organ][key]) for key in keys for cohort in cohorts)]
        for organ in settings["names"][1:]
    ]
    lines += table(["HU inside", *(f"{key}, {cohort}" for key in keys for cohort in cohorts)], rows)
    return "\n".join([*lines, *(f"- {note}" for note in result["notes"])]) + "\n"


def _share(row: Mapping[str, Any] | None) -> str:
    """Accuracy, and of how many."""
    if row is None:
        return "-"
    rest = f", {row['not_judged']} not judged" if row["not_judged"] else ""
    return f"{show(row['accuracy'])} ({row['right']} of {row['judged']}{rest})"


def _failures(failures: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each attribute that is not as asked."""
    if not failures:
        return []
    rows = [[str(row[key]) for key in ("case", "kind", "attribute", "found")] for row in failures[:LISTED]]
    more = len(failures) - LISTED
    rest = [f"... and {more} more, in the JSON.\n"] if more > 0 else []
    return table(["not as asked", "kind", "asked", "found"], rows) + rest
