"""Phantoms with a described lesion: bodies of the earlier rooms, in TotalSegmentator's numbers, and a lesion that looks
as its report says.

Words become numbers here: density a mean, variation a mottling, margin a ramp, shape a radius over directions, cavity
a place. `paint_lesion` paints into any CT with an organ map, real ones as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from .abdomen_phantoms import FIELD_OF_VIEW, abdomen, draw_attributes
from .io import CaseError, stem, write_json
from .lesion_boxes import SIDES, location_words
from .lesion_reports import LesionReport, cavity_of, complete, draw_report, write_reports
from .lesion_words import (
    ABSOLUTE_HU,
    CAVITY,
    DENSITY,
    ENHANCEMENT,
    FEATURES,
    GROUND_GLASS,
    LESION_KINDS,
    LUNGS,
    MARGIN,
    OUTWARD,
    PART_SOLID,
    RELATIVE_HU,
    SHAPE,
    VALUE,
    VARIATIONS,
    WALL,
    is_hollow,
    organ_id,
)
from .phantoms import FIELD_OF_VIEW as THORAX_VIEW
from .phantoms import Field, fill_cohort, smooth_field, thorax, write_nifti
from .reports import Attributes, Finding
from .totalsegmentator import ORGANS, TOTAL_V1

RECIPE = 1  # raise it when a change below alters the voxels of a given seed
THORAX_EVERY = 6  # bodies

WALL_HU, LUNG_HU = 60, 45  # what a lesion of a hollow organ or a lung is compared with
OUTWARD_SHARE = 0.4  # of lesions of solid organs
SPLEEN_SHARE = 0.08
SMALLEST = 0.2  # share of the asked ellipsoid that must find room


@dataclass(frozen=True)
class LesionBody:
    """A healthy body.

    Attributes:
        image: HU (X, Y, Z), int16.
        organs: label map (X, Y, Z), uint8, TotalSegmentator's v1 numbers.
        affine: voxel to RAS+ world matrix (4, 4), mm.
        enhanced: whether contrast medium was given.
    """

    image: np.ndarray
    organs: np.ndarray
    affine: np.ndarray
    enhanced: bool


# ---------------------------------------------------------------- bodies


@lru_cache(maxsize=1)
def lesion_body(number: int, shape: tuple[int, int, int], chest: bool = False) -> LesionBody:
    """A body without a lesion; the last one is kept, since painting it takes longest.

    Args:
        number: same number, same body.
        shape: voxels of an abdomen of 360 x 270 x 384 mm; a chest is lower, of equal voxels.
        chest: a thorax instead of an abdomen.
    """
    rng = np.random.default_rng([number, 2])
    if chest:
        height = round(shape[2] * THORAX_VIEW[2] / FIELD_OF_VIEW[2])
        case = thorax(number, (*shape[:2], height), num_nodules=0)
        return LesionBody(case.image, lobes(case.layout == 1, case.affine), case.affine, False)
    said = draw_attributes(rng)
    healthy = Attributes((Finding("tumour", "absent"), *said.findings[1:]), said.sex, said.age)
    body, enhanced = abdomen(number, shape, healthy), bool(rng.random() < 0.75)
    numbers = [TOTAL_V1.index(name) + 1 if name in TOTAL_V1 else 0 for name in ORGANS]
    numbers[ORGANS.index("vertebrae")] = TOTAL_V1.index("vertebrae_L3") + 1
    organs = np.array(numbers, dtype=np.uint8)[body.layout]
    bases = lobes((body.layout == ORGANS.index("body")) & (body.image < -600), body.affine, bases=True)
    image = body.image if enhanced else without_contrast(body.image)
    return LesionBody(image, np.maximum(organs, bases), body.affine, enhanced)


def lobes(lung: Field, affine: np.ndarray, bases: bool = False) -> Field:
    """Lungs parted by plain fissures into TotalSegmentator's five lobes; ``bases`` are of the lower ones alone."""
    x, y, z = (o + s * np.arange(n) for o, s, n in zip(affine[:3, 3], np.diag(affine), lung.shape, strict=False))
    x, y, z = x[:, None, None], y[:, None], z
    lower = np.broadcast_to(z < -0.9 * y, lung.shape) | bases
    right = np.where(lower, 17, np.where((z < 8) & (y > 0), 16, 15))
    return (lung * np.where(x > 0, right, np.where(lower, 14, 13))).astype(np.uint8)


