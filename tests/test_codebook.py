"""Laws of the autoencoder with a codebook, of its losses, and of the discriminators that join them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import blobs, normal
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.checkpoints import read_knobs, translate
from common.codebook import (
    VQ,
    AdversarialCodebookLoss,
    CodebookAutoencoder,
    CodebookLoss,
    CodebookRevival,
    CodeSpace,
    axial_slices,
    codebook_usage,
    edge_error,
    hinge,
    tell_scale,
)
from common.execution import FastPath
from common.training import EpochSeed, TrainingState

SMALL: dict[str, Any] = {
    "channels": (8, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1), "norm_num_groups": 4, "num_codes": 32,
}  # fmt: skip
dims = pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])


def make(d: int = 2, **settings) -> CodebookAutoencoder:
    torch.manual_seed(0)
    network = CodebookAutoencoder(d, **{**SMALL, **settings})
    # Codes as far apart as latents are: as drawn, near zero, a few of them would win everywhere.
    nn.init.normal_(network.codebook.weight, std=0.3)
    return network


def images(n: int = 2, d: int = 2, size: int = 16) -> torch.Tensor:
    return 0.5 + 0.5 * blobs(n, size, d)


# ---------------------------------------------------------------------------------------------------------------------
# The network


@dims
def test_shapes(d):
    network, image = make(d), images(2, d)
    latent = network.encode(image)
    assert latent.shape == (2, 4, *(8,) * d)
    codes, indices, loss = network.quantise(latent)
    assert (codes.shape, indices.shape, loss.shape) == (latent.shape, (2, *(8,) * d), ())
    assert network.decode(latent).shape == network.reconstruct(image).shape == image.shape
    assert [x.shape for x in network(image)] == [image.shape, (), indices.shape]


def test_the_defaults_are_the_published_size():
    with torch.device("meta"):
        network = CodebookAutoencoder()
        latent = network.encode(torch.empty(1, 1, 128, 128, 128))
    assert sum(p.numel() for p in network.parameters()) == 7_009_709
    assert latent.shape == (1, 4, 64, 64, 64)


def test_codes_are_drawn_as_published():
    codes = CodebookAutoencoder(2, **SMALL).codebook.weight
    assert codes.abs().max() <= 1 / 32
    assert codes.abs().max() > 0.9 / 32


@pytest.mark.parametrize(("channels", "blocks"), [((8,), (1,)), ((8, 16, 8), (1, 2, 1))])
def test_every_level_but_the_last_halves(channels, blocks):
    network = make(channels=channels, encoder_blocks=blocks, decoder_blocks=blocks)
    assert network.factor == 2 ** (len(channels) - 1)
    assert network.encode(images()).shape[2:] == (16 // network.factor,) * 2
    assert network.reconstruct(images()).shape == (2, 1, 16, 16)


def test_both_sides_end_in_norm_activation_convolution():
    for side in (make().encoder, make().decoder):
        assert [type(m) for m in list(side.blocks)[-3:-1]] == [nn.GroupNorm, nn.SiLU]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"sides \(16, 15\), expected multiples of 2: crop or pad"):
        make().encode(torch.rand(1, 1, 16, 15))
    with pytest.raises(ValueError, match=r"encoder_blocks \(1,\).* an entry for each level"):
        make(encoder_blocks=(1,))


@dims
def test_every_parameter_learns(d):
    network, image = make(d), images(2, d)
    CodebookLoss(32)(network(image), image).backward()
    assert [n for n, p in network.named_parameters() if not p.grad.any()] == []


# ---------------------------------------------------------------------------------------------------------------------
# The codebook


@dims
def test_the_nearest_code_is_found_whatever_the_chunk(d):
    network = make(d)
    latent = 0.5 * normal(2, 4, *(6,) * d)
    table = torch.cdist(latent.movedim(1, -1).double(), network.codebook.weight.double()[None])
    for chunk in (1, 7, 10_000):
        assert torch.equal(network.nearest(latent, chunk), table.argmin(-1))


class Largest(TorchDispatchMode):
    """Notes how many entries the largest tensor has that is made within."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.entries = max(self.entries, out.numel())
        return out


