"""Laws of every Gaussian scheduler, MONAI's and ours (one contract), then what `common/schedules.py` adds."""

from __future__ import annotations

import importlib
import math
import sys

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, NoiseSchedules

from common.schedules import DDIM, DDPM, CaseNoise, draw
from common.solvers import DPMSolverPP

T = 100
OURS = {
    "DDPM": lambda: DDPM(T, "cosine_exact", clip_sample=False),
    "DDPM-large": lambda: DDPM(T, "cosine_exact", clip_sample=False, variance_type="fixed_large", grid="rounded"),
    "DDIM": lambda: DDIM(T, "linear_exact", clip_sample=False, grid="strided"),
    "DDIM-eta": lambda: DDIM(T, "scaled_linear_exact", clip_sample=False, eta=1.0, final_alpha="first"),
    **{
        f"DPM-{order}-{method}": lambda order=order, method=method: DPMSolverPP(
            T, "cosine_exact", order=order, method=method, spacing="logsnr" if order == 2 else "time"
        )
        for order in (1, 2, 3)
        for method in ("multistep", "singlestep")
    },
}
EVERY = {
    "MONAI-DDPM": lambda: DDPMScheduler(T, clip_sample=False),
    "MONAI-DDIM": lambda: DDIMScheduler(T, clip_sample=False),
    **OURS,
}
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS.keys())
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def per_case(scheduler, t, batch: int) -> torch.Tensor:
    return torch.full((batch,), t.item(), dtype=scheduler.timesteps.dtype)


def run(scheduler, x, n=10, noise=None):
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        x, _ = scheduler.step(0.1 * x.sin(), t, x, generator=noise)
    return x


@every
def test_timesteps_descend_one_per_network_call(make):
    scheduler = make()
    for n in (1, 2, 5, 10, 20):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == n
        assert (scheduler.timesteps.diff() < 0).all()


@every
@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 3, 4, 5, 3)], ids=["2-D", "3-D"])
def test_the_true_noise_leads_to_the_true_image(make, shape):
    scheduler = make()
    x_0, noise = tensor(*shape), tensor(*shape, seed=1)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps[4:9] if not isinstance(scheduler, DPMSolverPP) else scheduler.timesteps:
        x_t = scheduler.add_noise(x_0, noise, per_case(scheduler, t, 2))
        x_prev, estimate = scheduler.step(noise, t, x_t)
        assert x_prev.shape == shape
        assert x_prev.dtype == estimate.dtype == torch.float32
        # the estimate divides by alpha, so its rounding grows as alpha falls
        scale = 1 / scheduler.add_noise(torch.ones(1, 1), torch.zeros(1, 1), per_case(scheduler, t, 1)).item()
        torch.testing.assert_close(estimate, x_0, atol=2e-6 * scale, rtol=0)


@every
def test_add_noise_has_the_marginal_mean_and_std(make):
    scheduler = make()
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[5]
    x_t = scheduler.add_noise(torch.full((2, 1, 300, 300), 0.7), tensor(2, 1, 300, 300), per_case(scheduler, t, 2))
    if isinstance(scheduler, DPMSolverPP):
        t = scheduler.log_alpha(t.item() / T + 1 / T)
        alpha_bar = math.exp(2 * t)
    else:
        alpha_bar = scheduler.alphas_cumprod[t].item()
    assert x_t.mean().item() == pytest.approx(0.7 * alpha_bar**0.5, abs=0.01)
    assert x_t.std().item() == pytest.approx((1 - alpha_bar) ** 0.5, abs=0.01)


@ours
def test_each_case_of_a_batch_has_its_own_time(make):
    scheduler = make()
    x, noise, t = tensor(3, 1, 4, 4), tensor(3, 1, 4, 4, seed=1), torch.tensor([3, 50, 98])
    for mix in (scheduler.add_noise, scheduler.get_velocity):
        alone = torch.cat([mix(x[i : i + 1], noise[i : i + 1], t[i]) for i in range(3)])
        assert torch.equal(mix(x, noise, t), alone)


@ours
def test_a_batch_equals_its_cases_one_by_one(make):
    x, seeds = tensor(3, 1, 4, 4, 4), [5, 6, 7]
    together = run(make(), x, noise=CaseNoise(seeds))
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i : i + 1], run(make(), x[i : i + 1], noise=CaseNoise([seed])))


