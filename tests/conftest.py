"""Fixtures: a small phantom cohort, and bundles run as a user runs them, in their own process."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from common.io import sha256, write_json  # noqa: E402
from common.phantoms import thorax_cohort  # noqa: E402
from common.semantics import Lesion  # noqa: E402
from tools import package  # noqa: E402
from tools.reading import build, parser  # noqa: E402

NAMES = sorted(path.parent.name for path in (REPO / "bundles").glob("*/configs"))
IGNORED = shutil.ignore_patterns("output", "data", "eval", "__pycache__", ".*", "*.previous.*")
SIDE = 64  # of drawn masks

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the tests between workers: a file stays together with its fixtures, or one bundle's part of it.

    (``--dist loadgroup`` would be the same, but does nothing in pytest-xdist 3.8 with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    bundles = "|".join(NAMES)

    class ByBundle(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return "::".join([file, *re.findall(rf"[\[-]({bundles})(?=[\]-])", test)[:1]])

    return ByBundle(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run bundles are slow and go first, so that no worker waits for another at the end."""
    slow = {item.path for item in items if item.get_closest_marker("bundle")}
    items.sort(key=lambda item: item.path not in slow)


@contextmanager
def no_bundle_stays() -> Iterator[None]:
    """A bundle built in this process puts itself first on the path (`use_bundle`): not beyond this context.

    Path and modules go together: with the path alone put back, the bundle that is first again would meet the
    ``scripts`` of another.
    """
    path, scripts = list(sys.path), sys.modules.get("scripts")
    yield
    if sys.path != path or sys.modules.get("scripts") is not scripts:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _no_bundle_stays() -> Iterator[None]:
    """What one test builds of a bundle must not reach the next."""
    with no_bundle_stays():
        yield


