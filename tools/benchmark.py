"""Measure a bundle on this machine: what the fast path gains, and what fewer sampling calls cost.

    python tools/benchmark.py lung_ddpm [--preset paper] [--runs 5] [--skip-samplers]
    python tools/benchmark.py cmdm [--weights FILE] [--cases 64]

Prints Markdown for docs/README.md. Both paths hold equal weights and are timed in turn (A B A B ...), so that a
drifting machine hits both; rows are medians. "Plain" is MONAI's ``DiffusionModelUNet`` as its defaults make it, or the
bundle's own network where MONAI has none: float32, contiguous, attention materialised, a gradient for everything.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import DiffusionInferer, Inferer
from monai.networks.nets import DiffusionModelUNet

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.conditioning import CrossAttention, Guided  # noqa: E402
from common.execution import FastPath  # noqa: E402
from common.io import list_cases  # noqa: E402
from common.mask_metrics import control  # noqa: E402
from common.mask_sampler import CheckedMaskSampler  # noqa: E402
from common.sampler import LayoutGuidedSampler  # noqa: E402
from common.schedules import DDPM  # noqa: E402
from common.semantics import Lesion, measure  # noqa: E402
from common.solvers import DPMSolverPP  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What differs between bundles, as data

# Networks of ours for which MONAI's own class can stand in, and what that has no argument for.
STOCK = {"scripts.common.unet.DiffusionUNet": DiffusionModelUNet}
OURS_ONLY = ("max_period", "upsample_mode", "zero_init_attention", "transformer_norm_eps")
# Calls of the short samplers, by what a bundle makes.
CALLS = {"image": [50, 20, 10], "mask": [50, 25, 20, 15, 10, 5]}
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

# ---------------------------------------------------------------------------------------------------------------------
# Measuring


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


# ---------------------------------------------------------------------------------------------------------------------
# A bundle, from its config


def bundle_config(name: str, overlays: list[str], weights: Path | None = None) -> ConfigParser:
    """The bundle's inference config; the network is built from it, as a run would."""
    root = REPO / "bundles" / name
    parser = ConfigParser()
    parser.read_config([str(root / "configs" / f"{c}.json") for c in ("inference", *overlays)])
    parser["bundle_root"] = str(root)
    if weights is not None:
        parser["weights"] = str(weights)
    return parser


def kind_of(parser: ConfigParser) -> str:
    """What the bundle makes first: "image" or "mask"."""
    return next(iter(parser["saver"]["outputs"].values()))


def network_of(parser: ConfigParser, device: torch.device, trained: bool = True) -> torch.nn.Module:
    """The bundle's network, with its weights if they are there."""
    network = parser.get_parsed_content("network_def")
    weights = Path(parser.get_parsed_content("weights"))
    if trained and weights.is_file():
        try:
            network.load_state_dict(torch.load(weights, weights_only=True))
        except RuntimeError as error:
            raise SystemExit(f"{weights} are of another size: give --weights, or --skip-samplers") from error
    elif trained:
        print(f"{weights} do not exist: samples come from an untrained network\n", flush=True)
    return network.to(device)


