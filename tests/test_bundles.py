"""Every bundle as a user runs it: the documented commands, each in its own process, at smoke size, on phantoms.

A session-wide training leaves weights that the tests of synthesis share; each test then looks at the files on disk.
The processes are forks (see `preloaded`) but for one, which must bring what a fork brought, byte by byte. All commands
are started for real, in the checkout and from the zips, by ``.ci/run``.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import run_command
from monai.transforms import LoadImage
from PIL import Image

from common.io import sha256
from tools import reading, verify
from tools.smoke import check_synthesis

pytestmark = pytest.mark.bundle

REPO = Path(__file__).resolve().parents[1]
NAMES = sorted(path.parent.name for path in (REPO / "bundles").glob("*/configs"))
TINY = {"channels": [8, 8], "attention_levels": [False, True], "norm_num_groups": 4, "image_size": 16}
TINY |= {"phantom_cases": 3, "phantom_size": 24, "val_cases": 1, "base": False}
Runner = Callable[..., object]


class Smoke(NamedTuple):
    """A bundle, trained at smoke size, and cases synthesised with its weights."""

    name: str
    trained: Path
    synthetic: Path

    @property
    def bundle(self) -> Path:
        return REPO / "bundles" / self.name

    def overlays(self, pattern: str) -> list[str]:
        return sorted(path.stem for path in (self.bundle / "configs").glob(f"{pattern}.json"))


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


def sidecars(folder: Path) -> list[dict]:
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [content for content in contents if "made_by" in content]


def outputs(folder: Path) -> dict[Path, str]:
    """The synthetic files in a folder -> the name of their case."""
    made = (card["made_by"] for card in sidecars(folder))
    return {folder / name: made_by["case"]["name"] for made_by in made for name in made_by["outputs"]}


def images(folder: Path) -> dict[str, bytes]:
    """The synthetic files in a folder -> {name: content}."""
    return {path.name: path.read_bytes() for path in outputs(folder)}


def times(folder: Path) -> dict[Path, int]:
    """When each synthetic file was written."""
    return {path: path.stat().st_mtime_ns for path in outputs(folder)}


def test_training_leaves_plain_weights_and_traces(smoke: Smoke) -> None:
    state = torch.load(smoke.trained / "model.pt", weights_only=True)
    network = reading.build(reading.parser(smoke.bundle, "inference", "smoke"))
    network.load_state_dict(state, strict=True, assign=True)
    assert all(value.isfinite().all() for value in state.values())
    assert {path.name for path in (smoke.trained / "preview").iterdir()} == {"epoch_0001.png", "epoch_0002.png"}
    assert list(smoke.trained.glob("events.out.tfevents.*"))


def test_every_case_is_synthesised_and_reads_back(smoke: Smoke) -> None:
    assert check_synthesis(smoke.synthetic) == []
    parsed = reading.parser(smoke.bundle, "inference", "smoke")
    parsed["output_dir"], parsed["weights"] = str(smoke.synthetic), str(smoke.trained / "model.pt")
    cases = sorted(parsed.get_parsed_content("cases"), key=lambda case: case["name"])
    assert [card["made_by"]["case"] for card in sidecars(smoke.synthetic)] == cases
    assert set(outputs(smoke.synthetic).values()) == {case["name"] for case in cases}
    assert not list(smoke.synthetic.rglob(".tmp-*")), "a temporary file was left behind"


def test_synthesis_changes_the_original_within_the_window(smoke: Smoke) -> None:
    # Where nothing is synthesised the original stays, with whatever values it has.
    low, high = reading.read(smoke.bundle / "configs" / "inference.json").get("hu_window", [0, 255])
    load = LoadImage(image_only=True, dtype=None)
    for path, case in ((p, c["made_by"]["case"]) for c in sidecars(smoke.synthetic) for p in c["made_by"]["outputs"]):
        if "image" in case and path.startswith(f"{case['name']}_image."):
            image, original = load(smoke.synthetic / path), load(case["image"])
            assert min(low, original.min()) <= image.min() < image.max() <= max(high, original.max())
            assert np.issubdtype(image.numpy().dtype, np.integer)
            assert not torch.equal(image, original)


def paint(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple]) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(*change(np.asarray(image.dataobj), image.affine)), path)


# Harm to a synthetic file -> what the check says.
HARM: dict[str, tuple[Callable[[Path], None], str]] = {
    "lost": (Path.unlink, "no "),
    "foreign value.png": (lambda p: paint(p, lambda m: np.where(m == m.max(), 7, m).astype(np.uint8)), "holds [7]"),
    "16 bits.png": (lambda p: paint(p, lambda m: m.astype(np.uint16)), "expected uint8"),
    "size.png": (lambda p: paint(p, lambda m: m[1:]), "expected uint8"),
    "mirrored.png": (lambda p: paint(p, lambda m: m[:, ::-1]), "its side-car says"),
    "emptied.png": (lambda p: paint(p, np.zeros_like), "its side-car says"),
    "grid.nii.gz": (lambda p: rewrite(p, lambda v, a: (v[1:], a)), "not on the grid"),
    "place.nii.gz": (lambda p: rewrite(p, lambda v, a: (v, a + np.eye(4)[0] * 9)), "not on the grid"),
    "constant.nii.gz": (lambda p: rewrite(p, lambda v, a: (np.zeros_like(v), a)), "is constant"),
}


def test_a_harmed_file_is_noticed(smoke: Smoke, tmp_path: Path) -> None:
    made = [p for p in outputs(smoke.synthetic) if p.suffix != ".png" or np.asarray(Image.open(p)).any()]
    kind = "".join(made[0].suffixes[-2:])
    # A picture's pixels are free, a mask is held to what was asked for, a volume to its grid.
    counted = kind != ".png" or "record" in sidecars(smoke.synthetic)[0]["made_by"]
    possible = [n for n in HARM if n.endswith(kind) or "." not in n]
    for name, (harm, words) in ((n, HARM[n]) for n in possible if counted or not n.startswith("16 bits")):
        folder = tmp_path / name
        shutil.copytree(smoke.synthetic, folder)
        harm(folder / made[0].name)
        (problem,) = check_synthesis(folder)
        if not counted:
            words = {"lost": words, "emptied.png": "is constant"}.get(name, "its side-car says")
        assert words in problem, name
        assert made[0].name in problem


def test_sidecars_tell_where_an_image_comes_from(smoke: Smoke) -> None:
    for card in sidecars(smoke.synthetic):
        made_by = card["made_by"]
        assert made_by["weights_sha256"] == sha256(smoke.trained / "model.pt")
        assert made_by["seed"] == made_by["case"]["seed"]
        assert {**made_by["inputs"], **made_by["outputs"]} == {
            name: sha256(smoke.synthetic / name) for name in [*made_by["inputs"], *made_by["outputs"]]
        }
        assert "synthetic" in made_by["notice"]


def test_synthesis_from_the_bundle_folder_is_the_same(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    bundle = smoke.bundle
    places = {"output_dir": tmp_path, "weights": smoke.trained / "model.pt"}
    done = run_bundle(smoke.name, "inference", "smoke", cwd=bundle, fresh=True, **places)
    assert done.returncode == 0, done.stdout
    assert images(tmp_path) == images(smoke.synthetic)


def test_training_from_the_bundle_folder_with_knobs(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    bundle = smoke.bundle
    known = reading.read(bundle / "configs" / "train.json")
    knobs = {key: value for key, value in TINY.items() if key in known}
    knobs |= {k: [v] * len(known[k]) for k, v in knobs.items() if isinstance(known[k], list) and isinstance(v, int)}
    done = run_bundle(smoke.name, "train", cwd=bundle, epochs=1, output_dir=tmp_path, **knobs)
    assert done.returncode == 0, done.stdout
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_misspelt_knob_is_refused(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    done = run_bundle(smoke.name, "train", "smoke", output_dir=tmp_path, epoch=5)
    assert done.returncode != 0
    assert "did you mean --epochs" in done.stdout
    assert not (tmp_path / "model.pt").exists()


def test_finished_cases_are_skipped(smoke: Smoke, run_bundle: Runner) -> None:
    cases, written, before = outputs(smoke.synthetic), times(smoke.synthetic), images(smoke.synthetic)
    gone = min(cases)
    gone.unlink()
    places = {"output_dir": smoke.synthetic, "weights": smoke.trained / "model.pt"}
    done = run_bundle(smoke.name, "inference", "smoke", **places)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("already finished, skipped") == len(sidecars(smoke.synthetic)) - 1
    assert images(smoke.synthetic) == before, "the case that was lost came back as another one"
    assert {cases[path] for path, time in times(smoke.synthetic).items() if written[path] != time} == {cases[gone]}


def test_sidecar_makes_the_case_again(smoke: Smoke, tmp_path: Path) -> None:
    path = next(p for p in sorted(smoke.synthetic.glob("*.json")) if "made_by" in json.loads(p.read_text()))
    command = ["-m", "monai.bundle", "run", "--args_file", str(path), "--output_dir", str(tmp_path / "again")]
    done = run_command(sys.executable, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    again = images(tmp_path / "again")
    assert again == {name: (smoke.synthetic / name).read_bytes() for name in again}
    assert set(again) == set(json.loads(path.read_text())["made_by"]["outputs"])


def test_evaluation_reports_numbers(smoke: Smoke, run_bundle: Runner) -> None:
    before = times(smoke.synthetic)
    places = {"output_dir": smoke.synthetic, "weights": smoke.trained / "model.pt"}
    done = run_bundle(smoke.name, "inference", "evaluate", "smoke", **places)
    assert done.returncode == 0, done.stdout
    report = json.loads((smoke.synthetic / "evaluation.json").read_text())
    assert any(isinstance(value, (int, float)) for _, value in reading.walk(report))
    assert "|" in (smoke.synthetic / "evaluation.md").read_text()
    assert before == times(smoke.synthetic), "evaluation made finished cases again"


def test_statistics_alone(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    """`fit.json` measures all masks without training, and synthesis takes what it wrote with any weights."""
    for overlay in smoke.overlays("fit"):
        done = run_bundle(smoke.name, "train", "smoke", overlay, output_dir=tmp_path / "fit")
        assert done.returncode == 0, done.stdout
        statistics = tmp_path / "fit" / "statistics.json"
        assert {path.name for path in statistics.parent.iterdir()} == {
            "phantoms",
            "statistics.json",
            "statistics.png",
        }, "it trained"
        assert Image.open(statistics.with_suffix(".png")).width > 500
        held = json.loads(statistics.read_text())
        config = reading.read(smoke.bundle / "configs" / "smoke.json")
        assert len(held["masks"]) + held["empty"] == config["phantom_cases"], "none is kept for validation"
        places = {"output_dir": tmp_path / "out", "weights": smoke.trained / "model.pt", "statistics": statistics}
        done = run_bundle(smoke.name, "inference", "smoke", num_samples=1, **places)
        assert done.returncode == 0, done.stdout
        assert check_synthesis(tmp_path / "out") == []


def test_stages(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    """Later stages and variants (``train_<stage>.json`` with ``inference_<stage>.json``) train and synthesise too."""
    stages = [name.removeprefix("train_") for name in smoke.overlays("train_*")]
    for stage in stages:
        folder = tmp_path / stage
        done = run_bundle(smoke.name, "train", f"train_{stage}", "smoke", output_dir=folder)
        assert done.returncode == 0, done.stdout
        assert (folder / "model.pt").is_file()
        if f"inference_{stage}" not in smoke.overlays("inference_*"):
            continue  # a stage that only prepares for the next one
        for legacy in [[], *([name] for name in smoke.overlays(f"legacy_{stage}"))]:
            places = {"output_dir": folder / "_".join(["synthetic", *legacy]), "weights": folder / "model.pt"}
            done = run_bundle(smoke.name, "inference", f"inference_{stage}", *legacy, "smoke", **places)
            assert done.returncode == 0, done.stdout
            assert check_synthesis(places["output_dir"]) == []


def test_legacy_overlay(smoke: Smoke, run_bundle: Runner, tmp_path: Path) -> None:
    for overlay in smoke.overlays("legacy"):
        places = {"output_dir": tmp_path, "weights": smoke.trained / "model.pt"}
        done = run_bundle(smoke.name, "inference", overlay, "smoke", **places)
        assert done.returncode == 0, done.stdout
        assert check_synthesis(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", verify.RELEASE, ids=lambda check: check.__name__)
def test_verified(check: reading.Check, name: str) -> None:
    assert check(REPO / "bundles" / name) == []
