"""Evaluation of annotation masks: are the lesions as asked, spread and shaped like real ones, and new?

The numbers themselves are `mask_metrics`. A check that cannot fail shows nothing, so control stands beside shuffled
conditions, similarity beside halves of the real set.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import LoadImage
from scipy import ndimage

from .evaluation import Loader, cohort_metrics, describe, extract, finite, show, table, write_report
from .io import CaseError, atomic_path, list_synthetic, unwrap
from .mask_metrics import (
    SHAPE,
    SPLITS,
    STATISTICS,
    compare_shapes,
    compare_statistics,
    control,
    errors,
    halves,
    match,
    nearest_mask,
    shape,
)
from .metrics import Extractor, RandomConvFeatures
from .semantics import Lesion, components, measure
from .workflow import versions

COPY = 0.98  # Dice from which a mask is suspected to be a copy

NOTES = (
    "Control: errors and R^2 are over asked lesions that have a partner in the mask; missing ones are counted apart, "
    "and as failures in within_tolerance (size to 25 %, centre to 5 % of the side). Shuffled: the same masks against "
    "the conditions of other masks; a number that is as good there says nothing.",
    "Distribution: 'asked' against real tells what the fit of the statistics loses, 'synthetic' what is lost in all. "
    f"Real halves: mean over {SPLITS} random splits of the real masks, a floor that is somewhat high, as halves hold "
    "fewer cases; their ratios are taken the larger way round. Energy is of rows over the spread of both.",
    "Shape is per component of at least min_size pixels. The perimeter is Crofton's in four directions: exact for "
    "discs, 5 % short for upright squares; holes count with their edges.",
    "FID, KID, MMD, density and coverage depend on the extractor and the image size: compare rows made with the same.",
    f"Nearest Dice above {COPY} means a suspected copy, if the real masks are those the model was trained on; small "
    "simple shapes come near that by chance, as 'real to other real' shows.",
)


def list_asked(synthetic_dir: str | Path) -> list[dict[str, Any]]:
    """What an inference run wrote, each mask with what its side-car says: lesions asked and, if recorded, achieved."""
    cases = []
    for outputs in list_synthetic(synthetic_dir):
        if "mask" not in outputs:
            raise ValueError(f"{synthetic_dir} holds a case without a mask, only {outputs}: is it of a mask bundle?")
        path = Path(outputs["mask"])
        sidecar = path.with_name(path.name.rpartition("_mask")[0] + ".json")
        made_by = json.loads(sidecar.read_text(encoding="utf-8"))["made_by"]
        case, record = made_by["case"], made_by.get("record") or {}
        if "lesions" not in case:
            raise ValueError(f"{sidecar} does not say which lesions were asked: was it made by mask inference?")
        case = {"name": case["name"], "seed": case.get("seed"), "asked": [Lesion(**n) for n in case["lesions"]]}
        recorded = [Lesion(**n) for n in record["achieved"]] if "achieved" in record else None
        told = {key: record.get(key) for key in ("tries", "accepted")}
        cases.append({"mask": str(path), **case, **told, "recorded": recorded})
    return cases


def _foreign_values(path: str, labels: Sequence[int]) -> list[int]:
    """Values in a file that a mask may not hold: label values, for a single class 0 and 255 as well."""
    found = set(LoadImage(image_only=True)(path).unique().tolist())
    allowed = [labels] if len(labels) > 1 else [[255], labels]
    return min((sorted(found - {0, *values}) for values in allowed), key=len)


def _measure(
    case: Mapping[str, Any],
    load: Loader,
    labels: Sequence[int],
    min_size: int,
    size: Sequence[int],
    extractor: Extractor,
) -> dict[str, Any]:
    """All that one mask tells by itself: lesions, shapes per label, features, pixels."""
    path = case.get("mask")
    if path is None or not Path(path).is_file():
        raise ValueError(f"mask file not found: {path}" if path else f"case {dict(case)} has no 'mask'")
    try:
        mask = torch.as_tensor(np.asarray(load(case)["mask"]))
    except Exception as error:
        cause = unwrap(error)
        raise cause if isinstance(cause, CaseError) else ValueError(f"cannot read mask {path}: {cause}") from error
    if mask.shape != (len(labels), *size):
        shapes = f"{tuple(mask.shape)}, expected {(len(labels), *size)}"
        raise ValueError(f"mask {path} is loaded as {shapes}: resize in load")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"mask {path} is loaded with values other than 0 and 1: threshold in load")
    regions, rows = mask.bool().numpy(), {}
    for label, region in zip(labels, regions, strict=True):
        numbered, _ = components(region, min_size)
        boxes = enumerate(ndimage.find_objects(numbered), 1)
        found = [shape(numbered[box] == i) for i, box in boxes]
        rows[label] = np.array(found).reshape(-1, len(SHAPE))
    return {
        "lesions": measure(regions, labels, min_size),
        "shapes": rows,
        "features": extract(extractor, 2 * mask[None].float() - 1),
        "pixels": mask.bool().flatten(),
    }


def evaluate_masks(
    real: Sequence[Mapping[str, Any]],
    synthetic_dir: str | Path,
    *,
    load: Loader,
    labels: Sequence[int] = (1,),
    min_size: int,
    image_size: Sequence[int],
    extractor: Extractor | None = None,
    name: str = "evaluation",
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a folder of synthetic masks with what was asked and with real ones.

    Writes `<name>.json`, `<name>.md`, `control.csv` (a row for each asked lesion) and `control.png` into the folder.

    Args:
        real: cases {"mask": path}; the training set, if nearest masks are to show copies.
        synthetic_dir: what an inference run wrote.
        load: case -> the same case with one channel per label (K, S, S) in {0, 1} under "mask".
        labels: values of the K channels.
        min_size: pixels from which a component counts as a lesion, at `image_size`.
        image_size: (S, S).
        extractor: images (N, K, S, S) in [-1, 1] -> features (N, F), by default `RandomConvFeatures()`.
        name: stem of the report.
        seed: of shuffling and splitting.

    Returns:
        what the JSON holds. A number that cannot be computed is None, and "reasons" says why.
    """
    synthetic = list_asked(synthetic_dir)
    if not real or not synthetic:
        raise ValueError(f"nothing to compare: {len(real)} real and {len(synthetic)} synthetic masks")
    extractor = extractor or RandomConvFeatures()
    measured = partial(_measure, load=load, labels=labels, min_size=min_size, size=image_size, extractor=extractor)
    r = [{**case, **measured(case)} for case in real]
    s = [{**case, **measured({"mask": case["mask"]})} for case in synthetic]
    foreign = {case["mask"]: _foreign_values(case["mask"], labels) for case in s}
    reasons: dict[str, str] = {}
    result: dict[str, Any] = {
        "name": name,
        "counts": {"real": len(r), "synthetic": len(s)},
        "settings": {
            "image_size": list(image_size),
            "min_size": min_size,
            "labels": list(labels),
            "extractor": describe(extractor),
            "seed": seed,
        },
        "versions": versions(),
        "control": _control(s, seed, reasons),
        "labels": {str(label): _label(label, r, s, seed, reasons) for label in labels},
        "metrics": cohort_metrics(_stack(r, "features"), _stack(s, "features"), reasons),
        "memorisation": _memorisation(r, s, reasons),
        "files": {
            "foreign_values": {path: values[:8] for path, values in foreign.items() if values},
            "differ_from_record": [c["mask"] for c in s if not _as_recorded(c)],
        },
        "cases": [{key: c[key] for key in ("mask", "name", "seed", "tries", "accepted", "nearest")} for c in s],
        "notes": list(NOTES),
    }
    result = {**finite(result, reasons), "reasons": reasons}
    _write_csv(s, Path(synthetic_dir) / "control.csv")
    _draw(s, result["control"]["asked"], Path(synthetic_dir) / "control.png")
    write_report(result, _markdown(result), synthetic_dir)
    return result


