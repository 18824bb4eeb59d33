"""Laws of `common.image_evaluation`: a copy, a good cohort and a bad one, told apart; what is missing has a reason."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import blobs, ellipse
from PIL import Image

from common import image_evaluation
from common.downstream import train_segmenter
from common.image_evaluation import NOTES, TWICE, evaluate_images

SIZE = 32


@pytest.fixture(autouse=True)
def _small_segmenter(monkeypatch):
    """One that learns red lesions in a second."""
    small = partial(train_segmenter, channels=(8, 16, 16), batch_size=8, lr=2e-2)
    monkeypatch.setattr(image_evaluation, "train_segmenter", small)


def pairs(n: int, seed: int = 0, kind: str = "good") -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (32, 32, 3) with a red lesion where the mask is, elsewhere ("moved"), or mere noise."""
    rng, made = np.random.default_rng(seed), []
    for wall in blobs(n, SIZE, dims=2, seed=seed):
        size, x, y = rng.uniform(0.06, 0.12), *rng.uniform(0.3, 0.45, 2)
        shown = ellipse(size, 1 - x, 1 - y, side=SIZE) if kind == "moved" else ellipse(size, x, y, side=SIZE)
        image = (100 + 20 * wall[0].numpy())[..., None] + 100 * shown[..., None] * (1, 0, 0)
        image = rng.uniform(0, 255, image.shape) if kind == "noise" else image
        made.append((image.astype(np.uint8), ellipse(size, x, y, side=SIZE)))
    return made


def write(folder: Path, made: list[tuple[np.ndarray, np.ndarray]]) -> list[dict]:
    """Real cases."""
    folder.mkdir()
    cases = [{key: str(folder / f"{i:03d}_{key}.png") for key in ("image", "mask")} for i in range(len(made))]
    for case, (image, mask) in zip(cases, made, strict=True):
        Image.fromarray(image).save(case["image"])
        Image.fromarray(mask).save(case["mask"])  # 1 bit
    return cases


def write_synthetic(folder: Path, made: list[tuple[np.ndarray, np.ndarray]]) -> Path:
    """What an inference run leaves behind."""
    for i, case in enumerate(write(folder, made)):
        outputs = {Path(path).name: "0" for path in case.values()}
        (folder / f"{i:03d}.json").write_text(json.dumps({"made_by": {"case": {"name": f"{i}"}, "outputs": outputs}}))
    return folder


def load(case):
    image, mask = (np.asarray(Image.open(case[key])) for key in ("image", "mask"))
    return {**case, "image": torch.tensor(image).movedim(-1, 0) / 127.5 - 1, "mask": torch.tensor(mask)[None]}


SETTINGS = {"load": load, "seeds": (0, 1), "epochs": 12}


# The report


def test_copy_good_and_bad_cohorts_are_told_apart(tmp_path, caplog):
    caplog.set_level(logging.INFO, "common.image_evaluation")
    real, held_out = write(tmp_path / "real", pairs(16)), write(tmp_path / "test", pairs(12, 1))
    cohorts = {
        "copy": [write_synthetic(tmp_path / "copy", pairs(16))],
        "good": [write_synthetic(tmp_path / f"good_{i}", pairs(12, 2 + i)) for i in range(3)],
        "moved": [write_synthetic(tmp_path / "moved", pairs(12, 9, "moved"))],
    }
    state = torch.get_rng_state()
    result = evaluate_images(real, held_out, cohorts, tmp_path / "out", **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["evaluation.json", "evaluation.md"]
    assert result["counts"] == {"real": 16, "held_out": 12}
    assert result["reasons"] == {}
    assert list(result["cohorts"]) == ["held-out", *cohorts]

    # Images.
    shown = {name: cohort["folders"][0]["metrics"] for name, cohort in result["cohorts"].items()}
    for key in ("fid", "mmd", "nearest_features_median_ratio", "nearest_voxels_median_ratio"):
        assert shown["copy"][key] == pytest.approx(0, abs=1e-6)
        assert min(shown["good"][key], shown["held-out"][key]) > 0.001
    assert shown["copy"]["diversity"] == pytest.approx(1)
    assert shown["copy"]["coverage"] == 1

    # Lesions.
    assert min(shown[name]["mask_agreement"] for name in ("copy", "good", "held-out")) > 0.8
    assert shown["moved"]["mask_agreement"] < 0.3

    # Repeats.
    folders, spread = result["cohorts"]["good"]["folders"], result["cohorts"]["good"]["summary"]
    assert [row["folder"] for row in folders] == [str(folder) for folder in cohorts["good"]]
    for key, value in spread.items():
        values = [row["metrics"][key] for row in folders]
        assert value == {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values)), "cases": 3}
    assert spread["fid"]["std"] > 0
    assert result["cohorts"]["moved"]["summary"]["fid"]["std"] == 0

    # Segmenters: a folder alone takes all seeds, among several each one in turn.
    arms = result["downstream"]
    assert list(arms) == ["real", f"real + {TWICE}", *(f"real + {name}" for name in cohorts)]
    assert [[run["seed"] for run in arm["runs"]] for arm in arms.values()] == [[0, 1]] * 3 + [[0, 1, 0], [0, 1]]
    assert [arm["runs"][0]["pairs"] for arm in arms.values()] == [16, 32, 32, 28, 28]
    assert arms["real + good"]["runs"][2]["folder"] == str(cohorts["good"][2])
    assert arms["real"]["runs"][0]["folder"] is None
    assert arms["real"]["summary"]["dice"]["mean"] == pytest.approx(shown["held-out"]["mask_agreement"])
    for key in ("dice", "iou"):
        values = [run[key] for run in arms["real + good"]["runs"]]
        assert arms["real + good"]["summary"][key]["mean"] == pytest.approx(np.mean(values))
        # The very same set: the very same segmenter.
        copies = arms["real + copy"]["summary"][key], arms[f"real + {TWICE}"]["summary"][key]
        assert copies[0] == copies[1]
        assert arms["real + moved"]["summary"][key]["mean"] < arms["real + good"]["summary"][key]["mean"]

    # One line for each training: none twice.
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("segmenter of")]
    assert len(lines) == sum(len(arm["runs"]) for arm in arms.values()) == 2 + 2 + 2 + 3 + 2
    assert "segmenter of 'real + good', seed 1: 12 epochs of 28 pairs in " in "\n".join(lines)

    text = (tmp_path / "out" / "evaluation.md").read_text()
    for words in (
        "| images | held-out | copy | good | moved |",
        "| pairs | 12 | 16 | 12, 12, 12 | 12 |",
        "(n=3) |",
        f"| real + {TWICE} | 32 |",
        "12 epochs on, tested on 12 held-out pairs",
        "RandomConvFeatures",
        *NOTES,
    ):
        assert words in text


