"""From a planned lesion to a painted one: mask in the box (LMNet), image in the mask (LINet), crop by crop.

Several lesions are made one after the other, so that later ones see earlier ones (Tian et al., arXiv 2503.00741). Only
crops are ever encoded and decoded, and of a crop only the lesion with a feathered rim reaches the CT: the published
code replaces the whole scan by its reconstruction, in which no reader finds the lesion.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor
from tqdm import tqdm

from .codebook import CodeSpace
from .conditioning import Network
from .io import case_seed
from .lesion_boxes import LESION, Box, LesionMask, binarise, least_voxels, plausible_fill, target_organ
from .lesion_geometry import AIR, Grid, crop_start, feather, paste, paste_labels, resample, to_hu, to_unit, working_grid
from .lesion_plan import Lesion, on_latents
from .lesion_reports import LesionReport, cavity_of, image_texts, mask_texts
from .lesion_words import INSIDE, MARGIN
from .text import contexts_of

logger = logging.getLogger(__name__)


FADING, SHARP = (
    ("ill-defined", "unclear", "irregularity", "poorly"),
    ("well-defined", "clear serosal", "clear boundary"),
)
SCANNER = (-1024.0, 3071.0)  # HU of a scanner's 12 bits, which a change on top of noise may not leave


class LesionSampler(Inferer):
    """Makes the planned lesions of a CT.

    Args:
        mask_sampler: draws a mask from its condition; called with ``context`` and ``seeds``.
        mask_network: LMNet; LINet is the engine's network.
        painter: draws latents from clean latents and mask.
        latents: the space of latents.
        contexts: text -> vector (D,).
        spacing: of the working grid, mm along S, A, L.
        mask_size: voxels of LMNet's crop.
        image_size: voxels of LINet's crop.
        mask_range: as LMNet was trained.
        num_tokens: rows of a context; None gives as many as there are attributes.
        tries: masks drawn for a lesion until one is accepted; else the fullest of them counts.
        rim: voxels around the lesion over which it fades into the CT; one more or fewer by the words for its margin.
        seed: of a case without one.
        verbose: show a progress bar, on a terminal.
    """

    def __init__(
        self,
        mask_sampler: Inferer,
        mask_network: Network,
        painter: Inferer,
        latents: CodeSpace,
        contexts: Callable[[str], Tensor],
        *,
        spacing: Sequence[float],
        mask_size: Sequence[int],
        image_size: Sequence[int],
        mask_range: Sequence[float] = (0.0, 1.0),
        num_tokens: int | None = 10,
        tries: int = 3,
        rim: int = 2,
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        self.mask_sampler, self.mask_network = mask_sampler, mask_network
        self.painter, self.latents, self.contexts = painter, latents, contexts
        self.spacing, self.mask_size, self.image_size = tuple(spacing), tuple(mask_size), tuple(image_size)
        self.low, self.high = mask_range
        self.num_tokens, self.tries, self.rim, self.seed = num_tokens, tries, rim, seed
        self.quiet = None if verbose else True

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Network,
        *,
        plans: Sequence[str] | None = None,
        seeds: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Make the lesions of each case.

        Args:
            inputs: CT in HU, organ map, numbered lesions that are given (B, 3, *S), as `PlanLesionsd` leaves them.
            network: LINet.
            plans: of each case; None takes what `PlanLesionsd` wrote on the image itself.
            seeds: one for each case.

        Returns:
            CT with its lesions, and label (0, 1 organ, 2 lesion), (B, 2, *S).
        """
        if plans is None:
            held: Any = getattr(inputs, "meta", {}).get("plan")
            plans = [held] * len(inputs) if isinstance(held, str) else held
            if plans is None:
                raise ValueError("no plan came with the image: preprocess it with PlanLesionsd, or give plans")
        seeds = range(self.seed, self.seed + len(inputs)) if seeds is None else [int(s) for s in seeds]
        volumes = convert_to_tensor(inputs)
        return torch.stack([self.one(v, json.loads(p), s, network) for v, p, s in zip(volumes, plans, seeds)])

    def one(self, volume: Tensor, plan: dict[str, Any], seed: int, network: Network) -> Tensor:
        """Make the lesions of one case (3, *S) -> (2, *S)."""
        image, organs, given = (volume[k : k + 1] for k in range(3))
        affine = np.array(plan["affine"])
        grid = working_grid(image.shape[1:], affine, self.spacing)
        lesions = [Lesion.of(content) for content in plan["lesions"]]
        label = torch.zeros_like(organs, dtype=torch.uint8)
        for lesion in lesions:
            label[torch.isin(organs, torch.tensor(lesion.organs).to(organs))] = 1
        for index, lesion in enumerate(tqdm(lesions, desc="lesions", disable=self.quiet, leave=False)):
            own = case_seed(seed, str(index))
            if lesion.number:
                mine = given == lesion.number
                label[mine] = LESION
                crop, mask = self.shown(mine, affine, lesion.box, grid)
            else:
                start, drawn = self.draw(lesion, organs, label, affine, grid, own)
                own_grid, box = grid.crop(start, self.mask_size), Box.of(drawn).moved(start)
                crop, mask = self.shown(torch.from_numpy(drawn)[None], own_grid.affine, box, grid)
                label = paste_labels(label, affine, mask, crop, LESION)
            image = self.paint(lesion, image, mask, affine, crop, own, network)
        return torch.cat([image.float(), label.to(image).float()])

    def shown(self, mask: Tensor, affine: np.ndarray, box: Box, grid: Grid) -> tuple[Grid, Tensor]:
        """LINet's crop around a lesion's box, and the lesion's mask (1, *S), which lies on any grid, in it."""
        crop = grid.crop(crop_start(box.centre, self.image_size, grid.shape), self.image_size)
        return crop, resample(mask.to(torch.uint8), affine, crop, "nearest").float()

    def draw(
        self, lesion: Lesion, organs: Tensor, label: Tensor, affine: np.ndarray, grid: Grid, seed: int
    ) -> tuple[tuple[int, ...], np.ndarray]:
        """A mask in the lesion's box (LMNet) -> start of its crop in the working grid, mask (*mask_size)."""
        start = crop_start(lesion.box.centre, self.mask_size, grid.shape)
        crop = grid.crop(start, self.mask_size)
        there = resample(organs, affine, crop, "nearest")
        earlier = resample(label, affine, crop, "nearest")[0] == LESION
        box = lesion.box.moved([-a for a in start])
        inside = box.mask(self.mask_size)
        organ = target_organ(there[0].cpu().numpy(), lesion.organs, inside)
        shown = torch.from_numpy(np.stack([organ, inside])).to(there)
        condition = torch.cat([there / 104, shown]).float()[None]
        context = contexts_of(mask_texts(lesion.report), self.contexts, self.num_tokens)[None].to(condition)
        allowed = ~earlier.cpu().numpy()
        if cavity_of(lesion.report) == INSIDE:
            allowed &= organ
        aim: dict[str, Any] = {
            "fill": plausible_fill(lesion.report.attributes.get("shape", "")),
            "least": least_voxels(self.spacing, "stone" in lesion.report.lesion),
        }
        best: LesionMask | None = None
        soft = np.zeros(self.mask_size)
        for attempt in range(self.tries):
            own = seed + attempt
            soft = self.mask_sampler(condition, self.mask_network, context=context, seeds=[own])[0, 0]
            soft = (soft.float().cpu().numpy() - self.low) / (self.high - self.low)
            found = binarise(soft, box, allowed=allowed, **aim)
            if best is None or found.voxels > best.voxels:
                best = found
            if found.accepted:
                break
        if best is not None and best.mask.any():
            return start, best.mask
        # Nothing rose above any threshold: what rose most, where it may be.
        logger.warning(f"{lesion.report.organ}: no mask stood out in {self.tries} tries, the highest values are taken")
        room = inside & allowed if (inside & allowed).any() else inside
        least = np.sort(soft[room])[-max(1, round(aim["fill"] * int(room.sum())))]
        return start, room & (soft >= least)

    def paint(
        self, lesion: Lesion, image: Tensor, mask: Tensor, affine: np.ndarray, crop: Grid, seed: int, network: Network
    ) -> Tensor:
        """Paint the lesion into its mask (LINet) and put it into the CT."""
        clean = to_unit(resample(image, affine, crop, "linear", AIR))[None]
        z_0 = self.latents.encode(clean)
        where = on_latents(mask[None], z_0.shape[2:]).to(z_0)
        context = contexts_of(image_texts(lesion.report), self.contexts, self.num_tokens)[None].to(z_0)
        z = self.painter(torch.cat([z_0, where], dim=1), network, context=context, seeds=[seed])
        made = to_hu(self.latents.decode(z)[0].float())
        weight = feather(mask, max(1, self.rim + blur(lesion.report))).to(made)
        pasted = paste(image, affine, made, weight, crop)
        return torch.where(pasted == image, image, pasted.clamp(*SCANNER))


def blur(report: LesionReport) -> int:
    """Voxels by which the rim of a lesion is wider than usual, as its margin is described: 1, 0 or -1.

    At the starter's voxels the painter cannot show a margin, which is half a voxel wide.

    Example:
        >>> blur(LesionReport("liver", attributes={"surface characteristics": "ill-defined margin"}))
        1
    """
    words = report.attributes.get(MARGIN, "")
    fades = any(word in words for word in FADING)
    return int(fades) - int(not fades and any(word in words for word in SHARP))