def test_no_table_of_all_places_by_all_codes_is_made():
    """The reference makes two, distances and one-hot codes (its pitfall 19).

    Measured with 2048 codes, there and back: for latents of 32^3 peak memory grows by 32 MB instead of 769 (24 times
    less) in 0.24 s instead of 1.9 s; for 64^3 by 33 MB.
    """
    network, latent = make(3, num_codes=512), normal(1, 4, 16, 32, 32).requires_grad_()
    with Largest() as seen:
        codes, _, loss = network.quantise(latent)
        (codes.sum() + loss).backward()
    assert seen.entries == 4096 * 512 < 16 * 32 * 32 * 512 / 3


@dims
def test_codes_stay_as_they_are(d):
    network = make(d)
    codes, indices, _ = network.quantise(normal(2, 4, *(5,) * d))
    assert torch.equal(codes, network.codebook.weight[indices].movedim(-1, 1))
    again = network.quantise(codes)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], indices)
    assert again[2] == 0


def test_the_gradient_goes_straight_through():
    network, latent = make(), normal(2, 4, 5, 5).requires_grad_()
    codes, _, _ = network.quantise(latent)
    weight = normal(*codes.shape, seed=1)
    (weight * codes).sum().backward()
    assert torch.equal(latent.grad, weight)
    assert network.codebook.weight.grad is None, "codes learn by the codebook loss alone"


def test_the_quarter_is_on_the_codes():
    """As published; elsewhere it is on the latents."""
    network, latent = make(), normal(2, 4, 5, 5).requires_grad_()
    _, indices, loss = network.quantise(latent)
    loss.backward()
    away = (latent.detach() - network.codebook.weight.detach()[indices].movedim(-1, 1)) / latent.numel()
    assert loss.item() == pytest.approx(1.25 * latent.numel() * away.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(latent.grad, 2 * away)
    pull = torch.zeros(32, 4).index_add(0, indices.flatten(), -0.5 * away.movedim(1, -1).flatten(0, -2))
    torch.testing.assert_close(network.codebook.weight.grad, pull)


def test_the_decoder_quantises_what_it_is_given():
    network, latent = make().eval(), 0.3 * normal(2, 4, 8, 8)
    codes = network.quantise(latent)[0]
    with torch.no_grad():
        assert torch.equal(network.decode(latent), network.decode(codes, quantised=False))
        assert not torch.equal(network.decode(latent), network.decode(latent, quantised=False))
        image = images()
        assert torch.equal(network.reconstruct(image), network(image)[0])


def test_codes_are_chosen_in_full_precision():
    network, image = make(), images()
    latent = 0.3 * normal(2, 4, 32, 32)
    plain = network.quantise(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network.quantise(latent)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed))
    pred = FastPath(lambda inputs, network: network(inputs), "bf16")(image, network)
    assert pred[1].dtype == torch.float32
    assert CodebookLoss(32)(pred, image).dtype == torch.float32


def test_usage_counts_codes_and_how_evenly_they_are_used():
    everything = torch.arange(12).reshape(1, 3, 4)
    assert [x.item() for x in codebook_usage(everything, 12)] == pytest.approx([1, 12])
    assert [x.item() for x in codebook_usage(everything % 3, 12)] == pytest.approx([0.25, 3])
    assert [x.item() for x in codebook_usage(torch.zeros(2, 5, 5, dtype=torch.long), 12)] == pytest.approx([1 / 12, 1])
    skewed = torch.tensor([0, 0, 0, 1])
    assert 1 < codebook_usage(skewed, 12)[1] < 2


