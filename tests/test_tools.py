"""The tools as a user runs them: help, exit codes, and what they leave behind."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import run_command
from PIL import Image

from common.mask_statistics import ShrunkKDE, save_statistics
from common.pictures import COLOURS
from common.semantics import Lesion
from tools import verify

TOOLS = ("verify", "package", "import_weights", "demo", "benchmark")


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_explains_itself(tool):
    done = run_command(sys.executable, f"tools/{tool}.py", "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout


@pytest.mark.parametrize("tool", ["demo", "benchmark"])
def test_an_unknown_bundle_is_a_usage_error(tool):
    done = run_command(sys.executable, f"tools/{tool}.py", "lung_dppm")
    assert done.returncode == 2
    assert "lung_dppm" in done.stdout


@pytest.mark.bundle
def test_demo_leaves_volumes_on_the_examples_grid_and_pictures(repo: Path, tmp_path: Path):
    done = run_command(sys.executable, "tools/demo.py", "lung_ddpm", "--samples", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    folder = tmp_path / "lung_ddpm"
    example = repo / "bundles/lung_ddpm/docs/example"
    original, synthetic = nib.load(example / "CT/chest.nii.gz"), nib.load(folder / "chest_image.nii.gz")
    layout = np.asarray(nib.load(folder / "chest_layout.nii.gz").dataobj)
    np.testing.assert_allclose(synthetic.affine, original.affine, atol=1e-4)
    before, after = np.asarray(original.dataobj), np.asarray(synthetic.dataobj)
    assert (before[layout == 0] == after[layout == 0]).all()
    assert (before[layout > 0] != after[layout > 0]).mean() > 0.9
    assert (layout == 2).any(), "the demo adds a nodule"
    # The lungs are air, the nodule is not: the starter weights follow the layout.
    assert after[layout == 1].mean() < -600
    assert after[layout == 2].mean() > after[layout == 1].mean() + 200
    assert Image.open(folder / "montage.png").width > 300
    assert Image.open(folder / "scroll.gif").n_frames == before.shape[2]


@pytest.mark.bundle
def test_demo_draws_masks_and_what_was_asked_over_them(repo: Path, tmp_path: Path):
    done = run_command(sys.executable, "tools/demo.py", "cmdm", "--samples", "7", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    folder = tmp_path / "cmdm"
    assert "cmdm: 7 synthetic cases" in done.stdout
    size = json.loads((repo / "bundles/cmdm/configs/inference.json").read_text())["image_size"]
    assert [np.asarray(Image.open(p)).shape for p in sorted(folder.glob("*_mask.png"))] == [tuple(size)] * 7
    assert verify.check_synthesis(folder) == []
    # The starter weights draw what they are asked for: all but one mask within tolerance, at the least.
    made = [json.loads(p.read_text())["made_by"] for p in folder.glob("mask_*.json")]
    assert sum(m["record"]["accepted"] for m in made) >= 6
    sheet = np.asarray(Image.open(folder / "montage.png"))
    assert sheet.shape[0] < sheet.shape[1], "two rows of six and one"
    assert (sheet == COLOURS[1]).all(axis=-1).any(), "circles of what was asked"
    assert (sheet == 255).all(axis=-1).any()


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--weights", "x.pt"], ["--preset", "smoke"]])
def test_demo_refuses_what_makes_no_sense(arguments: list[str]):
    assert run_command(sys.executable, "tools/demo.py", *arguments).returncode == 2


@pytest.mark.bundle
def test_benchmark_of_masks_prints_tables(repo: Path, tmp_path: Path):
    weights = tmp_path / "model.pt"
    command = ["cmdm", "--preset", "smoke", "--runs", "1", "--batch", "2", "--cases", "3", "--calls", "2", "4"]
    torch.save(verify.build(verify.parser(repo / "bundles/cmdm", "inference", "smoke"), "cpu").state_dict(), weights)
    model = ShrunkKDE().fit([[Lesion(0.1 + 0.01 * i, 0.4, 0.5)] for i in range(6)])
    save_statistics(model, tmp_path / "statistics.json")
    done = run_command(sys.executable, "tools/benchmark.py", *command, "--weights", str(weights))
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [line.strip("| \n").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    titles = [row[0] for row in rows]
    assert "2 cases" in titles
    for title in ("network call", "training step", "one chain in a call", "an unconditional pass at guidance 1"):
        assert title in titles
    curve = [row for row in rows if row[0].startswith(("ancestral", "DPM-Solver"))]
    assert [row[1] for row in curve] == ["500", "2", "4"]
    header = next(row for row in rows if row[0] == "sampler")
    for row in curve:
        assert len(row) == len(header)
        assert re.fullmatch(r"\d+\.\d+ s", row[2])
        assert 0 <= float(row[header.index("within tolerance")]) <= 1


@pytest.mark.bundle
def test_benchmark_prints_a_table(repo: Path):
    done = run_command(
        sys.executable, "tools/benchmark.py", "lung_ddpm", "--preset", "smoke", "--runs", "1", "--calls", "3"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "| network call |" in done.stdout
    assert "sampler noise" in done.stdout
