"""Boxes inside organs, lesions out of soft masks: laws, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from common import lesion_boxes
from common.io import CaseError
from common.lesion_boxes import (
    Box,
    binarise,
    box_centres,
    box_size,
    centre_of,
    components,
    least_voxels,
    place_box,
    plausible_fill,
    target_numbers,
    target_organ,
)
from common.lesion_words import INSIDE as WITHIN
from common.lesion_words import LUMEN, WALL
from common.lesion_words import OUTWARD as PROTRUDING


def ellipsoid(shape: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    places = np.indices(shape).T - np.array(centre)
    return (((places / radii) ** 2).sum(axis=-1) <= 1).T


ORGAN = ellipsoid((40, 36, 44), (20, 17, 22), (14, 12, 16))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def boxes(n: int = 60, **wanted) -> list[Box]:
    """Many draws."""
    wanted = {"organ": ORGAN, "size": (5, 6, 7), "hollow": False, "cavity": WITHIN, **wanted}
    draw = rng(1)
    return [place_box(**wanted, rng=draw) for _ in range(n)]


# ------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 4, 7), (6, 7, 4), (8, 3, 5)])
def test_a_box_has_its_exact_size(size):
    """The reference loses a voxel of odd sizes, and a box of size 1 is empty."""
    box = Box.around((12, 12, 10), size)
    mask = box.mask((26, 24, 22))
    assert mask.sum() == box.voxels == np.prod(size)
    assert Box.of(mask) == box
    theirs = np.prod([2 * (n // 2) for n in size])
    assert theirs < mask.sum()
    assert mask[12, 12, 10]


def test_boxes_move_grow_and_end_with_the_volume():
    box = Box((-1, 2, 3), (3, 3, 3))
    assert box.mask((4, 4, 4)).sum() == 2 * 2 * 1
    assert box.moved((1, -2, -3)) == Box((0, 0, 0), (3, 3, 3))
    assert box.grown(1) == Box((-2, 1, 2), (5, 5, 5))
    assert Box((4, 4, 4), (4, 5, 1)).centre == (5, 6, 4)
    with pytest.raises(ValueError, match="at least one voxel"):
        Box((0, 0, 0), (1, 0, 1))
    with pytest.raises(ValueError, match="empty"):
        Box.of(np.zeros((3, 3, 3), dtype=bool))


def test_sizes_of_reports_are_in_mm_and_turned():
    """Reports say left-right, front-back, head-foot; networks see S, A, L."""
    assert box_size((30, 20, 10), 1.0) == (10, 20, 30)
    assert box_size((30, 20, 10), 3.0) == (3, 7, 10)
    assert box_size((1, 1, 1), (5.0, 3.0, 3.0)) == (1, 1, 1)


def test_within_the_organ_means_all_of_the_ellipsoid_in_the_box():
    """The published rule, all of the box, refuses lesions that a thin organ does hold."""
    for size in ((5, 6, 7), (23, 19, 27)):
        middle, radii = [(n - 1) / 2 for n in size], [n / 2 for n in size]
        for box in boxes(size=size):
            assert box.size == size
            assert ORGAN[box.slices][ellipsoid(size, middle, [r - 0.75 for r in radii])].all()
    assert not any(ORGAN[box.slices].all() for box in boxes(size=(23, 19, 27)))


def test_protruding_crosses_the_surface():
    for box in boxes(cavity="protruding from the parenchymal organ,"):
        assert 0 < ORGAN[box.slices].sum() < box.voxels
        assert ORGAN[tuple(a + n // 2 for a, n in zip(box.start, box.size))]


def test_hollow_organs_have_a_lumen_and_a_wall():
    """Reference defect 6: the report's cavity was thrown away, so bladders never got their wall."""
    core = ndimage.binary_erosion(ORGAN, iterations=3)
    for cavity, region in ((LUMEN, core), (WALL, ORGAN & ~core)):
        centres = box_centres(ORGAN, (3, 3, 3), hollow=True, cavity=cavity, wall=3)
        assert {tuple(c) for c in centres} == {tuple(c) for c in np.argwhere(region)}
    thin = ellipsoid((20, 20, 20), (9, 9, 9), (3, 3, 3))
    for cavity in (LUMEN, WALL):
        assert len(box_centres(thin, (3, 3, 3), hollow=True, cavity=cavity)) == thin.sum()


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 4), (9, 8, 7)])
@pytest.mark.parametrize(("hollow", "cavity"), [(True, WALL), (True, LUMEN), (False, PROTRUDING), (False, "")])
def test_boxes_stay_in_the_scan(size, hollow, cavity):
    cut = np.zeros((16, 15, 14), dtype=bool)
    cut[8:, :7] = True  # an organ that the scan cuts
    for box in boxes(organ=cut, size=size, hollow=hollow, cavity=cavity):
        assert min(box.start) >= 0
        assert all(a + n <= s for a, n, s in zip(box.start, box.size, cut.shape))


