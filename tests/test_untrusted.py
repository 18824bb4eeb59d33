"""The linter of foreign bundles refuses what would run, write or hide something, says why, and runs nothing of it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_command
from monai.bundle import ComponentLocator, ConfigParser, ReferenceResolver

from tools import package, untrusted

REPO = Path(__file__).resolve().parents[1]
TOOL = REPO / "tools" / "untrusted.py"
BUNDLES = sorted((REPO / "bundles").glob("*/configs"))
GRANTED = "network,dynamic"  # what the Python code of this repository's bundles needs

Files = dict[str, bytes]


# ---------------------------------------------------------------------------------------------------------------------
# A bundle with nothing wrong, in the manner of the model zoo


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
LARGE = {"path": "models/big.pt", "url": "https://example.org/big.pt", "hash_val": "0" * 64, "hash_type": "sha256"}


def zipped(files: Files, *more: tuple[zipfile.ZipInfo | str, bytes], top: str = "spleen/") -> bytes:
    """Pack files, and entries as they are, into a zip."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{top}{name}", content)
        for entry, content in more:
            archive.writestr(entry, content)
    return target.getvalue()


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where whatever runs would leave a canary."""
    folder = tmp_path / "room"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def reasons(content: bytes | Files, folder: Path, *allowed: str) -> list[str]:
    """What the linter says against a bundle; it leaves nothing behind."""
    path = folder / "bundle"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        for name, data in content.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    before = sorted(folder.parent.rglob("*"))
    found = untrusted.inspect(path, allowed)
    assert sorted(folder.parent.rglob("*")) == before, "the linter wrote something"
    assert not Path("canary").exists(), "the linter ran something"
    (shutil.rmtree if path.is_dir() else os.remove)(path)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Hostile bundles

BANG = "__import__('os').system('touch canary')"
Attack = Callable[[Files], bytes | None]  # changes the files, or makes the zip itself


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


def entry(name: str, mode: int = 0o100644, content: bytes = b"x", **fields: Any) -> Attack:
    """Make an attack by an entry of the zip."""

    def attack(files: Files) -> bytes:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.create_system = mode << 16, 3
        for field, value in fields.items():
            setattr(info, field, value)
        return zipped(files, (info, content))

    return attack


def forged(old: bytes, new: bytes, count: int = -1) -> Attack:
    """Make an attack by changing the bytes of a zip that holds two files more."""

    def attack(files: Files) -> bytes:
        stored = zipfile.ZipInfo("spleen/docs/second.txt")  # not compressed
        data = zipped(files, ("spleen/docs/first.txt", b"one"), (stored, b"unforgeable"))
        assert old in data
        return data.replace(old, new, count)

    return attack


def around(before: bytes = b"", after: bytes = b"") -> Attack:
    return lambda files: before + zipped(files) + after


def overlapping(files: Files) -> bytes:
    """The directory leads to one file twice."""
    data = bytearray(zipped(files))
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    struct.pack_into("<I", data, second + 42, 0)
    return bytes(data)


def encrypted(files: Files) -> bytes:
    data = bytearray(zipped(files))
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def described_twice(files: Files) -> bytes:
    data = bytearray(zipped(files))
    data[8] = 0  # stored, says the file; deflated, says the directory
    return bytes(data)


def hiding(files: Files) -> bytes:
    """Bytes between the last file and the directory."""
    data = bytearray(zipped(files))
    start = struct.unpack_from("<I", data, len(data) - 6)[0]
    struct.pack_into("<I", data, len(data) - 6, start + 6)
    return bytes(data[:start] + b"hidden" + data[start:])


def commented(files: Files) -> bytes:
    data = bytearray(zipped(files))
    struct.pack_into("<H", data, len(data) - 2, 5)
    return bytes(data) + b"hello"


class Evil:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def inside_weights(**parts: bytes) -> Attack:
    """Make an attack by parts of a file as torch.save writes it."""

    def attack(files: Files) -> None:
        source = zipfile.ZipFile(io.BytesIO(files["models/model.pt"]))
        content = {name: source.read(name) for name in source.namelist()}
        files["models/model.pt"] = zipped(
            content | {f"archive/{n.replace('__', '/')}": d for n, d in parts.items()}, top=""
        )

    return attack


def twice_inside(files: Files) -> None:
    """Two pickles of one name in the weights, of which readers take different ones."""
    target = io.BytesIO(files["models/model.pt"])
    with zipfile.ZipFile(target, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(), 2))
    files["models/model.pt"] = target.getvalue()


def large(**items: Any) -> Attack:
    return put("large_files.yml", json.dumps({"large_files": [LARGE | items]}))


def log(old: str, new: str) -> Attack:
    assert old in LOGGING.decode()
    return put("configs/logging.conf", LOGGING.decode().replace(old, new))


def without(name: str) -> Attack:
    return lambda files: files.pop(name) and None


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


CONTAINERS: dict[str, tuple[Attack, str]] = {
    "path upwards": (entry("spleen/../../canary"), "leads out of the bundle's folder"),
    "absolute path": (entry("/tmp/canary"), "absolute path"),
    "home folder": (entry("~/canary"), "absolute path"),
    "drive": (entry("C:/canary"), "absolute path"),
    "backslash": (forged(b"spleen/docs/first.txt", b"spleen\\..\\..\\canaries"), "backslash"),
    "colon": (entry("spleen/docs/a.txt:stream"), "colon"),
    "NUL in a name": (forged(b"docs/first.txt", b"docs/first\0txt"), "not shown"),
    "text runs backwards": (entry("spleen/docs/\u202etxt.exe"), "not shown"),
    "dot at the end": (entry("spleen/docs/a.txt."), "Windows drops"),
    "space at the end": (entry("spleen/docs /a.txt"), "Windows drops"),
    "device": (entry("spleen/docs/NUL.txt"), "device on Windows"),
    "symbolic link": (entry("spleen/docs/link", stat.S_IFLNK | 0o777, b"/etc/passwd"), "symbolic link"),
    "pipe": (entry("spleen/docs/pipe", stat.S_IFIFO | 0o644), "no regular file"),
    "setuid": (entry("spleen/docs/tool", stat.S_IFREG | 0o4755), "setuid"),
    "name twice": (entry("spleen/configs/metadata.json"), "stands 2 times"),
    "name twice but for capitals": (entry("spleen/configs/METADATA.json"), "stands 2 times"),
    "name twice but for its letters": (entry("spleen/configs/\uff4detadata.json"), "stands 2 times"),
    "second name": (entry("spleen/docs/a.txt", extra=struct.pack("<HH", 0x7075, 1) + b"x"), "has a second name"),
    "two folders": (entry("other/docs/a.txt"), "2 things at the top"),
    "no folder": (lambda files: zipped(files, top=""), "things at the top"),
    "bomb": (entry("spleen/docs/a.txt", content=b"0" * 2**21, compress_type=zipfile.ZIP_DEFLATED), "a bomb"),
    "rare compression": (entry("spleen/docs/a.txt", compress_type=zipfile.ZIP_LZMA), "compressed in a rare way"),
    "encrypted": (encrypted, "is encrypted"),
    "two names of one file": (forged(b"docs/first.txt", b"docs/other.txt", 1), "cannot be read"),
    "other content than its checksum": (forged(b"unforgeable", b"unfOrgeable"), "cannot be read"),
    "no header": (forged(b"PK\3\4", b"PK\3\5", 1), "has no header of its own"),
    "compressed in two ways": (described_twice, "is described in two ways"),
    "bytes before the directory": (hiding, "belong to none"),
    "overlapping files": (overlapping, "overlaps another file"),
    "program before the zip": (around(b"#!/bin/sh\ntouch canary\n"), "hides bytes before it"),
    "second zip behind the zip": (lambda files: zipped(files) + zipped(files), "hides bytes before it"),
    "bytes behind the zip": (around(after=b"touch canary"), "follows the directory"),
    "comment": (commented, "follows the directory"),
    "cut off": (lambda files: zipped(files)[:-200], "no zip"),
    "cut in the middle": (lambda files: zipped(files)[100:], "no zip, or a damaged one"),
    "not a zip": (lambda files: b"<html>404</html>", "no zip"),
    "empty": (lambda files: b"", "no zip"),
}
KEY = "a if os.system('touch canary') else @c"  # a relative reference below it becomes this text
ATTACKS: dict[str, tuple[Attack, str]] = {
    # files
    "no metadata": (without("configs/metadata.json"), "this is no bundle"),
    "hidden": (put(".git/hooks/post-checkout", "touch canary"), "is hidden"),
    "compiled Python": (put("scripts/__pycache__/net.cpython-311.pyc", b"x"), "is hidden"),
    "library": (put("scripts/fast.so", b"x"), "is a program"),
    "shell script": (put("docs/install.sh", "touch canary"), "is a program"),
    "library by another name": (put("docs/notes.txt", b"\x7fELF\2\1\1"), "in truth a program"),
    "script by another name": (put("docs/notes.md", "#!/bin/sh\ntouch canary"), "in truth a program"),
    "archive": (put("docs/more.zip", zipped({"a": b""})), "an archive in the archive"),
    "archive by another name": (put("docs/more.txt", zipped({"a": b""})), "in truth an archive"),
    "tar by another name": (put("docs/more.txt", b"\0" * 257 + b"ustar"), "in truth an archive"),
    "gzip": (put("docs/more.tar.gz", b"\x1f\x8b"), "an archive in the archive"),
    "Python beside scripts": (put("torch.py", "open('canary', 'w')"), "may take a library's place"),
    "Python beside the configs": (put("configs/numpy/__init__.py", "1"), "may take a library's place"),
    "run by itself": (put("scripts/sitecustomize.py", "1"), "may take a library's place"),
    "path file": (put("docs/x.pth", "import os; os.system('touch canary')"), "is no zip"),
    # expressions
    "runs a command": (config(x=f"${BANG}"), "'__import__' is not for configs"),
    "imports os for its commands": (config(x="$os.system('touch canary')"), "'system' leads out of os"),
    "imports a command": (config(x="$from os import system"), "'system' leads out of os"),
    "imports subprocess": (config(x="$import subprocess"), "subprocess is not among the packages"),
    "imports everything": (config(x="$from glob import *"), "imports everything"),
    "imports by another name": (config(imports=["$import os as glob"], x="$glob.remove('a')"), "os.remove is not"),
    "import of an overlay": (overlay(y=["$import shutil as s"], x="$s.rmtree('/')"), "'rmtree'"),
    "evaluates": (config(x="$eval('1')"), "'eval' is not for configs"),
    "evaluates by another": (config(x="$list(map(exec, ['1']))"), "'exec' is not for configs"),
    "shadows eval": (config(x="$(lambda eval: 0)(0) or eval('1')"), "'eval' is not for configs"),
    "opens a file": (config(x="$open('canary', 'w')"), "'open' is not for configs"),
    "writes a file": (config(x="$Path('canary').write_text('x')"), "'write_text'"),
    "moves a file": (config(x="$Path('a').replace('b')"), "moves a file"),
    "moves a file by another": (config(x="$list(map(Path('a').replace, ['b']))"), "moves a file"),
    "moves a file by its class": (config(x="$Path.replace(Path('a'), 'b')"), "moves a file"),
    "sets an attribute in a loop": (config(x="$[0 for torch.nn.Module.forward in [print]]"), "assigns to torch.nn"),
    "sets a reference in a loop": (config(x="$[0 for @network in [print]]"), "assigns to"),
    "saves a file": (config(x="$np.savetxt('/home/me/.bashrc', ['touch canary'], fmt='%s')"), "'savetxt' leads out"),
    "climbs to object": (config(x="$().__class__.__base__.__subclasses__()"), "'__class__' may lead anywhere"),
    "climbs by getattr": (config(x="$getattr((), '__class__')"), "'__class__'"),
    "computes an attribute": (config(x="$getattr(@network, 'ev' + 'al')"), "getattr hides"),
    "hands on getattr": (config(x="$functools.reduce(getattr, [], 1)", y="$import functools"), "getattr hides"),
    "hides an attribute": (config(x="$getattr(*@datalist)"), "getattr hides"),
    "sets an attribute": (config(x="$setattr(torch, 'load', print)"), "setattr is for torch.backends"),
    "format string": (config(x="$'{0.__class__}'.format(@network)"), "the string"),
    "hands on a module": (config(x="$[os][0].path"), "os itself is handed on"),
    "module by reference": (config(m="$import os", x="$@m.getcwd()"), "hands on a module"),
    "module out of the imports": (config(x="$@imports[1].getcwd()"), "hands on a module"),
    "module through another": (config(x="$monai.data.utils.os.listdir('.')"), "'os' leads out of monai.data.utils"),
    "module through scripts": (config(x="$scripts.net.torch.hub.list('a/b')"), "'hub' leads out"),
    "frame": (config(x="$(i for i in [1]).gi_frame"), "'gi_frame' may lead anywhere"),
    "assigns": (config(x="$(y := 1)"), "NamedExpr has no place"),
    "unknown name": (config(x="$evil(1)"), "'evil' is not for configs, or unknown"),
    "table of modules": (config(y="$import sys", x="$sys.modules['os']"), "sys.modules is not among"),
    "head, but a little": (
        config(y="$import sys", x="$sys.path[0] == @bundle_root or sys.path.insert(0, @bundle_root)"),
        "sys.path is not among",
    ),
    "call stack": (config(y="$import traceback", x="$traceback.walk_stack(None)"), "'walk_stack' leads out"),
    "loads a pickle": (config(x="$torch.load('models/model.pt')"), "weights_only=True"),
    "loads a pickle, told to": (config(x="$torch.load('m.pt', weights_only=False)"), "weights_only must be True"),
    "loads a pickle, perhaps": (config(x="$torch.load('m.pt', **@amp)"), "hides its arguments"),
    "loads a pickled array": (config(x="$np.load('a.npy', None, True)"), "numpy.load with allow_pickle"),
    "evaluates by pandas": (config(x="$@dataset.eval('1')"), "eval runs its arguments"),
    "loads from a hub": (config(x="$torch.hub.load('a/b', 'c')"), "'hub' leads out of torch"),
    "loads a library": (config(x="$torch.ops.load_library('a.so')"), "'load_library'"),
    "downloads": (config(x="$monai.apps.download_url('http://a', 'b')"), "'download_url'"),
    "runs a bundle": (config(x="$monai.bundle.run(config_file='b.json')"), "monai.bundle"),
    "looks up a class": (config(x="$monai.transforms.LoadImage('os' + '.system')"), "looks up classes by strings"),
    "looks up a class later": (config(x="$@head(reader='a')"), "reader is looked up by its name"),
    "scripts of another": (
        lambda files: [files.pop(name) for name in list(files) if name.startswith("scripts/")] and None,
        "scripts is not in this bundle",
    ),
    "names a command": (config(x="$@head('os.system')"), "the string 'os.system'"),
    "not Python": (config(x="$import os; os.system('touch canary')@"), "cannot be parsed"),
    "endless": (config(x="$" + "1+" * 6000 + "1"), "an expression of"),
    "deeper than Python": (config(x="$" + "-" * 9000 + "1"), ""),
    "code in quotes of a reference": (
        config(f=1, x="""$'@f {__import__("os").system("touch canary")}'"""),
        "'__import__' is not for configs",
    ),
    "code in a key": (config(a=1, c={"v": 1}, **{KEY: {"v": 1, "x": "$@#v"}}), "'system' leads out of os"),
    "code in a description": (config(x={"_target_": "Identityd", "_desc_": f"${BANG}"}), "'__import__'"),
    "code in a condition": (config(x={"_target_": "Identityd", "_disabled_": f"${BANG}"}), "'__import__'"),
    "code in a requirement": (config(x={"_target_": "Identityd", "_requires_": [f"${BANG}"]}), "'__import__'"),
    "code in the metadata": (put("configs/metadata.json", dumped({"version": f"${BANG}"})), "'__import__'"),
    "code in another JSON": (put("docs/example.json", dumped({"x": f"${BANG}"})), "'__import__'"),
    "code in YAML": (put("configs/more.yaml", f'x: "${BANG}"'), "'__import__'"),
    # components
    "command as a component": (
        config(x={"_target_": "os.system", "command": "touch canary"}),
        "'system' leads out of os",
    ),
    "builtin as a component": (config(x={"_target_": "builtins.exec"}), "'exec' leads out of builtins"),
    "builtin without its package": (config(x={"_target_": "open", "file": "canary", "mode": "w"}), "open is no class"),
    "MONAI's evaluation": (config(x={"_target_": "ConfigExpression", "config": "$1"}), "ConfigExpression is no class"),
    "MONAI's parser": (config(x={"_target_": "monai.bundle.ConfigParser"}), "monai.bundle"),
    "another package": (config(x={"_target_": "evil.Network"}), "evil is not among the packages"),
    "module of another": (config(x={"_target_": "scripts.evil.Network"}), "is not in this bundle"),
    "computed component": (config(x={"_target_": "$'os.' + 'system'"}), "computes what to call"),
    "hub by an expression": (config(x={"_target_": "$torch.hub.load"}), "'hub' leads out of torch"),
    "component that cannot be parsed": (config(x={"_target_": "$("}), "cannot be parsed"),
    "component by reference": (config(n="a", x={"_target_": "@n"}), "not a reference"),
    "component by macro": (config(n="a", x={"_target_": "%n"}), "not a reference"),
    "component of an object": (config(x={"_target_": "$@head.name"}), "computes what to call"),
    "component of a path": (overlay(**{"network_def#_target_": "os.system"}), "'system' leads out of os"),
    "component through another": (config(x={"_target_": "monai.networks.nets.torch.jit.load"}), "leads out"),
    "no path": (config(x={"_target_": "os.system('touch canary')"}), "is no dotted path"),
    "debugger": (config(x={"_target_": "UNet", "_mode_": "debug"}), "stops in a debugger"),
    "debugger by another": (config(x={"_target_": "UNet", "_debug_": True}), "stops in a debugger"),
    "command as a reader": (
        config(x={"_target_": "LoadImaged", "keys": "a", "reader": "os.system", "command": "touch canary"}),
        "'system' leads out of os",
    ),
    "builtin as a writer": (config(x={"_target_": "SaveImaged", "writer": "breakpoint"}), "no class to look up"),
    "computed reader": (config(x={"_target_": "LoadImaged", "reader": "$'os.' + 'system'"}), "computes a name"),
    "reader by reference": (config(r="a", x={"_target_": "LoadImaged", "reader": "@r"}), "not a reference"),
    "reader later": (config(x={"_target_": "LoadImaged", "_mode_": "callable"}), "is not for this component"),
    "command among strings": (config(x=["a", "subprocess.run"]), "may be looked up"),
    "pickled arrays": (config(x={"_target_": "LoadImaged", "allow_pickle": True}), "must be false"),
    "pickled weights": (config(x={"_target_": "torch.load", "f": "m.pt"}), "runs code unless weights_only"),
    "pickled weights by an expression": (config(x={"_target_": "$torch.load", "f": "m.pt"}), "runs code unless"),
    "pickled cache": (config(x={"_target_": "PersistentDataset", "weights_only": "@amp"}), "must be true"),
    "writes elsewhere": (config(output_dir="/home/me/.ssh"), "outside of the bundle"),
    "writes above": (config(x={"_target_": "StatsHandler", "log_dir": "../.."}), "outside of the bundle"),
    "macro elsewhere": (config(x="%/tmp/evil.json::a"), "reads a file that is not in the bundle"),
    "macro out of a key": (
        config(**{"/tmp/evil.json": {"v": 1, "x": "%#v"}}),
        "reads a file that is not in the bundle",
    ),
    "pickles of a peer": (
        config(y="$import torch.distributed as dist", x="$dist.broadcast_object_list([None])"),
        "is not for configs",
    ),
    "program through a reader": (
        config(x="$monai.data.image_reader.nib.pkg_info.run(['touch', 'canary'])"),
        "'nib' leads out of monai.data.image_reader",
    ),
    "macro above": (config(x="%../evil.json"), "reads a file that is not in the bundle"),
    "macro that is not there": (config(x="%configs/evil.yaml#a"), "reads a file that is not in the bundle"),
    # JSON and YAML
    "key twice": (put("configs/x.json", '{"a": "$1", "a": 1}'), "stands twice"),
    "key twice in YAML": (put("configs/x.yaml", "a: 1\na: 2\n"), "stands twice"),
    "not a number": (put("configs/x.json", '{"a": NaN}'), "NaN is no JSON"),
    "endless number": (put("configs/x.json", '{"a": 1' + "0" * 5000 + "}"), "a number of 5001 digits"),
    "nested": (put("configs/x.json", nested(90)), "nested 8"),
    "nested deeper": (put("configs/x.json", nested(200_000)), "nested too deep"),
    "not JSON": (put("configs/x.json", "{'a': 1}"), "cannot be judged"),
    "not UTF-8": (put("configs/x.json", b'{"a": "\xff"}'), "cannot be judged"),
    "object in YAML": (
        put("configs/x.yaml", "a: !!python/object/apply:os.system ['touch canary']"),
        "a tag or an alias",
    ),
    "not YAML": (put("configs/x.yaml", "a: ["), "is no YAML"),
    "laughs in YAML": (put("configs/x.yaml", "a: &a [1]\nb: [*a, *a]\n"), "a tag or an alias"),
    # logging
    "logs by code": (log("class=StreamHandler", "class=eval"), "class=eval is not among"),
    "logs to a server": (log("class=StreamHandler", "class=handlers.SocketHandler"), "is not among"),
    "logs with code": (log("(sys.stdout,)", f"({BANG},)"), "is code"),
    "logs with a module": (log("(sys.stdout,)", "(sys.modules,)"), "is code"),
    "logs with keywords": (log("(sys.stdout,)", "()\nkwargs={'stream': open('canary', 'w')}"), "is code"),
    "logs with a syntax error": (log("(sys.stdout,)", "("), "is code"),
    "logs elsewhere": (log("'run.log'", "'/home/me/.bashrc'"), "outside of the bundle"),
    "logs in another format": (log("format=%(asctime)s", f"class={BANG}\nformat=%(asctime)s"), "is not among"),
    "no logging": (put("configs/logging.conf", "keys=root"), "cannot be judged"),
    # files that come later
    "large file in the clear": (large(url="http://example.org/a.pt"), "is not https://"),
    "large file unchecked": (large(hash_val=""), "no hash_val"),
    "no list of large files": (put("large_files.yml", "large_files: 3"), "is no list of files"),
    "large file elsewhere": (large(path="../../canary"), "refused here"),
    "large file of Python": (large(path="scripts/net.py"), "refused here"),
    # weights
    "command in weights": (
        inside_weights(data__pkl=b"", **{"data.pkl": pickle.dumps(Evil(), 2)}),
        "system, which may run",
    ),
    "command in newer weights": (inside_weights(**{"data.pkl": pickle.dumps(Evil(), 4)}), "STACK_GLOBAL"),
    "any class in weights": (
        put("models/model.pt", saved({"a": Path("x"), "b": torch.nn.Linear(1, 1)})),
        "which may run code",
    ),
    "second pickle": (twice_inside, "stands 2 times"),
    "more in weights": (inside_weights(extra__evil=b"x"), "no plain file of torch.save"),
    "something behind the pickle": (inside_weights(**{"data.pkl": pickle.dumps({}, 2) + b"x"}), "follows its pickle"),
    "damaged pickle": (inside_weights(**{"data.pkl": b"\x80\2]"}), "its pickle is damaged"),
    "old weights": (
        put("models/model.pt", saved({"a": torch.zeros(1)}, _use_new_zipfile_serialization=False)),
        "a bare pickle",
    ),
    "weights that are text": (put("models/model.ckpt", "version https://git-lfs"), "is no zip"),
    "TorchScript": (inside_weights(code____torch__=b"def forward(self): ..."), "is TorchScript"),
    "pickle": (put("models/table.pkl", pickle.dumps(Evil())), "is a pickle"),
    "pickle by another name": (put("models/table.csv", pickle.dumps(Evil())), "a bare pickle"),
    "pickled array": (put("models/table.npy", array(np.array([Evil()], dtype=object))), "holds pickled objects"),
    "pickled arrays in a zip": (
        put("models/table.npz", zipped({"a.npy": array(np.array([Evil()], dtype=object))}, top="")),
        "holds pickled objects",
    ),
    "bomb in weights": (inside_weights(**{"data/9": b"0" * 2**22}), "is a bomb"),
    "no array": (put("models/table.npy", "x"), "is no .npy file"),
    "no arrays": (put("models/table.npz", "x"), "is damaged"),
    "damaged array": (put("models/table.npy", b"\x93NUMPY\1\0\xff\xff{"), "damaged header"),
    # Python
    "Python with a syntax error": (python("def"), "cannot be parsed"),
    "Python with another encoding": (put("scripts/net.py", b"# coding: rot13\nvzcbeg bf"), "cannot be parsed"),
}
CODE: dict[str, tuple[str, str, str]] = {  # text, the grant it needs, words
    "command": ("os.system('touch canary')", "process", "os.system"),
    "command, imported": ("from os import system as s", "process", "os.system"),
    "command by a name": ("getattr(os, 'system')('touch canary')", "process", "os.system"),
    "command by a computed name": ("getattr(os, 'sys' + 'tem')('touch canary')", "dynamic", "by a computed name"),
    "command through torch": ("torch.serialization.os.system('touch canary')", "pickle", "torch.serialization"),
    "command through a sibling": ("from .parts import os as o\no.system('x')", "process", "scripts.parts.os.system"),
    "command of something": ("[os.path][0].system('x')", "process", ".system"),
    "module handed on": ("m = os", "dynamic", "os handed on"),
    "program": ("import subprocess", "process", "subprocess"),
    "program, hidden in a function": ("def f():\n    from subprocess import run\n", "process", "subprocess.run"),
    "kills": ("os.kill(1, 9)", "process", "os.kill"),
    "network": ("import urllib.request", "network", "urllib.request"),
    "socket": ("from socket import socket", "network", "socket"),
    "hub": ("torch.hub.load('a/b', 'c')", "network", "torch.hub"),
    "MONAI's download": ("from monai.apps import download_url", "network", "monai.apps.download_url"),
    "machine code": ("import ctypes", "native", "ctypes"),
    "extension": ("from torch.utils import cpp_extension", "native", "torch.utils.cpp_extension"),
    "library": ("torch.ops.load_library('x.so')", "native", "torch.ops.load_library"),
    "eval": ("eval('1')", "dynamic", "eval"),
    "exec": ("list(map(exec, ['1']))", "dynamic", "exec"),
    "import by name": ("import importlib\nimportlib.import_module('o' + 's')", "dynamic", "importlib"),
    "import by name, short": ("__import__('os')", "dynamic", "__import__"),
    "builtins": ("__builtins__['eval']('1')", "dynamic", "__builtins__"),
    "globals": ("announce.__globals__['os']", "dynamic", ".__globals__"),
    "subclasses": ("().__class__.__base__.__subclasses__()", "dynamic", ".__subclasses__"),
    "subclasses by a name": ("getattr(object, '__subclasses__')()", "dynamic", ".__subclasses__"),
    "code object": ("import types\ntypes.FunctionType", "dynamic", "types.FunctionType"),
    "search path": ("import sys\nsys.path.insert(0, '/tmp')", "dynamic", "sys.path"),
    "package path": ("__path__.append('/tmp')", "dynamic", "__path__"),
    "getattr handed on": ("import functools\nfunctools.reduce(getattr, ['a'], os)", "dynamic", "getattr handed on"),
    "everything": ("from os import *", "dynamic", "everything of os"),
    "pickle": ("import pickle\npickle.loads(b'')", "pickle", "pickle.loads"),
    "pickle, imported": ("from pickle import loads", "pickle", "pickle.loads"),
    "dill": ("import dill", "pickle", "dill"),
    "pickled weights": ("torch.load('x.pt')", "pickle", "torch.load that may unpickle"),
    "pickled weights, told to": ("torch.load('x.pt', weights_only=False)", "pickle", "torch.load"),
    "pickled weights, by another name": ("from torch import load", "pickle", "torch.load"),
    "pickled arrays": ("np.load('x.npy', allow_pickle=True)", "pickle", "numpy.load"),
    "deletes": ("import shutil\nshutil.rmtree('/')", "delete", "shutil.rmtree"),
    "unknown package": ("import evil.twin", "evil", "evil is not known here"),
}


def test_a_bundle_with_nothing_wrong_passes(tmp_path: Path):
    assert reasons(BENIGN, tmp_path) == []
    assert reasons(zipped(BENIGN), tmp_path) == []


USUAL = {  # what the model zoo and our bundles write, and more that does no harm
    "window": "$lambda x: torch.where((x > -57) & (x < 164), x, torch.zeros_like(x))",
    "optimiser": "$torch.optim.AdamW(@network.parameters(), lr=1e-4, weight_decay=1e-5)",
    "files": "$[{'image': i, 'label': l} for i, l in zip(sorted(glob.glob(@dataset_dir + '/*.nii.gz')), @datalist)]",
    "datalist": "$monai.data.load_decathlon_datalist(@dataset_dir + '/dataset.json', data_list_key='validation')",
    "backbone": "$monai.networks.nets.resnet50(spatial_dims=3, n_input_channels=1, conv1_t_size=[7, 7, 7])",
    "detector": "$monai.apps.detection.networks.retinanet_network.resnet_fpn_feature_extractor(@network, 3)",
    "folds": "$monai.auto3dseg.utils.datafold_read(datalist='a.json', basedir=@dataset_dir, fold=0)[0]",
    "logger": "$@evaluator.logger.setLevel(logging.WARNING if dist.get_rank() > 0 else logging.INFO)",
    "handler": "$@handlers#0.attach(@evaluator) if @amp else None",
    "generator": "$map(lambda t: dict(image=monai.transforms.concatenate(t), label=t[1]), zip(*@dataset))",
    "name": "$lambda x, s: dict(idx=s._data_index, subject=x['filename_or_obj'])",
    "scale": "$scripts.net.announce(@network, @dataloader, @device)",
    "load": "$@network.load_state_dict(torch.load(@bundle_root + '/m.pt', map_location=@device, weights_only=True))",
    "evaluation": "$@network.eval()",
    "numbers": "$np.pi / 8 + round(2.5) + math.sqrt(max(1, len(@datalist) // 5)) ** 2",
    "text": "$'a,b'.replace('a', 'c').split(',')[0].upper() + f\"{len(@datalist):03d}\"",
    "shape": "$tuple(int(np.prod(s)) for s in @network.shape[1:])",
    "rank": "$os.environ.get('LOCAL_RANK', '0') + os.path.join(@output_dir, str(os.cpu_count()))",
    "time": "$datetime.datetime.now().strftime('%Y') + str(time.time())",
    "events": "$@evaluator.add_event_handler(ignite.engine.Events.STARTED, ignite.handlers.TerminateOnNan())",
    "component": {"_target_": "$monai.networks.nets.UNet", "spatial_dims": 3},
    "reader": {"_target_": "LoadImaged", "keys": "image", "reader": ["itkreader", "monai.data.NumpyReader", None]},
    "writer": {"_target_": "scripts.net.Head", "writer": "@inferer"},
    "kinds": "$type(@network) is not None and isinstance(@network, torch.nn.Module)",
    **{key: str(value).replace("NAME", "spleen") for key, value in untrusted.HEAD.items() if key != "imports"},
}
MODULES = ["glob", "os", "sys", "math", "datetime", "time", "logging", "traceback", "ignite", "scripts"]


@pytest.mark.parametrize("name", USUAL)
def test_a_usual_expression_passes(name: str, tmp_path: Path):
    files = dict(BENIGN)
    imports = [*(f"$import {module}" for module in MODULES), "$import torch.distributed as dist"]
    put("configs/inference.json", dumped(INFERENCE | {"imports": imports, "create_output_dir": 1, name: USUAL[name]}))(
        files
    )
    overlaid = {"initialize": INFERENCE["initialize"][:-1]}
    put("configs/inference.json", dumped(json.loads(files["configs/inference.json"]) | overlaid))(files)
    assert reasons(files, tmp_path) == []


def test_lines_that_change_files_are_told(tmp_path: Path):
    files = dict(BENIGN)
    lines = ["open('a', 'w')", "open('a', mode=print)", "Path('a').open('x')", "os.remove('a')", "Path('a').unlink()"]
    python("\n".join(lines))(files)
    assert reasons(files, tmp_path) == []
    (tmp_path / "bundle.zip").write_bytes(zipped(files))
    told = [f.text for f in untrusted.examine(tmp_path / "bundle.zip") if f.member == "scripts/net.py"]
    first = NET.count(b"\n") + 1
    assert told == [f"writes, moves or deletes files: line {', '.join(str(first + n) for n in range(len(lines)))}"]


def test_what_cannot_be_judged_is_told_and_granted_apart(tmp_path: Path):
    """Weights on a server, networks of a hub and TorchScript are common in the zoo."""
    files = dict(BENIGN)
    large()(files)
    put("models/model.onnx", "x")(files)
    put("models/tables.npz", zipped({"a.npy": array(np.zeros(3))}, top=""))(files)
    put("configs/metadata.json", dumped({"required_packages_version": {"nibabel": "5", "evil-twin": "1"}}))(files)
    config(loss={"_target_": "monai.losses.PerceptualLoss"}, x={"pretrained": True, "url": "https://example.org"})(
        files
    )
    path = tmp_path / "bundle.zip"
    directory = zipfile.ZipInfo("spleen/docs/")
    directory.external_attr = (stat.S_IFDIR | 0o755) << 16
    path.write_bytes(zipped(files, (directory, b"")))
    found = untrusted.examine(path)
    assert {finding.needs for finding in found} == {untrusted.NOTE}
    told = "\n".join(map(untrusted.sentence, found))
    for words in (
        "models/big.pt is fetched later",
        ".onnx files are not judged",
        "may download a network",
        "3 Python files",
    ):
        assert words in told
    for words in ("weights may be downloaded", "the address https://example.org", "asks for evil-twin"):
        assert words in told
    ATTACKS["TorchScript"][0](files)
    assert [reason for reason in reasons(files, tmp_path) if reason.endswith("--allow torchscript")]
    assert not [reason for reason in reasons(files, tmp_path, "torchscript") if "TorchScript" in reason]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_container_is_refused(name: str, tmp_path: Path):
    attack, words = CONTAINERS[name]
    data = attack(dict(BENIGN))
    assert isinstance(data, bytes)
    found = reasons(data, tmp_path)
    assert [reason for reason in found if words in reason], found


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_file_is_refused_from_a_zip_and_from_a_folder(name: str, tmp_path: Path):
    attack, words = ATTACKS[name]
    files = dict(BENIGN)
    attack(files)
    assert files != BENIGN
    found = reasons(zipped(files), tmp_path)
    assert [reason for reason in found if words in reason], found
    assert sorted(reasons(files, tmp_path)) == sorted(found)


@pytest.mark.parametrize("name", CODE)
def test_hostile_python_is_refused_until_granted(name: str, tmp_path: Path):
    text, grant, words = CODE[name]
    files = dict(BENIGN)
    python(text)(files)
    found = reasons(files, tmp_path)
    assert [reason for reason in found if words in reason and reason.endswith(f"--allow {grant}")], found
    assert len(found) > len(reasons(files, tmp_path, grant))


# ---------------------------------------------------------------------------------------------------------------------
# The attacks are real: MONAI runs them


REAL = {  # attack -> id whose value sets it off
    "runs a command": "x",
    "imports os for its commands": "x",
    "module by reference": "x",
    "code in quotes of a reference": "x",
    "code in a key": f"{KEY}::x",
    "program through a reader": "x",
    "code in a description": "x",
    "code in a condition": "x",
    "code in a requirement": "x",
    "command as a component": "x",
    "builtin without its package": "x",
    "computed component": "x",
    "command as a reader": "x",
    "component of a path": "network_def",
}


@pytest.mark.parametrize("name", REAL)
def test_what_is_refused_would_have_run(name: str, room: Path):
    files = dict(BENIGN)
    ATTACKS[name][0](files)
    room.joinpath("base.json").write_bytes(files["configs/inference.json"])
    room.joinpath("overlay.json").write_bytes(files["configs/train.json"])
    parser = ConfigParser()
    parser.read_config(["base.json", "overlay.json"] if name == "component of a path" else "base.json")
    changes = {
        "module by reference": ("x", "$@m.system('touch canary')"),
        "computed component": ("x::command", "touch canary"),
        "component of a path": (
            "network_def",
            {"_target_": parser["network_def"]["_target_"], "command": "touch canary"},
        ),
    }
    if name in changes:
        key, value = changes[name]
        parser[key] = value
    parser["imports"] = ["$import os"]
    with contextlib.suppress(RuntimeError, ValueError, TypeError, AttributeError):
        parser.get_parsed_content(REAL[name])
    assert room.joinpath("canary").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Laws


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("$@a + @b#c", "x"),
        ("$@a::b::c + @a::b", "x"),
        ("$'@f {1}' + @", "x"),
        ("$@#a + @##b + @###c", "x::y::0"),
        ("$@##a", "k'ey] + 1::y"),
        ("$%::a if '@b' else '@@b@'", "x::y"),
        ("$@a@ab@abc", "x"),
    ],
)
def test_the_text_that_is_judged_is_the_text_that_monai_evaluates(value: str, path: str):
    class Everything(dict):
        def __contains__(self, key: object) -> bool:
            return True

    absolute = ConfigParser.resolve_relative_ids(path, value)
    assert f"${untrusted.as_evaluated(value, path)}" == ReferenceResolver.update_refs_pattern(absolute, Everything())


def harmful() -> dict[int, str]:
    """What no chain of attributes that the linter lets through may reach: {identity: name}."""
    import code
    import ctypes
    import http.client
    import importlib.util
    import logging.config
    import marshal
    import multiprocessing.reduction
    import pdb
    import pydoc
    import runpy
    import shelve
    import socket
    import tarfile
    import urllib.request

    import monai.utils.misc
    import monai.utils.module

    modules = [os, subprocess, shutil, pickle, ctypes, socket, urllib.request, http.client, logging.config, runpy, code]
    modules += [pdb, marshal, shelve, pydoc, zipfile, tarfile, multiprocessing.reduction, torch.hub, importlib.util]
    modules += [torch.serialization, monai.bundle.scripts]
    harmless = {"PathLike", "UnpicklingError", "cpu_count", "find_spec", "fspath", "getcwd", "getenv", "getpid"}
    harmless |= {"listdir", "makedirs", "mkdir", "pytorch_after", "scandir", "walk"}
    found = {id(module): module.__name__ for module in modules} | {id(importlib): "importlib", id(sys): "sys"}
    for module in modules:
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") in (module.__name__, "posix", "_pickle", "_ctypes", "_socket")
            if own and callable(value) and not name.startswith("_") and name not in harmless:
                found[id(value)] = f"{module.__name__}.{name}"
    words = (eval, exec, compile, open, __import__, breakpoint, globals, vars, types.FunctionType, types.CodeType)
    words += (torch.save, np.save, np.savez, np.savetxt, np.memmap, torch.jit.load, torch.ops.load_library)
    words += (monai.utils.misc.run_cmd, ConfigParser, importlib.import_module)
    words += tuple(getattr(monai.utils.module, n) for n in ("optional_import", "instantiate", "load_submodules"))
    return found | {id(value): value.__name__ for value in words}


# What a chain that passes may meet of other packages: words of the standard library, and numbers.
NEIGHBOURS = untrusted.words("""
    abc collections.abc copy enum io math numbers queue random string time tqdm
    torch torch.nn torch.nn.functional torch.fft torch.utils.checkpoint numpy
