"""Dictionary transforms MONAI lacks: checked layouts, conditions from layouts, moved nodules and masks, pasted patches.

All follow MONAI's conventions (keys, channel-first ``MetaTensor``); what is random at inference draws from the case's
own ``seed``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, LoadImage, MapTransform, Randomizable, Transform
from monai.utils import TraceKeys
from scipy import ndimage

from .io import CaseError

Data = Mapping[Hashable, Any]


def _file(data: Data, key: Hashable) -> str:
    meta = getattr(data.get(key), "meta", {})
    return str(meta.get("filename_or_obj", key))


def _like(values: torch.Tensor, image: MetaTensor) -> MetaTensor:
    """New voxels in an image's place: its affine, its file, its history."""
    return MetaTensor(values, meta=dict(image.meta), applied_operations=list(image.applied_operations))


def _spacing(image: torch.Tensor) -> np.ndarray:
    """Voxel size in mm (3,), or ones without an affine."""
    affine = getattr(image, "affine", None)
    return np.ones(image.ndim - 1) if affine is None else np.linalg.norm(np.asarray(affine)[:-1, :-1], axis=0)


class LoadCased(MapTransform):
    """MONAI's ``LoadImaged`` for cases, whose keys may be missing; a file that cannot be read is named.

    Args:
        keys: file paths that become channel-first images.
        kwargs: further arguments of ``LoadImage``.
    """

    def __init__(self, keys: KeysCollection, **kwargs: Any) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.load = LoadImage(image_only=True, ensure_channel_first=True, **kwargs)

    def __call__(self, data: Data) -> dict:
        """Load what is there."""
        data = dict(data)
        for key in self.key_iterator(data):
            try:
                image = self.load(data[key])
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise CaseError(
                    f"cannot read {data[key]} ({type(error).__name__}: {reason}): "
                    "the file is damaged or of another kind, replace it"
                ) from error
            data[key] = image
        return data


