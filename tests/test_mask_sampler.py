"""Masks of parts: each part its own chain, what was asked stays, what missed is drawn again."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.inferers import Inferer

from common.conditioning import CrossAttention, Guided
from common.mask_sampler import AddedMaskSampler, CheckedMaskSampler, RecordMaskd
from common.schedules import DDIM
from common.semantics import Lesion, conditions, measure

SIZE = (32, 40)
NULL = -1.0


def disc(size: float, x: float, y: float) -> np.ndarray:
    """Disc of an area and centre given as fractions, on SIZE."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    radius = np.sqrt(size * SIZE[0] * SIZE[1] / np.pi)
    return np.hypot(columns - x * SIZE[1], rows - y * SIZE[0]) < radius


class Painter:
    """A perfect network: predicts the image its context asks for; `spoil` draws something else at the first calls."""

    def __init__(self, classes: int = 1, spoil: int = 0) -> None:
        self.classes, self.spoil, self.calls, self.batches = classes, spoil, 0, []

    def __call__(self, x, t, context):
        self.calls += 1
        self.batches.append(len(x))
        images = -torch.ones(len(x), self.classes, *SIZE)
        for image, row in zip(images, context, strict=True):
            for k in range(self.classes):
                if row[k] != NULL:
                    place = row[self.classes + 2 * k :][:2] if self.calls > self.spoil else (0.1, 0.1)
                    image[k][torch.from_numpy(disc(float(row[k]), *map(float, place)))] = 1
        return images


def sampler(kind=CheckedMaskSampler, steps: int = 1, **kwargs):
    scheduler = DDIM(10, "cosine_exact", prediction_type="sample", clip_sample=False)
    own = {"min_size": 4, "null": NULL} if kind is CheckedMaskSampler else {}
    return kind(scheduler, steps, image_size=SIZE, **{"condition": CrossAttention(), **own, **kwargs})


def asked(*masks: list[Lesion], labels=(1,)) -> torch.Tensor:
    tables = [torch.from_numpy(conditions(lesions, labels, NULL)) for lesions in masks]
    most = max(map(len, tables))
    filled = [torch.cat([t, torch.full((most - len(t), t.shape[1]), torch.nan)]) for t in tables]
    return torch.stack(filled)


ONE = [Lesion(0.08, 0.3, 0.4)]
THREE = [Lesion(0.10, 0.25, 0.25), Lesion(0.06, 0.75, 0.3), Lesion(0.03, 0.6, 0.8)]


@pytest.mark.parametrize("kind", [AddedMaskSampler, CheckedMaskSampler])
def test_each_mask_has_what_was_asked(kind):
    out = sampler(kind)(asked(ONE, THREE), Painter(), seeds=[1, 2])
    assert out["mask"].shape == (2, 1, *SIZE)
    assert set(out["mask"].unique().tolist()) == {0.0, 1.0}
    assert out["accepted"].tolist() == [1, 1]
    assert out["tries"].tolist() == [1, 1]
    for lesions, mask in zip((ONE, THREE), out["mask"].numpy(), strict=True):
        achieved = measure(mask, [1], 4)
        assert len(achieved) == len(lesions)
        for a, b in zip(achieved, lesions, strict=True):
            assert a.size == pytest.approx(b.size, rel=0.2)
            assert (a.x, a.y) == pytest.approx((b.x, b.y), abs=0.03)


def test_all_parts_of_all_masks_share_network_calls():
    network = Painter()
    sampler()(asked(ONE, THREE, ONE), network, seeds=[1, 2, 3])
    assert network.batches == [5], "five parts, one step, one call"
    network = Painter()
    sampler(max_chains=2)(asked(ONE, THREE, ONE), network, seeds=[1, 2, 3])
    assert network.batches == [2, 2, 1]


def test_neutral_guidance_makes_no_null_pass():
    network = Painter()
    sampler(condition=Guided(CrossAttention(), 1.0, NULL))(asked(ONE), network, seeds=[1])
    assert network.calls == 1
    guided = Painter()
    sampler(condition=Guided(CrossAttention(), 2.0, NULL), max_tries=1)(asked(ONE), guided, seeds=[1])
    assert guided.calls == 2


class Noisy:
    """Returns the state: the mask is its case's noise, thresholded."""

    def __call__(self, x, t, context):
        return x


def test_a_part_depends_on_its_masks_seed_and_number_alone():
    options = {"max_tries": 1}
    together = sampler(AddedMaskSampler)(asked(ONE, THREE), Noisy(), seeds=[5, 6])["mask"]
    assert torch.equal(together[1:], sampler(AddedMaskSampler)(asked(THREE), Noisy(), seeds=[6])["mask"])
    small = sampler(AddedMaskSampler, max_chains=1)(asked(ONE, THREE), Noisy(), seeds=[5, 6])["mask"]
    assert torch.equal(together, small)
    other = sampler(AddedMaskSampler)(asked(ONE, THREE), Noisy(), seeds=[5, 7])["mask"]
    assert torch.equal(together[0], other[0])
    assert not torch.equal(together[1], other[1])
    checked = sampler(**options)
    assert torch.equal(
        checked(asked(ONE), Noisy(), seeds=[5])["mask"], checked(asked(ONE, ONE), Noisy(), seeds=[5, 9])["mask"][:1]
    )


