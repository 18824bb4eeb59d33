"""Procedural abdomen CT: a seeded body painted organ by organ, from the dome of the diaphragm to the pelvic floor.

Image and label map are painted together: each part is a signed distance that gives both its partial volume in the
image and its voxels in the layout. What a report says of the body (`Attributes`) sets sizes, gaps and the tumour.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

from .io import atomic_path
from .phantoms import (
    TISSUES,
    Canvas,
    Field,
    Point,
    column,
    ellipsoid,
    fill_cohort,
    intersection,
    paint_bone,
    smooth,
    smooth_field,
    tube,
    union,
    write_nifti,
)
from .reports import Attributes, Finding, write_report
from .totalsegmentator import ORGANS

FIELD_OF_VIEW = (360.0, 270.0, 384.0)  # mm along R, A, S; anatomy below is in mm from its centre
RECIPE = 2  # raise it when a change below alters the voxels of a given seed

# How much wider an organ is, by what the report says of it; 0 is gone. Ranges are far enough apart to tell by volume.
STATES: dict[str, dict[str, tuple[float, float]]] = {
    "spleen": {"absent": (0, 0), "enlarged": (1.35, 1.55), "small": (0.6, 0.7)},
    "kidney_right": {"absent": (0, 0), "small": (0.62, 0.72), "enlarged": (1.22, 1.32)},
    "kidney_left": {"absent": (0, 0), "small": (0.62, 0.72), "enlarged": (1.22, 1.32)},
    "liver": {"enlarged": (1.18, 1.25), "small": (0.75, 0.81)},
    "stomach": {"enlarged": (1.25, 1.4), "small": (0.6, 0.7)},
    "urinary_bladder": {"enlarged": (1.35, 1.55), "small": (0.5, 0.6)},
}

# The colon's course from the pole of the caecum to the anus, and its radius there.
COLON = np.array([
    (82, 26, -94, 24), (90, 14, -64, 27), (98, -6, -32, 24), (99, -14, -2, 23), (90, 14, 18, 22), (58, 52, 10, 21),
    (8, 72, -4, 20), (-46, 66, 14, 19), (-90, 26, 52, 19), (-106, -22, 76, 18), (-109, -38, 46, 17),
    (-106, -30, 4, 16), (-98, -2, -44, 15), (-72, 24, -80, 15), (-36, 40, -88, 16), (2, 22, -84, 16),
    (10, -24, -98, 17), (0, -48, -126, 21), (0, -50, -156, 22), (0, -38, -192, 13),
], dtype=float)  # fmt: skip
# Where along that course, counted in its points, the middle of a tumour of each site may lie.
COURSE = {
    "caecum": (0.3, 1.0), "ascending colon": (1.9, 3.2), "transverse colon": (5.2, 7.2),
    "descending colon": (10.1, 11.8), "sigmoid colon": (13.2, 14.9), "rectum": (17.1, 18.2),
}  # fmt: skip

# Half-widths (x) and half-depths (y) of the inner wall of the abdomen and of the trunk, along z.
PROFILE_Z = (-200, -165, -140, -110, -85, -50, 0, 60, 110, 160, 200)
PROFILES = {
    "wall x": (48, 54, 62, 80, 102, 116, 120, 123, 128, 130, 128),
    "wall y": (66, 70, 76, 82, 86, 88, 88, 90, 92, 92, 90),
    "trunk x": (158, 164, 164, 158, 150, 140, 136, 140, 147, 152, 154),
    "trunk y": (104, 110, 112, 110, 107, 103, 102, 104, 107, 109, 108),
    "spine y": (-78, -80, -82, -74, -60, -48, -43, -47, -54, -60, -64),
}  # fmt: skip


@dataclass(frozen=True)
class AbdomenPhantom:
    """One generated case: what an annotated and reported CT scan would bring.

    Attributes:
        image: Hounsfield units (X, Y, Z), int16, in [-1024, 3071].
        layout: label map (X, Y, Z), uint8, indices into ``ORGANS``.
        affine: voxel to RAS+ world matrix (4, 4), mm; positive diagonal, so axes point right, anterior, superior.
        attributes: what is true of the body, and what its report says.
    """

    image: np.ndarray
    layout: np.ndarray
    affine: np.ndarray
    attributes: Attributes


# ---------------------------------------------------------------- the canvas and its tubes


class Body(Canvas):
    """A canvas that keeps a label map beside the image."""

    TISSUES = TISSUES | {
        "liver": (110, 6), "spleen": (120, 6), "renal cortex": (178, 8), "renal medulla": (150, 8),
        "vessel": (160, 6), "pancreas": (95, 9), "muscle": (60, 7), "fat": (-105, 8), "bowel wall": (70, 6),
        "fluid": (15, 6), "gas": (-950, 10), "stool": (30, 30), "bladder": (8, 3), "bladder wall": (45, 5),
        "tumour": (83, 9), "tumour core": (62, 9), "prostate": (62, 8), "uterus": (95, 9), "gallbladder": (10, 3),
        "lung": (-850, 16), "adrenal": (80, 5),
    }  # fmt: skip

    def __init__(self, shape: Sequence[int], rng: np.random.Generator, size: float) -> None:
        super().__init__(shape, rng, FIELD_OF_VIEW, size)
        self.layout = np.zeros(self.shape, dtype=np.uint8)
        self._value: int | None = ORGANS.index("body")

    @contextmanager
    def labelled(self, organ: str | None) -> Iterator[None]:
        """What is painted within is that organ in the layout; with None, the layout stays as it is."""
        before, self._value = self._value, None if organ is None else ORGANS.index(organ)
        yield
        self._value = before

    def paint(self, distance: Field, tissue: str, box: tuple[slice, ...] = (), opacity: Field | float = 1.0) -> None:
        super().paint(distance, tissue, box, opacity)
        if self._value is not None:
            self.layout[box][distance < 0] = self._value

    def near(self, points: Sequence[Point], reach: float) -> tuple[tuple[slice, ...], list[Field]]:
        """The box of voxels within ``reach`` of ``points``, and their coordinates."""
        box = self.box(points, reach)
        return box, [axis[box] for axis in self.grid]


@dataclass
class Course:
    """A bent tube in a box of voxels.

    Attributes:
        box: where it is.
        distance: to its surface.
        along: mm from its beginning to the nearest point of its axis.
        ahead: how far in front of (anterior to) its axis a voxel lies, in mm.
    """

    box: tuple[slice, ...]
    distance: Field
    along: Field
    ahead: Field


def sweep(canvas: Canvas, paths: Sequence[np.ndarray], flat: Point = (1, 1, 1)) -> Course:
    """Follow paths of points with radii (N, 4); ``flat`` widens their section along an axis."""
    everything = np.concatenate(paths)
    reach = float(everything[:, 3].max()) * max(flat)
    whole = canvas.box(everything[:, :3], reach)
    distance, along, ahead = (np.full(canvas.grid[0][whole].shape, v, dtype=np.float32) for v in (1e3, 0, 0))
    for path in paths:
        start = 0.0
        for a, b in pairwise(path):
            length = float(np.linalg.norm(b[:3] - a[:3]))
            box = canvas.box([a[:3], b[:3]], max(a[3], b[3]) * max(flat))
            p = [axis[box] for axis in canvas.grid]
            inner = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(box, whole, strict=True))
            axis, offset = (b[:3] - a[:3]) / flat, [(q - c) / f for q, c, f in zip(p, a[:3], flat, strict=True)]
            t = (offset[0] * axis[0] + offset[1] * axis[1] + offset[2] * axis[2]) / (axis @ axis + 1e-6)
            t = np.clip(t, 0, 1)
            gap = [o - t * v for o, v in zip(offset, axis, strict=True)]
            d = np.sqrt(gap[0] ** 2 + gap[1] ** 2 + gap[2] ** 2) - (a[3] + t * (b[3] - a[3]))
            nearer = d < distance[inner]
            np.copyto(distance[inner], d, where=nearer)
            np.copyto(along[inner], start + t * length, where=nearer)
            np.copyto(ahead[inner], gap[1], where=nearer)
            start += length
    return Course(whole, distance, along, ahead)


def finer(path: np.ndarray, steps: int) -> np.ndarray:
    """The same path with ``steps`` pieces between two of its points, bent smoothly."""
    knots = np.arange(len(path))
    return PchipInterpolator(knots, path)(np.linspace(0, len(path) - 1, steps * (len(path) - 1) + 1))


# ---------------------------------------------------------------- what the body is like


def draw_attributes(rng: np.random.Generator) -> Attributes:
    """Draw what a report could say: most bodies have a tumour, some have an organ of unusual size or none at all."""
    sex, age = str(rng.choice(["male", "female"])), int(rng.integers(30, 89))
    tumour = Finding("tumour", "absent")
    if rng.random() < 0.85:
        size = round(float(rng.uniform(2, 7)), 1)
        tumour = Finding("tumour", "present", str(rng.choice(list(COURSE))), size)
    organs = []
    for organ, states in STATES.items():
        state = str(rng.choice(list(states)))
        if organ == "kidney_left" and state == "absent" and Finding("kidney_right", "absent") in organs:
            state = "present"
        chance = rng.random()
        if chance < 0.135:
            organs.append(Finding(organ, state))
        elif chance < 0.45:
            organs.append(Finding(organ))
    for organ in ("pancreas", "duodenum", "small_bowel", "colon"):
        if rng.random() < 0.2:
            organs.append(Finding(organ))
    order = rng.permutation(len(organs))
    return Attributes((tumour, *(organs[i] for i in order)), sex, age)


def organ_sizes(attributes: Attributes, rng: np.random.Generator) -> dict[str, float]:
    """How large each organ is, 1 on average; every organ takes as many draws whatever is said of it."""
    said = {finding.what: finding.state for finding in attributes.findings}
    sizes = {}
    for organ in ORGANS:
        normal, share = 1 + 0.04 * float(np.clip(rng.normal(), -1.25, 1.25)), rng.random()
        low_high = STATES.get(organ, {}).get(said.get(organ, "present"))
        sizes[organ] = normal if low_high is None else low_high[0] + share * (low_high[1] - low_high[0])
    return sizes


def grown(p: Sequence[Field], anchor: Point, size: float, shift: Point = (0, 0, 0)) -> list[Field]:
    """Coordinates in which an organ, ``size`` times larger seen from ``anchor`` and shifted, has its usual shape."""
    return [(axis - s - a) / size + a for axis, a, s in zip(p, anchor, shift, strict=True)]


# ---------------------------------------------------------------- the parts of an abdomen


def paint_trunk(canvas: Body, female: bool, rng: np.random.Generator) -> tuple[Field, Field]:
    """Skin, fat and the muscle coat; returns the distances to the skin and to the cavity."""
    p, z = canvas.grid, canvas.grid[2]
    fat, belly = rng.uniform(-3, 9), rng.uniform(-4, 8)
    half = {name: smooth(z, PROFILE_Z, values) for name, values in PROFILES.items()}
    hips, waist = (np.exp(-(((z - at) / 60) ** 2)) for at in (-140, 20))
    sides = 5 * hips - 7 * waist if female else -4 * hips
    front = np.clip(p[1] / 80, 0, 1) * belly * np.exp(-(((z + 20) / 90) ** 2))
    body = column(p, half["trunk x"] + sides + fat, half["trunk y"] + fat + front, 2.4)
    cavity = column(p, half["wall x"] + 0.5 * sides * (z > -90), half["wall y"] + 0.6 * front, 2.3)
    canvas.paint(body, "skin")
    canvas.paint(body + 3, "fat")
    paint_muscles(canvas, body, cavity)
    return body, cavity


def paint_muscles(canvas: Body, body: Field, cavity: Field) -> None:
    """The wall of the abdomen, buttocks and thighs; in the cavity's fat the muscles of back and pelvis."""
    p, z = canvas.grid, canvas.grid[2]
    side = [np.abs(p[0]), p[1], z]
    # Thick flanks, the two recti in front, hardly anything between and beside them.
    flank = (
        np.clip((side[0] - 70) / 25, 0, 1) * np.clip((p[1] + 75) / 40, 0, 1) * (8 + 4 * np.clip((50 - z) / 60, 0, 1))
    )
    recti = np.clip((62 - side[0]) / 8, 0, 1) * np.clip((side[0] - 2) / 6, 0, 1) * np.clip((p[1] - 40) / 25, 0, 1)
    muscle = cavity - 3 - 6 * recti - flank - 6 * np.clip((-20 - p[1]) / 30, 0, 1)
    for a, b, r, flat in (
        ((62, -74, -150), (92, -58, -95), 34, (1.3, 1, 1.3)),  # gluteal muscles
        ((96, 0, -150), (100, 4, -230), 48, (1, 1.1, 1)),  # thigh
        ((80, 30, -80), (94, 30, -190), 22, (1, 1, 1)),  # iliopsoas on its way out
    ):
        muscle = union(muscle, tube(side, a, b, r, r, flat), 6)
    canvas.paint(intersection(muscle, body + 7, 4), "muscle")
    canvas.paint(np.abs(cavity - 6) - 0.8, "fat", opacity=0.5 * (np.abs(p[1]) < 60) * (z > -60) * (z < 90))
    canvas.paint(cavity, "fat")
    for a, b, r, flat in (
        ((28, -92, -130), (28, -86, 60), 17, (1.4, 1, 1)),  # erector spinae
        ((28, -86, 60), (26, -94, 210), 16, (1.4, 1, 1)),
        ((64, -70, -60), (56, -72, 80), 11, (1.3, 1, 1)),  # quadratus lumborum
    ):
        canvas.paint(intersection(tube(side, a, b, r, r, flat), body + 7, 4), "muscle")
    for s in (-1, 1):
        psoas = [(s * 28, -46, 90), (s * 38, -44, 10), (s * 54, -24, -70), (s * 76, 18, -120)]
        canvas.tube(psoas, [8, 19, 22, 20], "muscle")
    lining = union(12 * np.clip((p[1] - 30) / 30, 0, 1) - 13 - cavity, z + 176, 10)  # pelvic side walls and floor
    canvas.paint(intersection(lining, z + 95, 20), "muscle", opacity=cavity < 0)


