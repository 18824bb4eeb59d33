"""Laws of the described lesions: the report's words show in the voxels, the body around stays, cohorts only grow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import ConvexHull

from common.io import CaseError
from common.lesion_lists import list_lesion_cases
from common.lesion_phantoms import THORAX_EVERY, described, lesion_body, lesion_cohort, paint_lesion
from common.lesion_reports import LesionReport, draw_report, read_reports
from common.lesion_words import (
    CAVITY,
    DENSITY,
    ENHANCEMENT,
    FEATURES,
    FLUID,
    GROUND_GLASS,
    LUNGS,
    MARGIN,
    ORGAN_NAMES,
    OUTWARD,
    PART_SOLID,
    SHAPE,
    VALUE,
    VARIATIONS,
    WALL,
    organ_id,
)

SHAPE_3D, SPACING, NOISE = (64, 56, 60), 2.0, 6.0
AFFINE = np.diag([SPACING, SPACING, SPACING, 1.0])
COARSE = (40, 32, 42)
HU = {"liver": 110.0, "spleen": 120.0, "stomach": 15.0, "lung upper lobe right": -850.0}


def block(organ: str = "liver") -> tuple[np.ndarray, np.ndarray]:
    """A cuboid organ in fat, and a spleen beside it on the right, with a scanner's noise; HU and organ map."""
    organs = np.zeros(SHAPE_3D, dtype=np.uint8)
    organs[6:50, 8:48, 8:52] = organ_id(organ)
    organs[50:60, 8:48, 8:52] = organ_id("spleen")
    image = np.full(SHAPE_3D, -100.0)
    for name in (organ, "spleen"):
        image[organs == organ_id(name)] = HU[name]
    if organ == "stomach":
        image[(organs == 6) & ~ndimage.binary_erosion(organs == 6, iterations=2)] = 60
    noise = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=SHAPE_3D), (0.6, 0.6, 0.5))
    return np.rint(image + NOISE * noise / noise.std()).astype(np.int16), organs


def said(
    density: str = "hypodense lesion", organ: str = "liver", size: float | tuple = 30.0, **words: str
) -> LesionReport:
    """A report of few words; ``words`` by the first letters of their keys."""
    keys = {"shape": SHAPE, "margin": MARGIN, "variations": VARIATIONS, "features": FEATURES, "cavity": CAVITY}
    attributes = {DENSITY: density, SHAPE: "round-like", MARGIN: "well-defined margin", VARIATIONS: "homogeneous"}
    attributes |= {keys.get(key, VALUE): word for key, word in words.items() if key != "location"}
    size = size if isinstance(size, tuple) else (size, size, size)
    return LesionReport(organ, "tumor", attributes, size, words.get("location", ""))