def _stack(cases: Sequence[Mapping[str, Any]], key: str) -> torch.Tensor:
    return torch.stack([case[key] for case in cases])


def _as_recorded(case: Mapping[str, Any]) -> bool:
    """Whether the lesions in the file are those that synthesis recorded, if it did."""
    a, b = (sorted(astuple(n) for n in z) for z in (case["recorded"] or (), case["lesions"]))
    return case["recorded"] is None or (len(a) == len(b) and np.allclose(a, b, atol=1e-4))


def _control(cases: Sequence[Mapping[str, Any]], seed: int, reasons: dict[str, str]) -> dict[str, Any]:
    """Control with the conditions as asked, and with those of other masks."""
    asked, achieved = ([c[key] for c in cases] for key in ("asked", "lesions"))
    result: dict[str, Any] = {"asked": control(asked, achieved)}
    if len(cases) > 1:
        order = np.random.default_rng(seed).permutation(len(cases))  # read as one cycle: nothing stays in its place
        other = dict(zip(order, np.roll(order, 1), strict=True))
        result["shuffled"] = control([asked[other[i]] for i in range(len(cases))], achieved)
    else:
        result["shuffled"] = dict.fromkeys(result["asked"], math.nan)
        reasons |= dict.fromkeys((f"control/shuffled/{k}" for k in result["asked"]), "needs at least 2 masks, got 1")
    for key, name in (("accepted", "accepted_share"), ("tries", "tries_mean")):
        told = [float(c[key]) for c in cases if c[key] is not None]
        result[name] = float(np.mean(told or math.nan))
        if not told:
            reasons[f"control/{name}"] = "no side-car records it"
    return result


