"""Laws of `common.pictures`: what is up is up, the patient's right is on the left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from common.pictures import (
    COLOURS,
    LayoutSheet,
    PairSheet,
    SliceSheet,
    asked_for,
    centre_of,
    label_plane,
    montage,
    photo,
    picture_of,
    plane,
    planes,
    save_gif,
    save_png,
)


def marked(axis: int) -> np.ndarray:
    """A dark RAS volume whose last slab along an axis is bright."""
    volume = np.zeros((4, 6, 8))
    volume[(slice(None),) * axis + (-1,)] = 1
    return volume


def pixels(volume: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(plane(volume, axis, 1, window=(0, 1), height=8))[..., 0]


def test_orientation_is_that_of_a_light_box():
    right, front, top = (marked(a) for a in range(3))
    assert pixels(right, 2).shape == (6, 4)  # axial: X across, Y up
    assert pixels(right, 1).shape == (8, 4)  # coronal: X across, Z up
    assert pixels(right, 0).shape == (8, 6)  # sagittal: Y across, Z up
    for axis in (1, 2):
        assert (pixels(right, axis)[:, 0] == 255).all(), "the patient's right is on the left"
    assert (pixels(front, 2)[0] == 255).all(), "axial: the front is up"
    assert (pixels(front, 0)[:, 0] == 255).all(), "sagittal: the front is on the left"
    for axis in (0, 1):
        assert (pixels(top, axis)[0] == 255).all(), "the head is up"


def test_spacing_shapes_the_picture():
    assert plane(np.zeros((10, 10, 10)), 1, 0, spacing=(1, 1, 3), height=90).size == (30, 90)


def test_cut_runs_through_the_highest_label():
    layout = np.zeros((9, 9, 9), dtype=np.uint8)
    layout[1:8, 1:8, 1:8] = 1
    layout[2, 3, 4] = 2
    assert centre_of(layout) == (2, 3, 4)
    assert centre_of(np.zeros((4, 6, 8))) == (2, 3, 4)


def test_layout_is_tinted_and_files_are_written(tmp_path):
    volume, layout = np.zeros((8, 8, 8)), np.zeros((8, 8, 8), dtype=np.uint8)
    layout[4:] = 1
    row = planes(volume, (5, 4, 4), window=(0, 1), layout=layout)
    sheet = montage([row, row], ["one", "two"])
    assert sheet.height == 2 * row[0].height
    assert np.asarray(row[2]).max() > 0
    save_png(sheet, tmp_path / "sheet.png")
    save_gif([sheet, sheet.rotate(180)], tmp_path / "scroll.gif")
    assert Image.open(tmp_path / "sheet.png").size == sheet.size
    assert Image.open(tmp_path / "scroll.gif").n_frames == 2


def test_what_was_asked_is_drawn_where_and_as_large_as_asked():
    mask = np.zeros((1, 50, 100))
    mask[:, :, 50:] = 1
    picture = asked_for(mask, [{"size": 0.1, "x": 0.25, "y": 0.5}], ["one", "two"], height=100)
    pixels = np.asarray(picture)
    rows, columns = np.nonzero((pixels == COLOURS[1]).all(axis=-1))
    assert picture.size[0] == 202
    assert picture.size[1] > 102, "room for the caption"
    low = np.asarray(asked_for(mask, [{"size": 0.1, "x": 0.25, "y": 1.0}], ["one"], height=100))[102:]
    assert not (low == COLOURS[1]).all(axis=-1).any(), "a circle does not run into the caption"
    assert (pixels[1:101, 110:200] == 255).all(), "the mask stays white on the right: rows first"
    assert (rows.mean() - 1, columns.mean() - 1) == pytest.approx((50, 50), abs=1)
    radius = np.sqrt(0.1 * 200 * 100 / np.pi)
    assert np.ptp(columns) == pytest.approx(2 * radius, abs=2)
    assert np.ptp(rows) == pytest.approx(2 * radius, abs=2)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (3, height, width)).astype(np.float32)


def test_a_photo_shows_the_image_pixel_by_pixel_rows_first():
    shown = photo(values := image(5, 8), height=5)
    assert (shown.mode, shown.size) == ("RGB", (10, 7)), "a rim of one pixel"
    inside = np.asarray(shown)[1:-1, 1:-1]
    np.testing.assert_array_equal(inside, np.rint((values + 1) * 127.5).transpose(1, 2, 0))
    assert not np.asarray(shown)[[0, -1]].any()
    back = photo(inside.transpose(2, 0, 1) / 127.5 - 1, height=5)
    np.testing.assert_array_equal(np.asarray(back)[1:-1, 1:-1], inside, err_msg="what is on disk is what is shown")


def test_a_photo_clips_and_rounds_and_keeps_its_proportions():
    assert photo(image(20, 30), height=40).size == (62, 42)
    levels = np.array([-9, -1, -0.998, 0.999, 1, 9]).reshape(1, 1, 6).repeat(3, 0)
    assert np.asarray(photo(levels, height=1))[1, 1:-1, 0].tolist() == [0, 0, 0, 255, 255, 255]


def test_a_sheet_of_pairs_shows_mask_synthetic_and_real_of_every_case_side_by_side():
    real = torch.from_numpy(np.stack([image(16, 12, seed) for seed in range(5)]))
    synthetic, masks = -real, (real[:, :1] > 0).float()
    sheet = PairSheet(real, masks, columns=2, height=32)(synthetic)
    width, height = 3 * 26, 34
    assert sheet.size == (2 * width, 3 * height), "five cases, two in a row"
    pixels = np.asarray(sheet)
    for case in range(5):
        top, left = case // 2 * height, case % 2 * width
        for k, shown in enumerate((picture_of(masks[case].numpy(), 32), photo(synthetic[case].numpy(), 32),
                                   photo(real[case].numpy(), 32))):  # fmt: skip
            tile = pixels[top : top + height, left + 26 * k : left + 26 * (k + 1)]
            # The caption lies over the first row's first mask.
            rows = slice(20 if top == 0 else 0, None)
            np.testing.assert_array_equal(tile[rows], np.asarray(shown)[rows], err_msg=f"case {case}, picture {k}")
    assert not pixels[2 * height :, width:].any(), "no sixth case"


def test_a_sheet_needs_a_synthetic_image_for_each_case():
    real, masks = np.zeros((3, 3, 8, 8)), np.zeros((3, 1, 8, 8))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        PairSheet(real, masks)(real[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Label maps and slices

GREY = (70, 70, 70)


def body(size: int = 8, labels: int = 3) -> np.ndarray:
    """A label map with each label in a slab of its own along every axis but the body, the last, around them."""
    layout = np.full((size, size, size), labels, dtype=np.uint8)
    layout[0] = 0
    for label in range(1, labels):
        layout[2 * label, 1:4, 2:5] = label
    return layout


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_labels_are_flat_colours_and_the_last_is_grey(axis):
    layout = body()
    shown = np.asarray(label_plane(layout, axis, 2, height=8)).astype(int)
    palette = np.array([(0, 0, 0), COLOURS[0], COLOURS[1], GREY])
    # As `plane` lays it out: first axis to columns, from the right; second to rows, from below.
    expected = palette[np.take(layout, 2, axis)[::-1].transpose(1, 0)[::-1]]
    assert np.abs(shown - expected).max() <= 1
    assert np.abs(shown - GREY).max(axis=-1).min() <= 1


@pytest.mark.parametrize("value", [0, 1, 13])
def test_a_label_map_of_one_value_has_one_colour(value):
    shown = np.asarray(label_plane(np.full((4, 4, 4), value), 2, 1, height=4))
    assert np.abs(shown.astype(int) - (GREY if value else (0, 0, 0))).max() <= 1


def test_twelve_labels_have_twelve_colours():
    assert len(set(COLOURS)) == len(COLOURS) >= 12


def test_label_planes_are_true_to_the_spacing():
    assert label_plane(body(10), 1, 0, spacing=(1, 1, 3), height=90).size == (30, 90)


def one_hot(layouts: np.ndarray, classes: int) -> np.ndarray:
    return np.moveaxis(np.eye(classes)[layouts[:, 0]], -1, 1)


def test_a_sheet_of_layouts_shows_real_above_synthetic_two_cases_in_a_row():
    real = np.stack([body()[None], body()[None, ::-1], body()[None, :, ::-1]])
    sheet = LayoutSheet(torch.from_numpy(real.copy()), focus=2)
    shown = np.asarray(sheet(torch.from_numpy(real.copy())))
    assert shown.shape == (2 * 256, 2 * 3 * 128, 3)
    for case in range(3):
        top, left = case // 2 * 256, case % 2 * 384
        upper, lower = shown[top + 20 : top + 128, left : left + 384], shown[top + 148 : top + 256, left : left + 384]
        np.testing.assert_array_equal(upper, lower, err_msg="what is drawn exactly is shown alike")
    assert not shown[256:, 384:].any(), "no fourth case"
    other = np.asarray(sheet(np.zeros_like(real)))
    np.testing.assert_array_equal(other[:128], shown[:128])
    assert not other[128:256].any()


def test_probabilities_are_shown_as_their_likeliest_labels():
    real = body()[None, None]
    sheet = LayoutSheet(real, focus=2)
    np.testing.assert_array_equal(np.asarray(sheet(one_hot(real, 4))), np.asarray(sheet(real)))


def test_the_cut_runs_through_the_focus_or_the_middle():
    real, synthetic = body()[None, None], body()[None, None]
    for focus, at in ((2, (4, 2, 3)), (9, (4, 4, 4))):
        expected = [np.asarray(label_plane(body(), axis, at[axis], height=128)) for axis in (2, 1, 0)]
        shown = np.asarray(LayoutSheet(real, focus)(synthetic))[128:]
        np.testing.assert_array_equal(shown, np.concatenate(expected, axis=1))


def test_a_sheet_of_slices_shows_real_above_synthetic():
    real = np.random.default_rng(0).uniform(-1, 1, (3, 1, 16, 16)).astype(np.float32)
    synthetic = torch.from_numpy(-real)
    shown = np.asarray(SliceSheet(real)(synthetic))
    assert shown.shape == (320, 480, 3)
    for case in range(3):
        for top, pixels in ((0, real), (160, -real)):
            due = np.asarray(plane(pixels[case, 0][..., None], 2, 0, window=(-1, 1), height=160))
            rows = slice(20 if top == 0 else 0, None)  # the caption
            tile = shown[top : top + 160, 160 * case : 160 * (case + 1)]
            np.testing.assert_array_equal(tile[rows], due[rows])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        SliceSheet(real)(synthetic[:2])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        LayoutSheet(body()[None, None], 1)(np.stack([body()[None]] * 2))
