"""Laws of Siamese-Diffusion: who learns from which term, when the augmentation runs, and that no pass is wasted."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer

from common.controlnet import DenseHintInput, HintControlNet
from common.execution import FastPath
from common.schedules import DDPM
from common.siamese import ControlInferer, NoiseConsistencyLoss, SiameseInferer, SiameseUNet, TrainingProgress
from common.training import TrainingState
from common.transforms import ToHintd
from common.unet import DiffusionUNet
from tools.literal_siamese import literal_step

SETTINGS = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 8}
SETTINGS |= {"norm_num_groups": 4, "with_conditioning": True, "cross_attention_dim": 6}
N = 300
SCHEDULER = DDPM(1000, "scaled_linear_exact", beta_start=0.00085, beta_end=0.012, clip_sample=False)
VELOCITY = DDPM(1000, "scaled_linear_exact", prediction_type="v_prediction")
VELOCITY_OF = ("inputs", "noise", "timesteps")
LATE = {"step": 200, "times": (37, 200, 201, 640)}
dims = pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])


def make(d: int = 2, seed: int = 0, zero_convs: bool = False, **kwargs) -> SiameseUNet:
    """A small network in float64, random everywhere: a fresh one has zeros that hide mistakes."""
    torch.manual_seed(seed)
    control = HintControlNet(d, 2, stem=DenseHintInput(d, 3, 8, num_merges=1, width=4), **SETTINGS)
    network = SiameseUNet(DiffusionUNet(d, 2, 2, **SETTINGS), control, **kwargs).double()
    for name, parameter in network.named_parameters():
        if not (zero_convs and ("controlnet_down_blocks" in name or "controlnet_mid_block" in name)):
            parameter.data = 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    return network


def batch(d: int = 2, times: tuple[int, ...] = LATE["times"]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    n, size = len(times), (4,) * d
    return {
        "inputs": torch.randn(n, 2, *size).double(),
        "noise": torch.randn(n, 2, *size).double(),
        "timesteps": torch.tensor(times),
        "hint_mask": torch.rand(n, 3, *(8,) * d).round().double(),
        "hint_image": torch.rand(n, 3, *(8,) * d).double(),
        "context": torch.randn(n, 5, 6).double(),
    }


def predict(
    network: torch.nn.Module, data: dict, step: int = LATE["step"], scheduler: DDPM = SCHEDULER
) -> dict[str, torch.Tensor]:
    inferer = SiameseInferer(scheduler)
    inferer.advance(step, N)
    return inferer(network=network, **data)


def moved(network: torch.nn.Module, value: torch.Tensor) -> set[str]:
    """Names of the parameters that a value's gradient reaches."""
    network.zero_grad(set_to_none=True)
    value.backward(retain_graph=True)
    return {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}


def parts_of(network: SiameseUNet) -> tuple[set[str], set[str], set[str]]:
    """Names of (ControlNet, decoder, frozen half)."""
    names = {name for name, _ in network.named_parameters()}
    control = {n for n in names if n.startswith("controlnet.")}
    decoder = {n for n in names if n.startswith(("unet.up_blocks.", "unet.out."))}
    return control, decoder, names - control - decoder


# ---------------------------------------------------------------------------------------------------------------------
# Who learns from which term


@pytest.mark.parametrize("term", ["mask", "image", "consistency", "augmented"])
def test_each_term_teaches_exactly_whom_it_should(term):
    network, data = make(), batch()
    control, decoder, _ = parts_of(network)
    hints = {k: data[k].requires_grad_() for k in ("hint_mask", "hint_image")}
    pred = predict(network, data)
    value = NoiseConsistencyLoss().terms(pred, data["noise"])[term].mean()
    assert moved(network, value) == (control if term == "image" else control | decoder)
    # The image branch learns by way of the image alone, sg[c_m]; the mask branch never sees the image.
    read = {k for k, hint in hints.items() if hint.grad is not None and hint.grad.any()}
    assert read == {"hint_image" if term == "image" else "hint_mask"}


def test_an_encoder_that_is_not_frozen_learns_from_the_mask_branch_alone():
    network, data = make(freeze_encoder=False), batch()
    control, decoder, encoder = parts_of(network)
    terms = NoiseConsistencyLoss().terms(predict(network, data), data["noise"])
    assert moved(network, terms["mask"].mean()) == control | decoder | encoder
    assert moved(network, terms["augmented"].mean()) == control | decoder | encoder
    assert moved(network, terms["image"].mean()) == control