@pytest.mark.parametrize(
    ("location", "axis", "side"),
    [
        ("upper pole", 0, 1),
        ("Inferior", 0, -1),
        ("anterior part", 1, 1),
        ("posterior", 1, -1),
        ("left", 2, 1),
        ("right lobe", 2, -1),
    ],
)
@pytest.mark.parametrize("cavity", [WITHIN, PROTRUDING])
def test_location_words_choose_a_half_of_the_organ(location, axis, side, cavity):
    """Index grows towards superior, anterior and the patient's left."""
    middle = [20, 17, 22][axis]
    for box in boxes(location=location, cavity=cavity):
        assert side * (box.start[axis] + box.size[axis] // 2 - middle) >= 0


def test_central_is_deep_and_words_add_up():
    depth = ndimage.distance_transform_edt(ORGAN)
    for location, side in (("central", 1), ("peripheral", -1), ("upper, peripheral", -1)):
        for box in boxes(location=location, cavity="", size=(3, 3, 3)):
            centre = tuple(a + 1 for a in box.start)
            assert side * (depth[centre] - depth.max() / 2) >= 0
            assert "upper" not in location or centre[0] >= 20


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"organ": np.zeros((8, 8, 8), dtype=bool)}, "no voxel of it in the organ map"),
        ({"size": (0, 3, 3)}, "has no extent"),
        ({"size": (20, 6, 7), "limit": (16, 16, 16)}, "20x6x7 voxels .* larger than the crop .* 16x16x16"),
        ({"size": (50, 6, 7)}, "larger than the scan, 40x36x44"),
        ({"size": (34, 30, 38)}, "fits nowhere within the parenchymal organ: .* would"),
        ({"size": (18, 18, 18), "location": "peripheral"}, "fits nowhere .* in its part 'peripheral'"),
        ({"location": "upper and lower"}, "contradicts itself"),
        ({"location": "segment VII"}, "names no part of an organ: use upper"),
    ],
)
def test_impossible_requests_are_refused_with_the_reason(wanted, reason):
    with pytest.raises(CaseError, match=f"liver: .*{reason}"):
        boxes(1, name="liver", **wanted)


def test_the_size_that_is_suggested_fits_and_a_larger_does_not():
    with pytest.raises(CaseError) as error:
        boxes(1, size=(34, 30, 38))
    size = tuple(int(n) for n in str(error.value).split(": ")[-1].split(" would")[0].split("x"))
    assert boxes(1, size=size)
    with pytest.raises(CaseError):
        boxes(1, size=tuple(n + 1 for n in size))
    # The reference puts it anywhere, without a word.
    assert boxes(1, size=(34, 30, 38), reference=True)


def test_placing_costs_the_organ_not_the_scan(monkeypatch):
    seen = []
    fits = lesion_boxes._fits
    monkeypatch.setattr(lesion_boxes, "_fits", lambda organ, size: seen.append(organ.shape) or fits(organ, size))
    scan = np.zeros((200, 180, 160), dtype=bool)
    scan[100:140, 100:136, 100:144] = ORGAN
    boxes(1, organ=scan)
    assert seen == [tuple(s.stop - s.start for s in Box.of(scan).slices)]


def test_the_same_seed_draws_the_same_box():
    assert boxes(5) == boxes(5)
    assert len(set(boxes(60))) > 40


# ------------------------------------------------------------------------------------------------------------- masks


def soft_lesion(sharpness: float = 0.15, seed: int = 0) -> tuple[np.ndarray, Box]:
    """What a network draws: a smooth blob, larger than it should be, with specks far away."""
    noise = ndimage.gaussian_filter(rng(seed).normal(size=(24, 24, 24)), 1)
    distance = np.linalg.norm(np.indices((24, 24, 24)).T - 11.5, axis=-1).T
    soft = 1 / (1 + np.exp((distance / 7 - 1) / sharpness)) + 0.3 * noise
    soft[1:4, 1:4, 1:4] = 2
    return soft, Box((6, 6, 6), (12, 12, 12))


