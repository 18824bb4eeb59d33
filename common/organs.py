"""The organ map of a CT, on the CT's own grid: the user's, a stored one, or TotalSegmentator's.

LesionDiffusion (2503.00741) knows organs by the numbers of TotalSegmentator's first version, 0 .. 104. The published
code overwrites the CT and segments it at a voxel size that is not its own: here a CT is only read, and never resampled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform

from .io import CaseError, atomic_path, sha256, stem, write_json
from .lesion_words import organ_id
from .totalsegmentator import ORGANS, TOTAL_V1, TOTAL_V2, Data
from .transforms import CheckCased, LoadCased

logger = logging.getLogger(__name__)

_V1 = {name: number for number, name in enumerate(TOTAL_V1, start=1)}


def organ_numbers(table: str | Mapping[int | str, int | str]) -> dict[int, int]:
    """Numbers in a file -> numbers of TotalSegmentator's first version.

    Args:
        table: ``"totalsegmentator_v1"``; ``"totalsegmentator_v2"``, by name, 0 for what v1 has not; ``"guidegen"``, the
            values of `ORGANS`; or a file's own numbers, ``{"6": 5}``, and so those of a mask, ``{"1": "liver"}``.
    """
    if not isinstance(table, str):
        named = {int(number): organ_id(organ) if isinstance(organ, str) else organ for number, organ in table.items()}
        if wrong := {n: organ for n, organ in named.items() if n < 0 or organ not in range(len(TOTAL_V1) + 1)}:
            raise ValueError(f"organ_table has {wrong}: numbers are 0 or more, organs 0 .. {len(TOTAL_V1)}, or names")
        return {0: 0, **named}
    if table == "totalsegmentator_v1":
        return {number: number for number in (0, *_V1.values())}
    if table == "totalsegmentator_v2":
        return {0: 0} | {n: _V1.get(name, 0) for n, name in enumerate(TOTAL_V2, start=1)}
    if table == "guidegen":
        # The rest is background, body, and a tumour, which lies in the bowel; the spine is one, the phantoms' lumbar.
        ours = {**_V1, "colorectal_cancer": _V1["colon"], "vertebrae": _V1["vertebrae_L3"]}
        return {value: ours.get(name, 0) for value, name in enumerate(ORGANS)}
    known = "totalsegmentator_v1, totalsegmentator_v2, guidegen"
    raise ValueError(f"organ_table must be one of {known}, or a dict of label numbers, got {table!r}")


class OrganMapd(Transform):
    """Gives every case its organ map (1, *S), numbers 0 .. 104: the one it came with, or one that is made and kept.

    What a segmenter makes is stored as ``<name>_organs.nii.gz`` beside a side-car that says of which CT and by whom. As
    long as both are the same, later runs and further samples of the CT use it again; else it is made anew.

    Args:
        segmenter: path of a CT -> organ map (X, Y, Z) on its grid, an array or a NIfTI image; None for cases that bring
            theirs. Its attribute ``description`` tells two segmenters apart, else its name.
        output_dir: where the maps are stored; needed with a segmenter.
        table: numbers of the maps that cases bring, as in `organ_numbers`.
        key: the organ map.
        image: the loaded CT.
    """

    def __init__(
        self,
        segmenter: Callable[[str], Any] | None = None,
        output_dir: str | os.PathLike | None = None,
        table: str | Mapping[int | str, int | str] = "totalsegmentator_v1",
        key: str = "organs",
        image: str = "image",
    ) -> None:
        if segmenter is not None and output_dir is None:
            raise ValueError("a segmenter's organ maps are stored: give output_dir")
        self.segmenter, self.output_dir = segmenter, Path(output_dir or ".")
        self.numbers = organ_numbers(table)
        self.key, self.image = key, image
        self.load, self.check = LoadCased(key), CheckCased((image, key))

    def __call__(self, data: Data) -> dict:
        """Find or make the map, bring it to v1 numbers, check it against the CT's grid."""
        data = dict(data)
        numbers = self.numbers
        if self.key not in data:
            data[self.key] = str(self.stored(str(data[self.image].meta["filename_or_obj"]), data))
            data, numbers = self.load(data), organ_numbers("totalsegmentator_v1")
        source = MetaTensor(data[self.key])
        name = str(source.meta.get("filename_or_obj", self.key))
        self.check.check_grid(data, self.key, self.image)
        values = torch.from_numpy(renumber(np.asarray(torch.as_tensor(source)), numbers, name)).to(source.dtype)
        data[self.key] = MetaTensor(values, meta=dict(source.meta), applied_operations=list(source.applied_operations))
        return data

    def stored(self, image: str, data: Data) -> Path:
        """A stored map of this CT by this segmenter; made, if there is none."""
        name = str(data.get("name") or stem(image))
        if self.segmenter is None:
            raise CaseError(
                f"{name} has no organ map: put one on the grid of {image} into ORGANS/{name}.nii.gz (in a list: under "
                f'"organs"), or install TotalSegmentator ({INSTALL}) and set --segmenter fast'
            )
        plain = getattr(self.segmenter, "__qualname__", type(self.segmenter).__name__)
        origin = {"image_sha256": sha256(image), "segmenter": str(getattr(self.segmenter, "description", plain))}
        own, sidecar = (self.output_dir / f"{name}_organs{suffix}" for suffix in (".nii.gz", ".json"))
        for other in (sidecar, *sorted(self.output_dir.glob("*_organs.json"))):
            if (found := _unchanged(other, origin)) is not None:
                return found
        if own.exists():
            logger.warning(f"{own} is not of this CT and segmenter, or was changed: made anew")
        organs = self.segment(image, data[self.image])
        with atomic_path(own) as temporary:
            nib.save(organs, temporary)
        write_json(sidecar, {"image": image, **origin, "organs": own.name, "organs_sha256": sha256(own)})
        return own

    def segment(self, image: str, like: MetaTensor) -> nib.Nifti1Image:
        """Run the segmenter and refuse what is not on the CT's grid."""
        assert self.segmenter is not None
        result = self.segmenter(image)
        affine = np.asarray(like.affine, dtype=float)
        values = np.asarray(getattr(result, "dataobj", result))
        same = np.allclose(getattr(result, "affine", affine), affine, atol=1e-2)
        if values.shape != tuple(like.shape[1:]) or not same:
            shapes = f"{values.shape} and {tuple(like.shape[1:])}"
            raise CaseError(f"the organ map of {image} is not on the CT's grid (shapes {shapes}): mend the segmenter")
        values = renumber(values, organ_numbers("totalsegmentator_v1"), f"the organ map of {image}")
        return nib.Nifti1Image(values.astype(np.uint8), affine)