def test_a_frozen_encoder_asks_for_no_gradient_and_keeps_no_graph():
    network, data = make(), batch()
    _, _, frozen = parts_of(network)
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == frozen
    h, skips, emb = network.encode(data["inputs"], data["timesteps"], data["context"].requires_grad_())
    assert not any(t.requires_grad for t in (h, emb, *skips))


@dims
@pytest.mark.parametrize("step", [0, N // 3, N // 3 + 1, N])
@pytest.mark.parametrize("scheduler", [SCHEDULER, VELOCITY], ids=["noise", "velocity"])
def test_the_loss_and_its_gradients_are_those_of_the_literal_step(d, step, scheduler):
    network, data = make(d), batch(d)
    target = data["noise"] if scheduler is SCHEDULER else scheduler.get_velocity(*(data[k] for k in VELOCITY_OF))
    found = NoiseConsistencyLoss()(predict(network, data, step, scheduler), target)
    found.backward()
    ours = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    loss = literal_step(network, scheduler, **data, step=step, steps=N)
    loss.backward()
    torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=1e-6)
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (ours[name] is None)
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# When


def test_both_branches_agree_at_the_start_and_while_the_zero_convolutions_are_zero():
    data = batch()
    for network, step in ((make(), 0), (make(zero_convs=True), 0), (make(zero_convs=True), N)):
        pred = predict(network, data, step)
        assert torch.equal(pred["mask"], pred["image"])
        assert not NoiseConsistencyLoss().terms(pred, data["noise"])["consistency"].any()
    assert NoiseConsistencyLoss().terms(predict(make(), data), data["noise"])["consistency"].all()


def test_the_images_weight_is_the_share_of_the_training_done():
    network, data, weights = make(), batch(), []
    network.forward = lambda *args, weight, **kwargs: weights.append(weight) or {}
    for step in (0, 1, 150, N):
        predict(network, data, step)
    assert weights == [0, 1 / N, 0.5, 1]


def test_augmentation_begins_one_step_after_a_third_and_reaches_time_200():
    network, data = make(), batch()
    for step, expected in ((0, [0, 0, 0, 0]), (N // 3, [0, 0, 0, 0]), (N // 3 + 1, [1, 1, 0, 0]), (N, [1, 1, 0, 0])):
        pred = predict(network, data, step)
        terms = NoiseConsistencyLoss().terms(pred, data["noise"])
        assert (terms["augmented"] > 0).int().tolist() == expected
        same = (pred["augmented"] == data["noise"]).flatten(1).all(1)
        assert same.int().tolist() == [1 - e for e in expected]
    assert SiameseInferer(SCHEDULER, augment_from=1.0).augment_from * N == N, "never begins: no step is beyond N"


def test_a_third_is_exact_whatever_the_number_of_steps():
    inferer, asked = SiameseInferer(SCHEDULER), []
    data = batch()
    for third in range(1, 2000, 7):
        for step in (third, third + 1):
            inferer.advance(step, 3 * third)
            inferer(network=lambda *args, chosen, **kwargs: asked.append(chosen is not None), **data)
    assert asked == [False, True] * (len(asked) // 2)


def test_the_augmented_input_is_the_images_clean_estimate_noised_again():
    network, data, seen = make(), batch(), []
    encode = network.encode
    network.encode = lambda x, *args: seen.append(x) or encode(x, *args)
    pred = predict(network, data)
    z_t, augmented = seen
    for row, b in enumerate([0, 1]):
        t = data["timesteps"][b : b + 1]
        alpha, sigma = SCHEDULER.levels(t, z_t[b : b + 1])
        z_0 = (z_t[b : b + 1] - sigma * pred["image"][b : b + 1]) / alpha
        expected = SCHEDULER.add_noise(z_0, data["noise"][b : b + 1], t)
        torch.testing.assert_close(augmented[row : row + 1], expected)
    assert not augmented.requires_grad


def test_a_batch_is_its_cases_one_by_one():
    network, data = make(), batch()
    together = predict(network, data)
    for b in range(4):
        alone = predict(network, {k: v[b : b + 1] for k, v in data.items()})
        for name, value in alone.items():
            torch.testing.assert_close(together[name][b : b + 1], value)


# ---------------------------------------------------------------------------------------------------------------------
# At which cost


class Passes:
    """Counts calls, and samples in them, of encoder, decoder, ControlNet and hint stem."""

    def __init__(self, network: SiameseUNet) -> None:
        self.calls: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()
        modules = {"encoder": network.unet.conv_in, "decoder": network.unet.out, "control": network.controlnet.conv_in}
        modules["stem"] = network.controlnet.controlnet_cond_embedding
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda _, inputs, name=name: self.count(name, len(inputs[0])))

    def count(self, name: str, samples: int) -> None:
        self.calls[name] += 1
        self.samples[name] += samples


def test_a_step_makes_the_passes_of_the_table_and_no_more():
    data = batch()
    early, late, last, plain = ({} for _ in range(4))
    for found, step, times in ((early, N // 3, LATE["times"]), (late, N, LATE["times"]), (last, N, (999,) * 4)):
        network = make()
        passes = Passes(network)
        predict(network, {**data, "timesteps": torch.tensor(times)}, step)
        found.update(passes.samples)
        assert passes.calls["stem"] == 1
        assert passes.calls["control"] == (2 if found is late else 1)
    assert early == {"encoder": 4, "decoder": 8, "control": 8, "stem": 8}
    assert late == {"encoder": 4 + 2, "decoder": 8 + 2, "control": 8 + 2, "stem": 8}, "two of four samples are due"
    assert last == early, "no sample is due: nothing is spent"
    network = make()
    passes = Passes(network)
    ControlInferer(SCHEDULER)(network=network, **data)
    plain.update(passes.samples)
    assert plain == {"encoder": 4, "decoder": 4, "control": 4, "stem": 4}
    network = make()
    passes = Passes(network)
    literal_step(network, SCHEDULER, **data, step=N, steps=N)
    assert passes.samples == {"encoder": 12, "decoder": 12, "control": 16, "stem": 16}, "what the published code spends"


def test_nothing_is_copied_and_nothing_is_left_behind(monkeypatch):
    network, data = make(), batch()
    before = {name: (p.data_ptr(), p.requires_grad, p.clone()) for name, p in network.named_parameters()}
    keys = list(network.state_dict())
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("a deep copy was made"))
    NoiseConsistencyLoss()(predict(network, data), data["noise"]).backward()
    assert list(network.state_dict()) == keys
    for name, parameter in network.named_parameters():
        pointer, requires_grad, values = before[name]
        assert (parameter.data_ptr(), parameter.requires_grad) == (pointer, requires_grad)
        assert torch.equal(parameter, values)


# ---------------------------------------------------------------------------------------------------------------------
# The baseline and the loss


def test_the_baseline_is_the_mask_branch_and_never_sees_the_image():
    network, data = make(), batch()
    pred = predict(network, data)["mask"]
    assert torch.equal(ControlInferer(SCHEDULER)(network=network, **data), pred)
    data["hint_image"] = None
    assert torch.equal(ControlInferer(SCHEDULER)(network=network, **data), pred)


def test_the_loss_is_the_sum_of_its_terms_and_weighs_the_consistency():
    noise, pred = torch.randn(3, 2, 4, 4), {k: torch.randn(3, 2, 4, 4) for k in ("mask", "image", "augmented")}
    for weight in (0.0, 1.0, 1.5):
        loss = NoiseConsistencyLoss(weight)
        total = loss(pred, noise)
        torch.testing.assert_close(total, sum(loss.latest.values()))
        expected = weight * torch.nn.functional.mse_loss(pred["mask"], pred["image"])
        torch.testing.assert_close(loss.latest["consistency"], expected)
    assert list(loss.latest) == ["mask", "image", "consistency", "augmented"]


# ---------------------------------------------------------------------------------------------------------------------
# In the engine


def prepare(batchdata, device, non_blocking, **_):
    data = batch()
    return data.pop("inputs"), data["noise"], (), data


def trainer(network: SiameseUNet, epochs: int, *handlers) -> SupervisedTrainer:
    loss, inferer = NoiseConsistencyLoss(), SiameseInferer(SCHEDULER)
    made = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=[{"image": torch.zeros(4, 1)}] * 3,
        network=network,
        optimizer=torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-3),
        loss_function=loss,
        inferer=inferer,
        prepare_batch=prepare,
        train_handlers=[TrainingProgress(inferer), *handlers],
    )
    made.seen, made.loss = [], loss
    made.add_event_handler(Events.ITERATION_COMPLETED, lambda _: made.seen.append(inferer.progress))
    return made


def test_it_trains_in_monais_engine_and_moves_what_it_should():
    network = make()
    before = {name: p.clone() for name, p in network.named_parameters()}
    engine = trainer(network, 2)
    engine.run()
    control, decoder, _ = parts_of(network)
    assert {name for name, p in network.named_parameters() if not torch.equal(p, before[name])} == control | decoder
    assert engine.seen == [(k, 6) for k in range(6)]
    assert all(value.isfinite() for value in engine.loss.latest.values())
    assert engine.loss.latest["augmented"] > 0


def test_progress_goes_on_after_a_resume(tmp_path: Path):
    def state(network: SiameseUNet) -> TrainingState:
        return TrainingState(tmp_path, {"network": network}, network)

    def stop(engine: Engine) -> None:
        engine.terminate()

    network = make()
    engine = trainer(network, 3, state(network))
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=1), stop)
    engine.run()
    network = make()
    resumed = trainer(network, 3, state(network))
    resumed.run()
    assert engine.seen + resumed.seen == [(k, 9) for k in range(9)]


