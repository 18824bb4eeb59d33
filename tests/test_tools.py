"""The tools as a user runs them: help, exit codes, and what they leave behind."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import run_command
from PIL import Image

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
def test_benchmark_prints_a_table(repo: Path):
    done = run_command(
        sys.executable, "tools/benchmark.py", "lung_ddpm", "--preset", "smoke", "--runs", "1", "--calls", "3"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "| network call |" in done.stdout
    assert "sampler noise" in done.stdout
