"""Crops of a CT at true spacing, and painted crops back into the file: what is not painted keeps its bits."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation
from torch.utils._python_dispatch import TorchDispatchMode

from common.lesion_geometry import (
    AIR,
    Grid,
    cover,
    crop_start,
    feather,
    paste,
    paste_labels,
    resample,
    to_hu,
    to_unit,
    working_grid,
)

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.8, 2.5), (0.9, 3.0, 1.3), (3.0, 3.0, 3.0)]


def scan_affine(seed: int, spacing: tuple[float, ...], tilt: float = 0.3) -> np.ndarray:
    """An oblique scan with its axes in any order and direction."""
    rng = np.random.default_rng(seed)
    turn = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(rng.uniform(-tilt, tilt, 3)).as_matrix() @ turn * spacing
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int16) -> torch.Tensor:
    values = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    return (values * 300).round().to(dtype) if not dtype.is_floating_point else (values * 300).to(dtype)


def world_ramp(grid: Grid) -> np.ndarray:
    """A volume whose values are linear in the world."""
    world = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))
    return world @ [1.0, -2.0, 3.0] + 7


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAL", "PIR", "ASL"])
def test_axes_grow_towards_superior_anterior_left(axcodes):
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axcodes))
    scan = nib.Nifti1Image(np.zeros((4, 5, 6)), np.eye(4)).as_reoriented(turn)
    assert nib.aff2axcodes(scan.affine) == tuple(axcodes)
    grid = working_grid(scan.shape, scan.affine, 2.0)
    assert nib.aff2axcodes(grid.affine) == tuple("SAL")
    np.testing.assert_allclose(grid.spacing, 2)


@pytest.mark.parametrize("seed", range(6))
def test_a_turned_file_has_the_same_working_grid(seed):
    affine, shape = scan_affine(seed, (0.7, 0.8, 2.5)), (20, 17, 9)
    image = nib.Nifti1Image(np.zeros(shape), affine)
    turned = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt("PIR")))
    ours, theirs = working_grid(shape, affine, 1.5), working_grid(turned.shape, turned.affine, 1.5)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-9)


def test_the_grid_covers_the_scan_and_overhangs_evenly():
    grid = working_grid((10, 10, 10), np.diag([1.0, 1.0, 1.0, 1.0]), 3.0)
    assert grid.shape == (4, 4, 4)
    ends = grid.to_world([[-0.5] * 3, [3.5] * 3])
    np.testing.assert_allclose(np.sort(ends, axis=0), [[-1.5] * 3, [10.5] * 3])


def test_true_spacing_not_the_endpoint_aligned_zoom():
    """Reference defect 3: 12 slices of 5 mm become 60 voxels declared 1 mm that are 55 / 59 mm apart."""
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    heights = 5.0 * torch.arange(12).expand(1, 4, 4, 12)
    grid = working_grid((4, 4, 12), affine, 1.0)
    assert grid.shape[0] * grid.spacing[0] == 60
    ours = resample(heights, affine, grid)[0, :, 0, 0].numpy()
    true = grid.to_world([(i, 0, 0) for i in range(60)])[:, 2]
    np.testing.assert_allclose(ours, true.clip(0, 55), atol=1e-4)
    theirs = 5.0 * np.arange(60) * (12 - 1) / (60 - 1)
    np.testing.assert_allclose(np.diff(theirs), 55 / 59)
    assert np.abs(theirs - np.arange(60)).max() == pytest.approx(4)


def test_world_and_index_are_inverse_and_crops_know_their_place():
    grid = Grid(scan_affine(1, (0.7, 0.8, 2.5)), (9, 8, 7))
    voxels = np.random.default_rng(0).uniform(-5, 20, (10, 3))
    np.testing.assert_allclose(grid.index_of(grid.to_world(voxels)), voxels, atol=1e-9)
    np.testing.assert_allclose(grid.crop((-2, 3, 1), (4, 4, 4)).to_world(voxels), grid.to_world(voxels + [-2, 3, 1]))


def test_cover_finds_the_part_that_holds_an_organ():
    affine = scan_affine(2, (1.0, 1.0, 2.0))
    mask = np.zeros((20, 21, 12), dtype=bool)
    mask[5:9, 10:13, 2:5] = True
    grid = working_grid(mask.shape, affine, 1.0)
    start, size = cover(mask, affine, grid)
    whole = resample(torch.from_numpy(mask[None]), affine, grid, "nearest")[0]
    part = resample(torch.from_numpy(mask[None]), affine, grid.crop(start, size), "nearest")[0]
    assert part.sum() == whole.sum() == 4 * 3 * 3 * 2
    assert part.numel() == whole.sum()
    with pytest.raises(ValueError, match="empty"):
        cover(np.zeros_like(mask), affine, grid)


def test_crop_start_is_clamped_and_small_volumes_lie_in_the_middle():
    assert crop_start((5, 50, 95), (16, 16, 16), (100, 100, 100)) == (0, 42, 84)
    assert crop_start((5, 5, 5), (16, 16, 16), (16, 10, 11)) == (0, -3, -3)


def test_wrong_grids_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="invertible"):
        Grid(np.zeros((4, 4)), (1, 1, 1))
    with pytest.raises(ValueError, match="three axes"):
        Grid(np.eye(4), (1, 0, 1))
    with pytest.raises(ValueError, match="spacing must be positive"):
        working_grid((4, 4, 4), np.eye(4), 0)
    with pytest.raises(ValueError, match="one volume"):
        resample(torch.zeros(4, 4, 4), np.eye(4), Grid(np.eye(4), (2, 2, 2)))
    with pytest.raises(ValueError, match="'linear' or 'nearest'"):
        resample(torch.zeros(1, 4, 4, 4), np.eye(4), Grid(np.eye(4), (2, 2, 2)), "cubic")
    rotated = Grid(scan_affine(0, (1, 1, 1)), (4, 4, 4))
    with pytest.raises(ValueError, match="rotated"):
        resample(torch.zeros(1, 4, 4, 4), np.eye(4), rotated)


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("seed", range(8))
def test_a_scan_at_the_working_spacing_is_only_turned_and_flipped(seed, mode):
    """Bit for bit, whatever the direction of its axes."""
    affine = scan_affine(seed, (0.7, 0.7, 0.7)).astype(np.float32)  # as a file holds it
    volume = noise(13, 11, 9, seed=seed)
    grid = working_grid(volume.shape[1:], affine, 0.7)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt("SAL"))
    expected = torch.from_numpy(apply_orientation(volume[0].numpy(), turn).copy())[None]
    found = resample(volume, affine, grid, mode)
    assert found.dtype == (torch.int16 if mode == "nearest" else torch.float32)
    assert torch.equal(found.to(torch.int16), expected)
    start = [2, -3, 4]
    crop = resample(volume, affine, grid.crop(start, [5, 6, 100]), mode, fill=-1000)
    inside = expected[:, 2:7, 0:3, 4:]
    assert torch.equal(crop[:, :, 3:6, : inside.shape[3]].to(torch.int16), inside)
    assert (crop[:, :, :3] == -1000).all()
    assert (crop[..., inside.shape[3] :] == -1000).all()


@pytest.mark.parametrize(("seed", "spacing"), enumerate(SPACINGS))
@pytest.mark.parametrize("pitch", [0.6, 1.0, 2.3])
def test_linear_in_the_world_stays_linear(seed, spacing, pitch):
    """Places are true on oblique scans: to rounding where the grid is finer, to 0.1 voxel where it averages."""
    scan = Grid(scan_affine(seed, spacing), (24, 22, 20))
    grid = working_grid(scan.shape, scan.affine, pitch)
    found = resample(torch.from_numpy(world_ramp(scan))[None], scan.affine, grid)[0].numpy()
    places = scan.index_of(grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)))
    inner = ((places >= 4) & (places <= np.array(scan.shape) - 5)).all(axis=-1)
    assert inner.sum() > 50
    slopes = np.abs(scan.affine[:3, :3].T @ [1.0, -2.0, 3.0])
    tolerance = 0.1 * slopes.sum() if min(spacing) < pitch else 1e-6
    np.testing.assert_allclose(found[inner], world_ramp(grid)[inner], atol=tolerance)


def test_a_coarser_grid_averages_noise_instead_of_picking_it():
    volume = noise(60, 60, 60, dtype=torch.float32)
    coarse = resample(volume, np.eye(4), working_grid((60, 60, 60), np.eye(4), 3.0))
    assert coarse[0, 2:-2, 2:-2, 2:-2].std() < 0.15 * volume.std()
    stripes = torch.tensor([1.0, -1.0]).repeat(30).expand(1, 60, 60, 60)
    shown = resample(stripes, np.eye(4), working_grid((60, 60, 60), np.eye(4), 2.5))
    assert shown[..., 2:-2].abs().max() < 0.1


@pytest.mark.parametrize(("seed", "spacing"), enumerate(SPACINGS))
def test_a_crop_reads_what_the_whole_grid_reads(seed, spacing):
    affine, volume = scan_affine(seed, spacing), noise(26, 27, 25)
    grid = working_grid(volume.shape[1:], affine, 1.4)
    start, size = (3, 2, 4), (6, 7, 8)
    crop = tuple(slice(a, a + n) for a, n in zip(start, size))
    for mode in ("linear", "nearest"):
        whole = resample(volume, affine, grid, mode, AIR)[0]
        part = resample(volume, affine, grid.crop(start, size), mode, AIR)[0]
        torch.testing.assert_close(part, whole[crop], atol=1e-3, rtol=0)


def test_a_volume_smaller_than_the_crop_lies_in_air():
    """Reference defect 16: it fails, or is padded with water at the end."""
    volume = torch.full((1, 6, 6, 6), 40, dtype=torch.int16)
    grid = working_grid((6, 6, 6), np.eye(4), 1.0)
    crop = resample(volume, np.eye(4), grid.crop(crop_start((3, 3, 3), (16, 8, 6), (6, 6, 6)), (16, 8, 6)), fill=AIR)
    assert crop.shape == (1, 16, 8, 6)
    assert (crop[:, 5:11, 1:7] == 40).all()
    assert (crop == AIR).sum() == 16 * 8 * 6 - 6**3
    beyond = resample(volume, np.eye(4), grid.crop((100, 0, 0), (4, 4, 4)), fill=AIR)
    assert (beyond == AIR).all()


def test_labels_on_any_grid_stay_labels():
    volume = torch.zeros(1, 12, 12, 12, dtype=torch.uint8)
    volume[:, 3:9, 3:9, 3:9] = 104
    for grid in (Grid(scan_affine(0, (0.8, 0.8, 0.8)), (30, 30, 30)), working_grid((12, 12, 12), np.eye(4), 0.7)):
        found = resample(volume, np.eye(4), grid, "nearest")
        assert found.dtype == torch.uint8
        assert set(found.unique().tolist()) <= {0, 104}
    # Two to one: which of two equally near voxels is taken is the same everywhere.
    halved = resample(volume, np.eye(4), working_grid((12, 12, 12), np.eye(4), 2.0), "nearest")
    assert len({tuple(plane.flatten().tolist()) for plane in halved[0, 2:4]}) == 1


def test_unknown_values_count_as_outside():
    volume = torch.zeros(1, 8, 8, 8)
    volume[0, 4, 4, 4] = torch.nan
    found = resample(volume, np.eye(4), working_grid((8, 8, 8), np.eye(4), 1.0), fill=AIR)
    assert (found == AIR).sum() == 1
    assert (found == 0).sum() == 8**3 - 1


def test_precision_is_not_lowered_by_the_engines_autocast():
    volume = noise(10, 10, 10)
    grid = working_grid((10, 10, 10), np.eye(4), 1.7)
    expected = resample(volume, np.eye(4), grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample(volume, np.eye(4), grid), expected)


class Sizes(TorchDispatchMode):
    """Numbers of elements of everything that is computed, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.made.append(out.numel())
        return out


