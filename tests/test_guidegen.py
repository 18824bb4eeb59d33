"""GuideGen as a user runs it: three stages that build on each other, reports or masks in, labels and CT out.

Every process takes some seconds to start: weights are trained once, and one run takes many cases.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from common.abdomen_phantoms import abdomen, abdomen_cohort
from common.totalsegmentator import CANCER, ORGANS, organ_table
from tools import reading
from tools.smoke import check_synthesis

pytestmark = pytest.mark.bundle

Run = Callable[..., subprocess.CompletedProcess]
NAME = "guidegen"
REPO = Path(__file__).resolve().parents[1]
MODELS = REPO / "bundles" / NAME / "models"
ENGLISH = "63-year-old man. A mass of 5.0 cm is seen in the sigmoid colon. The spleen is enlarged."
CHINESE = "男，66岁。脾脏切除术后。右肾缩小。"  # noqa: RUF001
WINDOW = reading.read(REPO / "bundles" / NAME / "configs" / "inference.json")["hu_window"]
GRID = (24, 24, 6)  # of volumes drawn from reports at smoke size


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def write(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def turned(values: np.ndarray, affine: np.ndarray, axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume, stored along other axes."""
    image = nib.Nifti1Image(values, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axcodes)))
    return np.asarray(image.dataobj), image.affine


def pair(folder: Path, name: str) -> tuple[bytes, bytes]:
    """Label volume and CT of a case, as they lie on disk."""
    layout, image = ((folder / f"{name}_{kind}.nii.gz").read_bytes() for kind in ("layout", "image"))
    return layout, image


