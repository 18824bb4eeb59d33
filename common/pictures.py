"""Pictures: slices of volumes as a radiologist looks at them, and masks, laid out in a montage or a GIF.

Volumes are RAS (X to the patient's right, Y to the front, Z up). Axial and coronal slices show the patient's right on
the left, sagittal slices the front on the left, as on a light box.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .io import atomic_path

LUNG_WINDOW = (-1350.0, 150.0)
ABDOMEN_WINDOW = (-160.0, 240.0)
COLOURS: tuple[tuple[int, int, int], ...]
COLOURS = ((66, 135, 245), (255, 80, 60), (60, 200, 120), (250, 190, 40), (190, 90, 220), (60, 210, 220))
COLOURS += ((245, 150, 190), (150, 110, 60), (170, 200, 60), (240, 240, 120), (255, 255, 255), (205, 205, 170))


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


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """A picture with lines of text above it, in the letters that the built-in font has."""
    lines = textwrap.wrap(text, width=max(20, picture.width // 6)) or [""]
    sheet = ImageOps.expand(picture, (0, 15 * len(lines) + 4, 0, 0))
    for i, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((5, 2 + 15 * i), line, fill=(255, 255, 255), font_size=12)
    return sheet


class VolumeSheet:
    """Shows a synthetic volume below the real one, and the layout: three planes of each.

    Args:
        real: the real volume (1, X, Y, Z) in [-1, 1].
        condition: the layout's channels (K, X, Y, Z), positive inside.
    """

    def __init__(self, real: Any, condition: Any) -> None:
        self.real = np.asarray(real)[0]
        inside = np.asarray(condition) > 0
        self.layout = (inside * np.arange(1, 1 + len(inside)).reshape(-1, 1, 1, 1)).max(axis=0)

    def __call__(self, synthetic: Any) -> Image.Image:
        """Picture of the first of a synthetic batch (B, 1, X, Y, Z)."""
        at = centre_of(self.layout)
        rows = [planes(volume, at, window=(-1.0, 1.0)) for volume in (self.real, np.asarray(synthetic)[0, 0])]
        rows.append(planes(self.real, at, window=(-1.0, 1.0), layout=self.layout))
        return montage(rows, ["real", "synthetic", "layout"])


def label_plane(
    layout: np.ndarray, axis: int, index: int, *, spacing: Sequence[float] = (1.0, 1.0, 1.0), height: int = 192
) -> Image.Image:
    """One slice of a label map in flat colours, oriented as `plane`; the last label, the body around all, is grey."""
    last = layout == max(1, layout.max())
    colours = np.array([(0, 0, 0), *(COLOURS[k % len(COLOURS)] for k in range(int(layout.max())))], dtype=np.uint8)
    shown = colours[layout.astype(int)]
    shown[last] = (70, 70, 70)
    parts = [plane(shown[..., c], axis, index, window=(0, 255), spacing=spacing, height=height) for c in range(3)]
    return Image.merge("RGB", [part.getchannel(0) for part in parts])


class LayoutSheet:
    """Shows synthetic label volumes below real ones: axial, coronal and sagittal slices through a label.

    Args:
        real: real label maps (B, 1, X, Y, Z).
        focus: the label to cut through; a case without it is cut in the middle.
    """

    def __init__(self, real: Any, focus: int) -> None:
        self.real = np.asarray(real)[:, 0]
        self.focus = focus

    def __call__(self, synthetic: Any) -> Image.Image:
        """Picture of label maps (B, 1, X, Y, Z) or probabilities (B, K, X, Y, Z)."""
        drawn = np.asarray(synthetic)
        drawn = drawn[:, 0] if drawn.shape[1] == 1 else drawn.argmax(axis=1)
        cells = []
        for real, ours in zip(self.real, drawn, strict=True):
            at = centre_of(real == self.focus)
            rows = [[label_plane(shown, axis, at[axis], height=128) for axis in (2, 1, 0)] for shown in (real, ours)]
            cells.append(montage(rows))
        return montage([cells[i : i + 2] for i in range(0, len(cells), 2)], ["real above synthetic"])


class SliceSheet:
    """Shows synthetic slices below the real ones.

    Args:
        real: real axial slices (B, 1, X, Y) in [-1, 1].
    """

    def __init__(self, real: Any) -> None:
        self.real = np.asarray(real)

    def __call__(self, synthetic: Any) -> Image.Image:
        """Picture of synthetic slices (B, 1, X, Y)."""
        pairs = zip(self.real[:, 0], np.asarray(synthetic)[:, 0], strict=True)
        cells = [montage([[plane(s[..., None], 2, 0, window=(-1.0, 1.0), height=160)] for s in pair]) for pair in pairs]
        return montage([cells], ["real above synthetic"])


class CropSheet:
    """Shows synthetic crops below the real ones, an axial slice through each, the mask's rim drawn over the real one.

    Args:
        real: real crops (B, 1, S, A, L) in [0, 1].
        mask: where to cut, and what to outline, (B, 1, S, A, L); None cuts in the middle.
    """

    def __init__(self, real: Any, mask: Any = None) -> None:
        self.real = np.asarray(real)[:, 0]
        self.mask = np.zeros_like(self.real) if mask is None else np.asarray(mask)[:, 0]

    def __call__(self, synthetic: Any) -> Image.Image:
        """Picture of synthetic crops (B, 1, S, A, L)."""
        cells = []
        for real, mask, drawn in zip(self.real, self.mask, np.asarray(synthetic)[:, 0], strict=True):
            at = int(mask.sum(axis=(1, 2)).argmax()) if mask.any() else len(real) // 2
            # Columns run to the patient's left, rows from front to back: R, A, S as `plane` wants it.
            shown = [volume.transpose(2, 1, 0)[::-1] for volume in (real, mask > 0.5, drawn)]
            rows = [
                [plane(shown[0], 2, at, window=(0, 1), layout=shown[1].astype(int), height=128)],
                [plane(shown[0], 2, at, window=(0, 1), height=128)],
                [plane(shown[2], 2, at, window=(0, 1), height=128)],
            ]
            cells.append(montage(rows))
        return montage([cells], ["mask, real, synthetic"])


class MaskSheet:
    """Shows synthetic masks, each below the real one whose statistics it was asked for.

    Args:
        real: real masks (B, K, H, W).
        threshold: value between background and foreground.
        columns: masks in a row.
    """

    def __init__(self, real: Any, threshold: float = 0.0, columns: int = 6) -> None:
        self.real = np.asarray(real)
        self.threshold = threshold
        self.columns = columns

    def __call__(self, synthetic: Any) -> Image.Image:
        """Picture of synthetic masks (B, K, H, W)."""
        pairs = [
            montage([[picture_of(mask > self.threshold)] for mask in pair])
            for pair in zip(self.real, np.asarray(synthetic), strict=True)
        ]
        rows = [pairs[i : i + self.columns] for i in range(0, len(pairs), self.columns)]
        return montage(rows, ["real above synthetic"])


class PairSheet:
    """Shows synthetic images, each between the mask it was made from and the real image of that mask.

    Args:
        real: real images (B, 3, H, W) in [-1, 1].
        masks: their masks (B, 1, H, W) in {0, 1}.
        columns: cases in a row.
        height: of each picture in pixels.
    """

    def __init__(self, real: Any, masks: Any, columns: int = 4, height: int = 128) -> None:
        self.real = np.asarray(real)
        self.masks = np.asarray(masks)
        self.columns = columns
        self.height = height

    def __call__(self, synthetic: Any) -> Image.Image:
        """Picture of synthetic images (B, 3, H, W) in [-1, 1]."""
        triples = [
            montage([[picture_of(mask, self.height), photo(image, self.height), photo(real, self.height)]])
            for mask, image, real in zip(self.masks, np.asarray(synthetic), self.real, strict=True)
        ]
        rows = [triples[i : i + self.columns] for i in range(0, len(triples), self.columns)]
        return montage(rows, ["mask, synthetic, real"])


def photo(image: np.ndarray, height: int = 128) -> Image.Image:
    """A colour image (3, H, W) in [-1, 1], rows first, as a picture."""
    pixels = np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
    size = (round(height * image.shape[2] / image.shape[1]), height)
    return ImageOps.expand(Image.fromarray(pixels.transpose(1, 2, 0)).resize(size, Image.Resampling.BICUBIC), 1)


def picture_of(mask: np.ndarray, height: int = 96) -> Image.Image:
    """A mask (K, H, W), rows first, as a picture: white, or a colour for each class; with a rim, to see its frame."""
    colours = ((255, 255, 255),) if len(mask) == 1 else COLOURS
    picture = np.zeros((*mask.shape[1:], 3), dtype=np.uint8)
    for k, inside in enumerate(mask):
        picture[inside > 0] = colours[k % len(colours)]
    size = (round(height * mask.shape[2] / mask.shape[1]), height)
    return ImageOps.expand(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), 1, (90, 90, 90))


def asked_for(
    mask: np.ndarray, asked: Sequence[Mapping[str, float]], caption: Sequence[str] = (), height: int = 144
) -> Image.Image:
    """A mask with what it was asked to hold drawn over it: a disc's rim of each asked area, a cross at its centre.

    Args:
        mask: (K, H, W), rows first.
        asked: lesions as a side-car tells them: size, x and y as fractions of the image.
        caption: lines to stand below.
        height: of the mask's picture in pixels.
    """
    picture, line, rim = picture_of(mask, height), 15, 1
    draw, width = ImageDraw.Draw(picture), picture.width - 2 * rim
    for lesion in asked:
        x, y = rim + lesion["x"] * width, rim + lesion["y"] * height
        radius = float(np.sqrt(lesion["size"] * width * height / np.pi))
        colour = COLOURS[1] if len(mask) == 1 else (255, 255, 255)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)
        draw.line((x - 4, y, x + 4, y), fill=colour, width=2)
        draw.line((x, y - 4, x, y + 4), fill=colour, width=2)
    sheet = ImageOps.expand(picture, (0, 0, 0, line * len(caption) + 2))
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(caption):
        draw.text((4, picture.height + line * i), text, fill=(255, 255, 255), font_size=11)
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
