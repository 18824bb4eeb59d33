"""Laws of `common.downstream`: the segmenter learns what can be seen, and is the same each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import blobs, ellipse
from torch import nn

from common.downstream import _flip, dice_scores, iou_scores, train_segmenter

TINY = {"channels": (8, 16, 16), "batch_size": 8, "lr": 2e-2, "seed": 0}


def visible(n: int, seed: int = 0, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in which the lesion is what is red."""
    rng = np.random.default_rng(seed)
    spots = [(rng.uniform(0.06, 0.15), *rng.uniform(0.3, 0.7, 2)) for _ in range(n)]
    masks = torch.from_numpy(np.stack([ellipse(*spot, side=side) for spot in spots]))[:, None].float()
    walls = 0.2 * blobs(n, side, dims=2, seed=seed) - 0.4
    return torch.cat([walls + 0.9 * masks, walls, walls], dim=1), masks


class Red(nn.Module):
    """Finds what is red, and so every lesion."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :1] - images[:, 1:2] - 0.45


# Training


def test_visible_lesions_are_learnt_and_found_in_other_images():
    network = train_segmenter(*visible(32), epochs=12, **TINY)
    assert not network.training
    assert float(dice_scores(network, *visible(16, seed=1)).mean()) > 0.9


def test_what_cannot_be_seen_is_not_found():
    images, masks = visible(32)
    network = train_segmenter(
        images[torch.randperm(32, generator=torch.Generator().manual_seed(0))], masks, epochs=12, **TINY
    )
    assert float(dice_scores(network, *visible(16, seed=1)).mean()) < 0.7


def test_same_seed_same_network_and_global_generators_untouched():
    pairs = visible(10)
    torch.manual_seed(7)
    np.random.seed(7)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = train_segmenter(*pairs, epochs=1, **TINY).state_dict()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    torch.rand(5)  # whatever was drawn before
    again = train_segmenter(*pairs, epochs=1, **TINY).state_dict()
    other = train_segmenter(*pairs, epochs=1, **{**TINY, "seed": 1}).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_pairs_given_are_not_changed():
    images, masks = visible(5)
    copies = images.clone(), masks.clone()
    train_segmenter(images, masks, epochs=2, **TINY)
    assert torch.equal(images, copies[0])
    assert torch.equal(masks, copies[1])


@pytest.mark.parametrize(("pairs", "epochs", "steps"), [(1, 1, 1), (8, 2, 2), (9, 2, 4), (18, 2, 6)])
def test_steps_grow_with_the_set(monkeypatch, pairs, epochs, steps):
    sizes = []
    flip = "common.downstream._flip"
    monkeypatch.setattr(flip, lambda image, mask, _: (sizes.append(len(image)), (image, mask))[1])
    train_segmenter(*visible(pairs), epochs=epochs, **TINY)
    assert len(sizes) == steps
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == pairs * epochs


def test_flips_keep_image_and_mask_together():
    images, masks = visible(40)
    image, mask = _flip(images, masks, torch.Generator().manual_seed(0))
    assert (dice_scores(Red(), image, mask) == 1).all()
    turned = (mask != masks).flatten(1).any(1)
    assert 0.5 < float(turned.float().mean()) < 1  # three in four


@pytest.mark.parametrize("channels", [1, 3])
def test_default_network_takes_grey_and_colour(channels):
    images, masks = visible(2)
    network = train_segmenter(images[:, :channels], masks, epochs=1, seed=0)
    assert network(images[:, :channels]).shape == masks.shape


# Scores


def test_scores_are_those_of_the_definition():
    masks = torch.zeros(4, 1, 8, 8)
    masks[0, :, :4], masks[1, :, :4], masks[2, :, :4] = 1, 1, 1
    images = masks.clone()
    images[1, :, :2] = 0  # half of it
    images[2] = 1 - images[2]  # the other place
    wide = 2 * images.expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1)
    assert dice_scores(Red(), wide, masks).tolist() == pytest.approx([1, 2 / 3, 0, 1])  # both empty: 1
    assert iou_scores(dice_scores(Red(), wide, masks)).tolist() == pytest.approx([1, 1 / 2, 0, 1])


def test_many_images_are_scored_as_each_by_itself():
    images, masks = visible(70)
    masks[::2] = masks[::2].flip(3)
    together = dice_scores(Red(), images, masks)
    assert together.shape == (70,)
    assert torch.equal(
        together, torch.cat([dice_scores(Red(), images[i : i + 1], masks[i : i + 1]) for i in range(70)])
    )


# Errors


def test_errors_teach():
    images, masks = visible(4)
    with pytest.raises(ValueError, match=r"multiples of 16, from 32 on, got \(16, 32\): resize"):
        train_segmenter(images[:, :, :16], masks[:, :, :16], epochs=1, seed=0)
    with pytest.raises(ValueError, match=r"got \(4, 3, 32, 32\) and \(4, 1, 16, 32\)"):
        train_segmenter(images, masks[:, :, :16], epochs=1, seed=0)
    with pytest.raises(ValueError, match="N > 0 pairs"):
        train_segmenter(images[:0], masks[:0], epochs=1, seed=0)
    with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
        train_segmenter(images, masks, epochs=0, **TINY)