class CheckCased(MapTransform):
    """Refuses volumes that cannot be used, naming the file and the way out.

    Args:
        keys: loaded images (C, *S); the first present one defines the grid.
        spatial_dims: expected number of spatial axes.
        limits: lowest and highest value, by default what an int16 file holds.
    """

    def __init__(
        self, keys: KeysCollection, spatial_dims: int = 3, limits: Sequence[float] = (-(2**15), 2**15 - 1)
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.spatial_dims = spatial_dims
        self.low, self.high = limits

    def __call__(self, data: Data) -> dict:
        """Check, and hand on unchanged."""
        data = dict(data)
        present = list(self.key_iterator(data))
        for key in present:
            self.check_volume(data[key], _file(data, key))
        for key in present[1:]:
            self.check_grid(data, key, present[0])
        return data

    def check_volume(self, image: MetaTensor, name: str) -> None:
        """One volume by itself: shape, place in the world, voxels."""
        shape = tuple(image.shape[1:] if image.shape[0] == 1 else image.shape)
        if len(shape) != self.spatial_dims:
            raise CaseError(f"{name} has shape {shape}, expected one {self.spatial_dims}-D volume: split or select it")
        if min(shape) < 2:
            raise CaseError(f"{name} has shape {shape}, expected at least 2 voxels on every axis")
        if not 0 < abs(np.linalg.det(image.affine)) < np.inf:
            raise CaseError(f"{name} has an affine that cannot be inverted: write it anew with the scan's voxel size")
        values = torch.as_tensor(image)
        bad = int((~((values >= self.low) & (values <= self.high))).sum())
        if bad:
            raise CaseError(
                f"{name} holds {bad} voxels that are NaN, infinite or outside [{self.low:g}, {self.high:g}]: "
                "replace them, in a CT by air (-1000 HU)"
            )

    def check_grid(self, data: Data, key: Hashable, first: Hashable) -> None:
        """Two volumes on one grid."""
        image, other = data[key], data[first]
        names = f"{_file(data, key)} and {_file(data, first)}"
        if image.shape != other.shape:
            shapes = f"{tuple(image.shape[1:])} and {tuple(other.shape[1:])}"
            raise CaseError(f"{names} have different shapes, {shapes}: resample one onto the other's grid")
        if not np.allclose(image.affine, other.affine, atol=1e-2):
            raise CaseError(f"{names} have different affines: resample one onto the other's grid")


class ToMaskd(MapTransform):
    """Loaded annotation masks as one channel per class, {0, 1}, at the network's size, rows first.

    Here, in `ToPictured` and on their ways back axes are swapped, and nowhere else: MONAI loads columns first.

    Bilinear without anti-aliasing and a threshold at one half, as CMDM does it, bit for bit: other resampling moves a
    rim by up to a hundred pixels.

    Args:
        keys: masks (C, W, H), C = 1, or 3 and 4 (colour: its green channel counts); a slice (C, W, H, 1) will do.
        image_size: size (H, W) of the result.
        labels: values of the classes, K of them; None for a binary mask, foreground above one half (127 of 255).
    """

    mode = "bilinear"

    def __init__(self, keys: KeysCollection, image_size: Sequence[int], labels: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        self.image_size = tuple(image_size)
        self.labels = None if labels is None else list(labels)

    def grey(self, mask: torch.Tensor) -> torch.Tensor:
        """The one channel of a mask (C, W, H) that counts."""
        return mask[1 if len(mask) >= 3 else 0]

    def __call__(self, data: Data) -> dict:
        """Replace each mask by its classes (K, H, W), float32."""
        data = dict(data)
        for key in self.key_iterator(data):
            data[key] = _like(self.classes(data[key], _file(data, key)), MetaTensor(data[key]))
        return data

    def classes(self, mask: torch.Tensor, name: str) -> torch.Tensor:
        """One mask (C, W, H) -> (K, *image_size) in {0, 1}."""
        mask = mask[..., 0] if mask.ndim == 4 and mask.shape[-1] == 1 else mask
        if mask.ndim != 3 or min(mask.shape[1:]) < 2:
            raise CaseError(f"{name} has shape {tuple(mask.shape)}, expected one 2-D mask: take a slice of it")
        values = torch.as_tensor(self.grey(mask)).float().T
        if self.labels is None:
            highest = float(values.max())
            if 1 < highest < 128:
                found = [int(v) for v in values.unique() if v][:5]
                raise CaseError(f"{name} holds {found}: masks are 0 and 255, else name the labels: --labels {found}")
            # A mask of bits counts as it is; one of 16 bits is cut at one half, too.
            one_hot = values[None] * (255 / (1 if highest == 1 else max(255.0, highest)))
        else:
            foreign = sorted(set(values.unique().tolist()) - {0.0, *map(float, self.labels)})
            if foreign:
                held = ", ".join(f"{v:g}" for v in foreign[:5])
                raise CaseError(f"{name} holds {held}, not in --labels {self.labels}: correct the mask or name them")
            one_hot = torch.stack([255 * (values == label).float() for label in self.labels])
        resized = torch.nn.functional.interpolate(one_hot[None], self.image_size, mode=self.mode)[0]
        return (resized >= 127.5).float()


class ToHintd(ToMaskd):
    """`ToMaskd` as Siamese-Diffusion does it, bit for bit: luma of a coloured mask, nearest neighbour.

    Args:
        keys: as in `ToMaskd`.
        image_size: as in `ToMaskd`.
        labels: as in `ToMaskd`.
    """

    mode = "nearest"

    def grey(self, mask: torch.Tensor) -> torch.Tensor:
        """The ITU-R 601 luma, by its usual integer weights."""
        if len(mask) < 3:
            return mask[0]
        red, green, blue = mask[:3].float()
        return (19595 * red + 38470 * green + 7471 * blue) / 65536


class FromMaskd(MapTransform):
    """The way back from `ToMaskd`: classes (K, H, W) -> a mask (1, W, H) of label values, or of 0 and 255.

    Where classes overlap the later one wins, as if painted in their order.

    Args:
        keys: masks (K, H, W) in {0, 1}.
        labels: as in `ToMaskd`.
    """

    def __init__(self, keys: KeysCollection, labels: Sequence[int] | None = None) -> None:
        super().__init__(keys)
        self.values = [255] if labels is None else list(labels)

    def __call__(self, data: Data) -> dict:
        """Replace the classes by label values."""
        data = dict(data)
        for key in self.key_iterator(data):
            mask = torch.zeros_like(data[key][:1])
            for value, inside in zip(self.values, data[key], strict=True):
                mask[0][inside > 0] = value
            data[key] = mask.transpose(1, 2)
        return data


class ToPictured(MapTransform):
    """Loaded colour pictures as images in [-1, 1] at the network's size, rows first.

    Bilinear without anti-aliasing, as Siamese-Diffusion does it, whatever the picture's proportions.

    Args:
        keys: pictures (C, W, H) of 0 to 255, C = 3 (RGB) or 1 (grey).
        image_size: size (H, W) of the result.
    """

    def __init__(self, keys: KeysCollection, image_size: Sequence[int]) -> None:
        super().__init__(keys)
        self.image_size = tuple(image_size)

    def __call__(self, data: Data) -> dict:
        """Replace each picture by an image (3, H, W)."""
        data = dict(data)
        for key in self.key_iterator(data):
            picture = MetaTensor(data[key])
            if picture.ndim != 3 or len(picture) not in (1, 3) or min(picture.shape[1:]) < 2:
                raise CaseError(f"{_file(data, key)} has shape {tuple(picture.shape)}, expected a colour picture")
            values = torch.as_tensor(picture).float().mT / 127.5 - 1
            resized = torch.nn.functional.interpolate(values[None], self.image_size, mode="bilinear")[0]
            data[key] = _like(resized.expand(3, -1, -1), picture)
        return data


class FromPictured(MapTransform):
    """The way back from `ToPictured`: images (3, H, W) in [-1, 1] -> (3, W, H) in 0 to 255, clipped and rounded.

    Args:
        keys: images.
    """

    def __call__(self, data: Data) -> dict:
        """Replace the images by pictures."""
        data = dict(data)
        for key in self.key_iterator(data):
            data[key] = ((data[key].clamp(-1, 1) + 1) * 127.5).round().mT
        return data


class MapLayoutd(Transform):
    """Brings any user's label numbers to the bundle's: 0 background, 1 .. K in the order of ``classes``.

    Args:
        key: the label map (1, *S).
        labels: class name -> numbers in the user's file, e.g. ``{"lung": [10, 11, 12, 13, 14], "nodule": [200]}``.
        masks: class name -> key of a separate mask file (non-zero is inside), painted over the label map when present.
        other: what to do with numbers in no class: ``"error"`` or ``"background"``.
        classes: the bundle's class names in its order; None takes the order of ``labels``.
    """

    def __init__(
        self,
        key: str,
        labels: Mapping[str, int | Sequence[int]],
        masks: Mapping[str, str] | None = None,
        other: str = "error",
        classes: Sequence[str] | None = None,
    ) -> None:
        if other not in ("error", "background"):
            raise ValueError(f"other_labels must be 'error' or 'background', got {other!r}")
        classes = list(labels) if classes is None else list(classes)
        if set(labels) != set(classes):
            raise ValueError(f"labels name {', '.join(labels)}, expected exactly {', '.join(classes)}")
        self.key = key
        self.labels = {name: np.atleast_1d(labels[name]).tolist() for name in classes}
        self.masks = dict(masks or {})
        self.other = other

    def __call__(self, data: Data) -> dict:
        """Map, merge, and check that something is left."""
        data = dict(data)
        source, name = data[self.key], _file(data, self.key)
        values = torch.as_tensor(source)
        if not torch.equal(values, values.round()):
            raise CaseError(
                f"{name} holds fractional values: a layout has whole-numbered labels; resample it with nearest"
            )
        known = {0, *(n for numbers in self.labels.values() for n in numbers)}
        unknown = sorted({int(v) for v in torch.unique(values)} - known)
        if unknown and self.other == "error":
            raise CaseError(
                f"{name} holds labels {unknown} that belong to no class: name them in --labels ({self.labels}), "
                "or drop them with --other_labels background"
            )
        layout = torch.zeros_like(values)
        for index, (label, numbers) in enumerate(self.labels.items(), start=1):
            layout[torch.isin(values, torch.tensor(numbers, dtype=values.dtype))] = index
            if self.masks.get(label) in data:
                layout[torch.as_tensor(data[self.masks[label]]) > 0] = index
        if not layout.any():
            raise CaseError(f"{name} holds none of the labels {self.labels}: the layout is empty; set --labels")
        data[self.key] = _like(layout, source)
        return data


class FillMissingImaged(Transform):
    """Where a case has a layout but no image, the image becomes NaN: unknown, all of it is to be synthesised.

    Args:
        key: the image.
        like: the layout, for grid and affine.
    """

    def __init__(self, key: str, like: str) -> None:
        self.key = key
        self.like = like

    def __call__(self, data: Data) -> dict:
        """Fill if missing."""
        data = dict(data)
        if self.key not in data:
            layout = data[self.like]
            data[self.key] = _like(torch.full(layout.shape, torch.nan), layout)
        return data


class FillMissingLayoutd(Transform):
    """Puts an empty frame in the place of a missing label map: all -1, which stands for "still to be drawn".

    Args:
        key: label map (1, *S), kept if there.
        size: voxels of the frame along R, A, S.
        field_of_view: what it covers in mm, centred on the world's origin.
    """

    def __init__(self, key: str, size: Sequence[int], field_of_view: Sequence[float]) -> None:
        self.key = key
        self.size = tuple(size)
        self.spacing = np.array(field_of_view, dtype=float) / self.size
        self.origin = (self.spacing - np.array(field_of_view)) / 2

    def __call__(self, data: Data) -> dict:
        """Fill."""
        if self.key in data:
            return dict(data)
        affine = np.diag([*self.spacing, 1.0])
        affine[:-1, -1] = self.origin
        return {**data, self.key: MetaTensor(torch.full((1, *self.size), -1.0), affine=torch.from_numpy(affine))}


class KeepGivend(Transform):
    """What a case brought stays as it was; what it lacked (`FillMissingLayoutd`) is what was drawn.

    Args:
        key: what was drawn.
        given: what the case brought, negative where it brought nothing; on the same grid.
    """

    def __init__(self, key: str, given: str) -> None:
        self.key = key
        self.given = given

    def __call__(self, data: Data) -> dict:
        """Choose for the whole case."""
        given = data[self.given]
        return dict(data) if (given < 0).any() else {**data, self.key: _like(given, data[self.key])}


class LayoutToConditiond(Transform):
    """Label map -> one channel for each foreground class, -1 outside and 1 inside.

    Args:
        key: label map (1, *S).
        output: key of the condition (K, *S).
        labels: the K label numbers that become channels (Lung-DDPM+ conditions on the nodule alone).
    """

    def __init__(self, key: str, output: str, labels: Sequence[int]) -> None:
        self.key = key
        self.output = output
        self.labels = list(labels)

    def __call__(self, data: Data) -> dict:
        """One channel for each class."""
        data = dict(data)
        layout = data[self.key]
        channels = torch.cat([torch.as_tensor(layout).round() == k for k in self.labels]).float()
        data[self.output] = _like(channels * 2 - 1, layout)
        return data


class ColumnScaled(MapTransform):
    """The references' intensity scaling: min-max to [-1, 1] separately for every index along one axis.

    The training of both references uses the third raw axis at full resolution, their sampling the first one after the
    resize; HU are lost unless the columns' ranges are kept, so they are, as ``<key>_columns``.

    Args:
        keys: images (1, *S).
        axis: spatial axis whose indices are scaled one by one.
    """

    def __init__(self, keys: KeysCollection, axis: int) -> None:
        super().__init__(keys)
        self.axis = axis

    def __call__(self, data: Data) -> dict:
        """Scale, and keep the ranges."""
        data = dict(data)
        for key in self.key_iterator(data):
            image = data[key]
            others = [a for a in range(1, image.ndim) if a != self.axis + 1]
            values = torch.as_tensor(image).double()
            low, high = values.amin(dim=others, keepdim=True), values.amax(dim=others, keepdim=True)
            width = torch.where(high > low, high - low, 1.0)
            data[key] = _like(((values - low) / width * 2 - 1).to(image.dtype), image)
            data[f"{key}_columns"] = torch.stack([low, width])
        return data


class ColumnUnscaled(MapTransform):
    """Inverse of `ColumnScaled`, for the prediction.

    Args:
        keys: images (1, *S) in [-1, 1].
        columns: key of the ranges that `ColumnScaled` kept.
    """

    def __init__(self, keys: KeysCollection, columns: str) -> None:
        super().__init__(keys)
        self.columns = columns

    def __call__(self, data: Data) -> dict:
        """Back to HU."""
        data = dict(data)
        for key in self.key_iterator(data):
            low, width = torch.as_tensor(data[self.columns]).to(data[key].device)
            data[key] = ((data[key] + 1) / 2 * width + low).float()
        return data


class PlaceNoduled(Transform):
    """Moves and resizes the layout's nodule inside the lung, or draws a new one: one scan yields many different pairs.

    Args:
        key: layout (1, X, Y, Z), values 0, lung, nodule.
        mode: ``"keep"`` changes nothing; ``"add"`` draws a new nodule; ``"move"`` takes the case's own ones elsewhere,
            or draws one where there is none.
        diameter: range of a new nodule's diameter in mm.
        scale: range of the factor by which a moved nodule is resized.
        lung: number of the lung label.
        nodule: number of the nodule label.
        tries: placements tried before the case is refused.
    """

    def __init__(
        self,
        key: str,
        mode: str = "keep",
        diameter: Sequence[float] = (8.0, 30.0),
        scale: Sequence[float] = (0.7, 1.4),
        lung: int = 1,
        nodule: int = 2,
        tries: int = 200,
    ) -> None:
        if mode not in ("keep", "move", "add"):
            raise ValueError(f"nodules must be 'keep', 'move' or 'add', got {mode!r}")
        self.key = key
        self.mode = mode
        self.diameter = tuple(diameter)
        self.scale = tuple(scale)
        self.lung = lung
        self.nodule = nodule
        self.tries = tries

    def __call__(self, data: Data) -> dict:
        """Place with the case's own seed."""
        if self.mode == "keep":
            return dict(data)
        data = dict(data)
        layout = data[self.key]
        rng = np.random.default_rng([int(data.get("seed", 0)), 0x6E6F64])
        labels = np.asarray(torch.as_tensor(layout)[0]).round().astype(np.uint8)
        lungs = (labels == self.lung) | (labels == self.nodule)
        spacing = _spacing(layout)
        shapes = self.shapes(labels == self.nodule, spacing, rng) if self.mode == "move" else []
        placed = labels.copy() if self.mode == "add" else np.where(lungs, self.lung, labels)
        for shape in shapes or [self.blob(rng.uniform(self.diameter[0], self.diameter[1]), spacing, rng)]:
            self.place(placed, shape, rng, _file(data, self.key))
        data[self.key] = _like(torch.as_tensor(placed[None]).to(layout.dtype), layout)
        return data

    def shapes(self, nodules: np.ndarray, spacing: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """The case's own nodules, each resized and mirrored at random."""
        components, _ = ndimage.label(nodules)
        shapes = []
        for index, box in enumerate(ndimage.find_objects(components), start=1):
            shape = np.pad(components[box] == index, 1)
            resized = ndimage.zoom(shape.astype(np.float32), rng.uniform(self.scale[0], self.scale[1]), order=1) > 0.5
            flips = tuple(slice(None, None, int(s)) for s in rng.choice([-1, 1], size=resized.ndim))
            shapes.append(resized[flips] if resized.any() else shape)
        return shapes

    def blob(self, diameter: float, spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A new nodule: an ellipsoid with a lightly bumpy surface."""
        radius = diameter / 2 * rng.uniform(0.85, 1.15, size=len(spacing))
        half = np.ceil(1.4 * radius / spacing).astype(int) + 1
        axes = [np.arange(-h, h + 1) * s for h, s in zip(half, spacing, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"))
        bumps = ndimage.gaussian_filter(rng.standard_normal(grid.shape[1:]), diameter / 5 / spacing)
        distance = np.sqrt(((grid.T / radius) ** 2).sum(-1)).T + 0.15 * bumps / max(bumps.std(), 1e-9)
        distance[tuple(half)] = 0  # never empty, however coarse the voxels
        components, _ = ndimage.label(distance < 1)
        return components == components[tuple(half)]

    def place(self, labels: np.ndarray, shape: np.ndarray, rng: np.random.Generator, name: str) -> None:
        """Paint ``shape`` where all of it lies in the lung and touches no other nodule."""
        offsets = np.argwhere(shape) - np.array(shape.shape) // 2
        centres = np.argwhere(labels == self.lung)
        for centre in centres[rng.integers(len(centres), size=self.tries)] if len(centres) else []:
            voxels = offsets + centre
            if (voxels < 0).any() or (voxels >= labels.shape).any():
                continue
            index = tuple(voxels.T)
            if (labels[index] == self.lung).all():
                labels[index] = self.nodule
                return
        extent = "x".join(str(n) for n in shape.shape)
        raise CaseError(
            f"{name}: no place in the lung for a nodule of {extent} voxels: lower --nodule_diameter or --nodule_scale"
        )


class CropNoduled(MapTransform, Randomizable, InvertibleTransform):
    """Cuts a cube around the nodule (Lung-DDPM+): ``start = max(0, min(n - size, v - size // 2))`` on every axis.

    Args:
        keys: images and layout to cut, all on one grid.
        layout: key of the label map.
        size: edges of the cube in voxels; shorter axes are padded with the image's minimum (air, or label 0).
        nodule: number of the nodule label.
        random: v is a random nodule voxel (training); else the centre of the largest nodule.
    """

    def __init__(
        self, keys: KeysCollection, layout: str, size: Sequence[int], nodule: int = 2, random: bool = False
    ) -> None:
        super().__init__(keys)
        self.layout = layout
        self.size = list(size)
        self.nodule = nodule
        self.random = random

    def __call__(self, data: Data) -> dict:
        """Cut, and remember where."""
        data = dict(data)
        nodules = np.asarray(torch.as_tensor(data[self.layout])[0]) == self.nodule
        if not nodules.any():
            raise CaseError(f"{_file(data, self.layout)} has no nodule to cut around: draw one, or use --nodules add")
        voxel = self.voxel(nodules)
        start = [int(max(0, min(n - s, v - s // 2))) for n, s, v in zip(nodules.shape, self.size, voxel, strict=True)]
        for key in self.key_iterator(data):
            data[key] = self.cut(data[key], start)
        return data

    def voxel(self, nodules: np.ndarray) -> np.ndarray:
        """The voxel in the middle of the cube."""
        if self.random:
            voxels = np.argwhere(nodules)
            return voxels[self.R.randint(len(voxels))]
        components, count = ndimage.label(nodules)
        largest = 1 + int(np.argmax(ndimage.sum_labels(nodules, components, range(1, count + 1))))
        return np.round(np.argwhere(components == largest).mean(axis=0)).astype(int)

    def cut(self, image: MetaTensor, start: Sequence[int]) -> MetaTensor:
        """One image's cube, its affine moved along."""
        values = torch.as_tensor(image)
        cube = values[self.box(start)]
        short = [s - n for s, n in zip(self.size, cube.shape[1:], strict=True)]
        padding = [p for s in reversed(short) for p in (0, s)]
        out = _like(torch.nn.functional.pad(cube, padding, value=float(values.amin())), image)
        out.affine = self.shifted(image.affine, start)
        self.push_transform(out, orig_size=image.shape[1:], extra_info={"start": list(start)})
        return out

    def inverse(self, data: Data) -> dict:
        """Lay the cube back into a volume of the original size, NaN (unknown) outside it."""
        data = dict(data)
        for key in self.key_iterator(data):
            cube = data[key]
            operation = self.pop_transform(cube)
            size, start = operation[TraceKeys.ORIG_SIZE], operation[TraceKeys.EXTRA_INFO]["start"]
            whole = torch.full((cube.shape[0], *size), torch.nan, dtype=cube.dtype, device=cube.device)
            inside = whole[self.box(start)]
            inside.copy_(torch.as_tensor(cube)[tuple(slice(n) for n in inside.shape)])
            data[key] = _like(whole, cube)
            data[key].affine = self.shifted(cube.affine, [-a for a in start])
        return data

    def box(self, start: Sequence[int]) -> tuple[slice, ...]:
        """Index of the cube in a channel-first volume; where the volume is shorter, of the part inside."""
        return (slice(None), *(slice(a, a + s) for a, s in zip(start, self.size, strict=True)))

    def shifted(self, affine: torch.Tensor, start: Sequence[int]) -> torch.Tensor:
        """Affine of a grid that begins at voxel ``start`` of the given one."""
        moved = affine.clone()
        moved[:3, 3] += affine[:3, :3] @ torch.tensor(start, dtype=affine.dtype, device=affine.device)
        return moved


class PasteBackd(Transform):
    """Puts the synthesis into the original: inside the layout the prediction, outside it the original, to the bit.

    Args:
        key: the prediction, on the original grid; where that is unknown (NaN) the original stays.
        original: key of the original image; where that is unknown (NaN) the prediction stays.
        layout: key of the label map on the original grid.
        labels: label numbers that are synthesised.
    """

    def __init__(self, key: str, original: str, layout: str, labels: Sequence[int]) -> None:
        self.key = key
        self.original = original
        self.layout = layout
        self.labels = list(labels)

    def __call__(self, data: Data) -> dict:
        """Paste, where there is an original (MONAI Label hands over none)."""
        data = dict(data)
        if self.original in data and self.layout in data:
            pred, original = data[self.key], torch.as_tensor(data[self.original])
            layout = torch.as_tensor(data[self.layout])
            outside = ~torch.isin(layout, torch.tensor(self.labels, dtype=layout.dtype, device=layout.device))
            keep = (outside.to(pred.device) | pred.isnan()) & original.to(pred.device).isfinite()
            data[self.key] = torch.where(keep, original.to(device=pred.device, dtype=pred.dtype), pred)
        return data


class RandMaskd(Transform, Randomizable):
    """Mirrors, resizes and shifts a mask: new masks from known ones, to synthesise from (Siamese-Diffusion's "Random").

    Drawn again until the lesion's area fits; a case for which none of the draws does is refused. What a case draws
    depends on its own ``seed`` alone; without one, on the transform's random state.

    Args:
        key: mask (K, *S), positive inside.
        mode: ``"random"``, or ``"keep"``, which changes nothing.
        zoom: range of the factor by which the mask is resized.
        shift: largest shift along an axis, as a fraction of it.
        area: range of the lesion's share of the mask.
        change: range of the factor by which that share may differ from the original one.
        tries: draws before the case is refused.
    """

    def __init__(
        self,
        key: str,
        mode: str = "random",
        zoom: Sequence[float] = (0.8, 1.2),
        shift: float = 0.1,
        area: Sequence[float] = (0.005, 0.7),
        change: Sequence[float] = (0.5, 2.0),
        tries: int = 50,
    ) -> None:
        if mode not in ("keep", "random"):
            raise ValueError(f"masks must be 'keep' or 'random', got {mode!r}")
        if not 0 < zoom[0] <= zoom[1]:
            raise ValueError(f"zoom must be a range above 0, got {tuple(zoom)}")
        self.key = key
        self.mode = mode
        self.zoom = tuple(zoom)
        self.shift = shift
        self.area = tuple(area)
        self.change = tuple(change)
        self.tries = tries

    def __call__(self, data: Data) -> dict:
        """Draw with the case's own seed until a mask fits."""
        data = dict(data)
        if self.mode == "keep":
            return data
        if "seed" in data:
            seeds = np.random.SeedSequence([int(data["seed"]), 0x6D61736B])
            self.set_random_state(seed=int(seeds.generate_state(1)[0]))
        mask = torch.as_tensor(data[self.key])
        before = self.share(mask)
        low, high = max(self.area[0], self.change[0] * before), min(self.area[1], self.change[1] * before)
        for _ in range(self.tries if before else 0):
            self.randomize(mask.ndim - 1)
            moved = self.move(mask)
            if low <= self.share(moved) <= high:
                data[self.key] = _like(moved, MetaTensor(data[self.key]))
                return data
        raise CaseError(
            f"{_file(data, self.key)}: lesion fills {before:.2%} of the mask, and none of {self.tries} random masks "
            f"came to between {low:.2%} and {high:.2%}: widen the range of areas, or leave the case out"
        )

    def randomize(self, data: int = 2) -> None:
        """Draw for so many axes: which are mirrored, one factor, how far they shift."""
        self.flips = self.R.rand(data) < 0.5
        self.factor = self.R.uniform(self.zoom[0], self.zoom[1])
        self.shifts = self.R.uniform(-self.shift, self.shift, data)

    def move(self, mask: torch.Tensor) -> torch.Tensor:
        """Apply what was drawn: each pixel takes its nearest one, from outside the mask zero."""
        for axis, (flip, shift) in enumerate(zip(self.flips, self.shifts, strict=True), start=1):
            count = mask.shape[axis]
            middle = (count - 1) / 2
            offset = (np.arange(count) - middle - shift * count) / self.factor
            source = np.rint(middle - offset if flip else middle + offset).astype(int)
            outside = torch.as_tensor((source < 0) | (source >= count), device=mask.device)
            index = torch.as_tensor(source.clip(0, count - 1), device=mask.device)
            mask = mask.index_select(axis, index).index_fill(axis, outside.nonzero()[:, 0], 0)
        return mask

    def share(self, mask: torch.Tensor) -> float:
        """Share of the mask that any lesion fills."""
        return float((mask > 0).any(dim=0).float().mean())