def test_what_missed_is_drawn_again_and_only_that(caplog):
    network = Painter(spoil=1)
    out = sampler(max_tries=3)(asked(ONE, [Lesion(0.02, 0.1, 0.1)]), network, seeds=[1, 2])
    assert network.batches == [2, 1], "the second mask was right at once"
    assert out["tries"].tolist() == [2, 1]
    assert out["accepted"].tolist() == [1, 1]
    with caplog.at_level(logging.WARNING):
        out = sampler(max_tries=2)(asked(ONE), Painter(spoil=9), seeds=[1])
    assert out["tries"].tolist() == [2]
    assert out["accepted"].tolist() == [0]
    assert "1 of 1 masks miss what was asked after 2 draws" in caplog.text


def test_touching_parts_are_not_accepted():
    """Added as published, two lesions side by side become one and the count is wrong."""
    close = [Lesion(0.08, 0.35, 0.5), Lesion(0.08, 0.65, 0.5)]
    network = Painter()
    assert sampler()(asked(close), network, seeds=[1])["accepted"].tolist() == [1], "apart, they are accepted"
    touching = [Lesion(0.08, 0.4, 0.5), Lesion(0.08, 0.6, 0.5)]
    assert len(measure(sampler(AddedMaskSampler)(asked(touching), network, seeds=[1])["mask"][0].numpy(), [1], 4)) == 1
    assert sampler(max_tries=2)(asked(touching), network, seeds=[1])["accepted"].tolist() == [0]


def test_speckle_and_what_was_not_asked_for_is_removed():
    class Speckled(Painter):
        def __call__(self, x, t, context):
            image = super().__call__(x, t, context)
            image[..., 0, 0] = 1
            image[..., 25:30, 30:36] = 1
            return image

    out = sampler()(asked(ONE), Speckled(), seeds=[1])["mask"][0].numpy()
    assert len(measure(out, [1], 1)) == 1
    raw = sampler(AddedMaskSampler)(asked(ONE), Speckled(), seeds=[1])["mask"][0].numpy()
    assert len(measure(raw, [1], 1)) == 3


def test_an_empty_draw_gives_an_empty_mask_that_is_not_accepted():
    class Blank(Painter):
        def __call__(self, x, t, context):
            return -torch.ones(len(x), 1, *SIZE)

    out = sampler(max_tries=2)(asked(ONE), Blank(), seeds=[1])
    assert out["mask"].sum() == 0
    assert out["accepted"].tolist() == [0]


def test_classes_are_drawn_together_and_exclude_each_other():
    lesions = [Lesion(0.10, 0.4, 0.5, 1), Lesion(0.06, 0.45, 0.5, 2)]
    network = Painter(classes=2)
    out = sampler(channels=2, size_tolerance=0.9, centre_tolerance=0.2)(
        asked(lesions, labels=[1, 2]), network, seeds=[1]
    )
    assert network.batches == [1], "one part holds a component of each class"
    assert out["mask"].shape == (1, 2, *SIZE)
    assert out["mask"].sum(1).max() <= 2
    only = sampler(channels=2)(asked([Lesion(0.06, 0.45, 0.5, 2)], labels=[1, 2]), network, seeds=[1])["mask"]
    assert only[0, 0].sum() == 0, "a class that was not asked for stays empty"
    assert only[0, 1].sum() > 0


def test_the_published_clamp_would_leave_no_background():
    """The reference clamps the sum to [0.1, inf) in place of [0, 1]; ours cuts it at one half."""
    out = sampler(AddedMaskSampler)(asked(ONE), Painter(), seeds=[1])["mask"]
    assert out.clamp(min=0.1).min() == pytest.approx(0.1), "the old behaviour"
    assert out.min() == 0


def test_intensities_are_a_matter_of_the_diffusion_alone():
    class Half(Painter):
        def __call__(self, x, t, context):
            return super().__call__(x, t, context) / 2 + 0.5  # {-1, 1} -> {0, 1}

    ours = sampler()(asked(THREE), Painter(), seeds=[1])["mask"]
    assert torch.equal(ours, sampler(intensities=(0, 1))(asked(THREE), Half(), seeds=[1])["mask"])


def test_record_is_plain_json():
    mask = torch.from_numpy(disc(0.1, 0.3, 0.6)[None]).float()
    data = {"mask": mask, "tries": torch.tensor(2.0), "accepted": torch.tensor(1.0)}
    record = RecordMaskd(labels=[1], min_size=4)(data)["record"]
    assert record["tries"] == 2
    assert record["accepted"] is True
    assert record["achieved"][0]["x"] == pytest.approx(0.3, abs=0.02)
    assert isinstance(sampler(), Inferer)


@pytest.mark.parametrize("knob", [{"max_tries": 0}, {"size_tolerance": 0}, {"centre_tolerance": -1}])
def test_nonsense_knobs_are_refused(knob):
    with pytest.raises(ValueError, match="must be"):
        sampler(**knob)
