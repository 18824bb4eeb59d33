"""Laws of the ControlNet: MONAI's to the bit, a stem of one's choice, a hint encoded once, guidance that keeps it."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import ControlNet
from torch import nn

from common.checkpoints import CheckpointError
from common.conditioning import ControlNetHint, GuidedContext
from common.controlnet import ControlledUNet, DenseHintInput, HintControlNet
from common.sampler import DiffusionSampler
from common.schedules import DDIM
from common.unet import DiffusionUNet

SETTINGS = {"channels": (8, 16), "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 8}
SETTINGS |= {"norm_num_groups": 4}
TEXT = {"with_conditioning": True, "cross_attention_dim": 6}
MONAI_STEM = {"conditioning_embedding_in_channels": 3, "conditioning_embedding_num_channels": (4, 8)}
dims = pytest.mark.parametrize("d", [2, 3], ids=["2-D", "3-D"])


def shuffled(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def make(d: int = 2, merges: int = 1, num_words: int | None = None, **kwargs) -> ControlledUNet:
    stem = DenseHintInput(d, 3, 8, num_merges=merges, width=4)
    settings = {**SETTINGS, **TEXT}
    unet = DiffusionUNet(d, 2, 2, num_words=num_words, **settings)
    return shuffled(ControlledUNet(unet, HintControlNet(d, 2, stem=stem, **settings), **kwargs))


def inputs(d: int = 2, n: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    values = {"x": torch.randn(n, 2, *(4,) * d), "timesteps": torch.arange(3, 3 + 97 * n, 97)}
    return {**values, "context": torch.randn(n, 5, 6), "hint": torch.rand(n, 3, *(8,) * d)}


# ---------------------------------------------------------------------------------------------------------------------
# The dense stem


def test_the_dense_stem_has_the_papers_size():
    stem = DenseHintInput(2, 3, 320)
    of_end = sum(p.numel() for p in stem.conv_out.parameters())
    assert sum(p.numel() for p in stem.parameters()) - of_end == 2_526_272
    assert of_end == 256 * 320 * 9 + 320


@dims
@pytest.mark.parametrize("merges", [0, 1, 2])
def test_the_dense_stem_halves_at_every_merge_and_reads_every_pixel(d, merges):
    stem = shuffled(DenseHintInput(d, 3, 8, num_merges=merges, width=4)).double()
    hint = torch.rand(1, 3, *(8,) * d, dtype=torch.float64, requires_grad=True)
    out = stem(hint)
    assert out.shape == (1, 8, *(8 // 2**merges,) * d)
    out.square().sum().backward()
    assert hint.grad.all()


def test_a_fresh_dense_stem_adds_nothing():
    assert not DenseHintInput(2, 3, 8, num_merges=1, width=4)(torch.rand(1, 3, 8, 8)).any()


def test_a_merge_takes_the_four_pixels_columns_last():
    """(row, column) = (0, 0), (1, 0), (0, 1), (1, 1): the order the published weights were trained in."""
    merge = DenseHintInput(2, 3, 8, num_merges=1, width=1).merges[0]
    seen = []
    merge.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.arange(4.0).reshape(1, 2, 2, 1).expand(1, 2, 2, 2)
    merge(x)
    assert seen[0].flatten()[::2].tolist() == [0, 2, 1, 3]
    assert merge.reduction.bias is not None


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match=r"the hint has sides \(8, 12\), expected multiples of 8"):
        DenseHintInput(2, 3, 8, width=4)(torch.rand(1, 3, 8, 12))
    network, data = make(), inputs()
    for x, hint in ((torch.randn(2, 2, 5, 4), torch.rand(2, 3, 10, 8)), (torch.randn(2, 2, 4, 3), None)):
        with pytest.raises(ValueError, match="expected multiples of 2"):
            network(x, data["timesteps"], data["context"], hint)
    with pytest.raises(ValueError, match="num_merges"):
        network(data["x"], data["timesteps"], data["context"], torch.rand(2, 3, 16, 16))


# ---------------------------------------------------------------------------------------------------------------------
# The ControlNet


@dims
@pytest.mark.parametrize("kind", [{}, TEXT, {"num_class_embeds": 3}], ids=["plain", "text", "classes"])
def test_it_is_monais_controlnet_where_the_stem_is_monais(d, kind):
    arguments = {**SETTINGS, **MONAI_STEM, **kind}
    ours, monais = (shuffled(cls(d, 2, **arguments)) for cls in (HintControlNet, ControlNet))
    assert list(ours.state_dict()) == list(monais.state_dict())
    data = inputs(d)
    given = {"x": data["x"], "timesteps": data["timesteps"], "controlnet_cond": data["hint"], "conditioning_scale": 0.7}
    given |= {"context": data["context"]} if kind is TEXT else {}
    given |= {"class_labels": torch.tensor([0, 2])} if "num_class_embeds" in kind else {}
    (down, mid), (monais_down, monais_mid) = ours(**given), monais(**given)
    assert all(torch.equal(a, b) for a, b in zip([*down, mid], [*monais_down, monais_mid], strict=True))


def test_a_hint_may_come_encoded_and_one_tensor_is_enough():
    control, data = make().controlnet, inputs()
    args = data["x"], data["timesteps"]
    plain = control(*args, data["hint"], context=data["context"])
    ready = control(*args, encoded=control.encode_hint(data["hint"]), context=data["context"])
    assert all(torch.equal(a, b) for a, b in zip([*plain[0], plain[1]], [*ready[0], ready[1]], strict=True))
    alone = shuffled(HintControlNet(2, 2, **SETTINGS))
    zero = alone(data["x"], torch.zeros(2), encoded=torch.zeros(2, 8, 4, 4))
    assert torch.equal(alone(data["x"])[1], zero[1])


def test_transformers_may_have_their_own_epsilon():
    """Stable Diffusion has 1e-6 before transformers and 1e-5 elsewhere: a small difference, easily missed."""
    settings = {**SETTINGS, **TEXT, "norm_eps": 1e-2}
    networks = [shuffled(DiffusionUNet(2, 2, 2, transformer_norm_eps=eps, **settings)) for eps in (None, 1e-2, 1e-3)]
    data = inputs()
    outs = [network(data["x"], data["timesteps"], data["context"]) for network in networks]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    control = HintControlNet(2, 2, transformer_norm_eps=1e-3, **settings, **MONAI_STEM)
    for network in (networks[2], control):
        norms = {name: m.eps for name, m in network.named_modules() if isinstance(m, nn.GroupNorm)}
        assert {eps for name, eps in norms.items() if name.endswith(("attention.norm", "attentions.0.norm"))} == {1e-3}
        assert {eps for name, eps in norms.items() if "attention" not in name} == {1e-2}


# ---------------------------------------------------------------------------------------------------------------------
# U-Net and ControlNet as one network


@dims
def test_a_fresh_control_changes_nothing_and_starts_as_the_unets_encoder(d):
    network, data = make(d), inputs(d)
    own = HintControlNet(d, 2, stem=DenseHintInput(d, 3, 8, 1, width=4), **SETTINGS, **TEXT)
    network = ControlledUNet(network.unet, own).eval()
    network.add_control()
    assert torch.equal(network(**data), network.unet(data["x"], data["timesteps"], data["context"]))
    copied = {name: p for name, p in own.named_parameters() if not name.startswith("controlnet_")}
    assert copied
    assert all(torch.equal(p, network.unet.get_parameter(name)) for name, p in copied.items())
    assert all(p.data_ptr() != network.unet.get_parameter(name).data_ptr() for name, p in copied.items())
    assert all(p.requires_grad for p in own.parameters())


def test_only_matching_builds_are_joined():
    other = HintControlNet(2, 2, **{**SETTINGS, "channels": (8, 8)}, **TEXT, **MONAI_STEM)
    with pytest.raises(ValueError, match="build both with the same"):
        ControlledUNet(DiffusionUNet(2, 2, 2, **SETTINGS, **TEXT), other)


def test_without_a_hint_it_is_the_unet_and_without_time_it_is_at_zero():
    network, data = make(), inputs()
    bare = network(data["x"], data["timesteps"], data["context"])
    assert torch.equal(bare, network.unet(data["x"], data["timesteps"], data["context"]))
    assert not torch.equal(bare, network(**data))
    zero = network(data["x"], torch.zeros(2), data["context"])
    assert torch.equal(network(data["x"], context=data["context"]), zero)


def test_one_tensor_is_enough_and_no_tokens_are_one_zero_token():
    network, data = make(), inputs()
    assert torch.equal(network(data["x"]), network(data["x"], torch.zeros(2), torch.zeros(2, 1, 6)))
    without = network(data["x"], data["timesteps"], hint=data["hint"])
    assert torch.equal(without, network(data["x"], data["timesteps"], torch.zeros(2, 1, 6), data["hint"]))
    wordless = ControlledUNet(DiffusionUNet(2, 2, 2, **SETTINGS), HintControlNet(2, 2, **SETTINGS))
    assert wordless(data["x"]).shape == data["x"].shape


def test_the_strength_scales_the_control():
    network, data = make(), inputs()
    assert torch.equal(network(**data, scale=0.0), network(data["x"], data["timesteps"], data["context"]))
    assert not torch.equal(network(**data, scale=0.5), network(**data))


def test_the_encoder_is_frozen_on_request():
    frozen, free = make(), make(freeze_encoder=False)
    data = inputs()
    assert torch.equal(frozen(**data), free(**data))
    with pytest.raises(RuntimeError, match="does not require grad"):
        frozen.encode(data["x"], data["timesteps"], data["context"])[0].sum().backward()
    free(**data).square().sum().backward()
    assert all(p.grad is not None for p in free.parameters())


def test_the_words_are_frozen_with_the_encoder():
    frozen, free = make(num_words=9), make(num_words=9, freeze_encoder=False)
    data = {**inputs(), "context": torch.tensor([[1, 8, 0], [3, 3, 2]])}
    assert torch.equal(frozen(**data), free(**data))
    for network, expected in ((frozen, False), (free, True)):
        network(**data).square().sum().backward()
        assert network.unet.words.weight.requires_grad == expected
        assert (network.unet.words.weight.grad is not None) == expected
    asked = {name.split(".")[0] for name, p in frozen.unet.named_parameters() if p.requires_grad}
    assert asked == {"up_blocks", "out"}
    assert all(p.requires_grad for p in frozen.controlnet.parameters())
    assert all(p.requires_grad for p in make(num_words=9, freeze_encoder=False).parameters())


def test_words_reach_the_unet_and_its_control_alike():
    network, data, words = make(num_words=9), inputs(), torch.tensor([[1, 8, 0], [3, 3, 2]])
    tokens = network.unet.words.weight[words]
    assert torch.equal(network(**{**data, "context": words}), network(**{**data, "context": tokens}))
    assert not torch.equal(network(**{**data, "context": words}), network(**{**data, "context": words.flip(0)}))


def test_its_channels_are_the_unets():
    unet, control = DiffusionUNet(2, 2, 3, **SETTINGS), HintControlNet(2, 2, **SETTINGS, **MONAI_STEM)
    network = ControlledUNet(unet, control)
    assert (network.in_channels, network.out_channels) == (2, 3)
    assert network(inputs()["x"]).shape == (2, 3, 4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Where a training starts


def is_copy(network: ControlledUNet) -> bool:
    """Whether the ControlNet's encoder is the U-Net's."""
    own = {n: p for n, p in network.controlnet.named_parameters() if not n.startswith("controlnet_")}
    return all(torch.equal(p, network.unet.get_parameter(n)) for n, p in own.items())


def other_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {k: torch.randn_like(v) for k, v in network.state_dict().items()}


@dims
def test_without_a_base_the_control_starts_as_the_fresh_unets_encoder(d):
    network = make(d, num_words=9)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert not is_copy(network)
    network.start(None)
    assert is_copy(network)
    kept = [k for k in before if k.startswith(("unet.", "controlnet.controlnet_"))]
    assert all(torch.equal(network.state_dict()[k], before[k]) for k in kept), "U-Net, stem and zero convolutions stay"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_of_the_unet_fills_it_and_its_encoder_is_copied(tmp_path, dtype):
    network = make(num_words=9)
    base = {k: v.to(dtype) for k, v in other_weights(network.unet).items()}
    stem = {k: v.clone() for k, v in network.controlnet.controlnet_cond_embedding.state_dict().items()}
    torch.save(base, tmp_path / "base.pt")
    network.start(tmp_path / "base.pt")
    assert all(torch.equal(v, base[k].float()) for k, v in network.unet.state_dict().items())
    assert is_copy(network)
    assert all(torch.equal(v, stem[k]) for k, v in network.controlnet.controlnet_cond_embedding.state_dict().items())
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert not network.unet.words.weight.requires_grad, "filling thaws nothing"


def test_weights_of_the_whole_network_are_taken_as_they_are(tmp_path):
    network = make()
    whole = other_weights(network)
    torch.save(whole, tmp_path / "model.pt")
    network.start(str(tmp_path / "model.pt"))
    assert all(torch.equal(v, whole[k]) for k, v in network.state_dict().items())
    assert not is_copy(network), "its ControlNet has been trained: nothing is copied over it"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda unet, whole: {**unet, "conv_in.conv.bias": torch.zeros(5)}, r"1 of another shape \(conv_in.conv.bias"),
        (lambda unet, whole: {k: v for k, v in unet.items() if "conv_in" not in k}, r"2 missing \(conv_in.conv"),
        (lambda unet, whole: {**unet, "more": torch.zeros(1)}, r"1 unexpected \(more\)"),
        (lambda unet, whole: {k: v for k, v in whole.items() if not k.startswith("unet.out")}, r"missing \(unet.out"),
        (lambda unet, whole: {"network": whole}, "missing"),
    ],
    ids=["shape", "missing", "unexpected", "half of both", "nested"],
)
def test_a_base_that_does_not_fit_is_refused_by_name_and_fills_nothing(tmp_path, spoil, message):
    network = make()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    torch.save(spoil(other_weights(network.unet), other_weights(network)), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=f"other.pt does not fit the network.*{message}"):
        network.start(tmp_path / "other.pt")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"none\.pt do not exist"):
        network.start(tmp_path / "none.pt")


def test_it_can_be_exported():
    network, data = make(), inputs()
    program = torch.export.export(network, (data["x"],), {k: v for k, v in data.items() if k != "x"})
    torch.testing.assert_close(
        program.module()(data["x"], **{k: v for k, v in data.items() if k != "x"}), network(**data)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class Counted:
    """Calls of a network's stem and decoder, with the samples in them."""

    def __init__(self, network: ControlledUNet) -> None:
        self.stem: list[int] = []
        self.decoder: list[int] = []
        network.controlnet.controlnet_cond_embedding.register_forward_pre_hook(lambda _, a: self.stem.append(len(a[0])))
        network.unet.out.register_forward_pre_hook(lambda _, a: self.decoder.append(len(a[0])))


