"""Expressions of configs: usual ones pass, hostile ones are refused, and would have done harm."""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import BANG, INFERENCE, Attack, assert_refused, changed, config, does_harm, dumped, overlay, put, reasons
from monai.bundle import ConfigParser, ReferenceResolver

from tools.untrusted.configs import as_evaluated
from tools.untrusted.expressions import forbidden
from tools.untrusted.policy import HEAD, LOADS, words

KEY = "a if os.system('touch canary') else @c"  # a relative reference below it becomes this text
ATTACKS: dict[str, tuple[Attack, str]] = {
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
    "pickles of a peer": (
        config(y="$import torch.distributed as dist", x="$dist.broadcast_object_list([None])"),
        "is not for configs",
    ),
    "program through a reader": (
        config(x="$monai.data.image_reader.nib.pkg_info.run(['touch', 'canary'])"),
        "'nib' leads out of monai.data.image_reader",
    ),
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
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_expression_is_refused(name: str, tmp_path: Path):
    assert_refused(*ATTACKS[name], tmp_path)


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
}
LOUD = {"module by reference": config(m="$import os", x="$@m.system('touch canary')")}  # what another only prepares


@pytest.mark.parametrize("name", REAL)
def test_what_is_refused_would_have_run(name: str, tmp_path: Path):
    assert does_harm(LOUD.get(name, ATTACKS[name][0]), REAL[name], tmp_path)


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
    **{key: str(value).replace("NAME", "spleen") for key, value in HEAD.items() if key != "imports"},
}
MODULES = ["glob", "os", "sys", "math", "datetime", "time", "logging", "traceback", "ignite", "scripts"]


@pytest.mark.parametrize("name", USUAL)
def test_a_usual_expression_passes(name: str, tmp_path: Path):
    imports = [*(f"$import {module}" for module in MODULES), "$import torch.distributed as dist"]
    items = {"imports": imports, "create_output_dir": 1, "initialize": INFERENCE["initialize"][:-1], name: USUAL[name]}
    assert reasons(changed(config(**items)), tmp_path) == []


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
    assert f"${as_evaluated(value, path)}" == ReferenceResolver.update_refs_pattern(absolute, Everything())


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
NEIGHBOURS = words("""
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
            passes = not forbidden(chain)
            if passes and id(value) in bad and chain not in LOADS:
                reached.add(f"{chain} is {bad[id(value)]}")
            if module and (passes or not forbidden(chain, importing=True)):
                if value.__name__.split(".")[0] == path.split(".")[0]:
                    stack.append((chain, value))
                elif value.__name__ not in NEIGHBOURS:
                    reached.add(f"{chain} is {value.__name__}")
            elif isinstance(value, type) and passes:
                stack.append((chain, value))
    assert len(seen) > 3000
    assert "\n".join(sorted(reached)) == ""
