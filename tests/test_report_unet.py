"""Laws of the network that reads reports: silence is a condition, order is none, the numbers are the publication's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.categorical import CategoricalInferer, CategoricalKLLoss, CategoricalSampler, CategoricalScheduler
from common.conditioning import CrossAttention, Guided
from common.report_unet import ReportUNet, Summary, TextAdapter
from common.unet import DiffusionUNet

K, WIDTH = 3, 8
NETWORK = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1, "norm_num_groups": 4,
           "num_head_channels": 8}  # fmt: skip
TEXT = {"with_conditioning": True, "cross_attention_dim": WIDTH}
ADAPTER = {"adapter_depth": 2, "adapter_heads": 2, "adapter_head_channels": 4}
PUBLISHED = {"channels": [64, 128, 128, 256, 320], "attention_levels": [False, False, False, True, True],
             "num_res_blocks": 2, "norm_num_groups": 32, "num_head_channels": 32}  # fmt: skip
depths = pytest.mark.parametrize("depth", [0, 2])


def shuffled(network: nn.Module) -> nn.Module:
    """Random weights everywhere: a fresh network has zeros that hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def make(d: int = 2, *, blank: int = 0, cls: type = ReportUNet, **settings) -> nn.Module:
    arguments = {**NETWORK, **TEXT, **(ADAPTER if cls is ReportUNet else {}), **settings}
    if blank:
        arguments["blank_channels"] = blank
    return shuffled(cls(d, K + blank, K, **arguments))


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planes(d: int = 2) -> torch.Tensor:
    return normal(2, K, *[8] * d, seed=2)


def report(rows: int = 5, said: int = 3) -> torch.Tensor:
    """Tokens (2, rows, WIDTH) of which the last rows are empty."""
    tokens = normal(2, rows, WIDTH)
    tokens[:, said:] = 0
    return tokens


TIMES = torch.tensor([3, 700])


# ---------------------------------------------------------------------------------------------------------------------
# Silence and order


@pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])
@depths
def test_no_context_is_nothing_said(d, depth):
    network, x = make(d, adapter_depth=depth), planes(d)
    silent = network(x, TIMES)
    torch.testing.assert_close(network(x, TIMES, torch.zeros(2, 1, WIDTH)), silent, atol=0, rtol=0)
    torch.testing.assert_close(network(x, TIMES, torch.zeros(2, 7, WIDTH)), silent)
    assert not torch.allclose(network(x, TIMES, report()), silent)


@depths
def test_where_nothing_is_said_stands_the_learned_token(depth):
    network, context = make(adapter_depth=depth), report()
    tokens = network.tokens(context)
    assert torch.equal(tokens[:, 3:], network.nothing.expand(2, 2, WIDTH))
    assert torch.equal(tokens[:, :3], network.adapter(context)[:, :3])
    assert torch.equal(tokens[:, :3], context[:, :3]) == (depth == 0), "without blocks tokens pass as they are"
    assert network.tokens(None) is None


@depths
def test_the_order_of_tokens_does_not_matter(depth):
    """Neither adapter nor cross-attention knows places: what a token means must be written in it."""
    network, context = make(adapter_depth=depth), report()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(network(planes(), TIMES, context[:, order]), network(planes(), TIMES, context))
    torch.testing.assert_close(network.tokens(context[:, order]), network.tokens(context)[:, order])


def test_a_summary_is_of_a_set_and_keeps_together_what_belongs_together():
    summary = shuffled(Summary(2 * WIDTH, 16, 6))
    spleen, liver, large, small = normal(4, WIDTH)

    def says(*pairs):
        return summary(torch.stack([torch.cat(pair) for pair in pairs])[None])

    told = says((spleen, large), (liver, small))
    torch.testing.assert_close(says((liver, small), (spleen, large)), told)
    assert not torch.allclose(says((spleen, small), (liver, large)), told, atol=1e-3)


