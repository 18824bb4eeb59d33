"""The running workflow: refused knobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow

from common.io import unwrap


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs ``check_knobs`` inside a workflow of a tiny bundle with the given knobs."""
    (tmp_path / "configs").mkdir()
    knobs = {
        "epochs": 5,
        "lr": 0.1,
        "resume": True,
        "channels": [8],
        "labels": {"lung": [1]},
        "place": None,
        "mode": "a",
        "cases": {"_target_": "dict"},
    }
    config = {"bundle_root": "$'.'", "device": "$'cpu'", **knobs, "initialize": ["$@check()"], "run": ["$None"]}
    (tmp_path / "configs/train.json").write_text(
        json.dumps({**config, "check": "$__import__('common.workflow').workflow.check_knobs"})
    )
    (tmp_path / "configs/smoke.json").write_text(json.dumps({"overlay_only": 3, "+initialize": []}))
    (tmp_path / "configs/metadata.json").write_text(json.dumps({"version": "0.1.0", "authors": "x"}))
    monkeypatch.setattr("sys.excepthook", None)

    def run(**override: Any) -> None:
        workflow = ConfigWorkflow(str(tmp_path / "configs/train.json"), workflow_type="train", **override)
        workflow.check_properties = lambda: None  # type: ignore[method-assign, assignment, return-value]
        workflow.initialize()

    return run


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"epochs": 7, "lr": 1, "resume": False, "channels": (8, 8), "labels": {"lung": [7]}, "place": "x", "mode": "b"},
        {"epochs": "$2 + 3", "lr": "@epochs", "channels": "$[8] * 2", "overlay_only": 4},
        {"cases": [{"image": "a.nii"}]},
        {"device": "cuda:1", "run_name": "mine"},
    ],
)
def test_good_knobs_pass(knobs: dict, checked: Callable[..., None]) -> None:
    checked(**knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"epoch": 5}, "unknown knob --epoch: did you mean --epochs?"),
        ({"authors": "me"}, "unknown knob --authors"),
        ({"zzz": 5}, r"unknown knob --zzz: see the table of knobs in docs/README.md"),
        ({"epochs": "five"}, "knob --epochs got 'five', expected something like 5"),
        ({"epochs": 2.5}, "knob --epochs got 2.5"),
        ({"epochs": True}, "knob --epochs got True"),
        ({"resume": 1}, "knob --resume got 1, expected something like True"),
        ({"channels": 8}, r"knob --channels got 8, expected something like \[8\]"),
        ({"labels": [1]}, "knob --labels"),
        ({"mode": 3}, "knob --mode got 3"),
        ({"epoch": 5, "mode": 3}, "knob --mode.*; unknown knob --epoch"),
    ],
)
def test_bad_knobs_are_refused(knobs: dict, message: str, checked: Callable[..., None]) -> None:
    with pytest.raises(RuntimeError) as error:
        checked(**knobs)
    cause = unwrap(error.value)
    assert isinstance(cause, ValueError)
    with pytest.raises(ValueError, match=message):
        raise cause