def renumber(values: np.ndarray, numbers: Mapping[int, int], name: str) -> np.ndarray:
    """Labels of a file by a table, int16; refuses what is no label, or not in the table."""
    labels = np.nan_to_num(values, nan=-1, posinf=-1, neginf=-1).astype(np.int32)
    if not np.array_equal(labels, values):
        raise CaseError(f"{name} holds fractional values: labels are whole numbers; resample it with nearest")
    lookup = np.full(max(numbers) + 2, -1, dtype=np.int16)
    lookup[list(numbers)] = list(numbers.values())
    organs = lookup[np.where((labels >= 0) & (labels < len(lookup)), labels, -1)]
    if (organs < 0).any():
        unknown = np.unique(labels[organs < 0]).tolist()
        raise CaseError(
            f"{name} holds labels {unknown[:8]}{' ...' * (len(unknown) > 8)} that its table does not know: set "
            "--organ_table to totalsegmentator_v1, totalsegmentator_v2 or guidegen, or name the organs of its numbers"
        )
    return organs


def _unchanged(sidecar: Path, origin: Mapping[str, str]) -> Path | None:
    """The map beside a side-car, if it is of this origin and still what was written."""
    if not sidecar.is_file():
        return None
    held = json.loads(sidecar.read_text(encoding="utf-8"))
    path = sidecar.with_name(f"{held.get('organs')}")
    same = all(held.get(key) == value for key, value in origin.items())
    return path if same and path.is_file() and sha256(path) == held.get("organs_sha256") else None


# ---------------------------------------------------------------------------------------------------------------------
# TotalSegmentator

INSTALL = "pip install torch==2.13.0 TotalSegmentator==2.18.0"

# Mode -> the task under which its weights are fetched, its trainer, its folders.
_LONG = "nnUNetTrainer_4000epochs_NoMirroring"
_PARTS = ("1_organs_1559subj", "2_vertebrae_1532subj", "3_cardiac_1559subj", "4_muscles_1559subj", "5_ribs_1559subj")
MODES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "fastest": ("total_fast", _LONG, ("Dataset298_TotalSegmentator_total_6mm_1559subj",)),
    "fast": ("total_fast", _LONG, ("Dataset297_TotalSegmentator_total_3mm_1559subj",)),
    "default": (
        "total",
        "nnUNetTrainerNoMirroring",
        tuple(f"Dataset29{part[0]}_TotalSegmentator_part{part}" for part in _PARTS),
    ),
}