def test_latents_are_scaled_on_the_way_in_and_out(caplog):
    network, image = make(), images()
    with torch.no_grad():
        plain, decoded = network.encode(image), network.reconstruct(image)
    space = CodeSpace(network, 0.5)
    torch.testing.assert_close(space.encode(image), 0.5 * plain)
    torch.testing.assert_close(space.decode(space.encode(image)), decoded)
    assert not any(p.requires_grad for p in network.parameters())
    with caplog.at_level(logging.INFO):
        scale = tell_scale(network, images())
    assert (scale * plain).std().item() == pytest.approx(1, abs=1e-4)
    assert f"--latent_scale {scale:.3f}" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# The authors' names


@pytest.mark.parametrize(("halves", "blocks"), [((0,), 1), ((1,), 2), ((0, 1), 1)])
def test_the_authors_levels_become_ours(halves, blocks):
    """Three levels of theirs, those that do not halve joined to the next: every key finds its place, and no other."""
    norm, conv = ("weight", "bias"), ("weight", "bias")
    source: dict[str, torch.Tensor] = {"quantize.embedding.weight": torch.rand(32, 4)}

    def add(name: str, inputs: int = 8, outputs: int = 8, size: int = 3) -> None:
        source[f"{name}.weight"] = torch.rand(outputs, inputs, size, size)
        source[f"{name}.bias"] = torch.rand(outputs)

    def block(name: str) -> None:
        for n in (1, 2):
            source.update({f"{name}.norm{n}.{k}": torch.rand(8) for k in norm})
            add(f"{name}.conv{n}")

    for level in range(3):
        for n in range(blocks):
            block(f"encoder.down.{level}.block.{n}")
        for n in range(blocks + 1):
            block(f"decoder.up.{level}.block.{n}")
        if level in halves:
            add(f"encoder.down.{level}.downsample.conv")
            add(f"decoder.up.{level + 1}.upsample.conv")
    for side in ("encoder", "decoder"):
        block(f"{side}.mid.block_1")
        block(f"{side}.mid.block_2")
        source.update({f"{side}.norm_out.{k}": torch.rand(8) for k in conv})
    add("encoder.conv_in", 1)
    add("encoder.conv_out", 8, 4)
    add("decoder.conv_in", 4)
    add("decoder.conv_out", 8, 1)
    add("quant_conv", 4, 4, 1)
    add("post_quant_conv", 4, 4, 1)
    source["loss.discriminator.weight"] = torch.rand(1)
    knobs = read_knobs(source, {**VQ, "constants": {**VQ["constants"], "norm_num_groups": 4}})
    network = CodebookAutoencoder(2, **knobs)
    assert network.factor == 2 ** len(halves)
    network.load_state_dict(translate(source, VQ, network.state_dict()))
    ends = [len(network.encoder.blocks), len(network.decoder.blocks)]
    assert ends == [6 + 3 * blocks + len(halves), 6 + 3 * (blocks + 1) + len(halves)]
    assert torch.equal(network.last_weight, source["decoder.conv_out.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_loss_is_the_absolute_error_and_the_codebooks(weight):
    network, image = make(), images()
    pred = network(image)
    loss = CodebookLoss(32, weight)
    torch.testing.assert_close(loss(pred, image), (pred[0] - image).abs().mean() + weight * pred[1])
    assert set(loss.latest) == {"l1", "codebook", "perplexity", "codes_used"}
    assert not any(x.requires_grad for x in loss.latest.values())
    assert loss.latest["perplexity"] == codebook_usage(pred[2], 32)[1]


@dims
def test_edges_cost_and_even_shifts_do_not(d):
    image = images(2, d, 32)
    assert edge_error(torch.full_like(image, 0.3)) == 0
    error = 0.1 * normal(*image.shape)
    torch.testing.assert_close(edge_error(2 * error), 2 * edge_error(error))
    steps = [error.diff(dim=axis).abs().mean() for axis in range(2, 2 + d)]
    torch.testing.assert_close(edge_error(error, scales=1), torch.stack(steps).mean())
    smooth = blobs(2, 32, d, seed=1)
    smooth = smooth * error.abs().mean() / smooth.abs().mean()
    assert edge_error(error) > 1.5 * edge_error(smooth), "at the same absolute error"
    pred = make(d)(image)
    extra = CodebookLoss(32, edge_weight=0.5)(pred, image) - CodebookLoss(32)(pred, image)
    torch.testing.assert_close(extra, 0.5 * edge_error(pred[0] - image))


@dims
def test_the_perceptual_loss_sees_the_same_axial_slice_of_both(d):
    image = torch.arange(8.0).view(1, 1, 8, *(1,) * (d - 1)).expand(3, 1, *(8,) * d)
    seen = []

    def perceptual(a, b):
        seen.append((a, b))
        return (a - b).square()

    network = make(d)
    loss = CodebookLoss(32, perceptual=perceptual)
    pred = network(image)
    plain = CodebookLoss(32)(pred, image)
    torch.testing.assert_close(loss(pred, image), plain + loss.latest["perceptual"])
    a, b = seen[0]
    assert a.shape == b.shape == (3, 1, 8, 8)
    for n in range(3):
        place = int(b[n].mean()) if d == 3 else slice(None)
        assert torch.equal(b[n, 0], image[n, 0, place])
        assert torch.equal(a[n, 0], pred[0][n, 0, place])


def test_slices_are_drawn_anew_for_every_case():
    volume = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(64, 1, 16, 4, 4)
    torch.manual_seed(0)
    (found,) = axial_slices(volume)
    assert len(found.unique()) > 8


# ---------------------------------------------------------------------------------------------------------------------
# The discriminators


def adversarial(network: CodebookAutoencoder, **settings) -> AdversarialCodebookLoss:
    torch.manual_seed(1)
    return AdversarialCodebookLoss(network, CodebookLoss(32), **{"start": 0, "channels": 4, **settings})


def weights(loss: AdversarialCodebookLoss) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in loss.discriminators.parameters()])


