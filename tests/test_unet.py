"""Laws of the U-Net: MONAI's to the bit where the settings are MONAI's, the references' where they are not."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import ControlNet, DiffusionModelUNet
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import nn

from common.unet import DiffusionUNet, timestep_embedding

CHANNELS = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1, "norm_num_groups": 4}
KINDS = {
    "plain": {},
    "cross-attention": {"with_conditioning": True, "cross_attention_dim": 6},
    "classes": {"num_class_embeds": 3},
    "updown": {"resblock_updown": True},
    "fused": {"use_flash_attention": True, "num_res_blocks": (2, 1)},
}
dims = pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])
kinds = pytest.mark.parametrize("kind", KINDS)


def shuffled(network: nn.Module) -> nn.Module:
    """Random weights everywhere: a fresh network has zeros that hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def make(d: int, kind: str = "plain", cls: type = DiffusionUNet, **settings) -> nn.Module:
    arguments = {**CHANNELS, "num_head_channels": 8, **KINDS[kind], **settings}
    return shuffled(cls(d, 1, 1, **arguments))


def inputs(d: int, kind: str = "plain") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    values = {"x": torch.randn(2, 1, *[8] * d), "timesteps": torch.tensor([3, 700])}
    if kind == "cross-attention":
        values["context"] = torch.randn(2, 4, 6)
    if kind == "classes":
        values["class_labels"] = torch.tensor([0, 2])
    return values


@dims
@kinds
def test_it_is_monais_network_where_the_settings_are_monais(d, kind):
    ours, monais = make(d, kind), make(d, kind, cls=DiffusionModelUNet)
    assert list(ours.state_dict()) == list(monais.state_dict())
    monais.load_state_dict(ours.state_dict())
    assert torch.equal(ours(**inputs(d, kind)), monais(**inputs(d, kind)))


@dims
def test_a_controlnets_residuals_enter_as_in_monai(d):
    control = shuffled(
        ControlNet(d, 1, **CHANNELS, num_head_channels=8, conditioning_embedding_in_channels=2,
                   conditioning_embedding_num_channels=(8,))
    )  # fmt: skip
    values = inputs(d)
    down, mid = control(**values, controlnet_cond=torch.randn(2, 2, *[8] * d))
    values |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    ours, monais = make(d), make(d, cls=DiffusionModelUNet)
    assert torch.equal(ours(**values), monais(**values))
    assert not torch.equal(ours(**values), ours(**inputs(d)))
    with pytest.raises(ValueError, match="zip"):
        ours(**{**values, "down_block_additional_residuals": down[:-1]})


@dims
@kinds
def test_the_halves_make_the_whole(d, kind):
    network, values = make(d, kind, max_period=1000.0, upsample_mode="linear"), inputs(d, kind)
    emb = network.embed(values["x"], values["timesteps"], values.get("class_labels"))
    h, skips = network.encode(values["x"], emb, values.get("context"))
    kept = [s.clone() for s in skips]
    assert torch.equal(network.decode(h, skips, emb, values.get("context")), network(**values))
    assert len(skips) == len(kept)
    assert all(torch.equal(a, b) for a, b in zip(skips, kept, strict=True))


@dims
def test_one_tensor_is_enough_and_means_time_zero(d):
    network, x = make(d), inputs(d)["x"]
    assert torch.equal(network(x), network(x, torch.zeros(2)))


def test_one_time_serves_the_whole_batch():
    network, x = make(2), inputs(2)["x"]
    for one in (torch.tensor(7), torch.tensor([7])):
        assert torch.equal(network(x, one), network(x, torch.tensor([7, 7])))


