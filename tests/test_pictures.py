"""Laws of `common.pictures`: what is up is up, the patient's right is on the left."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from common.pictures import COLOURS, asked_for, centre_of, montage, plane, planes, save_gif, save_png


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
