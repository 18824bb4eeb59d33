"""Stable Diffusion's kind of checkpoint through the command line: one file becomes a bundle's networks, or is refused.

The files are written the other way round, from networks of ours, as `test_ldm_layout` does it; where parity data are
present, the authors' weights and numbers serve as well (see `test_parity`).
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import run_command
from monai.bundle import ConfigParser
from PIL import Image
from safetensors.torch import save_file
from test_ldm_layout import (
    LEVELS,
    control_layout,
    foreign,
    foreign_vae,
    make_control,
    merged,
    same,
    settings,
    shuffled,
    unet_layout,
)
from test_parity import (
    SIAMESE,
    assert_near,
    files_of_set,
    siamese_checkpoint,
    siamese_heads,
    siamese_settings,
    tensors,
)
from test_parity import settings as parity_settings

from common.autoencoder import LDMAutoencoder
from common.controlnet import OWN, ControlledUNet
from common.ldm_layout import PREFIXES, parts
from common.text import CachedText, CLIPText
from common.unet import DiffusionUNet
from tools import import_weights
from tools.import_weights import import_components, main

REPO = Path(__file__).resolve().parents[1]
BUNDLE = REPO / "bundles" / "siamese_diffusion"
VAE = ((32, 32), 1, (False, False))  # channels, blocks, attention: it halves once, as does the stem
Weights = dict[str, torch.Tensor]


class Pair(NamedTuple):
    """Networks, and the file that holds them in Stable Diffusion's names."""

    network: ControlledUNet
    autoencoder: LDMAutoencoder
    content: Weights


def pair(dense: bool = True, levels: list = LEVELS, vae: tuple = VAE) -> Pair:
    unet = shuffled(DiffusionUNet(2, 4, 4, **settings(levels)))
    network = ControlledUNet(unet, make_control(levels, dense, 1))
    autoencoder = shuffled(LDMAutoencoder(2, channels=vae[0], num_res_blocks=vae[1]))
    if dense:
        content = merged(network, levels)
    else:
        content = without(merged(ControlledUNet(unet, make_control(levels, True, 1)), levels), "controlnet")
        control = foreign(network.controlnet, [*unet_layout(levels), *control_layout(levels, False, 1)])
        content |= {PREFIXES["controlnet"] + k: v for k, v in control.items()}
    content |= {PREFIXES["autoencoder"] + k: v for k, v in foreign_vae(autoencoder, *vae).items()}
    return Pair(network, autoencoder, content)


def without(content: Weights, *names: str) -> Weights:
    return {k: v for k, v in content.items() if not k.startswith(tuple(PREFIXES[name] for name in names))}


@pytest.fixture(scope="module")
def both() -> Pair:
    return pair()


def saved(content: Weights, folder: Path) -> str:
    torch.save(content, folder / "file.ckpt")
    return str(folder / "file.ckpt")


# ---------------------------------------------------------------------------------------------------------------------
# What is taken


@pytest.mark.parametrize("form", ["bare", "wrapped", "safetensors"])
def test_one_file_fills_all_networks_and_tells_their_sizes(tmp_path, both, form):
    path = tmp_path / ("file.safetensors" if form == "safetensors" else "file.ckpt")
    if form == "safetensors":
        save_file({k: v.contiguous().clone() for k, v in both.content.items()}, path)
    else:
        torch.save({"state_dict": both.content, "global_step": 3000} if form == "wrapped" else both.content, path)
    components, card = import_components(BUNDLE, path)
    assert same(components["network_def"].state_dict(), both.network.state_dict())
    assert same(components["autoencoder_def"].state_dict(), both.autoencoder.state_dict())
    knobs, build = card["knobs"], settings(LEVELS)
    assert [knobs[k] for k in ("channels", "num_res_blocks", "attention_levels")] == [
        list(build[k]) for k in ("channels", "num_res_blocks", "attention_levels")
    ]
    expected = {
        "cross_attention_dim": 6, "transformer_num_layers": 2, "num_heads": 8, "hint_channels": 3, "dense_hint": True,
        "hint_width": 4, "num_merges": 1, "latent_channels": 4, "latent_scale": 0.18215, "prediction_type": "epsilon",
        "autoencoder_channels": [32, 32], "autoencoder_blocks": 1, "autoencoder_groups": 32,
        "autoencoder_attention": True, "num_words": None, "num_train_timesteps": 10,
    }  # fmt: skip
    assert {k: knobs[k] for k in expected} == expected
    assert (card["step"], card["ready"], card["notes"]) == (3000 if form == "wrapped" else None, True, [])