def test_a_training_without_length_is_refused_before_it_begins():
    inferer = SiameseInferer(SCHEDULER)
    for steps in (0, -3):
        with pytest.raises(ValueError, match="expected more than 0"):
            inferer.advance(0, steps)
    with pytest.raises(ValueError, match="must lie in"):
        inferer.advance(5, 4)
    with pytest.raises(ValueError, match="TrainingProgress"):
        inferer(network=make(), **batch())
    engine = Engine(lambda *_: pytest.fail("a step was made"))
    TrainingProgress(inferer).attach(engine)
    with pytest.raises(ValueError, match="expected more than 0"):
        engine.run(iter([1, 2]), max_epochs=1)


def test_other_mistakes_teach_at_the_door():
    for kind in (ControlInferer, SiameseInferer):
        with pytest.raises(ValueError, match="epsilon"):
            kind(DDPM(10, prediction_type="sample"))
    data = batch()
    with pytest.raises(ValueError, match="SiameseInferer"):
        make()(data["inputs"], hint_image=data["hint_image"])


def test_the_fast_path_teaches_the_same_parameters():
    """Autocast caches weights cast without gradient; the halves without it must not spoil those with it."""
    network, data = make().float(), {k: v.float() if v.is_floating_point() else v for k, v in batch().items()}
    inferer, loss, found = SiameseInferer(SCHEDULER), NoiseConsistencyLoss(), {}
    inferer.advance(LATE["step"], N)
    for precision in ("float32", "bf16"):
        network.zero_grad(set_to_none=True)
        value = loss(FastPath(inferer, precision)(network=network, **data), data["noise"])
        assert value.dtype == torch.float32
        value.backward()
        found[precision] = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert set(found["float32"]) == set(found["bf16"])
    exact, fast = (torch.cat([g.flatten() for g in grads.values()]) for grads in found.values())
    assert torch.nn.functional.cosine_similarity(exact, fast, dim=0) > 0.99


