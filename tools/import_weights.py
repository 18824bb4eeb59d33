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
from collections.abc import Mapping, Sequence
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
    dropped_keys,
    read_knobs,
    read_weights,
    select,
    translate,
)
from common.io import atomic_path, sha256, write_json  # noqa: E402

LAYOUTS = ("authors", "monai_generative")


class UsageError(ValueError):
    """The command line is wrong; the message says how it should read."""


def import_checkpoint(
    bundle_root: str | Path,
    path: str | Path,
    *,
    layout: str = "authors",
    part: str | None = None,
    preset: str | None = None,
    **knobs: Any,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a bundle's network at the size of a foreign checkpoint and fill it.

    Args:
        bundle_root: folder of the bundle, with ``configs/inference.json`` and ``configs/import_rules.json``.
        path: the checkpoint.
        layout: whose names it uses: ``"authors"`` or ``"monai_generative"``.
        part: which entry of the file to take in place of the rules' choice, e.g. ``"model"``.
        preset: overlay in ``configs/`` to start from, e.g. ``"paper"``.
        knobs: values that win over those read off the weights.

    Returns:
        (network on the CPU in evaluation mode, provenance card)
    """
    root, path = Path(bundle_root).resolve(), Path(path)
    rules = _rules(root, layout)
    if part is not None:
        rules["select"] = [part]
    parser = _parser(root, preset)
    _check_knobs(parser, knobs)
    # What the weights cannot tell stands among the rules' constants, until the user says otherwise.
    constants = rules.get("constants", {})
    rules["constants"] = {**constants, **{k: v for k, v in knobs.items() if k in constants}}
    content = read_weights(path)
    state, name = select(content, rules)
    knobs = read_knobs(state, rules, knobs)
    overlays = read_knobs(state, {**rules, "knobs": {"overlays": rules.get("overlays", [])}})["overlays"]
    network = _build(parser, knobs)
    network.load_state_dict(translate(state, rules, network.state_dict()))
    dropped = dropped_keys(state, rules)
    card = {
        "source": {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), "layout": layout},
        "part": name or "top level",
        "not_imported": {} if name == "" else {k: _describe(v) for k, v in content.items() if k != name},
        "step": next((content[k] for k in ("step", "global_step", "epoch") if isinstance(content.get(k), int)), None),
        "licence": rules.get("licence", "not stated"),
        "training_data": rules.get("training_data", "not stated"),
        "knobs": knobs,
        "overlays": [f"configs/{preset}.json"] * (preset is not None) + overlays,
        "keys": {
            "in_file": len(state),
            "used": len(state) - sum(map(len, dropped.values())),
            "dropped": {reason: {"count": len(keys), "keys": keys} for reason, keys in dropped.items()},
            "filled": len(network.state_dict()),
        },
        "parameters": sum(p.numel() for p in network.parameters()),
        "versions": {"monai": monai.__version__, "torch": torch.__version__},
    }
    return network.eval(), card


def _rules(root: Path, layout: str) -> dict[str, Any]:
    path = root / "configs" / "import_rules.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if layout == "monai_generative":
        own = content.get(layout, {})
        return {**MONAI_GENERATIVE, **own, "knobs": {**MONAI_GENERATIVE["knobs"], **own.get("knobs", {})}}
    if layout not in content:
        raise UsageError(f"{path} has no rules for layout {layout!r}, only {[k for k in content if k in LAYOUTS]}")
    return dict(content[layout])


def _parser(root: Path, preset: str | None) -> ConfigParser:
    files = [root / "configs" / f"{name}.json" for name in ("inference", preset) if name]
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


def _build(parser: ConfigParser, knobs: Mapping[str, Any]) -> torch.nn.Module:
    parser.update(dict(knobs))
    try:
        return parser.get_parsed_content("network_def")
    except (RuntimeError, ValueError, TypeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise CheckpointError(f"no network can be built with {dict(knobs)}: {cause}") from error


def _describe(value: Any) -> Any:
    if isinstance(value, (int, float, str)):
        return value
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (Mapping, list)) else type(value).__name__


def write(network: torch.nn.Module, card: dict[str, Any], output: Path) -> None:
    """Write ``model.pt``, its card ``model.json`` and the overlay ``imported.json``; what was there first is kept."""
    for suffix in ("pt", "json"):
        old, kept = output / f"model.{suffix}", output / f"model.previous.{suffix}"
        if old.is_file() and not (output / "model.previous.pt" if suffix == "pt" else kept).is_file():
            with atomic_path(kept) as temporary:
                shutil.copy2(old, temporary)
    with atomic_path(output / "model.pt") as temporary:
        torch.save(network.state_dict(), temporary)
    card["weights_sha256"] = sha256(output / "model.pt")
    write_json(output / "model.json", card)
    write_json(output / "imported.json", {"_desc_": f"Knobs of {card['source']['file']}.", **card["knobs"]})


def _command(root: Path, output: Path, overlays: Sequence[str]) -> str:
    """Say how to use what was written, from the bundle's folder."""
    files = ["configs/inference.json", *overlays, output / "imported.json"]
    listed = ",".join(f"'{file}'" for file in files)
    return f'cd {root} && python -m monai.bundle run --config_file "[{listed}]" --weights {output / "model.pt"}'


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
        network, card = import_checkpoint(
            root, args.checkpoint, layout=args.layout, part=args.select, preset=args.preset, **knobs
        )
        card |= {k: v for k in ("licence", "training_data") if (v := getattr(args, k)) is not None}
        output = Path(args.output).resolve() if args.output else root / "models"
        write(network, card, output)
    except (UsageError, CheckpointError, OSError) as error:
        print(f"import_weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    keys = card["keys"]
    dropped = sum(entry["count"] for entry in keys["dropped"].values())
    print(f"{args.checkpoint} ({card['part']}): {keys['used']} keys used, {dropped} dropped, {keys['filled']} filled")
    print(f"{output / 'model.pt'}: {card['parameters']} parameters; trained on: {card['training_data']}")
    print("Now run:  " + _command(root, output, card["overlays"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