def test_the_card_accounts_for_every_key(tmp_path, both):
    content = {**both.content, PREFIXES["autoencoder"] + "loss.logvar": torch.zeros(())}
    _, card = import_components(BUNDLE, saved(content, tmp_path))
    keys = card["keys"]
    dropped = {reason.split()[0]: entry["count"] for reason, entry in keys["dropped"].items()}
    assert dropped == {"text": 1, "averages": 1, "schedule": 6, "discriminator": 1}
    assert keys["in_file"] == len(content) == keys["used"] + sum(dropped.values())
    assert sum(part["used"] for part in keys["parts"].values()) == keys["used"]
    assert sum(part["filled"] for part in keys["parts"].values()) == keys["filled"]
    vae = keys["parts"]["autoencoder"]
    assert vae["fills"] == "autoencoder_def"
    assert (vae["in_file"] - 1, vae["filled"] - 2) == (vae["used"], vae["used"])  # quant_conv becomes two


def test_stable_diffusion_alone_starts_the_controlnet_as_the_unets_encoder(tmp_path, both, capsys):
    path, out = saved(without(both.content, "controlnet"), tmp_path), tmp_path / "out"
    assert main(["siamese_diffusion", path, "--output", str(out)]) == 0
    told = capsys.readouterr().out
    assert "no ControlNet in the file" in told
    assert "Now train:" in told
    assert "Now run:" not in told
    state = torch.load(out / "model.pt", weights_only=True)
    control = {k.removeprefix("controlnet."): v for k, v in state.items() if k.startswith("controlnet.")}
    shared = [k for k in control if not k.startswith(OWN)]
    assert shared
    assert all(torch.equal(control[k], state[f"unet.{k}"]) for k in shared)
    zero = [v for k, v in control.items() if k.startswith(OWN[1:]) or "cond_embedding.conv_out" in k]
    assert len(zero) > 8
    assert not any(v.any() for v in zero)
    card = json.loads((out / "model.json").read_text())
    assert card["keys"]["parts"]["controlnet"] == {
        "fills": "network_def", "in_file": 0, "used": 0, "filled": len(control)
    }  # fmt: skip
    # The file does not tell the stem: it is the one of the overlay that the command names.
    assert control["controlnet_cond_embedding.convs.0.conv.weight"].shape[0] == 16


def test_an_autoencoder_may_attend_on_its_levels(tmp_path, both):
    vae = ((32, 32), 1, (False, True))
    network = shuffled(LDMAutoencoder(2, channels=vae[0], num_res_blocks=1, attention_levels=vae[2]))
    theirs = {PREFIXES["autoencoder"] + k: v for k, v in foreign_vae(network, *vae).items()}
    components, card = import_components(BUNDLE, saved(without(both.content, "autoencoder") | theirs, tmp_path))
    assert same(components["autoencoder_def"].state_dict(), network.state_dict())
    assert card["knobs"]["autoencoder_def::attention_levels"] == [False, True]


def test_the_original_stem_is_recognised(tmp_path):
    original = pair(dense=False)
    components, card = import_components(BUNDLE, saved(without(original.content, "autoencoder"), tmp_path))
    assert same(components["network_def"].state_dict(), original.network.state_dict())
    found = {k: v for k, v in card["knobs"].items() if "hint" in k or k == "num_merges"}
    assert found == {"hint_channels": 3, "dense_hint": False, "hint_widths": [16, 32, 96, 256]}


def test_without_an_autoencoder_it_says_so(tmp_path, both, capsys):
    path, out = saved(without(both.content, "autoencoder"), tmp_path), tmp_path / "out"
    assert main(["siamese_diffusion", path, "--output", str(out)]) == 0
    assert "no autoencoder in the file: give one" in capsys.readouterr().out
    assert not (out / "autoencoder.pt").exists()
    overlay = json.loads((out / "imported.json").read_text())
    assert not [k for k in overlay if k.startswith("autoencoder")]


def test_what_was_there_first_is_kept(tmp_path, both):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.pt", "autoencoder.pt", "model.json"):
        (out / name).write_bytes(b"first")
    for _ in range(2):
        assert main(["siamese_diffusion", saved(both.content, tmp_path), "--output", str(out)]) == 0
    for name in ("model.previous.pt", "autoencoder.previous.pt", "model.previous.json"):
        assert (out / name).read_bytes() == b"first"


