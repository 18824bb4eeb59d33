"""Laws of the procedural thorax: seeded, plausible, any shape; cohorts that resume and never mix."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.phantoms import FIELD_OF_VIEW, LABELS, Phantom, thorax, thorax_cohort

SMALL = (24, 24, 24)


@pytest.fixture(scope="module", params=[0, 1, 2])
def phantom(request: pytest.FixtureRequest) -> Phantom:
    return thorax(request.param, (48, 40, 44))


def test_same_seed_same_phantom_other_seed_other_phantom() -> None:
    first, again, other = thorax(3, SMALL), thorax(3, SMALL), thorax(4, SMALL)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.layout, again.layout)
    assert first.nodules == again.nodules
    assert (first.layout != other.layout).mean() > 0.005


def test_types_and_ranges(phantom: Phantom) -> None:
    assert phantom.image.dtype == np.int16
    assert phantom.layout.dtype == np.uint8
    assert phantom.image.shape == phantom.layout.shape == (48, 40, 44)
    assert phantom.image.min() >= -1024
    assert 250 < phantom.image.max() <= 3071
    assert set(np.unique(phantom.layout)) == {0, *LABELS.values()}
    assert 1 <= len(phantom.nodules) <= 3


def test_hounsfield_units_are_plausible(phantom: Phantom) -> None:
    lung = phantom.image[phantom.layout == LABELS["lung"]]
    assert -900 < np.median(lung) < -780
    corner = phantom.image[:3, -3:, :10]
    assert abs(np.mean(corner) + 1000) < 20
    middle = phantom.image[22:26, :, 15:30]
    assert 0 < np.median(middle[middle > -300]) < 150


def test_lung_volume_and_sides(phantom: Phantom) -> None:
    litres = np.prod(np.diag(phantom.affine)[:3]) / 1e6
    left, right = (phantom.layout[:24] > 0).sum() * litres, (phantom.layout[24:] > 0).sum() * litres
    assert 1.3 < left < right < 3


def test_heart_left_liver_right_spine_behind(phantom: Phantom) -> None:
    tissue = (phantom.image > 0) & (phantom.layout == 0)
    heart_level = tissue[10:38, 10:32, 17]
    assert heart_level[:14].sum() > heart_level[14:].sum()
    bone = np.argwhere(phantom.image[18:30] > 250)[:, 1]
    assert np.median(bone) < 16


@pytest.mark.parametrize("seed", range(6))
def test_nodules_lie_wholly_in_lung(seed: int) -> None:
    phantom = thorax(seed, (40, 40, 40), num_nodules=3)
    nodule = phantom.layout == LABELS["nodule"]
    assert ndimage.label(nodule, np.ones((3, 3, 3)))[1] == 3 == len(phantom.nodules)
    shell = ndimage.binary_dilation(nodule, np.ones((3, 3, 3))) & ~nodule
    assert (phantom.layout[shell] == LABELS["lung"]).all()
    for found in phantom.nodules:
        index = np.linalg.solve(phantom.affine, [*found["center_mm"], 1])[:3].round().astype(int)
        assert nodule[tuple(index)]
        assert found["texture"] in {"solid", "part-solid", "ground-glass"}
        assert found["diameter_mm"] >= 6


def test_nodules_change_the_image_only_where_they_are() -> None:
    without, with_one = thorax(5, (48, 48, 48), num_nodules=0), thorax(5, (48, 48, 48), num_nodules=1)
    assert without.nodules == ()
    assert not (without.layout == LABELS["nodule"]).any()
    nodule = with_one.layout == LABELS["nodule"]
    np.testing.assert_array_equal(with_one.layout[~nodule], without.layout[~nodule])
    assert with_one.image[nodule].mean() > without.image[nodule].mean() + 100
    far = ~ndimage.binary_dilation(nodule, np.ones((3, 3, 3)), iterations=3)
    assert np.abs(with_one.image[far].astype(int) - without.image[far]).max() <= 1


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 40, 23), (64, 16, 32)])
def test_any_shape_covers_the_same_body(shape: tuple[int, ...]) -> None:
    phantom = thorax(0, shape)
    assert phantom.image.shape == phantom.layout.shape == shape
    assert (phantom.layout == LABELS["nodule"]).any()
    np.testing.assert_allclose(np.diag(phantom.affine)[:3] * shape, FIELD_OF_VIEW)
    assert 2.5 < (phantom.layout > 0).sum() * np.prod(np.diag(phantom.affine)[:3]) / 1e6 < 7


@pytest.mark.parametrize("shape", [(8, 32, 32), (32, 32)])
def test_shapes_it_cannot_hold_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 16"):
        thorax(0, shape)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*.nii.gz"))}


def test_small_cohort_is_a_prefix_and_grows_in_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    assert thorax_cohort(large, 3, SMALL) == str(large)
    thorax_cohort(small, 2, SMALL)
    assert files(small).items() < files(large).items()
    assert len(files(large)) == 6
    thorax_cohort(small, 3, SMALL)
    assert files(small) == files(large)
    assert json.loads((small / "phantoms.json").read_text())["num_cases"] == 3

    # Fewer, or as many: nothing to do, nothing said.
    with caplog.at_level(logging.INFO, "common.phantoms"):
        thorax_cohort(small, 1, SMALL)
        thorax_cohort(small, 3, SMALL)
    assert not caplog.records
    assert json.loads((small / "phantoms.json").read_text())["num_cases"] == 3


@pytest.mark.parametrize("lost", ["CT/thorax_0001.nii.gz", "SEG/thorax_0000.nii.gz", "phantoms.json"])
def test_what_is_lost_comes_back_the_same(tmp_path: Path, lost: str) -> None:
    thorax_cohort(tmp_path, 2, SMALL, 7)
    before, stamp = files(tmp_path), (tmp_path / "phantoms.json").read_bytes()
    (tmp_path / lost).unlink()
    thorax_cohort(tmp_path, 2, SMALL, 7)
    assert files(tmp_path) == before
    assert (tmp_path / "phantoms.json").read_bytes() == stamp
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("stamped", [True, False])
def test_other_settings_are_never_mixed_in(tmp_path: Path, stamped: bool) -> None:
    thorax_cohort(tmp_path, 1, SMALL)
    before = files(tmp_path)
    if not stamped:
        (tmp_path / "phantoms.json").unlink()
    with pytest.raises(ValueError, match="delete"):
        thorax_cohort(tmp_path, 2, SMALL, seed=1)
    with pytest.raises(ValueError, match="delete"):
        thorax_cohort(tmp_path, 2, (16, 24, 24))
    assert files(tmp_path) == before


def test_files_keep_values_and_affine(tmp_path: Path) -> None:
    thorax_cohort(tmp_path, 1, (20, 24, 28))
    image, layout = (nib.load(tmp_path / kind / "thorax_0000.nii.gz") for kind in ("CT", "SEG"))
    assert image.get_data_dtype() == np.int16
    assert layout.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    for file in (image, layout):
        np.testing.assert_allclose(file.get_qform(coded=True)[0], file.get_sform(coded=True)[0], atol=1e-4)
        np.testing.assert_allclose(np.diag(file.affine)[:3] * file.shape, FIELD_OF_VIEW, rtol=1e-6)
    assert set(np.unique(np.asanyarray(layout.dataobj))) == {0, 1, 2}
