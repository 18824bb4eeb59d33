"""GuideGen measured: categorical diffusion against tables of K x K, its networks, and both stages in fewer calls.

The plain form of the categorical work is what the equations at the head of `common.categorical` say word for word, and
what was published: planes for labels, and for each voxel the posterior of every x_0.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.inferers import Inferer
from monai.networks import one_hot
from monai.transforms import ScaleIntensityRange
from monai.utils import unsqueeze_right
from torch import Tensor

from common.abdomen_phantoms import abdomen, draw_attributes
from common.anatomy_metrics import (
    coverage_agreement,
    measure_coverage,
    measure_organs,
    slice_jumps,
    volume_statistics_agreement,
)
from common.categorical import CategoricalInferer, CategoricalKLLoss, CategoricalScheduler
from common.execution import FastPath
from common.reports import write_report
from common.slices import LabelsToGrid
from common.totalsegmentator import organ_names
from tools.benchmark_siamese import optimised
from tools.measuring import cases_of, compared, network_of, paired, table

CLASSES, TIMES, STEPS = 12, 1000, 50  # of the publication; as many steps as spare most of its 1000
SLAB = 16  # slices of which a K x K table is made at once: of a whole volume it takes 600 MB, several times over
MASK_CALLS, SLICE_CALLS = [10, 20, 30], [5, 10, 15]
REFERENCE_CALLS = 50  # of the slices, as published
PROMPTS, VOLUMES, TOGETHER = 16, 4, 4  # label volumes, CT volumes, label volumes in a call
SIDE_BY_SIDE, TIMED_SLICES = [2, 4], 8
OTHER = 10_000  # added to the seeds of another draw

Action = Callable[[], Any]

# ---------------------------------------------------------------------------------------------------------------------
# Categorical work


class LiteralCategorical:
    """Categorical diffusion word for word: every sum over x_0 has its table, every draw is one from K probabilities.

    Args:
        scheduler: whose tables it reads.
        slab: slices (of the first spatial axis) for which a K x K table is held at once.
    """

    def __init__(self, scheduler: CategoricalScheduler, slab: int = SLAB) -> None:
        self.classes, self.slab = scheduler.num_classes, slab
        self.kept = torch.cat([torch.ones(1).double(), scheduler.alphas_cumprod])

    def rates(self, t: int, s: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shares a and A of labels that are kept from s to t, and from the start to s."""
        before = self.kept[s + 1]
        return (self.kept[t + 1] / before).to(like), before.to(like)

    def kernel(self, labels: Tensor, keep: Tensor) -> Tensor:
        """Of labels (B, 1, *S): keep [c = label] + (1 - keep) / K, (B, K, *S)."""
        return keep * one_hot(labels, self.classes) + (1 - keep) / self.classes

    def posterior(self, x_t: Tensor, x_0: Tensor, t: int, s: int) -> Tensor:
        """q(x_s | x_t, x_0): G_c B_c, normalised over c."""
        a, before = self.rates(t, s, self.kept.float())
        both = self.kernel(x_t, a) * self.kernel(x_0, before)
        return both / both.sum(dim=1, keepdim=True)

    def mixture(self, x_t: Tensor, w: Tensor, t: int, s: int) -> Tensor:
        """p(x_s | x_t) (B, K, *S), slab by slab."""
        slabs = zip(x_t.split(self.slab, dim=2), w.split(self.slab, dim=2), strict=True)
        return torch.cat([self.averaged(*slab, t, s) for slab in slabs], dim=2)

    def averaged(self, x_t: Tensor, w: Tensor, t: int, s: int) -> Tensor:
        """Posteriors of every x_0 = d, a table (B, d, c, *S), averaged over w."""
        a, before = self.rates(t, s, w)
        every = before * torch.eye(self.classes).to(w) + (1 - before) / self.classes
        both = self.kernel(x_t, a)[:, None] * unsqueeze_right(every[None], w.ndim + 1)
        return (both / both.sum(dim=2, keepdim=True) * w[:, :, None]).sum(dim=1)

    def drawn(self, probabilities: Tensor) -> Tensor:
        """One label (B, 1, *S) from each voxel's K probabilities."""
        rows = probabilities.movedim(1, -1)
        return rows.reshape(-1, self.classes).multinomial(1).view(rows.shape[:-1])[:, None].to(probabilities)

    def add_noise(self, x_0: Tensor, t: int) -> Tensor:
        """Draw from q(x_t | x_0)."""
        return self.drawn(self.kernel(x_0, self.rates(t, -1, self.kept.float())[0]))

    def step(self, logits: Tensor, x_t: Tensor, t: int, s: int) -> Tensor:
        """Draw from p(x_s | x_t)."""
        return self.drawn(self.mixture(x_t, logits.softmax(dim=1), t, s).clamp(min=1e-12))

    def kl(self, x_0: Tensor, x_t: Tensor, logits: Tensor, t: int, s: int) -> Tensor:
        """KL(q || p) of each voxel (B, 1, *S)."""
        true, ours = self.posterior(x_t, x_0, t, s), self.mixture(x_t, logits.softmax(dim=1), t, s)
        return (true * (true.log() - ours.clamp(min=1e-12).log())).sum(dim=1, keepdim=True)


