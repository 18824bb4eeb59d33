"""The laws of the configs, as CONTRIBUTING.md states them: what MONAI would let pass, or stumble over elsewhere."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

from tools.reading import Check, configs, everything, read, walk
from tools.untrusted.policy import HEAD

# Ids that train.json and inference.json share by name only, and why.
MAY_DIFFER = {
    "_desc_": "each file describes itself",
    "output_dir": "training and synthesis write to different folders",
    "batch_size": "training and synthesis fill memory differently",
    "phantom_cases": "training needs more of them",
    "phantom_seed": "synthesis starts from bodies that training has not seen",
    "phantom_crop": "training needs what is around a lesion, synthesis whole bodies",
    "phantom_lesions": "training needs lesions, synthesis bodies without",
    "cases": "training reads real cases; synthesis needs fewer files or none, repeats cases, goes on after a bad one",
    "preprocessing": "synthesis prepares what is asked, training real images; what both do is shared by id",
    "run": "each file's own verb",
}

# What logging.conf may say where it creates something: the terminal is all that a bundle writes its log to.
LOGGING = {"class": ("StreamHandler",), "args": ("(sys.stdout,)", "(sys.stderr,)"), "kwargs": ()}


def check_json(bundle: Path) -> list[str]:
    """Every JSON file parses, has no key twice and is indented by 4."""
    problems = []
    for path in sorted(path for folder in ("configs", "docs", "models") for path in (bundle / folder).rglob("*.json")):
        try:
            read(path)
        except ValueError as error:
            problems.append(f"{path.name}: {error}" if path.name not in str(error) else str(error))
        depth = 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = re.sub(r'"(\\.|[^"\\])*"', "", line).strip()
            closing = len(code) - len(code.lstrip("]}"))
            if line.strip() and len(line) - len(line.lstrip()) != 4 * (depth - closing):
                problems.append(f"{path.name}:{number} is not indented by {4 * (depth - closing)}")
                break
            depth += sum(code.count(c) for c in "[{") - sum(code.count(c) for c in "]}")
    return problems


def check_head(bundle: Path) -> list[str]:
    """Every complete config begins with the same head, word for word but for the bundle's name."""
    problems = []
    for name, content in configs(bundle)[0].items():
        found = [(k, v) for k, v in content.items() if k != "_desc_"][: len(HEAD)]
        text = json.dumps(HEAD)
        named = re.search(r"'bundles/(\w+)'", str(content.get("bundle_root")))
        if named:
            text = text.replace("NAME", named[1])
        wrong = [k for (k, v), (key, value) in zip(json.loads(text).items(), found) if (k, v) != (key, value)]
        problems += [f"{name}.json: {k} differs from the common head" for k in wrong]
        if named and (bundle.parent.name == "bundles" and named[1] != bundle.name):
            problems.append(f"{name}.json: bundle_root names {named[1]}, the folder is {bundle.name}")
    return problems


def check_requires(bundle: Path) -> list[str]:
    """What comes from `scripts` waits for `use_bundle`, and no import item touches it."""
    problems = []
    for where, item in everything(bundle):
        if isinstance(item, dict) and str(item.get("_target_", "")).startswith("scripts."):
            requires = item.get("_requires_", [])
            if "@use_bundle" not in (requires if isinstance(requires, list) else [requires]):
                problems.append(f'{where}: {item["_target_"]} lacks "_requires_": "@use_bundle"')
        if isinstance(item, str) and re.match(r"\$(import|from)\s+scripts\b", item):
            problems.append(f"{where}: imports scripts, which is not on the path yet; name it by _target_")
    return problems


def check_strings(bundle: Path) -> list[str]:
    """No file macro, no metadata reference, no '#', which MONAI rewrites: each config stands alone in any folder."""
    signs = {"is a macro": r"^%", "reads @_meta_": r"@_meta_", "holds a #, which MONAI turns into ::": r"#"}
    texts = [*everything(bundle), *walk(read(bundle / "configs" / "metadata.json"), "metadata.json")]
    texts += [(where, key) for where, item in texts if isinstance(item, dict) for key in item]
    return [f"{w}: {t[:60]!r} {s}" for w, t in texts if isinstance(t, str) for s, p in signs.items() if re.search(p, t)]


