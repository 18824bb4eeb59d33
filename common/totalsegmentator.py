"""Organs of the abdomen: TotalSegmentator's classes, the labels that guidegen makes of them, the body around them.

Names and numbers are those of TotalSegmentator's task ``total``, 1.5.7 and 2.18.0. Left and right are the patient's.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from scipy import ndimage

from .io import CaseError

Data = Mapping[Hashable, Any]

# Index is the label's value. The publication has the first twelve; bones and skin are what a scan also shows.
ORGANS: tuple[str, ...] = ("background", "spleen", "kidney_right", "kidney_left", "liver", "stomach", "pancreas")
ORGANS += ("small_bowel", "duodenum", "colon", "urinary_bladder", "colorectal_cancer", "vertebrae", "body")
CANCER, VERTEBRAE, BODY = (ORGANS.index(name) for name in ("colorectal_cancer", "vertebrae", "body"))


def _both(names: str) -> tuple[str, ...]:
    """Paired structures, in TotalSegmentator's usual order."""
    return tuple(f"{name}_{side}" for name in names.split() for side in ("left", "right"))


_SPINE = tuple(f"vertebrae_{part}{n}" for part, count in (("L", 5), ("T", 12), ("C", 7)) for n in range(count, 0, -1))
_RIBS = tuple(f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13))
_LUNGS = tuple(f"lung_{lobe}_lobe_left" for lobe in ("upper", "lower"))
_LUNGS += tuple(f"lung_{lobe}_lobe_right" for lobe in ("upper", "middle", "lower"))
_UPPER = ("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach")
_ADRENALS = ("adrenal_gland_right", "adrenal_gland_left")
_ILIAC = _both("iliac_artery iliac_vena")
_LIMBS = _both("humerus scapula clavicula femur hip")
_MUSCLES = _both("gluteus_maximus gluteus_medius gluteus_minimus autochthon iliopsoas")

# Index + 1 is TotalSegmentator's number.
TOTAL_V1: tuple[str, ...] = (
    *_UPPER,
    *("aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas"),
    *_ADRENALS,
    *_LUNGS,
    *_SPINE,
    *("esophagus", "trachea", "heart_myocardium", "heart_atrium_left", "heart_ventricle_left"),
    *("heart_atrium_right", "heart_ventricle_right", "pulmonary_artery", "brain"),
    *_ILIAC,
    *("small_bowel", "duodenum", "colon"),
    *_RIBS,
    *_LIMBS,
    *("sacrum", "face"),
    *_MUSCLES,
    "urinary_bladder",
)
TOTAL_V2: tuple[str, ...] = (
    *_UPPER,
    "pancreas",
    *_ADRENALS,
    *_LUNGS,
    *("esophagus", "trachea", "thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate"),
    *("kidney_cyst_left", "kidney_cyst_right", "sacrum", "vertebrae_S1"),
    *_SPINE,
    *("heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk", "subclavian_artery_right"),
    *("subclavian_artery_left", "common_carotid_artery_right", "common_carotid_artery_left"),
    *("brachiocephalic_vein_left", "brachiocephalic_vein_right", "atrial_appendage_left"),
    *("superior_vena_cava", "inferior_vena_cava", "portal_vein_and_splenic_vein"),
    *_ILIAC,
    *_LIMBS,
    "spinal_cord",
    *_MUSCLES,
    *("brain", "skull"),
    *_RIBS,
    *("sternum", "costal_cartilages"),
)
_CLASSES = {"v1": TOTAL_V1, "v2": TOTAL_V2}


def _organ(name: str) -> int:
    """Our value of one of TotalSegmentator's classes; what is no organ of ours still lies inside the skin."""
    if name == "sacrum" or name.startswith("vertebrae_"):
        return VERTEBRAE
    return ORGANS.index(name) if name in ORGANS else BODY


def organ_table(version: str) -> dict[int, int]:
    """TotalSegmentator's numbers -> values of `ORGANS`.

    Args:
        version: ``"v1"`` (104 classes) or ``"v2"`` (117).

    Example:
        >>> organ_table("v1")[104], organ_table("v2")[21]
        (10, 10)
    """
    if version not in _CLASSES:
        raise ValueError(f"TotalSegmentator's version must be one of {', '.join(_CLASSES)}, got {version!r}")
    return {number: _organ(name) for number, name in enumerate(_CLASSES[version], start=1)}


def organ_names(num_classes: int = len(ORGANS)) -> list[str]:
    """Names of the first classes, background first: for configs, which can name functions but no tables."""
    return list(ORGANS[:num_classes])


def find_body(image: np.ndarray, above: float = -300.0) -> np.ndarray:
    """Everything inside the skin: the largest piece denser than air, with the air it encloses in axial slices.

    By slices, since bowel gas and lungs may open at the upper or lower end of a scan.

    Args:
        image: CT in HU (X, Y, Z), slices along Z.
        above: what lies above is no air and no lung.

    Returns:
        Mask (X, Y, Z), empty where nothing is dense enough.
    """
    pieces, count = ndimage.label(image > above)
    if not count:
        return np.zeros(image.shape, dtype=bool)
    body = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    in_plane = ndimage.generate_binary_structure(3, 1)
    in_plane[1, 1, [0, 2]] = False
    air, count = ndimage.label(~body, in_plane)
    outside = np.zeros(count + 1, dtype=bool)
    outside[air[[0, -1]]] = outside[air[:, [0, -1]]] = True
    outside[0] = False
    return ~outside[air]


