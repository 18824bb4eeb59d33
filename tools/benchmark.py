"""Measure a bundle on this machine: what the fast path gains, and what fewer sampling calls cost.

    python tools/benchmark.py lung_ddpm [--preset paper] [--runs 5] [--skip-samplers]

Prints Markdown for docs/README.md. Both paths hold equal weights and are timed in turn (A B A B ...), so that a
drifting machine hits both; rows are medians. "Plain" is MONAI's ``DiffusionModelUNet`` as its defaults make it:
float32, contiguous, attention materialised, a gradient for everything.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import DiffusionInferer, Inferer
from monai.networks.nets import DiffusionModelUNet

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.execution import FastPath  # noqa: E402
from common.io import list_cases  # noqa: E402
from common.sampler import LayoutGuidedSampler  # noqa: E402
from common.schedules import DDPM  # noqa: E402
from common.solvers import DPMSolverPP  # noqa: E402

# What MONAI's own class has no argument for.
OURS_ONLY = ("max_period", "upsample_mode", "zero_init_attention")


def machine(device: torch.device) -> str:
    """One line about where the numbers come from."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    features = [k for k in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(k)]
    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    threads = torch.get_num_threads()
    return f"{name}, {threads} threads, {', '.join(features) or 'no native bf16'}, torch {torch.__version__}"


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one action, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def paired(plain: Callable[[], Any], fast: Callable[[], Any], runs: int, device: torch.device) -> tuple[float, float]:
    """Medians of two actions, timed in turn after a warm-up of each."""
    plain(), fast()
    times = [(seconds(plain, device), seconds(fast, device)) for _ in range(runs)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def peak_memory(action: Callable[[], Any], device: torch.device) -> float:
    """Peak memory in MiB while an action runs: of the GPU, or of this process (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    action()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10


def bundle_config(name: str, overlays: list[str]) -> ConfigParser:
    """The bundle's inference config; the network is built from it, as a run would."""
    root = REPO / "bundles" / name
    parser = ConfigParser()
    parser.read_config([str(root / "configs" / f"{c}.json") for c in ("inference", *overlays)])
    parser["bundle_root"] = str(root)
    return parser


def networks(parser: ConfigParser, device: torch.device, trained: bool) -> tuple[DiffusionModelUNet, torch.nn.Module]:
    """MONAI's default network and ours, with equal weights."""
    ours = parser.get_parsed_content("network_def")
    weights = Path(parser.get_parsed_content("weights"))
    if trained and weights.is_file():
        ours.load_state_dict(torch.load(weights, weights_only=True))
    arguments = {
        key: parser.get_parsed_content(f"network_def::{key}")
        for key in parser["network_def"]
        if not key.startswith("_") and key not in OURS_ONLY
    }
    plain = DiffusionModelUNet(**{**arguments, "use_flash_attention": False})
    plain.load_state_dict(ours.state_dict(), strict=True)
    return plain.to(device), ours.to(device)


def measure_paths(parser: ConfigParser, runs: int, device: torch.device, compile: bool) -> list[list[str]]:
    """Rows: network call and training step, plain against fast."""
    plain, ours = networks(parser, device, trained=False)
    size = parser.get_parsed_content("patch_size" if "patch_size" in parser else "image_size")
    channels = plain.in_channels - 1
    image = torch.randn(1, 1, *size, device=device)
    condition = torch.randn(1, channels, *size, device=device).sign()
    forward: dict[str, Any] = {
        "noise": torch.randn_like(image),
        "timesteps": torch.tensor([100], device=device),
        "condition": condition,
        "mode": "concat",
    }
    noising = DiffusionInferer(DDPM(250, "cosine_exact"))
    fast = FastPath(noising, compile=compile)

    def call(inferer: Inferer, network: torch.nn.Module) -> Callable[[], Any]:
        def action() -> None:
            with torch.no_grad():
                inferer(image, network, **forward)

        return action

    def step(inferer: Inferer, network: torch.nn.Module) -> Callable[[], Any]:
        optimizer = torch.optim.Adam(network.parameters())

        def action() -> None:
            optimizer.zero_grad()
            torch.nn.functional.l1_loss(inferer(image, network, **forward), forward["noise"]).backward()
            optimizer.step()

        return action

    rows = []
    for title, make in (("network call", call), ("training step", step)):
        a, b = make(noising, plain), make(fast, ours)
        before, after = paired(a, b, runs, device)
        memory = [peak_memory(action, device) for action in (a, b)]
        rows.append(
            [
                title,
                f"{before:.3f} s",
                f"{after:.3f} s",
                f"**{before / after:.1f} x**",
                *(f"{m:.0f} MiB" for m in memory),
            ]
        )
    return rows


def example_inputs(parser: ConfigParser, name: str, device: torch.device) -> torch.Tensor:
    """The bundle's example as the network sees it."""
    cases = list_cases(REPO / "bundles" / name / "docs" / "example")
    preprocessing = parser.get_parsed_content("preprocessing")
    return torch.as_tensor(preprocessing({**cases[0], "source": "{}"})["image"])[None].to(device)


def measure_samplers(parser: ConfigParser, name: str, device: torch.device, calls: list[int]) -> list[list[str]]:
    """Rows: time and distance to the 250-call result, inside the layout, in [-1, 1]; two seeds tell the noise."""
    parser["nodules"] = "add"
    _, network = networks(parser, device, trained=True)
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


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="name of a bundle with a docs/example")
    parser.add_argument("--preset", action="append", default=[], help="overlay to apply, e.g. paper; repeatable")
    parser.add_argument("--runs", type=int, default=5, help="timed pairs (default: 5)")
    parser.add_argument("--calls", type=int, nargs="*", default=[50, 20, 10], help="short samplers (default: 50 20 10)")
    parser.add_argument("--compile", action="store_true", help="let the fast path compile the network too")
    parser.add_argument("--skip-samplers", action="store_true", help="time the network only")
    arguments = parser.parse_args()
    if not (REPO / "bundles" / arguments.bundle).is_dir():
        parser.error(f"no bundle {arguments.bundle} in {REPO / 'bundles'}")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    config = bundle_config(arguments.bundle, arguments.preset)
    print(f"{machine(device)}; {' + '.join(['inference', *arguments.preset])}\n", flush=True)
    header = ["one case", "plain MONAI", "fast path", "ratio", "peak memory, plain", "peak memory, fast"]
    print(table(header, measure_paths(config, arguments.runs, device, arguments.compile)) + "\n", flush=True)
    if not arguments.skip_samplers:
        rows = measure_samplers(config, arguments.bundle, device, arguments.calls)
        print(table(["sampler", "calls", "time", "RMSE to 250 calls", "inside the layout"], rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
