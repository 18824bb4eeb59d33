"""The smoke run: train, synthesise and evaluate for seconds as a user does, and read back what was written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import LoadImage

from common.io import sha256, stem
from common.semantics import Lesion, measure


def run(bundle: Path, cwd: Path, names: Sequence[str], **knobs: str) -> str:
    """Run the documented command in its own process -> the end of its output if it failed, else nothing."""
    files = [os.path.join(os.path.relpath(bundle / "configs", cwd), f"{name}.json") for name in names]
    flags = [part for key, value in knobs.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files), *flags]
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return f"{'+'.join(names)} in {cwd}: {' '.join(done.stdout.split())[-400:]}" if done.returncode else ""


def check_synthesis(output: Path) -> list[str]:
    """Every file that a side-car in `output` names reads back as what the side-car says it is."""
    cards = [content for p in sorted(output.glob("*.json")) if "made_by" in (content := json.loads(p.read_text()))]
    problems = []
    for card in cards:
        made_by, config = card["made_by"], json.loads(Path(card["config_file"]).read_text())
        problems += [] if made_by["outputs"] else [f"{made_by['case']['name']} has no file"]
        for file, digest in ((output / name, digest) for name, digest in made_by["outputs"].items()):
            if not file.is_file():
                problems.append(f"no {file.name}")
                continue
            masks = "achieved" in made_by.get("record", {})
            found = check_mask(file, made_by, config) if masks else check_image(file, made_by)
            changed = [f"{file.name} is another file than its side-car says"] if sha256(file) != digest else []
            problems += found or changed
    return problems or ([] if cards else [f"no side-car in {output}"])


def check_image(file: Path, made_by: dict[str, Any]) -> list[str]:
    """An image is finite, not all the same, and on the grid of its layout, given or drawn, if the case has one."""
    load = LoadImage(image_only=True)
    image, problems = load(file), []
    drawn = [file.parent / name for name in made_by["outputs"] if stem(name).endswith(("_layout", "_label"))]
    layout = made_by["case"].get("layout") or next(filter(Path.is_file, drawn), None)
    grid = load(layout) if layout else image
    if image.shape != grid.shape or not torch.allclose(image.affine, grid.affine, atol=1e-4):
        problems.append(f"{file.name} is {tuple(image.shape)} and not on the grid of its layout {tuple(grid.shape)}")
    if not image.isfinite().all() or math.isclose(float(image.min()), float(image.max())):
        problems.append(f"{file.name} is not finite or is constant")
    return problems


def check_mask(file: Path, made_by: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """A mask has its size and no foreign value, and holds the lesions that its side-car says it does."""
    mask = LoadImage(image_only=True, dtype=None)(file).numpy().squeeze().T  # columns come first
    if mask.shape != tuple(config["image_size"]) or mask.dtype != np.uint8:
        return [f"{file.name} is {mask.dtype} {mask.shape}, expected uint8 {tuple(config['image_size'])}"]
    labels = config["labels"] or [1]
    values = config["labels"] or [255]
    foreign = sorted(set(np.unique(mask).tolist()) - {0, *values})
    if foreign:
        return [f"{file.name} holds {foreign[:5]}, expected 0 and {values}"]
    found = measure(np.stack([mask == value for value in values]), labels, config["min_size"])
    told = [Lesion(**lesion) for lesion in made_by["record"]["achieved"]]
    return [] if found == told else [f"{file.name} holds {found}, its side-car says {told}"]


def check_smoke(bundle: Path) -> list[str]:
    """Train, synthesise and evaluate in seconds, from the folder above ``bundles/`` and from the bundle's own."""
    problems = []
    for cwd in (bundle.parents[1] if bundle.parent.name == "bundles" else bundle.parent, bundle):
        with tempfile.TemporaryDirectory() as folder:
            places = {"output_dir": folder, "weights": f"{folder}/model.pt"}
            failed = run(bundle, cwd, ["train", "smoke"], output_dir=folder)
            failed = failed or run(bundle, cwd, ["inference", "smoke"], **places)
            problems += [failed] if failed else check_synthesis(Path(folder))
            failed = failed or run(bundle, cwd, ["inference", "evaluate", "smoke"], **places)
            missing = [name for name in ("evaluation.json", "evaluation.md") if not Path(folder, name).is_file()]
            problems += [failed] if failed else [f"evaluate in {cwd} wrote no {name}" for name in missing]
    return list(dict.fromkeys(problems))
