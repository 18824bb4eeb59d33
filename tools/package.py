"""Package bundles as release zips, complete with the shared code, that run in an empty folder anywhere.

    python tools/package.py                      # all bundles -> dist/<name>_v<version>.zip
    python tools/package.py lung_ddpm --preset paper --weights big.pt

The same tree gives the same bytes. Beside the zips lie ``model_info.json``, by which MONAI finds versions, and
``SHA256SUMS``. Exit codes: 0 packaged, 1 a bundle is incomplete, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

REPO = Path(__file__).resolve().parents[1]
SKIPPED = {"output", "data", "eval", "mlruns"}
REQUIRED = ["LICENSE", "docs/data_license.txt", "configs/metadata.json", "models/model.pt"]


class PackageError(ValueError):
    """A bundle cannot be packaged; the message says what it lacks."""


def members(bundle: Path, common: Path) -> dict[str, bytes]:
    """Collect what goes into the zip -> {path inside the bundle: content}."""
    found: dict[str, bytes] = {}
    for root, prefix in ((bundle, ""), (common, "scripts/common/")):
        for path in root.rglob("*"):
            name = path.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
            if hidden or name.parts[0] in SKIPPED or ".previous." in name.name:
                continue
            if path.is_symlink():
                raise PackageError(f"{path} is a symbolic link, which unzipping does not restore: put the file there")
            if path.is_file():
                found[prefix + name.as_posix()] = path.read_bytes()
    return found


def bake(files: dict[str, bytes], preset: str) -> None:
    """Write an overlay's knobs into the recipes; what only the sibling recipe knows stays out of a recipe."""
    overlay = _content(files, f"configs/{preset}.json")
    overlay = {key: value for key, value in overlay.items() if key != "_desc_"}
    if any("::" in key or key.startswith("+") for key in overlay):
        raise PackageError(f"{preset}.json rewires a recipe; only an overlay of top-level knobs can be a preset")
    recipes = {name: _content(files, f"configs/{name}.json") for name in ("train", "inference")}
    for name, sibling in (("train", "inference"), ("inference", "train")):
        foreign = recipes[sibling].keys() - recipes[name].keys()
        files[f"configs/{name}.json"] = _json(recipes[name] | {k: v for k, v in overlay.items() if k not in foreign})
    if "image_size" in overlay:
        parsed = ConfigParser(_content(files, "configs/inference.json"))
        size = parsed.get_parsed_content("latent_size" if "latent_size" in parsed else "image_size")
        meta = _content(files, "configs/metadata.json")
        for group, entry, channels in (("inputs", "image", "in_channels"), ("outputs", "pred", "out_channels")):
            form = meta["network_data_format"][group][entry]
            form["spatial_shape"] = list(size)
            if f"network_def::{channels}" in parsed:
                form["num_channels"] = int(parsed.get_parsed_content(f"network_def::{channels}"))
        files["configs/metadata.json"] = _json(meta)


def replace_weights(files: dict[str, bytes], weights: Path) -> None:
    """Put other weights in the place of models/model.pt, with what lies beside them: card, statistics and the like.

    Without a card they get a minimal one; what else models/ holds (statistics, not other weights) stays if they bring
    none.
    """
    card: dict[str, Any] = {"source": {"file": weights.name}}
    if weights.with_suffix(".json").is_file():
        card = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    files["models/model.pt"] = weights.read_bytes()
    card["weights_sha256"] = hashlib.sha256(files["models/model.pt"]).hexdigest()
    files["models/model.json"] = _json(card)
    others = {name.rpartition(".")[0] for name in files if re.fullmatch(r"models/.*\.pt", name)}
    for name in [name for name in files if name.startswith("models/") and name.rpartition(".")[0] not in others]:
        beside = weights.with_name(Path(name).name)
        if beside.is_file():
            files[name] = beside.read_bytes()
        else:
            print(f"package: no {beside}: {name} stays as it is", file=sys.stderr)


def _content(files: dict[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        raise PackageError(f"no {name}")
    return json.loads(files[name])


def _json(content: Any) -> bytes:
    """Indent by 4, with short lists on one line as in our configs."""
    text = json.dumps(content, indent=4, ensure_ascii=False)

    def short(match: re.Match) -> str:
        line = "[" + re.sub(r"\n\s+", " ", match[1]) + "]"
        return line if len(line) <= 100 else match[0]

    return (re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", short, text) + "\n").encode()


def package(bundle: Path, output: Path, *, weights: Path | None = None, preset: str | None = None) -> Path:
    """Write the release zip of one bundle.

    Args:
        bundle: its folder, with the shared code in ``../../common``.
        output: folder for the zip.
        weights: state dict to ship as ``models/model.pt``.
        preset: overlay whose knobs become the defaults.

    Returns:
        the zip's path.
    """
    files = members(bundle, bundle.parents[1] / "common")
    if weights is not None:
        replace_weights(files, weights)
    if preset is not None:
        bake(files, preset)
    missing = [name for name in [*REQUIRED, "scripts/common/__init__.py"] if name not in files]
    if missing:
        raise PackageError(f"lacks {', '.join(missing)}")
    target = output / f"{bundle.name}_v{_content(files, 'configs/metadata.json')['version']}.zip"
    output.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{os.getpid()}")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{bundle.name}/{name}", date_time=(2020, 1, 1, 0, 0, 0))
            entry.external_attr, entry.create_system = 0o100644 << 16, 3
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED)
    os.replace(temporary, target)
    return target


def write_index(output: Path) -> None:
    """List every zip of the folder in ``model_info.json`` (SHA-1, as MONAI wants) and ``SHA256SUMS``."""
    zips = {path: path.read_bytes() for path in sorted(output.glob("*_v*.zip"))}
    info = {path.stem: {"checksum": hashlib.sha1(data).hexdigest(), "source": ""} for path, data in zips.items()}
    (output / "model_info.json").write_bytes(_json(info))
    sums = [f"{hashlib.sha256(data).hexdigest()}  {path.name}\n" for path, data in zips.items()]
    (output / "SHA256SUMS").write_text("".join(sums))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> exit code."""
    known = sorted(p.parent.name for p in (REPO / "bundles").glob("*/configs"))
    cli = argparse.ArgumentParser(description="Package bundles.", epilog="Exit codes: 0 ok, 1 incomplete, 2 usage.")
    cli.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    cli.add_argument("--output", type=Path, default=REPO / "dist", help="folder for the zips (default: dist)")
    cli.add_argument("--weights", type=Path, help="state dict to ship as models/model.pt")
    cli.add_argument("--preset", help="overlay whose knobs become the defaults, e.g. paper; needs its --weights")
    args = cli.parse_args(argv)
    unknown = [name for name in args.names if name not in known]
    if unknown:
        cli.error(f"no bundle {unknown[0]!r}: choose among {', '.join(known)}")
    if (args.weights or args.preset) and len(args.names) != 1:
        cli.error("--weights and --preset belong to one bundle: name it")
    if args.preset and not args.weights:
        cli.error(
            f"--preset {args.preset} changes the network, so that models/model.pt no longer fits: give its --weights"
        )
    if args.weights and not args.weights.is_file():
        cli.error(f"no weights {args.weights}")
    failed = False
    for name in args.names or known:
        try:
            target = package(REPO / "bundles" / name, args.output, weights=args.weights, preset=args.preset)
        except (PackageError, OSError) as error:
            print(f"package: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    if args.output.is_dir():
        write_index(args.output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