def _differences(a: Any, b: Any, path: str) -> list[str]:
    """Ids below `path` at which two values differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [path]
    return [d for k in {**a, **b} for d in _differences(a.get(k, ...), b.get(k, ...), f"{path}::{k}")]


def check_shared_ids(bundle: Path) -> list[str]:
    """An id that train.json and inference.json both have has the same value in both."""
    train, inference = (read(bundle / "configs" / f"{name}.json") for name in ("train", "inference"))
    shared = [k for k in train if k in inference and k not in MAY_DIFFER]
    found = [path for k in shared for path in _differences(train[k], inference[k], k)]
    return [f"{path} differs between train.json and inference.json" for path in found]


def check_flat_knobs(bundle: Path) -> list[str]:
    """Numbers that one turns are top-level ids: components refer to them, overlays set them there."""
    bases, overlays = configs(bundle)
    knobs = {key for content in bases.values() for key, value in content.items() if not isinstance(value, dict)}
    knobs |= {"max_epochs", "spatial_size"}
    # A loader that is not the training's may have a size of its own.
    knobs -= {"batch_size", "num_workers", "cache_rate"}
    problems = []
    for where, item in everything(bundle):
        if isinstance(item, dict) and "_target_" in item:
            fixed = {
                k: v for k, v in item.items() if k in knobs and isinstance(v, (int, float, list)) and "@" not in str(v)
            }
            problems += [f"{where}::{k} is fixed to {v}: make it a top-level knob" for k, v in fixed.items()]
    for name, content in overlays.items():
        nested = [k for k, v in content.items() if "::" in k and type(v) in (int, float)]
        problems += [f"{name}.json {k}: make it a top-level knob" for k in nested]
    return problems


def check_overlays(bundle: Path) -> list[str]:
    """An overlay changes a base and brings no network of its own.

    A key is in a base, or the parent of a nested key is; or it is `finalize`; or an overlay introduces it, which is to
    say sets it and refers to it (``"patch_size"`` and ``"@patch_size"``). All else would be a misspelt knob.
    """
    bases, overlays = configs(bundle)
    known = {path for content in bases.values() for path, _ in walk(content)} | {"finalize"}
    for content in overlays.values():
        text = json.dumps(content)
        known |= {key for key in content if "::" not in key and re.search(rf"@{re.escape(key)}\b", text)}
    networks = {c[k]["_target_"] for c in bases.values() for k in c if k.endswith("_def") and isinstance(c[k], dict)}
    problems = []
    for name, content in overlays.items():
        for key in content:
            path = key.removeprefix("+")
            if path != "_desc_" and path not in known and ("::" not in path or path.rpartition("::")[0] not in known):
                problems.append(f"{name}.json: no base has {path}, and no overlay that sets it refers to it")
        copies = [p for p, item in walk(content) if isinstance(item, dict) and item.get("_target_") in networks]
        problems += [f"{name}.json: {p} is a second copy of a network" for p in copies]
    return problems


def check_initialize(bundle: Path) -> list[str]:
    """`initialize` puts the bundle first, fixes the seed, and refuses unknown knobs."""
    bases, overlays = configs(bundle)
    problems = []
    for name, content in {**bases, **overlays}.items():
        if name not in bases and "initialize" not in content:
            continue
        items = content.get("initialize") or [None]
        seeding = items[1:2] if name in bases else items
        if items[0] != "$@use_bundle":
            problems.append(f"{name}.json: initialize does not start with $@use_bundle")
        if "$monai.utils.set_determinism(@seed)" not in seeding:
            problems.append(f"{name}.json: initialize lacks set_determinism(@seed) after it")
        if not any(isinstance(i, dict) and i.get("_target_") == "scripts.common.workflow.check_knobs" for i in items):
            problems.append(f"{name}.json: initialize lacks workflow.check_knobs: misspelt knobs would pass")
    return problems


def check_logging(bundle: Path) -> list[str]:
    """logging.conf writes to the terminal; MONAI would let it write to any file, socket or mailbox."""
    parsed = configparser.RawConfigParser()
    parsed.read_string((bundle / "configs" / "logging.conf").read_text(encoding="utf-8"))
    said = [(name, key, value) for name in parsed.sections() for key, value in parsed.items(name) if key in LOGGING]
    wrong = [(name, key, value) for name, key, value in said if value not in LOGGING[key]]
    return [f"logging.conf [{n}]: {k} is {v}, expected {' or '.join(LOGGING[k]) or 'none'}" for n, k, v in wrong]


LAWS: list[Check] = [check_json, check_head, check_requires, check_strings, check_shared_ids]
LAWS += [check_flat_knobs, check_overlays, check_initialize, check_logging]
