"""What a bundle holds besides its recipes: files, licences, metadata, the model card and the weights' provenance."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
from monai.bundle import ConfigParser, verify_metadata

from common.io import sha256
from tools.reading import SKIPPED, Check, parser, read

FILES = ["LICENSE", "docs/README.md", "docs/data_license.txt", "models/model.pt"]
FILES += [f"configs/{name}" for name in ("metadata.json", "inference.json", "train.json", "logging.conf")]
PLACES = {"LICENSE", "configs", "docs", "models", "scripts", "large_files.yml", "large_files.yaml", "large_files.json"}

# A path of one machine in a text; paths in documented commands (/data/LIDC-IDRI) and below @ids are none.
TEXTS = {".json", ".md", ".txt", ".conf", ".py", ".yml", ".yaml"}
MACHINE = re.compile(r"(?<![\w.@$'/-])(?:/(?:home|root|Users|work|tmp|mnt|media|var|opt|srv)/|[A-Za-z]:\\{1,2})[\w.-]+")

# MONAI's metadata schema, re-stated as it must be at hand without network.
SCHEMA = Path(__file__).with_name("metadata_schema.json")
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # the Apache License 2.0, word for word
SECTIONS = ["Model overview", "Data", "Commands", "Knobs", "Files written", "Numbers", "Limits", "Licence"]
CARD = ["source", "weights_sha256", "training_data", "licence", "knobs", "versions"]
LARGE = {"path": r"(?!/|.*\.\.)\S+", "url": r"https://\S+", "hash_val": r"[0-9a-f]{32,128}", "hash_type": r"md5|sha\d+"}


def parts(bundle: Path) -> list[Path]:
    """All that is part of a bundle, links included; what runs leave behind is not."""
    found = [(path, path.relative_to(bundle)) for path in sorted(bundle.rglob("*"))]
    left = SKIPPED | {"__pycache__"}
    return [p for p, name in found if not left & {name.parts[0], *name.parts} and ".previous." not in name.name]


def cards(bundle: Path) -> dict[str, dict[str, Any]]:
    """Weights of models/ by name -> their provenance card, empty without one."""
    found = [path for path in parts(bundle) if path.parent == bundle / "models" and path.suffix == ".pt"]
    return {p.name: read(p.with_suffix(".json")) if p.with_suffix(".json").is_file() else {} for p in found}


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


def check_tidy(bundle: Path) -> list[str]:
    """No link, which unzipping loses; nothing hidden or without a place in a bundle; no path of one machine."""
    problems = []
    for path in parts(bundle):
        name = path.relative_to(bundle)
        if path.is_symlink():
            problems.append(f"{name} is a symbolic link: put the file there")
        elif name.name.startswith("."):
            problems.append(f"{name} is hidden: delete it")
        elif name.parts[0] not in PLACES:
            problems.append(f"{name} has no place in a bundle: one of {', '.join(sorted(PLACES))}")
        elif path.is_file() and path.suffix in TEXTS:
            found = MACHINE.search(path.read_text(encoding="utf-8"))
            problems += [f"{name} names {found[0]}, a path of one machine"] if found else []
    return problems


def check_licence(bundle: Path) -> list[str]:
    """LICENSE is Apache-2.0's, metadata.json says whose; data_license.txt tells of the data of every weights file."""
    problems = []
    if sha256(bundle / "LICENSE") != APACHE:
        problems.append("LICENSE is not the text of the Apache License 2.0, word for word")
    if not str(read(bundle / "configs" / "metadata.json").get("copyright")).startswith("Copyright (c) "):
        problems.append('metadata.json: copyright does not begin with "Copyright (c) "')
    text = (bundle / "docs" / "data_license.txt").read_text(encoding="utf-8")
    for name, card in cards(bundle).items():
        makers = re.findall(r"common/\w+\.py", str(card.get("training_data")))
        untold = [told for told in makers or [name] if told not in text]
        problems += [f"data_license.txt does not mention {told}, of models/{name}" for told in untold]
    return problems


def check_metadata(bundle: Path) -> list[str]:
    """metadata.json obeys MONAI's schema, by MONAI's own check as well, and the changelog knows the version."""
    path = bundle / "configs" / "metadata.json"
    meta = read(path)
    errors = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).iter_errors(meta)
    problems = ["::".join(["metadata.json", *map(str, e.absolute_path)]) + f": {e.message[:200]}" for e in errors]
    version = meta.get("version")
    problems += [] if version in meta.get("changelog", {}) else [f"version {version} is not in the changelog"]
    if not problems:  # it stops at the first
        verify_metadata(meta_file=str(path), filepath=str(SCHEMA))
    return problems