@pytest.mark.parametrize("step", [0, LATE["step"]])
def test_it_runs_under_distributed_data_parallel(step, tmp_path: Path):
    """The step is one forward, so that the gradients are reduced; no parameter is unused, not even at w_i = 0."""
    network, data = make(), batch()
    NoiseConsistencyLoss()(predict(network, data, step), data["noise"]).backward()
    expected = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(network)
        for _ in range(2):  # a second forward complains of parameters unused in the first
            network.zero_grad(set_to_none=True)
            NoiseConsistencyLoss()(predict(wrapped, data, step), data["noise"]).backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name])


# ---------------------------------------------------------------------------------------------------------------------
# The mask as a hint


def test_a_hint_is_the_nearest_pixel_of_the_masks_luma():
    colours = torch.zeros(3, 4, 2)
    colours[0, 0], colours[1, 1], colours[2, 2] = 255, 255, 255
    colours[:, 3] = torch.tensor([[127.0, 128.0]] * 3)
    hint = ToHintd("mask", (2, 4))({"mask": MetaTensor(colours)})["mask"]
    assert hint.tolist() == [[[0, 1, 0, 0], [0, 1, 0, 1]]], "red and blue are dark, green is light, grey is at 127"
    large = ToHintd("mask", (4, 8))({"mask": MetaTensor(colours)})["mask"]
    assert torch.equal(large, hint.repeat_interleave(2, 1).repeat_interleave(2, 2))
