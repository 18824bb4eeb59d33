"""Every bundle as a user runs it: the documented commands, each in its own process, at smoke size, on phantoms.

A session-wide training leaves weights that the tests of synthesis share; each test then looks at the files on disk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import run_command
from monai.transforms import LoadImage

from tools import verify

pytestmark = pytest.mark.bundle

REPO = Path(__file__).resolve().parents[1]
NAMES = sorted(path.parent.name for path in (REPO / "bundles").glob("*/configs"))
TINY = {"channels": [8, 8], "attention_levels": [False, True], "norm_num_groups": 4, "image_size": [16, 16, 16]}
TINY |= {"phantom_cases": 3, "phantom_size": [24, 24, 24], "val_cases": 1}
Runner = Callable[..., object]


class Smoke(NamedTuple):
    """A bundle, trained at smoke size, and cases synthesised with its weights."""

    name: str
    trained: Path
    synthetic: Path

    def overlays(self, pattern: str) -> list[str]:
        return sorted(path.stem for path in (REPO / "bundles" / self.name / "configs").glob(f"{pattern}.json"))


@pytest.fixture(scope="session", params=NAMES)
def smoke(request: pytest.FixtureRequest, run_bundle: Runner, tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """Train and synthesise from the repository's root."""
    folder = tmp_path_factory.mktemp(request.param)
    trained, synthetic = folder / "train", folder / "synthetic"
    done = run_bundle(request.param, "train", "smoke", output_dir=trained)
    assert done.returncode == 0, done.stdout
    done = run_bundle(request.param, "inference", "smoke", output_dir=synthetic, weights=trained / "model.pt")
    assert done.returncode == 0, done.stdout
    return Smoke(request.param, trained, synthetic)


def images(folder: Path) -> dict[str, bytes]:
    """The synthetic files in a folder -> {name: content}."""
    return {name: (folder / name).read_bytes() for card in sidecars(folder) for name in card["made_by"]["outputs"]}


def sidecars(folder: Path) -> list[dict]:
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [content for content in contents if "made_by" in content]


def test_training_leaves_plain_weights_and_traces(smoke: Smoke) -> None:
    state = torch.load(smoke.trained / "model.pt", weights_only=True)
    network = verify.build(verify.parser(REPO / "bundles" / smoke.name, "inference", "smoke"))
    network.load_state_dict(state, strict=True, assign=True)
    assert all(value.isfinite().all() for value in state.values())
    assert {path.name for path in (smoke.trained / "preview").iterdir()} == {"epoch_0001.png", "epoch_0002.png"}
    assert list(smoke.trained.glob("events.out.tfevents.*"))


def test_synthetic_images_read_back(smoke: Smoke) -> None:
    assert verify.check_synthesis(smoke.synthetic) == []
    config = verify.read(REPO / "bundles" / smoke.name / "configs" / "smoke.json")
    assert len(sidecars(smoke.synthetic)) == config["phantom_cases"]
    # Where nothing is synthesised the original stays, with whatever values it has.
    low, high = verify.read(REPO / "bundles" / smoke.name / "configs" / "inference.json").get("hu_window", [0, 255])
    load = LoadImage(image_only=True, dtype=None)
    for card in sidecars(smoke.synthetic):
        image, original = (
            load(smoke.synthetic / f"{card['made_by']['case']['name']}_image.nii.gz"),
            load(card["made_by"]["case"]["image"]),
        )
        assert min(low, original.min()) <= image.min() < image.max() <= max(high, original.max())
        assert np.issubdtype(image.numpy().dtype, np.integer)
        assert not torch.equal(image, original)
    assert not list(smoke.synthetic.rglob(".tmp-*")), "a temporary file was left behind"


def test_sidecars_tell_where_an_image_comes_from(smoke: Smoke) -> None:
    for card in sidecars(smoke.synthetic):
        made_by = card["made_by"]
        assert made_by["weights_sha256"] == verify.sha256(smoke.trained / "model.pt")
        assert made_by["seed"] == made_by["case"]["seed"]
        assert {**made_by["inputs"], **made_by["outputs"]} == {
            name: verify.sha256(smoke.synthetic / name) for name in [*made_by["inputs"], *made_by["outputs"]]
        }
        assert "synthetic" in made_by["notice"]


