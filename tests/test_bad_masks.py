"""Masks and wishes as users bring them, through whole runs of the mask bundle: bad ones are named, good ones are done.

A run is a process of some seconds, so one run takes many cases; what stops at its first bad file is asked in-process,
of the very components that the configs build.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from common.io import CaseError, unwrap
from common.mask_statistics import ShrunkKDE, save_statistics
from common.semantics import Lesion
from tools import reading
from tools.smoke import check_synthesis

pytestmark = pytest.mark.bundle
Run = Callable[..., subprocess.CompletedProcess]
BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "cmdm"
SIDE = 48


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of the smoke size, statistics beside them."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.manual_seed(0)
    torch.save(reading.build(reading.parser(BUNDLE, "inference", "smoke"), "cpu").state_dict(), path)
    masks = [[Lesion(0.05 + 0.01 * i, 0.3 + 0.05 * i, 0.5)] for i in range(6)]
    masks += [[Lesion(0.04, 0.25, 0.4), Lesion(0.03, 0.75, 0.6)], []]
    save_statistics(ShrunkKDE().fit(masks), path.with_name("statistics.json"))
    return path


@pytest.fixture
def infer(run_bundle: Run, weights: Path) -> Run:
    """Smoke inference with the given knobs."""
    return lambda *overlays, **knobs: run_bundle(
        "cmdm", "inference", "smoke", *overlays, **{"weights": weights, "max_tries": 1, **knobs}
    )


def ending(run: subprocess.CompletedProcess) -> str:
    """What a failed run says last, below the traceback."""
    assert run.returncode != 0, run.stdout
    return run.stdout.rstrip().rpartition("\n\n")[2]


def disc(x: float = 24, y: float = 20, radius: float = 8, shape: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """A mask (H, W), 0 and 255."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.where((columns - x) ** 2 + (rows - y) ** 2 < radius**2, 255, 0).astype(np.uint8)


def built(item: str, *configs: str, **knobs: Any) -> Any:
    """An item of the bundle's config, as a run would build it; its error is the one that a run ends with."""
    parsed = reading.parser(BUNDLE, *configs, "smoke")
    for key, value in knobs.items():
        parsed[key] = str(value) if isinstance(value, Path) else value
    try:
        return parsed.get_parsed_content(item)
    except Exception as error:
        cause = unwrap(error)
        # The bundle knows common/ by another name, and so its classes are others than ours.
        raise CaseError(str(cause)) if type(cause).__name__ == "CaseError" else cause from None


def measured(folder: Path, **knobs: Any) -> list[list[Any]]:
    """What `fit.json` and training measure in a folder."""
    return built("lesions", "train", "fit", dataset_dir=folder, output_dir=folder / "out", **knobs)


# ---------------------------------------------------------------------------------------------------------------------
# Masks to measure


def palette(values: np.ndarray) -> Image.Image:
    """White and black by a palette, as annotation tools write it."""
    picture = Image.fromarray((values > 0).astype(np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, 255, 255, 255])
    return picture


def rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


# Odd but good: each holds one disc, at the same place.
GOOD: dict[str, Callable[[Path], None]] = {
    "l.png": lambda p: Image.fromarray(disc()).save(p),
    "rgb.png": lambda p: Image.fromarray(rgb(disc())).save(p),
    "rgba.png": lambda p: Image.fromarray(np.dstack([rgb(disc()), np.full((SIDE, SIDE), 255, np.uint8)])).save(p),
    "sixteen_bit.png": lambda p: Image.fromarray(disc().astype(np.uint16) * 257).save(p),
    "photo.jpg": lambda p: Image.fromarray(disc()).save(p, quality=90),
    "LOUD.PNG": lambda p: Image.fromarray(disc()).save(p),
    "odd.size.png": lambda p: Image.fromarray(disc(46, 24.2, 12.2, (58, 92))).save(p),
    "nifti.nii.gz": lambda p: nib.save(nib.Nifti1Image(disc().T, np.eye(4)), p),
    "slice.nii": lambda p: nib.save(nib.Nifti1Image(disc().T[..., None], np.eye(4)), p),
}
# Good, and without a lesion.
EMPTY: dict[str, Callable[[Path], None]] = {
    "empty.png": lambda p: Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(p),
    "speckle.png": lambda p: Image.fromarray(disc(radius=1)).save(p),
}
# Not masks at all, and passed over.
OTHERS = ("notes.txt", "Thumbs.db", "wishes.csv", ".DS_Store")

