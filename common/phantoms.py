"""Procedural chest CT: a seeded thorax painted part by part on a coordinate grid in millimetres.

Every part (a rib, the heart, a vessel) is a signed distance, negative inside, blended into the image over one voxel,
so thin parts get their partial volume at any resolution. A smooth random warp and drawn sizes make each body its own.
"""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

from .io import atomic_path, stamp, stamped

logger = logging.getLogger(__name__)

LABELS = {"lung": 1, "nodule": 2}  # 0 is background
FIELD_OF_VIEW = (360.0, 270.0, 320.0)  # mm along R, A, S; anatomy below is in mm from its centre
RECIPE = 2  # raise it when a change below alters the voxels of a given seed

# Tissue: mean HU, and how much its texture varies.
TISSUES: dict[str, tuple[float, float]] = {
    "air": (-1000, 0), "gas": (-980, 5), "lung": (-868, 14), "fat": (-102, 8), "muscle": (52, 7), "skin": (15, 5),
    "blood": (60, 4), "heart": (46, 5), "vessel": (42, 6), "airway wall": (-20, 10), "esophagus": (35, 5),
    "liver": (60, 6), "spleen": (52, 5), "stomach": (22, 8), "cord": (32, 4), "disc": (85, 8), "cartilage": (105, 12),
    "cortex": (560, 50), "marrow": (190, 25), "solid": (30, 12), "part-solid": (-440, 30), "ground-glass": (-600, 30),
}  # fmt: skip

# Half-widths (x) and half-depths (y) of the chest's inner wall and of the trunk, along z.
PROFILE_Z = (-175, -120, -60, 0, 45, 80, 105, 122, 140, 175)
PROFILES = {
    "cage x": (126, 132, 136, 132, 118, 100, 80, 58, 48, 44), "cage y": (84, 90, 93, 90, 82, 72, 60, 50, 44, 42),
    "trunk x": (146, 154, 158, 157, 158, 160, 154, 126, 84, 56),
    "trunk y": (108, 116, 120, 119, 116, 109, 99, 86, 72, 64),
}  # fmt: skip

Point = Sequence[float] | np.ndarray
Field = np.ndarray


@dataclass(frozen=True)
class Phantom:
    """One generated case: what an annotated CT scan would bring.

    Attributes:
        image: Hounsfield units (X, Y, Z), int16, in [-1024, 3071].
        layout: label map (X, Y, Z), uint8, values of ``LABELS``.
        affine: voxel to RAS+ world matrix (4, 4), mm; positive diagonal, so axes point right, anterior, superior.
        nodules: one dict per nodule with ``center_mm`` (world), ``diameter_mm`` and ``texture``.
    """

    image: np.ndarray
    layout: np.ndarray
    affine: np.ndarray
    nodules: tuple[dict, ...]


# ---------------------------------------------------------------- shapes: signed distances, roughly in mm


def smooth(z: Field, heights: Point, values: Point) -> Field:
    """Read ``values`` given at ``heights`` at any ``z``, smoothly between the knots."""
    knots = np.linspace(heights[0], heights[-1], 176)
    return np.interp(z, knots, PchipInterpolator(heights, values)(knots)).astype(np.float32)


def profile(name: str, z: Field) -> Field:
    """Read a half-axis of the body at height ``z``."""
    return smooth(z, PROFILE_Z, PROFILES[name])


def bend(x: Field) -> Field:
    """How far forward the midline of the chest lies of its flanks: its section is a kidney's."""
    return 10 * np.exp(-((x / 62) ** 2)) - 4


def column(p: Sequence[Field], half_x: Field, half_y: Field, power: float = 2.3) -> Field:
    """Distance to an upright column with a rounded-rectangle section."""
    rho = (np.abs(p[0] / half_x) ** power + np.abs(p[1] / half_y) ** power) ** (1 / power)
    return (rho - 1) * np.minimum(half_x, half_y)


def ellipsoid(p: Sequence[Field], centre: Point, radii: Point) -> Field:
    """Distance to an ellipsoid, first order: exact on its surface."""
    q = [(axis - c) / r for axis, c, r in zip(p, centre, radii, strict=True)]
    k0 = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + 1e-6
    k1 = np.sqrt(sum((axis / r) ** 2 for axis, r in zip(q, radii, strict=True))) + 1e-6
    return k0 * (k0 - 1) / k1


