"""Files of a bundle: kinds, what they hold in truth, JSON and YAML, logging.conf, later files, weights."""

from __future__ import annotations

import io
import json
import pickle
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import (
    BANG,
    LOGGING,
    Attack,
    Evil,
    Files,
    array,
    assert_refused,
    changed,
    config,
    dumped,
    put,
    reasons,
    saved,
    zipped,
)

from tools import untrusted
from tools.untrusted.weights import PICKLE_GLOBALS

LARGE = {"path": "models/big.pt", "url": "https://example.org/big.pt", "hash_val": "0" * 64, "hash_type": "sha256"}


def inside_weights(parts: Files) -> Attack:
    """Make an attack by parts of a file as torch.save writes it."""

    def attack(files: Files) -> None:
        source = zipfile.ZipFile(io.BytesIO(files["models/model.pt"]))
        content = {name: source.read(name) for name in source.namelist()}
        files["models/model.pt"] = zipped(content | {f"archive/{n}": data for n, data in parts.items()}, top="")

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


ATTACKS: dict[str, tuple[Attack, str]] = {
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
        inside_weights({"data.pkl": pickle.dumps(Evil(), 2)}),
        "system, which may run",
    ),
    "command in newer weights": (inside_weights({"data.pkl": pickle.dumps(Evil(), 4)}), "STACK_GLOBAL"),
    "any class in weights": (
        put("models/model.pt", saved({"a": Path("x"), "b": torch.nn.Linear(1, 1)})),
        "which may run code",
    ),
    "second pickle": (twice_inside, "stands 2 times"),
    "more in weights": (inside_weights({"extra/evil": b"x"}), "no plain file of torch.save"),
    "something behind the pickle": (inside_weights({"data.pkl": pickle.dumps({}, 2) + b"x"}), "follows its pickle"),
    "damaged pickle": (inside_weights({"data.pkl": b"\x80\2]"}), "its pickle is damaged"),
    "old weights": (
        put("models/model.pt", saved({"a": torch.zeros(1)}, _use_new_zipfile_serialization=False)),
        "a bare pickle",
    ),
    "weights that are text": (put("models/model.ckpt", "version https://git-lfs"), "is no zip"),
    "TorchScript": (inside_weights({"code/__torch__.py": b"def forward(self): ..."}), "is TorchScript"),
    "pickle": (put("models/table.pkl", pickle.dumps(Evil())), "is a pickle"),
    "pickle by another name": (put("models/table.csv", pickle.dumps(Evil())), "a bare pickle"),
    "pickled array": (put("models/table.npy", array(np.array([Evil()], dtype=object))), "holds pickled objects"),
    "pickled arrays in a zip": (
        put("models/table.npz", zipped({"a.npy": array(np.array([Evil()], dtype=object))}, top="")),
        "holds pickled objects",
    ),
    "bomb in weights": (inside_weights({"data/9": b"0" * 2**22}), "is a bomb"),
    "no array": (put("models/table.npy", "x"), "is no .npy file"),
    "no arrays": (put("models/table.npz", "x"), "is damaged"),
    "damaged array": (put("models/table.npy", b"\x93NUMPY\1\0\xff\xff{"), "damaged header"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path):
    assert_refused(*ATTACKS[name], tmp_path)


def test_what_cannot_be_judged_is_told_and_granted_apart(tmp_path: Path):
    """Weights on a server, networks of a hub and TorchScript are common in the zoo."""
    files = changed(
        large(),
        put("models/model.onnx", "x"),
        put("models/tables.npz", zipped({"a.npy": array(np.zeros(3))}, top="")),
        put("configs/metadata.json", dumped({"required_packages_version": {"nibabel": "5", "evil-twin": "1"}})),
        config(loss={"_target_": "monai.losses.PerceptualLoss"}, x={"pretrained": True, "url": "https://example.org"}),
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


def test_weights_may_build_only_what_torch_lets_them():
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    names = [n for package in ("torch", "torch._utils", "torch.storage") for n in dir(sys.modules[package])]
    candidates = {f"{package}.{n}" for package in ("torch", "torch._utils", "torch.storage") for n in names}
    passing = {name for name in candidates | set(allowed) if PICKLE_GLOBALS.fullmatch(name)}
    assert len(passing) > 30
    assert passing <= set(allowed)
