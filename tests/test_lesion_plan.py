"""Plans of lesions: what a case came with decides which stages are left, boxes lie where reports say."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.codebook import CodebookAutoencoder, CodeSpace
from common.io import CaseError
from common.lesion_geometry import to_unit
from common.lesion_plan import Lesion, LesionCropd, MaskStated, PaintStated, PlanLesionsd, SplitLesiond, on_latents
from common.lesion_reports import RuleReportWriter
from common.text import PhraseEncoder

LIVER, LEFT_KIDNEY, BLADDER = 5, 3, 104
WITHIN = "within the parenchymal organ"
AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre)) <= radius**2


def scan(label: bool = False, affine: np.ndarray = AFFINE) -> dict[str, Any]:
    """A case on a grid of 3 mm, R A S: liver on the patient's right, a kidney on the left, the bladder below."""
    shape = (48, 40, 44)
    organs = np.zeros(shape, dtype=np.int16)
    organs[ball(shape, (34, 22, 28), 11)] = LIVER
    organs[ball(shape, (12, 14, 26), 6)] = LEFT_KIDNEY
    organs[ball(shape, (24, 24, 7), 6)] = BLADDER
    image = np.full(shape, -900, dtype=np.int16)
    image[ball(shape, (24, 20, 22), 24)] = -80
    image[organs > 0] = 60
    image[0, 0, 0] = 3000
    data: dict[str, Any] = {"name": "a", "seed": 3, "source": "{}"}
    for key, volume in {"image": image, "organs": organs}.items():
        data[key] = MetaTensor(torch.from_numpy(volume)[None].float(), affine=torch.from_numpy(affine))
    if label:
        values = (organs == LIVER).astype(np.uint8)
        values[ball(shape, (34, 22, 33), 4)] = values[ball(shape, (34, 22, 22), 3)] = 2
        data["label"] = MetaTensor(torch.from_numpy(values)[None].float(), affine=torch.from_numpy(affine))
    return data


def planner(**kwargs: Any) -> PlanLesionsd:
    return PlanLesionsd(RuleReportWriter(), **{"spacing": (3, 3, 3), "size": (32, 32, 32), **kwargs})


def lesions(data: Mapping[str, Any]) -> list[Lesion]:
    return [Lesion.of(content) for content in json.loads(data["plan"])["lesions"]]


def inside(lesion: Lesion, organ: int, data: Mapping[str, Any]) -> float:
    """Share of a lesion's box that lies in an organ; the working grid is S, A, L, the scan R, A, S."""
    organs = np.asarray(data["organs"][0] == organ).transpose(2, 1, 0)[:, :, ::-1]
    return float(organs[lesion.box.slices].mean())


def test_what_is_asked_for_is_planned_and_the_rest_is_drawn() -> None:
    data = scan()
    before = data["image"].clone()
    wish = {"organ": "liver", "attributes": {"density": "hypodense lesion", "cavity": WITHIN}, "size_mm": [18, 21, 24]}
    planned = planner(wish=wish)(data)
    (lesion,) = lesions(planned)
    assert lesion.report.organ == "liver"
    assert lesion.report.attributes["density"] == "hypodense lesion"
    assert {"shape", "surface characteristics", "CT value"} <= set(lesion.report.attributes)
    assert lesion.box.size == (8, 7, 6), "S, A, L of 18 x 21 x 24 mm (L-R, A-P, S-I)"
    assert inside(lesion, LIVER, data) == 1
    assert planned["image"].shape == (3, *before.shape[1:])
    assert torch.equal(torch.as_tensor(planned["image"][0]), torch.as_tensor(before[0])), "the CT is handed on as it is"
    assert planned["image"].meta["plan"] == planned["plan"], "MONAI Label hands an inferer the image alone"


def test_same_seed_same_plan() -> None:
    one, again, other = planner()(scan()), planner()(scan()), planner()({**scan(), "seed": 4})
    assert one["plan"] == again["plan"] != other["plan"]


def test_an_organ_that_is_left_open_is_one_that_is_there_and_fits_the_lesion() -> None:
    for seed in range(8):
        (lesion,) = lesions(planner(wish={"lesion": "cyst"})({**scan(), "seed": seed}))
        assert lesion.report.organ in ("liver", "kidney left")
        (lesion,) = lesions(planner()({**scan(), "seed": seed}))
        assert lesion.organs[0] in (LIVER, LEFT_KIDNEY, BLADDER)
    with pytest.raises(CaseError, match="no organ of this scan may have a 'lung tumor'"):
        planner(wish={"lesion": "lung tumor"})(scan())


