"""Package bundles as release zips, complete with the shared code, that run in an empty folder anywhere.

    python tools/package.py                      # all -> dist/<name>_v<version>.zip, monailabel_app.zip, fetch.pyz
    python tools/package.py --source https://github.com/OWNER/REPO/releases/download/TAG
    python tools/package.py lung_ddpm --preset paper --weights big.pt
    python tools/package.py guidegen --preset paper --weights big.pt --weights mask_weights=big_mask.pt ...

The same tree gives the same bytes. Beside the zips lie ``model_info.json``, by which MONAI finds versions, and
``SHA256SUMS``. Exit codes: 0 packaged, 1 a bundle is incomplete, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from monai.bundle import ConfigParser

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.io import atomic_path, sha256  # noqa: E402
from tools.reading import FILLS, SKIPPED, build  # noqa: E402

REQUIRED = ["LICENSE", "docs/data_license.txt", "docs/requirements.txt", "configs/metadata.json", "models/model.pt"]
REQUIRED += ["scripts/common/__init__.py"]

Files = dict[str, Path | bytes]  # path inside the bundle: where its content lies, or the content


class PackageError(ValueError):
    """A bundle cannot be packaged; the message says what it lacks."""


def members(bundle: Path, common: Path) -> Files:
    """Collect what goes into the zip: the bundle, the shared code, and what to install before it runs."""
    found: Files = {}
    for root, prefix in ((bundle, ""), (common, "scripts/common/")):
        for path in root.rglob("*"):
            name = path.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
            if hidden or name.parts[0] in SKIPPED or ".previous." in name.name:
                continue
            if path.is_symlink():
                raise PackageError(f"{path} is a symbolic link, which unzipping does not restore: put the file there")
            if path.is_file():
                found[prefix + name.as_posix()] = path
    if (common.parent / "requirements.txt").is_file():
        found["docs/requirements.txt"] = common.parent / "requirements.txt"
    return found


def bake(files: Files, preset: str) -> None:
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


def drop_unnamed(files: Files) -> None:
    """Leave out weights, with their cards, that no config reads any more since a preset was baked in."""
    configs = b"".join(_read(files[name]) for name in files if re.fullmatch(r"configs/.*\.json", name))
    for name in [name for name in files if name.endswith(".pt") and f"/{name}'".encode() not in configs]:
        del files[name]
        files.pop(_card_of(name), None)


def replace_weights(files: Files, target: str, weights: Path) -> None:
    """Put weights into the zip, with their card; without one they get a minimal one.

    The model's bring what lies beside them, too. What else models/ holds (statistics, not other weights) stays if they
    bring none.
    """
    card: dict[str, Any] = {"source": {"file": weights.name}, "licence": "not stated"}
    if weights.with_suffix(".json").is_file():
        card = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    files[target] = weights
    files[_card_of(target)] = _json(card | {"weights": Path(target).name, "weights_sha256": sha256(weights)})
    if target != "models/model.pt":
        return
    others = {_card_of(name) for name in files if name.endswith(".pt")}
    for name in [name for name in files if re.fullmatch(r"models/[^/]*", name)]:
        if name.endswith(".pt") or name in others:
            continue
        beside = weights.with_name(Path(name).name)
        if beside.is_file():
            files[name] = beside
        else:
            print(f"package: no {beside}: {name} stays as it is", file=sys.stderr)


def clean_cards(files: Files) -> None:
    """Cut paths of the machine that trained, which cards may name, to their last part."""

    def cut(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: cut(value) for key, value in item.items()}
        if isinstance(item, list):
            return [cut(value) for value in item]
        absolute = isinstance(item, str) and (PurePosixPath(item).is_absolute() or PureWindowsPath(item).is_absolute())
        return PureWindowsPath(item).name if absolute else item

    for name in [_card_of(name) for name in files if name.endswith(".pt") and _card_of(name) in files]:
        card = _content(files, name)
        if cut(card) != card:
            files[name] = _json(cut(card))


def check_places(files: Files, *places: Path) -> None:
    """No text tells where it was made."""
    for name, content in files.items():
        found = [str(p) for p in places if not name.endswith(".pt") and str(p).encode() in _read(content)]
        if found:
            raise PackageError(f"{name} holds {found[0]}, a place on this machine: make the path relative")


def check_weights(files: Files, bundle: Path) -> None:
    """Every network that inference.json fills from a file of models/ finds its weights there, and they fit."""
    parsed = _inference(files, bundle)
    for knob in [knob for knob in _content(files, "configs/inference.json") if knob.endswith("weights")]:
        name = _target(parsed, knob, bundle)
        if name is None:
            continue
        if name not in files:
            raise PackageError(f"lacks {name}, which {knob} names: give --weights {knob}=FILE")
        network = FILLS.get(knob, knob.replace("weights", "def"))
        try:
            with _opened(files[name]) as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
            build(parsed, network=network).load_state_dict(state, strict=True, assign=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as error:
            cause = " ".join(str(error).split())[:200]
            raise PackageError(
                f"{name} does not fit {network}: give another, --weights {knob}=FILE ({cause})"
            ) from error


def _inference(files: Files, bundle: Path) -> ConfigParser:
    parsed = ConfigParser(_content(files, "configs/inference.json"))
    parsed["bundle_root"], parsed["device"] = str(bundle), "cpu"
    return parsed


def _target(parsed: ConfigParser, knob: str, bundle: Path) -> str | None:
    """The file of models/ that a knob names, if any."""
    value = str(parsed.get_parsed_content(knob)) if knob in parsed else ""
    return value.removeprefix(f"{bundle}/") if value.startswith(f"{bundle}/models/") else None


def _card_of(weights: str) -> str:
    return f"{weights.removesuffix('.pt')}.json"


def _opened(content: Path | bytes) -> BinaryIO:
    return content.open("rb") if isinstance(content, Path) else io.BytesIO(content)


def _read(content: Path | bytes) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _content(files: Files, name: str) -> dict[str, Any]:
    if name not in files:
        raise PackageError(f"no {name}")
    return json.loads(_read(files[name]))


def _json(content: Any) -> bytes:
    """Indent by 4, with short lists on one line as in our configs."""
    text = json.dumps(content, indent=4, ensure_ascii=False)

    def short(match: re.Match) -> str:
        line = "[" + re.sub(r"\n\s+", " ", match[1]) + "]"
        return line if len(line) <= 100 else match[0]

    return (re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", short, text) + "\n").encode()


def package(
    bundle: Path, output: Path, *, weights: Mapping[str, Path] | None = None, preset: str | None = None
) -> Path:
    """Write the release zip of one bundle.

    Args:
        bundle: its folder, with the shared code in ``../../common``.
        output: folder for the zip.
        weights: state dicts to ship, by the knob of inference.json that names their place.
        preset: overlay whose knobs become the defaults.

    Returns:
        the zip's path.
    """
    checkout = bundle.parents[1]
    files = members(bundle, checkout / "common")
    if preset is not None:
        bake(files, preset)
        drop_unnamed(files)
    for knob, file in (weights or {}).items():
        place = _target(_inference(files, bundle), knob, bundle)
        if place is None:
            raise PackageError(f"no knob {knob!r} of inference.json names a file of models/ to put {file.name} there")
        replace_weights(files, place, file)
    missing = [name for name in REQUIRED if name not in files]
    missing += [_card_of(name) for name in files if name.endswith(".pt") and _card_of(name) not in files]
    if missing:
        raise PackageError(f"lacks {', '.join(missing)}")
    clean_cards(files)
    check_places(files, *(place for place in (checkout, Path.home()) if place != Path("/")))
    check_weights(files, bundle)
    target = output / f"{bundle.name}_v{_content(files, 'configs/metadata.json')['version']}.zip"
    write_zip(target, {f"{bundle.name}/{name}": content for name, content in files.items()})
    return target


def package_app(output: Path) -> Path:
    """Write the zip of the MONAI Label app that serves the bundles; what it is made of is the same in any checkout."""
    app, target = REPO / "tools" / "monailabel_app", output / "monailabel_app.zip"
    files: Files = {f"{app.name}/{name}": app / name for name in ("README.md", "main.py", "requirements.txt")}
    write_zip(target, files | {f"{app.name}/LICENSE": REPO / "LICENSE"})
    return target


def package_fetch(output: Path) -> Path:
    """Write ``fetch.pyz``, a zip that Python runs: tools/fetch.py and what it needs, for those without a checkout."""
    target, tools = output / "fetch.pyz", REPO / "tools"
    sources = [tools / "__init__.py", tools / "fetch.py", *(tools / "untrusted").glob("*.py"), REPO / "LICENSE"]
    files: Files = {path.relative_to(REPO).as_posix(): path for path in sources}
    write_zip(target, files | {"__main__.py": b"import sys\n\nfrom tools.fetch import main\n\nsys.exit(main())\n"})
    return target


def write_zip(target: Path, files: Files) -> None:
    """Write files by their names in the zip, the same bytes for the same content."""
    # Stored, not deflated: weights hardly shrink, and what they deflate to depends on the zlib at hand.
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))
            entry.external_attr, entry.create_system = 0o100644 << 16, 3
            entry.file_size = content.stat().st_size if isinstance(content, Path) else len(content)
            with _opened(content) as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink)


def write_index(output: Path, source: str = "") -> None:
    """List a folder's bundles in ``model_info.json`` (SHA-1, as MONAI wants), and all its zips in ``SHA256SUMS``.

    An older ``model_info.json`` in the folder keeps its entries of zips that lie elsewhere.

    Args:
        source: address of the folder the zips will be downloaded from. MONAI demands the entry, so without an address
            it is empty.
    """
    index, zips = output / "model_info.json", sorted(output.glob("*_v*.zip"))
    earlier = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    info = {name: entry for name, entry in earlier.items() if entry["source"]}
    for path in zips:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha1").hexdigest()
        info[path.stem] = {"checksum": checksum, "source": f"{source.rstrip('/')}/{path.name}" if source else ""}
    index.write_bytes(_json(dict(sorted(info.items()))))
    sums = [f"{sha256(path)}  {path.name}\n" for path in sorted([*output.glob("*.zip"), *output.glob("*.pyz")])]
    (output / "SHA256SUMS").write_text("".join(sums))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> exit code."""
    known = sorted(p.parent.name for p in (REPO / "bundles").glob("*/configs"))
    cli = argparse.ArgumentParser(description="Package bundles.", epilog="Exit codes: 0 ok, 1 incomplete, 2 usage.")
    cli.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    cli.add_argument("--output", type=Path, default=REPO / "dist", help="folder for the zips (default: dist)")
    cli.add_argument("--source", default="", metavar="URL", help="where the zips will lie, for model_info.json")
    cli.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="[KNOB=]FILE",
        help="state dict to ship where a knob of inference.json names it (default: weights); may be given again",
    )
    cli.add_argument("--preset", help="overlay whose knobs become the defaults, e.g. paper; needs its --weights")
    args = cli.parse_args(argv)
    unknown = [name for name in args.names if name not in known]
    if unknown:
        cli.error(f"no bundle {unknown[0]!r}: choose among {', '.join(known)}")
    if (args.weights or args.preset) and len(args.names) != 1:
        cli.error("--weights and --preset belong to one bundle: name it")
    if args.source and not re.match(r"https?://\S+$", args.source):
        cli.error(f"--source {args.source} is no http address")
    weights = {}
    for text in args.weights:
        knob, equals, file = text.rpartition("=")
        weights[knob if equals else "weights"] = Path(file)
        if not Path(file).is_file():
            cli.error(f"no weights {file}")
    if args.preset and "weights" not in weights:
        cli.error(
            f"--preset {args.preset} changes the network, so that models/model.pt no longer fits: give its --weights"
        )
    failed = False
    for name in args.names or known:
        try:
            target = package(REPO / "bundles" / name, args.output, weights=weights, preset=args.preset)
        except (PackageError, OSError) as error:
            print(f"package: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    if not args.names:
        print(package_app(args.output))
        print(package_fetch(args.output))
    if args.output.is_dir():
        write_index(args.output, args.source)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
