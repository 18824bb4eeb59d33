"""Siamese-Diffusion: one ControlNet under two hints, mask and image, and the better informed branch teaches the other.

Qiu et al., "Noise-Consistent Siamese-Diffusion for Medical Image Synthesis and Segmentation", CVPR 2025
(https://arxiv.org/abs/2505.06068). With sg the stop-gradient, C the ControlNet, U the U-Net, k of N steps done,

    c_m = C(z_t, mask)    c_i = C(z_t, image)    e_m = U(z_t, c_m)    e_mix = U_const(z_t, sg[c_m] + (k / N) c_i)
    L_m = |e_m - eps|^2    L_i = |e_mix - eps|^2    L_c = w_c |e_m - sg[e_mix]|^2
    z_t' = z_t + s (eps - e_mix)    L_m' = [t <= 200] |U(z_t', C(z_t', mask)) - eps|^2    from k > N / 3 on

U_const has the U-Net's weights as constants: L_i trains the ControlNet alone, by way of c_i. Only the mask branch is
used for sampling. The published code deep-copies both networks at every step and makes up to twice the passes.

The same holds for networks that predict the velocity v = a eps - s z_0 in place of the noise (from scratch they learn
far faster), with v for eps in the losses. Re-noising the estimate z_0' = z_0 + s (v - v_mix) by eps gives

    z_t' = z_t + a s (v - v_mix)    v' = a eps - s z_0' = v - s^2 (v - v_mix)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from torch import Tensor, nn

from .controlnet import Control, ControlledUNet, Encoded
from .schedules import ExactScheduler


class SiameseUNet(ControlledUNet):
    """`ControlledUNet` that also makes the predictions of a training step, in the fewest passes.

    They are made inside ``forward``, so that ``DistributedDataParallel`` and ``torch.compile`` see them.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        hint: Tensor | None = None,
        *,
        hint_image: Tensor | None = None,
        weight: float = 0.0,
        target: Tensor | None = None,
        shift: Tensor | None = None,
        retarget: Tensor | None = None,
        chosen: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Predict as `ControlledUNet` does; with ``hint_image``, make the predictions of a training step.

        Args:
            x: noisy image or latent z_t (B, C, *s).
            timesteps: times (B,).
            context: tokens for cross-attention (B, L, D); one zero token when left out.
            hint: the mask (B, K, *S).
            hint_image: the clean image (B, K, *S).
            weight: w_i, strength of the image's control.
            target: eps or v (B, C, *s).
            shift: how far z_t' is from z_t for an error of one in the target: s, or a s; ready to multiply z_t.
            retarget: how far the target of z_t' is from that of z_t: 0, or s^2; likewise.
            chosen: samples (B,) that get an augmented twin; None makes none.
            kwargs: of `ControlledUNet.forward`.

        Returns:
            ``{"mask": e_m, "image": e_mix, "augmented": e_m'}``, each (B, C, *s) to be compared with the target;
            ``augmented`` is the target itself for samples that were not chosen, so that its loss is zero there.
        """
        if hint_image is None:
            return super().forward(x, timesteps, context, hint, **kwargs)
        if timesteps is None or hint is None or target is None or shift is None or retarget is None:
            raise ValueError("a training step needs timesteps, hint, target and levels: call it by SiameseInferer")
        context = self.tokens(x, context)
        encoded = self.encode(x, timesteps, context)
        hints = self.encode_hint(torch.cat([hint, hint_image]))
        c_m, c_i = self.controls(x, timesteps, context, hints)

        # Mask-Diffusion, the branch that samples.
        e_m = self.decode(encoded, c_m, context)

        # Image-Diffusion: sg[c_m] + w_i c_i through a decoder whose weights are constants.
        e_mix = self.decode(detached(encoded), mixed(c_m, c_i, weight), context, frozen=True)

        # Online-Augmentation: the image branch's z_0, re-noised by the same eps to the same time.
        augmented = target
        if chosen is not None and chosen.any():
            error = target - e_mix.detach().to(target.dtype)
            tokens = None if context is None else context[chosen]
            e_aug = super().forward(
                (x + shift * error)[chosen], timesteps[chosen], tokens, encoded=hints[: len(x)][chosen]
            )
            moved = e_aug.to(target.dtype) + (retarget * error)[chosen]
            augmented = target.index_put((chosen,), moved)
        return {"mask": e_m, "image": e_mix, "augmented": augmented}

    def controls(self, x: Tensor, timesteps: Tensor, context: Tensor | None, hints: Tensor) -> tuple[Control, Control]:
        """c_m and c_i of encoded masks and, behind them, images: one ControlNet, one batch of twice the size."""
        tokens = None if context is None else torch.cat([context, context])
        down, mid = self.controlnet(torch.cat([x, x]), torch.cat([timesteps] * 2), context=tokens, encoded=hints)
        halves, (mid_m, mid_i) = [d.chunk(2) for d in down], mid.chunk(2)
        return ([m for m, _ in halves], mid_m), ([i for _, i in halves], mid_i)


def mixed(c_m: Control, c_i: Control, weight: float) -> Control:
    """sg[c_m] + w_i c_i."""
    down = [m.detach() + weight * i for m, i in zip(c_m[0], c_i[0], strict=True)]
    return down, c_m[1].detach() + weight * c_i[1]


def detached(encoded: Encoded) -> Encoded:
    """Features cut off from the encoder, for when that is trained: L_i is not to reach it."""
    h, skips, emb = encoded
    return h.detach(), [s.detach() for s in skips], emb.detach()


class ControlInferer(Inferer):
    """Training by a mask alone, as a plain ControlNet: the baseline, and what validation measures.

    Args:
        scheduler: noise schedule; its ``prediction_type`` is what the network predicts, noise or velocity.
    """

    def __init__(self, scheduler: ExactScheduler) -> None:
        super().__init__()
        if scheduler.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"Siamese-Diffusion predicts noise or velocity, the scheduler {scheduler.prediction_type!r}: set "
                "'epsilon' or 'v_prediction'"
            )
        self.scheduler = scheduler

    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Any,
        noise: Tensor,
        timesteps: Tensor,
        hint_mask: Tensor,
        hint_image: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Any:
        """Noise the image and predict the noise.

        Args:
            inputs: clean image, or scaled latent, z_0 (B, C, *s).
            network: `ControlledUNet`, or one wrapped for several GPUs.
            noise: eps (B, C, *s).
            timesteps: times (B,).
            hint_mask: the mask (B, K, *S).
            hint_image: the image in the hint's range (B, K, *S); unused here.
            context: tokens for cross-attention (B, L, D).

        Returns:
            e_m (B, C, *s).
        """
        return network(self.scheduler.add_noise(inputs, noise, timesteps), timesteps, context, hint_mask)


class SiameseInferer(ControlInferer):
    """Siamese-Diffusion's training: the predictions that `NoiseConsistencyLoss` compares.

    `TrainingProgress` tells it k and N.

    Args:
        scheduler: as in `ControlInferer`.
        augment_from: share of the training after which Online-Augmentation begins; 1 never begins.
        augment_until: the last time that is augmented (the paper writes t < 200, its code has t <= 200).
    """

    def __init__(self, scheduler: ExactScheduler, augment_from: float = 1 / 3, augment_until: int = 200) -> None:
        super().__init__(scheduler)
        self.augment_from = augment_from
        self.augment_until = augment_until
        self.progress: tuple[int, int] | None = None

    def advance(self, step: int, steps: int) -> None:
        """Say that `step` of `steps` optimiser steps are done."""
        if steps <= 0:
            raise ValueError(
                f"training has N = {steps} steps, expected more than 0: w_i = k / N and the start of the augmentation "
                "hang on it, so give epochs and a data loader of known length"
            )
        if not 0 <= step <= steps:
            raise ValueError(f"step {step} is not among the {steps} of the training: w_i = k / N must lie in [0, 1]")
        self.progress = step, steps

    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Any,
        noise: Tensor,
        timesteps: Tensor,
        hint_mask: Tensor,
        hint_image: Tensor,
        context: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Noise the image and predict in both branches; arguments as in `ControlInferer`, network a `SiameseUNet`.

        Returns:
            as `SiameseUNet.forward`.
        """
        if self.progress is None:
            raise ValueError("the training's progress is unknown: add TrainingProgress(inferer) to train_handlers")
        step, steps = self.progress
        alpha, sigma = self.scheduler.levels(timesteps, inputs)
        velocity = self.scheduler.prediction_type == "v_prediction"
        return network(
            alpha * inputs + sigma * noise,
            timesteps,
            context,
            hint_mask,
            hint_image=hint_image,
            weight=step / steps,
            target=alpha * noise - sigma * inputs if velocity else noise,
            shift=alpha * sigma if velocity else sigma,
            retarget=sigma**2 if velocity else torch.zeros_like(sigma),
            chosen=timesteps <= self.augment_until if step > self.augment_from * steps else None,
        )


class NoiseConsistencyLoss(nn.Module):
    """L_m + L_i + L_c + L_m', means over the batch.

    `latest` keeps the four terms of the last call, for the log.

    Args:
        weight: w_c, strength of the consistency (0.5 to 1.5 do well, 2 degrades); 0 leaves it out.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.latest: dict[str, Tensor] = {}

    def terms(self, pred: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """The four terms, each a mean over all but the batch (B,)."""

        def distance(a: Tensor, b: Tensor) -> Tensor:
            return (a.float() - b.float()).square().flatten(1).mean(1)

        return {
            "mask": distance(pred["mask"], target),
            "image": distance(pred["image"], target),
            "consistency": self.weight * distance(pred["mask"], pred["image"].detach()),
            "augmented": distance(pred["augmented"], target),
        }

    def forward(self, pred: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Sum the terms of a `SiameseUNet`'s predictions."""
        terms = {name: values.mean() for name, values in self.terms(pred, target).items()}
        self.latest = {name: value.detach() for name, value in terms.items()}
        return torch.stack(list(terms.values())).sum()


class TrainingProgress:
    """Handler that tells a `SiameseInferer` how far the training is, also after a resume.

    Args:
        inferer: the inferer itself, not the `FastPath` around it.
    """

    def __init__(self, inferer: SiameseInferer) -> None:
        self.inferer = inferer

    def attach(self, engine: Engine) -> None:
        """Check the length at the start, tell the progress before every step."""
        engine.add_event_handler(Events.STARTED, self.check)
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def check(self, engine: Engine) -> None:
        """Refuse a training of unknown or no length before its first step."""
        self.inferer.advance(0, self.steps(engine))

    def __call__(self, engine: Engine) -> None:
        """Tell k, the steps done: the engine counts the one that begins."""
        self.inferer.advance(engine.state.iteration - 1, self.steps(engine))

    def steps(self, engine: Engine) -> int:
        """N."""
        return (engine.state.max_epochs or 0) * (engine.state.epoch_length or 0)