def paint(report: LesionReport, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """CT before and after, organ map, mask."""
    image, organs = block(report.organ)
    after, mask = paint_lesion(image, organs, AFFINE, report, np.random.default_rng(seed))
    return image, after, organs, mask


# Words


def test_density_words_come_in_their_order():
    order = (FLUID, "hypodense lesion", "isodense lesion", "hyperdense lesion")
    means = []
    for word in order:
        for seed in (0, 1):
            _, after, _, mask = paint(said(word), seed)
            means.append(after[mask].mean())
    assert means[0] == pytest.approx(10, abs=20)
    assert np.all(np.diff(np.array(means).reshape(4, 2).mean(1)) > 12)
    assert abs(np.mean(means[4:6]) - HU["liver"]) < 12


@pytest.mark.parametrize("value", [-20, 57, 400])
def test_a_ct_value_counts_before_the_word(value):
    _, after, _, mask = paint(said("hyperdense lesion", value=f"{value} HU"))
    core = ndimage.binary_erosion(mask)
    assert after[core].mean() == pytest.approx(value, abs=4)


def test_lungs_show_ground_glass_and_solid_cores():
    lung = "lung upper lobe right"
    _, glass, _, mask = paint(said(GROUND_GLASS, lung))
    assert -700 < np.median(glass[mask]) < -330
    _, part, _, mask = paint(said(PART_SOLID, lung, 40.0))
    depth = ndimage.distance_transform_edt(mask)
    assert np.median(part[depth > 0.7 * depth.max()]) > -60
    assert np.median(part[mask & (depth < 2)]) < -250


def test_ring_is_brighter_than_its_core():
    _, after, _, mask = paint(said("ring enhancement", size=40.0))
    depth = ndimage.distance_transform_edt(mask) / ndimage.distance_transform_edt(mask).max()
    ring, core = after[(depth > 0.2) & (depth < 0.35)].mean(), after[depth > 0.6].mean()
    assert ring > core + 40


def test_heterogeneous_is_mottled_and_homogeneous_only_noisy():
    spread = {}
    for word in ("homogeneous", "heterogeneous"):
        _, after, _, mask = paint(said("isodense lesion", size=40.0, variations=word))
        calm = ndimage.gaussian_filter(after.astype(float), 1.5)
        spread[word] = calm[ndimage.binary_erosion(mask, iterations=3)].std()
    assert spread["heterogeneous"] > 3 * spread["homogeneous"]


@pytest.mark.parametrize(
    ("feature", "sign"), [("presence of increased density areas", 1), ("presence of decreased density areas", -1)]
)
def test_areas_of_other_density_are_there(feature, sign):
    _, plain, _, mask = paint(said("isodense lesion", size=40.0))
    _, areas, _, same = paint(said("isodense lesion", size=40.0, features=feature))
    np.testing.assert_array_equal(mask, same)
    edge = 99 if sign > 0 else 1
    assert sign * (np.percentile(areas[mask], edge) - np.percentile(plain[mask], edge)) > 15


def test_an_ill_defined_margin_is_a_slow_ramp():
    step = {}
    for word in ("well-defined margin", "ill-defined margin"):
        before, after, _, mask = paint(said(FLUID, size=40.0, margin=word))
        change = ndimage.gaussian_filter((after.astype(float) - before), 0.7)
        slope = np.sqrt(sum(ndimage.sobel(change, axis) ** 2 for axis in range(3))) / 32
        step[word] = slope[mask].max()
    assert step["ill-defined margin"] < 0.7 * step["well-defined margin"]


def test_noise_inside_is_that_of_the_organ():
    _, after, organs, mask = paint(said(FLUID, size=50.0))
    inside = after[ndimage.binary_erosion(mask, iterations=3)].std()
    outside = after[(organs == 5) & ~ndimage.binary_dilation(mask, iterations=3)].std()
    assert inside == pytest.approx(outside, rel=0.25)


# Size and place


@pytest.mark.parametrize("size", [(12.0, 12.0, 12.0), (30.0, 20.0, 40.0), (50.0, 44.0, 36.0)])
@pytest.mark.parametrize("shape", ["round-like", "irregular", "spiculated"])
def test_size_is_as_asked_within_a_voxel(size, shape):
    words = {"features": "spiculated margins"} if shape == "spiculated" else {"shape": shape}
    for seed in range(3):
        _, _, _, mask = paint(said(size=size, **words), seed)
        extent = (np.ptp(np.argwhere(mask), axis=0) + 1) * SPACING
        assert np.all(extent <= np.array(size) + SPACING + 1e-6)
        assert np.all(extent >= np.array(size) - (1 if shape == "round-like" else 2) * SPACING - 1e-6)


def test_round_is_convex_and_irregular_is_not():
    def solidity(shape: str) -> list[float]:
        masks = [paint(said(size=40.0, shape=shape), seed)[3] for seed in range(4)]
        return [m.sum() / ConvexHull(np.argwhere(m)).volume for m in masks]

    assert min(solidity("round-like")) > 1  # voxels have a size, a hull of their centres has less
    assert np.mean(solidity("irregular")) < 1


@pytest.mark.parametrize("seed", range(4))
def test_within_stays_in_the_organ_and_protruding_leaves_it_but_spares_others(seed):
    _, _, organs, mask = paint(said(), seed)
    assert (organs[mask] == 5).all()
    _, _, organs, mask = paint(said(cavity=OUTWARD), seed)
    share = (organs[mask] == 5).mean()
    assert 0.3 < share < 0.95
    assert not (organs[mask] == 1).any()


def test_wall_thickening_hugs_the_wall_and_spares_the_lumen():
    words = {"shape": "irregular wall thickening", "cavity": WALL}
    before, after, organs, mask = paint(said("isodense lesion", "stomach", 40.0, **words))
    depth = ndimage.distance_transform_edt(organs == 6) * SPACING
    assert depth[mask].max() < 20 < depth.max()
    assert depth[mask].min() <= SPACING
    assert after[mask].mean() > before[mask].mean() + 5
    protruding = paint(said("isodense lesion", "stomach", 40.0, shape="protrusion into the lumen", cavity=WALL))[3]
    assert depth[protruding].max() > depth[mask].max()
    assert (organs[protruding] == 6).all()


@pytest.mark.parametrize(
    ("location", "axis", "side"),
    [("upper", 2, 1), ("lower", 2, -1), ("anterior", 1, 1), ("left", 0, -1), ("right", 0, 1)],
)
def test_location_words_name_the_half(location, axis, side):
    for seed in range(3):
        _, _, organs, mask = paint(said(size=16.0, location=location), seed)
        organ = np.argwhere(organs == 5)
        middle = (organ.min(0) + organ.max(0)) / 2
        assert side * (np.argwhere(mask).mean(0)[axis] - middle[axis]) >= -0.5


# What stays


@pytest.mark.parametrize(("margin", "reach"), [("well-defined margin", 2.0), ("ill-defined margin", 4.0)])
def test_beyond_the_rim_the_ct_is_untouched(margin, reach):
    before, after, _, mask = paint(said("hyperdense lesion", size=40.0, margin=margin))
    assert after.dtype == before.dtype
    far = ndimage.distance_transform_edt(~mask, sampling=SPACING) > reach
    np.testing.assert_array_equal(after[far], before[far])
    assert (after != before)[mask].mean() > 0.8


def test_painting_is_pure_and_the_same_for_the_same_seed():
    image, organs = block()
    copies = image.copy(), organs.copy()
    first = paint_lesion(image, organs, AFFINE, said(), np.random.default_rng(1))
    again = paint_lesion(image, organs, AFFINE, said(), np.random.default_rng(1))
    other = paint_lesion(image, organs, AFFINE, said(), np.random.default_rng(2))
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(organs, copies[1])
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("axcodes", ["LPS", "PSR", "SAL"])
def test_the_files_orientation_does_not_matter(axcodes):
    image, organs = block()
    report = said(size=(20.0, 30.0, 40.0), location="upper left")
    expected = paint_lesion(image, organs, AFFINE, report, np.random.default_rng(1))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(axcodes))
    )
    turned = [nib.orientations.apply_orientation(x, turn) for x in (image, organs)]
    affine = AFFINE @ nib.orientations.inv_ornt_aff(turn, SHAPE_3D)
    got = paint_lesion(*turned, affine, report, np.random.default_rng(1))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, nib.orientations.apply_orientation(b, turn))


