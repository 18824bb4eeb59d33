"""LesionDiffusion's working grid: crops of a CT at true spacing, and painted crops back into the file.

The CT stays on its own grid. A working grid, axes S, A, L, exists only as a matrix: what is read from it or pasted
through it touches the crop's part of the file alone, and what is not painted keeps its bits. World coordinates are RAS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.utils import convert_to_tensor
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import ArrayLike
from scipy import ndimage
from torch import Tensor

AXES = "SAL"
AIR = -1000.0
KNOTS_HU = (-1000.0, -200.0, 200.0, 1000.0)
KNOTS_UNIT = (0.0, 0.2, 0.8, 1.0)
SNAP = 1e-3  # voxels: affines of files are float32, so closer than that is equal
ROTATED = 0.05  # voxels along a whole grid: less is no rotation


# ------------------------------------------------------------------------------------------------------------- grids


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxels in the world.

    Args:
        affine: voxel -> world (4, 4), mm, RAS.
        shape: voxels along each axis.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
            raise ValueError(f"affine must be an invertible matrix (4, 4), got {affine.tolist()}: repair the header")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"a grid has three axes of at least one voxel, got {tuple(self.shape)}")
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres between voxels along each axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def crop(self, start: Sequence[int], size: Sequence[int]) -> Grid:
        """The part that begins at voxel ``start``; it may reach beyond this grid."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(start)
        return Grid(affine, (size[0], size[1], size[2]))

    def to_world(self, voxels: ArrayLike) -> np.ndarray:
        """Voxels (..., 3) -> mm (..., 3)."""
        return np.asarray(voxels) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index_of(self, world: ArrayLike) -> np.ndarray:
        """Millimetres (..., 3) -> voxels (..., 3), not rounded."""
        return (np.asarray(world) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T


def working_grid(shape: Sequence[int], affine: ArrayLike, spacing: float | Sequence[float]) -> Grid:
    """The grid S, A, L on which networks see a scan: its own axes turned and flipped, never rotated, at true spacing.

    It covers the scan's extent, voxel edge to voxel edge, and overhangs evenly where the spacing does not divide it;
    so a scan that has the spacing is only turned and flipped, and a file that is turned gives the same grid.

    Args:
        shape: of the scan.
        affine: of the scan, voxel -> RAS (4, 4).
        spacing: mm, one for all or one along each of S, A, L.

    Example:
        >>> working_grid((40, 40, 12), np.diag([1.0, 1.0, 5.0, 1.0]), 1.0).shape
        (60, 40, 40)
    """
    if np.min(spacing) <= 0:
        raise ValueError(f"spacing must be positive, got {spacing} mm")
    scan = Grid(np.asarray(affine), (shape[0], shape[1], shape[2]))
    turn = ornt_transform(io_orientation(scan.affine), axcodes2ornt(AXES))
    turned = scan.affine @ inv_ornt_aff(turn, scan.shape)
    size = np.array(scan.shape)[np.argsort(turn[:, 0])]
    scale = np.asarray(spacing) / np.linalg.norm(turned[:3, :3], axis=0)
    count = np.maximum(1, np.ceil(size / scale - SNAP)).astype(int)
    place = np.diag([*scale, 1.0])
    place[:3, 3] = (size - 1) / 2 - (count - 1) / 2 * scale
    return Grid(turned @ place, (int(count[0]), int(count[1]), int(count[2])))


def cover(mask: np.ndarray, affine: ArrayLike, grid: Grid) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Start and size of the part of a grid that holds a mask of the file, e.g. an organ: to look at it alone.

    Args:
        mask: bool (*S), on the file's own grid.
        affine: of the file.
        grid: e.g. the working grid.
    """
    if not mask.any():
        raise ValueError("the mask is empty: there is nothing to cover")
    first, last = _bounds(np.linalg.inv(grid.affine) @ np.asarray(affine, dtype=np.float64), *_extent(mask))
    first, last = np.floor(first + 0.5 + SNAP).astype(int), np.ceil(last - 0.5 - SNAP).astype(int)
    return tuple(first.tolist()), tuple((last - first + 1).tolist())


def crop_start(centre: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """First voxel of a crop: the reference's ``clamp(centre - size // 2, 0, shape - size)``.

    Where the volume is smaller than the crop the start is negative and what lies around it, evenly, is filled as
    `resample` is told (air); the reference pads with water at the end.
    """
    return tuple(
        min(max(c - s // 2, 0), n - s) if n >= s else (n - s) // 2 for c, s, n in zip(centre, size, shape, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- sampling


def resample(volume: Tensor, affine: ArrayLike, grid: Grid, mode: str = "linear", fill: float = 0.0) -> Tensor:
    """Read a grid off a volume; only the part that the grid covers is touched.

    Linear reading goes along the volume's axes, so the grid must not be rotated against it; where voxels of the grid
    are voxels of the volume it copies them, bit for bit; where the grid is coarser it averages (a triangle whose full
    width at half maximum is the grid's spacing), so that noise becomes no pattern.

    Args:
        volume: (C, *S).
        affine: of the volume, voxel -> RAS (4, 4).
        grid: where to read.
        mode: ``"linear"`` (intensities) or ``"nearest"`` (labels, any rotation).
        fill: value outside the volume's voxels, and of what is not finite: -1000 for HU, 0 for labels.

    Returns:
        (C, *grid.shape); linear: float32 (float64 of such), nearest: the volume's type.
    """
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode must be 'linear' or 'nearest', got {mode!r}")
    volume = convert_to_tensor(volume)
    matrix = np.linalg.inv(_grid_of(volume, affine).affine) @ grid.affine
    places = _places(matrix, grid.shape)
    if mode == "nearest":
        # Half-way goes up, whatever the rounding of the places.
        nearest = [np.clip(np.floor(c + 0.5 + SNAP), 0, n - 1) for c, n in zip(places, volume.shape[1:])]
        index = [torch.from_numpy(c.astype(np.int64)).to(volume.device) for c in nearest]
        out = volume[:, index[0], index[1], index[2]]
    else:
        out = _read_along_axes(volume, matrix, grid.shape, places, fill)
    for c, n in zip(places, volume.shape[1:]):
        outside = (c < -0.5 - SNAP) | (c > n - 0.5 + SNAP)
        if outside.any():
            out = out.masked_fill(torch.from_numpy(outside).to(out.device), fill)
    return out


def _grid_of(volume: Tensor, affine: ArrayLike) -> Grid:
    """A file's own grid."""
    if volume.ndim != 4:
        raise ValueError(f"expected one volume (C, X, Y, Z), got shape {tuple(volume.shape)}")
    return Grid(np.asarray(affine), (volume.shape[1], volume.shape[2], volume.shape[3]))


def _places(matrix: np.ndarray, size: Sequence[int]) -> list[np.ndarray]:
    """For each axis of a volume, where a grid's voxels lie on it; the shapes broadcast to ``size``."""
    along = np.ogrid[tuple(slice(0, n) for n in size)]
    # What does not rotate stays one-dimensional.
    return [
        sum((row[k] * along[k] for k in range(3) if abs(row[k]) * size[k] > ROTATED), np.full((1, 1, 1), row[3]))
        for row in matrix[:3]
    ]


def _read_along_axes(
    volume: Tensor, matrix: np.ndarray, size: Sequence[int], places: Sequence[np.ndarray], fill: float
) -> Tensor:
    """Linear reading: one small matrix of weights for each axis."""
    axes = np.abs(matrix[:3, :3]).argmax(axis=1)
    if sorted(axes) != [0, 1, 2] or any(c.size != size[k] for c, k in zip(places, axes)):
        raise ValueError("the grid is rotated against the volume: make it by working_grid of the volume's own affine")
    ratio = np.abs(matrix[range(3), axes])
    read = [_weights(c.ravel(), r, n) for c, r, n in zip(places, ratio, volume.shape[1:])]
    dtype = torch.float64 if volume.dtype == torch.float64 else torch.float32
    part = volume[(slice(None), *(box for box, _ in read))].to(dtype)
    part = part.nan_to_num(fill, fill, fill)
    with torch.autocast(volume.device.type, enabled=False):
        for _, weights in read:  # each axis is used up in front and comes back last
            part = torch.tensordot(part, torch.from_numpy(weights).to(part), dims=([1], [1]))
    return part.permute(0, *(1 + np.argsort(axes)).tolist())


def _weights(places: np.ndarray, ratio: float, n: int) -> tuple[slice, np.ndarray]:
    """What voxels of an axis count for places on it: which ones, and the weights (places, voxels); rows sum to 1."""
    whole = np.rint(places)
    places = (whole if np.abs(places - whole).max() < SNAP else places).clip(0, n - 1)
    width = ratio if ratio > 1 + SNAP else 1.0
    first, last = max(0, math.ceil(places.min() - width)), min(n - 1, math.floor(places.max() + width))
    weights = (1 - np.abs(places[:, None] - np.arange(first, last + 1)) / width).clip(0)
    return slice(first, last + 1), weights / weights.sum(axis=1, keepdims=True)


# ----------------------------------------------------------------------------------------------------------- pasting


def feather(mask: Tensor, voxels: int = 2) -> Tensor:
    """How much of a painted crop counts: 1 in the lesion, falling smoothly to 0 beyond ``voxels`` around it.

    Args:
        mask: (1, *S), inside above 0.5.
        voxels: width of the rim.

    Returns:
        weight (1, *S) in [0, 1].
    """
    mask = convert_to_tensor(mask) > 0.5
    weight = torch.zeros(mask.shape, device=mask.device)
    if mask.any():
        near = (slice(None), *_around(mask, [voxels] * 3))
        distance = ndimage.distance_transform_edt(~mask[near][0].cpu().numpy())
        weight[near] = torch.from_numpy(0.5 + 0.5 * np.cos(np.pi * np.minimum(distance / (voxels + 1), 1))).to(weight)
    return weight


def paste(original: Tensor, affine: ArrayLike, painted: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """Put a painted crop into the file's volume: ``original + weight * (painted - original)``.

    What is carried from grid to grid is the change, not the crop: so texture finer than the working grid stays, an
    unchanged crop changes nothing, and a voxel that no weight reaches keeps its bits.

    Args:
        original: (1, *S), the file's values.
        affine: of the file, voxel -> RAS (4, 4).
        painted: (1, *grid.shape), same unit.
        weight: (1, *grid.shape) in [0, 1], see `feather`.
        grid: of the crop.

    Returns:
        (1, *S), the type of ``original``; integers are rounded, and kept in their range.
    """
    out = convert_to_tensor(original).clone()
    painted, weight = (convert_to_tensor(crop).to(out.device) for crop in (painted, weight))
    box, there = _reached(out, affine, weight > 0, grid)
    if there is None:
        return out
    change = weight * (painted - resample(out, affine, grid, fill=AIR))
    change = resample(change, grid.affine, there)
    part = out[(slice(None), *box)]
    new = part + change
    if not part.is_floating_point():
        limits = torch.iinfo(part.dtype)
        new = new.round().clamp(limits.min, limits.max)
    part.copy_(torch.where(change != 0, new.to(part.dtype), part))
    return out


def paste_labels(labels: Tensor, affine: ArrayLike, mask: Tensor, grid: Grid, value: int = 2) -> Tensor:
    """Write a crop's mask into the file's label map, with smooth edges; a lesion below one voxel gets one.

    Args:
        labels: (1, *S), the file's label map.
        affine: of the file.
        mask: (1, *grid.shape), inside above 0.5.
        grid: of the crop.
        value: what to write.
    """
    out = convert_to_tensor(labels).clone()
    inside = convert_to_tensor(mask).to(out.device) > 0.5
    box, there = _reached(out, affine, inside, grid)
    if there is not None:
        share = resample(inside.float(), grid.affine, there)
        enough = min(0.5, float(share.max()) * (1 - SNAP))
        out[(slice(None), *box)].masked_fill_(share > enough, value)
    return out


def _reached(volume: Tensor, affine: ArrayLike, mask: Tensor, grid: Grid) -> tuple[tuple[slice, ...], Grid | None]:
    """The part of a file's volume that a crop's mask may reach, and that part's grid; none where they do not meet."""
    whole = _grid_of(volume, affine)
    if mask.shape[1:] != grid.shape:
        raise ValueError(f"the crop has shape {tuple(mask.shape[1:])}, its grid {grid.shape}: give the crop's own grid")
    if not mask.any():
        return (), None
    blur = np.ceil(np.abs(np.linalg.inv(grid.affine) @ whole.affine)[:3, :3].max(axis=1)).astype(int)
    near = _around(mask, (1 + blur).tolist())
    low, high = np.array([(s.start, s.stop - 1) for s in near]).T
    low, high = _bounds(np.linalg.inv(whole.affine) @ grid.affine, low, high)
    first = np.clip(np.floor(low), 0, whole.shape).astype(int).tolist()
    last = np.clip(np.ceil(high) + 1, 0, whole.shape).astype(int).tolist()
    box = tuple(slice(a, b) for a, b in zip(first, last))
    size = [b - a for a, b in zip(first, last)]
    return box, whole.crop(first, size) if min(size) > 0 else None


def _around(mask: Tensor, margin: Sequence[int]) -> tuple[slice, ...]:
    """The box around a mask (1, *S), larger by a margin as far as there are voxels."""
    low, high = _extent(mask[0].cpu().numpy())
    return tuple(
        slice(max(0, int(a) - m), min(n, int(b) + 1 + m)) for a, b, m, n in zip(low, high, margin, mask.shape[1:])
    )


def _extent(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last voxel of a mask along each axis."""
    held = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return np.array([h[0] for h in held]), np.array([h[-1] for h in held])


def _bounds(matrix: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the outer edges of voxels ``low`` to ``high`` lie after a matrix: least and greatest."""
    corners = np.array(np.meshgrid(*zip(low - 0.5, high + 0.5), indexing="ij")).reshape(3, 8)
    moved = matrix[:3, :3] @ corners + matrix[:3, 3:]
    return moved.min(axis=1), moved.max(axis=1)


# ------------------------------------------------------------------------------------------------------- intensities


def to_unit(hu: Tensor) -> Tensor:
    """HU -> [0, 1], continuous and piecewise linear: soft tissue (-200 to 200) gets 60 % of the range."""
    return _piecewise(hu, KNOTS_HU, KNOTS_UNIT)


def to_hu(unit: Tensor) -> Tensor:
    """[0, 1] -> HU, inverse of `to_unit`."""
    return _piecewise(unit, KNOTS_UNIT, KNOTS_HU)


def _piecewise(x: Tensor, knots: Sequence[float], values: Sequence[float]) -> Tensor:
    x = x if x.is_floating_point() else x.float()
    y = torch.full_like(x, values[0])
    for a, b, u, v in zip(knots[:-1], knots[1:], values[:-1], values[1:]):
        y += (x.clamp(a, b) - a) * ((v - u) / (b - a))
    return y