def test_paths_below_the_bundle_move_with_it():
    inside, outside = (import_weights._place(root / "models" / "a.pt", BUNDLE) for root in (BUNDLE, REPO))
    parser = ConfigParser({"bundle_root": "/elsewhere", "inside": inside, "outside": outside})
    assert parser.get_parsed_content("inside") == "/elsewhere/models/a.pt"
    assert parser.get_parsed_content("outside") == str(REPO / "models" / "a.pt")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda c: c.pop("model.diffusion_model.out.2.bias"),
            "unet (model.diffusion_model.*): the weights do not fill",
        ),
        (lambda c: c.pop("model.diffusion_model.out.2.bias"), "1 missing (out.2.conv.bias)"),
        (lambda c: c.pop("control_model.zero_convs.1.0.bias"), "1 missing (controlnet_down_blocks.1.conv.bias)"),
        (lambda c: c.pop("first_stage_model.quant_conv.bias"), "autoencoder (first_stage_model.*): the weights do not"),
        (lambda c: c.update({"model.diffusion_model.new.weight": torch.ones(1)}), "1 unexpected (new.weight)"),
        (lambda c: c.update({"control_model.new.weight": torch.ones(1)}), "1 unexpected (new.weight)"),
        (lambda c: c.update({"first_stage_model.new.weight": torch.ones(1)}), "1 unexpected (new.weight)"),
        (lambda c: c.update({"lora.up": torch.ones(1)}), "1 keys belong to no part of a latent-diffusion checkpoint"),
        (lambda c: c.update({"lora.up": torch.ones(1)}), "(lora.up)"),
        (lambda c: c["control_model.zero_convs.1.0.bias"].fill_(torch.nan), "(zero_convs.1.0.bias)"),
        (
            lambda c: c.update({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}),
            "reads 9 channels and predicts 4, as for inpainting",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, both, capsys, spoil, message):
    content = {k: v.clone() for k, v in both.content.items()}
    spoil(content)
    refused(content, message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["autoencoder"], "no U-Net in the checkpoint, only autoencoder: take the merged file"),
        (["controlnet"], "no U-Net in the checkpoint, only controlnet: take the merged file"),
    ],
)
def test_a_single_part_is_refused(tmp_path, both, capsys, keep, message):
    content = {k: v for k, v in both.content.items() if k.startswith(tuple(PREFIXES[name] for name in keep))}
    refused(content, message, tmp_path, capsys)
    bare = {k.removeprefix(PREFIXES[keep[0]]): v for k, v in content.items()}
    refused(bare, "one part in bare names", tmp_path, capsys)


def refused(content: Weights, message: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["siamese_diffusion", saved(content, folder), "--output", str(folder / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 1000
    assert not (folder / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The commands it tells


class Encoder:
    """Stands in for the text encoder, under its name, at the width of a small build."""

    description = CLIPText("openai/clip-vit-large-patch14").description

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, text: str) -> torch.Tensor:
        return torch.randn(7, self.width, generator=torch.Generator().manual_seed(len(text)))


def told(path: str, out: Path, *knobs: str) -> dict[str, list[str]]:
    """Import in a process of its own -> the commands that it tells, by their verb."""
    done = run_command(
        sys.executable, "tools/import_weights.py", "siamese_diffusion", path, "--output", str(out), *knobs
    )
    assert done.returncode == 0, done.stdout
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if ": " in line and " cd " in line)
    commands = {verb.strip(): shlex.split(line) for verb, line in lines.items()}
    assert all(command[:4] == ["cd", str(BUNDLE), "&&", "python"] for command in commands.values())
    return {verb: [sys.executable, *command[4:]] for verb, command in commands.items()}


def obeyed(command: list[str], **knobs: object) -> subprocess.CompletedProcess:
    small = {"phantom_size": 32, "image_size": [32, 32], "num_inference_steps": 2, "batch_size": 2, **knobs}
    flags = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    done = run_command(*command, *flags, cwd=BUNDLE)
    assert done.returncode == 0, done.stdout[-3000:]
    return done


@pytest.mark.bundle
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "original"])
def test_the_commands_told_work(tmp_path, dense):
    levels = [(32, 1, False), (64, 1, True)]
    # The original stem shrinks by 8, as does an autoencoder of four levels.
    vae = VAE if dense else ((32, 32, 32, 32), 1, (False,) * 4)
    path = saved(pair(dense, levels, vae).content, tmp_path)
    contexts = tmp_path / "contexts.pt"
    CachedText(Encoder(6), contexts).encode_all(["A photo of a polyp.", ""])
    commands = told(path, tmp_path / "imported", "--num_train_timesteps", "1000")
    assert set(commands) == {"Now run", "Or train"}

    out = tmp_path / "synthetic"
    obeyed(commands["Now run"], contexts_file=contexts, output_dir=out, phantom_cases=2)
    images = [np.asarray(Image.open(p)) for p in sorted(out.glob("*_image.png"))]
    assert [(i.shape, i.dtype) for i in images] == [((32, 32, 3), np.uint8)] * 2
    assert all(i.std() > 0 for i in images)
    assert len(list(out.glob("*_mask.png"))) == 2

    # Training starts from just these weights: without a learning rate it ends with them. Once will do.
    if not dense:
        return
    out = tmp_path / "train"
    still = {"lr": 0.0, "lr_end": 0.0, "num_workers": 0, "epochs": 1, "val_cases": 1, "preview_cases": 1}
    obeyed(commands["Or train"], contexts_file=contexts, output_dir=out, phantom_cases=3, **still)
    before, after = (torch.load(folder / "model.pt", weights_only=True) for folder in (tmp_path / "imported", out))
    assert set(before) == set(after)
    assert all(torch.equal(after[k], v) for k, v in before.items())


