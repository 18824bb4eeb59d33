"""TotalSegmentator's classes, the organs made of them, tumours pasted, bodies found."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, Orientation

from common.io import CaseError
from common.totalsegmentator import (
    BODY,
    CANCER,
    ORGANS,
    TOTAL_V1,
    TOTAL_V2,
    VERTEBRAE,
    MapOrgansd,
    find_body,
    organ_table,
)

REPO = Path(__file__).resolve().parent.parent
PUBLISHED = Path(os.environ.get("PARITY_DIR", REPO.parent / "shared" / "parity")) / "guidegen" / "dev_misc.json"
TORSO = REPO.parent / "shared" / "data" / "ct_totalseg_torso"

CLASSES = {"v1": TOTAL_V1, "v2": TOTAL_V2}
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
SPLEEN, LIVER = ORGANS.index("spleen"), ORGANS.index("liver")


def volume(values: Any, name: str = "seg.nii.gz", affine: np.ndarray = AFFINE) -> MetaTensor:
    """A channel-first image, as the loader hands it on."""
    tensor = torch.as_tensor(np.asarray(values), dtype=torch.float32)[None]
    return MetaTensor(tensor, affine=torch.as_tensor(affine), meta={"filename_or_obj": name})


def trunk() -> tuple[np.ndarray, np.ndarray]:
    """CT and inside of the skin: a cylinder with gas, a lung open at the top, and a couch behind."""
    x, y, _ = np.ogrid[:20, :24, :10]
    inside = np.broadcast_to((x - 9.5) ** 2 + (y - 11.5) ** 2 < 64, (20, 24, 10))
    image = np.where(inside, 40.0, -1000.0)
    image[8:11, 10:13, 3:6] = -990  # gas, closed on all sides
    image[5:8, 12:15, 7:] = -850  # lung, open at the last slice
    image[2:18, 22] = 100
    return image, inside


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_every_class_once_and_in_pairs() -> None:
    assert len(TOTAL_V1) == 104
    assert len(TOTAL_V2) == 117
    for classes in CLASSES.values():
        assert len(set(classes)) == len(classes)
        left = {name.replace("left", "*") for name in classes if "left" in name}
        right = {name.replace("right", "*") for name in classes if "right" in name}
        # Unpaired: a lung's middle lobe, the trunk's one artery, the atrial appendage.
        assert left ^ right <= {"lung_middle_lobe_*", "atrial_appendage_*"}


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("v1", {"spleen": 1, "kidney_right": 2, "kidney_left": 3, "liver": 5, "stomach": 6, "pancreas": 10}),
        ("v1", {"small_bowel": 55, "duodenum": 56, "colon": 57, "urinary_bladder": 104}),
        ("v1", {"vertebrae_L5": 18, "vertebrae_C1": 41, "rib_left_1": 58, "rib_right_12": 81, "sacrum": 92}),
        ("v2", {"spleen": 1, "kidney_right": 2, "kidney_left": 3, "liver": 5, "stomach": 6, "pancreas": 7}),
        ("v2", {"small_bowel": 18, "duodenum": 19, "colon": 20, "urinary_bladder": 21, "sacrum": 25}),
        ("v2", {"vertebrae_S1": 26, "vertebrae_C1": 50, "rib_left_1": 92, "costal_cartilages": 117}),
    ],
)
def test_numbers_are_totalsegmentators(version: str, numbers: dict[str, int]) -> None:
    assert {name: CLASSES[version].index(name) + 1 for name in numbers} == numbers


@pytest.mark.parametrize("version", CLASSES)
def test_organs_keep_their_names_and_all_else_is_bone_or_body(version: str) -> None:
    table = organ_table(version)
    assert list(table) == list(range(1, len(CLASSES[version]) + 1))
    for number, value in table.items():
        name = CLASSES[version][number - 1]
        spine = name.startswith("vertebrae") or name == "sacrum"
        assert ORGANS[value] == (name if name in ORGANS else "vertebrae" if spine else "body")
    # Each soft organ is one class; the tumour is none of TotalSegmentator's.
    counts = Counter(table.values())
    assert [counts[value] for value in range(1, CANCER)] == [1] * 10
    assert counts[CANCER] == 0
    assert counts[VERTEBRAE] == {"v1": 25, "v2": 26}[version]


def test_unknown_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of v1, v2, got 'v3'"):
        organ_table("v3")
    for table in ("totalsegmentator", "totalsegmentator_v3", "v1"):
        with pytest.raises(ValueError, match=r"must be one of guidegen, totalsegmentator_v1.*got"):
            MapOrgansd("seg", table)


def test_installed_package_agrees() -> None:
    package = pytest.importorskip("totalsegmentator.map_to_binary", reason="totalsegmentator is not installed")
    maps = package.class_map
    if "total_v1" not in maps:  # 1.x, whose draft of v2 was numbered otherwise
        assert dict(enumerate(TOTAL_V1, start=1)) == maps["total"]
        return
    assert dict(enumerate(TOTAL_V1, start=1)) == maps["total_v1"]
    assert dict(enumerate(TOTAL_V2, start=1)) == maps["total"]


def test_publications_map_by_twelve_classes() -> None:
    if not PUBLISHED.is_file():
        pytest.skip(f"no {PUBLISHED}: set PARITY_DIR to the folder of reference numbers")
    published = json.loads(PUBLISHED.read_text())
    labels = np.array(published["totalseg_v1_labels"])
    data = {"seg": volume(labels[:, None, None])}
    ours = MapOrgansd("seg", "totalsegmentator_v1", num_classes=12)(data)["seg"]
    assert ours[0, :, 0, 0].tolist() == published["stage1_map"]
    assert published["stage1_tumour_label"] == CANCER


# ---------------------------------------------------------------------------------------------------------------------
# Mapping


@pytest.mark.parametrize("version", CLASSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_volume_is_mapped_voxel_by_voxel(version: str, dtype: torch.dtype) -> None:
    table = {0: 0, **organ_table(version)}
    numbers = np.random.default_rng(0).integers(0, len(table), (7, 8, 9))
    data = {"seg": volume(numbers).to(dtype), "name": "a"}
    mapped = MapOrgansd("seg", f"totalsegmentator_{version}")(data)
    expected = np.vectorize(table.__getitem__)(numbers)
    np.testing.assert_array_equal(mapped["seg"][0], expected)
    assert mapped["seg"].dtype == dtype
    assert mapped["seg"].meta["filename_or_obj"] == "seg.nii.gz"
    np.testing.assert_array_equal(mapped["seg"].affine, AFFINE)
    assert mapped["name"] == "a"
    np.testing.assert_array_equal(data["seg"][0], numbers)  # the input is as it was


def test_ours_is_left_as_it_is_and_mapping_twice_is_mapping_once() -> None:
    numbers = np.arange(14).reshape(1, 2, 7)
    same = MapOrgansd("seg", "guidegen")
    np.testing.assert_array_equal(same({"seg": volume(numbers)})["seg"][0], numbers)
    once = MapOrgansd("seg", "totalsegmentator_v2")({"seg": volume(np.arange(118).reshape(2, 1, 59))})
    assert torch.equal(same(once)["seg"], once["seg"])


def test_own_table_with_numbers_as_json_writes_them() -> None:
    numbers = np.array([[[0, 6, 300]]])
    for table in ({6: LIVER, 300: SPLEEN}, {"6": LIVER, "300": SPLEEN}):
        assert MapOrgansd("seg", table)({"seg": volume(numbers)})["seg"].flatten().tolist() == [0, LIVER, SPLEEN]
    for table in ({6: 14}, {6: -1}, {-6: 4}, {2**16: 4}):
        with pytest.raises(ValueError, match=r"table entries .* cannot be used: numbers lie in .* values in 0 .. 13"):
            MapOrgansd("seg", table)


@pytest.mark.parametrize(
    ("table", "number"),
    [("totalsegmentator_v1", 105), ("totalsegmentator_v2", 118), ("guidegen", 14), ({6: 4}, 5), ({6: 4}, -1)],
)
def test_unknown_numbers_name_the_file_and_themselves(table: Any, number: int) -> None:
    numbers = np.zeros((3, 4, 5))
    numbers[1, 2, 3], numbers[2, 2, 2] = number, 10**6
    with pytest.raises(CaseError, match=rf"seg.nii.gz holds labels \[{number}, 1000000\] that are not in the .*table"):
        MapOrgansd("seg", table)({"seg": volume(numbers)})


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, -np.inf])
def test_fractional_numbers_are_refused(value: float) -> None:
    with pytest.raises(CaseError, match=r"seg.nii.gz holds fractional values.*nearest"):
        MapOrgansd("seg", "guidegen")({"seg": volume(np.full((2, 2, 2), value))})


@pytest.mark.parametrize("num_classes", [2, 11, 12, 13, 14])
def test_values_beyond_the_classes_become_background(num_classes: int) -> None:
    numbers = np.arange(14).reshape(2, 7, 1)
    few = MapOrgansd("seg", "guidegen", num_classes=num_classes)({"seg": volume(numbers)})["seg"][0]
    np.testing.assert_array_equal(few, np.where(numbers < num_classes, numbers, 0))


@pytest.mark.parametrize("num_classes", [1, 15])
def test_impossible_number_of_classes(num_classes: int) -> None:
    with pytest.raises(ValueError, match=r"num_classes must lie in 2 .. 14"):
        MapOrgansd("seg", "guidegen", num_classes=num_classes)


def test_mirrored_file_keeps_left_left() -> None:
    numbers = np.zeros((9, 8, 7))
    numbers[1:3, 2:4, 3:5], numbers[6:8, 2:4, 3:5] = 3, 2
    mirror = np.array([[-2.0, 0, 0, 16], [0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]])
    mapped = {}
    for name, image in (("plain", volume(numbers)), ("mirrored", volume(numbers[::-1].copy(), affine=mirror))):
        seg = MapOrgansd("seg", "totalsegmentator_v1")({"seg": image})["seg"]
        centre = {v: seg.affine.numpy()[0, :3] @ (seg[0].numpy() == v).nonzero() for v in (2, 3)}
        assert centre[3].mean() < centre[2].mean()
        mapped[name] = Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(seg)
    assert torch.equal(mapped["plain"].as_tensor(), mapped["mirrored"].as_tensor())


# ---------------------------------------------------------------------------------------------------------------------
# Tumour


def test_tumour_lies_over_organs_and_nothing_else_changes() -> None:
    numbers = np.full((6, 6, 6), 57)
    mask = np.zeros((6, 6, 6))
    mask[2:4, 2:4, 2:4], mask[0, 0, 0], mask[5, 5, 5] = 1, 0.5, 0.6
    data = {"seg": volume(numbers), "tumour": volume(mask, "tumour.nii.gz")}
    transform = MapOrgansd("seg", "totalsegmentator_v1", lesion="tumour")
    seg = transform(data)["seg"][0]
    np.testing.assert_array_equal(seg, np.where(mask > 0.5, CANCER, ORGANS.index("colon")))
    assert not (transform({"seg": data["seg"]})["seg"] == CANCER).any()  # a patient without
    np.testing.assert_array_equal(data["tumour"][0], mask.astype(np.float32))


@pytest.mark.parametrize("role", ["lesion", "image"])
def test_other_grids_are_refused(role: str) -> None:
    transform = MapOrgansd("seg", "guidegen", **{role: "other"})
    seg = volume(np.zeros((4, 4, 4)))
    with pytest.raises(CaseError, match=r"b.nii and seg.nii.gz have different shapes, \(4, 4, 5\) and \(4, 4, 4\)"):
        transform({"seg": seg, "other": volume(np.ones((4, 4, 5)), "b.nii")})
    with pytest.raises(CaseError, match=r"b.nii and seg.nii.gz have different affines: resample"):
        transform({"seg": seg, "other": volume(np.ones((4, 4, 4)), "b.nii", np.diag([2.0, 3, 5, 1]))})


# ---------------------------------------------------------------------------------------------------------------------
# Body


def test_body_is_all_inside_the_skin_without_the_couch() -> None:
    image, inside = trunk()
    np.testing.assert_array_equal(find_body(image), inside)
    assert not find_body(np.full((4, 4, 4), -1000.0)).any()
    assert not find_body(np.full((4, 4, 4), np.nan)).any()
    assert find_body(np.zeros((4, 4, 4))).all()


def test_body_fills_background_only() -> None:
    image, inside = trunk()
    numbers = np.zeros(image.shape)
    numbers[8:11, 10:13, 3:6], numbers[0, 0, 0] = 57, 5  # colon full of gas; a stray voxel in the air
    mask = np.zeros(image.shape)
    mask[9, 13, 4] = 1
    data = {"seg": volume(numbers), "ct": volume(image, "ct.nii"), "tumour": volume(mask)}
    seg = MapOrgansd("seg", "totalsegmentator_v1", lesion="tumour", image="ct")(data)["seg"][0].numpy()
    np.testing.assert_array_equal(seg > 0, inside | (numbers > 0))
    np.testing.assert_array_equal(seg == ORGANS.index("colon"), numbers == 57)
    np.testing.assert_array_equal(seg == CANCER, mask > 0)  # in what would be body
    assert seg[0, 0, 0] == LIVER
    np.testing.assert_array_equal(data["seg"][0], numbers)
    np.testing.assert_array_equal(data["ct"][0], image.astype(np.float32))


def test_without_image_body_stays_as_labelled() -> None:
    numbers = np.array([[[0, 7, 13]]])
    data = {"seg": volume(numbers)}
    for image in (None, "ct"):
        seg = MapOrgansd("seg", "totalsegmentator_v1", image=image)(data)["seg"]
        assert seg.flatten().tolist() == [0, BODY, BODY]


def test_image_without_body_is_refused() -> None:
    data = {"seg": volume(np.zeros((4, 4, 4))), "ct": volume(np.full((4, 4, 4), -1000.0), "ct.nii")}
    with pytest.raises(CaseError, match=r"ct.nii holds nothing above -300.*Hounsfield"):
        MapOrgansd("seg", "guidegen", image="ct")(data)
    assert not MapOrgansd("seg", "guidegen", image="ct", num_classes=12)(data)["seg"].any()  # nobody asks for it


def test_threshold_decides() -> None:
    image = np.full((8, 8, 3), -1000.0)
    image[2:6, 2:6] = -400
    assert not find_body(image).any()
    assert find_body(image, above=-500).sum() == 4 * 4 * 3


# ---------------------------------------------------------------------------------------------------------------------
# A patient


def test_torso_of_a_patient() -> None:
    if not TORSO.is_dir():
        pytest.skip(f"no {TORSO}")
    load = LoadImage(image_only=True, ensure_channel_first=True)
    data = {"seg": load(TORSO / "seg_v1_104.nii.gz"), "ct": load(TORSO / "ct.nii.gz")}
    mapped = MapOrgansd("seg", "totalsegmentator_v1", image="ct")(data)["seg"]
    seg = mapped[0].numpy().astype(int)
    litres = np.bincount(seg.ravel(), minlength=14) * abs(np.linalg.det(mapped.affine.numpy())) / 1e6
    limits = {"spleen": (0.05, 0.8), "kidney_right": (0.05, 0.4), "kidney_left": (0.05, 0.4), "pancreas": (0.02, 0.2)}
    limits |= {"colon": (0.1, 2.5), "small_bowel": (0.1, 2.5), "urinary_bladder": (0.02, 1.0), "vertebrae": (0.2, 1.5)}
    limits |= {"liver": (0.8, 2.5), "stomach": (0.02, 1.5), "duodenum": (0.02, 0.3), "body": (10, 60)}
    for name, (low, high) in limits.items():
        value = ORGANS.index(name)
        whole = not (seg == value)[..., [0, -1]].any() or name == "body"
        assert not whole or low < litres[value] < high, (name, litres[value])

    where = {name: np.argwhere(seg == ORGANS.index(name)).mean(0) for name in limits}
    assert where["liver"][0] > where["spleen"][0]  # index 0 grows to the patient's right
    assert where["kidney_right"][0] > where["kidney_left"][0]
    assert where["urinary_bladder"][2] < where["kidney_left"][2] < where["liver"][2]
    assert where["vertebrae"][1] < where["stomach"][1]

    body, organs = find_body(data["ct"][0].numpy()), (seg > 0) & (seg != BODY)
    assert (body & organs).sum() > 0.999 * organs.sum()
    assert 0.3 < body.mean() < 0.95
