"""Measure a bundle on this machine: what the fast path gains, and what fewer sampling calls cost.

    python tools/benchmark.py lung_ddpm [--preset paper] [--runs 5] [--skip-samplers]
    python tools/benchmark.py cmdm [--weights FILE] [--cases 64]
    python tools/benchmark.py siamese_diffusion [--batch 16] [--cases 16] [--calls 20 10]
    python tools/benchmark.py guidegen [--batch 4] [--cases 16] [--volume 64 128 128]
    python tools/benchmark.py lesion_diffusion [--batch 4] [--cases 6] [--calls 5 10 15]

Prints Markdown for docs/README.md; what is timed in pairs, as medians. "Plain" is MONAI's ``DiffusionModelUNet`` as its
defaults make it, or the bundle's own network where MONAI has none: float32, contiguous, attention materialised, a
gradient for everything.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import DiffusionInferer, Inferer

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.execution import FastPath  # noqa: E402
from common.schedules import DDPM  # noqa: E402
from tools.benchmark_guidegen import cascade_samplers, mask_paths  # noqa: E402
from tools.benchmark_lesions import lesion_paths, lesion_samplers  # noqa: E402
from tools.benchmark_masks import mask_samplers  # noqa: E402
from tools.benchmark_siamese import pair_samplers, siamese_paths  # noqa: E402
from tools.benchmark_volumes import volume_samplers  # noqa: E402
from tools.measuring import bundle_config, cases_of, compared, machine, network_of, plain_twin, table  # noqa: E402

Tables = Callable[[ConfigParser, argparse.Namespace, torch.device], Iterator[str]]

# ---------------------------------------------------------------------------------------------------------------------
# The fast path of a network that reads one condition


def single_paths(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The table of network call and training step."""
    rows = measure_paths(parser, arguments.batch, arguments.runs, device, arguments.compile)
    unit = cases_of(arguments.batch)
    yield table([unit, "plain", "fast path", "ratio", "peak memory, plain", "peak memory, fast"], rows)


def cascade_paths(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables of a cascade's two networks."""
    yield from mask_paths(parser, arguments, device)
    yield "The network of the images:"
    yield from single_paths(parser, arguments, device)


def random_condition(network: Any, image: torch.Tensor) -> tuple[torch.Tensor, str]:
    """A condition for a batch, and how it reaches the network: further channels, or a row beside the image."""
    channels = network.in_channels - network.out_channels
    if channels:
        return torch.randn(len(image), channels, *image.shape[2:], device=image.device).sign(), "concat"
    return torch.rand(len(image), network.num_statistics, device=image.device), "crossattn"


def measure_paths(parser: ConfigParser, batch: int, runs: int, device: torch.device, compile: bool) -> list[list[str]]:
    """Rows: network call and training step, plain against fast."""
    ours: Any = network_of(parser, device, trained=False)
    plain = plain_twin(parser, ours, device)
    names = ("network_size", "patch_size", "image_size")
    size = parser.get_parsed_content(next(name for name in names if name in parser))
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

    return [
        compared(title, make(noising, plain), make(fast, ours), runs, device)
        for title, make in (("network call", call), ("training step", step))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The command

# What a bundle makes, and "report" if it reads one -> tables of its network, tables of its samplers.
KINDS: dict[frozenset[str], tuple[Tables, Tables]] = {
    frozenset({"image", "layout"}): (single_paths, volume_samplers),
    frozenset({"mask"}): (single_paths, mask_samplers),
    frozenset({"image", "mask"}): (siamese_paths, pair_samplers),
    frozenset({"report", "image", "layout"}): (cascade_paths, cascade_samplers),
    frozenset({"image", "label"}): (lesion_paths, lesion_samplers),
}


def kind_of(parser: ConfigParser) -> frozenset[str]:
    """What the bundle makes of a case, and of what if that is a report."""
    read = {"report"} if "reports" in parser else set()
    return frozenset(parser["saver"]["outputs"].values()) | read


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="name of a bundle")
    parser.add_argument("--preset", action="append", default=[], help="overlay to apply, e.g. paper; repeatable")
    parser.add_argument("--weights", type=Path, help="other weights than the config names")
    parser.add_argument("--runs", type=int, default=5, help="timed pairs (default: 5)")
    parser.add_argument("--batch", type=int, help="cases in a call (default: the recipe's batch_size, without presets)")
    parser.add_argument("--calls", type=int, nargs="*", help="of the short samplers (default: as the bundle needs)")
    parser.add_argument("--cases", type=int, help="to draw with each sampler (default: 64 masks, else 16)")
    parser.add_argument(
        "--volume", type=int, nargs=3, default=[64, 128, 128], metavar=("X", "Y", "Z"),
        help="of the categorical work (default: the published 64 128 128)",
    )  # fmt: skip
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

    arguments.batch = arguments.batch or bundle_config(arguments.bundle, [])["batch_size"]
    print(f"{machine(device)}; {' + '.join(['inference', *arguments.preset])}\n", flush=True)
    for make in KINDS[kind_of(bundle_config(arguments.bundle, []))][: 1 if arguments.skip_samplers else 2]:
        config = bundle_config(arguments.bundle, arguments.preset, arguments.weights)  # making tables changes it
        for text in make(config, arguments, device):
            print(text + "\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