def paint_lung_bases(canvas: Body, cavity: Field, rng: np.random.Generator) -> Field:
    """Lung around two domes; returns the distance to the space under the diaphragm."""
    p, breath = canvas.grid, rng.uniform(-6, 6)
    right = 182 + breath - 70 * (((p[0] - 62) / 84) ** 2 + ((p[1] - 12) / 96) ** 2)
    left = 174 + breath - 70 * (((p[0] + 66) / 80) ** 2 + ((p[1] - 10) / 96) ** 2)
    centre = 160 + breath - 30 * (((p[0] + 10) / 70) ** 2 + ((p[1] - 30) / 62) ** 2)
    dome = 0.75 * (p[2] + union(union(-right, -left, 24), -centre, 24))
    top = intersection(cavity + 1, -dome)
    canvas.paint(top, "muscle")
    spine = tube(p, (0, -66, 100), (0, -70, 220), 36, 36)
    lung = intersection(intersection(cavity + 3, 4 - dome), -spine, 6)
    canvas.paint(lung, "lung")
    heart = intersection(ellipsoid(p, (-22, 34, 205), (62, 48, 44)), 5 - dome)
    canvas.paint(heart, "vessel", opacity=0.9)
    return dome


def paint_bone_shape(canvas: Body, distance: Field, box: tuple[slice, ...] = (), cortex: float = 2.5) -> None:
    """A cortical shell around marrow."""
    canvas.paint(distance, "cortex", box)
    canvas.paint(distance + cortex, "marrow", box)


