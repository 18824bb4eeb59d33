"""Laws of `common.mask_metrics`: what was asked against what came, shapes, distances between sets, copies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import draw, ellipse

from common.mask_metrics import (
    compare_shapes,
    compare_statistics,
    control,
    energy_distance,
    halves,
    match,
    nearest_mask,
    perimeter,
    shape,
)
from common.semantics import Lesion

MIN_SIZE = 10


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
