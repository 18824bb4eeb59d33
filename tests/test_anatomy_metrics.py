"""Laws of `common.anatomy_metrics`: measures do not depend on the grid, and what was asked is read off."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from common.abdomen_phantoms import abdomen
from common.anatomy_metrics import (
    KINDS,
    AttributeReader,
    accuracy_table,
    attribute_accuracy,
    coverage_agreement,
    measure_coverage,
    measure_organs,
    slice_jumps,
    volume_statistics_agreement,
)
from common.reports import Attributes, Finding
from common.totalsegmentator import ORGANS

AFFINE = np.diag([10.0, 10.0, 10.0, 1.0])  # a voxel is 1 ml
SITES = {"caecum": (0.75, 0.5, 0.3), "rectum": (0.5, 0.3, 0.1), "descending colon": (0.2, 0.4, 0.5)}


def box(labels: np.ndarray, organ: str, start: tuple, size: tuple) -> np.ndarray:
    """Paint a box of an organ."""
    labels[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = ORGANS.index(organ)
    return labels


@pytest.fixture
def labels() -> np.ndarray:
    """A body of 20 x 16 x 12 with a large right kidney, a small left one, a spleen in two pieces."""
    grid = box(np.zeros((24, 20, 16), np.uint8), "body", (2, 2, 2), (20, 16, 12))
    for organ, start, size in (
        ("kidney_right", (16, 4, 4), (4, 4, 4)),
        ("kidney_left", (4, 4, 4), (2, 2, 2)),
        ("spleen", (4, 4, 8), (3, 3, 3)),
        ("spleen", (10, 4, 8), (1, 1, 1)),
    ):
        box(grid, organ, start, size)
    return grid


# ---------------------------------------------------------------------------------------------------------- measuring


def test_organs_are_measured(labels):
    found = measure_organs(labels, AFFINE, ORGANS)
    assert list(found) == list(ORGANS[1:])
    kidney = found["kidney_right"]
    assert kidney["volume_ml"] == pytest.approx(64)
    assert kidney["components"] == 1
    assert kidney["largest_share"] == 1
    assert kidney["centre"] == pytest.approx([(18 - 2) / 20, (6 - 2) / 16, (6 - 2) / 12])
    assert found["spleen"]["components"] == 2
    assert found["spleen"]["largest_share"] == pytest.approx(27 / 28)
    assert found["spleen"]["largest_centre"] == pytest.approx([3.5 / 20, 3.5 / 16, 7.5 / 12])
    assert found["spleen"]["centre"] != pytest.approx(found["spleen"]["largest_centre"])


def test_an_absent_organ_has_no_place(labels):
    liver = measure_organs(labels, AFFINE, ORGANS)["liver"]
    assert (liver["volume_ml"], liver["components"], liver["diameter_cm"]) == (0, 0, 0)
    assert np.isnan([*liver["centre"], *liver["largest_centre"], liver["largest_share"]]).all()


def test_an_empty_map_is_measured():
    found = measure_organs(np.zeros((8, 8, 8), np.uint8), AFFINE, ORGANS)
    assert all(organ["volume_ml"] == 0 for organ in found.values())


def test_mirroring_swaps_sides(labels):
    def swapped(grid):
        right, left = grid == ORGANS.index("kidney_right"), grid == ORGANS.index("kidney_left")
        return np.where(right, ORGANS.index("kidney_left"), np.where(left, ORGANS.index("kidney_right"), grid))

    there = measure_organs(labels, AFFINE, ORGANS)
    here = measure_organs(swapped(labels[::-1]), AFFINE, ORGANS)
    for a, b in (("kidney_right", "kidney_left"), ("kidney_left", "kidney_right"), ("spleen", "spleen")):
        assert here[a]["volume_ml"] == there[b]["volume_ml"]
        assert here[a]["centre"][0] == pytest.approx(1 - there[b]["centre"][0])
        assert here[a]["centre"][1:] == pytest.approx(there[b]["centre"][1:])


def test_scaling_changes_volume_and_diameter_only(labels):
    small = measure_organs(labels, AFFINE, ORGANS)
    large = measure_organs(labels, np.diag([-20.0, 20.0, 20.0, 1.0]), ORGANS)
    finer = measure_organs(labels.repeat(2, 0).repeat(2, 1).repeat(2, 2), np.diag([5.0, 5.0, 5.0, 1.0]), ORGANS)
    for organ in ("spleen", "kidney_right", "body"):
        assert large[organ]["volume_ml"] == pytest.approx(8 * small[organ]["volume_ml"])
        assert large[organ]["diameter_cm"] == pytest.approx(2 * small[organ]["diameter_cm"])
        assert large[organ]["centre"] == small[organ]["centre"]
        for key in ("volume_ml", "diameter_cm", "centre", "components"):
            assert finer[organ][key] == pytest.approx(small[organ][key])


def test_a_ball_has_its_diameter():
    axis = np.arange(40) - 20
    inside = sum(np.meshgrid(axis**2, axis**2, axis**2)) <= 12**2
    found = measure_organs(np.where(inside, ORGANS.index("colorectal_cancer"), 0), np.diag([2, 2, 2, 1]), ORGANS)
    assert found["colorectal_cancer"]["diameter_cm"] == pytest.approx(4.8, rel=0.02)


def test_stray_voxels_do_not_move_the_body(labels):
    stray = labels.copy()
    stray[0, 0, 0] = stray[-1, -1, -1] = ORGANS.index("body")
    here, there = (measure_organs(grid, AFFINE, ORGANS)["kidney_left"] for grid in (stray, labels))
    assert here["centre"] == there["centre"]


def test_measuring_errors_teach(labels):
    with pytest.raises(ValueError, match=r"holds 13, 12 labels have names .*MapOrgansd"):
        measure_organs(labels, AFFINE, ORGANS[:12])
    with pytest.raises(ValueError, match=r"holds 1\.5"):
        measure_coverage(np.full((2, 2, 2), 1.5), ORGANS)
    with pytest.raises(ValueError, match=r"expected a label map \(X, Y, Z\)"):
        measure_organs(labels[None], AFFINE, ORGANS)


def test_coverage_sums_to_one_and_agrees_with_itself(labels):
    coverage = measure_coverage(labels, ORGANS)
    assert sum(coverage.values()) == pytest.approx(1)
    assert coverage["kidney_left"] == 8 / labels.size
    half = {**coverage, "kidney_left": 4 / labels.size, "liver": 0.01}
    agreement = coverage_agreement([coverage], [half])
    assert agreement == pytest.approx(coverage_agreement([half], [coverage]), nan_ok=True)
    assert (agreement["spleen"], agreement["kidney_left"], agreement["liver"]) == (1, 0.5, 0)
    assert math.isnan(agreement["colon"])


def test_jumps_see_seams_and_not_the_outside():
    layout = np.zeros((6, 6, 5), np.uint8)
    layout[1:5, 1:5] = ORGANS.index("body")
    volume = np.random.default_rng(0).normal(0, 500, layout.shape)
    volume[1:5, 1:5] = 40
    assert slice_jumps(volume, layout) == {"voxel": 0, "mean": 0}
    volume[1:5, 1:5] += 10 * np.arange(5)
    assert slice_jumps(volume, layout) == pytest.approx({"voxel": 10, "mean": 10})
    # A change of texture that leaves the brightness is no seam.
    volume[1:5, 1:5] = 40
    volume[1:5:2, 1:5, ::2] += 30
    volume[2:5:2, 1:5, ::2] -= 30
    assert slice_jumps(volume, layout) == pytest.approx({"voxel": 30, "mean": 0})
    assert np.isnan(list(slice_jumps(volume, 0 * layout).values())).all()
    with pytest.raises(ValueError, match="of one shape"):
        slice_jumps(volume, layout[..., 1:])


# ------------------------------------------------------------------------------------------------- reports, read off

USUAL = {"spleen": 200.0, "kidney_right": 150.0, "kidney_left": 150.0, "liver": 1500.0, "pancreas": 80.0}
FACTORS = {"present": 1.0, "small": 0.4, "enlarged": 2.2, "absent": 0.0}


def organ(volume: float, centre=(0.5, 0.5, 0.5)) -> dict:
    """As `measure_organs` says it of a ball."""
    return {
        "volume_ml": volume,
        "centre": list(centre),
        "components": int(volume > 0),
        "largest_share": 1.0,
        "largest_centre": list(centre),
        "diameter_cm": float(np.cbrt(6 * volume / np.pi)),
    }


def body(attributes: Attributes, rng: np.random.Generator) -> dict:
    """Measured organs of a case of which these attributes are true."""
    states = {finding.what: finding for finding in attributes.findings}
    measured = {
        name: organ(usual * FACTORS[states[name].state if name in states else "present"] * rng.uniform(0.9, 1.1))
        for name, usual in USUAL.items()
    }
    tumour = states.get("tumour")
    if tumour is None or tumour.state == "absent":
        return {**measured, "colorectal_cancer": organ(0)}
    centre = np.array(SITES[tumour.where]) + rng.normal(0, 0.02, 3)
    volume = np.pi / 6 * (tumour.size_cm / 1.25) ** 3  # what reports call the size is a little more
    return {**measured, "colorectal_cancer": organ(volume, centre)}


def draw(rng: np.random.Generator) -> Attributes:
    """Some findings of some organs, never of the pancreas."""
    findings = [Finding("tumour", "absent")]
    if rng.random() < 0.8:
        findings = [Finding("tumour", "present", str(rng.choice(list(SITES))), float(rng.uniform(2, 7)))]
    for name in list(USUAL)[:-1]:
        if rng.random() < 0.4:
            # Nobody has a small right kidney here.
            states = ["present", "absent", "enlarged", "small"][: 3 if name == "kidney_right" else 4]
            findings.append(Finding(name, str(rng.choice(states))))
    return Attributes(tuple(findings))


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    """Fitted to 80 drawn bodies."""
    rng = np.random.default_rng(0)
    attributes = [draw(rng) for _ in range(80)]
    return AttributeReader().fit([body(a, rng) for a in attributes], attributes)


def judged(reader: AttributeReader, asked: Attributes, true: Attributes) -> dict[str, bool | None]:
    """Attribute -> whether it came out, in a body of which others are true."""
    rows = attribute_accuracy(asked, reader, body(true, np.random.default_rng(1)))
    assert {row["kind"] for row in rows} <= set(KINDS)
    return {row["attribute"]: row["right"] for row in rows}


def test_what_is_true_is_read(reader):
    rng = np.random.default_rng(1)
    cases = [draw(rng) for _ in range(60)]
    rows = [row for case in cases for row in attribute_accuracy(case, reader, body(case, rng))]
    table = accuracy_table(rows)
    assert table["overall"]["accuracy"] == 1
    assert table["overall"]["judged"] == len(rows) == sum(table[kind]["judged"] for kind in KINDS)
    assert table["overall"]["judged"] - table["normal"]["judged"] == table["unusual"]["judged"]
    shuffled = [row for a, b in pairwise(cases) for row in attribute_accuracy(a, reader, body(b, rng))]
    assert accuracy_table(shuffled)["unusual"]["accuracy"] < 0.5


@pytest.mark.parametrize("state", ["present", "absent", "small", "enlarged"])
def test_states_are_told_apart(reader, state):
    true = Attributes((Finding("spleen", state), Finding("tumour", "absent")))
    for other in ("present", "absent", "small", "enlarged"):
        asked = Attributes((Finding("spleen", other),))
        assert judged(reader, asked, true) == {f"spleen {other}": other == state}


def test_a_size_that_others_have_is_known(reader):
    small = Attributes((Finding("kidney_right", "small"),))
    assert judged(reader, small, small) == {"kidney_right small": True}
    # But not of an organ that never differs.
    small = Attributes((Finding("pancreas", "small"), Finding("ascites", "present")))
    assert judged(reader, small, Attributes()) == {"pancreas small": None, "ascites present": None}
    assert judged(reader, Attributes((Finding("pancreas"),)), Attributes()) == {"pancreas present": True}


def test_a_kidney_of_the_wrong_side_is_wrong(reader):
    left, right = (Attributes((Finding(f"kidney_{side}", "absent"),)) for side in ("left", "right"))
    both = Attributes(left.findings + right.findings)
    assert judged(reader, left, left) == {"kidney_left absent": True}
    for true in (right, both, Attributes()):
        assert judged(reader, left, true) == {"kidney_left absent": False}
    assert judged(reader, both, both) == {"kidney_left absent": True, "kidney_right absent": True}
    assert attribute_accuracy(left, reader, body(left, np.random.default_rng(0)))[0]["kind"] == "side"


def test_site_and_size_of_a_tumour(reader):
    asked = Attributes((Finding("tumour", "present", "rectum", 4.0),))
    names = ["tumour present", "tumour in rectum", "tumour 4 cm"]
    for true, right in (
        (Finding("tumour", "present", "rectum", 4.9), [True, True, True]),
        (Finding("tumour", "present", "caecum", 4.0), [True, False, True]),
        (Finding("tumour", "present", "rectum", 6.0), [True, True, False]),
        (Finding("tumour", "absent"), [False, False, False]),
    ):
        assert judged(reader, asked, Attributes((true,))) == dict(zip(names, right, strict=True))
    none = Attributes((Finding("tumour", "absent"),))
    assert judged(reader, none, none) == {"tumour absent": True}
    assert judged(reader, none, asked) == {"tumour absent": False}
    # Whoever asks for no size or a site that no report names gets none judged.
    vague = Attributes((Finding("tumour", "present", "near the bladder"),))
    assert judged(reader, vague, asked) == {"tumour present": True, "tumour in near the bladder": None}


def test_reading_a_report_gives_its_attributes(reader):
    asked = Attributes((Finding("spleen", "enlarged"), Finding("tumour", "present", "caecum", 5.0)))
    read = {finding.what: finding for finding in reader.read(body(asked, np.random.default_rng(3))).findings}
    assert set(read) == {*USUAL, "tumour"}
    assert read["spleen"].state == "enlarged"
    assert read["liver"].state == "present"
    assert read["tumour"].where == "caecum"
    assert read["tumour"].size_cm == pytest.approx(5, abs=0.2)


def test_a_reader_needs_reports(reader):
    with pytest.raises(ValueError, match="as many reports as measured cases, got 0 and 1"):
        AttributeReader().fit([body(Attributes(), np.random.default_rng(0))], [])
    # A cohort without tumours teaches nothing of them.
    case = body(Attributes(), np.random.default_rng(0))
    blind = AttributeReader().fit([case], [Attributes()])
    asked = Attributes((Finding("tumour", "present", "rectum", 4.0),))
    assert [row["right"] for row in attribute_accuracy(asked, blind, case)] == [None]
    assert math.isnan(accuracy_table([])["overall"]["accuracy"])


def test_reports_are_read_off_phantoms():
    """On bodies of known attributes the reader itself hardly errs, so that an error is the generator's."""
    cases = [abdomen(seed, (32, 32, 32)) for seed in range(60)]
    measured = [measure_organs(case.layout, case.affine, ORGANS) for case in cases]
    reader = AttributeReader().fit(measured[:40], [case.attributes for case in cases[:40]])
    rows = [
        row
        for case, organs in zip(cases[40:], measured[40:], strict=True)
        for row in attribute_accuracy(case.attributes, reader, organs)
    ]
    table = accuracy_table(rows)
    assert table["overall"]["accuracy"] >= 0.95
    assert table["unusual"]["accuracy"] >= 0.95
    assert table["overall"]["not_judged"] == 0


