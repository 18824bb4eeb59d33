"""Show a bundle's main job: shipped weights -> a small synthetic cohort -> files, and pictures of them.

    python tools/demo.py [lung_ddpm ...] [--output demo] [--samples 3]

Runs the bundle's documented command with the knobs of its docs/example/demo.json, so what it shows is what a user gets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.io import list_synthetic  # noqa: E402
from common.mask_metrics import errors, match  # noqa: E402
from common.pictures import (  # noqa: E402
    ABDOMEN_WINDOW,
    LUNG_WINDOW,
    asked_for,
    captioned,
    centre_of,
    label_plane,
    montage,
    photo,
    picture_of,
    plane,
    planes,
    save_gif,
    save_png,
)
from common.reports import parse_report, write_report  # noqa: E402
from common.semantics import Lesion  # noqa: E402


def demo_bundles() -> list[str]:
    """Bundles that ship an example to start from."""
    return sorted(p.parents[2].name for p in REPO.glob("bundles/*/docs/example/demo.json"))


def load(path: str | Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """A NIfTI as RAS array and voxel size."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj), tuple(float(z) for z in image.header.get_zooms()[:3])


def synthesise(name: str, output: Path, samples: int | None, presets: Sequence[str], weights: Path | None) -> None:
    """Run the bundle with the knobs of its example."""
    bundle = REPO / "bundles" / name
    example = bundle / "docs" / "example"
    knobs = {**json.loads((example / "demo.json").read_text()), "output_dir": output}
    if "dataset_dir" in knobs:
        knobs["dataset_dir"] = example / knobs["dataset_dir"]
    knobs |= {} if samples is None else {"num_samples": samples}
    knobs |= {} if weights is None else {"weights": weights.resolve()}
    files = [str(bundle / "configs" / f"{config}.json") for config in ("inference", *presets)]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files[0] if not presets else str(files)]
    command += [part for key, value in knobs.items() for part in (f"--{key}", str(value))]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=REPO)


