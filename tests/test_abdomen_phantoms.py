"""Laws of the procedural abdomen: the body is what its attributes say, at every resolution; cohorts only grow."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.abdomen_phantoms import (
    COURSE,
    FIELD_OF_VIEW,
    ORGANS,
    STATES,
    AbdomenPhantom,
    abdomen,
    abdomen_cohort,
    draw_attributes,
)
from common.reports import SITES, Attributes, Finding, parse_report

SMALL = (32, 32, 32)
NORMAL = Attributes((Finding("tumour", "absent"),), "female", 50)
SOLID = ("spleen", "kidney_right", "kidney_left", "liver", "pancreas")


def where(phantom: AbdomenPhantom, organ: str) -> np.ndarray:
    """World coordinates (N, 3) of the voxels of an organ, in mm."""
    voxels = np.argwhere(phantom.layout == ORGANS.index(organ))
    return voxels @ phantom.affine[:3, :3].T + phantom.affine[:3, 3]


def volumes(phantom: AbdomenPhantom) -> np.ndarray:
    """Millilitres of each label."""
    return np.bincount(phantom.layout.ravel(), minlength=len(ORGANS)) * np.prod(np.diag(phantom.affine)[:3]) / 1000


def volume(phantom: AbdomenPhantom, organ: str) -> float:
    """Millilitres of an organ."""
    return float(volumes(phantom)[ORGANS.index(organ)])


def test_same_seed_same_phantom_other_seed_other_phantom() -> None:
    first, again, other = abdomen(3, SMALL), abdomen(3, SMALL), abdomen(4, SMALL)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.layout, again.layout)
    assert first.attributes == again.attributes
    assert (first.layout != other.layout).mean() > 0.02


def test_same_body_at_every_resolution() -> None:
    coarse, fine = abdomen(5, (30, 30, 32)), abdomen(5, (90, 90, 96))
    assert coarse.attributes == fine.attributes
    middle = fine.layout[1::3, 1::3, 1::3]  # the fine voxel at the centre of each coarse one
    assert (middle == coarse.layout).mean() > 0.99
    assert abs(np.median(fine.image[1::3, 1::3, 1::3][middle == 4]) - np.median(coarse.image[coarse.layout == 4])) < 12


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 40, 23), (64, 16, 32)])
def test_any_shape_covers_the_same_field(shape: tuple[int, ...]) -> None:
    phantom = abdomen(0, shape)
    assert phantom.image.shape == phantom.layout.shape == shape
    assert phantom.image.dtype == np.int16
    assert phantom.layout.dtype == np.uint8
    np.testing.assert_allclose(np.diag(phantom.affine)[:3] * shape, FIELD_OF_VIEW)


@pytest.mark.parametrize("shape", [(8, 32, 32), (32, 32)])
def test_shapes_it_cannot_hold_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 16"):
        abdomen(0, shape)


@pytest.mark.parametrize("seed", range(10))
def test_drawn_bodies_are_valid(seed: int) -> None:
    phantom = abdomen(seed, SMALL)
    said = {finding.what: finding.state for finding in phantom.attributes.findings}
    assert [f.what for f in phantom.attributes.findings].count("tumour") == 1
    assert phantom.image.min() >= -1024
    assert 300 < phantom.image.max() <= 3071
    for organ in ORGANS[1:]:
        absent = said.get(organ) == "absent" or (organ == "colorectal_cancer" and said["tumour"] == "absent")
        least = 0 if absent else 1 if organ == "colorectal_cancer" else 8
        count = int((phantom.layout == ORGANS.index(organ)).sum())
        assert (count == 0) if absent else (count >= least), (organ, count)
    for organ in SOLID:
        assert ndimage.label(phantom.layout == ORGANS.index(organ), np.ones((3, 3, 3)))[1] <= 1, organ
    body, parts = ndimage.label(phantom.layout > 0)
    assert parts == 1
    assert 0.3 < (body > 0).mean() < 0.7


def test_contrast_and_sides() -> None:
    phantom = abdomen(1, (72, 60, 72), NORMAL)
    means = {
        organ: np.median(phantom.image[phantom.layout == i])
        for i, organ in enumerate(ORGANS)
        if organ != "colorectal_cancer"
    }
    assert means["background"] < -900
    assert (
        means["urinary_bladder"] < 35 < means["pancreas"] < means["liver"] < means["kidney_left"] < means["vertebrae"]
    )
    x, y, z = ({organ: where(phantom, organ).mean(0)[axis] for organ in ORGANS[1:11]} for axis in range(3))
    assert x["liver"] > 20
    assert x["kidney_right"] > 40
    assert x["kidney_left"] < -40
    assert x["spleen"] < -60
    assert x["stomach"] < -10
    assert z["liver"] > z["pancreas"] > z["small_bowel"] > z["urinary_bladder"]
    assert z["kidney_left"] > z["kidney_right"]
    assert y["stomach"] > y["pancreas"] > y["kidney_left"]


@pytest.mark.parametrize(("organ", "state"), [(organ, state) for organ, states in STATES.items() for state in states])
def test_a_state_changes_its_organ_alone(organ: str, state: str) -> None:
    normal, changed = (
        abdomen(7, (36, 30, 36), Attributes((Finding(organ, name),), "male")) for name in ("present", state)
    )
    ratio = volume(changed, organ) / volume(normal, organ)
    low, high = {"absent": (0, 0), "small": (0.1, 0.7), "enlarged": (1.35, 5)}[state]
    assert low <= ratio <= high
    for other in set(ORGANS[1:11]) - {organ, "small_bowel", "colon"}:
        assert 0.6 < volume(changed, other) / volume(normal, other) < 1.5, other


def test_states_can_be_told_by_volume() -> None:
    seen: dict[str, list[tuple[str, float]]] = {organ: [] for organ in STATES}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        states = {organ: str(rng.choice(["present", *states])) for organ, states in STATES.items()}
        findings = tuple(Finding(organ, state) for organ, state in states.items())
        found = volumes(abdomen(seed, (36, 30, 36), Attributes(findings, str(rng.choice(["male", "female"])))))
        for organ, state in states.items():
            seen[organ].append((state, float(np.log(found[ORGANS.index(organ)] + 0.3))))
    right = 0
    for pairs in seen.values():
        usual = {state: np.median([v for s, v in pairs if s == state]) for state, _ in pairs}
        right += sum(min(usual, key=lambda s: abs(usual[s] - v)) == state for state, v in pairs)
    assert right >= 0.97 * 40 * len(STATES)


@pytest.mark.parametrize(("site", "size"), zip(SITES, (2.5, 5.0, 3.5, 6.0, 6.8, 4.2), strict=True))
def test_tumour_lies_at_its_site_in_its_size(site: str, size: float) -> None:
    shape, cancer = (80, 60, 80), ORGANS.index("colorectal_cancer")
    phantom = abdomen(11, shape, Attributes((Finding("tumour", "present", site, size),)))
    assert ndimage.label(phantom.layout == cancer)[1] == 1
    assert 0.78 * size < (6 / np.pi * volume(phantom, "colorectal_cancer")) ** (1 / 3) < 1.1 * size
    tumour = where(phantom, "colorectal_cancer")
    extent = tumour.max(0) - tumour.min(0) + np.diag(phantom.affine)[:3]
    assert 0.85 * size < extent.max() / 10 < 1.2 * size

    # The same body but for the tumour, which spares the other organs.
    without = abdomen(11, shape, Attributes())
    changed = phantom.layout != without.layout
    np.testing.assert_array_equal(changed, phantom.layout == cancer)
    assert {ORGANS[i] for i in np.unique(without.layout[changed])} <= {"colon", "small_bowel", "body"}
    assert (without.layout[changed] == ORGANS.index("colon")).any()


def test_sites_are_apart() -> None:
    assert set(COURSE) == set(SITES)
    centres = {}
    for site in SITES:
        said = Attributes((Finding("tumour", "present", site, 4.0),))
        centres[site] = np.array([where(abdomen(i, SMALL, said), "colorectal_cancer").mean(0) for i in range(3)])
    for site, points in centres.items():
        others = np.concatenate([centres[other] for other in SITES if other != site])
        own = np.linalg.norm(points - points.mean(0), axis=1)
        assert (np.linalg.norm(points[:, None] - others, axis=-1).min(1) > 15).all(), site
        means = {other: np.linalg.norm(points - centres[other].mean(0), axis=1) for other in SITES if other != site}
        assert all((own < distance).all() for distance in means.values()), site


def test_other_nouns_are_let_be_and_tumours_add_up() -> None:
    base = abdomen(2, SMALL, NORMAL)
    more = abdomen(
        2, SMALL, Attributes((*NORMAL.findings, Finding("gallstone"), Finding("liver", "cirrhotic")), "female")
    )
    np.testing.assert_array_equal(base.layout, more.layout)
    two = (Finding("tumour", "present", "rectum", 5.0), Finding("tumour", "present", "caecum", 5.0))
    both = abdomen(2, SMALL, Attributes(two, "female"))
    assert ndimage.label(both.layout == ORGANS.index("colorectal_cancer"))[1] == 2


def test_attributes_are_varied_and_never_without_kidneys() -> None:
    drawn = [draw_attributes(np.random.default_rng(seed)) for seed in range(800)]
    tumours = [f for a in drawn for f in a.findings if f.what == "tumour"]
    assert len(tumours) == 800
    present = [f for f in tumours if f.state == "present"]
    assert 0.8 < len(present) / 800 < 0.9
    assert {f.where for f in present} == set(SITES)
    assert all(2 <= f.size_cm <= 7 for f in present if f.size_cm is not None)
    for organ, states in STATES.items():
        share = sum(f.what == organ and f.state in states for a in drawn for f in a.findings) / 800
        assert 0.09 < share < 0.18, organ
    gone = {"kidney_right", "kidney_left"}
    assert not any(gone <= {f.what for f in a.findings if f.state == "absent"} for a in drawn)
    assert {a.sex for a in drawn} == {"male", "female"}
    assert all(a.age is not None and 30 <= a.age <= 88 for a in drawn)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("abdomen_*"))}


def test_small_cohort_is_a_prefix_and_grows_in_place(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    assert abdomen_cohort(large, 3, (24, 20, 16)) == str(large)
    abdomen_cohort(small, 2, (24, 20, 16))
    assert files(small).items() < files(large).items()
    assert len(files(large)) == 9
    (small / "SEG" / "abdomen_0001.nii.gz").unlink()
    abdomen_cohort(small, 3, (24, 20, 16))
    assert files(small) == files(large)
    assert json.loads((small / "phantoms.json").read_text())["num_cases"] == 3


def test_other_settings_are_never_mixed_in(tmp_path: Path) -> None:
    abdomen_cohort(tmp_path, 1, (24, 20, 16))
    before = files(tmp_path)
    for stamped in (True, False):
        if not stamped:
            (tmp_path / "phantoms.json").unlink()
        with pytest.raises(ValueError, match="delete"):
            abdomen_cohort(tmp_path, 2, (24, 20, 16), seed=1)
        with pytest.raises(ValueError, match="delete"):
            abdomen_cohort(tmp_path, 2, (16, 16, 16))
    assert files(tmp_path) == before


def test_files_hold_what_the_docstring_says(tmp_path: Path) -> None:
    abdomen_cohort(tmp_path, 16, (16, 16, 16))
    image, layout = (nib.load(tmp_path / kind / "abdomen_0003.nii.gz") for kind in ("CT", "SEG"))
    assert image.get_data_dtype() == np.int16
    assert layout.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(layout.affine) == ("R", "A", "S")
    number = int(np.random.SeedSequence([0, 3]).generate_state(1)[0])
    case = abdomen(number, (16, 16, 16))
    np.testing.assert_array_equal(np.asanyarray(layout.dataobj), case.layout)
    texts = [(tmp_path / "REPORT" / f"abdomen_{i:04d}.txt").read_text(encoding="utf-8") for i in range(16)]
    assert set(parse_report(texts[3]).findings) == set(case.attributes.findings)
    chinese = sum(not text.isascii() for text in texts)
    assert 0 < chinese < 10
