"""Laws of the autoencoder and of the scaled latent space."""

from __future__ import annotations

import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import nn
from torch.distributions import Normal, kl_divergence

from common.autoencoder import AutoencoderLoss, LatentMomentsd, LatentSpace, LDMAutoencoder, unit_scale
from common.conditioning import Concat
from common.sampler import DiffusionSampler
from common.schedules import DDIM, CaseNoise

SETTINGS = {"channels": (8, 8, 16), "num_res_blocks": 1, "norm_num_groups": 4, "latent_channels": 2}
dims = pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])


def make(d: int = 2, **settings) -> LDMAutoencoder:
    torch.manual_seed(0)
    return LDMAutoencoder(d, 3, 3, **{**SETTINGS, **settings}).eval()


@dims
def test_shapes_and_moments(d):
    network, image = make(d), torch.rand(2, 3, *(8,) * d)
    mean, deviation = network.encode(image)
    assert mean.shape == deviation.shape == (2, 2, *(2,) * d)
    assert (deviation > 0).all()
    assert network.decode(mean).shape == image.shape
    assert network(image)[0].shape == image.shape


def test_it_has_stable_diffusions_size():
    with torch.device("meta"):
        network = LDMAutoencoder(2)
    assert sum(p.numel() for p in network.parameters()) == 83_653_863


@pytest.mark.parametrize("attention", [None, (False, True, True)])
@pytest.mark.parametrize("blocks", [1, (1, 2, 2)])
def test_the_decoder_has_one_block_more_on_every_level(attention, blocks):
    network = make(num_res_blocks=blocks, attention_levels=attention)
    counts = [sum(isinstance(m, AEKLResBlock) for m in side.blocks) for side in (network.encoder, network.decoder)]
    assert counts[1] - counts[0] == 3
    attentions = [
        sum(isinstance(m, SpatialAttentionBlock) for m in side.blocks) for side in (network.encoder, network.decoder)
    ]
    assert attentions[0] >= 1
    assert (attentions == [1, 1]) == (attention is None)
    assert network(torch.rand(1, 3, 8, 8))[0].shape == (1, 3, 8, 8)


def test_both_sides_end_in_norm_activation_convolution():
    network = make()
    for side in (network.encoder, network.decoder):
        kinds = [type(m) for m in list(side.blocks)[-3:-1]]
        assert kinds == [nn.GroupNorm, nn.SiLU]


def test_mean_and_variance_read_all_of_the_encoders_channels():
    network = make()
    assert network.quant_conv_mu.conv.weight.shape == network.quant_conv_log_sigma.conv.weight.shape == (2, 4, 1, 1)
    network.quant_conv_log_sigma.conv.bias.data.fill_(1000.0)
    assert network.encode(torch.rand(1, 3, 8, 8))[1].max().item() == pytest.approx(torch.e**10, rel=1e-5)


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match=r"sides \(8, 6\), expected multiples of 4"):
        make().encode(torch.rand(1, 3, 8, 6))


def test_every_parameter_learns():
    network = make()
    reconstruction, mean, deviation = network(torch.rand(2, 3, 8, 8))
    (reconstruction.square().mean() + mean.square().mean() + deviation.mean()).backward()
    still = [n for n, p in network.named_parameters() if not n.endswith("to_k.bias") and not p.grad.any()]
    assert still == []


# ---------------------------------------------------------------------------------------------------------------------
# The latent space


def test_latents_are_scaled_on_the_way_in_and_out():
    network, image = make(), torch.rand(2, 3, 8, 8)
    latents = LatentSpace(network, 0.5)
    mean, deviation = latents.moments(image)
    with torch.no_grad():
        plain = network.encode(image)
        torch.testing.assert_close(mean, 0.5 * plain[0])
        torch.testing.assert_close(deviation, 0.5 * plain[1])
        torch.testing.assert_close(latents.decode(mean), network.decode(plain[0]))


def test_a_latent_is_drawn_around_its_mean_case_by_case():
    latents, image = LatentSpace(make(), 0.5), torch.rand(2, 3, 8, 8)
    mean, deviation = latents.moments(image)
    z = latents.encode(image, CaseNoise([4, 5]))
    torch.testing.assert_close(z, mean + deviation * CaseNoise([4, 5])(mean))
    torch.testing.assert_close(z[1:], latents.encode(image[1:], CaseNoise([5])))
    assert not torch.equal(latents.encode(image), latents.encode(image))


def test_the_autoencoder_is_a_fixed_frame():
    network = make().train()
    latents = LatentSpace(network)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert not latents.decode(latents.encode(torch.rand(1, 3, 8, 8, requires_grad=True))).requires_grad


