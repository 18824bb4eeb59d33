"""Statistics of masks: draws are like the masks they were fitted to, by thresholds that can fail; files and wishes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.spatial.distance import cdist

from common.io import CaseError, case_seed
from common.mask_statistics import (
    GaussianProcessKDE,
    ShrunkKDE,
    Statistics,
    fit_statistics,
    list_requests,
    load_statistics,
    report,
    save_statistics,
)
from common.semantics import Lesion, conditions, measure

MASKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "cmdm_masks"
SEEDS = (0, 1, 2)
SMALLEST = 25 / 128**2
CLASSES = [1, 2, 3]
Masks = list[list[Lesion]]


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Drawing. Thresholds are those of the specification, on 2000 draws; each must hold for every seed.

LIMITS = {
    "KS of size": 0.08,
    "KS of x": 0.08,
    "KS of y": 0.08,
    "size sd": (0.85, 1.20),
    "95 % size": (0.75, 1.25),
    "Spearman": 0.10,
    "size to centre": 0.10,
    "counts": 0.03,
}


def table(masks: Masks) -> np.ndarray:
    return np.array([(a.size, a.x, a.y) for mask in masks for a in mask])


def centrality(rows: np.ndarray) -> float:
    return float(stats.spearmanr(rows[:, 0], np.hypot(rows[:, 1] - 0.5, rows[:, 2] - 0.5)).statistic)


def compare(real: Masks, drawn: Masks) -> dict[str, float]:
    """What `LIMITS` bounds."""
    a, b = table(real), table(drawn)
    counts = [Counter(map(len, masks)) for masks in (real, drawn)]
    shares = [[count[n] / len(masks) for n in range(9)] for count, masks in zip(counts, (real, drawn))]
    ks = [float(stats.ks_2samp(a[:, i], b[:, i]).statistic) for i in range(3)]
    spearman = stats.spearmanr(a).statistic - stats.spearmanr(b).statistic
    values = [*ks, b[:, 0].std() / a[:, 0].std(), np.quantile(b[:, 0], 0.95) / np.quantile(a[:, 0], 0.95)]
    values += [abs(spearman).max(), abs(centrality(a) - centrality(b)), abs(np.diff(shares, axis=0)).sum() / 2]
    return dict(zip(LIMITS, map(float, values), strict=True))


def missed(real: Masks, drawn: Masks) -> dict[str, float]:
    """The thresholds that the draws do not keep."""
    ranges = {name: limit if isinstance(limit, tuple) else (0, limit) for name, limit in LIMITS.items()}
    found = compare(real, drawn)
    return {name: found[name] for name, (low, high) in ranges.items() if not low <= found[name] <= high}


def assert_lawful(masks: Masks, smallest: float = SMALLEST, spacing: float = 0.85) -> None:
    for mask in masks:
        assert all(a.size >= smallest and 0 <= a.x <= 1 and 0 <= a.y <= 1 for a in mask)
        for label in {a.label for a in mask}:
            kind = [a for a in mask if a.label == label]
            assert sum(a.size for a in kind) < 0.9
            for i, a in enumerate(kind):
                for b in kind[:i]:
                    radii = np.sqrt(a.size / np.pi) + np.sqrt(b.size / np.pi)
                    assert np.hypot(a.x - b.x, a.y - b.y) >= spacing * radii


def procedural(n: int = 200, slope: float = 0.0, seed: int = 7) -> Masks:
    """Masks of 1 to 3 lesions: fewer are larger, central ones are larger; ``slope`` lets size grow with x."""
    rng, masks = random(seed), []
    while len(masks) < n:
        count = int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))
        x, y = rng.beta(4, 3, count), rng.beta(3, 3, count)
        away = np.hypot(x - 0.5, y - 0.5)
        size = 0.12 / count * np.exp(-1.5 * away + slope * (x - 0.55) + 0.5 * rng.standard_normal(count))
        mask = [Lesion(*map(float, row)) for row in zip(size.clip(SMALLEST, 0.6), x, y)]
        try:
            assert_lawful([mask])
        except AssertionError:
            continue
        masks.append(sorted(mask, key=lambda a: -a.size))
    return masks


@cache
def released(name: str, labels: tuple[int, ...]) -> Masks:
    """Measured masks of the data set, 128 pixels, components from 25."""
    files = sorted((MASKS / name).glob("*.png"))
    if not files:
        pytest.skip(f"masks absent: {MASKS / name}")
    images = (np.asarray(Image.open(file)) for file in files)
    if labels == (1,):
        return [measure(image[None] > 127, labels, 25) for image in images]
    return [measure(np.stack([image == k for k in labels]), labels, 25) for image in images]


@cache
def real(name: str) -> Masks:
    return procedural() if name == "procedural" else released(name, (1,))


@cache
def fitted(name: str, model: type[Statistics] = ShrunkKDE) -> Statistics:
    return model(min_size=SMALLEST).fit(real(name))


@pytest.mark.parametrize("name", ["procedural", "polyp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_like_the_masks(name, seed):
    drawn = fitted(name).draw(2000, random(seed))
    assert missed(real(name), drawn) == {}
    assert_lawful(drawn)


@pytest.mark.parametrize("name", ["procedural", "polyp"])
def test_draws_are_better_than_those_of_the_published_model(name):
    ours = compare(real(name), fitted(name).draw(2000, random()))
    theirs = fitted(name, GaussianProcessKDE).draw(2000, random())
    assert_lawful(theirs)
    theirs = compare(real(name), theirs)
    assert ours["KS of size"] < theirs["KS of size"]
    assert abs(ours["size sd"] - 1) < abs(theirs["size sd"] - 1)


@pytest.mark.parametrize("name", ["procedural", "polyp"])
def test_the_thresholds_can_fail(name):
    drawn = fitted(name).draw(2000, random())
    sizes = iter(random(1).permutation(table(drawn)[:, 0]).tolist())
    shuffled = [[replace(a, size=next(sizes)) for a in mask] for mask in drawn]
    assert "size to centre" in missed(real(name), shuffled)
    halved = [[replace(a, size=a.size / 2) for a in mask] for mask in drawn]
    assert {"KS of size", "size sd", "95 % size"} <= set(missed(real(name), halved))
    alone = fitted(name).draw(2000, random(), count=1)
    assert "counts" in missed(real(name), alone)


def test_correlation_of_size_and_place_is_kept():
    strong = procedural(slope=6.0)
    spearman = stats.spearmanr(table(strong)).statistic[0, 1]
    assert spearman == pytest.approx(0.8, abs=0.08)
    assert missed(strong, ShrunkKDE(min_size=SMALLEST).fit(strong).draw(2000, random())) == {}
    assert "Spearman" in missed(strong, fitted("procedural").draw(2000, random()))


def energy(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean())


@pytest.mark.parametrize("name", ["procedural", "polyp"])
def test_draws_are_as_near_to_other_masks_as_masks_are(name):
    """Energy distance, averaged over splits because each half is small."""
    masks, scale = real(name), table(real(name)).std(axis=0)
    between, drawn = [], []
    for seed in range(4):
        order = random(seed).permutation(len(masks))
        one, other = ([masks[i] for i in half] for half in np.array_split(order, 2))
        draws = ShrunkKDE(min_size=SMALLEST).fit(one).draw(1000, random(seed))
        between.append(energy(table(one) / scale, table(other) / scale))
        drawn.append(energy(table(draws) / scale, table(other) / scale))
    assert np.mean(drawn) <= 2 * np.mean(between)


def nested(n: int = 150) -> Masks:
    """A wall (2) around a cavity (1), an atrium (3) below: one anatomy, moved and scaled as a whole."""
    rng, masks = random(5), []
    for _ in range(n):
        scale, x, y = rng.lognormal(0, 0.3), *rng.normal(0.5, 0.06, 2)
        shares = np.array([0.06, 0.10, 0.04]) * scale * rng.lognormal(0, 0.08, 3)
        places = [(x, y), (x, y - 0.03), (x + 0.02, min(0.97, y + 0.3))] + rng.normal(0, 0.01, (3, 2))
        masks.append([Lesion(float(s), *map(float, xy), label=k) for s, xy, k in zip(shares, places, CLASSES)])
    return masks


def of_classes(masks: Masks) -> np.ndarray:
    return np.concatenate([conditions(mask, CLASSES, null=np.nan) for mask in masks])


@pytest.mark.parametrize("name", ["nested", "camus"])
def test_classes_keep_their_anatomy(name):
    masks = nested() if name == "nested" else released(name, tuple(CLASSES))
    model = ShrunkKDE(min_size=SMALLEST).fit(masks, CLASSES)
    drawn = model.draw(2000, random())
    assert_lawful(drawn)
    a, b = (stats.spearmanr(of_classes(m), nan_policy="omit").statistic for m in (masks, drawn))
    assert abs(a).max() > 0.5, "there is something to keep"
    assert abs(a - b).max() <= 0.10
    offsets = [(of_classes(m)[:, 3:5] - of_classes(m)[:, 5:7]).std(axis=0) for m in (masks, drawn)]
    assert (offsets[1] < 1.2 * offsets[0]).all(), "the wall stays around the cavity"
    with pytest.raises(CaseError, match=r"count 5 was never seen .* expected one of 3"):
        model.draw(1, random(), count=5)


def test_missing_classes_follow_the_given_ones():
    model = ShrunkKDE(min_size=SMALLEST).fit(nested(), CLASSES)
    for x in (0.4, 0.6):
        given = Lesion(0.06, x, 0.5)
        masks = [model.complete([given], 3, random(seed)) for seed in range(20)]
        assert all(mask[0] == given for mask in masks)
        assert of_classes(masks)[:, 5].mean() == pytest.approx(x, abs=0.02)
    assert model.complete(masks[0], 3, random()) == masks[0]
    with pytest.raises(CaseError, match="never seen"):
        model.complete([given, replace(given, x=0.1)], 3, random())


@pytest.mark.parametrize("model", [ShrunkKDE, GaussianProcessKDE])
def test_seeds_decide(model):
    fit = fitted("procedural", model)
    assert fit.draw(20, random(3)) == fit.draw(20, random(3))
    assert fit.draw(20, random(3)) != fit.draw(20, random(4))


@pytest.mark.parametrize("count", range(1, 9))
def test_any_count_can_be_drawn(count):
    for name in (ShrunkKDE, GaussianProcessKDE):
        masks = fitted("procedural", name).draw(5, random(), count)
        assert {len(mask) for mask in masks} == {count}
        assert_lawful(masks)


def test_draws_end_with_reasons():
    big = ShrunkKDE().fit([[Lesion(0.1, 0.1 + 0.01 * i, 0.5)] for i in range(80)])
    with pytest.raises(CaseError, match=r"count 500: no valid mask of .* in 200 tries .*closer than spacing"):
        big.draw(1, random(), count=500)
    with pytest.raises(CaseError, match=r"200 smaller than min_size 0.5"):
        ShrunkKDE(min_size=0.5).fit(big.masks).draw(1, random())
    with pytest.raises(CaseError, match=r"200 filling max_fill 0.05"):
        ShrunkKDE(max_fill=0.05).fit(big.masks).draw(1, random())
    for count in (0, -1, 2.5):
        with pytest.raises(CaseError, match="a mask has 1 lesion or more"):
            big.draw(1, random(), count=count)
    with pytest.raises(ValueError, match="0 <= min_size < max_fill"):
        ShrunkKDE(max_fill=2)


def test_completed_masks_hold_what_was_given():
    given = [Lesion(0.05, 0.2, 0.2), Lesion(0.2, 0.7, 0.7)]
    mask = fitted("procedural").complete(given, 4, random())
    assert mask[:2] == given
    assert len(mask) == 4
    assert_lawful([mask])
    assert fitted("procedural").complete(given, 2, random()) == given
    with pytest.raises(CaseError, match="2 are given"):
        fitted("procedural").complete(given, 1, random())


def test_few_or_equal_masks_repeat(caplog):
    one = [Lesion(0.1, 0.3, 0.4), Lesion(0.05, 0.8, 0.8)]
    for masks in ([one], [one] * 3, [[one[0]]]):
        drawn = ShrunkKDE().fit(masks).draw(5, random())
        np.testing.assert_allclose(table(drawn), table([masks[0]] * 5), rtol=1e-9)
    assert caplog.text.count("the spread cannot be known, every draw repeats it") == 3
    other = [Lesion(0.12, 0.5, 0.5)]
    for masks in ([one, other], [one, other, [one[0]]]):
        model = ShrunkKDE().fit([[], *masks, []])
        assert_lawful(model.draw(50, random()))
        assert report(model)["empty"] == 2
    with pytest.raises(CaseError, match="needs 3 or more lesions"):
        GaussianProcessKDE().fit([other])
    with pytest.raises(CaseError, match="all 2 masks are empty"):
        ShrunkKDE().fit([[], []])
    edge = ShrunkKDE().fit([[Lesion(0.1, 0.0, 1.0)], [Lesion(0.2, 0.1, 0.9)]])
    assert_lawful(edge.draw(50, random()))


def test_a_label_that_some_masks_lack():
    masks = [mask if i % 3 else mask[:2] for i, mask in enumerate(nested())]
    drawn = ShrunkKDE().fit(masks, CLASSES).draw(600, random())
    assert sum(len(mask) == 2 for mask in drawn) / 600 == pytest.approx(1 / 3, abs=0.06)
    assert {a.label for mask in drawn if len(mask) == 2 for a in mask} == {1, 2}


# Keeping.


@pytest.mark.parametrize("model", [ShrunkKDE, GaussianProcessKDE])
def test_files_hold_the_whole_model(model, tmp_path):
    fit = model(min_size=0.002, spacing=1.1).fit([*procedural(40), []])
    save_statistics(fit, tmp_path / "fit.json")
    again = load_statistics(tmp_path / "fit.json")
    assert again == fit
    assert again.masks == fit.masks
    assert again.draw(10, random()) == fit.draw(10, random())
    save_statistics(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "fit.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "size,x,y\n", "give rows by --dataset_dir"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "[]", "holds no semantic statistics"),
        ("a.json", '{"kind": "layout"}', "holds no semantic statistics"),
        ("a.json", '{"kind": "semantic statistics", "model": "Oracle"}', "is damaged .KeyError: 'Oracle'"),
        ("a.json", None, "cannot read .* train.json writes it; or give --dataset_dir"),
    ],
)
def test_other_files_are_no_statistics(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CaseError, match=message):
        load_statistics(tmp_path / name)


@pytest.mark.parametrize("labels", [[1], [*CLASSES, 9]])
def test_fit_leaves_a_file_and_a_picture(labels, tmp_path):
    masks = procedural(30) if labels == [1] else nested(30)
    model = fit_statistics(masks, ShrunkKDE(), labels, tmp_path / "deep" / "fit.json")
    content = json.loads((tmp_path / "deep" / "fit.json").read_text())
    assert content["report"] == report(model)
    assert Image.open(tmp_path / "deep" / "fit.png").size == (1200, 750)


def test_report_says_what_the_masks_are_like():
    rows = table(real("procedural"))
    found = report(fitted("procedural"))
    assert sum(found["counts"].values()) == found["masks"] == 200
    assert found["percentiles"]["size"]["50"] == pytest.approx(np.median(rows[:, 0]), abs=1e-6)
    np.testing.assert_allclose(found["pearson"], np.corrcoef(rows.T), atol=1e-4)
    np.testing.assert_allclose(found["spearman"], stats.spearmanr(rows).statistic, atol=1e-4)
    assert found["spearman_size_to_centre"] == [pytest.approx(centrality(rows), abs=1e-4)]
    single = report(ShrunkKDE().fit([[Lesion(0.1, 0.5, 0.5)]]))
    assert single["pearson"] == [[None] * 3] * 3
    assert report(ShrunkKDE().fit(nested(9), CLASSES))["counts"] == {"1+1+1": 9}
    assert "size_9" not in report(ShrunkKDE().fit(nested(9), [*CLASSES, 9]))["percentiles"]


# Asking.


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "fit.json"
    save_statistics(fitted("procedural"), path)
    return path


def written(folder: Path, content: object) -> Path:
    """Requests as a file: text is a table, the rest JSON."""
    path = folder / ("ask.csv" if isinstance(content, str) else "ask.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_drawn_masks_do_not_depend_on_how_many(statistics):
    cases = list_requests(statistics, num_samples=12, seed=3)
    assert list_requests(statistics, num_samples=5, seed=3) == cases[:5]
    assert list_requests(statistics, num_samples=5, seed=4) != cases[:5]
    assert [case["name"] for case in cases[:2]] == ["mask_0000", "mask_0001"]
    assert cases[1]["seed"] == case_seed(3, "mask_0001")
    assert json.loads(json.dumps(cases)) == cases
    assert cases[0]["lesions"] != cases[1]["lesions"]
    counted = list_requests(statistics, num_samples=3, count=5)
    assert [len(case["lesions"]) for case in counted] == [5, 5, 5]
    with pytest.raises(CaseError, match="no valid mask"):
        list_requests(statistics, num_samples=3, count=5000)
    with pytest.raises(CaseError, match=r"fitted to labels \[1\], expected \[1, 2\]"):
        list_requests(statistics, labels=[1, 2])


ROW = {"size": 0.1, "x": 0.25, "y": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        "size,x,y\n0.1,0.25,0.5\n0.2,0.7,0.7\n",
        "\ufeffX, Y ,SIZE\r\n0.25, 0.5 ,0.1\r\n\r\n0.7,0.7,0.2\r\n",
        [ROW, {"size": 0.2, "x": 0.7, "y": 0.7}],
        {"masks": [{"lesions": [ROW]}, {"lesions": [{"size": 0.2, "x": 0.7, "y": 0.7, "label": 1}]}]},
    ],
)
def test_requests_need_no_statistics(content, tmp_path):
    cases = list_requests(tmp_path / "absent.json", written(tmp_path, content), num_samples=7)
    assert [case["name"] for case in cases] == ["mask_0000", "mask_0001"]
    assert [case["lesions"] for case in cases] == [
        [{**ROW, "label": 1}],
        [{"size": 0.2, "x": 0.7, "y": 0.7, "label": 1}],
    ]


@pytest.mark.parametrize(
    "content",
    [
        "size,x,y,mask\n0.1,0.25,0.5,a\n0.3,0.5,0.5,\n0.05,0.8,0.5,a\n",
        {"masks": [{"name": "a", "lesions": [ROW, {"size": 0.05, "x": 0.8, "y": 0.5}]}, {"lesions": [ROW]}]},
        [{"name": "a", "lesions": [ROW, {"size": 0.05, "x": 0.8, "y": 0.5}]}, {"lesions": [ROW]}],
    ],
)
def test_rows_of_one_mask(content, tmp_path):
    cases = list_requests(tmp_path / "absent.json", written(tmp_path, content))
    assert [(case["name"], len(case["lesions"])) for case in cases] == [("a", 2), ("mask_0001", 1)]


def test_labels_of_requests(tmp_path):
    path = written(tmp_path, "size,x,y,label,mask\n0.1,0.2,0.3,2,a\n0.1,0.2,0.3,4,b\n0.1,0.2,0.3,,c\n")
    a, b, c = list_requests("absent.json", path, labels=[1, 2])
    assert a["lesions"][0]["label"] == 2
    assert "row 3: label 4 is unknown, expected one of [1, 2]" in b["error"]
    assert "row 4: label is missing" in c["error"]


def test_missing_lesions_are_drawn(statistics, tmp_path):
    path = written(tmp_path, "size,x,y,count\n0.1,0.25,0.5,3\n0.1,0.25,0.5,\n")
    cases = list_requests(statistics, path)
    assert [len(case["lesions"]) for case in cases] == [3, 1]
    assert all(case["lesions"][0] == {**ROW, "label": 1} for case in cases)
    assert [len(case["lesions"]) for case in list_requests(statistics, path, count=2)] == [3, 2]
    assert list_requests(statistics, path) == cases
    without = list_requests(tmp_path / "absent.json", path)
    assert "cannot read" in without[0]["error"]
    assert "error" not in without[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1529,0.5,0.5,,", "row 3: size 1529 .* divide pixels by width"),
        ("0.1,86,0.5,,", "row 3: x 86 .* divide pixels"),
        ("0.1,0.5,-0.5,,", "row 3: y -0.5 is not in"),
        ("-0.1,0.5,0.5,,", "row 3: size -0.1"),
        ("0,0.5,0.5,,", "row 3: size 0 "),
        ("nan,0.5,0.5,,", "row 3: size nan"),
        ("0.1,inf,0.5,,", "row 3: x inf"),
        ("small,0.5,0.5,,", "row 3: size 'small' is not a number"),
        ("0.1,,0.5,,", "row 3: x is missing"),
        ("0.1", "row 3: x is missing"),
        ("0.1,0.5,0.5,,,9", "row 3: it has more values than the header"),
        ("0.1,0.5,0.5,2.5,", "row 3: count 2.5: expected one whole number"),
        ("0.1,0.5,0.5,0,", "row 3: count 0: expected one whole number, at least the 1"),
        ("0.1,0.5,0.5,many,", "row 3: count 'many' is not a number"),
        ("0.1,0.5,0.5,900,", "count 900: no valid mask"),
        ("0.1,0.5,0.5,,../up", "row 3: name '../up' .* cannot name a file"),
        ("0.1,0.5,0.5,,.hidden", "row 3: name '.hidden'"),
        ("0.1,0.5,0.5,,mask_0000", "row 3: name 'mask_0000' is taken"),
    ],
)
def test_a_bad_request_is_named_and_the_others_go_on(row, message, statistics, tmp_path):
    path = written(tmp_path, f"size,x,y,count,mask\n0.1,0.5,0.5,,\n{row}\n0.1,0.5,0.5,,last\n")
    good, bad, last = list_requests(statistics, path)
    assert "error" not in good
    assert "error" not in last
    assert last["name"] == "last"
    with pytest.raises(ValueError, match=message):
        raise ValueError(bad["error"])
    assert "\n" not in bad["error"]
    assert Path(bad["name"]).name == bad["name"]


def test_bad_entries_of_json(tmp_path):
    masks = {"masks": [{"name": "a", "lesions": [ROW]}, {"name": "a", "lesions": [ROW]}, {"lesions": 3}, 7]}
    cases = list_requests("absent.json", written(tmp_path, masks))
    assert ["error" in case for case in cases] == [False, True, True, True]
    assert "row 2: name 'a' is taken" in cases[1]["error"]
    assert "row 3: size is missing" in cases[2]["error"]
    cases = list_requests("absent.json", written(tmp_path, [5, {**ROW, "x": True}, {**ROW, "x": [1]}, ROW]))
    assert ["error" in case for case in cases] == [True, True, True, False]
    two = written(tmp_path, [{**ROW, "mask": "a", "count": 2}, {**ROW, "mask": "a", "count": 3}])
    assert "count 2 and 3: expected one" in list_requests("absent.json", two)[0]["error"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "header of an empty file: expected a table"),
        ("size,x,y\n", "asks for no mask"),
        ("area,x,y\n1,2,3\n", "header area,x,y: expected a table with the header size,x,y"),
        ("size;x;y\n0.1;0.5;0.5\n", "header size;x;y"),
        ([], "asks for no mask"),
        ({"masks": []}, "asks for no mask"),
        ({"kind": "semantic statistics"}, "asks for no mask"),
        (3, "asks for no mask"),
    ],
)
def test_a_file_without_requests_is_refused(content, message, tmp_path):
    with pytest.raises(CaseError, match=message):
        list_requests("absent.json", written(tmp_path, content))


def test_unreadable_requests(tmp_path):
    with pytest.raises(CaseError, match=r"cannot read .*absent\.csv"):
        list_requests("absent.json", tmp_path / "absent.csv")
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00size")
    with pytest.raises(CaseError, match="is not a text table"):
        list_requests("absent.json", tmp_path / "bad.csv")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CaseError, match="not valid JSON"):
        list_requests("absent.json", tmp_path / "bad.json")