def paint_spine(canvas: Body) -> None:
    """Vertebrae and sacrum under one label, discs between them, the canal behind."""
    y_at = PchipInterpolator(PROFILE_Z, PROFILES["spine y"])
    course = [(0.0, float(y_at(z)), float(z)) for z in (-76, -40, 0, 40, 90, 140, 200)]
    canvas.tube(course, [19] * 7, "disc", flat=(1.2, 0.85, 1))
    sacrum = [(0, -58, -84, 20), (0, -72, -108, 17), (0, -84, -134, 13), (0, -86, -158, 8), (0, -80, -172, 5)]
    with canvas.labelled("vertebrae"):
        arches, z = [], -62.0
        for level in range(9):
            y, r = float(y_at(z)), 20 - 0.4 * level
            box, p = canvas.near([(0, y, z)], 1.4 * r)
            body = ((p[0] / (1.18 * r)) ** 2 + ((p[1] - y) / (0.88 * r)) ** 2) ** 0.5 - 1
            height = np.abs(p[2] - z) - 11.5 + 0.5 * level
            paint_bone_shape(canvas, intersection(0.95 * r * body, height, 4), box)
            arches += arch(y, z)
            z += 35.0 - 0.9 * level
        for paths, flat in ((arches, (1, 1, 1)), ([sacrum], (1.9, 0.8, 1))):
            course_of = sweep(canvas, [np.array(path, dtype=float) for path in paths], flat)
            paint_bone_shape(canvas, course_of.distance, course_of.box)
    canal = [(x, y - 26, z) for x, y, z in course]
    canvas.tube(canal, [8] * 7, "fat", flat=(1.2, 1, 1))
    canvas.tube(canal, [6] * 7, "cord")


