"""Fetch a bundle's zip: compare its checksum, look into it, and only then put it in place, whole or not at all.

    python tools/fetch.py https://.../cmdm_v0.1.0.zip              # into ./cmdm, by the SHA256SUMS beside it
    python tools/fetch.py cmdm_v0.1.0.zip --sha256 9f86d0... --bundle_dir bundles --allow network,dynamic
    python -I fetch.pyz --look cmdm_v0.1.0.zip                     # only tells what is in it

``python -m monai.bundle download`` compares nothing and unpacks file by file into place. This needs Python 3.11 alone:
``fetch.pyz`` of a release is this program in one file. What a bundle's Python code may do is yours to grant (--allow).
Checksums from the zip's own server tell damage; only one that you got elsewhere (--sha256) tells forgery. Exit codes:
0 in place, or nothing to refuse, 1 refused, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import re
import signal
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, or the .pyz

from tools import untrusted
from tools.untrusted.container import DAMAGED

LISTS = ("SHA256SUMS", "model_info.json")  # of checksums, looked for beside a zip in this order
MAX_BYTES = 32 * 2**30  # of a download
PATIENCE = 60  # seconds without a byte
REFUSALS = (*DAMAGED, http.client.HTTPException)  # what the network, the disk, a list or a zip may raise


class FetchError(ValueError):
    """A bundle is not put in place; the message says why."""


def is_url(address: str) -> bool:
    """Whether an address is of the web, and not a file."""
    return address.startswith(("http://", "https://"))


def opened(address: str) -> Any:
    """Open what an address or a path names, to read bytes."""
    return urllib.request.urlopen(address, timeout=PATIENCE) if is_url(address) else open(address, "rb")


def download(address: str, target: Path) -> None:
    """Copy what an address or a path names into a file, with a bar where somebody looks on."""
    with opened(address) as source, target.open("wb") as sink:
        announced = getattr(source, "length", None)
        while block := source.read(2**20):
            sink.write(block)
            if sink.tell() > MAX_BYTES:
                raise FetchError(f"is larger than {MAX_BYTES / 1e9:.0f} GB")
            if sys.stderr.isatty():
                share = f" of {announced / 1e6:.1f}" if announced else ""
                print(f"\r{sink.tell() / 1e6:.1f}{share} MB", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        if announced is not None and sink.tell() != announced:
            raise FetchError(f"broke off after {sink.tell()} of {announced} bytes: try again")


def file_name(address: str) -> str:
    """The last part of an address or a path."""
    return urllib.parse.unquote(urllib.parse.urlsplit(address).path if is_url(address) else address).rpartition("/")[2]


def find_checksum(address: str, sums: str | None) -> tuple[str, str]:
    """Find a zip's checksum in a list, or in those that lie beside it -> (algorithm, hex digits)."""
    beside = [urllib.parse.urljoin(address, n) if is_url(address) else str(Path(address).with_name(n)) for n in LISTS]
    name = file_name(address)
    for place in [sums] if sums else beside:
        try:
            with opened(place) as file:
                text = file.read(2**24).decode(errors="replace")
        except (urllib.error.HTTPError, FileNotFoundError) as error:
            if sums or getattr(error, "code", 404) not in (403, 404, 410):
                raise FetchError(f"cannot read {place}: {error}") from error
            continue
        found = re.search(rf"^([0-9a-fA-F]{{64}}) [ *]{re.escape(name)}\s*$", text, re.MULTILINE)
        if found:
            return "sha256", found[1]
        if file_name(place).endswith(".json"):
            checksum = json.loads(text).get(name.removesuffix(".zip"), {}).get("checksum")
            if isinstance(checksum, str):
                return "sha1", checksum
    where = sums or " or ".join(beside)
    raise FetchError(f"no checksum of {name} in {where}: give it (--sha256), its list (--sums), or --no-checksum")


