"""Laws of the fast path: the same numbers within a stated tolerance, said in one line, and no trace on the network."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
import torch.distributed as dist
from monai.inferers import DiffusionInferer, SimpleInferer
from torch import nn

import common.execution as execution
from common.conditioning import ConditionPrepareBatch
from common.execution import FastPath
from common.sampler import LayoutGuidedSampler
from common.schedules import DDPM
from common.solvers import DPMSolverPP
from common.training import WeightEMA
from common.unet import DiffusionUNet

dims = pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])
LAYOUT = {2: torch.channels_last, 3: torch.channels_last_3d}


def small(d: int, channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    network = DiffusionUNet(d, channels, 1, channels=(8, 16), attention_levels=(False, True), num_res_blocks=1,
                            norm_num_groups=4, num_head_channels=8, use_flash_attention=True).eval()  # fmt: skip
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return network


def image(d: int, channels: int = 1) -> torch.Tensor:
    return torch.randn(2, channels, *[8] * d, generator=torch.Generator().manual_seed(1))


def off(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative root mean square of the difference."""
    return ((result - expected).square().mean() / expected.square().mean()).sqrt().item()


@dims
@pytest.mark.parametrize(
    ("precision", "channels_last", "tolerance"),
    [("bf16", True, 3e-2), ("bf16", False, 3e-2), ("float32", True, 1e-5), ("float32", False, 0.0)],
)
def test_the_fast_path_keeps_the_numbers(d, precision, channels_last, tolerance):
    x = image(d)
    expected = small(d)(x)
    result = FastPath(SimpleInferer(), precision, channels_last)(x, small(d))
    assert result.dtype == torch.float32
    assert off(result, expected) <= tolerance
    assert (precision == "bf16") != torch.equal(result, expected) or precision == "float32"


@dims
def test_training_and_synthesis_keep_the_numbers_too(d):
    batch = {"image": image(d), "condition": torch.ones(2, 1, *[8] * d)}
    prepared, _, _, infer = ConditionPrepareBatch(50, seed=0)(batch)
    train = DiffusionInferer(DDPM(50))
    expected = train(prepared, small(d, 2), **infer)
    assert off(FastPath(train, "bf16")(prepared, small(d, 2), **infer), expected) < 3e-2

    sampler = LayoutGuidedSampler(DPMSolverPP(50, "cosine_exact", thresholding="clamp"), 5)
    inputs = torch.cat([prepared, batch["condition"]], dim=1)
    expected = sampler(inputs, small(d, 2))
    # Five calls and a solver stand between a rounding and the sample; random weights forgive nothing.
    assert off(FastPath(sampler, "bf16")(inputs, small(d, 2)), expected) < 0.1
    assert off(FastPath(sampler, "float32")(inputs, small(d, 2)), expected) < 1e-5


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bf16_only_where_it_is_native(monkeypatch, native):
    seen = []

    def network(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return x

    monkeypatch.setattr(execution, "native_bf16", lambda device: native)
    for precision in ("auto", "bf16", "float32"):
        FastPath(SimpleInferer(), precision)(image(2), network)
    assert seen == [native, True, False]
    assert not torch.is_autocast_enabled("cpu")


def test_native_bf16_reads_the_devices_capabilities(monkeypatch):
    for capabilities, native in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert execution.native_bf16("cpu") is native
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: not including_emulation)
    assert execution.native_bf16(torch.device("cuda", 0))
    assert not execution.native_bf16("meta")


def test_the_path_is_described_once_in_one_line(caplog):
    caplog.set_level(logging.INFO, logger="common.execution")
    fast = FastPath(SimpleInferer(), "float32")
    for network in (small(2), small(2)):
        fast(image(2), network)
        fast(image(2), network)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("execution path on cpu: float32, channels-last")
    assert "\n" not in message


