"""Procedural colonoscopy: a seeded stretch of bowel wall with a polyp on it, lit by the lamp at the camera.

A `Scene` is a height field, its colour and the light that reaches it; normals of the height give diffuse light and
highlights (Lambert 1760, Blinn 1977), so that folds, polyp and their glints agree. Noise lives on lattices of a fixed
number of cells: one seed is one picture at every size.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .io import atomic_path, stamp, stamped
from .mask_phantoms import blob
from .prompts import build_prompts

logger = logging.getLogger(__name__)

RECIPE = 1  # raise it when the same seed gives other pixels
FINER = 2  # rendered pixels per pixel of the image, on a side

# Colours that lit mucosa takes, and what a polyp's own colour is to the one around it: redder, paler, yellower, alike.
MUCOSA = np.array([(0.82, 0.40, 0.31), (0.84, 0.42, 0.22), (0.76, 0.28, 0.22), (0.78, 0.48, 0.38), (0.72, 0.38, 0.38)])
POLYPS = np.array([(1.03, 0.74, 0.72), (1.08, 1.22, 1.24), (1.06, 1.14, 0.84), (1.00, 0.97, 0.97)])

Field = np.ndarray
Grid = tuple[Field, Field]


@dataclass
class Scene:
    """What the camera looks at; lengths are fractions of the image's width.

    Attributes:
        grid: pixel centres x, y (S, S).
        height: of the surface towards the camera (S, S).
        light: share of the lamp's light that arrives (S, S).
        albedo: colour of the surface (S, S, 3), in [0, 1].
        polyp: where the surface is polyp (S, S), bool.
    """

    grid: Grid
    height: Field
    light: Field
    albedo: Field
    polyp: Field


def noise(rng: np.random.Generator, cells: int, size: int) -> Field:
    """Smooth noise of mean 0 and deviation near 1 (size, size), whose bumps are ``1 / cells`` of the width wide."""
    lattice = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return 1.3 * np.asarray(lattice.resize((size, size), Image.Resampling.BICUBIC))


def vessels(rng: np.random.Generator, size: int) -> Field:
    """A net of vessels that fork and thin out (size, size), 0 to 1."""
    picture = Image.new("L", (size, size))
    draw = ImageDraw.Draw(picture)
    roots = [(rng.uniform(0, 1, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0.009, 0.015)) for _ in range(7)]
    while roots:
        at, heading, width = roots.pop()
        for _ in range(int(rng.integers(5, 12))):
            heading += rng.normal(0, 0.35)
            end = at + 0.045 * np.array([np.cos(heading), np.sin(heading)])
            shade = int(255 * min(1.0, width / 0.009))
            draw.line([*(at * size), *(end * size)], fill=shade, width=max(1, round(width * size)))
            at, width = end, width * 0.95
        if width > 0.004:
            roots += [(at, heading + turn, width * 0.75) for turn in (rng.uniform(0.2, 0.9), -rng.uniform(0.2, 0.9))]
    return ndimage.gaussian_filter(np.asarray(picture, dtype=np.float32) / 255, 0.004 * size)


def mucosa(rng: np.random.Generator, size: int) -> Scene:
    """A healthy wall: folds around a lumen that is in view or beside it, relief, blotches, vessels."""
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    x, y = np.meshgrid(centres, centres)
    # The lumen: the wall recedes towards it and the light with it.
    away, turn = (rng.uniform(0.1, 0.34) if rng.random() < 0.5 else rng.uniform(0.6, 1.0)), rng.uniform(0, 2 * np.pi)
    dx, dy = x - 0.5 - away * math.cos(turn), y - 0.5 - away * math.sin(turn)
    squash, tilt = rng.uniform(0.75, 1.0), rng.uniform(0, np.pi)
    u, v = dx * math.cos(tilt) + dy * math.sin(tilt), (dy * math.cos(tilt) - dx * math.sin(tilt)) / squash
    angle, radius = np.arctan2(v, u), np.hypot(u, v) + 1e-3
    radius = radius * np.exp(0.10 * noise(rng, 4, size) + 0.08 * np.cos(3 * angle + rng.uniform(0, 2 * np.pi)))
    light = 1 - 0.97 * np.exp(-((radius / rng.uniform(0.16, 0.30)) ** 1.8))

    # Folds: crests at equal steps of depth, steep and in shadow on their far side.
    phase = np.log(radius + 0.05) * rng.uniform(1.1, 1.9) + 0.12 * noise(rng, 5, size) + rng.uniform(0, 1)
    step = phase - np.floor(phase)
    strength = rng.uniform(0.3, 1.2) * np.clip(0.8 + 0.3 * noise(rng, 4, size), 0.1, 1.3)
    crest = np.where(step > 0.35, np.exp(-(((step - 0.35) / 0.25) ** 2)), np.exp(-(((step - 0.35) / 0.10) ** 2)))
    valley = np.exp(-(((step - 0.18) / 0.10) ** 2))
    height = 0.10 * strength * np.minimum(radius, 0.6) ** 0.8 * crest
    light = light * (1 + np.clip(strength * (0.25 * crest - 0.6 * valley), -0.75, 0.3))

    # Relief and colour.
    rough = rng.uniform(0.5, 1.2)
    for cells, amount in ((5, 0.016), (13, 0.0038), (28, 0.0013), (60, 0.0006)):
        height = height + rough * amount * noise(rng, cells, size)
    shares = rng.dirichlet(np.full(len(MUCOSA), 0.5))
    blotches = 0.6 * noise(rng, 5, size) + 0.4 * noise(rng, 12, size) + 0.25 * noise(rng, 40, size)
    albedo = _tint(*(shares @ MUCOSA)) * (1 + blotches[..., None] * _tint(0.02, 0.09, 0.08))
    net = np.clip(rng.uniform(0.2, 1.4) * vessels(rng, size) * (0.9 + 0.5 * noise(rng, 4, size)), 0, 1)
    albedo = albedo * (1 - net[..., None] * _tint(0.16, 0.55, 0.48))
    return Scene((x, y), height, light, albedo, np.zeros((size, size), dtype=bool))


def place(rng: np.random.Generator, scene: Scene, area: float) -> tuple[float, float]:
    """Where a polyp of that area fits: wholly in view, not in the depth of the lumen, on no other polyp."""
    radius = math.sqrt(area / math.pi)
    size, spread = len(scene.height), max(0.04, 0.42 - radius)
    taken = ndimage.distance_transform_edt(~scene.polyp) / size if scene.polyp.any() else np.ones((size, size))
    best, score = (0.5, 0.5), -np.inf
    for _ in range(12):
        away, turn = spread * rng.uniform(0, 1) ** 0.5, rng.uniform(0, 2 * np.pi)
        x, y = 0.5 + away * math.cos(turn), 0.5 + away * math.sin(turn)
        at = (int(y * size), int(x * size))
        free = min(0.0, float(taken[at]) - 1.6 * radius) * 10 + min(0.0, float(scene.light[at]) - 0.45)
        if free > score:
            best, score = (x, y), free
    return best


def grow_polyp(rng: np.random.Generator, scene: Scene, area: float) -> None:
    """Raise a polyp from the wall: a dome, some of several lobes, with its own colour and texture, and its shadow."""
    size, radius = len(scene.height), math.sqrt(area / math.pi)
    x, y = place(rng, scene, area)
    lobes = [(x, y, area)]
    for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.6, 0.15, 0.15, 0.1]))):
        turn, away = rng.uniform(0, 2 * np.pi), 0.7 * radius
        lobes.append((x + away * math.cos(turn), y + away * math.sin(turn), area * rng.uniform(0.25, 0.5)))
    reach = [blob(rng, scene.grid, *lobe).astype(np.float32) for lobe in lobes]  # 1 on each lobe's rim
    bulge = rng.uniform(0.45, 1.0)
    power = rng.uniform(0.6, 1.0)
    domes = [bulge * math.sqrt(a / math.pi) * np.clip(1 - r**2, 0, 1) ** power for r, (_, _, a) in zip(reach, lobes)]
    rim, dome = np.minimum.reduce(reach), np.sum(np.power(domes, 4), axis=0) ** 0.25
    inside = rim < 1

    # Shadow: all round the foot, and thrown away from the middle of the view, where the lamp is.
    thrown = (0.35 * bulge * (x - 0.5), 0.35 * bulge * (y - 0.5))
    shifted = ndimage.shift(rim, (thrown[1] * size, thrown[0] * size), order=1, mode="nearest")
    shadow = 0.25 * np.exp(-(((rim - 1) / 0.15) ** 2)) + 0.4 * np.clip((1.2 - shifted) / 0.4, 0, 1)
    scene.light = np.where(inside, scene.light, scene.light * (1 - np.clip(bulge * shadow, 0, 0.75)))
    # It stands nearer to the lamp than the wall behind it.
    near = max(0.6, float(np.median(scene.light[inside]))) + 0.15 * bulge
    scene.light = np.where(inside, 0.25 * scene.light + 0.75 * near, scene.light)

    bumps = noise(rng, 60, size) * 0.0006 + noise(rng, 26, size) * 0.003 + noise(rng, 13, size) * 0.006
    bumps = rng.uniform(0.2, 1.3) * bumps + 0.88 * (scene.height[inside].mean() - scene.height)
    within = np.clip(2.5 * (1 - rim), 0, 1)  # no step on the rim, which would outline it
    scene.height = np.where(inside, scene.height + dome + within * bumps, scene.height)
    shares = rng.dirichlet(np.full(len(POLYPS), 0.5))
    speckle = 0.4 * noise(rng, 24, size) + 0.6 * noise(rng, 9, size)
    own = scene.albedo.mean(axis=(0, 1)) * _tint(*(shares @ POLYPS))
    own = own * (1 + speckle[..., None] * _tint(0.02, 0.08, 0.07))
    scene.albedo = np.where(inside[..., None], 0.2 * scene.albedo + 0.8 * own, scene.albedo)
    scene.polyp = scene.polyp | inside


def photograph(rng: np.random.Generator, scene: Scene) -> Field:
    """The scene as the camera sees it (S, S, 3), in [0, 1]."""
    size, (x, y) = len(scene.height), scene.grid
    slope_y, slope_x = np.gradient(scene.height, 1 / size)
    normal = _unit(-slope_x, -slope_y, np.ones_like(slope_x))
    lamp = rng.uniform(0.25, 0.75, 2).tolist()
    towards = _unit(lamp[0] - x, lamp[1] - y, np.full_like(x, 0.75))
    viewer = _unit(0.5 - x, 0.5 - y, np.full_like(x, 0.75))
    diffuse = np.clip((normal * towards).sum(axis=0), 0, 1)
    halfway = (normal * _unit(*(towards + viewer))).sum(axis=0)
    glint = np.clip(halfway, 0, 1) ** rng.uniform(120, 300)
    arriving = scene.light / (1 + rng.uniform(0.8, 3.5) * ((x - lamp[0]) ** 2 + (y - lamp[1]) ** 2))

    # Wet where a film of fluid lies, so that not every slope that could shine does.
    film = np.clip(0.3 + 0.8 * noise(rng, 14, size), 0, 1)
    colour = scene.albedo * (0.14 + rng.uniform(1.15, 1.65) * diffuse)[..., None] * arriving[..., None]
    colour = colour + rng.uniform(0.7, 2.2) * (film * glint * arriving)[..., None]
    colour = colour * _tint(*rng.uniform((0.94, 0.90, 0.84), (1.06, 1.06, 1.10)))
    colour = np.where(colour > 0.75, 1 - 0.25 * np.exp(3 - 4 * colour), colour)  # a sensor's soft shoulder
    colour = colour + 0.012 * noise(rng, 110, size)[..., None]
    return np.clip(colour * frame(scene.grid)[..., None], 0, 1)


def frame(grid: Grid) -> Field:
    """The endoscope's window (S, S): 1 in the middle, darker towards the rim, 0 in the cut corners."""
    x, y = (2 * np.abs(axis - 0.5) for axis in grid)
    edge = np.maximum(np.maximum(x, y) / 0.99, (x + y) / 1.52)
    return np.clip((1 - edge) / 0.02, 0, 1) * (1 - 0.25 * edge**4)


