"""Laws of LesionDiffusion's training and sampling: what is known survives, losses are the written ones, guidance is."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from common.attribute_unet import AttributeUNet
from common.execution import FastPath
from common.lesion_diffusion import (
    AttributeCondition,
    BoxWeightedLoss,
    InpaintingLoss,
    InpaintingSampler,
    LesionInferer,
    LesionPrepareBatch,
    box_volume,
    painted,
)
from common.sampler import DiffusionSampler
from common.schedules import DDIM, DDPM
from common.solvers import DPMSolverPP

BETAS = {"schedule": "scaled_linear_exact", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
PUBLISHED = {"grid": "strided", "steps_offset": 1, "final_alpha": "first"}
WIDTH, LATENT, ROWS = 6, 4, 3
dimensions = pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask(d: int = 3, cases: int = 2, side: int = 6) -> torch.Tensor:
    """Masks (B, 1, *S) that do not fill their boxes."""
    found = torch.zeros(cases, 1, *[side] * d)
    for b in range(cases):
        found[(b, 0, *[slice(1 + b, 4 + b)] * d)] = 1
        found[(b, 0, *[1 + b] * d)] = 0
    return found


def batch(d: int = 3, channels: int = LATENT) -> dict[str, torch.Tensor]:
    m = mask(d)
    return {"image": normal(2, channels, *m.shape[2:]), "condition": m, "context": normal(2, ROWS, WIDTH), "mask": m}


def unet(d: int = 3, outputs: int = LATENT + 1, inputs: int = LATENT + 1) -> AttributeUNet:
    torch.manual_seed(0)
    network = AttributeUNet(
        d, inputs, outputs, channels=(8, 16), attention_levels=(False, True), num_res_blocks=1, num_head_channels=8,
        cross_attention_dim=WIDTH, null_token=True, norm_num_groups=4,
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)
    return network.eval()


class Watched:
    """A network that keeps what it was given."""

    def __init__(self, outputs: int = LATENT + 1) -> None:
        self.outputs, self.calls = outputs, []

    def __call__(self, x, t, context=None):
        self.calls.append((x, t, context))
        told = 0 if context is None else context.mean(dim=(1, 2)).view(-1, *[1] * (x.ndim - 1))
        return (0.1 * x[:, :1] + told).expand(-1, self.outputs, *x.shape[2:])


# ---------------------------------------------------------------------------------------------------------------------
# A batch


@pytest.mark.parametrize("inpaint", [False, True], ids=["LMNet", "LINet"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_batch_brings_what_network_and_loss_need(inpaint, kind):
    data, scheduler = batch(), DDPM(1000, prediction_type=kind, **BETAS)
    prepare = LesionPrepareBatch(1000, inpaint=inpaint, scheduler=scheduler)
    image, target, args, infer = prepare(data)
    assert torch.equal(image, data["image"])
    assert args == ()
    assert set(infer) == {"noise", "timesteps", "condition", "context"} | ({"mask"} if inpaint else set())
    assert torch.equal(infer["condition"], data["condition"])
    assert torch.equal(infer["context"], data["context"])
    assert set(target) == {"target", "mask"}
    assert torch.equal(target["mask"], data["mask"])
    noise, t = infer["noise"], infer["timesteps"]
    known = {"epsilon": noise, "sample": image, "v_prediction": scheduler.get_velocity(image, noise, t)}
    torch.testing.assert_close(target["target"], known[kind])
    # Masks are often stored as whole numbers.
    stored = {**data, "condition": data["condition"].byte(), "mask": data["mask"].bool(), "box": data["mask"].bool()}
    _, target, _, infer = prepare(stored)
    assert {v.dtype for v in (*target.values(), infer["condition"])} == {torch.float32}
    assert set(target) == {"target", "mask", "box"}


def test_attributes_are_dropped_to_zeros_and_a_seed_draws_the_same():
    data = {k: v.repeat(50, *[1] * (v.ndim - 1)) for k, v in batch(2).items()}
    torch.manual_seed(0)
    dropped = LesionPrepareBatch(1000, drop=0.3)(data)[3]
    silent = (dropped["context"] == 0).flatten(1).all(dim=1)
    assert 0.15 < silent.float().mean() < 0.45
    assert torch.equal(dropped["context"][~silent], data["context"][~silent])
    assert torch.equal(dropped["condition"], data["condition"]), "only what is said is dropped"
    for key in ("noise", "timesteps"):
        a, b = (LesionPrepareBatch(1000, seed=3)(data)[3][key] for _ in range(2))
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Training forward and losses


@dimensions
def test_training_leaves_the_clean_latent_outside_the_mask(d):
    data, scheduler, network = batch(d), DDPM(1000, **BETAS), Watched()
    _, _, _, infer = LesionPrepareBatch(1000, inpaint=True, scheduler=scheduler)(data)
    out = LesionInferer(scheduler)(data["image"], network, **infer)
    ((x, t, context),) = network.calls
    assert out.shape[1] == LATENT + 1
    assert torch.equal(t, infer["timesteps"])
    assert torch.equal(context, infer["context"])
    m = data["mask"].expand(-1, LATENT, *[-1] * d) > 0
    noised = scheduler.add_noise(data["image"], infer["noise"], t)
    assert torch.equal(x[:, :LATENT][~m], data["image"][~m]), "to the last bit"
    assert torch.equal(x[:, :LATENT][m], noised[m])
    assert torch.equal(x[:, LATENT:], data["condition"])
    LesionInferer(scheduler)(data["image"], network, **{k: v for k, v in infer.items() if k != "mask"})
    assert torch.equal(network.calls[1][0][:, :LATENT], noised), "without a mask all is noised"


@dimensions
def test_the_loss_of_masks_is_the_written_one(d):
    box, aim, pred = mask(d), normal(2, 1, *[6] * d), normal(2, 1, *[6] * d, seed=1)
    total = 0.0
    for place in itertools.product(range(2), *[range(6)] * d):
        b, *s = place
        w = 1000.0 if box[(b, 0, *s)] else 1.0
        total += w * (aim[(b, 0, *s)] - pred[(b, 0, *s)]).item() ** 2
    loss = BoxWeightedLoss()
    assert loss(pred, {"target": aim, "mask": box}).item() == pytest.approx(total / box.numel(), rel=1e-5)
    error = (aim - pred).square()
    assert loss.latest["inside"].item() == pytest.approx(error[box > 0].mean().item(), rel=1e-5)
    assert loss.latest["outside"].item() == pytest.approx(error[box == 0].mean().item(), rel=1e-5)
    plain = BoxWeightedLoss(1.0)(pred, {"target": aim, "mask": box})
    assert plain.item() == pytest.approx(error.mean().item(), rel=1e-6)


@dimensions
def test_the_loss_of_painting_is_the_written_one(d):
    m, aim, pred = mask(d), normal(2, LATENT, *[6] * d), normal(2, LATENT + 1, *[6] * d, seed=1)
    volume = 3**d
    assert box_volume(m).tolist() == [volume, volume]
    assert m.flatten(1).sum(dim=1).tolist() == [volume - 1, volume - 1], "the box is larger than the mask"
    l1 = sum((m[b] * aim[b] - m[b] * pred[b, :LATENT]).abs().sum().item() / (volume + 1e-6) for b in range(2)) / 2
    p = 1 / (1 + (-pred[:, LATENT:].double()).exp())
    dice = 1 - (2 * (p * m).sum() + 1e-6) / (p.sum() + m.sum() + 1e-6)
    loss = InpaintingLoss()
    assert loss(pred, {"target": aim, "mask": m}).item() == pytest.approx(l1 + dice.item(), rel=1e-5)
    assert loss.latest["painted"].item() == pytest.approx(l1, rel=1e-5)
    assert loss.latest["dice"].item() == pytest.approx(dice.item(), rel=1e-5)
    # A box that is told takes the place of the smallest.
    loss(pred, {"target": aim, "mask": m, "box": torch.ones_like(m)})
    assert loss.latest["painted"].item() == pytest.approx(l1 * (volume + 1e-6) / 6**d, rel=1e-5)
    only = InpaintingLoss(dice_weight=0)(pred, {"target": aim, "mask": m})
    assert only.item() == pytest.approx(l1, rel=1e-5)


def test_what_is_outside_the_mask_costs_nothing():
    m, aim, pred = mask(), normal(2, LATENT, 6, 6, 6), normal(2, LATENT + 1, 6, 6, 6, seed=1).requires_grad_()
    InpaintingLoss(dice_weight=0)(pred, {"target": aim, "mask": m}).backward()
    assert (pred.grad[:, :LATENT].abs().amax(dim=1, keepdim=True)[m == 0] == 0).all()
    assert (pred.grad[:, :LATENT].abs().amin(dim=1, keepdim=True)[m == 1] > 0).all()
    perfect = torch.cat([aim, torch.where(m > 0, 50.0, -50.0)], dim=1)
    assert InpaintingLoss()(perfect, {"target": aim, "mask": m}).item() == pytest.approx(0, abs=1e-6)


def test_a_box_spans_pieces_and_an_empty_mask_costs_nothing_but_dice():
    m = torch.zeros(3, 1, 5, 6, 7)
    m[0, 0, 1, 1, 1] = m[0, 0, 3, 2, 6] = 1
    m[1] = 1
    assert box_volume(m).tolist() == [3 * 2 * 6, 5 * 6 * 7, 0]
    loss = InpaintingLoss()
    total = loss(normal(3, 2, 5, 6, 7), {"target": normal(3, 1, 5, 6, 7, seed=1), "mask": torch.zeros_like(m)})
    assert total.isfinite()
    assert loss.latest["painted"] == 0


@pytest.mark.parametrize("inpaint", [False, True], ids=["LMNet", "LINet"])
def test_monais_engines_train_and_validate(inpaint):
    """As the configs wire them; the loss falls."""
    channels = LATENT if inpaint else 1
    m = mask(2, side=8)
    cases = [
        {"image": normal(channels, 8, 8, seed=b) if inpaint else m[b], "condition": m[b], "mask": m[b],
         "context": normal(ROWS, WIDTH, seed=b)} for b in range(2)
    ]  # fmt: skip
    scheduler = DDPM(1000, prediction_type="v_prediction", **BETAS)
    network = unet(2, channels + inpaint, channels + 1)
    loss = InpaintingLoss() if inpaint else BoxWeightedLoss(10)
    loader = torch.utils.data.DataLoader(cases, batch_size=2)
    step = FastPath(LesionInferer(scheduler), precision="float32")
    losses = []

    def prepared(**kwargs):
        return LesionPrepareBatch(1000, inpaint=inpaint, scheduler=scheduler, **kwargs)

    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=12, train_data_loader=loader, network=network, inferer=step,
        optimizer=torch.optim.Adam(network.parameters(), 0.01), loss_function=loss, prepare_batch=prepared(drop=0.1),
    )  # fmt: skip
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=loader, network=network, inferer=step,
        prepare_batch=prepared(seed=1), decollate=False,
    )  # fmt: skip

    def validate() -> float:
        evaluator.run()
        output = evaluator.state.output
        return loss(output["pred"], output["label"]).item()

    losses = [validate(), validate()]
    assert losses[0] == losses[1], "validation draws the same"
    trainer.run()
    assert validate() < losses[0]
    assert set(loss.latest) == ({"painted", "dice"} if inpaint else {"inside", "outside"})


# ---------------------------------------------------------------------------------------------------------------------
# The condition


def test_guidance_of_one_makes_one_call_and_any_other_a_doubled_batch():
    network, condition, context = Watched(1), mask(), normal(2, ROWS, WIDTH)
    x, t = normal(2, 1, 6, 6, 6, seed=3), torch.tensor([4, 9])
    told = AttributeCondition()(network, condition, context)(x, t)
    (call,) = network.calls
    assert torch.equal(call[0], torch.cat([x, condition], dim=1))
    assert torch.equal(call[2], context)
    guided = AttributeCondition(3.0)(network, condition, context)(x, t)
    assert len(network.calls) == 2
    doubled = network.calls[1]
    assert torch.equal(doubled[0], torch.cat([call[0]] * 2)), "the channels are kept on both sides"
    assert torch.equal(doubled[2], torch.cat([torch.zeros_like(context), context]))
    null = AttributeCondition()(network, condition, torch.zeros_like(context))(x, t)
    torch.testing.assert_close(guided, null + 3 * (told - null))


def test_neutral_guidance_is_no_guidance_and_none_at_all_is_the_null():
    network, condition, context = unet(), mask(), normal(2, ROWS, WIDTH)
    x, t = normal(2, LATENT, 6, 6, 6, seed=3), torch.tensor([4, 9])
    with torch.no_grad():
        told, neutral, none = (AttributeCondition(s)(network, condition, context)(x, t) for s in (1, 1 + 1e-9, 0))
        silent = AttributeCondition(5.0, use_text=False)(network, condition, context)(x, t)
    torch.testing.assert_close(neutral, told, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(none, silent, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(told, silent, atol=1e-4)


def test_without_text_the_network_gets_none():
    network, x, t = Watched(1), normal(2, 1, 6, 6, 6), torch.tensor([4, 9])
    AttributeCondition(3.0, use_text=False)(network, mask(), normal(2, ROWS, WIDTH))(x, t)
    AttributeCondition(3.0)(network, mask())(x, t)
    assert [context for _, _, context in network.calls] == [None, None]
    one = normal(1, ROWS, WIDTH)
    AttributeCondition()(network, mask(), one)(x, t)
    assert torch.equal(network.calls[-1][2], one.expand(2, -1, -1)), "one for all cases"


def test_the_plain_sampler_draws_masks_by_attributes_case_by_case():
    """LMNet's chain: condition channels, attributes by name, a seed for each case."""
    network, condition, context = unet(outputs=1, inputs=4), normal(2, 3, 6, 6, 6), normal(2, ROWS, WIDTH)
    sampler = DiffusionSampler(DDIM(1000, eta=1.0, **BETAS), 3, condition=AttributeCondition(2.0))
    both = sampler(condition, network, seeds=[5, 6], context=context)
    assert both.shape == (2, 1, 6, 6, 6)
    for b in range(2):
        alone = sampler(condition[b : b + 1], network, seeds=[5 + b], context=context[b : b + 1])
        torch.testing.assert_close(alone, both[b : b + 1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sampler(condition, network, seeds=[5, 6], context=-context), both, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Painting


SCHEDULERS = {
    "DDPM": lambda: DDPM(1000, **BETAS),
    "DDIM as published": lambda: DDIM(1000, eta=1.0, **BETAS, **PUBLISHED),
    "DDIM": lambda: DDIM(1000, **BETAS),
    "DPM-Solver++": lambda: DPMSolverPP(1000, **{k: v for k, v in BETAS.items() if k != "clip_sample"}),
}
schedulers = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


@dimensions
@schedulers
def test_outside_the_mask_the_clean_latent_survives_to_the_last_bit(make, d):
    """Every step sees it, and so does the end; inside, nothing of it is seen."""
    m, clean, network = mask(d), normal(2, LATENT, *[6] * d), Watched()
    outside = (m == 0).expand(-1, LATENT, *[-1] * d)
    sampler = InpaintingSampler(make(), 4, channels=LATENT, condition=AttributeCondition())
    context = normal(2, ROWS, WIDTH)
    inputs = torch.cat([clean, m], dim=1)
    sample = sampler(inputs, network, seeds=[1, 2], context=context)
    assert len(network.calls) == 4
    for x, _, _ in network.calls:
        assert torch.equal(x[:, :LATENT][outside], clean[outside])
        assert torch.equal(x[:, LATENT:], m)
    assert torch.equal(sample[outside], clean[outside])
    assert sample.shape == clean.shape
    other = sampler(torch.cat([torch.where(outside, clean, 7.0), m], dim=1), network, seeds=[1, 2], context=context)
    assert torch.equal(other, sample)


@schedulers
def test_a_batch_is_painted_as_its_cases_one_by_one(make):
    network, inputs, context = unet(), torch.cat([normal(2, LATENT, 6, 6, 6), mask()], dim=1), normal(2, ROWS, WIDTH)
    sampler = InpaintingSampler(make(), 4, channels=LATENT, condition=AttributeCondition(2.0))
    both = sampler(inputs, network, seeds=[5, 6], context=context)
    guess = sampler.mask_logit
    assert guess.shape == (2, 1, 6, 6, 6)
    for b in range(2):
        alone = sampler(inputs[b : b + 1], network, seeds=[5 + b], context=context[b : b + 1])
        torch.testing.assert_close(alone, both[b : b + 1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sampler.mask_logit, guess[b : b + 1], atol=1e-4, rtol=1e-4)


def test_a_network_that_knows_the_noise_paints_the_lesion_back():
    """One that predicts the true noise inside the mask gives z_0 back, mask channel or none."""
    m, clean = mask(), normal(2, LATENT, 6, 6, 6)
    scheduler = DDIM(1000, **BETAS)

    def knows(x, t, context=None):
        alpha, sigma = scheduler.levels(t, x)
        return (x[:, :LATENT] - alpha * clean) / sigma

    sampler = InpaintingSampler(scheduler, 5, channels=LATENT, condition=AttributeCondition())
    hidden = torch.cat([painted(torch.zeros_like(clean), clean, m), m], dim=1)
    torch.testing.assert_close(sampler(hidden, knows, seeds=[1, 2]), clean, atol=1e-3, rtol=1e-3)
    assert sampler.mask_logit is None


def test_inputs_without_a_mask_are_refused():
    sampler = InpaintingSampler(DDIM(1000, **BETAS), 2, channels=LATENT, condition=AttributeCondition())
    with pytest.raises(ValueError, match="inputs have 4 channels, expected 4 of the clean latent and the mask"):
        sampler(normal(1, LATENT, 6, 6, 6), Watched())


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of steps


def test_every_number_of_steps_runs_where_599_of_the_references_do_not():
    """Theirs go past the end of the table wherever T // S leaves a step too many."""
    theirs, ours, broken = DDIM(1000, **BETAS, **PUBLISHED), DDIM(1000, eta=1.0, **BETAS), []
    for steps in range(1, 1001):
        try:
            theirs.set_timesteps(steps)
        except ValueError:
            broken.append(steps)
        ours.set_timesteps(steps)
        times = ours.timesteps
        assert len(times) == steps
        assert 0 <= times.min() <= times.max() == 999
        assert (times.diff() < 0).all()
    assert len(broken) == 599
    with pytest.raises(ValueError, match="3 strided steps reach timestep 1000 > 999: take a divisor of 1000"):
        theirs.set_timesteps(3)
    assert {3, 37, 101} <= set(broken)
    assert not {50, 200, 500} & set(broken)


@pytest.mark.parametrize("steps", [1, 3, 37])
def test_odd_numbers_of_steps_sample(steps):
    sampler = InpaintingSampler(DDIM(1000, **BETAS), steps, channels=LATENT, condition=AttributeCondition())
    network = Watched()
    sample = sampler(torch.cat([normal(1, LATENT, 6, 6), mask(2, 1)], dim=1), network, context=normal(1, ROWS, WIDTH))
    assert len(network.calls) == steps
    assert sample.isfinite().all()
