"""Input as users bring it, through whole bundle runs: what is bad is named, what is odd but good is synthesised.

Every run is a process of some seconds, so one run takes many cases.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import run_command
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from common.unet import DiffusionUNet

pytestmark = pytest.mark.bundle
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """Untrained weights of the smoke size."""
    knobs = json.loads((repo / "bundles/lung_ddpm/configs/smoke.json").read_text())
    size = {k: knobs[k] for k in ("channels", "attention_levels", "norm_num_groups")}
    network = DiffusionUNet(3, 3, 1, num_res_blocks=1, num_head_channels=knobs["channels"], **size)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def scan(cohort: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, layout and affine of one phantom."""
    image = nib.load(cohort / "CT/thorax_0000.nii.gz")
    return np.asarray(image.dataobj), np.asarray(nib.load(cohort / "SEG/thorax_0000.nii.gz").dataobj), image.affine


@pytest.fixture
def infer(run_bundle: Run, weights: Path) -> Run:
    """Smoke inference with the given knobs."""
    return lambda **knobs: run_bundle("lung_ddpm", "inference", "smoke", **{"weights": weights, **knobs})


def ending(run: subprocess.CompletedProcess) -> str:
    """What a failed run says last, below the traceback."""
    assert run.returncode != 0, run.stdout
    return run.stdout.rstrip().rpartition("\n\n")[2]


