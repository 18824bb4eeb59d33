"""Laws of `common.mask_evaluation`: what was asked against what came, shapes, copies, and the report of a folder."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.mask_evaluation import (
    compare_shapes,
    compare_statistics,
    control,
    energy_distance,
    evaluate_masks,
    halves,
    match,
    nearest_mask,
    perimeter,
    shape,
)
from common.semantics import Lesion, measure

SIDE, MIN_SIZE = 64, 10


def ellipse(size: float, x: float, y: float, aspect: float = 1.0, angle: float = 0.0, side: int = SIDE) -> np.ndarray:
    """A filled ellipse of that area and centre, in fractions of the image."""
    rows, columns = np.mgrid[:side, :side] - side * np.array([y, x]).reshape(2, 1, 1)
    u, v = columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)
    return u**2 / aspect + v**2 * aspect <= size * side**2 / np.pi


def draw(n: int, seed: int = 0, scale: float = 1.0) -> list[list[Lesion]]:
    """Lesions of n masks, one in four masks with two of them; large ones nearer to the centre."""
    rng, masks = np.random.default_rng(seed), []
    for _ in range(n):
        sizes = rng.lognormal(-3, 0.4, 1 + (rng.random() < 0.25)).clip(0.01, 0.12)
        spots = rng.permutation([0.28, 0.72])
        masks.append(
            [
                Lesion(float(scale * s), float(c + rng.normal(0, 0.04)), 0.5 + float(rng.normal(0, 0.08)))
                for s, c in zip(sizes, spots)
            ]
        )
    return masks


def paint(lesions: list[Lesion], rng: np.random.Generator) -> np.ndarray:
    """A mask that holds the lesions, as ellipses of some aspect."""
    shapes = [ellipse(n.size, n.x, n.y, rng.uniform(0.8, 1.25), rng.uniform(0, 3)) for n in lesions]
    return np.any([np.zeros((SIDE, SIDE), bool), *shapes], axis=0)


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


# Control


def test_masks_as_asked_are_without_error():
    asked = draw(20)
    numbers = control(asked, [mask[::-1] for mask in asked])  # order inside a mask means nothing
    assert [numbers[k] for k in ("size_error_p90", "centre_distance_p90", "missing_share")] == [0, 0, 0]
    assert [numbers[k] for k in ("r2_size", "r2_x", "r2_y", "count_accuracy", "within_tolerance")] == [1] * 5


def test_displacement_and_growth_are_measured():
    asked = draw(20)
    moved = [[Lesion(1.1 * n.size, n.x + 0.03, n.y - 0.04) for n in mask] for mask in asked]
    numbers = control(asked, moved)
    for key in ("mean", "median", "p90"):
        assert numbers[f"centre_distance_{key}"] == pytest.approx(0.05)
        assert numbers[f"size_error_{key}"] == pytest.approx(0.1)
    centre = np.array([n.x for mask in asked for n in mask])
    assert numbers["r2_x"] == pytest.approx(1 - 0.03**2 / centre.var())


def test_missing_lesions_and_wrong_labels_count():
    a, b = Lesion(0.1, 0.3, 0.3), Lesion(0.1, 0.7, 0.7)
    assert match([a, b], [b]) == [None, b]
    assert match([a], [Lesion(0.1, 0.3, 0.3, label=2)]) == [None]
    numbers = control([[a, b], [a]], [[b], [a, b]])
    assert numbers["missing_share"] == pytest.approx(1 / 3)
    assert numbers["within_tolerance"] == pytest.approx(2 / 3)
    assert numbers["count_accuracy"] == 0
    assert numbers["size_error_mean"] == 0
    assert numbers["r2_size"] != numbers["r2_size"], "all sizes alike: not defined"
    nothing = control([[a]], [[]])
    assert nothing["missing_share"] == 1
    assert math.isnan(nothing["size_error_mean"])
    with pytest.raises(ValueError, match="asked is of 1 masks, achieved of 2"):
        control([[a]], [[a], [b]])


def test_assignment_is_by_centre_and_size():
    large, small = Lesion(0.2, 0.5, 0.5), Lesion(0.01, 0.5, 0.5)
    assert match([small, large], [large, small]) == [small, large]
    near, far = Lesion(0.1, 0.2, 0.5), Lesion(0.1, 0.45, 0.5)
    # The greedy choice would give the second nothing near.
    assert match([Lesion(0.1, 0.33, 0.5), Lesion(0.1, 0.6, 0.5)], [far, near]) == [near, far]


# Distribution


def test_energy_distance_is_zero_for_equal_rows_only():
    x = np.random.default_rng(0).normal(size=(50, 3))
    assert energy_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert energy_distance(np.zeros((4, 1)), np.ones((3, 1))) == pytest.approx(2)


def test_cohorts_drawn_alike_are_near_the_floor_and_others_are_not():
    real, alike, halved = draw(150), draw(150, seed=1), draw(150, seed=1, scale=0.5)
    floor, near, far = (
        halves(real, compare_statistics),
        compare_statistics(real, alike),
        compare_statistics(real, halved),
    )
    for key in ("ks_size", "ks_x", "ks_y", "energy", "count_total_variation"):
        assert near[key] < 2 * floor[key] + 0.02
    assert far["ks_size"] > 0.4
    assert far["size_sd_ratio"] == pytest.approx(near["size_sd_ratio"] / 2)
    assert far["energy"] > 5 * floor["energy"]
    assert far["count_total_variation"] == near["count_total_variation"]
    assert compare_statistics(real, real) == {k: 1 if k.endswith("ratio") else pytest.approx(0, abs=1e-9) for k in near}

    # Sizes shuffled over the masks keep the marginals and lose the link with the place.
    linked = [[Lesion(0.02 + 0.1 * n.x, n.x, n.y) for n in mask] for mask in real]
    sizes = iter(np.random.default_rng(0).permutation([n.size for mask in linked for n in mask]))
    loose = compare_statistics(linked, [[Lesion(float(next(sizes)), n.x, n.y) for n in mask] for mask in linked])
    assert loose["ks_size"] == 0
    assert loose["spearman_difference"] > 0.7


def test_counts_are_compared_as_shares():
    one, two = [Lesion(0.1, 0.3, 0.3)], [Lesion(0.1, 0.3, 0.3), Lesion(0.1, 0.7, 0.7)]
    assert compare_statistics([one] * 4, [one, two])["count_total_variation"] == 0.5
    numbers = compare_statistics([one, two], [[], []])
    assert numbers["count_total_variation"] == 1
    assert math.isnan(numbers["ks_size"])


# Shape


def test_shape_of_a_disc():
    area, compactness, solidity, eccentricity, holes = shape(ellipse(0.25, 0.5, 0.5, side=200))
    assert area == pytest.approx(10000, rel=0.01)
    assert compactness == pytest.approx(4 * math.pi, rel=0.01)
    assert solidity == pytest.approx(1, abs=0.02)
    assert eccentricity < 0.05
    assert holes == 0


def test_shape_of_a_square():
    square = np.zeros((60, 60), bool)
    square[10:50, 15:55] = True
    area, compactness, solidity, eccentricity, holes = shape(square)
    assert (area, holes) == (1600, 0)
    assert (solidity, eccentricity) == (pytest.approx(1), pytest.approx(0))
    assert compactness == pytest.approx(16 * 0.948**2, rel=0.03)  # Crofton's known shortfall for upright squares


def test_shape_of_a_turned_ellipse():
    region = ellipse(0.1, 0.5, 0.5, 2.0, 0.7, side=200)  # axes 2 : 1
    area, compactness, solidity, eccentricity, holes = shape(region)
    a, b = math.sqrt(2 * area / math.pi), math.sqrt(area / math.pi / 2)
    ramanujan = math.pi * (3 * (a + b) - math.sqrt((3 * a + b) * (a + 3 * b)))
    assert perimeter(region) == pytest.approx(ramanujan, rel=0.02)
    assert compactness == pytest.approx(ramanujan**2 / area, rel=0.03)
    assert solidity == pytest.approx(1, abs=0.03)
    assert eccentricity == pytest.approx(math.sqrt(3) / 2, abs=0.01)
    assert holes == 0


def test_shape_of_a_ring_and_of_specks():
    ring = ellipse(0.25, 0.5, 0.5, side=200) & ~ellipse(0.0625, 0.5, 0.5, side=200)
    *_, solidity, eccentricity, holes = shape(ring)
    assert holes == 1
    assert perimeter(ring) == pytest.approx(1.5 * 2 * math.pi * 200 * math.sqrt(0.25 / math.pi), rel=0.01)
    assert solidity == pytest.approx(0.75, abs=0.02)
    assert eccentricity < 0.05
    diamond = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)  # joined by corners, so its middle is a hole
    assert shape(diamond)[-1] == 1
    assert shape(np.ones((1, 1), bool)).tolist()[2:] == [1, 0, 0]


def test_other_shapes_are_told_apart():
    rng = np.random.default_rng(0)

    def rows(aspect: float) -> list[np.ndarray]:
        return [
            shape(ellipse(0.08, 0.5, 0.5, aspect + rng.uniform(0, 0.3), rng.uniform(0, 3)))[None] for _ in range(30)
        ]

    round_, alike, long = rows(1), rows(1), rows(2)
    assert compare_shapes(round_, long)["ks_eccentricity"] == 1
    assert compare_shapes(round_, alike)["ks_eccentricity"] < 0.4
    assert compare_shapes(round_, long)["energy"] > 5 * compare_shapes(round_, alike)["energy"]
    assert all(math.isnan(v) for v in compare_shapes(round_, []).values())
    pierced = [rows + [0, 0, 0, 0, 500] for rows in alike]  # a number that no real mask varies in cannot drown the rest
    assert 0.1 < compare_shapes(round_, pierced)["energy"] < 5


# Copies


def test_nearest_mask_finds_the_copy_and_knows_dice():
    masks = torch.rand(7, 400, generator=torch.Generator().manual_seed(0)) > 0.5
    near = nearest_mask(masks[[4, 2]], masks, chunk=3)
    assert near.dice.tolist() == [1, 1]
    assert near.mask.tolist() == [4, 2]
    other = nearest_mask(masks, chunk=3)
    assert (other.mask != torch.arange(7)).all()
    i, j = 3, int(other.mask[3])
    overlap, total = (masks[i] & masks[j]).sum(), masks[i].sum() + masks[j].sum()
    assert float(other.dice[3]) == pytest.approx(float(2 * overlap / total))
    assert nearest_mask(torch.zeros(1, 400, dtype=torch.bool), masks).dice.tolist() == [0]
    with pytest.raises(ValueError, match="needs other masks"):
        nearest_mask(masks[:1])


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