@ours
def test_a_run_repeats_on_the_same_scheduler(make):
    scheduler, x = make(), tensor(2, 1, 4, 4)
    first = run(scheduler, x, noise=CaseNoise([1, 2]))
    assert torch.equal(first, run(scheduler, x, noise=CaseNoise([1, 2])))
    assert first.dtype == torch.float32
    assert first.isfinite().all()


@ours
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_survive_any_dtype_and_samples_keep_theirs(make, dtype):
    scheduler = make()
    before = scheduler.alphas_cumprod.clone()
    x = tensor(2, 1, 4, 4, dtype=torch.float64).to(dtype)
    assert scheduler.add_noise(x, x, torch.tensor([3, 50])).dtype == dtype
    assert scheduler.get_velocity(x, x, torch.tensor([3, 50])).dtype == dtype
    assert run(scheduler, x, noise=CaseNoise([1, 2])).dtype == dtype
    assert torch.equal(scheduler.alphas_cumprod, before)
    assert scheduler.betas.dtype == scheduler.alphas.dtype == torch.float64


@ours
def test_samples_stay_on_their_device(make):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = tensor(2, 1, 4, 4)
    there = run(make(), x.cuda(), noise=CaseNoise([1, 2]))
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), run(make(), x, noise=CaseNoise([1, 2])), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@ours
def test_the_three_predictions_agree(make, kind):
    scheduler, reference = make(), make()
    scheduler.prediction_type = kind
    x_0, noise = tensor(2, 1, 4, 4, dtype=torch.float64), tensor(2, 1, 4, 4, seed=1, dtype=torch.float64)
    for s in (scheduler, reference):
        s.set_timesteps(10)
    t = scheduler.timesteps[0]
    x_t = scheduler.add_noise(x_0, noise, t)
    velocity = scheduler.get_velocity(x_0, noise, t)
    output = {"epsilon": noise, "sample": x_0, "v_prediction": velocity}[kind]
    x, _ = scheduler.step(output, t, x_t, generator=CaseNoise([1, 2]))
    expected, _ = reference.step(noise, t, x_t, generator=CaseNoise([1, 2]))
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)  # float32 model times


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exact", "monai"),
    [("cosine_exact", "cosine"), ("linear_exact", "linear_beta"), ("scaled_linear_exact", "scaled_linear_beta")],
)
def test_exact_schedules_are_monais_in_float64(exact, monai):
    betas, alphas, alphas_cumprod = NoiseSchedules[exact](250)
    assert betas.dtype == alphas.dtype == alphas_cumprod.dtype == torch.float64
    assert torch.equal(alphas, 1 - betas)
    torch.testing.assert_close(alphas_cumprod, alphas.cumprod(0))
    torch.testing.assert_close(betas, DDPMScheduler(250, monai).betas.double(), atol=1e-5, rtol=0)


def test_cosine_schedule_has_the_published_values():
    betas, _, abar = NoiseSchedules["cosine_exact"](250)
    assert betas[0].item() == pytest.approx(1.9427e-4, rel=1e-4)
    assert betas.max() == betas[-1] == 0.999
    assert abar[124].item() == pytest.approx(0.4938436, rel=1e-6)
    assert abar[249].item() == pytest.approx(3.886e-8, rel=1e-3)


def test_the_file_may_be_imported_under_two_names(monkeypatch):
    spec = importlib.util.spec_from_file_location("twin_schedules", sys.modules["common.schedules"].__file__)
    twin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twin)
    assert torch.equal(twin.DDPM(T, "cosine_exact").betas, DDPM(T, "cosine_exact").betas)


# -- noise -------------------------------------------------------------------------------------------------------------


def test_case_noise_wants_one_seed_per_case():
    with pytest.raises(ValueError, match="2 seeds for 3 cases"):
        CaseNoise([1, 2])(torch.zeros(3, 1, 4, 4))