def _label(
    label: int, real: Sequence[Mapping], synthetic: Sequence[Mapping], seed: int, reasons: dict[str, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Distribution and shape of one label's lesions: each cohort against the real masks."""

    def of(cases: Sequence[Mapping], key: str) -> list[list[Lesion]]:
        return [[lesion for lesion in c[key] if lesion.label == label] for c in cases]

    r, s, asked = of(real, "lesions"), of(synthetic, "lesions"), of(synthetic, "asked")
    shapes, new = ([c["shapes"][label] for c in cases] for cases in (real, synthetic))
    result = {
        "distribution": {
            "synthetic": compare_statistics(r, s),
            "asked": compare_statistics(r, asked),
            "real_halves": halves(r, compare_statistics, seed),
        },
        "shape": {"synthetic": compare_shapes(shapes, new), "real_halves": halves(shapes, compare_shapes, seed)},
    }
    lesions = {"synthetic": sum(map(len, s)), "asked": sum(map(len, asked)), "real": sum(map(len, r))}
    for part, columns in result.items():
        for cohort, numbers in columns.items():
            few = [f"{n} {c}" for c, n in lesions.items() if c in (cohort, "real") and n < 3]
            why = f"needs at least 3 lesions, got {' and '.join(few)}" if few else "too few lesions, or all alike"
            for key, value in numbers.items():
                if math.isnan(value):
                    reasons[f"labels/{label}/{part}/{cohort}/{key}"] = why
    return result


def _memorisation(real: Sequence[dict], synthetic: Sequence[dict], reasons: dict[str, str]) -> dict[str, Any]:
    """Nearest real mask of each synthetic one, noted in the case, and of each real one as the baseline."""
    r, s = _stack(real, "pixels"), _stack(synthetic, "pixels")
    near = nearest_mask(s, r)
    for case, dice, index in zip(synthetic, near.dice.tolist(), near.mask.tolist(), strict=True):
        case["nearest"] = {"dice": dice, "iou": dice / (2 - dice), "mask": str(real[index]["mask"])}
    result: dict[str, Any] = {"synthetic_to_real": _similarity(near.dice)}
    if len(r) > 1:
        result["real_to_other_real"] = _similarity(nearest_mask(r).dice)
    else:
        result["real_to_other_real"] = dict.fromkeys(result["synthetic_to_real"], math.nan)
        paths = (f"memorisation/real_to_other_real/{key}" for key in result["synthetic_to_real"])
        reasons |= dict.fromkeys(paths, "needs at least 2 masks, got 1 real")
    return {**result, "suspected_copies": [c["mask"] for c in synthetic if c["nearest"]["dice"] > COPY]}


def _similarity(dice: torch.Tensor) -> dict[str, float]:
    """Dice and IoU of nearest masks, summarised."""
    both = {"dice": dice.numpy(), "iou": (dice / (2 - dice)).numpy()}
    numbers = {f"{key}_{f.__name__}": float(f(x)) for key, x in both.items() for f in (np.median, np.max)}
    return {**numbers, "share_of_suspects": float((dice > COPY).float().mean())}


def _write_csv(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A row for each asked lesion; a missing one has empty cells."""
    columns = ["mask", "label", *(f"{k}_{n}" for k in ("asked", "achieved") for n in STATISTICS)]
    columns += ["relative_size_error", "centre_distance", "matched", "tries", "accepted", "seed"]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for case in cases:
            for asked, achieved in zip(case["asked"], match(case["asked"], case["lesions"])):
                answer = ([*astuple(achieved)[:3], *errors(asked, achieved)]) if achieved else [""] * 5
                numbers = [f"{n:.6g}" if n != "" else "" for n in (*astuple(asked)[:3], *answer)]
                told = ["" if case[k] is None else int(case[k]) for k in ("tries", "accepted", "seed")]
                writer.writerow([Path(case["mask"]).name, asked.label, *numbers, int(achieved is not None), *told])


def _draw(cases: Sequence[Mapping[str, Any]], numbers: Mapping[str, float | None], path: Path) -> None:
    """Achieved over asked size, x and y, a colour for each label, with the line where they agree."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only needed here
    from matplotlib.figure import Figure

    pairs = [(a, b) for c in cases for a, b in zip(c["asked"], match(c["asked"], c["lesions"])) if b is not None]
    labels = sorted({a.label for a, _ in pairs})
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, key in zip(np.ravel(figure.subplots(1, 3)), STATISTICS, strict=True):
        top = max([1.0] if key != "size" else [0.01, *(1.05 * getattr(n, key) for pair in pairs for n in pair)])
        axes.plot([0, top], [0, top], color="0.6", linewidth=1)
        for label in labels:
            x, y = np.array([(getattr(a, key), getattr(b, key)) for a, b in pairs if a.label == label]).T
            axes.scatter(x, y, s=10, alpha=0.5, label=f"label {label}")
        axes.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel=f"{key} asked", ylabel=f"{key} achieved")
        axes.set_title(f"{key}: R² {show(numbers[f'r2_{key}'])}")
    if len(labels) > 1:
        figure.axes[0].legend()
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _markdown(result: Mapping[str, Any]) -> str:
    """The report people read: a table each of control, distribution and shape per label, cohort metrics and copies."""

    def columns(title: str, numbers: Mapping[str, Mapping[str, Any]]) -> list[str]:
        keys = next(iter(numbers.values()))
        rows = [[key, *(show(column[key]) for column in numbers.values())] for key in keys]
        return table([title, *(name.replace("_", " ") for name in numbers)], rows)

    counts, settings, control_ = result["counts"], result["settings"], result["control"]
    lines = [
        f"# {result['name']}\n",
        f"{counts['synthetic']} synthetic against {counts['real']} real masks, image size {settings['image_size']}, "
        f"lesions from {settings['min_size']} pixels; features by {settings['extractor']}.\n",
        f"Accepted {show(control_['accepted_share'])}, mean tries {show(control_['tries_mean'])}.\n",
        *columns("control, conditions", {key: control_[key] for key in ("asked", "shuffled")}),
    ]
    for label, parts in result["labels"].items():
        for part, numbers in parts.items():
            lines += columns(f"{part} of label {label} against real", numbers)
    nearest = {key: value for key, value in result["memorisation"].items() if key != "suspected_copies"}
    lines += table(["metric", "value"], [[key, show(value)] for key, value in result["metrics"].items()])
    lines += columns("nearest real mask", nearest)
    listed = {
        "Suspected copies": result["memorisation"]["suspected_copies"],
        "Files with values that no mask may hold": result["files"]["foreign_values"],
        "Files whose lesions are not those recorded": result["files"]["differ_from_record"],
    }
    lines += [f"{title}: {len(paths)}{': ' * bool(paths)}{', '.join(paths)}.\n" for title, paths in listed.items()]
    return "\n".join([*lines, *(f"- {note}" for note in result["notes"])]) + "\n"
