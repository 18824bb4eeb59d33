"""Laws of conditioning: what the network is given, guidance that costs nothing when neutral, batches for training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import DiffusionInferer
from monai.networks.nets import ControlNet

from common.conditioning import Concat, ConditionPrepareBatch, ControlNetHint, CrossAttention, Guided
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
