"""Dictionary transforms: loading and checking, layouts and conditions, columns, nodules, crops, pasting back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.data.image_reader import PILReader
from monai.transforms import Compose, CopyItemsd, Invertd, Orientationd, Resized
from PIL import Image
from scipy import ndimage

from common.io import CaseError, case_seed
from common.transforms import (
    CheckCased,
    ColumnScaled,
    ColumnUnscaled,
    CropNoduled,
    FillMissingImaged,
    FillMissingLayoutd,
    FromMaskd,
    FromPictured,
    KeepGivend,
    LayoutToConditiond,
    LoadCased,
    MapLayoutd,
    PasteBackd,
    PlaceNoduled,
    RandMaskd,
    ToMaskd,
    ToPictured,
)

AFFINE = np.array([[0, -2.0, 0, 5], [1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])


def volume(values: Any, name: str = "scan.nii", affine: np.ndarray = AFFINE) -> MetaTensor:
    """A channel-first image, as the loader hands it on."""
    tensor = torch.as_tensor(np.asarray(values), dtype=torch.float32)[None]
    return MetaTensor(tensor, affine=torch.as_tensor(affine), meta={"filename_or_obj": name})


def chest(shape: tuple[int, int, int] = (20, 22, 24), nodule: tuple[slice, ...] | None = None) -> np.ndarray:
    """A layout: a block of lung with an optional nodule."""
    labels = np.zeros(shape, dtype=np.uint8)
    labels[2:-2, 3:-3, 4:-4] = 1
    if nodule is not None:
        labels[nodule] = 2
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Loading and checking


def test_loading_skips_missing_keys_and_names_unreadable_files(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(chest(), AFFINE), tmp_path / "a.nii.gz")
    load = LoadCased(["image", "layout"])
    loaded = load({"layout": str(tmp_path / "a.nii.gz"), "seed": 1})
    assert loaded["layout"].shape == (1, 20, 22, 24)
    assert loaded["seed"] == 1
    np.testing.assert_allclose(loaded["layout"].affine, AFFINE)

    whole = (tmp_path / "a.nii.gz").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"<html>not found</html>"):
        (tmp_path / "b.nii.gz").write_bytes(damaged)
        with pytest.raises(
            CaseError, match=r"cannot read .*b\.nii\.gz \(.*\): the file is damaged.*replace it"
        ) as error:
            load({"image": str(tmp_path / "b.nii.gz"), "layout": str(tmp_path / "a.nii.gz")})
        assert len(str(error.value).splitlines()) == 1


def broken(value: float) -> np.ndarray:
    values = np.zeros((4, 4, 4))
    values[1, 2, 3] = value
    return values


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (volume(broken(np.nan)), r"scan.nii holds 1 .*NaN.*replace them"),
        (volume(broken(-np.inf)), r"holds 1 .*infinite"),
        (volume(broken(1e5)), r"holds 1 .*outside \[-32768, 32767\]"),
        (volume(np.zeros((4, 4))), r"has shape \(4, 4\), expected one 3-D volume: split or select it"),
        (MetaTensor(torch.zeros(2, 4, 4, 4)), r"has shape \(2, 4, 4, 4\), expected one 3-D volume"),
        (volume(np.zeros((4, 4, 1))), r"has shape \(4, 4, 1\), expected at least 2 voxels on every axis"),
        (volume(np.zeros((4, 0, 4))), r"expected at least 2 voxels"),
        (volume(np.zeros((4, 4, 4)), affine=np.diag([1, 0, 1, 1])), "affine that cannot be inverted"),
    ],
)
def test_unusable_volumes_are_refused(image: MetaTensor, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        CheckCased("image")({"image": image})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            volume(np.zeros((4, 4, 5)), "seg.nii"),
            r"seg.nii and scan.nii have different shapes, \(4, 4, 5\) and \(4, 4, 4\)",
        ),
        (volume(np.zeros((4, 4, 4)), "seg.nii", np.eye(4)), "seg.nii and scan.nii have different affines: resample"),
    ],
)
def test_one_grid_is_demanded(other: MetaTensor, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        CheckCased(["image", "layout"])({"image": volume(np.zeros((4, 4, 4))), "layout": other})


def test_a_good_case_passes_unchanged() -> None:
    data = {"image": volume(broken(-32768)), "layout": volume(broken(2)), "name": "a"}
    assert CheckCased(["image", "layout", "nodule"])(data) == data
    CheckCased("image", spatial_dims=2)({"image": MetaTensor(torch.zeros(1, 4, 4))})


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def test_any_labels_become_the_bundles() -> None:
    values = np.zeros((3, 3, 3))
    values[0] = [[10, 11, 12], [13, 14, 200], [55, 0, 0]]
    # The order in which the user names the classes does not matter.
    labels = {"nodule": 200, "lung": [10, 11, 12, 13, 14]}
    mapped = MapLayoutd("layout", labels, other="background", classes=["lung", "nodule"])({"layout": volume(values)})[
        "layout"
    ]
    assert mapped[0, 0].tolist() == [[1, 1, 1], [1, 1, 2], [0, 0, 0]]
    np.testing.assert_allclose(mapped.affine, AFFINE)
    with pytest.raises(CaseError, match=r"scan.nii holds labels \[55\] .*--labels .*--other_labels background"):
        MapLayoutd("layout", labels, classes=["lung", "nodule"])({"layout": volume(values)})


def test_a_separate_mask_is_painted_over() -> None:
    mask = np.zeros((20, 22, 24))
    mask[8:10, 8:10, 8:10] = 255
    transform = MapLayoutd("layout", {"lung": [1], "nodule": [2]}, masks={"nodule": "nodule"})
    data = {"layout": volume(chest())}
    assert (transform({**data, "nodule": volume(mask)})["layout"] == 2).sum() == 8
    assert (transform(data)["layout"] == 2).sum() == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (chest() * 0, "holds none of the labels .*the layout is empty; set --labels"),
        (chest() * 0.5, "holds fractional values: a layout has whole-numbered labels; resample it with nearest"),
        (chest() * 7, r"holds labels \[7\] that belong to no class"),
    ],
)
def test_unusable_layouts_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(CaseError, match=f"seg.nii {message}"):
        MapLayoutd("layout", {"lung": [1], "nodule": [2]})({"layout": volume(values, "seg.nii")})


def test_wrong_arguments_are_refused_at_the_door() -> None:
    with pytest.raises(ValueError, match="other_labels must be 'error' or 'background', got 'drop'"):
        MapLayoutd("layout", {"lung": [1]}, other="drop")
    with pytest.raises(ValueError, match="labels name lungs, nodule, expected exactly lung, nodule"):
        MapLayoutd("layout", {"lungs": [1], "nodule": [2]}, classes=["lung", "nodule"])
    with pytest.raises(ValueError, match="nodules must be 'keep', 'move' or 'add', got 'draw'"):
        PlaceNoduled("layout", mode="draw")


def test_a_missing_image_is_unknown_everywhere() -> None:
    layout = volume(chest())
    data = FillMissingImaged("image", "layout")({"layout": layout})
    assert data["image"].isnan().all()
    np.testing.assert_allclose(data["image"].affine, AFFINE)
    assert FillMissingImaged("image", "layout")({"layout": layout, "image": layout})["image"] is layout


def test_a_missing_layout_is_a_frame_of_minus_one_around_the_worlds_origin() -> None:
    fill = FillMissingLayoutd("layout", (6, 5, 4), (360, 270, 384))
    data = {"report": "no tumour"}
    frame = fill(data)["layout"]
    assert frame.shape == (1, 6, 5, 4)
    assert (frame == -1).all()
    assert "layout" not in data
    affine = np.asarray(frame.affine)
    np.testing.assert_allclose(np.diag(affine), [60, 54, 96, 1])
    corners = [affine @ [*c, 1] for c in ((-0.5, -0.5, -0.5), (5.5, 4.5, 3.5))]
    np.testing.assert_allclose(corners, [[-180, -135, -192, 1], [180, 135, 192, 1]])
    assert torch.equal(Orientationd("layout", axcodes="RAS", labels=None)(fill(data))["layout"], frame), "it is RAS"
    whole = FillMissingLayoutd("layout", [2, 2, 2], [3, 3, 3])({})["layout"]
    np.testing.assert_allclose(np.diag(whole.affine), [1.5, 1.5, 1.5, 1])


def test_a_layout_that_is_there_is_kept() -> None:
    layout = volume(chest())
    assert FillMissingLayoutd("layout", (6, 5, 4), (1, 1, 1))({"layout": layout})["layout"] is layout


def test_what_a_case_brought_stays_and_what_it_lacked_is_what_was_drawn() -> None:
    keep = KeepGivend("pred", "label")
    drawn, brought = volume(chest() * 0 + 3, "drawn.nii"), volume(chest(), "seg.nii")
    data = {"pred": drawn, "label": brought}
    kept = keep(data)["pred"]
    assert torch.equal(kept.as_tensor(), brought.as_tensor())
    np.testing.assert_allclose(kept.affine, AFFINE)
    assert data["pred"] is drawn
    empty = FillMissingLayoutd("label", drawn.shape[1:], (1, 1, 1))({"pred": drawn})
    assert keep(empty)["pred"] is drawn
    background = {"pred": drawn, "label": volume(chest() * 0)}
    assert not keep(background)["pred"].any(), "a layout of background is a layout"


def test_resampled_labels_come_back_as_they_were_brought() -> None:
    """There and back through a coarser grid loses labels: what was given is not what comes back by inversion."""
    prepare = Compose([CopyItemsd("layout", names="label"), Resized("layout", (10, 10, 10), mode="nearest-exact")])
    data = prepare({"layout": volume(chest(nodule=np.s_[5:6, 5:6, 5:6]))})
    data["pred"] = MetaTensor(data["layout"].as_tensor())
    inverted = Invertd("pred", prepare, orig_keys="layout", nearest_interp=True, to_tensor=True)(data)
    assert not torch.equal(inverted["pred"].as_tensor(), data["label"].as_tensor())
    assert torch.equal(KeepGivend("pred", "label")(inverted)["pred"].as_tensor(), data["label"].as_tensor())


def test_the_condition_is_strictly_plus_or_minus_one() -> None:
    layout = volume(chest(nodule=np.s_[8:12, 8:12, 8:12]))
    condition = LayoutToConditiond("layout", "condition", [1, 2])({"layout": layout})["condition"]
    assert condition.shape == (2, 20, 22, 24)
    assert set(condition.unique().tolist()) == {-1.0, 1.0}
    for channel, label in zip(condition, (1, 2), strict=True):
        assert torch.equal(torch.as_tensor(channel > 0), torch.as_tensor(layout[0] == label))
    # One history for each image: what happens to the condition is not undone on the layout.
    data = Resized("condition", (10, 11, 12), mode="trilinear")({"layout": layout, "condition": condition})
    assert len(data["condition"].applied_operations) == 1
    assert layout.applied_operations == []


# ---------------------------------------------------------------------------------------------------------------------
# Columns


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_columns_are_scaled_as_in_the_references_and_back(axis: int) -> None:
    values = np.random.default_rng(0).normal(-400, 500, (5, 6, 7)).astype(np.float32)
    np.moveaxis(values, axis, 0)[2] = -1000  # a constant column: zero range divides by 1
    data = ColumnScaled("image", axis)({"image": volume(values)})

    columns = np.moveaxis(values.astype(np.float64), axis, 0).reshape(values.shape[axis], -1)
    low, width = columns.min(1, keepdims=True), np.ptp(columns, axis=1, keepdims=True)
    width[width == 0] = 1
    expected = 2 * (columns - low) / width - 1
    scaled = np.moveaxis(np.asarray(data["image"][0]), axis, 0).reshape(expected.shape)
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    assert (scaled[2] == -1).all()

    back = ColumnUnscaled("pred", "image_columns")({**data, "pred": data["image"]})["pred"]
    assert back.dtype == torch.float32
    np.testing.assert_allclose(back[0], values, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Nodules

NODULE = np.s_[6:10, 7:11, 8:13]


def place(
    mode: str, seed: int = 0, labels: np.ndarray | None = None, affine: np.ndarray = AFFINE, **knobs: Any
) -> np.ndarray:
    labels = chest(nodule=NODULE) if labels is None else labels
    data = {"layout": volume(labels, "seg.nii", affine), "seed": seed}
    return np.asarray(PlaceNoduled("layout", mode, **knobs)(data)["layout"][0]).astype(np.uint8)


def test_keep_changes_nothing() -> None:
    np.testing.assert_array_equal(place("keep"), chest(nodule=NODULE))


@pytest.mark.parametrize("mode", ["move", "add"])
def test_every_seed_gives_its_own_layout_inside_the_lung(mode: str) -> None:
    knobs = {"diameter": (4, 9)}
    layouts = [place(mode, case_seed(0, f"a/{k}"), **knobs) for k in range(6)]
    assert len({layout.tobytes() for layout in layouts}) == 6
    np.testing.assert_array_equal(layouts[0], place(mode, case_seed(0, "a/0"), **knobs))
    for layout in layouts:
        np.testing.assert_array_equal(layout > 0, chest() > 0)
        assert (layout == 2).any()
        if mode == "add":
            assert (layout[NODULE] == 2).all()
            assert (layout == 2).sum() > np.ones_like(layout)[NODULE].sum()


def test_moving_keeps_the_number_of_nodules_even_where_their_boxes_overlap() -> None:
    labels = chest((40, 40, 40))
    labels[10:20, 10, 10], labels[10, 10:20, 10] = 2, 2  # an L ...
    labels[18, 18, 10] = 2  # ... and a dot in its box
    for seed in range(5):
        moved = place("move", seed, labels, scale=(1, 1))
        assert ndimage.label(moved == 2, np.ones((3, 3, 3)))[1] <= 2
        assert (moved == 2).sum() == (labels == 2).sum()


def test_move_draws_a_nodule_where_there_is_none() -> None:
    assert (place("move", labels=chest(), diameter=(4, 6)) == 2).any()


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 0.7, 2.5), (3, 1, 1)])
def test_new_nodules_are_measured_in_millimetres(spacing: tuple[float, float, float]) -> None:
    lung = np.ones(tuple(int(60 / s) for s in spacing), dtype=np.uint8)
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1])
    volumes = []
    for seed in range(20):
        nodule = place("add", seed, lung, affine, diameter=(14, 14)) == 2
        volumes.append(nodule.sum() * np.prod(spacing))
        extent = [(np.ptp(axis) + 1) * s for axis, s in zip(np.nonzero(nodule), spacing, strict=True)]
        assert 9 < min(extent) <= max(extent) < 22
    assert np.mean(volumes) == pytest.approx(np.pi / 6 * 14**3, rel=0.15)


def test_a_nodule_smaller_than_a_voxel_is_one_voxel() -> None:
    lung = np.ones((9, 9, 9), dtype=np.uint8)
    assert (place("add", 0, lung, np.diag([8, 8, 8, 1]), diameter=(2, 2)) == 2).sum() == 1


@pytest.mark.parametrize("labels", [chest(nodule=np.s_[2:-2, 3:-3, 4:-4]), chest()])
def test_no_room_is_told(labels: np.ndarray) -> None:
    with pytest.raises(CaseError, match=r"seg.nii: no place in the lung .* lower --nodule_diameter or --nodule_scale"):
        place("add", 0, labels, diameter=(60, 60))


# ---------------------------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize("centre", [(0, 0, 0), (19, 21, 23), (9, 10, 12), (3, 21, 0)])
def test_the_crop_is_the_references(centre: tuple[int, int, int]) -> None:
    labels = np.zeros((20, 22, 24))
    labels[centre] = 2
    image = np.random.default_rng(0).normal(size=labels.shape).astype(np.float32)
    crop = CropNoduled(["image", "layout"], "layout", (8, 9, 10), random=True)
    data = crop({"image": volume(image), "layout": volume(labels)})
    start = [max(0, min(n - s, v - s // 2)) for n, s, v in zip(labels.shape, (8, 9, 10), centre, strict=True)]
    box = tuple(slice(a, a + s) for a, s in zip(start, (8, 9, 10), strict=True))
    np.testing.assert_array_equal(data["image"][0], image[box])
    np.testing.assert_array_equal(data["layout"][0], labels[box])
    np.testing.assert_allclose(data["image"].affine[:, 3], AFFINE @ [*start, 1])


def test_short_axes_are_padded_and_the_inverse_is_exact() -> None:
    labels = chest((6, 22, 8), nodule=np.s_[3:4, 15:18, 3:5])
    image = np.random.default_rng(0).normal(size=labels.shape).astype(np.float32)
    crop = CropNoduled(["image", "layout"], "layout", (10, 10, 10))
    data = crop({"image": volume(image), "layout": volume(labels)})
    assert data["image"].shape == data["layout"].shape == (1, 10, 10, 10)
    assert (data["image"][0, 6:] == float(image.min())).all()
    assert (data["layout"][0, 6:] == 0).all()

    whole = crop.inverse(data)["image"]
    start = [0, 11, 0]
    np.testing.assert_array_equal(whole[0, :, 11:21], image[:, 11:21])
    assert start == [0, min(12, 16 - 5), 0]
    assert whole[0, :, :11].isnan().all()  # unknown outside the cube
    assert whole[0, :, 21:].isnan().all()
    np.testing.assert_allclose(whole.affine, AFFINE)
    assert whole.applied_operations == []


def test_the_largest_nodule_is_the_centre_unless_random() -> None:
    labels = chest((40, 40, 40), nodule=np.s_[8:10, 8:10, 8:10])
    labels[28:33, 28:33, 28:33] = 2
    fixed = CropNoduled("layout", "layout", (6, 6, 6))
    assert (fixed({"layout": volume(labels)})["layout"] == 2).sum() == 5**3
    chance = CropNoduled("layout", "layout", (6, 6, 6), random=True).set_random_state(0)
    crops = [chance({"layout": volume(labels)})["layout"] for _ in range(60)]
    assert all((c == 2).any() for c in crops)
    assert len({tuple(c.affine[:3, 3].tolist()) for c in crops}) > 10


def test_no_nodule_no_crop() -> None:
    with pytest.raises(CaseError, match=r"seg.nii has no nodule to cut around: draw one, or use --nodules add"):
        CropNoduled("layout", "layout", (6, 6, 6))({"layout": volume(chest(), "seg.nii")})


def test_invertd_undoes_crop_and_orientation_and_the_original_survives() -> None:
    labels = chest(nodule=NODULE)
    labels[12:14, 15:17, 15:17] = 2  # a second nodule, outside the cube
    image = np.random.default_rng(0).normal(-300, 300, labels.shape).round().astype(np.float32)
    keys = ["image", "layout"]
    preprocessing = Compose(
        [
            CopyItemsd(keys, names=["original", "label"]),
            Orientationd(keys, axcodes="RAS", labels=None),
            CropNoduled(keys, "layout", (8, 8, 8)),
        ]
    )
    data = preprocessing({"image": volume(image), "layout": volume(labels)})
    data["pred"] = MetaTensor(torch.full((1, 8, 8, 8), 77.0))
    post = Compose(
        [
            Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True),
            PasteBackd("pred", "original", "label", [2]),
        ]
    )
    pred = post(data)["pred"]
    expected = image.copy()
    expected[NODULE] = 77
    np.testing.assert_array_equal(pred[0], expected)
    np.testing.assert_allclose(pred.affine, AFFINE)


def test_pasting_keeps_the_prediction_where_the_original_is_unknown() -> None:
    pred, original = volume(np.full((4, 4, 4), 5.0)), volume(np.full((4, 4, 4), np.nan))
    data = {"pred": pred, "original": original, "label": volume(np.zeros((4, 4, 4)))}
    paste = PasteBackd("pred", "original", "label", [1, 2])
    assert (paste(data)["pred"] == 5).all()
    assert paste({"pred": pred})["pred"] is pred


def drawn(*values: int, size: int = 8) -> MetaTensor:
    """A mask of vertical stripes, one of each value, columns first as MONAI loads it."""
    return MetaTensor(torch.tensor(values).repeat_interleave(size)[None, :, None].expand(1, -1, 2 * size).clone())


def test_a_binary_mask_becomes_one_channel_of_zero_and_one():
    out = ToMaskd("mask", (16, 16))({"mask": drawn(0, 127, 128, 255)})["mask"]
    assert out.shape == (1, 16, 16)
    assert out.dtype == torch.float32
    assert out[0, 0].tolist() == [0] * 8 + [1] * 8, "127 is background, 128 foreground"


def test_the_green_channel_of_a_colour_mask_counts():
    colours = torch.stack([torch.full((8, 8), 255), torch.zeros(8, 8), torch.full((8, 8), 255)])
    assert ToMaskd("mask", (8, 8))({"mask": MetaTensor(colours)})["mask"].sum() == 0
    colours[1, :, :4] = 200
    assert ToMaskd("mask", (8, 8))({"mask": MetaTensor(colours)})["mask"].sum() == 32


def test_label_maps_become_a_channel_of_each_label_and_back():
    mask = drawn(0, 3, 1, 3)
    rows_first = mask.shape[:0:-1]
    classes = ToMaskd("mask", rows_first, labels=[1, 3])({"mask": mask})
    assert classes["mask"].shape == (2, *rows_first)
    assert classes["mask"][0, 0].tolist() == [0] * 16 + [1] * 8 + [0] * 8, "the first row"
    assert torch.equal(FromMaskd("mask", labels=[1, 3])(classes)["mask"].long(), torch.as_tensor(mask))
    binary = ToMaskd("mask", rows_first)({"mask": 255 * (mask > 0)})
    assert torch.equal(FromMaskd("mask")(binary)["mask"], 255.0 * (torch.as_tensor(mask) > 0))


@pytest.mark.parametrize(("mask", "labels", "message"), [
    (drawn(0, 1, 2), None, r"holds \[1, 2\]: masks are 0 and 255, else name the labels: --labels \[1, 2\]"),
    (drawn(0, 1, 7), [1, 2], r"holds 7, not in --labels \[1, 2\]"),
    (MetaTensor(torch.zeros(1, 4, 4, 3)), None, "expected one 2-D mask"),
])  # fmt: skip
def test_masks_that_cannot_be_meant_are_refused(mask, labels, message):
    mask.meta["filename_or_obj"] = "folder/odd.png"
    with pytest.raises(CaseError, match=f"odd.png.*{message}"):
        ToMaskd("mask", (8, 8), labels)({"mask": mask})


def disc(x: float = 0.45, y: float = 0.55, radius: float = 0.2, size: int = 48) -> MetaTensor:
    """A mask (1, H, W) with one round lesion."""
    centres = (torch.arange(size) + 0.5) / size
    inside = (centres[None] - x) ** 2 + (centres[:, None] - y) ** 2 < radius**2
    return MetaTensor(inside[None].float(), meta={"filename_or_obj": "round.png"})


def test_a_random_mask_is_the_seeds_and_stays_a_mask() -> None:
    rand, masks = RandMaskd("mask"), [disc() for _ in range(60)]
    moved = [rand({"mask": mask, "seed": case_seed(0, str(i))})["mask"] for i, mask in enumerate(masks)]
    assert torch.equal(rand({"mask": disc(), "seed": case_seed(0, "7")})["mask"], moved[7]), "whatever came between"
    assert len({mask.numpy().tobytes() for mask in moved}) > 50
    assert all(set(mask.unique().tolist()) == {0.0, 1.0} and mask.shape == (1, 48, 48) for mask in moved)
    assert moved[0].meta["filename_or_obj"] == "round.png"
    # Zoom and shift span their ranges, and no more.
    factors = np.sqrt([float(mask.sum() / disc().sum()) for mask in moved])
    assert 0.77 < factors.min() < 0.85
    assert 1.15 < factors.max() < 1.23
    where = np.array([ndimage.center_of_mass(mask[0].numpy()) for mask in moved]) / 48 - 0.5
    assert (np.abs(where) < 0.05 * 1.2 + 0.1 + 0.02).all()
    assert (np.abs(where).max(axis=0) > 0.1).all()


def test_each_axis_is_mirrored_half_the_time() -> None:
    rand = RandMaskd("mask", zoom=(1.0, 1.0), shift=0.0)
    rand.set_random_state(seed=0)
    quarter = torch.zeros(1, 8, 8)
    quarter[:, :3, :5] = 1
    moved = [rand({"mask": quarter})["mask"] for _ in range(80)]
    ways = [quarter.flip(axes) for axes in ((), (1,), (2,), (1, 2))]
    counts = [sum(torch.equal(mask, way) for mask in moved) for way in ways]
    assert sum(counts) == 80, "nothing but mirroring, to the pixel"
    assert min(counts) > 8


def test_random_masks_respect_the_area_and_classes_move_together() -> None:
    rand = RandMaskd("mask", area=(0.13, 0.2))
    two = torch.cat([disc(radius=0.2), disc(radius=0.1)])
    for seed in range(30):
        moved = rand({"mask": two, "seed": seed})["mask"]
        assert 0.13 <= float(moved[0].mean()) <= 0.2
        assert (moved[1] <= moved[0]).all(), "the inner class stays inside the outer"
    # At the border shifts cut lesions off: never more than half.
    corner = disc(0.05, 0.05, 0.1)
    areas = [float(RandMaskd("mask")({"mask": corner, "seed": s})["mask"].sum() / corner.sum()) for s in range(60)]
    assert 0.5 <= min(areas) < max(areas) <= 2


def test_masks_without_a_fitting_random_one_are_refused() -> None:
    with pytest.raises(CaseError, match=r"round.png: lesion fills 12.*none of 5 random masks.*widen the range"):
        RandMaskd("mask", area=(0.6, 0.7), tries=5)({"mask": disc(), "seed": 1})
    with pytest.raises(CaseError, match=r"lesion fills 0\.00%"):
        RandMaskd("mask")({"mask": torch.zeros(1, 8, 8), "seed": 1})


def test_kept_masks_stay_and_options_are_checked() -> None:
    mask = torch.zeros(1, 8, 8)
    assert RandMaskd("mask", mode="keep")({"mask": mask})["mask"] is mask
    with pytest.raises(ValueError, match="'keep' or 'random', got 'move'"):
        RandMaskd("mask", mode="move")
    with pytest.raises(ValueError, match="zoom must be a range above 0"):
        RandMaskd("mask", zoom=(0.0, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Colour pictures


def picture(channels: int = 3, width: int = 6, height: int = 10, seed: int = 0) -> MetaTensor:
    """A picture of every grey level there is room for, columns first as MONAI loads it."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (channels, width, height), generator=generator)
    pixels[0, 0, :2] = torch.tensor([0, 255])
    return MetaTensor(pixels.float(), meta={"filename_or_obj": "folder/photo.png"})


