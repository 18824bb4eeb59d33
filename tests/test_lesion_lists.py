"""Lists of cases with organs, labels, reports: folders, JSON, the reference's text lists, whose rows are compared."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import touch
from monai.data import MetaTensor

from common.cases import CaseStream
from common.io import CaseError, case_seed
from common.lesion_lists import LISTS, CheckLesiond, list_lesion_cases, mismatches

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parents[2] / "shared" / "data"))
ALL = ("image", "organs", "label", "report")


def write_lists(root: Path, rows: dict[str, list[str]], split: str = "train", missing: tuple[str, ...] = ()) -> Path:
    """The reference's lists, and empty files that they name."""
    for middle, lines in rows.items():
        touch(root, *(line for line in lines if line and line not in missing))
        (root / f"{split}_{middle}_list.txt").write_text("\n".join(lines) + "\n")
    return root


def demo_rows(*cases: str) -> dict[str, list[str]]:
    """Rows in the layout of the reference's demo: a folder for each case, the same names in all of them."""
    files = {"img": "img_health.nii.gz", "label": "label.nii.gz", "type": "type.json", "seg": "totalseg_health.nii.gz"}
    return {middle: [f"demo/{case}/{file}" for case in cases] for middle, file in files.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Folders and JSON


def test_folder_with_all_and_with_a_ct_alone(tmp_path: Path) -> None:
    for folder in ("CT", "ORGANS", "LABEL"):
        touch(tmp_path, f"{folder}/b.nii.gz")
    touch(tmp_path, "CT/a.nrrd", "REPORT/b.json")
    a, b = list_lesion_cases(tmp_path, seed=3)
    assert a == {"name": "a", "seed": case_seed(3, "a/0"), "image": str(tmp_path / "CT/a.nrrd")}
    assert b == {
        "name": "b", "seed": case_seed(3, "b/0"), "image": str(tmp_path / "CT/b.nii.gz"),
        "organs": str(tmp_path / "ORGANS/b.nii.gz"), "label": str(tmp_path / "LABEL/b.nii.gz"),
        "report": str(tmp_path / "REPORT/b.json"),
    }  # fmt: skip
    assert [case["name"] for case in list_lesion_cases(tmp_path, num_samples=2)] == ["a_s0", "a_s1", "b_s0", "b_s1"]
    for key, name in (("organs", "organs"), ("label", "label"), ("report", "a report: write one, REPORT/a.json")):
        with pytest.raises(CaseError, match=f"case a in .* lacks {name}"):
            list_lesion_cases(tmp_path, need=("image", key))
    bad = list_lesion_cases(tmp_path, need=ALL, strict=False)
    assert ["error" in case for case in bad] == [True, False]


def test_reports_and_maps_of_no_ct_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "CT/a.nii.gz", "REPORT/a.json", "REPORT/A2.json")
    with caplog.at_level(logging.WARNING, "common.lesion_lists"):
        assert len(list_lesion_cases(tmp_path)) == 1
    assert "REPORT/A2.json is passed over: there is no CT of that name" in caplog.text
    touch(tmp_path, "ORGANS/b.nii.gz")
    with pytest.raises(CaseError, match=r"case b in .* lacks image"):
        list_lesion_cases(tmp_path)


