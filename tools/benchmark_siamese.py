"""Siamese-Diffusion measured: one training step against the published one, and samplers of images of masks.

The published step (`literal_siamese`) runs once in the plain network, which tells what a user gains, and once in the
network and the precision that ours is given, which tells what the fewer passes gain alone.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import Inferer
from torch import Tensor

from common.conditioning import GuidedContext
from common.execution import FastPath
from common.sampler import DiffusionSampler
from common.schedules import DDIM
from common.siamese import NoiseConsistencyLoss, SiameseInferer
from common.solvers import DPMSolverPP
from tools.literal_siamese import literal_step
from tools.measuring import cases_of, compared, network_of, paired, plain_twin, table

CALLS = [50, 20, 15, 10, 5]
CASES = 16
REFERENCE_CALLS = 250
GUIDANCE = 3.0
TOKENS = 77  # of a prompt in Stable Diffusion, where the network reads an encoder's tokens and not words

Action = Callable[[], Any]
# k and N on either side of N / 3, from where on samples of low noise get an augmented twin.
STEPS = {"": (1, 4), ", augmenting": (3, 4)}
# Modules that run once in each pass of a part.
PARTS = {
    "encoder": "unet.conv_in",
    "decoder": "unet.out",
    "ControlNet": "controlnet.conv_in",
    "its stem": "controlnet.controlnet_cond_embedding",
}

# ---------------------------------------------------------------------------------------------------------------------
# Network call and training step


def siamese_paths(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables of network call and training step, and of the passes a step is made of."""
    bench = StepBench(parser, arguments.batch, device, arguments.compile)
    unit = cases_of(arguments.batch)
    header = [unit, "plain, as published", "ours", "ratio", "peak memory, plain", "peak memory, ours"]
    yield table(header, measure_steps(bench, arguments.runs))
    yield table([f"samples through, {unit}", *PARTS, "networks copied"], measure_passes(bench))


class Predict(Inferer):
    """One prediction, to be run on a `FastPath`."""

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        return network(inputs, *args, **kwargs)