""")


def test_no_chain_that_passes_leads_to_harm_or_to_another_package():
    """Everything that can be reached from the packages of the allow-list, as it is installed, is walked through."""
    for name in ("monai.apps.detection", "monai.apps.generation", "PIL.Image", "einops", "nibabel"):
        importlib.import_module(name)
    bad, seen, reached = harmful(), set(), set()
    packages = ("monai", "torch", "numpy", "ignite", "einops", "nibabel", "PIL")
    stack: list[tuple[str, Any]] = [(package, sys.modules[package]) for package in packages]
    while stack:
        path, holder = stack.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        for name, value in [item for item in vars(holder).items() if item[0].isidentifier()]:
            chain, module = f"{path}.{name}", isinstance(value, types.ModuleType)
            passes = not untrusted.forbidden(chain)
            if passes and id(value) in bad and chain not in untrusted.LOADS:
                reached.add(f"{chain} is {bad[id(value)]}")
            if module and (passes or not untrusted.forbidden(chain, importing=True)):
                if value.__name__.split(".")[0] == path.split(".")[0]:
                    stack.append((chain, value))
                elif value.__name__ not in NEIGHBOURS:
                    reached.add(f"{chain} is {value.__name__}")
            elif isinstance(value, type) and passes:
                stack.append((chain, value))
    assert len(seen) > 3000
    assert "\n".join(sorted(reached)) == ""


def test_no_bare_name_leads_out_of_monai_s_harmless_parts():
    locator = ComponentLocator()
    locator.get_component_module_name("UNet")
    passing = {n for n in locator._components_table or {} if not untrusted.target_problem(n, {}, {}, "")}
    modules = {f"{module}.{name}" for name in passing for module in locator._components_table[name]}
    assert len(passing) > 800
    assert {path for path in modules if untrusted.forbidden(path)} == set()


def test_weights_may_build_only_what_torch_lets_them():
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    names = [n for package in ("torch", "torch._utils", "torch.storage") for n in dir(sys.modules[package])]
    candidates = {f"{package}.{n}" for package in ("torch", "torch._utils", "torch.storage") for n in names}
    passing = {name for name in candidates | set(allowed) if untrusted.PICKLE_GLOBALS.fullmatch(name)}
    assert len(passing) > 30
    assert passing <= set(allowed)


def test_a_check_that_breaks_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(bundle: untrusted.Bundle) -> Iterator[untrusted.Finding]:
        raise KeyError("a")

    monkeypatch.setattr(untrusted, "CHECKS", [*untrusted.CHECKS, broken])
    assert [reason for reason in reasons(BENIGN, tmp_path) if "broken cannot judge this bundle" in reason]


def test_a_bundle_of_any_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(untrusted, "MAX_MEMBERS", 5)
    assert "more than 5 files" in reasons(zipped(BENIGN), tmp_path)[0]
    assert "more than 5 files" in reasons(BENIGN, tmp_path)[0]
    monkeypatch.setattr(untrusted, "MAX_MEMBERS", 100)
    monkeypatch.setattr(untrusted, "MAX_PICKLE", 10)
    assert [reason for reason in reasons(BENIGN, tmp_path) if "its pickle has more than 10 bytes" in reason]
    monkeypatch.setattr(untrusted, "MAX_TEXT", 50)
    assert [reason for reason in reasons(BENIGN, tmp_path) if "too large to be judged" in reason]


def test_no_reason_says_more_than_one_line_to_a_terminal(tmp_path: Path):
    files = dict(BENIGN)
    config(**{"\x1b[2J\n": "$eval('\x1b[1m')"})(files)
    for reason in reasons(files, tmp_path):
        assert reason.isprintable()


def test_a_link_in_a_folder_is_refused(tmp_path: Path):
    folder = tmp_path / "bundle"
    for name, data in BENIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "docs" / "passwords").symlink_to("/etc/passwd")
    assert "symbolic link" in untrusted.inspect(folder)[0]


# ---------------------------------------------------------------------------------------------------------------------
# This repository's releases, and the command line


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    return {configs.parent.name: package.package(configs.parent, folder) for configs in BUNDLES}


def test_our_releases_need_grants_for_their_python_and_nothing_else(releases: dict[str, Path]):
    for path in releases.values():
        found = [finding for finding in untrusted.examine(path) if finding.needs != untrusted.NOTE]
        assert {finding.needs for finding in found} == set(GRANTED.split(","))
        assert {finding.member.partition("/")[0] for finding in found} == {"scripts"}
        assert [f for f in found if (f.member, f.needs) == ("scripts/common/llm.py", "network")]


def lone(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a copy of the one file by Python alone: no site-packages, nothing from the current folder."""
    shutil.copy(TOOL, folder)
    command = [sys.executable, "-I", "-S", "untrusted.py", *arguments]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True)