def test_case_noise_ignores_order_and_dtype():
    like = torch.zeros(3, 2, 4, 4)
    noise = CaseNoise([1, 2, 3])(like)
    assert torch.equal(CaseNoise([3, 1, 2])(like), noise[[2, 0, 1]])
    assert torch.equal(CaseNoise([1, 2, 3])(like.half()), noise.half())
    assert torch.equal(noise[:1], torch.randn((1, 2, 4, 4), generator=torch.Generator().manual_seed(1)))


def test_draw_takes_nothing_a_generator_or_a_callable():
    like = torch.zeros(2, 1, 3)
    torch.manual_seed(4)
    first = draw(like)
    assert torch.equal(first, draw(like, torch.Generator().manual_seed(4)))
    assert torch.equal(draw(like, lambda x: x + 7), like + 7)


# -- grids -------------------------------------------------------------------------------------------------------------


def test_grids_are_those_of_the_references():
    def grid(n, **kwargs):
        scheduler = DDIM(kwargs.pop("T", 1000), **kwargs)
        scheduler.set_timesteps(n)
        return scheduler.timesteps.tolist()

    monai = DDIMScheduler(1000)
    monai.set_timesteps(50)
    assert grid(50) == monai.timesteps.tolist()
    assert grid(50, grid="strided", steps_offset=1) == list(range(981, 0, -20))  # latent diffusion
    assert grid(5, grid="strided", steps_offset=1) == [801, 601, 401, 201, 1]
    assert len(grid(30, grid="strided")) == 31  # the reference's count when n does not divide T
    assert grid(7, grid="rounded", T=501) == np.round(np.linspace(500, 1, 7)).astype(int).tolist()  # CMDM
    assert grid(500, grid="rounded", T=501) == list(range(500, 0, -1))


@pytest.mark.parametrize("scheduler", [DDPM, DDIM])
@pytest.mark.parametrize("grid", ["linspace", "rounded"])
def test_any_number_of_steps_up_to_the_whole_grid(scheduler, grid):
    s = scheduler(30, grid=grid)
    for n in range(1, 30):
        s.set_timesteps(n)
        assert len(s.timesteps) == n
        assert (s.timesteps.diff() < 0).all()


def test_mistakes_are_told_at_the_door():
    for kwargs in ({"grid": "zigzag"}, {"final_alpha": "two"}, {"variance_type": "learned"}, {"steps_offset": -1}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            DDPM(T, **kwargs)
    for n in (0, T + 1):
        with pytest.raises(ValueError, match=r"num_inference_steps must lie in \[1, 100\]"):
            DDPM(T).set_timesteps(n)
    with pytest.raises(ValueError, match="take a divisor of 1000"):
        DDIM(1000, grid="strided", steps_offset=1).set_timesteps(1000)
    scheduler, x = DDPM(T), torch.zeros(1, 1, 2, 2)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="not on the grid"):
        scheduler.step(x, 98, x)
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 100\)"):
        scheduler.add_noise(x, x, torch.tensor([-1]))


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm_on_all_steps_is_monais(variance_type, clip):
    ours, monai = (cls(T, variance_type=variance_type, clip_sample=clip) for cls in (DDPM, DDPMScheduler))
    x, eps = tensor(2, 1, 4, 4), tensor(2, 1, 4, 4, seed=1)
    for t in (99, 50, 1, 0):
        a, b = (s.step(eps, t, x, generator=torch.Generator().manual_seed(3)) for s in (ours, monai))
        for mine, theirs in zip(a, b, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=0)  # MONAI's float32 tables


def test_a_clipped_x_0_is_within_range():
    scheduler, x = DDPM(T, clip_sample_min=-0.5, clip_sample_max=0.25), tensor(1, 1, 8, 8)
    x_0 = scheduler.step(x, 99, 3 * x)[1]
    assert (x_0.min(), x_0.max()) == (-0.5, 0.25)


def test_noise_is_drawn_but_not_added_at_the_last_step():
    scheduler, x, drawn = DDPM(T), tensor(1, 1, 4, 4), []

    def noise(like):
        drawn.append(like.shape)
        return torch.full_like(like, torch.nan)

    assert scheduler.step(x, 0, x, generator=noise)[0].isfinite().all()
    assert len(drawn) == 1
    assert torch.equal(*scheduler.step(x, 0, x, generator=noise))  # nothing but x_0 is left