@pytest.mark.parametrize("max_period", [10000.0, 1000.0])
def test_the_embedding_is_cosine_then_sine_and_odd_widths_end_in_zero(max_period):
    t = torch.tensor([0.0, 2.5, 249.0])
    even, odd = timestep_embedding(t, 8, max_period), timestep_embedding(t, 9, max_period)
    rates = max_period ** (-torch.arange(4) / 4)
    torch.testing.assert_close(even, torch.cat([(t[:, None] * rates).cos(), (t[:, None] * rates).sin()], 1))
    assert torch.equal(odd, torch.cat([even, torch.zeros(3, 1)], dim=1))


def test_an_odd_width_works_end_to_end():
    network = make(2, channels=(9, 9), norm_num_groups=3, num_head_channels=9)
    assert network(inputs(2)["x"], torch.tensor([1, 2])).isfinite().all()


def test_fractional_times_lie_between_their_neighbours():
    network, x = make(2), inputs(2)["x"][:1]
    low, mid, high = (network(x, torch.tensor([t])) for t in (100.0, 100.01, 100.02))
    assert not torch.equal(low, mid)
    torch.testing.assert_close(mid, (low + high) / 2, atol=1e-4, rtol=1e-3)
    assert torch.equal(network(x, torch.tensor([100])), low)


@dims
@kinds
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_gradients_reach_every_parameter(d, kind, mode):
    network = make(d, kind, upsample_mode=mode).train()
    network(**inputs(d, kind)).square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None]
    # The softmax does not see what every key has in common; the rest must move.
    still = [n for n, p in network.named_parameters() if not n.endswith("to_k.bias") and not p.grad.any()]
    if kind == "classes":
        assert not network.class_embedding.weight.grad[1].any()
    assert silent == []
    assert still == []


@dims
def test_a_fresh_network_attends_as_the_identity_and_predicts_zero(d):
    network = DiffusionUNet(d, 1, 1, **CHANNELS, num_head_channels=8)
    x = torch.randn(2, 16, *[4] * d)
    assert torch.equal(network.middle_block.attention(x), x)
    assert not network(**inputs(d)).any()
    monais = DiffusionUNet(d, 1, 1, **CHANNELS, num_head_channels=8, zero_init_attention=False)
    assert not torch.equal(monais.middle_block.attention(x), x)


def test_a_fresh_cross_attention_is_the_identity_without_dead_projections():
    network = DiffusionUNet(2, 1, 1, **CHANNELS, num_head_channels=8, **KINDS["cross-attention"])
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(network.middle_block.attention(x, context=torch.randn(2, 4, 6)), x)
    # Two zero layers in a row would hold each other back: only the outer one is zero.
    assert all(p.any() for n, p in network.named_parameters() if n.endswith("out_proj.weight"))


@dims
@pytest.mark.parametrize("kind", ["plain", "updown"])
def test_linear_upsampling_is_torchs(d, kind):
    network = make(d, kind, upsample_mode="linear")
    up = network.up_blocks[0].upsampler
    up = up.upsample if kind == "updown" else up
    x = torch.randn(1, 16, *[4] * d)
    expected = nn.functional.interpolate(
        x, scale_factor=2, mode={2: "bilinear", 3: "trilinear"}[d], align_corners=False
    )
    assert torch.equal(up.upsample_non_trainable(x), expected)
    with pytest.raises(ValueError, match="upsample_mode"):
        make(d, upsample_mode="cubic")


