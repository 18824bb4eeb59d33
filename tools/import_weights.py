"""Import published weights into a bundle: every key accounted for, nothing inside the file run, provenance written.

    python tools/import_weights.py lung_ddpm Lung-DDPM-LIDC-IDRI-100000-steps.pt

A knob that the weights do not tell is given like to MONAI itself: ``--norm_num_groups 4 --image_size "[32,32,32]"``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch
from monai.bundle import ConfigParser

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.checkpoints import (  # noqa: E402
    MONAI_GENERATIVE,
    CheckpointError,
    Foreign,
    by_rules,
    read_knobs,
    read_weights,
    select,
)
from common.io import atomic_path, sha256, write_json  # noqa: E402
from common.ldm_layout import LATENT_DIFFUSION, by_networks, by_parts  # noqa: E402

LAYOUTS = ("authors", "monai_generative")
# Rules that bundles share: an entry of import_rules.json says by "layout" which it stands on. And who reads by them.
SHARED = {"monai_generative": MONAI_GENERATIVE, "latent_diffusion": LATENT_DIFFUSION}
READERS: dict[str, Callable[..., Foreign]] = {"latent_diffusion": by_parts, "networks": by_networks}


class UsageError(ValueError):
    """The command line is wrong; the message says how it should read."""


def import_checkpoint(
    bundle_root: str | Path, path: str | Path, **options: Any
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a bundle's network at the size of a foreign checkpoint and fill it; arguments as of `import_components`.

    Returns:
        (network on the CPU in evaluation mode, of several the first; provenance card)
    """
    components, card = import_components(bundle_root, path, **options)
    return next(iter(components.values())), card


def import_components(
    bundle_root: str | Path,
    path: str | Path,
    *,
    layout: str = "authors",
    part: str | None = None,
    preset: str | None = None,
    **knobs: Any,
) -> tuple[dict[str, torch.nn.Module], dict[str, Any]]:
    """Build all that a foreign checkpoint fills of a bundle, at its size.

    Args:
        bundle_root: folder of the bundle, with ``configs/inference.json`` and ``configs/import_rules.json``.
        path: the checkpoint.
        layout: whose names it uses: ``"authors"`` or ``"monai_generative"``.
        part: which entry of the file to take in place of the rules' choice, e.g. ``"model"``; where weights and
            averages lie side by side below prefixes, the prefix of those to take.
        preset: overlay in ``configs/`` to start from, e.g. ``"paper"``.
        knobs: values that win over those read off the weights.

    Returns:
        ({"network_def" or another component of the config: network on the CPU in evaluation mode}, provenance card)
    """
    root, path = Path(bundle_root).resolve(), Path(path)
    known = _rules(root, layout)
    presets = [f"configs/{preset}.json"] * (preset is not None)
    _check_knobs(_parser(root, presets), knobs)
    content = read_weights(path)
    rules = _fitting(content, [_chosen(each, part) for each in known])
    # What the weights cannot tell stands among the rules' constants, until the user says otherwise.
    constants = rules.get("constants", {})
    rules["constants"] = {**constants, **{k: v for k, v in knobs.items() if k in constants}}
    state, name = select(content, rules)
    found = READERS.get(rules.get("layout", ""), by_rules)(state, rules, knobs)
    overlays = read_knobs(state, {**rules, "knobs": {"overlays": rules.get("overlays", [])}})["overlays"]
    overlays = list(dict.fromkeys(presets + overlays))
    # What is built is what the overlays, too, make of it, as they are part of the command that runs it.
    components = {k: _build(_parser(root, overlays), found.knobs, k) for k in found.fill}
    for component, network in components.items():
        network.load_state_dict(found.fill[component](network.state_dict()))
    dropped = found.dropped
    card = {
        "source": {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), "layout": layout},
        "part": name or "top level",
        "not_imported": {} if name == "" else {k: _describe(v) for k, v in content.items() if k != name},
        "step": next((content[k] for k in ("step", "global_step", "epoch") if isinstance(content.get(k), int)), None),
        "licence": rules.get("licence", "not stated"),
        "training_data": rules.get("training_data", "not stated"),
        "knobs": found.knobs,
        "overlays": overlays,
        "keys": {
            "in_file": len(state),
            "used": len(state) - sum(map(len, dropped.values())),
            "dropped": {reason: {"count": len(keys), "keys": keys} for reason, keys in dropped.items()},
            "filled": sum(len(network.state_dict()) for network in components.values()),
            "parts": _parts(found, components),
        },
        "parameters": sum(p.numel() for p in next(iter(components.values())).parameters()),
        "notes": list(found.notes),
        "ready": found.ready,
        "versions": {"monai": monai.__version__, "torch": torch.__version__},
    }
    return {k: network.eval() for k, network in components.items()}, card