# ------------------------------------------------------------------------------------------------------ two cohorts


def cohort(seed: int, n: int = 40, factor: float = 1.0, shift: float = 0.0, lost: int = 0) -> list[dict]:
    """Measured cases with one organ, of which the first few are without."""
    rng = np.random.default_rng(seed)
    volumes = 100 * factor * np.exp(rng.normal(0, 0.2, n)) * (np.arange(n) >= lost)
    return [{"spleen": organ(v, rng.normal(0.5 + shift, 0.05, 3)), "liver": organ(0)} for v in volumes]


def test_equal_cohorts_agree_and_distance_grows():
    same = volume_statistics_agreement(cohort(0), cohort(0))
    assert same["spleen"] == pytest.approx(
        dict(occurrence_real=1, occurrence_synthetic=1, volume_ratio=1, volume_distance=0, centre_distance=0)
    )
    assert math.isnan(same["liver"]["volume_ratio"])
    assert same["liver"]["occurrence_real"] == 0
    another = volume_statistics_agreement(cohort(0), cohort(1))["spleen"]
    assert another["volume_distance"] < 0.5
    assert another["centre_distance"] < 0.5
    wrong = volume_statistics_agreement(cohort(0), cohort(0, factor=2, shift=0.1, lost=10))["spleen"]
    assert wrong["occurrence_synthetic"] == 0.75
    assert wrong["volume_ratio"] == pytest.approx(2, rel=0.1)
    assert wrong["volume_distance"] == pytest.approx(np.log(2) / 0.2, rel=0.3)
    assert wrong["centre_distance"] == pytest.approx(0.1 / 0.05, rel=0.3)
    with pytest.raises(ValueError, match="0 real and 40 synthetic"):
        volume_statistics_agreement([], cohort(0))