def write(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# One run over everything


def changed(values: np.ndarray, value: float) -> np.ndarray:
    values = values.astype(np.float32)
    values[5, 6, 7] = value
    return values


def turned(values: np.ndarray, affine: np.ndarray, axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same scan, stored along other axes."""
    image = nib.Nifti1Image(values, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axcodes)))
    return np.asarray(image.dataobj), image.affine


# Odd but good: they must be synthesised.
GOOD = ("good", "plain", "1.2.840 left lung.v2", "lps", "permuted", "anisotropic", "float_labels", "masked", "no_image")

# Bad: what the report must say about each.
BAD = {
    "nan": ("CT/nan.nii.gz holds 1 voxels that are NaN", "replace them"),
    "inf": ("CT/inf.nii.gz holds 1 voxels that are NaN, infinite", "replace them"),
    "empty": ("cannot read", "CT/empty.nii.gz", "Empty file", "replace it"),
    "truncated": ("cannot read", "CT/truncated.nii.gz", "ended before", "replace it"),
    "truncated_layout": ("cannot read", "SEG/truncated_layout.nii.gz", "ended before", "replace it"),
    "web_page": ("cannot read", "CT/web_page.nii.gz", "not a gzip file", "replace it"),
    "four_d": ("CT/four_d.nii.gz has shape (2, 24, 24, 24), expected one 3-D volume", "split or select"),
    "two_d": ("CT/two_d.nii.gz has shape (24, 24), expected one 3-D volume", "split or select"),
    "other_grid": ("SEG/other_grid.nii.gz", "CT/other_grid.nii.gz", "(24, 24, 24) and (22, 24, 24)", "resample"),
    "other_place": ("SEG/other_place.nii.gz", "different affines", "resample"),
    "no_label": ("SEG/no_label.nii.gz holds none of the labels", "set --labels"),
    "unknown_label": ("SEG/unknown_label.nii.gz holds labels [7]", "--labels", "--other_labels background"),
    "fractional": ("SEG/fractional.nii.gz holds fractional values", "resample it with nearest"),
    "no_layout": ("case no_layout", "lacks layout", "add the file or remove the case"),
    "twice": ("two files for case twice", "CT/twice.nii", "CT/twice.nii.gz", "keep one"),
}


def write_cases(root: Path, image: np.ndarray, layout: np.ndarray, affine: np.ndarray) -> None:
    """All of `GOOD` and `BAD`, as ``CT/``, ``SEG/`` and ``SEG_NODULE/``."""
    moved = affine + np.array([[0, 0, 0, 20], *[[0] * 4] * 3])
    wide = affine @ np.diag([1, 2, 1, 1])
    odd: dict[str, dict[str, Any]] = {
        "nan": {"image": changed(image, np.nan)},
        "inf": {"image": changed(image, np.inf)},
        "four_d": {"image": np.stack([image, image], axis=-1)},
        "two_d": {"image": image[:, :, 0]},
        "other_grid": {"image": image[:-2]},
        "other_place": {"layout_affine": moved},
        "no_label": {"layout": layout * 0},
        "unknown_label": {"layout": np.where(layout == 1, 7, layout)},
        "fractional": {"layout": layout.astype(np.float32) / 2},
        "float_labels": {"layout": layout.astype(np.float32)},
        "masked": {"layout": (layout > 0).astype(np.uint8)},
        "anisotropic": {"image": image[:, ::2], "layout": layout[:, ::2], "affine": wide, "layout_affine": wide},
    }
    for name, axcodes in (("lps", "LPS"), ("permuted", "SAL")):
        values, world = turned(image, affine, axcodes)
        labels = turned(layout, affine, axcodes)[0]
        odd[name] = {"image": values, "layout": labels, "affine": world, "layout_affine": world}
    for name in [*GOOD, *BAD]:
        case = {"image": image, "layout": layout, "affine": affine, "layout_affine": affine, **odd.get(name, {})}
        kind = ".nii" if name == "plain" else ".nii.gz"
        if name != "no_image":
            write(root / "CT" / f"{name}{kind}", case["image"], case["affine"])
        if name != "no_layout":
            write(root / "SEG" / f"{name}{kind}", np.asarray(case["layout"]), case["layout_affine"])
    write(root / "CT/twice.nii", image, affine)
    write(root / "SEG_NODULE/masked.nii.gz", (layout == 2).astype(np.uint8) * 255, affine)
    for path in (root / "CT/truncated.nii.gz", root / "SEG/truncated_layout.nii.gz"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (root / "CT/empty.nii.gz").write_bytes(b"")
    (root / "CT/web_page.nii.gz").write_text("<html>not found</html>")
    for hidden in ("CT/.DS_Store", "CT/._good.nii.gz", "SEG/.hidden.nii.gz"):
        (root / hidden).write_bytes(b"hidden")


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory,
    scan: tuple[np.ndarray, np.ndarray, np.ndarray],
    run_bundle: Run,
    weights: Path,
) -> tuple[subprocess.CompletedProcess, Path, Path]:
    """The run, its input and its output folder."""
    root = tmp_path_factory.mktemp("everything")
    write_cases(root / "in", *scan)
    knobs = {"weights": weights, "dataset_dir": root / "in", "output_dir": root / "out"}
    return run_bundle("lung_ddpm", "inference", "smoke", **knobs), root / "in", root / "out"


def test_the_run_fails_with_one_report_at_its_end(everything: tuple) -> None:
    lines = ending(everything[0]).splitlines()
    assert lines[0] == f"CaseError: {len(BAD)} of {len(BAD) + len(GOOD)} cases failed, the others are done:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == sorted(BAD)
    assert "Transform input info" not in everything[0].stdout


@pytest.mark.parametrize("name", BAD)
def test_a_bad_case_is_named_with_cause_and_fix(name: str, everything: tuple) -> None:
    run, _, output = everything
    (line,) = [line for line in ending(run).splitlines() if line.startswith(f"  {name}: ")]
    for words in BAD[name]:
        assert words in line
    assert not list(output.glob(f"{name}[._]*"))


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_case_comes_out_on_its_own_grid(name: str, everything: tuple) -> None:
    _, source, output = everything
    kind = ".nii" if name == "plain" else ".nii.gz"
    layout = nib.load(source / "SEG" / f"{name}{kind}")
    synthetic, label = nib.load(output / f"{name}_image.nii.gz"), nib.load(output / f"{name}_layout.nii.gz")
    for image in (synthetic, label):
        assert image.shape == layout.shape
        np.testing.assert_allclose(image.affine, layout.affine, atol=1e-4)
    values, labels = np.asarray(synthetic.dataobj), np.asarray(label.dataobj)
    assert (values.dtype, labels.dtype) == (np.int16, np.uint8)
    assert values.min() >= -1024
    assert (labels == 2).any() == (name == "masked" or (np.asarray(layout.dataobj) == 2).any())
    np.testing.assert_array_equal(labels > 0, np.asarray(layout.dataobj) > 0)
    if name != "no_image":
        original = np.asarray(nib.load(source / "CT" / f"{name}{kind}").dataobj)
        np.testing.assert_array_equal(values[labels == 0], original[labels == 0])  # to the bit
        assert (values[labels > 0] != original[labels > 0]).any()


def test_orientation_does_not_matter(everything: tuple) -> None:
    output = everything[2]
    labels = [nib.as_closest_canonical(nib.load(output / f"{n}_layout.nii.gz")) for n in ("good", "lps", "permuted")]
    for other in labels[1:]:
        np.testing.assert_array_equal(np.asarray(other.dataobj), np.asarray(labels[0].dataobj))
        np.testing.assert_allclose(other.affine, labels[0].affine, atol=1e-4)


def test_nothing_else_is_left_and_inputs_are_untouched(everything: tuple, scan: tuple) -> None:
    _, source, output = everything
    expected = [f"{name}{end}" for name in GOOD for end in (".json", "_image.nii.gz", "_layout.nii.gz")]
    assert [f for f in files(output) if not f.startswith("run-")] == sorted(expected)
    np.testing.assert_array_equal(np.asarray(nib.load(source / "CT/good.nii.gz").dataobj), scan[0])
    np.testing.assert_array_equal(np.asarray(nib.load(source / "SEG/good.nii.gz").dataobj), scan[1])


# ---------------------------------------------------------------------------------------------------------------------
# Other people's labels, a datalist, several samples, an interrupted run


def test_lobes_datalist_samples_and_going_on(infer: Run, scan: tuple, tmp_path: Path) -> None:
    image, layout, affine = scan
    lobes = np.where(layout == 1, 10 + np.arange(24)[:, None, None] % 5, np.where(layout == 2, 200, 0)).astype(np.uint8)
    lobes[0, 0, 0] = 51  # the heart: no class of ours
    write(tmp_path / "a.nii.gz", image, affine)
    write(tmp_path / "b.nii.gz", lobes, affine)
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz", "layout": "b.nii.gz"}]}))
    knobs = {
        "dataset_dir": tmp_path / "list.json",
        "output_dir": tmp_path / "out",
        "labels": "{'lung': [10, 11, 12, 13, 14], 'nodule': [200]}",
        "other_labels": "background",
        "nodules": "move",
        "num_samples": 2,
    }
    run = infer(**knobs)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("written to") == 2
    layouts = [np.asarray(nib.load(tmp_path / f"out/a_s{k}_layout.nii.gz").dataobj) for k in range(2)]
    images = [np.asarray(nib.load(tmp_path / f"out/a_s{k}_image.nii.gz").dataobj) for k in range(2)]
    seeds = [json.loads((tmp_path / f"out/a_s{k}.json").read_text())["made_by"]["seed"] for k in range(2)]
    assert (layouts[0] != layouts[1]).any()
    assert (images[0] != images[1]).any()
    assert seeds[0] != seeds[1]
    for labels in layouts:
        np.testing.assert_array_equal(labels > 0, layout > 0)

    # What is finished is skipped; the missing one comes out as before.
    before = (tmp_path / "out/a_s1_image.nii.gz").read_bytes()
    for path in (tmp_path / "out").glob("a_s1*"):
        path.unlink()
    run = infer(**knobs)
    assert run.returncode == 0, run.stdout
    assert "a_s0: already finished, skipped" in run.stdout
    assert gzip.decompress((tmp_path / "out/a_s1_image.nii.gz").read_bytes()) == gzip.decompress(before)


def test_a_sidecar_makes_the_same_files_again(everything: tuple, tmp_path: Path) -> None:
    sidecar = everything[2] / "lps.json"
    command = ["-m", "monai.bundle", "run", "--args_file", str(sidecar), "--output_dir", str(tmp_path / "again")]
    run = run_command(sys.executable, *command, cwd=tmp_path)
    assert run.returncode == 0, run.stdout
    first, again = (json.loads(path.read_text())["made_by"] for path in (sidecar, tmp_path / "again/lps.json"))
    assert {k: again[k] for k in ("case", "inputs", "weights_sha256")} == {
        k: first[k] for k in ("case", "inputs", "weights_sha256")
    }
    for name in first["outputs"]:
        images = [nib.load(folder / name) for folder in (everything[2], tmp_path / "again")]
        np.testing.assert_array_equal(np.asarray(images[0].dataobj), np.asarray(images[1].dataobj))


# ---------------------------------------------------------------------------------------------------------------------
# Runs that cannot succeed


def test_a_bad_volume_stops_training_with_the_same_words(run_bundle: Run, scan: tuple, tmp_path: Path) -> None:
    image, layout, affine = scan
    for name in ("a", "b"):
        write(tmp_path / "in/CT" / f"{name}.nii.gz", image, affine)
        write(tmp_path / "in/SEG" / f"{name}.nii.gz", layout, affine)
    damaged = tmp_path / "in/CT/a.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    run = run_bundle("lung_ddpm", "train", "smoke", dataset_dir=tmp_path / "in", output_dir=tmp_path / "out")
    assert ending(run).startswith(f"CaseError: cannot read {damaged} (EOFError: ")
    assert ending(run).endswith("the file is damaged or of another kind, replace it")
    assert not list((tmp_path / "out").glob("*.pt"))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(("kind", "words"), [("payload", "refused"), ("shape", "shape")])
def test_a_bad_checkpoint_is_refused(
    kind: str, words: str, infer: Run, weights: Path, cohort: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.pt"
    if kind == "payload":
        torch.save({"model": Payload(tmp_path / "pwned")}, bad)
    else:
        state = torch.load(weights)
        torch.save({**state, "conv_in.conv.weight": torch.zeros(8, 5, 3, 3, 3)}, bad)
    text = ending(infer(dataset_dir=cohort, output_dir=tmp_path / "out", weights=bad))
    assert str(bad) in text
    assert words in text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "pwned").exists()
    assert [f for f in files(tmp_path / "out") if not f.startswith("run-")] == []


def test_a_misspelt_knob_is_refused(infer: Run, cohort: Path, tmp_path: Path) -> None:
    run = infer(dataset_dir=cohort, output_dir=tmp_path / "out", num_inference_step=2, phantom_cases="two")
    assert "unknown knob --num_inference_step: did you mean --num_inference_steps?" in ending(run)
    assert "knob --phantom_cases got 'two', expected something like 2" in ending(run)
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize("place", ["a file", "the input"])
def test_an_impossible_output_is_refused_at_the_door(place: str, infer: Run, cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = cohort / "CT" if place == "the input" else tmp_path / "file" / "sub"
    before = files(cohort / "CT")
    text = ending(infer(dataset_dir=cohort, output_dir=output))
    assert str(output) in text
    assert "choose another --output_dir" in text
    assert files(cohort / "CT") == before


def test_a_full_disk_ends_the_run_and_leaves_no_half_case(
    repo: Path, weights: Path, scan: tuple, tmp_path: Path
) -> None:
    image, layout, affine = scan
    write(tmp_path / "in/CT/a.nii", image, affine)
    write(tmp_path / "in/SEG/a.nii", layout, affine)
    config = str([f"bundles/lung_ddpm/configs/{name}.json" for name in ("inference", "smoke")])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config]
    command += ["--dataset_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), "--weights", str(weights)]
    command += ["--saver::extension", ".nii"]  # 27 kB, where the limit is 20
    run = subprocess.run(
        command,
        cwd=repo,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert "cannot write" in ending(run)
    assert "a_image.nii: File too large; free space or choose another --output_dir" in ending(run)
    assert [f for f in files(tmp_path / "out") if not f.startswith("run-")] == []
