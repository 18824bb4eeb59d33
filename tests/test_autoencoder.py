"""Laws of the autoencoder and of the scaled latent space."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import nn

from common.autoencoder import LatentSpace, LDMAutoencoder, unit_scale
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
