"""Laws of the evaluation of painted lesions: every number on cases whose answer is known, and on cases that are bad."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from common.io import CaseError, write_json
from common.lesion_boxes import Box
from common.lesion_evaluation import (
    Patcher,
    _by_word,
    _control,
    evaluate_lesions,
    lesion_downstream,
    list_lesions,
    measure_lesion,
    outside_change,
    seam_ratio,
)
from common.lesion_geometry import cover, working_grid
from common.lesion_lists import list_lesion_cases
from common.lesion_phantoms import lesion_cohort, paint_lesion
from common.lesion_reports import LesionReport, read_reports, write_reports
from common.lesion_words import CAVITY, DENSITY, FLUID, OUTWARD, VALUE

SPACING = (2.0, 3.0, 4.0)
AFFINE = np.diag([*SPACING, 1.0])
COARSE, VOXEL = (40, 32, 42), 9.0
SHAPE = (30, 24, 20)


def cuboid(start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """A box of voxels."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = True
    return mask


def report(organ: str = "liver", size: tuple[float, float, float] = (10, 12, 12), **words: str) -> LesionReport:
    keys = {"density": DENSITY, "value": VALUE, "cavity": CAVITY}
    return LesionReport(organ, "tumor", {keys[key]: word for key, word in words.items()}, size)


# One lesion


def test_a_lesion_that_is_as_asked():
    lesion, liver = cuboid((10, 8, 6), (5, 4, 3)), cuboid((2, 2, 2), (24, 18, 14))
    before = np.where(liver, 100.0, -100.0)
    after = np.where(lesion, 60.0, before)
    row = measure_lesion(
        report(density="hypodense lesion", value="55 HU"), lesion, after, AFFINE, liver.astype(int) * 5, before
    )
    assert row["achieved_mm"] == [10, 12, 12]
    assert row["size_error_mm"] == [0, 0, 0]
    assert row["inside"] == row["fill"] == 1
    assert (row["hu"], row["change"], row["contrast"], row["ct_value"]) == (60, -40, -40, 55)
    assert row["volume_mm3"] == 5 * 4 * 3 * 24


def test_a_lesion_that_is_not_as_asked():
    liver = cuboid((0, 2, 2), (10, 18, 14))
    lesion = cuboid((5, 8, 6), (20, 4, 3))  # 5 voxels of the organ, 1 more within 3 mm, of 20
    row = measure_lesion(report(), lesion, np.zeros(SHAPE), AFFINE, liver.astype(int) * 5)
    assert row["inside"] == pytest.approx(6 / 20)
    assert row["size_error_mm"] == [30, 0, 0]
    far = measure_lesion(report(), cuboid((25, 8, 6), (5, 4, 3)), np.zeros(SHAPE), AFFINE, liver.astype(int) * 5)
    assert far["inside"] == 0
    absent = measure_lesion(report("pancreas"), lesion, np.zeros(SHAPE), AFFINE, liver.astype(int) * 5)
    assert absent["inside"] == 0
    assert math.isnan(absent["contrast"])


def test_what_is_not_known_is_not_a_number():
    row = measure_lesion(report(), cuboid((5, 5, 5), (2, 2, 2)), np.zeros(SHAPE), AFFINE)
    assert all(math.isnan(row[key]) for key in ("inside", "change", "contrast", "ct_value"))


def test_without_an_original_the_organ_is_measured_around_the_lesion():
    liver, lesion = cuboid((2, 2, 2), (24, 18, 14)), cuboid((4, 4, 4), (18, 14, 10))
    after = np.where(lesion, 20.0, 100.0)
    row = measure_lesion(report(), lesion, after, AFFINE, liver.astype(int) * 5)
    assert row["contrast"] == -80


# Control of density


def rows(pairs: list[tuple[str, float]], organ: str = "liver") -> list[dict]:
    return [
        {
            "density": word,
            "contrast": contrast,
            "organ": organ,
            "hu": contrast + 100,
            "ct_value": math.nan,
            "change": 0.0,
        }
        for word, contrast in pairs
    ]


def test_rank_correlation_is_one_if_words_are_heard_minus_one_if_turned_round():
    words = [FLUID, "hypodense lesion", "isodense lesion", "hyperdense lesion"]
    heard = rows([(word, 30.0 * i) for i, word in enumerate(words)])
    turned = rows([(word, -30.0 * i) for i, word in enumerate(words)])
    assert _control(heard)["rank correlation"] == pytest.approx(1)
    assert _control(turned)["rank correlation"] == pytest.approx(-1)
    deaf = [(word, float(x)) for x in range(12) for word in words]
    assert abs(_control(rows(deaf))["rank correlation"]) < 0.05


