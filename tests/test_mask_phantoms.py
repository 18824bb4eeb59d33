"""Generated masks: repeatable, as many as asked, of the kinds they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from common.mask_phantoms import heart, lesions, mask_cohort
from common.semantics import measure


def read(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("kind", [lesions, heart])
def test_a_seed_is_a_mask(kind):
    assert np.array_equal(kind(3, 48), kind(3, 48))
    assert not np.array_equal(kind(3, 48), kind(4, 48))
    assert kind(0, 48).shape == (48, 48)
    assert kind(0, 48).dtype == np.uint8


def test_lesions_are_binary_of_plausible_size_and_number():
    masks = [lesions(seed, 64) for seed in range(150)]
    assert {int(v) for mask in masks for v in np.unique(mask)} == {0, 255}
    found = [measure(mask[None] > 0, [1], 10) for mask in masks]
    counts = np.bincount([len(f) for f in found], minlength=4)
    assert counts[1] > 100
    assert counts[2] > 5
    assert counts[0] == 0
    sizes = np.array([f[0].size for f in found])
    assert 0.01 < sizes.min() < sizes.max() < 0.5
    # As in real masks, the large ones lie nearer the centre.
    rim = np.array([np.hypot(f[0].x - 0.5, f[0].y - 0.5) for f in found])
    assert np.corrcoef(sizes.argsort().argsort(), rim.argsort().argsort())[0, 1] < -0.15


def test_size_is_a_matter_of_resolution_only():
    small, large = lesions(5, 64) > 0, lesions(5, 128) > 0
    assert small.mean() == pytest.approx(large.mean(), rel=0.05)


def test_hearts_have_one_component_of_each_class_in_anatomical_order():
    for seed in range(20):
        mask = heart(seed, 96)
        found = {lesion.label: lesion for lesion in measure(np.stack([mask == k for k in (1, 2, 3)]), [1, 2, 3], 10)}
        assert set(found) == {1, 2, 3}
        assert found[3].y > found[1].y, "the atrium lies below the ventricle"
        assert abs(found[2].x - found[1].x) < 0.1, "the myocardium surrounds the ventricle"


def test_a_cohort_grows_in_place_and_refuses_other_settings(tmp_path):
    mask_cohort(tmp_path, 2, 32, seed=1)
    first = [read(path) for path in sorted((tmp_path / "masks").glob("*.png"))]
    (tmp_path / "masks" / "mask_0001.png").unlink()
    mask_cohort(tmp_path, 4, 32, seed=1)
    again = [read(path) for path in sorted((tmp_path / "masks").glob("*.png"))]
    assert len(again) == 4
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    with pytest.raises(ValueError, match="another folder"):
        mask_cohort(tmp_path, 4, 48, seed=1)
    with pytest.raises(ValueError, match="kind must be"):
        mask_cohort(tmp_path / "new", 4, 48, kind="liver")
