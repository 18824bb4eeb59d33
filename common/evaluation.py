"""Evaluation: a synthetic cohort against a real one, as one JSON for programs and one Markdown table for people.

One volume is in memory at a time; the numbers themselves are `metrics`.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import LoadImage, Orientation

from .io import atomic_path, list_synthetic, write_json
from .metrics import (
    STATISTICS,
    Extractor,
    RandomConvFeatures,
    density_coverage,
    fid,
    kid,
    label_hu_statistics,
    mmd,
    ms_ssim,
    mse,
    nearest_training_distance,
)

logger = logging.getLogger(__name__)

NOTES = (
    "FID, KID, MMD, density, coverage and feature distances depend on the extractor and the image size: compare rows "
    "made with the same ones only, and not with published values made with another network.",
    "Methods that copy the background from the reference are flattered by whole-volume MSE and MS-SSIM, and by FID and "
    "MMD: read the rows inside each label. An MS-SSIM window centred inside a label still sees a rim around it.",
    "HU statistics are taken after clipping to the window, which synthetic images cannot leave.",
    "Nearest ratio: distance of a synthetic case to its nearest real case, over the median distance of a real case to "
    "its nearest other. Near 0 means a copy, if the real cases are those the model was trained on.",
)


Loader = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Case with file paths -> the same case with tensors (C, *S) under "image" and "layout"."""


def read_volume(case: Mapping[str, Any], key: str) -> MetaTensor:
    """The case's file, or tensor, as an image (C, *S) in RAS orientation, with its affine; errors name the file."""
    orient = Orientation(axcodes="RAS", labels=None)
    if isinstance(case.get(key), torch.Tensor):
        return MetaTensor(orient(case[key]))
    if key not in case:
        raise ValueError(f"case {dict(case)} has no '{key}': every case needs file paths under 'image' and 'layout'")
    if not Path(case[key]).is_file():
        raise ValueError(f"{key} file not found: {case[key]}")
    volume = orient(LoadImage(image_only=True, ensure_channel_first=True)(case[key]))
    if not volume.isfinite().all():
        raise ValueError(f"{key} file holds NaN or infinite values: {case[key]}")
    return MetaTensor(volume)


def _load(case: Mapping[str, Any], key: str) -> torch.Tensor:
    """As `read_volume`, plain and as a batch of one (1, C, *S)."""
    return torch.as_tensor(read_volume(case, key).numpy(), dtype=torch.float32)[None]


def extract(extractor: Extractor, image: torch.Tensor) -> torch.Tensor:
    """Features (F,) of one image (1, C, *S)."""
    features = extractor(image)
    if features.ndim != 2 or len(features) != 1:
        raise ValueError(f"the extractor must map (N, C, *S) to (N, F), got {tuple(features.shape)} for one image")
    return features[0].detach().cpu()


def describe(extractor: Extractor) -> str:
    """The extractor's name for the report."""
    return getattr(extractor, "description", getattr(extractor, "__qualname__", repr(extractor)))


def _measure(
    case: Mapping[str, Any],
    image_size: Sequence[int] | None,
    window: tuple[float, float],
    labels: Mapping[str, int],
    extractor: Extractor,
) -> dict[str, Any]:
    """All that one case tells by itself: features, a thumbnail of voxels, statistics, errors against its reference."""

    def scaled(hu: torch.Tensor) -> torch.Tensor:
        return 2 * (hu.clamp(*window) - window[0]) / (window[1] - window[0]) - 1

    hu, layout = _load(case, "image"), _load(case, "layout")
    if hu.shape[2:] != layout.shape[2:]:
        shapes = f"{tuple(hu.shape[2:])} and {tuple(layout.shape[2:])}"
        raise ValueError(f"image and layout differ in shape, {shapes}: {case['image']}, {case['layout']}")
    size = tuple(image_size or hu.shape[2:])
    image = F.interpolate(scaled(hu), size, mode="area")  # as MONAI's Resize
    measured = {
        "features": extract(extractor, image),
        "voxels": F.interpolate(image, (32,) * len(size), mode="area")[0],
        "labels": label_hu_statistics(hu[0].clamp(*window), layout[0], labels),
    }
    if "reference" in case:
        # Compare on the synthetic image's grid, whatever the reference's.
        reference = F.interpolate(scaled(_load(case, "reference")), size, mode="area")
        regions = F.interpolate(layout, size, mode="nearest")
        masks = torch.cat([torch.ones_like(regions), *(regions == value for value in labels.values())], dim=1)
        error = mse(image, reference, masks)
        similarity = ms_ssim(image, reference, masks) if min(size) >= 11 else error * math.nan
        rows = (dict(zip(("mse", "ms_ssim"), row, strict=True)) for row in torch.cat([error, similarity]).T.tolist())
        measured["reference"] = dict(zip(("whole volume", *labels), rows, strict=True))
    return measured


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over the cases that have a value."""
    known = [value for value in values if math.isfinite(value)]
    return {"mean": float(np.mean(known or math.nan)), "std": float(np.std(known or math.nan)), "cases": len(known)}


def _summaries(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Tables row -> column -> value, one per case, to one table of summaries."""
    first = tables[0] if tables else {}
    return {r: {c: summary([table[r][c] for table in tables]) for c in row} for r, row in first.items()}