@dims
def test_nothing_is_asked_of_the_discriminators_before_the_start(d):
    network, image = make(d), images(2, d)
    loss = adversarial(network, start=2)
    before, draws = weights(loss), torch.get_rng_state()
    for _ in range(2):
        pred = network(image)
        assert torch.equal(loss(pred, image), CodebookLoss(32)(pred, image))
        assert set(loss.latest) == {"l1", "codebook", "perplexity", "codes_used"}
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.equal(weights(loss), before)
    pred = network(image)
    assert loss(pred, image) != CodebookLoss(32)(pred, image)
    assert not torch.equal(weights(loss), before)
    assert {"gan", "gan_weight", "discriminators"} <= set(loss.latest)


def test_nothing_is_learned_in_validation():
    network, image = make(), images()
    loss = adversarial(network)
    before = weights(loss)
    with torch.no_grad():
        pred = network(image)
        assert torch.equal(loss(pred, image), CodebookLoss(32)(pred, image))
    assert (loss.step, torch.equal(weights(loss), before)) == (0, True)


@dims
def test_volumes_are_judged_as_volumes_and_as_slices(d):
    loss = adversarial(make(d))
    assert [x.initial_conv.conv.weight.ndim - 2 for x in loss.discriminators] == ([2] if d == 2 else [2, 3])


@pytest.mark.parametrize("weight", [0.5, 2.0])
@dims
def test_both_terms_pull_equally_at_the_last_convolution(d, weight, monkeypatch):
    """Adaptive weight = weight |d nll| / (|d gan| + 1e-4), at most 1e4 times; gan = -(mean D2d + mean D3d) / 2."""
    network, image = make(d), images(1, d)
    loss = adversarial(network, weight=weight)
    monkeypatch.setattr(loss, "learn", lambda pairs: torch.tensor(0.0))
    torch.manual_seed(5)
    pred = network(image)
    total = loss(pred, image)

    torch.manual_seed(5)
    pred = network(image)
    fakes = [axial_slices(image, pred[0])[1], pred[0]][-len(loss.discriminators) :]
    near, last = (pred[0] - image).abs().mean(), network.decoder.blocks[-1].conv.weight
    gan = -sum(critic(fake)[-1].mean() for critic, fake in zip(loss.discriminators, fakes)) / len(fakes)
    pulls = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (near, gan)]
    ratio = weight * (pulls[0] / (pulls[1] + 1e-4)).clamp(0, 1e4)
    torch.testing.assert_close(loss.latest["gan_weight"], ratio)
    torch.testing.assert_close(total, near + pred[1] + ratio * gan)
    assert not loss.latest["gan_weight"].requires_grad


