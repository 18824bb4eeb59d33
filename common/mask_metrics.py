"""Annotation masks in numbers: lesions against what was asked, statistics and shapes of two sets, the nearest mask.

`mask_evaluation` makes a report of them. The publication of Controllable Mask Diffusion gives no numbers: the choice is
ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp, rankdata

from .semantics import Lesion

Lesions = Sequence[Lesion]
"""The lesions of one mask."""

STATISTICS = ("size", "x", "y")
SHAPE = ("area", "perimeter2_over_area", "solidity", "eccentricity", "holes")
SIZE_TOLERANCE, CENTRE_TOLERANCE = 0.25, 0.05  # what synthesis accepts by default
SPLITS = 10
TINY = 1e-9  # what rounding leaves of a spread of zero


def match(asked: Lesions, achieved: Lesions) -> list[Lesion | None]:
    """The achieved lesion that answers each asked one, or None: the assignment nearest in centre and diameter."""
    found: list[Lesion | None] = [None] * len(asked)
    for label in {lesion.label for lesion in asked}:
        rows = [i for i, lesion in enumerate(asked) if lesion.label == label]
        candidates = [lesion for lesion in achieved if lesion.label == label]
        if candidates:
            # All three in units of the image's side.
            a, b = (
                np.array([(math.sqrt(n.size), n.x, n.y) for n in z]) for z in ([asked[i] for i in rows], candidates)
            )
            cost = cdist(a[:, 1:], b[:, 1:]) + np.abs(a[:, :1] - b[:, 0])
            for i, j in zip(*linear_sum_assignment(cost), strict=True):
                found[rows[i]] = candidates[j]
    return found


def errors(asked: Lesion, achieved: Lesion) -> tuple[float, float]:
    """Relative size error, and distance of the centres as a fraction of the image's side."""
    return abs(achieved.size - asked.size) / asked.size, math.hypot(achieved.x - asked.x, achieved.y - asked.y)


def control(asked: Sequence[Lesions], achieved: Sequence[Lesions]) -> dict[str, float]:
    """How well masks hold the lesions that they were asked to hold.

    Args:
        asked: lesions asked for, per mask.
        achieved: lesions measured, of the same masks.

    Returns:
        flat numbers, NaN where not defined: missing_share, within_tolerance (of all asked lesions), count_accuracy
        (share of masks with as many lesions of each label as asked), mean, median and 90 % point of the errors, R^2
        about the identity line, which is negative where the mean of the asked values would be a better guess.
    """
    if len(asked) != len(achieved):
        raise ValueError(f"asked is of {len(asked)} masks, achieved of {len(achieved)}: give one list for each mask")
    pairs = [pair for a, b in zip(asked, achieved) for pair in zip(a, match(a, b))]
    matched = [(a, b) for a, b in pairs if b is not None]
    size, centre = np.array([errors(a, b) for a, b in matched]).reshape(-1, 2).T
    within = (size <= SIZE_TOLERANCE) & (centre <= CENTRE_TOLERANCE)
    same = [Counter(n.label for n in a) == Counter(n.label for n in b) for a, b in zip(asked, achieved)]
    result = {
        "masks": float(len(asked)),
        "lesions": float(len(pairs)),
        "missing_share": 1 - len(matched) / len(pairs) if pairs else math.nan,
        "within_tolerance": float(within.sum()) / len(pairs) if pairs else math.nan,
        "count_accuracy": float(np.mean(same or math.nan)),
    }
    for name, values in (("size_error", size), ("centre_distance", centre)):
        numbers = (values.mean(), *np.percentile(values, (50, 90))) if len(values) else [math.nan] * 3
        result |= {f"{name}_{key}": float(n) for key, n in zip(("mean", "median", "p90"), numbers)}
    x, y = (_rows([z]) for z in (zip(*matched, strict=True) if matched else ([], [])))
    residual, total = np.square(y - x).sum(0), np.square(x - (x.mean(0) if len(x) else 0)).sum(0)
    return result | {
        f"r2_{key}": float(1 - r / t) if t > TINY else math.nan for key, r, t in zip(STATISTICS, residual, total)
    }


def _rows(lesions: Sequence[Lesions]) -> np.ndarray:
    """Lesions of all masks as rows (N, 3) of size, x, y."""
    return np.array([astuple(lesion)[:3] for mask in lesions for lesion in mask], float).reshape(-1, 3)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of rows (N, D), (M, D); zero for equal sets. Szekely & Rizzo 2013."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([cdist(row[None], b).mean() for row in a])) if len(a) else math.nan

    return max(0.0, 2 * mean(x, y) - mean(x, x) - mean(y, y))