def test_json_list_with_reports_inline_and_by_path(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.nii.gz", "x/b.nii.gz", "r/b.json", "x/o.nii.gz")
    inline = {"lesions": [{"organ": "liver"}]}
    entries: list[dict[str, Any]] = [
        {"image": "x/b.nii.gz", "report": "r/b.json", "organs": "x/o.nii.gz"},
        {"name": "first", "image": str(tmp_path / "x/a.nii.gz"), "report": inline, "label": None},
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(entries))
    b, first = list_lesion_cases(path)
    assert first["report"] == inline
    assert first["name"] == "first"
    assert "label" not in first
    assert b["report"] == str(tmp_path / "r/b.json")
    entries[0]["report"] = "r/c.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(CaseError, match=r"report of b: .*r/c.json is not a file"):
        list_lesion_cases(path)
    del entries[0]["report"]
    path.write_text(json.dumps(entries))
    with pytest.raises(CaseError, match=r'case b in .* lacks a report: write one, "report" of its entry'):
        list_lesion_cases(path, need=("image", "report"))


def test_wrong_arguments(tmp_path: Path) -> None:
    touch(tmp_path, "CT/a.nii.gz")
    with pytest.raises(ValueError, match="need names seg, expected some of image, organs, label, report"):
        list_lesion_cases(tmp_path, need=("image", "seg"))
    with pytest.raises(
        ValueError, match=r"has no lists like train_img_list.txt, so it has no split 'val': leave it out"
    ):
        list_lesion_cases(tmp_path, split="val")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list_lesion_cases(tmp_path / "nowhere")
    write_lists(tmp_path, demo_rows("a"))
    with pytest.raises(ValueError, match="split must be one of train, val, got 'test'"):
        list_lesion_cases(tmp_path, split="test")


# ---------------------------------------------------------------------------------------------------------------------
# The reference's lists


def test_lists_as_they_are(tmp_path: Path) -> None:
    """The reference's shipped settings skip the first case of every list, and its tools write rows in another order."""
    cases = ("liver_2", "kidney_0", "liver_1")
    write_lists(tmp_path, demo_rows(*cases))
    elsewhere = tmp_path / "elsewhere"
    rows = {middle: [str(elsewhere / line) for line in lines] for middle, lines in demo_rows("bladder_7").items()}
    write_lists(tmp_path, {**rows, "coarseg": rows["seg"]}, "val")
    listed = list_lesion_cases(tmp_path, split="train", need=ALL, seed=5)
    assert [case["name"] for case in listed] == list(cases)  # the first is there, nothing is sorted
    for case, name in zip(listed, cases, strict=True):
        assert case == {
            "name": name, "seed": case_seed(5, f"{name}/0"),
            "image": str(tmp_path / f"demo/{name}/img_health.nii.gz"),
            "label": str(tmp_path / f"demo/{name}/label.nii.gz"),
            "report": str(tmp_path / f"demo/{name}/type.json"),
            "organs": str(tmp_path / f"demo/{name}/totalseg_health.nii.gz"),
        }  # fmt: skip
    (val,) = list_lesion_cases(tmp_path, split="val", seed=5)
    assert val["lesion_organs"] == val["organs"] == rows["seg"][0]
    # Both splits are all, and a case is the same in either.
    assert list_lesion_cases(tmp_path, seed=5) == [*listed, val]
    assert len({case["seed"] for case in [*listed, val]}) == 4


def test_cases_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    lines = ["sets/kits/1/raw.nii.gz", "sets/msd/1/raw.nii.gz", "sets/msd/2/raw.nii.gz", "sets/msd/2/raw.nii.gz"]
    write_lists(tmp_path, {"img": lines})
    assert [c["name"] for c in list_lesion_cases(tmp_path)] == ["kits_1", "msd_1", "msd_2", "msd_2_2"]
    write_lists(tmp_path, {"img": ["CT/1.2.840.nii.gz"]})
    assert [c["name"] for c in list_lesion_cases(tmp_path)] == ["1.2.840"]


def test_first_case_of_a_list_gets_its_output(tmp_path: Path) -> None:
    write_lists(tmp_path, demo_rows("a", "b", "c"))
    seen = [case["name"] for case in CaseStream(list_lesion_cases(tmp_path), dict)]
    assert seen == ["a", "b", "c"]


def test_lists_of_unequal_lengths_are_refused(tmp_path: Path) -> None:
    rows = demo_rows("a", "b", "c")
    write_lists(tmp_path, {**rows, "seg": rows["seg"][:2]})
    message = "differ in length: train_img_list.txt has 3 lines, .*train_seg_list.txt has 2 lines; line i of every list"
    with pytest.raises(CaseError, match=message):
        list_lesion_cases(tmp_path, strict=False)


def test_needed_lists_must_be_there(tmp_path: Path) -> None:
    write_lists(tmp_path, {"img": ["a/ct.nii.gz", "b/ct.nii.gz"]})
    assert len(list_lesion_cases(tmp_path)) == 2
    with pytest.raises(FileNotFoundError, match=r"train_type_list.txt, .*train_seg_list.txt does not exist"):
        list_lesion_cases(tmp_path, need=("image", "organs", "report"))
    with pytest.raises(FileNotFoundError, match=r"val_img_list.txt does not exist"):
        list_lesion_cases(tmp_path, split="val")


def test_every_wrong_row_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    rows = demo_rows("a", "b", "c", "d", "e", "f")
    rows["label"][1], rows["label"][4] = rows["label"][4], rows["label"][1]
    rows["type"][2] = ""
    write_lists(tmp_path, rows, missing=("demo/f/img_health.nii.gz",))
    with pytest.raises(CaseError) as error:
        list_lesion_cases(tmp_path)
    lines = str(error.value).splitlines()
    for line, ours, theirs in ((2, "e", "b"), (5, "b", "e")):
        named = f"{tmp_path}/train_label_list.txt, line {line}: demo/{ours}/label.nii.gz looks like another case than "
        assert (
            sum(text.startswith(f"{named}demo/{theirs}/img_health.nii.gz in train_img_list.txt") for text in lines) == 1
        )
    assert f"{tmp_path}/train_type_list.txt, line 3: empty" in lines
    assert sum("line 6: " in text and "demo/f/img_health.nii.gz is not a file" in text for text in lines) == 1
    cases = list_lesion_cases(tmp_path, strict=False)
    assert ["error" in case for case in cases] == [False, True, True, False, True, True]
    stream = CaseStream(cases, dict)
    assert [case["name"] for case in stream] == ["a", "d"]
    with pytest.raises(CaseError, match="4 of 6 cases failed"):
        stream.report()


@pytest.mark.parametrize(
    ("images", "others", "wrong"),
    [
        # One row has slipped: all that follow are wrong, and fit the row before.
        (["c/1/ct", "c/2/ct", "c/3/ct", "c/4/ct"], ["l/2/seg", "l/3/seg", "l/4/seg", "l/5/seg"], [1, 2, 3]),
        (["c/1/ct", "c/2/ct", "c/3/ct", "c/4/ct"], ["l/1/seg", "l/2/seg", "l/4/seg", "l/3/seg"], [2, 3]),
        # A case that is in no other row.
        (["liver_1/ct", "liver_2/ct", "liver_3/ct"], ["liver_1/l", "liver_7/l", "liver_3/l"], [1]),
        (["liver_1/ct", "liver_2/ct"], ["liver_1/l", "liver_7/l"], [1]),
        (["liver_1/ct", "kidney_1/ct"], ["kidney_1/l", "liver_1/l"], [0, 1]),
        # Names that differ for all cases alike say nothing.
        (["CT/case_01_0000.nii.gz", "CT/case_02_0000.nii.gz"], ["L/Case-1.nii", "L/Case-2.nii"], []),
        (["p/anna/ct", "p/berta/ct"], ["p/0001/l", "p/0002/l"], []),
        (["2020-03-01/a/ct", "2020-04-01/b/ct", "2021-03-04/c/ct"], ["a/l", "b/l", "c/l"], []),
        # One CT with several labels, and a single row.
        (["a/ct", "a/ct", "b/ct"], ["a/l1", "a/l2", "b/l1"], []),
        (["a/ct", "a/ct"], ["a/l1", "a/l2"], []),
        (["a/ct"], ["b/l"], []),
        ([], [], []),
    ],
)
def test_rows_that_look_like_different_cases(images: list[str], others: list[str], wrong: list[int]) -> None:
    assert mismatches(images, others) == wrong


def test_every_list_of_the_reference_is_known() -> None:
    assert set(LISTS.values()) == {"img", "label", "type", "seg", "coarseg"}


# ---------------------------------------------------------------------------------------------------------------------
# Opened files


def volume(values: Any, name: str, affine: np.ndarray | None = None) -> MetaTensor:
    tensor = torch.as_tensor(np.asarray(values), dtype=torch.float32)[None]
    affine = torch.eye(4) if affine is None else torch.as_tensor(affine)
    return MetaTensor(tensor, affine=affine, meta={"filename_or_obj": name})


def case(**changes: Any) -> dict:
    label, organs = np.zeros((4, 4, 4)), np.zeros((4, 4, 4))
    label[1:3, 1:3], label[2, 2, 2], organs[1:3, 1:3] = 1, 2, 5
    parts = {"name": "a", "image": volume(np.zeros((4, 4, 4)), "ct.nii"), "organs": volume(organs, "o.nii")}
    report = {"lesions": [{"organ": "liver", "lesion": "liver tumor"}]}
    return {**parts, "label": volume(label, "l.nii"), "report": report, **changes}


def test_parts_that_belong_together_pass_unchanged() -> None:
    data = case()
    checked = CheckLesiond()(data)
    assert checked == data
    assert checked is not data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The reference resizes what is up to three voxels larger.
        ({"label": volume(np.zeros((4, 4, 7)), "l.nii")}, r"l.nii and ct.nii have different shapes, \(4, 4, 7\) and"),
        ({"organs": volume(np.zeros((4, 4, 4)), "o.nii", np.diag([1, 1, 2, 1.0]))}, "o.nii and ct.nii have .* affines"),
        ({"label": volume(np.ones((4, 4, 4)), "l.nii")}, r"l.nii holds no lesion: mark it by 2 \(1 is the organ\)"),
        ({"label": volume(np.full((4, 4, 4), 3), "l.nii")}, r"l.nii holds \[3.0\]: a label has 0 background, 1 organ"),
        (
            {"report": {"lesions": [{"organ": "bladder"}]}},
            "the report of a speaks of urinary bladder, but o.nii has none",
        ),
        ({"report": {"44": ["", "", {}, []]}}, "version 2 finds no heart chambers"),
    ],
)
def test_parts_that_do_not_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        CheckLesiond()(case(**changes))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    data = {key: value for key, value in case().items() if key not in ("label", "report")}
    with pytest.raises(CaseError, match="case a lacks label, report"):
        CheckLesiond()(data)
    assert CheckLesiond(need=("image",))(data) == data
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"lesions": [{"organ": "spleen"}]}))
    with pytest.raises(CaseError, match=r"r.json speaks of spleen, but o.nii has none"):
        CheckLesiond()(case(report=str(path)))