@pytest.fixture(autouse=True)
def _loggers_enabled() -> None:
    """What one test does to logging (a bundle's logging.conf, a silenced rank) must not reach the next."""
    logging.disable(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four thorax phantoms of 24^3: ``CT/`` and ``SEG/``. Read only: copy it before changing anything."""
    return Path(thorax_cohort(tmp_path_factory.mktemp("cohort"), 4, (24, 24, 24)))


@pytest.fixture(scope="session")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkouts(name)``: a copy of one bundle in a small checkout, with untrained weights, which make any size cheap.

    What else lies in models/ (statistics, say) stays, and the card of the shipped weights. Read only.
    """

    @cache
    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp("checkout")
        bundle = root / "bundles" / name
        shutil.copytree(REPO / "common", root / "common", ignore=IGNORED)
        shutil.copy(REPO / "requirements.txt", root)
        shutil.copytree(REPO / "bundles" / name, bundle, ignore=IGNORED)
        for path in (bundle / "models").glob("model_*"):
            path.unlink()
        levels = len(json.loads((bundle / "configs" / "inference.json").read_text())["attention_levels"])
        for config in ("inference", "train"):
            edit(bundle, config, channels=[8, 8, 16, 16][:levels], norm_num_groups=4)
        save_weights(bundle, build(parser(bundle, "inference"), "cpu").state_dict())
        return bundle

    return make


@pytest.fixture(params=NAMES)
def checkout(request: pytest.FixtureRequest, checkouts: Callable[[str], Path]) -> Path:
    """Each bundle in its small checkout."""
    return checkouts(request.param)


def copy_checkout(checkout: Path, folder: Path, name: str | None = None) -> Path:
    """Copy the checkout's bundle, to break it; the shared code stays where it is."""
    bundle = folder / "bundles" / (name or checkout.name)
    shutil.copytree(checkout, bundle)
    (folder / "common").symlink_to(checkout.parents[1] / "common")
    shutil.copy(checkout.parents[1] / "requirements.txt", folder)
    return bundle


def edit(bundle: Path, name: str, /, **items: Any) -> None:
    """Set top-level items of a config."""
    path = bundle / "configs" / f"{name}.json"
    path.write_bytes(package._json(json.loads(path.read_text()) | items))


def save_weights(bundle: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the weights of a bundle, and fit their card to them."""
    path, card = (bundle / "models" / f"model.{ending}" for ending in ("pt", "json"))
    torch.save({key: value.half().float() for key, value in state.items()}, path)
    write_json(card, json.loads(card.read_text()) | {"weights_sha256": sha256(path)})


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
PATIENCE = 600  # seconds


@cache
def preloaded() -> subprocess.Popen:
    """The process that forks for every command; it ends with ours, when its stdin does."""
    command = [sys.executable, str(REPO / "tests" / "preloaded.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, text=True, bufsize=1, **pipes)


def fork_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run ``python *arguments`` without its start: see `preloaded`."""
    server = preloaded()
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        order = {"command": arguments, "cwd": str(cwd), "output": output.name, "seconds": PATIENCE}
        server.stdin.write(json.dumps(order) + "\n")
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess([sys.executable, *arguments], status, output.read())


def run_command(
    *command: str, cwd: Path = REPO, env: dict[str, str] | None = None, fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run a command as a user would; the result holds stdout and stderr together.

    Python's are forked from a process that has MONAI imported, unless ``fresh``, with an environment of their own, or
    where a fork might inherit CUDA.
    """
    if command[0] == sys.executable and env is None and not fresh and not torch.cuda.is_available():
        return fork_command(*command[1:], cwd=cwd)
    environment = {**os.environ, **ENVIRONMENT, **(env or {})}
    return subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE
    )


@pytest.fixture(scope="session")
def run_bundle() -> Callable[..., subprocess.CompletedProcess]:
    """``run_bundle("lung_ddpm", "inference", "smoke", output_dir=...)``: the README's command in its own process.

    ``cwd`` may be the repository (default) or the bundle's folder; the config paths follow.
    """

    def run(
        name: str,
        *configs: str,
        cwd: Path = REPO,
        root: Path | None = None,
        env: dict | None = None,
        fresh: bool = False,
        **knobs: object,
    ) -> subprocess.CompletedProcess:
        bundle = root or REPO / "bundles" / name
        folder = os.path.relpath(bundle / "configs", cwd)
        files = [f"{folder}/{c}.json" for c in configs]
        config_file = files[0] if len(files) == 1 else str(files)
        flags = [part for key, value in knobs.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config_file, *flags]
        return run_command(*command, cwd=cwd, env=env, fresh=fresh)

    return run


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blobs(n: int, size: int = 24, dims: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth images (n, 1, *S) in [-1, 1], a stand-in for anatomy."""
    coarse = normal(n, 1, *(5,) * dims, seed=seed)
    mode = "bilinear" if dims == 2 else "trilinear"
    return torch.nn.functional.interpolate(coarse, (size,) * dims, mode=mode).tanh()


def touch(root: Path, *names: str) -> Path:
    """Files with their own name as content; listing never opens them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def ellipse(size: float, x: float, y: float, aspect: float = 1.0, angle: float = 0.0, side: int = SIDE) -> np.ndarray:
    """A filled ellipse of that area and centre, in fractions of the image."""
    rows, columns = np.mgrid[:side, :side] - side * np.array([y, x]).reshape(2, 1, 1)
    u, v = columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)
    return u**2 / aspect + v**2 * aspect <= size * side**2 / np.pi


def draw(n: int, seed: int = 0, scale: float = 1.0) -> list[list[Lesion]]:
    """Lesions of n masks, one in four masks with two of them; large ones nearer to the centre."""
    rng, masks = np.random.default_rng(seed), []
    for _ in range(n):
        sizes = rng.lognormal(-3, 0.4, 1 + (rng.random() < 0.25)).clip(0.01, 0.12)
        spots = rng.permutation([0.28, 0.72])
        masks.append(
            [
                Lesion(float(scale * s), float(c + rng.normal(0, 0.04)), 0.5 + float(rng.normal(0, 0.08)))
                for s, c in zip(sizes, spots)
            ]
        )
    return masks


def paint(lesions: list[Lesion], rng: np.random.Generator) -> np.ndarray:
    """A mask that holds the lesions, as ellipses of some aspect."""
    shapes = [ellipse(n.size, n.x, n.y, rng.uniform(0.8, 1.25), rng.uniform(0, 3)) for n in lesions]
    return np.any([np.zeros((SIDE, SIDE), bool), *shapes], axis=0)