def arch(y: float, z: float) -> list[list[tuple[float, float, float, float]]]:
    """Pedicles with transverse processes, laminae and spinous process behind a vertebral body, with their radii."""
    sides = [[(s * 13, y - 14, z + 2, 5.5), (s * 15, y - 29, z - 2, 6), (s * 40, y - 34, z, 4)] for s in (-1.0, 1.0)]
    laminae = [(-14.0, y - 29, z - 2, 5.5), (0, y - 37, z - 6, 5), (14, y - 29, z - 2, 5.5)]
    return [*sides, laminae, [(0, y - 36, z - 5, 5), (0, y - 52, z - 10, 5)]]


def paint_ribs(canvas: Body) -> None:
    """The lower six pairs."""
    ribs = sweep(canvas, [rib(level, side) for level in range(6) for side in (-1, 1)], (1, 1, 1.5))
    paint_bone_shape(canvas, ribs.distance, ribs.box, 2.2)


def rib(level: int, side: int) -> np.ndarray:
    """Points and radii along a rib from the spine round the wall; level 0 is the twelfth, 5 the seventh."""
    head, reach = 124 + 27 * level, (0.42, 0.56, 0.74, 0.8, 0.84, 0.86)[level]
    turn = np.linspace(0.14, reach, 14)
    z = head - (62 + 8 * level) * np.clip(turn / 0.8, 0, 1) ** 1.1
    half = [smooth(z, PROFILE_Z, PROFILES[name]) + 5 for name in ("wall x", "wall y")]
    x = side * half[0] * np.sin(np.pi * turn) ** (2 / 2.3)
    y = -half[1] * np.sign(np.cos(np.pi * turn)) * np.abs(np.cos(np.pi * turn)) ** (2 / 2.3)
    return np.stack([x, y, z, np.full(14, 4.2)], axis=1)


def paint_pelvis(canvas: Body, cavity: Field) -> None:
    """Iliac wings as plates round the cavity, hip joints, the pubic arch."""
    p = canvas.grid
    x, (y, z) = np.abs(p[0]), p[1:]
    crest = z + 24 + 0.012 * (y + 10) ** 2
    wing = intersection(np.abs(cavity - 7) - 4.5, intersection(crest, -150 - z, 4), 4)
    wing = intersection(wing, np.maximum(28 - x, np.maximum(-78 - y, y - 62 - 0.4 * (z + 60))), 4)
    paint_bone_shape(canvas, wing, cortex=2.2)
    for s in (-1, 1):
        paint_bone(canvas, [(s * 76, -2, -140), (s * 82, 0, -166)], [22, 26])
        paint_bone(canvas, [(s * 74, 12, -158), (s * 44, 46, -166), (s * 8, 62, -172)], [12, 8, 9])
        paint_bone(canvas, [(s * 72, -20, -165), (s * 60, -34, -198)], [13, 14])
        canvas.tube([(s * 88, -2, -164), (s * 92, -2, -168)], [25, 25], "cartilage")
        paint_bone(canvas, [(s * 89, -2, -165), (s * 90, -2, -167)], [23, 23])
        paint_bone(canvas, [(s * 94, -4, -170), (s * 132, -16, -190)], [15, 17])


