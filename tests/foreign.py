"""A foreign bundle with nothing wrong, in the manner of the model zoo; attacks that change it; what is said of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

from tools import untrusted

Files = dict[str, bytes]


def saved(content: Any, **settings: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def array(content: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, content)
    return file.getvalue()


def dumped(content: Any) -> bytes:
    return json.dumps(content, indent=4).encode()


INFERENCE = {
    "imports": ["$import glob", "$import os", "$import json", "$from pathlib import Path", "$import scripts"],
    "bundle_root": ".",
    "output_dir": "$@bundle_root + '/eval'",
    "dataset_dir": "/workspace/data/Task09_Spleen",
    "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "create_output_dir": "$Path(@output_dir).mkdir(exist_ok=True)",
    "network_def": {"_target_": "UNet", "spatial_dims": 3, "channels": [16, 32], "strides": [2], "norm": "batch"},
    "network": "$@network_def.to(@device)",
    "head": {"_target_": "scripts.net.Head", "width": "$@network_def#channels[0]"},
    "optimizer": "$torch.optim.Adam(@network.parameters(), 1e-4)",
    "checkpoint": "$torch.load(@bundle_root + '/models/model.pt', weights_only=True)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: np.clip(x, -57, 164).astype(np.float32)"},
            {"_target_": "CastToTyped", "keys": "image", "dtype": ["$torch.float32"], "_disabled_": "$not @amp"},
        ],
    },
    "amp": True,
    "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "collate_fn": "$monai.data.utils.no_collation"},
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [96, 96, 96], "overlap": 0.5},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "writer": "PILWriter"},
        ],
    },
    "again": "%postprocessing#transforms",
    "handlers": [
        {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        {"_target_": "StatsHandler", "output_transform": "$lambda x: monai.handlers.from_engine(['loss'])(x)"},
    ],
    "evaluator": {"_target_": "SupervisedEvaluator", "_requires_": "@create_output_dir", "val_handlers": "@handlers"},
    "tidy": {"_target_": "ignite.metrics.Accuracy", "_mode_": "callable", "_desc_": "why: @nothing, and 50 %"},
    "initialize": [
        "$import torch.distributed as dist",
        "$dist.is_initialized() or dist.init_process_group(backend='nccl')",
        "$monai.utils.set_determinism(seed=123)",
        "$setattr(torch.backends.cudnn, 'benchmark', True)",
        "$torch.cuda.set_device(int(os.environ['LOCAL_RANK']))",
        "$scripts.net.announce(getattr(@network, 'depth', 3), json.loads('[1]'), x=f'{2 + 2:.1f}')",
    ],
    "run": ["$@evaluator.run()"],
}
TRAIN = {
    "+imports": ["$from scipy import ndimage"],
    "evaluator#val_handlers": "$@handlers[: -2 if dist.get_rank() > 0 else None]",
    "grow": "$lambda x, s=2: np.concatenate(tuple([ndimage.binary_dilation(x == _k) for _k in range(s)]), axis=0)",
    "relative": {"a": 1, "b": "$@#a + 1", "c": {"d": "@##a"}},
    "metrics": {"_target_": "monai.handlers.MeanDice", "output_transform": "$monai.handlers.from_engine(['pred'])"},
}
LOGGING = b"""[loggers]
keys=root
[handlers]
keys=console,file
[formatters]
keys=full
[logger_root]
level=INFO
handlers=console,file
[handler_console]
class=StreamHandler
formatter=full
args=(sys.stdout,)
[handler_file]
class=logging.handlers.RotatingFileHandler
args=('run.log', 'a', 1000)
[formatter_full]
format=%(asctime)s - %(message)s
"""
NET = b'''"""A head."""
from __future__ import annotations

import importlib.metadata
import logging
import os
import re
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import nn

from .parts import width

PATTERN = re.compile("a|b")


class Head(nn.Module):
    def __init__(self, compile: bool = False) -> None:
        super().__init__()
        self.net, self.compiled = UNet(2, 1, 1, (4, 8), (2,)), compile
        self.dtype = getattr(torch, "float32")

    def load(self, path: str) -> None:
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        np.save(os.path.join("out", "x.npy"), np.load(path))
        self.eval()
        with open(path) as file, Path("log.txt").open() as other:
            logging.info("%s %s", file.read(), other.read())
        for name in ("a", "b"):
            setattr(self, name, getattr(self, name, None))


def announce(*values: object, x: str = "") -> str:
    return importlib.metadata.version("monai")
'''
BENIGN: Files = {
    "LICENSE": b"Apache License",
    "configs/metadata.json": dumped({"version": "0.1.0", "schema": "https://example.org/schema.json", "task": "a, b"}),
    "configs/inference.json": dumped(INFERENCE),
    "configs/train.json": dumped(TRAIN),
    "configs/multi_gpu.yaml": b"device: \"$torch.device(f'cuda:{dist.get_rank()}')\"\nlr: 1.0e-05\nsame: [1, 2]\n",
    "configs/logging.conf": LOGGING,
    "docs/README.md": b"# A bundle",
    "models/model.pt": saved({"a": torch.zeros(2), "b": torch.ones(3, dtype=torch.float16), "c": {"epoch": 1}}),
    "models/table.npy": array(np.arange(3)),
    "scripts/__init__.py": b"",
    "scripts/net.py": NET,
    "scripts/parts.py": b"width = 3\n",
}


def zipped(files: Files, *more: tuple[zipfile.ZipInfo | str, bytes], top: str = "spleen/") -> bytes:
    """Pack files, and entries as they are, into a zip."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{top}{name}", content)
        for entry, content in more:
            archive.writestr(entry, content)
    return target.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Attacks

