"""GuideGen's second stage: a CT volume slice by slice, each drawn from the one before it and its slice of the labels.

A slice lives in the space the diffusion runs in, pixels or an autoencoder's latents, and stays there: what the next
one is told is the state that was drawn, not its decoded picture encoded anew. A state of zeros stands for "no slice
before". Slices of one volume follow each other; volumes of a batch go side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from monai.inferers import Inferer
from monai.networks import one_hot
from monai.networks.utils import pixelunshuffle
from monai.transforms import Randomizable, Transform
from monai.utils import convert_to_tensor
from torch import Tensor
from tqdm import tqdm

from .autoencoder import LatentSpace
from .io import case_seed
from .sampler import DiffusionSampler
from .schedules import CaseNoise


class SliceCondition(Protocol):
    """What the network is told about a slice."""

    def __call__(self, previous: Tensor, layout: Tensor) -> Tensor:
        """Of the state before (B, C, *s) and the slice's labels (B, 1, *S) make further channels (B, D, *s)."""
        ...


class PlanesCondition:
    """The state before, and a plane for each class; where states are smaller than labels, planes are folded to them.

    Args:
        num_classes: K.
        factor: side of the patch of labels that belongs to one entry of a state; D is C + K factor^2.
    """

    def __init__(self, num_classes: int, factor: int = 1) -> None:
        self.num_classes = num_classes
        self.factor = factor

    def __call__(self, previous: Tensor, layout: Tensor) -> Tensor:
        """Join them (B, C + K factor^2, *s)."""
        planes = one_hot(layout, self.num_classes)
        planes = planes if self.factor == 1 else pixelunshuffle(planes, layout.ndim - 2, self.factor)
        return torch.cat([previous, planes.to(previous)], dim=1)


class GreyCondition:
    """The slice before and labels / 255 as a shade of grey, as published: nearly invisible, and ordered."""

    def __call__(self, previous: Tensor, layout: Tensor) -> Tensor:
        """Join them (B, C + 1, *S)."""
        return torch.cat([previous, layout.to(previous) / 255], dim=1)


class EncodedCondition:
    """`GreyCondition` in the latents of an autoencoder of its own, as in the published latent variant.

    Args:
        latents: space of the diffusion; previous states are decoded from it.
        pairs: space of the condition's autoencoder, of two channels; its mean is taken.
    """

    def __init__(self, latents: LatentSpace, pairs: LatentSpace) -> None:
        self.latents = latents
        self.pairs = pairs
        self.grey = GreyCondition()

    def __call__(self, previous: Tensor, layout: Tensor) -> Tensor:
        """Encode (B, z, *s)."""
        # No slice before is an empty one, not what the decoder makes of zeros.
        there = previous.flatten(1).any(dim=1).view(-1, *[1] * (previous.ndim - 1))
        return self.pairs.moments(self.grey(torch.where(there, self.latents.decode(previous), 0), layout))[0]