@pytest.mark.parametrize("fill", [None, 0.3, plausible_fill("round-like,")])
def test_a_mask_aims_at_a_plausible_fill_of_its_box(fill):
    """Reference defect 11: it aims at all of the box, anywhere."""
    soft, box = soft_lesion()
    ours = binarise(soft, box, fill=fill)
    assert ours.voxels == ours.mask.sum()
    assert ours.voxels / box.voxels == pytest.approx(fill or 0.4, abs=0.12)
    assert ours.accepted
    assert not (ours.mask & ~box.grown(1).mask(soft.shape)).any()
    assert ndimage.label(ours.mask)[1] == 1
    theirs = binarise(soft, box, reference=True)
    assert theirs.voxels / box.voxels > 0.7
    assert theirs.aim == box.voxels


def test_a_mask_stays_in_the_organ_and_off_earlier_lesions():
    soft, box = soft_lesion()
    organ = np.zeros(soft.shape, dtype=bool)
    organ[:, :14] = True
    ours = binarise(soft, box, allowed=organ)
    assert ours.accepted
    assert not (ours.mask & ~organ).any()
    refused = binarise(soft, box, taken=ours.mask)
    assert refused.overlaps
    assert not refused.accepted


def test_what_is_too_small_is_drawn_again():
    """400 mm3, 50 of a stone, at any spacing; and never more than half of what was asked."""
    assert [least_voxels(), least_voxels(stone=True), least_voxels(3.0), least_voxels((3.0, 3.0, 3.0), True)] == [
        400,
        50,
        15,
        2,
    ]
    soft, box = soft_lesion()
    assert not binarise(np.zeros_like(soft), box).accepted
    small = Box((10, 10, 10), (4, 4, 4))
    assert binarise(soft, small).accepted  # 26 voxels are what was asked; the reference would refuse
    faint = np.where(soft > 1.02, soft, 0)
    assert not binarise(faint, box).accepted


def test_lesions_largest_first():
    labels = np.zeros((20, 40, 10), dtype=bool)
    for k, n in enumerate((3, 6, 4, 5, 2)):
        labels[2:, 8 * k :][:n, :n, :n] = True
    found = components(labels)
    assert [c.voxels for c in found] == [216, 125, 64]
    for lesion in found:
        whole = lesion.in_volume(labels.shape)
        assert whole.sum() == lesion.voxels
        assert Box.of(whole) == lesion.box
        assert (whole <= labels).all()
    assert [c.voxels for c in components(labels, max_count=2)] == [216, 125]
    assert [c.voxels for c in components(labels, max_count=9)] == [216, 125, 64]
    assert [c.voxels for c in components(labels, min_voxels=1000)] == [216]
    assert components(np.zeros((4, 4, 4), dtype=bool)) == []


def test_the_centre_is_that_of_the_largest_lesion():
    labels = np.zeros((20, 20, 20), dtype=bool)
    labels[0, 0, 0] = labels[8:12, 3:8, 17] = True
    assert centre_of(labels) == (9, 5, 17)
    with pytest.raises(CaseError, match="no lesion"):
        centre_of(np.zeros((4, 4, 4), dtype=bool))


def test_a_lesions_size_is_measured_not_read():
    """Reference defect 20: the demo reports' sizes do not match their lesions; boxes of labels are measured."""
    labels = np.zeros((30, 30, 30), dtype=bool)
    labels[3:12, 4:10, 5:17] = ellipsoid((9, 6, 12), (4, 2.5, 5.5), (4.5, 3, 6))
    (lesion,) = components(labels)
    assert lesion.box.size == (9, 6, 12)
    assert 0.2 < lesion.voxels / lesion.box.voxels < 0.7


def test_the_organ_a_report_speaks_of():
    organs = np.zeros((10, 10, 10), dtype=np.uint8)
    organs[:5], organs[5:, :5], organs[5:, 5:] = 2, 13, 14
    region = Box((4, 0, 0), (4, 3, 3)).mask(organs.shape)
    assert target_numbers(organs, [2, 104], region) == [2]
    assert target_numbers(organs, [13, 14], region) == [13, 14]
    assert np.array_equal(target_organ(organs, [2, 3], region), organs == 2)
    assert np.array_equal(target_organ(organs, [13, 14], region), organs > 2)
