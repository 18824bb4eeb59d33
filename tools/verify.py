"""Verify bundles: files, metadata, the laws of the configs, networks, weights, and on request a smoke run.

    python tools/verify.py                       # all bundles of this repository
    python tools/verify.py lung_ddpm --smoke     # one, trained and run for seconds as well
    python tools/verify.py /somewhere/lung_ddpm  # an unzipped release

Every ``check_<what>(bundle)`` returns a list of problems, empty if all is well. Bundles are data here: a path, JSON,
and MONAI's own parser. Exit codes: 0 all checks passed, 1 a check failed, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.transforms import LoadImage

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.io import stem  # noqa: E402
from common.semantics import Lesion, measure  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What is expected, as data

# Parameters of the published networks, by the configs that build them.
PAPER_PARAMETERS: dict[str, dict[tuple[str, ...], int]] = {
    "cmdm": {
        ("train", "paper"): 130_378_113,
        ("inference", "paper"): 130_378_113,
    },
    "lung_ddpm": {
        ("train", "paper"): 40_226_433,
        ("inference", "paper"): 40_226_433,
        ("train", "train_plus", "paper_plus"): 39_051_393,
        ("inference", "inference_plus", "paper_plus"): 39_051_393,
    },
    "guidegen": {
        ("train", "paper"): 267_541_124,
        ("inference", "paper"): 267_541_124,
        ("train", "pixel", "paper_pixel"): 172_883_713,
        ("inference", "pixel", "paper_pixel"): 172_883_713,
        ("train", "train_mask", "paper", "paper_mask", "unconditional"): 95_402_060,
        ("train", "train_mask", "paper", "paper_mask"): 115_439_308 + 40_946_688,
    },
    "lesion_diffusion": {
        ("train", "paper"): 187_503_365,
        ("inference", "paper"): 187_503_365,
        ("train", "train_mask", "paper", "paper_mask"): 2_527_489,
        ("train", "train_vq", "paper", "paper_vq"): 7_009_709,
    },
    "siamese_diffusion": {
        ("train", "paper"): 1_222_977_476,
        ("inference", "paper"): 1_222_977_476,
    },
}

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

FILES = ["LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt"]
FILES += [f"configs/{name}" for name in ("metadata.json", "inference.json", "train.json", "logging.conf")]
DATA = {"metadata", "import_rules"}  # JSON in configs/ that is no MONAI config
# Knobs that name a file of weights, and the component it fills.
FILLS = {"weights": "network_def", "mask_weights": "mask_network_def", "autoencoder_weights": "autoencoder_def"}
MAX_MODELS = 15_000_000  # bytes of all that lies in models/, as it is in git

HEAD = {
    "imports": ["$import glob", "$import os", "$import sys", "$import traceback"],
    "bundle_root": "$next((str(w.config_root_path.resolve().parent) for w in (f.f_locals.get('self') for f, _ in "
    "traceback.walk_stack(None)) if isinstance(w, monai.bundle.ConfigWorkflow)), "
    "os.path.abspath('bundles/NAME' if os.path.isdir('bundles/NAME') else '.'))",
    "use_bundle": "$sys.path[0] == @bundle_root or (sys.path.insert(0, @bundle_root), "
    "[sys.modules.pop(m) for m in list(sys.modules) if m.split('.')[0] == 'scripts'])",
    "device": "$torch.device('cuda:' + os.environ.get('LOCAL_RANK', '0') if torch.cuda.is_available() else 'cpu')",
}

# MONAI's metadata schema, re-stated as it must be at hand without network.
SCHEMA = json.loads((REPO / "tools" / "metadata_schema.json").read_text(encoding="utf-8"))

# ---------------------------------------------------------------------------------------------------------------------
# Reading


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


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Files and metadata


def check_files(bundle: Path) -> list[str]:
    """The files of the model zoo are there, and all that synthesis reads; the name does not look like a version's."""
    named = [f"name {bundle.name} contains _v, where MONAI cuts the version off"] if "_v" in bundle.name else []
    wanted = dict.fromkeys([*FILES, *_shipped(bundle)])
    return [f"no {name}" for name in wanted if not (bundle / name).is_file()] + named


def _shipped(bundle: Path) -> list[str]:
    """Files of models/ that the knobs of inference.json name, e.g. statistics beside the weights."""
    path = bundle / "configs" / "inference.json"
    content = read(path) if path.is_file() else {}
    named = [k for k, v in content.items() if isinstance(v, str) and v.startswith("$") and re.search(r"\.\w+'", v)]
    parsed = parser(bundle, "inference") if named else None
    values = [str(parsed.get_parsed_content(k)) for k in named if parsed is not None]
    return [os.path.relpath(v, bundle) for v in values if v.startswith(f"{bundle / 'models'}{os.sep}")]


