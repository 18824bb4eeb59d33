"""Generated endoscopies: repeatable, as many as asked, a polyp where the mask says and not given away by its colour."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from common.endoscopy_phantoms import FINER, endoscopy, endoscopy_cohort, frame, grow_polyp, mucosa, photograph
from common.prompts import read_prompts

CASES = [endoscopy(seed, 48) for seed in range(40)]


def read(folder):
    return {path.relative_to(folder): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def grey(image):
    return image.mean(axis=-1)


def test_a_seed_is_a_picture():
    for first, again, other in zip(endoscopy(3, 48), endoscopy(3, 48), endoscopy(4, 48)):
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


def test_images_are_pink_lit_and_framed():
    for image, _ in CASES:
        assert image.shape == (48, 48, 3)
        assert image.dtype == np.uint8
        assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all(), "the window cuts the corners"
        red, green, blue = image[12:36, 12:36].reshape(-1, 3).mean(axis=0)
        assert red > 1.1 * max(green, blue)
        assert 40 < grey(image[12:36, 12:36]).mean() < 215
        assert grey(image[12:36, 12:36]).std() > 5


def test_masks_are_binary_and_of_plausible_size():
    assert {int(v) for _, mask in CASES for v in np.unique(mask)} == {0, 255}
    shares = np.array([(mask > 0).mean() for _, mask in CASES])
    assert 0.008 < shares.min() < shares.max() < 0.35
    assert shares.std() > 0.03


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_is_exactly_what_is_raised_and_coloured(seed):
    scene = mucosa(np.random.default_rng(seed), 96)
    height, albedo = scene.height, scene.albedo
    grow_polyp(np.random.default_rng(seed), scene, 0.08)
    assert scene.polyp.mean() == pytest.approx(0.08, rel=0.7)
    raised, coloured = scene.height != height, (scene.albedo != albedo).any(axis=-1)
    assert not (raised | coloured)[~scene.polyp].any()
    assert (raised & coloured)[scene.polyp].mean() > 0.99


@pytest.mark.parametrize("seed", range(8))
def test_pixels_change_in_the_mask_and_its_shadow_alone(seed):
    """Against the same wall under the same lamp without a polyp."""
    wall, _, camera = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    scene = mucosa(wall, 64 * FINER)
    healthy = photograph(camera, scene).reshape(64, FINER, 64, FINER, 3).mean(axis=(1, 3))
    image, mask = endoscopy(seed, 64)
    changed = np.abs(image / 255 - healthy).max(axis=-1) > 0.01
    inside = mask > 0
    assert changed[inside].mean() > 0.97
    assert changed.any()
    # The shadow lies close: nothing changes a polyp's width away from it.
    rows, columns = np.nonzero(inside)
    reach = 4 + max(np.ptp(rows), np.ptp(columns))
    far = np.ones_like(inside)
    far[max(0, rows.min() - reach) : rows.max() + reach, max(0, columns.min() - reach) : columns.max() + reach] = False
    assert not changed[far].any()
    assert inside[frame(tuple(axis[::FINER, ::FINER] for axis in scene.grid)) == 0].mean() < 0.01


def test_inside_differs_from_outside_but_no_threshold_tells():
    differences, best = [], []
    for image, mask in CASES:
        inside, seen = mask > 0, grey(image) > 0
        differences.append(np.abs(image[inside].mean(axis=0) - image[seen & ~inside].mean(axis=0)).max())
        dice = 0.0
        for channel in np.moveaxis(image, -1, 0):
            for threshold in np.percentile(channel, range(5, 100, 5)):
                for guess in (channel >= threshold, channel < threshold):
                    dice = max(dice, 2 * (guess & inside).sum() / (guess.sum() + inside.sum()))
        best.append(dice)
    assert np.mean(differences) > 8
    assert np.mean(best) < 0.6, "even the best threshold of each image"


def test_size_is_a_matter_of_resolution_only():
    for seed in range(4):
        small, large = endoscopy(seed, 48), endoscopy(seed, 96)
        assert (small[1] > 0).mean() == pytest.approx((large[1] > 0).mean(), rel=0.08)
        coarse = large[0].reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))
        assert np.corrcoef(coarse.ravel(), small[0].ravel())[0, 1] > 0.97


def test_too_small_a_picture_is_refused():
    with pytest.raises(ValueError, match="at least 16 pixels, got 8"):
        endoscopy(0, 8)


def test_a_cohort_grows_in_place_and_refuses_other_settings(tmp_path):
    assert endoscopy_cohort(tmp_path, 2, 32, seed=1) == str(tmp_path)
    first = read(tmp_path)
    assert len(read_prompts(tmp_path / "prompt.json")) == 2
    (tmp_path / "masks" / "case_0001.png").unlink()
    endoscopy_cohort(tmp_path, 4, 32, seed=1)
    again = read(tmp_path)
    assert len(again) == 8
    assert all(np.array_equal(pixels, again[path]) for path, pixels in first.items())
    cases = read_prompts(tmp_path / "prompt.json")
    assert [case["name"] for case in cases] == [f"case_{i:04d}" for i in range(4)]
    endoscopy_cohort(tmp_path, 3, 32, seed=1)
    assert json.loads((tmp_path / "phantoms.json").read_text())["num_cases"] == 4, "a smaller wish takes nothing away"
    with pytest.raises(ValueError, match="another folder"):
        endoscopy_cohort(tmp_path, 4, 48, seed=1)


def test_a_lost_index_is_written_again_and_an_edited_one_kept(tmp_path):
    index = tmp_path / "prompt.json"
    endoscopy_cohort(tmp_path, 1, 16)
    index.unlink()
    endoscopy_cohort(tmp_path, 1, 16)
    index.write_text(index.read_text().replace("A photo", "A picture"))
    endoscopy_cohort(tmp_path, 1, 16)
    assert read_prompts(index)[0]["prompt"] == "A picture of a polyp."