def paint_small_bowel(canvas: Body, cavity: Field, rng: np.random.Generator) -> None:
    """Coils of fluid-filled bowel between the colon's limbs."""
    rows = []
    for row, z in enumerate(np.linspace(22, -96, 6)):
        for layer, y in enumerate((60, 34, 8)):
            wide = 76 - 8 * layer - max(0.0, -60 - z) * 0.7
            x = np.linspace(-wide, wide, 6) * (-1) ** (row + layer)
            up = 9 * (-1) ** np.arange(6)
            rows.append(np.stack([x, np.full(6, y) + 4 * up / 10, z + up], axis=1))
    path = np.concatenate(rows)
    path = path + rng.normal(0, 5, path.shape)
    radius = rng.uniform(9.5, 13, len(path))
    course = sweep(canvas, [finer(np.column_stack([path, radius]), 2)])
    distance = intersection(course.distance + 1.2 * np.sin(course.along / 4), cavity[course.box] + 3, 3)
    with canvas.labelled("small_bowel"):
        canvas.paint(distance, "bowel wall", course.box)
    with canvas.labelled(None):
        canvas.paint(distance + 3.2, "fluid", course.box, rng.uniform(0.6, 1))
        gas = intersection(distance + 3.2, 13 - course.ahead + 12 * np.cos(course.along / 70), 2)
        canvas.paint(gas, "gas", course.box)