def check_json(bundle: Path) -> list[str]:
    """Every JSON file parses, has no key twice and is indented by 4."""
    problems = []
    for path in sorted((bundle / "configs").glob("*.json")):
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


def check_metadata(bundle: Path) -> list[str]:
    """metadata.json obeys MONAI's schema, and the changelog knows the version."""
    meta = read(bundle / "configs" / "metadata.json")
    errors = jsonschema.Draft202012Validator(SCHEMA).iter_errors(meta)
    problems = ["::".join(["metadata.json", *map(str, e.absolute_path)]) + f": {e.message[:200]}" for e in errors]
    version = meta.get("version")
    return problems + ([] if version in meta.get("changelog", {}) else [f"version {version} is not in the changelog"])


def check_versions(bundle: Path) -> list[str]:
    """In a checkout, the packages of metadata.json are those of requirements.txt."""
    requirements = bundle.parent.parent / "requirements.txt"
    if bundle.parent.name != "bundles" or not requirements.is_file():
        return []
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", requirements.read_text(), flags=re.MULTILINE))
    meta = read(bundle / "configs" / "metadata.json")
    named = {"monai": meta["monai_version"], "torch": meta["pytorch_version"], "numpy": meta["numpy_version"]}
    wrong = {k: v for k, v in {**named, **meta["required_packages_version"]}.items() if pins.get(k) != v}
    return [f"{k} is {v} in metadata.json, {pins.get(k)} in requirements.txt" for k, v in wrong.items()]


def check_data_format(bundle: Path) -> list[str]:
    """`network_data_format` says what the knobs of inference.json say."""
    form, parsed = read(bundle / "configs" / "metadata.json")["network_data_format"], parser(bundle, "inference")
    problems = []
    for entry, channels in zip((form["inputs"]["image"], form["outputs"]["pred"]), channels_of(build(parsed))):
        for key, value in (("num_channels", channels), ("spatial_shape", grid(parsed))):
            if entry[key] != value:
                problems.append(f"{key} is {entry[key]} in metadata.json, {value} by inference.json")
        if len(entry.get("channel_def", {})) not in (0, entry["num_channels"]):
            problems.append(f"channel_def names {len(entry['channel_def'])} channels of {entry['num_channels']}")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# The laws of the configs


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


def check_properties(bundle: Path) -> list[str]:
    """MONAI finds every property of a training and of an inference workflow; asked at smoke size, as it builds them."""
    problems = []
    meta, logging_file = (str(bundle / "configs" / name) for name in ("metadata.json", "logging.conf"))
    for name, kind in (("train", "train"), ("inference", "infer")):
        files = [str(bundle / "configs" / f"{n}.json") for n in (name, "smoke")]
        with tempfile.TemporaryDirectory() as folder:
            places = {"bundle_root": str(bundle), "output_dir": folder, "device": "cpu"}
            # Nothing is loaded; but what lies beside the shipped weights may be read.
            places["weights"] = str(bundle / "models" / "model.pt")
            workflow = ConfigWorkflow(files, meta, logging_file, workflow_type=kind, **places)
            workflow.initialize()
            try:
                wrong = workflow.check_properties() or []
            except KeyError as error:  # MONAI's answer to a required one that is missing
                wrong = [str(error.args[0])]
            problems += [f"{name}.json: {w}" for w in wrong]
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Networks and weights


def check_network(bundle: Path) -> list[str]:
    """The network turns one tensor of the shape in metadata.json into one of the other; MONAI's own check agrees."""
    meta = bundle / "configs" / "metadata.json"
    form, parsed = read(meta)["network_data_format"], parser(bundle, "inference")
    shapes = [(1, e["num_channels"], *e["spatial_shape"]) for e in (form["inputs"]["image"], form["outputs"]["pred"])]
    output = build(parsed)(torch.empty(shapes[0], device="meta"))
    if tuple(output.shape) != shapes[1]:
        return [f"the network turns {shapes[0]} into {tuple(output.shape)}, metadata.json says {shapes[1]}"]
    config = str(bundle / "configs" / "inference.json")
    verify_net_in_out("network_def", str(meta), config, device="cpu", bundle_root=str(bundle))
    return []