def test_a_summary_is_heard_before_attention_is():
    """Attention begins at zero: only the summary tells two reports apart in a network whose transformers are silent."""
    networks = {width: make(summary_width=width) for width in (0, 16)}
    for network in networks.values():
        for name, parameter in network.named_parameters():
            if "attentions" in name or "middle_block.attention" in name:
                parameter.data.zero_()
    other = -report()
    for width, network in networks.items():
        same = torch.allclose(network(planes(), TIMES, report()), network(planes(), TIMES, other), atol=1e-5)
        assert same == (width == 0)
    whole = networks[16](planes(), TIMES, report())
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(networks[16](planes(), TIMES, report()[:, order]), whole)


@depths
def test_a_token_said_otherwise_says_otherwise(depth):
    network, context, x = make(adapter_depth=depth), report(), planes()
    told = network(x, TIMES, context)
    for row in range(3):
        changed = context.clone()
        changed[0, row] *= -1
        other = network(x, TIMES, changed)
        assert not torch.allclose(other[0], told[0], atol=1e-5)
        torch.testing.assert_close(other[1], told[1])


def test_cases_of_a_batch_keep_their_own_reports():
    network, context, x = make(), report(), planes()
    context[1] = 0
    both = network(x, TIMES, context)
    for b in range(2):
        alone = network(x[b : b + 1], TIMES[b : b + 1], context[b : b + 1])
        torch.testing.assert_close(alone, both[b : b + 1])
    torch.testing.assert_close(network(x[1:], TIMES[1:]), both[1:])


@depths
def test_gradients_reach_adapter_and_learned_token(depth):
    network = make(adapter_depth=depth).train()
    network(planes(), TIMES, report()).square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None]
    # The softmax does not see what every key has in common; the rest must move.
    still = [n for n, p in network.named_parameters() if not n.endswith("to_k.bias") and not p.grad.any()]
    assert silent == []
    assert still == []
    assert network.nothing.grad.any()


def test_the_learned_token_learns_where_nothing_is_said_and_the_adapter_where_something_is():
    network = make().train()
    network(planes(), TIMES, normal(2, 4, WIDTH)).square().sum().backward()
    assert not network.nothing.grad.any()
    network.zero_grad()
    network(planes(), TIMES).square().sum().backward()
    assert network.nothing.grad.any()
    assert not any(p.grad.any() for p in network.adapter.parameters() if p.grad is not None)


def test_a_fresh_network_hears_reports_after_its_first_steps():
    """Attention starts as the identity: training, not its start, decides whether a report counts."""
    torch.manual_seed(0)
    network = ReportUNet(2, K, K, **NETWORK, **TEXT, **ADAPTER)
    context, other = report(), report().flip(0)
    assert torch.equal(network(planes(), TIMES, context), network(planes(), TIMES, other))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (network(planes(), TIMES, context) - planes().flip(0)).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(network(planes(), TIMES, context), network(planes(), TIMES, other), atol=1e-6)


def test_the_adapter_adds_what_its_blocks_make():
    adapter, tokens = make().adapter, report()
    made = adapter.blocks[1](adapter.blocks[0](tokens))
    assert torch.equal(adapter(tokens), tokens + made)
    assert torch.equal(TextAdapter(WIDTH, depth=0)(tokens), tokens)


def test_dropout_drops_in_training_alone():
    plain, dropping = (make(adapter_dropout=p) for p in (0.0, 0.5))
    dropping.load_state_dict(plain.state_dict())
    context = report()
    torch.testing.assert_close(dropping.eval().tokens(context), plain.tokens(context))
    torch.manual_seed(0)
    assert not torch.allclose(dropping.train().tokens(context), plain.tokens(context))


def test_tokens_of_another_width_teach():
    with pytest.raises(ValueError, match=r"tokens of width 6, the network reads 8: set cross_attention_dim"):
        make()(planes(), TIMES, torch.ones(2, 4, 6))


# ---------------------------------------------------------------------------------------------------------------------
# One family with the other networks


@pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])
def test_without_text_it_is_the_plain_network_and_hears_nothing(d):
    ours = make(d, with_conditioning=False, cross_attention_dim=None)
    plain = make(d, cls=DiffusionUNet, with_conditioning=False, cross_attention_dim=None)
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    expected = plain(planes(d), TIMES)
    assert torch.equal(ours(planes(d), TIMES), expected)
    assert torch.equal(ours(planes(d), TIMES, report()), expected)
    assert ours.adapter is None


