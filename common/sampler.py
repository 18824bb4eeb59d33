"""Sampling: the one reverse loop, as a MONAI ``Inferer``, Lung-DDPM's two ways to keep the surrounding anatomy, and
chains of samplers.

``DiffusionSampler`` knows a scheduler (MONAI's contract) and a conditioning adapter; subclasses change where the loop
starts (`initial`) or what happens after a step (`after_step`). Every case draws from its own seed, so its sample does
not depend on the batch it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.networks.schedulers.scheduler import Scheduler
from monai.utils import convert_to_tensor
from tqdm import tqdm

from .conditioning import Concat, Condition, Denoiser, Network
from .schedules import CaseNoise


class DiffusionSampler(Inferer):
    """Turns a condition into a sample by running a scheduler backwards.

    Args:
        scheduler: any of ours in `schedules` and `solvers`, or a deterministic one of MONAI's (its random ones cannot
            draw case by case).
        num_inference_steps: network calls for one sample.
        channels: channels of the sample.
        condition: adapter that binds the condition to the network.
        decode: maps the finished state to the image, e.g. an autoencoder's decoder; None when diffusion runs on pixels.
        latent_shape: spatial shape of the state; None takes the condition's.
        seed: case b of a call without seeds draws from ``seed + b``.
        on_step: called as ``on_step(index, x)`` after every step, to watch or record the loop.
        verbose: show a progress bar, on a terminal.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        num_inference_steps: int,
        *,
        channels: int = 1,
        condition: Condition | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        latent_shape: Sequence[int] | None = None,
        seed: int = 0,
        on_step: Callable[[int, torch.Tensor], None] | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        self.scheduler: Any = scheduler
        self.num_inference_steps = num_inference_steps
        self.channels = channels
        self.condition = condition or Concat()
        self.decode = decode
        self.latent_shape = latent_shape
        self.seed = seed
        self.on_step = on_step
        self.quiet = None if verbose else True  # None: tqdm shows the bar on a terminal only

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: Network,
        *,
        seeds: Sequence[int] | torch.Tensor | None = None,
        noise: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **condition: torch.Tensor,
    ) -> torch.Tensor:
        """Sample one image for each case of the batch.

        Args:
            inputs: what the condition is read from (B, K, *S); subclasses say more.
            network: predicts from ``(x_t, timesteps, ...)``.
            seeds: one for each case.
            noise: source of all draws, ``noise(like) -> tensor``; it takes the place of the seeds.
            condition: what else each case brings for the adapter, e.g. ``context``.

        Returns:
            sample, float32 (B, channels, *S).
        """
        inputs = convert_to_tensor(inputs)  # a MetaTensor's history would be carried through every step
        if noise is None:
            cases = range(self.seed, self.seed + len(inputs)) if seeds is None else [int(s) for s in seeds]
            noise = CaseNoise(list(cases))
        denoise = self.condition(network, self.condition_of(inputs), **condition)
        x = self.initial(inputs, denoise, noise)

        self.scheduler.set_timesteps(self.num_inference_steps)
        steps = tqdm(self.scheduler.timesteps, desc="sampling", unit="call", disable=self.quiet, leave=False)
        for index, t in enumerate(steps):
            x = self.step(denoise, x, t, noise)
            x = self.after_step(x, index, inputs, noise)
            if self.on_step is not None:
                self.on_step(index, x)
        return x if self.decode is None else self.decode(x)

    def step(
        self, denoise: Denoiser, x: torch.Tensor, t: torch.Tensor, noise: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """One network call and one scheduler step; the state stays float32 whatever the network computes in."""
        pred = denoise(x, t.to(x.device).expand(len(x))).to(x.dtype)
        return self.scheduler.step(pred, t, x, generator=noise)[0]

    def condition_of(self, inputs: torch.Tensor) -> torch.Tensor:
        """The part of the inputs that conditions the network."""
        return inputs

    def initial(
        self, inputs: torch.Tensor, denoise: Denoiser, noise: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The state the loop starts from: pure noise."""
        shape = tuple(self.latent_shape or inputs.shape[2:])
        return noise(torch.empty(len(inputs), self.channels, *shape, device=inputs.device))

    def after_step(
        self, x: torch.Tensor, index: int, inputs: torch.Tensor, noise: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Hook: amend the state after step ``index``."""
        return x


class LayoutGuidedSampler(DiffusionSampler):
    """Lung-DDPM's anatomically aware sampling: after each step the background is the re-noised reference.

    ``inputs`` is the reference image, then the layout's channels in {-1, 1}: (B, 1 + K, *S). Background is where every
    channel is -1. A reference voxel that is NaN is unknown and is generated: with no reference at all, everything is.

    Args:
        scheduler: as in `DiffusionSampler`.
        num_inference_steps: as in `DiffusionSampler`.
        blend_from: blend after the steps whose time is at most this, and after the last; negative never blends, None
            always does.
        blend_mode: ``"corrected"`` brings the background to the noise level the step arrived at, and to the reference
            itself at the end; ``"reference"`` uses the level the step came from, as published (the background keeps
            noise of std 0.014).
        kwargs: as in `DiffusionSampler`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        num_inference_steps: int,
        *,
        blend_from: float | None = None,
        blend_mode: str = "corrected",
        **kwargs: object,
    ) -> None:
        super().__init__(scheduler, num_inference_steps, **kwargs)  # type: ignore[arg-type]
        if blend_mode not in ("corrected", "reference"):
            raise ValueError(f"blend_mode must be 'corrected' or 'reference', got {blend_mode!r}")
        self.blend_from = float("inf") if blend_from is None else blend_from
        self.blend_mode = blend_mode

    def condition_of(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layout's channels."""
        if inputs.shape[1] <= self.channels:
            raise ValueError(
                f"inputs have {inputs.shape[1]} channels, expected the reference ({self.channels}) and at least one "
                "layout channel: concatenate them in preprocessing"
            )
        return inputs[:, self.channels :]

    def background(self, inputs: torch.Tensor) -> torch.Tensor:
        """Where the reference is kept: outside every label, and known."""
        outside = (inputs[:, self.channels :] <= -1).all(dim=1, keepdim=True)
        return outside & inputs[:, : self.channels].isfinite()

    def after_step(
        self, x: torch.Tensor, index: int, inputs: torch.Tensor, noise: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Keep the step inside the layout, the re-noised reference outside."""
        # The reference implementation draws whether it blends or not: keep its random stream.
        z = noise(x)
        times = self.scheduler.timesteps
        last = index + 1 == len(times)
        # A solver's last call stands above time 0: whoever blends at all pins the background at the end.
        if (0 if last else times[index]) > self.blend_from:
            return x
        reference = inputs[:, : self.channels]
        if self.blend_mode == "corrected" and last:
            known = reference
        else:
            known = self.scheduler.add_noise(reference, z, times[index + (self.blend_mode == "corrected")])
        return torch.where(self.background(inputs), known, x)


class InversionSampler(LayoutGuidedSampler):
    """Lung-DDPM+ as published: the background starts from the reference run up the ODE, and is not blended again.

    Args:
        scheduler: a solver whose ``set_timesteps`` knows ``invert=True`` (`solvers.DPMSolverPP`).
        num_inference_steps: network calls for each of the two directions.
        kwargs: as in `LayoutGuidedSampler`; ``blend_from`` defaults to never.
    """

    def __init__(self, scheduler: Scheduler, num_inference_steps: int, **kwargs: object) -> None:
        super().__init__(scheduler, num_inference_steps, **{"blend_from": -1.0, **kwargs})  # type: ignore[arg-type]

    def initial(
        self, inputs: torch.Tensor, denoise: Denoiser, noise: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Noise inside the layout, the inverted reference outside."""
        z = super().initial(inputs, denoise, noise)
        return torch.where(self.background(inputs), self.invert(inputs, denoise, noise), z)

    def invert(
        self, inputs: torch.Tensor, denoise: Denoiser, noise: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Run the reference image up to pure noise, under the same condition."""
        x = inputs[:, : self.channels].nan_to_num(0, posinf=0, neginf=0)
        self.scheduler.set_timesteps(self.num_inference_steps, invert=True)
        for t in tqdm(self.scheduler.timesteps, desc="inverting", unit="call", disable=self.quiet, leave=False):
            x = self.step(denoise, x, t, noise)
        return x


class CascadeSampler(Inferer):
    """Two samplers in a chain: the second is conditioned on what the first has drawn (GuideGen: labels, then CT).

    A case that brings its own result of the first stage skips that stage.

    Args:
        first: sampler of the first stage.
        first_network: its network; the second's is the engine's.
        second: sampler of the second stage.
        between: brings what the first draws to the second's grid.
    """

    def __init__(
        self,
        first: Inferer,
        first_network: Network,
        second: Inferer,
        between: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.first = first
        self.first_network = first_network
        self.second = second
        self.between = between

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: Network,
        *,
        drawn: torch.Tensor,
        seeds: Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the second stage drew, then what it was drawn from, (B, C + D, *S).

        Args:
            inputs: condition of the first stage (B, ...).
            network: of the second stage.
            drawn: result of the first stage (B, D, *S) on the second's grid; a case of negative values has none.
            seeds: one for each case.
        """
        drawn = convert_to_tensor(drawn).clone()
        missing = (drawn.flatten(1) < 0).all(dim=1).nonzero()[:, 0]
        if len(missing):
            chosen = None if seeds is None else [int(seeds[row]) for row in missing.tolist()]
            made = self.first(convert_to_tensor(inputs)[missing], self.first_network, seeds=chosen)
            drawn[missing] = (made if self.between is None else self.between(made)).to(drawn)
        return torch.cat([self.second(drawn, network, seeds=seeds), drawn], dim=1)
