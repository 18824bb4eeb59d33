"""Components of configs: what ``_target_`` and its arguments must not name, and what MONAI would have called."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign import Attack, Files, assert_refused, config, does_harm, overlay
from monai.bundle import ComponentLocator

from tools.untrusted.components import target_problem
from tools.untrusted.expressions import forbidden


def pieced(files: Files) -> None:
    """An overlay adds the name of what is called to arguments that name nothing."""
    config(network_def={"command": "touch canary"})(files)
    overlay(**{"network_def#_target_": "os.system"})(files)


ATTACKS: dict[str, tuple[Attack, str]] = {
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
    "computed component": (
        config(x={"_target_": "$'os.' + 'system'", "command": "touch canary"}),
        "computes what to call",
    ),
    "hub by an expression": (config(x={"_target_": "$torch.hub.load"}), "'hub' leads out of torch"),
    "component that cannot be parsed": (config(x={"_target_": "$("}), "cannot be parsed"),
    "component by reference": (config(n="a", x={"_target_": "@n"}), "not a reference"),
    "component by macro": (config(n="a", x={"_target_": "%n"}), "not a reference"),
    "component of an object": (config(x={"_target_": "$@head.name"}), "computes what to call"),
    "component of a path": (pieced, "'system' leads out of os"),
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
    "macro above": (config(x="%../evil.json"), "reads a file that is not in the bundle"),
    "macro that is not there": (config(x="%configs/evil.yaml#a"), "reads a file that is not in the bundle"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_component_is_refused(name: str, tmp_path: Path):
    assert_refused(*ATTACKS[name], tmp_path)


REAL = {  # attack -> id whose value sets it off
    "command as a component": "x",
    "builtin without its package": "x",
    "computed component": "x",
    "command as a reader": "x",
    "component of a path": "network_def",
}


@pytest.mark.parametrize("name", REAL)
def test_what_is_refused_would_have_run(name: str, tmp_path: Path):
    assert does_harm(ATTACKS[name][0], REAL[name], tmp_path)


def test_no_bare_name_leads_out_of_monai_s_harmless_parts():
    locator = ComponentLocator()
    locator.get_component_module_name("UNet")
    passing = {n for n in locator._components_table or {} if not target_problem(n, {}, {}, "")}
    modules = {f"{module}.{name}" for name in passing for module in locator._components_table[name]}
    assert len(passing) > 800
    assert {path for path in modules if forbidden(path)} == set()
