"""Laws of the network that reads attributes: the publication's numbers, silence, order, and its settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attribute_unet import AttributeUNet
from common.lesion_diffusion import AttributeCondition

WIDTH = 8
SMALL = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 8,
         "cross_attention_dim": WIDTH}  # fmt: skip
PUBLISHED = {"attention_levels": (False, False, True), "num_head_channels": 32, "cross_attention_dim": 512}
LMNET = {"in_channels": 4, "out_channels": 1, "channels": (16, 32, 64), "num_res_blocks": 1}
LINET = {"in_channels": 5, "out_channels": 5, "channels": (128, 256, 512), "num_res_blocks": 2}
TIMES = torch.tensor([3, 700])
variants = pytest.mark.parametrize(
    "settings", [{}, {"null_token": True}, {"summary_width": 6}, {"null_token": True, "summary_width": 6}],
    ids=["published", "null token", "summary", "both"],
)  # fmt: skip


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shuffled(network: nn.Module) -> nn.Module:
    """Random weights everywhere: a fresh network has zeros that hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def make(d: int = 3, **settings) -> AttributeUNet:
    return shuffled(AttributeUNet(d, 3, 1, **{**SMALL, **settings}))


def image(d: int = 3) -> torch.Tensor:
    return normal(2, 3, *[4] * d, seed=2)


def attributes(rows: int = 4, said: int = 3) -> torch.Tensor:
    """Encoded attributes (2, rows, WIDTH) of which the last rows are empty."""
    context = normal(2, rows, WIDTH)
    context[:, said:] = 0
    return context


# ---------------------------------------------------------------------------------------------------------------------
# The publication's


@pytest.mark.parametrize(("build", "count"), [(LMNET, 2_527_489), (LINET, 187_503_365)], ids=["LMNet", "LINet"])
def test_published_size_and_shapes(build, count):
    """Real shapes of the whole crops, no memory."""
    with torch.device("meta"):
        network = AttributeUNet(3, **build, **PUBLISHED).eval()
        assert sum(p.numel() for p in network.parameters()) == count
        size = (64, 152, 152) if build is LMNET else (64, 64, 64)
        x = torch.empty(1, build["in_channels"], *size)
        for context in (torch.empty(1, 8, 512), None):
            assert network(x, torch.zeros(1), context).shape == (1, build["out_channels"], *size)
    assert network.attends_to_itself == (build is LINET), "only LINet's tokens are as wide as its transformers"


def test_norms_are_of_32_groups_or_of_one_channel_each():
    with torch.device("meta"):
        network = AttributeUNet(3, **LMNET, **PUBLISHED)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)}
    seen = {(module.num_channels, module.num_groups) for module in norms.values()}
    assert seen == {(16, 16), (48, 48), (32, 32), (64, 32), (96, 32), (128, 32)}
    for name, module in norms.items():
        transformer = "attention" in name
        assert module.eps == (1e-6 if transformer else 1e-5), name


@pytest.mark.parametrize(("groups", "hears"), [(None, False), (4, True)])
def test_norms_of_single_channels_are_deaf_to_time(groups, hears):
    """A defect of the published rule in narrow networks: LMNet hears the time in its 64 channels alone."""
    network = make(norm_num_groups=groups)
    early, late = (network(image(), torch.full((2,), t), attributes()) for t in (1, 990))
    assert torch.allclose(early, late, atol=1e-4) != hears
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert all(module.num_groups == (groups or module.num_channels) for module in norms if module.num_channels < 32)


def test_the_feed_forward_has_no_gate():
    network = make()
    blocks = [module for name, module in network.named_modules() if name.endswith(".ff")]
    assert blocks
    for block in blocks:
        assert tuple(block.linear1.weight.shape) == (64, 16)
        x = normal(2, 5, 16)
        torch.testing.assert_close(block(x), block.linear2(nn.functional.gelu(block.linear1(x))))


def test_one_projection_without_bias_stands_before_all_attention():
    network, context = make(), attributes()
    assert set(network.context_projection.state_dict()) == {"weight"}
    torch.testing.assert_close(network.tokens(context), context @ network.context_projection.weight.mT)
    told = network(image(), TIMES, context)
    network.context_projection.weight.data.mul_(2)
    torch.testing.assert_close(network(image(), TIMES, context / 2), told)


def test_with_both_options_off_there_is_no_key_of_ours():
    plain, ours = (set(make(**settings).state_dict()) for settings in ({}, {"null_token": True, "summary_width": 6}))
    assert {name.split(".")[0] for name in ours - plain} == {"nothing", "summary"}
    assert not plain - ours


@pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])
def test_fused_attention_is_the_same_function(d):
    fused, plain = make(d), make(d, use_flash_attention=False)
    attention = [m for m in fused.modules() if hasattr(m, "use_flash_attention")]
    assert attention
    assert all(module.use_flash_attention for module in attention)
    torch.testing.assert_close(
        fused(image(d), TIMES, attributes()), plain(image(d), TIMES, attributes()), atol=1e-5, rtol=1e-4
    )


# ---------------------------------------------------------------------------------------------------------------------
# Silence and order


@variants
@pytest.mark.parametrize("width", [WIDTH, 16], ids=["other width", "as wide as the transformers"])
def test_no_context_says_nothing(settings, width):
    """It is a row of zeros, but where the published network can attend to itself."""
    network, x = make(cross_attention_dim=width, **settings), image()
    silent = network(x, TIMES)
    assert network.attends_to_itself == (width == 16 and not settings)
    same = torch.allclose(network(x, TIMES, torch.zeros(2, 1, width)), silent, atol=1e-6)
    assert same != network.attends_to_itself
    assert not torch.allclose(network(x, TIMES, normal(2, 4, width)), silent, atol=1e-4)


@variants
def test_how_many_rows_say_nothing_does_not_matter_if_all_do(settings):
    network, x = make(**settings), image()
    one, many = (network(x, TIMES, torch.zeros(2, rows, WIDTH)) for rows in (1, 10))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)


def test_where_nothing_is_said_stands_the_learned_token():
    network, context = make(null_token=True), attributes()
    tokens = network.tokens(context)
    torch.testing.assert_close(tokens[:, 3:], network.context_projection(network.nothing).expand(2, 1, WIDTH))
    torch.testing.assert_close(tokens[:, :3], network.context_projection(context[:, :3]))
    assert (make().tokens(context)[:, 3:] == 0).all(), "without it zeros stay zeros"
    with torch.no_grad():
        before = network(image(), TIMES, context)
        network.nothing += 1
        assert not torch.allclose(network(image(), TIMES, context), before, atol=1e-4)
    network(image(), TIMES).square().mean().backward()
    assert network.nothing.grad.abs().max() > 0, "and it learns"


@variants
def test_the_order_of_attributes_does_not_matter(settings):
    network, context = make(**settings), attributes()
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(
        network(image(), TIMES, context[:, order]), network(image(), TIMES, context), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("null_token", [False, True])
def test_a_summary_is_heard_before_attention_is_and_counts_no_empty_rows(null_token):
    network = make(summary_width=6, null_token=null_token, norm_num_groups=4)
    for name, parameter in network.named_parameters():
        if "attention" in name:
            parameter.data.zero_()
        if "summary" in name:
            parameter.data.mul_(5)
    told = network(image(), TIMES, attributes())
    assert not torch.allclose(network(image(), TIMES, -attributes()), told, atol=1e-4)
    longer = nn.functional.pad(attributes(), (0, 0, 0, 5))
    torch.testing.assert_close(network(image(), TIMES, longer), told, atol=1e-5, rtol=1e-4)


@variants
def test_a_batch_equals_its_cases_one_by_one(settings):
    network, context, x = make(**settings), attributes(), image()
    context[1] = 0
    both = network(x, TIMES, context)
    for b in range(2):
        alone = network(x[b : b + 1], TIMES[b : b + 1], context[b : b + 1])
        torch.testing.assert_close(alone, both[b : b + 1], atol=1e-5, rtol=1e-4)


def test_attributes_of_another_width_are_refused():
    with pytest.raises(ValueError, match="attributes of width 5, the network reads 8"):
        make()(image(), TIMES, torch.zeros(2, 1, 5))


# ---------------------------------------------------------------------------------------------------------------------
# As MONAI and exporters call it


@pytest.mark.parametrize("settings", [{"cross_attention_dim": 16}, {"null_token": True, "summary_width": 6}])
def test_one_tensor_is_enough_and_traces(settings):
    network, x = make(2, **settings), image(2)
    with torch.no_grad():
        traced = torch.jit.trace(network, x, check_trace=False)
        torch.testing.assert_close(traced(x + 1), network(x + 1))


def test_a_traced_network_reads_attributes():
    network = make(null_token=True, summary_width=6)
    with torch.no_grad():
        traced = torch.jit.trace(network, (image(), TIMES, attributes()), check_trace=False)
        other = attributes(said=2)
        torch.testing.assert_close(traced(image(), TIMES + 1, other), network(image(), TIMES + 1, other))


def test_text_switched_off_is_heard_by_no_published_network():
    """The second attention becomes attention to itself, through the same weights."""
    network, x = make(cross_attention_dim=16), image()
    off = AttributeCondition(use_text=False)(network, x[:, 1:], normal(2, 4, 16))(x[:, :1], TIMES)
    assert torch.equal(off, network(x, TIMES))
