"""What the tests stand on: a forked command is like a started one, and no bundle meets another's code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import fork_command, no_bundle_stays, run_command

from tools import reading

TELL = """
import os, sys
print(__name__, sys.argv[1:], os.getcwd(), sys.path[0], os.environ["OMP_NUM_THREADS"], sys.stdin.read())
sys.stdout.flush()
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError('it ends\\n\\nhere')", "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("start", [["inner/tell.py"], ["-m", "inner.tell"]], ids=["file", "module"])
def test_a_fork_does_what_a_start_does(start: list[str], end: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "tell.py").write_text(TELL.format(end=end))
    command = [sys.executable, *start, "--some", "['a', 'b']"]
    forked, started = (run_command(*command, cwd=tmp_path, fresh=fresh) for fresh in (False, True))
    assert forked.returncode == started.returncode
    for first, last in [(0, 1), (-1, None)]:
        assert forked.stdout.splitlines()[first:last] == started.stdout.splitlines()[first:last]


def test_a_fork_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleep.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr("conftest.PATIENCE", 1)
    assert fork_command("sleep.py", cwd=tmp_path).returncode < 0


def test_bundles_of_one_process_do_not_meet(repo: Path) -> None:
    """A bundle stays first for a module's tests; what a test in between builds of another must be gone after it."""

    def build(name: str) -> str:
        return type(reading.build(reading.parser(repo / "bundles" / name, "inference", "smoke"))).__module__

    ours = build("cmdm")
    assert sys.modules["scripts"].__file__ == str(repo / "bundles/cmdm/scripts/__init__.py")
    with no_bundle_stays():
        assert build("lung_ddpm") != ours
    assert build("cmdm") == ours
    assert sys.path[0] == str(repo / "bundles/cmdm")
