"""LesionDiffusion measured: its networks, crops against whole scans, fewer calls, and what words do to a lesion."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import Tensor

from common.execution import FastPath
from common.lesion_diffusion import LesionInferer
from common.lesion_phantoms import LesionBody, lesion_body
from common.lesion_words import FLUID, organ_id
from tools.benchmark_guidegen import unfused
from tools.benchmark_siamese import optimised
from tools.measuring import cases_of, compared, network_of, table

BODIES, CALLS, REFERENCE_CALLS = 6, [5, 10, 15], 200
DENSITIES = (FLUID, "hypodense lesion", "isodense lesion", "hyperdense lesion")
WISH = {"organ": "liver", "lesion": "liver tumor", "size_mm": [36, 36, 36], "location": ""}
ENHANCED = {"enhancement status": "enhanced ct", "cavity": "within the parenchymal organ"}

# ---------------------------------------------------------------------------------------------------------------------
# The networks


def lesion_paths(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables of both networks, and of a crop against a whole scan."""
    header = [cases_of(arguments.batch), "plain", "fast path", "ratio", "peak memory, plain", "peak memory, fast"]
    for name, kind, size in (("LMNet", "mask_", "mask_size"), ("LINet", "", "latent_size")):
        yield f"{name}:"
        yield table(header, measure_network(parser, kind, size, arguments, device))
    yield "The autoencoder, there and back; a scan of 3 x 3 x 3 crops:"
    yield table(["one lesion", "whole scan", "crop", "ratio", "peak memory, scan", "peak memory, crop"], [
        measure_crop(parser, arguments.runs, device)
    ])  # fmt: skip


def measure_network(
    parser: ConfigParser, kind: str, size: str, arguments: argparse.Namespace, device: torch.device
) -> list[list[str]]:
    """Rows: network call and training step; plain is float32, contiguous, with attention materialised."""
    ours: Any = parser.get_parsed_content(f"{kind}network_def").to(device)
    plain = unfused(ours)
    scheduler = parser.get_parsed_content(f"{kind}solver")
    channels = int(parser.get_parsed_content("latent_channels")) if not kind else 1
    shape = parser.get_parsed_content(size)
    image = torch.randn(arguments.batch, channels, *shape, device=device)
    given: dict[str, Any] = {
        "noise": torch.randn_like(image),
        "timesteps": torch.full((len(image),), 100, device=device),
        "condition": torch.rand(len(image), ours.in_channels - channels, *shape, device=device).round(),
        "context": torch.randn(len(image), 8, ours.context_width, device=device),
    }
    noising = LesionInferer(scheduler)
    fast = FastPath(noising, compile=arguments.compile)

    def call(inferer: Any, network: torch.nn.Module) -> Callable[[], Any]:
        def action() -> None:
            with torch.no_grad():
                inferer(image, network, **given)

        return action

    def step(inferer: Any, network: torch.nn.Module) -> Callable[[], Any]:
        return optimised(network, lambda: inferer(image, network, **given).square().mean())

    return [
        compared(title, make(noising, plain), make(fast, ours), arguments.runs, device)
        for title, make in (("network call", call), ("training step", step))
    ]


def measure_crop(parser: ConfigParser, runs: int, device: torch.device) -> list[str]:
    """A row: the published way encodes and decodes the whole scan for a lesion, ours a crop."""
    autoencoder: Any = parser.get_parsed_content("autoencoder_def").to(device).eval()
    size = parser.get_parsed_content("image_size")
    scan, crop = (torch.rand(1, 1, *(k * n for n in size), device=device) for k in (3, 1))

    def both(image: Tensor) -> Callable[[], Any]:
        def action() -> None:
            with torch.no_grad():
                autoencoder.reconstruct(image)

        return action

    return compared("encode and decode", both(scan), both(crop), runs, device)


# ---------------------------------------------------------------------------------------------------------------------
# Whole lesions


