"""Laws of conditioning: what the network is given, guidance that costs nothing when neutral, batches for training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import DiffusionInferer
from monai.networks.nets import ControlNet

from common.conditioning import (
    Concat,
    ConditionPrepareBatch,
    ControlNetHint,
    CrossAttention,
    Guided,
    GuidedContext,
    HintPrepareBatch,
)
from common.schedules import DDPM
from common.unet import DiffusionUNet

TIMES = torch.tensor([3, 7])


class Recorder:
    """A network that remembers its calls; answers 0.1 x."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, x, t, **kwargs):
        self.calls.append((x, t, kwargs))
        return 0.1 * x[:, :1]


@pytest.mark.parametrize("size", [(4, 5), (4, 5, 3)], ids=["2-D", "3-D"])
def test_concat_puts_the_image_first(size):
    network, x, condition = Recorder(), torch.zeros(2, 1, *size), torch.ones(2, 3, *size)
    pred = Concat()(network, condition)(x, TIMES)
    joined, t, kwargs = network.calls[0]
    assert pred.shape == x.shape
    assert joined.shape[1] == 4
    assert torch.equal(joined[:, :1], x)
    assert torch.equal(joined[:, 1:], condition)
    assert torch.equal(t, TIMES)
    assert kwargs == {}


def test_cross_attention_hands_over_the_tokens():
    network, x, tokens = Recorder(), torch.zeros(2, 1, 4, 4), torch.ones(2, 5, 6)
    CrossAttention()(network, tokens)(x, TIMES)
    assert network.calls[0][0] is x
    assert network.calls[0][2]["context"] is tokens


