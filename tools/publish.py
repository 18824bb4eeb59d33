"""Publish a release zip as a repository of the Hugging Face hub, from which MONAI downloads bundles by name.

    pip install huggingface_hub
    python tools/publish.py dist/cmdm_v0.1.0.zip --repo OWNER/cmdm --dry-run    # tells what it would send
    HF_TOKEN=... python tools/publish.py dist/cmdm_v0.1.0.zip --repo OWNER/cmdm

MONAI's ``push_to_hf_hub`` does it: the bundle is the repository's root, its page begins with a YAML head, its version
is a tag, and so is ``latest_version``. Then ``python -m monai.bundle download --name cmdm --source huggingface_hub
--repo OWNER/cmdm`` finds it. Exit codes: 0 published, 1 the hub or the zip refuses, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
from monai.bundle import push_to_hf_hub

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from common.io import sha256  # noqa: E402
from tools.fetch import unpack  # noqa: E402


class Rehearsal:
    """Stands in for the hub's client ``HfApi`` as `push_to_hf_hub` uses it: tells what it is asked for."""

    def __init__(self, **_: Any) -> None:
        pass

    def create_repo(self, repo_id: str, private: bool, **_: Any) -> None:
        """Tell which repository would be made."""
        print(f"repository {repo_id}, {'private' if private else 'public'}, unless it is there")

    def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> str:
        """List what would be sent -> the repository's address."""
        files = sorted(path for path in Path(folder_path).rglob("*") if path.is_file())
        for path in files:
            print(f"{sha256(path)} {path.stat().st_size:>10} {path.relative_to(folder_path).as_posix()}")
        print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
        return f"{huggingface_hub.constants.ENDPOINT}/{repo_id}"

    def create_tag(self, tag: str, **_: Any) -> None:
        """Tell which tag would be set."""
        print(f"tag {tag}")


def publish(archive: Path, repo: str, *, private: bool = True) -> str:
    """Push a release zip to the hub -> the repository's address."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = unpack(archive, Path(folder))
        version = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
        # docs/README.md becomes the repository's page, which shows the pictures from where it is.
        for picture in (bundle / "docs").glob("*.png"):
            shutil.copy(picture, bundle)
        options = {"private": private, "version": version, "tag_as_latest_version": True}
        return str(push_to_hf_hub(repo, bundle.name, folder, **options, commit_message=f"{bundle.name} {version}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> exit code."""
    cli = argparse.ArgumentParser(description="Publish a bundle.", epilog="Exit codes: 0 ok, 1 refused, 2 usage.")
    cli.add_argument("archive", type=Path, metavar="ZIP", help="a release, as tools/package.py makes it")
    cli.add_argument("--repo", required=True, metavar="OWNER/NAME", help="of the hub")
    cli.add_argument("--public", action="store_true", help="a repository that everybody sees, where it is made here")
    cli.add_argument("--dry-run", action="store_true", help="tell what would be sent, and send nothing")
    args = cli.parse_args(argv)
    if not args.archive.is_file():
        cli.error(f"no zip {args.archive}: make one with tools/package.py")
    if args.repo.count("/") != 1:
        cli.error(f"--repo {args.repo} is not OWNER/NAME")
    client = Rehearsal if args.dry_run else huggingface_hub.HfApi
    try:
        with mock.patch.object(huggingface_hub, "HfApi", client):
            address = publish(args.archive, args.repo, private=not args.public)
    except Exception as error:  # of whichever library the hub's client speaks through
        print(f"publish: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"nothing was sent to {address}" if args.dry_run else address)
    return 0


if __name__ == "__main__":
    sys.exit(main())
