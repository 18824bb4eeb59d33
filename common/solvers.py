"""DPM-Solver++: a fast solver of the probability-flow ODE, orders 1 to 3, multistep or singlestep, up or down in time.

Lu et al. 2022, https://arxiv.org/abs/2211.01095. With lambda = log(alpha / sigma), the ODE's solution in terms of x_0
    x_t = sigma_t / sigma_s x_s + sigma_t int_{lambda_s}^{lambda_t} e^lambda x_0(lambda) d lambda            (Eq. 9)
is exact but for x_0's Taylor expansion in lambda. Lung-DDPM+ samples with it; MONAI has no such scheduler.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schedules import ExactScheduler, Noise

CHOICES = {
    "order": (1, 2, 3),
    "method": ("multistep", "singlestep"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "thresholding": ("none", "clamp", "dynamic"),
    "spacing": ("time", "logsnr"),
    "curvature": ("released", "exact"),
}


class DPMSolverPP(ExactScheduler):
    """DPM-Solver++ behind MONAI's scheduler API; one `step` per network call, from t = 1 to 1/N (N training steps).

    Times: the discrete schedule's step n = 1..N stands at t = n / N, and the network is told (t - 1/N) * `time_scale`.
    A run is one sequence of steps in the order of `timesteps`; it ends at the noise level of the first training step.

    Args:
        num_train_timesteps: N.
        schedule: a name in MONAI's `NoiseSchedules`; its own arguments follow by keyword.
        order: 1 (DDIM), 2 or 3.
        method: "multistep" extrapolates earlier predictions; "singlestep" spends `order` calls on each interval.
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding: of x_0: "none", "clamp" to [-1, 1], or "dynamic", scaled by the case's 0.995 quantile (Imagen).
        time_scale: None for N, the times the network was trained on; Lung-DDPM+ as released says 1000.
        spacing: grid uniform in "time" (Lung-DDPM+) or in "logsnr" (the paper's).
        lower_order_final: multistep runs of fewer than 10 steps end with lower orders, which is more stable.
        curvature: of multistep order 3. The released solver, like every descendant of the authors' code, takes half of
            x_0'', and so converges with order 2; "exact" takes all: order 3, yet no better on coarse "time" grids.
        **schedule_args: arguments of the schedule.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_exact",
        *,
        order: int = 2,
        method: str = "multistep",
        prediction_type: str = "epsilon",
        thresholding: str = "none",
        time_scale: float | None = None,
        spacing: str = "time",
        lower_order_final: bool = True,
        curvature: str = "released",
        **schedule_args: Any,
    ) -> None:
        super().__init__(num_train_timesteps, schedule, **schedule_args)
        self.order, self.method, self.prediction_type = order, method, prediction_type
        self.thresholding, self.spacing, self.lower_order_final = thresholding, spacing, lower_order_final
        self.curvature = curvature
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        self.time_scale = float(time_scale or num_train_timesteps)
        self.nodes = np.arange(1, num_train_timesteps + 1) / num_train_timesteps
        self.log_alphas = 0.5 * torch.log1p(-self.betas).cumsum(0).numpy()
        self.set_timesteps(num_train_timesteps)

    # -- the continuous schedule -------------------------------------------------------------------------------------

    def log_alpha(self, t: np.ndarray) -> np.ndarray:
        """Return log alpha(t): linear between the nodes n / N, and beyond them."""
        position = t * self.num_train_timesteps - 1
        left = np.clip(np.floor(position).astype(int), 0, self.num_train_timesteps - 2)
        return self.log_alphas[left] + (position - left) * (self.log_alphas[left + 1] - self.log_alphas[left])

    def log_snr(self, t: np.ndarray) -> np.ndarray:
        """Return lambda(t) = log(alpha / sigma), which falls with t."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))

    def time_of(self, log_snr: np.ndarray) -> np.ndarray:
        """Return the t in [1/N, 1] of a lambda: the exact inverse of `log_snr`."""
        return np.interp(-0.5 * np.logaddexp(0, -2 * log_snr), self.log_alphas[::-1], self.nodes[::-1])

    def _even(self, start: float, end: float, n: int) -> np.ndarray:
        """Return n + 1 times from start to end at equal distances in lambda."""
        return self.time_of(np.linspace(self.log_snr(np.array(start)), self.log_snr(np.array(end)), n + 1))

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """Return the squared signal level, float64 on the CPU, of model times (integers or not)."""
        t = timesteps.detach().cpu().double().numpy() / self.time_scale + 1 / self.num_train_timesteps
        return torch.as_tensor(np.exp(2 * self.log_alpha(t)))

    # -- the grid ----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, invert: bool = False
    ) -> None:
        """Choose the grid of a run and forget the last run.

        Args:
            num_inference_steps: number of network calls.
            device: where `timesteps` lies.
            invert: walk up from t = 1/N to 1, which turns an image into its noise.
        """
        n = num_inference_steps
        if n < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {n}")
        t = np.linspace(1, 1 / self.num_train_timesteps, n + 1)
        if self.spacing == "logsnr":
            t = self._even(t[0], t[-1], n)
        t = t[::-1].copy() if invert else t
        # Call i belongs to the interval [first, end] of the grid; calls inside it lie evenly in lambda.
        size = self.order if self.method == "singlestep" else 1
        self._intervals = [(i - i % size, min(i - i % size + size, n)) for i in range(n)]
        for first, end in self._intervals:
            t[first + 1 : end] = self._even(t[first], t[end], end - first)[1:-1]
        alpha_bar = np.exp(2 * self.log_alpha(t))
        self._lambda, self._alpha = self.log_snr(t).tolist(), np.sqrt(alpha_bar).tolist()
        self._sigma = np.sqrt(1 - alpha_bar).tolist()
        times = (t[:-1] - 1 / self.num_train_timesteps) * self.time_scale
        self.timesteps = torch.from_numpy(times).float().to(device)
        self.num_inference_steps = n
        self._restart()

    def _restart(self) -> None:
        self._next: int | None = None  # the call that must come, None for any
        self._history: list[tuple[float, Tensor]] = []  # (lambda, x_0) of earlier calls, newest first

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Noise = None
    ) -> tuple[Tensor, Tensor]:
        """Use one network call: return the sample (B, C, *S) at the next call's time, and x_0.

        Args:
            model_output: the network's answer at `timestep`.
            timestep: an entry of `timesteps`; a run may begin anywhere on the grid, then goes on in order.
            sample: the current sample (B, C, *S), which a blend may have changed since the last step.
            generator: unused, the solver is deterministic.
        """
        call = self._position(float(timestep))
        first = self._intervals[call][0]
        x_0 = self._threshold(self.predict_x_0(model_output, sample, self._alpha[call], self._sigma[call]))
        if call == first:
            self._start = sample, x_0
            self._history = self._history if self.method == "multistep" else []
        self._history = [(self._lambda[call], x_0), *self._history][: self.order]

        # Eq. 9 with x_0 = its value at the interval's start, then a slope, then a curvature (all in units of h).
        start, x_0_start = self._start
        h = self._lambda[call + 1] - self._lambda[first]
        p1 = math.expm1(-h)
        p2 = p1 / h + 1
        alpha, ratio = self._alpha[call + 1], self._sigma[call + 1] / self._sigma[first]
        x_next = ratio * start - alpha * p1 * x_0_start
        slope, curvature = self._derivatives(call, h)
        if slope is not None:
            x_next = x_next + alpha * (p2 if curvature is not None else -0.5 * p1) * slope
        if curvature is not None:
            x_next = x_next - alpha * (p2 / h - 0.5) * curvature

        self._next = call + 1
        if self._next == len(self._intervals):
            self._restart()
        return x_next, x_0

    def _position(self, time: float) -> int:
        """Return the call that stands at model time `time`, or say what is wrong with it."""
        distance = (self.timesteps.cpu() - time).abs()
        call = int(distance.argmin())
        if distance[call] > 1e-5 * self.time_scale:
            raise ValueError(f"model time {time} is not on the grid {self.timesteps.tolist()}: call set_timesteps")
        due = self._intervals[call][0] if self._next is None else self._next
        if call != due:
            raise ValueError(f"step got call {call}, expected {due}: follow timesteps, or set_timesteps to begin again")
        return call

    def _threshold(self, x_0: Tensor) -> Tensor:
        if self.thresholding == "clamp":
            return x_0.clamp(-1, 1)
        if self.thresholding == "dynamic":
            # Imagen (Saharia et al. 2022, section 2.3), case by case: a case must not depend on its batch.
            bound = x_0.abs().flatten(1).float().quantile(0.995, dim=1).clamp(min=1).to(x_0)
            bound = bound.view(-1, *[1] * (x_0.ndim - 1))
            return x_0.clamp(-bound, bound) / bound
        return x_0

    def _derivatives(self, call: int, h: float) -> tuple[Tensor | None, Tensor | float | None]:
        """Return h x_0' and h^2 x_0'' by divided differences in lambda, None where the order has none."""
        points, (first, end) = self._history, self._intervals[call]
        if self.method == "singlestep":
            points = [points[0], points[-1]][: 1 + call - first]
        elif self.lower_order_final and len(self._intervals) < 10:
            points = points[: len(self._intervals) - call]
        if len(points) == 1:
            return None, None
        slopes = [(m - n) * (h / (at - before)) for (at, m), (before, n) in pairwise(points)]
        if len(slopes) == 1:  # 3S weighs its slope as a third-order method, with no curvature
            return slopes[0], 0.0 if end - first == 3 else None
        change, span = slopes[0] - slopes[1], points[0][0] - points[2][0]
        weight = (1 if self.curvature == "released" else 2) * h / span
        return slopes[0] + change * ((points[0][0] - points[1][0]) / span), change * weight
