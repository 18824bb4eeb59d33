"""Show a bundle's main job: shipped weights and example -> a small synthetic cohort -> NIfTI, montage, GIF.

    python tools/demo.py [lung_ddpm ...] [--output demo] [--samples 3]

Runs the bundle's documented command, so what it shows is what a user gets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.io import list_cases, list_synthetic  # noqa: E402
from common.pictures import centre_of, montage, plane, planes, save_gif, save_png  # noqa: E402


def demo_bundles() -> list[str]:
    """Bundles that ship an example to start from."""
    return sorted(p.parents[1].name for p in REPO.glob("bundles/*/docs/example"))


def load(path: str | Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """A NIfTI as RAS array and voxel size."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj), tuple(float(z) for z in image.header.get_zooms()[:3])


def synthesise(name: str, output: Path, samples: int) -> list[dict]:
    """Run the bundle on its example, every sample with a nodule of its own."""
    config = REPO / "bundles" / name / "configs" / "inference.json"
    knobs = json.loads((REPO / "bundles" / name / "docs" / "example" / "demo.json").read_text())
    knobs |= {
        "dataset_dir": str(config.parents[1] / "docs" / "example"),
        "output_dir": str(output),
        "num_samples": samples,
    }
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config)]
    command += [part for key, value in knobs.items() for part in (f"--{key}", str(value))]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=REPO)
    return [case for case in list_synthetic(output) if Path(case["image"]).is_file()]


def picture(name: str, output: Path, cases: list[dict]) -> list[Path]:
    """Montage: a row for each sample, three planes through its nodule beside its layout. GIF: through the chest."""
    reference = list_cases(REPO / "bundles" / name / "docs" / "example")[0]["image"]
    original, spacing = load(reference)
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


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="NAME", help=f"default: {', '.join(demo_bundles())}")
    parser.add_argument("--output", type=Path, default=REPO / "demo", help="where results go (default: demo/)")
    parser.add_argument("--samples", type=int, default=3, help="synthetic cases for each example (default: 3)")
    arguments = parser.parse_args()
    names = arguments.bundles or demo_bundles()
    unknown = sorted(set(names) - set(demo_bundles()))
    if unknown:
        parser.error(f"no example for {', '.join(unknown)}; there are: {', '.join(demo_bundles())}")
    for name in names:
        start = time.perf_counter()
        output = (arguments.output / name).resolve()
        cases = synthesise(name, output, arguments.samples)
        files = [Path(case[key]) for case in cases for key in ("image", "layout")] + picture(name, output, cases)
        print(f"\n{name}: {len(cases)} synthetic cases in {time.perf_counter() - start:.0f} s")
        print("\n".join(f"  {file}" for file in files), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