def tube(p: Sequence[Field], a: Point, b: Point, radius_a: float, radius_b: float, flat: Point = (1, 1, 1)) -> Field:
    """Distance to a tapering tube from ``a`` to ``b``; ``flat`` widens its section along an axis."""
    ab = [(end - start) / f for start, end, f in zip(a, b, flat, strict=True)]
    ap = [(axis - start) / f for axis, start, f in zip(p, a, flat, strict=True)]
    length2 = sum(v * v for v in ab) + 1e-6
    t = np.clip((ap[0] * ab[0] + ap[1] * ab[1] + ap[2] * ab[2]) / length2, 0, 1)
    d2 = (ap[0] - t * ab[0]) ** 2 + (ap[1] - t * ab[1]) ** 2 + (ap[2] - t * ab[2]) ** 2
    return np.sqrt(d2) - (radius_a + t * (radius_b - radius_a))


def union(a: Field, b: Field, blend: float = 8.0) -> Field:
    """Union of two parts, rounded where they meet."""
    h = np.maximum(blend - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h / (4 * blend)


def intersection(a: Field, b: Field, blend: float = 8.0) -> Field:
    """Intersection of two parts, its edge rounded."""
    return -union(-a, -b, blend)


def smooth_field(shape: Sequence[int], sigma: Point, rng: np.random.Generator) -> Field:
    """Draw correlated Gaussian noise of mean 0 and standard deviation 1; ``sigma`` in voxels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(tuple(shape), dtype=np.float32), sigma)
    return (noise - noise.mean()) / (noise.std() + 1e-6)


# ---------------------------------------------------------------- the canvas


class Canvas:
    """An image on a warped coordinate grid, on which parts are painted one over the other.

    Args:
        shape: voxels along R, A, S.
        rng: draws body size, warp and texture.
        field_of_view: mm along R, A, S.
        size: scales the body.
    """

    WARP = 6.0  # mm, largest displacement
    TISSUES = TISSUES

    def __init__(
        self, shape: Sequence[int], rng: np.random.Generator, field_of_view: Point = FIELD_OF_VIEW, size: float = 1.0
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.spacing = np.array(field_of_view) / self.shape
        self.origin = (self.spacing - np.array(field_of_view)) / 2
        self.scale = size * rng.uniform(0.95, 1.02, 3)
        self.edge = float(np.prod(self.spacing) ** (1 / 3))
        axes = [o + s * np.arange(n) for o, s, n in zip(self.origin, self.spacing, self.shape, strict=True)]
        self.world = [w.astype(np.float32) for w in np.meshgrid(*axes, indexing="ij", sparse=True)]
        self.waves = [(rng.normal(size=(3, 3)) * 2 * np.pi / 420, rng.uniform(0, 2 * np.pi, 3)) for _ in range(3)]
        self.grid = [w / s + d for w, s, d in zip(self.world, self.scale, self._displacement(self.world), strict=True)]
        self.texture = smooth_field(self.shape, 6.0 / self.spacing, rng)
        self.image = np.full(self.shape, TISSUES["air"][0], dtype=np.float32)

    def _displacement(self, world: Sequence[Field]) -> list[Field]:
        """Three long random waves along each direction: no two bodies bend alike."""
        x, y, z = world
        moved = []
        for waves, phases in self.waves:
            total = sum(np.sin(a * x + b * y + c * z + phase) for (a, b, c), phase in zip(waves, phases, strict=True))
            moved.append(np.asarray(total, dtype=np.float32) * (self.WARP / 3))
        return moved

    def to_world(self, point: Point) -> np.ndarray:
        """Where in the world a point of the grid lies: the warp, undone by iteration."""
        world = np.asarray(point) * self.scale
        for _ in range(8):
            world = (point - np.array(self._displacement(list(world)))) * self.scale
        return world

    def box(self, points: Sequence[Point] | np.ndarray, reach: float) -> tuple[slice, ...]:
        """Voxels that anything within ``reach`` of ``points`` can touch."""
        corners = np.asarray(points) * self.scale
        reach = 1.05 * reach + 1.1 * self.WARP + self.edge
        low = np.floor((corners.min(0) - reach - self.origin) / self.spacing).astype(int)
        high = np.ceil((corners.max(0) + reach - self.origin) / self.spacing).astype(int) + 1
        return tuple(slice(max(0, lo), max(0, hi)) for lo, hi in zip(low, high, strict=True))

    def paint(self, distance: Field, tissue: str, box: tuple[slice, ...] = (), opacity: Field | float = 1.0) -> None:
        """Blend ``tissue`` in where ``distance`` is negative, with a soft edge one voxel wide."""
        mean, spread = self.TISSUES[tissue]
        cover = np.clip(0.5 - distance / self.edge, 0, 1) * opacity
        self.image[box] += cover * (mean + spread * self.texture[box] - self.image[box])

    def ellipsoid(self, centre: Point, radii: Point, tissue: str, inside: Field | None = None) -> None:
        """Paint an ellipsoid, cut by ``inside`` when given."""
        box = self.box([centre], max(radii))
        distance = ellipsoid([axis[box] for axis in self.grid], centre, radii)
        self.paint(distance if inside is None else intersection(distance, inside[box]), tissue, box)

    def tube(
        self, points: Sequence[Point], radii: Point, tissue: str, flat: Point = (1, 1, 1), within: Field | None = None
    ) -> None:
        """Paint a chain of tapering tubes; those thinner than a voxel fade by the volume they fill."""
        for a, b, radius_a, radius_b in zip(points, points[1:], radii, radii[1:], strict=False):
            box = self.box([a, b], max(radius_a, radius_b) * max(flat))
            opacity: Any = min(1.0, (2.2 * max(radius_a, radius_b) * max(flat) / self.edge) ** 1.2)
            distance = tube([axis[box] for axis in self.grid], a, b, radius_a, radius_b, flat)
            self.paint(distance, tissue, box, opacity if within is None else opacity * within[box])


# ---------------------------------------------------------------- the parts of a thorax


def paint_trunk(canvas: Canvas, rng: np.random.Generator) -> Field:
    """Skin, fat and the muscle coat; returns the distance to the chest cavity."""
    p, z = canvas.grid, canvas.grid[2]
    side = [np.abs(p[0]), p[1], z]
    fat = rng.uniform(-2, 10)
    body = column(p, profile("trunk x", z) + fat, profile("trunk y", z) + fat)
    body = union(body, tube(side, (108, -12, 100), (134, 2, 190), 46, 38), 30)
    if rng.random() < 0.5:
        size = rng.uniform(0.7, 1.0)
        body = union(body, ellipsoid(side, (72, 98, -2), (58 * size, 34 * size, 56 * size)), 14)
    canvas.paint(body, "skin")
    canvas.paint(body + 3, "fat")

    cavity = column([p[0], p[1] - bend(p[0]), z], profile("cage x", z), profile("cage y", z))
    muscle = cavity - 13
    for a, b, r, flat in (
        ((26, -96, -180), (28, -94, 110), 14, (1.3, 1, 1)),  # erector spinae
        ((18, 98, 20), (122, 48, 88), 11, (1, 1, 2.4)),  # pectoralis
        ((128, -62, -20), (126, -40, 105), 15, (1, 2, 1)),  # latissimus and scapular muscles
        ((60, -86, 70), (112, -68, 105), 15, (1, 1, 2)),  # rhomboids, trapezius
        ((108, -12, 105), (134, 2, 190), 30, (1, 1, 1)),  # shoulder and arm
        ((26, -30, 105), (22, -18, 190), 32, (1, 1, 1)),  # neck
    ):
        muscle = union(muscle, tube(side, a, b, r, r, flat), 6)
    canvas.paint(intersection(muscle, body + 6, 4), "muscle")
    # Fat planes between the muscle coat and the intercostal wall.
    canvas.paint(np.abs(cavity - 15.5) - 1.2, "fat", opacity=0.6 * (np.abs(p[1]) < 80))
    return cavity


def diaphragm(p: Sequence[Field], rng: np.random.Generator) -> Field:
    """Distance to the abdomen: below two domes, the right one higher, and the flat tendon between them."""
    breath = rng.uniform(-12, 9)
    right = -52 + breath - 66 * (((p[0] - 66) / 74) ** 2 + ((p[1] - 14) / 92) ** 2)
    left = -55 + breath - 66 * (((p[0] + 66) / 74) ** 2 + ((p[1] - 14) / 92) ** 2)
    centre = -70 + breath - 34 * (((p[0] + 14) / 70) ** 2 + ((p[1] - 32) / 62) ** 2)
    return 0.8 * (p[2] + union(union(-right, -left, 20), -centre, 20))


def heart(p: Sequence[Field], shrink: float) -> Field:
    """Distance to the heart: a base behind the sternum, an apex to the left and front."""
    ventricles = tube(p, (-14, 16, -32), (-67, 35, -54), 46 - shrink, 34 - shrink)
    return union(ventricles, ellipsoid(p, (7, 8, -26), (44 - shrink, 44 - shrink, 50 - shrink)), 12)


def mediastinum(p: Sequence[Field], heart_shrink: float) -> Field:
    """Distance to all that parts the lungs: heart, great vessels, spine."""
    parts = heart(p, heart_shrink - 4)
    for a, b, ra, rb, flat in (
        ((0, -78, -200), (0, -78, 200), 27, 27, (1, 1.2, 1)),  # spine
        ((1, 0, 190), (0, 2, 10), 19, 32, (1, 1.5, 1)),  # great vessels
        ((-24, -46, 42), (-20, -48, -200), 16, 15, (1, 1, 1)),  # descending aorta
        ((2, -38, 20), (2, -36, -200), 13, 17, (1, 1.8, 1)),  # esophagus and what goes with it
        ((0, 40, 60), (0, 66, -20), 8, 10, (1, 3.2, 1)),  # behind the sternum
        ((0, 66, -20), (-14, 60, -110), 10, 22, (1, 3.2, 1)),
        ((-12, 20, -60), (-16, 24, -110), 30, 30, (1, 1, 1)),  # the heart rests on the diaphragm
    ):
        parts = union(parts, tube(p, a, b, ra, rb, flat), 10)
    return parts


def lungs(p: Sequence[Field], cavity: Field, abdomen: Field, middle: Field) -> Field:
    """Distance to both lungs: the cavity under rounded apices, less mediastinum and abdomen."""
    x = np.abs(p[0])
    apex = 0.75 * (p[2] - 122 + 52 * (((x - 46) / 52) ** 2 + ((p[1] + 16) / 62) ** 2))
    space = intersection(intersection(cavity, apex, 16), -middle, 8)
    return intersection(space, -abdomen, 6)


def paint_abdomen(canvas: Canvas, cavity: Field, abdomen: Field) -> None:
    """Diaphragm, liver, stomach with its bubble, spleen."""
    inside = intersection(cavity + 2, abdomen + 3, 6)
    canvas.paint(intersection(cavity, abdomen), "muscle")
    canvas.paint(inside, "fat")
    canvas.ellipsoid((-62, 22, -112), (46, 50, 50), "stomach", inside + 2)
    # The patient lies on the back: gas rises to the front.
    canvas.ellipsoid((-62, 22, -112), (42, 46, 46), "gas", intersection(inside + 6, 34 - canvas.grid[1], 2))
    canvas.ellipsoid((-96, -44, -124), (34, 46, 54), "spleen", inside + 1)
    canvas.ellipsoid((64, 4, -124), (98, 96, 88), "liver", inside + 1)
    canvas.ellipsoid((-6, 34, -112), (62, 44, 36), "liver", inside + 1)
    canvas.tube([(24, -18, -70), (20, -28, -180)], [12, 11], "blood")


def paint_mediastinum(canvas: Canvas, middle: Field, above: Field, heart_shrink: float) -> None:
    """Heart, great vessels, esophagus, trachea and main bronchi, in fat."""
    canvas.paint(intersection(middle, above), "fat")
    canvas.paint(intersection(heart(canvas.grid, heart_shrink), above + 2, 4), "heart")
    canvas.paint(intersection(heart(canvas.grid, heart_shrink + 9), above + 10, 4), "blood")
    for points, radii, tissue in (
        ([(10, 24, -20), (14, 22, 30), (6, 8, 54), (-12, -18, 60), (-23, -42, 44)], [16, 16, 15, 14, 13], "blood"),
        ([(-23, -42, 44), (-22, -48, -60), (-6, -44, -180)], [13, 12, 11], "blood"),
        ([(30, 14, 84), (28, 10, -10)], [9, 10], "blood"),  # superior vena cava
        ([(-18, 32, -14), (-14, 14, 20), (-40, -12, 18)], [14, 13, 9], "blood"),  # pulmonary trunk and left artery
        ([(-14, 14, 18), (20, 0, 12), (42, -6, 6)], [12, 10, 9], "blood"),
        ([(6, 8, 56), (16, 8, 92), (24, -2, 180)], [7, 6, 5], "blood"),  # arteries to the head and arms
        ([(-10, -6, 60), (-14, -4, 100), (-20, -4, 180)], [5, 4, 4], "blood"),
        ([(-18, -18, 58), (-28, -12, 110), (-60, -6, 126)], [6, 5, 4], "blood"),
        ([(30, 14, 84), (-6, 30, 92), (-34, 14, 112)], [8, 7, 6], "blood"),
        ([(-4, -32, 190), (-6, -33, 20), (-10, -36, -100)], [8, 8, 8], "esophagus"),
        ([(18, 2, 150), (16, 0, 132)], [9, 7], "disc"),  # thyroid
        ([(-16, 2, 150), (-14, 0, 132)], [9, 7], "disc"),
    ):
        canvas.tube(points, radii, tissue)
    airways = (
        ([(2, -12, 190), (3, -14, 42)], [9, 9]),
        ([(3, -14, 42), (20, -16, 22), (40, -18, 4)], [7.5, 7, 5]),
        ([(3, -14, 42), (-22, -18, 22), (-46, -20, 6)], [7, 6.5, 4.5]),
    )
    for thicker, tissue in ((2.5, "esophagus"), (0, "gas")):
        for path, calibres in airways:
            canvas.tube(path, np.add(calibres, thicker), tissue)


def paint_bone(canvas: Canvas, points: Sequence[Point], radii: Point, flat: Point = (1, 1, 1)) -> None:
    """A cortical shell around marrow."""
    canvas.tube(points, radii, "cortex", flat=flat)
    canvas.tube(points, [max(0.5, r - 2.2) for r in radii], "marrow", flat=flat)


def paint_spine(canvas: Canvas) -> None:
    """Vertebrae with arches and processes, discs between, the canal behind."""
    canvas.tube([(0, -64, -190), (0, -64, 190)], [15, 13], "disc", flat=(1.15, 0.9, 1))
    for level in range(15):
        z, r = 152 - 23.5 * level, 13 + 0.35 * level
        paint_bone(canvas, [(0, -64, z - 3), (0, -64, z + 3)], [r, r], (1.2, 1, 0.55))
        for side in (-1, 1):
            paint_bone(canvas, [(side * 12, -74, z), (side * 15, -90, z - 2), (side * 38, -98, z)], [4.5, 5.5, 4])
        paint_bone(canvas, [(-13, -92, z - 2), (0, -99, z - 6), (13, -92, z - 2)], [4, 4.5, 4])
        paint_bone(canvas, [(0, -98, z - 6), (0, -107, z - 16)], [3.6, 3.2], (0.9, 1, 1.8))
    canvas.tube([(0, -84, -190), (0, -84, 190)], [8, 8], "fat")
    canvas.tube([(0, -84, -190), (0, -84, 190)], [5.5, 5.5], "cord")


def rib_path(level: int, side: int) -> list[tuple[float, float, float]]:
    """Points along a rib, from the spine round the chest wall, sloping down to the front."""
    head, drop = 146 - 23.5 * level, min(38 + 12.0 * level, 112)
    reach = {11: 0.66, 12: 0.5}.get(level, 0.94 - 0.012 * max(0, level - 4) ** 1.5)
    turn = np.linspace(0.13, reach, 18)
    z = head - drop * np.clip(turn / 0.8, 0, 1) ** 1.15 + 26 * np.clip(turn - 0.8, 0, 1) / 0.14 * (level > 2)
    x = side * (profile("cage x", z) + 5) * np.sin(np.pi * turn) ** (2 / 2.3)
    y = -(profile("cage y", z) + 5) * np.sign(np.cos(np.pi * turn)) * np.abs(np.cos(np.pi * turn)) ** (2 / 2.3)
    y += bend(x)
    return [(float(a), float(b), float(c)) for a, b, c in zip(x, y, z, strict=True)]


def paint_cage(canvas: Canvas) -> None:
    """Ribs with their cartilage, sternum, clavicles, shoulder blades and upper arms."""
    for level in range(1, 13):
        for side in (-1, 1):
            path = rib_path(level, side)
            bone = path if level > 10 else path[:15]
            canvas.tube(path[14:], [4.0] * 4, "cartilage", flat=(1, 1, 1.5))
            paint_bone(canvas, bone, [3.8] * len(bone), (1, 1, 1.45))
    heights = np.array([78.0, 56.0, 20.0, -20.0, -56.0])
    front = [(0.0, float(y) + 8, float(z)) for y, z in zip(profile("cage y", heights), heights, strict=True)]
    paint_bone(canvas, front, [6, 6, 4.5, 5, 3.5], (3.2, 1, 1))
    for side in (-1, 1):
        paint_bone(canvas, [(side * 16, 78, 84), (side * 60, 62, 104), (side * 112, 12, 128)], [7, 5.5, 6])
        socket = (side * 126, -34, 116)
        paint_bone(canvas, [socket, (side * 118, -64, 70), (side * 104, -80, 16)], [6, 3.5, 3.5])
        paint_bone(canvas, [socket, (side * 96, -72, 96), (side * 70, -86, 92)], [5, 3.2, 3], (1, 1, 1.6))
        paint_bone(canvas, [(side * 106, -74, 80), (side * 88, -84, 52)], [2.6, 2.6], (1, 1, 4))
        paint_bone(canvas, [(side * 128, -14, 128), (side * 134, 0, 195)], [20, 12])


def grow(root: np.ndarray, targets: np.ndarray, calibre: float) -> list[tuple[np.ndarray, np.ndarray, float, float]]:
    """Branch from ``root`` toward ever smaller halves of ``targets``; radius follows the share supplied (Murray)."""
    count = len(targets)
    tip = targets[0] if count == 1 else root + (0.28 if count > 60 else 0.5) * (targets.mean(0) - root)
    segments = [(root, tip, calibre * count**0.36, calibre * max(count / 2, 0.5) ** 0.36)]
    if count > 1:
        spread = targets - targets.mean(0)
        axis = np.linalg.eigh(spread.T @ spread)[1][:, -1]
        order = np.argsort(spread @ axis)
        for half in np.array_split(targets[order], 2):
            segments += grow(tip, half, calibre)
    return segments


def paint_lungs(canvas: Canvas, lung: Field, rng: np.random.Generator) -> None:
    """Parenchyma, denser where gravity settles blood; arteries with bronchi beside them, and veins."""
    canvas.paint(lung, "lung")
    within = np.clip(0.5 - lung / canvas.edge, 0, 1)
    canvas.image -= within * np.clip(0.45 * canvas.grid[1], -45, 30)
    fine = smooth_field(canvas.shape, 1.5 / canvas.spacing + 0.3, rng)
    canvas.image += 9 * within * fine
    for side, hila in ((1, ((42, -6, 6), (34, 4, -12))), (-1, ((-42, -14, 14), (-36, 0, -10)))):
        places = np.argwhere((lung < -5) & (canvas.grid[0] * side > 0))
        for hilum, calibre, airy in ((hila[0], 0.8, True), (hila[1], 0.72, False)):
            picks = places[rng.integers(0, len(places), 240)]
            targets = np.stack([axis[tuple(picks.T)] for axis in canvas.grid], axis=1)
            for a, b, radius_a, radius_b in grow(np.array(hilum, dtype=float), targets, calibre):
                canvas.tube([a, b], [radius_a, radius_b], "vessel", within=within)
                if airy and radius_a > 1.9:
                    aside = np.array([0.3, -0.8, 0.5]) * 1.9 * radius_a
                    path, calibres = [a + aside, b + aside], 0.8 * np.array([radius_a, radius_b])
                    canvas.tube(path, 1.1 * calibres + 1, "airway wall", within=within)
                    canvas.tube(path, calibres, "gas", within=within)


# ---------------------------------------------------------------- nodules


def nodule_distance(canvas: Canvas, centre: np.ndarray, radius: float, rng: np.random.Generator) -> Field:
    """Distance to a ball with gentle lobes and, in some, spicules."""
    offset = [w - c for w, c in zip(canvas.world, centre, strict=True)]
    length = np.sqrt(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2) + 1e-3
    spiky = rng.random() < 0.35
    surface = np.full(canvas.shape, radius * (0.92 if spiky else 0.97), dtype=np.float32)
    for bump in rng.normal(size=(9, 3)) if spiky else rng.normal(size=(4, 3)):
        bump /= np.linalg.norm(bump)
        along = (offset[0] * bump[0] + offset[1] * bump[1] + offset[2] * bump[2]) / length
        surface += radius * np.where(spiky, 0.35 * np.exp(14 * (along - 1)), 0.07 * np.exp(3 * (along - 1)))
    return length - surface


def place_nodule(canvas: Canvas, layout: np.ndarray, rng: np.random.Generator) -> dict:
    """Paint one nodule where the lung is deep enough; writes into ``layout``, returns its description."""
    interior = ndimage.binary_erosion(layout == LABELS["lung"], np.ones((3, 3, 3)))
    if not interior.any():
        raise ValueError(f"no room for another nodule in {canvas.shape} voxels: ask for fewer nodules or more voxels")
    depth = ndimage.distance_transform_edt(interior, sampling=canvas.spacing)
    diameter = max(float(np.clip(rng.lognormal(2.55, 0.45), 6, 30)), 2 * float(canvas.spacing.max()))
    texture = str(rng.choice(["solid", "part-solid", "ground-glass"], p=[0.6, 0.2, 0.2]))
    diameter = min(diameter, 2 * float(depth.max()))
    index = rng.choice(np.argwhere(depth >= min(0.6 * diameter, depth.max())))
    centre = canvas.origin + canvas.spacing * index

    distance = nodule_distance(canvas, centre, diameter / 2, rng)
    mask = (distance < 0) & interior
    mask[tuple(index)] = True
    distance = np.where(mask, np.minimum(distance, -canvas.edge / 4), np.maximum(distance, canvas.edge / 4))
    canvas.paint(distance, texture)
    if texture == "part-solid":
        canvas.paint(distance + 0.24 * diameter, "solid")
    layout[mask] = LABELS["nodule"]
    return {"center_mm": tuple(float(c) for c in centre), "diameter_mm": round(diameter, 1), "texture": texture}


# ---------------------------------------------------------------- public: one case, a cohort


def thorax(seed: int, shape: Sequence[int] = (64, 64, 64), *, num_nodules: int | None = None) -> Phantom:
    """Generate one chest CT with its lung and nodule labels.

    Args:
        seed: same seed, shape and number of nodules: same phantom, bit for bit.
        shape: voxels along right, anterior, superior; at least 16 each. The field of view stays 360 x 270 x 320 mm.
        num_nodules: how many nodules, 1 to 3 at random if None. The body around them does not depend on it.

    Returns:
        The phantom.

    Example:
        >>> thorax(0, (16, 16, 16), num_nodules=0).nodules
        ()
    """
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape must be three sizes of at least 16 voxels, got {tuple(shape)}")
    body, lesions, scanner = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    count = int(lesions.integers(1, 4)) if num_nodules is None else num_nodules

    # From the skin inward: each part covers what it displaces.
    canvas = Canvas(shape, body)
    cavity = paint_trunk(canvas, body)
    abdomen = diaphragm(canvas.grid, body)
    heart_shrink = body.uniform(-5, 4)
    middle = mediastinum(canvas.grid, heart_shrink)
    lung = lungs(canvas.grid, cavity, abdomen, middle)
    paint_abdomen(canvas, cavity, abdomen)
    paint_mediastinum(canvas, middle, intersection(cavity, -abdomen), heart_shrink)
    paint_spine(canvas)
    paint_cage(canvas)
    paint_lungs(canvas, lung, body)

    layout = np.where(lung < 0, LABELS["lung"], 0).astype(np.uint8)
    nodules = tuple(place_nodule(canvas, layout, lesions) for _ in range(count))

    # The scanner: point spread, then noise that neighbours share.
    image = ndimage.gaussian_filter(canvas.image, 0.4)
    image += scanner.uniform(8, 24) * smooth_field(canvas.shape, (0.6, 0.6, 0.5), scanner)
    affine = np.diag([*canvas.spacing, 1.0])
    affine[:3, 3] = canvas.origin
    return Phantom(np.clip(np.rint(image), -1024, 3071).astype(np.int16), layout, affine, nodules)


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray, note: str) -> None:
    """Write voxels and their world matrix (as qform and sform) to a ``.nii.gz``, the same bytes every time."""
    file = nib.Nifti1Image(voxels, affine)
    file.set_qform(affine, code=1)
    file.set_sform(affine, code=1)
    file.header.set_xyzt_units("mm")
    file.header["descrip"] = note.encode()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(file.to_bytes(), compresslevel=5, mtime=0))


def check_cohort(root: Path, settings: dict, note: str) -> int:
    """Refuse a folder made with other settings; returns how many cases its stamp promises.

    Where a run was cut short there is no stamp, and the note in each file's header speaks for it.
    """
    if count := stamped(root, settings):
        return count
    for path in sorted([*root.glob("CT/*.nii.gz"), *root.glob("SEG/*.nii.gz")]):
        held_note = nib.Nifti1Image.from_filename(path).header["descrip"].item().decode(errors="replace")
        if held_note != note:
            raise ValueError(f"{path} is '{held_note}', not '{note}': name another folder, or delete the file")
    return 0


def fill_cohort(
    directory: str | os.PathLike,
    num_cases: int,
    files: Sequence[str],
    settings: dict[str, Any],
    generate: Callable[[int, Sequence[Path], str], None],
) -> None:
    """Generate the cases that a folder lacks, and stamp the folder once it is whole.

    Args:
        directory: folder of the cohort, made if missing.
        num_cases: how many cases there must be at least.
        files: names of a case's files under the folder, with ``{:04d}`` for the number of the case.
        settings: ``kind``, ``recipe``, ``seed`` and ``shape``; a folder made with others is refused.
        generate: called with a case's own seed, the paths of its files and the note for their headers.
    """
    root, seed = Path(directory), int(settings["seed"])
    settings = settings | {"seed": seed, "shape": [int(n) for n in settings["shape"]]}
    kind, size = settings["kind"], "x".join(map(str, settings["shape"]))
    note = f"{kind} phantom, recipe {settings['recipe']}, seed {seed}, {size}"
    made = check_cohort(root, settings, note)
    cases = [[root / file.format(i) for file in files] for i in range(num_cases)]
    missing = [i for i, paths in enumerate(cases) if not all(path.exists() for path in paths)]
    if missing:
        logger.info("generating %d %s phantom cases of %s voxels in %s", len(missing), kind, size, root)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
    for i in missing:
        generate(int(np.random.SeedSequence([seed, i]).generate_state(1)[0]), cases[i], note)
    if num_cases > made:
        stamp(root, settings, num_cases)


def thorax_cohort(
    directory: str | os.PathLike, num_cases: int, shape: Sequence[int] = (64, 64, 64), seed: int = 0
) -> str:
    """Make sure a folder holds a cohort of thorax phantoms, generating what is missing.

    Cases are ``CT/thorax_0000.nii.gz`` (int16) with ``SEG/thorax_0000.nii.gz`` (uint8). Case i depends on ``seed`` and
    i alone, so a small cohort is a prefix of a larger one and can grow in place. ``phantoms.json``, written last, keeps
    the settings.

    Args:
        directory: folder of the cohort, made if missing.
        num_cases: how many cases there must be at least.
        shape: voxels of each case.
        seed: seed of the cohort, 0 or more.

    Returns:
        The folder, as a string.
    """

    def generate(number: int, paths: Sequence[Path], note: str) -> None:
        case = thorax(number, shape)
        write_nifti(paths[0], case.image, case.affine, note)
        write_nifti(paths[1], case.layout, case.affine, note)

    files = ("CT/thorax_{:04d}.nii.gz", "SEG/thorax_{:04d}.nii.gz")
    fill_cohort(
        directory, num_cases, files, {"kind": "thorax", "recipe": RECIPE, "seed": seed, "shape": shape}, generate
    )
    return str(directory)
