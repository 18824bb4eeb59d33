"""Bundles as data: their configs, read and parsed from wherever we are, and the networks these build."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

Check = Callable[[Path], list[str]]  # a bundle's folder -> problems, none if all is well

DATA = {"metadata", "import_rules"}  # JSON in configs/ that is no MONAI config
SKIPPED = {"output", "data", "eval", "mlruns"}  # folders that runs leave in a bundle, and that are no part of it
# Knobs that name a file of weights, and the component it fills.
FILLS = {"weights": "network_def", "mask_weights": "mask_network_def", "autoencoder_weights": "autoencoder_def"}
FILLS |= {"pair_autoencoder_weights": "pair_autoencoder_def"}


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, of which MONAI silently takes the last, are an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{path.name}: key {max(keys, key=keys.count)!r} stands twice")
        return dict(pairs)

    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)


def configs(bundle: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """Read all configs -> (bases, overlays); a base is complete alone: `train`, `inference`, any with a head."""
    found = {p.stem: read(p) for p in sorted((bundle / "configs").glob("*.json")) if p.stem not in DATA}
    bases = {name: c for name, c in found.items() if name in ("train", "inference") or "bundle_root" in c}
    return bases, {name: c for name, c in found.items() if name not in bases}


def walk(item: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (id, value) of an item and of all that it holds."""
    yield path, item
    pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in pairs:
        yield from walk(value, f"{path}::{key}" if path else str(key))


def everything(bundle: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file and id, value) over all configs."""
    for group in configs(bundle):
        for name, content in group.items():
            yield from ((f"{name}.json {path}", value) for path, value in walk(content))


def parser(bundle: Path, *names: str) -> ConfigParser:
    """Parse configs of a bundle, wherever we are, on the CPU."""
    result = ConfigParser()
    result.read_config([str(bundle / "configs" / f"{name}.json") for name in names])
    result["bundle_root"], result["device"] = str(bundle), "cpu"
    return result


def build(parsed: ConfigParser, device: str = "meta", network: str = "network_def") -> torch.nn.Module:
    """Build a network; on ``"meta"`` it has shapes and no memory."""
    with torch.device(device):
        return parsed.get_parsed_content(network).eval()


def grid(parsed: ConfigParser) -> list[int]:
    """Spatial shape of what the network denoises: of its own name, or of a latent, a patch, or the image."""
    names = ("network_size", "latent_size", "patch_size", "image_size")
    return list(parsed.get_parsed_content(next(k for k in names if k in parsed)))


def channels_of(network: Any) -> tuple[int, int]:
    """Channels that a network takes and gives."""
    return network.in_channels, network.out_channels