def test_cmdm_s_chain_ends_on_its_first_level():
    """CMDM's ancestral step, x <- (x - eps beta / sqrt(1 - abar)) / sqrt(alpha) + sqrt(beta) z, with no z at i = 1."""
    scheduler = DDPM(501, grid="rounded", final_alpha="first", variance_type="fixed_large", clip_sample=False)
    scheduler.set_timesteps(500)
    x, eps, z = (tensor(1, 1, 4, 4, seed=i) for i in range(3))
    for i in (500, 77, 1):
        beta, abar = scheduler.betas[i].item(), scheduler.alphas_cumprod[i].item()
        expected = (x - eps * beta / (1 - abar) ** 0.5) / (1 - beta) ** 0.5 + (i > 1) * beta**0.5 * z
        torch.testing.assert_close(scheduler.step(eps, i, x, generator=lambda _: z)[0], expected, atol=1e-6, rtol=1e-6)


def test_ddim_with_eta_one_is_ddpm_on_any_grid():
    x, eps = tensor(2, 1, 4, 4), tensor(2, 1, 4, 4, seed=1)
    ddpm, ddim = DDPM(T), DDIM(T, eta=1.0)
    for scheduler in (ddpm, ddim):
        scheduler.set_timesteps(7)
    for t in ddpm.timesteps:
        a, b = (s.step(eps, t, x, generator=CaseNoise([1, 2]))[0] for s in (ddpm, ddim))
        torch.testing.assert_close(a, b)


def test_ddim_steps_to_the_next_entry_as_latent_diffusion_does():
    """Song's Eq. 12 on the reference's grid; the last step goes to the level of timestep 0 and still draws noise."""
    scheduler = DDIM(
        1000, "scaled_linear_exact", beta_start=0.0015, beta_end=0.0195, clip_sample=False,
        grid="strided", steps_offset=1, final_alpha="first", eta=1.0,
    )  # fmt: skip
    scheduler.set_timesteps(200)
    x, eps, z = (tensor(1, 4, 4, 4, seed=i) for i in range(3))
    for t in (996, 501, 1):
        a, b = scheduler.alphas_cumprod[t].item(), scheduler.alphas_cumprod[max(t - 5, 0)].item()
        s = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        expected = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b - s**2) ** 0.5 * eps + s * z
        mine = scheduler.step(eps, t, x, generator=lambda _: z)[0]
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


def chain(scheduler, noise_of, n):
    """Run 20 000 one-pixel chains with the noise prediction `noise_of(x, abar)`; return all (abar, x) on the way."""
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(0)
    x, visited = torch.randn(1, 1, 100, 200, generator=generator), []
    for t in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[t].item()
        visited.append((abar, x))
        x, _ = scheduler.step(noise_of(x, abar), t, x, generator=generator)
    return [*visited, (1.0, x)]


@pytest.mark.parametrize("make", [DDPM, lambda *a, **k: DDIM(*a, eta=1.0, **k)], ids=["DDPM", "DDIM-eta"])
def test_the_whole_chain_reproduces_a_gaussian(make):
    """With the exact score of N(mu, s^2), ancestral sampling ends in that Gaussian."""
    mu, s = 0.4, 0.3
    _, x = chain(
        make(1000, "cosine_exact", clip_sample=False),
        lambda x, abar: (1 - abar) ** 0.5 * (x - abar**0.5 * mu) / (abar * s**2 + 1 - abar),
        1000,
    )[-1]
    assert x.mean().item() == pytest.approx(mu, abs=0.01)
    assert x.std().item() == pytest.approx(s, rel=0.02)


@pytest.mark.parametrize("n", [5, 23, T])
def test_a_strided_chain_keeps_every_marginal_of_a_known_image(n):
    """The posterior between any two levels is exact: given x_0, each level visited has q(x_t | x_0)."""
    mu = 0.4
    scheduler = DDPM(T, "cosine_exact", clip_sample=False)
    for abar, x in chain(scheduler, lambda x, abar: (x - abar**0.5 * mu) / (1 - abar) ** 0.5, n):
        assert x.mean().item() == pytest.approx(abar**0.5 * mu, abs=0.03)
        assert x.std().item() == pytest.approx((1 - abar) ** 0.5, rel=0.03, abs=1e-4)