def check_versions(bundle: Path) -> list[str]:
    """The packages of metadata.json are pinned as in requirements.txt, so that all bundles install side by side."""
    places = (bundle / "docs" / "requirements.txt", bundle.parent.parent / "requirements.txt")
    requirements = next(filter(Path.is_file, places), None)
    if requirements is None:
        return ["no requirements.txt: neither in docs/, as in a release, nor in the checkout"]
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", requirements.read_text(encoding="utf-8"), flags=re.MULTILINE))
    meta = read(bundle / "configs" / "metadata.json")
    named = {"monai": meta["monai_version"], "torch": meta["pytorch_version"], "numpy": meta["numpy_version"]}
    wrong = {k: v for k, v in {**named, **meta["required_packages_version"]}.items() if pins.get(k) != v}
    return [f"{k} is {v} in metadata.json, {pins.get(k)} in requirements.txt" for k, v in wrong.items()]


def check_published(bundle: Path) -> list[str]:
    """A version is published once: ``model_info.json`` beside the bundles, where the zoo has it, does not list it."""
    index = bundle.parent / "model_info.json"
    release = f"{bundle.name}_v{read(bundle / 'configs' / 'metadata.json')['version']}"
    source = read(index).get(release, {}).get("source") if index.is_file() else None
    return [f"{release} is published at {source}: count the version up, tell why in the changelog"] if source else []


def check_readme(bundle: Path) -> list[str]:
    """The model card has every section, in order, and what it shows and names is in the bundle."""
    text = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    problems = [f"README.md has no section {name!r}" for name in SECTIONS if name not in sections]
    if not problems and sections != SECTIONS:
        problems.append(f"README.md has the sections {sections}, expected {SECTIONS}")
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", text)
    named = [f"configs/{name}" for name in re.findall(r"configs/(\w+\.json)", text)]
    wanted = [*(f"docs/{link}" for link in links), *named]
    return problems + [f"README.md names {name}: no such file" for name in wanted if not (bundle / name).is_file()]


def check_cards(bundle: Path) -> list[str]:
    """The card of every weights file says what made it, from what, with what, and under which terms it comes."""
    problems = []
    for name, card in cards(bundle).items():
        lacking = [key for key in CARD if card.get(key) in (None, "", {}, "not stated")]
        problems += [f"the card of models/{name} does not state {', '.join(lacking)}"] if lacking else []
        if card.get("weights", name) != name:
            problems.append(f"the card of models/{name} is {card['weights']}'s")
    return problems


def check_apps(bundle: Path) -> list[str]:
    """What is promised to an app, inference.json keeps: the file it answers with, the knobs that a client may turn."""
    recipe, meta = (read(bundle / "configs" / f"{name}.json") for name in ("inference", "metadata"))
    shown = recipe["displayable_configs"]
    problems = [f"displayable_configs::{k} is not the knob @{k}" for k, v in shown.items() if v != f"@{k}"]
    problems += [f"displayable_configs::{k}: inference.json has no such knob" for k in shown if k not in recipe]
    written = list(recipe["saver"]["outputs"].values())
    results = {app: promised["result"] for app, promised in meta.get("supported_apps", {}).items()}
    wrong = {app: result for app, result in results.items() if result not in written}
    return problems + [
        f"supported_apps::{app} answers with {r}, the saver writes {written}" for app, r in wrong.items()
    ]


def check_large_files(bundle: Path) -> list[str]:
    """Whatever large_files.yml lets MONAI download has a place in the bundle, an https address and a hash."""
    problems = []
    for path in bundle.glob("large_files.*"):
        for entry in ConfigParser.load_config_file(path)["large_files"]:
            wrong = [key for key, form in LARGE.items() if not re.fullmatch(form, str(entry.get(key)))]
            problems += [f"{path.name}: {key} of {entry.get('path')} is {entry.get(key)!r}" for key in wrong]
    return problems


CONTENTS: list[Check] = [check_files, check_tidy, check_licence, check_metadata, check_versions, check_published]
CONTENTS += [check_readme, check_cards, check_apps, check_large_files]