class MapOrgansd(Transform):
    """Brings a segmentation's numbers to `ORGANS`, pastes the tumour, finds the body.

    Args:
        key: the label map (1, *S); a case without one is handed on.
        table: ``"totalsegmentator_v1"``, ``"totalsegmentator_v2"``, ``"guidegen"`` (ours already), or the numbers of
            another segmentation -> values of `ORGANS`, e.g. ``{"6": 4}``; 0 is background unless it says otherwise.
        lesion: key of a tumour mask on the same grid, inside above 0.5, pasted over the organs when present.
        image: key of the CT in HU on the same grid; when present, background inside the skin becomes body.
        body_above: as in `find_body`.
        num_classes: values from here on become background; the publication has 12.
    """

    def __init__(
        self,
        key: str,
        table: str | Mapping[int | str, int],
        lesion: str | None = None,
        image: str | None = None,
        body_above: float = -300.0,
        num_classes: int = len(ORGANS),
    ) -> None:
        if not 2 <= num_classes <= len(ORGANS):
            raise ValueError(f"num_classes must lie in 2 .. {len(ORGANS)}, got {num_classes}")
        self.key, self.lesion, self.image = key, lesion, image
        self.body_above = body_above
        self.num_classes = num_classes
        self.table = f"table {table}" if isinstance(table, str) else "given table"
        self.lookup = _lookup(_numbers(table))

    def __call__(self, data: Data) -> dict:
        """Map, find the body, paste the tumour, drop the classes that are not wanted."""
        data = dict(data)
        if self.key not in data:
            return data
        source = MetaTensor(data[self.key])
        layout = self.organs(source, _file(data, self.key))
        if self.image in data and self.num_classes > BODY:
            layout[(layout == 0) & self.body(data)] = BODY
        if self.lesion in data:
            self.check_grid(data, self.lesion)
            layout[np.asarray(data[self.lesion]) > 0.5] = CANCER
        layout[layout >= self.num_classes] = 0
        values = torch.from_numpy(layout).to(source.dtype)
        data[self.key] = MetaTensor(values, meta=dict(source.meta), applied_operations=list(source.applied_operations))
        return data

    def organs(self, source: torch.Tensor, name: str) -> np.ndarray:
        """The label map (1, *S) by `ORGANS`, int16."""
        values = np.asarray(torch.as_tensor(source))
        numbers = np.nan_to_num(values, nan=-1, posinf=-1, neginf=-1).astype(np.int64)
        if not np.array_equal(numbers, values):
            raise CaseError(f"{name} holds fractional values: labels are whole numbers; resample it with nearest")
        inside = (numbers >= 0) & (numbers < len(self.lookup))
        layout = self.lookup[np.where(inside, numbers, -1)]
        if (layout < 0).any():
            unknown = np.unique(numbers[layout < 0]).tolist()
            raise CaseError(
                f"{name} holds labels {unknown[:8]}{' ...' * (len(unknown) > 8)} that are not in the "
                f"{self.table}: choose the table of the program that wrote them, or give one that names them"
            )
        return layout

    def body(self, data: Data) -> np.ndarray:
        """Inside of the skin (1, *S), from the CT."""
        self.check_grid(data, self.image)
        image = np.asarray(data[self.image])
        if image.ndim != 4 or len(image) != 1:
            raise CaseError(f"{_file(data, self.image)} has shape {image.shape}, expected one volume (1, X, Y, Z)")
        # Holes are filled in axial slices, whichever axis of the file points upwards.
        up = int(np.abs(np.asarray(MetaTensor(data[self.image]).affine)[2, :3]).argmax())
        body = np.moveaxis(find_body(np.moveaxis(image[0], up, 2), self.body_above), 2, up)
        if not body.any():
            raise CaseError(
                f"{_file(data, self.image)} holds nothing above {self.body_above:g}: no body is found; "
                "give the CT in Hounsfield units"
            )
        return body[None]

    def check_grid(self, data: Data, key: Hashable) -> None:
        """One volume on the label map's grid."""
        volume, labels = MetaTensor(data[key]), MetaTensor(data[self.key])
        names = f"{_file(data, key)} and {_file(data, self.key)}"
        if volume.shape != labels.shape:
            shapes = f"{tuple(volume.shape[1:])} and {tuple(labels.shape[1:])}"
            raise CaseError(f"{names} have different shapes, {shapes}: resample one onto the other's grid")
        if not np.allclose(volume.affine, labels.affine, atol=1e-2):
            raise CaseError(f"{names} have different affines: resample one onto the other's grid")


def _file(data: Data, key: Hashable) -> str:
    return str(getattr(data[key], "meta", {}).get("filename_or_obj", key))


def _numbers(table: str | Mapping[int | str, int]) -> dict[int, int]:
    """A table by name or as written in a config, whose keys are strings."""
    if not isinstance(table, str):
        return {0: 0, **{int(number): value for number, value in table.items()}}
    if table == "guidegen":
        return {value: value for value in range(len(ORGANS))}
    program, _, version = table.partition("_")
    if program != "totalsegmentator" or version not in _CLASSES:
        known = ", ".join(["guidegen", *(f"totalsegmentator_{version}" for version in _CLASSES)])
        raise ValueError(f"table must be one of {known}, or a dict of label numbers, got {table!r}")
    return {0: 0, **organ_table(version)}


def _lookup(numbers: Mapping[int, int]) -> np.ndarray:
    """Values by number, -1 where there is none, as in the last entry."""
    wrong = {n: value for n, value in numbers.items() if not 0 <= n < 2**16 or value not in range(len(ORGANS))}
    if wrong:
        raise ValueError(
            f"table entries {wrong} cannot be used: numbers lie in 0 .. 65535, values in 0 .. {len(ORGANS) - 1}"
        )
    lookup = np.full(max(numbers) + 2, -1, dtype=np.int16)
    lookup[list(numbers)] = list(numbers.values())
    return lookup
