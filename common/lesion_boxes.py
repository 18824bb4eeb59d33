"""Where a lesion goes and what of a drawn mask it is: boxes inside organs, thresholds, components (LesionDiffusion).

All arrays are on a working grid, axes S, A, L: index grows towards superior, anterior and the patient's left.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from .io import CaseError
from .lesion_words import INSIDE, LUMEN, OUTWARD, WALL, organ_id
from .lesion_words import LUNGS as LOBES

Triple = tuple[int, int, int]

LESION = 2  # its value in a label; 1 is the organ
LUNGS = frozenset(organ_id(name) for name in LOBES)

# Word -> axis and side of it, 1 where the index is large; central and peripheral are told by depth.
SIDES = {
    **dict.fromkeys(("upper", "superior", "cranial"), (0, 1)),
    **dict.fromkeys(("lower", "inferior", "caudal"), (0, -1)),
    **dict.fromkeys(("anterior", "ventral"), (1, 1)),
    **dict.fromkeys(("posterior", "dorsal"), (1, -1)),
    "left": (2, 1),
    "right": (2, -1),
    **dict.fromkeys(("central", "deep"), (3, 1)),
    **dict.fromkeys(("peripheral", "superficial", "subcapsular"), (3, -1)),
}

FILL = 0.4  # of its box, as the demo's lesions (0.36, 0.39)
ROUND_FILL = math.pi / 6
LEAST_MM3, LEAST_STONE_MM3 = 400, 50


# ------------------------------------------------------------------------------------------------------------- boxes


@dataclass(frozen=True)
class Box:
    """Voxels ``start`` to ``start + size``; may reach beyond the volume.

    Example:
        >>> Box.around((5, 5, 5), (3, 3, 1)).start
        (4, 4, 5)
    """

    start: Triple
    size: Triple

    def __post_init__(self) -> None:
        if len(self.start) != 3 or len(self.size) != 3 or min(self.size) < 1:
            raise ValueError(f"a box has three axes of at least one voxel, got start {self.start}, size {self.size}")
        object.__setattr__(self, "start", tuple(int(a) for a in self.start))
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))

    @classmethod
    def around(cls, centre: Sequence[int], size: Sequence[int]) -> Box:
        """Of exact size; the reference takes ``2 * (size // 2)`` voxels."""
        return cls(_triple(c - n // 2 for c, n in zip(centre, size, strict=True)), _triple(size))

    @classmethod
    def of(cls, mask: np.ndarray) -> Box:
        """The smallest around a mask."""
        found = ndimage.find_objects((np.asarray(mask) > 0).view(np.uint8))
        if not found:
            raise ValueError("the mask is empty: no box around it")
        return cls(_triple(s.start for s in found[0]), _triple(s.stop - s.start for s in found[0]))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of its part inside a volume."""
        return tuple(slice(max(a, 0), max(a + n, 0)) for a, n in zip(self.start, self.size))

    @property
    def centre(self) -> Triple:
        """(first + last) // 2, the reference's."""
        return _triple(a + (n - 1) // 2 for a, n in zip(self.start, self.size))

    @property
    def voxels(self) -> int:
        """Its volume."""
        return math.prod(self.size)

    def mask(self, shape: Sequence[int]) -> np.ndarray:
        """Itself in a volume, bool."""
        out = np.zeros(tuple(shape), dtype=bool)
        out[self.slices] = True
        return out

    def grown(self, voxels: int) -> Box:
        """Larger by so much on every side."""
        return Box(_triple(a - voxels for a in self.start), _triple(n + 2 * voxels for n in self.size))

    def moved(self, offset: Sequence[int]) -> Box:
        """Shifted, e.g. by minus the start of a crop."""
        return Box(_triple(a + o for a, o in zip(self.start, offset, strict=True)), self.size)


def _triple(values: Iterable[Any]) -> Triple:
    a, b, c = (int(v) for v in values)
    return a, b, c


def _written(size: Sequence[int]) -> str:
    return "x".join(str(n) for n in size)


def box_size(size_mm: Sequence[float], spacing: float | Sequence[float]) -> Triple:
    """Voxels along S, A, L of a report's size along L-R, A-P, S-I in mm; at least one."""
    return _triple(np.maximum(1, np.rint(np.asarray(size_mm)[::-1] / np.asarray(spacing))))


def place_box(
    organ: np.ndarray,
    size: Sequence[int],
    *,
    hollow: bool,
    cavity: str,
    rng: np.random.Generator,
    location: str = "",
    limit: Sequence[int] | None = None,
    wall: int = 5,
    name: str = "the organ",
    reference: bool = False,
) -> Box:
    """Draw a box for a lesion of an organ.

    Args:
        organ: bool (S, A, L), the scan or any part of it that holds the organ.
        size: of the box, voxels along S, A, L.
        hollow: whether the organ is (urinary bladder, stomach, colon, esophagus, ...).
        cavity: the report's: ``"within the parenchymal organ"``: the ellipsoid that fills the box lies in it;
            ``"protruding from ..."``: it crosses its surface; ``"within the lumen of a hollow organ"``: the centre is
            deeper than the wall; ``"wall thickening"``: it is not; anything else: the centre is in the organ.
        rng: draws the centre.
        location: words for the part of the organ that holds the centre: a half of its extent (upper, anterior, left of
            the patient, ...), central or peripheral; other words are passed over.
        limit: largest box the network can draw, its crop.
        wall: voxels of a hollow organ's wall; the published 5 are 5 mm.
        name: of the organ, for messages.
        reference: as published: a box that fits nowhere goes anywhere, location is not heard.
    """
    size = _triple(size)
    if min(size) < 1:
        raise CaseError(f"{name}: a lesion of {_written(size)} voxels has no extent: give a size of at least one voxel")
    for most, what in ((limit, "the crop that the network draws in"), (organ.shape, "the scan")):
        if most is not None and any(n > m for n, m in zip(size, most, strict=True)):
            raise CaseError(
                f"{name}: a box of {_written(size)} voxels (S, A, L) is larger than {what}, {_written(most)}: "
                "ask for a smaller lesion"
            )
    centres = box_centres(
        organ, size, hollow=hollow, cavity=cavity, location=location, wall=wall, name=name, reference=reference
    )
    return Box.around(centres[rng.integers(len(centres))], size)


def box_centres(
    organ: np.ndarray,
    size: Sequence[int],
    *,
    hollow: bool,
    cavity: str,
    location: str = "",
    wall: int = 5,
    name: str = "the organ",
    reference: bool = False,
) -> np.ndarray:
    """Every centre that a box may get, moved where it would leave the volume; arguments as of `place_box`.

    Returns:
        voxels (N, 3).
    """
    if not organ.any():
        raise CaseError(f"{name}: no voxel of it in the organ map; choose an organ that the scan shows")
    size, held = _triple(size), Box.of(organ)
    part = organ[held.slices]
    share = part if reference else part & _share(part, location, name)
    region = _region(part, size, hollow, cavity.strip().rstrip(",").lower(), wall, reference) & share
    if not region.any():
        where = f"{cavity.strip(' ,')} {f'in its part {location!r}' if location else ''}".strip()
        raise CaseError(
            f"{name}: a box of {_written(size)} voxels (S, A, L) fits nowhere {where}: "
            f"{_largest(part, share, size)} would, or choose another place"
        )
    low = np.array(size) // 2
    high = np.array(organ.shape) - (low + 1 if reference else size - low)
    return np.clip(np.argwhere(region) + held.start, low, high)


def _region(organ: np.ndarray, size: Triple, hollow: bool, cavity: str, wall: int, reference: bool) -> np.ndarray:
    """Where in an organ the centre may lie."""
    region = organ
    if hollow and cavity in (LUMEN, WALL):
        core = ndimage.binary_erosion(organ, iterations=max(1, wall))
        region = core if cavity == LUMEN else organ & ~core
    elif not hollow and cavity == INSIDE:
        region = _boxes_fit(organ, _triple(2 * (n // 2) + 1 for n in size)) if reference else _fits(organ, size)
        return region if region.any() or not reference else organ
    elif not hollow and cavity == OUTWARD and not reference:
        region = organ & ~_fits(organ, size)
    return region if region.any() else organ


def _fits(organ: np.ndarray, size: Triple) -> np.ndarray:
    """Centres at which the ellipsoid that fills a box lies in an organ: a lesion has no corners."""
    radii = np.maximum(np.array(size) / 2, 0.5)
    return ndimage.distance_transform_edt(np.pad(organ, 1), 1 / radii)[1:-1, 1:-1, 1:-1] >= 1


def _boxes_fit(organ: np.ndarray, size: Triple) -> np.ndarray:
    """Centres of the boxes that lie in an organ."""
    return ndimage.minimum_filter(organ.view(np.uint8), size, mode="constant", cval=0).astype(bool)


def _largest(organ: np.ndarray, share: np.ndarray, size: Triple) -> str:
    """The largest box of like proportions that fits, in words."""
    least, most = 0.0, 1.0
    for _ in range(6):
        middle = (least + most) / 2
        fits = _fits(organ, _scaled(size, middle)) & share
        least, most = (middle, most) if fits.any() else (least, middle)
    return _written(_scaled(size, least))


def _scaled(size: Triple, factor: float) -> Triple:
    return _triple(max(1, int(n * factor)) for n in size)


def location_words(location: str) -> list[str]:
    """The words of a report's location that have a place in an organ."""
    return [word for word in re.findall("[a-z]+", location.lower()) if word in SIDES]


def _share(organ: np.ndarray, location: str, name: str) -> np.ndarray:
    """The part of an organ, cut to its extent, that location words mean."""
    words = location_words(location)
    if location.strip() and not words:
        raise CaseError(f"{name}: location {location!r} names no part of an organ: use {', '.join(SIDES)}")
    sides: dict[int, int] = {}
    for axis, side in map(SIDES.__getitem__, words):
        if sides.setdefault(axis, side) != side:
            raise CaseError(f"{name}: location {location!r} contradicts itself: keep one of opposite words")
    share = np.ones(organ.shape, dtype=bool)
    for axis, side in sides.items():
        if axis == 3:
            depth = ndimage.distance_transform_edt(np.pad(organ, 1))[1:-1, 1:-1, 1:-1]
            share &= side * (2 * depth - depth.max()) >= 0
        else:
            n = organ.shape[axis]
            half = side * (2 * np.arange(n) - (n - 1)) >= 0
            share &= half.reshape([n if a == axis else 1 for a in range(3)])
    return share


# ------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class LesionMask:
    """A lesion cut out of a drawn soft mask.

    Args:
        mask: bool (S, A, L).
        threshold: the soft value above which it lies.
        voxels: how many it has.
        aim: how many it should have.
        large: whether it has more than the least that counts.
        overlaps: whether it meets an earlier lesion.
    """

    mask: np.ndarray
    threshold: float
    voxels: int
    aim: int
    large: bool
    overlaps: bool

    @property
    def accepted(self) -> bool:
        """Else draw again."""
        return self.large and not self.overlaps


def plausible_fill(shape: str) -> float:
    """How much of its box a lesion of a described shape fills."""
    return ROUND_FILL if any(word in shape.lower() for word in ("round", "cyst", "nodul", "punctate")) else FILL


def least_voxels(spacing: float | Sequence[float] = 1.0, stone: bool = False) -> int:
    """The published least volume of a lesion, 400 voxels of 1 mm, of a stone 50, at another spacing."""
    volume = float(np.prod(np.broadcast_to(spacing, 3)))
    return max(1, round((LEAST_STONE_MM3 if stone else LEAST_MM3) / volume))


def binarise(
    soft: np.ndarray,
    box: Box,
    *,
    fill: float | None = None,
    least: int = LEAST_MM3,
    allowed: np.ndarray | None = None,
    taken: np.ndarray | None = None,
    reference: bool = False,
) -> LesionMask:
    """Cut the lesion out of a drawn mask: the largest component, at the threshold that brings it nearest to the aim.

    Args:
        soft: (S, A, L), about 0 outside and 1 inside.
        box: of the lesion.
        fill: the share of the box to aim at, see `plausible_fill`; ``None`` is 0.4.
        least: voxels above which a lesion counts, see `least_voxels`; never more than half of the aim.
        allowed: bool, where a lesion may be, e.g. the organ.
        taken: bool, earlier lesions.
        reference: as published: the aim is the whole box, and the lesion may be anywhere.
    """
    region = np.ones(soft.shape, dtype=bool) if reference else box.grown(1).mask(soft.shape)
    if allowed is not None and not reference:
        region &= allowed
    room = int(region[box.slices].sum())
    aim = room if reference else round(room * (FILL if fill is None else fill))
    thresholds = np.linspace(0.9, 0.3, 7) if reference else np.linspace(0.9, 0.1, 17)
    masks = [_largest_component((soft > threshold) & region) for threshold in thresholds]
    best = int(np.argmin([abs(int(mask.sum()) - aim) for mask in masks]))
    voxels = int(masks[best].sum())
    large = voxels > (least if reference else min(least, aim / 2))
    overlaps = taken is not None and bool((masks[best] & taken).any())
    return LesionMask(masks[best], float(thresholds[best]), voxels, aim, large, overlaps)


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """Faces join."""
    numbered, count = ndimage.label(mask)
    return numbered == 1 + np.bincount(numbered.ravel())[1:].argmax() if count else mask


@dataclass(frozen=True, eq=False)
class Component:
    """One lesion of a label map: its box in the map, and its mask inside that box (bool)."""

    box: Box
    mask: np.ndarray

    @property
    def voxels(self) -> int:
        """Its volume."""
        return int(self.mask.sum())

    def in_volume(self, shape: Sequence[int]) -> np.ndarray:
        """Its mask in the whole map."""
        out = np.zeros(tuple(shape), dtype=bool)
        out[self.box.slices] = self.mask
        return out


def components(lesions: np.ndarray, max_count: int = 3, min_voxels: int = 50) -> list[Component]:
    """The lesions of a mask, largest first.

    Args:
        lesions: bool (*S).
        max_count: how many at most.
        min_voxels: smaller and equal ones are left out, unless all are: then the largest counts.
    """
    if not lesions.any():
        return []
    held = Box.of(lesions)
    numbered, _ = ndimage.label(lesions[held.slices])
    voxels = np.bincount(numbered.ravel())[1:]
    order = np.argsort(-voxels, kind="stable")[:max_count]
    kept = [k for k in order if voxels[k] > min_voxels] or order[:1].tolist()
    found = ndimage.find_objects(numbered)
    boxes = [Box(_triple(s.start for s in found[k]), _triple(s.stop - s.start for s in found[k])) for k in kept]
    return [Component(box.moved(held.start), numbered[box.slices] == k + 1) for box, k in zip(boxes, kept)]


def centre_of(mask: np.ndarray) -> Triple:
    """The voxel in the middle of the largest component's box: around it training crops lie."""
    if not (found := components(mask, 1, 0)):
        raise CaseError("the label holds no lesion (value 2): nothing to crop around; leave the case out")
    return found[0].box.centre


def target_numbers(organs: np.ndarray, numbers: Sequence[int], region: np.ndarray) -> list[int]:
    """Which of a report's organs a lesion is in: the one with most of its region; of lungs all lobes named.

    Args:
        organs: organ map (*S), TotalSegmentator's v1 numbers.
        numbers: of the report's organs.
        region: bool (*S): the lesion, its box, or a crop around it.
    """
    if LUNGS.intersection(numbers):
        return list(numbers)
    shares = np.bincount(organs[region].astype(np.int64).ravel(), minlength=max(numbers) + 1)
    return [max(numbers, key=lambda number: shares[number])]


def target_organ(organs: np.ndarray, numbers: Sequence[int], region: np.ndarray) -> np.ndarray:
    """What a network is told the organ is, bool (*S); arguments as of `target_numbers`."""
    return np.isin(organs, target_numbers(organs, numbers, region))