def written(output: Path) -> list[dict[str, Any]]:
    """What the run left: for each case the paths of its files, and under "made_by" what its side-car says."""
    cases = []
    for path in sorted(output.glob("*.json")):
        made_by = json.loads(path.read_text(encoding="utf-8")).get("made_by")
        if made_by is not None:
            cases.append({"made_by": made_by, "files": [output / name for name in made_by["outputs"]]})
    files = list_synthetic(output)
    return [{**case, **paths} for case, paths in zip(cases, files, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, by what a case consists of


def picture_volumes(cases: Sequence[dict[str, Any]], output: Path) -> list[Path]:
    """Montage: a row for each sample, three planes through its nodule beside its layout. GIF: through the chest."""
    original, spacing = load(cases[0]["reference"])
    volumes = [(load(case["image"])[0], load(case["layout"])[0]) for case in cases]

    rows, captions = [], []
    for volume, layout in volumes:
        at = centre_of(layout)
        real = plane(original, 2, at[2], spacing=spacing)
        drawn = plane(volume, 2, at[2], spacing=spacing, layout=layout)
        rows.append([real, drawn, *planes(volume, at, spacing=spacing)])
        captions.append("real | layout | synthetic: axial, coronal, sagittal")
    save_png(montage(rows, captions), output / "montage.png")

    every = [original, *(volume for volume, _ in volumes)]
    titles = ["real", *(f"synthetic {k}" for k in range(len(volumes)))]
    frames = []
    for z in range(original.shape[2]):
        frame = [montage([[plane(v, 2, z, spacing=spacing)]], [t]) for v, t in zip(every, titles, strict=True)]
        frames.append(montage([frame]))
    save_gif(frames, output / "scroll.gif")
    return [output / "montage.png", output / "scroll.gif"]


def picture_masks(cases: Sequence[dict[str, Any]], output: Path, columns: int = 6) -> list[Path]:
    """Montage: each mask, and over it the area and the place that were asked for, below it the numbers."""
    cells = []
    for case in cases:
        asked, achieved = case["made_by"]["case"]["lesions"], case["made_by"]["record"]["achieved"]
        values = np.asarray(Image.open(case["mask"]))
        labels = sorted({lesion["label"] for lesion in asked})
        binary = values[None] > 0
        mask = binary if len(labels) == 1 else np.stack([values == label for label in labels])
        cells.append(asked_for(mask, asked, numbers(asked, achieved)))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    save_png(montage(rows), output / "montage.png")
    return [output / "montage.png"]


def numbers(asked: Sequence[dict[str, Any]], achieved: Sequence[dict[str, Any]]) -> list[str]:
    """Three lines: the sizes asked for, the sizes drawn, and how far the centres lie apart, in % of the image."""
    wanted, found = ([Lesion(**lesion) for lesion in lesions] for lesions in (asked, achieved))
    pairs = list(zip(wanted, match(wanted, found), strict=True))
    texts = {
        "asked": [f"{100 * a.size:.1f}" for a, _ in pairs],
        "drawn": ["none" if b is None else f"{100 * b.size:.1f}" for _, b in pairs],
        "away": ["" if b is None else f"{100 * errors(a, b)[1]:.1f}" for a, b in pairs],
    }
    return [f"{title} {', '.join(values)} %" for title, values in texts.items()]


def picture_pairs(cases: Sequence[dict[str, Any]], output: Path, columns: int = 6, height: int = 160) -> list[Path]:
    """Montage: each synthetic image below the mask it was made from."""
    cells = []
    for case in cases:
        mask = np.asarray(Image.open(case["mask"]))[None] > 0
        image = np.asarray(Image.open(case["image"]).convert("RGB")).transpose(2, 0, 1) / 127.5 - 1
        cells.append(montage([[picture_of(mask, height)], [photo(image, height)]]))
    save_png(montage([cells[i : i + columns] for i in range(0, len(cells), columns)]), output / "montage.png")
    return [output / "montage.png"]


def picture_reports(cases: Sequence[dict[str, Any]], output: Path) -> list[Path]:
    """Montage: for each case what the report asks for, the labels, and the CT, in three planes. GIF: through all."""
    cells, volumes = [], []
    for case in cases:
        (volume, spacing), layout = load(case["image"]), load(case["layout"])[0]
        at, window = centre_of(np.where(layout == layout.max(), 0, layout)), (volume.min(), volume.max())
        labels = [label_plane(layout, axis, at[axis], spacing=spacing) for axis in (2, 1, 0)]
        row = montage([[*labels, *planes(volume, at, window=window, spacing=spacing)]])
        said = case["made_by"]["case"].get("report") or "(a label volume of one's own)"
        # The built-in font has no Chinese: what was understood stands for it.
        said = said if said.isascii() else f"(Chinese:) {write_report(parse_report(said))}"
        cells.append([captioned(row, said)])
        volumes.append((volume, window, spacing))
    save_png(montage(cells), output / "montage.png")
    frames = [
        montage([[plane(v, 2, round(f * (v.shape[2] - 1)), window=w, spacing=s) for v, w, s in volumes]])
        for f in np.linspace(0, 1, 48)
    ]
    save_gif(frames, output / "scroll.gif")
    return [output / "montage.png", output / "scroll.gif"]


def picture_lesions(cases: Sequence[dict[str, Any]], output: Path) -> list[Path]:
    """Montage: for each lesion what was asked, the CT before, the CT after, and its mask; axial and coronal."""
    cells = []
    for case in cases:
        (before, spacing), (after, _), (label, _) = (load(case[k]) for k in ("reference", "image", "label"))
        report = case["made_by"]["record"]["reports"][0]
        window = LUNG_WINDOW if "lung" in report["organ"] else ABDOMEN_WINDOW
        at, rows = centre_of(label), []
        for axis in (2, 1):
            shown = [plane(v, axis, at[axis], window=window, spacing=spacing) for v in (before, after)]
            lesion = (label == 2).astype(np.uint8)
            tinted = plane(after, axis, at[axis], window=window, spacing=spacing, layout=lesion)
            rows.append([*shown, tinted])
        said = ", ".join(report["attributes"][k] for k in ("density", "shape", "surface characteristics", "CT value"))
        size = " x ".join(f"{n:.0f}" for n in report["size_mm"])
        cells.append(captioned(montage(rows, ["before, after, mask"]), f"{report['lesion']}, {size} mm: {said}"))
    columns = 3
    save_png(montage([cells[i : i + columns] for i in range(0, len(cells), columns)]), output / "montage.png")
    return [output / "montage.png"]


# What of a case decides which picture shows it best; the first that it has.
PICTURES: dict[frozenset[str], Callable[[Sequence[dict[str, Any]], Path], list[Path]]] = {
    frozenset({"image", "label", "reference"}): picture_lesions,
    frozenset({"image", "layout", "reference"}): picture_volumes,
    frozenset({"image", "layout"}): picture_reports,
    frozenset({"image", "mask"}): picture_pairs,
    frozenset({"mask"}): picture_masks,
}


def picture(cases: Sequence[dict[str, Any]], output: Path) -> list[Path]:
    """Write the pictures for what a run left; none if nobody knows how to show it."""
    return next((draw(cases, output) for kinds, draw in PICTURES.items() if cases and kinds <= cases[0].keys()), [])


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="NAME", help=f"default: {', '.join(demo_bundles())}")
    parser.add_argument("--output", type=Path, default=REPO / "demo", help="where results go (default: demo/)")
    parser.add_argument("--samples", type=int, help="synthetic cases, of each example if there are such")
    parser.add_argument("--preset", action="append", default=[], help="overlay to apply, e.g. legacy; repeatable")
    parser.add_argument("--weights", type=Path, help="other weights than the shipped ones; needs one bundle's name")
    arguments = parser.parse_args()
    names = arguments.bundles or demo_bundles()
    unknown = sorted(set(names) - set(demo_bundles()))
    if unknown:
        parser.error(f"no example for {', '.join(unknown)}; there are: {', '.join(demo_bundles())}")
    if arguments.samples is not None and arguments.samples < 1:
        parser.error(f"--samples {arguments.samples}: expected 1 or more")
    if (arguments.weights or arguments.preset) and len(names) != 1:
        parser.error("--weights and --preset belong to one bundle: name it")
    for name in names:
        start = time.perf_counter()
        output = (arguments.output / name).resolve()
        synthesise(name, output, arguments.samples, arguments.preset, arguments.weights)
        cases = written(output)
        files = [file for case in cases for file in case["files"]] + picture(cases, output)
        print(f"\n{name}: {len(cases)} synthetic cases in {time.perf_counter() - start:.0f} s")
        print("\n".join(f"  {file}" for file in files), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
