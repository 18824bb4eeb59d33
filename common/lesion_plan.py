"""What goes where: every lesion of a case gets its report and its box; and what networks learn from lesions there are.

LesionDiffusion (Tian et al., arXiv 2503.00741) asks for these in files that are edited by hand between its programs.
Here a case comes with what the user has, CT alone or organ map, report, label, and the stages before are skipped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Transform
from nibabel.orientations import io_orientation
from numpy.typing import ArrayLike
from scipy import ndimage
from torch import Tensor

from .codebook import CodeSpace
from .io import CaseError, write_json
from .lesion_boxes import LESION, Box, box_size, components, place_box, target_organ
from .lesion_geometry import AIR, Grid, cover, crop_start, resample, to_unit, working_grid
from .lesion_reports import (
    LesionReport,
    cavity_of,
    described,
    draw_report,
    image_texts,
    is_hollow,
    kinds_of,
    lesion_kind,
    mask_texts,
    organ_id,
    organ_name,
    read_reports,
)
from .lesion_reports import write_reports as plain
from .text import contexts_of
from .transforms import Data

logger = logging.getLogger(__name__)

TEXTS: dict[str, Callable[[LesionReport], list[str]]] = {"mask": mask_texts, "image": image_texts}
PLACES = 50  # boxes tried for a lesion that must not touch the others'
SHRINKINGS = 8  # of a lesion whose size is free
WALL_MM = 5.0  # how deep the wall of a hollow organ is


@dataclass(frozen=True)
class Lesion:
    """One lesion to be made.

    Attributes:
        report: what it is to be like.
        box: where, in voxels of the working grid.
        number: of its component in the case's label, from 1; 0 where the mask is still to be drawn.
    """

    report: LesionReport
    box: Box
    number: int = 0

    @property
    def organs(self) -> list[int]:
        """Numbers of the organs it lies in."""
        return [organ_id(name) for name in self.report.organs or (self.report.organ,)]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        (report,) = plain([self.report])["lesions"]
        box = {"start": list(self.box.start), "size": list(self.box.size)}
        return {"report": report, "box": box, "number": self.number}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Lesion:
        """From JSON."""
        (report,) = read_reports({"lesions": [content["report"]]})
        box = Box(tuple(content["box"]["start"]), tuple(content["box"]["size"]))
        return cls(report, box, content["number"])


def overlap_of(organs: Tensor, lesion: Tensor) -> dict[int, int]:
    """Numbers of organs -> voxels of a lesion that lie in them."""
    count = torch.bincount(torch.as_tensor(organs)[torch.as_tensor(lesion) > 0].long())
    return {number: int(n) for number, n in enumerate(count) if number and n}


def box_of(mask: Tensor, affine: ArrayLike, grid: Grid) -> Box:
    """Smallest box of the working grid around a mask (1, *S) of the file; a mask below its voxels gets one voxel."""
    start, size = cover(np.asarray(mask[0]) > 0, affine, grid)
    seen = resample(mask, affine, grid.crop(start, size), "nearest")[0]
    return Box.of(np.asarray(seen)).moved(start) if seen.any() else Box.around(Box(start, size).centre, (1, 1, 1))


class PlanLesionsd(Transform):
    """Decides for every lesion of a case what it is like and where it lies: ``plan``, as JSON.

    Where the label has lesions, they are painted as they are. Else each report becomes a lesion, or ``num_lesions`` are
    asked for by ``wish``. What a report leaves open the writer adds; boxes are drawn from the case's own seed. The plan
    is kept in ``output_dir``, so that a run that goes on neither asks nor draws again.

    Args:
        writer: completes a report: ``writer(wish, seed=, present=, extent_mm=) -> LesionReport``.
        spacing: of the working grid, mm along S, A, L.
        size: voxels (S, A, L) of the crops that networks see; a box must fit into them.
        wish: what is asked of a case without report, in the form of a report's lesion; may be empty.
        num_lesions: how many, of a case without report.
        max_lesions: of a label, the largest.
        output_dir: where plans are kept; None keeps none.
    """

    def __init__(
        self,
        writer: Callable[..., LesionReport],
        *,
        spacing: Sequence[float],
        size: Sequence[int],
        wish: Mapping[str, Any] | None = None,
        num_lesions: int = 1,
        max_lesions: int = 3,
        output_dir: str | os.PathLike | None = None,
    ) -> None:
        if num_lesions < 1:
            raise ValueError(f"num_lesions must be at least 1, got {num_lesions}")
        self.writer = writer
        self.spacing, self.size = tuple(spacing), tuple(size)
        self.wish = {k: v for k, v in (wish or {}).items() if v not in (None, "", {}, [])}
        self.num_lesions, self.max_lesions = num_lesions, max_lesions
        self.output_dir = None if output_dir is None else Path(output_dir)

    def __call__(self, data: Data) -> dict:
        """Add ``plan``; ``image`` becomes CT, organ map and numbered lesions, (3, *S)."""
        data = dict(data)
        image, organs = MetaTensor(data["image"]), torch.as_tensor(data["organs"])
        numbered = self.numbered(data, organs)
        grid = working_grid(image.shape[1:], image.affine, self.spacing)
        reports = read_reports(data["report"], str(data.get("name", ""))) if "report" in data else []
        lesions = self.stored(data, reports, organs, numbered, grid, np.asarray(image.affine))
        plan = {"lesions": [lesion.plain() for lesion in lesions], "affine": np.asarray(image.affine).tolist()}
        data["plan"] = json.dumps(plan)
        stacked = torch.cat([torch.as_tensor(image).float(), organs.float(), numbered.float()])
        data["image"] = MetaTensor(stacked, meta={**image.meta, "plan": data["plan"]})
        return data

    def numbered(self, data: Data, organs: Tensor) -> Tensor:
        """Lesions of the case's label by number (1, *S); zeros without a label."""
        out = torch.zeros(organs.shape, dtype=torch.uint8)
        if "label" in data:
            found = components(np.asarray(data["label"][0]) == LESION, self.max_lesions)
            for number, lesion in enumerate(found, start=1):
                out[0][lesion.box.slices][torch.from_numpy(lesion.mask)] = number
        return out

    def stored(
        self,
        data: Data,
        reports: Sequence[LesionReport],
        organs: Tensor,
        numbered: Tensor,
        grid: Grid,
        affine: np.ndarray,
    ) -> list[Lesion]:
        """The case's plan, made now or by a run before."""
        asked = {
            "report": plain(reports)["lesions"] or None,
            "wish": self.wish, "num_lesions": self.num_lesions, "max_lesions": self.max_lesions,
            "writer": str(getattr(self.writer, "description", type(self.writer).__name__)),
            "seed": data["seed"], "affine": affine.tolist(), "spacing": self.spacing, "size": self.size,
            "organs": torch.bincount(organs.flatten().long()).tolist(),
            "label": torch.bincount(numbered.flatten().long()).tolist(),
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        path = None if self.output_dir is None else self.output_dir / f"{data['name']}_plan.json"
        if path is not None and path.is_file():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held.get("asked_sha256") == digest:
                return [Lesion.of(content) for content in held["lesions"]]
            logger.warning(f"{path} answers another question than is asked now: planned anew")
        lesions = self.lesions(data["seed"], reports, organs, numbered, grid, affine)
        if path is not None:
            write_json(path, {"asked_sha256": digest, "lesions": [lesion.plain() for lesion in lesions]})
        return lesions

    def lesions(
        self,
        seed: int,
        reports: Sequence[LesionReport],
        organs: Tensor,
        numbered: Tensor,
        grid: Grid,
        affine: np.ndarray,
    ) -> list[Lesion]:
        """Complete the reports and place the boxes."""
        rng = np.random.default_rng(seed)
        given, extents = int(numbered.max()), self.extents(organs, affine)
        lesions: list[Lesion] = []
        for index in range(given or len(reports) or self.num_lesions):
            own, place = (np.random.default_rng(seed) for seed in rng.integers(2**31, size=2))
            mask = numbered == index + 1 if given else None
            overlap = None if mask is None else overlap_of(organs, mask)
            if reports:
                wish = reports[index] if overlap is None else described(reports, overlap)
            else:
                wish = self.wished(overlap, extents, own)
            extent = np.minimum(
                extents.get(organ_id(wish.organ), np.inf), self.reach if wish.size_mm is None else np.inf
            )
            known = {"present": frozenset(extents), "extent_mm": extent.tolist()}
            report = self.writer(wish, seed=int(own.integers(2**31)), **known)
            if mask is None:
                lesions.append(self.placed(report, wish, organs, grid, affine, place, lesions))
            else:
                lesions.append(Lesion(report, self.fitting(box_of(mask, affine, grid), report), index + 1))
        return lesions

    @property
    def reach(self) -> np.ndarray:
        """What a lesion whose size is not said may measure (x, y, z): the crop must show what is around it."""
        return 0.7 * (np.array(self.size) * self.spacing)[::-1]

    def wished(
        self, overlap: Mapping[int, int] | None, present: Collection[int], rng: np.random.Generator
    ) -> LesionReport:
        """A report of what knobs ask for; an organ that they leave open is one that is there, and fits the rest."""
        wish = dict(self.wish)
        if overlap is not None and not overlap:
            raise CaseError("a lesion of the label lies in no organ of the organ map: say in a report what it is")
        if overlap is not None:
            wish["organ"] = organ_name(max(overlap, key=lambda number: overlap[number]))
        if "organ" not in wish and "lesion" in wish:
            homes = [name for name in map(organ_name, sorted(present)) if self.may_have(name, wish["lesion"])]
            if not homes:
                raise CaseError(f"no organ of this scan may have a {wish['lesion']!r}: name one, --organ")
            wish["organ"] = homes[int(rng.integers(len(homes)))]
        wish.setdefault("organ", draw_report(rng, present).organ)
        return read_reports({"lesions": [wish]}, "asked for by knobs")[0]

    @staticmethod
    def may_have(organ: str, lesion: str) -> bool:
        """Whether a kind of lesion is among those of an organ."""
        try:
            return lesion_kind(lesion, organ) in kinds_of(organ)
        except CaseError:
            return False

    def extents(self, organs: Tensor, affine: np.ndarray) -> dict[int, np.ndarray]:
        """Organs that are there -> their extent in mm along L-R, A-P, S-I."""
        axes = np.argsort(io_orientation(affine)[:, 0])
        spacing = affine_to_spacing(affine)
        found = ndimage.find_objects(np.asarray(organs[0]).astype(np.int32))
        boxes = {number: box for number, box in enumerate(found, start=1) if box is not None}
        return {n: np.array([(box[a].stop - box[a].start) * spacing[a] for a in axes]) for n, box in boxes.items()}

    def placed(
        self,
        report: LesionReport,
        wish: LesionReport,
        organs: Tensor,
        grid: Grid,
        affine: np.ndarray,
        rng: np.random.Generator,
        others: Sequence[Lesion],
    ) -> Lesion:
        """A box in the report's organ, apart from others'; a size that nobody asked for shrinks until it fits."""
        free = wish.size_mm is None or wish.source == "rules"
        for _ in range(SHRINKINGS if free else 0):
            try:
                return Lesion(report, self.place(report, organs, grid, affine, rng, others))
            except CaseError:
                x, y, z = (round(0.8 * n, 1) for n in report.size_mm or (0, 0, 0))
                report = replace(report, size_mm=(x, y, z))
        return Lesion(report, self.place(report, organs, grid, affine, rng, others))

    def place(
        self,
        report: LesionReport,
        organs: Tensor,
        grid: Grid,
        affine: np.ndarray,
        rng: np.random.Generator,
        others: Sequence[Lesion],
    ) -> Box:
        """A box of the report's size in its organ."""
        mask = np.isin(np.asarray(organs[0]), [organ_id(name) for name in report.organs or (report.organ,)])
        if not mask.any():
            raise CaseError(f"{report.organ} is not in the organ map: choose an organ that is, or mend the map")
        size = box_size(report.size_mm or (0, 0, 0), self.spacing)
        start, extent = cover(mask, affine, grid)
        # A box may protrude from the organ, but not leave the scan.
        low = [max(0, a - n) for a, n in zip(start, size)]
        high = [min(g, a + e + n) for g, a, e, n in zip(grid.shape, start, extent, size)]
        around = grid.crop(low, [h - a for a, h in zip(low, high)])
        organ = np.asarray(resample(torch.from_numpy(mask)[None].to(torch.uint8), affine, around, "nearest")[0]) > 0
        wall = max(1, round(WALL_MM / float(np.mean(self.spacing))))
        told: dict[str, Any] = {"hollow": is_hollow(report.organ), "cavity": cavity_of(report)}
        told |= {"location": report.location, "name": report.organ}
        for _ in range(PLACES):
            box = place_box(organ, size, rng=rng, limit=self.size, wall=wall, **told).moved(low)
            if not any(_touch(box, other.box) for other in others):
                return box
        raise CaseError(f"{report.organ}: no room for another lesion of {size} voxels: ask for fewer or smaller ones")

    def fitting(self, box: Box, report: LesionReport) -> Box:
        """A given lesion must fit into what the networks see."""
        if any(n > limit for n, limit in zip(box.size, self.size)):
            most = [round(n * s) for n, s in zip(self.size, self.spacing)]
            raise CaseError(
                f"the lesion in {report.organ} has {box.size} voxels (S, A, L), at most {most} mm fit: cut it"
            )
        return box


def _touch(a: Box, b: Box) -> bool:
    return all(x < y + n + 1 and y < x + m + 1 for x, m, y, n in zip(a.start, a.size, b.start, b.size))


class SplitLesiond(Transform):
    """What `lesion_sampler.LesionSampler` gives, as files have it: ``pred_image``, ``pred_label``, and ``record``.

    A CT of whole numbers stays one, so that the voxels which no lesion touched are the file's, bit for bit.
    """

    def __call__(self, data: Data) -> dict:
        """Split ``pred`` (2, *S), give both parts the place of ``image``, and tell what was made."""
        data = dict(data)
        pred, source = torch.as_tensor(data["pred"]).float().cpu(), MetaTensor(data["image"])
        whole = torch.equal(original := torch.as_tensor(source[:1]).cpu(), original.round())
        image = pred[:1].round().to(torch.int16) if whole else pred[:1]
        meta = {
            "affine": source.affine.cpu(),
            **{k: v for k, v in source.meta.items() if k in ("filename_or_obj", "space")},
        }
        data["pred_image"] = MetaTensor(image, meta=meta)
        data["pred_label"] = MetaTensor(pred[1:2].to(torch.uint8), meta=meta)
        lesions = json.loads(data["plan"])["lesions"]
        data["record"] = {"reports": [{**lesion["report"], "box": lesion["box"]} for lesion in lesions]}
        return data


# ---------------------------------------------------------------------------------------------------------------------
# For training


class LesionCropd(Transform):
    """Crops a loaded case around its largest lesion, on the working grid, with all that is known there.

    Adds ``crop`` (1, *size), the CT in [0, 1]; ``lesions``, all of them, and ``lesion``, the largest; ``organs`` / 104;
    ``target``, the report's organs; ``box``, the lesion's; ``context`` (L, D), the report's attributes encoded.

    Args:
        size: voxels (S, A, L).
        spacing: mm along S, A, L.
        contexts: text -> vector (D,).
        num_tokens: rows of the context; None gives as many as there are attributes.
        told: whose attributes: ``"mask"`` (LMNet) or ``"image"`` (LINet).
    """

    def __init__(
        self,
        size: Sequence[int],
        spacing: Sequence[float],
        contexts: Callable[[str], Tensor],
        num_tokens: int | None = 10,
        told: str = "image",
    ) -> None:
        if told not in TEXTS:
            raise ValueError(f"told must be one of {', '.join(TEXTS)}, got {told!r}")
        self.size, self.spacing = tuple(size), tuple(spacing)
        self.contexts, self.num_tokens, self.told = contexts, num_tokens, told

    def __call__(self, data: Data) -> dict:
        """Crop."""
        image, organs = MetaTensor(data["image"]), torch.as_tensor(data["organs"])
        affine = np.asarray(image.affine)
        every = (torch.as_tensor(data["label"]) == LESION).to(torch.uint8)
        if not every.any():
            raise CaseError(f"the label of case {data.get('name', '')} holds no lesion (value 2): leave the case out")
        (largest,) = components(np.asarray(every[0]) > 0, 1)
        lesion = torch.from_numpy(largest.in_volume(every.shape[1:]))[None].to(torch.uint8)
        grid = working_grid(image.shape[1:], affine, self.spacing)
        box = box_of(lesion, affine, grid)
        start = crop_start(box.centre, self.size, grid.shape)
        crop = grid.crop(start, self.size)
        seen = {k: resample(v, affine, crop, "nearest") for k, v in (("lesions", every), ("lesion", lesion))}
        there = resample(organs, affine, crop, "nearest")
        report = described(read_reports(data["report"], str(data.get("name", ""))), overlap_of(organs, lesion))
        organ = target_organ(np.asarray(there[0]), Lesion(report, box).organs, np.asarray(seen["lesion"][0]) > 0)
        return {
            **{k: v for k, v in data.items() if k in ("name", "seed")},
            "crop": to_unit(resample(torch.as_tensor(image), affine, crop, "linear", AIR)),
            **{k: v.float() for k, v in seen.items()},
            "organs": there.float() / 104,
            "target": torch.from_numpy(organ)[None].float(),
            "box": torch.from_numpy(box.moved([-a for a in start]).mask(self.size))[None].float(),
            "context": contexts_of(TEXTS[self.told](report), self.contexts, self.num_tokens),
        }


class MaskStated(Transform):
    """What LMNet learns from a crop: the lesion's mask, given the organs, the target organ and the box.

    Args:
        mask_range: values of background and lesion (published: 0 and 1).
    """

    def __init__(self, mask_range: Sequence[float] = (0.0, 1.0)) -> None:
        self.low, self.high = mask_range

    def __call__(self, data: Mapping[str, Any]) -> dict:
        """Add ``image``, ``condition`` and ``mask``, where the loss looks."""
        image = self.low + (self.high - self.low) * data["lesion"]
        condition = torch.cat([data["organs"], data["target"], data["box"]])
        return {**data, "image": image, "condition": condition, "mask": data["box"]}


def on_latents(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask (B, 1, *S) on the grid of latents, by the nearest, as published; one it would lose keeps a voxel."""
    small = torch.nn.functional.interpolate(mask.float(), tuple(shape))
    lost = ~small.flatten(1).any(dim=1)
    if lost.any():
        small[lost] = torch.nn.functional.adaptive_max_pool3d(mask[lost].float(), tuple(shape))
    return small


class PaintStated(Transform):
    """What LINet learns from a crop: its latents inside the lesions, given those outside.

    Args:
        latents: the space of latents.
        device: where its autoencoder lies.
    """

    def __init__(self, latents: CodeSpace, device: str | torch.device = "cpu") -> None:
        self.latents = latents
        self.device = device

    def __call__(self, data: Mapping[str, Any]) -> dict:
        """Add ``image``, the latents; ``condition`` and ``mask``, the lesions on their grid."""
        image = self.latents.encode(data["crop"][None].to(self.device))[0].cpu()
        mask = on_latents(data["lesions"][None], image.shape[1:])[0]
        return {**data, "image": image, "condition": mask, "mask": mask}