@dims
def test_weights_copies_and_averages_are_untouched(d):
    network, fast = small(d), FastPath(SimpleInferer(), "bf16")
    before = copy.deepcopy(network.state_dict())
    fast(image(d), network)
    assert network.conv_in.conv.weight.is_contiguous(memory_format=LAYOUT[d])
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == torch.float32 for k in before)
    for twin in (copy.deepcopy(network), WeightEMA(network).module):
        assert torch.equal(fast(image(d), twin), fast(image(d), network))
    small(d).load_state_dict(after)


def test_every_network_is_prepared_even_at_a_used_address():
    fast = FastPath(SimpleInferer(), "float32")
    for _ in range(5):
        network = small(2)
        fast(image(2), network)
        assert network.conv_in.conv.weight.is_contiguous(memory_format=torch.channels_last)
        del network
        gc.collect()
    assert len(fast._prepared) == 0  # and none is kept alive


def test_compile_is_asked_for_once_per_network(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    network = small(2)
    fast = FastPath(SimpleInferer(), "float32", compile=True)
    fast(image(2), network)
    fast(image(2), network)
    assert compiled == [network]
    FastPath(SimpleInferer())(image(2), network)
    assert compiled == [network]


def test_plain_callables_and_other_results_pass_through():
    fast = FastPath(lambda inputs, network: {"a": network(inputs)}, "bf16")
    assert torch.equal(fast(image(2), lambda x: 2 * x)["a"], 2 * image(2))
    with pytest.raises(ValueError, match="precision must be"):
        FastPath(SimpleInferer(), "fp16")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_distributed_network_gets_the_gradients_of_a_plain_one(tmp_path, layout):
    """PyTorch warns of strides that changed after wrapping, then returns wrong gradients: we leave them alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        network, plain = nn.parallel.DistributedDataParallel(small(3).to(memory_format=layout)), small(3)
        fast = FastPath(SimpleInferer(), "float32")
        for candidate in (network, plain):
            fast(image(3), candidate).square().mean().backward()
        for a, b in zip(network.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


class Slices(SimpleInferer):
    """Runs a network of slices over volumes."""

    def __call__(self, inputs, network, *args, **kwargs):
        return torch.stack([network(inputs[..., z]) for z in range(inputs.shape[-1])], dim=-1)


class Noise(SimpleInferer):
    """Runs a network of images on tokens' account."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d = d

    def __call__(self, inputs, network, *args, **kwargs):
        return network(image(self.d))


def laid_out(network: nn.Module) -> torch.Tensor:
    """A weight whose strides tell the layout."""
    return network.down_blocks[1].resnets[0].conv1.conv.weight


@dims
def test_the_network_not_its_input_decides_on_channels_last(d):
    """A network of slices is called with volumes, one of volumes with tokens (B, L, D)."""
    expected = small(d)(image(d))
    network = small(d)
    result = FastPath(Noise(d), "float32")(torch.zeros(2, 4, 6), network)
    assert laid_out(network).is_contiguous(memory_format=LAYOUT[d])
    assert not laid_out(network).is_contiguous()
    assert off(result, expected) < 1e-5


def test_a_network_of_slices_runs_over_volumes():
    volume = image(3)
    network = small(2)
    result = FastPath(Slices(), "float32")(volume, network)
    assert laid_out(network).is_contiguous(memory_format=torch.channels_last)
    assert off(result, Slices()(volume, small(2))) < 1e-5


@dims
def test_a_network_that_does_not_say_is_judged_by_its_input(d):
    network = nn.Sequential(small(d).down_blocks[1].resnets[0].conv1)
    FastPath(SimpleInferer(), "float32")(torch.zeros(2, 8, *[8] * d), network)
    assert network[0].conv.weight.is_contiguous(memory_format=LAYOUT[d])
    tokens = nn.Sequential(nn.Linear(6, 6))
    assert FastPath(SimpleInferer(), "float32")(torch.zeros(2, 4, 6), tokens).shape == (2, 4, 6)