def test_pictures_become_images_rows_first_in_the_networks_range() -> None:
    image = ToPictured("image", (10, 6))({"image": picture(), "name": "a"})["image"]
    assert image.shape == (3, 10, 6)
    assert image.dtype == torch.float32
    assert (image.min().item(), image.max().item()) == (-1, 1)
    assert image[0, :2, 0].tolist() == [-1, 1]
    torch.testing.assert_close(image.as_tensor(), picture().as_tensor().mT / 127.5 - 1)
    assert image.meta["filename_or_obj"] == "folder/photo.png"


def test_there_and_back_is_the_identity_on_every_grey_level() -> None:
    levels = torch.arange(256.0).reshape(1, 16, 16).repeat(3, 1, 1)
    for pixels in (levels, torch.as_tensor(picture())):
        size = pixels.shape[:0:-1]
        data = {"image": MetaTensor(pixels)}
        kept = data["image"].clone()
        back = FromPictured("image")(ToPictured("image", size)(data))["image"]
        assert torch.equal(torch.as_tensor(back), pixels)
        assert torch.equal(data["image"], kept), "the picture that came stays as it was"
        assert torch.equal(back.to(torch.uint8).float(), back.as_tensor()), "nothing is lost on the way to the disk"


def test_the_way_back_clips_and_rounds_to_the_nearest_level() -> None:
    levels = torch.tensor([[-3.0, -0.4, 0.4, 0.6], [99.6, 100.4, 254.7, 900.0]])
    back = FromPictured("image")({"image": (levels / 127.5 - 1).expand(3, -1, -1)})["image"]
    assert back.shape == (3, 4, 2), "columns first, as writers want it"
    assert back[1].mT.tolist() == [[0, 0, 0, 1], [100, 100, 255, 255]]