def test_demo_cases_of_the_reference(tmp_path: Path) -> None:
    """Its two published cases, by lists as its tools write them; the CTs are not with us, so labels stand in."""
    demo = DATA / "lesion_demo"
    if not demo.is_dir():
        pytest.skip(f"no {demo}")
    from common.organs import OrganMapd
    from common.transforms import LoadCased

    endings = {"img": "label_3mm.nii.gz", "label": "label_3mm.nii.gz", "type": "type.json"}
    endings["seg"] = "totalseg_health_3mm.nii.gz"
    for middle, ending in endings.items():
        lines = [str(demo / f"{name}_{ending}") for name in ("Liver_cancer", "Bladder_cancer")]
        (tmp_path / f"val_{middle}_list.txt").write_text("\n".join(lines))
    cases = list_lesion_cases(tmp_path, need=ALL)
    assert [c["name"] for c in cases] == ["Liver_cancer_label_3mm", "Bladder_cancer_label_3mm"]
    load, organs, check = LoadCased(("image", "organs", "label")), OrganMapd(), CheckLesiond()
    for data in map(load, cases):
        check(organs(data))
    other = {**load(cases[0]), "report": cases[1]["report"]}
    if 104 not in other["organs"].unique():
        with pytest.raises(CaseError, match="speaks of urinary bladder"):
            check(organs(other))