# ---------------------------------------------------------------------------------------------------------------------
# The authors' weights and numbers


@pytest.mark.parametrize("variant", SIAMESE)
def test_the_imported_files_give_the_authors_outputs(tmp_path, variant):
    checkpoint, config = siamese_checkpoint(variant), siamese_settings(variant)["unet_config"]
    heads = siamese_heads(config, parts(checkpoint))
    path = saved({"state_dict": checkpoint, "global_step": 3000}, tmp_path)
    out = tmp_path / "out"
    assert main(["siamese_diffusion", path, "--output", str(out), "--num_head_channels", json.dumps(heads)]) == 0

    parser = ConfigParser()
    files = [BUNDLE / "configs" / "inference.json", BUNDLE / "configs" / "paper.json", out / "imported.json"]
    parser.read_config([str(file) for file in files])
    parser["bundle_root"], parser["device"] = str(BUNDLE), "cpu"
    network, latents = (parser.get_parsed_content(name) for name in ("network_def", "latents"))
    network.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    data, vae = (tensors("siamese_diffusion", f"{variant}{name}.npz") for name in ("networks", "vae"))
    with torch.no_grad():
        given = [data[k] for k in ("x", "timesteps", "context")]
        assert_near(network(*given), data["eps_no_control"], 2e-5)
        assert_near(network(*given, data["hint_mask"]), data["eps_mask"], 2e-5)
        assert_near(network.encode_hint(data["hint_image"]), data["dhi_image"], 2e-5)
        assert_near(latents.moments(vae["pixel"])[0], vae["latent_scaled_mean"], 2e-5)
        assert_near(latents.decode(latents.scale * vae["z"]), vae["decoded"], 1e-4)


@pytest.mark.parametrize("name", files_of_set("siamese_diffusion", "*sd15_size_keys.json"))
@pytest.mark.parametrize("control", [True, False], ids=["merged", "Stable Diffusion alone"])
def test_stable_diffusions_size_is_the_papers(tmp_path, monkeypatch, name, control):
    """All on the meta device: the networks that the tool builds for the full list of keys are those of paper.json."""
    shapes = parity_settings("siamese_diffusion", name)
    content = {k: torch.empty(s, dtype=torch.int8, device="meta") for k, s in shapes.items()}
    if not control:
        content = without(content, "controlnet")
    monkeypatch.setattr(import_weights, "read_weights", lambda path: content)
    path = saved({}, tmp_path)
    with torch.device("meta"):
        components, card = import_components(BUNDLE, path)
    assert sum(p.numel() for p in components["network_def"].parameters()) == card["parameters"] == 1_222_977_476
    assert sum(p.numel() for p in components["autoencoder_def"].parameters()) == 83_653_863
    paper = json.loads((BUNDLE / "configs" / "paper.json").read_text())
    knobs = {k: v for k, v in card["knobs"].items() if k in paper}
    assert knobs == {k: paper[k] for k in knobs}
    assert {"channels", "num_heads", "cross_attention_dim", "autoencoder_channels", "latent_scale"} <= set(knobs)
    used = {name: part["used"] for name, part in card["keys"]["parts"].items()}
    assert used == {"unet": 686, "controlnet": 368 * control, "autoencoder": 248}