def test_reading_costs_the_crop_not_the_volume():
    """A scan of 8e12 voxels that take no memory, and one whose only copy is the output."""
    endless = torch.tensor([[[[40]]]], dtype=torch.int16).expand(1, 20000, 20000, 20000)
    for spacing in (1.0, 1.3):
        grid = working_grid(endless.shape[1:], np.eye(4), spacing).crop((5000, 6000, 7000), (8, 8, 8))
        for mode in ("linear", "nearest"):
            torch.testing.assert_close(resample(endless, np.eye(4), grid, mode).float(), torch.full((1, 8, 8, 8), 40.0))

    volume, affine = noise(96, 96, 96), np.diag([0.8, 0.8, 0.8, 1])
    grid = working_grid(volume.shape[1:], affine, 1.0).crop((30, 30, 30), (12, 12, 12))
    with Sizes() as sizes:
        painted = resample(volume, affine, grid, fill=AIR) + 50
        paste(volume, affine, painted, torch.ones(1, 12, 12, 12), grid)
        paste_labels(volume, affine, torch.ones(1, 12, 12, 12), grid)
    assert sorted(sizes.made)[-2:] == [volume.numel()] * 2
    assert sorted(sizes.made)[-3] < volume.numel() / 20


# ----------------------------------------------------------------------------------------------------------- pasting


