"""Laws of `common.semantics`: exact measures, and conditions that belong to what they stand beside."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
import torch

from common.io import CaseError
from common.semantics import (
    AskLesionsd,
    Lesion,
    SelectPartd,
    components,
    conditions,
    lesions_of,
    list_parts,
    measure,
    measure_cases,
)

CLASSES = [1, 2, 3]


def canvas(*boxes: tuple[int, int, int, int], height: int = 20, width: int = 20) -> np.ndarray:
    """A mask with rectangles (top, left, height, width)."""
    mask = np.zeros((height, width), dtype=bool)
    for top, left, rows, columns in boxes:
        mask[top : top + rows, left : left + columns] = True
    return mask


# Measuring.


def test_corner_contact_joins():
    found, rows = components(canvas((2, 2, 3, 3), (5, 5, 3, 3)))
    assert rows.tolist() == [[18, 4.5, 4.5]]
    assert found.max() == 1


def test_holes_are_not_filled():
    ring = canvas((2, 2, 7, 7)) & ~canvas((4, 4, 3, 3))
    assert components(ring)[1].tolist() == [[40, 5, 5]]


def test_threshold_counts_from_exactly_so_many_pixels():
    mask = canvas((0, 0, 3, 3), (6, 6, 2, 4), (12, 12, 3, 4))
    found, rows = components(mask, min_size=9)
    assert rows[:, 0].tolist() == [9, 12]
    assert np.unique(found).tolist() == [0, 1, 2], "numbered without gaps"
    assert (found == 2).sum() == 12
    assert not found[6:8, 6:10].any(), "what is too small is background"


def test_components_cut_by_the_frame_count():
    assert components(canvas((0, 16, 2, 4)))[1].tolist() == [[8, 17.5, 0.5]]


def test_an_empty_mask_has_no_components():
    found, rows = components(canvas())
    assert rows.shape == (0, 3)
    assert not found.any()
    assert measure(canvas()[None], [1]) == []


def test_x_is_the_column_and_fractions_are_of_the_own_axis():
    mask = canvas((1, 30, 2, 4), height=10, width=40)
    assert measure(mask[None], [1]) == [Lesion(size=8 / 400, x=31.5 / 40, y=1.5 / 10)]


def test_shifts_and_flips_move_the_places_alone():
    mask = canvas((3, 5, 4, 2), (9, 12, 2, 5), (12, 1, 3, 3))
    rows = components(mask)[1]
    np.testing.assert_allclose(components(np.roll(mask, (2, 3), axis=(0, 1)))[1], rows + [0, 3, 2])
    flipped = components(mask[:, ::-1])[1]
    expected = rows * [1, -1, 1] + [0, 19, 0]
    assert sorted(map(tuple, flipped)) == sorted(map(tuple, expected))
    turned = components(mask.T)[1]
    assert sorted(map(tuple, turned)) == sorted(map(tuple, rows[:, [0, 2, 1]]))


def test_lesions_come_by_label_largest_first():
    masks = np.stack([canvas((0, 0, 2, 2), (10, 10, 4, 4)), canvas(), canvas((5, 5, 3, 3))])
    lesions = measure(masks, [7, 5, 3])
    assert [(a.label, a.size * 400) for a in lesions] == [(7, 16), (7, 4), (3, 9)]
    with pytest.raises(ValueError, match="3 channels, labels name 2"):
        measure(masks, [7, 5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1529, 0.5, 0.5), r"size 1529 .* fractions of the image, divide pixels by width \* height"),
        ((0.1, 86, 0.5), "x 86 .* divide pixels by the width"),
        ((0.1, 0.5, 57), "y 57 .* divide pixels by the height"),
        ((0, 0.5, 0.5), r"size 0 is not in \(0, 1\]$"),
        ((0.1, -0.1, 0.5), r"x -0.1 is not in \[0, 1\]$"),
        ((float("nan"), 0.5, 0.5), "size nan"),
        ((0.1, 0.5, float("inf")), "y inf"),
    ],
)
def test_pixels_are_taken_for_what_they_are(values, message):
    """The published code trains on fractions and draws pixels."""
    with pytest.raises(ValueError, match=message):
        Lesion(*values)


# Conditions.


def test_conditions_are_size_x_y_in_this_order():
    """The published code trains on (size, x, y) and draws (size, y, x)."""
    assert conditions([Lesion(0.25, x=0.5, y=0.125)], [1]).tolist() == [[0.25, 0.5, 0.125]]


def test_condition_of_classes_holds_sizes_then_places():
    lesions = [Lesion(0.25, 0.5, 0.125, 3), Lesion(0.5, 0.75, 1, 1), Lesion(0.125, 0, 0.25, 3)]
    rows = conditions(lesions, CLASSES, null=-1)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[0.5, -1, 0.25, 0.75, 1, -1, -1, 0.5, 0.125], [-1, -1, 0.125, -1, -1, -1, -1, 0, 0.25]]
    assert lesions_of(rows[0], CLASSES, null=-1) == [lesions[1], lesions[0]]
    assert lesions_of(rows[1], CLASSES, null=-1) == [lesions[2]]
    assert conditions([], CLASSES).shape == (0, 9)
    with pytest.raises(CaseError, match="label 4 is unknown"):
        conditions([Lesion(0.1, 0.1, 0.1, 4)], CLASSES)


COUNTS = {
    "a": [],
    "b": [(2, 2, 4, 4)],
    "c": [(1, 1, 3, 3), (10, 10, 5, 5)],
    "d": [(0, 0, 2, 2), (0, 10, 2, 3), (6, 0, 2, 4), (6, 10, 2, 5), (12, 4, 2, 6)],
}


def counted(case: dict) -> dict:
    return {**case, "mask": torch.as_tensor(canvas(*COUNTS[case["file"]])[None]).float()}


def test_every_part_meets_its_own_condition():
    """The published code pairs by position in two lists: one mask without exactly one lesion shifts all that follow."""
    cases = [{"name": name, "file": name} for name in COUNTS]
    parts = list_parts(cases, measure_cases(cases, counted, [1], 1), [1])
    assert Counter(part["file"] for part in parts) == {"b": 1, "c": 2, "d": 5}
    assert len({part["name"] for part in parts}) == len(parts)
    select = SelectPartd(labels=[1])
    seen = Counter()
    for part in parts:
        out = select(counted(part))
        assert out["mask"].dtype == torch.float32
        (only,) = measure(out["mask"], [1])
        assert conditions([only], [1]).tolist() == [out["condition"].tolist()]
        seen[part["file"], only.size] += 1
    assert set(seen.values()) == {1}, "each component once"
    assert round(400 * sum(size for _, size in seen)) == sum(canvas(*boxes).sum() for boxes in COUNTS.values())


def test_part_of_several_classes_holds_one_component_of_each():
    masks = np.stack([canvas((0, 0, 2, 2), (10, 10, 4, 4)), canvas((5, 5, 3, 3)), canvas()])
    data = {"mask": torch.as_tensor(masks).float(), "part": 1}
    out = SelectPartd(labels=CLASSES)(data)
    assert out["mask"].sum(dim=(1, 2)).tolist() == [4, 0, 0]
    assert out["condition"].tolist() == conditions([Lesion(0.01, 0.5 / 20, 0.5 / 20)], CLASSES)[0].tolist()
    assert data["mask"].sum() == masks.sum(), "the input stays"
    with pytest.raises(CaseError, match="no part 2"):
        SelectPartd(labels=CLASSES)({**data, "part": 2})


def test_asked_lesions_are_padded_with_nan():
    data = {"name": "a", "lesions": [{"size": 0.1, "x": 0.2, "y": 0.3}, Lesion(0.2, 0.5, 0.5)]}
    rows = AskLesionsd(parts=3)(data)["condition"]
    assert rows.dtype == torch.float32
    np.testing.assert_allclose(rows[:2], [[0.2, 0.5, 0.5], [0.1, 0.2, 0.3]], rtol=1e-6)
    assert rows[2].isnan().all()
    with pytest.raises(CaseError, match=r"2 lesions of a kind .* raise --parts"):
        AskLesionsd(parts=1)(data)
    for bad in ({"size": 0.1, "x": 0.2}, {"size": 12, "x": 0.1, "y": 0.1}):
        with pytest.raises(CaseError, match="a: "):
            AskLesionsd()({"name": "a", "lesions": [bad]})


def test_nothing_to_measure_is_refused(caplog):
    with pytest.raises(CaseError, match=r"none of 0 masks .no file"):
        measure_cases([], counted, [1], 1)
    empty = [{"name": "a", "file": "a", "mask": "a.png"}]
    with pytest.raises(CaseError, match=r"none of 1 masks \(a.png\) holds .* \[1\] and 7 pixels"):
        measure_cases(empty, counted, [1], 7)
    with caplog.at_level(logging.INFO, "common.semantics"):
        measure_cases([{"name": name, "file": name} for name in COUNTS], counted, [1], 1)
    assert "4 masks, 8 lesions" in caplog.text
    assert "1 empty" in caplog.text
