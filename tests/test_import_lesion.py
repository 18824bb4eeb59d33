"""LesionDiffusion's checkpoints by the bundle's rules: each file fills its networks, every key accounted for.

The files are written the other way round, from networks of ours; where parity data are present, the authors' weights
serve as well (see `test_parity`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_import_guidegen import below, dotless, lively, schedule
from test_ldm_layout import foreign, output_layout, same, unet_layout
from test_parity import (
    LESION_MASKS,
    LESION_PAINT,
    assert_near,
    lesion_checkpoint,
    lesion_condition,
    lesion_unet_settings,
    tensors,
)

from common.attribute_unet import AttributeUNet
from common.checkpoints import CheckpointError, Foreign, select
from common.codebook import CodebookAutoencoder
from tools import import_weights

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "lesion_diffusion"
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """A bundle puts itself first on the path: not beyond one test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


HEAD = 8
LEVELS = [(16, 1, False), (32, 1, True)]  # channels, residual blocks, attention
BUILDS = {"published, small": [(8, 2, False), (16, 2, False), (32, 2, True)], "attends twice": [(16, 1, True), *LEVELS]}
VAE: dict[str, Any] = {"channels": (16, 16), "encoder_blocks": (1, 4), "decoder_blocks": (2, 6), "num_codes": 20}


def unet(inputs: int, outputs: int, levels: list = LEVELS, seed: int = 0) -> AttributeUNet:
    channels, blocks, attention = zip(*levels, strict=True)
    network = AttributeUNet(
        3, inputs, outputs, channels=channels, num_res_blocks=blocks, attention_levels=attention,
        num_head_channels=HEAD, cross_attention_dim=12,
    )  # fmt: skip
    return lively(network, seed)


def unet_file(network: AttributeUNet, levels: list = LEVELS) -> Weights:
    """Their names; a plain GELU lies one place deeper than a gated one."""
    layers = [*unet_layout(levels), *output_layout(levels), ("context_linear_projection", "context_projection")]
    return {k.replace(".ff.net.0.proj.", ".ff.net.0.0."): v for k, v in foreign(network, layers).items()}


def vae_layout() -> Iterator[tuple[str, str]]:
    """Three levels of theirs, one block each, of which the first halves: two of ours."""
    encoder = ["conv_in", "down.0.block.0", "down.0.downsample", "down.1.block.0", "down.2.block.0", "mid.block_1",
               "mid.block_2", "norm_out", "", "conv_out"]  # fmt: skip
    decoder = ["conv_in", "mid.block_1", "mid.block_2", "up.2.block.0", "up.2.block.1", "up.1.block.0", "up.1.block.1",
               "up.1.upsample", "up.0.block.0", "up.0.block.1", "norm_out", "", "conv_out"]  # fmt: skip
    for side, names in (("encoder", encoder), ("decoder", decoder)):
        for n, name in enumerate(names):
            if name:
                ends = {"upsample": ".postconv.conv", "downsample": ".conv.conv"}.get(name.split(".")[-1], "")
                ours = f"{side}.blocks.{n}{ends or '.conv' * name.startswith('conv_')}"
                yield f"{side}.{name}{'.conv' * bool(ends)}", ours
    for name in ("quant_conv", "post_quant_conv"):
        yield name, f"{name}.conv"
    yield "quantize.embedding", "codebook"


def vae_file(autoencoder: CodebookAutoencoder) -> Weights:
    names = sorted(((ours, theirs) for theirs, ours in vae_layout()), key=lambda pair: -len(pair[0]))
    found = {}
    for key, value in autoencoder.state_dict().items():
        ours, theirs = next(pair for pair in names if key.startswith(f"{pair[0]}."))
        inner = key.removeprefix(f"{ours}.").replace("conv1.conv", "conv1").replace("conv2.conv", "conv2")
        found[f"{theirs}.{inner}"] = value
    discriminators = {"loss.ct_discriminator.model0.0.weight": torch.ones(2, 1, 4, 4, 4)}
    return found | discriminators | {"loss.frame_discriminator.model1.1.num_batches_tracked": torch.tensor(3)}


def vae(seed: int = 0) -> CodebookAutoencoder:
    return lively(CodebookAutoencoder(3, **VAE), seed)


def diffusion_file(network: AttributeUNet, levels: list = LEVELS) -> Weights:
    """A checkpoint as Lightning writes it, with averages, schedule and the frozen text encoder."""
    weights = below("model.", unet_file(network, levels))
    tower = {"cond_stage_model.model.proj.0.weight": torch.ones(3, 2)}
    return {**schedule(), **weights, **dotless(weights), **tower}


