"""Files in and out: listing and atomic writing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import names, touch

from common.io import CaseError, atomic_path, case_seed, list_cases, read_text, seeded, stem, write_json

FOLDERS = {"image": "CT", "layout": "SEG"}


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


def test_files_that_are_no_images_are_passed_over_by_name(tmp_path, caplog):
    touch(tmp_path, "masks/a.png", "masks/b.JPG", "masks/notes.txt", "masks/table.csv", "masks/.DS_Store")
    cases = list_cases(tmp_path, {"mask": "masks"})
    assert [case["name"] for case in cases] == ["a", "b"]
    assert "notes.txt is passed over" in caplog.text
    assert ".DS_Store" not in caplog.text


@pytest.mark.parametrize("num_samples", [1, 3])
def test_samples_are_named_and_seeded_as_listed_cases_are(num_samples: int, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/{name}.nii" for folder in ("CT", "SEG") for name in ("b", "a_s1")), "CT/alone.nii")
    listed = list_cases(tmp_path, FOLDERS, num_samples=num_samples, seed=7, strict=False)
    names = ["a_s1", "alone", "b"]
    assert [c["name"] for c in listed] == [
        n if num_samples == 1 else f"{n}_s{k}" for n in names for k in range(num_samples)
    ]
    assert [c["seed"] for c in listed] == [case_seed(7, f"{n}/{k}") for n in names for k in range(num_samples)]
    assert ["error" in c for c in listed] == [n == "alone" for n in names for k in range(num_samples)]
    bare = [{k: v for k, v in c.items() if k != "seed"} for c in list_cases(tmp_path, FOLDERS, strict=False)]
    kept = json.dumps(bare)
    assert seeded(bare, num_samples, 7) == listed
    assert json.dumps(bare) == kept, "the cases that came stay as they were"
    assert seeded(bare[::-1]) == seeded(bare)[::-1], "neither order nor company matters"
    assert seeded([]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Texts

TEXTS = {"report": "REPORT"}


def test_texts_join_the_cases_of_their_names_and_may_be_missing(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/{name}.nii" for folder in ("CT", "SEG") for name in ("a.1", "b", "c")))
    touch(tmp_path, "REPORT/a.1.txt", "REPORT/nobody.txt", "REPORT/c.md")
    (tmp_path / "REPORT/b.txt").write_text("\n Milz vergrößert. \n\n肝脏增大\n", encoding="utf-8")
    cases = list_cases(tmp_path, FOLDERS, texts=TEXTS, num_samples=2)
    assert [case["name"] for case in cases] == ["a.1_s0", "a.1_s1", "b_s0", "b_s1", "c_s0", "c_s1"]
    assert [case.get("report") for case in cases[::2]] == ["REPORT/a.1.txt", "Milz vergrößert. \n\n肝脏增大", None]
    assert cases[0]["report"] == cases[1]["report"]
    assert [{k: v for k, v in c.items() if k != "report"} for c in cases] == list_cases(
        tmp_path, FOLDERS, num_samples=2
    )


def test_without_a_folder_of_texts_there_are_none(tmp_path: Path) -> None:
    touch(tmp_path, "CT/a.nii", "SEG/a.nii")
    assert list_cases(tmp_path, FOLDERS, texts=TEXTS) == list_cases(tmp_path, FOLDERS)


def test_in_a_datalist_the_text_stands_itself(tmp_path: Path) -> None:
    touch(tmp_path, "CT/a.nii", "SEG/a.nii", "REPORT/a.txt")
    item = {"image": "CT/a.nii", "layout": "SEG/a.nii", "report": "No tumour."}
    (tmp_path / "list.json").write_text(json.dumps([item]))
    (case,) = list_cases(tmp_path / "list.json", FOLDERS, texts=TEXTS)
    assert case["report"] == "No tumour."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_text_is_read_with_or_without_its_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  肿瘤 5 cm\r\n", encoding=encoding)
    assert read_text(tmp_path / "a.txt") == "肿瘤 5 cm"


def test_what_is_no_text_is_refused_by_name_or_travels_along(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/{name}.nii" for folder in ("CT", "SEG") for name in "ab"), "REPORT/b.txt")
    (tmp_path / "REPORT/a.txt").write_bytes("Milz vergrößert".encode("latin-1"))
    with pytest.raises(CaseError, match=r"a\.txt is not text in UTF-8 .*: save it anew in UTF-8"):
        list_cases(tmp_path, FOLDERS, texts=TEXTS)
    a, b = list_cases(tmp_path, FOLDERS, texts=TEXTS, strict=False)
    assert "a.txt is not text in UTF-8" in a["error"]
    assert (b["report"], "error" in b) == ("REPORT/b.txt", False)
