"""One contract for every sampler on every scheduler, then what layout guidance and inversion add."""

from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import DDIMScheduler

from common.categorical import CategoricalSampler, CategoricalScheduler
from common.conditioning import Condition, CrossAttention, Guided
from common.sampler import CascadeSampler, DiffusionSampler, InversionSampler, LayoutGuidedSampler
from common.schedules import DDIM, DDPM
from common.slices import LabelsToGrid, PlanesCondition, SliceSampler
from common.solvers import DPMSolverPP
from common.unet import DiffusionUNet

T, N = 50, 6
SCHEDULERS = {
    "MONAI-DDIM": lambda: DDIMScheduler(T, "linear_beta"),
    "DDPM": lambda: DDPM(T, "cosine_exact"),
    "DDIM": lambda: DDIM(T, "cosine_exact"),
    "DDIM-eta": lambda: DDIM(T, "cosine_exact", eta=0.7),
    "DPM-2": lambda: DPMSolverPP(T, "cosine_exact", thresholding="clamp"),
    "DPM-3": lambda: DPMSolverPP(T, "cosine_exact", order=3, thresholding="dynamic"),
    "DPM-3-single": lambda: DPMSolverPP(T, "cosine_exact", order=3, method="singlestep"),
}
SAMPLERS = {
    "plain": DiffusionSampler,
    "guided": LayoutGuidedSampler,
    "reference": lambda *a, **k: LayoutGuidedSampler(*a, blend_mode="reference", **k),
    "inversion": InversionSampler,
}
PAIRS = [
    pytest.param(sampler, scheduler, id=f"{s}-{name}")
    for s, sampler in SAMPLERS.items()
    for name, scheduler in SCHEDULERS.items()
    if s != "inversion" or name.startswith("DPM")
]
every = pytest.mark.parametrize(("sampler", "scheduler"), PAIRS)
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)


class Stub:
    """Predicts 0.1 x from the image channel and counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.times: list[float] = []
        self.dtype = dtype

    def __call__(self, x, t):
        assert t.shape == (len(x),)
        self.times.append(t[0].item())
        return (0.1 * x[:, :1]).to(self.dtype)


def cases(batch: int = 3, layout: int = 2, size: tuple[int, ...] = (6, 5, 4), seed: int = 0) -> torch.Tensor:
    """Reference in [-1, 1], then one-hot layout channels in {-1, 1}, about half of it background."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 1, *size, generator=generator) * 2 - 1
    label = (torch.rand(batch, 1, *size, generator=generator) * 2 * layout).long() - layout + 1
    return torch.cat([image, *[2.0 * (label == k + 1) - 1 for k in range(layout)]], dim=1)


def background(inputs: torch.Tensor) -> torch.Tensor:
    return (inputs[:, 1:] == -1).all(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# The contract


@every
def test_a_case_and_its_seed_fix_the_sample_whatever_the_batch(sampler, scheduler):
    run, inputs, seeds = sampler(scheduler(), N), cases(), [11, 12, 13]
    together = run(inputs, Stub(), seeds=seeds)
    assert together.shape == (3, 1, 6, 5, 4)
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    assert torch.equal(run(inputs.flip(0), Stub(), seeds=seeds[::-1]).flip(0), together)
    for b in range(3):
        assert torch.equal(run(inputs[b : b + 1], Stub(), seeds=torch.tensor(seeds[b : b + 1])), together[b : b + 1])
    assert not torch.equal(run(inputs, Stub(), seeds=[1, 2, 3]), together)


@every
def test_neither_the_global_generator_nor_the_inputs_are_touched(sampler, scheduler):
    inputs, before = cases(), torch.random.get_rng_state()
    kept = inputs.clone()
    sampler(scheduler(), N)(inputs, Stub())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(inputs, kept)


@every
def test_no_hidden_network_calls(sampler, scheduler):
    network = Stub()
    run = sampler(scheduler(), N)
    run(cases(), network)
    assert len(network.times) == (2 * N if sampler is InversionSampler else N)
    assert network.times[-N:] == run.scheduler.timesteps.tolist()


@every
def test_two_dimensions_are_three_with_a_singleton_axis(sampler, scheduler):
    flat = cases(size=(6, 5))
    deep = sampler(scheduler(), N)(flat.unsqueeze(-1), Stub(), seeds=[1, 2, 3])
    assert torch.equal(sampler(scheduler(), N)(flat, Stub(), seeds=[1, 2, 3]), deep.squeeze(-1))


@every
def test_the_state_stays_float32_under_a_bf16_network(sampler, scheduler):
    states = []
    run = sampler(scheduler(), N, on_step=lambda i, x: states.append(x))
    half = run(cases(), Stub(torch.bfloat16))
    full = sampler(scheduler(), N)(cases(), Stub())
    assert {x.dtype for x in states} == {torch.float32}
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.05)


