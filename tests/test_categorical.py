"""Categorical diffusion against brute force: every chain of few labels and few steps is enumerated."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from scipy import stats

from common.categorical import CategoricalInferer, CategoricalKLLoss, CategoricalSampler, CategoricalScheduler
from common.conditioning import ConditionPrepareBatch
from common.sampler import DiffusionSampler
from common.schedules import CaseNoise

DOUBLE = torch.float64
SCHEDULES = {"cosine_exact": {}, "linear_exact": {"beta_start": 0.01, "beta_end": 0.2}}
SMALL = [(K, T, name) for K, T in ((2, 6), (3, 5), (4, 4)) for name in SCHEDULES]


def scheduler_of(T, K, name="cosine_exact", **kwargs):
    return CategoricalScheduler(T, K, name, **SCHEDULES[name], **kwargs)


def kernels(scheduler):
    """One matrix (K, K) for each training step, from x_{t-1} (row) to x_t, by the definition."""
    K = scheduler.num_classes
    return [(1 - b) * torch.eye(K, dtype=DOUBLE) + b / K for b in scheduler.betas.tolist()]


def between(scheduler, s, t):
    """Matrix from x_s to x_t; s = -1 is x_0's."""
    whole = torch.eye(scheduler.num_classes, dtype=DOUBLE)
    for kernel in kernels(scheduler)[s + 1 : t + 1]:
        whole = whole @ kernel
    return whole


def every_pair(K):
    """Label maps (K * K, 1, 1) in which each pair of labels stands once."""
    pairs = torch.tensor(list(product(range(K), repeat=2)))
    return pairs[:, :1, None], pairs[:, 1:, None]


def random_logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# -- laws, by enumeration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "T", "name"), SMALL)
def test_marginals_are_products_of_the_steps(K, T, name):
    scheduler, labels = scheduler_of(T, K, name), torch.arange(K)[:, None, None]
    for t in range(T):
        for s in range(-1, t):
            ours = scheduler.marginal(labels, t, s, DOUBLE)[..., 0]
            torch.testing.assert_close(ours, between(scheduler, s, t), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("K", "T", "name"), SMALL)
def test_posterior_and_mixture_are_bayes_between_any_two_times(K, T, name):
    scheduler = scheduler_of(T, K, name)
    x_t, x_0 = every_pair(K)
    logits = random_logits(len(x_t), K, 1)
    w = logits.softmax(1)[..., 0]
    for t in range(T):
        for s in range(-1, t):
            up, down, all_up = (between(scheduler, *ends) for ends in ((s, t), (-1, s), (-1, t)))
            # table[l, d, c] = q(x_s = c | x_t = l, x_0 = d)
            table = up.T[:, None, :] * down[None] / all_up.T[..., None]
            ours = scheduler.posterior(x_t, x_0, t, s, DOUBLE).exp()[..., 0]
            torch.testing.assert_close(ours, table[x_t.flatten(), x_0.flatten()], atol=1e-12, rtol=0)
            mixed = scheduler.posterior_mixture(x_t, logits, t, s).exp()[..., 0]
            brute = torch.einsum("nd,ndc->nc", w, table[x_t.flatten()])
            torch.testing.assert_close(mixed, brute, atol=1e-12, rtol=0)
            torch.testing.assert_close(mixed.sum(1), torch.ones_like(mixed[:, 0]), atol=1e-12, rtol=0)


