"""LesionDiffusion (Tian et al., arXiv 2503.00741): a mask is drawn in a box, then a lesion painted into the mask.

LMNet diffuses the mask of a lesion from organs, target organ and box; LINet the latents of the image, inside the mask
alone: outside it stands the clean latent, in training and before every step of sampling,

    z_t = z_0 (1 - m) + q_sample(z_0, t) m

and a further output channel guesses the mask. Both hear what the lesion is to be like by attention to its attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from .conditioning import ConditionPrepareBatch, Denoiser, Network, tokens_of
from .sampler import DiffusionSampler
from .schedules import ExactScheduler

# ---------------------------------------------------------------------------------------------------------------------
# Training


class LesionPrepareBatch(ConditionPrepareBatch):
    """Draws noise and time for a training batch of either network, and drops the attributes now and then.

    The batch has "image" (B, C, *S), what is diffused; "condition" (B, K, *S), the channels that join it; "context"
    (B, L, D), the encoded attributes; "mask" (B, 1, *S) in {0, 1}, where the loss looks: the box, or the lesion; and
    maybe "box" (B, 1, *S), the lesion's own where it is not the smallest around the mask (`InpaintingLoss`).

    Args:
        num_train_timesteps: times are drawn from {0 .. num_train_timesteps - 1}.
        inpaint: what is outside the mask is known (LINet): the mask goes to the inferer, too.
        kwargs: of `ConditionPrepareBatch`; ``drop`` is the share of cases whose attributes become rows of zeros.
    """

    def __init__(self, num_train_timesteps: int, *, inpaint: bool = False, **kwargs: Any) -> None:
        super().__init__(num_train_timesteps, "context", mode="crossattn", **kwargs)
        self.inpaint = inpaint

    def __call__(  # type: ignore[override]
        self,
        batchdata: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor], tuple, dict]:
        """Return image, {target, mask, box?}, (), {noise, timesteps, condition, context, mask?}."""
        image, target, args, infer = super().__call__(batchdata, device, non_blocking, **kwargs)
        brought = {
            key: convert_to_tensor(batchdata[key]).to(image, non_blocking=non_blocking)
            for key in ("condition", "mask", "box")
            if key in batchdata
        }
        condition = brought.pop("condition")
        drawn = {"noise": infer["noise"], "timesteps": infer["timesteps"], "context": infer["condition"]}
        known = {"mask": brought["mask"]} if self.inpaint else {}
        return image, {"target": target, **brought}, args, {**drawn, "condition": condition, **known}


def painted(sample: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """The sample (B, C, *S) inside the mask (B, 1, *S) in {0, 1}, outside what is known, untouched."""
    return torch.where(mask > 0.5, sample, known)


class LesionInferer(Inferer):
    """Training forward of either network.

    Args:
        scheduler: noise schedule.
    """

    def __init__(self, scheduler: ExactScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Network,
        noise: Tensor,
        timesteps: Tensor,
        condition: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Noise what is diffused, inside the mask if there is one, and predict.

        Args:
            inputs: the clean mask, image or latent (B, C, *S).
            network: reads (B, C + K, *S).
            noise: eps (B, C, *S).
            timesteps: times (B,).
            condition: channels that join it (B, K, *S).
            context: encoded attributes (B, L, D).
            mask: where to paint (B, 1, *S).

        Returns:
            prediction (B, C, *S), or with further channels.
        """
        x = self.scheduler.add_noise(inputs, noise, timesteps)
        if mask is not None:
            x = painted(x, inputs, mask)
        return network(torch.cat([x, condition], dim=1), timesteps, context=context)