def test_synthesis_from_the_bundle_folder_is_the_same(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    bundle = REPO / "bundles" / smoke.name
    places = {"output_dir": tmp_path, "weights": smoke.trained / "model.pt"}
    done = run_bundle(smoke.name, "inference", "smoke", cwd=bundle, **places)
    assert done.returncode == 0, done.stdout
    assert images(tmp_path) == images(smoke.synthetic)


def test_training_from_the_bundle_folder_with_knobs(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    bundle = REPO / "bundles" / smoke.name
    known = verify.read(bundle / "configs" / "train.json")
    knobs = {key: value for key, value in TINY.items() if key in known}
    done = run_bundle(smoke.name, "train", cwd=bundle, epochs=1, output_dir=tmp_path, **knobs)
    assert done.returncode == 0, done.stdout
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_misspelt_knob_is_refused(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    done = run_bundle(smoke.name, "train", "smoke", output_dir=tmp_path, epoch=5)
    assert done.returncode != 0
    assert "did you mean --epochs" in done.stdout
    assert not (tmp_path / "model.pt").exists()


def test_finished_cases_are_skipped(smoke: Smoke, run_bundle: Runner) -> None:
    times = {path: path.stat().st_mtime_ns for path in smoke.synthetic.glob("*.nii.gz")}
    gone = min(path for path in times if path.name.endswith("_image.nii.gz"))
    before = images(smoke.synthetic)
    gone.unlink()
    places = {"output_dir": smoke.synthetic, "weights": smoke.trained / "model.pt"}
    done = run_bundle(smoke.name, "inference", "smoke", **places)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("already finished, skipped") == len(sidecars(smoke.synthetic)) - 1
    assert images(smoke.synthetic) == before, "the case that was lost came back as another one"
    case = gone.name.removesuffix("_image.nii.gz")
    assert {
        path.name.split("_image")[0].split("_layout")[0] for path, t in times.items() if path.stat().st_mtime_ns != t
    } == {case}


def test_sidecar_makes_the_case_again(smoke: Smoke, tmp_path: Path) -> None:
    path = next(p for p in sorted(smoke.synthetic.glob("*.json")) if "made_by" in json.loads(p.read_text()))
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--args_file",
        str(path),
        "--output_dir",
        str(tmp_path / "again"),
    ]
    done = run_command(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    again = images(tmp_path / "again")
    assert again == {name: (smoke.synthetic / name).read_bytes() for name in again}
    assert set(again) == set(json.loads(path.read_text())["made_by"]["outputs"])


def test_evaluation_reports_numbers(smoke: Smoke, run_bundle: Runner) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke.synthetic.glob("*.nii.gz")}
    places = {"output_dir": smoke.synthetic, "weights": smoke.trained / "model.pt"}
    done = run_bundle(smoke.name, "inference", "evaluate", "smoke", **places)
    assert done.returncode == 0, done.stdout
    report = json.loads((smoke.synthetic / "evaluation.json").read_text())
    assert any(isinstance(value, (int, float)) for _, value in verify.walk(report))
    assert "|" in (smoke.synthetic / "evaluation.md").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in before}, "evaluation made finished cases again"


def test_stages(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    """Later stages and variants (``train_<stage>.json`` with ``inference_<stage>.json``) train and synthesise too."""
    stages = [name.removeprefix("train_") for name in smoke.overlays("train_*")]
    for stage in stages:
        folder = tmp_path / stage
        done = run_bundle(smoke.name, "train", f"train_{stage}", "smoke", output_dir=folder)
        assert done.returncode == 0, done.stdout
        for legacy in [[], *([name] for name in smoke.overlays(f"legacy_{stage}"))]:
            places = {"output_dir": folder / "_".join(["synthetic", *legacy]), "weights": folder / "model.pt"}
            done = run_bundle(smoke.name, "inference", f"inference_{stage}", *legacy, "smoke", **places)
            assert done.returncode == 0, done.stdout
            assert verify.check_synthesis(places["output_dir"]) == []


def test_legacy_overlay(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    for overlay in smoke.overlays("legacy"):
        places = {"output_dir": tmp_path, "weights": smoke.trained / "model.pt"}
        done = run_bundle(smoke.name, "inference", overlay, "smoke", **places)
        assert done.returncode == 0, done.stdout
        assert verify.check_synthesis(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", verify.RELEASE, ids=lambda check: check.__name__)
def test_verified(check: verify.Check, name: str) -> None:
    assert check(REPO / "bundles" / name) == []
