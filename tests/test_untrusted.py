"""The linter of foreign bundles as a whole: it passes what is well, refuses what it cannot judge, and runs anywhere.

Hostile bundles stand in the files beside this one: `container`, `files`, `expressions`, `components`, `code`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import NAMES, REPO, run_command
from foreign import BANG, BENIGN, changed, config, reasons, zipped

from tools import package, untrusted
from tools.untrusted.container import Bundle, Finding

GRANTED = "network,dynamic"  # what the Python code of this repository's bundles needs


def test_a_bundle_with_nothing_wrong_passes(tmp_path: Path):
    assert reasons(BENIGN, tmp_path) == []
    assert reasons(zipped(BENIGN), tmp_path) == []


def test_a_check_that_breaks_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(bundle: Bundle) -> Iterator[Finding]:
        raise KeyError("a")

    monkeypatch.setattr(untrusted, "CHECKS", [*untrusted.CHECKS, broken])
    assert [reason for reason in reasons(BENIGN, tmp_path) if "broken cannot judge this bundle" in reason]


def test_no_reason_says_more_than_one_line_to_a_terminal(tmp_path: Path):
    for reason in reasons(changed(config(**{"\x1b[2J\n": "$eval('\x1b[1m')"})), tmp_path):
        assert reason.isprintable()


# ---------------------------------------------------------------------------------------------------------------------
# This repository's releases, and the command lines


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole release."""
    folder = tmp_path_factory.mktemp("dist")
    assert package.main(["--output", str(folder)]) == 0
    return folder


def test_our_releases_need_grants_for_their_python_and_nothing_else(dist: Path):
    releases = sorted(dist.glob("*_v*.zip"))
    assert len(releases) == len(NAMES)
    for path in releases:
        found = [finding for finding in untrusted.examine(path) if finding.needs != untrusted.NOTE]
        assert {finding.needs for finding in found} == set(GRANTED.split(","))
        assert {finding.member.partition("/")[0] for finding in found} == {"scripts"}
        assert [f for f in found if (f.member, f.needs) == ("scripts/common/llm.py", "network")]


def look(dist: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a copy of the one file by Python alone: no site-packages, nothing from the current folder."""
    shutil.copy(dist / "fetch.pyz", folder)
    command = [sys.executable, "-I", "-S", "fetch.pyz", "--look", *arguments]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True)


def test_the_file_alone_judges_a_release(dist: Path, tmp_path: Path):
    path = str(next(dist.glob("lesion_diffusion_v*.zip")))
    done = look(dist, tmp_path, path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "REFUSED scripts/common/llm.py: may reach the network" in done.stdout
    assert "grant it: --allow network" in done.stdout
    assert "Python files" in done.stdout
    assert "refused, " in done.stdout.splitlines()[-1]
    done = look(dist, tmp_path, path, "--allow", GRANTED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "allowed scripts/common/llm.py: may reach the network" in done.stdout
    assert "REFUSED" not in done.stdout


def test_the_file_alone_does_not_guess_at_yaml(dist: Path, tmp_path: Path):
    (tmp_path / "bundle.zip").write_bytes(zipped(BENIGN))
    done = look(dist, tmp_path, "bundle.zip")
    assert done.returncode == 1
    assert "configs/multi_gpu.yaml: cannot be judged: YAML cannot be judged without PyYAML" in done.stdout
    assert look(dist, tmp_path, "nowhere.zip").returncode == 2
    assert look(dist, tmp_path).returncode == 2


def test_verify_inspects_before_it_verifies(dist: Path, tmp_path: Path):
    (ours,) = dist.glob("cmdm_v*.zip")
    (tmp_path / "evil.zip").write_bytes(zipped(changed(config(x=f"${BANG}"))))
    verify = (sys.executable, str(REPO / "tools" / "verify.py"), "--untrusted")
    done = run_command(*verify, "evil.zip", str(ours), cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "REFUSED configs/inference.json: x" in done.stdout
    assert f"{ours}: refused" in done.stdout
    done = run_command(*verify, str(ours), "--allow", GRANTED, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert run_command(*verify, "nowhere.zip", cwd=tmp_path).returncode == 2
    assert not (tmp_path / "canary").exists()
