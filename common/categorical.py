"""Categorical diffusion: voxels hold one of K labels, and noise replaces labels by uniform ones.

Hoogeboom et al. 2021, https://arxiv.org/abs/2102.05379; on images CCDM, Zbinden et al. 2023 (2303.08888), which is
GuideGen's first stage. With A_t the share of labels kept, A = A_s, a = A_t / A_s, for any s < t:

    q(x_t | x_0) = A_t [x_t = x_0] + (1 - A_t) / K                                                (marginal)
    q(x_s | x_t, x_0) = G_c B_c / S,   G_c = a [c = x_t] + (1 - a) / K,   B_c = A [c = x_0] + (1 - A) / K
    p(x_s = c | x_t) = sum_d w_d q(c | x_t, d) = G_c (A w_c / S_c + R (1 - A) / K)                 (mixture)

with S_d = A G_d + (1 - A) / K, R = sum_d w_d / S_d and w = softmax(network): K numbers a voxel, where the published
code makes a table of K x K. In logarithms where gradients need it; and as G and S take two values each, all classes
get that of the others, and x_t alone is set right. The state is a label map (B, 1, *S).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import unsqueeze_right
from torch import Tensor, nn

from .conditioning import Concat, CrossAttention, Denoiser
from .sampler import DiffusionSampler
from .schedules import ExactScheduler, Noise, draw

Time = Tensor | int
Earlier = Time | None  # s: -1 for x_0, None for the training step before t


class CategoricalScheduler(ExactScheduler):
    """Categorical diffusion behind MONAI's scheduler API, exact for any number of steps.

    Noise is standard normal, as everywhere: its normal CDF is the one uniform number that draws a voxel's label. So any
    noise source of `schedules`, and the one reverse loop, serve labels too.

    Args:
        num_train_timesteps: T.
        num_classes: K.
        schedule: a name in MONAI's `NoiseSchedules`; CCDM's linear one is "linear_exact" from 0.01 to 0.2.
        mode: "consistent", or for parity "ccdm_v1", the published code with its defects: the cosine A_t lags a step,
            grids of fewer steps still make single steps, the loss has a cross-entropy of probabilities for logits.
        last_step: returns "argmax" of w, a "sample" from w, or "probs", w itself (B, K, *S), to average over runs.
        evidence: add log q(x_t | x_0), what the voxel itself says, to what the network says: a network then need not
            learn to copy its input, which rare labels take long for. Not in the published code.
        **schedule_args: arguments of the schedule.
    """

    prediction_type = "sample"  # the training target is x_0

    def __init__(
        self, num_train_timesteps: int, num_classes: int, schedule: str = "cosine_exact", *,
        mode: str = "consistent", last_step: str = "argmax", evidence: bool = False, **schedule_args: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_train_timesteps, schedule, **schedule_args)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, background included, got {num_classes}")
        if mode not in ("consistent", "ccdm_v1") or last_step not in ("argmax", "sample", "probs"):
            raise ValueError(f"mode: consistent, ccdm_v1; last_step: argmax, sample, probs; got {mode}, {last_step}")
        self.num_classes, self.mode, self.last_step, self.evidence = num_classes, mode, last_step, evidence
        if mode == "ccdm_v1" and schedule == "cosine_exact":  # f((t - 1) / T), neither shifted nor normalised
            s = schedule_args.get("s", 0.008)
            lagging = torch.cat([torch.ones(1).double(), self.alphas_cumprod[:-1]])
            self.alphas_cumprod = math.cos(s / (1 + s) * math.pi / 2) ** 2 * lagging

    def one_hot(self, labels: Tensor) -> Tensor:
        """Planes (B, K, *S) of a label map (B, 1, *S): what the network reads."""
        return self._hits(labels).float()

    def model_time(self, timesteps: Tensor) -> Tensor:
        """The time the network is told: CCDM counts steps from 1."""
        return timesteps + 1

    def predict(self, denoise: Denoiser, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (B, K, *S) of x_0 for a label map x_t (B, 1, *S), timesteps (B,)."""
        logits = denoise(self.one_hot(x_t), self.model_time(timesteps))
        return logits + self.marginal(x_t, timesteps).log() if self.evidence else logits  # q is symmetric in its labels

    def prior(self, noise: Tensor) -> Tensor:
        """Uniform labels, x_T, from standard normal noise, in its dtype."""
        return self._uniform_label(_uniform(noise)).to(noise.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Draw from q(x_t | x_0): label map x_0 and standard normal noise, (B, 1, *S), to label map x_t like x_0."""
        # The lower tail is replaced: near 0 a uniform number has digits left to choose the class by.
        uniform = _uniform(noise)
        lost = unsqueeze_right(1 - self.alpha_bar(torch.as_tensor(timesteps)), uniform.ndim).to(uniform)
        return torch.where(uniform < lost, self._uniform_label(uniform / lost).to(original_samples), original_samples)

    def marginal(self, labels: Tensor, t: Time, s: Earlier = -1, dtype: Any = torch.float32) -> Tensor:
        """Probabilities (B, K, *S) of q(x_t | x_s) for a label map x_s (B, 1, *S)."""
        keep, lost, _, _ = self._rates(t, s)
        keep, lost = (unsqueeze_right(rate, labels.ndim).to(labels.device, dtype) for rate in (keep, lost))
        return keep * self._hits(labels) + lost / self.num_classes

    def posterior(self, x_t: Tensor, x_0: Tensor, t: Time, s: Earlier = None, dtype: Any = torch.float32) -> Tensor:
        """Log-probabilities (B, K, *S) of q(x_s | x_t, x_0) for label maps (B, 1, *S)."""
        at, same = self._logs(t, s, x_t, dtype), x_t == x_0
        whole = torch.where(same, at["s_hit"], at["s"])
        found = (at["g"] + at["v"] - whole).repeat_interleave(self.num_classes, dim=1)
        found.scatter_(1, x_t.long(), at["g_hit"] + at["v"] - whole)
        return found.scatter_(1, x_0.long(), torch.where(same, at["g_hit"], at["g"]) + at["b_hit"] - whole)

    def posterior_mixture(self, x_t: Tensor, logits: Tensor, t: Time, s: Earlier = None) -> Tensor:
        """Log-probabilities (B, K, *S) of p(x_s | x_t): the posterior averaged over w = softmax(logits).

        The average is over x_0: the posterior of the averaged x_0 is another thing. At s = -1 it is w.
        """
        log_w = _full(logits).log_softmax(dim=1)
        at, here = self._logs(t, s, x_t, log_w.dtype), x_t.long().expand_as(log_w[:, :1])
        ratio = log_w - at["s"]
        ratio.scatter_add_(1, here, (at["s"] - at["s_hit"]).expand(here.shape))
        # p stays apart: late on it is tiny (0 in the published tables), and its logarithm would take the digits.
        mixed = torch.logaddexp(at["p"] + ratio, at["v"] + ratio.logsumexp(dim=1, keepdim=True)).add_(at["g"])
        return mixed.scatter_add_(1, here, (at["g_hit"] - at["g"]).expand(here.shape))

    def mixture(self, x_t: Tensor, w: Tensor, t: Time, s: Earlier = None) -> Tensor:
        """Probabilities (B, K, *S) of p(x_s | x_t), to draw from: `posterior_mixture` of w without logarithms."""
        at, here = self._terms(t, s), x_t.long()
        own, own_hit, rest, rest_hit, stay = (
            unsqueeze_right(rate, w.ndim).to(w)
            for rate in (
                at["g"] * at["p"] / at["s"],
                at["g_hit"] * at["p"] / at["s_hit"],
                at["g"] * at["v"] / at["s"],
                at["g"] * at["v"] / at["s_hit"],
                at["g_hit"] / at["g"],
            )
        )
        w_here = w.gather(1, here)
        rest = rest * (1 - w_here) + rest_hit * w_here  # G R (1 - A) / K
        return torch.addcmul(rest, own, w).scatter_(1, here, own_hit * w_here + stay * rest)

    def kl(self, x_0: Tensor, x_t: Tensor, logits: Tensor, t: Time, s: Earlier = None) -> Tensor:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of each voxel (B, 1, *S); at s = -1 it is -log w[x_0]."""
        ours = self.posterior_mixture(x_t, logits, t, s)
        ours = ours.clamp(min=math.log(1e-12)) if self.mode == "ccdm_v1" else ours
        true = self.posterior(x_t, x_0, t, s, ours.dtype).clamp_(min=-1e3)  # of what cannot be: 0 times a finite number
        return (true.exp() * (true - ours)).sum(dim=1, keepdim=True)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the descending timesteps T - 1 .. 0 of a run of 1 to T steps."""
        n, most = num_inference_steps, self.num_train_timesteps
        if not 1 <= n <= most:
            raise ValueError(f"num_inference_steps must lie in [1, {most}], got {n}")
        self.num_inference_steps = n
        self.timesteps = torch.linspace(most - 1, 0, n, dtype=torch.float64).round().long().to(device)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Noise = None
    ) -> tuple[Tensor, Tensor]:
        """Go from x_t (B, 1, *S) to the next timestep by the network's logits (B, K, *S): return (x_prev, w)."""
        if model_output.shape[1] != self.num_classes:
            raise ValueError(f"the network predicts {model_output.shape[1]} classes, expected {self.num_classes}")
        steps, here, w = self.timesteps.tolist(), int(timestep), _full(model_output).softmax(dim=1)
        if here not in steps:
            raise ValueError(f"timestep {here} is not on the grid {steps[:3]}..{steps[-1]}: call set_timesteps first")
        previous = [*steps, -1][steps.index(here) + 1]
        if previous < 0 and self.last_step != "sample":
            return (w if self.last_step == "probs" else w.argmax(dim=1, keepdim=True).to(sample)), w
        stride = None if self.mode == "ccdm_v1" else previous
        # Inverse CDF: how many classes lie below a uniform share of the whole. In place, class by class: at full size
        # a CPU spends more time on fresh memory than on sums.
        cdf = self.mixture(sample, w, here, stride).split(1, dim=1)
        for below, upto in pairwise(cdf):
            upto += below
        share = _uniform(draw(sample.float(), generator)).to(w) * cdf[-1]
        x_prev = torch.zeros_like(sample)
        for upto in cdf:
            x_prev += upto < share
        return x_prev, w

    def _hits(self, labels: Tensor) -> Tensor:
        classes = torch.arange(self.num_classes, device=labels.device, dtype=labels.dtype)
        return labels == classes.view(-1, *[1] * (labels.ndim - 2))

    def _uniform_label(self, uniform: Tensor) -> Tensor:
        return (uniform * self.num_classes).floor().clamp(max=self.num_classes - 1)

    def _rates(self, t: Time, s: Earlier) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a, 1 - a, A_s and 1 - A_s in float64, each (1,) or (B,)."""
        here = torch.as_tensor(t).detach().cpu().long().reshape(-1)
        before = here - 1 if s is None else torch.as_tensor(s).cpu().long().expand_as(here)
        if before.min() < -1 or not (before < here).all():
            raise ValueError(f"s must lie in [-1, t), got {before.tolist()} for {here.tolist()}")
        abar, p = self.alpha_bar(here), torch.cat([torch.ones(1).double(), self.alphas_cumprod])[before + 1]
        a, lost = (self.alphas[here], self.betas[here]) if s is None else (abar / p, 1 - abar / p)
        return a, lost, p, 1 - p

    def _terms(self, t: Time, s: Earlier) -> dict[str, Tensor]:
        """The formulas' constants in float64, twice where the label at hand makes a difference."""
        a, lost, p, lost_s = self._rates(t, s)
        g, v = lost / self.num_classes, lost_s / self.num_classes
        return {"g": g, "g_hit": a + g, "v": v, "b_hit": p + v, "p": p, "s": p * g + v, "s_hit": p * (a + g) + v}

    def _logs(self, t: Time, s: Earlier, like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Logarithms of the constants."""
        found = self._terms(t, s)
        return {k: unsqueeze_right(x.log(), like.ndim).to(like.device, dtype) for k, x in found.items()}


def _full(logits: Tensor) -> Tensor:  # under AMP the network's logits come in half
    return logits if logits.dtype == torch.float64 else logits.float()


def _uniform(noise: Tensor) -> Tensor:
    """Standard normal numbers by their CDF to uniform ones; torch's own ndtr has no digits in float32's lower tail."""
    return torch.erfc(noise.float() * -(0.5**0.5)) / 2


class CategoricalInferer(Inferer):
    """Training's forward pass, with the arguments of MONAI's ``DiffusionInferer``: noise a label map, predict x_0."""

    def __init__(self, scheduler: CategoricalScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: Callable[..., Tensor], noise: Tensor, timesteps: Tensor,
        condition: Tensor | None = None, mode: str = "crossattn",
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return what `CategoricalKLLoss` reads: logits (B, K, *S), x_t (B, 1, *S), timesteps (B,).

        Args:
            inputs: label map x_0 (B, 1, *S), values in {0 .. K - 1}; the noise, standard normal, has its shape.
            network: predicts logits from ``(one_hot(x_t), timesteps, context=)``.
            condition: further planes (B, C, *S) for mode "concat", tokens (B, L, D) for "crossattn", or None.
        """
        k = self.scheduler.num_classes
        if inputs.shape[1] != 1 or not 0 <= inputs.min() <= inputs.max() < k:
            got = f"{tuple(inputs.shape)} with {inputs.min().item():g}..{inputs.max().item():g}"
            raise ValueError(f"expected labels (B, 1, *S) in 0..{k - 1}, got {got}: map them or set num_classes")
        x_t = self.scheduler.add_noise(inputs, noise, timesteps)
        adapter = Concat() if mode == "concat" else CrossAttention()
        denoise = network if condition is None else adapter(network, condition)
        logits = self.scheduler.predict(denoise, x_t, timesteps)
        return {"logits": logits, "x_t": x_t, "timesteps": timesteps}


class CategoricalKLLoss(nn.Module):
    """KL divergence between the true and the predicted reverse step, the variational bound's term.

    Args:
        scheduler: the noise; its mode "ccdm_v1" makes this the published loss, with ``reduction="sum"``.
        class_weights: of the true class of a voxel, for the KL; None weighs all alike.
        reduction: over voxels, "mean" or "sum"; over cases always the mean.
        ce_weight: weight of the cross-entropy of x_0, an auxiliary that says at every time what the bound says late
            (Austin et al. 2021, 2107.03006, Eq. 5): what trains in minutes.
        balance: weight of each class in that cross-entropy, so that small organs are learned as soon as large ones; the
            logits stay those of the unweighted truth, as the weights join them (Menon et al. 2021, 2007.07314).
    """

    def __init__(
        self, scheduler: CategoricalScheduler, class_weights: Sequence[float] | None = None, reduction: str = "mean",
        ce_weight: float = 0.0, balance: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        k = scheduler.num_classes
        weights, balances = (torch.ones(k) if w is None else torch.tensor(list(w)) for w in (class_weights, balance))
        if {len(weights), len(balances)} != {k} or not (balances > 0).all() or reduction not in ("mean", "sum"):
            got = f"{len(weights)} class_weights, {len(balances)} in balance, {k} classes, reduction {reduction!r}"
            raise ValueError(f"expected a class weight a class, balance above 0, reduction 'mean' or 'sum', got {got}")
        self.scheduler, self.class_weights, self.reduction, self.ce_weight = scheduler, weights, reduction, ce_weight
        self.balance = balances
        self.latest: dict[str, Tensor] = {}

    def terms(self, pred: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """KL and, where it is asked for, cross-entropy of each case (B,)."""
        logits, labels = _full(pred["logits"]), target[:, 0].long()
        kl = self.scheduler.kl(target, pred["x_t"], logits, pred["timesteps"])[:, 0]
        found = {"kl": kl * self.class_weights.to(kl)[labels]}
        if self.ce_weight:
            balance = self.balance.to(kl)
            shifted = logits + balance.log().view(-1, *[1] * (logits.ndim - 2))
            ce = nn.functional.cross_entropy(shifted, labels, weight=balance, reduction="none")
            found["ce_x_0"] = self.ce_weight * ce
        if self.scheduler.mode == "ccdm_v1":  # probabilities taken for logits: it never falls below ln(1 + (K - 1) / e)
            found["ce"] = nn.functional.cross_entropy(logits.softmax(dim=1), labels, reduction="none")
        return {name: getattr(value.flatten(1), self.reduction)(1) for name, value in found.items()}

    def forward(self, pred: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Sum the terms of a `CategoricalInferer`'s prediction against x_0 (B, 1, *S); `latest` keeps them."""
        terms = {name: values.mean() for name, values in self.terms(pred, target).items()}
        self.latest = {name: value.detach() for name, value in terms.items()}
        return torch.stack(list(terms.values())).sum()


class CategoricalSampler(DiffusionSampler):
    """`DiffusionSampler` with a `CategoricalScheduler`: the state is a label map, shown to the network as planes."""

    def initial(self, inputs: Tensor, denoise: Denoiser, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """The state the loop starts from: uniform labels."""
        return self.scheduler.prior(super().initial(inputs, denoise, noise))

    def step(self, denoise: Denoiser, x: Tensor, t: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
        return super().step(lambda labels, times: self.scheduler.predict(denoise, labels, times), x, t, noise)
