"""GuideGen's kinds of checkpoints through the command line: each fills its part of the bundle, or is refused by name.

The files are written the other way round, from networks of ours that see volumes in the authors' order of axes, slices
first; where parity data are present, the authors' weights and numbers serve as well (see `test_parity`).
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import normal, run_command
from monai.bundle import ConfigParser
from test_ldm_layout import builds, foreign, foreign_vae, output_layout, same, unet_layout
from test_parity import (
    GUIDEGEN_MASKS,
    GUIDEGEN_SLICES,
    Replay,
    assert_near,
    assert_near_relative,
    files_of_set,
    guidegen_stage_2,
    numbers,
    parity_file,
    settings,
    tensors,
)

from common.autoencoder import LDMAutoencoder
from common.categorical import CategoricalScheduler
from common.checkpoints import read_knobs, translate
from common.ldm_layout import PLAIN_UNET
from common.slices import to_unit_range
from common.unet import DiffusionUNet
from tools import import_weights
from tools.import_weights import import_components, main

REPO = Path(__file__).resolve().parents[1]
BUNDLE = REPO / "bundles" / "guidegen"
LEVELS = [(32, 1, False), (64, 1, True)]  # channels, residual blocks, attention
VAE = ((32, 32), 1, (False, True))
HEAD = 16
KEPT = ["channels", "num_res_blocks", "attention_levels"]
Weights = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Files as the authors write them


def unet(dims: int, inputs: int, outputs: int, levels: list = LEVELS, head: int = HEAD, seed: int = 0) -> DiffusionUNet:
    channels, blocks, attention = zip(*levels, strict=True)
    network = DiffusionUNet(
        dims, inputs, outputs, channels=channels, num_res_blocks=blocks, attention_levels=attention, norm_eps=1e-5,
        num_head_channels=[min(head, c) for c in channels],
    )  # fmt: skip
    return lively(network, seed)


def lively(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights in float16's numbers, of a size that keeps the signal's; no zero convolutions."""
    if next(network.parameters()).device.type == "meta":
        return network.eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 100
        parameter.data = torch.randn(parameter.shape, generator=generator).div(fan**0.5).half().float()
    return network.eval()


def unet_file(network: DiffusionUNet, levels: list = LEVELS, head: int = HEAD) -> Weights:
    """Their names: plain attention has one projection, whose rows lie head by head."""
    state = foreign(network, [*unet_layout(levels), *output_layout(levels)])
    found = {}
    for key, value in state.items():
        if ".attn.to_q." in key:
            rows = [state[key.replace("to_q", f"to_{part}")] for part in "qkv"]
            heads = max(1, len(value) // head)
            joined = torch.stack([part.unflatten(0, (heads, -1)) for part in rows], dim=1).flatten(0, 2)
            found[key.replace("attn.to_q", "qkv")] = joined[..., None] if joined.ndim == 2 else joined
        elif ".attn.to_out.0." in key:
            found[key.replace("attn.to_out.0", "proj_out")] = value[..., None] if value.ndim == 2 else value
        elif ".attn.to_" not in key:
            found[key] = value
    return found


def below(prefix: str, state: Weights) -> Weights:
    return {prefix + key: value for key, value in state.items()}


def dotless(state: Weights) -> Weights:
    """Averages as Lightning files have them: half of the weights, so that they can be told apart."""
    averages = {"model_ema." + k.removeprefix("model.").replace(".", ""): v / 2 for k, v in state.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3, dtype=torch.int32)}
    return averages | counters


def schedule(steps: int = 20) -> Weights:
    betas = torch.linspace(0.002**0.5, 0.02**0.5, steps).square()
    return {name: betas for name in ("betas", "alphas_cumprod_prev", "posterior_mean_coef1", "logvar")}


def vae(channels: int, seed: int = 0) -> LDMAutoencoder:
    return lively(
        LDMAutoencoder(2, channels, channels, channels=VAE[0], num_res_blocks=VAE[1], attention_levels=VAE[2]), seed
    )


def pixel_file(network: DiffusionUNet) -> Weights:
    weights = below("model.diffusion_model.", unet_file(network))
    return {**weights, **dotless(weights), **schedule()}