def without_contrast(image: np.ndarray) -> np.ndarray:
    """The same body without contrast medium: enhanced tissue falls to what it is by itself, its noise stays."""
    calm = ndimage.gaussian_filter(image.astype(np.float32), 0.8)
    fall = np.interp(calm, [-1024, 45, 185, 330, 3071], [-1024, 45, 56, 330, 3071]) - calm
    return np.rint(image + fall).astype(np.int16)


# ---------------------------------------------------------------- what the words mean


def has(report: LesionReport, key: str, *words: str) -> bool:
    """Whether an attribute holds one of the words."""
    return any(word in report.attributes.get(key, "") for word in words)


def mean_density(report: LesionReport, organ: float, rng: np.random.Generator) -> float:
    """Mean HU of the lesion: its CT value, else drawn from the range of its density word.

    Args:
        report: what is said.
        organ: HU of the organ, of which most words are parts.
        rng: draws within the range.
    """
    share, kind = rng.random(), LESION_KINDS.get(report.lesion)
    if said := report.attributes.get(VALUE):
        return float(said.removesuffix("HU"))
    density = report.attributes.get(DENSITY, "")
    low, high = (organ * (1 + part) for part in RELATIVE_HU.get(density, (-0.3, 0.1)))
    if kind is not None and kind.hu and density in kind.densities:
        low, high = kind.hu
    low, high = ABSOLUTE_HU.get(density, (low, high))
    return low + share * (high - low)


def organ_density(report: LesionReport, image: Field, organ: Field) -> float:
    """HU of the organ itself: of a hollow one's wall, of solid tissue in a lung, else its median."""
    if is_hollow(report.organ):
        return WALL_HU
    return LUNG_HU if report.organ in LUNGS else float(np.median(image[organ]))