def check_paper(bundle: Path) -> list[str]:
    """The published networks build and run, without memory, and have the published number of parameters."""
    table = PAPER_PARAMETERS.get(bundle.name, {})
    named = {name for names in table for name in names}
    overlays = [p.stem for p in sorted((bundle / "configs").glob("paper*.json"))]
    problems = [f"{name}.json is not in PAPER_PARAMETERS of tools/verify.py" for name in overlays if name not in named]
    for names, expected in table.items():
        parsed = parser(bundle, *names)
        network = build(parsed)
        size = grid(parsed)
        taken, given = channels_of(network)
        output = network(torch.empty(1, taken, *size, device="meta"))
        shape = tuple((output[0] if isinstance(output, tuple) else output).shape)  # an autoencoder tells more
        count = sum(p.numel() for p in network.parameters())
        if count != expected or shape != (1, given, *size):
            problems.append(f"{'+'.join(names)}: {count:,} parameters, expected {expected:,}; output {shape}")
    return problems


def check_export(bundle: Path) -> list[str]:
    """The network can be traced, as ``ckpt_export --use_trace True`` does, and the trace computes the same.

    Scripting, which ``ckpt_export`` does by default, is impossible for all of MONAI's diffusion networks
    ("cannot statically infer the expected size of a list").
    """
    parsed = parser(bundle, "inference")
    network = build(parsed, "cpu")
    image = torch.rand(1, channels_of(network)[0], *[max(8, s // 4) for s in grid(parsed)])
    with torch.no_grad():
        traced = torch.jit.trace(network, image, check_trace=False)
        same = torch.allclose(traced(image), network(image), atol=1e-5)
    return [] if same else ["the traced network computes something else"]


def check_weights(bundle: Path) -> list[str]:
    """Shipped weights are small, plain, finite, fill their network and agree with their card ``models/<name>.json``."""
    problems = []
    found = [p for p in sorted((bundle / "models").glob("*.pt")) if not p.stem.endswith(".previous")]
    size = sum(p.stat().st_size for p in (bundle / "models").rglob("*") if p.is_file() and ".previous." not in p.name)
    if size > MAX_MODELS:
        problems.append(f"models/ holds {size / 1e6:.1f} MB, more than {MAX_MODELS / 1e6:.0f} MB")
    bases, overlays = configs(bundle)
    for path in found:
        users = [(n, k) for n, c in {**bases, **overlays}.items() for k in FILLS if f"/{path.name}'" in str(c.get(k))]
        name, knob = users[0] if users else ("inference", "weights")
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            parsed = parser(bundle, "inference", *[name] * (name in overlays))
            build(parsed, network=FILLS[knob]).load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            problems.append(f"{path.name}: {' '.join(str(error).split())[:200]}")
        if not all(value.isfinite().all() for value in state.values()):
            problems.append(f"{path.name} holds NaN or infinity")
        card = path.with_suffix(".json")
        if not card.is_file():
            problems.append(f"{path.name} has no provenance card {card.name}")
        elif read(card).get("weights_sha256") != sha256(path):
            problems.append(f"weights_sha256 in {card.name} is not that of {path.name}")
    missing = [] if (bundle / "models" / "model.pt").is_file() else ["no weights models/model.pt"]
    return missing + problems


# ---------------------------------------------------------------------------------------------------------------------
# Smoke run


def run(bundle: Path, cwd: Path, names: Sequence[str], **knobs: str) -> str:
    """Run the documented command in its own process -> the end of its output if it failed, else nothing."""
    files = [os.path.join(os.path.relpath(bundle / "configs", cwd), f"{name}.json") for name in names]
    flags = [part for key, value in knobs.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files), *flags]
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return f"{'+'.join(names)} in {cwd}: {' '.join(done.stdout.split())[-400:]}" if done.returncode else ""


def check_synthesis(output: Path) -> list[str]:
    """Every file that a side-car in `output` names reads back as what the side-car says it is."""
    cards = [content for p in sorted(output.glob("*.json")) if "made_by" in (content := json.loads(p.read_text()))]
    problems = []
    for card in cards:
        made_by, config = card["made_by"], json.loads(Path(card["config_file"]).read_text())
        problems += [] if made_by["outputs"] else [f"{made_by['case']['name']} has no file"]
        for file, digest in ((output / name, digest) for name, digest in made_by["outputs"].items()):
            if not file.is_file():
                problems.append(f"no {file.name}")
                continue
            masks = "achieved" in made_by.get("record", {})
            found = check_mask(file, made_by, config) if masks else check_image(file, made_by)
            changed = [f"{file.name} is another file than its side-car says"] if sha256(file) != digest else []
            problems += found or changed
    return problems or ([] if cards else [f"no side-car in {output}"])


def check_image(file: Path, made_by: dict[str, Any]) -> list[str]:
    """An image is finite, not all the same, and on the grid of its layout, given or drawn, if the case has one."""
    load = LoadImage(image_only=True)
    image, problems = load(file), []
    drawn = [file.parent / name for name in made_by["outputs"] if stem(name).endswith(("_layout", "_label"))]
    layout = made_by["case"].get("layout") or next(filter(Path.is_file, drawn), None)
    grid = load(layout) if layout else image
    if image.shape != grid.shape or not torch.allclose(image.affine, grid.affine, atol=1e-4):
        problems.append(f"{file.name} is {tuple(image.shape)} and not on the grid of its layout {tuple(grid.shape)}")
    if not image.isfinite().all() or math.isclose(float(image.min()), float(image.max())):
        problems.append(f"{file.name} is not finite or is constant")
    return problems


def check_mask(file: Path, made_by: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """A mask has its size and no foreign value, and holds the lesions that its side-car says it does."""
    mask = LoadImage(image_only=True, dtype=None)(file).numpy().squeeze().T  # columns come first
    if mask.shape != tuple(config["image_size"]) or mask.dtype != np.uint8:
        return [f"{file.name} is {mask.dtype} {mask.shape}, expected uint8 {tuple(config['image_size'])}"]
    labels = config["labels"] or [1]
    values = config["labels"] or [255]
    foreign = sorted(set(np.unique(mask).tolist()) - {0, *values})
    if foreign:
        return [f"{file.name} holds {foreign[:5]}, expected 0 and {values}"]
    found = measure(np.stack([mask == value for value in values]), labels, config["min_size"])
    told = [Lesion(**lesion) for lesion in made_by["record"]["achieved"]]
    return [] if found == told else [f"{file.name} holds {found}, its side-car says {told}"]


def check_smoke(bundle: Path) -> list[str]:
    """Train, synthesise and evaluate in seconds, from the folder above ``bundles/`` and from the bundle's own."""
    problems = []
    for cwd in (bundle.parents[1] if bundle.parent.name == "bundles" else bundle.parent, bundle):
        with tempfile.TemporaryDirectory() as folder:
            places = {"output_dir": folder, "weights": f"{folder}/model.pt"}
            failed = run(bundle, cwd, ["train", "smoke"], output_dir=folder)
            failed = failed or run(bundle, cwd, ["inference", "smoke"], **places)
            problems += [failed] if failed else check_synthesis(Path(folder))
            failed = failed or run(bundle, cwd, ["inference", "evaluate", "smoke"], **places)
            missing = [name for name in ("evaluation.json", "evaluation.md") if not Path(folder, name).is_file()]
            problems += [failed] if failed else [f"evaluate in {cwd} wrote no {name}" for name in missing]
    return list(dict.fromkeys(problems))


Check = Callable[[Path], list[str]]
LAWS: list[Check] = [check_json, check_head, check_requires, check_strings, check_shared_ids]
LAWS += [check_flat_knobs, check_overlays, check_initialize]
STATIC = [check_metadata, check_versions, check_data_format, check_paper]
RELEASE = [check_files, check_properties, check_network, check_export, check_weights]
CHECKS: list[Check] = [*LAWS, *STATIC, *RELEASE]


def attempt(check: Check, bundle: Path) -> list[str]:
    """Run a check; one that cannot even run has found a problem."""
    try:
        return check(bundle)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return [f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> exit code."""
    known = sorted(p.parent for p in (REPO / "bundles").glob("*/configs"))
    cli = argparse.ArgumentParser(description="Verify bundles.", epilog="Exit codes: 0 ok, 1 failed, 2 usage.")
    cli.add_argument("bundles", nargs="*", metavar="NAME_OR_PATH", help="name under bundles/, or folder (default: all)")
    cli.add_argument("--smoke", action="store_true", help="also train, synthesise and evaluate for seconds")
    args = cli.parse_args(argv)
    logging.disable(logging.WARNING)
    bundles = []
    for name in args.bundles or [p.name for p in known]:
        root = next((p for p in (REPO / "bundles" / name, Path(name)) if (p / "configs").is_dir()), None)
        if root is None:
            cli.error(f"no bundle {name!r}: choose one of {', '.join(p.name for p in known)}, or give its folder")
        bundles.append(root.resolve())
    failed = 0
    for bundle in bundles:
        for check in [*CHECKS, *([check_smoke] if args.smoke else [])]:
            problems = attempt(check, bundle)
            failed += bool(problems)
            line = f"{bundle.name} {check.__name__.removeprefix('check_')}"
            print(f"FAIL {line}: {'; '.join(problems)}" if problems else f"ok   {line}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
