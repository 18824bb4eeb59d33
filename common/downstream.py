"""Does it help? A small segmenter trained on a set of pairs of image and mask, tested on held-out ones.

The test of a synthetic cohort (Qiu 2025, Section 4): Dice of a segmenter trained on real and synthetic pairs, against
one trained on the real pairs alone, and one on the real pairs twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from monai.metrics import compute_dice
from monai.networks.nets import UNet
from torch import nn

from .execution import FastPath

SEGMENT = FastPath(SimpleInferer())
BATCH = 64  # of images that are only looked at


def train_segmenter(
    images: torch.Tensor,
    masks: torch.Tensor,
    *,
    epochs: int = 30,
    batch_size: int = 8,
    lr: float = 5e-3,
    channels: Sequence[int] = (16, 32, 64, 128, 128),
    seed: int,
) -> nn.Module:
    """A residual U-Net (0.9 M parameters by default) that knows the masks of these images.

    Same seed, same pairs, same network; the global generators stay as they are. AdamW under a one-cycle rate, flips for
    augmentation. The number of steps grows with the set.

    Args:
        images: (N, C, *S), 2-D or 3-D, in [-1, 1]; sides that the network can halve to no less than 2 pixels.
        masks: (N, 1, *S) in {0, 1}.
        epochs: how often each pair is seen.
        batch_size: pairs in a step, at most; the batches of an epoch are equally large, give or take one.
        lr: highest learning rate.
        channels: features of each level of the U-Net.
        seed: of weights, order and flips.

    Returns:
        network in evaluation mode, images (N, C, *S) -> logits (N, 1, *S).
    """
    coarsest = 2 ** (len(channels) - 1)
    if not len(images) or images.ndim not in (4, 5) or masks.shape != (len(images), 1, *images.shape[2:]):
        shapes = f"{tuple(images.shape)} and {tuple(masks.shape)}"
        raise ValueError(f"expected images (N, C, *S) and masks (N, 1, *S) of N > 0 pairs, got {shapes}")
    if any(side % coarsest or side < 2 * coarsest for side in images.shape[2:]):
        sides = tuple(images.shape[2:])
        raise ValueError(f"sides must be multiples of {coarsest}, from {2 * coarsest} on, got {sides}: resize")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        strides = (2,) * (len(channels) - 1)
        network = UNet(images.ndim - 2, images.shape[1], 1, channels, strides, num_res_units=2, norm="BATCH")
    network.to(images.device)
    batches = math.ceil(len(images) / batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=batches * epochs)
    loss_function, generator = DiceCELoss(sigmoid=True), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        # Equal batches: statistics of a last batch of one or two pairs would spoil the batch norm.
        for batch in torch.randperm(len(images), generator=generator).tensor_split(batches):
            image, mask = _flip(images[batch], masks[batch], generator)
            loss = loss_function(SEGMENT(image, network), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _flip(image: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pair as it is or mirrored, along each axis."""
    for axis in range(2, image.ndim):
        chosen = (torch.rand(len(image), *[1] * (image.ndim - 1), generator=generator) < 0.5).to(image.device)
        image, mask = (torch.where(chosen, x.flip(axis), x) for x in (image, mask))
    return image, mask


@torch.no_grad()
def dice_scores(network: nn.Module, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Dice (N,) of what the network finds more likely than not in images (N, C, *S) with masks (N, 1, *S).

    1 where mask and answer are both empty.
    """
    scores = [
        compute_dice(SEGMENT(image, network) > 0, mask, ignore_empty=False)[:, 0]
        for image, mask in zip(images.split(BATCH), masks.split(BATCH), strict=True)
    ]
    return torch.cat(scores)


def iou_scores(dice: torch.Tensor) -> torch.Tensor:
    """Intersection over union (N,) that goes with a Dice."""
    return dice / (2 - dice)