# Bad: what the error must say besides the file's name.
BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "truncated.png": (
        lambda p: (
            (Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(p))
            or p.write_bytes(p.read_bytes()[:900])
        ),
        ("cannot read", "truncated", "replace it"),
    ),
    "text.png": (lambda p: p.write_text("no picture"), ("cannot read", "another kind, replace it")),
    "zero_bytes.png": (lambda p: p.write_bytes(b""), ("cannot read", "replace it")),
    "label_map.png": (lambda p: Image.fromarray(disc() // 85).save(p), ("masks are 0 and 255", "--labels")),
    "volume.nii.gz": (
        lambda p: nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)), p),
        ("shape", "expected one 2-D mask", "take a slice"),
    ),
    "line.png": (lambda p: Image.fromarray(disc()[:1]).save(p), ("expected one 2-D mask",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of everything that is good, and of other files."""
    root = tmp_path_factory.mktemp("masks") / "in"
    root.mkdir()
    for name, write in {**GOOD, **EMPTY}.items():
        write(root / name)
    for name in OTHERS:
        (root / name).write_text("x")
    return root


def test_a_mixed_folder_is_measured_whole(folder: Path, run_bundle: Run, tmp_path: Path) -> None:
    run = run_bundle("cmdm", "train", "smoke", "fit", dataset_dir=folder, output_dir=tmp_path)
    assert run.returncode == 0, run.stdout
    held = json.loads((tmp_path / "statistics.json").read_text())
    assert (len(held["masks"]), held["empty"]) == (len(GOOD), len(EMPTY))
    for name in OTHERS:
        assert (f"{folder / name} is passed over" in run.stdout) == (not name.startswith("."))


def test_every_file_type_shows_the_same_mask(folder: Path) -> None:
    names = sorted([*GOOD, *EMPTY], key=lambda n: n.removesuffix(".gz").rpartition(".")[0])
    found = dict(zip(names, measured(folder), strict=True))
    size = np.pi * 8**2 / SIDE**2
    for name in GOOD:
        (lesion,) = found[name]
        assert (lesion.x, lesion.y) == pytest.approx((0.51, 0.43), abs=0.03), name
        assert lesion.size == pytest.approx(size, rel=0.1), name
    assert all(found[name] == [] for name in EMPTY)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_mask_is_named_with_cause_and_remedy(name: str, tmp_path: Path) -> None:
    write, words = BAD[name]
    write(tmp_path / name)
    GOOD["l.png"](tmp_path / "l.png")
    with pytest.raises(CaseError) as caught:
        measured(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "l.png" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_bad_mask_stops_training_with_one_message(run_bundle: Run, tmp_path: Path) -> None:
    for name in ("text.png", "label_map.png"):
        BAD[name][0](tmp_path / name)
    GOOD["l.png"](tmp_path / "l.png")
    run = run_bundle("cmdm", "train", "smoke", dataset_dir=tmp_path, output_dir=tmp_path / "out")
    for name in ("text.png", "label_map.png"):
        assert str(tmp_path / name) in ending(run)
    assert ending(run).startswith("CaseError: ")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.pt"))


def test_masks_of_bits_count_as_they_are(tmp_path: Path) -> None:
    Image.fromarray(disc() // 255).save(tmp_path / "a_zero_one.png")
    Image.fromarray(disc()).convert("1").save(tmp_path / "b_one_bit.png")
    palette(disc()).save(tmp_path / "c_palette.png")
    Image.fromarray(disc()).save(tmp_path / "d_eight_bit.png")
    *bits, eight = measured(tmp_path)
    assert bits == [eight] * 3
    assert measured(tmp_path, labels=[1, 255])[:3] == bits, "named, they are the same"


def labelled(path: Path, values: tuple[int, ...] = (1, 2)) -> None:
    """A label map: a disc in a larger one."""
    mask = np.where(disc(radius=12) > 0, values[1], 0)
    Image.fromarray(np.where(disc(radius=7) > 0, values[0], mask).astype(np.uint8)).save(path)


def test_label_maps_with_labels(tmp_path: Path) -> None:
    for i in range(2):
        labelled(tmp_path / f"{i}.png")
    for lesions in measured(tmp_path, labels=[1, 2]):
        assert [lesion.label for lesion in lesions] == [1, 2]
        assert lesions[0].size == pytest.approx(np.pi * 7**2 / SIDE**2, rel=0.1)
    assert [len(lesions) for lesions in measured(tmp_path, labels=[1, 2, 3])] == [2, 2], "a label may be absent"
    labelled(tmp_path / "foreign.png", (1, 7))
    with pytest.raises(CaseError, match=r"foreign.png holds 7, not in --labels \[1, 2\]: correct the mask or name"):
        measured(tmp_path, labels=[1, 2])


@pytest.mark.parametrize(("names", "words"), [
    (("empty.png", "speckle.png"), ("none of 2 masks", "empty.png", "--dataset_dir", "--min_size")),
    ((), ("holds no case",)),
    (("notes.txt",), ("holds no case",)),
    (("l.png", "l.jpg"), ("two files for case l", "l.png", "l.jpg", "keep one")),
])  # fmt: skip
def test_a_folder_without_a_usable_mask_says_why(
    names: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    writers = {**GOOD, **EMPTY, "l.jpg": GOOD["photo.jpg"], "notes.txt": lambda p: p.write_text("x")}
    for name in names:
        writers[name](tmp_path / name)
    with pytest.raises((CaseError, FileNotFoundError)) as caught:
        measured(tmp_path)
    assert str(tmp_path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        measured(tmp_path / "nowhere")


def test_one_mask_is_enough_and_every_draw_repeats_it(infer: Run, run_bundle: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    GOOD["l.png"](tmp_path / "in/l.png")
    run = run_bundle("cmdm", "train", "smoke", "fit", dataset_dir=tmp_path / "in", output_dir=tmp_path / "fit")
    assert run.returncode == 0, run.stdout
    assert "every draw repeats it" in run.stdout
    statistics = tmp_path / "fit/statistics.json"
    cases = built("cases", "inference", statistics=statistics, num_samples=3, weights=tmp_path / "no.pt")
    assert {json.dumps(case["lesions"]) for case in cases} == {json.dumps(cases[0]["lesions"])}


def test_classes_from_label_maps_to_masks_of_another_shape(run_bundle: Run, tmp_path: Path) -> None:
    """Label maps in, a network of three classes, label maps out, not square; the side-cars tell what the files hold."""
    knobs = {"labels": "[1, 2, 3]", "image_size": "[24, 32]", "min_size": 2}
    places = {"output_dir": tmp_path / "out", "weights": tmp_path / "out/model.pt"}
    run = run_bundle("cmdm", "train", "smoke", phantom_kind="heart", epochs=1, output_dir=tmp_path / "out", **knobs)
    assert run.returncode == 0, run.stdout
    for overlays in ([], ["legacy"]):
        places["output_dir"] = tmp_path / "-".join(["synthetic", *overlays])
        run = run_bundle("cmdm", "inference", *overlays, "smoke", **places, **knobs)
        assert run.returncode == 0, run.stdout
        assert check_synthesis(places["output_dir"]) == []
    wrong = run_bundle("cmdm", "inference", "smoke", **{**places, **knobs, "labels": "[1, 2, 4]"})
    assert "was fitted to labels [1, 2, 3], expected [1, 2, 4]" in ending(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Wishes: a table or JSON

HEADER = "mask,size,x,y,label,count"
GOOD_ROWS = {"plain": "0.1,0.5,0.5,,", "more": "0.05,0.3,0.3,,3", "edge": "0.02,0,1,1,"}
BAD_ROWS = {
    "word": ("large,0.5,0.5,,", "size 'large' is not a number"),
    "negative": ("-0.1,0.5,0.5,,", "size -0.1 is not in (0, 1]"),
    "nothing": ("0,0.5,0.5,,", "size 0 is not in (0, 1]"),
    "pixels": ("400,0.5,0.5,,", "divide pixels by width * height"),
    "column": ("0.1,31,0.5,,", "divide pixels by the width"),
    "row": ("0.1,0.5,-0.2,,", "y -0.2 is not in [0, 1]"),
    "lacking": ("0.1,0.5,,,", "y is missing"),
    "not_a_number": ("nan,0.5,0.5,,", "size nan is not in (0, 1]"),
    "infinite": ("0.1,inf,0.5,,", "x inf is not in [0, 1]"),
    "label": ("0.1,0.5,0.5,4,", "label 4 is unknown, expected one of [1]"),
    "half": ("0.1,0.5,0.5,,1.5", "count 1.5: expected one whole number"),
    "uncounted": ("0.1,0.5,0.5,,many", "count 'many' is not a number"),
    "minus": ("0.1,0.5,0.5,,-2", "count -2: expected one whole number"),
    "long": ("0.1,0.5,0.5,,,9", "more values than the header"),
    "../up": ("0.1,0.5,0.5,,", "name '../up' is taken or cannot name a file"),
    "crowd": ("0.3,0.5,0.5,,40", "no valid mask"),
}


def test_a_table_with_nonsense_rows(infer: Run, tmp_path: Path) -> None:
    rows = {**{name: row for name, (row, _) in BAD_ROWS.items()}, **GOOD_ROWS}
    table = tmp_path / "wishes.csv"
    table.write_text("\n".join([HEADER, *(f"{name},{row}" for name, row in rows.items())]))
    run = infer(dataset_dir=table, output_dir=tmp_path / "out")
    said = ending(run).splitlines()
    assert said[0] == f"CaseError: {len(BAD_ROWS)} of {len(rows)} cases failed, the others are done:"
    assert len(said) == 1 + len(BAD_ROWS)
    for number, (line, (name, (_, words))) in enumerate(zip(said[1:], BAD_ROWS.items(), strict=True), 2):
        assert f"{table}, row {number}: " in line, name
        assert words in line, name
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {f"{name}_mask.png" for name in GOOD_ROWS}
    assert check_synthesis(tmp_path / "out") == []
    told = json.loads((tmp_path / "out/more.json").read_text())["made_by"]["case"]["lesions"]
    assert len(told) == 3
    assert told[0] == {"size": 0.05, "x": 0.3, "y": 0.3, "label": 1}
    assert not list(tmp_path.glob("up*"))


def test_json_with_nonsense_entries(infer: Run, tmp_path: Path) -> None:
    good = {"size": 0.1, "x": 0.4, "y": 0.6}
    bad: dict[str, tuple[Any, str]] = {
        "string": ("lesion", "size is missing"),
        "none": ([], "size is missing"),
        "inner": ([good, "x"], "size is missing"),
        "truth": ([{**good, "size": True}], "size True is not a number"),
        "null": ([{**good, "x": None}], "x is missing"),
        "nested": ([{**good, "y": [0.5]}], "y [0.5] is not a number"),
    }
    masks: list[Any] = [{"name": name, "lesions": lesions} for name, (lesions, _) in bad.items()]
    masks += ["not an object", {"name": "good", "lesions": [good]}]
    (tmp_path / "wishes.json").write_text(json.dumps({"masks": masks}))
    said = ending(infer(dataset_dir=tmp_path / "wishes.json", output_dir=tmp_path / "out")).splitlines()
    assert said[0] == f"CaseError: {len(bad) + 1} of {len(masks)} cases failed, the others are done:"
    for line, (name, (_, words)) in zip(said[1:], bad.items(), strict=False):
        assert line.startswith(f"  {name}: {tmp_path / 'wishes.json'}, row ")
        assert words in line
    assert [p.name for p in (tmp_path / "out").glob("*.png")] == ["good_mask.png"]


@pytest.mark.parametrize(("name", "content", "words"), [
    ("none.csv", None, ("cannot read", "size,x,y")),
    ("empty.csv", "", ("header of an empty file", "size,x,y")),
    ("headless.csv", "0.1,0.5,0.5\n", ("has the header 0.1,0.5,0.5", "size,x,y")),
    ("no_rows.csv", "size,x,y\n", ("asks for no mask",)),
    ("semicolons.csv", "size;x;y\n0.1;0.5;0.5\n", ("has the header size;x;y", "size,x,y")),
    ("binary.csv", b"\x89PNG\xff\xfe", ("not a text table",)),
    ("broken.json", "{", ("not valid JSON",)),
    ("empty.json", "[]", ("asks for no mask",)),
    ("number.json", "3", ("asks for no mask",)),
])  # fmt: skip
def test_an_unusable_table_of_wishes(name: str, content: str | bytes | None, words: tuple, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CaseError) as caught:
        built("cases", "inference", dataset_dir=tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics, weights, places


@pytest.mark.parametrize(("name", "content", "words"), [
    ("table.csv", "size,x,y\n0.1,0.5,0.5\n", ("is a table, not fitted statistics", "--dataset_dir")),
    ("none.json", None, ("cannot read", "train.json writes it")),
    ("card.json", '{"weights_sha256": "0"}', ("holds no semantic statistics", "train.json wrote")),
    ("broken.json", '{"kind": "semantic', ("not valid JSON",)),
    ("half.json", '{"kind": "semantic statistics", "model": "ShrunkKDE"}', ("is damaged", "fit the statistics anew")),
    ("other.json", '{"kind": "semantic statistics", "model": "Oracle"}', ("is damaged", "fit the statistics anew")),
])  # fmt: skip
def test_unusable_statistics(name: str, content: str | None, words: tuple, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CaseError) as caught:
        built("cases", "inference", statistics=tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_run_without_statistics_ends_with_one_line(infer: Run, tmp_path: Path) -> None:
    text = ending(infer(statistics=tmp_path / "none.json", output_dir=tmp_path / "out"))
    assert len(text.splitlines()) == 1
    assert str(tmp_path / "none.json") in text
    assert not list(tmp_path.rglob("*.png"))


def test_weights_of_another_size_are_refused(infer: Run, weights: Path, tmp_path: Path) -> None:
    text = ending(infer(channels="[8, 16]", output_dir=tmp_path / "out"))
    assert str(weights) in text
    assert "shape" in text
    assert len(text.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*.png"))


def test_an_impossible_output_is_refused_at_the_door(infer: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = ending(infer(output_dir=tmp_path / "file" / "sub"))
    assert str(tmp_path / "file" / "sub") in text
    assert "choose another --output_dir" in text


def test_a_table_of_wishes_in_the_output_folder_stays(infer: Run, tmp_path: Path) -> None:
    table = tmp_path / "wishes.csv"
    table.write_text("size,x,y\n0.1,0.5,0.5\n")
    run = infer(dataset_dir=table, output_dir=tmp_path)
    assert run.returncode == 0, run.stdout
    assert table.read_text() == "size,x,y\n0.1,0.5,0.5\n"
    assert (tmp_path / "mask_0000_mask.png").is_file()


def test_a_killed_run_goes_on_and_a_larger_one_keeps_the_first(infer: Run, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = str([str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", "smoke")])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, "--num_samples", "2000"]
    command += ["--batch_size", "1", "--max_tries", "1", "--weights", str(weights), "--output_dir", str(out)]
    run = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        patience = time.monotonic() + 120
        while not (out / "mask_0001.json").is_file() and time.monotonic() < patience:
            time.sleep(0.02)
    finally:
        run.kill()
        run.wait()
    before = {path.name: path.read_bytes() for path in out.glob("mask_*.json")}
    assert 2 <= len(before) < 2000
    again = infer(num_samples=len(before) + 2, batch_size=1, output_dir=out)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("already finished, skipped") == len(before)
    assert again.stdout.count(": written to") == 2
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert len(list(out.glob("*.png"))) == len(before) + 2
    assert check_synthesis(out) == []