def sampler(condition, **kwargs) -> DiffusionSampler:
    scheduler = DDIM(50, "linear_exact", clip_sample=False)
    return DiffusionSampler(scheduler, 4, channels=2, condition=condition, latent_shape=(4, 4), **kwargs)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (3.0, 4)])
def test_a_hint_is_encoded_once_and_neutral_guidance_costs_nothing(guidance, rows):
    network, data = make(), inputs()
    counted = Counted(network)
    guided = GuidedContext(guidance, torch.zeros(1, 5, 6), context=data["context"])
    sampler(guided)(data["hint"], network)
    assert counted.stem == [2]
    assert counted.decoder == [rows] * 4


def test_neutral_guidance_is_no_guidance():
    network, data = make(), inputs()
    plain = sampler(ControlNetHint(context=data["context"]))(data["hint"], network)
    assert torch.equal(sampler(GuidedContext(1.0, context=data["context"]))(data["hint"], network), plain)
    assert not torch.equal(sampler(ControlNetHint(context=0 * data["context"]))(data["hint"], network), plain)


def test_guidance_keeps_the_hint_on_both_sides():
    network, data, null = make(), inputs(), torch.randn(1, 5, 6)
    guided = GuidedContext(9.0, null, context=data["context"][:1])(network, data["hint"])
    x, t = data["x"], data["timesteps"]
    with torch.no_grad():
        e_u = network(x, t, null.expand(2, -1, -1), data["hint"])
        e_c = network(x, t, data["context"][:1].expand(2, -1, -1), data["hint"])
        torch.testing.assert_close(guided(x, t), e_u + 9 * (e_c - e_u), rtol=1e-4, atol=1e-4)