def test_noise_and_one_image_over_and_over_get_worse_numbers(tmp_path):
    real = write(tmp_path / "real", pairs(16))
    made = {"good": pairs(12, 1), "noise": pairs(12, 2, "noise"), "one": pairs(1, 3) * 12}
    cohorts = {name: [write_synthetic(tmp_path / name, images)] for name, images in made.items()}
    result = evaluate_images(real, None, cohorts, tmp_path, load=load, segment=False)
    good, noise, one = (result["cohorts"][name]["folders"][0]["metrics"] for name in cohorts)
    for key in ("fid", "kid_mean", "mmd", "nearest_features_median_ratio", "nearest_voxels_min_ratio"):
        assert noise[key] > 3 * good[key]
    assert (noise["density"], noise["coverage"]) == (0, 0)
    assert one["diversity"] == 0 < 0.5 < good["diversity"]
    assert one["coverage"] < 0.5 * good["coverage"]


def test_same_input_same_report(tmp_path):
    real, cohorts = write(tmp_path / "real", pairs(6)), {"a": [write_synthetic(tmp_path / "a", pairs(4, 1))]}
    results = [evaluate_images(real, real[:3], cohorts, tmp_path, **{**SETTINGS, "epochs": 1}) for _ in range(2)]
    assert results[0] == results[1]


# What is missing


def nulls(tree, path=""):
    """Paths of all that is None, but for the folder that real pairs do not have."""
    if isinstance(tree, dict):
        return {p for key, value in tree.items() if key != "folder" for p in nulls(value, f"{path}/{key}".lstrip("/"))}
    if isinstance(tree, list):
        return {p for value in tree for p in nulls(value, f"{path}/*")}
    return {path} if tree is None else set()


@pytest.mark.parametrize("held_out", [None, []])
def test_without_held_out_pairs(tmp_path, held_out):
    real, cohorts = write(tmp_path / "real", pairs(12)), {"a": [write_synthetic(tmp_path / "a", pairs(6, 1))]}
    result = evaluate_images(real, held_out, cohorts, tmp_path / "out", **SETTINGS)
    assert result["downstream"] == {}
    assert list(result["cohorts"]) == ["a"]
    assert result["cohorts"]["a"]["folders"][0]["metrics"]["mask_agreement"] > 0.5
    assert result["reasons"] == dict.fromkeys(("cohorts/held-out", "downstream"), "no held-out pairs were given")
    assert "No downstream part: no held-out pairs were given." in (tmp_path / "out" / "evaluation.md").read_text()


