"""Laws of the latent-diffusion layout: for any build every key has its place, and the file tells the network's size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from common.autoencoder import LDMAutoencoder
from common.checkpoints import CheckpointError, read_knobs, read_weights, translate
from common.controlnet import ControlledUNet, DenseHintInput, HintControlNet
from common.ldm_layout import AUTOENCODER, CONTROLNET, PREFIXES, UNET, controlled_from_ldm, parts
from common.unet import DiffusionUNet

# levels as (channels, residual blocks, attention)
BUILDS = {
    "one level": [(32, 1, True)],
    "Stable Diffusion's, small": [(32, 2, True), (64, 2, True), (96, 2, True), (96, 2, False)],
    "uneven": [(32, 1, False), (64, 3, True), (32, 2, False)],
    "last level attends": [(32, 2, False), (64, 1, True)],
}
builds = pytest.mark.parametrize("levels", BUILDS.values(), ids=BUILDS)
Layer = tuple[str, str]


def unet_layout(levels: list) -> Iterator[Layer]:
    """Pairs (their prefix, our prefix) of whole modules, walked as latent diffusion builds them."""
    yield "input_blocks.0.0", "conv_in.conv"
    n = 0
    for i, (_, blocks, attention) in enumerate(levels):
        for j in range(blocks):
            n += 1
            yield f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}"
            if attention:
                yield f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}"
        if i + 1 < len(levels):
            n += 1
            yield f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsampler.op.conv"
    for k, name in enumerate(("resnet_1", "attention", "resnet_2")):
        yield f"middle_block.{k}", f"middle_block.{name}"


def output_layout(levels: list) -> Iterator[Layer]:
    n = 0
    for u, (_, blocks, attention) in enumerate(reversed(levels)):
        for j in range(blocks + 1):
            yield f"output_blocks.{n}.0", f"up_blocks.{u}.resnets.{j}"
            if attention:
                yield f"output_blocks.{n}.1", f"up_blocks.{u}.attentions.{j}"
            if j == blocks and u + 1 < len(levels):
                yield f"output_blocks.{n}.{1 + attention}.conv", f"up_blocks.{u}.upsampler.postconv.conv"
            n += 1
    yield "out.0", "out.0"
    yield "out.2", "out.2.conv"


INNER = {
    "norm1": "in_layers.0", "conv1.conv": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2.conv": "out_layers.3", "skip_connection.conv": "skip_connection", "proj_in.conv": "proj_in",
    "proj_out.conv": "proj_out",
}  # fmt: skip


def foreign(network: torch.nn.Module, layers: list[Layer]) -> dict[str, torch.Tensor]:
    """The network's weights under their names, written the other way round than the rules: from ours to theirs."""
    result = {}
    for key, value in network.state_dict().items():
        fits = [(a, b) for a, b in layers if key.startswith(f"{b}.")]
        theirs, ours = max(fits, key=lambda pair: len(pair[1]), default=("", ""))
        rest = key.removeprefix(f"{ours}.") if fits else key
        inner = next((i for i in INNER if rest.startswith(f"{i}.") and "transformer_blocks" not in rest), None)
        rest = rest.replace(inner, INNER[inner], 1) if inner else rest
        rest = (
            rest.replace("out_proj", "to_out.0")
            .replace("ff.linear1", "ff.net.0.proj")
            .replace("ff.linear2", "ff.net.2")
        )
        result[f"{theirs}.{rest}" if theirs else rest] = value
    assert len(result) == len(network.state_dict())
    return result


