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
        """Return ``denoise(x_t, timesteps)``; an adapter may take more, by name, of what belongs to each case."""
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
        controlnet: ControlNet for the network: ours (`controlnet.HintControlNet`) encodes the hint once for an image,
            MONAI's at every step. None takes the network's own (`controlnet.ControlledUNet`).
        scale: strength of the residuals.
        context: tokens for cross-attention as well, (1, L, D), or (B, L, D) for that batch, or numbers of words
            (1, L) or (B, L); None gives none. What a call brings along takes its place.
    """

    def __init__(
        self, controlnet: Network | None = None, scale: float = 1.0, context: torch.Tensor | None = None
    ) -> None:
        self.controlnet = controlnet
        self.scale = scale
        self.context = context

    def __call__(self, network: Network, condition: torch.Tensor, context: torch.Tensor | None = None) -> Denoiser:
        """Bind ``condition``, the hint (B, K, *S), and each case's own tokens."""
        hint, context = self.encoded(network, condition), self.context if context is None else context
        return lambda x, t: self.predict(network, hint, x, t, tokens_of(context, x))

    def encoded(self, network: Network, hint: torch.Tensor) -> torch.Tensor:
        """What of the hint does not depend on the step; MONAI's ControlNet keeps it as it is."""
        encode = getattr(network if self.controlnet is None else self.controlnet, "encode_hint", None)
        return hint if encode is None else encode(hint)

    def predict(
        self, network: Network, hint: torch.Tensor, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        """One prediction under the encoded hint."""
        look_up: Any = getattr(network, "tokens", None)
        if self.controlnet is not None and look_up is not None:
            context = look_up(context)  # only the U-Net has a table of words
        tokens = {} if context is None else {"context": context}
        if self.controlnet is None:
            return network(x, t, encoded=hint, scale=self.scale, **tokens)
        key = "encoded" if hasattr(self.controlnet, "encode_hint") else "controlnet_cond"
        control: Any = self.controlnet(x, t, **{key: hint}, conditioning_scale=self.scale, **tokens)
        down, mid = control
        return network(x, t, down_block_additional_residuals=down, mid_block_additional_residual=mid, **tokens)


class GuidedContext(ControlNetHint):
    """Classifier-free guidance by the tokens, the hint being kept on both sides (Siamese-Diffusion, ControlNet).

    The ControlNet reads the tokens too, so both sides need it: they go as one batch of twice the size.

    Args:
        guidance: scale; 1 is neutral, and then there is no unconditional half.
        null_context: tokens of the empty prompt, as ``context``.
        kwargs: as in `ControlNetHint`.
    """

    def __init__(self, guidance: float, null_context: torch.Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if guidance != 1 and null_context is None:
            raise ValueError(f"guidance {guidance} compares context with null_context: give both, or guidance 1")
        self.guidance = guidance
        self.null_context = null_context

    def __call__(self, network: Network, condition: torch.Tensor, context: torch.Tensor | None = None) -> Denoiser:
        """Bind ``condition``, the hint (B, K, *S), and each case's own tokens."""
        if self.guidance == 1:
            return super().__call__(network, condition, context)
        context = self.context if context is None else context
        if context is None:
            raise ValueError(f"guidance {self.guidance} needs a context to compare with null_context: give one")
        hint = self.encoded(network, condition).repeat(2, *[1] * (condition.ndim - 1))

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            tokens: Any = (tokens_of(self.null_context, x), tokens_of(context, x))
            pred = self.predict(network, hint, torch.cat([x, x]), torch.cat([t, t]), torch.cat(tokens))
            null, conditional = pred.chunk(2)
            return null + self.guidance * (conditional - null)

        return denoise


def tokens_of(context: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """Tokens, or numbers of words, (1, ...) or (B, ...) for each case of the batch `x`."""
    if context is None:
        return None
    if len(context) not in (1, len(x)):
        raise ValueError(f"context has {len(context)} rows for {len(x)} cases: give one for all, or each case its own")
    context = context.to(x) if context.is_floating_point() else context.to(x.device)
    return context.expand(len(x), *context.shape[1:])


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

    Where the batch has the moments of a latent (``mean`` and ``std``), latents drawn from them are noised, else the
    image.

    Args:
        num_train_timesteps: times are drawn from {first_timestep .. num_train_timesteps - 1}.
        condition_name: key of the condition in the batch, or None.
        first_timestep: lowest time (CMDM's schedule has an entry 0 that is never used).
        scheduler: its ``prediction_type`` (noise, image or velocity) is the target; None means noise.
        drop: probability that a case's condition is replaced by ``null``.
        null: value that stands for "no condition", or a whole condition (L, D) or (L,) that does.
        mode: how ``DiffusionInferer`` joins the condition, ``"concat"`` or ``"crossattn"``.
        seed: makes every call draw the same and leaves the global generators alone, so that validation compares epochs
            on equal draws; None draws anew.
        t_power: times t are drawn in proportion to (t + 1)^t_power; 0 is uniform. GuideGen has 1.5, which hardly ever
            trains the last steps of sampling.
    """

    def __init__(
        self,
        num_train_timesteps: int,
        condition_name: str | None = "condition",
        *,
        first_timestep: int = 0,
        scheduler: Scheduler | None = None,
        drop: float = 0.0,
        null: float | torch.Tensor = 0.0,
        mode: str = "concat",
        seed: int | None = None,
        t_power: float = 0.0,
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
        self.t_power = t_power

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
            plain["image"] = self.start(plain)
            image, target, args, infer = super().__call__(plain, device, non_blocking, **kwargs)
            if "condition" in infer:
                infer |= {"condition": self.dropped(infer["condition"]), "mode": self.mode}
        return image, target, args, infer

    def start(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What is noised (B, C, *S)."""
        if "mean" not in batch:
            return batch["image"]
        return batch["mean"] + batch["std"] * torch.randn_like(batch["mean"])

    def get_timesteps(self, images: torch.Tensor) -> torch.Tensor:
        """A time for each case of the batch."""
        if not self.t_power:
            return torch.randint(self.first_timestep, self.num_train_timesteps, (len(images),), device=images.device)
        drawn = self.time_law().multinomial(len(images), replacement=True)
        return drawn.to(images.device) + self.first_timestep

    def time_law(self) -> torch.Tensor:
        """Probabilities of the times {first_timestep .. num_train_timesteps - 1}, float64."""
        steps = torch.arange(self.first_timestep + 1, self.num_train_timesteps + 1, dtype=torch.float64)
        weights = steps**self.t_power
        return weights / weights.sum()

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
        return torch.where(chosen.to(condition.device), torch.as_tensor(self.null).to(condition), condition)


class HintPrepareBatch(ConditionPrepareBatch):
    """`ConditionPrepareBatch` for a network that is shown the mask and, in training, the image (Siamese-Diffusion).

    The batch has "image" (B, C, *S) in [-1, 1], "mask" (B, 1, *S) in {0, 1} and the tokens ``condition_name``.
    """

    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],  # type: ignore[override]
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict]:
        """Return z_0, target, (), {noise, timesteps, hint_mask, hint_image, context}."""
        z_0, target, args, infer = super().__call__(batchdata, device, non_blocking, **kwargs)
        image, mask = (
            convert_to_tensor(batchdata[key]).to(device, non_blocking=non_blocking) for key in ("image", "mask")
        )
        # One stem reads both: the mask gets the image's channels, the image the mask's range.
        hints = {"hint_mask": mask.expand(-1, image.shape[1], *image.shape[2:]), "hint_image": (image + 1) / 2}
        drawn = {"noise": infer["noise"], "timesteps": infer["timesteps"], "context": infer["condition"]}
        return z_0, target, args, drawn | hints
