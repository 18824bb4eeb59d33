"""CMDM's own network: MONAI's U-Net with gates, and the shipped weights doing what they are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet

from bundles.cmdm.scripts.network import GatedBlock, GatedUNet, TimedBlock
from tools.import_weights import import_checkpoint

SMALL = {"channels": [8, 16], "attention_levels": [False, True], "num_res_blocks": 1, "num_head_channels": [2, 4]}
SMALL |= {"norm_num_groups": 4, "norm_eps": 1e-5}


def gated(**kwargs) -> GatedUNet:
    torch.manual_seed(0)
    network = GatedUNet(2, **{**SMALL, **kwargs}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # nothing at zero, so that everything shows
    return network


def stock_keys(network: torch.nn.Module) -> set[str]:
    return {key for key in network.state_dict() if "_gate." not in key}


def test_it_is_monais_network_but_for_the_gates():
    stock = DiffusionModelUNet(2, 1, 1, resblock_updown=True, **SMALL)
    assert stock_keys(gated()) == set(stock.state_dict())
    names = {name for name, m in gated().named_modules() if isinstance(m, GatedBlock)}
    assert names == {
        "down_blocks.0.downsampler",
        "middle_block.resnet_1",
        "middle_block.resnet_2",
        *(f"up_blocks.{i}.resnets.{j}" for i in (0, 1) for j in (0, 1)),
        "up_blocks.0.upsampler",
    }


def test_open_gates_are_no_gates():
    """With weights 0 and the bias at which SiLU is 1, it computes what MONAI's network computes."""
    network, stock = gated(), DiffusionModelUNet(2, 1, 1, resblock_updown=True, **SMALL).eval()
    for module in network.modules():
        if isinstance(module, GatedBlock):
            for gate in (module.size_gate, module.location_gate):
                torch.nn.init.zeros_(gate.weight)
                torch.nn.init.constant_(gate.bias, 1.2784645)
    stock.load_state_dict({k: v for k, v in network.state_dict().items() if "_gate." not in k})
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3.0, 400.0])
    with torch.no_grad():
        assert torch.allclose(network(x, t, torch.rand(2, 3)), stock(x, t), atol=1e-5)


def test_the_published_initialisation_starts_nearly_closed():
    """torch's own initialisation leaves two thirds of the gates below 0.05; ours begin around 1."""

    def gates(block: GatedBlock) -> torch.Tensor:
        condition = torch.rand(500, 3) * torch.tensor([0.3, 1.0, 1.0])
        act = torch.nn.functional.silu
        return act(block.size_gate(condition[:, :1])) * act(block.location_gate(condition[:, 1:]))

    torch.manual_seed(0)
    block = GatedBlock(2, 64, 256, 64, norm_num_groups=8)
    ours = gates(block).abs()
    for gate in (block.size_gate, block.location_gate):
        gate.reset_parameters()
    published = gates(block).abs()
    assert (published < 0.05).float().mean() > 0.5
    assert (ours < 0.05).float().mean() < 0.25
    assert published.mean() < 0.1 < ours.mean()


def test_statistics_reach_the_output_and_only_through_the_gates():
    network, x, t = gated(), torch.randn(1, 1, 16, 16), torch.tensor([10.0])
    with torch.no_grad():
        out = {c: network(x, t, torch.tensor([c])) for c in [(0.1, 0.2, 0.3), (0.4, 0.2, 0.3), (0.1, 0.6, 0.3)]}
    first, *others = out.values()
    assert all(not torch.allclose(first, other, atol=1e-5) for other in others)
    network.zero_grad()
    network(x, t, torch.tensor([[0.1, 0.2, 0.3]])).sum().backward()
    blocks = [m for m in network.modules() if isinstance(m, GatedBlock)]
    assert all(b.size_gate.weight.grad.abs().sum() > 0 and b.location_gate.weight.grad.abs().sum() > 0 for b in blocks)


def test_without_statistics_it_is_unconditional():
    for null in (0.0, -1.0):
        network, x, t = gated(null=null), torch.randn(2, 1, 16, 16), torch.tensor([10.0, 10.0])
        with torch.no_grad():
            assert torch.equal(network(x, t), network(x, t, torch.full((2, 3), null)))
            assert network(x).shape == x.shape


def test_time_scale():
    a, b = gated(time_scale=1.0), gated(time_scale=0.01)
    x, c = torch.randn(1, 1, 16, 16), torch.rand(1, 3)
    with torch.no_grad():
        assert torch.allclose(a(x, torch.tensor([2.0]), c), b(x, torch.tensor([200.0]), c), atol=1e-5)


def test_several_classes_have_a_triple_each():
    network = gated(num_classes=3)
    assert network.num_statistics == 9
    assert network(torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0]), torch.rand(2, 9)).shape == (2, 3, 16, 16)


def test_plain_blocks_ignore_the_statistics():
    network = gated()
    plain = [m for m in network.modules() if type(m) is TimedBlock]
    assert len(plain) == 2
    emb = torch.randn(2, plain[0].emb_channels + 3)
    changed = emb.clone()
    changed[:, -3:] += 1
    x = torch.randn(2, 8, 16, 16)
    assert torch.equal(plain[0](x, emb), plain[0](x, changed))


@pytest.mark.parametrize(("size", "multipliers", "parameters"), [
    (64, [1, 2, 3, 4], 95_581_697), (128, [1, 1, 2, 3, 4], 98_656_129), (256, [1, 1, 2, 2, 4, 4], 130_378_113),
])  # fmt: skip
def test_published_sizes(repo: Path, size, multipliers, parameters):
    """The three presets of the publication; paper.json is the last."""
    levels = len(multipliers)
    channels = [128 * m for m in multipliers]
    attention = [size >> i in (16, 8) for i in range(levels)]
    with torch.device("meta"):
        network = GatedUNet(
            2,
            channels=channels,
            attention_levels=attention,
            num_res_blocks=2,
            num_head_channels=[c // 4 for c in channels],
        )
    assert sum(p.numel() for p in network.parameters()) == parameters
    paper = json.loads((repo / "bundles/cmdm/configs/paper.json").read_text())
    if size == 256:
        assert (paper["channels"], paper["attention_levels"]) == (channels, attention)


def test_heads_are_what_one_says(repo: Path):
    """Weights do not tell their attention heads: 4 is assumed, and another number gives another network."""
    path = repo.parent / "shared" / "parity" / "cmdm" / "dev_net_a.pt"
    if not path.is_file():
        pytest.skip(f"parity data absent: {path}")
    four, two = (import_checkpoint(repo / "bundles/cmdm", path, preset="paper", num_heads=n)[0] for n in (4, 2))
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(four(x), two(x), atol=1e-4)