def finite(tree: Any, reasons: dict[str, str], path: str = "") -> Any:
    """The tree with NaN and infinity replaced by None, and a reason noted for each that has none yet."""
    if isinstance(tree, Mapping):
        return {key: finite(value, reasons, f"{path}/{key}".lstrip("/")) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value, reasons, f"{path}/*") for value in tree]  # one reason for all cases alike
    if isinstance(tree, float) and not math.isfinite(tree):
        reasons.setdefault(
            path, "not defined here: label absent, image or region too small, or too few or duplicate cases"
        )
        return None
    return tree


def cohort_metrics(
    real: torch.Tensor, synthetic: torch.Tensor, reasons: dict[str, str], only: Collection[str] = ()
) -> dict[str, Any]:
    """Distances between features (N, F), (M, F); those that too few cases forbid are None, the error their reason.

    Args:
        real: features.
        synthetic: likewise.
        reasons: takes the reasons.
        only: first names of those wanted, e.g. ``("fid", "kid_mean")``, all by default: some are quadratic in N.
    """
    metrics: dict[str, Any] = {}
    for keys, compute in (
        (["fid"], lambda: [fid(real, synthetic)]),
        (["kid_mean", "kid_std"], lambda: kid(real, synthetic)),
        (["mmd"], lambda: [mmd(real, synthetic)]),
        (["density", "coverage"], lambda: density_coverage(real, synthetic)),
    ):
        if only and keys[0] not in only:
            continue
        try:
            metrics |= zip(keys, compute(), strict=True)
        except ValueError as error:
            metrics |= dict.fromkeys(keys)
            reasons |= dict.fromkeys((f"metrics/{key}" for key in keys), str(error))
    return metrics


def show(value: Any) -> str:
    """A number, a summary or None, as it stands in a report."""
    if isinstance(value, Mapping):
        return f"{show(value['mean'])} ± {show(value['std'])} (n={value['cases']})"
    return "-" if value is None else f"{value:.4g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]


def write_report(result: Mapping[str, Any], markdown: str, output_dir: str | Path) -> None:
    """Write a result as JSON and as Markdown, named after it."""
    path = Path(output_dir) / result["name"]
    write_json(f"{path}.json", result)
    with atomic_path(f"{path}.md") as temporary:
        temporary.write_text(markdown, encoding="utf-8")
    logger.info(f"evaluation written to {path}.md and .json")


def _markdown(result: Mapping[str, Any]) -> str:
    """The report people read: one table of cohort metrics, one against references, one of HU statistics, the notes."""
    counts, settings = result["counts"], result["settings"]
    lines = [
        f"# {result['name']}\n",
        f"{counts['synthetic']} synthetic against {counts['real']} real cases, {counts['reference']} with a reference; "
        f"features by {settings['extractor']}, image size {settings['image_size'] or 'native'}, "
        f"window {settings['window']}.\n",
        *table(["metric", "value"], [[name, show(value)] for name, value in result["metrics"].items()]),
    ]
    if result["reference"]:
        rows = [[region, show(row["mse"]), show(row["ms_ssim"])] for region, row in result["reference"].items()]
        lines += table(["against the reference", "MSE", "MS-SSIM"], rows)
    if settings["labels"]:
        header = ["HU inside label", "cohort", "voxels", *STATISTICS]
        rows = [
            [label, cohort, *(show(row[statistic]["mean"]) for statistic in ("voxels", *STATISTICS))]
            for label in settings["labels"]
            for cohort, row in ((cohort, result["labels"][cohort][label]) for cohort in ("real", "synthetic"))
        ]
        lines += table(header, rows)
    return "\n".join([*lines, *(f"- {note}" for note in result["notes"])]) + "\n"


