"""Verify bundles: files, metadata, the laws of the configs, networks, weights, and on request a smoke run.

    python tools/verify.py                       # all bundles of this repository
    python tools/verify.py lung_ddpm --smoke     # one, trained and run for seconds as well
    python tools/verify.py /somewhere/lung_ddpm  # an unzipped release
    python tools/verify.py --untrusted some.zip  # a foreign bundle, which is only looked into: see tools/untrusted

Every ``check_<what>(bundle)`` returns a list of problems, empty if all is well: those of the model zoo's
``verify_bundle`` that need no network, and ours. Bundles are data here: a path, JSON, and MONAI's own parser.
Exit codes: 0 all checks passed, 1 a check failed, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from tools import untrusted  # noqa: E402
from tools.contents import CONTENTS  # noqa: E402
from tools.laws import LAWS  # noqa: E402
from tools.networks import (  # noqa: E402
    check_data_format,
    check_export,
    check_network,
    check_paper,
    check_properties,
    check_weights,
)
from tools.reading import Check  # noqa: E402
from tools.smoke import check_smoke  # noqa: E402

STATIC: list[Check] = [*CONTENTS, check_data_format, check_paper]
RELEASE: list[Check] = [check_properties, check_network, check_export, check_weights]
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
    cli.add_argument(
        "--untrusted", nargs="+", type=Path, metavar="ZIP_OR_FOLDER", help="look into foreign bundles, and run nothing"
    )
    cli.add_argument("--allow", **untrusted.ALLOW)
    args = cli.parse_args(argv)
    if args.untrusted:
        for path in args.untrusted:
            if not path.exists():
                cli.error(f"no file or folder {path}")
        return untrusted.look(args.untrusted, args.allow)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # torch's, about what a trace holds constant: whether that matters is checked
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