def test_a_batch_of_hints_is_its_hints_one_by_one():
    network, data = make(), inputs()
    guided = GuidedContext(2.0, torch.zeros(1, 5, 6), context=data["context"][:1])
    together = sampler(guided)(data["hint"], network, seeds=[4, 5])
    for b in range(2):
        alone = sampler(guided)(data["hint"][b : b + 1], network, seeds=[4 + b])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_pair_and_the_whole_condition_alike():
    network, data = make(), inputs()
    x, t = data["x"], data["timesteps"]
    whole = ControlNetHint(scale=0.5, context=data["context"])(network, data["hint"])(x, t)
    pair = ControlNetHint(network.controlnet, 0.5, data["context"])(network.unet, data["hint"])(x, t)
    assert torch.equal(whole, pair)
    # MONAI's ControlNet takes tokens too, and encodes the hint at every step.
    settings = {**SETTINGS, **TEXT}
    monais = shuffled(ControlNet(2, 2, **settings, **{**MONAI_STEM, "conditioning_embedding_num_channels": (4, 8)}))
    ours = shuffled(HintControlNet(2, 2, **settings, **MONAI_STEM))
    outs = [ControlNetHint(c, context=data["context"])(network.unet, data["hint"])(x, t) for c in (monais, ours)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("words", [False, True], ids=["tokens", "words"])
def test_a_batch_of_hints_and_contexts_is_its_cases_one_by_one(guidance, words):
    network, data = make(num_words=9), inputs()
    own = torch.tensor([[1, 8, 0, 2, 2], [3, 3, 2, 5, 7]]) if words else data["context"]
    guided = GuidedContext(guidance, torch.zeros_like(own[:1]), context=torch.ones_like(own[:1]))
    together = sampler(guided)(data["hint"], network, seeds=[4, 5], context=own)
    for b in range(2):
        alone = sampler(guided)(data["hint"][b : b + 1], network, seeds=[4 + b], context=own[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-4, atol=1e-4)
    default = sampler(guided)(data["hint"], network, seeds=[4, 5])
    assert (together - default).abs().max() > 1e-3
    named = GuidedContext(guidance, torch.zeros_like(own[:1]), context=own)
    assert torch.equal(sampler(named)(data["hint"], network, seeds=[4, 5]), together)


def test_the_pair_looks_words_up_as_the_whole_does():
    network, data, words = make(num_words=9), inputs(), torch.tensor([[1, 8, 0], [3, 3, 2]])
    x, t = data["x"], data["timesteps"]
    for adapter in (ControlNetHint, lambda c=None: GuidedContext(2.0, torch.zeros(1, 3, dtype=int), controlnet=c)):
        whole = adapter()(network, data["hint"], words)(x, t)
        assert torch.equal(whole, adapter(network.controlnet)(network.unet, data["hint"], words)(x, t))


def test_tokens_serve_all_cases_or_each_its_own():
    network, data = make(), inputs(n=3)
    with pytest.raises(ValueError, match="2 rows for 3 cases"):
        ControlNetHint(context=data["context"][:2])(network, data["hint"])(data["x"], data["timesteps"])


def test_guidance_without_both_contexts_is_refused():
    with pytest.raises(ValueError, match="give both"):
        GuidedContext(2.0, context=torch.zeros(1, 5, 6))
    network, data = make(), inputs()
    with pytest.raises(ValueError, match="needs a context"):
        GuidedContext(2.0, null_context=torch.zeros(1, 5, 6))(network, data["hint"])