def test_rank_correlation_is_of_solid_organs_and_words_that_have_an_order():
    others = rows([("isodense lesion", 500.0)], "stomach") + rows([(FLUID, 900.0)], "lung upper lobe left")
    others += rows([("mixed-density lesion", 0.0), ("", 3.0)])
    found = _control(others)
    assert found["lesions in it"] == 0
    assert math.isnan(found["rank correlation"])
    same = rows([("isodense lesion", float(x)) for x in range(5)])
    assert math.isnan(_control(same)["rank correlation"])


def test_ct_value_error_beside_that_of_shuffled_ones():
    asked = [0.0, 50.0, 100.0]
    near = [{**row, "ct_value": v, "hu": v + 2} for row, v in zip(rows([("", 0)] * 3), asked, strict=True)]
    assert _control(near)["CT value error"] == pytest.approx(2)
    assert _control(near)["shuffled"] == pytest.approx(np.mean([48, 98, 52, 48, 102, 52]), abs=0.1)
    deaf = [{**row, "hu": 50.0} for row in near]
    assert _control(deaf)["CT value error"] == pytest.approx(_control(deaf)["shuffled"], abs=1)


def test_hollow_organs_have_rows_of_their_own():
    table = _by_word(rows([("isodense lesion", 10.0)]) + rows([("isodense lesion", 300.0)], "colon"))
    assert {word: row["contrast"]["mean"] for word, row in table.items()} == {
        "isodense lesion": 10,
        "isodense lesion (hollow organ)": 300,
    }


# Surroundings


def noisy() -> np.ndarray:
    return 5 * np.random.default_rng(0).normal(size=SHAPE)


def test_a_hard_paste_has_a_seam_and_a_feathered_one_has_none():
    before, mask = noisy(), cuboid((8, 6, 5), (12, 10, 8))
    hard = before + 60 * mask
    soft = before + 60 * np.clip(ndimage.distance_transform_edt(mask) / 12, 0, 1)
    assert seam_ratio(before, hard, SPACING) > 8
    assert seam_ratio(before, soft, SPACING) < 1.5
    assert math.isnan(seam_ratio(before, before, SPACING))


def test_a_seam_is_the_ratio_of_steps():
    before = np.zeros((8, 8, 8))
    before[:, :, 4:] = 10  # where the paste ends, the tissue has a step of its own
    after = before.copy()
    after[:, :, :4] = -20
    assert seam_ratio(before, after, (1, 1, 1)) == pytest.approx(3)


def test_outside_nothing_may_change():
    before, mask = noisy(), cuboid((8, 6, 5), (12, 10, 8))
    after = before.copy()
    assert outside_change(before, after, mask, SPACING, 6) == 0
    after[mask] += 40
    after[7, 6, 5] += 30  # 2 mm away
    assert outside_change(before, after, mask, SPACING, 6) == 0
    assert outside_change(before, after, mask, SPACING, 1) == pytest.approx(30)
    after[2, 2, 2] += 7
    assert outside_change(before, after, mask, SPACING, 6) == pytest.approx(7)
    assert outside_change(before, after, np.zeros_like(mask), SPACING, 6) == pytest.approx(40)


# Patches


def test_a_box_of_the_working_grid_finds_its_own_lesion():
    first, second = cuboid((4, 4, 4), (5, 4, 3)), cuboid((18, 14, 12), (5, 4, 3))
    see = Patcher((4.0, 3.0, 2.0), (16, 16, 16))
    grid = working_grid(SHAPE, AFFINE, see.spacing)
    for own, other in ((first, second), (second, first)):
        box = Box(*cover(own, AFFINE, grid))
        near = see.near(box, SHAPE, AFFINE)
        assert near[own].all()
        assert not near[other].any()
        assert see.volume(box) == pytest.approx(own.sum() * 24)


def test_patches_hold_ct_organ_and_lesion_and_not_always_in_the_middle():
    see = Patcher((4.0, 3.0, 2.0), (16, 16, 16))
    middles = set()
    for start in ((4, 4, 4), (9, 7, 6), (15, 12, 9)):
        lesion, liver = cuboid(start, (5, 4, 3)), cuboid((2, 2, 2), (24, 18, 14))
        patch = see(np.where(lesion, 1000.0, -1000.0).astype(np.float32), liver, lesion, AFFINE)
        assert patch.shape == (3, 16, 16, 16)
        assert float(patch[2].sum()) == lesion.sum()
        torch.testing.assert_close(patch[0] > 0, patch[2] > 0)
        assert (patch[1][patch[2] > 0] == 1).all()
        assert {float(patch[0].min()), float(patch[0].max())} == {-1, 1}
        middles.add(tuple(torch.nonzero(patch[2]).float().mean(0).tolist()))
    assert len(middles) > 1
    with pytest.raises(ValueError, match="at least 16"):
        Patcher(3.0, (16, 16, 8))