def latent_file(network: DiffusionUNet, image: LDMAutoencoder | None, pair: LDMAutoencoder | None) -> Weights:
    content = pixel_file(network)
    for prefix, autoencoder in (("first_stage_model.", image), ("cond_stage_model.", pair)):
        if autoencoder is not None:
            content |= below(prefix, foreign_vae(autoencoder, *VAE))
    return content


def saved(content: Any, folder: Path, name: str = "file.ckpt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def lightning(content: Weights, folder: Path) -> Path:
    return saved({"state_dict": content, "global_step": 1234, "epoch": 1}, folder)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Their volumes (..., k, i, j) or slices (..., j, i) with our axes, and slices back."""
    return x.movedim(2, -1) if x.ndim == 5 else x.mT


def imported(path: Path, out: Path, *knobs: str) -> None:
    assert main(["guidegen", str(path), "--output", str(out), *knobs]) == 0


def configured(out: Path, names: tuple[str, ...] = ("imported",), **knobs: Any) -> ConfigParser:
    """The config that the told command runs."""
    cards = [out / f"{name.replace('imported_', '').replace('imported', 'model')}.json" for name in names]
    overlays = [overlay for card in cards for overlay in json.loads(card.read_text())["overlays"]]
    parser = ConfigParser()
    files = [BUNDLE / "configs/inference.json", *(BUNDLE / name for name in dict.fromkeys(overlays))]
    parser.read_config([str(file) for file in [*files, *(out / f"{name}.json" for name in names)]])
    parser["bundle_root"], parser["device"] = str(BUNDLE), "cpu"
    parser.update(knobs)
    return parser


def network_of(parser: ConfigParser, component: str, weights: Path) -> torch.nn.Module:
    network = parser.get_parsed_content(component)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


# ---------------------------------------------------------------------------------------------------------------------
# What is taken


@pytest.mark.parametrize("blank", [1, 0])
def test_a_first_stage_fills_the_mask_network_and_sees_volumes_in_our_axes(tmp_path, blank):
    theirs, average = (unet(3, 4 + blank, 4, seed=seed) for seed in (1, 2))
    entries = {"model": unet_file(theirs), "average_model": unet_file(average), "optimizer": {"lr": 0.1}, "engine": {}}
    path = saved(entries | {"feature_cond_encoder": {"transformer_blocks.0.norm1.weight": torch.ones(2)}}, tmp_path)
    x, t = normal(2, 4 + blank, 4, 8, 6), torch.tensor([3, 77])
    for knobs, network in (((), average), (("--select", "model"), theirs)):
        imported(path, tmp_path / "out", "--mask_head_channels", str(HEAD), *knobs)
        parser = configured(tmp_path / "out", ("imported_mask",))
        ours = network_of(parser, "mask_network_def", tmp_path / "out/mask.pt")
        with torch.no_grad():
            assert_near(ours(turned(x), t), turned(network(x, t)), 1e-5)
    card = json.loads((tmp_path / "out/mask.json").read_text())
    assert (card["part"], card["keys"]["dropped"]) == ("model", {})
    assert set(card["not_imported"]) == {"average_model", "optimizer", "engine", "feature_cond_encoder"}
    assert card["keys"]["in_file"] == card["keys"]["used"] == len(unet_file(theirs))
    assert card["weights_sha256"]
    expected = {
        "num_classes": 4, "mask_channels": [32, 64], "mask_attention_levels": [False, True],
        "mask_num_res_blocks": 1, "mask_norm_num_groups": 32, "mask_head_channels": HEAD,
        "mask_blank_channels": blank, "mask_text": False, "mask_patch_size": 1, "mask_mode": "ccdm_v1",
    }  # fmt: skip
    assert {k: card["knobs"][k] for k in expected} == expected
    assert not (tmp_path / "out/model.pt").exists()
    # Its starter weights must not come between.
    assert parser.get_parsed_content("mask_weights") == str(tmp_path / "out/mask.pt")
    assert parser.get_parsed_content("mask_network").state_dict().keys() == ours.state_dict().keys()


@builds
@pytest.mark.parametrize("dims", [2, 3])
def test_a_plain_unet_of_any_build_comes_back_and_tells_its_size(levels, dims):
    network = unet(dims, 4, 3, levels)
    content, rules = unet_file(network, levels), {**PLAIN_UNET}
    rules["constants"] = {**PLAIN_UNET["constants"], "head_channels": HEAD}
    assert same(translate(content, rules, network.state_dict()), network.state_dict())
    again = DiffusionUNet(dims, **read_knobs(content, rules))
    again.load_state_dict(network.state_dict())
    x = normal(1, 4, *[8] * dims)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), network(x))


@pytest.mark.parametrize("select", [None, "model_ema", "model"])
def test_a_second_stage_on_pixels(tmp_path, select):
    theirs = unet(2, 3, 1)
    path, knobs = lightning(pixel_file(theirs), tmp_path), ["--head_channels", str(HEAD)]
    imported(path, tmp_path / "out", *knobs, *([] if select is None else ["--select", select]))
    parser = configured(tmp_path / "out")
    ours = network_of(parser, "network_def", tmp_path / "out/model.pt")
    if select != "model":
        for parameter in theirs.parameters():
            parameter.data /= 2
    x, t = normal(2, 3, 8, 12), torch.tensor([3, 17])
    with torch.no_grad():
        assert_near(ours(turned(x), t), turned(theirs(x, t)), 1e-5)
    card = json.loads((tmp_path / "out/model.json").read_text())
    keys, count = card["keys"], len(unet_file(theirs))
    assert keys["in_file"] == len(pixel_file(theirs)) == 2 * count + 2 + 4
    dropped = {reason.split()[0]: entry["count"] for reason, entry in keys["dropped"].items()}
    own = {"averages": count + 2} if select == "model" else {"the": count, "counters": 2}
    assert dropped == {**own, "schedule": 4}
    assert keys["used"] == count == keys["in_file"] - sum(dropped.values())
    assert card["step"] == 1234
    expected = {"num_train_timesteps": 20, "beta_start": 0.002, "beta_end": 0.02, "prediction_type": "epsilon"}
    assert {k: card["knobs"][k] for k in expected} == expected
    assert card["overlays"] == ["configs/pixel.json", "configs/paper_pixel.json"]


def test_without_averages_the_weights_are_taken_and_it_says_so(tmp_path, capsys):
    content = {k: v for k, v in pixel_file(unet(2, 3, 1)).items() if not k.startswith("model_ema.")}
    components, card = import_components(BUNDLE, saved(content, tmp_path), head_channels=HEAD)
    assert "the file has no averages of the weights: the weights themselves are taken" in card["notes"]
    x = normal(1, 3, 8, 8)
    with torch.no_grad():
        assert_near(components["network_def"](turned(x)), turned(unet(2, 3, 1)(x)), 1e-5)
    path = saved(content, tmp_path)
    refused(path, "have no average under model_ema.", tmp_path, capsys, "--select", "model_ema")


def test_a_second_stage_in_latents_with_both_autoencoders(tmp_path):
    theirs, image, pair = unet(2, 8, 4), vae(1, seed=3), vae(2, seed=4)
    imported(lightning(latent_file(theirs, image, pair), tmp_path), tmp_path / "out", "--head_channels", str(HEAD))
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["autoencoder.pt", "imported.json", "model.json", "model.pt", "pair_autoencoder.pt"]
    card = json.loads((tmp_path / "out/model.json").read_text())
    assert {k: v["fills"] for k, v in card["keys"]["parts"].items()} == {
        "unet": "network_def", "autoencoder": "autoencoder_def", "pair_autoencoder": "pair_autoencoder_def"
    }  # fmt: skip
    assert [note for note in card["notes"] if "axcodes" not in note] == []
    size = [8, 12]
    parser = configured(tmp_path / "out", image_size=size[::-1], num_inference_steps=2)
    slices = normal(2, 1, *size).sigmoid()
    latents, pairs = (parser.get_parsed_content(name) for name in ("latents", "slice_condition"))
    with torch.no_grad():
        assert_near(latents.moments(turned(slices))[0], turned(image.encode(slices)[0]), 1e-5)
        assert_near(latents.decode(turned(normal(1, 4, 4, 6))), turned(image.decode(normal(1, 4, 4, 6))), 1e-5)
        told = pairs.pairs.moments(turned(torch.cat([slices, slices], dim=1)))[0]
        assert_near(told, turned(pair.encode(torch.cat([slices, slices], dim=1))[0]), 1e-5)
    # The whole sampler of that config runs.
    network = network_of(parser, "network_def", tmp_path / "out/model.pt")
    layout = torch.zeros(1, 1, 12, 8, 3)
    layout[..., 3:9, 2:6, 1:] = 4
    volume = parser.get_parsed_content("sampler")(layout, network, seeds=[1])
    assert volume.shape == layout.shape
    assert volume.isfinite().all()
    assert volume[..., 1:].std() > 0


def test_autoencoders_may_come_in_files_of_their_own(tmp_path, capsys):
    """In any order; the command tells of all that lies in the folder."""
    out, head = tmp_path / "out", ("--head_channels", str(HEAD))
    disturb = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(1, 1, 4, 4)}
    imported(saved({"state_dict": foreign_vae(vae(1), *VAE) | disturb}, tmp_path), out)
    told = capsys.readouterr().out
    assert "Now run" not in told
    assert "2 dropped" in told
    imported(lightning(latent_file(unet(2, 8, 4), None, None), tmp_path), out, *head)
    told = capsys.readouterr().out
    assert "no autoencoder of the image in the file" in told
    assert "no autoencoder of the condition in the file" in told
    imported(saved(foreign_vae(vae(2), *VAE), tmp_path), out)
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Now run:")]
    files = json.loads(shlex.split(command)[shlex.split(command).index("--config_file") + 1].replace("'", '"'))
    overlays = ["imported.json", "imported_autoencoder.json", "imported_pair_autoencoder.json"]
    assert files == ["configs/inference.json", "configs/paper.json", *(str(out / name) for name in overlays)]
    parser = configured(out, ("imported", "imported_autoencoder", "imported_pair_autoencoder"), image_size=[8, 8])
    whole, x = vae(2), normal(1, 2, 8, 8)
    with torch.no_grad():
        told = parser.get_parsed_content("slice_condition").pairs.moments(turned(x))[0]
        assert_near(told, turned(whole.encode(x)[0]), 1e-5)
    assert json.loads((out / "pair_autoencoder.json").read_text())["weights_sha256"]


def test_an_import_of_another_variant_stays_out_of_the_command(tmp_path, capsys):
    imported(saved(foreign_vae(vae(2), *VAE), tmp_path), tmp_path / "out")
    imported(lightning(pixel_file(unet(2, 3, 1)), tmp_path), tmp_path / "out", "--head_channels", str(HEAD))
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Now run:")]
    assert "imported.json" in command
    assert "pair_autoencoder" not in command


def test_the_width_of_a_head_is_assumed_aloud_and_the_users_wins(tmp_path):
    path = saved({"average_model": unet_file(unet(3, 5, 4))}, tmp_path)
    (assumed, told), (given, silent) = (
        import_components(BUNDLE, path, **knobs) for knobs in ({}, {"mask_head_channels": HEAD})
    )
    assert "unet: the weights do not tell --mask_head_channels, 32 is taken as published" in told["notes"]
    assert not [note for note in silent["notes"] if "head" in note]
    assert (told["knobs"]["mask_head_channels"], silent["knobs"]["mask_head_channels"]) == (32, HEAD)
    x = normal(1, 4, 8, 8, 4)
    with torch.no_grad():
        a, b = (components["mask_network_def"](x) for components in (assumed, given))
    assert (a - b).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refused(path: Path, message: str, folder: Path, capsys: pytest.CaptureFixture, *knobs: str) -> None:
    capsys.readouterr()
    assert main(["guidegen", str(path), "--output", str(folder / "refused"), *knobs]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 1000
    assert not (folder / "refused").exists()


SPOILED = {
    "first, missing": ("mask", lambda c: c.pop("out.2.bias"), "1 missing (out.2.conv.bias)"),
    "first, extra": ("mask", lambda c: c.update(new=torch.ones(1)), "1 unexpected (new)"),
    "first, shape": (
        "mask",
        lambda c: c.update({"out.0.bias": torch.ones(7)}),
        "1 of another shape (out.0.bias (7,) for (32,))",
    ),
    "first, NaN": ("mask", lambda c: c["out.2.bias"].fill_(torch.nan), "1 tensors hold NaN or infinity (out.2.bias)"),
    "pixel, missing": (
        "pixel",
        lambda c: [c.pop("model.diffusion_model.out.2.bias"), c.pop("model_ema.diffusion_modelout2bias")],
        "unet (model.diffusion_model.*): the weights do not fill the network: 1 missing (out.2.conv.bias)",
    ),
    "pixel, no average": (
        "pixel",
        lambda c: c.pop("model_ema.diffusion_modelout2bias"),
        "1 weights have no average under model_ema. (model.diffusion_model.out.2.bias): take the weights themselves",
    ),
    "pixel, average of nothing": (
        "pixel",
        lambda c: c.update({"model_ema.other": torch.ones(1)}),
        "1 keys belong to no network of the bundle (model_ema.other)",
    ),
    "pixel, extra": ("pixel", lambda c: c.update(lora=torch.ones(1)), "no network of the bundle (lora); expected"),
    "latent, missing": ("latent", lambda c: c.pop("first_stage_model.quant_conv.bias"), "autoencoder (first_stage_mod"),
    "latent, extra": (
        "latent",
        lambda c: c.update({"cond_stage_model.new": torch.ones(1)}),
        "pair_autoencoder (cond_stage_model.*): the weights do not fill the network: 1 unexpected (new)",
    ),
    "autoencoder, missing": ("pair", lambda c: c.pop("decoder.conv_out.bias"), "1 missing (decoder.blocks."),
    "autoencoder, extra": ("pair", lambda c: c.update(new=torch.ones(1)), "1 unexpected (new)"),
    "autoencoder, shape": (
        "pair",
        lambda c: c.update({"decoder.conv_in.bias": torch.ones(3)}),
        "from decoder.conv_in.bias (3,) for (32,)",
    ),
    "three channels": (
        "pair",
        lambda c: c.update({"encoder.conv_in.weight": torch.ones(32, 3, 3, 3)}),
        "none of the bundle's rules fits the file, which holds weights that begin",
    ),
}


@pytest.mark.parametrize(("kind", "spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, capsys, kind, spoil, message):
    content = {
        "mask": lambda: unet_file(unet(3, 5, 4)),
        "pixel": lambda: pixel_file(unet(2, 3, 1)),
        "latent": lambda: latent_file(unet(2, 8, 4), vae(1), vae(2)),
        "pair": lambda: foreign_vae(vae(2), *VAE),
    }[kind]()
    content = {k: v.clone() for k, v in content.items()}
    spoil(content)
    path = saved({"average_model": content} if kind == "mask" else {"state_dict": content}, tmp_path)
    refused(path, message, tmp_path, capsys)


def test_the_text_adapter_alone_is_refused_with_the_reason(tmp_path, capsys):
    adapter = {"transformer_blocks.0.norm1.weight": torch.ones(4)}
    for content in (adapter, {"feature_cond_encoder": adapter}):
        refused(saved(content, tmp_path), "the text adapter alone, which no published network reads", tmp_path, capsys)


def test_what_is_nothing_of_guidegen_is_told_what_would_be(tmp_path, capsys):
    refused(saved({"weight": torch.ones(2)}, tmp_path), "begin weight; they take the first stage", tmp_path, capsys)
    refused(saved({"epoch": 3}, tmp_path), "no weights among 'epoch'; they take the first stage", tmp_path, capsys)


# ---------------------------------------------------------------------------------------------------------------------
# The published sizes: nothing but shapes


def on_meta(monkeypatch: pytest.MonkeyPatch, content: dict[str, Weights]) -> tuple[dict, dict]:
    empty = {k: torch.empty(v.shape, dtype=torch.int8, device="meta") for k, v in content.items()}
    monkeypatch.setattr(import_weights, "read_weights", lambda path: {"state_dict": empty})
    monkeypatch.setattr(import_weights, "sha256", lambda path: "")
    with torch.device("meta"):
        return import_components(BUNDLE, Path(__file__))


def levels_of(paper: dict, prefix: str = "") -> list:
    channels, attends = paper[f"{prefix}channels"], paper[f"{prefix}attention_levels"]
    return [(c, paper[f"{prefix}num_res_blocks"], a) for c, a in zip(channels, attends, strict=True)]


@pytest.mark.parametrize(
    ("overlay", "prefix", "shape", "parameters"),
    [
        ("paper", "mask_", (3, 13, 12), 95_402_060),
        ("paper_pixel", "", (2, 3, 1), 172_900_000),
        ("paper", "", (2, 8, 4), 267_500_000),
    ],
    ids=["first stage", "pixels", "latents"],
)
def test_published_sizes_are_recognised_as_the_presets(monkeypatch, overlay, prefix, shape, parameters):
    paper = json.loads((BUNDLE / f"configs/{overlay}.json").read_text())
    levels, head = levels_of(paper, prefix), paper[f"{prefix}head_channels"]
    with torch.device("meta"):
        content = unet_file(unet(*shape, levels, head), levels, head)
    content = content if prefix else below("model.diffusion_model.", content)
    components, card = on_meta(monkeypatch, content)
    assert list(components) == [f"{prefix}network_def"]
    assert card["parameters"] == pytest.approx(parameters, rel=0 if prefix else 1e-3)
    told = {k: v for k, v in card["knobs"].items() if k in paper and k not in ("mask_text", "report_encoder")}
    assert told == {k: paper[k] for k in told}
    assert {f"{prefix}{k}" for k in (*KEPT, "norm_num_groups", "head_channels")} <= set(told)


@pytest.mark.parametrize(("channels", "name", "parameters"), [(1, "", 83_600_000), (2, "pair_", 130_700_000)])
def test_published_autoencoders_are_recognised(monkeypatch, channels, name, parameters):
    base, paper = (json.loads((BUNDLE / f"configs/{file}.json").read_text()) for file in ("inference", "paper"))
    paper = {**base, **paper}
    widths, blocks = paper[f"{name}autoencoder_channels"], paper["autoencoder_blocks"]
    with torch.device("meta"):
        autoencoder = LDMAutoencoder(2, channels, channels, channels=widths, num_res_blocks=blocks)
    content = foreign_vae(autoencoder, tuple(widths), blocks, (False,) * len(widths))
    components, card = on_meta(monkeypatch, content)
    assert list(components) == [f"{name}autoencoder_def"]
    assert card["parameters"] == pytest.approx(parameters, rel=1e-3)
    assert card["knobs"][f"{name}autoencoder_channels"] == widths


# ---------------------------------------------------------------------------------------------------------------------
# The authors' weights and numbers


@pytest.mark.parametrize("name", GUIDEGEN_MASKS)
def test_guidegen_imported_first_stage_gives_the_authors_logits(tmp_path, name):
    variant, data = name.removesuffix("_io.npz"), tensors("guidegen", name)
    config, file = settings("guidegen", f"{variant}_settings.json"), parity_file("guidegen", f"{variant}_ckpt.pt")
    if config["dims"] != 3:
        pytest.skip("the bundle's first stage draws volumes")
    planes = CategoricalScheduler(10, config["num_classes"]).one_hot(data["xt_lab"][:, None])
    for weights in numbers("guidegen", f"{variant}_ckpt.pt"):
        build = ("--mask_head_channels", str(config["num_head_channels"]))
        build += ("--mask_norm_num_groups", str(config["norm_groups"]))
        imported(file, tmp_path, "--select", weights, *build)
        ours = network_of(configured(tmp_path, ("imported_mask",)), "mask_network_def", tmp_path / "mask.pt")
        label = weights.removesuffix("_model")
        for kind in ("zero", "rand"):
            inputs = planes if kind == "zero" else torch.cat([planes, data["image_rand"]], dim=1)
            with torch.no_grad():
                logits = ours(turned(inputs), data["t"])
            assert_near(logits, turned(data[f"logits_{label}_{kind}"]), 1e-5)


@pytest.mark.parametrize("name", GUIDEGEN_SLICES)
def test_guidegen_imported_second_stage_gives_the_authors_slices(tmp_path, name):
    data, config = tensors("guidegen", name), guidegen_stage_2(name)
    if config["out_channels"] != 1:
        pytest.skip("recorded on latents")
    file = parity_file("guidegen", name.replace("_io.npz", "_unet_ckpt.pt"))
    for label, select in (("model", "model"), ("ema", "model_ema")):
        build = ("--head_channels", str(config["num_head_channels"]), "--norm_num_groups", str(config["norm_groups"]))
        imported(file, tmp_path, "--select", select, *build)
        parser = configured(tmp_path, image_size=list(data["x_start"].shape[:1:-1]))
        parser["num_inference_steps"] = int(data["ddim_S"])
        network = network_of(parser, "network_def", tmp_path / "model.pt")
        with torch.no_grad():
            eps = network(turned(torch.cat([data["x_noisy"], data["cond"]], dim=1)), data["t"])
        assert_near(eps, turned(data[f"eps_{label}"]), 1e-5)

    # The config's own sampler, with what the release does and the bundle leaves out by default.
    layout = turned(data["ar_mask_lab"][None, None].float()).transpose(2, 3)
    order = [z for z in data["ar_order"].tolist() if z >= 0]
    sampler = parser.get_parsed_content("sampler")
    sampler.lead = int(layout.flatten(0, 3).any(dim=0).int().argmax()) - order[0]
    raw: list[torch.Tensor] = []
    sampler.rescale = lambda state: raw.append(state) or to_unit_range(state)
    volume = sampler(layout, network, noise=Replay(turned(data["ar_xT"][z]) for z in order))
    theirs = data["ar_raw_slices"][:, :, order]
    assert_near_relative(torch.stack(raw, dim=2), theirs.mT, 2e-6)
    assert_near(volume[..., order].movedim(-1, 2).mT, data["ar_volume_minmax"][:, :, order], 2e-6)


@pytest.mark.parametrize("name", files_of_set("guidegen", "stage2*_ae_io.npz"))
def test_guidegen_imported_autoencoder_gives_the_authors_latents(tmp_path, name):
    data = tensors("guidegen", name)
    imported(parity_file("guidegen", name.replace("_io.npz", "_ckpt.pt")), tmp_path)
    kind = {1: "autoencoder", 2: "pair_autoencoder"}[data["x"].shape[1]]
    ours = network_of(configured(tmp_path, (f"imported_{kind}",)), f"{kind}_def", tmp_path / f"{kind}.pt")
    with torch.no_grad():
        mean, std = ours.encode(turned(data["x"]))
        assert_near(mean, turned(data["mean"]), 5e-6)
        assert_near(std, turned(data["std"]), 5e-6)
        assert_near(ours.decode(turned(data["mean"])), turned(data["decoded_mean"]), 3e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The commands it tells


def told(path: Path, out: Path, *knobs: str) -> list[str]:
    """Import in a process of its own -> the command that it tells, if it tells one."""
    done = run_command(sys.executable, "tools/import_weights.py", "guidegen", str(path), "--output", str(out), *knobs)
    assert done.returncode == 0, done.stdout
    lines = [line.removeprefix("Now run:") for line in done.stdout.splitlines() if line.startswith("Now run:")]
    if not lines:
        return []
    (command,) = (shlex.split(line) for line in lines)
    assert command[:4] == ["cd", str(BUNDLE), "&&", "python"]
    return [sys.executable, *command[4:]]


@pytest.mark.bundle
def test_the_command_told_draws_volumes_by_both_stages(tmp_path):
    """On pixels: labels given at first, then, with the first stage imported as well, labels drawn."""
    out = tmp_path / "imported"
    second = told(lightning(pixel_file(unet(2, 3, 1)), tmp_path), out, "--head_channels", str(HEAD))
    first = saved({"average_model": unet_file(unet(3, 13, 12))}, tmp_path)
    both = told(first, out, "--mask_head_channels", str(HEAD))
    small = {"image_size": [16, 16], "volume_slices": 4, "num_inference_steps": 2, "mask_size": [8, 8, 4],
             "mask_inference_steps": 3, "phantom_size": [16, 16, 16], "phantom_cases": 1}  # fmt: skip
    flags = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    for name, command in {"second": second, "both": both}.items():
        folder = tmp_path / name
        done = run_command(*command, *flags, "--output_dir", str(folder), cwd=BUNDLE)
        assert done.returncode == 0, done.stdout[-3000:]
        (image,), (layout,) = (sorted(folder.glob(f"*_{key}.nii.gz")) for key in ("image", "layout"))
        labels = np.asarray(nib.load(layout).dataobj)
        assert np.asarray(nib.load(image).dataobj)[labels > 0].std() > 0
        assert labels.max() < 12
