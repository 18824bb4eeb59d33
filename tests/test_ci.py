"""The workflow and the gate as data: what starts them, what they may do, and that the commands they name exist.

GitHub itself is not asked; the steps' own commands run elsewhere in the tests, or here where they are a line of shell.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import NAMES, REPO, run_command

from tools.reading import read

TEXT = (REPO / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load(TEXT)
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
STEPS = [(job, step) for job, content in JOBS.items() for step in content["steps"]]
COMMANDS = [line for _, step in STEPS for line in step.get("run", "").splitlines()]
COMMANDS += (REPO / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_change_runs_the_gate_and_nothing_else_of_weight() -> None:
    triggers = WORKFLOW[True]  # YAML reads `on` so
    assert {"push", "pull_request", "workflow_dispatch"} == {*triggers}
    assert triggers["push"] == {"branches": ["main"], "tags": ["v*"]}
    assert [job for job, content in JOBS.items() if "if" not in content] == ["gate"]
    assert JOBS["gate"]["steps"][-1] == {"run": ".ci/run"}


def test_a_release_needs_a_tag_and_all_that_is_tested() -> None:
    assert JOBS["release"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert {*JOBS["release"]["needs"]} == {*JOBS} - {"release"}


def test_only_the_release_may_write_and_no_step_keeps_the_token() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert {job: c["permissions"] for job, c in JOBS.items() if "permissions" in c} == {
        "release": {"contents": "write"}
    }
    assert [job for job, step in STEPS if "GH_TOKEN" in step.get("env", {})] == ["release"]
    checkouts = [step for _, step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(JOBS)
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_actions_are_pinned_to_commits() -> None:
    used = re.findall(r"uses: (.*)", TEXT)
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_no_expression_is_pasted_into_a_shell() -> None:
    """A tag's or branch's name may hold shell code: it comes through the environment, in quotes."""
    assert [line for line in COMMANDS if "${{" in line] == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"\btools/\w+\.py", c)])
def test_named_tools_exist_and_know_their_flags(command: str) -> None:
    for tool, rest in re.findall(r"\b(tools/\w+\.py)\"?([^|]*)", command):
        assert (REPO / tool).is_file()
        flags = [word for word in shlex.split(rest) if re.fullmatch(r"--[a-z][a-z_]*", word)]
        if flags:
            text = run_command(sys.executable, tool, "--help").stdout
            assert [flag for flag in flags if flag not in text] == []


def test_named_targets_and_scripts_exist() -> None:
    targets = {name for line in COMMANDS for name in re.findall(r"^make (\S+)", line)}
    rules = re.findall(r"^([\w./-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert targets
    assert targets <= {*rules}
    assert (REPO / ".ci" / "run").stat().st_mode & 0o100, "executable"
    assert subprocess.run(["bash", "-n", REPO / ".ci" / "run"]).returncode == 0
    named = {name for line in COMMANDS for name in re.findall(r"\btests/\w+\.py", line)}
    assert [name for name in named if not (REPO / name).is_file()] == []


def test_user_requirements_alone_come_first_in_the_gate() -> None:
    lines = [line for line in COMMANDS if re.match(r"make |.*--smoke", line)][-4:]
    assert [line.split()[:2] for line in lines] == [
        ["make", ".venv/.installed"],
        ["ls", "-d"],
        ["make", ".venv/.installed-dev"],
        ["make", "test"],
    ]


@pytest.mark.parametrize(("tag", "code"), [("v0.1.0", 0), ("v0.2.0", 1), ("v0.1", 1), ("v0.1.0-rc", 1)])
def test_a_tag_of_another_version_is_no_release(tmp_path: Path, tag: str, code: int) -> None:
    (step,) = [step for _, step in STEPS if step.get("name") == "every bundle has the tag's version"]
    (tmp_path / "dist").mkdir()
    others = ["SHA256SUMS", "fetch.pyz", "model_info.json", "monailabel_app.zip"]
    for name in [*(f"{name}_v0.1.0.zip" for name in NAMES), *others]:
        (tmp_path / "dist" / name).touch()
    done = run_command("bash", "-e", "-c", step["run"], cwd=tmp_path, env={"GITHUB_REF_NAME": tag})
    assert done.returncode == code
    assert len(done.stdout.splitlines()) == (len(NAMES) if code else 0)


def test_one_version_everywhere() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert {read(REPO / "bundles" / name / "configs" / "metadata.json")["version"] for name in NAMES} == {project}
    assert re.search(r"^## (\S+)", (REPO / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == project