@pytest.mark.parametrize("size", [(4, 4), (20, 9), (10, 6)])
def test_resizing_is_bilinear_whatever_the_proportions(size: tuple[int, int]) -> None:
    image = ToPictured("image", size)({"image": picture()})["image"]
    assert image.shape == (3, *size)
    assert image.abs().max() <= 1
    values = torch.as_tensor(picture()).mT[None] / 127.5 - 1
    expected = torch.nn.functional.interpolate(values, size, mode="bilinear", align_corners=False, antialias=False)[0]
    torch.testing.assert_close(image.as_tensor(), expected)
    flat = ToPictured("image", size)({"image": MetaTensor(torch.full((3, 6, 10), 77.0))})["image"]
    torch.testing.assert_close(flat.as_tensor(), torch.full((3, *size), 77 / 127.5 - 1))


def test_grey_pictures_are_grey_in_colour() -> None:
    grey = picture(1)
    image = ToPictured("image", (5, 4))({"image": grey})["image"]
    colour = ToPictured("image", (5, 4))({"image": MetaTensor(grey.repeat(3, 1, 1))})["image"]
    assert torch.equal(image, colour)
    assert image.shape == (3, 5, 4)
    assert torch.equal(ToPictured("image", (5, 4))({"image": grey.as_tensor()})["image"], image), "no MetaTensor needed"