def test_the_unit_scale_makes_the_variance_one():
    z = 7 * torch.randn(64, 2, 8, 8)
    assert (unit_scale(z) * z).std().item() == pytest.approx(1, abs=1e-5)


def test_the_sampler_decodes_with_it():
    latents = LatentSpace(make(), 0.5)
    states = []
    sampler = DiffusionSampler(
        DDIM(10, "linear_exact"), 2, channels=2, condition=Concat(), decode=latents.decode, latent_shape=(2, 2),
        on_step=lambda _, x: states.append(x),
    )  # fmt: skip
    out = sampler(torch.zeros(1, 1, 2, 2), lambda x, t: 0.1 * x[:, :2])
    assert torch.equal(out, latents.decode(states[-1]))
    assert out.shape == (1, 3, 8, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Its training


@pytest.mark.parametrize("weight", [0.0, 1e-3, 1.0])
@dims
def test_the_loss_is_the_absolute_error_and_the_divergence_from_a_standard_normal(weight, d):
    shape, size = (2, 3, *(8,) * d), (2, 2, *(2,) * d)
    image, target, mean, std = torch.rand(shape), torch.rand(shape), torch.randn(size), torch.rand(size) + 0.1
    divergence = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean()
    expected = nn.functional.l1_loss(image, target) + weight * divergence
    torch.testing.assert_close(AutoencoderLoss(weight)((image, mean, std), target), expected)
    parts = [AutoencoderLoss(weight)((image[b], mean[b], std[b]), target[b]) for b in range(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), expected)


def test_nothing_is_lost_on_a_perfect_image_of_a_standard_normal():
    image, zero, one = torch.rand(2, 3, 8, 8), torch.zeros(2, 2, 2, 2), torch.ones(2, 2, 2, 2)
    loss = AutoencoderLoss(1.0)
    assert loss((image, zero, one), image) == 0
    assert all(
        loss((image, mean, std), image) > 0 for mean, std in ((zero + 0.1, one), (zero, 1.1 * one), (zero, 0.9 * one))
    )
    half = tuple(x.bfloat16() for x in (image, zero, one))
    assert loss(half, half[0]).dtype == torch.float32, "summed in full precision whatever the network computed in"


def test_the_loss_teaches_both_sides():
    network, image = make(), torch.rand(2, 3, 8, 8)
    AutoencoderLoss(1.0)(network(image), image).backward()
    still = [n for n, p in network.named_parameters() if not n.endswith("to_k.bias") and not p.grad.any()]
    assert still == []


# ---------------------------------------------------------------------------------------------------------------------
# Moments that are worth caching


@pytest.mark.parametrize("kind", [MetaTensor, torch.Tensor.numpy, torch.Tensor.clone], ids=["meta", "numpy", "plain"])
def test_the_moments_of_a_case_join_it_and_leave_it_as_it_was(kind):
    latents, image = LatentSpace(make(), 0.5), torch.rand(3, 8, 8)
    case = {"image": kind(image), "name": "a"}
    out = LatentMomentsd("image", latents)(case)
    assert set(case) == {"image", "name"}
    assert torch.equal(torch.as_tensor(case["image"]), image)
    assert out["image"] is case["image"]
    for name, expected in zip(("mean", "std"), latents.moments(image[None]), strict=True):
        assert type(out[name]) is torch.Tensor
        assert out[name].device.type == "cpu"
        assert not out[name].requires_grad
        assert torch.equal(out[name], expected[0])


def test_every_image_is_encoded_once_however_many_epochs(monkeypatch):
    latents, seen = LatentSpace(make()), []
    encode = latents.moments
    monkeypatch.setattr(latents, "moments", lambda image: seen.append(len(image)) or encode(image))
    cases = [{"image": torch.rand(3, 8, 8)} for _ in range(3)]
    data = CacheDataset(cases, LatentMomentsd("image", latents), progress=False)
    epochs = [[data[i]["mean"] for i in range(3)] for _ in range(2)]
    assert seen == [1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moments_come_back_from_the_gpu():
    image = torch.rand(3, 8, 8)
    out = LatentMomentsd("image", LatentSpace(make().cuda()), "cuda")({"image": image})
    assert (out["mean"].device.type, out["std"].device.type) == ("cpu", "cpu")
    torch.testing.assert_close(out["mean"], LatentMomentsd("image", LatentSpace(make()))({"image": image})["mean"],
                               atol=1e-2, rtol=1e-2)  # fmt: skip
