"""Laws of `common.volume_evaluation`: equal cohorts agree, swapped reports and seams are seen, gaps have reasons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.reports import Attributes, Finding, write_report
from common.totalsegmentator import ORGANS
from common.volume_evaluation import evaluate_anatomy, list_prompted

WINDOW = (-175.0, 250.0)
HU = {"background": -1000, "body": -100, "spleen": 120, "liver": 110, "kidney_right": 180, "colorectal_cancer": 80}
SITES = {"caecum": (12, 8, 4), "rectum": (9, 5, 2), "sigmoid colon": (6, 11, 5)}


def paint(attributes: Attributes, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """HU and labels (20, 18, 16) of a simple body of which the attributes are true."""
    labels = np.zeros((20, 18, 16), np.uint8)
    labels[2:18, 2:16, 1:15] = ORGANS.index("body")
    said = {finding.what: finding for finding in attributes.findings}
    for name, start in (("spleen", (3, 3, 9)), ("liver", (10, 8, 8)), ("kidney_right", (13, 3, 7))):
        state = said[name].state if name in said else "present"
        size = {"absent": 0, "small": 2, "present": 3, "enlarged": 5}[state]
        labels[tuple(slice(a, a + size) for a in start)] = ORGANS.index(name)
    tumour = said["tumour"]
    if tumour.state == "present":
        grid = np.stack(np.meshgrid(*map(np.arange, labels.shape), indexing="ij"), axis=-1)
        far = np.linalg.norm(grid - SITES[tumour.where] - rng.normal(0, 0.3, 3), axis=-1)
        labels[far < tumour.size_cm / 2] = ORGANS.index("colorectal_cancer")
    hu = np.array([HU.get(name, 0) for name in ORGANS])[labels] + rng.normal(0, 10, labels.shape)
    return hu.astype(np.float32), labels


def draw(i: int, rng: np.random.Generator) -> Attributes:
    """A tumour somewhere in most, and an organ that is unusual."""
    tumour = Finding("tumour", "absent")
    if i % 5:
        tumour = Finding("tumour", "present", list(SITES)[i % 3], round(float(rng.uniform(3, 5)), 1))
    organs = [Finding("spleen", ["present", "absent", "small", "enlarged"][i % 4]), Finding("liver")]
    return Attributes((*organs, Finding("kidney_right", ["present", "absent"][i // 4 % 2]), tumour))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen cases as an inference run leaves them: images, layouts and side-cars. Read only."""
    root, rng = tmp_path_factory.mktemp("cases"), np.random.default_rng(0)
    for i in range(16):
        attributes = draw(i, rng)
        report = write_report(attributes, "zh" if i == 3 else "en", rng)
        affine = np.diag([10.0, 10.0, 10.0, 1.0])
        for key, volume in zip(("image", "layout"), paint(attributes, rng), strict=True):
            nib.save(nib.Nifti1Image(volume, affine), root / f"c{i:02d}_{key}.nii.gz")
        case = {"name": f"c{i:02d}", "seed": i, "report": report}
        outputs = {f"c{i:02d}_{key}.nii.gz": "-" for key in ("image", "layout")}
        (root / f"c{i:02d}.json").write_text(json.dumps({"made_by": {"case": case, "outputs": outputs}}))
    return root


def changed(folder: Path, to: Path, change) -> Path:
    """A copy of the folder with changed cases of the side-cars."""
    shutil.copytree(folder, to)
    cars = sorted(to.glob("c*.json"))
    cases = change([json.loads(car.read_text())["made_by"]["case"] for car in cars])
    for car, case in zip(cars, cases, strict=True):
        content = json.loads(car.read_text())
        content["made_by"]["case"] = case
        car.write_text(json.dumps(content))
    return to