def test_a_controlnet_hint_enters_by_the_skips():
    settings = {"channels": (8, 8), "attention_levels": (False, True), "num_res_blocks": 1, "norm_num_groups": 4}
    torch.manual_seed(0)
    network = DiffusionUNet(2, 1, 1, **settings, num_head_channels=8).eval()
    control = ControlNet(2, 1, **settings, num_head_channels=8, conditioning_embedding_in_channels=2,
                         conditioning_embedding_num_channels=(8,)).eval()  # fmt: skip
    for parameter in (*network.parameters(), *control.parameters()):
        parameter.data = 0.2 * torch.randn(parameter.shape)
    x, hint = torch.randn(2, 1, 8, 8), torch.randn(2, 2, 8, 8)
    down, mid = control(x, TIMES, controlnet_cond=hint)
    expected = network(x, TIMES, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    torch.testing.assert_close(ControlNetHint(control)(network, hint)(x, TIMES), expected)
    torch.testing.assert_close(ControlNetHint(control, scale=0.0)(network, hint)(x, TIMES), network(x, TIMES))


@pytest.mark.parametrize(("adapter", "shape"), [(Concat(), (2, 2, 4, 4)), (CrossAttention(), (2, 5, 6))])
def test_neutral_guidance_is_no_guidance_and_one_call(adapter, shape):
    network, x, condition = Recorder(), torch.randn(2, 1, 4, 4), torch.ones(shape)
    guided = Guided(adapter, 1.0)(network, condition)(x, TIMES)
    assert len(network.calls) == 1
    assert torch.equal(guided, adapter(network, condition)(x, TIMES))


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_guidance_is_null_plus_scale_times_the_difference(scale):
    x, condition = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    seen = []

    def network(joined, t):
        seen.append(joined[:, 1:])
        return joined[:, :1] * joined[:, 1:].mean() + 1

    guided = Guided(Concat(), scale, null=-1.0)(network, condition)(x, TIMES)
    null, conditional = -x + 1, x * condition.mean() + 1
    torch.testing.assert_close(guided, null + scale * (conditional - null))
    assert len(seen) == 2
    assert any(torch.equal(c, torch.full_like(condition, -1)) for c in seen)


# ---------------------------------------------------------------------------------------------------------------------
# Training batches


def batch(n: int = 4) -> dict:
    return {
        "image": MetaTensor(torch.rand(n, 1, 4, 4)),
        "condition": MetaTensor(torch.rand(n, 2, 4, 4) + 1),
        "name": ["a"] * n,
    }


def test_noise_is_the_target_and_times_cover_the_schedule():
    torch.manual_seed(0)
    data = batch(2000)
    image, target, args, infer = ConditionPrepareBatch(10)(data)
    assert torch.equal(image, data["image"].as_tensor())
    assert target is infer["noise"]
    assert args == ()
    assert infer["timesteps"].unique().tolist() == list(range(10))
    assert infer["noise"].std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(infer["condition"], data["condition"].as_tensor())


@pytest.mark.parametrize("first", [0, 3])
def test_times_may_be_drawn_by_a_power_law(first):
    prepare, n = ConditionPrepareBatch(12, first_timestep=first, t_power=1.5), 20000
    torch.manual_seed(0)
    drawn = prepare.get_timesteps(torch.zeros(n, 1))
    law = prepare.time_law()
    weights = torch.arange(first, 12).add(1).double() ** 1.5
    assert torch.equal(law, weights / weights.sum())
    counts = torch.bincount(drawn, minlength=12)[first:].double()
    assert counts.sum() == n
    # Chi-squared: its mean is the degrees of freedom, 11 or 8.
    assert ((counts - n * law) ** 2 / (n * law)).sum() < 30
    assert prepare(batch())[3]["timesteps"].dtype == torch.long


def test_a_power_of_zero_draws_as_ever():
    ours, usual = (ConditionPrepareBatch(10, seed=1, **k)(batch())[3]["timesteps"] for k in ({"t_power": 0.0}, {}))
    assert torch.equal(ours, usual)


def test_metatensors_go_in_and_plain_tensors_come_out():
    image, target, _, infer = ConditionPrepareBatch(10, drop=0.5)(batch())
    assert all(type(t) is torch.Tensor for t in (image, target, *(v for k, v in infer.items() if k != "mode")))


def test_a_seed_fixes_the_draws_and_leaves_the_global_generator_alone():
    data, prepare = batch(), ConditionPrepareBatch(1000, drop=0.5, seed=3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = prepare(data)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = prepare(data)
    for key in ("noise", "timesteps", "condition"):
        assert torch.equal(first[3][key], second[3][key])
    free = ConditionPrepareBatch(1000)
    assert not torch.equal(free(data)[1], free(data)[1])


@pytest.mark.parametrize("drop", [0.0, 0.2, 1.0])
def test_conditions_are_dropped_case_by_case_at_the_rate_asked_for(drop):
    torch.manual_seed(0)
    condition = ConditionPrepareBatch(10, drop=drop, null=-1.0)(batch(4000))[3]["condition"]
    null = (condition == -1).flatten(1)
    assert torch.equal(null.any(1), null.all(1))  # a case loses all of its condition or none
    assert null.all(1).float().mean().item() == pytest.approx(drop, abs=0.02)


def test_dropping_leaves_the_callers_batch_as_it_was():
    data = batch()
    before = data["condition"].clone()
    ConditionPrepareBatch(10, drop=1.0)(data)
    assert torch.equal(data["condition"], before)


@pytest.mark.parametrize("mode", ["concat", "crossattn", "unconditional"])
def test_it_feeds_monais_inferer(mode):
    seen = {}

    def network(x, timesteps, context=None):
        seen.update(x=x, timesteps=timesteps, context=context)
        return 0.1 * x[:, :1]

    data = batch()
    if mode == "crossattn":
        data["condition"] = torch.rand(4, 5, 6)
    prepare = ConditionPrepareBatch(10, mode=mode) if mode != "unconditional" else ConditionPrepareBatch(10, None)
    image, target, args, infer = prepare(data)
    pred = DiffusionInferer(DDPM(10))(image, network, *args, **infer)
    assert pred.shape == target.shape
    assert seen["x"].shape[1] == (3 if mode == "concat" else 1)
    assert (seen["context"] is not None) == (mode == "crossattn")


def test_mistakes_teach_at_the_door():
    for make in (partial(ConditionPrepareBatch, 10, mode="add"), partial(ConditionPrepareBatch, 10, drop=1.5)):
        with pytest.raises(ValueError, match="got"):
            make()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seed_leaves_the_gpus_generator_alone():
    before = torch.cuda.get_rng_state()
    ConditionPrepareBatch(10, seed=3)(batch(), device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_is_what_the_scheduler_turns_back_into_the_image(kind):
    scheduler = DDPM(50, "cosine_exact", prediction_type=kind, clip_sample=False)
    batch = {"image": torch.randn(3, 1, 4, 4), "condition": torch.zeros(3, 1, 4, 4)}
    image, target, _, infer = ConditionPrepareBatch(50, scheduler=scheduler)(batch, "cpu")
    noisy = scheduler.add_noise(image, infer["noise"], infer["timesteps"])
    for b, t in enumerate(infer["timesteps"].tolist()):
        _, x_0 = scheduler.step(target[b : b + 1], t, noisy[b : b + 1])
        torch.testing.assert_close(x_0, image[b : b + 1], atol=1e-2 if t == 49 else 1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Latents, null conditions that are whole rows, hints


def latent_batch(n: int = 4) -> dict:
    """Images, masks, words, and the moments of their latents."""
    torch.manual_seed(5)
    return {
        "image": MetaTensor(torch.rand(n, 3, 8, 8) * 2 - 1),
        "mask": MetaTensor((torch.rand(n, 1, 8, 8) > 0.5).float()),
        "context": torch.randint(1, 50, (n, 5)),
        "mean": MetaTensor(torch.randn(n, 2, 4, 4)),
        "std": torch.rand(n, 2, 4, 4) + 0.5,
    }


def latent_draw(prepared: tuple, data: dict) -> torch.Tensor:
    return (prepared[0] - torch.as_tensor(data["mean"])) / data["std"]


def test_latents_are_drawn_anew_for_every_batch_around_their_mean():
    data, prepare = latent_batch(2000), ConditionPrepareBatch(10, "context", mode="crossattn")
    first, second = prepare(data), prepare(data)
    assert first[0].shape == first[1].shape == data["mean"].shape
    assert type(first[0]) is torch.Tensor
    assert not torch.equal(first[0], second[0])
    draws = latent_draw(first, data)
    assert draws.mean().item() == pytest.approx(0, abs=0.02)
    assert draws.std().item() == pytest.approx(1, abs=0.02)
    certain = {**data, "std": torch.zeros_like(data["std"])}
    assert torch.equal(prepare(certain)[0], torch.as_tensor(data["mean"]))


@pytest.mark.parametrize("seed", [None, 3])
def test_a_latents_draw_is_not_the_noise(seed):
    """The same generator seeded twice would noise every latent by its own draw."""
    data = latent_batch(500)
    prepared = ConditionPrepareBatch(10, "context", mode="crossattn", seed=seed)(data)
    draws, noise = latent_draw(prepared, data).flatten(), prepared[3]["noise"].flatten()
    assert torch.corrcoef(torch.stack([draws, noise]))[0, 1].abs().item() < 0.03
    assert not torch.isclose(draws, noise, atol=1e-5).float().mean() > 0.01


def test_a_seed_fixes_the_latents_too():
    data, prepare = latent_batch(), ConditionPrepareBatch(10, "context", mode="crossattn", seed=3)
    first = prepare(data)
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    second = prepare(data)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    kept = latent_batch()
    assert all(torch.equal(torch.as_tensor(data[k]), torch.as_tensor(kept[k])) for k in data), (
        "the batch is the caller's"
    )


@pytest.mark.parametrize(
    "condition", [torch.randint(1, 50, (4000, 5)), torch.rand(4000, 5, 6) + 1], ids=["words", "tokens"]
)
def test_a_null_condition_may_be_a_row_of_its_own(condition):
    torch.manual_seed(0)
    null = torch.arange(5) + 100 if condition.ndim == 2 else -torch.rand(5, 6)
    data = {"image": torch.rand(4000, 1, 1, 1), "context": condition}
    out = ConditionPrepareBatch(10, "context", mode="crossattn", drop=0.2, null=null)(data)[3]["condition"]
    assert out.dtype == condition.dtype
    lost, kept = (out == null).flatten(1).all(1), (out == condition).flatten(1).all(1)
    assert torch.equal(lost, ~kept), "a whole row or none of it"
    assert lost.float().mean().item() == pytest.approx(0.2, abs=0.02)
    every = ConditionPrepareBatch(10, "context", mode="crossattn", drop=1.0, null=null)(data)[3]["condition"]
    assert torch.equal(every, null.expand_as(condition))
    zero = ConditionPrepareBatch(10, "context", mode="crossattn", drop=1.0)(data)[3]["condition"]
    assert zero.dtype == condition.dtype
    assert not zero.any()


@pytest.mark.parametrize("latent", [True, False], ids=["latents", "pixels"])
@pytest.mark.parametrize("size", [(8, 8), (8, 6, 4)], ids=["2-D", "3-D"])
def test_hints_are_the_mask_in_the_images_channels_and_the_image_in_the_masks_range(latent, size):
    image, mask = MetaTensor(torch.rand(4, 3, *size) * 2 - 1), MetaTensor((torch.rand(4, 1, *size) > 0.5).float())
    image[0, 0], image[0, 1] = -1, 1
    data = {"image": image, "mask": mask, "context": torch.randint(1, 50, (4, 5))}
    data |= {"mean": torch.randn(4, 2, 4, 4), "std": torch.ones(4, 2, 4, 4)} if latent else {}
    z_0, target, args, infer = HintPrepareBatch(10, "context", mode="crossattn")(data)
    assert args == ()
    assert set(infer) == {"noise", "timesteps", "context", "hint_mask", "hint_image"}
    assert z_0.shape == target.shape == infer["noise"].shape == ((4, 2, 4, 4) if latent else image.shape)
    assert torch.equal(target, infer["noise"])
    assert infer["hint_mask"].shape == infer["hint_image"].shape == image.shape
    for channel in infer["hint_mask"].unbind(1):
        assert torch.equal(channel, mask[:, 0].as_tensor())
    assert torch.equal(infer["hint_image"], (image.as_tensor() + 1) / 2)
    assert (infer["hint_image"].min().item(), infer["hint_image"].max().item()) == (0, 1)
    assert torch.equal(infer["context"], data["context"])
    assert all(type(v) is torch.Tensor for v in (z_0, target, *infer.values()))


def test_words_are_dropped_hints_are_not():
    data, null = latent_batch(), torch.zeros(5)
    infer = HintPrepareBatch(10, "context", mode="crossattn", drop=1.0, null=null)(data)[3]
    assert infer["context"].dtype == torch.int64
    assert not infer["context"].any()
    assert torch.equal(infer["hint_mask"][:, :1], data["mask"].as_tensor())
    assert data["context"].all()


def test_the_target_of_hinted_latents_is_the_velocity_where_the_scheduler_predicts_it():
    scheduler = DDPM(50, "cosine_exact", prediction_type="v_prediction")
    z_0, target, _, infer = HintPrepareBatch(50, "context", mode="crossattn", scheduler=scheduler)(latent_batch())
    abar = scheduler.alphas_cumprod[infer["timesteps"]].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(target, abar.sqrt() * infer["noise"] - (1 - abar).sqrt() * z_0)
    fixed = HintPrepareBatch(50, "context", mode="crossattn", scheduler=scheduler, seed=2)
    first, second = fixed(latent_batch()), fixed(latent_batch())
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# ---------------------------------------------------------------------------------------------------------------------
# A context of each case's own


class Spoken(Recorder):
    """A controlled network whose answer each case's own tokens, and its hint, shift."""

    def __call__(self, x, t, encoded, scale, context=None):
        super().__call__(x, t, encoded=encoded, scale=scale, context=context)
        shift = 0 if context is None else context.float().flatten(1).mean(1)
        return 0.1 * x + (shift + encoded.flatten(1).mean(1)).view(-1, 1, 1, 1)


TOKENS = {"tokens": torch.rand(3, 5, 6) + 1, "words": torch.randint(1, 50, (3, 5))}
of_any_kind = pytest.mark.parametrize("kind", TOKENS)
adapters = pytest.mark.parametrize(
    "adapter",
    [lambda context: ControlNetHint(context=context), lambda context: GuidedContext(1.0, context=context),
     lambda context: GuidedContext(3.0, torch.zeros_like(TOKENS["tokens" if context.ndim == 3 else "words"][:1]),
                                   context=context)],
    ids=["plain", "neutral", "guided"],
)  # fmt: skip


@of_any_kind
@adapters
def test_a_calls_context_takes_the_place_of_the_default(kind, adapter):
    own, network = TOKENS[kind], Spoken()
    x, t, hint = torch.randn(3, 1, 4, 4), torch.tensor([1, 2, 3]), torch.rand(3, 1, 4, 4)
    default = torch.full_like(own[:1], 7)
    called = adapter(default)(network, hint, own)(x, t)
    assert torch.equal(called, adapter(own)(network, hint)(x, t)), "as if it had been the default"
    assert not torch.equal(called, adapter(default)(network, hint)(x, t))
    assert all(call[2]["context"].dtype == own.dtype for call in network.calls), "words stay whole numbers"
    assert torch.equal(network.calls[0][2]["context"][-3:], own)
    assert (default == 7).all()


@of_any_kind
@adapters
def test_cases_with_contexts_of_their_own_are_their_cases_one_by_one(kind, adapter):
    own, network = TOKENS[kind], Spoken()
    x, t, hint = torch.randn(3, 1, 4, 4), torch.tensor([1, 2, 3]), torch.rand(3, 1, 4, 4)
    make = adapter(torch.zeros_like(own[:1]))
    together = make(network, hint, own)(x, t)
    for b in (slice(0, 1), slice(1, 2), slice(2, 3)):
        torch.testing.assert_close(make(network, hint[b], own[b])(x[b], t[b]), together[b])
    one = make(network, hint, own[:1])(x, t)
    torch.testing.assert_close(one, make(network, hint, own[:1].expand_as(own))(x, t))
    with pytest.raises(ValueError, match="2 rows for 3 cases"):
        make(network, hint, own[:2])(x, t)


def test_guidance_needs_a_default_or_a_calls_context():
    guided, hint, own = GuidedContext(2.0, TOKENS["words"][:1]), torch.rand(3, 1, 4, 4), TOKENS["words"]
    with pytest.raises(ValueError, match="needs a context to compare with null_context"):
        guided(Spoken(), hint)
    assert guided(Spoken(), hint, own)(torch.randn(3, 1, 4, 4), torch.arange(3)).shape == (3, 1, 4, 4)
