"""The data index of Siamese-Diffusion: built from folders, read back, and every error named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.cases import CaseStream
from common.io import CaseError, case_seed, list_cases
from common.prompts import build_prompts, list_prompts, read_prompts

ENTRY = {"source": "masks/a.png", "target": "images/a.jpg", "prompt": "a polyp"}


@pytest.fixture
def folder(tmp_path):
    for name in ("images/b.png", "images/a.jpg", "masks/a.png", "masks/b.png", "masks/.hidden.png", "masks/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def written(folder, *lines):
    path = folder / "prompt.json"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_what_is_built_is_read(folder):
    path = build_prompts(folder, "Ein Polyp \u2013 rot\u2028oder blass.")
    assert path == str(folder / "prompt.json")
    lines = Path(path).read_text().splitlines()
    assert json.loads(lines[0])["source"] == "masks/a.png", "relative to the file"
    cases = read_prompts(path)
    assert [case["name"] for case in cases] == ["a", "b"]
    assert cases[0] == {
        "name": "a",
        "mask": str(folder / "masks" / "a.png"),
        "image": str(folder / "images" / "a.jpg"),
        "prompt": "Ein Polyp \u2013 rot\u2028oder blass.",
    }


def test_other_folders_and_the_default_prompt(folder):
    (folder / "images").rename(folder / "photos")
    cases = read_prompts(build_prompts(folder, images="photos"))
    assert cases[0]["image"] == str(folder / "photos" / "a.jpg")
    assert cases[0]["prompt"] == "A photo of a polyp."


def test_all_missing_partners_are_named_at_once(folder):
    (folder / "images" / "c.png").touch()
    (folder / "masks" / "d.png").touch()
    (folder / "masks" / "e.png").touch()
    with pytest.raises(CaseError, match=r"images lacks d, e; .*masks lacks c: images and masks pair by name"):
        build_prompts(folder)
    for i in range(9):
        (folder / "masks" / f"x{i}.png").touch()
    with pytest.raises(CaseError, match="images lacks d, e, x0, x1, x2 and 6 more"):
        build_prompts(folder)
    assert not (folder / "prompt.json").exists()


def test_folders_that_cannot_be_paired(folder, tmp_path):
    (folder / "masks" / "a.bmp").touch()
    with pytest.raises(CaseError, match=r"a\.bmp and a\.png for one case: keep one"):
        build_prompts(folder)
    with pytest.raises(FileNotFoundError, match="photos is not a folder"):
        build_prompts(folder, images="photos")
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "masks").mkdir()
    with pytest.raises(CaseError, match="hold no image files"):
        build_prompts(tmp_path / "empty")


def test_lines_and_an_array_are_read_alike(folder):
    other = {**ENTRY, "source": "masks/b.png", "target": "images/b.png"}
    lines = read_prompts(written(folder, ENTRY, "", other, ""))
    assert len(lines) == 2
    assert read_prompts(written(folder, json.dumps([ENTRY, other], indent=2))) == lines
    assert read_prompts(written(folder, "\ufeff" + json.dumps(ENTRY) + "\r")) == lines[:1], "as some editors save it"


def test_paths_may_start_at_the_working_directory(folder, monkeypatch):
    (folder / "data").mkdir()
    path = written(folder / "data", ENTRY)
    with pytest.raises(CaseError, match=r"masks/a\.png is neither beside the index nor in the working directory"):
        read_prompts(path)
    monkeypatch.chdir(folder)
    assert read_prompts(path)[0]["mask"] == str(folder / "masks" / "a.png")


def test_images_are_optional_where_the_caller_says_so(folder):
    bare = {"source": "masks/b.png", "target": None, "prompt": "a polyp"}
    cases = read_prompts(written(folder, ENTRY, bare), optional=("image",))
    assert "image" in cases[0]
    assert set(cases[1]) == {"name", "mask", "prompt"}
    with pytest.raises(CaseError, match="line 2: lacks target"):
        read_prompts(written(folder, ENTRY, bare))


@pytest.mark.parametrize(("lines", "message"), [
    ([ENTRY, '{"source": '], "line 2: broken JSON"),
    (["[1, 2"], "prompt.json: broken JSON"),
    ([ENTRY, "3"], "line 2: lacks source, target, prompt, expected texts"),
    ([[ENTRY, {"source": "masks/b.png"}]], "entry 2: lacks target, prompt"),
    (["", {**ENTRY, "prompt": 7}], "line 2: lacks prompt"),
    ([{**ENTRY, "source": "masks/z.png"}], "line 1: masks/z.png is neither"),
    ([{**ENTRY, "target": "images/z.png"}], "line 1: images/z.png is neither"),
    ([{**ENTRY, "source": ""}], "line 1:  is neither"),
    ([ENTRY, ENTRY], "line 2: a case a has been named before"),
    ([""], "is empty: expected one object of source, target, prompt"),
    ([[]], "is empty"),
])  # fmt: skip
def test_errors_name_the_line(folder, lines, message):
    with pytest.raises(CaseError, match=f"prompt.json.*{message}|{message}"):
        read_prompts(written(folder, *lines))


def test_an_index_that_is_none(folder):
    with pytest.raises(FileNotFoundError, match="write it with build_prompts"):
        read_prompts(folder / "none.json")
    (folder / "prompt.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CaseError, match="not text in UTF-8"):
        read_prompts(folder / "prompt.json")


# ---------------------------------------------------------------------------------------------------------------------
# With or without an index


def without_seeds(cases):
    return [{k: v for k, v in case.items() if k != "seed"} for case in cases]


def test_an_index_is_listed_by_its_name_or_its_folders(folder):
    index = build_prompts(folder, "flat, red")
    cases = list_prompts(index, prompt="another", seed=3)
    assert without_seeds(cases) == read_prompts(index), "an index has its own prompts"
    assert list_prompts(folder, prompt="another", seed=3) == list_prompts(str(folder), seed=3) == cases
    renamed = Path(index).rename(folder / "train.json")
    assert list_prompts(renamed, seed=3) == cases
    assert {case["prompt"] for case in list_prompts(folder)} == {"A photo of a polyp."}, "no prompt.json, no index"


def test_two_folders_without_an_index_give_what_an_index_would(folder):
    listed = list_prompts(folder, prompt="flat, red", seed=3)
    assert [set(case) for case in listed] == [{"name", "mask", "image", "prompt", "seed"}] * 2
    build_prompts(folder, "flat, red")
    assert list_prompts(folder, seed=3) == listed
    assert list_prompts(folder.parent / folder.name, seed=3) == listed


def test_the_default_prompt_is_build_prompts(folder):
    listed = list_prompts(folder)
    build_prompts(folder)
    assert list_prompts(folder) == listed


def test_masks_alone_will_do_where_images_are_optional(folder, monkeypatch):
    bare = list_prompts(folder / "masks", optional=("image",), prompt="flat, red", seed=3)
    assert [set(case) for case in bare] == [{"name", "mask", "prompt", "seed"}] * 2
    paired = list_prompts(folder, optional=("image",), prompt="flat, red", seed=3)
    assert [{k: v for k, v in case.items() if k != "image"} for case in paired] == bare, "the same case, the same seed"
    (folder / "images" / "b.png").unlink()
    a, b = list_prompts(folder, optional=("image",))
    assert ("image" in a, "image" in b) == (True, False)
    assert not {"error"} & (a.keys() | b.keys())
    with pytest.raises(FileNotFoundError, match=r"no folder masks/ \(mask\)"):
        list_prompts(folder / "masks")
    monkeypatch.chdir(folder)
    assert list_prompts("masks", optional=("image",), prompt="flat, red", seed=3) == bare, "paths are valid anywhere"


@pytest.mark.parametrize("index", [False, True], ids=["folders", "index"])
def test_samples_of_a_case_differ_by_seeds_that_names_alone_decide(folder, index):
    if index:
        build_prompts(folder)
    cases = list_prompts(folder, num_samples=3, seed=7)
    assert [case["name"] for case in cases] == ["a_s0", "a_s1", "a_s2", "b_s0", "b_s1", "b_s2"]
    assert [case["seed"] for case in cases] == [case_seed(7, f"{name}/{k}") for name in "ab" for k in range(3)]
    assert len({case["seed"] for case in cases}) == 6
    assert cases[0]["mask"] == cases[2]["mask"]
    once = {case["name"]: case["seed"] for case in list_prompts(folder, seed=7)}
    assert once == {"a": cases[0]["seed"], "b": cases[3]["seed"]}
    assert list_prompts(folder, seed=8)[0]["seed"] != once["a"]
    # Neither the other cases nor their order, nor where they lie, nor the text.
    moved = folder.rename(folder.parent / f"{folder.name}_moved")
    if index:
        lines = (moved / "prompt.json").read_text().splitlines()
        (moved / "prompt.json").write_text("\n".join(lines[::-1]).replace("polyp", "lesion"))
    else:
        for name in ("masks/a.png", "images/a.jpg"):
            (moved / name).unlink()
    assert list_prompts(moved, prompt="lesion", seed=7)[0]["seed"] == once["b"]
    listed = list_cases(moved, {"mask": "masks"}, seed=7)
    assert listed[-1]["seed"] == once["b"], "as with cases of any other bundle"


def test_a_bad_pair_stops_training_and_travels_along_in_synthesis(folder):
    (folder / "masks" / "c.png").touch()
    (folder / "images" / "d.png").touch()
    cases = list_prompts(folder, strict=False)
    assert {case["name"]: case.get("error", "").rpartition(" in ")[0] for case in cases} == {
        "a": "", "b": "", "c": "case c", "d": "case d",
    }  # fmt: skip
    stream = CaseStream(cases, dict)
    assert [case["name"] for case in stream] == ["a", "b"]
    with pytest.raises(CaseError, match=r"2 of 4 cases failed(.|\n)*c: .*lacks image(.|\n)*d: .*lacks mask"):
        stream.report()
    with pytest.raises(CaseError, match=r"case c .* lacks image(.|\n)*case d .* lacks mask"):
        list_prompts(folder)
    bad = [case for case in list_prompts(folder, optional=("image",), strict=False) if "error" in case]
    assert [case["name"] for case in bad] == ["d"], "a mask without an image is no fault where images are optional"


def test_places_without_cases_are_refused(folder, tmp_path):
    for place in ("nowhere", "nowhere.json"):
        with pytest.raises(FileNotFoundError, match=f"{place} does not exist"):
            list_prompts(tmp_path / place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no case"):
        list_prompts(tmp_path / "empty", optional=("image",))
    with pytest.raises(CaseError, match="line 1: lacks source"):
        list_prompts(written(folder, {"target": "images/a.jpg", "prompt": "a polyp"}))