def test_the_adaptive_weight_is_bounded():
    network = make()
    last = network.last_weight
    loss = adversarial(network, weight=0.5)
    assert loss.balance(1e6 * last.sum(), 0 * last.sum()) == 0.5 * 1e4
    assert loss.balance(0 * last.sum(), last.sum()) == 0


def test_the_hinge():
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge(real, fake).item() == pytest.approx(0.5 * (0 + 1 + 2) / 3 + 0.5 * (0 + 1 + 2) / 3)
    assert hinge(real + 5, fake - 5) == 0


def test_the_discriminators_learn_to_tell_and_the_generator_to_deceive():
    network, image = make(3), images(4, 3)
    loss = adversarial(network, lr=2e-3)
    sharp = image + 0.2 * normal(*image.shape)
    fake = image.clone().requires_grad_()
    costs = [loss.learn([axial_slices(sharp, fake), [sharp, fake]]).item() for _ in range(25)]
    assert costs[-1] < 0.3 * costs[0]
    assert fake.grad is None
    # A step against the generator's gradient makes them believe more.
    slices, volumes = loss.discriminators

    def belief(x: torch.Tensor) -> torch.Tensor:
        return (slices(x[:, :, 8])[-1].mean() + volumes(x)[-1].mean()) / 2

    (step,) = torch.autograd.grad(-belief(fake), fake)
    assert belief(fake - 0.1 * step / step.norm()) > belief(fake)


def test_the_generators_term_leaves_no_gradient_in_the_discriminators():
    network, image = make(), images()
    loss = adversarial(network)
    total = loss(network(image), image)
    before = [p.grad.clone() for p in loss.discriminators.parameters()]
    total.backward()
    assert all(torch.equal(p.grad, b) for p, b in zip(loss.discriminators.parameters(), before))
    assert network.last_weight.grad.any()


def test_several_processes_teach_the_same_discriminators(monkeypatch):
    """Two equal ranks do as one alone; here the other's share of a sum is our own once more."""
    alone, together = (adversarial(make()) for _ in range(2))
    pair = [[images(), images().flip(-1)]]
    alone.learn(pair)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    together.learn(pair)
    torch.testing.assert_close(weights(together), weights(alone))


def test_it_runs_under_distributed_data_parallel(tmp_path):
    gradients = []
    for wrapped in (False, True):
        network, image = make(), images()
        loss = adversarial(network)
        if wrapped:
            dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        try:
            called = nn.parallel.DistributedDataParallel(network) if wrapped else network
            assert AdversarialCodebookLoss(called, CodebookLoss(32), channels=4).network is network
            loss(called(image), image).backward()
        finally:
            if wrapped:
                dist.destroy_process_group()
        gradients.append(
            torch.cat([p.grad.flatten() for p in [*network.parameters(), *loss.discriminators.parameters()]])
        )
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def trainer(
    folder: Path,
    epochs: int,
    stop: int | None = None,
    revive: int = 4,
    start: int = 4,
    codes: int = 32,
    interval: int = 1,
) -> Any:
    """A training as the bundle configures it; `stop` kills it after that epoch."""
    torch.manual_seed(0)
    network = CodebookAutoencoder(2, **{**SMALL, "num_codes": codes})
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    loss = AdversarialCodebookLoss(network, CodebookLoss(codes), start=start, channels=4)
    revival = CodebookRevival(network, revive)
    data = Dataset([{"image": image, "label": image} for image in images(8)])
    objects = {"network": network, "optimizer": optimizer, "loss": loss, "revival": revival}
    state = TrainingState(folder, objects, network, interval)
    engine = SupervisedTrainer(
        "cpu", epochs, DataLoader(data, batch_size=4, shuffle=True), network, optimizer, loss,
        train_handlers=[EpochSeed(0), state, revival],
    )  # fmt: skip
    engine.logger.setLevel(logging.ERROR)

    def halt(engine: Any) -> None:
        if engine.state.epoch == stop:
            engine.terminate()

    engine.add_event_handler(Events.EPOCH_COMPLETED, halt)
    engine.run()
    return SimpleNamespace(network=network, loss=loss, revival=revival)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not(tmp_path):
    whole = trainer(tmp_path / "whole", 5)
    trainer(tmp_path / "killed", 5, stop=3)
    resumed = trainer(tmp_path / "killed", 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), resumed.network.parameters()))
    assert torch.equal(weights(whole.loss), weights(resumed.loss))
    assert whole.loss.step == resumed.loss.step == 10
    assert torch.equal(whole.revival.used, resumed.revival.used)