def test_location_words_are_respected() -> None:
    wish = {"organ": "liver", "size_mm": [9, 9, 9], "location": "upper anterior"}
    for seed in range(5):
        (lesion,) = lesions(planner(wish=wish)({**scan(), "seed": seed}))
        assert lesion.box.centre[0] >= 27
        assert lesion.box.centre[1] >= 21


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ({"organ": "pancreas"}, "not in the scan"),
        ({"organ": "lever"}, "near names are"),
        ({"organ": "liver", "size_mm": [200, 200, 200]}, "ask for a smaller one"),
        ({"organ": "liver", "size_mm": [78, 78, 78], "attributes": {"cavity": WITHIN}}, "fits nowhere"),
        ({"organ": "liver", "location": "upper lower"}, "contradicts itself"),
        ({"organ": "urinary bladder", "attributes": {"cavity": WITHIN}}, "does not fit urinary bladder"),
    ],
)
def test_impossible_requests_are_refused_with_the_reason(wish: dict[str, Any], why: str) -> None:
    with pytest.raises(CaseError, match=why):
        planner(wish=wish)(scan())


def test_a_size_that_is_free_shrinks_until_it_fits() -> None:
    wish = {"organ": "kidney left", "lesion": "kidney tumor", "attributes": {"cavity": WITHIN}}
    sizes = [lesions(planner(wish=wish)({**scan(), "seed": seed}))[0].box.size for seed in range(6)]
    assert max(map(max, sizes)) <= 12


def test_a_size_that_rules_wrote_shrinks_too() -> None:
    """Rules know an organ's extent, not its shape; a size that somebody asked for is refused instead."""
    lesion = {"organ": "liver", "size_mm": [78, 78, 78], "attributes": {"cavity": WITHIN}}
    (made,) = lesions(planner()({**scan(), "report": {"lesions": [{**lesion, "source": "rules"}]}}))
    assert max(made.box.size) < 26
    with pytest.raises(CaseError, match="fits nowhere"):
        planner()({**scan(), "report": {"lesions": [lesion]}})


def test_several_lesions_keep_apart() -> None:
    planned = planner(wish={"organ": "liver", "size_mm": [12, 12, 12]}, num_lesions=3)(scan())
    boxes = [lesion.box for lesion in lesions(planned)]
    volume = sum(box.mask((44, 40, 48)).astype(int) for box in boxes)
    assert len(boxes) == 3
    assert volume.max() == 1
    with pytest.raises(CaseError, match="no room for another"):
        planner(wish={"organ": "kidney left", "size_mm": [21, 21, 21]}, num_lesions=2)(scan())


def test_reports_of_the_case_come_before_the_wish() -> None:
    report = {"5": ["round-like", "", {"shape": "round-like,", "density": "low density lesion,"}, [[0], [[15, 12, 9]]]]}
    (lesion,) = lesions(planner(wish={"organ": "bladder"})({**scan(), "report": report}))
    assert (lesion.report.organ, lesion.report.attributes["density"]) == ("liver", "hypodense lesion")
    assert lesion.box.size == (3, 4, 5)


def test_lesions_of_a_label_are_taken_as_they_are() -> None:
    data = scan(label=True)
    planned = planner()(data)
    first, second = lesions(planned)
    assert (first.number, second.number) == (1, 2)
    assert first.box.size == (9, 9, 9)
    assert first.report.organ == second.report.organ == "liver"
    numbered = np.asarray(planned["image"][2])
    assert [int((numbered == k).sum()) for k in (1, 2)] == sorted([257, 123], reverse=True)
    data["organs"] = data["organs"] * 0
    with pytest.raises(CaseError, match="lies in no organ"):
        planner()(data)


