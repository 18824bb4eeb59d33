"""Pictures: slices of volumes as a radiologist looks at them, laid out in a montage or a GIF.

Volumes are RAS (X to the patient's right, Y to the front, Z up). Axial and coronal slices show the patient's right on
the left, sagittal slices the front on the left, as on a light box.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .io import atomic_path

LUNG_WINDOW = (-1350.0, 150.0)
COLOURS = ((66, 135, 245), (255, 80, 60), (60, 200, 120), (250, 190, 40), (190, 90, 220), (60, 210, 220))


def plane(
    volume: np.ndarray,
    axis: int,
    index: int,
    *,
    window: tuple[float, float] = LUNG_WINDOW,
    layout: np.ndarray | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    height: int = 192,
) -> Image.Image:
    """One slice as a picture, true to the voxel spacing, the layout's labels tinted.

    Args:
        volume: RAS array (X, Y, Z).
        axis: the axis that is cut: 0 sagittal, 1 coronal, 2 axial.
        index: where it is cut.
        window: values shown black and white.
        layout: label map (X, Y, Z) to lay over it.
        spacing: voxel size in mm.
        height: of the picture in pixels, for the longest axis of the volume.
    """
    gray = (np.take(volume, index, axis).astype(np.float32) - window[0]) / (window[1] - window[0])
    colour = np.repeat(np.clip(gray, 0, 1)[..., None] * 255, 3, axis=-1)
    if layout is not None:
        labels = np.take(layout, index, axis)
        for label in range(1, int(layout.max()) + 1):
            tint = np.array(COLOURS[(label - 1) % len(COLOURS)])
            colour[labels == label] = 0.65 * colour[labels == label] + 0.35 * tint
    # First axis to columns, running right to left (front to back); second to rows, running upwards.
    picture = Image.fromarray(colour.astype(np.uint8)[::-1].transpose(1, 0, 2)[::-1])
    scale = height / max(n * s for n, s in zip(volume.shape, spacing, strict=True))
    columns, rows = (max(1, round(volume.shape[a] * spacing[a] * scale)) for a in range(3) if a != axis)
    return picture.resize((columns, rows), Image.Resampling.BICUBIC)


def planes(volume: np.ndarray, at: Sequence[int], **options: Any) -> list[Image.Image]:
    """Axial, coronal and sagittal slice through a voxel; options are those of `plane`."""
    return [plane(volume, axis, at[axis], **options) for axis in (2, 1, 0)]


def centre_of(layout: np.ndarray) -> tuple[int, int, int]:
    """The voxel to cut at: inside the largest patch of the highest label, i.e. of what the layout is about."""
    voxels = np.argwhere(layout == layout.max()) if layout.any() else np.array([layout.shape]) // 2
    middle = np.median(voxels, axis=0)
    x, y, z = voxels[np.abs(voxels - middle).sum(axis=1).argmin()]
    return int(x), int(y), int(z)


def montage(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str] = ()) -> Image.Image:
    """Pictures in rows, each row with a caption in its corner."""
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (max(sum(p.width for p in row) for row in rows), sum(heights)))
    draw = ImageDraw.Draw(sheet)
    top = 0
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width
        if i < len(captions):
            draw.text((5, top + 3), captions[i], fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
        top += height
    return sheet


def save_gif(frames: Sequence[Image.Image], path: str | Path, seconds: float = 6.0) -> None:
    """Write an endless GIF that takes so many seconds for a round."""
    with atomic_path(path) as temporary:
        duration = max(20, round(1000 * seconds / len(frames)))
        frames[0].save(temporary, format="gif", save_all=True, append_images=frames[1:], duration=duration, loop=0)


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png")