def test_a_ct_of_fractions_keeps_them():
    image, organs = block()
    real = image + np.float32(0.25)
    after, mask = paint_lesion(real, organs, AFFINE, said(), np.random.default_rng(0))
    far = ~ndimage.binary_dilation(mask, iterations=2)
    assert after.dtype == real.dtype
    np.testing.assert_array_equal(after[far], real[far])


def test_what_cannot_be_painted_is_refused_with_the_reason():
    image, organs = block()
    rng = np.random.default_rng(0)
    with pytest.raises(CaseError, match=r"300 x 300 x 300 mm does not fit into the liver: ask for a smaller one"):
        paint_lesion(image, organs, AFFINE, said(size=300.0), rng)
    with pytest.raises(CaseError, match=r"no pancreas \(\[10\]\)"):
        paint_lesion(image, organs, AFFINE, replace(said(), organ="pancreas"), rng)
    with pytest.raises(ValueError, match="no size_mm"):
        paint_lesion(image, organs, AFFINE, replace(said(), size_mm=None), rng)


# Bodies


def test_bodies_have_the_organs_by_totalsegmentators_numbers():
    abdomen = lesion_body(3, COARSE)
    names = {ORGAN_NAMES[n - 1] for n in np.unique(abdomen.organs) if n}
    assert {"liver", "pancreas", "stomach", "colon", "urinary bladder", "small bowel", "duodenum"} <= names
    assert "vertebrae L3" in names
    where = {n: np.argwhere(abdomen.organs == n).mean(0) for n in (2, 5, 6, 14, 17, 104)}
    assert where[5][0] > where[6][0]  # the liver lies on the right
    assert where[17][0] > where[14][0]
    assert where[104][2] < where[5][2]
    chest = lesion_body(3, COARSE, chest=True)
    assert set(np.unique(chest.organs)) == {0, 13, 14, 15, 16, 17}
    np.testing.assert_allclose(np.diag(chest.affine)[:3], np.diag(abdomen.affine)[:3], rtol=0.02)
    upper, lower = (np.argwhere(chest.organs == n).mean(0)[2] for n in (15, 17))
    assert upper > lower


def test_without_contrast_a_liver_is_darker():
    bodies = [lesion_body(number, COARSE) for number in range(10)]
    assert {body.enhanced for body in bodies} == {True, False}
    for body in bodies:
        liver = np.median(body.image[body.organs == 5])
        assert (95 < liver < 125) if body.enhanced else (40 < liver < 65)


def test_drawn_reports_are_true_of_the_drawn_lesion():
    kinds = set()
    for number, chest in ((3, False), (4, False), (5, True)):
        body = lesion_body(number, COARSE, chest)
        for seed in range(5):
            image, mask, report = described(body, np.random.default_rng(seed))
            kinds.add(report.lesion)
            extent = (np.ptp(np.argwhere(mask), axis=0) + 1) * nib.affines.voxel_sizes(body.affine)
            np.testing.assert_allclose(report.size_mm, extent, atol=0.1)
            assert report.attributes[VALUE] == f"{image[mask].mean():.0f} HU"
            assert report.attributes[ENHANCEMENT].startswith("enhanced") == body.enhanced
            assert (report.organ in LUNGS) == chest
    assert len(kinds) > 3


