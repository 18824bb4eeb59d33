"""Semantic information of masks: how large, where and how many; measured, and put as a network reads it.

Heo & Jung 2025, doi 10.1016/j.compbiomed.2025.110807. Sizes and places are fractions of the image; x is the column, y
the row. A part of a mask is one component of each class: what the network draws at once. `mask_statistics` models them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from scipy import ndimage
from tqdm import tqdm

from .io import Case, CaseError, unwrap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lesion:
    """One component: its area and the mean of its pixels' columns and rows, as fractions of the image.

    Example:
        >>> Lesion(size=0.1, x=0.5, y=0.25)
        Lesion(size=0.1, x=0.5, y=0.25, label=1)
    """

    size: float
    x: float
    y: float
    label: int = 1

    def __post_init__(self) -> None:
        for name, divisor in (("size", "width * height"), ("x", "the width"), ("y", "the height")):
            value = getattr(self, name)
            if not (0 <= value <= 1 and (value or name != "size")):
                hint = f": sizes and places are fractions of the image, divide pixels by {divisor}"
                allowed = "(0, 1]" if name == "size" else "[0, 1]"
                raise ValueError(f"{name} {value:g} is not in {allowed}{hint if value > 1 else ''}")


def components(mask: np.ndarray, min_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of a binary mask; corner contact joins, holes stay.

    Args:
        mask: (H, W).
        min_size: smallest area in pixels that counts.

    Returns:
        label map (H, W), 0 and 1 to N; and a row (size, x, y) in pixels for each of the N, in reading order.
    """
    found, n = ndimage.label(mask, structure=np.ones((3, 3)))
    index = np.arange(1, n + 1)
    sizes = np.asarray(ndimage.sum_labels(mask, found, index), dtype=np.float64)
    yx = np.asarray(ndimage.center_of_mass(mask, found, index), dtype=np.float64).reshape(n, 2)
    kept = sizes >= min_size
    number = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)])
    return number[found], np.column_stack([sizes, yx[:, ::-1]])[kept]


def _ranked(masks: np.ndarray, labels: Sequence[int], min_size: int) -> Iterator[tuple[np.ndarray, list[Lesion]]]:
    """Of each class: its components numbered from 1 by size, largest first, and their measures in that order."""
    if len(masks) != len(labels):
        raise ValueError(f"mask has {len(masks)} channels, labels name {len(labels)}: one channel for each label")
    for label, mask in zip(labels, masks):
        found, rows = components(mask > 0.5, min_size)
        order = np.argsort(-rows[:, 0], kind="stable")
        rank = np.zeros(len(rows) + 1, dtype=int)
        rank[order + 1] = np.arange(1, len(rows) + 1)
        height, width = mask.shape
        fractions = (rows[order] / [height * width, width, height]).tolist()
        yield rank[found], [Lesion(size, x, y, int(label)) for size, x, y in fractions]


def measure(masks: np.ndarray, labels: Sequence[int], min_size: int = 1) -> list[Lesion]:
    """Lesions of one image, by label, largest first; masks (K, H, W) in {0, 1}, ``min_size`` in pixels."""
    return [lesion for _, lesions in _ranked(np.asarray(masks), labels, min_size) for lesion in lesions]


def table_of(lesions: Sequence[Lesion], labels: Sequence[int]) -> np.ndarray:
    """Lesions of one image as parts (P, K, 3): the j-th largest of every label in row j, NaN where there is none."""
    unknown = {lesion.label for lesion in lesions} - set(labels)
    if unknown:
        raise CaseError(f"label {', '.join(map(str, sorted(unknown)))} is unknown, expected one of {list(labels)}")
    columns = [sorted((a for a in lesions if a.label == k), key=lambda a: -a.size) for k in labels]
    table = np.full((max(map(len, columns)), len(labels), 3), np.nan)
    for k, column in enumerate(columns):
        for j, lesion in enumerate(column):
            table[j, k] = lesion.size, lesion.x, lesion.y
    return table


def lesions_in(table: np.ndarray, labels: Sequence[int]) -> list[Lesion]:
    """Inverse of `table_of`."""
    columns = ((int(label), rows[~np.isnan(rows[:, 0])]) for label, rows in zip(labels, table.swapaxes(0, 1)))
    ordered = ((label, row) for label, rows in columns for row in rows[np.argsort(-rows[:, 0])].tolist())
    return [Lesion(size, x, y, label) for label, (size, x, y) in ordered]


def conditions(lesions: Sequence[Lesion], labels: Sequence[int], null: float = 0.0) -> np.ndarray:
    """What the network reads: a row (K sizes, K pairs x, y) for each part (P, 3K), ``null`` for an absent class."""
    table = table_of(lesions, labels)
    rows = np.concatenate([table[..., 0], table[..., 1:].reshape(-1, 2 * len(labels))], axis=1)
    return np.where(np.isnan(rows), null, rows).astype(np.float32)