@pytest.mark.parametrize("shape", [(2, 8, 8), (4, 8, 8), (3, 8, 8, 1), (8, 8), (3, 1, 8), (3, 8, 1)], ids=str)
def test_what_is_no_colour_picture_is_refused_by_name(shape: tuple[int, ...]) -> None:
    odd = MetaTensor(torch.zeros(shape), meta={"filename_or_obj": "folder/odd.png"})
    with pytest.raises(CaseError, match=r"folder/odd\.png has shape \(.*expected a colour picture"):
        ToPictured("image", (8, 8))({"image": odd})


def test_files_of_every_mode_load_as_the_bundle_loads_them(tmp_path: Path) -> None:
    """Palette, grey, alpha: the reader's converter makes all of them RGB."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 6, 3), dtype=np.uint8)
    grey = Image.fromarray(pixels[..., 0])
    made = {"rgb": Image.fromarray(pixels), "grey": grey, "palette": grey.convert("P"), "alpha": grey.convert("LA")}
    load = LoadCased("image", reader=PILReader(converter=lambda p: p.convert("RGB")))
    prepare = Compose([load, ToPictured("image", (10, 6)), FromPictured("image")])
    for name, source in made.items():
        source.save(tmp_path / f"{name}.png")
        back = np.asarray(prepare({"image": str(tmp_path / f"{name}.png")})["image"])
        expected = pixels if name == "rgb" else pixels[..., :1].repeat(3, axis=2)
        np.testing.assert_array_equal(back.transpose(2, 1, 0), expected, err_msg=name)