# Does it help?


def spots(n: int, seed: int, told: bool = True) -> torch.Tensor:
    """Patches with a dark cuboid lesion in a bright organ; if not told the truth, masks of another patch."""
    rng = np.random.default_rng(seed)
    out = torch.zeros(n, 3, 16, 16, 16)
    out[:, 0] = torch.from_numpy(0.3 + 0.1 * rng.normal(size=(n, 16, 16, 16)))
    out[:, 1] = 1
    for k in range(n):
        a = rng.integers(1, 9, 3)
        out[k, 2, a[0] : a[0] + 6, a[1] : a[1] + 6, a[2] : a[2] + 6] = 1
    out[:, 0] -= 0.5 * out[:, 2]
    if not told:
        out[:, 2] = out[:, 2].roll(1, 0)
    return out


def test_lesions_like_the_real_ones_help_and_others_do_not():
    settings = {"seeds": (0, 1), "steps": 24, "channels": (8, 16, 16)}
    real, test = spots(2, 0), spots(12, 1)
    good = lesion_downstream(real, spots(24, 2), test, **settings)
    bad = lesion_downstream(real, spots(24, 2, told=False), test, **settings)
    assert set(good) == {"real", "real + synthetic", "synthetic"}
    assert good["real"] == bad["real"]
    assert good["real"]["gain"]["mean"] == 0
    assert good["real + synthetic"]["dice"]["mean"] > 0.5
    assert good["synthetic"]["dice"]["mean"] > bad["synthetic"]["dice"]["mean"] + 0.3
    assert all(len(arm["runs"]) == arm["dice"]["cases"] == 2 for arm in good.values())