def lesion_samplers(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables of fewer calls and of words."""
    bench = LesionBench(parser, arguments.cases or BODIES, device)
    yield f"Lesions in {len(bench.bodies)} livers, in fewer calls:"
    header = ["calls of each network", "one lesion", "Dice of the mask", "RMSE inside, HU", "mean inside, HU"]
    yield table(header, measure_calls(bench, arguments.calls or CALLS))
    yield "The word for the density, and the lesion's mean less the liver's, in HU:"
    yield table(["density", "CT value asked", "with words", "without (`--use_text False`)"], measure_density(bench))
    yield "Words for margin and shape:"
    yield table(["word", "what is measured", "value"], [*measure_margin(bench), *measure_shape(bench)])


class LesionBench:
    """The bundle's chain on drawn bodies that have a liver.

    Args:
        parser: the bundle's config.
        number: how many bodies.
        device: where networks run.
    """

    def __init__(self, parser: ConfigParser, number: int, device: torch.device) -> None:
        parser["device"] = str(device)
        self.network = network_of(parser, device).eval()
        self.chain: Any = parser.get_parsed_content("lesion_sampler")
        self.plan: Any = parser.get_parsed_content("to_plan")[0]
        self.plan.output_dir = None
        x, y, z = parser.get_parsed_content("phantom_size")
        bodies = (lesion_body(seed, (int(x), int(y), int(z))) for seed in itertools.count(5000))
        self.bodies = [self.case(body, k) for k, body in zip(range(number), (b for b in bodies if b.enhanced))]
        self.device = device

    def case(self, body: LesionBody, seed: int) -> dict[str, Any]:
        """A healthy body as preprocessing hands it on."""
        volumes, place = {"image": body.image, "organs": body.organs}, torch.from_numpy(body.affine)
        loaded = {k: MetaTensor(torch.from_numpy(v.astype(np.float32))[None], affine=place) for k, v in volumes.items()}
        return {"name": f"body_{seed}", "seed": seed, "source": "{}", **loaded}

    def draw(self, attributes: Mapping[str, str], **wish: Any) -> list[dict[str, Any]]:
        """CT before and after, lesion and liver, of each body."""
        self.plan.wish = {**WISH, **wish, "attributes": {**ENHANCED, **attributes}}
        made = []
        for case in self.bodies:
            planned = self.plan(case)
            inputs = planned["image"].as_tensor()[None].to(self.device)
            image, label = self.chain(inputs, self.network, plans=[planned["plan"]], seeds=[case["seed"]])[0].cpu()
            before, organs = case["image"][0].as_tensor(), case["organs"][0].as_tensor()
            liver = organs == organ_id(self.plan.wish["organ"])
            made.append(
                {"before": before, "after": image, "lesion": label == 2, "organ": liver, "plan": planned["plan"]}
            )
        return made

    def steps(self, calls: int) -> None:
        """Set the calls of both networks."""
        for sampler in (self.chain.mask_sampler, self.chain.painter):
            getattr(sampler, "inferer", sampler).num_inference_steps = calls

    def words(self, on: bool) -> None:
        """Whether the painter hears words."""
        getattr(self.chain.painter, "inferer", self.chain.painter).condition.use_text = on


def mean(values: Sequence[float]) -> float:
    """Mean of what is a number."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def dice(a: Tensor, b: Tensor) -> float:
    """Dice of two masks."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def measure_calls(bench: LesionBench, calls: Sequence[int]) -> list[list[str]]:
    """Rows: what changes with the number of calls, equal plans and seeds; another seed tells what that means."""

    def timed(number: int) -> tuple[list[dict[str, Any]], float]:
        bench.steps(number)
        start = time.perf_counter()
        made = bench.draw({"density": "hypodense lesion"})
        return made, (time.perf_counter() - start) / len(made)

    def row(title: str, made: Sequence[dict[str, Any]], wall: float) -> list[str]:
        masks = [dice(a["lesion"], b["lesion"]) for a, b in zip(made, full)]
        both = [(a["after"], b["after"], a["lesion"] & b["lesion"]) for a, b in zip(made, full)]
        rmse = [float((x[m] - y[m]).square().mean().sqrt()) for x, y, m in both]
        inside = [float(a["after"][a["lesion"]].mean()) for a in made]
        return [title, f"{wall:.2f} s", f"{mean(masks):.3f}", f"{mean(rmse):.1f}", f"{mean(inside):.0f}"]

    full, wall = timed(REFERENCE_CALLS)
    rows = [row(f"{REFERENCE_CALLS} (reference)", full, wall)]
    rows += [row(str(number), *timed(number)) for number in calls]
    before = [body["seed"] for body in bench.bodies]
    plans, bench.plan = bench.plan, Planned([made["plan"] for made in full], bench.plan)
    for body in bench.bodies:
        body["seed"] += 1000
    rows.append(row("the last, another seed", *timed(calls[-1])))
    bench.plan = plans
    for body, seed in zip(bench.bodies, before):
        body["seed"] = seed
    return rows


class Planned:
    """Gives plans made before, in turn."""

    def __init__(self, plans: Sequence[Any], planner: Any) -> None:
        self.plans, self.planner, self.wish = list(plans), planner, planner.wish

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The next plan, with the case's image."""
        return {**self.planner(data), "plan": self.plans.pop(0)}


def contrast(made: Mapping[str, Tensor]) -> float:
    """The lesion's mean less the median of what of the organ is around, in HU."""
    return float(made["after"][made["lesion"]].mean() - made["after"][made["organ"] & ~made["lesion"]].median())


def measure_density(bench: LesionBench) -> list[list[str]]:
    """Rows: a word for the density, with words heard and not."""
    rows = []
    for word in DENSITIES:
        kind = {"lesion": "liver cyst"} if word == FLUID else {}
        cells = []
        for on in (True, False):
            bench.words(on)
            cells.append(mean([contrast(made) for made in bench.draw({"density": word}, **kind)]))
        value = mean([float(asked_value(bench, body)) for body in bench.bodies])
        rows.append([word, f"{value:.0f} HU", *(f"{cell:+.0f}" for cell in cells)])
    bench.words(True)
    return rows


def asked_value(bench: LesionBench, body: Mapping[str, Any]) -> str:
    """CT value in the report of a body."""
    plan = json.loads(bench.plan(body)["plan"])["lesions"][0]
    return plan["report"]["attributes"]["CT value"].removesuffix(" HU")


def measure_margin(bench: LesionBench) -> list[list[str]]:
    """Rows: how much of a hypodense lesion's change is there one voxel and two voxels outside its mask."""
    rows = []
    for word in ("well-defined margin", "ill-defined margin"):
        made = bench.draw({"density": "hypodense lesion", "surface characteristics": word, "CT value": "60 HU"})
        shares = [mean([share_outside(m, k) for m in made]) for k in (1, 2)]
        rows.append(
            [word, "change 1 and 2 voxels outside the mask over that inside", " ".join(f"{s:.2f}" for s in shares)]
        )
    return rows


def share_outside(made: Mapping[str, Tensor], distance: int) -> float:
    """Mean change of HU in a shell outside a lesion's mask over the mean change inside."""
    lesion = made["lesion"][None, None].float()
    outer, inner = (torch.nn.functional.max_pool3d(lesion, 2 * k + 1, 1, k)[0, 0] > 0 for k in (distance, distance - 1))
    change = made["after"] - made["before"]
    return float(change[outer & ~inner].mean() / change[made["lesion"]].mean())


def measure_shape(bench: LesionBench) -> list[list[str]]:
    """Rows: how round masks are, and how much of their box they fill."""
    rows = []
    for word in ("round-like", "irregular"):
        made = bench.draw({"shape": word})
        ball = mean([roundness(m["lesion"]) for m in made])
        box = mean([fill(m["lesion"]) for m in made])
        rows.append(
            [word, "share of the mask in the ball of its volume; of its box that it fills", f"{ball:.2f} {box:.2f}"]
        )
    return rows


def fill(mask: Tensor) -> float:
    """Share of a mask in the smallest box around it."""
    voxels = mask.nonzero()
    return len(voxels) / float((voxels.max(0).values - voxels.min(0).values + 1).prod())


def roundness(mask: Tensor) -> float:
    """Share of a mask that lies in the ball of its own volume around its centre."""
    voxels = mask.nonzero().double()
    distance = (voxels - voxels.mean(0)).square().sum(1).sqrt()
    return float((distance <= (3 * len(voxels) / (4 * np.pi)) ** (1 / 3)).double().mean())