def lesions_of(condition: np.ndarray, labels: Sequence[int], null: float = 0.0) -> list[Lesion]:
    """The lesions that one row (3K,) of `conditions` asks for; absent classes are left out, NaN is padding."""
    row = np.asarray(condition, dtype=np.float64)
    table = np.column_stack([row[: len(labels)], row[len(labels) :].reshape(-1, 2)])
    table[(table == null).all(axis=1)] = np.nan
    return lesions_in(table[None], labels)


class SelectPartd(MapTransform):
    """One part of a mask and its own condition: both come from the same components, so they always pair up.

    The published code pairs masks and conditions by position in two lists of different lengths; after the first mask
    with more or fewer than one component all its conditions belong to other masks.

    Args:
        key: masks (K, H, W) in {0, 1}; of each class only the component of that rank by size stays.
        part: key of the rank, 0 for the largest.
        output: key of the condition (3K,).
        labels: the K label values.
        min_size: smallest component in pixels.
        null: condition of an absent class.
    """

    def __init__(
        self,
        key: str = "mask",
        part: str = "part",
        output: str = "condition",
        labels: Sequence[int] = (1,),
        min_size: int = 1,
        null: float = 0.0,
    ) -> None:
        super().__init__(key)
        self.key, self.part, self.output = key, part, output
        self.labels = list(labels)
        self.min_size = min_size
        self.null = null

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        """Select and measure."""
        data = dict(data)
        mask, j = data[self.key], int(data[self.part])
        ranked = list(_ranked(np.asarray(mask), self.labels, self.min_size))
        lesions = [of_class[j] for _, of_class in ranked if j < len(of_class)]
        if not lesions:
            raise CaseError(f"{data.get('name', self.key)} has no part {j} of {self.min_size} pixels: measure it again")
        kept = np.stack([rank == j + 1 for rank, _ in ranked])
        data[self.key] = mask * torch.as_tensor(kept)
        data[self.output] = torch.as_tensor(conditions(lesions, self.labels, self.null)[0])
        return data


class AskLesionsd(MapTransform):
    """Asked lesions of one mask -> conditions (parts, 3K); rows beyond the mask's own are NaN, so that cases batch.

    Args:
        key: lesions, each a `Lesion` or a dict of its fields.
        output: key of the conditions.
        labels: the K label values.
        null: condition of a class that a part lacks.
        parts: rows.
    """

    def __init__(
        self,
        key: str = "lesions",
        output: str = "condition",
        labels: Sequence[int] = (1,),
        null: float = 0.0,
        parts: int = 8,
    ) -> None:
        super().__init__(key)
        self.key, self.output = key, output
        self.labels = list(labels)
        self.null = null
        self.parts = parts

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        """Lesions to rows."""
        data = dict(data)
        try:
            lesions = [a if isinstance(a, Lesion) else Lesion(**a) for a in data[self.key]]
        except (TypeError, ValueError) as error:
            raise CaseError(f"{data.get('name', self.key)}: {error}") from error
        rows = conditions(lesions, self.labels, self.null)
        if len(rows) > self.parts:
            raise CaseError(f"{len(rows)} lesions of a kind are asked for, {self.parts} are possible: raise --parts")
        padding = ((0, self.parts - len(rows)), (0, 0))
        data[self.output] = torch.as_tensor(np.pad(rows, padding, constant_values=np.nan))
        return data


def measure_cases(
    cases: Sequence[Case], load: Callable[[Case], Any], labels: Sequence[int], min_size: int, key: str = "mask"
) -> list[list[Lesion]]:
    """Measure the masks of all cases; an empty mask gives no lesion, the bad ones one error that names them all.

    Args:
        cases: from `list_cases`.
        load: makes of a case a dict whose ``key`` is (K, H, W) in {0, 1}.
        labels: the K label values.
        min_size: smallest component in pixels.
        key: of the masks.
    """
    found, bad = [], []
    for case in tqdm(cases, "measuring", disable=None, leave=False):
        try:
            found.append(measure(load(case)[key], labels, min_size))
        except (CaseError, RuntimeError) as error:  # a RuntimeError is what MONAI makes of an error in a transform
            cause = unwrap(error)
            if not isinstance(cause, CaseError):
                raise
            bad.append(str(cause))
    if bad:
        more = f"\n... and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise CaseError("\n".join(bad[:20]) + more)
    counts = Counter(map(len, found))
    if not any(found):
        files = ", ".join(str(case.get(key)) for case in cases[:3]) or "no file"
        raise CaseError(
            f"none of {len(cases)} masks ({files}) holds a component of labels {list(labels)} and {min_size} pixels or "
            "more: check --dataset_dir and --labels, or lower --min_size"
        )
    spread = ", ".join(f"{n} of {count}" for count, n in sorted(counts.items()))
    logger.info(f"{len(cases)} masks, {sum(map(len, found))} lesions; masks by count: {spread}; {counts[0]} empty")
    return found


def list_parts(cases: Sequence[Case], lesions: Sequence[Sequence[Lesion]], labels: Sequence[int]) -> list[Case]:
    """One training case for each part of each mask, for `SelectPartd`; empty masks give none."""
    return [
        {**case, "part": j, "name": f"{case['name']}_part{j}"}
        for case, of_case in zip(cases, lesions, strict=True)
        for j in range(len(table_of(of_case, labels)))
    ]
