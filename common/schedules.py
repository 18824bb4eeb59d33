"""Noise schedules in float64, the references' timestep grids, and the two ancestral samplers that walk them.

DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239) and DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502).
MONAI keeps float32 tables, rebinds them in `add_noise`, and steps by `T // n` whatever grid it made. Here the tables
stay float64 and every step goes to the next entry of `timesteps`: any number of steps is a correct sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.networks.schedulers import DDPMScheduler, NoiseSchedules, Scheduler
from monai.utils import unsqueeze_right
from torch import Tensor

Noise = torch.Generator | Callable[[Tensor], Tensor] | None
Tables = tuple[Tensor, Tensor, Tensor]


# Registering is idempotent: this file may be imported as `common.schedules` and as `scripts.common.schedules`.
@NoiseSchedules.add_def("cosine_exact", "Cosine schedule in float64, Nichol & Dhariwal 2021, Eq. 17")
def cosine_exact(num_train_timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Tables:
    """Return float64 (betas, alphas, alphas_cumprod) of the cosine schedule with offset `s`."""
    f = np.cos((np.arange(num_train_timesteps + 1) / num_train_timesteps + s) / (1 + s) * np.pi / 2) ** 2
    return _tables(np.minimum(1 - f[1:] / f[:-1], max_beta))


@NoiseSchedules.add_def("linear_exact", "Linear betas in float64, Ho et al. 2020, section 4")
def linear_exact(num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Tables:
    """Return float64 (betas, alphas, alphas_cumprod) with betas linear between the two ends."""
    return _tables(np.linspace(beta_start, beta_end, num_train_timesteps))


@NoiseSchedules.add_def("scaled_linear_exact", "Betas linear in their square root, in float64 (latent diffusion)")
def scaled_linear_exact(num_train_timesteps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Tables:
    """Return float64 (betas, alphas, alphas_cumprod) with sqrt(betas) linear between the two ends."""
    return _tables(np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2)


def _tables(betas: np.ndarray | Tensor) -> Tables:
    betas = torch.as_tensor(betas, dtype=torch.float64)
    return betas, 1 - betas, torch.cumprod(1 - betas, dim=0)


class CaseNoise:
    """Noise with one generator per case, so that a case's synthesis depends neither on its batch nor on the device.

    Args:
        seeds: one seed per case of the batch.

    Example:
        >>> x = torch.zeros(2, 1, 4, 4)
        >>> torch.equal(CaseNoise([7, 8])(x)[1:], CaseNoise([8])(x[1:]))
        True
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Draw standard normal noise (B, ...) shaped like `like`, on its device and in its dtype."""
        if len(self.generators) != len(like):
            raise ValueError(f"CaseNoise has {len(self.generators)} seeds for {len(like)} cases: give each case one")
        return torch.cat([torch.randn((1, *like.shape[1:]), generator=g) for g in self.generators]).to(like)


def draw(like: Tensor, generator: Noise = None) -> Tensor:
    """Draw standard normal noise shaped like `like` from a generator, a `CaseNoise`, or the global generator."""
    if generator is None:
        return torch.randn_like(like)
    if isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
    return generator(like)


class ExactScheduler(Scheduler):
    """What our schedulers share: float64 tables nobody rebinds, noising, and the three readings of a prediction."""

    prediction_type: str

    def __init__(self, num_train_timesteps: int = 1000, schedule: str = "linear_exact", **schedule_args: Any) -> None:
        super().__init__(num_train_timesteps, schedule, **schedule_args)
        self.betas, self.alphas, self.alphas_cumprod = _tables(self.betas)

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """Return the squared signal level, float64 on the CPU, of integer timesteps in [0, T)."""
        index = timesteps.detach().cpu().long()
        if index.numel() and not 0 <= index.min() <= index.max() < self.num_train_timesteps:
            raise ValueError(f"timesteps must lie in [0, {self.num_train_timesteps}), got {index.tolist()}")
        return self.alphas_cumprod[index]

    def levels(self, timesteps: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and noise level (alpha, sigma) of scalar or per-case timesteps, ready to multiply `like`."""
        abar = unsqueeze_right(self.alpha_bar(torch.as_tensor(timesteps)), like.ndim)
        return abar.sqrt().to(like), (1 - abar).sqrt().to(like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Draw from q(x_t | x_0): alpha_t x_0 + sigma_t noise, for (B, C, *S) tensors."""
        alpha, sigma = self.levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Return the target of v-prediction, alpha_t noise - sigma_t x_0."""
        alpha, sigma = self.levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def predict_x_0(self, model_output: Tensor, sample: Tensor, alpha: float, sigma: float) -> Tensor:
        """Read x_0 off the network's output at signal level `alpha` and noise level `sigma`."""
        model_output = model_output.to(sample.dtype)
        if self.prediction_type == "epsilon":
            return (sample - sigma * model_output) / alpha
        return model_output if self.prediction_type == "sample" else alpha * sample - sigma * model_output


class DDPM(ExactScheduler, DDPMScheduler):
    """Ancestral sampling with the exact posterior between neighbours of any timestep grid; on all T steps it is Ho's.

    Args:
        num_train_timesteps: T, the length of the tables.
        schedule: a name in MONAI's `NoiseSchedules`; its own arguments follow by keyword.
        grid: "linspace" as MONAI, T-1 to 0; "strided" as latent diffusion, multiples of T // n (more than n of them
            when n does not divide T); "rounded" as CMDM, T-1 to 1: index 0 is never visited.
        steps_offset: added to every timestep of "linspace" and "strided" (latent diffusion: 1).
        final_alpha: level after the last step: "one", no noise left, or "first", that of timestep 0.
        **kwargs: MONAI's `variance_type` ("fixed_small" or "fixed_large"), `prediction_type`, `clip_sample`,
            `clip_sample_min`, `clip_sample_max`, and the schedule's arguments.
    """

    def __init__(
        self, num_train_timesteps: int = 1000, schedule: str = "linear_exact", *,
        grid: str = "linspace", steps_offset: int = 0, final_alpha: str = "one", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_train_timesteps, schedule, **kwargs)
        if grid not in ("linspace", "strided", "rounded") or final_alpha not in ("one", "first"):
            raise ValueError(f"grid: linspace, strided, rounded; final_alpha: one, first; got {grid}, {final_alpha}")
        if self.variance_type not in ("fixed_small", "fixed_large"):
            raise ValueError(f"variance_type must be fixed_small or fixed_large, got {self.variance_type}")
        if not 0 <= steps_offset < num_train_timesteps:
            raise ValueError(f"steps_offset must lie in [0, {num_train_timesteps}), got {steps_offset}")
        self.grid, self.steps_offset, self.final_alpha = grid, steps_offset, final_alpha

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the descending timesteps of a run of 1 to T steps."""
        last, offset, n = self.num_train_timesteps - 1, self.steps_offset, num_inference_steps
        most = last if self.grid == "rounded" else last + 1 - offset * (self.grid == "linspace")
        if not 1 <= n <= most:
            raise ValueError(f"num_inference_steps must lie in [1, {most}] on the {self.grid} grid, got {n}")
        if self.grid == "linspace":
            steps = torch.linspace(last - offset, 0, n).round().long() + offset
        elif self.grid == "rounded":
            steps = torch.linspace(last, 1, n).round().long()
        else:
            steps = torch.arange(0, last + 1, (last + 1) // n).flip(0) + offset
        if steps[0] > last:
            raise ValueError(f"{n} strided steps reach timestep {steps[0]} > {last}: take a divisor of {last + 1}")
        self.num_inference_steps, self.timesteps = len(steps), steps.to(device)

    def _neighbours(self, timestep: int | Tensor) -> tuple[float, float, bool]:
        """Return alpha-bar here, alpha-bar at the next entry of the grid, and whether this is the last entry."""
        steps, here = self.timesteps.tolist(), int(timestep)
        if here not in steps:
            raise ValueError(f"timestep {here} is not on the grid {steps[:3]}..{steps[-1]}: call set_timesteps first")
        rest = steps[steps.index(here) + 1 :]
        final = 1.0 if self.final_alpha == "one" else self.alphas_cumprod[0].item()
        return self.alphas_cumprod[here].item(), self.alphas_cumprod[rest[0]].item() if rest else final, not rest

    def _denoise(
        self, model_output: Tensor, sample: Tensor, abar: float, abar_prev: float, eta: float
    ) -> tuple[Tensor, Tensor, float]:
        """Return the mean of x_prev, x_0 and the noise's std: DDIM Eq. 12 and 16; eta = 1 is DDPM Eq. 7."""
        alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        x_0 = self.predict_x_0(model_output, sample, alpha, sigma)
        if self.clip_sample:
            x_0 = x_0.clamp(*self.clip_sample_values)
        variance = eta**2 * (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        # The direction to x_t is eps = (x_t - alpha x_0) / sigma, true to a clipped x_0 (MONAI keeps the network's).
        weight = max(1 - abar_prev - variance, 0.0) ** 0.5 / sigma
        return (abar_prev**0.5 - weight * alpha) * x_0 + weight * sample, x_0, max(variance, 0.0) ** 0.5

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Noise = None
    ) -> tuple[Tensor, Tensor]:
        """Go from x_t (B, C, *S) to the next timestep: return (x_prev, x_0).

        Noise is drawn at the last step too and left unused, as the references do: it keeps seeds comparable.
        """
        abar, abar_prev, last = self._neighbours(timestep)
        mean, x_0, std = self._denoise(model_output, sample, abar, abar_prev, eta=1.0)
        if self.variance_type == "fixed_large":
            std = (1 - abar / abar_prev) ** 0.5
        noise = draw(sample, generator)
        return (mean if last else mean + max(std, 1e-10) * noise), x_0  # variance >= 1e-20, as Ho's code


class DDIM(DDPM):
    """DDIM: the family of samplers from the deterministic one (eta 0) to DDPM's (eta 1), on any grid of `DDPM`.

    Args:
        eta: share of the posterior's noise that is drawn at each step, also at the last if `final_alpha` leaves some.
        *args: as `DDPM`.
        **kwargs: as `DDPM`.
    """

    def __init__(self, *args: Any, eta: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eta = eta

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Noise = None
    ) -> tuple[Tensor, Tensor]:
        """Go from x_t (B, C, *S) to the next timestep: return (x_prev, x_0)."""
        abar, abar_prev, _ = self._neighbours(timestep)
        mean, x_0, std = self._denoise(model_output, sample, abar, abar_prev, self.eta)
        return (mean + std * draw(sample, generator) if self.eta > 0 else mean), x_0