def colon_path(sizes: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """The colon's course in this body, with its radii (N, 4); large organs above push it down."""
    path = COLON.copy()
    path[[2, 3, 4, 5], 2] -= np.array([40, 110, 140, 90]) * max(0.0, sizes["liver"] - 1)
    path[[5, 6, 7], 2] -= 35 * max(0.0, sizes["stomach"] - 1)
    path[8:12, 1:3] += np.array([(20, -50), (40, -110), (50, -80), (30, -30)]) * max(0.0, sizes["spleen"] - 1)
    sway = rng.normal(0, 1, (len(path), 3)) * (3, 4, 5)
    sway[[6, 7], 2] += rng.normal(0, 8)  # some transverse colons hang low
    path[:-1, :3] += sway[:-1]
    path[:, 3] *= rng.uniform(0.85, 1.12) * rng.uniform(0.92, 1.08, len(path))
    return path


def paint_colon(canvas: Body, cavity: Field, path: np.ndarray, rng: np.random.Generator) -> None:
    """Wall with haustra, stool and gas that floats on it."""
    phase, level = rng.uniform(0, 6, 3), rng.uniform(-8, 8)
    course = sweep(canvas, [finer(path, 4)])
    haustra = 2.6 * np.cos(2 * np.pi * course.along / 34 + phase[0])
    distance = intersection(course.distance + haustra, cavity[course.box] + 1, 3)
    with canvas.labelled("colon"):
        canvas.paint(distance, "bowel wall", course.box)
    with canvas.labelled(None):
        canvas.paint(distance + 3.5, "stool", course.box)
        crumbs = np.cos(course.along / 4 + course.ahead / 3) + np.cos(course.ahead / 2.5 - course.along / 7)
        canvas.paint(intersection(distance + 6, 3 * (0.9 - crumbs), 1), "fat", course.box, rng.uniform(0.1, 0.6))
        rise = level + 12 * np.cos(course.along / 110 + phase[1])
        canvas.paint(intersection(distance + 3.5, rise - course.ahead, 2), "gas", course.box)


def paint_stomach(canvas: Body, dome: Field, size: float, rng: np.random.Generator) -> None:
    """A bag from the left dome to the pylorus, gas in front and fluid behind."""
    path = np.array([
        (-58, -22, 148, 30), (-64, 2, 128, 33), (-62, 30, 102, 30), (-44, 52, 74, 25), (-12, 60, 56, 21),
        (16, 52, 54, 16), (30, 38, 60, 11),
    ], dtype=float)  # fmt: skip
    path[:, :3] += rng.normal(0, 1, 3) * (2, 3, 4)
    path[1:-1, :3] += rng.normal(0, 3, (5, 3))
    # A hollow organ swells more than it lengthens.
    pylorus = path[-1, :3].copy()
    path[:, :3] = pylorus + (path[:, :3] - pylorus) * size**0.2
    path[:, 3] *= size**1.4
    path[:4, :3] += np.outer(path[:4, 3] * max(0.0, 1 - size**-1.4), (0.5, 0.6, -0.6))  # away from dome and spleen
    course = sweep(canvas, [finer(path, 3)])
    distance = intersection(course.distance, dome[course.box] + 4, 6)
    with canvas.labelled("stomach"):
        canvas.paint(distance, "bowel wall", course.box)
    with canvas.labelled(None):
        canvas.paint(distance + 4, "fluid", course.box)
        level = rng.uniform(26, 44) - canvas.grid[1][course.box]
        canvas.paint(intersection(distance + 4, level, 2), "gas", course.box)


def paint_liver(canvas: Body, under: Field, size: float, rng: np.random.Generator) -> None:
    """Right and left lobe over a slanting underside, with its veins, and the gallbladder beneath."""
    left, tilt = rng.uniform(0.92, 1.08), rng.uniform(-0.03, 0.03)
    box, real = canvas.near([(40, 0, 100)], 150 * size)
    p = grown(real, (104, -36, 172), size)
    lobes = ellipsoid(p, (62, -3, 97), (62, 77, 84))
    lobes = union(lobes, ellipsoid(p, (2, 44, 136), (66 * left, 40, 38)), 18)
    below = (0.48 + tilt) * (92 - p[0]) + 0.86 * (24 - p[2]) + 0.1 * p[1]
    groove = tube(p, (10, 10, 60), (10, 86, 90), 8, 5)
    distance = intersection(intersection(lobes, below, 12), -groove, 5) * size
    distance = intersection(distance, under[box], 5)
    with canvas.labelled("liver"):
        canvas.paint(distance, "liver", box)
    within = np.zeros(canvas.shape, dtype=np.float32)
    within[box] = np.clip(0.5 - (distance + 3) / canvas.edge, 0, 1)
    with canvas.labelled(None):
        for points, radii in (
            ([(16, 2, 84), (34, 4, 96), (62, 0, 104), (92, -14, 112)], [8, 7, 5.5, 3]),
            ([(62, 0, 104), (84, 24, 92)], [5, 3]), ([(34, 4, 96), (10, 36, 120), (-24, 44, 130)], [6, 5, 3]),
            ([(20, -20, 158), (54, -10, 142), (88, -24, 124)], [6, 4.5, 3]),
            ([(20, -20, 158), (46, 26, 140), (66, 44, 118)], [6, 4.5, 3]),
            ([(20, -20, 158), (0, 20, 148), (-26, 42, 140)], [6, 4, 2.5]),
        ):  # fmt: skip
            canvas.tube(points, radii, "vessel", within=within)
        canvas.tube([(21, -22, 170), (21, -18, 60)], [12, 12], "vessel", within=within)
    bladder = grown(real, (104, -36, 172), size)
    bag = tube(bladder, (46, 34, 56), (62, 58, 34), 9, 15) * size
    canvas.paint(intersection(bag, under[box], 3), "gallbladder", box)


def paint_spleen(canvas: Body, under: Field, size: float, rng: np.random.Generator) -> None:
    """A bean against the left ribs, hollowed towards the stomach."""
    shift = rng.normal(0, 1, 3) * (1, 4, 4)
    if not size:
        return
    box, real = canvas.near([(-94, -42, 124)], 74 * size + 10)
    p = grown(real, (-110, -56, 148), size, shift)
    turned = (0.9 * (p[0] + 92) + 0.42 * (p[1] + 42), 0.9 * (p[1] + 42) - 0.42 * (p[0] + 92), p[2] - 126)
    bean = intersection(ellipsoid(turned, (0, 0, 0), (32, 54, 60)), -ellipsoid(turned, (38, 14, 0), (22, 34, 60)), 8)
    with canvas.labelled("spleen"):
        canvas.paint(intersection(bean * size, under[box], 4), "spleen", box)


def paint_kidney(canvas: Body, side: int, size: float, rng: np.random.Generator) -> None:
    """Cortex round pyramids round the fat of the sinus; the upper pole lies nearer to the spine."""
    shift = rng.normal(0, 3, 3)
    if not size:
        return
    centre = np.array([side * 63, -46, 56 if side > 0 else 70]) + shift
    box, real = canvas.near([centre], 66 * size)
    p = grown(real, centre, size)
    q = [
        side * (p[0] - centre[0]) + 0.22 * (p[2] - centre[2]),
        p[1] - centre[1] - 0.15 * (p[2] - centre[2]),
        p[2] - centre[2],
    ]
    sinus = ellipsoid(q, (-14, 6, 0), (15, 9, 20))
    bean = intersection(ellipsoid(q, (0, 0, 0), (27, 26, 55)), -sinus, 5) * size
    with canvas.labelled("kidney_right" if side > 0 else "kidney_left"):
        canvas.paint(bean, "renal cortex", box)
    with canvas.labelled(None):
        rays = np.cos(6 * np.arctan2(q[2], 2 * q[1] + 1e-3)) * 3
        canvas.paint(bean + 8 - rays, "renal medulla", box)


def paint_upper_gut(canvas: Body, sizes: dict[str, float], rng: np.random.Generator) -> None:
    """Pancreas from the duodenum's C to the hilum of the spleen, and the duodenum round its head."""
    shift = rng.normal(0, 2.5, 3)
    pancreas = np.array([
        (32, 14, 36, 13), (28, 18, 52, 14), (10, 24, 66, 10.5), (-14, 22, 76, 10.5), (-42, 4, 88, 10.5),
        (-66, -16, 98, 9),
    ])  # fmt: skip
    pancreas[:, :3] += shift
    pancreas[:, 3] *= sizes["pancreas"]
    course = sweep(canvas, [finer(pancreas, 2)])
    with canvas.labelled("pancreas"):
        canvas.paint(course.distance + 1.2 * np.cos(course.along / 2.2), "pancreas", course.box)
    duodenum = np.array([
        (32, 36, 62, 12), (48, 20, 64, 12), (54, 4, 46, 12.5), (52, 2, 24, 13), (34, 4, 8, 12.5), (6, 6, 6, 11.5),
        (-20, 8, 18, 11.5), (-30, 18, 32, 11),
    ])  # fmt: skip
    duodenum[:, :3] += shift
    duodenum[:, 3] *= sizes["duodenum"]
    course = sweep(canvas, [finer(duodenum, 2)])
    with canvas.labelled("duodenum"):
        canvas.paint(course.distance, "bowel wall", course.box)
    with canvas.labelled(None):
        canvas.paint(course.distance + 3.5, "fluid", course.box)
        canvas.paint(intersection(course.distance + 3.5, 6 - course.ahead, 2), "gas", course.box, 0.8)


def paint_vessels(canvas: Body) -> None:
    """Aorta and vena cava with their branches, the portal vein."""
    for points, radii in (
        ([(-6, -34, 210), (-8, -26, 130), (-8, -17, 60), (-6, -16, -28)], [12, 11, 10, 9]),
        ([(20, -22, 180), (20, -18, 60), (18, -20, -34)], [12, 12, 11]),
        ([(-6, -16, -28), (26, -18, -70), (46, -2, -110), (70, 36, -160), (76, 48, -200)], [7, 6.5, 6, 5, 5]),
        ([(-6, -16, -28), (-30, -16, -70), (-46, -2, -110), (-70, 36, -160), (-76, 48, -200)], [7, 6.5, 6, 5, 5]),
        ([(18, -20, -34), (34, -28, -70), (46, -12, -110), (62, 34, -160), (66, 44, -200)], [8, 7, 6.5, 6, 6]),
        ([(18, -20, -34), (-28, -28, -70), (-46, -12, -110), (-62, 34, -160), (-66, 44, -200)], [8, 7, 6.5, 6, 6]),
        ([(4, 8, -40), (6, 12, 40), (16, 2, 84), (34, 4, 96)], [5, 6, 8, 7]),
        ([(8, 12, 62), (-36, -4, 82), (-78, -30, 118)], [6, 5, 4]),
        ([(-8, -12, 92), (-6, 8, 90)], [4, 4]),
        ([(-8, -10, 66), (-4, 6, 30), (0, 16, -30)], [4, 4, 3]),
        ([(-8, -18, 64), (-52, -40, 72)], [4, 3]), ([(18, -18, 58), (52, -40, 58)], [4, 3]),
    ):  # fmt: skip
        canvas.tube(points, radii, "vessel")


def paint_pelvic_organs(canvas: Body, size: float, female: bool, rng: np.random.Generator) -> None:
    """Urinary bladder, and behind or below it uterus or prostate."""
    shift = rng.normal(0, 1, 3) * (3, 3, 2)
    if female:
        canvas.ellipsoid((2, -12, -124), (26, 16, 26), "uterus")
    else:
        canvas.ellipsoid((0, 6, -176), (24, 19, 15), "prostate")
    box, real = canvas.near([(0, 26, -140)], 60 * size)
    p = grown(real, (0, 24, -164), size, shift)
    distance = ellipsoid(p, (0, 26, -138), (42, 31, 29)) * size
    with canvas.labelled("urinary_bladder"):
        canvas.paint(distance, "bladder wall", box)
    with canvas.labelled(None):
        canvas.paint(distance + 3, "bladder", box)


def paint_tumour(canvas: Body, inside: Field, path: np.ndarray, finding: Finding, rng: np.random.Generator) -> None:
    """A lobed mass on the wall of the colon, which fills it and grows into the fat around."""
    share, turn, bumps = rng.random(), rng.uniform(-1.2, 1.2), rng.normal(size=(6, 3))
    if finding.where not in COURSE or finding.state == "absent":
        return
    low, high = COURSE[finding.where]
    here = PchipInterpolator(np.arange(len(path)), path)(low + share * (high - low))
    diameter = 10 * (finding.size_cm or 4.0)
    # It sits on the wall that looks into the abdomen, where a large one has room.
    inward = np.arctan2(40 - here[1], -here[0]) + turn
    aside = 0.4 * here[3] + 0.5 * max(0.0, diameter / 2 - here[3])
    centre = canvas.to_world(here[:3] + aside * np.array([np.cos(inward), np.sin(inward), 0]))
    offset = [w - c for w, c in zip(canvas.world, centre, strict=True)]
    length = np.sqrt(offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2) + 1e-3
    surface = np.full(canvas.shape, 0.42 * diameter, dtype=np.float32)
    for bump in bumps / np.linalg.norm(bumps, axis=1, keepdims=True):
        along = (offset[0] * bump[0] + offset[1] * bump[1] + offset[2] * bump[2]) / length
        surface += 0.075 * diameter * np.exp(5 * (along - 1))
    distance = length - surface
    may_grow = [ORGANS.index(organ) for organ in ("colon", "small_bowel", "body")]
    mask = (distance < 0) & np.isin(canvas.layout, may_grow) & (inside < 0)
    middle = np.rint((centre - canvas.origin) / canvas.spacing).astype(int)
    mask[tuple(np.clip(middle, 0, np.array(canvas.shape) - 1))] = True  # never too small to be seen
    distance = np.where(mask, np.minimum(distance, -canvas.edge / 4), np.maximum(distance, canvas.edge / 4))
    with canvas.labelled("colorectal_cancer"):
        canvas.paint(distance, "tumour")
    with canvas.labelled(None):
        canvas.paint(distance + 0.3 * diameter, "tumour core")


def keep_whole(layout: Field) -> None:
    """Give crumbs that a neighbour has cut off a solid organ to the body around."""
    places = ndimage.find_objects(layout)
    for organ in ("spleen", "kidney_right", "kidney_left", "liver", "pancreas"):
        value = ORGANS.index(organ)
        if (box := places[value - 1]) is not None:
            parts, count = ndimage.label(layout[box] == value, np.ones((3, 3, 3)))
            if count > 1:
                largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
                layout[box][(parts > 0) & (parts != largest)] = ORGANS.index("body")


# ---------------------------------------------------------------- public: one case, a cohort


def abdomen(seed: int, shape: Sequence[int] = (96, 80, 48), attributes: Attributes | None = None) -> AbdomenPhantom:
    """Generate one abdominal CT, portal venous phase, with its labels.

    Args:
        seed: same seed, shape and attributes: same phantom, bit for bit; at another shape the same body.
        shape: voxels along right, anterior, superior; at least 16 each. The field of view stays 360 x 270 x 384 mm.
        attributes: what is true of the body, drawn from ``seed`` if None. Findings of other nouns are let be.

    Returns:
        The phantom.

    Example:
        >>> abdomen(0, (16, 16, 16), Attributes((Finding("spleen", "absent"),))).layout.shape
        (16, 16, 16)
    """
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape must be three sizes of at least 16 voxels, got {tuple(shape)}")
    seeds = np.random.SeedSequence(seed).spawn(5)
    said, habit, build, lesions, scanner = (np.random.default_rng(s) for s in seeds)
    attributes = draw_attributes(said) if attributes is None else attributes
    female = habit.random() < 0.5 if not attributes.sex else attributes.sex == "female"
    canvas = Body(shape, build, 0.97 if female else 1.01)
    stature = float(np.prod(canvas.scale)) ** (1 / 3)  # organs differ less than bodies do
    sizes = {organ: size / stature**0.6 for organ, size in organ_sizes(attributes, habit).items()}
    body, cavity = paint_trunk(canvas, female, habit)
    dome = paint_lung_bases(canvas, cavity, habit)
    under = intersection(cavity + 3, dome + 3, 4)
    path = colon_path(sizes, habit)
    paint_small_bowel(canvas, cavity, habit)
    paint_colon(canvas, under, path, habit)
    paint_vessels(canvas)
    paint_spleen(canvas, under, sizes["spleen"], habit)
    paint_stomach(canvas, under, sizes["stomach"], habit)
    paint_liver(canvas, under, sizes["liver"], habit)
    paint_kidney(canvas, 1, sizes["kidney_right"], habit)
    paint_kidney(canvas, -1, sizes["kidney_left"], habit)
    paint_upper_gut(canvas, sizes, habit)
    paint_spine(canvas)
    paint_ribs(canvas)
    paint_pelvis(canvas, cavity)
    paint_pelvic_organs(canvas, sizes["urinary_bladder"], female, habit)
    for finding in attributes.findings:
        if finding.what == "tumour":
            paint_tumour(canvas, cavity - 7, path, finding, lesions)
    canvas.layout[np.broadcast_to(body >= 0, canvas.shape)] = 0
    keep_whole(canvas.layout)

    # The scanner: point spread, then noise that neighbours share.
    image = ndimage.gaussian_filter(canvas.image, 0.4)
    image += scanner.uniform(6, 16) * smooth_field(canvas.shape, (0.6, 0.6, 0.5), scanner)
    affine = np.diag([*canvas.spacing, 1.0])
    affine[:3, 3] = canvas.origin
    voxels = np.clip(np.rint(image), -1024, 3071).astype(np.int16)
    return AbdomenPhantom(voxels, canvas.layout, affine, attributes)


def abdomen_cohort(
    directory: str | os.PathLike, num_cases: int, shape: Sequence[int] = (96, 80, 48), seed: int = 0
) -> str:
    """Make sure a folder holds a cohort of abdomen phantoms, generating what is missing.

    Cases are ``CT/abdomen_0000.nii.gz`` (int16, HU) with ``SEG/abdomen_0000.nii.gz`` (uint8, values of ``ORGANS``) and
    ``REPORT/abdomen_0000.txt`` (UTF-8; about every fourth in Chinese). Case i depends on ``seed`` and i alone, so a
    small cohort is a prefix of a larger one and can grow in place. ``phantoms.json``, written last, keeps the settings.

    Args:
        directory: folder of the cohort, made if missing.
        num_cases: how many cases there must be at least.
        shape: voxels of each case.
        seed: seed of the cohort, 0 or more.

    Returns:
        The folder, as a string.
    """

    def generate(number: int, paths: Sequence[Path], note: str) -> None:
        case, words = abdomen(number, shape), np.random.default_rng([number, 1])
        text = write_report(case.attributes, "zh" if words.random() < 0.25 else "en", words)
        with atomic_path(paths[0]) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        write_nifti(paths[1], case.image, case.affine, note)
        write_nifti(paths[2], case.layout, case.affine, note)

    files = ("REPORT/abdomen_{:04d}.txt", "CT/abdomen_{:04d}.nii.gz", "SEG/abdomen_{:04d}.nii.gz")
    fill_cohort(
        directory, num_cases, files, {"kind": "abdomen", "recipe": RECIPE, "seed": seed, "shape": shape}, generate
    )
    return str(directory)
