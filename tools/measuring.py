"""What every benchmark is made of: clocks, memory, a bundle's network from its config, and Markdown tables.

Two ways of doing a thing hold equal weights and are timed in turn (A B A B ...), so that a drifting machine hits both.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.networks.nets import DiffusionModelUNet

REPO = Path(__file__).resolve().parents[1]

# Networks of ours for which MONAI's own class can stand in, and what that has no argument for.
STOCK = {"scripts.common.unet.DiffusionUNet": DiffusionModelUNet}
OURS_ONLY = ("max_period", "upsample_mode", "zero_init_attention", "transformer_norm_eps")

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


def compared(
    title: str, plain: Callable[[], Any], fast: Callable[[], Any], runs: int, device: torch.device
) -> list[str]:
    """A row: time of either way, their ratio, peak memory of either."""
    before, after = paired(plain, fast, runs, device)
    memory = [f"{peak_memory(action, device):.0f} MiB" for action in (plain, fast)]
    return [title, f"{before:.3f} s", f"{after:.3f} s", f"**{before / after:.1f} x**", *memory]


def cases_of(batch: int) -> str:
    """How many cases, in words."""
    return "one case" if batch == 1 else f"{batch} cases"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


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
        for key in [k for k, v in parser.get().items() if isinstance(v, dict) and "use_flash_attention" in v]:
            parser[f"{key}::use_flash_attention"] = False
        plain = parser.get_parsed_content("network_def")
    else:
        keys = [key for key in parser["network_def"] if not key.startswith("_") and key not in OURS_ONLY]
        arguments = {key: parser.get_parsed_content(f"network_def::{key}") for key in keys}
        plain = stock(**{**arguments, "use_flash_attention": False})
    plain.load_state_dict(ours.state_dict(), strict=True)
    return plain.to(device)