def bumps(report: LesionReport, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions (K, 3), heights and sharpness (K,) of what makes the shape differ from an ellipsoid."""
    kinds = [(3, 0.03, 2.5)]
    if has(report, SHAPE, "irregular"):
        kinds += [(7, 1.1, 8.0), (10, 0.4, 16.0)]
    if has(report, MARGIN, "ill-defined", "unclear", "irregularity", "poorly"):
        kinds += [(10, 0.1, 12.0)]
    if has(report, FEATURES, "spiculated"):
        kinds += [(12, 0.8, 25.0)]
    directions = rng.normal(size=(sum(n for n, _, _ in kinds), 3))
    heights = np.concatenate([h * rng.uniform(0.4 if s >= 25 else -0.8, 1, n) for n, h, s in kinds])
    sharpness = np.concatenate([np.full(n, s) for n, _, s in kinds])
    return directions / np.linalg.norm(directions, axis=1, keepdims=True), heights, sharpness


def radius_over(directions: Sequence[Field], shape: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Field:
    """Radius of the shape in unit directions."""
    radius = np.ones_like(directions[0])
    for (a, b, c), height, sharp in zip(*shape, strict=True):
        radius += height * np.exp(sharp * (directions[0] * a + directions[1] * b + directions[2] * c - 1))
    return np.maximum(radius, 0.4)


def shape_distance(offset: Sequence[Field], radii: np.ndarray, report: LesionReport, rng: np.random.Generator) -> Field:
    """Distance in mm, first order, to the lesion's surface, whose extent along the axes is twice ``radii``."""
    shape = bumps(report, rng)
    # The shape's own box, over directions spread evenly (Fibonacci), is stretched to the one asked for.
    turn = np.arange(2000) + 0.5
    up = 1 - turn / 1000
    flat, angle = np.sqrt(1 - up**2), np.pi * (1 + 5**0.5) * turn
    around = np.stack([flat * np.cos(angle), flat * np.sin(angle), up])
    points = around * radius_over(list(around), shape)
    low, high = points.min(1), points.max(1)
    stretch = (high - low) / (2 * radii)
    v = [o * s + (a + b) / 2 for o, s, a, b in zip(offset, stretch, low, high, strict=True)]
    length = np.sqrt(v[0] ** 2 + v[1] ** 2 + v[2] ** 2) + 1e-6
    u = [axis / length for axis in v]
    slope = np.sqrt(sum((axis * s) ** 2 for axis, s in zip(u, stretch, strict=True)))
    return ((length - radius_over(u, shape)) / slope).astype(np.float32)


def contents(
    report: LesionReport, mean: float, inside: Field, distance: Field, size: np.ndarray, rng: np.random.Generator
) -> Field:
    """HU in and around a lesion, without noise; ``size`` is its radius in voxels along each axis."""
    mottling, areas = (smooth_field(distance.shape, np.maximum(share * size, 0.7), rng) for share in (0.28, 0.35))
    deepest = max(float(-distance[inside].min()), 1e-3)
    hu = np.zeros_like(distance)
    if has(report, VARIATIONS, "heterogeneous"):
        hu += 17 * mottling
    if has(report, DENSITY, "mixed"):
        hu += 26 * areas
    if has(report, DENSITY, "ring"):
        hu += 120 * np.clip(2 - 7 * np.abs(distance / deepest + 0.25), 0, 1)
    if has(report, DENSITY, PART_SOLID):  # as much of the outside as makes the mean
        rim = np.quantile(distance[inside], np.clip(1 - (LUNG_HU - mean) / 600, 0, 1))
        hu -= 600 * np.clip(0.5 + 4 * (distance - rim) / deepest, 0, 1)
    if has(report, FEATURES, "increased"):
        hu += 75 * np.clip(2 * areas - 1, 0, 1)
    if has(report, FEATURES, "decreased", "retention"):
        hu -= 60 * np.clip(-2 * mottling - 0.8, 0, 1)
    if has(report, FEATURES, "stone") and "stone" not in report.lesion:
        hu += 350 * np.clip(-4 * distance / deepest - 2.4, 0, 1)
    return hu + mean - hu[inside].mean()


# ---------------------------------------------------------------- where it goes


def among(places: np.ndarray, location: str, organ: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Those of the places (N, 3), with depths (N,), that lie where the words say, e.g. in the upper half."""
    for axis, side in (SIDES[word] for word in location_words(location)):
        if axis == 3:
            fits = side * (depth - np.median(depth)) >= 0
        else:
            # Theirs are S, A, L, ours R, A, S.
            at, extent = (side if axis < 2 else -side) * places[:, 2 - axis], organ[:, 2 - axis]
            fits = at >= (side if axis < 2 else -side) * (extent.min() + extent.max()) / 2
        places, depth = (places[fits], depth[fits]) if fits.any() else (places, depth)
    return places


def place_lesion(
    report: LesionReport, organ: Field, free: Field, spacing: np.ndarray, radii: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw the voxel of the lesion's centre, by cavity and location."""
    cavity = cavity_of(report)
    # In units of the ellipsoid, so that at depth 1 it fits.
    depth = ndimage.distance_transform_edt(organ, sampling=spacing / radii)
    if cavity == OUTWARD:
        room = ndimage.uniform_filter(free.astype(np.float32), np.maximum(1, np.rint(2 * radii / spacing)).astype(int))
        fits = (depth > 0) & (depth < max(0.7, 1.01 * depth[depth > 0].min()))
        fits &= depth >= min(0.3, depth[fits].max())
        fits &= room >= 0.75 * room[fits].max()
    elif cavity == WALL:
        touching = has(report, SHAPE, "protrusion")
        fits = (depth > 0) & (depth < max(0.8 if touching else 0.45, 1.01 * depth[depth > 0].min()))
    else:
        fits = depth >= min(1.0, 0.98 * float(depth.max()))
    places = among(np.argwhere(fits), report.location, np.argwhere(organ), depth[fits])
    return places[rng.integers(len(places))]


def crescent(
    report: LesionReport, organ: Field, spacing: np.ndarray, radii: np.ndarray, rng: np.random.Generator
) -> Field:
    """Distance to what lies deeper in a hollow organ than a thickened wall of uneven thickness."""
    depth = ndimage.distance_transform_edt(organ, sampling=spacing).astype(np.float32) - float(spacing.min()) / 2
    thick = (0.9 if has(report, SHAPE, "narrowing") else 0.6) * float(radii.min())
    uneven = 1 + 0.25 * smooth_field(organ.shape, np.maximum(0.4 * radii / spacing, 0.7), rng)
    return depth - np.clip(thick, float(spacing.max()), 16) * uneven


def paint_lesion(
    image: np.ndarray, organs: np.ndarray, affine: np.ndarray, report: LesionReport, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paint the lesion that a report describes into a CT.

    Args:
        image: HU (X, Y, Z), any orientation and voxel size.
        organs: label map (X, Y, Z), TotalSegmentator's v1 numbers.
        affine: voxel to RAS+ world matrix (4, 4), mm.
        report: with a size.
        rng: draws place, form and texture.

    Returns:
        a new image of the same type, equal to the old one beyond the lesion's rim, and the lesion's mask (X, Y, Z).
    """
    if report.size_mm is None:
        raise ValueError("the report has no size_mm: complete() writes one")
    turn = nib.orientations.io_orientation(affine)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    painted, mask = image.copy(), np.zeros(image.shape, dtype=bool)
    seen, labels, lesion = (nib.orientations.apply_orientation(x, turn) for x in (painted, organs, mask))
    _paint(seen, labels, lesion, spacing, report, rng)
    seen, lesion = (nib.orientations.apply_orientation(x, back) for x in (seen, lesion))
    return np.ascontiguousarray(seen), np.ascontiguousarray(lesion)


def _paint(
    image: Field, organs: Field, lesion: Field, spacing: np.ndarray, report: LesionReport, rng: np.random.Generator
) -> None:
    """As `paint_lesion`, in place, axes R, A, S."""
    values = [organ_id(name) for name in report.organs or (report.organ,)]
    everywhere = np.isin(organs, values)
    if not everywhere.any():
        raise CaseError(f"organ map holds no {report.organ} ({values}): ask for a lesion of an organ that it holds")
    radii = np.array(report.size_mm, dtype=float) / 2
    reach = np.ceil(1.3 * radii / spacing).astype(int) + 3
    whole = _around(np.argwhere(everywhere), reach, organs.shape)
    organ, free = everywhere[whole], _fat(image[whole], organs[whole])
    centre = place_lesion(report, organ, free, spacing, radii, rng) + [axis.start for axis in whole]

    # All else happens in a box around it.
    box = _around(centre[None], reach, organs.shape)
    old = image[box].astype(np.float32)
    offset = np.meshgrid(
        *(s * (np.arange(b.start, b.stop) - c) for s, b, c in zip(spacing, box, centre, strict=True)),
        indexing="ij", sparse=True,
    )  # fmt: skip
    edge = float(np.prod(spacing) ** (1 / 3))
    distance = shape_distance(offset, radii, report, rng)
    inner = tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, whole, strict=True))
    if cavity_of(report) == OUTWARD:
        allowed = (organ | free)[inner]
    else:
        allowed = organ[inner]
        if cavity_of(report) == WALL and not has(report, SHAPE, "protrusion"):
            distance = np.maximum(distance, crescent(report, organ, spacing, radii, rng)[inner])
    distance = np.where(allowed, distance, 1e3)
    middle = tuple(c - b.start for c, b in zip(centre, box, strict=True))
    distance[middle] = min(distance[middle], -edge / 4)  # never too small to be seen
    pieces, _ = ndimage.label(distance < 0)
    inside = pieces == pieces[middle]
    distance = np.where(inside | (distance > 0), distance, edge)
    if inside.sum() * np.prod(spacing) < SMALLEST * 4 / 3 * np.pi * np.prod(radii) - np.prod(spacing):
        size = " x ".join(f"{2 * radius:g}" for radius in radii)
        raise CaseError(f"a lesion of {size} mm does not fit into the {report.organ}: ask for a smaller one")

    base = organ_density(report, image[whole], organ)
    mean = mean_density(report, base, rng)
    new = contents(report, mean, inside, distance, radii / spacing, rng) + _noise(image[whole], old.shape, rng)
    if has(report, DENSITY, GROUND_GLASS):
        new = np.maximum(new, np.where(inside, old, new))  # vessels show through it
    mixed = old + _cover(report, distance, edge, float(radii.min())) * (new - old)
    image[box] = np.clip(np.rint(mixed), -1024, 3071) if np.issubdtype(image.dtype, np.integer) else mixed
    lesion[box] |= inside


def _around(voxels: np.ndarray, reach: np.ndarray, shape: Sequence[int]) -> tuple[slice, ...]:
    """The box of voxels within ``reach`` of others."""
    low, high = voxels.min(0) - reach, voxels.max(0) + reach + 1
    return tuple(slice(max(0, int(a)), min(int(b), n)) for a, b, n in zip(low, high, shape, strict=True))


def _cover(report: LesionReport, distance: Field, edge: float, radius: float) -> Field:
    """Share of the lesion in each voxel: one voxel of partial volume, or the slow ramp of an ill-defined margin."""
    if has(report, MARGIN, "ill-defined", "unclear", "poorly"):
        return np.clip(0.35 - distance / max(edge, 0.4 * radius), 0, 1)
    return np.clip(0.5 - distance / edge, 0, 1)


def _noise(around: Field, shape: Sequence[int], rng: np.random.Generator) -> Field:
    """Noise as strong as in the calmest tissue around."""
    noise = smooth_field(shape, (0.6, 0.6, 0.5), rng)
    tissue = ndimage.minimum_filter(around, 3) > -200
    tissue = tissue if tissue.sum() > 200 else np.ones_like(tissue)
    return noise * np.quantile(_unrest(around)[tissue], 0.2) / (np.quantile(_unrest(noise), 0.2) + 1e-6)


def _unrest(image: Field) -> Field:
    """How much voxels differ from what is smooth, locally."""
    image = image.astype(np.float32)
    return np.sqrt(ndimage.uniform_filter((image - ndimage.gaussian_filter(image, 1)) ** 2, 3))


def _fat(image: Field, organs: Field) -> Field:
    """What a lesion may grow into: no organ, no lung, no muscle."""
    calm = ndimage.gaussian_filter(image.astype(np.float32), 0.7)
    return (organs == 0) & (calm > -250) & (calm < 20)


# ---------------------------------------------------------------- cohorts


def described(body: LesionBody, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, LesionReport]:
    """Draw a report for a body and paint its lesion; the report then says size and density as they have become.

    Returns:
        image and lesion mask (X, Y, Z), report.
    """
    spacing = nib.affines.voxel_sizes(body.affine)
    extents = whole_organs(body.organs, spacing)
    for _ in range(40):
        drawn = draw_report(rng, extents)
        if rng.random() < SPLEEN_SHARE and organ_id("spleen") in extents:  # not of the publication, but of many scans
            drawn = LesionReport("spleen")
        said = {ENHANCEMENT: "enhanced ct" if body.enhanced else "non-contrast ct"}
        solid = not is_hollow(drawn.organ) and drawn.organ not in LUNGS and "stone" not in drawn.lesion
        if rng.random() < OUTWARD_SHARE and solid:
            said[CAVITY] = OUTWARD
        wish = LesionReport(drawn.organ, drawn.lesion, said)
        report = complete(wish, rng, extents, extents[organ_id(drawn.organ)])
        words = {key: value for key, value in report.attributes.items() if key != VALUE}
        try:
            image, lesion = paint_lesion(body.image, body.organs, body.affine, replace(report, attributes=words), rng)
        except CaseError:  # drawn too large for this body
            continue
        words[VALUE] = f"{image[lesion].mean():.0f} HU"
        x, y, z = (np.ptp(np.argwhere(lesion), axis=0) + 1) * spacing
        size = (round(float(x), 1), round(float(y), 1), round(float(z), 1))
        return image, lesion, replace(report, attributes=words, size_mm=size)
    raise RuntimeError(f"no lesion fits into a body with organs {sorted(extents)}: use more voxels")


def whole_organs(organs: Field, spacing: np.ndarray) -> dict[int, tuple[float, float, float]]:
    """Extent (x, y, z) in mm of each organ, by number, that the ends of the scan do not cut."""
    found = {}
    ends = np.bincount(organs[:, :, [0, -1]].ravel(), minlength=256)
    for number, box in enumerate(ndimage.find_objects(organs), start=1):
        if box is not None and ends[number] < 0.02 * (organs[box] == number).sum():
            x, y, z = (float((b.stop - b.start) * s) for b, s in zip(box, spacing, strict=True))
            found[number] = (x, y, z)
    return found


def lesion_cohort(
    directory: str | os.PathLike,
    num_cases: int,
    *,
    shape: Sequence[int] = (120, 90, 128),
    crop: int | None = None,
    lesions: bool = True,
    seed: int = 0,
    body_every: int = 4,
) -> str:
    """Make sure a folder holds a cohort of described lesions, generating what is missing.

    Cases are ``CT/lesion_0000.nii.gz`` (int16, HU), ``ORGANS/`` (uint8, TotalSegmentator's v1 numbers of the body),
    ``LABEL/`` (uint8, 1 organ, 2 lesion) and ``REPORT/lesion_0000.json``. Case i depends on ``seed`` and i alone.

    Args:
        directory: folder of the cohort, made if missing.
        num_cases: how many cases there must be at least.
        shape: voxels of an abdomen, 3 mm wide by default; every sixth body is a chest.
        crop: keep a cube of so many voxels around the lesion, for training.
        lesions: without, CT and report are what a synthesis starts from: a healthy body, and a lesion that fits in it.
        seed: seed of the cohort, 0 or more.
        body_every: so many cases share a body.

    Returns:
        The folder, as a string.
    """
    x, y, z = (int(n) for n in shape)

    def generate(number: int, paths: Sequence[Path], note: str) -> None:
        person = int(stem(paths[0]).rpartition("_")[2]) // body_every
        own = int(np.random.SeedSequence([seed, person, 3]).generate_state(1)[0])
        body = lesion_body(own, (x, y, z), chest=person % THORAX_EVERY == THORAX_EVERY - 1)
        image, lesion, report = described(body, np.random.default_rng([number, 4]))
        organ = np.isin(body.organs, [organ_id(name) for name in report.organs or (report.organ,)])
        label = np.where(lesion, 2, organ).astype(np.uint8)
        box, affine = _cube(lesion, crop), body.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [axis.start for axis in box]
        write_json(paths[0], write_reports([report]))
        volumes = [image if lesions else body.image, body.organs, label]
        for path, volume in zip(paths[1:], volumes, strict=False):
            write_nifti(path, np.ascontiguousarray(volume[box]), affine, note)

    folders = ("REPORT/lesion_{:04d}.json", *(f"{name}/lesion_{{:04d}}.nii.gz" for name in ("CT", "ORGANS", "LABEL")))
    settings: dict[str, Any] = {"kind": "lesion" if lesions else "lesion request", "recipe": RECIPE, "seed": seed}
    settings |= {"shape": (x, y, z), "crop": crop, "body_every": body_every}
    fill_cohort(directory, num_cases, folders if lesions else folders[:3], settings, generate)
    return str(directory)


def _cube(lesion: Field, crop: int | None) -> tuple[slice, ...]:
    """The cube of voxels around a lesion, moved into the volume."""
    if crop is None:
        return tuple(slice(0, n) for n in lesion.shape)
    voxels = np.argwhere(lesion)
    start = np.clip((voxels.min(0) + voxels.max(0)) // 2 - crop // 2, 0, np.maximum(0, np.array(lesion.shape) - crop))
    return tuple(slice(int(a), min(int(a) + crop, n)) for a, n in zip(start, lesion.shape, strict=True))
