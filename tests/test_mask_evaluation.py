"""Laws of `common.mask_evaluation`: the report of a folder, whatever lies in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIDE, draw, paint
from PIL import Image

from common.mask_evaluation import evaluate_masks
from common.semantics import Lesion, measure

MIN_SIZE = 10


def write_real(folder: Path, n: int, seed: int = 0) -> list[dict]:
    folder.mkdir()
    rng, cases = np.random.default_rng(seed), []
    for i, lesions in enumerate(draw(n, seed)):
        Image.fromarray(255 * paint(lesions, rng).astype(np.uint8)).save(folder / f"{i:03d}.png")
        cases.append({"mask": str(folder / f"{i:03d}.png")})
    return cases


def write_synthetic(folder: Path, asked: list[list[Lesion]], masks: list[np.ndarray], labels=(1,)) -> Path:
    """What an inference run leaves behind."""
    folder.mkdir()
    for i, (lesions, mask) in enumerate(zip(asked, masks, strict=True)):
        grey = 255 * mask.astype(np.uint8) if mask.dtype == bool else mask
        Image.fromarray(grey).save(folder / f"a_{i}_mask.png")
        achieved = measure(one_hot(grey, labels), labels, MIN_SIZE)
        made_by = {
            "case": {"name": f"a_{i}", "seed": i, "lesions": [vars(n) for n in lesions]},
            "outputs": {f"a_{i}_mask.png": "0"},
            "record": {"tries": 1 + i % 2, "accepted": i > 0, "achieved": [vars(n) for n in achieved]},
        }
        (folder / f"a_{i}.json").write_text(json.dumps({"made_by": made_by}))
    return folder


def one_hot(grey: np.ndarray, labels=(1,)) -> np.ndarray:
    return (grey > 127)[None] if len(labels) == 1 else np.stack([grey == label for label in labels])


def loader(labels=(1,)):
    return lambda case: {**case, "mask": torch.as_tensor(one_hot(np.asarray(Image.open(case["mask"])), labels)).float()}


SETTINGS = {"load": loader(), "labels": (1,), "min_size": MIN_SIZE, "image_size": (SIDE, SIDE)}


# The report


def test_a_folder_gives_a_report_that_reads_back(tmp_path):
    rng, asked = np.random.default_rng(5), draw(24, seed=5)
    masks = [paint(lesions, rng) for lesions in asked]
    real = write_real(tmp_path / "real", 30)
    masks[3] = np.asarray(Image.open(real[7]["mask"])) > 0  # memorised
    masks[4] = np.zeros_like(masks[4])  # nothing came
    folder = write_synthetic(tmp_path / "out", asked, masks)
    result = evaluate_masks(real, folder, **SETTINGS)
    assert json.loads((folder / "evaluation.json").read_text()) == result
    assert {"control.csv", "control.png", "evaluation.md"} < {p.name for p in folder.iterdir()}
    assert not list(folder.glob(".tmp*"))
    assert result["counts"] == {"real": 30, "synthetic": 24}

    # Control: as asked but for the two spoilt masks, and the shuffled check can fail.
    good, shuffled = result["control"]["asked"], result["control"]["shuffled"]
    assert good["centre_distance_median"] < 0.01
    assert good["size_error_median"] < 0.05
    assert good["missing_share"] * good["lesions"] == pytest.approx(1)
    assert good["count_accuracy"] >= 22 / 24
    assert shuffled["centre_distance_median"] > 5 * good["centre_distance_median"]
    assert shuffled["within_tolerance"] < 0.2 < 0.8 < good["within_tolerance"]
    assert shuffled["r2_size"] < 0 < good["r2_size"]
    assert result["control"]["accepted_share"] == pytest.approx(23 / 24)
    assert result["control"]["tries_mean"] == 1.5

    # Copies: the one, by name.
    assert result["memorisation"]["suspected_copies"] == [str(folder / "a_3_mask.png")]
    case = next(c for c in result["cases"] if c["name"] == "a_3")
    assert case["nearest"] == {"dice": 1, "iou": 1, "mask": real[7]["mask"]}
    assert result["memorisation"]["real_to_other_real"]["dice_max"] < 0.98
    assert result["files"] == {"foreign_values": {}, "differ_from_record": []}

    # Drawn alike: near the floor.
    label = result["labels"]["1"]
    for part, key in (("distribution", "ks_size"), ("distribution", "energy"), ("shape", "ks_solidity")):
        assert label[part]["synthetic"][key] < 2 * label[part]["real_halves"][key] + 0.05
    assert label["distribution"]["asked"]["ks_size"] < 0.4
    assert result["metrics"]["fid"] > 0

    # The rows.
    rows = list(csv.DictReader((folder / "control.csv").open()))
    assert len(rows) == sum(map(len, asked))
    missing = [row for row in rows if row["mask"] == "a_4_mask.png"]
    assert {(row["matched"], row["achieved_x"], row["seed"]) for row in missing} == {("0", "", "4")}
    first = next(row for row in rows if row["mask"] == "a_0_mask.png")
    assert float(first["asked_size"]) == pytest.approx(asked[0][0].size, rel=1e-5)
    assert (first["matched"], first["tries"], first["accepted"], first["label"]) == ("1", "1", "0", "1")
    errors = [float(row["centre_distance"]) for row in rows if row["matched"] == "1"]
    assert np.median(errors) == pytest.approx(good["centre_distance_median"], abs=1e-5)
    text = (folder / "evaluation.md").read_text()
    for words in (
        "| control, conditions | asked | shuffled |",
        "Suspected copies: 1: ",
        "| fid |",
        "RandomConvFeatures",
    ):
        assert words in text

    # The same again.
    assert evaluate_masks(real, folder, **SETTINGS) == result


def test_several_classes(tmp_path):
    labels, rng = (85, 170), np.random.default_rng(0)
    asked = [[Lesion(n.size, 0.28, n.y, 85), Lesion(n.size, 0.72, n.y, 170)] for n in (m[0] for m in draw(8))]
    grey = []
    for lesions in asked:
        layers = [(n.label * paint([n], rng)).astype(np.uint8) for n in lesions]
        grey.append(np.maximum(*layers))
    folder = write_synthetic(tmp_path / "out", asked, grey, labels)
    real = [{"mask": str(folder / f"a_{i}_mask.png")} for i in range(8)]
    settings = {**SETTINGS, "load": loader(labels), "labels": labels}
    result = evaluate_masks(real, folder, **settings)
    assert result["control"]["asked"]["within_tolerance"] == 1
    assert result["control"]["asked"]["lesions"] == 16
    assert sorted(result["labels"]) == ["170", "85"]
    assert result["labels"]["170"]["distribution"]["synthetic"]["ks_size"] == 0
    assert result["files"]["foreign_values"] == {}
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-6)

    # Classes exchanged: the same pixels, yet every lesion is missing and Dice sees it.
    for i, mask in enumerate(grey):
        other = np.select([mask == 85, mask == 170], [170, 85]).astype(np.uint8)
        Image.fromarray(other).save(folder / f"a_{i}_mask.png")
    (tmp_path / "real").mkdir()
    for i, mask in enumerate(grey):
        Image.fromarray(mask).save(tmp_path / "real" / f"{i}.png")
    real = [{"mask": str(tmp_path / "real" / f"{i}.png")} for i in range(8)]
    result = evaluate_masks(real, folder, **settings)
    assert result["control"]["asked"]["within_tolerance"] == 0
    assert result["memorisation"]["synthetic_to_real"]["dice_max"] < 0.1
    assert len(result["files"]["differ_from_record"]) == 8


def test_too_few_cases_give_nulls_with_reasons(tmp_path):
    real = write_real(tmp_path / "real", 1)
    folder = write_synthetic(tmp_path / "out", [[Lesion(0.1, 0.5, 0.5)]], [np.zeros((SIDE, SIDE), bool)])
    result = evaluate_masks(real, folder, **SETTINGS, name="few")
    reasons = result["reasons"]
    assert result["metrics"]["fid"] is None
    assert "at least 2 cases" in reasons["metrics/fid"]
    assert result["control"]["asked"]["missing_share"] == 1
    assert result["control"]["asked"]["size_error_mean"] is None
    assert result["control"]["shuffled"]["count_accuracy"] is None
    assert reasons["control/shuffled/count_accuracy"] == "needs at least 2 masks, got 1"
    assert result["labels"]["1"]["distribution"]["synthetic"]["ks_size"] is None
    assert "needs at least 3 lesions" in reasons["labels/1/distribution/synthetic/ks_size"]
    assert result["memorisation"]["real_to_other_real"]["dice_max"] is None
    assert reasons["memorisation/real_to_other_real/dice_max"] == "needs at least 2 masks, got 1 real"
    assert result["memorisation"]["synthetic_to_real"]["dice_max"] == 0
    assert "| ks_size | - |" in (folder / "few.md").read_text()

    def nulls(tree, path=""):
        if isinstance(tree, dict):
            return {p for key, value in tree.items() for p in nulls(value, f"{path}/{key}".lstrip("/"))}
        return {path} if tree is None else set()

    found = {p for key in ("control", "labels", "metrics", "memorisation") for p in nulls(result[key], key)}
    assert found
    assert found <= set(reasons)


def test_files_that_break_the_promise_are_named(tmp_path):
    asked = draw(3)
    rng = np.random.default_rng(0)
    folder = write_synthetic(tmp_path / "out", asked, [paint(lesions, rng) for lesions in asked])
    real = write_real(tmp_path / "real", 3)
    soft = np.asarray(Image.open(folder / "a_1_mask.png")).copy()
    soft[0, :3] = (1, 100, 130)
    Image.fromarray(soft).save(folder / "a_1_mask.png")
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(folder / "a_2_mask.png")
    result = evaluate_masks(real, folder, **SETTINGS)
    assert result["files"]["foreign_values"] == {str(folder / "a_1_mask.png"): [1, 100, 130]}
    assert result["files"]["differ_from_record"] == [str(folder / "a_2_mask.png")]

    # A single class may have a label value instead of 255, but not both.
    Image.fromarray(np.where(soft > 200, 7, 0).astype(np.uint8)).save(folder / "a_1_mask.png")
    anything = {"load": lambda case: {"mask": torch.as_tensor(np.asarray(Image.open(case["mask"])) > 5)[None]}}
    seven = {**SETTINGS, "labels": (7,), **anything}
    assert evaluate_masks(real, folder, **seven)["files"]["foreign_values"] == {}
    assert evaluate_masks(real, folder, **SETTINGS)["files"]["foreign_values"] == {str(folder / "a_1_mask.png"): [7]}

    # A run without a record is read too.
    for path in folder.glob("a_*.json"):
        content = json.loads(path.read_text())
        del content["made_by"]["record"]
        path.write_text(json.dumps(content))
    result = evaluate_masks(real, folder, **SETTINGS)
    assert result["control"]["accepted_share"] is None
    assert result["reasons"]["control/tries_mean"] == "no side-car records it"
    assert result["files"]["differ_from_record"] == []


def test_errors_teach(tmp_path):
    asked, rng = draw(2), np.random.default_rng(0)
    folder = write_synthetic(tmp_path / "out", asked, [paint(lesions, rng) for lesions in asked])
    real = write_real(tmp_path / "real", 2)
    with pytest.raises(ValueError, match="0 real and 2 synthetic"):
        evaluate_masks([], folder, **SETTINGS)
    with pytest.raises(ValueError, match="mask file not found: nowhere"):
        evaluate_masks([{"mask": "nowhere.png"}], folder, **SETTINGS)
    with pytest.raises(ValueError, match="has no 'mask'"):
        evaluate_masks([{"image": real[0]["mask"]}], folder, **SETTINGS)
    with pytest.raises(ValueError, match=r"000\.png is loaded as \(1, 64, 64\), expected \(1, 32, 32\)"):
        evaluate_masks(real, folder, **{**SETTINGS, "image_size": (32, 32)})
    grey = {**SETTINGS, "load": lambda case: {"mask": torch.full((1, SIDE, SIDE), 0.5)}}
    with pytest.raises(ValueError, match=r"000\.png is loaded with values other than 0 and 1"):
        evaluate_masks(real, folder, **grey)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read mask .*broken\.png"):
        evaluate_masks([{"mask": tmp_path / "broken.png"}], folder, **SETTINGS)
    content = json.loads((folder / "a_1.json").read_text())
    del content["made_by"]["case"]["lesions"]
    (folder / "a_1.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a_1\.json does not say which lesions were asked"):
        evaluate_masks(real, folder, **SETTINGS)
    assert not list(folder.glob("evaluation*"))