def test_without_segmenters(tmp_path, monkeypatch):
    monkeypatch.delattr(image_evaluation, "train_segmenter")
    real, cohorts = write(tmp_path / "real", pairs(4)), {"a": [write_synthetic(tmp_path / "a", pairs(4, 1))]}
    result = evaluate_images(real, real, cohorts, tmp_path, load=load, segment=False, name="looks")
    assert result["cohorts"]["a"]["folders"][0]["metrics"]["fid"] > 0
    assert result["downstream"] == {}
    assert {p for p in nulls(result["cohorts"], "cohorts") if "mask_agreement" not in p} == set()
    assert nulls(result["cohorts"], "cohorts") | {"downstream"} == set(result["reasons"])
    assert set(result["reasons"].values()) == {"segmenters were not asked for"}
    assert "| mask_agreement | - | - |" in (tmp_path / "looks.md").read_text()


def test_too_few_cases_give_nulls_with_reasons(tmp_path):
    real, cohorts = write(tmp_path / "real", pairs(3)), {"a": [write_synthetic(tmp_path / "a", pairs(1, 1))] * 2}
    result = evaluate_images(real, None, cohorts, tmp_path, **{**SETTINGS, "epochs": 1})
    metrics = result["cohorts"]["a"]["folders"][0]["metrics"]
    assert metrics["fid"] is metrics["diversity"] is None
    assert metrics["nearest_voxels_min_ratio"] > 0
    assert "at least 2 cases" in result["reasons"]["cohorts/a/folders/*/metrics/fid"]
    assert "at least 2 cases" in result["reasons"]["cohorts/a/summary/fid/mean"]
    assert "too few" in result["reasons"]["cohorts/a/folders/*/metrics/diversity"]
    assert nulls(result["cohorts"], "cohorts") <= set(result["reasons"])
    assert "| fid | - ± - (n=0) |" in (tmp_path / "evaluation.md").read_text()


def test_pairs_are_brought_to_the_size_that_was_asked(tmp_path):
    real, cohorts = write(tmp_path / "real", pairs(4)), {"a": [write_synthetic(tmp_path / "a", pairs(4, 1))]}
    Image.open(real[1]["image"]).resize((50, 40)).save(real[1]["image"])
    Image.open(real[1]["mask"]).resize((50, 40)).save(real[1]["mask"])
    result = evaluate_images(real, None, cohorts, tmp_path, **{**SETTINGS, "epochs": 1, "image_size": (48, 64)})
    assert result["settings"]["image_size"] == [48, 64]
    with pytest.raises(ValueError, match=r"001_image\.png is loaded as \(3, 40, 50\), the first real image as \(3, 32"):
        evaluate_images(real, None, cohorts, tmp_path, **SETTINGS)


# Errors


def test_errors_name_folder_and_file(tmp_path):
    real, good = write(tmp_path / "real", pairs(2)), write_synthetic(tmp_path / "a", pairs(2, 1))

    def refused(match, real=real, held_out=None, cohorts=None, **settings):
        with pytest.raises(ValueError, match=match):
            evaluate_images(real, held_out, cohorts or {"a": [good]}, tmp_path / "out", **{**SETTINGS, **settings})

    refused("0 real pairs, 1 cohorts", real=[])
    refused("0 seeds", seeds=())
    with pytest.raises(ValueError, match="0 cohorts"):
        evaluate_images(real, None, {}, tmp_path, **SETTINGS)
    refused(r"'a' needs a list of folders, got '.*a'", cohorts={"a": str(good)})
    refused(r"'a' needs a list of folders, got \[\]", cohorts={"a": []})
    refused(f"cannot be called '{TWICE}'", cohorts={TWICE: [good]})
    refused(r"cohort 'b': \S+empty holds no synthetic case", cohorts={"a": [good], "b": [tmp_path / "empty"]})
    refused("image file not found: nowhere", held_out=[{"image": "nowhere.png", "mask": real[0]["mask"]}])
    refused("has no 'mask'", held_out=[{"image": real[0]["image"]}])
    refused(r"\[-1, 1\] and mask as 0 and 1.*000_image", load=lambda c: {**load(c), "image": 128 * load(c)["image"]})
    refused(r"\[-1, 1\] and mask as 0 and 1.*000_mask", load=lambda c: {**load(c), "mask": 255 * load(c)["mask"]})
    refused("in \\[-1, 1\\]", load=lambda c: {**load(c), "image": torch.nan * load(c)["image"]})

    wide = Image.open(good / "001_mask.png").resize((40, 32))
    wide.save(good / "001_mask.png")
    refused(r"got \(3, 32, 32\) and \(1, 32, 40\): \S+001_image.png, \S+001_mask.png")
    (good / "001_mask.png").write_bytes(b"no picture")
    refused(r"cannot read \S+001_image.png, \S+001_mask.png: ")
    (good / "001_mask.png").unlink()
    refused(r"mask file not found: \S+001_mask.png")
    (good / "001.json").write_text(json.dumps({"made_by": {"case": {}, "outputs": {"001_image.png": "0"}}}))
    refused(r"cohort 'a': \S+a holds a case without image and mask: .*001_image")
    assert not (tmp_path / "out").exists()
