"""Python code of a bundle: refused until granted, by name of the grant; lines that write are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign import NET, Attack, assert_refused, changed, put, python, reasons, zipped

from tools import untrusted

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
ATTACKS: dict[str, tuple[Attack, str]] = {
    "Python with a syntax error": (python("def"), "cannot be parsed"),
    "Python with another encoding": (put("scripts/net.py", b"# coding: rot13\nvzcbeg bf"), "cannot be parsed"),
}


@pytest.mark.parametrize("name", CODE)
def test_hostile_python_is_refused_until_granted(name: str, tmp_path: Path):
    text, grant, words = CODE[name]
    files = changed(python(text))
    found = reasons(files, tmp_path)
    assert [reason for reason in found if words in reason and reason.endswith(f"--allow {grant}")], found
    assert len(found) > len(reasons(files, tmp_path, grant))


@pytest.mark.parametrize("name", ATTACKS)
def test_python_that_cannot_be_read_is_refused(name: str, tmp_path: Path):
    assert_refused(*ATTACKS[name], tmp_path)


def test_lines_that_change_files_are_told(tmp_path: Path):
    lines = ["open('a', 'w')", "open('a', mode=print)", "Path('a').open('x')", "os.remove('a')", "Path('a').unlink()"]
    files = changed(python("\n".join(lines)))
    assert reasons(files, tmp_path) == []
    (tmp_path / "bundle.zip").write_bytes(zipped(files))
    told = [f.text for f in untrusted.examine(tmp_path / "bundle.zip") if f.member == "scripts/net.py"]
    first = NET.count(b"\n") + 1
    assert told == [f"writes, moves or deletes files: line {', '.join(str(first + n) for n in range(len(lines)))}"]
