"""The running MONAI workflow, seen from inside: its config, its bundle, and whether its knobs are known.

MONAI hands none of this to the components it builds, so we find the workflow on the call stack, as the head of every
config does for ``bundle_root``.
"""

from __future__ import annotations

import difflib
import json
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from .io import unwrap


def running_workflow() -> ConfigWorkflow | None:
    """The MONAI workflow that is executing us, found on the call stack; None outside one."""
    for frame, _ in traceback.walk_stack(None):
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, ConfigWorkflow):
            return candidate
    return None


def _running_config() -> dict[str, Any]:
    workflow = running_workflow()
    config: Any = {} if workflow is None else workflow.parser.config
    return config


def bundle_root() -> Path | None:
    """Root of the running bundle; a replay, whose config lies elsewhere, spells it out."""
    workflow = running_workflow()
    if workflow is None:
        return None
    root = str(_running_config().get("bundle_root", "$"))
    return workflow.config_root_path.resolve().parent if root.startswith("$") else Path(root)


def executed_config() -> dict[str, Any]:
    """The config as it runs, overrides included, in plain JSON; empty outside a workflow."""
    content = {k: v for k, v in _running_config().items() if k not in ("_meta_", "made_by")}
    plain: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return plain


def versions() -> dict[str, str]:
    """Versions of what computes, for the record."""
    return {"monai": monai.__version__, "torch": torch.__version__, "numpy": np.__version__}


def check_knobs() -> None:
    """Refuse knobs that no config of the bundle knows, and values of another type than the default's.

    MONAI accepts any top-level key, so ``--epoch 5`` would pass silently. Called in every ``initialize``, where it also
    sees to it that a failed run ends with the cause.
    """
    root = bundle_root()
    if root is None:
        return
    sys.excepthook = _end_with_cause
    configs, defaults = root / "configs", dict[str, Any]()
    for path in [configs / "inference.json", configs / "train.json", *sorted(configs.glob("*.json"))]:
        if path.is_file() and path.name not in ("metadata.json", "import_rules.json"):
            defaults = {k.lstrip("+"): v for k, v in json.loads(path.read_text(encoding="utf-8")).items()} | defaults
    tracking: Any = DEFAULT_EXP_MGMT_SETTINGS
    reserved = {"_meta_", "_desc_", "made_by", "tracking_uri", "experiment_name", "run_name"}
    reserved |= set(tracking["mlflow"]["configs"])
    problems = []
    for key, value in _running_config().items():
        if key not in defaults and key not in reserved:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see the table of knobs in docs/README.md"
            problems.append(f"unknown knob --{key}: {hint}")
        elif key in defaults and not _same_kind(defaults[key], value):
            problems.append(f"knob --{key} got {value!r}, expected something like {defaults[key]!r}")
    if problems:
        raise ValueError("; ".join(problems))


def _same_kind(default: Any, value: Any) -> bool:
    """Whether a value may take a default's place; expressions, components and open defaults yield to anything."""
    if default is None or value is None or any(isinstance(v, str) and v[:1] in "$@%" for v in (default, value)):
        return True
    if isinstance(default, dict) and "_target_" in default:
        return True
    if isinstance(default, float) and type(value) is int:
        return True
    kind = (list, tuple) if isinstance(default, list) else type(default)
    return isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)


def _end_with_cause(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook: below the traceback, say once more what MONAI's own errors have wrapped."""
    sys.__excepthook__(kind, error, trace)
    cause = unwrap(error)
    if cause is not error:
        sys.stderr.write(f"\n{type(cause).__name__}: {cause}\n")