def test_the_step_before_is_the_default():
    scheduler, (x_t, x_0) = scheduler_of(9, 3), every_pair(3)
    for t in range(9):
        a, b = (scheduler.posterior(x_t, x_0, t, s, DOUBLE) for s in (None, t - 1))
        torch.testing.assert_close(a.exp(), b.exp(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_any_number_of_steps_keeps_the_marginals(n, name):
    """Who knows x_0 hands the network the marginals it was trained on, and ends in x_0."""
    K = 3
    scheduler, every = scheduler_of(1000, K, name), torch.arange(K)[:, None, None]
    assert drift(scheduler, every, n) <= 1e-12


def drift(scheduler, every, n):
    """Largest distance in total variation between the reverse chain's marginals and q(x_t | x_0 = 0)."""
    scheduler.set_timesteps(n)
    steps, K = scheduler.timesteps.tolist(), scheduler.num_classes
    target = scheduler.marginal
    x_0, worst = torch.zeros_like(every), 0.0
    state = target(x_0[:1], steps[0], -1, DOUBLE)[0, :, 0]
    for t, s in zip(steps, [*steps[1:], -1], strict=True):
        previous = None if scheduler.mode == "ccdm_v1" and s >= 0 else s
        state = state @ scheduler.posterior(every, x_0, t, previous, DOUBLE).exp()[..., 0]
        due = target(x_0[:1], s, -1, DOUBLE)[0, :, 0] if s >= 0 else torch.eye(K, dtype=DOUBLE)[0]
        worst = max(worst, (state - due).abs().sum().item() / 2)
    return worst


@pytest.mark.parametrize(
    ("T", "n", "expected"), [(1000, 1000, 0.00101), (250, 250, 0.00398), (1000, 50, 0.743), (1000, 250, 0.413)]
)
def test_the_published_chain_drifts(T, n, expected):
    """Defects kept for parity: the late schedule, and steps that are skipped without saying so."""
    K = 12
    scheduler = scheduler_of(T, K, mode="ccdm_v1")
    assert drift(scheduler, torch.arange(K)[:, None, None], n) == pytest.approx(expected, rel=0.01)


def test_likelihood_is_at_least_the_bound():
    """-log p(x_0) of a small model, all chains enumerated, is at most the sum of the KLs."""
    K, T = 3, 5
    scheduler, every = scheduler_of(T, K, "linear_exact"), torch.arange(K)[:, None, None]
    tables = [random_logits(K, K, 1, seed=t) for t in range(T)]
    p = torch.full((K,), 1 / K, dtype=DOUBLE)
    for t in reversed(range(T)):
        p = p @ scheduler.posterior_mixture(every, tables[t], t).exp()[..., 0]
    for d in range(K):
        x_0 = torch.full_like(every, d)
        last = scheduler.marginal(x_0[:1], T - 1, -1, DOUBLE)[0, :, 0]
        bound = (last * (last * K).log()).sum()
        for t in range(T):
            q = scheduler.marginal(x_0[:1], t, -1, DOUBLE)[0, :, 0]
            bound = bound + (q * scheduler.kl(x_0, every, tables[t], t)[:, 0, 0]).sum()
        assert -p[d].log() <= bound


# -- loss --------------------------------------------------------------------------------------------------------------


def kl_cases(K=4, T=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    scheduler, t = scheduler_of(T, K), torch.tensor([0, 1, 7, T - 1])
    x_0, x_t = (torch.randint(0, K, (4, 1, 3, 3), generator=g) for _ in range(2))
    return scheduler, t, x_0, x_t


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_kl_is_zero_at_the_truth_and_so_is_its_gradient(dtype):
    scheduler, t, x_0, x_t = kl_cases()
    logits = (80 * (scheduler.one_hot(x_0) - 0.5)).to(dtype).requires_grad_()
    kl = scheduler.kl(x_0, x_t, logits, t)
    assert kl.abs().max() <= 1e-6
    kl.sum().backward()
    assert logits.grad.abs().max() <= 1e-6


def test_kl_is_positive_and_at_the_end_the_log_likelihood():
    scheduler, t, x_0, x_t = kl_cases()
    logits = random_logits(4, 4, 3, 3)
    kl = scheduler.kl(x_0, x_t, logits, t)
    assert kl.min() > 0
    nll = torch.nn.functional.cross_entropy(logits, x_0[:, 0], reduction="none")
    torch.testing.assert_close(kl[0, 0], nll[0], atol=1e-12, rtol=0)


def test_gradient_of_the_kl():
    scheduler, t, x_0, x_t = kl_cases()
    logits = random_logits(4, 4, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: scheduler.kl(x_0, x_t, z, t), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    scheduler, t, x_0, x_t = kl_cases()
    logits = (80 * random_logits(4, 4, 3, 3).sign()).to(dtype).requires_grad_()
    mixed = scheduler.posterior_mixture(x_t, logits, t)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(4, 3, 3), atol=1e-5, rtol=0)
    kl = scheduler.kl(x_0, x_t, logits, t)
    kl.sum().backward()
    assert kl.isfinite().all()
    assert logits.grad.isfinite().all()


def test_loss_weighs_true_classes_and_reduces():
    scheduler, t, x_0, x_t = kl_cases()
    pred = {"logits": random_logits(4, 4, 3, 3), "x_t": x_t, "timesteps": t}
    weights = [1.0, 0.0, 2.0, 3.0]
    kl = scheduler.kl(x_0, x_t, pred["logits"], t) * torch.tensor(weights)[x_0]
    loss = CategoricalKLLoss(scheduler, weights)
    torch.testing.assert_close(loss(pred, x_0), kl.mean())
    assert loss.latest.keys() == {"kl"}
    torch.testing.assert_close(CategoricalKLLoss(scheduler, weights, "sum")(pred, x_0), kl.sum() / 4)


def test_the_published_loss_has_a_floor():
    """Cross-entropy of probabilities taken for logits: perfect predictions still cost ln(1 + (K - 1) / e)."""
    _, t, x_0, x_t = kl_cases()
    scheduler = scheduler_of(20, 4, mode="ccdm_v1")
    pred = {"logits": 80 * (scheduler.one_hot(x_0) - 0.5), "x_t": x_t, "timesteps": t}
    assert CategoricalKLLoss(scheduler)(pred, x_0).item() == pytest.approx(math.log(1 + 3 / math.e), abs=1e-5)


def test_the_auxiliary_is_the_cross_entropy_of_x_0():
    scheduler, t, x_0, x_t = kl_cases()
    pred = {"logits": random_logits(4, 4, 3, 3), "x_t": x_t, "timesteps": t}
    due = torch.nn.functional.cross_entropy(pred["logits"], x_0[:, 0])
    weights = [1.0, 0.0, 2.0, 3.0]
    plain, loss = CategoricalKLLoss(scheduler, weights), CategoricalKLLoss(scheduler, weights, ce_weight=0.3)
    torch.testing.assert_close(loss(pred, x_0), plain(pred, x_0) + 0.3 * due)
    assert loss.latest.keys() == {"kl", "ce_x_0"}
    torch.testing.assert_close(loss.latest["ce_x_0"], 0.3 * due)
    summed = CategoricalKLLoss(scheduler, weights, "sum", ce_weight=0.3)(pred, x_0)
    torch.testing.assert_close(summed, x_0[0].numel() * loss(pred, x_0))
    assert torch.equal(CategoricalKLLoss(scheduler, weights, ce_weight=0.0)(pred, x_0), plain(pred, x_0))


def test_balance_makes_rare_classes_loud_and_leaves_the_truth_where_it_is():
    """At logits = log p the expected gradient is 0 whatever the balance; away from it a rare class pulls harder."""
    scheduler, truth = scheduler_of(20, 4), torch.tensor([0.9, 0.07, 0.02, 0.01])
    t, x_t = torch.full((1,), 7), torch.zeros(1, 1, 1)
    pulls = {}
    for balance in (None, [1.0, 3.0, 7.0, 20.0]):
        for name, start in (("truth", truth.log()), ("nothing", torch.zeros(4))):
            gradient = torch.zeros(4)
            for label, share in enumerate(truth):
                logits = start.clone().requires_grad_()
                loss = CategoricalKLLoss(scheduler, ce_weight=1.0, balance=balance)
                pred = {"logits": logits.view(1, 4, 1), "x_t": x_t, "timesteps": t}
                loss.terms(pred, torch.full((1, 1, 1), label))["ce_x_0"].sum().backward()
                gradient += share * logits.grad
            pulls[name, balance is None] = gradient
    torch.testing.assert_close(pulls["truth", True], torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(pulls["truth", False], torch.zeros(4), atol=1e-5, rtol=0)
    # Of two networks that know nothing, the balanced one hears of the rarest class first.
    shares = {plain: pulls["nothing", plain].abs() / pulls["nothing", plain].abs().sum() for plain in (True, False)}
    assert shares[False][0] < shares[True][0] or shares[False][3] > shares[True][3]
    with pytest.raises(ValueError, match="balance above 0"):
        CategoricalKLLoss(scheduler, balance=[1, 1, 1, 0])


def test_evidence_makes_a_prior_a_posterior():
    """A network that knows the prior alone is, with the voxel's own evidence, exact: Bayes, and the prior comes out."""
    scheduler = scheduler_of(12, 3, evidence=True)
    prior = torch.tensor([0.7, 0.2, 0.1])

    def network(planes, times):
        return prior.log().view(1, 3, 1).expand(planes.shape)

    for t in (0, 5, 11):
        x_t = torch.arange(3.0).view(3, 1, 1)
        w = scheduler.predict(network, x_t, torch.full((3,), t)).softmax(dim=1)
        q = between(scheduler, -1, t).T.float()  # row: x_t, column: x_0
        due = prior * q / (prior * q).sum(dim=1, keepdim=True)
        torch.testing.assert_close(w[..., 0], due, atol=1e-5, rtol=0)
    scheduler.last_step = "sample"
    for steps in (3, 12):
        sampler = CategoricalSampler(
            scheduler, steps, latent_shape=(40_000,), condition=lambda network, condition: network
        )
        drawn = sampler(torch.zeros(1, 1, 1), network, seeds=[steps])
        shares = torch.bincount(drawn.flatten().long(), minlength=3) / drawn.numel()
        torch.testing.assert_close(shares, prior, atol=0.01, rtol=0)


def test_at_the_first_time_the_bound_is_the_auxiliary_and_neither_has_a_floor():
    scheduler, _, x_0, x_t = kl_cases()
    first, loss = torch.zeros(4, dtype=torch.long), CategoricalKLLoss(scheduler, ce_weight=1.0)
    loss({"logits": random_logits(4, 4, 3, 3), "x_t": x_t, "timesteps": first}, x_0)
    torch.testing.assert_close(loss.latest["kl"], loss.latest["ce_x_0"])
    sure = {"logits": 80 * (scheduler.one_hot(x_0) - 0.5), "x_t": x_t, "timesteps": first}
    assert loss(sure, x_0) <= 1e-6


def test_the_auxiliary_says_late_what_the_bound_no_longer_says():
    """Near T the bound's gradient fades, for x_t tells little; the cross-entropy's stays."""
    scheduler, _, x_0, x_t = kl_cases()
    last, sizes = torch.full((4,), scheduler.num_train_timesteps - 1), []
    for weight in (0.0, 1.0):
        logits = random_logits(4, 4, 3, 3).requires_grad_()
        loss = CategoricalKLLoss(scheduler, ce_weight=weight)
        loss({"logits": logits, "x_t": x_t, "timesteps": last}, x_0).backward()
        sizes.append(logits.grad.abs().mean())
    assert sizes[1] > 5 * sizes[0]


# -- draws -------------------------------------------------------------------------------------------------------------


def chi_square(labels, probabilities):
    probabilities = probabilities.double()
    counts = torch.bincount(labels.flatten().long(), minlength=len(probabilities)).double()
    return stats.chisquare(counts, probabilities / probabilities.sum() * counts.sum()).pvalue


@pytest.mark.parametrize("t", [0, 30, 500, 999])
def test_noised_labels_have_the_marginal(t):
    scheduler, x_0 = scheduler_of(1000, 12), torch.full((1, 1, 1000, 1000), 5, dtype=torch.uint8)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(t))
    x_t = scheduler.add_noise(x_0, noise, torch.tensor([t]))
    assert x_t.dtype == torch.uint8
    assert chi_square(x_t, scheduler.marginal(x_0[..., :1, :1], t, -1, DOUBLE).flatten()) > 1e-3


def test_uniform_start_and_one_step_have_their_probabilities():
    scheduler, g = scheduler_of(1000, 12), torch.Generator().manual_seed(0)
    x_t = torch.full((1, 1, 1000, 1000), 3.0)
    assert chi_square(scheduler.prior(torch.randn(x_t.shape, generator=g)), torch.full((12,), 1 / 12.0)) > 1e-3
    scheduler.set_timesteps(20)
    logits, t = random_logits(1, 12, 1, 1).float(), scheduler.timesteps[10]
    x_prev, w = scheduler.step(logits.expand(1, 12, 1000, 1000), t, x_t, generator=g)
    due = scheduler.posterior_mixture(x_t[..., :1, :1], logits, t.item(), scheduler.timesteps[11]).exp()
    assert (x_prev.shape, x_prev.dtype, w.shape) == (x_t.shape, x_t.dtype, (1, 12, 1000, 1000))
    assert chi_square(x_prev, due.flatten()) > 1e-3


def test_no_draw_falls_outside_the_classes_or_on_an_impossible_one():
    scheduler = scheduler_of(10, 3, last_step="sample")
    scheduler.set_timesteps(1)
    noise = torch.tensor([-9.0, 0.0, 9.0, 40.0]).view(1, 1, 4)
    x, logits = torch.zeros(1, 1, 4), torch.tensor([-200.0, 0.0, -200.0]).view(1, 3, 1).expand(1, 3, 4)
    assert (scheduler.step(logits, 9, x, generator=lambda _: noise)[0] == 1).all()
    assert scheduler.prior(noise).flatten().tolist() == [0, 1, 2, 2]
    assert scheduler.add_noise(x, -noise, 9).max() <= 2


def test_sources_of_noise():
    scheduler, x = scheduler_of(10, 3), torch.zeros(2, 1, 5, 5)
    logits = random_logits(2, 3, 5, 5).float()
    a, b = (scheduler.step(logits, 5, x, generator=torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(a, b)
    torch.manual_seed(1)
    assert torch.equal(scheduler.step(logits, 5, x)[0], a)
    both = scheduler.step(logits, 5, x, generator=CaseNoise([4, 5]))[0]
    assert torch.equal(scheduler.step(logits[1:], 5, x[1:], generator=CaseNoise([5]))[0], both[1:])


@pytest.mark.parametrize("t", [0, 3, 9])
def test_renaming_the_classes_renames_the_probabilities(t):
    scheduler, order = scheduler_of(10, 4), torch.tensor([2, 0, 3, 1])
    logits, x_t = random_logits(1, 4, 4), torch.arange(4).view(1, 1, 4)
    renamed = scheduler.posterior_mixture(order.argsort()[x_t], logits[:, order], t)
    torch.testing.assert_close(renamed, scheduler.posterior_mixture(x_t, logits, t)[:, order])


# -- in the house ------------------------------------------------------------------------------------------------------


def sees_half(x, t, context=None):
    """A network that knows x_0: label 2 where the first coordinate is high, else 0."""
    logits = torch.full_like(x[:, :3], -10.0)
    logits[:, 2, x.shape[2] // 2 :] = logits[:, 0, : x.shape[2] // 2] = 10.0
    return logits


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("space", [(6, 6), (6, 6, 2)])
def test_the_one_reverse_loop_makes_label_maps(steps, space):
    sampler = CategoricalSampler(scheduler_of(50, 3), steps)
    sample = sampler(torch.zeros(2, 1, *space), sees_half)
    assert sample.shape == (2, 1, *space)
    assert (sample[:, :, :3] == 0).all()
    assert (sample[:, :, 3:] == 2).all()
    assert isinstance(sampler, DiffusionSampler)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("last_step", ["argmax", "sample", "probs"])
def test_who_knows_the_labels_draws_them_in_any_number_of_steps(steps, last_step):
    """The truth comes as the condition: logits of certainty, whatever the noisy labels show."""
    scheduler = scheduler_of(50, 5, last_step=last_step)
    truth = torch.randint(0, 5, (3, 1, 6, 5, 4), generator=torch.Generator().manual_seed(0)).float()
    run = CategoricalSampler(scheduler, steps)
    sample = run(scheduler.one_hot(truth), lambda x, t: 60 * x[:, 5:], seeds=[1, 2, 3])
    if last_step == "probs":
        torch.testing.assert_close(sample, scheduler.one_hot(truth))
        sample = sample.argmax(dim=1, keepdim=True)
    assert torch.equal(sample.float(), truth)


def test_the_loop_shows_planes_and_times_and_draws_case_by_case():
    seen, states = [], []

    def network(x, t):
        seen.append((x, t))
        return 0.1 * x[:, :3] - 0.1 * x[:, 3:]

    sampler = CategoricalSampler(scheduler_of(50, 3), 5, on_step=lambda i, x: states.append(x))
    inputs = torch.ones(2, 1, 8, 8)
    both = sampler(inputs, network, seeds=[7, 8])
    assert [t.tolist() for _, t in seen] == [[50, 50], [38, 38], [25, 25], [13, 13], [1, 1]]
    for (x, _), state in zip(seen[1:], states, strict=False):
        assert (x[:, :3].sum(1) == 1).all()
        assert torch.equal(x[:, :3].argmax(1, keepdim=True).float(), state)
    assert torch.equal(sampler(inputs[1:], network, seeds=[8]), both[1:])
    fused = CategoricalSampler(scheduler_of(50, 3, last_step="probs"), 5)(inputs, network, seeds=[7, 8])
    assert fused.shape == (2, 3, 8, 8)
    assert torch.equal(fused.argmax(1, keepdim=True).float(), both)


@pytest.mark.parametrize("mode", ["concat", "crossattn"])
def test_training_step_through_the_sockets(mode):
    """MONAI's prepare_batch, our inferer and loss: gradients descend to the truth."""
    scheduler, planes = scheduler_of(20, 3), 4 if mode == "concat" else 3
    layer, seen = torch.nn.Conv2d(planes, 3, 1), []

    def network(x, t, context=None):
        seen.append((x.shape, t, context))
        return layer(x)

    prepare = ConditionPrepareBatch(20, "image", scheduler=scheduler, mode=mode)
    image = torch.randint(0, 3, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    inputs, target, args, kwargs = prepare({"image": image}, "cpu")
    assert torch.equal(target, image), "the target is the label map"
    inferer, loss = CategoricalInferer(scheduler), CategoricalKLLoss(scheduler)
    optimizer, values = torch.optim.Adam(layer.parameters(), 0.1), []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(inferer(inputs, network, *args, **kwargs), target)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    assert seen[0][0] == (4, planes, 8, 8)
    assert torch.equal(seen[0][1], kwargs["timesteps"] + 1)
    assert (seen[0][2] is None) == (mode == "concat")


def test_mistakes_are_told_at_the_door():
    for kwargs in ({"mode": "fast"}, {"last_step": "mean"}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            scheduler_of(10, 3, **kwargs)
    with pytest.raises(ValueError, match="num_classes"):
        scheduler_of(10, 1)
    scheduler, x = scheduler_of(10, 3), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"num_inference_steps must lie in \[1, 10\]"):
        scheduler.set_timesteps(11)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="predicts 2 classes, expected 3"):
        scheduler.step(torch.zeros(1, 2, 2, 2), 9, x)
    with pytest.raises(ValueError, match="not on the grid"):
        scheduler.step(torch.zeros(1, 3, 2, 2), 8, x)
    with pytest.raises(ValueError, match=r"\[-1, t\)"):
        scheduler.posterior(x, x, 3, 3)
    with pytest.raises(ValueError, match="2 class_weights, 3 in balance, 3 classes"):
        CategoricalKLLoss(scheduler, [1, 2])
    with pytest.raises(ValueError, match="reduction"):
        CategoricalKLLoss(scheduler, reduction="none")
    with pytest.raises(ValueError, match=r"in 0\.\.2"):
        CategoricalInferer(scheduler)(x + 3, sees_half, x, torch.tensor([1]))