def compare(archive: Path, algorithm: str, expected: str) -> None:
    """Refuse a file with another checksum than expected."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected.strip().lower():
        raise FetchError(f"has {algorithm} {found}, expected {expected}: damaged, or another file")


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the one bundle of a zip -> its folder."""
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    found = sorted(folder.iterdir())
    if len(found) != 1 or not (found[0] / "configs" / "metadata.json").is_file():
        names = ", ".join(path.name for path in found[:3]) or "nothing"
        raise FetchError(f"is no bundle: expected one folder with configs/metadata.json, found {names}")
    return found[0]


def put(made: Path, target: Path, aside: Path) -> None:
    """Move a folder to its place in one step; one already there steps aside, and comes back if that fails."""
    try:
        if os.path.lexists(target):
            os.rename(target, aside)
        os.rename(made, target)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.rename(aside, target)
        raise


def fetch(
    address: str,
    bundle_dir: Path,
    checksum: tuple[str, str] | None,
    *,
    allowed: Collection[str] = (),
    force: bool = False,
) -> Path:
    """Fetch a bundle -> its folder.

    Args:
        address: of a zip, on the web or on this machine.
        bundle_dir: the folder it will be in.
        checksum: (algorithm, hex digits); None compares nothing.
        allowed: what its Python code may do, see `untrusted`.
        force: replace a bundle that is already there.
    """
    bundle_dir.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that the last step is a renaming.
    with tempfile.TemporaryDirectory(prefix=".tmp-fetch-", dir=bundle_dir) as work:
        archive, folder = Path(work, "download.zip"), Path(work, "unpacked")
        download(address, archive)
        if checksum is not None:
            compare(archive, *checksum)
        problems = untrusted.inspect(archive, allowed)
        if problems:
            more = f" ({len(problems) - 1} more: --look at the zip tells all)" if len(problems) > 1 else ""
            raise FetchError(f"{problems[0]}{more}")
        made = unpack(archive, folder)
        target = bundle_dir / made.name
        if os.path.lexists(target) and not force:
            raise FetchError(f"{target} is already there: remove it, or replace it with --force")
        put(made, target, Path(work, "replaced"))
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> exit code."""
    cli = argparse.ArgumentParser(description="Fetch a bundle.", epilog="Exit codes: 0 in place, 1 refused, 2 usage.")
    cli.add_argument("address", metavar="URL_OR_FILE", help="the zip")
    known = cli.add_mutually_exclusive_group()
    known.add_argument("--sha256", metavar="X", help="the zip's checksum, in hex digits")
    known.add_argument("--sums", metavar="URL_OR_FILE", help=f"list with the checksum (default: {' or '.join(LISTS)})")
    known.add_argument("--no-checksum", action="store_true", help="compare nothing")
    cli.add_argument(
        "--bundle_dir", type=Path, default=Path("."), help="where the bundle's folder shall be (default: .)"
    )
    cli.add_argument("--allow", **untrusted.ALLOW)
    cli.add_argument("--force", action="store_true", help="replace the bundle if it is already there")
    cli.add_argument("--look", action="store_true", help="only look into a zip or a folder that is here, and tell all")
    args = cli.parse_args(argv)
    if args.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", args.sha256):
        cli.error("--sha256 takes 64 hex digits")
    if args.look:
        if not Path(args.address).exists():
            cli.error(f"no file or folder {args.address}: --look is for what is on this machine")
        return untrusted.look([Path(args.address)], args.allow)
    if not is_url(args.address) and not Path(args.address).is_file():
        cli.error(f"{args.address} is neither a file nor an address with http:// or https://")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as well
    try:
        checksum = ("sha256", args.sha256) if args.sha256 else None
        if checksum is None and not args.no_checksum:
            checksum = find_checksum(args.address, args.sums)
        target = fetch(args.address, args.bundle_dir, checksum, allowed=args.allow, force=args.force)
    except KeyboardInterrupt:
        print(f"fetch: {args.address}: interrupted; nothing is left of it", file=sys.stderr)
        return 1
    except REFUSALS as error:
        print(f"fetch: {args.address}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{target}: {' '.join(checksum) if checksum else 'checksum not compared'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