class BoxWeightedLoss(nn.Module):
    """LMNet's loss: the mean over all voxels of w (target - prediction)^2, with w > 1 in the box.

    `latest` keeps the mean squared errors inside and outside the box, without weights, for the log.

    Args:
        box_weight: w in the box (published: 1000), which a lesion fills so little of a crop that the rest would win.
    """

    def __init__(self, box_weight: float = 1000.0) -> None:
        super().__init__()
        self.box_weight = box_weight
        self.latest: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Compare a prediction (B, C, *S) with ``target``, under ``mask`` (B, 1, *S), the box."""
        error, box = (pred.float() - target["target"]).square(), target["mask"].expand_as(pred)
        inside, total = (error.detach() * box).sum(), error.detach().sum()
        self.latest = {
            "inside": inside / box.sum().clamp(min=1),
            "outside": (total - inside) / (1 - box).sum().clamp(min=1),
        }
        return (error * (1 + (self.box_weight - 1) * box)).mean()


class InpaintingLoss(nn.Module):
    """LINet's loss: absolute error inside the mask, for each voxel of the mask's box, plus Dice of the guessed mask.

    `latest` keeps the two terms, for the log.

    Args:
        dice_weight: of the Dice (published: 1).
    """

    smooth = 1e-6

    def __init__(self, dice_weight: float = 1.0) -> None:
        super().__init__()
        self.dice_weight = dice_weight
        self.latest: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Compare a prediction (B, C + 1, *S), the mask's logit last, with ``target`` (B, C, *S) under ``mask``.

        The box is ``box`` (B, 1, *S) where the target has one, else the smallest around the mask.
        """
        mask, aim = target["mask"], target["target"]
        wrong = (mask * (pred[:, :-1].float() - aim)).abs().flatten(1).sum(dim=1)
        volume = target["box"].flatten(1).sum(dim=1) if "box" in target else box_volume(mask)
        guess = pred[:, -1:].float().sigmoid()
        overlap = (2 * (guess * mask).sum() + self.smooth) / (guess.sum() + mask.sum() + self.smooth)
        terms = {"painted": (wrong / (volume + self.smooth)).mean(), "dice": self.dice_weight * (1 - overlap)}
        self.latest = {name: value.detach() for name, value in terms.items()}
        return terms["painted"] + terms["dice"]


def box_volume(mask: Tensor) -> Tensor:
    """Voxels of the smallest box around each case's mask (B, 1, *S) -> (B,); 0 for an empty one."""
    volume = mask.new_ones(len(mask))
    for axis in range(2, mask.ndim):
        hit = (mask > 0.5).movedim(axis, 1).flatten(2).any(dim=2).int()
        # argmax gives the first of equals.
        sides = hit.shape[1] - hit.argmax(dim=1) - hit.flip(1).argmax(dim=1)
        volume = volume * sides * hit.amax(dim=1)
    return volume


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class AttributeCondition:
    """Condition by channels that join the noisy image, and by attributes, which guidance amplifies.

    Args:
        scale: of classifier-free guidance, null + scale (conditional - null), the channels being kept on both sides;
            1 is neutral and costs one call, any other one call of twice the batch. The null has rows of zeros.
        use_text: False leaves the attributes out, as the authors' shipped settings do.
    """

    def __init__(self, scale: float = 1.0, use_text: bool = True) -> None:
        self.scale = scale
        self.use_text = use_text

    def __call__(self, network: Network, condition: Tensor, context: Tensor | None = None) -> Denoiser:
        """Bind ``condition`` (B, K, *S) and the attributes, (B, L, D) or for all cases (1, L, D)."""
        if context is None or not self.use_text:
            return lambda x, t: network(torch.cat([x, condition], dim=1), t, context=None)
        tokens = tokens_of(convert_to_tensor(context), condition)
        if self.scale == 1:
            return lambda x, t: network(torch.cat([x, condition], dim=1), t, context=tokens)
        both = torch.cat([torch.zeros_like(tokens), tokens])  # type: ignore[arg-type, list-item]

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            joined = torch.cat([x, condition], dim=1)
            null, conditional = network(torch.cat([joined, joined]), torch.cat([t, t]), context=both).chunk(2)
            return null + self.scale * (conditional - null)

        return denoise


class InpaintingSampler(DiffusionSampler):
    """LINet's sampling: before every step and at the end, what is outside the mask is the clean latent.

    ``inputs`` are the clean latents, then the mask in {0, 1}: (B, channels + 1, *s). The network sees the mask as its
    condition. `mask_logit` keeps what it guessed of it at the last step, (B, 1, *s), or None.
    """

    mask_logit: Tensor | None = None

    def condition_of(self, inputs: Tensor) -> Tensor:
        """The mask."""
        if inputs.shape[1] != self.channels + 1:
            raise ValueError(
                f"inputs have {inputs.shape[1]} channels, expected {self.channels} of the clean latent and the mask: "
                "concatenate them"
            )
        return inputs[:, self.channels :]

    def initial(self, inputs: Tensor, denoise: Denoiser, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """Noise inside the mask."""
        return self.after_step(super().initial(inputs, denoise, noise), -1, inputs, noise)

    def step(self, denoise: Denoiser, x: Tensor, t: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """One step of the latent; what else the network predicts, the mask, is kept aside."""

        def latent(x: Tensor, t: Tensor) -> Tensor:
            pred = denoise(x, t)
            self.mask_logit = pred[:, self.channels :] if pred.shape[1] > self.channels else None
            return pred[:, : self.channels]

        return super().step(latent, x, t, noise)

    def after_step(self, x: Tensor, index: int, inputs: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """Keep the clean latent outside the mask."""
        return painted(x, inputs[:, : self.channels], inputs[:, self.channels :])