def measure_categorical(volume: Sequence[int], runs: int, device: torch.device) -> list[list[str]]:
    """Rows: each piece of categorical work on a volume, by tables of K x K and ours."""
    ours = CategoricalScheduler(TIMES, CLASSES)
    plain = LiteralCategorical(ours)
    ours.set_timesteps(STEPS)
    t, s = ours.timesteps[STEPS // 2 :][:2].tolist()
    logits = 2 * torch.randn(1, CLASSES, *volume, device=device)
    x_t, x_0 = (torch.randint(0, CLASSES, (1, 1, *volume), device=device).float() for _ in range(2))
    w, noise, half = logits.softmax(dim=1), partial(torch.randn, x_t.shape, device=device), halved(volume)
    small = {key: x[half].clone() for key, x in {"x_0": x_0, "x_t": x_t, "logits": logits}.items()}

    def slope(kl: Callable[..., Tensor]) -> Action:
        leaf = small["logits"].requires_grad_()
        return lambda: torch.autograd.grad(kl(small["x_0"], small["x_t"], leaf, t, s).mean(), leaf)

    pairs: dict[str, tuple[Action, Action]] = {
        "posterior mixture": (lambda: plain.mixture(x_t, w, t, s), lambda: ours.mixture(x_t, w, t, s)),
        "the same of logits, in logarithms": (
            lambda: plain.mixture(x_t, logits.softmax(dim=1), t, s).log(),
            lambda: ours.posterior_mixture(x_t, logits, t, s),
        ),
        "whole step, softmax and draw included": (
            lambda: plain.step(logits, x_t, t, s),
            lambda: ours.step(logits, t, x_t),
        ),
        "noising": (lambda: plain.add_noise(x_0, t), lambda: ours.add_noise(x_0, noise(), t)),
        "KL and its gradient, half the sides": (slope(plain.kl), slope(ours.kl)),
    }
    return [compared(title, *pair, runs, device) for title, pair in pairs.items()]


def halved(volume: Sequence[int]) -> tuple[Any, ...]:
    """The corner of half the sides, of tensors (B, C, *S)."""
    return (..., *(slice(max(1, side // 2)) for side in volume))


# ---------------------------------------------------------------------------------------------------------------------
# The network of the label volumes


def mask_paths(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables of categorical work, and of a training step and of sampling with the first stage's network."""
    columns = ["ratio", "peak memory, plain", "peak memory, ours"]
    yield f"Categorical work, {CLASSES} classes; tables of K x K are made of {SLAB} slices at once:"
    unit = " x ".join(map(str, arguments.volume))
    yield table([unit, "K x K", "ours", *columns], measure_categorical(arguments.volume, arguments.runs, device))
    bench, unit = MaskSteps(parser, arguments.batch, device), cases_of(arguments.batch)
    yield "The network of the label volumes:"
    yield table([unit, "plain", "fast path", *columns], measure_mask_paths(bench, arguments.runs, arguments.compile))
    size = max(2, parser.get_parsed_content("mask_patch_size"))
    yield f"Voxels folded into channels, patches of {size}, against none, both on the fast path:"
    rows = measure_folding(bench, size, arguments.runs, arguments.compile)
    yield table([unit, "voxels", "patches", "ratio", "peak memory, voxels", "peak memory, patches"], rows)


class MaskSteps:
    """A batch of labels and reports, on which networks of the first stage train and draw.

    Args:
        parser: the bundle's config.
        batch: how many cases.
        device: where the networks run.
    """

    def __init__(self, parser: ConfigParser, batch: int, device: torch.device) -> None:
        self.parser, self.device = parser, device
        self.scheduler, size, classes = (
            parser.get_parsed_content(key) for key in ("mask_scheduler", "mask_size", "num_classes")
        )
        self.tokens = torch.stack([context for _, context in prompts(parser, batch)]).to(device)
        self.labels = torch.randint(0, classes, (batch, 1, *size), device=device).float()
        self.noise = torch.randn_like(self.labels)
        self.times = torch.randint(self.scheduler.num_train_timesteps, (batch,), device=device)

    def network(self, patch: int | None = None) -> Any:
        """A network of random weights, of the config's patch or another."""
        before = self.parser["mask_patch_size"]
        self.parser["mask_patch_size"] = before if patch is None else patch  # and all is built anew
        network = self.parser.get_parsed_content("mask_network_def").to(self.device)
        self.parser["mask_patch_size"] = before
        return network

    def training(self, network: Any, path: Callable[[Inferer], Inferer]) -> Action:
        """A training step; `path` wraps the inferer."""
        inferer, criterion = path(CategoricalInferer(self.scheduler)), CategoricalKLLoss(self.scheduler, ce_weight=1.0)
        batch = {"noise": self.noise, "timesteps": self.times, "condition": self.tokens, "mode": "crossattn"}
        return optimised(network, lambda: criterion(inferer(self.labels, network, **batch), self.labels))

    def sampling(self, network: Any, path: Callable[[Inferer], Inferer], calls: int = 2) -> Action:
        """A short run of the bundle's sampler."""
        sampler = copy.copy(self.parser.get_parsed_content("mask_sampler"))
        sampler.num_inference_steps, sampler.quiet = calls, True
        run = path(sampler)
        return lambda: run(self.tokens, network)


def unfused(network: torch.nn.Module) -> torch.nn.Module:
    """A copy that holds its attention weights as a matrix, as MONAI's networks do unless told otherwise."""
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = False  # type: ignore[assignment]
    return twin


def measure_mask_paths(bench: MaskSteps, runs: int, compile: bool) -> list[list[str]]:
    """Rows: training step and two sampling calls, plain against fast."""
    fast, fast_path = bench.network(), partial(FastPath, compile=compile)
    plain = unfused(fast)
    return [
        compared(title, make(plain, as_it_is), make(fast, fast_path), runs, bench.device)
        for title, make in (("training step", bench.training), ("two sampling calls", bench.sampling))
    ]


def as_it_is(inferer: Inferer) -> Inferer:
    """No fast path."""
    return inferer


def measure_folding(bench: MaskSteps, patch: int, runs: int, compile: bool) -> list[list[str]]:
    """Rows: the same channels on voxels and on patches."""
    voxels, patches, path = bench.network(1), bench.network(patch), partial(FastPath, compile=compile)
    return [
        compared(title, make(voxels, path), make(patches, path), runs, bench.device)
        for title, make in (("training step", bench.training), ("two sampling calls", bench.sampling))
    ]


def prompts(parser: ConfigParser, number: int) -> list[tuple[str, Tensor]]:
    """Reports of nobody in the training set, and what the network reads of them (L, D)."""
    contexts, found = parser.get_parsed_content("contexts"), []
    for i in range(number):
        rng = np.random.default_rng([parser["phantom_seed"], i])
        report = write_report(draw_attributes(rng), rng=rng)
        found.append((report, torch.as_tensor(contexts(report))))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Fewer calls


def cascade_samplers(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables of both stages in fewer calls."""
    drop_missing(parser)
    masks = MaskVolumes(parser, arguments.cases or PROMPTS, device)
    yield f"Label volumes of {len(masks.tokens)} reports, and how a cohort in fewer calls differs from that in all:"
    rows = measure_masks(masks, arguments.calls or MASK_CALLS)
    yield table(["calls", "one volume", *COHORT], rows)
    volumes = SliceVolumes(parser, min(arguments.cases or VOLUMES, VOLUMES), device)
    yield f"CT of {len(volumes.layout)} label volumes of {volumes.layout.shape[-1]} slices; jumps between slices:"
    rows = measure_slices(volumes, arguments.calls or SLICE_CALLS)
    yield table(["calls", "one volume", f"RMSE to {REFERENCE_CALLS} calls", *JUMPS], rows)
    rows = measure_side_by_side(volumes, arguments.runs)
    yield table(["one slice, of", "one volume alone", "side by side", "ratio"], rows)


def drop_missing(parser: ConfigParser) -> None:
    """Go on with random weights where there are none."""
    for key in ("mask_weights", "autoencoder_weights"):
        path = parser.get_parsed_content(key)
        if path and not Path(path).is_file():
            print(f"{path} does not exist: that network stays untrained\n", flush=True)
            parser[key] = None


def mean_of(values: Sequence[float]) -> float:
    """Mean of what is a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # none is
        return float(np.nanmean(list(values)))


class MaskVolumes:
    """Label volumes of equal reports and seeds, in more or fewer calls.

    Args:
        parser: the bundle's config.
        num_cases: how many reports.
        device: where the network runs.
    """

    def __init__(self, parser: ConfigParser, num_cases: int, device: torch.device) -> None:
        self.tokens = torch.stack([context for _, context in prompts(parser, num_cases)]).to(device)
        self.network = parser.get_parsed_content("mask_network").to(device).eval()
        self.sampler = copy.copy(parser.get_parsed_content("mask_sampler"))
        self.sampler.quiet = True
        self.full = self.sampler.scheduler.num_train_timesteps
        size, slices, field_of_view, classes = (
            parser.get_parsed_content(key) for key in ("image_size", "volume_slices", "field_of_view", "num_classes")
        )
        self.to_grid, self.names = LabelsToGrid([*size, slices]), organ_names(classes)
        self.affine = np.diag([*np.divide(field_of_view, [*size, slices]), 1.0])

    def draw(self, calls: int, other: int = 0, n: int | None = None) -> Tensor:
        """Labels (n, 1, *S) on the grid of the CT; `other` makes other seeds."""
        self.sampler.num_inference_steps = calls
        run, drawn = FastPath(self.sampler), []
        for first in range(0, len(self.tokens[:n]), TOGETHER):
            part = self.tokens[:n][first : first + TOGETHER]
            seeds = [other + first + i for i in range(len(part))]
            drawn.append(self.to_grid(run(part, self.network, seeds=seeds)))
        return torch.cat(drawn)

    def timed(self, calls: int, other: int = 0) -> tuple[Tensor, float]:
        """Label volumes, and the seconds that each took."""
        self.draw(1, n=TOGETHER)  # the first call of a shape is slow
        start = time.perf_counter()
        labels = self.draw(calls, other).cpu()
        return labels, (time.perf_counter() - start) / len(labels)

    def cohort(self, labels: Tensor) -> dict[str, list[dict[str, Any]]]:
        """What is measured of label volumes, case by case."""
        volumes = [volume[0].numpy().astype(np.int32) for volume in labels]
        return {
            "organs": [measure_organs(volume, self.affine, self.names) for volume in volumes],
            "coverage": [measure_coverage(volume, self.names) for volume in volumes],
        }


def cohort_numbers(
    first: Mapping[str, list[dict[str, Any]]], second: Mapping[str, list[dict[str, Any]]]
) -> dict[str, float]:
    """How two cohorts differ, organs weighing alike; those which a cohort lacks count in occurrence and coverage."""
    coverage = list(coverage_agreement(first["coverage"], second["coverage"]).values())
    organs = volume_statistics_agreement(first["organs"], second["organs"]).values()
    return {
        "coverage": mean_of(coverage),
        "least": min((value for value in coverage if value == value), default=float("nan")),
        "occurrence": mean_of([abs(row["occurrence_real"] - row["occurrence_synthetic"]) for row in organs]),
        "volumes": mean_of([row["volume_distance"] for row in organs]),
        "centres": mean_of([row["centre_distance"] for row in organs]),
    }


# Columns of the table of label volumes: keys of `cohort_numbers`.
COHORT = {
    "coverage ratio: mean": "coverage",
    "worst organ": "least",
    "occurrence off": "occurrence",
    "volumes: distance": "volumes",
    "centres: distance": "centres",
}


def measure_masks(bench: MaskVolumes, calls: Sequence[int]) -> list[list[str]]:
    """Rows: time, and agreement with the cohort of full length; other seeds tell what agreement means."""
    labels, wall = bench.timed(bench.full)
    reference = bench.cohort(labels)
    rows = [[f"{bench.full} (reference)", f"{wall:.2f} s", *[""] * len(COHORT)]]
    runs = [(f"{bench.full}, other seeds", bench.full, OTHER), *((str(n), n, 0) for n in calls)]
    for title, n, other in runs:
        labels, wall = bench.timed(n, other)
        found = cohort_numbers(reference, bench.cohort(labels))
        rows.append([title, f"{wall:.2f} s", *(f"{found[key]:.3f}" for key in COHORT.values())])
    return rows


# Columns of the table of CT: keys of `slice_jumps`.
JUMPS = {"voxels' jump / real": "voxel", "brightness' jump / real": "mean"}


class SliceVolumes:
    """CT of equal label volumes and seeds, in more or fewer calls: phantoms nobody trained on.

    Args:
        parser: the bundle's config.
        num_cases: how many volumes.
        device: where the networks run.
    """

    def __init__(self, parser: ConfigParser, num_cases: int, device: torch.device) -> None:
        self.device, self.network = device, network_of(parser, device).eval()
        self.sampler = copy.copy(parser.get_parsed_content("sampler"))
        self.sampler.quiet = True
        self.calls = parser["num_inference_steps"]
        size, grid, seed, classes, window, intensities = (
            parser.get_parsed_content(key)
            for key in ("image_size", "phantom_size", "phantom_seed", "num_classes", "hu_window", "intensity_range")
        )
        self.to_hu = ScaleIntensityRange(intensities[0], intensities[1], window[0], window[1], clip=True)
        phantoms = [abdomen(seed + i, (*size, grid[-1])) for i in range(num_cases)]
        labels = torch.stack([torch.as_tensor(phantom.layout) for phantom in phantoms])[:, None].float()
        self.layout = torch.where(labels < classes, labels, 0).to(device)
        self.real = np.stack([phantom.image for phantom in phantoms]).clip(*window)

    def draw(self, calls: int, layout: Tensor, other: int = 0) -> Tensor:
        """HU (n, X, Y, Z) of label maps (n, 1, X, Y, Z), side by side; `other` makes other seeds."""
        self.sampler.sampler.num_inference_steps = calls
        seeds = [other + i for i in range(len(layout))]
        return torch.as_tensor(self.to_hu(FastPath(self.sampler)(layout, self.network, seeds=seeds)))[:, 0]

    def timed(self, calls: int, other: int = 0) -> tuple[Tensor, float]:
        """Volumes drawn one after the other, and the seconds that each took."""
        self.draw(1, self.layout[..., : self.layout.shape[-1] // 2])  # the first call of a shape is slow
        start = time.perf_counter()
        volumes = [self.draw(calls, layout[None], other + i) for i, layout in enumerate(self.layout)]
        wall = (time.perf_counter() - start) / len(volumes)
        return torch.cat(volumes).cpu(), wall

    def rmse(self, a: Tensor, b: Tensor) -> float:
        """RMSE in HU inside the body."""
        return float((a - b)[self.layout[:, 0].cpu() > 0].square().mean().sqrt())

    def jumps(self, volumes: Tensor) -> list[float]:
        """Jumps between slices over those of the real images, as `JUMPS` lists them."""
        layouts = self.layout[:, 0].cpu().numpy()
        drawn, real = (
            [slice_jumps(volume, layout) for volume, layout in zip(cohort, layouts, strict=True)]
            for cohort in (volumes.numpy(), self.real)
        )
        return [
            mean_of([case[key] for case in drawn]) / mean_of([case[key] for case in real]) for key in JUMPS.values()
        ]


def measure_slices(bench: SliceVolumes, calls: Sequence[int]) -> list[list[str]]:
    """Rows: time, distance to the long run of equal seeds, seams; other seeds tell what a distance means."""
    reference, wall = bench.timed(REFERENCE_CALLS)

    def row(title: str, wall: float, distance: str, volumes: Tensor) -> list[str]:
        return [title, f"{wall:.2f} s", distance, *(f"{ratio:.2f}" for ratio in bench.jumps(volumes))]

    rows = [row(str(REFERENCE_CALLS), wall, "0 (reference)", reference)]
    runs = [(f"{REFERENCE_CALLS}, other seeds", REFERENCE_CALLS, OTHER), *((str(n), n, 0) for n in calls)]
    for title, n, other in runs:
        volumes, wall = bench.timed(n, other)
        rows.append(row(title, wall, f"{bench.rmse(volumes, reference):.1f} HU", volumes))
    return rows


def measure_side_by_side(bench: SliceVolumes, runs: int) -> list[list[str]]:
    """Rows: what a slice takes when several volumes are drawn at once."""
    middle = max(0, (bench.layout.shape[-1] - TIMED_SLICES) // 2)
    layout = bench.layout[:1, ..., middle : middle + TIMED_SLICES]
    slices, rows = int(bench.sampler.due(layout).sum()), []
    for n in SIDE_BY_SIDE:
        many = layout.expand(n, -1, -1, -1, -1)
        alone, together = (partial(bench.draw, bench.calls, volumes) for volumes in (layout, many))
        slow, fast = paired(alone, together, runs, bench.device)
        slow, fast = slow / slices, fast / slices / n
        rows.append([f"{n} volumes", f"{slow:.3f} s", f"{fast:.3f} s", f"**{slow / fast:.1f} x**"])
    return rows