# Cohorts


def digests(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("lesion_*"))}


def test_a_cohort_grows_in_place_and_is_the_prefix_of_a_larger_one(tmp_path):
    lesion_cohort(tmp_path / "small", 2, shape=COARSE, body_every=2)
    small = digests(tmp_path / "small")
    lesion_body.cache_clear()
    lesion_cohort(tmp_path / "large", 4, shape=COARSE, body_every=2)
    large = digests(tmp_path / "large")
    assert len(large) == 16
    assert small == {name: large[name] for name in small}
    lesion_cohort(tmp_path / "small", 4, shape=COARSE, body_every=2)
    assert digests(tmp_path / "small") == large
    with pytest.raises(ValueError, match="name another folder"):
        lesion_cohort(tmp_path / "small", 4, shape=COARSE, body_every=2, crop=16)


def test_cases_are_listed_and_their_files_agree(tmp_path):
    lesion_cohort(tmp_path, 3, shape=COARSE, body_every=3, crop=24)
    cases = list_lesion_cases(tmp_path, need=("image", "organs", "label", "report"))
    assert [case["name"] for case in cases] == ["lesion_0000", "lesion_0001", "lesion_0002"]
    for case in cases:
        image, organs, label = (nib.load(case[key]) for key in ("image", "organs", "label"))
        (report,) = read_reports(case["report"])
        values, lesion = np.asarray(organs.dataobj), np.asarray(label.dataobj)
        assert image.shape == organs.shape == label.shape == (24, 24, 24)
        np.testing.assert_array_equal(image.affine, label.affine)
        assert set(np.unique(lesion)) <= {0, 1, 2}
        assert (lesion == 2).any()
        assert set(np.unique(values[lesion == 1])) <= {organ_id(name) for name in report.organs or (report.organ,)}


def test_healthy_cases_are_what_lesions_are_painted_into(tmp_path):
    lesion_cohort(tmp_path / "ill", 2, shape=COARSE)
    lesion_cohort(tmp_path / "well", 2, shape=COARSE, lesions=False)
    assert not (tmp_path / "well" / "LABEL").exists()
    assert json.loads((tmp_path / "well" / "phantoms.json").read_text())["kind"] == "lesion request"
    for i in range(2):
        name = f"lesion_{i:04d}"
        ill, well, label = (
            np.asarray(nib.load(tmp_path / f / f"{name}.nii.gz").dataobj) for f in ("ill/CT", "well/CT", "ill/LABEL")
        )
        far = ndimage.distance_transform_edt(label != 2) > 2.1
        np.testing.assert_array_equal(ill[far], well[far])
        assert (ill != well).any()
        reports = [(tmp_path / f / "REPORT" / f"{name}.json").read_text() for f in ("ill", "well")]
        assert reports[0] == reports[1]


def test_a_crop_is_cut_from_the_whole(tmp_path):
    lesion_cohort(tmp_path / "whole", 1, shape=COARSE)
    lesion_cohort(tmp_path / "crop", 1, shape=COARSE, crop=20)
    whole, crop = (nib.load(tmp_path / f / "CT/lesion_0000.nii.gz") for f in ("whole", "crop"))
    start = np.rint(np.linalg.inv(whole.affine) @ crop.affine[:, 3])[:3].astype(int)
    part = np.asarray(whole.dataobj)[tuple(slice(a, a + 20) for a in start)]
    np.testing.assert_array_equal(part, np.asarray(crop.dataobj))
    labels = [np.asarray(nib.load(tmp_path / f / "LABEL/lesion_0000.nii.gz").dataobj) for f in ("whole", "crop")]
    assert (labels[0] == 2).sum() == (labels[1] == 2).sum()


def test_every_sixth_body_is_a_chest(tmp_path):
    lesion_cohort(tmp_path, THORAX_EVERY, shape=COARSE, body_every=1, lesions=False)
    chests = [read_reports(tmp_path / "REPORT" / f"lesion_{i:04d}.json")[0].organ in LUNGS for i in range(THORAX_EVERY)]
    assert chests == [False] * (THORAX_EVERY - 1) + [True]


def test_the_writer_draws_what_bodies_can_show():
    rng, present = np.random.default_rng(0), (1, 2, 3, 5, 6, 10, 57, 104)
    assert {organ_id(draw_report(rng, present).organ) for _ in range(60)} <= set(present)