def used(network: CodebookAutoencoder) -> float:
    with torch.no_grad():
        return codebook_usage(network.nearest(network.encode(images(8))), network.num_codes)[0].item()


def test_dead_codes_are_revived(tmp_path):
    """A short training on a toy set: 20 % of 128 codes used without, 91 % with; perplexity 9 and 81, L1 .11 and .08."""
    plain, revived = (trainer(tmp_path / str(n), 20, revive=n, start=1000, codes=128, interval=20) for n in (0, 5))
    assert used(plain.network) < 0.4
    assert used(revived.network) > 0.8
    assert revived.loss.latest["l1"] < plain.loss.latest["l1"]


def batch_of(network: CodebookAutoencoder, iteration: int) -> SimpleNamespace:
    image = images()
    return SimpleNamespace(
        state=SimpleNamespace(iteration=iteration, output={"image": image, "pred": network(image), "label": image})
    )


def test_only_codes_that_nobody_chose_become_latents_of_the_batch():
    network = make()
    revival = CodebookRevival(network, 3)
    before = network.codebook.weight.detach().clone()
    calls: list[Callable] = []
    revival.attach(SimpleNamespace(add_event_handler=lambda event, handler: calls.append(handler)))  # type: ignore
    assert calls == [revival]
    for iteration in (2, 3):
        revival(batch_of(network, iteration))
        assert torch.equal(network.codebook.weight, before)
    revival.used[:5] = True
    chosen = revival.used.clone()
    revival(batch_of(network, 4))
    after = network.codebook.weight.detach()
    assert torch.equal(after[chosen], before[chosen])
    latents = network.encode(images()).detach().movedim(1, -1).flatten(0, -2)
    near = (after[~chosen, None] - latents).abs().amax(2).amin(1)
    assert near.max() < 1e-6
    assert not revival.used.any()


def test_revival_is_off_unless_it_is_asked_for():
    CodebookRevival(make()).attach(None)  # type: ignore[arg-type]


def test_few_latents_revive_few_codes():
    network = make()
    before = network.codebook.weight.detach().clone()
    CodebookRevival(network, 1).replace(torch.full((3, 4), 9.0))
    assert (network.codebook.weight != before).any(1).sum() == 3


def test_all_processes_revive_alike(monkeypatch):
    """A code is unused if no rank used it, and all take what the first one drew."""
    network = make()
    revival = CodebookRevival(network, 1)
    revival.used[0] = True
    other = torch.zeros(32, dtype=torch.int)
    other[1:30] = 2
    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(other))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: sent.append((tensor, source)))
    before = network.codebook.weight.detach().clone()
    with torch.no_grad():
        revival.replace(torch.full((9, 4), 9.0))
    assert (network.codebook.weight != before).any(1).nonzero().flatten().tolist() == [30, 31]
    assert [(t is network.codebook.weight, s) for t, s in sent] == [(True, 0)]