def ball(shape: tuple[int, ...], radius: float) -> torch.Tensor:
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) - (np.array(shape) - 1) / 2
    return torch.from_numpy(np.linalg.norm(places, axis=-1) <= radius)[None].float()


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize(("seed", "spacing"), enumerate(SPACINGS * 2))
def test_outside_the_painted_region_every_bit_stays(seed, spacing, dtype):
    affine, volume = scan_affine(seed, spacing), noise(30, 28, 26, seed=seed, dtype=dtype)
    kept = volume.clone()
    grid = working_grid(volume.shape[1:], affine, 1.2)
    crop = grid.crop([n // 2 - 8 for n in grid.shape], (16, 16, 16))
    mask = ball((16, 16, 16), 4)
    weight = feather(mask, 2)
    painted = resample(volume, affine, crop, fill=AIR) + 500
    out = paste(volume, affine, painted, weight, crop)
    assert torch.equal(volume, kept)  # reference defect 1: the input was overwritten
    assert out.dtype == dtype
    world = Grid(affine, (30, 28, 26)).to_world(np.argwhere(np.ones((30, 28, 26))))
    distance = np.linalg.norm(world - crop.to_world([7.5] * 3), axis=1).reshape(30, 28, 26)
    reach = 1.2 * (4 + 3) + np.sqrt(3) * max(1.2, *spacing)
    assert torch.equal(out[0][distance > reach], volume[0][distance > reach])
    # And inside the change arrives, in full where the file is fine enough.
    change = (out - volume)[0].double().numpy()
    assert change[distance < 2.4].mean() > (480 if max(spacing) < 2 else 250)
    assert change.min() >= -1
    assert change.max() <= 501


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
@pytest.mark.parametrize(("seed", "spacing"), enumerate(SPACINGS * 2))
def test_an_unchanged_crop_changes_nothing(seed, spacing, dtype):
    """Not even where the working grid is coarser than the file: what is pasted is the change."""
    affine, volume = scan_affine(seed, spacing), noise(21, 22, 23, seed=seed, dtype=dtype)
    crop = working_grid(volume.shape[1:], affine, 2.0).crop((-2, 1, 3), (20, 9, 9))
    same = resample(volume, affine, crop, fill=AIR)
    assert torch.equal(paste(volume, affine, same, torch.ones(same.shape), crop), volume)


def test_on_its_own_grid_paste_is_the_formula():
    volume = noise(12, 12, 12, dtype=torch.float32)
    grid = working_grid((12, 12, 12), np.eye(4), 1.0)
    crop = grid.crop((2, 3, 4), (6, 6, 6))
    painted, weight = noise(6, 6, 6, seed=1, dtype=torch.float32), torch.rand(1, 6, 6, 6)
    out = resample(paste(volume, np.eye(4), painted, weight, crop), np.eye(4), crop)
    before = resample(volume, np.eye(4), crop)
    torch.testing.assert_close(out, before + weight * (painted - before), atol=1e-3, rtol=0)
    full = paste(volume.round().to(torch.int16), np.eye(4), painted.round(), torch.ones_like(weight), crop)
    assert torch.equal(resample(full, np.eye(4), crop), painted.round())


def test_the_scans_range_is_kept():
    """Reference defect 12: the whole scan was clipped to +-1000 HU; metal and the integers' limits stay."""
    volume = torch.full((1, 10, 10, 10), 3071, dtype=torch.int16)
    volume[:, 5] = 32767
    volume[:, 6] = -32768
    crop = working_grid((10, 10, 10), np.eye(4), 1.0).crop((2, 2, 2), (6, 6, 6))
    mask = torch.zeros(1, 6, 6, 6)
    mask[0, 2:4, 2:4, 2:4] = 1
    brighter = resample(volume, np.eye(4), crop, fill=AIR) + 100
    out = paste(volume, np.eye(4), brighter, mask, crop)
    assert (out != volume).sum() == 4  # 4 of the 8 stay at the limit
    assert out[0, 5].max() == 32767
    assert (out == 3171).sum() == 4


def test_a_crop_that_misses_the_file_or_weighs_nothing_changes_nothing():
    volume, grid = noise(8, 8, 8), working_grid((8, 8, 8), np.eye(4), 1.0)
    away, painted = grid.crop((50, 0, 0), (4, 4, 4)), torch.zeros(1, 4, 4, 4)
    assert torch.equal(paste(volume, np.eye(4), painted, painted + 1, away), volume)
    assert torch.equal(paste(volume, np.eye(4), painted, painted, grid.crop((0, 0, 0), (4, 4, 4))), volume)
    assert torch.equal(paste_labels(volume, np.eye(4), painted + 1, away), volume)
    with pytest.raises(ValueError, match="own grid"):
        paste(volume, np.eye(4), painted, painted + 1, grid)


def test_feather_is_one_in_the_lesion_and_falls_to_zero():
    mask = ball((20, 20, 20), 5)
    weight = feather(mask, voxels=2)
    assert (weight[mask > 0] == 1).all()
    assert ((weight > 0) & (weight < 1)).any()
    line = weight[0, 10, 10, 10:]
    assert (line.diff() <= 0).all()
    assert weight[ball((20, 20, 20), 8) == 0].max() == 0
    assert torch.equal(feather(torch.zeros(1, 4, 4, 4)), torch.zeros(1, 4, 4, 4))
    assert torch.equal(feather(mask, voxels=0), mask)


@pytest.mark.parametrize(("seed", "spacing"), enumerate(SPACINGS * 2))
def test_a_pasted_lesion_has_its_place_and_volume(seed, spacing):
    affine = scan_affine(seed, spacing)
    labels = torch.ones(1, 32, 30, 28, dtype=torch.uint8)
    grid = working_grid(labels.shape[1:], affine, 1.2)
    crop = grid.crop([n // 2 - 8 for n in grid.shape], (16, 16, 16))
    mask = ball((16, 16, 16), 5)
    out = paste_labels(labels, affine, mask, crop)
    assert set(out.unique().tolist()) == {1, 2}
    lesion = np.argwhere((out == 2)[0].numpy())
    np.testing.assert_allclose(
        Grid(affine, (32, 30, 28)).to_world(lesion).mean(axis=0), crop.to_world([7.5] * 3), atol=0.5 * max(spacing)
    )
    assert len(lesion) * np.prod(spacing) == pytest.approx(float(mask.sum()) * 1.2**3, rel=0.2)


def test_a_lesion_below_one_voxel_is_not_lost():
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    labels = torch.ones(1, 8, 8, 6, dtype=torch.uint8)
    crop = working_grid((8, 8, 6), affine, 1.0).crop((8, 0, 0), (8, 8, 8))
    mask = torch.zeros(1, 8, 8, 8)
    mask[0, 3, 4, 4] = 1
    assert (paste_labels(labels, affine, mask, crop) == 2).sum() == 1


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "LAS", "SPR"])
def test_left_is_left_through_files(tmp_path, axcodes):
    """A lesion drawn on the patient's left, written and read again, is on the patient's left, superior, anterior."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -15
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axcodes))
    image = nib.Nifti1Image(np.full((16, 16, 16), 40, dtype=np.int16), affine).as_reoriented(turn)
    nib.save(image, tmp_path / "ct.nii.gz")
    read = nib.load(tmp_path / "ct.nii.gz")
    volume = torch.from_numpy(np.asarray(read.dataobj))[None]
    grid = working_grid(read.shape, read.affine, 1.0)
    crop = grid.crop((20, 18, 22), (8, 8, 8))
    mask = ball((8, 8, 8), 3)
    painted = resample(volume, read.affine, crop, fill=AIR) - 30
    out = paste(volume, read.affine, painted, mask, crop)
    labels = paste_labels(torch.zeros_like(volume), read.affine, mask, crop)
    for name, values in (("out", out), ("labels", labels)):
        nib.save(nib.Nifti1Image(values[0].numpy(), read.affine, read.header), tmp_path / f"{name}.nii.gz")
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.get_data_dtype() == np.int16
    np.testing.assert_array_equal(written.affine, read.affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj), out[0].numpy())
    lesion = nib.load(tmp_path / "labels.nii.gz")
    world = nib.affines.apply_affine(lesion.affine, np.argwhere(np.asarray(lesion.dataobj) == 2)).mean(axis=0)
    assert world[0] < -5  # left
    assert world[1] > 5  # anterior
    assert world[2] > 5  # superior
    changed = np.asarray(written.dataobj) != np.asarray(read.dataobj)
    assert changed[np.asarray(lesion.dataobj) == 2].all()


# ------------------------------------------------------------------------------------------------------- intensities


def test_intensities_are_the_published_curve_and_its_inverse():
    hu = torch.linspace(-3024, 3071, 2001)
    expected = np.interp(hu, [-1000, -200, 200, 1000], [0, 0.2, 0.8, 1])
    np.testing.assert_allclose(to_unit(hu).numpy(), expected, atol=1e-6)
    torch.testing.assert_close(to_hu(to_unit(hu)), hu.clamp(-1000, 1000), atol=2e-3, rtol=0)
    assert to_unit(torch.tensor([40], dtype=torch.int16)).dtype == torch.float32
    assert to_hu(torch.tensor([-0.3, 1.3])).tolist() == pytest.approx([-1000, 1000], abs=1e-3)
    assert all(a < b for a, b in itertools.pairwise(to_unit(torch.arange(-1000.0, 1001, 50)).tolist()))