def plain_twin(parser: ConfigParser, ours: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """MONAI's network as its defaults make it, or the bundle's own without fused attention; weights are equal."""
    stock = STOCK.get(parser["network_def"]["_target_"])
    if stock is None:
        parser["network_def::use_flash_attention"] = False
        plain = parser.get_parsed_content("network_def")
    else:
        keys = [key for key in parser["network_def"] if not key.startswith("_") and key not in OURS_ONLY]
        arguments = {key: parser.get_parsed_content(f"network_def::{key}") for key in keys}
        plain = stock(**{**arguments, "use_flash_attention": False})
    plain.load_state_dict(ours.state_dict(), strict=True)
    return plain.to(device)


def random_condition(network: Any, image: torch.Tensor) -> tuple[torch.Tensor, str]:
    """A condition for a batch, and how it reaches the network: further channels, or a row beside the image."""
    channels = network.in_channels - network.out_channels
    if channels:
        return torch.randn(len(image), channels, *image.shape[2:], device=image.device).sign(), "concat"
    return torch.rand(len(image), network.num_statistics, device=image.device), "crossattn"


# ---------------------------------------------------------------------------------------------------------------------
# The fast path


def measure_paths(parser: ConfigParser, batch: int, runs: int, device: torch.device, compile: bool) -> list[list[str]]:
    """Rows: network call and training step, plain against fast."""
    ours: Any = network_of(parser, device, trained=False)
    plain = plain_twin(parser, ours, device)
    size = parser.get_parsed_content("patch_size" if "patch_size" in parser else "image_size")
    image = torch.randn(batch, ours.out_channels, *size, device=device)
    condition, mode = random_condition(ours, image)
    forward: dict[str, Any] = {
        "noise": torch.randn_like(image),
        "timesteps": torch.full((batch,), 100, device=device),
        "condition": condition,
        "mode": mode,
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


# ---------------------------------------------------------------------------------------------------------------------
# Samplers of volumes


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


# ---------------------------------------------------------------------------------------------------------------------
# Samplers of masks


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


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def print_volumes(config: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> None:
    """The table of samplers of a bundle that makes volumes."""
    rows = measure_volumes(config, arguments.bundle, device, arguments.calls or CALLS["image"])
    print(table(["sampler", "calls", "time", "RMSE to 250 calls", "inside the layout"], rows), flush=True)


def print_masks(config: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> None:
    """The tables of samplers of a bundle that makes masks."""
    bench = MaskBench(config, arguments.cases, device)
    steps = config["num_inference_steps"] if bench.full != config["num_inference_steps"] else 20
    header = ["one mask", "this way", "ours", "ratio"]
    print(table(header, measure_batching(bench, arguments.runs, steps)) + "\n", flush=True)
    print(f"{arguments.cases} masks, each lesion drawn once:\n", flush=True)
    rows = measure_masks(bench, arguments.calls or CALLS["mask"])
    print(table(["sampler", "calls", "one mask", *CONTROL], rows), flush=True)


SAMPLERS = {"image": print_volumes, "mask": print_masks}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="name of a bundle")
    parser.add_argument("--preset", action="append", default=[], help="overlay to apply, e.g. paper; repeatable")
    parser.add_argument("--weights", type=Path, help="other weights than the config names")
    parser.add_argument("--runs", type=int, default=5, help="timed pairs (default: 5)")
    parser.add_argument("--batch", type=int, help="cases in a call (default: the recipe's batch_size, without presets)")
    parser.add_argument("--calls", type=int, nargs="*", help="of the short samplers (default: as the bundle needs)")
    parser.add_argument("--cases", type=int, default=64, help="masks to draw with each sampler (default: 64)")
    parser.add_argument("--compile", action="store_true", help="let the fast path compile the network too")
    parser.add_argument("--skip-samplers", action="store_true", help="time the network only")
    arguments = parser.parse_args()
    if not (REPO / "bundles" / arguments.bundle).is_dir():
        parser.error(f"no bundle {arguments.bundle} in {REPO / 'bundles'}")
    if arguments.weights is not None and not arguments.weights.is_file():
        parser.error(f"no weights {arguments.weights}")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that single draws miss is what the tables tell

    batch = arguments.batch or bundle_config(arguments.bundle, [])["batch_size"]
    config = bundle_config(arguments.bundle, arguments.preset, arguments.weights)
    print(f"{machine(device)}; {' + '.join(['inference', *arguments.preset])}\n", flush=True)
    unit = "one case" if batch == 1 else f"{batch} cases"
    header = [unit, "plain", "fast path", "ratio", "peak memory, plain", "peak memory, fast"]
    rows = measure_paths(config, batch, arguments.runs, device, arguments.compile)
    print(table(header, rows) + "\n", flush=True)
    if not arguments.skip_samplers:
        config = bundle_config(arguments.bundle, arguments.preset, arguments.weights)
        SAMPLERS[kind_of(config)](config, arguments, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