@every
def test_on_step_sees_every_step_in_order(sampler, scheduler):
    seen = []
    sample = sampler(scheduler(), N, on_step=lambda i, x: seen.append((i, x.clone())))(cases(), Stub())
    assert [i for i, _ in seen] == list(range(N))
    assert torch.equal(seen[-1][1], sample)


@pytest.mark.parametrize(("sampler", "channels"), zip(SAMPLERS.values(), (4, 3, 3, 3)), ids=SAMPLERS)
def test_a_real_network_agrees_closely_between_batches(sampler, channels):
    torch.manual_seed(0)
    network = DiffusionUNet(2, channels, 1, channels=(8, 8), attention_levels=(False, True), num_res_blocks=1,
                            norm_num_groups=4, num_head_channels=8).eval()  # fmt: skip
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)
    run, inputs = sampler(DPMSolverPP(T, "cosine_exact", thresholding="clamp"), 4), cases(size=(8, 8))
    together = run(inputs, network, seeds=[1, 2, 3])
    for b in range(3):
        alone = run(inputs[b : b + 1], network, seeds=[b + 1])
        torch.testing.assert_close(alone, together[b : b + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_run_that_failed_halfway_leaves_no_trace(sampler):
    run, count = sampler(DPMSolverPP(T, "cosine_exact", order=3), N), []
    expected = run(cases(), Stub())

    def fails(x, t):
        count.append(t)
        if len(count) == 3:
            raise RuntimeError("out of memory")
        return 0.1 * x[:, :1]

    with pytest.raises(RuntimeError, match="out of memory"):
        run(cases(), fails)
    assert torch.equal(run(cases(), Stub()), expected)


def test_without_seeds_the_samplers_seed_counts_up():
    run = DiffusionSampler(DDIM(T), N, seed=4)
    assert torch.equal(run(cases(), Stub()), run(cases(), Stub(), seeds=[4, 5, 6]))
    with pytest.raises(ValueError, match="2 seeds for 3 cases"):
        run(cases(), Stub(), seeds=[1, 2])


def test_a_noise_source_takes_the_place_of_the_seeds():
    run, like = DiffusionSampler(DDIM(T), N), []

    def zeros(x):
        like.append(x.shape)
        return torch.zeros_like(x)

    assert not run(cases(), Stub(), noise=zeros).any()
    assert like == [(3, 1, 6, 5, 4)]


def test_diffusion_in_a_latent_space_decodes_once():
    calls = []

    def decode(z):
        calls.append(z)
        return z.mean(1, keepdim=True).repeat_interleave(2, 2)

    tokens = torch.randn(2, 4, 6)
    run = DiffusionSampler(DDIM(T), N, channels=3, latent_shape=(4, 5), condition=CrossAttention(), decode=decode)
    sample = run(tokens, lambda x, t, context: 0.1 * x)
    assert calls[0].shape == (2, 3, 4, 5)
    assert len(calls) == 1
    assert sample.shape == (2, 1, 8, 5)


def test_any_adapter_of_the_condition_serves():
    inputs = cases()

    def network(joined, t):
        return joined[:, :1] * joined[:, 1:].mean(dim=(1, 2, 3, 4), keepdim=True)

    adapters: list[Condition | None] = [None, Guided(DiffusionSampler(DDIM(T), 1).condition, 1.0)]
    first, second = (LayoutGuidedSampler(DDIM(T), N, condition=a)(inputs, network) for a in adapters)
    assert torch.equal(first, second)


class Shifted:
    """An adapter that takes a number of each case's own beside the condition, and remembers what came."""

    def __init__(self) -> None:
        self.came: list[dict] = []

    def __call__(self, network, condition, **own):
        self.came.append(own)
        shift = own["context"].view(-1, *[1] * (condition.ndim - 1))
        return lambda x, t: network(torch.cat([x, condition], dim=1), t) + shift


@every
def test_what_a_case_brings_for_the_adapter_reaches_it_once_and_is_that_cases_alone(sampler, scheduler):
    adapter, inputs, own = Shifted(), cases(), torch.tensor([0.0, 0.3, -0.2])
    run = sampler(scheduler(), N, condition=adapter)
    together = run(inputs, Stub(), seeds=[1, 2, 3], context=own)
    assert [list(given) for given in adapter.came] == [["context"]]
    assert adapter.came[0]["context"] is own
    for b in range(3):
        alone = run(inputs[b : b + 1], Stub(), seeds=[b + 1], context=own[b : b + 1])
        assert torch.equal(alone, together[b : b + 1])
    plain = sampler(scheduler(), N)(inputs, Stub(), seeds=[1, 2, 3])
    assert torch.equal(plain[0], together[0])
    assert not torch.equal(plain[1], together[1])


def test_an_adapter_that_takes_nothing_more_refuses_more():
    with pytest.raises(TypeError, match="context"):
        DiffusionSampler(DDIM(T), N)(cases(), Stub(), context=torch.zeros(3))


def test_the_bar_is_quiet_where_nobody_watches(capfd):
    for verbose in (True, False):
        InversionSampler(DPMSolverPP(T), 2, verbose=verbose)(cases(), Stub())
    assert capfd.readouterr() == ("", "")


def test_metatensors_go_in_and_plain_tensors_come_out():
    sample = LayoutGuidedSampler(DDIM(T), N)(MetaTensor(cases()), Stub())
    assert type(sample) is torch.Tensor
    assert torch.equal(sample, LayoutGuidedSampler(DDIM(T), N)(cases(), Stub()))


def test_no_gradients_are_kept():
    weight = torch.ones(1, requires_grad=True)
    assert not DiffusionSampler(DDIM(T), 2)(cases(), lambda x, t: weight * x[:, :1]).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Layout guidance


@every_scheduler
@pytest.mark.parametrize("layout", [1, 2, 5])
def test_corrected_blending_ends_with_the_reference_itself_outside_the_layout(scheduler, layout):
    inputs = cases(layout=layout)
    sample = LayoutGuidedSampler(scheduler(), N)(inputs, Stub())
    outside = background(inputs)
    assert 0.2 < outside.float().mean() < 0.8
    assert torch.equal(sample[outside], inputs[:, :1][outside])
    assert not torch.isclose(sample[~outside], inputs[:, :1][~outside]).any(dim=0).all()


@every_scheduler
def test_every_label_is_free_and_equals_the_unguided_sample_under_an_elementwise_network(scheduler):
    """The loop mixes no voxels, so only the stream of draws could differ: compare with blending switched off."""
    inputs = cases()
    free = LayoutGuidedSampler(scheduler(), N, blend_from=-1)(inputs, Stub(), seeds=[1, 2, 3])
    blended = LayoutGuidedSampler(scheduler(), N)(inputs, Stub(), seeds=[1, 2, 3])
    inside = ~background(inputs)
    if not isinstance(scheduler(), DPMSolverPP) or scheduler().thresholding != "dynamic":
        assert torch.equal(free[inside], blended[inside])
    assert not torch.equal(free, blended)


def test_the_published_blending_leaves_noise_of_std_0_0139():
    """Quirk kept under "reference": the background keeps the noise of the first training step, T = 250."""
    inputs = torch.cat([torch.zeros(1, 1, 32, 32, 32), -torch.ones(1, 2, 32, 32, 32)], dim=1)
    sampler = LayoutGuidedSampler(DDPM(250, "cosine_exact"), 10, blend_mode="reference")
    assert sampler(inputs, Stub()).std().item() == pytest.approx(0.0139, abs=0.0003)


@pytest.mark.parametrize("mode", ["corrected", "reference"])
def test_blending_meets_the_level_of_its_mode_after_every_step(mode):
    inputs, states = torch.cat([torch.zeros(1, 1, 48, 48), -torch.ones(1, 1, 48, 48)], dim=1), []
    scheduler = DDPM(T, "cosine_exact")
    LayoutGuidedSampler(scheduler, 10, blend_mode=mode, on_step=lambda i, x: states.append(x.std().item()))(
        inputs, Stub()
    )
    level = (1 - scheduler.alphas_cumprod[scheduler.timesteps]).sqrt().tolist()
    expected = [*level[1:], 0.0] if mode == "corrected" else level
    assert states == pytest.approx(expected, rel=0.08)


@every_scheduler
@pytest.mark.parametrize("k", [-1, 0, 20, math.inf])
def test_blend_from_names_the_steps_that_blend(scheduler, k):
    """Negative never, k the steps at times k and below, and any k >= 0 the last one."""
    inputs = torch.cat([torch.full((1, 1, 8, 8), 5.0), -torch.ones(1, 1, 8, 8)], dim=1)
    blended = []

    class Watched(LayoutGuidedSampler):
        def after_step(self, x, index, inputs, noise):
            after = super().after_step(x, index, inputs, noise)
            blended.append(not torch.equal(after, x))
            return after

    run = Watched(scheduler(), N, blend_from=k)
    sample = run(inputs, Stub())
    times = run.scheduler.timesteps.tolist()
    assert blended == [t <= k or (i == N - 1 and k >= 0) for i, t in enumerate(times)]
    assert torch.equal(sample, inputs[:, :1]) == (k >= 0)


@every_scheduler
@pytest.mark.parametrize("mode", ["corrected", "reference"])
def test_what_the_reference_does_not_know_is_generated(scheduler, mode):
    inputs = cases()
    unknown = torch.zeros(3, 1, 6, 5, 4, dtype=torch.bool)
    unknown[:, :, 3:] = True
    torn = inputs.clone()
    torn[:, :1][unknown] = math.nan
    torn[0, 0, 3, 0, 0] = math.inf
    run = LayoutGuidedSampler(scheduler(), N, blend_mode=mode)
    free = LayoutGuidedSampler(scheduler(), N, blend_mode=mode, blend_from=-1)
    sample = run(torn, Stub())
    assert sample.isfinite().all()
    kept = background(inputs) & ~unknown
    assert torch.equal(sample[kept], run(inputs, Stub())[kept])
    if not isinstance(run.scheduler, DPMSolverPP) or run.scheduler.thresholding != "dynamic":
        assert torch.equal(sample[~kept], free(inputs, Stub())[~kept])


def test_with_no_reference_at_all_inversion_starts_from_noise():
    inputs = cases()
    inputs[:, 0] = math.nan
    inputs[0, 0, 0] = math.inf
    inverted = InversionSampler(DPMSolverPP(T), N)(inputs, Stub())
    free = LayoutGuidedSampler(DPMSolverPP(T), N, blend_from=-1)(inputs, Stub())
    assert torch.equal(inverted, free)


@pytest.mark.parametrize("channels", [1, 2])
def test_inputs_without_a_layout_teach(channels):
    run = LayoutGuidedSampler(DDIM(T), N, channels=channels)
    with pytest.raises(ValueError, match=rf"inputs have {channels} channels.*at least one layout channel"):
        run(torch.zeros(1, channels, 4, 4), Stub())
    with pytest.raises(ValueError, match="blend_mode must be"):
        LayoutGuidedSampler(DDIM(T), N, blend_mode="soft")


# ---------------------------------------------------------------------------------------------------------------------
# Inversion


def test_up_and_down_again_is_the_reference():
    """On a Gaussian, whose noise prediction is exact, the round trip errs by the solver's discretisation alone."""
    mu, std = 0.3, 0.4
    errors = []
    for steps in (25, 100):
        solver = DPMSolverPP(250, "cosine_exact", order=2)
        abar = lambda t, solver=solver: solver.alpha_bar(t).float().view(-1, 1, 1, 1, 1)  # noqa: E731

        def network(joined, t, abar=abar):
            a, s2 = abar(t).sqrt(), 1 - abar(t)
            return s2.sqrt() * (joined[:, :1] - a * mu) / (a**2 * std**2 + s2)

        inputs = cases(2)
        sample = InversionSampler(solver, steps)(inputs, network)
        outside = background(inputs)
        errors.append((sample - inputs[:, :1])[outside].abs().max().item())
        assert ((sample - inputs[:, :1])[~outside].abs() > 0.05).any()  # the inside is new
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 4


def test_inversion_may_blend_as_well():
    inputs = cases()
    sample = InversionSampler(DPMSolverPP(T), N, blend_from=None)(inputs, Stub())
    assert torch.equal(sample[background(inputs)], inputs[:, :1][background(inputs)])


# ---------------------------------------------------------------------------------------------------------------------
# Chains


class First:
    """A first stage that draws its case's seed everywhere, and keeps what it was given."""

    def __init__(self) -> None:
        self.came: list[tuple[torch.Tensor, object, object]] = []

    def __call__(self, inputs, network, *, seeds=None):
        self.came.append((inputs, network, seeds))
        values = torch.zeros(len(inputs)) if seeds is None else torch.tensor(seeds)
        return values.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


class Second:
    """A second stage that shows what it was drawn from and by which seed."""

    def __init__(self) -> None:
        self.seeds: list[object] = []

    def __call__(self, inputs, network, *, seeds=None):
        self.seeds.append(seeds)
        return network(inputs)


def given(*values: float) -> torch.Tensor:
    """Results of the first stage (B, 1, 4, 4); a negative number stands for none."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()


def plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_a_given_result_is_kept_to_the_bit_and_the_first_stage_sleeps():
    first, second = First(), Second()
    drawn = torch.rand(3, 2, 4, 4)
    drawn[0, 0, 0, 0] = -1  # negative somewhere is not negative everywhere
    kept = drawn.clone()
    run = CascadeSampler(first, None, second, between=lambda made: 1 / 0)
    both = run(torch.zeros(3, 5), plus_one, drawn=MetaTensor(drawn), seeds=[1, 2, 3])
    assert first.came == []
    assert second.seeds == [[1, 2, 3]]
    assert type(both) is torch.Tensor
    assert torch.equal(both, torch.cat([kept + 1, kept], dim=1)), "the second stage's, then what it was drawn from"
    assert torch.equal(drawn, kept)


def test_in_a_mixed_batch_the_first_stage_draws_what_is_missing_with_the_cases_own_seeds():
    first, second, network = First(), Second(), object()
    inputs, drawn = torch.rand(4, 5), given(2, -1, 0, -1)
    run = CascadeSampler(first, network, second)
    both = run(inputs, plus_one, drawn=drawn, seeds=torch.tensor([11, 12, 13, 14]))
    ((came, net, seeds),) = first.came
    assert torch.equal(came, inputs[[1, 3]])
    assert (net is network, seeds) == (True, [12, 14])
    assert torch.equal(both[:, 1:], given(2, 12, 0, 14))
    assert torch.equal(both[:, :1], given(3, 13, 1, 15))
    assert torch.equal(drawn, given(2, -1, 0, -1)), "the frame that came stays as it was"


def test_what_the_first_draws_is_brought_to_the_seconds_grid_and_only_that():
    run = CascadeSampler(First(), None, Second(), between=lambda made: 10 * made)
    both = run(torch.zeros(2, 5), plus_one, drawn=given(7, -1), seeds=[1, 2])
    assert torch.equal(both[:, 1:], given(7, 20))


def test_without_seeds_each_stage_counts_its_own():
    first, second = First(), Second()
    CascadeSampler(first, None, second)(torch.zeros(2, 5), plus_one, drawn=given(-1, -1))
    assert (first.came[0][2], second.seeds) == (None, [None])


def test_a_report_becomes_labels_and_labels_a_volume_case_by_case():
    """The whole chain on stubs: a batch, some of it given, equals its cases one by one."""

    def labels_of(planes, t, context):
        return 3 * planes + context.mean(dim=1)[:, :, None, None, None]

    def slice_of(joined, t):
        return 0.1 * joined[:, :1] + 0.1 * joined[:, 1:2] + 0.1 * joined[:, 2:3]

    scheduler = CategoricalScheduler(T, 3, last_step="probs")
    first = CategoricalSampler(scheduler, 4, condition=CrossAttention(), latent_shape=(3, 3, 2))
    second = SliceSampler(DiffusionSampler(DPMSolverPP(T, "cosine_exact"), 3), PlanesCondition(3))
    run = CascadeSampler(first, labels_of, second, LabelsToGrid((6, 6, 4)))
    reports = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    drawn = torch.full((3, 1, 6, 6, 4), -1.0)
    drawn[1] = torch.randint(0, 3, (1, 6, 6, 4), generator=torch.Generator().manual_seed(1))
    both = run(reports, slice_of, drawn=drawn, seeds=[5, 6, 7])
    assert both.shape == (3, 2, 6, 6, 4)
    assert torch.equal(both[1, 1:], drawn[1])
    assert set(both[:, 1].unique().tolist()) <= {0, 1, 2}
    for b in range(3):
        alone = run(reports[b : b + 1], slice_of, drawn=drawn[b : b + 1], seeds=[5 + b])
        assert torch.equal(alone, both[b : b + 1])
    again = run(reports, slice_of, drawn=both[:, 1:], seeds=[5, 6, 7])
    assert torch.equal(again, both), "from its own labels a case becomes itself"