BANG = "__import__('os').system('touch canary')"
Attack = Callable[[Files], bytes | None]  # changes the files, or makes the zip itself


class Evil:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def put(name: str, content: bytes | str) -> Attack:
    """Make an attack that adds or replaces a file."""
    return lambda files: files.update({name: content.encode() if isinstance(content, str) else content})


def config(**items: Any) -> Attack:
    """Make an attack in configs/inference.json."""
    return put("configs/inference.json", dumped(INFERENCE | items))


def overlay(**items: Any) -> Attack:
    """Make an attack in an overlay."""
    return put("configs/train.json", dumped(TRAIN | items))


def python(text: str) -> Attack:
    """Make an attack in the bundle's Python code."""
    return put("scripts/net.py", NET.decode() + text + "\n")


def changed(*attacks: Attack) -> Files:
    """The bundle, after attacks on its files."""
    files = dict(BENIGN)
    for attack in attacks:
        attack(files)
    return files


# ---------------------------------------------------------------------------------------------------------------------
# What is said, and what MONAI does


def write(files: Files, folder: Path) -> None:
    """Write files below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def reasons(content: bytes | Files, folder: Path, *allowed: str) -> list[str]:
    """What the linter says against a bundle, from an empty current folder; it writes nothing, and so runs no attack."""
    path, room = folder / "away" / "bundle", folder / "away" / "room"
    room.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(content, path)
    before = sorted(folder.rglob("*"))
    with contextlib.chdir(room):
        found = untrusted.inspect(path, allowed)
    assert sorted(folder.rglob("*")) == before, "the linter wrote or ran something"
    (shutil.rmtree if path.is_dir() else os.remove)(path)
    return found


def assert_refused(attack: Attack, words: str, folder: Path) -> None:
    """An attack on the bundle's files is refused with these words, from a zip and from a folder."""
    files = changed(attack)
    assert files != BENIGN
    found = reasons(zipped(files), folder)
    assert [reason for reason in found if words in reason], found
    assert sorted(reasons(files, folder)) == sorted(found)


def does_harm(attack: Attack, key: str, folder: Path) -> bool:
    """Let MONAI evaluate an item of an attacked bundle's configs -> whether the attack works."""
    configs = {name: changed(attack)[f"configs/{name}"] for name in ("inference.json", "train.json")}
    write(configs, folder)
    parser = ConfigParser()
    parser.read_config([str(folder / name) for name in configs])
    parser["imports"] = ["$import os"]
    with contextlib.chdir(folder), contextlib.suppress(RuntimeError, ValueError, TypeError, AttributeError):
        parser.get_parsed_content(key)
    return (folder / "canary").exists()
