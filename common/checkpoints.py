"""Other people's weights into our networks: read without running code, rename by rules that are data, account for every key.

`read_weights` opens a file, `CheckpointLoader` puts it into a network from a config, and `translate` turns a foreign state
dict into ours. All are strict both ways: a key that is left over, missing or of another shape is an error that lists it.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import monai.handlers
import torch
from ignite.engine import Engine
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MAX_BYTES = 8 * 2**30


class CheckpointError(ValueError):
    """A weights file is unusable or does not fit; the message names file, cause and fix."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_weights(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read tensors from a ``.safetensors`` or PyTorch file on the CPU; code inside a pickle is never run.

    Args:
        path: the file; nested dicts of tensors and plain values are kept as they are.
        max_bytes: refuse larger files, also when they unpack to more.

    Returns:
        what the file holds, usually ``{name: tensor}`` or such dicts one level down.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} do not exist: train first, fetch them, or run tools/import_weights.py")
    _check_file(path, max_bytes)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of tensors: save a state dict")
    return dict(content)


def _check_file(path: Path, max_bytes: int) -> None:
    """Recognise, by size and first bytes, what is often saved in place of weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        raise CheckpointError(f"{path} is empty: the download failed, fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git-LFS pointer, not the weights: run `git lfs pull` or fetch the raw file")
    if head.startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, the download failed: fetch the raw file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    elif head.startswith(b"pk\x03\x04"):
        raise CheckpointError(f"{path} is cut off (a zip without its end): fetch it again")
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size} bytes, more than the limit of {max_bytes}: raise max_bytes if you trust it")


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError  # here, as only users of this format need the package
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not in safetensors format ({error}): fetch it again") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise CheckpointError(f"{path} is damaged or no PyTorch file: fetch it again") from error
        raise CheckpointError(
            f"{path} wants to run code ({wanted[1]}) and is refused: if you trust its author, save its plain tensors "
            "with torch.save(state_dict, ...) on a machine that may run that code"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is damaged, cut off or no PyTorch state dict ({reason}): fetch it again") from error


class CheckpointLoader(monai.handlers.CheckpointLoader):
    """MONAI's handler, but strict and telling: loads at the start of a run, and lists what does not fit.

    Arguments are MONAI's; `load_path` may be ``.safetensors``. The file holds a plain state dict, or one under the name
    used in `load_dict`, "model" or "state_dict". With ``strict=False`` whatever does not fit is skipped with a warning.
    """

    def __call__(self, engine: Engine) -> None:
        """Load every object of `load_dict`."""
        content = read_weights(self.load_path)
        for name, item in self.load_dict.items():
            inner = next((content[k] for k in (name, "model", "state_dict") if isinstance(content.get(k), Mapping)), None)
            if inner is None and len(self.load_dict) > 1:
                raise CheckpointError(f"{self.load_path} has no entry {name!r}, only {', '.join(map(repr, content))}")
            state = content if inner is None else inner
            if isinstance(item, nn.Module):
                self._load(_unwrap(item), state)
            else:
                item.load_state_dict(state)
        self.logger.info(f"Restored all variables from {self.load_path}")

    def _load(self, network: nn.Module, state: Mapping[str, Any]) -> None:
        problems = compare(state, network.state_dict())
        if problems and self.strict:
            raise CheckpointError(
                f"{self.load_path} does not fit the network: {problems}. Weights and knobs differ: pass the overlay that "
                "tools/import_weights.py wrote (models/imported.json), the knobs of that training, or train again"
            )
        if problems:
            self.logger.warning(f"{self.load_path} fits in part only: {problems}")
        target = network.state_dict()
        network.load_state_dict({k: v for k, v in state.items() if _fits(v, target.get(k))}, strict=self.strict)


def compare(state: Mapping[str, Any], target: Mapping[str, Tensor]) -> str:
    """Say in one line what keeps `state` from filling `target`; empty if it fits."""
    shapes = [
        f"{k} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}, network has {tuple(target[k].shape)}"
        for k, v in state.items()
        if k in target and not _fits(v, target[k])
    ]
    found = {
        "missing": [k for k in target if k not in state],
        "unexpected": [k for k in state if k not in target],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in found.items() if keys)


def _fits(value: Any, target: Tensor | None) -> bool:
    return target is not None and isinstance(value, Tensor) and value.shape == target.shape


def _some(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (", ..." if len(keys) > limit else "")


def _unwrap(network: nn.Module) -> nn.Module:
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return network.module if isinstance(network, parallel) else network
