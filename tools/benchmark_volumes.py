"""Samplers of volumes against each other: what fewer network calls cost inside the layout."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser

from common.execution import FastPath
from common.io import list_cases
from common.sampler import LayoutGuidedSampler
from common.schedules import DDPM
from common.solvers import DPMSolverPP
from tools.measuring import REPO, network_of, table

CALLS = [50, 20, 10]


def volume_samplers(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The table of samplers of a bundle that makes volumes."""
    rows = measure_volumes(parser, arguments.bundle, device, arguments.calls or CALLS)
    yield table(["sampler", "calls", "time", "RMSE to 250 calls", "inside the layout"], rows)


def example_inputs(parser: ConfigParser, name: str, device: torch.device) -> torch.Tensor:
    """The bundle's example as the network sees it."""
    cases = list_cases(REPO / "bundles" / name / "docs" / "example")
    preprocessing = parser.get_parsed_content("preprocessing")
    return torch.as_tensor(preprocessing({**cases[0], "source": "{}"})["image"])[None].to(device)


def measure_volumes(parser: ConfigParser, name: str, device: torch.device, calls: Sequence[int]) -> list[list[str]]:
    """Rows: time and distance to the 250-call result, inside the layout, in [-1, 1]; two seeds tell the noise."""
    parser["nodules"] = "add"
    network = network_of(parser, device)
    inputs = example_inputs(parser, name, device)
    inside = ~LayoutGuidedSampler(DDPM(250), 1).background(inputs)

    def sample(scheduler: Any, steps: int, seed: int) -> tuple[torch.Tensor, float]:
        sampler = FastPath(LayoutGuidedSampler(scheduler, steps))
        start = time.perf_counter()
        result = sampler(inputs, network.eval(), seeds=[seed])
        return result[inside], time.perf_counter() - start

    def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).square().mean().sqrt())

    def solver() -> DPMSolverPP:
        return DPMSolverPP(250, "cosine_exact", order=2, thresholding="clamp")

    reference, wall = sample(solver(), 250, 0)
    other, _ = sample(solver(), 250, 1)
    ancestral, wall_ancestral = sample(DDPM(250, "cosine_exact"), 250, 0)

    def row(title: str, steps: int, wall: float, distance: str, x: torch.Tensor) -> list[str]:
        return [title, str(steps), f"{wall:.1f} s", distance, f"{1000 * x.mean():.0f} ± {1000 * x.std():.0f} HU"]

    real = inputs[:, :1][inside]
    rows = [
        row("DPM-Solver++(2M)", 250, wall, "0 (reference)", reference),
        row("the same, another seed", 250, wall, f"{rmse(reference, other):.3f} (sampler noise)", other),
        row("ancestral (published)", 250, wall_ancestral, f"{rmse(reference, ancestral):.3f}", ancestral),
    ]
    for steps in calls:
        result, wall = sample(solver(), steps, 0)
        rows.append(row("DPM-Solver++(2M)", steps, wall, f"{rmse(reference, result):.3f}", result))
    rows.append(["the real image", "", "", "", f"{1000 * real.mean():.0f} ± {1000 * real.std():.0f} HU"])
    return rows
