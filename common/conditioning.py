"""Conditioning: how a condition reaches the network, in training and in sampling.

Training: a MONAI ``PrepareBatch`` draws noise and time, and drops the condition now and then for guidance. Sampling: an
adapter turns ``(network, condition)`` into ``denoise(x_t, t)``, so that the reverse loop never asks which kind it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from monai.engines.utils import DiffusionPrepareBatch
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_tensor

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Network = Callable[..., torch.Tensor]


class Condition(Protocol):
    """Adapter: binds a condition to a network."""

    def __call__(self, network: Network, condition: torch.Tensor) -> Denoiser:
        """Return ``denoise(x_t, timesteps)``."""
        ...


class Concat:
    """The condition joins the noisy image as further channels, image first (all five references)."""

    def __call__(self, network: Network, condition: torch.Tensor) -> Denoiser:
        """Bind ``condition`` (B, K, *S)."""
        return lambda x, t: network(torch.cat([x, condition], dim=1), t)


class CrossAttention:
    """The condition is a list of tokens the network attends to."""

    def __call__(self, network: Network, condition: torch.Tensor) -> Denoiser:
        """Bind ``condition`` (B, L, D)."""
        return lambda x, t: network(x, t, context=condition)


class ControlNetHint:
    """The condition is a picture that a ControlNet turns into residuals of the network's skips.

    Args:
        controlnet: MONAI ``ControlNet`` for the same network.
        scale: strength of the residuals.
    """

    def __init__(self, controlnet: Network, scale: float = 1.0) -> None:
        self.controlnet = controlnet
        self.scale = scale

    def __call__(self, network: Network, condition: torch.Tensor) -> Denoiser:
        """Bind ``condition``, the hint (B, K, *S)."""

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            down, mid = self.controlnet(x, t, controlnet_cond=condition, conditioning_scale=self.scale)
            return network(x, t, down_block_additional_residuals=down, mid_block_additional_residual=mid)

        return denoise


class Guided:
    """Classifier-free guidance (Ho & Salimans 2022): ``null + scale (conditional - null)``.

    Args:
        condition: adapter for both predictions.
        scale: 1 is neutral, and then no unconditional pass is made.
        null: value that stands for "no condition", as in training (`ConditionPrepareBatch`).
    """

    def __init__(self, condition: Condition, scale: float, null: float = 0.0) -> None:
        self.condition = condition
        self.scale = scale
        self.null = null

    def __call__(self, network: Network, condition: torch.Tensor) -> Denoiser:
        """Bind ``condition`` and its null twin."""
        conditional = self.condition(network, condition)
        if self.scale == 1:
            return conditional
        unconditional = self.condition(network, torch.full_like(condition, self.null))

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            null = unconditional(x, t)
            return null + self.scale * (conditional(x, t) - null)

        return denoise


class ConditionPrepareBatch(DiffusionPrepareBatch):
    """Draws noise and time for a training batch, and drops conditions for classifier-free guidance.

    Args:
        num_train_timesteps: times are uniform on {first_timestep .. num_train_timesteps - 1}.
        condition_name: key of the condition in the batch, or None.
        first_timestep: lowest time (CMDM's schedule has an entry 0 that is never used).
        scheduler: its ``prediction_type`` (noise, image or velocity) is the target; None means noise.
        drop: probability that a case's condition is replaced by ``null``.
        null: value that stands for "no condition".
        mode: how ``DiffusionInferer`` joins the condition, ``"concat"`` or ``"crossattn"``.
        seed: makes every call draw the same and leaves the global generators alone, so that validation compares epochs
            on equal draws; None draws anew.
    """

    def __init__(
        self,
        num_train_timesteps: int,
        condition_name: str | None = "condition",
        *,
        first_timestep: int = 0,
        scheduler: Scheduler | None = None,
        drop: float = 0.0,
        null: float = 0.0,
        mode: str = "concat",
        seed: int | None = None,
    ) -> None:
        super().__init__(num_train_timesteps, condition_name)
        if mode not in ("concat", "crossattn"):
            raise ValueError(f"mode must be 'concat' or 'crossattn', got {mode!r}")
        if not 0 <= drop <= 1:
            raise ValueError(f"drop is a probability, got {drop}")
        self.first_timestep = first_timestep
        self.scheduler = scheduler
        self.drop = drop
        self.null = null
        self.mode = mode
        self.seed = seed

    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],  # type: ignore[override]
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict]:
        """Return image, target, (), {noise, timesteps, condition, mode}."""
        # MetaTensors carry history that no training step needs: plain tensors are faster.
        plain = {k: convert_to_tensor(v) for k, v in batchdata.items() if isinstance(v, torch.Tensor)}
        cuda = [d for d in [torch.device(device or "cpu")] if d.type == "cuda"]
        with torch.random.fork_rng(devices=cuda, enabled=self.seed is not None):
            if self.seed is not None:
                torch.manual_seed(self.seed)
            image, target, args, infer = super().__call__(plain, device, non_blocking, **kwargs)
            if "condition" in infer:
                infer |= {"condition": self.dropped(infer["condition"]), "mode": self.mode}
        return image, target, args, infer

    def get_timesteps(self, images: torch.Tensor) -> torch.Tensor:
        """A time for each case of the batch."""
        return torch.randint(self.first_timestep, self.num_train_timesteps, (len(images),), device=images.device)

    def get_target(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network is to predict."""
        kind = getattr(self.scheduler, "prediction_type", "epsilon")
        if self.scheduler is None or kind == "epsilon":
            return noise
        return images if kind == "sample" else self.scheduler.get_velocity(images, noise, timesteps)

    def dropped(self, condition: torch.Tensor) -> torch.Tensor:
        """Replace the condition of some cases by the null condition."""
        if not self.drop:
            return condition
        chosen = torch.rand(len(condition), *[1] * (condition.ndim - 1)) < self.drop
        return condition.masked_fill(chosen.to(condition.device), self.null)
