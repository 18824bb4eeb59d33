"""Samplers of masks against each other: what fewer network calls cost in control, and what batching gains."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from common.conditioning import CrossAttention, Guided
from common.execution import FastPath
from common.mask_metrics import control
from common.mask_sampler import CheckedMaskSampler
from common.semantics import Lesion, measure
from common.solvers import DPMSolverPP
from tools.measuring import network_of, paired, table

CALLS = [50, 25, 20, 15, 10, 5]
CASES = 64
# Columns of the table of masks: keys of `mask_metrics.control`.
CONTROL = {
    "size error: mean": "size_error_mean",
    "median": "size_error_median",
    "90 %": "size_error_p90",
    "centre off: mean": "centre_distance_mean",
    "90 % ": "centre_distance_p90",
    "count right": "count_accuracy",
    "within tolerance": "within_tolerance",
}


def mask_samplers(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables of samplers of a bundle that makes masks."""
    bench = MaskBench(parser, arguments.cases or CASES, device)
    steps = parser["num_inference_steps"] if bench.full != parser["num_inference_steps"] else 20
    yield table(["one mask", "this way", "ours", "ratio"], measure_batching(bench, arguments.runs, steps))
    yield f"{len(bench.cases)} masks, each lesion drawn once:"
    yield table(["sampler", "calls", "one mask", *CONTROL], measure_masks(bench, arguments.calls or CALLS))


class MaskBench:
    """Masks of equal asked statistics and seeds, drawn once each by samplers that differ in one thing.

    Args:
        parser: the bundle's config.
        num_cases: how many masks.
        device: where the network runs.
    """

    def __init__(self, parser: ConfigParser, num_cases: int, device: torch.device) -> None:
        parser["num_samples"], parser["max_tries"], parser["sampler::verbose"] = num_cases, 1, False
        if not Path(parser.get_parsed_content("statistics")).is_file():
            parser["statistics"] = str(Path(parser["bundle_root"]) / "models" / "statistics.json")
        self.parser = parser
        self.device = device
        self.network = network_of(parser, device).eval()
        self.cases = parser.get_parsed_content("cases")
        preprocessing = parser.get_parsed_content("preprocessing")
        items = [preprocessing({**case, "source": "{}"}) for case in self.cases]
        self.inputs = torch.stack([torch.as_tensor(item["image"]) for item in items]).to(device)
        self.labels, self.min_size, self.null, order, times, schedule, prediction = (
            parser.get_parsed_content(key)
            for key in (
                "label_values",
                "min_size",
                "null",
                "solver_order",
                "num_train_timesteps",
                "noise_schedule",
                "prediction_type",
            )
        )
        self.solver = DPMSolverPP(times, schedule, prediction_type=prediction, order=order)
        self.ancestral = parser.get_parsed_content("scheduler")
        # A recipe that samples by the scheduler says how many calls are all of them.
        self.full = parser["num_inference_steps"] if parser["solver"] == "@scheduler" else times

    def sampler(self, scheduler: Any, calls: int, **changes: Any) -> FastPath:
        """The bundle's sampler with one draw for each part."""
        size, intensities, chains, channels = (
            self.parser.get_parsed_content(key) for key in ("image_size", "intensities", "max_chains", "num_classes")
        )
        settings: dict[str, Any] = {"max_tries": 1, "max_chains": chains, "condition": self.guided(1.0)}
        settings |= {"intensities": intensities, "min_size": self.min_size, "null": self.null, "channels": channels}
        return FastPath(CheckedMaskSampler(scheduler, calls, image_size=size, **{**settings, **changes}))

    def guided(self, scale: float) -> Guided:
        """Guidance of a scale."""
        return Guided(CrossAttention(), scale, self.null)

    def draw(self, sampler: FastPath, n: int | None = None) -> torch.Tensor:
        """The first n masks (n, K, H, W)."""
        inputs, cases = self.inputs[:n], self.cases[:n]
        return sampler(inputs, self.network, seeds=[case["seed"] for case in cases])["mask"]

    def row(self, title: str, scheduler: Any, calls: int) -> list[str]:
        """Time and control numbers of one sampler."""
        sampler = self.sampler(scheduler, calls)
        self.draw(self.sampler(scheduler, 1), 1)  # the first call of a shape is slow
        start = time.perf_counter()
        masks = self.draw(sampler).numpy()
        wall = (time.perf_counter() - start) / len(masks)
        asked = [[Lesion(**lesion) for lesion in case["lesions"]] for case in self.cases]
        found = control(asked, [measure(mask, self.labels, self.min_size) for mask in masks])
        return [title, str(calls), f"{wall:.3f} s", *(f"{found[key]:.3f}" for key in CONTROL.values())]


def measure_masks(bench: MaskBench, calls: Sequence[int]) -> list[list[str]]:
    """Rows: time and control of the ancestral sampler and of the solver in few calls."""
    rows = [bench.row("ancestral (published)", bench.ancestral, bench.full)]
    return rows + [bench.row("DPM-Solver++(2M)", bench.solver, n) for n in calls]


def measure_batching(bench: MaskBench, runs: int, calls: int, n: int = 16) -> list[list[str]]:
    """Rows: what all chains in one call gain, and what guidance 1 saves by leaving the unconditional pass out."""
    ours = bench.sampler(bench.solver, calls)
    others = {
        "one chain in a call": bench.sampler(bench.solver, calls, max_chains=1),
        "an unconditional pass at guidance 1": bench.sampler(bench.solver, calls, condition=bench.guided(1 + 1e-9)),
    }
    rows = []
    for title, other in others.items():
        slow, fast = paired(partial(bench.draw, other, n), partial(bench.draw, ours, n), runs, bench.device)
        drawn = len(bench.cases[:n])
        rows.append([title, f"{slow / drawn:.3f} s", f"{fast / drawn:.3f} s", f"**{slow / fast:.1f} x**"])
    return rows
