"""Files in and out: listing, streaming past bad cases, atomic writing, side-cars, refused knobs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from common.io import (
    CaseError,
    CaseSaver,
    CaseStream,
    atomic_path,
    case_seed,
    list_cases,
    list_synthetic,
    sha256,
    stem,
    unwrap,
    write_json,
)

FOLDERS = {"image": "CT", "layout": "SEG"}


def touch(root: Path, *names: str) -> Path:
    """Files with their own name as content; listing never opens them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_atomic_path_replaces_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "a.txt"
    for content in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.write_text(content)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == content
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("failing", ["body", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = touch(tmp_path, "a.txt") / "a.txt"
    if failing != "body":
        monkeypatch.setattr(os, failing, full)

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            if failing == "body":
                full()

    with pytest.raises(OSError, match=r"cannot write .*a\.txt: No space left.*--output_dir"):
        write()
    assert target.read_text() == "a.txt"
    assert names(tmp_path) == ["a.txt"]


def test_an_error_of_the_writer_passes_unchanged(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write()
    assert names(tmp_path) == []


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Case lists


@pytest.mark.parametrize(
    ("file", "case"),
    [
        ("a.nii.gz", "a"),
        ("a.nii", "a"),
        ("1.2.840.7.nii.gz", "1.2.840.7"),
        ("case one v2.0.nii.gz", "case one v2.0"),
        ("scan", "scan"),
        ("scan.png", "scan"),
    ],
)
def test_stem_drops_the_file_type_only(file: str, case: str) -> None:
    assert stem(f"folder.d/{file}") == case


def test_a_folder_is_paired_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "CT/b.nii.gz", "CT/a b.1.nii", "SEG/a b.1.nii.gz", "SEG/b.nii", "CT/.hidden.nii.gz", "SEG/._b.nii")
    cases = list_cases(tmp_path, FOLDERS)
    assert [c["name"] for c in cases] == ["a b.1", "b"]
    assert [Path(c[k]).name for c in cases for k in FOLDERS] == ["a b.1.nii", "a b.1.nii.gz", "b.nii.gz", "b.nii"]


def test_relative_folders_become_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "data/CT/a.nii", "data/SEG/a.nii")
    monkeypatch.chdir(tmp_path)
    assert list_cases("data", FOLDERS)[0]["image"] == str(tmp_path / "data/CT/a.nii")


def test_optional_keys_may_be_missing(tmp_path: Path) -> None:
    touch(tmp_path, "SEG/a.nii", "SEG/b.nii", "CT/b.nii")
    folders = {**FOLDERS, "nodule": "SEG_NODULE"}
    a, b = list_cases(tmp_path, folders, optional=["image", "nodule"])
    assert "image" not in a
    assert "image" in b
    with pytest.raises(FileNotFoundError, match=r"no folder SEG_NODULE/ \(nodule\)"):
        list_cases(tmp_path, folders, optional=["image"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_datalist_works_like_a_folder(wrapped: bool, tmp_path: Path) -> None:
    touch(tmp_path, "CT/a.nii", "SEG/a.nii", "elsewhere/c.nii")
    items = [
        {"image": "CT/a.nii", "layout": str(tmp_path / "SEG/a.nii")},
        {"image": None, "layout": "elsewhere/c.nii", "name": "third", "age": 60},
    ]
    (tmp_path / "list.json").write_text(json.dumps({"training": items} if wrapped else items))
    a, third = list_cases(tmp_path / "list.json", FOLDERS, optional=["image"])
    assert a == list_cases(tmp_path, FOLDERS)[0]
    assert (third["name"], third["age"], "image" in third) == ("third", 60, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must be a list of {image, layout} objects"),
        ('{"cases": []}', "must be a list"),
        ("[]", "holds no case"),
        ('[{"image": "CT/a.nii"}]', "case a .* lacks layout"),
        ('[{"image": "CT/a.nii", "layout": 5}]', r"lacks layout \(.*/5 is not a file\)"),
        ('[{"image": "CT/a.nii", "layout": "gone.nii"}]', r"lacks layout \(.*gone.nii is not a file\)"),
        ('[{"image": "CT/a.nii", "layout": "CT/a.nii", "name": "../../a"}]', "use no slashes"),
        ('[{"image": "CT/a.nii", "layout": "CT/a.nii"}, {"image": "CT/a.nii", "layout": "CT/a.nii"}]', "case a twice"),
    ],
)
def test_a_bad_datalist_is_refused(content: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "CT/a.nii")
    (tmp_path / "list.json").write_text(content)
    with pytest.raises((CaseError, FileNotFoundError), match=message):
        list_cases(tmp_path / "list.json", FOLDERS)


@pytest.mark.parametrize("place", ["nowhere", "nowhere.json"])
def test_a_missing_data_set_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{place} does not exist"):
        list_cases(tmp_path / place, FOLDERS)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "CT/.keep", "SEG/.keep")
    with pytest.raises(FileNotFoundError, match=r"holds no case: expected CT/ \(image\), SEG/ \(layout\)"):
        list_cases(tmp_path, FOLDERS)


def test_bad_pairs_stop_training_and_travel_along_in_inference(tmp_path: Path) -> None:
    touch(tmp_path, "CT/a.nii", "SEG/a.nii", "CT/alone.nii", "CT/twice.nii", "CT/twice.nii.gz", "SEG/twice.nii")
    with pytest.raises(CaseError, match=r"two files for case twice(.|\n)*case alone .* lacks layout"):
        list_cases(tmp_path, FOLDERS)
    cases = list_cases(tmp_path, FOLDERS, strict=False)
    assert [("error" in c) for c in cases] == [False, True, True]


def test_seeds_depend_on_seed_name_and_sample_alone(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/{name}.nii" for folder in ("CT", "SEG") for name in "abc"))
    cases = list_cases(tmp_path, FOLDERS, num_samples=3, seed=7)
    assert [c["name"] for c in cases[:4]] == ["a_s0", "a_s1", "a_s2", "b_s0"]
    assert len({c["seed"] for c in cases}) == 9
    (tmp_path / "CT/a.nii").unlink()
    (tmp_path / "SEG/a.nii").unlink()
    assert list_cases(tmp_path, FOLDERS, num_samples=3, seed=7) == cases[3:]
    assert list_cases(tmp_path, FOLDERS, seed=7)[0]["seed"] == cases[3]["seed"] == case_seed(7, "b/0")
    assert list_cases(tmp_path, FOLDERS, seed=8)[0]["seed"] != cases[3]["seed"]


# ---------------------------------------------------------------------------------------------------------------------
# The stream


def test_bad_cases_are_reported_and_the_others_come(caplog: pytest.LogCaptureFixture) -> None:
    def transform(case: dict) -> dict:
        if case["name"] == "bug":
            try:
                raise KeyError("image")
            except KeyError as error:
                raise RuntimeError("applying transform <X>") from error
        if case["name"] == "bad":
            raise CaseError("bad.nii\nis bad")
        return case

    data = [{"name": "bug", "layout": __file__}, {"name": "a"}, {"name": "bad"}, {"name": "z", "error": "unpaired"}]
    stream = CaseStream(data, transform)
    assert [(c["name"], json.loads(c["source"])) for c in stream] == [("a", {"name": "a"})]
    with pytest.raises(CaseError) as error:
        stream.report()
    assert str(error.value).splitlines() == [
        "3 of 4 cases failed, the others are done:",
        f"  bug: KeyError: 'image'; see {__file__}",
        "  bad: bad.nii is bad",
        "  z: unpaired",
    ]
    assert len(caplog.records) == 3


def test_a_clean_stream_reports_nothing() -> None:
    stream = CaseStream([{"name": "a"}], dict)
    list(stream)
    stream.report()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_cases_exactly(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [{"name": str(i)} for i in range(7)]
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        seen += [c["name"] for c in CaseStream(data, dict)]
    assert sorted(seen) == [c["name"] for c in data]


def test_unwrap_peels_off_monai_and_keeps_what_teaches() -> None:
    teaching = OSError("cannot write")
    teaching.__cause__ = OSError("low level")
    inner, outer = RuntimeError("applying transform"), RuntimeError("Failed to instantiate")
    inner.__cause__, outer.__cause__ = teaching, inner
    assert unwrap(outer) is teaching
    assert unwrap(lonely := RuntimeError("of its own")) is lonely


# ---------------------------------------------------------------------------------------------------------------------
# The saver


@pytest.fixture
def case(tmp_path: Path) -> dict:
    touch(tmp_path, "in/CT/a.nii", "in/SEG/a.nii", "weights.pt")
    return list_cases(tmp_path / "in", FOLDERS)[0]


def saver_for(root: Path) -> CaseSaver:
    outputs = {"pred": "image", "label": "layout"}
    return CaseSaver(root / "out", outputs, dtypes={"pred": "int16", "label": "uint8"}, weights=root / "weights.pt")


def save(saver: CaseSaver, case: dict) -> None:
    affine = torch.tensor([[0, -2.0, 0, 5], [1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]], dtype=torch.float64)
    pred = MetaTensor(torch.arange(24.0).reshape(1, 2, 3, 4) - 12, affine=affine)
    saver.save({"source": json.dumps(case), "pred": pred, "label": (pred > 0).float(), "seed": case["seed"]})


def test_files_and_sidecar(case: dict, tmp_path: Path) -> None:
    saver = saver_for(tmp_path)
    saver.start()
    save(saver, case)
    run = saver.run_file().name
    assert names(tmp_path / "out") == sorted(["a.json", "a_image.nii.gz", "a_layout.nii.gz", run])
    image = nib.load(tmp_path / "out/a_image.nii.gz")
    assert image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(image.dataobj).ravel(), np.arange(24) - 12)
    np.testing.assert_allclose(image.affine[:2], [[0, -2, 0, 5], [1, 0, 0, 6]])

    sidecar = json.loads((tmp_path / "out/a.json").read_text())
    made_by = sidecar["made_by"]
    assert sidecar["config_file"] == str(tmp_path / "out" / run)
    assert sidecar["cases"] == [{**case, "weights_sha256": sha256(tmp_path / "weights.pt")}]
    assert made_by["case"] == case
    assert made_by["seed"] == case["seed"]
    assert made_by["inputs"] == {case[k]: sha256(case[k]) for k in FOLDERS}
    assert made_by["outputs"] == {f: sha256(tmp_path / "out" / f) for f in ("a_image.nii.gz", "a_layout.nii.gz")}
    assert made_by["versions"]["monai"] == monai.__version__
    assert list_synthetic(tmp_path / "out") == [
        {k: str(tmp_path / f"out/a_{k}.nii.gz") for k in FOLDERS} | {"reference": case["image"]}
    ]


def test_finished_cases_are_skipped_and_changed_ones_made_again(case: dict, tmp_path: Path) -> None:
    saver = saver_for(tmp_path)
    assert not saver.finished(case)
    save(saver, case)
    assert saver.finished(case)
    assert list(CaseStream([case], dict, saver)) == []
    assert not saver.finished({**case, "seed": 1})

    (tmp_path / "weights.pt").write_text("other weights")
    assert not saver_for(tmp_path).finished(case)
    (tmp_path / "weights.pt").write_text("weights.pt")
    Path(case["image"]).write_text("another scan")
    assert not saver_for(tmp_path).finished(case)
    touch(tmp_path, "in/CT/a.nii")
    other = saver_for(tmp_path)
    other._config = {"num_inference_steps": 5}
    assert not other.finished(case)
    other._config = {"output_dir": "elsewhere", "batch_size": 4}
    assert other.finished(case)

    (tmp_path / "out/a_image.nii.gz").write_text("of a run with another recipe that was cut short")
    assert not saver_for(tmp_path).finished(case)
    (tmp_path / "out/a_image.nii.gz").unlink()
    assert not saver_for(tmp_path).finished(case)


def test_a_replay_with_other_weights_is_refused(case: dict, tmp_path: Path) -> None:
    stream = CaseStream([{**case, "weights_sha256": "0" * 64}], dict, saver_for(tmp_path))
    assert list(stream) == []
    with pytest.raises(CaseError, match="other weights"):
        stream.report()


@pytest.mark.parametrize("place", ["in/CT", "in/SEG", "in/../in/SEG"])
def test_outputs_never_go_where_inputs_lie(place: str, case: dict, tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"holds the input .*a\.nii: choose another --output_dir"):
        CaseStream([case], dict, CaseSaver(tmp_path / place, {"pred": "image"}))


def test_a_full_disk_leaves_no_half_case(case: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_for(tmp_path)
    write = saver._write

    def run_out(path: Path, image: torch.Tensor, dtype: str) -> None:
        write(path, image, dtype)
        if dtype == "uint8":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saver, "_write", run_out)
    with pytest.raises(OSError, match=r"cannot write .*a_layout\.nii\.gz: No space left on device; free space"):
        save(saver, case)
    assert names(tmp_path / "out") == ["a_image.nii.gz"]
    assert not saver.finished(case)


def test_a_diverged_network_writes_nothing(case: dict, tmp_path: Path) -> None:
    pred = MetaTensor(torch.full((1, 2, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"a_image\.nii\.gz would hold NaN or infinite voxels"):
        saver_for(tmp_path).save({"source": json.dumps(case), "pred": pred})
    assert not (tmp_path / "out").exists()


def test_an_unwritable_place_is_found_at_the_door(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    with pytest.raises(OSError, match=r"cannot write .*file/sub/run-.*choose another --output_dir"):
        CaseSaver(tmp_path / "file/sub", {"pred": "image"}).start()


# ---------------------------------------------------------------------------------------------------------------------
# Knobs


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
        json.dumps({**config, "check": "$__import__('common.io').io.check_knobs"})
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