def test_missing_or_surplus_conditions_teach():
    with pytest.raises(ValueError, match="class_labels are needed"):
        make(2, "classes")(inputs(2)["x"])
    with pytest.raises(ValueError, match="with_conditioning"):
        make(2)(inputs(2)["x"], context=torch.zeros(2, 4, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Words


def worded(d: int = 2) -> nn.Module:
    return make(d, "cross-attention", num_words=9)


@dims
def test_words_are_looked_up_and_tokens_pass(d):
    network, values, words = worded(d), inputs(d), torch.tensor([[1, 8, 0], [3, 3, 2]])
    tokens = network.words.weight[words]
    assert tokens.shape == (2, 3, 6)
    assert torch.equal(network.tokens(words), tokens)
    assert network.tokens(tokens) is tokens
    assert network.tokens(None) is None
    by_word = network(**values, context=words)
    assert torch.equal(by_word, network(**values, context=tokens))
    assert torch.equal(by_word, network(**values, context=words.int())), "whole numbers of any type"
    assert not torch.equal(by_word, network(**values, context=words.flip(1)[:, :2]))


def test_the_table_is_all_that_words_add():
    plain, network = make(2, "cross-attention"), worded()
    assert list(plain.state_dict()) == list(make(2, "cross-attention", cls=DiffusionModelUNet).state_dict())
    assert set(network.state_dict()) - set(plain.state_dict()) == {"words.weight"}
    assert network.words.weight.shape == (9, 6)
    torch.manual_seed(3)
    drawn = make_fresh(num_words=9)
    torch.manual_seed(3)
    same = make_fresh().state_dict()
    assert all(torch.equal(drawn.state_dict()[k], v) for k, v in same.items()), "the other weights start as without it"


def make_fresh(**settings) -> nn.Module:
    return DiffusionUNet(2, 1, 1, **CHANNELS, num_head_channels=8, **KINDS["cross-attention"], **settings)


def test_the_words_that_came_learn_and_no_others():
    network = worded().train()
    network(**inputs(2), context=torch.tensor([[1, 8], [3, 1]])).square().sum().backward()
    assert network.words.weight.grad.any(1).nonzero().flatten().tolist() == [1, 3, 8]


def test_words_without_a_table_and_a_table_without_attention_teach():
    with pytest.raises(ValueError, match="numbers of words, the network no table of them: set num_words"):
        make(2, "cross-attention")(**inputs(2), context=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="num_words 9 needs cross-attention: set with_conditioning"):
        make(2, num_words=9)


# ---------------------------------------------------------------------------------------------------------------------
# Patches


@dims
@pytest.mark.parametrize("kind", ["plain", "cross-attention"])
def test_a_patch_is_folded_into_channels_and_unfolded(d, kind):
    arguments = {**CHANNELS, "num_head_channels": 8, **KINDS[kind]}
    folded = shuffled(DiffusionUNet(d, 2, 3, patch_size=2, **arguments))
    inner = shuffled(DiffusionUNet(d, 2 * 2**d, 3 * 2**d, **arguments))
    assert (folded.in_channels, folded.out_channels) == (2, 3), "as seen from outside"
    assert folded.state_dict().keys() == inner.state_dict().keys()
    inner.load_state_dict(folded.state_dict())
    values = {**inputs(d, kind), "x": torch.randn(2, 2, *[16] * d)}
    ours = folded(**values)
    assert ours.shape == (2, 3, *[16] * d)
    coarse = inner(**{**values, "x": pixelunshuffle(values["x"], d, 2)})
    assert torch.equal(ours, pixelshuffle(coarse, d, 2))


@dims
def test_a_patch_of_one_changes_nothing(d):
    assert torch.equal(make(d, patch_size=1)(**inputs(d)), make(d)(**inputs(d)))


def test_sides_that_do_not_fold_teach():
    with pytest.raises(ValueError, match="divisible"):
        make(2, patch_size=2)(torch.randn(1, 1, 9, 8))


def test_it_can_be_exported_and_traced():
    network, x = make(2, upsample_mode="linear", max_period=1000.0), inputs(2)["x"]
    expected = network(x, torch.tensor([3, 700]))
    program = torch.export.export(network, (x, torch.tensor([3, 700])))
    torch.testing.assert_close(program.module()(x, torch.tensor([3, 700])), expected)
    traced = torch.jit.trace(network, (x, torch.tensor([3, 700])))
    torch.testing.assert_close(traced(x, torch.tensor([3, 700])), expected)
    torch.testing.assert_close(torch.jit.trace(network, (x,))(x), network(x))