def _tint(*rgb: float) -> Field:
    return np.array(rgb, dtype=np.float32)


def _unit(*parts: Field) -> Field:
    vector = np.stack(parts)
    return vector / np.sqrt((vector * vector).sum(axis=0))


def endoscopy(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """One colonoscopy image with one polyp, sometimes two.

    Args:
        seed: same seed: same picture, at any size.
        size: pixels on a side, at least 16.

    Returns:
        the image (size, size, 3), uint8 RGB, and the polyps' mask (size, size), uint8, 0 and 255.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    wall, lesion, camera = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    scene = mucosa(wall, size * FINER)
    for share in (1.0, 0.5) if lesion.random() < 0.1 else (1.0,):
        grow_polyp(lesion, scene, share * float(np.clip(lesion.lognormal(-2.7, 0.6), 0.015, 0.28)))
    seen = scene.polyp & (frame(scene.grid) > 0)
    picture, mask = (_shrink(field, size) for field in (photograph(camera, scene), seen.astype(np.float32)))
    return np.rint(255 * picture).astype(np.uint8), np.where(mask >= 0.5, 255, 0).astype(np.uint8)


def _shrink(field: Field, size: int) -> Field:
    return field.reshape(size, FINER, size, FINER, *field.shape[2:]).mean(axis=(1, 3))


def endoscopy_cohort(directory: str | os.PathLike, num_cases: int, size: int = 96, seed: int = 0) -> str:
    """Make sure a folder holds a cohort of endoscopy phantoms, drawing what is missing.

    Cases are ``images/case_0000.png`` with ``masks/case_0000.png``, listed in ``prompt.json``. Case i depends on
    ``seed`` and i alone, so a small cohort is the beginning of a larger one.

    Args:
        directory: folder of the cohort, made if missing.
        num_cases: how many cases there must be at least.
        size: pixels on a side.
        seed: seed of the cohort, 0 or more.

    Returns:
        The folder, as a string.
    """
    root = Path(directory)
    settings = {"kind": "endoscopy", "recipe": RECIPE, "seed": int(seed), "size": int(size)}
    made = stamped(root, settings)
    pairs = [tuple(root / folder / f"case_{i:04d}.png" for folder in ("images", "masks")) for i in range(num_cases)]
    missing = [i for i, pair in enumerate(pairs) if i >= made or not all(path.exists() for path in pair)]
    if missing:
        logger.info(f"drawing {len(missing)} endoscopy phantoms of {size} x {size} pixels in {root}")
    for i in missing:
        for path, pixels in zip(pairs[i], endoscopy(int(np.random.SeedSequence([seed, i]).generate_state(1)[0]), size)):
            with atomic_path(path) as temporary:
                Image.fromarray(pixels).save(temporary, format="png")
    if missing or not (root / "prompt.json").exists():
        build_prompts(root)
    if num_cases > made:
        stamp(root, settings, num_cases)
    return str(directory)
