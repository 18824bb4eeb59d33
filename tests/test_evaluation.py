"""Laws of `common.evaluation`: files to a report, and what it says when something is missing."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import blobs
from PIL import Image

from common.evaluation import evaluate_pairs

LABELS = {"lung": 1, "nodule": 2, "absent": 9}


@pytest.fixture
def cohort(tmp_path):
    """Make n cases of 24^3 on disk, in HU, with a lung and a nodule."""

    def make(n: int, seed: int = 0, **extra):
        cases = []
        for i, image in enumerate(blobs(n, seed=seed)):
            layout = np.zeros((24, 24, 24), np.uint8)
            layout[4:20, 4:20, 4:20], layout[10:13, 10:13, 10:13] = 1, 2
            case = {"image": tmp_path / f"{seed}_{i}.nii.gz", "layout": tmp_path / f"{seed}_{i}_layout.nii.gz"}
            nib.save(nib.Nifti1Image((1000 * image[0]).numpy(), np.diag([-1, -1, 1, 1])), case["image"])
            nib.save(nib.Nifti1Image(layout, np.diag([-1, -1, 1, 1])), case["layout"])
            cases.append({**case, **extra})
        return cases

    return make


def test_evaluate_pairs_writes_a_report_that_reads_back(cohort, tmp_path):
    real, synthetic = cohort(4), cohort(3, seed=1)
    synthetic[0]["reference"] = synthetic[0]["image"]
    synthetic[1]["image"] = real[2]["image"]  # memorised
    result = evaluate_pairs(real, synthetic, tmp_path / "out", image_size=(16, 16, 16), labels=LABELS)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["evaluation.json", "evaluation.md"]
    assert result["counts"] == {"real": 4, "synthetic": 3, "reference": 1}
    assert all(value is not None and value >= 0 for key, value in result["metrics"].items() if key != "kid_mean")

    # The case compared with itself, and the copied case.
    for region in ("whole volume", "lung", "nodule"):
        assert result["reference"][region]["mse"]["mean"] == 0
        assert result["reference"][region]["ms_ssim"]["mean"] == pytest.approx(1, abs=1e-5)
    copy = result["cases"]["synthetic"][1]
    assert copy["nearest_voxels"] == {"distance": 0, "ratio": 0, "image": str(real[2]["image"])}
    assert copy["nearest_features"]["ratio"] == pytest.approx(0, abs=1e-6)
    assert result["labels"]["real"]["nodule"]["voxels"] == {"mean": 27, "std": 0, "cases": 4}

    # An absent label is null, with the reason.
    assert result["labels"]["synthetic"]["absent"]["mean"]["mean"] is None
    assert "absent" in result["reasons"]["labels/synthetic/absent/mean/mean"]
    text = (tmp_path / "out" / "evaluation.md").read_text()
    for words in ("| fid |", "| whole volume |", "| nodule | synthetic | 27 |", "flattered", "RandomConvFeatures"):
        assert words in text


def test_identical_cohorts_are_at_zero(cohort, tmp_path):
    cases = cohort(3)
    result = evaluate_pairs(cases, cases, tmp_path, labels={"lung": 1})["metrics"]
    assert result["fid"] == pytest.approx(0, abs=1e-9)
    assert result["coverage"] == 1
    assert result["nearest_voxels_min_ratio"] == 0


def test_one_case_gives_nulls_with_reasons_instead_of_a_crash(cohort, tmp_path):
    result = evaluate_pairs(cohort(3), cohort(1, seed=1), tmp_path, labels={"lung": 1}, name="one")
    for key in ("fid", "kid_mean", "mmd", "coverage"):
        assert result["metrics"][key] is None
        assert result["reasons"][f"metrics/{key}"] == "needs at least 2 cases, got 1 synthetic"
    assert result["metrics"]["nearest_features_min_ratio"] > 0
    assert "| fid | - |" in (tmp_path / "one.md").read_text()


def test_colour_pictures_are_evaluated_too(tmp_path):
    cases = []
    for i, image in enumerate(blobs(2, 32, 2)):
        case = {"image": tmp_path / f"{i}.png", "layout": tmp_path / f"{i}_layout.png"}
        grey = (127 * (image[0] + 1)).byte().numpy()
        Image.fromarray(np.stack([grey, grey // 2, grey], axis=-1)).save(case["image"])
        Image.fromarray((grey > 99).astype(np.uint8)).save(case["layout"])
        cases.append({**case, "reference": case["image"]})
    result = evaluate_pairs(cases, cases, tmp_path, labels={"polyp": 1}, window=(0, 255))
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-9)
    assert result["reference"]["polyp"]["mse"] == {"mean": 0, "std": 0, "cases": 2}


def test_an_image_too_small_for_ms_ssim_gives_null(cohort, tmp_path):
    cases = cohort(2)
    cases[0]["reference"] = cases[1]["image"]
    result = evaluate_pairs(
        cases, cases, tmp_path, labels={}, image_size=(8, 8, 8), extractor=lambda images: images.flatten(1)
    )
    assert result["reference"]["whole volume"]["mse"]["mean"] > 0
    assert result["reference"]["whole volume"]["ms_ssim"]["mean"] is None
    assert "too small" in result["reasons"]["cases/synthetic/*/reference/whole volume/ms_ssim"]


def test_the_users_extractor_is_used(cohort, tmp_path):
    seen = []

    def corner_values(images):
        seen.append((tuple(images.shape), float(images.min()) >= -1, float(images.max()) <= 1))
        return images.flatten(1)[:, :5]

    result = evaluate_pairs(
        cohort(2), cohort(2, seed=1), tmp_path, labels={}, window=(-500, 500), extractor=corner_values
    )
    assert seen == [((1, 1, 24, 24, 24), True, True)] * 4
    assert "corner_values" in result["settings"]["extractor"]


def test_evaluation_errors_teach(cohort, tmp_path):
    good, labels = cohort(2), {"lung": 1}
    with pytest.raises(ValueError, match="0 real and 2 synthetic"):
        evaluate_pairs([], good, tmp_path, labels=labels)
    with pytest.raises(ValueError, match=r"window must be \(low, high\)"):
        evaluate_pairs(good, good, tmp_path, labels=labels, window=(100, -100))
    with pytest.raises(ValueError, match=r"image file not found: nowhere\.nii"):
        evaluate_pairs([{**good[0], "image": "nowhere.nii"}], good, tmp_path, labels=labels)
    with pytest.raises(ValueError, match="has no 'layout'"):
        evaluate_pairs([{"image": good[0]["image"]}], good, tmp_path, labels=labels)
    with pytest.raises(ValueError, match=r"must map .* got \(1, 1, 24, 24, 24\)"):
        evaluate_pairs(good, good, tmp_path, labels=labels, extractor=lambda x: x)
    bad = tmp_path / "bad.nii.gz"
    nib.save(nib.Nifti1Image(np.full((24, 24, 24), np.nan, np.float32), np.eye(4)), bad)
    with pytest.raises(ValueError, match=r"NaN or infinite values: .*bad\.nii"):
        evaluate_pairs([{**good[0], "image": bad}], good, tmp_path, labels=labels)
    nib.save(nib.Nifti1Image(np.zeros((24, 24, 20), np.uint8), np.eye(4)), bad)
    with pytest.raises(ValueError, match=r"differ in shape, \(24, 24, 24\) and \(24, 24, 20\)"):
        evaluate_pairs([{**good[0], "layout": bad}], good, tmp_path, labels=labels)
    assert not list(tmp_path.glob("evaluation*"))