# A folder


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real phantoms, and healthy ones; read only."""
    root = tmp_path_factory.mktemp("lesions")
    lesion_cohort(root / "real", 6, shape=COARSE)
    lesion_cohort(root / "held out", 2, shape=COARSE, seed=1)
    lesion_cohort(root / "healthy", 4, shape=COARSE, lesions=False, seed=2, body_every=2)
    return root


def synthesise(root: Path, out: Path, *, hu: float = 0, aside: int = 0, touch: float = 0, boxes: bool = True) -> Path:
    """What an inference run leaves, made by the phantoms' painter; or by a bad one.

    Args:
        root: of the cohorts.
        out: folder to write.
        hu: added to every lesion.
        aside: voxels by which masks are moved away from what was painted.
        touch: HU added in a far corner.
        boxes: whether the side-car tells the boxes.
    """
    out.mkdir()
    for case in list_lesion_cases(root / "healthy"):
        image, name = nib.load(case["image"]), case["name"]
        before, organs = np.asarray(image.dataobj), np.asarray(nib.load(case["organs"]).dataobj)
        (asked,) = read_reports(case["report"])
        after, mask = paint_lesion(before, organs, image.affine, asked, np.random.default_rng(case["seed"]))
        after = after + np.int16(hu) * mask
        after[0, 0, 0] += np.int16(touch)
        grid = working_grid(before.shape, image.affine, VOXEL)
        start, size = cover(mask, image.affine, grid)
        told = write_reports([asked])["lesions"][0] | ({"box": {"start": start, "size": size}} if boxes else {})
        label = np.where(np.roll(mask, aside, axis=0), 2, np.isin(organs, organs[mask])).astype(np.uint8)
        files = {f"{name}_image.nii.gz": after.astype(np.int16), f"{name}_label.nii.gz": label}
        for file, voxels in files.items():
            nib.save(nib.Nifti1Image(voxels, image.affine), out / file)
        made_by = {"case": case, "outputs": dict.fromkeys(files, ""), "record": {"reports": [told]}}
        write_json(out / f"{name}.json", {"made_by": made_by})
    return out


def evaluate(cohorts: Path, folder: Path, **settings: object) -> dict:
    real = list_lesion_cases(cohorts / "real")
    return evaluate_lesions(real, folder, folder, spacing=VOXEL, size=(16, 16, 16), rim_mm=2 * VOXEL, **settings)


def test_side_cars_are_read(cohorts, tmp_path):
    folder = synthesise(cohorts, tmp_path / "out")
    cases = list_lesions(folder)
    assert len(cases) == 4
    healthy = list_lesion_cases(cohorts / "healthy")
    for case, source in zip(cases, healthy, strict=True):
        assert (case["original"], case["organs"]) == (source["image"], source["organs"])
        ((asked, box),) = case["asked"]
        assert asked == read_reports(source["report"])[0]
        assert isinstance(box, Box)


def test_a_good_painter_gets_good_numbers(cohorts, tmp_path):
    folder = synthesise(cohorts, tmp_path / "out")
    result = evaluate(cohorts, folder)
    assert result["counts"] == {"real": 6, "synthetic": 4, "lesions": 4, "missing": 0, "held_out": 0}
    assert result["surroundings"]["outside_max_hu"] == 0
    found = result["lesions"]["synthetic"]
    assert found["inside"]["mean"] > 0.99
    assert abs(found["achieved over asked"]["mean"] - 1) < 0.35
    assert 0.1 < found["fill"]["mean"] <= 1
    assert result["control"]["synthetic"]["CT value error"] < 0.6 * result["control"]["synthetic"]["shuffled"]
    assert result["lesions"]["real"]["size error, absolute (mm)"]["mean"] < 0.1  # phantoms' reports are true
    assert result["downstream"] == {}
    assert result["reasons"]["downstream"] == "no held-out cases, or no steps, were given"
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    text = (folder / "evaluation.md").read_text()
    assert "does density follow the words?" in text
    assert "nan" not in text


def test_a_bad_painter_gets_bad_numbers(cohorts, tmp_path):
    good = evaluate(cohorts, synthesise(cohorts, tmp_path / "good"))
    bad = evaluate(cohorts, synthesise(cohorts, tmp_path / "bad", hu=400, aside=14, touch=9, boxes=False))
    assert bad["surroundings"]["outside_max_hu"] >= 9
    assert bad["lesions"]["synthetic"]["inside"]["mean"] < 0.5
    loud = evaluate(cohorts, synthesise(cohorts, tmp_path / "loud", hu=400))
    assert loud["control"]["synthetic"]["CT value error"] > good["control"]["synthetic"]["CT value error"] + 200
    assert loud["surroundings"]["seam_ratio"]["mean"] > 1.5 * good["surroundings"]["seam_ratio"]["mean"]
    # Of four lesions a FID is large anyway.
    assert loud["patches"]["synthetic"]["fid"] > good["patches"]["synthetic"]["fid"]


def test_lesions_that_are_not_where_their_box_is_are_missing(cohorts, tmp_path):
    folder = synthesise(cohorts, tmp_path / "out")
    path = next(folder.glob("lesion_0000.json"))
    sidecar = json.loads(path.read_text())
    sidecar["made_by"]["record"]["reports"][0]["box"]["start"] = [0, 0, 0]
    path.write_text(json.dumps(sidecar))
    counts = evaluate(cohorts, folder)["counts"]
    assert (counts["lesions"], counts["missing"]) == (3, 1)


def test_the_downstream_test_runs_on_folders(cohorts, tmp_path):
    folder = synthesise(cohorts, tmp_path / "out")
    held_out = list_lesion_cases(cohorts / "held out")
    result = evaluate(cohorts, folder, held_out=held_out, few=2, seeds=(0,), steps=1)
    assert result["counts"]["held_out"] == 2
    assert all(0 <= arm["dice"]["mean"] <= 1 for arm in result["downstream"].values())


def test_errors_teach(cohorts, tmp_path):
    with pytest.raises(ValueError, match="nothing to compare: 6 real cases, 0 synthetic"):
        evaluate(cohorts, cohorts / "real")
    folder = synthesise(cohorts, tmp_path / "out")
    path = next(folder.glob("lesion_0000.json"))
    sidecar = json.loads(path.read_text())
    del sidecar["made_by"]["record"]
    path.write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match="does not say which lesions were made"):
        list_lesions(folder)
    real = [dict(case) for case in list_lesion_cases(cohorts / "real")]
    organs = nib.load(real[0]["organs"])
    empty = tmp_path / "empty.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(organs.shape, np.uint8), organs.affine), empty)
    real[0]["label"] = str(empty)
    good = synthesise(cohorts, tmp_path / "good")
    with pytest.raises(CaseError, match="label holds no lesion"):
        evaluate_lesions(real, good, good, spacing=VOXEL, size=(16, 16, 16))
    small = tmp_path / "small.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), organs.affine), small)
    real[0]["label"] = str(small)
    with pytest.raises(CaseError, match="must lie on one grid"):
        evaluate_lesions(real, good, good, spacing=VOXEL, size=(16, 16, 16))


def test_protruding_lesions_are_told_apart():
    row = measure_lesion(report(cavity=OUTWARD), cuboid((5, 5, 5), (2, 2, 2)), np.zeros(SHAPE), AFFINE)
    assert row["protruding"]