def test_with_text_it_is_the_plain_network_on_its_own_tokens():
    ours, plain, context = make(), make(cls=DiffusionUNet), report()
    left = plain.load_state_dict(ours.state_dict(), strict=False)
    assert left.missing_keys == []
    assert {key.split(".")[0] for key in left.unexpected_keys} == {"adapter", "nothing"}
    assert torch.equal(ours(planes(), TIMES, context), plain(planes(), TIMES, ours.tokens(context)))


@pytest.mark.parametrize("text", [True, False], ids=["text", "no text"])
def test_blank_channels_are_zeros_that_may_be_left_out(text):
    settings = {} if text else {"with_conditioning": False, "cross_attention_dim": None}
    network, x = make(blank=2, **settings), planes()
    full = torch.cat([x, torch.zeros(2, 2, 8, 8)], dim=1)
    expected = network(full, TIMES)
    assert expected.shape == (2, K, 8, 8)
    assert torch.equal(network(x, TIMES), expected)
    assert torch.equal(network(full[:, : K + 1], TIMES), expected)
    for count in (K - 1, K + 3):
        with pytest.raises(RuntimeError, match="channels"):
            network(normal(2, count, 8, 8), TIMES)


@pytest.mark.parametrize(("blank", "patch"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_one_tensor_is_enough(blank, patch):
    """As MONAI's shape check and exporters call a network."""
    network = make(3, blank=blank, patch_size=patch)
    assert (network.in_channels, network.out_channels) == (K + blank, K)
    x = normal(1, K + blank, 8, 8, 8)
    assert network(x).shape == (1, K, 8, 8, 8)
    assert torch.equal(network(x), network(x, torch.zeros(1), torch.zeros(1, 1, WIDTH)))


@pytest.mark.parametrize("patch", [1, 2])
def test_it_serves_the_categorical_sockets_with_guidance(patch):
    scheduler = CategoricalScheduler(20, K)
    network, context = make(3, patch_size=patch, blank=1), report()
    labels = torch.randint(0, K, (2, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    pred = CategoricalInferer(scheduler)(labels, network.train(), torch.randn(labels.shape), torch.tensor([3, 17]),
                                         condition=context)  # fmt: skip
    loss = CategoricalKLLoss(scheduler, ce_weight=0.1)(pred, labels)
    loss.backward()
    assert loss.isfinite()
    assert network.nothing.grad.isfinite().all()
    drawn = {}
    for scale in (0.0, 1.0, 4.0):
        condition = Guided(CrossAttention(), scale)
        run = CategoricalSampler(scheduler, 3, condition=condition, latent_shape=(8, 8, 8))
        drawn[scale] = run(context, network.eval(), seeds=[1, 2])
        assert drawn[scale].shape == labels.shape
    bare = CategoricalSampler(scheduler, 3, condition=CrossAttention(), latent_shape=(8, 8, 8))
    assert (drawn[1.0] == bare(context, network, seeds=[1, 2])).float().mean() > 0.999
    assert (drawn[0.0] == bare(torch.zeros_like(context), network, seeds=[1, 2])).float().mean() > 0.999
    assert not torch.equal(drawn[4.0], drawn[1.0])


# ---------------------------------------------------------------------------------------------------------------------
# The publication's sizes


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_published_network_has_its_size():
    with torch.device("meta"):
        network = ReportUNet(3, 13, 12, blank_channels=1, with_conditioning=False, **PUBLISHED)
    assert count(network) == 95_402_060


def test_the_published_adapter_has_its_size_and_fits_the_network():
    with torch.device("meta"):
        adapter = TextAdapter(768)
        network = ReportUNet(3, 13, 12, blank_channels=1, with_conditioning=True, cross_attention_dim=768, **PUBLISHED)
    assert count(adapter) == 40_946_688
    assert count(network.adapter) == count(adapter)
    assert count(network) == 115_439_308 + 40_946_688, "the learned token included"
    assert {n.split(".")[0] for n, _ in network.named_parameters()} >= {"adapter", "nothing"}
    assert network.nothing.shape == (1, 1, 768)