def _compare(real: np.ndarray, other: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Kolmogorov-Smirnov distance of each column, energy distance of the rows, standardised together."""
    if min(len(real), len(other)) < 2:
        return {**{f"ks_{name}": math.nan for name in names}, "energy": math.nan}
    distances = {f"ks_{n}": float(ks_2samp(a, b, method="asymp").statistic) for n, a, b in zip(names, real.T, other.T)}
    spread = np.concatenate([real, other]).std(0)  # real masks alone may have none, as of holes
    spread = np.where(spread > TINY, spread, 1)
    return {**distances, "energy": energy_distance(real / spread, other / spread)}


def _correlations(rows: np.ndarray) -> np.ndarray:
    """Spearman correlations (4, 4) of size, x, y and the distance to the image's centre; NaN if one is constant."""
    if len(rows) < 3:
        return np.full((4, 4), math.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(rankdata(np.c_[rows, np.hypot(*(rows[:, 1:] - 0.5).T)], axis=0).T)


def compare_statistics(real: Sequence[Lesions], other: Sequence[Lesions]) -> dict[str, float]:
    """Distances between the lesion statistics of two sets of masks: marginals, spread, tail, correlations, counts.

    Returns:
        flat numbers; the two ratios are `other` over `real`, centrality is the correlation of size and distance to the
        image's centre; count is the total variation of the number of lesions per mask.
    """
    a, b = _rows(real), _rows(other)
    difference = np.abs(_correlations(a) - _correlations(b))
    enough = min(len(a), len(b)) >= 2 and a[:, 0].std() > TINY
    most = 1 + max((len(mask) for mask in (*real, *other)), default=0)
    shares = [
        np.bincount([len(m) for m in masks] or [0], minlength=most) / (len(masks) or math.nan)
        for masks in (real, other)
    ]
    return {
        **_compare(a, b, STATISTICS),
        "size_sd_ratio": float(b[:, 0].std() / a[:, 0].std()) if enough else math.nan,
        "size_q95_ratio": float(np.quantile(b[:, 0], 0.95) / np.quantile(a[:, 0], 0.95)) if enough else math.nan,
        "spearman_difference": float(difference[:3, :3].max()),
        "centrality_difference": float(difference[0, 3]),
        "count_total_variation": float(np.abs(shares[0] - shares[1]).sum() / 2),
    }


def compare_shapes(real: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, float]:
    """Distances between the shapes, rows (components, 5) for each mask, of two sets of masks."""
    empty = np.empty((0, len(SHAPE)))
    return _compare(np.concatenate([empty, *real]), np.concatenate([empty, *other]), SHAPE)


def halves(real: Sequence[Any], compare: Callable[..., dict[str, float]], seed: int = 0) -> dict[str, float]:
    """The same numbers between random halves of the real masks, mean over splits: the floor of what can be reached."""
    generator, tables = np.random.default_rng(seed), []
    for _ in range(SPLITS):
        order, half = generator.permutation(len(real)), len(real) // 2
        tables.append(compare([real[i] for i in order[:half]], [real[i] for i in order[half:]]))
    # Upwards and downwards must not cancel.
    tables = [{k: max(v, 1 / v) if k.endswith("ratio") and v > 0 else v for k, v in t.items()} for t in tables]
    return {key: float(np.mean([t[key] for t in tables])) for key in tables[0]}


def perimeter(component: np.ndarray) -> float:
    """Length of the edges of a region (H, W) of bools, holes' included, by Crofton's formula in four directions."""
    m = np.pad(component, 1)
    straight = (m[1:] != m[:-1]).sum() + (m[:, 1:] != m[:, :-1]).sum()
    diagonal = (m[1:, 1:] != m[:-1, :-1]).sum() + (m[1:, :-1] != m[:-1, 1:]).sum()
    return float(math.pi / 8 * (straight + diagonal / math.sqrt(2)))  # diagonal lines lie closer by the root of 2


def shape(component: np.ndarray) -> np.ndarray:
    """Shape of a region (H, W) of bools, see `SHAPE`: area in pixels, compactness (disc: 4 pi), solidity, ... (5,)."""
    rows, columns = np.nonzero(component)
    area = len(rows)
    corners = np.concatenate([np.c_[rows + i, columns + j] for i in (0, 1) for j in (0, 1)])
    minor, major = np.linalg.eigvalsh(np.cov(rows, columns, bias=True) + np.eye(2) / 12)  # a pixel's own extent
    holes = ndimage.label(~np.pad(component, 1))[1] - 1  # background is 4-connected where the region is 8-connected
    solidity = area / ConvexHull(np.unique(corners, axis=0)).volume  # in 2-D, scipy's volume is the area
    return np.array([area, perimeter(component) ** 2 / area, solidity, math.sqrt(max(0, 1 - minor / major)), holes])


class NearestMask(NamedTuple):
    """Per mask: Dice with the most similar of the others, and its number."""

    dice: torch.Tensor
    mask: torch.Tensor


def nearest_mask(masks: torch.Tensor, others: torch.Tensor | None = None, *, chunk: int = 256) -> NearestMask:
    """Most similar mask of `others` (M, P) for each of `masks` (N, P), bools; by default of the masks themselves.

    Classes count when they lie side by side in P. An empty mask resembles nothing: Dice 0.
    """
    against = masks if others is None else others
    if against.shape[1:] != masks.shape[1:] or len(against) < (2 if others is None else 1):
        raise ValueError(f"needs other masks of the same size, got {tuple(masks.shape)} and {tuple(against.shape)}")
    parts = []
    for x in masks.split(chunk):
        x = x.float()
        overlap = torch.cat([x @ y.float().T for y in against.split(chunk)], dim=1)
        parts.append(2 * overlap / (x.sum(1)[:, None] + against.sum(1)).clamp(min=1))
    dice = torch.cat(parts)
    return NearestMask(*(dice.fill_diagonal_(-1) if others is None else dice).max(1))