class SliceSampler(Inferer):
    """Draws volumes from label maps, slice by slice upwards, for all cases of a batch at once.

    A slice draws from a seed made of its case's and its place: neither the batch nor what lies elsewhere matters.

    Args:
        sampler: draws one slice of each case, in the diffusion's space.
        condition: what the network is told about a slice.
        decode: states -> slices; None when diffusion runs on pixels.
        outside: value of slices without labels.
        lead: slices below the first one with labels that are drawn as well (published: 1).
        rescale: applied to each drawn batch before it counts, e.g. `to_unit_range`.
        chunk: slices decoded at once.
        verbose: show a progress bar over slices, on a terminal.
    """

    def __init__(
        self,
        sampler: DiffusionSampler,
        condition: SliceCondition,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        outside: float = -1.0,
        lead: int = 0,
        rescale: Callable[[Tensor], Tensor] | None = None,
        chunk: int = 16,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.condition = condition
        self.decode = decode
        self.outside = outside
        self.lead = lead
        self.rescale = rescale
        self.chunk = chunk
        self.quiet = None if verbose else True  # None: tqdm shows the bar on a terminal only

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Callable[..., Tensor],
        *,
        seeds: Sequence[int] | Tensor | None = None,
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Draw volumes (B, C, X, Y, Z) for label maps (B, 1, X, Y, Z).

        Args:
            inputs: the label maps; slices that are all 0 below the first and above the last labelled one stay empty.
            network: predicts from ``(x_t, timesteps)``, the condition's channels behind the state's.
            seeds: one for each case; without them the sampler's ``seed + b``.
            noise: source of all draws, ``noise(like) -> tensor``; it takes the place of the seeds.
        """
        layout = convert_to_tensor(inputs)
        if layout.ndim != 5 or layout.shape[1] != 1:
            raise ValueError(f"expected label maps (B, 1, X, Y, Z), got {tuple(layout.shape)}")
        cases = range(self.sampler.seed, self.sampler.seed + len(layout)) if seeds is None else [int(s) for s in seeds]
        if len(cases) != len(layout):
            raise ValueError(f"SliceSampler has {len(cases)} seeds for {len(layout)} cases: give each case one")
        drawn = self.due(layout)
        states: dict[int, tuple[Tensor, Tensor]] = {}  # of each slice: the cases that have it, and what was drawn
        previous: Tensor | None = None
        bar = tqdm(range(layout.shape[-1]), desc="slices", unit="slice", disable=self.quiet, leave=False)
        for z in (z for z in bar if drawn[:, z].any()):
            rows = drawn[:, z].nonzero()[:, 0]
            labels = layout[rows, ..., z]
            if previous is None:
                previous = self.nothing(labels[:1]).repeat(len(layout), 1, 1, 1)
            source = noise or CaseNoise([slice_seed(cases[int(row)], z) for row in rows])
            told = self.condition(previous[rows], labels)
            state = self.sampler(told, network, noise=source)
            state = state if self.rescale is None else self.rescale(state)
            previous[rows] = state
            states[z] = (rows, state)
        return self.assemble(layout, states)

    def due(self, layout: Tensor) -> Tensor:
        """Which slices of which case are drawn (B, Z): from the first labelled one to the last."""
        there = layout.flatten(1, 3).any(dim=1)
        here, places = there.int(), torch.arange(there.shape[1], device=there.device)
        first, last = here.argmax(dim=1), there.shape[1] - 1 - here.flip(1).argmax(dim=1)
        return (
            (places >= (first - self.lead)[:, None]) & (places <= last[:, None]) & there.any(dim=1, keepdim=True)
        ).cpu()

    def nothing(self, labels: Tensor) -> Tensor:
        """The state that stands for no slice (B, C, *s)."""
        shape = tuple(self.sampler.latent_shape or labels.shape[2:])
        return torch.zeros(len(labels), self.sampler.channels, *shape, device=labels.device)

    def assemble(self, layout: Tensor, states: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """Volumes of the drawn states, decoded in chunks, the rest filled up."""
        if not states:
            return torch.full_like(layout, self.outside, dtype=torch.float32)
        order = [(int(row), z) for z, (rows, _) in states.items() for row in rows]
        flat = torch.cat([state for _, state in states.values()])
        slices = flat if self.decode is None else torch.cat([self.decode(part) for part in flat.split(self.chunk)])
        volume = slices.new_full((len(layout), slices.shape[1], *layout.shape[2:]), self.outside)
        for (row, z), picture in zip(order, slices, strict=True):
            volume[row, ..., z] = picture
        return volume.float()


def slice_seed(seed: int, z: int) -> int:
    """Seed of a slice of a case."""
    return case_seed(int(seed), str(z))


def to_unit_range(slices: Tensor) -> Tensor:
    """Stretch a whole batch to [0, 1], as the published sampler does: HU are lost, and cases depend on each other."""
    return (slices - slices.min()) / (slices.max() - slices.min())


class SliceMomentsd(Transform):
    """Adds ``mean`` and ``std`` (z, *s, Z), the latents of a volume's slices: encoded once, whoever caches the case.

    Args:
        key: volume (1, X, Y, Z).
        latents: the latent space.
        device: where its autoencoder lies.
        chunk: slices encoded at once.
    """

    def __init__(self, key: str, latents: LatentSpace, device: str | torch.device = "cpu", chunk: int = 16) -> None:
        self.key = key
        self.latents = latents
        self.device = device
        self.chunk = chunk

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        """Encode."""
        slices = convert_to_tensor(data[self.key]).movedim(-1, 0).split(self.chunk)
        moments = [self.latents.moments(part.to(self.device)) for part in slices]
        mean, std = (torch.cat(parts).movedim(0, -1).cpu() for parts in zip(*moments, strict=True))
        return {**data, "mean": mean, "std": std}


class RandSlicesd(Transform, Randomizable):
    """Picks labelled slices of a case, each with the slice before it as ``previous``, for training.

    Args:
        keys: volumes (C, *S, Z), e.g. "image" and "layout", or "mean", "std" and "layout".
        of: the one whose slice before is the condition.
        num_slices: how many; a case with fewer gives some twice. None gives all, in order, with nothing drawn.
        blank: probability that a slice is shown none before it, as the first one of a volume is.
        layout: key of the label map.
    """

    def __init__(
        self, keys: Sequence[str], of: str, num_slices: int | None = 1, blank: float = 0.0, layout: str = "layout"
    ) -> None:
        if num_slices is not None and num_slices < 1:
            raise ValueError(f"num_slices must be at least 1, or None for all, got {num_slices}")
        self.keys = tuple(keys)
        self.of = of
        self.num_slices = num_slices
        self.blank = blank
        self.layout = layout
        self.chosen: list[tuple[int, bool]] = []

    def randomize(self, places: Any = None) -> None:
        """Draw slices, and which of them are shown none before."""
        if self.num_slices is None:
            self.chosen = [(int(z), False) for z in places]
            return
        drawn = self.R.choice(places, self.num_slices, replace=len(places) < self.num_slices)
        self.chosen = [(int(z), bool(self.R.rand() < self.blank)) for z in drawn]

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict]:
        """Return a case for each slice."""
        volumes: dict[Hashable, Any] = {key: convert_to_tensor(data[key]) for key in self.keys}
        labelled = np.flatnonzero(convert_to_tensor(data[self.layout]).flatten(0, -2).any(dim=0).cpu())
        if not len(labelled):
            raise ValueError(f"case {data.get('name', '')}: {self.layout} is all background, no slice to learn")
        self.randomize(np.arange(labelled[0], labelled[-1] + 1))
        rest = {k: v for k, v in data.items() if k not in volumes}
        return [
            {**rest, **{k: v[..., z] for k, v in volumes.items()}, "previous": self.before(volumes, z, blank)}
            for z, blank in self.chosen
        ]

    def before(self, volumes: Mapping[Hashable, Tensor], z: int, blank: bool) -> Tensor:
        """The slice below, zeros if there is none."""
        source = volumes[self.of]
        return torch.zeros_like(source[..., 0]) if blank or z == 0 else source[..., z - 1]


class SliceConditiond(Transform):
    """Makes a slice's ``condition`` of its ``previous`` and ``layout``.

    Args:
        condition: what the network is told about a slice.
    """

    def __init__(self, condition: SliceCondition) -> None:
        self.condition = condition

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        """Add it."""
        told = self.condition(convert_to_tensor(data["previous"])[None], convert_to_tensor(data["layout"])[None])
        return {**data, "condition": told[0]}


class LabelsToGrid:
    """Brings drawn label maps to the grid of the images, for `sampler.CascadeSampler`.

    Args:
        size: *S of the images.
    """

    def __init__(self, size: Sequence[int]) -> None:
        self.size = tuple(size)

    def __call__(self, drawn: Tensor) -> Tensor:
        """Labels (B, 1, *S) by the nearest; probabilities (B, K, *s) smoothly, and then the likeliest class."""
        if drawn.shape[1] == 1:
            return torch.nn.functional.interpolate(drawn, self.size, mode="nearest-exact")
        mode = "bilinear" if drawn.ndim == 4 else "trilinear"
        return torch.nn.functional.interpolate(drawn, self.size, mode=mode).argmax(dim=1, keepdim=True).to(drawn)
