"""Every command of README.md, run as it stands but small; the cards' commands name what exists.

Small: a bundle's smoke knobs behind its configs, two processes for eight, one bundle where all would do. ``make`` and
``.ci/run`` are what runs these tests, so of them only the plan is looked at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import NAMES, REPO, run_command
from loopback import Page, Web
from test_checkpoints import as_authors, tiny

from tools import package

RELEASE = "github.com/OWNER/REPO/releases/download/v0.1.0"
CARDS = [REPO / "bundles" / name / "docs" / "README.md" for name in NAMES]


def commands(path: Path) -> list[str]:
    """The commands of a page's bash blocks, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [re.split(r"\s+#\s", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


README = commands(REPO / "README.md")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder to work in, data and a checkpoint in it, and an environment in which GitHub is here."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(cohort, folder / "DATASET")
    torch.save({"step": 1, "ema": as_authors(tiny())}, folder / "CHECKPOINT")
    dist = folder / "release"
    package.package(REPO / "bundles" / "cmdm", dist)
    package.write_index(dist, f"https://{RELEASE}")
    web = Web(folder)
    web.pages |= {f"{RELEASE}/{path.name}": Page(path.read_bytes()) for path in dist.iterdir()}
    yield folder, web.environment(folder / "hub")
    web.shutdown()


def small(command: str, folder: Path) -> list[str]:
    """The same command for a test: a list, as no shell is needed."""
    words = re.findall(r'"[^"]*"|\S+', command)
    words = [word.strip('"') for word in words]
    for i, word in enumerate(words):
        if word == "--config_file":
            files = re.findall(r"[\w/.]+\.json", words[i + 1])
            smoke = Path(files[0]).with_name("smoke.json")
            words[i + 1] = str([*files, str(smoke)])
        if word in ("DATASET", "OUT", "CHECKPOINT", "dist", "elsewhere", "fetched") or word.startswith("dist/"):
            words[i] = str(folder / word)
    if "monai.bundle" in words and "run" in words:
        words += [] if "--output_dir" in words else ["--output_dir", str(folder / "TRAINED")]
        trained = folder / "TRAINED" / "model.pt"
        words += ["--weights", str(trained)] if trained.is_file() and "inference" in str(words) else []
    if words[0] == "torchrun":
        words[:2] = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        words += ["--output_dir", str(folder / "TWO")]
    words[0] = sys.executable if words[0] == "python" else words[0]
    extra = {
        "import_weights": ["--output", str(folder / "imported"), "--norm_num_groups", "2", "--image_size", "[8,8,8]"],
        "benchmark": ["--preset", "smoke", "--calls", "2"],
        "package": ["cmdm"],
        "tools/verify.py": ["cmdm"] if "--untrusted" not in words else [],
    }
    return words + [word for tool, more in extra.items() if tool in words[1] for word in more]


@pytest.mark.bundle
@pytest.mark.parametrize("number", range(len(README)), ids=lambda number: f"command_{number}")
def test_command_of_the_readme(number: int, desk: tuple[Path, dict[str, str]]) -> None:
    folder, environment = desk
    command = README[number]
    if command.startswith("make"):
        goal = re.sub(r" [A-Z]+=\S+", "", command).split()[1]
        done = run_command("make", "--dry-run", "--always-make", goal)
        assert done.returncode == 0, done.stdout
        return
    if command == ".ci/run":
        assert os.access(REPO / ".ci" / "run", os.X_OK)
        return
    done = run_command(*small(command, folder), env=environment if "https://" in command else None)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"


def test_commands_left_what_they_promise(desk: tuple[Path, dict[str, str]]) -> None:
    """After those above, in the same process."""
    folder, _ = desk
    for file in ("TRAINED/model.pt", "OUT/evaluation.md", "imported/model.pt", "elsewhere/cmdm/models/model.pt",
                 "fetched/cmdm/models/model.pt", "dist/SHA256SUMS", "TWO/model.pt"):  # fmt: skip
        assert (folder / file).is_file(), f"no {file}"
    assert list((folder / "OUT").glob("*_image.nii.gz"))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parents[1].name)
def test_commands_of_a_card_name_files_and_knobs_that_exist(card: Path) -> None:
    configs = card.parents[1] / "configs"
    known = {key.lstrip("+") for path in configs.glob("*.json") for key in json.loads(path.read_text(encoding="utf-8"))}
    known |= {"config_file", "args_file", "tracking", "nproc_per_node", "standalone", "nnodes", "bundle_root"}
    for command in commands(card):
        for file in re.findall(r"bundles/\w+/configs/\w+\.json|tools/\w+\.py", command):
            assert (REPO / file).is_file(), f"{command}: no {file}"
        if "monai.bundle run" in command:
            assert set(re.findall(r"\s--(\w+)", command)) <= known, command


def test_every_bundle_has_its_row_picture_and_page() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"](bundles/{name}/docs/montage.png)" in text
        assert f"| [`{name}`](bundles/{name}/docs/README.md)" in text
    for place in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (REPO / place).exists(), f"README.md links to {place}"


def test_server_is_set_up_alike_by_hand_and_by_make() -> None:
    app = REPO / "tools" / "monailabel_app"
    page, makefile = (path.read_text(encoding="utf-8") for path in (app / "README.md", REPO / "Makefile"))
    pins = re.search(r"--no-deps (\S+ \S+)", page)
    assert pins is not None
    assert all(pins[1] in text for text in (makefile, (app / "requirements.txt").read_text(encoding="utf-8")))