class TotalSegmentatorOrgans:
    """The real TotalSegmentator 2 as a segmenter: path of a CT -> organ map in v1 numbers, on the CT's grid.

    It knows no heart chambers (44 .. 48), no pulmonary artery (49) and no face (93): these stay empty. Nothing is
    downloaded, nothing is reported to its makers, and the CT's file is only read.

    Args:
        mode: ``"fast"`` (one model, voxels of 3 mm), ``"fastest"`` (6 mm), or ``"default"`` (five models, 1.5 mm).
        device: torch's name of it.
        weights_dir: folder with the models' folders; None takes what TotalSegmentator would.
        sequential: read, predict and write one after the other in this process, instead of by processes that each
            import everything anew: for a small CT 2 s instead of 20.
    """

    def __init__(
        self,
        mode: str = "fast",
        device: str | torch.device = "cpu",
        weights_dir: str | os.PathLike | None = None,
        sequential: bool = True,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"TotalSegmentator's mode must be one of {', '.join(MODES)}, got {mode!r}")
        try:
            version = metadata.version("TotalSegmentator")
        except metadata.PackageNotFoundError:
            raise ImportError(f"TotalSegmentator is not installed: {INSTALL}, or give every case its organs") from None
        self.mode, self.sequential = mode, sequential
        self.device = str(device).replace("cuda", "gpu")
        self.weights_dir = weights_root() if weights_dir is None else Path(weights_dir).absolute()
        self.description = f"TotalSegmentator {version}, total, {mode}, v1_order"
        self.check_weights()

    def check_weights(self) -> None:
        """Find all weights at the door; without them TotalSegmentator would start to download."""
        task, trainer, folders = MODES[self.mode]
        weights = f"{trainer}__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth"
        missing = [folder for folder in folders if not (self.weights_dir / folder / weights).is_file()]
        if missing:
            raise FileNotFoundError(
                f"TotalSegmentator's weights of mode {self.mode!r} are not in {self.weights_dir}: {', '.join(missing)} "
                f"(each with {weights}). Fetch them once, where there is internet, with\n"
                f"  TOTALSEG_WEIGHTS_PATH={self.weights_dir} totalseg_download_weights -t {task}"
            )

    def __call__(self, path: str | os.PathLike) -> nib.Nifti1Image:
        """Segment a CT; uint8, shape and affine of the file as MONAI reads it."""
        # From memory, so that the file is out of reach, and whatever format MONAI reads will do.
        image = CheckCased("image")(LoadCased("image")({"image": str(path)}))["image"]
        source = nib.Nifti1Image(np.asarray(image[0]), np.asarray(image.affine, dtype=float))
        # Building a network draws weights: the run's own randomness shall not depend on it.
        with _environment(self.weights_dir), torch.random.fork_rng(devices=[]), _nnunet(self.sequential):
            from totalsegmentator.python_api import totalsegmentator

            return totalsegmentator(
                source, None, task="total", ml=True, v1_order=True, quiet=True, device=self.device,
                fast=self.mode == "fast", fastest=self.mode == "fastest", nr_thr_resamp=1, nr_thr_saving=1,
            )  # fmt: skip


def weights_root() -> Path:
    """Where TotalSegmentator looks for weights."""
    home = Path(os.environ.get("TOTALSEG_HOME_DIR") or Path.home() / ".totalsegmentator")
    return Path(os.environ.get("TOTALSEG_WEIGHTS_PATH") or home / "nnunet" / "results").absolute()


@contextlib.contextmanager
def _environment(weights_dir: Path) -> Iterator[None]:
    """TotalSegmentator's settings for one call: this weights folder, a home of its own where statistics are off."""
    before = dict(os.environ)
    settings = {"totalseg_id": "none", "send_usage_stats": False, "statistics_disclaimer_shown": True}
    with tempfile.TemporaryDirectory(prefix="totalsegmentator-") as home:
        write_json(Path(home) / "config.json", {**settings, "prediction_counter": 0})
        os.environ |= {"TOTALSEG_WEIGHTS_PATH": str(weights_dir), "TOTALSEG_HOME_DIR": home}
        try:
            yield
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)


@contextlib.contextmanager
def _nnunet(sequential: bool) -> Iterator[None]:
    """nnU-Net with the two trainers at hand, and, if wanted, without worker processes."""
    from totalsegmentator.config import setup_nnunet

    setup_nnunet()  # nnU-Net reads its folders at import
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.variants.data_augmentation import nnUNetTrainerNoMirroring as mirroring
    from nnunetv2.training.nnUNetTrainer.variants.training_length import nnUNetTrainer_Xepochs_NoMirroring as epochs
    from totalsegmentator.nnunet import custom_trainers

    # The search for a trainer imports all of nnU-Net's, and dies with a torchvision that does not fit this torch.
    for module, (_, name, _) in ((epochs, MODES["fast"]), (mirroring, MODES["default"])):
        custom_trainers[name] = getattr(module, name)
    before = nnUNetPredictor.predict_from_files

    def one_by_one(self: Any, source: Any, target: Any, save_probabilities: bool = False, **_: Any) -> Any:
        return self.predict_from_files_sequential(source, target, save_probabilities)

    if sequential:
        nnUNetPredictor.predict_from_files = one_by_one
    try:
        yield
    finally:
        nnUNetPredictor.predict_from_files = before