def shuffled(network: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return network


def settings(levels: list) -> dict:
    channels, blocks, attention = zip(*levels, strict=True)
    heads = [c // 8 for c in channels]
    return {"channels": channels, "num_res_blocks": blocks, "attention_levels": attention, "num_head_channels": heads,
            "with_conditioning": True, "cross_attention_dim": 6, "transformer_num_layers": 2, "norm_eps": 1e-5,
            "transformer_norm_eps": 1e-6}  # fmt: skip


def control_layout(levels: list, dense: bool, merges: int) -> list[Layer]:
    skips = sum(blocks for _, blocks, _ in levels) + len(levels)
    layers = [("zero_convs.0.0", "controlnet_down_blocks.0"), ("middle_block_out.0", "controlnet_mid_block.conv")]
    layers += [(f"zero_convs.{k}.0", f"controlnet_down_blocks.{k}.conv") for k in range(1, skips)]
    stem = "controlnet_cond_embedding"
    if not dense:
        layers += [("input_hint_block.0", f"{stem}.conv_in.conv"), ("input_hint_block.14", f"{stem}.conv_out.conv")]
        return layers + [(f"input_hint_block.{2 * k + 2}", f"{stem}.blocks.{k}.conv") for k in range(6)]
    block = "input_hint_block.0"
    layers += [("input_hint_block.1", f"{stem}.conv_out.conv"), (f"{block}.initial_conv", f"{stem}.convs.0.conv")]
    layers += [(f"{block}.conv_before_res{k + 1}", f"{stem}.convs.{k}.conv") for k in range(1, merges + 2)]
    for k in range(merges + 2):
        layers += [(f"{block}.layer{k + 1}.conv{n + 1}", f"{stem}.units.{k}.conv.unit{n}.conv") for n in (0, 1)]
    return layers + [(f"{block}.patch_merge{k + 1}", f"{stem}.merges.{k}") for k in range(merges)]


def make_control(levels: list, dense: bool, merges: int) -> HintControlNet:
    stem = DenseHintInput(2, 3, levels[0][0], merges, width=4) if dense else None
    return shuffled(HintControlNet(2, 4, stem=stem, conditioning_embedding_in_channels=3, **settings(levels)))


def same(ours: dict, theirs: dict) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def plain(knobs: dict) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in knobs.items()}


@builds
def test_a_unet_of_any_build_comes_back_and_tells_its_size(levels):
    network = shuffled(DiffusionUNet(2, 4, 4, **settings(levels)))
    theirs = foreign(network, [*unet_layout(levels), *output_layout(levels)])
    assert same(translate(theirs, UNET, network.state_dict()), network.state_dict())
    knobs, expected = read_knobs(theirs, UNET), plain({**settings(levels), "in_channels": 4, "out_channels": 4})
    if len(set(expected["num_res_blocks"])) == 1:
        expected["num_res_blocks"] = expected["num_res_blocks"][0]
    assert {k: v for k, v in knobs.items() if k != "norm_num_groups"} == expected
    assert DiffusionUNet(2, **knobs).load_state_dict(network.state_dict())


@builds
@pytest.mark.parametrize(("dense", "merges"), [(False, 3), (True, 0), (True, 3)], ids=["original", "pixels", "dense"])
def test_a_controlnet_of_any_build_comes_back_and_tells_its_stem(levels, dense, merges):
    network = make_control(levels, dense, merges)
    theirs = foreign(network, [*unet_layout(levels), *control_layout(levels, dense, merges)])
    assert same(translate(theirs, CONTROLNET, network.state_dict()), network.state_dict())
    knobs = read_knobs(theirs, CONTROLNET)
    assert (knobs["dense_hint"], knobs["hint_channels"]) == (dense, 3)
    assert knobs["num_merges"] == (merges if dense else 0)


def vae_layout(channels: tuple, blocks: int, attention: tuple) -> Iterator[Layer]:
    n = 0
    yield "encoder.conv_in", "encoder.blocks.0.conv"
    for i in range(len(channels)):
        for j in range(blocks):
            n += 1
            yield f"encoder.down.{i}.block.{j}", f"encoder.blocks.{n}"
            if attention[i]:
                n += 1
                yield f"encoder.down.{i}.attn.{j}", f"encoder.blocks.{n}"
        if i + 1 < len(channels):
            n += 1
            yield f"encoder.down.{i}.downsample.conv", f"encoder.blocks.{n}.conv.conv"
    for k, name in enumerate(("mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", None, "conv_out"), 1):
        if name is not None:
            yield f"encoder.{name}", f"encoder.blocks.{n + k}" + ".conv" * (name == "conv_out")
    yield "decoder.conv_in", "decoder.blocks.0.conv"
    for k, name in enumerate(("mid.block_1", "mid.attn_1", "mid.block_2"), 1):
        yield f"decoder.{name}", f"decoder.blocks.{k}"
    n = 3
    for i in reversed(range(len(channels))):
        for j in range(blocks + 1):
            n += 1
            yield f"decoder.up.{i}.block.{j}", f"decoder.blocks.{n}"
            if attention[i]:
                n += 1
                yield f"decoder.up.{i}.attn.{j}", f"decoder.blocks.{n}"
        if i:
            n += 1
            yield f"decoder.up.{i}.upsample.conv", f"decoder.blocks.{n}.postconv.conv"
    yield "decoder.norm_out", f"decoder.blocks.{n + 1}"
    yield "decoder.conv_out", f"decoder.blocks.{n + 3}.conv"
    yield "post_quant_conv", "post_quant_conv.conv"


def foreign_vae(network: LDMAutoencoder, channels: tuple, blocks: int, attention: tuple) -> dict[str, torch.Tensor]:
    layers, theirs = list(vae_layout(channels, blocks, attention)), {}
    for key, value in network.state_dict().items():
        if key.startswith("quant_conv"):
            continue
        a, b = max((pair for pair in layers if key.startswith(f"{pair[1]}.")), key=lambda pair: len(pair[1]))
        rest = key.removeprefix(f"{b}.")
        if ".attn.to_" in key or ".attn.out_proj" in key:
            value = value[..., None, None] if value.ndim == 2 else value
        for ours, other in {
            "attn.to_": "",
            "attn.out_proj": "proj_out",
            "1.conv.": "1.",
            "2.conv.": "2.",
            "cut.conv": "cut",
        }.items():
            rest = rest.replace(ours, other)
        theirs[f"{a}.{rest}"] = value
    for name in ("weight", "bias"):
        halves = [network.state_dict()[f"quant_conv_{part}.conv.{name}"] for part in ("mu", "log_sigma")]
        theirs[f"quant_conv.{name}"] = torch.cat(halves)
    return theirs


@pytest.mark.parametrize("attention", [(False, False, False), (False, True, True)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_an_autoencoder_of_any_build_comes_back(blocks, attention):
    channels = (32, 32, 64)
    network = shuffled(LDMAutoencoder(2, channels=channels, num_res_blocks=blocks, attention_levels=attention))
    theirs = foreign_vae(network, channels, blocks, attention)
    assert same(translate(theirs, AUTOENCODER, network.state_dict()), network.state_dict())
    knobs = read_knobs(theirs, AUTOENCODER)
    assert knobs["attention_levels"] == list(attention)
    assert LDMAutoencoder(2, **knobs).load_state_dict(network.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Merged checkpoints

LEVELS = BUILDS["uneven"]


def merged(network: ControlledUNet, levels: list = LEVELS) -> dict[str, torch.Tensor]:
    unet = foreign(network.unet, [*unet_layout(levels), *output_layout(levels)])
    control = foreign(network.controlnet, [*unet_layout(levels), *control_layout(levels, True, 1)])
    return {
        **{PREFIXES["unet"] + k: v for k, v in unet.items()},
        **{PREFIXES["controlnet"] + k: v for k, v in control.items()},
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77),
        "model_ema.decay": torch.tensor(0.9),
        **{k: torch.zeros(10) for k in ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar",
                                        "log_one_minus_alphas_cumprod", "posterior_mean_coef1")},
    }  # fmt: skip


def make_pair() -> ControlledUNet:
    return ControlledUNet(shuffled(DiffusionUNet(2, 4, 4, **settings(LEVELS))), make_control(LEVELS, True, 1))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_merged_file_fills_both_networks(wrapped):
    network = make_pair()
    content = {"state_dict": merged(network), "epoch": 3} if wrapped else merged(network)
    assert set(parts(content)) == {"unet", "controlnet"}
    filled = controlled_from_ldm(content, network.state_dict())
    assert same(dict(sorted(filled.items())), dict(sorted(network.state_dict().items())))


def test_plain_stable_diffusion_starts_the_controlnet_as_the_unets_encoder():
    network = make_pair()
    content = {k: v for k, v in merged(network).items() if not k.startswith(PREFIXES["controlnet"])}
    fresh = ControlledUNet(network.unet, HintControlNet(2, 4, stem=DenseHintInput(2, 3, 32, 1, 4), **settings(LEVELS)))
    fresh.load_state_dict(controlled_from_ldm(content, fresh.state_dict()))
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 6)
    assert torch.equal(fresh(x, t, context, torch.rand(1, 3, 16, 16)), network.unet(x, t, context))
    assert torch.equal(fresh.controlnet.conv_in.conv.weight, network.unet.conv_in.conv.weight)


def test_safetensors_serve_as_well(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    network = make_pair()
    save_file({k: v.contiguous().clone() for k, v in merged(network).items()}, tmp_path / "model.safetensors")
    filled = controlled_from_ldm(read_weights(tmp_path / "model.safetensors"), network.state_dict())
    assert all(torch.equal(filled[k], v) for k, v in network.state_dict().items())


def test_nothing_passes_silently():
    network = make_pair()
    content = merged(network)
    with pytest.raises(CheckpointError, match="surprise"):
        parts({**content, "surprise.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no part"):
        parts({k: v for k, v in content.items() if not k.startswith(("model.", "control_model."))})
    with pytest.raises(CheckpointError, match="no U-Net"):
        controlled_from_ldm({k: v for k, v in content.items() if "control_model" in k}, network.state_dict())
    missing = {k: v for k, v in content.items() if k != f"{PREFIXES['unet']}out.2.bias"}
    with pytest.raises(CheckpointError, match=r"missing \(out\.2\.conv\.bias\)"):
        controlled_from_ldm(missing, network.state_dict())