def read(state: Weights, part: str | None = None, **given: Any) -> tuple[Foreign, dict[str, Any]]:
    """What the bundle's rules make of a file, as tools/import_weights.py asks them."""
    content = {"state_dict": state, "epoch": 3, "global_step": 1234}
    known = [import_weights._chosen(rules, part) for rules in import_weights._rules(BUNDLE, "authors")]
    rules = import_weights._fitting(content, known)
    found = import_weights.READERS[rules["layout"]](select(content, rules)[0], rules, given)
    accounted = [key for part in found.parts.values() for key in part.keys]
    accounted += [key for keys in found.dropped.values() for key in keys if key not in set(accounted)]
    assert sorted(accounted) == sorted(state), "every key belongs to a part or is dropped for a reason"
    return found, rules


def filled(found: Foreign, component: str, network: torch.nn.Module) -> torch.nn.Module:
    network.load_state_dict(found.fill[component](network.state_dict()))
    return network.eval()


def halved(network: torch.nn.Module) -> Weights:
    return {k: v / 2 for k, v in network.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# What is taken


@pytest.mark.parametrize("levels", BUILDS.values(), ids=BUILDS)
def test_a_network_of_any_build_comes_back_and_tells_its_size(levels):
    theirs = unet(4, 1, levels)
    found, rules = read(diffusion_file(theirs, levels), mask_head_channels=HEAD)
    assert set(found.fill) == {"mask_network_def"}
    channels, blocks, attention = (list(part) for part in zip(*levels, strict=True))
    expected = {
        "mask_channels": channels, "mask_attention_levels": attention, "mask_num_res_blocks": blocks[0],
        "mask_head_channels": HEAD, "token_width": 12, "null_token": False, "summary_width": 0, "mask_range": [0, 1],
        "mask_prediction_type": "epsilon", "num_train_timesteps": 20, "beta_start": 0.002, "beta_end": 0.02,
    }  # fmt: skip
    assert {k: found.knobs[k] for k in expected} == expected
    ours = filled(found, "mask_network_def", unet(4, 1, levels, seed=5))
    assert same(ours.state_dict(), halved(theirs)), "averages are taken"
    assert rules["overlays"] == ["configs/paper.json"]


def test_weights_or_averages_as_asked_for_and_weights_where_there_are_no_averages():
    theirs = unet(4, 1)
    content = diffusion_file(theirs)
    for part, expected in ((None, halved(theirs)), ("model_ema", halved(theirs)), ("model", theirs.state_dict())):
        found, _ = read(content, part)
        assert same(found.fill["mask_network_def"](theirs.state_dict()), expected)
        assert found.knobs["mask_head_channels"] == 32
        assert any("--mask_head_channels, 32 is taken as published" in note for note in found.notes)
    alone = {k: v for k, v in content.items() if not k.startswith("model_ema.")}
    found, _ = read(alone)
    assert same(found.fill["mask_network_def"](theirs.state_dict()), theirs.state_dict())
    assert "the file has no averages of the weights: the weights themselves are taken" in found.notes
    count = len(unet_file(theirs))
    found, _ = read(content)
    reasons = {reason.split(":")[0]: len(keys) for reason, keys in found.dropped.items()}
    assert reasons == {
        "the weights themselves": count, "counters of the averages": 2, "text encoder": 1,
        "schedule table, computed anew in float64 by common/schedules.py": 4,
    }  # fmt: skip


def test_the_painter_comes_with_its_autoencoder():
    theirs, image = unet(5, 5), vae(seed=3)
    found, _ = read({**diffusion_file(theirs), **below("first_stage_model.", vae_file(image))}, head_channels=HEAD)
    assert {name: part.component for name, part in found.parts.items()} == {
        "network": "network_def", "autoencoder": "autoencoder_def"
    }  # fmt: skip
    expected = {
        "channels": [16, 32], "attention_levels": [False, True], "num_res_blocks": 1, "head_channels": HEAD,
        "token_width": 12, "autoencoder_channels": [16, 16], "encoder_blocks": [1, 4], "decoder_blocks": [2, 6],
        "autoencoder_groups": 16, "latent_channels": 4, "num_codes": 20, "prediction_type": "epsilon",
        "null_token": False, "summary_width": 0,
    }  # fmt: skip
    assert {k: found.knobs[k] for k in expected} == expected
    assert same(found.fill["network_def"](theirs.state_dict()), halved(theirs))
    knobs = found.knobs
    ours = CodebookAutoencoder(
        3, channels=knobs["autoencoder_channels"], encoder_blocks=knobs["encoder_blocks"],
        decoder_blocks=knobs["decoder_blocks"], latent_channels=knobs["latent_channels"],
        num_codes=knobs["num_codes"], norm_num_groups=knobs["autoencoder_groups"],
    )  # fmt: skip
    assert same(filled(found, "autoencoder_def", ours).state_dict(), image.state_dict())
    found, _ = read(diffusion_file(theirs))
    assert set(found.fill) == {"network_def"}
    assert "no autoencoder in the file: import VQ.ckpt into the same folder as well" in found.notes
    assert found.knobs["latent_channels"] == 4


def test_an_autoencoder_alone():
    theirs = vae()
    found, _ = read(vae_file(theirs))
    assert set(found.fill) == {"autoencoder_def"}
    assert same(found.fill["autoencoder_def"](theirs.state_dict()), theirs.state_dict())
    assert [len(keys) for keys in found.dropped.values()] == [2]
    assert any("16 is taken as published" in note for note in found.notes)


def test_all_three_files_through_the_command_line(tmp_path, capsys):
    """Each becomes what the bundle's config names, and one command runs them together."""
    masks, painter, image = unet(4, 1), unet(5, 5, seed=1), vae(seed=3)
    whole = {**diffusion_file(painter), **below("first_stage_model.", vae_file(image))}
    files = {"LMNet": diffusion_file(masks), "LINet": whole, "VQ": vae_file(image)}
    for name, state in files.items():
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": state, "global_step": 1234}, path)
        heads = [] if name == "VQ" else [f"--{'mask_' * (name == 'LMNet')}head_channels", str(HEAD)]
        assert import_weights.main(["lesion_diffusion", str(path), "--output", str(tmp_path / "out"), *heads]) == 0
    for name, expected in (("mask", halved(masks)), ("model", halved(painter)), ("autoencoder", image.state_dict())):
        assert same(torch.load(tmp_path / f"out/{name}.pt", weights_only=True), expected)
        assert json.loads((tmp_path / f"out/{name}.json").read_text())["overlays"] == ["configs/paper.json"]
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Now run:")][-1:]
    assert all(f"imported{name}.json" in command for name in ("", "_mask", "_autoencoder"))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_half_a_file_is_refused_by_name():
    content = diffusion_file(unet(4, 1))
    averages = {k: v for k, v in content.items() if k.startswith("model_ema.")}
    with pytest.raises(CheckpointError, match="averages alone, whose names have lost their dots"):
        read(averages)
    tower = {k: v for k, v in content.items() if k.startswith("cond_stage_model.")}
    with pytest.raises(CheckpointError, match="the text encoder alone, the frozen BiomedCLIP"):
        read(tower)
    with pytest.raises(CheckpointError, match="none of the bundle's rules fits the file"):
        read({"encoder.blocks.0.weight": torch.ones(2)})


def test_a_lost_average_a_stray_key_and_another_width_are_named():
    theirs = unet(4, 1)
    content = diffusion_file(theirs)
    lost = {k: v for k, v in content.items() if k != "model_ema.out2bias"}
    with pytest.raises(CheckpointError, match=r"1 weights have no average under model_ema\. \(model\.out\.2\.bias\)"):
        read(lost)
    with pytest.raises(CheckpointError, match=r"1 keys belong to no network of the bundle \(diffusion\.weight\)"):
        read({**content, "diffusion.weight": torch.ones(1)})
    found, _ = read(content)
    with pytest.raises(CheckpointError, match="of another shape"):
        found.fill["mask_network_def"](unet(4, 1, [(8, 1, False), (32, 1, True)]).state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# The authors' weights


@pytest.mark.parametrize("name", [*LESION_MASKS, *LESION_PAINT])
def test_the_authors_weights_through_the_bundles_rules(name):
    """One checkpoint, which these data hold in two files; averages are taken."""
    data, content = tensors("lesion_diffusion", name), lesion_checkpoint(name)
    paints = "linet" in name
    kind = "" if paints else "mask_"
    found, _ = read(content, **{f"{kind}head_channels": lesion_unet_settings(name)["num_head_channels"]})
    knobs, condition = found.knobs, data["mask" if paints else "cond"]
    channels = (data["x_t"].shape[1] + condition.shape[1], data["out" if paints else "eps"].shape[1])
    network = AttributeUNet(
        condition.ndim - 2, *channels, channels=knobs[f"{kind}channels"], cross_attention_dim=knobs["token_width"],
        attention_levels=knobs[f"{kind}attention_levels"], num_res_blocks=knobs[f"{kind}num_res_blocks"],
        num_head_channels=knobs[f"{kind}head_channels"],
    )  # fmt: skip
    denoise = lesion_condition(name)(filled(found, f"{kind}network_def", network), condition, data["context"])
    with torch.no_grad():
        assert_near(denoise(data["x_t"], data["t"]), data["out_ema" if paints else "eps_ema"], 2e-5)
    assert "autoencoder_def" in found.fill or not paints