def redrawn(folder: Path, key: str, change) -> None:
    """Change the files of all cases."""
    for path in folder.glob(f"c*_{key}.nii.gz"):
        image = nib.load(path)
        volume = change(np.asarray(image.dataobj))
        path.unlink()
        nib.save(nib.Nifti1Image(volume, image.affine), path)


def evaluate(real: list | Path, synthetic: Path, output: Path, **kwargs):
    real = list_prompted(real) if isinstance(real, Path) else real
    return evaluate_anatomy(real, synthetic, output, names=ORGANS, window=WINDOW, **{"slices": 4, **kwargs})


@pytest.fixture(scope="module")
def same(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The report of a cohort against itself."""
    output = tmp_path_factory.mktemp("same")
    return evaluate(folder, folder, output), output


def test_the_report_reads_back(same):
    result, output = same
    assert json.loads((output / "evaluation.json").read_text()) == result
    assert sorted(path.name for path in output.iterdir()) == ["evaluation.json", "evaluation.md"]
    text = (output / "evaluation.md").read_text()
    for words in ("| overall |", "| fid_axial |", "| spleen |", "slice jumps", "HU inside", "shuffled", "RandomConv"):
        assert words in text
    assert result["counts"]["synthetic_with_report"] == result["counts"]["real_with_report"] == 16
    case = result["cases"]["synthetic"][3]
    assert case["report"]
    assert case["seed"] == 3
    assert all(row["right"] for row in case["attributes"])


def test_a_cohort_against_itself_is_perfect(same):
    result, _ = same
    metrics, attributes = result["metrics"], result["attributes"]
    assert metrics["attributes_overall"] == attributes["asked"]["overall"]["accuracy"] >= 0.97
    assert attributes["real"]["unusual"]["accuracy"] >= 0.9
    assert metrics["fid_mean"] == pytest.approx(0, abs=1e-6)
    assert metrics["slice_jump_ratio_voxel"] == metrics["slice_jump_ratio_mean"] == 1
    for space in ("features", "voxels", "layout"):
        assert metrics[f"nearest_{space}_min_ratio"] == pytest.approx(0, abs=1e-6)
    assert result["cases"]["synthetic"][3]["nearest"]["voxels"]["image"] == result["cases"]["real"][3]["image"]
    spleen = result["organs"]["spleen"]
    assert (spleen["volume_distance"], spleen["coverage_ratio"], spleen["occurrence_synthetic"]) == (0, 1, 0.75)
    assert spleen["real"] == spleen["synthetic"]
    assert spleen["real"]["volume_ml"]["cases"] == 12
    hu = result["labels"]["synthetic"]["liver"]
    assert hu["mean"]["mean"] == pytest.approx(110, abs=1)
    assert hu["std"]["mean"] == pytest.approx(10, abs=1)
    # An organ that nobody has is null, with the reason.
    assert result["organs"]["pancreas"]["volume_distance"] is None
    assert result["reasons"]["organs/pancreas/volume_distance"]


def test_volumes_that_ignore_their_reports_are_seen(folder, same, tmp_path):
    swapped = changed(folder, tmp_path / "swapped", lambda cases: cases[1:] + cases[:1])
    result = evaluate(folder, swapped, tmp_path / "out")
    assert result["attributes"]["asked"]["unusual"]["accuracy"] < 0.5
    assert same[0]["attributes"]["shuffled"]["unusual"]["accuracy"] < 0.6
    failure = result["failures"][0]
    assert set(failure) == {"case", "attribute", "kind", "asked", "found", "right"}
    wrong = [row for row in result["failures"] if row["kind"] == "absence"]
    assert f"| {wrong[0]['case']} | absence | {wrong[0]['attribute']} |" in (tmp_path / "out/evaluation.md").read_text()


def test_seams_and_wrong_organs_are_seen(folder, tmp_path):
    there = changed(folder, tmp_path / "seams", lambda cases: cases)
    steps = 60 * (np.arange(16) % 2)
    redrawn(there, "image", lambda hu: (hu + steps).astype(np.float32))
    redrawn(there, "layout", lambda labels: np.where(labels == ORGANS.index("liver"), ORGANS.index("body"), labels))
    result = evaluate(folder, there, tmp_path / "out")
    assert result["metrics"]["slice_jump_ratio_mean"] > 3
    assert result["metrics"]["slice_jump_ratio_voxel"] > 1.5
    assert result["metrics"]["fid_mean"] > 1e-3
    assert result["organs"]["liver"]["occurrence_synthetic"] == 0
    assert {row["attribute"] for row in result["failures"]} >= {"liver present"}


def test_what_was_not_asked_is_not_judged(folder, tmp_path):
    def change(cases):
        return [{**cases[0], "layout": "given.nii.gz"}, {**cases[1], "report": None}, *cases[2:]]

    result = evaluate(folder, changed(folder, tmp_path / "some", change), tmp_path / "out")
    assert (result["counts"]["synthetic_with_report"], result["counts"]["layout_given"]) == (15, 1)
    judged = ["attributes" in case for case in result["cases"]["synthetic"]]
    assert judged == [False, False, *[True] * 14]


def test_gaps_have_reasons(folder, tmp_path):
    real = [{key: case[key] for key in ("image", "layout")} for case in list_prompted(folder)[:1]]
    result = evaluate(real, folder, tmp_path / "out", extractor=lambda x: torch.zeros(1, 0)[:, :, None])
    assert result["metrics"]["attributes_overall"] is result["metrics"]["fid_axial"] is None
    reasons = result["reasons"]
    assert reasons["metrics/attributes_overall"] == "no real case has a report to learn from"
    assert "must map (N, C, *S) to (N, F)" in reasons["metrics/fid_axial"]
    assert reasons["metrics/nearest_voxels_min_ratio"].startswith("a single real case")
    assert "| overall | - (0 of 0) |" in (tmp_path / "out" / "evaluation.md").read_text()


def test_load_brings_real_cases_to_our_labels(folder, tmp_path):
    def load(case):
        loaded = {key: torch.from_numpy(nib.load(case[key]).get_fdata())[None] for key in ("image", "layout")}
        return {**case, "image": loaded["image"], "layout": torch.where(loaded["layout"] == 13, 0, loaded["layout"])}

    result = evaluate(folder, folder, tmp_path / "out", load=load)
    assert result["organs"]["body"]["occurrence_real"] == 0
    assert result["organs"]["body"]["occurrence_synthetic"] == 1


def test_errors_teach(folder, tmp_path):
    real = list_prompted(folder)
    with pytest.raises(ValueError, match=r"0 synthetic in .*nothing"):
        evaluate(real, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match=r"window \(low, high\)"):
        evaluate_anatomy(real, folder, tmp_path / "out", names=ORGANS, window=(1, 0))
    with pytest.raises(ValueError, match=r"c00_layout.*holds 13, 12 labels have names"):
        evaluate_anatomy(real, folder, tmp_path / "out", names=ORGANS[:12], window=WINDOW)
    with pytest.raises(ValueError, match=r"cannot read .*c00_image.*: no such organ"):
        evaluate(real, folder, tmp_path / "out", load=lambda case: (_ for _ in ()).throw(OSError("no such organ")))
    with pytest.raises(ValueError, match=r"both be \(1, X, Y, Z\)"):
        evaluate([{**real[0], "image": torch.zeros(1, 4, 4, 4)}], folder, tmp_path / "out")
    lacking = changed(folder, tmp_path / "lacking", lambda cases: cases)
    car = lacking / "c00.json"
    car.write_text(json.dumps({"made_by": {"case": {}, "outputs": {"c00_image.nii.gz": "-"}}}))
    with pytest.raises(ValueError, match="without image and layout"):
        evaluate(real, lacking, tmp_path / "out")
    assert not (tmp_path / "out").exists()