class StepBench:
    """A random batch of training, and three networks of equal weights: plain, on the fast path, and in between.

    As many samples as one can expect have a time that is augmented, at least one.

    Args:
        parser: the bundle's config.
        batch: how many samples.
        device: where the networks run.
        compile: let the fast path compile its network.
    """

    def __init__(self, parser: ConfigParser, batch: int, device: torch.device, compile: bool = False) -> None:
        network: Any = network_of(parser, device, trained=False)
        self.fast, self.fused = network, copy.deepcopy(network)
        self.compile = compile
        image_size, latent_size, times, self.scheduler = (
            parser.get_parsed_content(key) for key in ("image_size", "latent_size", "num_train_timesteps", "scheduler")
        )
        until = SiameseInferer(self.scheduler).augment_until
        self.due = max(1, round(batch * (until + 1) / times))
        latent = torch.randn(batch, network.in_channels, *latent_size, device=device)
        picture = torch.rand(batch, parser["hint_channels"], *image_size, device=device)
        self.batch: dict[str, Any] = {
            "inputs": latent,
            "noise": torch.randn_like(latent),
            "timesteps": torch.tensor([until // 2] * self.due + [(until + times) // 2] * (batch - self.due)).to(device),
            "hint_mask": (picture[:, :1] < 0.2).to(picture).expand_as(picture),
            "hint_image": picture,
            "context": self.context(parser).to(device).expand(batch, *[-1] * (1 + (network.unet.words is None))),
        }
        self.plain: Any = plain_twin(parser, self.fast, device)

    def context(self, parser: ConfigParser) -> Tensor:
        """The prompt's words (1, L); random tokens (1, L, D) where a text encoder would have to be fetched."""
        if self.fast.unet.words is not None:
            return parser.get_parsed_content("contexts")(parser["prompt"])[None]
        return torch.randn(1, TOKENS, self.fast.unet.cross_attention_dim)

    def call(self) -> Action:
        """A prediction as published: the hint is encoded anew."""
        x, times, hint, context = (self.batch[key] for key in ("inputs", "timesteps", "hint_mask", "context"))
        return torch.no_grad()(lambda: self.plain(x, times, context, hint))

    def fast_call(self) -> Action:
        """A prediction as in our sampling: the hint has been encoded once for all calls."""
        x, times, hint, context = (self.batch[key] for key in ("inputs", "timesteps", "hint_mask", "context"))
        path = FastPath(Predict(), compile=self.compile)
        path.prepare(self.fast, x)
        with torch.no_grad(), path.autocast(x.device):
            encoded = self.fast.encode_hint(hint)
        return torch.no_grad()(lambda: path(x, self.fast, times, context, encoded=encoded))

    def literal(self, network: Any, step: int, steps: int) -> Action:
        """A training step as published."""

        def loss() -> Tensor:
            tokens = network.tokens(self.batch["inputs"], self.batch["context"])
            batch = {**self.batch, "context": tokens}
            return literal_step(network, self.scheduler, **batch, step=step, steps=steps)

        return optimised(network, loss)

    def ours(self, network: Any, step: int, steps: int, **path: Any) -> Action:
        """A training step as the bundle makes it; `path` are arguments of `FastPath`."""
        inferer, criterion = SiameseInferer(self.scheduler), NoiseConsistencyLoss()
        inferer.advance(step, steps)
        fast = FastPath(inferer, **path)
        z_0, noise, times = (self.batch[key] for key in ("inputs", "noise", "timesteps"))
        velocity = self.scheduler.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(z_0, noise, times) if velocity else noise
        return optimised(network, lambda: criterion(fast(network=network, **self.batch), target))


def optimised(network: torch.nn.Module, loss: Callable[[], Tensor]) -> Action:
    """Forward, backward and an optimiser step over the trained parameters; calling it returns the loss."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])

    def action() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return action


def measure_steps(bench: StepBench, runs: int) -> list[list[str]]:
    """Rows: network call and training step, plain and as published against ours; then equal but for the passes."""
    device = bench.batch["inputs"].device
    rows = [compared("network call", bench.call(), bench.fast_call(), runs, device)]
    for suffix, (step, steps) in STEPS.items():
        title = f"training step{suffix}{f' {bench.due}' if suffix else ''}"
        literal = bench.literal(bench.plain, step, steps)
        ours = bench.ours(bench.fast, step, steps, compile=bench.compile)
        rows.append(compared(title, literal, ours, runs, device))
        literal = bench.literal(bench.fused, step, steps)
        ours = bench.ours(bench.fused, step, steps, precision="float32", channels_last=False)
        rows.append(compared(f"{title}; both float32 with fused attention", literal, ours, runs, device))
    return rows


def measure_passes(bench: StepBench) -> list[list[str]]:
    """Rows: what of a batch goes through each part in a training step, as published and ours."""
    rows, network = [], copy.deepcopy(bench.fused)
    for suffix, (step, steps) in STEPS.items():
        for title, make in (("as published", bench.literal), ("ours", bench.ours)):
            samples, copies = passes(network, make(network, step, steps))
            rows.append([title + suffix, *(str(samples[part]) for part in PARTS), str(copies)])
    return rows


def passes(network: torch.nn.Module, action: Action) -> tuple[dict[str, int], int]:
    """Samples that go through each part of a network while an action runs, and how many copies of its halves run."""
    samples, copied = dict.fromkeys(PARTS, 0), set()

    def counter(part: str) -> Callable[..., None]:
        # A plain function: a deep copy of the module keeps it, so that copies count here too.
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            samples[part] += len(output)
            if module is not network.get_submodule(PARTS[part]):
                copied.add(PARTS[part].split(".")[0])

        return hook

    handles = [network.get_submodule(path).register_forward_hook(counter(part)) for part, path in PARTS.items()]
    try:
        action()
    finally:
        for handle in handles:
            handle.remove()
    return samples, len(copied)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers of images of masks


def pair_samplers(parser: ConfigParser, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The tables of samplers of a bundle that makes images of masks."""
    with tempfile.TemporaryDirectory() as folder:
        bench = PairBench(parser, arguments.cases or CASES, arguments.batch, folder, device)
    calls = parser["num_inference_steps"]
    header = [f"one image, {calls} calls", f"guidance {GUIDANCE:g}", "guidance 1", "ratio"]
    yield table(header, measure_guidance(bench, arguments.runs, calls))
    yield f"{len(bench.seeds)} images; RMSE in [-1, 1] to the {REFERENCE_CALLS}-call result of equal seeds:"
    header = ["sampler", "calls", "one image", "RMSE inside the lesion", "RMSE of the whole image"]
    yield table(header, measure_pairs(bench, arguments.calls or CALLS))


class PairBench:
    """Images of equal masks and seeds, drawn by samplers that differ in one thing.

    Args:
        parser: the bundle's config.
        num_cases: how many masks; phantoms, or those of its ``dataset_dir``.
        batch: how many are drawn together.
        folder: where phantoms may go; nothing there is needed later.
        device: where the network runs.
    """

    def __init__(self, parser: ConfigParser, num_cases: int, batch: int, folder: str, device: torch.device) -> None:
        parser["num_samples"], parser["phantom_cases"], parser["output_dir"] = 1, num_cases, folder
        self.batch = batch
        self.device = device
        self.network = network_of(parser, device).eval()
        preprocessing = parser.get_parsed_content("preprocessing")
        cases = parser.get_parsed_content("cases")[:num_cases]
        items = [preprocessing({**case, "source": "{}"}) for case in cases]
        self.hints, self.masks, self.contexts = (
            torch.stack([torch.as_tensor(item[key]) for item in items]).to(device)
            for key in ("image", "label", "context")
        )
        self.seeds = [case["seed"] for case in cases]
        kept = ("channels", "condition", "decode", "latent_shape")
        self.settings: dict[str, Any] = {key: parser.get_parsed_content(f"sampler::{key}") for key in kept}
        self.null_context = parser.get_parsed_content("guided::null_context")

        # The schedule that the network was trained on, walked as ours do and as published.
        names = ("num_train_timesteps", "noise_schedule", "beta_start", "beta_end", "prediction_type", "solver_order")
        times, schedule, start, end, prediction, order = (parser.get_parsed_content(name) for name in names)
        shared = {"beta_start": start, "beta_end": end, "prediction_type": prediction}
        grid: dict[str, Any] = {"grid": "strided", "steps_offset": 1, "final_alpha": "first", "clip_sample": False}
        self.solver = DPMSolverPP(times, schedule, order=order, **shared)
        self.published = DDIM(times, schedule, **grid, **shared)

    def sampler(self, scheduler: Any, calls: int, **changes: Any) -> FastPath:
        """The bundle's sampler with another scheduler."""
        return FastPath(DiffusionSampler(scheduler, calls, **{**self.settings, **changes}))

    def guided(self, guidance: float) -> GuidedContext:
        """Guidance of a scale by each case's own context."""
        return GuidedContext(guidance, self.null_context)

    def draw(self, sampler: FastPath, other: int = 0) -> Tensor:
        """Images (n, 3, H, W) in [-1, 1]; `other` makes other seeds."""
        images = []
        for i in range(0, len(self.seeds), self.batch):
            part = slice(i, i + self.batch)
            seeds = [seed + other for seed in self.seeds[part]]
            images.append(sampler(self.hints[part], self.network, seeds=seeds, context=self.contexts[part]))
        return torch.cat(images).clamp(-1, 1)

    def timed(self, scheduler: Any, calls: int, other: int = 0) -> tuple[Tensor, float]:
        """Images, and the seconds that each took."""
        self.draw(self.sampler(self.solver, 1))  # the first call of a shape is slow
        sampler, start = self.sampler(scheduler, calls), time.perf_counter()
        images = self.draw(sampler, other).cpu()
        return images, (time.perf_counter() - start) / len(images)

    def distances(self, a: Tensor, b: Tensor) -> list[float]:
        """RMSE of images (n, 3, H, W) inside the lesions, and all over."""
        error = (a - b).square().mean(1, keepdim=True)
        return [float(part.mean().sqrt()) for part in (error[self.masks.cpu() > 0], error)]


def measure_pairs(bench: PairBench, calls: Sequence[int]) -> list[list[str]]:
    """Rows: time, and distance to the long run of equal seeds; other seeds tell what a distance means."""
    reference, wall = bench.timed(bench.solver, REFERENCE_CALLS)
    solver, zero = f"DPM-Solver++({bench.solver.order}M)", "0 (reference)"
    rows = [[solver, str(REFERENCE_CALLS), f"{wall:.3f} s", zero, zero]]
    runs: list[tuple[str, Any, int, int, str]] = [
        ("the same, another seed", bench.solver, REFERENCE_CALLS, 1, " (sampler noise)"),
        ("DDIM (published)", bench.published, 50, 0, ""),
        *((solver, bench.solver, n, 0, "") for n in calls),
    ]
    for title, scheduler, n, other, remark in runs:
        images, wall = bench.timed(scheduler, n, other)
        numbers = [f"{distance:.3f}{remark}" for distance in bench.distances(images, reference)]
        rows.append([title, str(n), f"{wall:.3f} s", *numbers])
    return rows


def measure_guidance(bench: PairBench, runs: int, calls: int) -> list[list[str]]:
    """A row: what guidance 1 saves by leaving the unconditional half of the batch out."""
    draws = [
        partial(bench.draw, bench.sampler(bench.solver, calls, condition=bench.guided(g))) for g in (GUIDANCE, 1.0)
    ]
    slow, fast = (wall / len(bench.seeds) for wall in paired(draws[0], draws[1], runs, bench.device))
    return [["no unconditional half", f"{slow:.3f} s", f"{fast:.3f} s", f"**{slow / fast:.1f} x**"]]
