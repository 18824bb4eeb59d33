"""Siamese-Diffusion's training step pass by pass, as paper and published code have it: for tests and benchmarks.

Deep copies of U-Net and ControlNet at every step, the encoder and c_m run anew for the image branch, and the whole
batch augmented as soon as one sample is due. `common.siamese` does the same in fewer passes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from common.controlnet import Control, ControlledUNet
from common.schedules import ExactScheduler
from common.unet import DiffusionUNet


def literal_step(
    network: ControlledUNet,
    scheduler: ExactScheduler,
    inputs: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    hint_mask: Tensor,
    hint_image: Tensor,
    context: Tensor | None = None,
    *,
    step: int,
    steps: int,
) -> Tensor:
    """The loss of one step; a network and the rest as in `common.siamese.SiameseInferer`."""
    unet, controlnet = network.unet, network.controlnet
    unet_copy, controlnet_copy = copy.deepcopy(unet), copy.deepcopy(controlnet)

    def predict(model: DiffusionUNet, x: Tensor, control: Control) -> Tensor:
        with torch.no_grad():
            emb = model.embed(x, timesteps)
            h, skips = model.encode(x, emb, context)
        down, mid = control
        return model.decode(h + mid, [s + d for s, d in zip(skips, down, strict=True)], emb, context)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).mean(1)

    def target(z_0: Tensor) -> Tensor:
        return scheduler.get_velocity(z_0, noise, timesteps) if scheduler.prediction_type == "v_prediction" else noise

    z_t = scheduler.add_noise(inputs, noise, timesteps)
    e_m = predict(unet, z_t, controlnet(z_t, timesteps, hint_mask, context=context))
    down_m, mid_m = controlnet_copy(z_t, timesteps, hint_mask, context=context)
    down_i, mid_i = controlnet(z_t, timesteps, hint_image, context=context)
    weight = step / steps
    down = [m.detach() + weight * i for m, i in zip(down_m, down_i, strict=True)]
    e_mix = predict(unet_copy, z_t, (down, mid_m.detach() + weight * mid_i))
    loss = distance(e_m, target(inputs)) + distance(e_mix, target(inputs)) + distance(e_m, e_mix.detach())
    due = timesteps <= 200
    if step > steps / 3 and due.any():
        levels: Any = scheduler.levels(timesteps, inputs)
        alpha, sigma = levels
        z_0 = scheduler.predict_x_0(e_mix.detach(), z_t, alpha, sigma)
        z_t = alpha * z_0 + sigma * noise
        e_aug = predict(unet, z_t, controlnet(z_t, timesteps, hint_mask, context=context))
        loss = loss + due * distance(e_aug, target(z_0))
    return loss.mean()
