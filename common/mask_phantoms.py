"""Generated annotation masks: lesions as polyps and skin lesions look, and hearts as CAMUS labels them.

Statistics are correlated as in real masks: a large lesion lies nearer the centre, one of several is smaller. No image
belongs to them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from .io import atomic_path, stamp, stamped

logger = logging.getLogger(__name__)

RECIPE = 1  # raise it when the same seed gives other masks
COUNTS = (0.86, 0.11, 0.03)  # shares of masks with one, two and three lesions


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as fractions of the image: x (columns), y (rows)."""
    centres = (np.arange(size) + 0.5) / size
    return np.meshgrid(centres, centres)


def blob(rng: np.random.Generator, grid: tuple[np.ndarray, np.ndarray], x: float, y: float, area: float) -> np.ndarray:
    """A star-shaped lesion of about the given area around (x, y): an ellipse whose rim waves in four harmonics.

    Returns how far out a pixel lies: 0 in the middle, below 1 inside, 1 on the rim.
    """
    stretch, turn = rng.uniform(1.0, 1.7) ** 0.5, rng.uniform(0, np.pi)
    dx, dy = grid[0] - x, grid[1] - y
    u = (dx * np.cos(turn) + dy * np.sin(turn)) / stretch
    v = (dy * np.cos(turn) - dx * np.sin(turn)) * stretch
    angle = np.arctan2(v, u)
    harmonics = [(k, rng.normal(0, 0.11 / (k - 1)), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5)]
    rim = 1 + sum(a * np.cos(k * angle + phase) for k, a, phase in harmonics)
    power = 1 + sum(a**2 for _, a, _ in harmonics) / 2  # the waves' own share of the area
    return np.hypot(u, v) / (rim * np.sqrt(area / (np.pi * power)))


def lesions(seed: int, size: int = 128) -> np.ndarray:
    """One mask with one to three lesions, uint8 (size, size), rows first, 0 and 255."""
    rng, grid = np.random.default_rng(seed), _grid(size)
    count = int(rng.choice(len(COUNTS), p=COUNTS)) + 1
    mask = np.zeros((size, size), dtype=bool)
    placed: list[tuple[float, float, float]] = []
    while len(placed) < count:
        area = float(np.clip(rng.lognormal(-2.3, 0.65) / count, 0.012, 0.42))
        radius = np.sqrt(area / np.pi)
        # Where it lies whole or nearly so, which keeps the large ones central.
        x, y = rng.uniform(0.8 * radius, 1 - 0.8 * radius, 2)
        if all(np.hypot(x - px, y - py) > 1.5 * (radius + pr) for px, py, pr in placed):
            mask |= blob(rng, grid, x, y, area) < 1
            placed.append((x, y, radius))
    return np.where(mask, 255, 0).astype(np.uint8)


def heart(seed: int, size: int = 128) -> np.ndarray:
    """One apical view, uint8 (size, size), rows first: 1 ventricle, 2 myocardium around it, 3 atrium below."""
    rng, (x, y) = np.random.default_rng(seed), _grid(size)
    # Frame of the ventricle: v runs along its axis from apex (-1) to base (1), u across.
    cx, cy = rng.normal(0.5, 0.04, 2) - (0.0, 0.1)
    length, width, tilt = rng.normal(0.24, 0.025), rng.normal(0.115, 0.015), rng.normal(0, 0.15)
    dx, dy = x - cx, y - cy
    u, v = dx * np.cos(tilt) + dy * np.sin(tilt), dy * np.cos(tilt) - dx * np.sin(tilt)
    wall, above = rng.normal(0.045, 0.006), v < 0.75 * length
    label = np.zeros((size, size), dtype=np.uint8)
    label[(np.hypot(u / (width + wall), v / (length + wall)) < 1) & above] = 2
    label[(np.hypot(u / width, v / length) < 1) & above] = 1
    atrium = rng.normal(0.12, 0.012, 2)
    label[(np.hypot(u / atrium[0], (v - 0.75 * length - 0.8 * atrium[1]) / atrium[1]) < 1) & ~above] = 3
    return label


KINDS = {"lesions": lesions, "heart": heart}


def mask_cohort(
    directory: str | os.PathLike, num_cases: int, size: int = 128, seed: int = 0, kind: str = "lesions"
) -> str:
    """Make sure a folder holds generated masks ``masks/mask_0000.png``, drawing what is missing.

    Mask i depends on ``seed`` and i alone, so a small cohort is the beginning of a larger one.

    Args:
        directory: folder of the cohort, made if missing.
        num_cases: how many masks there must be at least.
        size: pixels on a side.
        seed: seed of the cohort, 0 or more.
        kind: ``"lesions"`` (0 and 255) or ``"heart"`` (labels 0 to 3).

    Returns:
        The folder, as a string.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    root = Path(directory)
    settings = {"kind": kind, "recipe": RECIPE, "seed": int(seed), "size": int(size)}
    made = stamped(root, settings)
    paths = [root / "masks" / f"mask_{i:04d}.png" for i in range(num_cases)]
    missing = [i for i, path in enumerate(paths) if i >= made or not path.exists()]
    if missing:
        logger.info(f"drawing {len(missing)} masks ({kind}) of {size} x {size} pixels in {root}")
    for i in missing:
        mask = KINDS[kind](int(np.random.SeedSequence([seed, i]).generate_state(1)[0]), size)
        with atomic_path(paths[i]) as temporary:
            Image.fromarray(mask).save(temporary, format="png")
    if num_cases > made:
        stamp(root, settings, num_cases)
    return str(directory)