def _parts(found: Foreign, components: Mapping[str, torch.nn.Module]) -> dict[str, dict[str, Any]]:
    """Say of each part how many keys it has in the file, how many were used, and how many of ours it filled."""
    out = {key for keys in found.dropped.values() for key in keys}
    return {
        name: {
            "fills": part.component,
            "in_file": len(part.keys),
            "used": sum(key not in out for key in part.keys),
            "filled": sum(key.startswith(part.prefix) for key in components[part.component].state_dict()),
        }
        for name, part in found.parts.items()
    }


def _rules(root: Path, layout: str) -> list[dict[str, Any]]:
    """Rules for a layout; a bundle that reads several kinds of files has a list of them."""
    path = root / "configs" / "import_rules.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if layout not in content and layout not in SHARED:
        raise UsageError(f"{path} has no rules for layout {layout!r}, only {[k for k in content if k in LAYOUTS]}")
    own = content.get(layout, {})
    return [_shared(rules, layout) for rules in (own if isinstance(own, list) else [own])]


def _shared(own: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """A bundle's rules on top of those they stand on."""
    shared = SHARED.get(own.get("layout", layout), {})
    return {**shared, **own, "knobs": {**shared.get("knobs", {}), **own.get("knobs", {})}}


def _chosen(rules: Mapping[str, Any], part: str | None) -> dict[str, Any]:
    """The rules with the user's choice of a part in place of their own."""
    if part is None:
        return dict(rules)
    prefix = f"{part.rstrip('.')}."
    return {**rules, "take": prefix} if prefix in rules.get("averages", []) else {**rules, "select": [part]}


def _fitting(content: Mapping[str, Any], known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first rules whose ``when``, an expression over the selected weights, holds; without one they always fit."""
    begins: list[str] = []
    for rules in known:
        if "when" not in rules:
            return rules
        try:
            state, _ = select(content, rules)
        except CheckpointError:
            continue
        begins = list(state)[:3]
        if read_knobs(state, {"knobs": {"fits": rules["when"]}})["fits"]:
            if "refuse" in rules:
                raise CheckpointError(rules["refuse"])
            return rules
    held = f"weights that begin {', '.join(begins)}" if begins else f"no weights among {', '.join(map(repr, content))}"
    expected = "; ".join(rules["_desc_"] for rules in known if "refuse" not in rules)
    raise CheckpointError(f"none of the bundle's rules fits the file, which holds {held}; they take {expected}")


def _parser(root: Path, overlays: Iterable[str]) -> ConfigParser:
    files = [root / name for name in ("configs/inference.json", *overlays)]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} does not exist")
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    parser["bundle_root"], parser["device"] = str(root), "cpu"
    return parser


def _check_knobs(parser: ConfigParser, knobs: Mapping[str, Any]) -> None:
    for knob in knobs:
        if knob not in parser:
            near = difflib.get_close_matches(knob, list(parser.get("") or {}), n=1)
            raise UsageError(f"unknown option or knob --{knob}" + (f": did you mean --{near[0]}?" if near else ""))


def _build(parser: ConfigParser, knobs: Mapping[str, Any], component: str) -> torch.nn.Module:
    parser.update(dict(knobs))
    try:
        return parser.get_parsed_content(component)
    except (RuntimeError, ValueError, TypeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise CheckpointError(f"no network can be built with {dict(knobs)}: {cause}") from error


def _describe(value: Any) -> Any:
    if isinstance(value, (int, float, str)):
        return value
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (Mapping, list)) else type(value).__name__


def _named(component: str) -> str:
    """Name of a component's files: ``network_def`` is the model, another one is called as in the config."""
    return "model" if component == "network_def" else component.removesuffix("_def").removesuffix("_network")


def _overlay(name: str) -> str:
    """File of the knobs that come with a card, so that several imports may lie side by side."""
    return "imported.json" if name == "model" else f"imported_{name}.json"


def write(components: Mapping[str, torch.nn.Module], card: dict[str, Any], output: Path, root: Path) -> str:
    """Write weights, their card and their knobs as an overlay; what was there first is kept.

    ``network_def`` becomes ``model.pt``, another component ``NAME_def`` or ``NAME_network_def`` becomes ``NAME.pt``,
    which the overlay names as ``NAME_weights``. Card ``NAME.json`` and overlay, ``imported.json`` for the model and
    ``imported_NAME.json`` for others, are called by the first of them.

    Returns:
        name of the first component's files
    """
    names = {component: _named(component) for component in components}
    first = next(iter(names.values()))
    for written in [*(f"{name}.pt" for name in names.values()), f"{first}.json"]:
        old = output / written
        kept = old.with_suffix(f".previous{old.suffix}")
        if old.is_file() and not kept.is_file():
            with atomic_path(kept) as temporary:
                shutil.copy2(old, temporary)
    overlay = {"_desc_": f"Knobs of {card['source']['file']}.", **card["knobs"]}
    for component, network in components.items():
        name = names[component]
        file = output / f"{name}.pt"
        with atomic_path(file) as temporary:
            torch.save(network.state_dict(), temporary)
        if name == first:
            card["weights_sha256"] = sha256(file)
        else:
            card[name] = {
                "file": file.name,
                "parameters": sum(p.numel() for p in network.parameters()),
                "weights_sha256": sha256(file),
            }
        if component != "network_def":
            overlay[f"{name}_weights"] = _place(file, root)
    write_json(output / f"{first}.json", card)
    write_json(output / _overlay(first), overlay)
    return first


def _place(file: Path, root: Path) -> str:
    """A path as a config says it: from the bundle's root if it lies below, so that both may move."""
    if file.is_relative_to(root):
        return f"$@bundle_root + {'/' + file.relative_to(root).as_posix()!r}"
    return file.as_posix()


def _commands(root: Path, output: Path) -> list[str]:
    """Say how to use what lies imported in a folder, from the bundle's: to synthesise, and to train on where it can."""
    imports = _imports(output)
    if "model" not in imports:
        return []
    model = imports["model"]
    # Of another variant than the model is what stands on other overlays.
    files = [_overlay(name) for name, card in imports.items() if {*card["overlays"]} <= {*model["overlays"]}]
    uses = [("Now run:  ", "inference", "weights")] if model["ready"] else []
    train = root / "configs" / "train.json"
    if train.is_file() and "base" in json.loads(train.read_text(encoding="utf-8")):
        uses.append(("Or train: " if uses else "Now train:", "train", "base"))
    commands = []
    for verb, config, knob in uses:
        listed = [f"configs/{config}.json", *model["overlays"], *(output / file for file in files)]
        config_file = ",".join(f"'{file}'" for file in listed)
        run = f'python -m monai.bundle run --config_file "[{config_file}]" --{knob} {output / "model.pt"}'
        commands.append(f"{verb} cd {root} && {run}")
    return commands


def _imports(output: Path) -> dict[str, dict[str, Any]]:
    """Cards of what was imported into a folder, by the name of its files, the model first."""
    others = sorted(path.stem.removeprefix("imported_") for path in output.glob("imported_*.json"))
    cards = {}
    for name in ("model", *others):
        files = output / _overlay(name), output / f"{name}.json"
        if all(file.is_file() for file in files):
            card = json.loads(files[1].read_text(encoding="utf-8"))
            cards.update({name: card} if "overlays" in card else {})  # else trained here since
    return cards


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="import_weights.py",
        allow_abbrev=False,
        description="Import an author's checkpoint into a bundle.",
        epilog="Any other --knob value sets a knob of configs/inference.json, e.g. --norm_num_groups 4. "
        "Exit codes: 0 imported, 1 the file is refused, 2 the command line is wrong.",
    )
    parser.add_argument("bundle", help="name under bundles/, or a bundle's folder")
    parser.add_argument("checkpoint", help=".pt, .pth, .ckpt or .safetensors; code inside is never run")
    parser.add_argument("--output", help="folder for what is written (default: the bundle's models/)")
    parser.add_argument("--preset", help="overlay in configs/ to start from, e.g. paper")
    parser.add_argument("--layout", choices=LAYOUTS, default="authors", help="whose names the file uses")
    parser.add_argument("--select", help="entry of the file to take, e.g. model (default: as the bundle's rules say)")
    parser.add_argument("--licence", help="licence of the weights, for the card")
    parser.add_argument("--training_data", help="what the weights were trained on, for the card")
    args, rest = parser.parse_known_args(argv)
    if len(rest) % 2 or not all(name.startswith("--") for name in rest[::2]):
        parser.error(f"expected pairs of --knob value, got {' '.join(rest)}")
    return args, {name.removeprefix("--"): _value(text) for name, text in zip(rest[::2], rest[1::2], strict=True)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> exit code."""
    args, knobs = _arguments(argv)
    try:
        root = next((p for p in (REPO / "bundles" / args.bundle, Path(args.bundle)) if (p / "configs").is_dir()), None)
        if root is None:
            known = sorted(p.parent.name for p in (REPO / "bundles").glob("*/configs"))
            raise UsageError(f"no bundle {args.bundle!r}: choose one of {', '.join(known)}, or give its folder")
        root = root.resolve()
        components, card = import_components(
            root, args.checkpoint, layout=args.layout, part=args.select, preset=args.preset, **knobs
        )
        card |= {k: v for k in ("licence", "training_data") if (v := getattr(args, k)) is not None}
        output = Path(args.output).resolve() if args.output else root / "models"
        first = write(components, card, output, root)
    except (UsageError, CheckpointError, OSError) as error:
        print(f"import_weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    keys = card["keys"]
    dropped = sum(entry["count"] for entry in keys["dropped"].values())
    print(f"{args.checkpoint} ({card['part']}): {keys['used']} keys used, {dropped} dropped, {keys['filled']} filled")
    for name, part in keys["parts"].items() if len(keys["parts"]) > 1 else ():
        print(f"  {name}: {part['used']} of {part['in_file']} keys used, {part['filled']} filled in {part['fills']}")
    print(f"{output / first}.pt: {card['parameters']} parameters; trained on: {card['training_data']}")
    for note in card["notes"]:
        print(f"Note: {note}")
    for command in _commands(root, output):
        print(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