def evaluate_pairs(
    real: Sequence[Mapping[str, Any]],
    synthetic: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    image_size: Sequence[int] | None = None,
    window: tuple[float, float] = (-1000, 1000),
    labels: Mapping[str, int],
    extractor: Extractor | None = None,
    load: Loader | None = None,
    name: str = "evaluation",
) -> dict[str, Any]:
    """Compare a synthetic with a real cohort; write `<name>.json` and `<name>.md`, one volume in memory at a time.

    Args:
        real: cases {"image": path, "layout": path}; the training set, if nearest distances are to show memorisation.
        synthetic: likewise, of any number; "reference" may name the image a case was made from.
        output_dir: folder of the report, made if missing.
        image_size: size (*S) for features and errors, by default the native one (errors: the synthetic image's).
        window: intensities (HU) that become [-1, 1].
        labels: name -> value in the layouts, e.g. {"lung": 1, "nodule": 2}.
        extractor: images (N, C, *S) in [-1, 1] -> features (N, F), by default `RandomConvFeatures()`.
        load: loads a real case whose label numbers are not the bundle's; by default files are taken as they are.
        name: stem of the two files.

    Returns:
        what the JSON holds. A metric that cannot be computed is None, and "reasons" says why.
    """
    if not real or not synthetic:
        raise ValueError(f"nothing to compare: {len(real)} real and {len(synthetic)} synthetic cases")
    if not window[0] < window[1]:
        raise ValueError(f"window must be (low, high), got {window}")
    extractor = RandomConvFeatures() if extractor is None else extractor
    cohorts: dict[str, list[dict[str, Any]]] = {"real": [], "synthetic": []}
    for cohort, cases in (("real", real), ("synthetic", synthetic)):
        for i, case in enumerate(cases, 1):
            logger.info("%s case %d of %d: %s", cohort, i, len(cases), case.get("image"))
            loaded = load(case) if load and cohort == "real" else case
            cohorts[cohort].append(
                {**_measure(loaded, image_size, window, labels, extractor), "image": str(case.get("image"))}
            )
    r, s = (torch.stack([case["features"] for case in cohorts[cohort]]) for cohort in ("real", "synthetic"))

    reasons: dict[str, str] = {}
    metrics = cohort_metrics(r, s, reasons)

    # Memorisation, in both spaces.
    for space in ("features", "voxels"):
        x, y = (torch.stack([case.pop(space) for case in cohorts[cohort]]) for cohort in ("synthetic", "real"))
        nearest = nearest_training_distance(x, y)
        for case, distance, index, ratio in zip(cohorts["synthetic"], *(z.tolist() for z in nearest[:3]), strict=True):
            case[f"nearest_{space}"] = {"distance": distance, "ratio": ratio, "image": cohorts["real"][index]["image"]}
        metrics[f"nearest_{space}_min_ratio"] = float(nearest.ratio.min())
        metrics[f"nearest_{space}_median_ratio"] = float(nearest.ratio.median())

    with_reference = [case["reference"] for case in cohorts["synthetic"] if "reference" in case]
    result = {
        "name": name,
        "counts": {**{cohort: len(cases) for cohort, cases in cohorts.items()}, "reference": len(with_reference)},
        "settings": {
            "image_size": None if image_size is None else list(image_size),
            "window": list(window),
            "labels": dict(labels),
            "extractor": describe(extractor),
        },
        "versions": {"python": platform.python_version(), "monai": monai.__version__, "torch": torch.__version__},
        "metrics": metrics,
        "reference": _summaries(with_reference),
        "labels": {cohort: _summaries([case["labels"] for case in cases]) for cohort, cases in cohorts.items()},
        "cases": cohorts,
        "notes": list(NOTES),
    }
    result = {**finite(result, reasons), "reasons": reasons}
    write_report(result, _markdown(result), output_dir)
    return result


def evaluate_folder(real: Sequence[Mapping[str, Any]], synthetic_dir: str | Path, **kwargs: Any) -> dict[str, Any]:
    """Compare a folder of synthetic cases, found by their side-cars, with real ones; the report goes into that folder.

    Args:
        real: as in `evaluate_pairs`.
        synthetic_dir: what an inference run wrote.
        kwargs: further arguments of `evaluate_pairs`.

    Returns:
        as `evaluate_pairs`.
    """
    return evaluate_pairs(real, list_synthetic(synthetic_dir), synthetic_dir, **kwargs)