def test_the_file_alone_judges_a_release(releases: dict[str, Path], room: Path):
    path = str(releases["lesion_diffusion"])
    done = lone(room, path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "REFUSED scripts/common/llm.py: may reach the network" in done.stdout
    assert "grant it: --allow network" in done.stdout
    assert "Python files" in done.stdout
    assert "refused, " in done.stdout.splitlines()[-1]
    done = lone(room, path, "--allow", GRANTED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "allowed scripts/common/llm.py: may reach the network" in done.stdout
    assert "REFUSED" not in done.stdout


def test_the_file_alone_does_not_guess_at_yaml(room: Path):
    room.joinpath("bundle.zip").write_bytes(zipped(BENIGN))
    done = lone(room, "bundle.zip")
    assert done.returncode == 1
    assert "configs/multi_gpu.yaml: cannot be judged: YAML cannot be judged without PyYAML" in done.stdout
    assert lone(room, "nowhere.zip").returncode == 2
    assert lone(room).returncode == 2


def test_verify_inspects_before_it_verifies(releases: dict[str, Path], room: Path):
    evil = dict(BENIGN)
    ATTACKS["runs a command"][0](evil)
    room.joinpath("evil.zip").write_bytes(zipped(evil))
    verify = (sys.executable, str(REPO / "tools" / "verify.py"), "--untrusted")
    done = run_command(*verify, str(room / "evil.zip"), str(releases["cmdm"]), cwd=room)
    assert done.returncode == 1, done.stdout
    assert "REFUSED configs/inference.json: x" in done.stdout
    assert f"{releases['cmdm']}: refused" in done.stdout
    done = run_command(*verify, str(releases["cmdm"]), "--allow", GRANTED, cwd=room)
    assert done.returncode == 0, done.stdout
    assert run_command(*verify, str(room / "nowhere.zip"), cwd=room).returncode == 2
    assert not room.joinpath("canary").exists()