def succeeded(run: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert run.returncode == 0, run.stdout
    return run


def ending(run: subprocess.CompletedProcess) -> str:
    """What a failed run says last, below the traceback."""
    assert run.returncode != 0, run.stdout
    return run.stdout.rstrip().rpartition("\n\n")[2]


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five studies, as a user's own: ``CT/``, ``SEG/``, ``REPORT/``, one report in Chinese, and none of the last."""
    root = Path(abdomen_cohort(tmp_path_factory.mktemp("studies"), 5, (24, 20, 16)))
    (root / "phantoms.json").unlink()
    (root / "REPORT/abdomen_0000.txt").write_text(ENGLISH, encoding="utf-8")
    (root / "REPORT/abdomen_0001.txt").write_text(CHINESE, encoding="utf-8")
    (root / "REPORT/abdomen_0004.txt").unlink()
    return root


@pytest.fixture(scope="module")
def stages(data: Path, run_bundle: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three stages trained one after the other -> their weights, by the knobs of synthesis that take them."""
    root, made = tmp_path_factory.mktemp("stages"), {}
    for knob, overlays, needs in (
        ("mask_weights", ["train_mask"], []),
        ("autoencoder_weights", ["train_autoencoder"], []),
        ("weights", [], ["autoencoder_weights"]),
    ):
        places = {name: made[name] for name in needs} | {"output_dir": root / knob}
        if knob == "mask_weights":  # long enough for labels of several classes
            few = {"epochs": 20, "val_interval": 20, "preview_interval": 20}
            places |= {"contexts_file": root / "contexts.pt", **few}
        run = succeeded(run_bundle(NAME, "train", *overlays, "smoke", dataset_dir=data, **places))
        assert ("--latent_scale" in run.stdout) == (knob == "autoencoder_weights"), "one stage tells the others"
        made[knob] = root / knob / "model.pt"
    return made


def test_each_stage_fills_its_own_network(stages: dict[str, Path]) -> None:
    parsed = reading.parser(REPO / "bundles" / NAME, "inference", "smoke")
    for knob, weights in stages.items():
        network = parsed.get_parsed_content(reading.FILLS[knob])
        network.load_state_dict(torch.load(weights, weights_only=True), strict=True)


def test_the_first_stage_reads_the_reports_of_the_folder(stages: dict[str, Path], data: Path) -> None:
    held = torch.load(stages["mask_weights"].parents[1] / "contexts.pt", weights_only=True)
    reports = {path.read_text(encoding="utf-8").strip() for path in (data / "REPORT").iterdir()}
    assert {ENGLISH, CHINESE} <= reports
    assert len(reports) == 4
    assert len(held) == len(reports | {""}), "a missing one is empty"


def test_pixels_and_a_foreign_index_train_and_synthesise(
    data: Path, stages: dict[str, Path], run_bundle: Run, tmp_path: Path
) -> None:
    """`pixel.json`, on the release's index of files with TotalSegmentator's numbers."""
    index = {}
    for path in sorted((data / "CT").iterdir()):
        layout, affine = read(data / "SEG" / path.name), nib.load(path).affine
        write(tmp_path / "seg" / path.name, foreign(layout), affine)
        write(tmp_path / "tumour" / path.name, (layout == CANCER).astype(np.uint8), affine)
        report = data / "REPORT" / path.name.replace(".nii.gz", ".txt")
        files = {"ct": str(path), "totalseg": f"seg/{path.name}", "crcseg": f"tumour/{path.name}"}
        index[path.name[:13]] = files | {"text": report.read_text("utf-8") if report.exists() else ""}
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    studies = {"dataset_dir": tmp_path / "index.json", "label_table": "totalsegmentator_v1"}
    for name, overlays in (("mask", ["train_mask"]), ("pixel", ["pixel"])):
        places = {"output_dir": tmp_path / name, "contexts_file": tmp_path / f"{name}.contexts.pt"}
        succeeded(run_bundle(NAME, "train", *overlays, "smoke", epochs=1, **places, **studies))
        assert (tmp_path / name / "model.pt").is_file()
    assert len(torch.load(tmp_path / "mask.contexts.pt")) == 5, "four reports of the index, and an empty one"
    (tmp_path / "prompts.txt").write_text(ENGLISH, encoding="utf-8")
    places = {"dataset_dir": tmp_path / "prompts.txt", "output_dir": tmp_path / "out"}
    places |= {"weights": tmp_path / "pixel/model.pt", "mask_weights": stages["mask_weights"]}
    succeeded(run_bundle(NAME, "inference", "pixel", "smoke", **places))
    assert check_synthesis(tmp_path / "out") == []
    assert read(tmp_path / "out/report_0001_image.nii.gz").shape == GRID


# ---------------------------------------------------------------------------------------------------------------------
# From reports


@pytest.fixture(scope="module")
def drawn(stages: dict[str, Path], run_bundle: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three reports of one file, two of them with the same words, two at a time."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text(f"# two languages\n{ENGLISH}\n\n{CHINESE}\n{ENGLISH}\n", encoding="utf-8")
    places = {"dataset_dir": folder / "prompts.txt", "output_dir": folder / "out"}
    succeeded(run_bundle(NAME, "inference", "smoke", batch_size=2, **places, **stages))
    return folder / "out"


def test_reports_become_pairs_on_one_grid(drawn: Path) -> None:
    assert check_synthesis(drawn) == []
    cards = [json.loads(path.read_text())["made_by"]["case"] for path in sorted(drawn.glob("report_*.json"))]
    assert [card["report"] for card in cards] == [ENGLISH, CHINESE, ENGLISH]
    for card in cards:
        layout, image = (nib.load(drawn / f"{card['name']}_{kind}.nii.gz") for kind in ("layout", "image"))
        assert layout.shape == image.shape == GRID
        np.testing.assert_array_equal(layout.affine, image.affine)
        np.testing.assert_allclose(np.diag(image.affine)[:3], np.array((360, 270, 384)) / GRID)
        labels, values = np.asarray(layout.dataobj), np.asarray(image.dataobj)
        assert (labels.dtype, values.dtype) == (np.uint8, np.int16)
        assert set(np.unique(labels)) <= set(range(len(ORGANS))), "a class that the table does not know"
        assert len(np.unique(labels)) > 1
        assert WINDOW[0] <= values.min() < values.max() <= WINDOW[1]


def test_cases_of_the_same_words_differ(drawn: Path) -> None:
    first, other = pair(drawn, "report_0001"), pair(drawn, "report_0003")
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.fixture(scope="module")
def folder_run(
    stages: dict[str, Path], run_bundle: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess, Path]:
    """A folder of reports: one that was drawn in company before, an empty one, one that is no UTF-8."""
    root = tmp_path_factory.mktemp("folder")
    (root / "in").mkdir()
    (root / "in/report_0001.txt").write_text(ENGLISH, encoding="utf-8-sig")
    (root / "in/blank.txt").write_text(" \n", encoding="utf-8")
    (root / "in/latin.txt").write_text("Männlich", encoding="latin-1")
    return run_bundle(NAME, "inference", "smoke", dataset_dir=root / "in", output_dir=root / "out", **stages), root


def test_a_report_alone_gives_the_same_files_as_in_company(
    folder_run: tuple[subprocess.CompletedProcess, Path], drawn: Path
) -> None:
    assert pair(folder_run[1] / "out", "report_0001") == pair(drawn, "report_0001")


def test_bad_reports_are_named_and_the_others_done(folder_run: tuple[subprocess.CompletedProcess, Path]) -> None:
    run, root = folder_run
    lines = ending(run).splitlines()
    assert lines[0] == "CaseError: 2 of 3 cases failed, the others are done:"
    assert f"{root / 'in/blank.txt'} is empty: write a report" in lines[1]
    assert f"{root / 'in/latin.txt'} is not text in UTF-8" in lines[2]
    assert len(lines) == 3


def test_another_seed_gives_another_mask_and_a_list_may_bring_its_own(
    stages: dict[str, Path], drawn: Path, run_bundle: Run, tmp_path: Path
) -> None:
    phantom = abdomen(5, (20, 16, 16))
    own = phantom.layout[..., :9]
    write(tmp_path / "own.nii.gz", own, phantom.affine)
    entries = [{"name": "report_0001", "report": ENGLISH}, {"name": "own", "layout": "own.nii.gz"}, CHINESE]
    (tmp_path / "list.json").write_text(json.dumps(entries), encoding="utf-8")
    places = {"dataset_dir": tmp_path / "list.json", "output_dir": tmp_path / "out"}
    succeeded(run_bundle(NAME, "inference", "smoke", seed=1, batch_size=3, **places, **stages))
    assert check_synthesis(tmp_path / "out") == []
    np.testing.assert_array_equal(read(tmp_path / "out/own_layout.nii.gz"), own)
    assert read(tmp_path / "out/own_image.nii.gz").shape == own.shape
    assert read(tmp_path / "out/report_0003_layout.nii.gz").shape == GRID
    assert pair(tmp_path / "out", "report_0001")[0] != pair(drawn, "report_0001")[0]


# ---------------------------------------------------------------------------------------------------------------------
# From masks

TO_FOREIGN = {0: 0, CANCER: 57, **{ours: number for number, ours in reversed(organ_table("v1").items())}}  # 57: colon


def foreign(layout: np.ndarray) -> np.ndarray:
    """Our values as TotalSegmentator's first version numbers them; it has no tumour: colon."""
    return np.vectorize(TO_FOREIGN.get, otypes=[np.uint8])(layout)


def ours(layout: np.ndarray) -> np.ndarray:
    """What is expected to come back."""
    return np.where(layout == CANCER, ORGANS.index("colon"), layout)


# Masks as users bring them, and what is said of those that cannot be used.
GOOD = ("plain", "lps", "permuted", "wide", "thick", "tilted", "float_labels", "cropped")
BAD = {
    "truncated": ("cannot read", "SEG/truncated.nii.gz", "replace it"),
    "unknown": ("SEG/unknown.nii.gz holds labels [200]", "table totalsegmentator_v1"),
    "four_d": ("SEG/four_d.nii.gz has shape", "expected one 3-D volume"),
}


def own_masks() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each name in `GOOD` the label volume in our values, and its affine."""
    phantom, wide = abdomen(6, (24, 20, 16)), abdomen(7, (32, 28, 16))
    layout, affine = phantom.layout, phantom.affine
    angle = np.radians(8)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    empty = layout.copy()
    empty[..., :3] = empty[..., -2:] = 0
    return {
        "plain": (layout, affine),
        "lps": turned(layout, affine, "LPS"),
        "permuted": turned(layout, affine, "SAL"),
        "wide": (wide.layout[..., :7], wide.affine),
        "thick": (layout[:, ::2, ::3], affine @ np.diag([1, 2, 3, 1])),
        "tilted": (layout, tilt @ affine),
        "float_labels": (layout, affine),
        "cropped": (empty, affine),
    }


@pytest.fixture(scope="module")
def masks_run(
    stages: dict[str, Path], run_bundle: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess, Path]:
    """All masks, of several shapes, two at a time where neighbours are equal, in TotalSegmentator's numbers."""
    root = tmp_path_factory.mktemp("masks")
    for name, (layout, affine) in own_masks().items():
        values = foreign(layout)
        write(root / f"in/SEG/{name}.nii.gz", values.astype("f4") if name == "float_labels" else values, affine)
    layout, affine = own_masks()["plain"]
    write(root / "in/SEG/four_d.nii.gz", np.stack([layout, layout], axis=-1), affine)
    write(root / "in/SEG/unknown.nii.gz", np.where(layout == 4, 200, foreign(layout)).astype(np.uint8), affine)
    whole = (root / "in/SEG/plain.nii.gz").read_bytes()
    (root / "in/SEG/truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    return run_masks(run_bundle, root, stages, batch_size=2), root


def run_masks(run_bundle: Run, root: Path, stages: dict[str, Path], **knobs: object) -> subprocess.CompletedProcess:
    knobs |= {"dataset_dir": root / "in", "output_dir": root / "out"}
    return run_bundle(NAME, "inference", "smoke", from_masks=True, label_table="totalsegmentator_v1", **knobs, **stages)


def test_unusable_masks_are_named_and_the_others_done(masks_run: tuple[subprocess.CompletedProcess, Path]) -> None:
    lines = ending(masks_run[0]).splitlines()
    assert lines[0] == f"CaseError: {len(BAD)} of {len(BAD) + len(GOOD)} cases failed, the others are done:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == sorted(BAD)
    for line in lines[1:]:
        for words in BAD[line.split(":")[0].strip()]:
            assert words in line


@pytest.mark.parametrize("name", GOOD)
def test_a_ct_comes_on_the_masks_own_grid(name: str, masks_run: tuple[subprocess.CompletedProcess, Path]) -> None:
    given = nib.load(masks_run[1] / f"in/SEG/{name}.nii.gz")
    layout, image = (nib.load(masks_run[1] / f"out/{name}_{kind}.nii.gz") for kind in ("layout", "image"))
    assert image.shape == given.shape
    for volume in (layout, image):
        np.testing.assert_allclose(volume.affine, given.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(layout.dataobj), ours(own_masks()[name][0]))  # to the bit
    values = np.asarray(image.dataobj)
    assert values.dtype == np.int16
    assert WINDOW[0] <= values.min() < values.max() <= WINDOW[1]


def test_slices_without_labels_stay_empty(masks_run: tuple[subprocess.CompletedProcess, Path]) -> None:
    values = read(masks_run[1] / "out/cropped_image.nii.gz")
    assert (values[..., [0, 1, 2, -2, -1]] == WINDOW[0]).all()
    assert (values[..., 3:-2] != WINDOW[0]).any(axis=(0, 1)).all()


@pytest.fixture(scope="module")
def again(
    masks_run: tuple[subprocess.CompletedProcess, Path],
    stages: dict[str, Path],
    run_bundle: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess, Path]:
    """The run continued, one at a time: a CT is gone, a mask is stored along other axes, the unusable ones are gone."""
    root = tmp_path_factory.mktemp("again")
    for folder in ("in/SEG", "out"):
        (root / folder).mkdir(parents=True)
        for path in (masks_run[1] / folder).iterdir():
            if path.name.split(".")[0] not in BAD:
                (root / folder / path.name).write_bytes(path.read_bytes())
    for path in (root / "out").glob("*.json"):  # a side-car names its case's mask
        path.write_text(path.read_text().replace(str(masks_run[1] / "in"), str(root / "in")))
    (root / "out/wide_image.nii.gz").unlink()
    layout, affine = turned(*own_masks()["plain"], "PIR")
    write(root / "in/SEG/plain.nii.gz", foreign(layout), affine)
    return succeeded(run_masks(run_bundle, root, stages)), root


def test_a_lost_ct_comes_back_as_it_was(
    again: tuple[subprocess.CompletedProcess, Path], masks_run: tuple[subprocess.CompletedProcess, Path]
) -> None:
    assert again[0].stdout.count("already finished, skipped") == len(GOOD) - 2
    assert pair(again[1] / "out", "wide") == pair(masks_run[1] / "out", "wide")


def test_the_ct_does_not_depend_on_how_the_mask_is_stored(
    again: tuple[subprocess.CompletedProcess, Path], masks_run: tuple[subprocess.CompletedProcess, Path]
) -> None:
    for kind in ("layout", "image"):
        before, after = (
            nib.as_closest_canonical(nib.load(run[1] / f"out/plain_{kind}.nii.gz")) for run in (masks_run, again)
        )
        np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
        np.testing.assert_allclose(after.affine, before.affine, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Runs that cannot succeed


def test_a_list_without_reports_is_refused(stages: dict[str, Path], run_bundle: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# nothing yet\n\n", encoding="utf-8")
    places = {"dataset_dir": tmp_path / "prompts.txt", "output_dir": tmp_path / "out"}
    text = ending(run_bundle(NAME, "inference", "smoke", **places, **stages))
    assert text.startswith(f"CaseError: {tmp_path / 'prompts.txt'} holds no report: ")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("knob", ["mask_weights", "autoencoder_weights"])
def test_missing_weights_are_named(knob: str, stages: dict[str, Path], run_bundle: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(ENGLISH, encoding="utf-8")
    places = {"dataset_dir": tmp_path / "prompts.txt", "output_dir": tmp_path / "out"}
    text = ending(run_bundle(NAME, "inference", "smoke", **places, **stages | {knob: tmp_path / "nowhere.pt"}))
    assert str(tmp_path / "nowhere.pt") in text
    assert len(text.splitlines()) == 1


def test_weights_of_other_classes_are_refused(stages: dict[str, Path], run_bundle: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(ENGLISH, encoding="utf-8")
    places = {"dataset_dir": tmp_path / "prompts.txt", "output_dir": tmp_path / "out"}
    text = ending(run_bundle(NAME, "inference", "smoke", num_classes=12, **places, **stages))
    assert "model.pt does not fit the network: " in text
    assert "Weights and knobs differ" in text
    assert len(text.splitlines()) == 1
    assert not list((tmp_path / "out").glob("report_*"))


# ---------------------------------------------------------------------------------------------------------------------
# The starter


@pytest.mark.skipif(not (MODELS / "mask.pt").is_file(), reason="the bundle has no weights of the first stage yet")
def test_the_shipped_weights_draw_what_the_report_says(run_bundle: Run, tmp_path: Path) -> None:
    reports = [
        "A mass of 5.0 cm is seen in the rectum. The left kidney is absent after nephrectomy.",
        "A mass of 5.0 cm is seen in the caecum. The left kidney is unremarkable.",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(reports), encoding="utf-8")
    places = {"dataset_dir": tmp_path / "prompts.txt", "output_dir": tmp_path / "out"}
    # The labels are looked at alone: few slices, few calls for each.
    succeeded(run_bundle(NAME, "inference", batch_size=2, volume_slices=16, num_inference_steps=2, **places))
    layouts = [read(tmp_path / f"out/report_000{k}_layout.nii.gz") for k in (1, 2)]
    gone, there = ((layout == ORGANS.index("kidney_left")).sum() for layout in layouts)
    assert gone < 0.3 * there
    rectum, caecum = (np.argwhere(layout == ORGANS.index("colorectal_cancer")).mean(axis=0) for layout in layouts)
    assert rectum[2] < caecum[2], "it lies lower"
    assert rectum[0] < caecum[0], "and not on the right"
