"""Masks from asked statistics: a reverse chain for each part of a mask, then one mask of them.

Controllable Mask Diffusion (Heo & Jung 2025, https://doi.org/10.1016/j.compbiomed.2025.110807) draws every lesion by
itself and adds the results. We draw all parts of all masks in one batch, keep of each the component that was asked for,
and draw a part again that missed what was asked or touches its neighbour.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor
from scipy import ndimage

from .conditioning import Network
from .io import case_seed
from .sampler import DiffusionSampler
from .semantics import components, measure

logger = logging.getLogger(__name__)

Part = tuple[int, int]
"""Number of the mask in the batch, number of the part in the mask."""
EIGHT = np.ones((3, 3), dtype=bool)


class AddedMaskSampler(DiffusionSampler):
    """As published: each part is a chain of its own; the results are added and cut at the threshold.

    Args:
        scheduler: as in `DiffusionSampler`.
        num_inference_steps: as in `DiffusionSampler`.
        image_size: size (H, W) of a mask.
        intensities: values of background and foreground in the diffusion.
        max_chains: most chains in one network call.
        kwargs: as in `DiffusionSampler`; ``channels`` is the number of classes K.
    """

    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int,
        *,
        image_size: Sequence[int],
        intensities: Sequence[float] = (-1.0, 1.0),
        max_chains: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(scheduler, num_inference_steps, latent_shape=image_size, **kwargs)
        self.image_size = tuple(image_size)
        self.low, self.high = intensities
        self.max_chains = max_chains

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: Network, *, seeds: Sequence[int] | torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Draw one mask for each case of the batch.

        Args:
            inputs: statistics of each part of each mask (B, P, 3 K) as `semantics.conditions` writes them; rows of NaN
                stand for parts a mask does not have.
            network: predicts from ``(x_t, timesteps, context=statistics)``.
            seeds: one for each mask.

        Returns:
            ``mask`` (B, K, H, W) in {0, 1}, ``tries`` (B,) and ``accepted`` (B,): whether all is as asked.
        """
        inputs = convert_to_tensor(inputs)
        cases = list(range(self.seed, self.seed + len(inputs))) if seeds is None else [int(s) for s in seeds]
        parts = [(b, p) for b, rows in enumerate(inputs) for p, row in enumerate(rows) if not row.isnan().all()]
        return self.masks(inputs, parts, network, cases)

    def draw(
        self, inputs: torch.Tensor, parts: Sequence[Part], network: Network, seeds: Sequence[int], attempt: int = 0
    ) -> torch.Tensor:
        """Run the chains of some parts -> (len(parts), K, H, W), 0 background, 1 foreground, not yet cut.

        A part's draw depends on its mask's seed, its number and the attempt, not on what else is in the batch.
        """
        drawn = []
        for start in range(0, len(parts), self.max_chains):
            chunk = parts[start : start + self.max_chains]
            conditions = torch.stack([inputs[part] for part in chunk])
            own = [case_seed(seeds[b], f"{p}/{attempt}") for b, p in chunk]
            drawn.append(super().__call__(conditions, network, seeds=own))
        return (torch.cat(drawn).cpu() - self.low) / (self.high - self.low)

    def masks(
        self, inputs: torch.Tensor, parts: Sequence[Part], network: Network, seeds: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Add the chains of each mask."""
        total = torch.zeros(len(inputs), self.channels, *self.image_size)
        for (b, _), drawn in zip(parts, self.draw(inputs, parts, network, seeds), strict=True):
            total[b] += drawn
        ones = torch.ones(len(inputs))
        return {"mask": (total >= 0.5).float(), "tries": ones, "accepted": ones}


class CheckedMaskSampler(AddedMaskSampler):
    """Ours: of each part only what was asked for stays, parts do not touch, and a part that missed is drawn again.

    Args:
        scheduler: as in `DiffusionSampler`.
        num_inference_steps: as in `DiffusionSampler`.
        min_size: components of fewer pixels are speckle.
        size_tolerance: accepted relative error of a size.
        centre_tolerance: accepted distance of a centre from the asked one, as a fraction of the image.
        max_tries: most draws of a part; then the best stays, and a warning says so.
        null: statistic of a class that the part does not have.
        kwargs: as in `AddedMaskSampler`.
    """

    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int,
        *,
        min_size: int = 10,
        size_tolerance: float = 0.25,
        centre_tolerance: float = 0.05,
        max_tries: int = 4,
        null: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(scheduler, num_inference_steps, **kwargs)
        if max_tries < 1 or size_tolerance <= 0 or centre_tolerance <= 0:
            raise ValueError(
                f"max_tries ({max_tries}) and tolerances ({size_tolerance}, {centre_tolerance}) must be > 0"
            )
        self.min_size = min_size
        self.size_tolerance = size_tolerance
        self.centre_tolerance = centre_tolerance
        self.max_tries = max_tries
        self.null = null

    def masks(
        self, inputs: torch.Tensor, parts: Sequence[Part], network: Network, seeds: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Draw, check, draw again what missed."""
        candidates: dict[Part, list[tuple[float, np.ndarray]]] = {part: [] for part in parts}
        tries = torch.zeros(len(inputs))
        pending, result = list(parts), np.zeros((len(inputs), self.channels, *self.image_size), dtype=bool)
        for attempt in range(self.max_tries):
            for part, drawn in zip(pending, self.draw(inputs, pending, network, seeds, attempt), strict=True):
                candidates[part].append(self.asked_for(drawn.numpy(), inputs[part].cpu().numpy()))
                tries[part[0]] = attempt + 1
            result, pending = self.compose(candidates, result.shape)
            if not pending:
                break
        missed = sorted({b for b, _ in pending})
        if missed:
            logger.warning(f"{len(missed)} of {len(inputs)} masks miss what was asked after {self.max_tries} draws")
        accepted = torch.tensor([b not in missed for b in range(len(inputs))])
        return {"mask": torch.from_numpy(result).float(), "tries": tries, "accepted": accepted.float()}

    def asked_for(self, drawn: np.ndarray, statistics: np.ndarray) -> tuple[float, np.ndarray]:
        """What of a drawn part (K, H, W) was asked for, and its error in units of the tolerances (<= 1 is a hit)."""
        inside = (drawn >= 0.5) & (drawn == drawn.max(axis=0))
        kept, error = np.zeros_like(inside), 0.0
        for k, size in enumerate(statistics[: len(drawn)]):
            if size == self.null:
                continue
            labelled, rows = components(inside[k], self.min_size)
            if not len(rows):
                return float("inf"), kept
            # Of several components the one nearest to the asked place.
            distance = np.hypot(*(rows[:, 1:] / self.image_size[::-1] - statistics[len(drawn) + 2 * k :][:2]).T)
            nearest = int(distance.argmin())
            kept[k] = labelled == nearest + 1
            relative = abs(rows[nearest, 0] / inside[k].size - size) / size
            error = max(error, relative / self.size_tolerance, distance[nearest] / self.centre_tolerance)
        return float(error), kept

    @staticmethod
    def compose(
        candidates: dict[Part, list[tuple[float, np.ndarray]]], shape: Sequence[int]
    ) -> tuple[np.ndarray, list[Part]]:
        """Lay the best draws together, large parts first -> masks (B, K, H, W), parts to draw again."""
        result, again = np.zeros(shape, dtype=bool), []
        for (b, p), draws in sorted(candidates.items(), key=lambda item: item[0]):
            rim = np.stack([ndimage.binary_dilation(mask, EIGHT) for mask in result[b]])
            touching, error, best = min((bool((rim & mask).any()), error, i) for i, (error, mask) in enumerate(draws))
            if touching or error > 1:
                again.append((b, p))
            result[b] |= draws[best][1]
        return result, again


class RecordMaskd(MapTransform):
    """Measures a finished mask (K, H, W), for the side-car: what was achieved beside how often it was drawn.

    Args:
        key: mask in {0, 1}.
        output: where the record goes, a dict in plain JSON.
        labels: values of the K classes.
        min_size: components of fewer pixels are not counted.
    """

    def __init__(self, key: str = "mask", output: str = "record", *, labels: Sequence[int], min_size: int) -> None:
        super().__init__(key)
        self.output = output
        self.labels = list(labels)
        self.min_size = min_size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        """Add the record."""
        mask = np.asarray(data[self.keys[0]]) > 0
        # Where classes overlap the later one is painted over the others (`FromMaskd`).
        seen = mask & (np.cumsum(mask[::-1], axis=0)[::-1] == 1)
        achieved = [asdict(lesion) for lesion in measure(seen, self.labels, self.min_size)]
        record = {"achieved": achieved, "tries": int(data["tries"]), "accepted": bool(data["accepted"])}
        return {**data, self.output: record}