def test_a_plan_is_kept_and_answers_only_its_own_question(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    class Writer(RuleReportWriter):
        description = "counts"

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            asked.append(1)
            return super().__call__(*args, **kwargs)

    plan = PlanLesionsd(Writer(), spacing=(3, 3, 3), size=(32, 32, 32), output_dir=tmp_path)
    first, again = plan(scan())["plan"], plan(scan())["plan"]
    assert first == again
    assert len(asked) == 1, "a run that goes on asks nobody again"
    with caplog.at_level(logging.WARNING):
        other = plan({**scan(), "seed": 9})["plan"]
    assert other != first
    assert len(asked) == 2
    assert "planned anew" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# For training


def cropped(told: str = "image", size: int = 16, affine: np.ndarray = AFFINE) -> dict[str, Any]:
    data = {**scan(label=True, affine=affine), "report": {"lesions": [{"organ": "liver"}, {"organ": "bladder"}]}}
    return LesionCropd((size,) * 3, (3, 3, 3), PhraseEncoder(), told=told)(data)


def test_a_crop_shows_the_largest_lesion_and_what_is_around() -> None:
    crop = cropped()
    assert crop["crop"].shape == crop["lesion"].shape == (1, 16, 16, 16)
    assert crop["lesion"].sum() == 257
    assert crop["lesions"].sum() > 257, "all lesions are painted, one is masked"
    assert crop["box"].sum() == 9**3
    assert torch.equal(crop["lesion"] * crop["box"], crop["lesion"])
    assert torch.equal(crop["target"], (crop["organs"] * 104 == LIVER).float())
    # The lesion lies in the liver: S, A, L of the crop are the scan's, turned.
    centre = crop["lesion"][0].nonzero().float().mean(0)
    assert torch.allclose(centre, torch.full((3,), 8.0), atol=0.6)
    assert crop["crop"][0, 8, 8, 8] == to_unit(torch.tensor(60.0))
    with pytest.raises(ValueError, match="told must be one of"):
        LesionCropd((8, 8, 8), (3, 3, 3), PhraseEncoder(), told="all")


def test_a_flipped_file_gives_the_same_crop() -> None:
    flipped = np.array([[-3.0, 0, 0, 141], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    data = {**scan(label=True), "report": {"lesions": [{"organ": "liver"}]}}
    turned = dict(data)
    for key in ("image", "organs", "label"):
        turned[key] = MetaTensor(torch.as_tensor(data[key]).flip(1), affine=torch.from_numpy(flipped))
    crop = LesionCropd((16,) * 3, (3, 3, 3), PhraseEncoder())
    one, other = crop(data), crop(turned)
    assert all(torch.equal(one[key], other[key]) for key in ("crop", "lesion", "organs", "target", "box"))


def test_masks_are_scaled_and_conditioned() -> None:
    state = MaskStated((-1.0, 1.0))(cropped("mask"))
    assert set(state["image"].unique().tolist()) == {-1.0, 1.0}
    assert state["condition"].shape == (3, 16, 16, 16)
    assert torch.equal(state["mask"], state["box"])


def test_painting_learns_from_latents_and_keeps_small_lesions() -> None:
    autoencoder = CodebookAutoencoder(
        channels=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1), num_codes=8, norm_num_groups=4
    )
    crop = cropped()
    state = PaintStated(CodeSpace(autoencoder, 2.0))(crop)
    assert torch.allclose(state["image"], 2 * autoencoder.encode(crop["crop"][None])[0])
    assert torch.equal(state["mask"], state["condition"])
    tiny = torch.zeros(1, 1, 8, 8, 8)
    tiny[0, 0, 3, 3, 3] = 1
    assert on_latents(tiny, (4, 4, 4)).sum() == 1, "nearest alone would lose it"


def test_split_keeps_whole_numbers_and_place() -> None:
    source = scan()["image"]
    pred = torch.cat([torch.as_tensor(source), torch.zeros_like(torch.as_tensor(source))])
    plan = json.dumps({"lesions": [{"report": {"organ": "liver"}, "box": {"start": [0, 0, 0], "size": [1, 1, 1]}}]})
    out = SplitLesiond()({"pred": pred, "image": source, "plan": plan})
    assert out["pred_image"].dtype == torch.int16
    assert torch.equal(out["pred_image"].float().as_tensor(), torch.as_tensor(source))
    assert torch.allclose(out["pred_image"].affine, source.affine)
    assert out["record"]["reports"][0]["organ"] == "liver"
    half = MetaTensor(torch.as_tensor(source) + 0.5, affine=source.affine)
    assert SplitLesiond()({"pred": pred + 0.5, "image": half, "plan": plan})["pred_image"].dtype == torch.float32
