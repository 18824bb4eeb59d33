"""Weights come in whole or not at all: reading refuses what is no data, renaming accounts for every key, both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from safetensors.torch import save_file
from torch import nn

from common.checkpoints import (
    CheckpointError,
    CheckpointLoader,
    fill,
    filled,
    from_monai_generative,
    read_knobs,
    read_weights,
    select,
    translate,
)
from common.unet import DiffusionUNet
from tools.import_weights import import_checkpoint, main

REPO = Path(__file__).resolve().parents[1]
BUNDLE = REPO / "bundles" / "lung_ddpm"
RULES = json.loads((BUNDLE / "configs" / "import_rules.json").read_text())["authors"]
KNOBS = {"norm_num_groups": 2, "image_size": [8, 8, 8]}
RESNET = {
    "norm1": "in_layers.0",
    "conv1.conv": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2.conv": "out_layers.3",
    "skip_connection.conv": "skip_connection",
}


def tiny(in_channels: int = 3, res_blocks: int = 1) -> DiffusionUNet:
    torch.manual_seed(0)
    network = DiffusionUNet(
        3,
        in_channels,
        1,
        channels=[4, 8],
        attention_levels=[False, True],
        num_res_blocks=res_blocks,
        norm_num_groups=2,
        num_head_channels=[4, 8],
        norm_eps=1e-5,
        max_period=1000.0,
        upsample_mode="linear",
        zero_init_attention=False,
    )
    return network.eval()


def as_authors(network: DiffusionUNet) -> dict[str, torch.Tensor]:
    """The reference's names, by walking the network as its constructor does: independent of the rules under test."""
    state: dict[str, torch.Tensor] = {}

    def put(name: str, module: nn.Module) -> None:
        state.update({f"denoise_fn.{name}.{k}": v.clone() for k, v in module.state_dict().items()})

    def put_resnet(name: str, resnet: nn.Module) -> None:
        for ours, theirs in RESNET.items():
            if not ours.startswith("skip") or not isinstance(resnet.skip_connection, nn.Identity):
                put(f"{name}.{theirs}", resnet.get_submodule(ours))

    def put_attention(name: str, block: nn.Module) -> None:
        put(f"{name}.norm", block.norm)
        parts = [block.attn.to_q, block.attn.to_k, block.attn.to_v]
        state[f"denoise_fn.{name}.qkv.weight"] = torch.cat([p.weight.data for p in parts])[..., None].clone()
        state[f"denoise_fn.{name}.qkv.bias"] = torch.cat([p.bias.data for p in parts])
        state[f"denoise_fn.{name}.proj_out.weight"] = block.attn.out_proj.weight.data[..., None].clone()
        state[f"denoise_fn.{name}.proj_out.bias"] = block.attn.out_proj.bias.data.clone()

    for buffer in ("betas", "alphas_cumprod", "sqrt_recip_alphas_cumprod", "posterior_variance", "sqrt_alphas_cumprod"):
        state[buffer] = torch.zeros(250)
    put("time_embed", network.time_embed)
    put("input_blocks.0.0", network.conv_in.conv)
    number = 1
    for block in network.down_blocks:
        for j, resnet in enumerate(block.resnets):
            put_resnet(f"input_blocks.{number}.0", resnet)
            if hasattr(block, "attentions"):
                put_attention(f"input_blocks.{number}.1", block.attentions[j])
            number += 1
        if block.downsampler is not None:
            put(f"input_blocks.{number}.0.op", block.downsampler.op.conv)
            number += 1
    put_resnet("middle_block.0", network.middle_block.resnet_1)
    put_attention("middle_block.1", network.middle_block.attention)
    put_resnet("middle_block.2", network.middle_block.resnet_2)
    number = 0
    for block in network.up_blocks:
        for j, resnet in enumerate(block.resnets):
            put_resnet(f"output_blocks.{number}.0", resnet)
            if hasattr(block, "attentions"):
                put_attention(f"output_blocks.{number}.1", block.attentions[j])
            if j + 1 == len(block.resnets) and block.upsampler is not None:
                put(f"output_blocks.{number}.{1 + hasattr(block, 'attentions')}.conv", block.upsampler.postconv.conv)
            number += 1
    put("out.0", network.out[0])
    put("out.2", network.out[2].conv)
    return state


@pytest.fixture
def authors(tmp_path) -> Path:
    """A file as the authors save it: averaged weights beside raw ones, which must not be taken."""
    ema = as_authors(tiny())
    path = tmp_path / "authors.pt"
    torch.save({"step": 7, "model": {k: v + 1 for k, v in ema.items()}, "ema": ema}, path)
    return path


def assert_equal(network: nn.Module, expected: nn.Module) -> None:
    state = network.state_dict()
    assert list(state) == list(expected.state_dict())
    assert all(torch.equal(state[k], v) for k, v in expected.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_payload_is_refused_and_not_run(tmp_path, zipped):
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    torch.save({"model": {"w": torch.ones(1)}, "x": Payload(trap)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"wants to run code \(\w+\.mkdir\) and is refused"):
        read_weights(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html>not found</html>", "is a web page, the download failed: fetch the raw file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
        (b"PK\x03\x04 and then nothing", "cut off"),
        (b"just some text", "damaged|no PyTorch"),
        (b"\x80\x02", "damaged|cut off"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_checkpoint_says_so(tmp_path, content, message, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_truncated_missing_large_and_not_a_dict(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    with pytest.raises(CheckpointError, match="more than the limit of 1000"):
        read_weights(path, max_bytes=1000)
    for zipped in (True, False):
        torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(CheckpointError, match=r"cut off|damaged"):
            read_weights(path)
    with pytest.raises(FileNotFoundError, match="train first"):
        read_weights(tmp_path / "none.pt")
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        read_weights(path)


def test_safetensors_equal_pt_and_nesting_is_kept(tmp_path):
    state = {"a.w": torch.randn(3, 2), "b": torch.arange(4)}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        read = read_weights(tmp_path / name)
        assert set(read) == set(state)
        assert all(torch.equal(read[k], v) for k, v in state.items())
    torch.save({"step": 3, "ema": state}, tmp_path / "nested.pt")
    assert read_weights(tmp_path / "nested.pt")["step"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# The handler


def run_loader(path: Path, network: nn.Module, **kwargs) -> None:
    engine = Engine(lambda engine, batch: None)
    CheckpointLoader(load_path=str(path), load_dict={"model": network}, **kwargs).attach(engine)
    engine.run([0])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "step": 3}, lambda s: {"state_dict": s}])
def test_loader_takes_plain_and_nested_files_and_unwraps(tmp_path, wrap):
    torch.manual_seed(0)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(wrap(source.state_dict()), tmp_path / "model.pt")
    run_loader(tmp_path / "model.pt", nn.DataParallel(target))
    assert_equal(target, source)


def test_loader_lists_everything_that_does_not_fit(tmp_path):
    torch.save({"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="1 missing") as error:
        run_loader(tmp_path / "model.pt", nn.Linear(3, 2))
    for part in ("missing (bias)", "1 unexpected (scale)", "weight (2, 4) for (2, 3)", "tools/import_weights.py"):
        assert part in str(error.value)


def test_loader_shortens_long_lists_and_may_be_lenient(tmp_path, caplog):
    torch.save({**{f"k{i}": torch.zeros(1) for i in range(20)}, "bias": torch.ones(2)}, tmp_path / "model.pt")
    network = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"20 unexpected \(k0, .*k7, \.\.\.\)"):
        run_loader(tmp_path / "model.pt", network)
    run_loader(tmp_path / "model.pt", network, strict=False)
    assert torch.equal(network.bias.data, torch.ones(2))
    assert "fits in part only" in caplog.text


def test_filled_without_a_path_is_the_network_as_it_is():
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    assert filled(network, None) is network
    assert torch.equal(network.weight, before)
    assert isinstance(filled(nn.Identity(), None), nn.Identity)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("way", ["filled", "loader"])
def test_half_precision_files_fill_networks_that_compute_in_their_own(tmp_path, suffix, way):
    torch.manual_seed(0)
    source, target, path = nn.BatchNorm1d(3), nn.BatchNorm1d(3), tmp_path / f"half{suffix}"
    source.weight.data, source.num_batches_tracked = torch.randn(3), torch.tensor(70_001)
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    if way == "filled":
        assert filled(target, path) is target
    else:
        run_loader(path, target)
    assert {k: v.dtype for k, v in target.state_dict().items()} == {k: v.dtype for k, v in source.state_dict().items()}
    assert torch.equal(target.weight, source.weight.half().float())
    assert target.num_batches_tracked == 70_001


def test_what_does_not_fit_is_refused_by_the_files_name_and_fills_nothing(tmp_path, caplog):
    path = tmp_path / "other.pt"
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(5), "more": torch.ones(1)}, path)
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"other\.pt does not fit the network: 1 unexpected \(more\).*bias \(5,\)"
    ):
        filled(network, path)
    with pytest.raises(CheckpointError, match=r"^mine does not fit"):
        fill(network, read_weights(path), "mine")
    assert torch.equal(network.weight, before)
    with pytest.raises(FileNotFoundError, match=r"none\.pt do not exist"):
        filled(network, tmp_path / "none.pt")
    fill(network, read_weights(path), path, strict=False)
    assert torch.equal(network.weight, torch.ones(2, 3))
    assert "other.pt fits in part only" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Renaming


@pytest.mark.parametrize(("in_channels", "res_blocks"), [(3, 1), (2, 2)])
def test_round_trip_is_exact_and_knobs_are_read_off(in_channels, res_blocks):
    network = tiny(in_channels, res_blocks)
    source = as_authors(network)
    state = translate(source, RULES, network.state_dict())
    assert list(state) == list(network.state_dict())
    assert all(torch.equal(state[k], v) and state[k].is_contiguous() for k, v in network.state_dict().items())
    assert read_knobs(source, RULES, {"norm_num_groups": 2}) == {
        "channels": [4, 8],
        "attention_levels": [False, True],
        "num_res_blocks": res_blocks,
        "norm_num_groups": 2,
        "condition_labels": [2] if in_channels == 2 else [1, 2],
        "num_train_timesteps": 250,
        "prediction_type": "epsilon",
        "image_size": [128, 128, 128],
        "patch_size": [64, 64, 64],
    }


def test_heads_are_cut_per_head():
    rules = {"split": [{"key": "qkv", "into": ["q", "k", "v"], "heads": "$channels // 2"}]}
    rows = torch.arange(12.0)  # two heads of two channels: q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1
    parts = translate({"qkv": rows}, rules, {n: torch.zeros(4) for n in "qkv"})
    assert {n: p.tolist() for n, p in parts.items()} == {"q": [0, 1, 6, 7], "k": [2, 3, 8, 9], "v": [4, 5, 10, 11]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update({"denoise_fn.x.w": torch.zeros(1)}), "1 unexpected (x.w from denoise_fn.x.w)"),
        (lambda s: s.pop("denoise_fn.out.2.bias"), "1 missing (out.2.conv.bias)"),
        (lambda s: s.update({"denoise_fn.out.0.bias": torch.zeros(5)}), "denoise_fn.out.0.bias (5,) for (4,)"),
        (lambda s: s.update({"out.0.bias": torch.zeros(4)}), "both become out.0.bias"),
        (lambda s: s["denoise_fn.out.0.bias"].fill_(float("nan")), "NaN or infinity (denoise_fn.out.0.bias)"),
        (lambda s: s.update({"denoise_fn.out.0.bias": 3}), "out.0.bias from denoise_fn.out.0.bias int for (4,)"),
    ],
)
def test_every_key_is_accounted_for(spoil, message):
    network = tiny()
    source = as_authors(network)
    spoil(source)
    with pytest.raises(CheckpointError) as error:
        translate(source, RULES, network.state_dict())
    assert message in str(error.value)


def test_averaged_twins_without_dots_replace_the_weights():
    inner = {"model.a.w": torch.zeros(1), "model_ema.aw": torch.ones(1), "model_ema.decay": torch.ones(())}
    rules = {"select": ["state_dict"], "ema": ["model.", "model_ema."]}
    state, name = select({"state_dict": inner}, rules)
    assert name == "state_dict"
    assert state["model.a.w"].item() == 1
    assert set(state) == {"model.a.w", "model_ema.decay"}
    del inner["model_ema.aw"]
    with pytest.raises(CheckpointError, match="1 weights have no average"):
        select({"state_dict": inner}, rules)


# ---------------------------------------------------------------------------------------------------------------------
# A bundle's import


def test_import_takes_the_average_and_records_all(authors):
    network, card = import_checkpoint(BUNDLE, authors, **KNOBS)
    assert_equal(network, tiny())
    x, t = torch.randn(1, 3, 8, 8, 8), torch.tensor([5])
    assert torch.equal(network(x, t), tiny()(x, t))
    dropped = {reason: entry["count"] for reason, entry in card["keys"]["dropped"].items()}
    assert list(dropped.values()) == [5]
    assert "schedule" in next(iter(dropped))
    assert card["keys"]["used"] + 5 == card["keys"]["in_file"]
    assert (card["part"], card["step"], card["knobs"]["image_size"]) == ("ema", 7, [8, 8, 8])
    assert "IUCPQ" in card["training_data"]
    assert "MIT" in card["licence"]
    raw, _ = import_checkpoint(BUNDLE, authors, part="model", **KNOBS)
    assert not torch.equal(raw.out[2].conv.weight, network.out[2].conv.weight)


def test_safetensors_source_equals_pt_source(tmp_path, authors):
    save_file(as_authors(tiny()), tmp_path / "authors.safetensors")
    network, _ = import_checkpoint(BUNDLE, tmp_path / "authors.safetensors", part="", **KNOBS)
    assert_equal(network, tiny())


def test_command_line_in_its_own_process(tmp_path, authors):
    output = tmp_path / "models"
    output.mkdir()
    (output / "model.pt").write_bytes(b"shipped")
    command = [sys.executable, str(REPO / "tools" / "import_weights.py"), "lung_ddpm", str(authors)]
    command += ["--output", str(output), "--norm_num_groups", "2", "--image_size", "[8,8,8]"]
    command += ["--training_data", "random numbers"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"'configs/legacy.json','{output / 'imported.json'}'" in done.stdout
    network = randomised(tiny())
    run_loader(output / "model.pt", network)
    assert_equal(network, tiny())
    card = json.loads((output / "model.json").read_text())
    assert card["training_data"] == "random numbers"
    assert len(card["weights_sha256"]) == len(card["source"]["sha256"]) == 64
    assert {**json.loads((output / "imported.json").read_text()), "_desc_": 0} == {**card["knobs"], "_desc_": 0}
    assert (output / "model.previous.pt").read_bytes() == b"shipped"
    assert main([*command[2:]]) == 0
    assert (output / "model.previous.pt").read_bytes() == b"shipped"
    assert not list(output.glob(".tmp*"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--norm_num_groups", "3"], 1, "norm_num_groups"),
        (["--norm_num_groups", "2", "--select", "swa"], 1, "the file holds 'step', 'model', 'ema'"),
        (["--layout", "monai_generative"], 1, "no down_blocks.0.resnets.0.conv1.conv.weight among"),
        (["--norm_group", "2"], 2, "did you mean --norm_num_groups?"),
        (["--preset", "huge"], 2, "huge.json does not exist"),
    ],
)
def test_refusals_are_one_line_with_an_exit_code(tmp_path, authors, capsys, arguments, code, message):
    assert main(["lung_ddpm", str(authors), "--output", str(tmp_path / "out"), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 1000
    assert not (tmp_path / "out").exists()


def test_usage_errors(capsys):
    assert main(["no_such_bundle", "x.pt"]) == 2
    assert "choose one of" in capsys.readouterr().err
    assert main(["lung_ddpm", "no_such_file.pt"]) == 1
    for arguments in ([], ["lung_ddpm", "x.pt", "--norm_num_groups"], ["lung_ddpm", "x.pt", "--layout", "mine"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# MONAI GenerativeModels 0.2.3


@pytest.fixture(scope="module")
def generative() -> SimpleNamespace:
    pytest.importorskip("generative", reason="monai-generative 0.2.3 is not installed")
    from generative.networks.nets import AutoencoderKL, DiffusionModelUNet

    return SimpleNamespace(DiffusionModelUNet=DiffusionModelUNet, AutoencoderKL=AutoencoderKL)


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))  # zero-initialised layers would hide what is behind them
    return network.eval()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("kind", [DiffusionModelUNet, DiffusionUNet])
def test_generative_unet_gives_equal_outputs(generative, spatial_dims, context, kind):
    settings = {
        "spatial_dims": spatial_dims,
        "in_channels": 2,
        "out_channels": 1,
        "num_res_blocks": [1, 2],
        "attention_levels": [False, True],
        "norm_num_groups": 4,
        "num_head_channels": [4, 4],
        "resblock_updown": spatial_dims == 2,
    } | ({"with_conditioning": True, "cross_attention_dim": 6} if context else {})
    old = randomised(generative.DiffusionModelUNet(num_channels=[8, 8], **settings))
    new = kind(channels=[8, 8], **settings).eval()
    new.load_state_dict(from_monai_generative(old.state_dict(), new.state_dict()))
    x, t = torch.randn(2, 2, *[8] * spatial_dims), torch.tensor([3, 700])
    tokens = torch.randn(2, 5, 6) if context else None
    with torch.no_grad():
        expected = old(x, t, context=tokens)
        torch.testing.assert_close(new(x, t, context=tokens), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.05


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("include_fc", [False, True])
def test_generative_autoencoder_gives_equal_outputs(generative, spatial_dims, attention, include_fc):
    settings = {
        "spatial_dims": spatial_dims,
        "latent_channels": 2,
        "num_res_blocks": [1, 1],
        "attention_levels": [False, attention],
        "norm_num_groups": 4,
        "with_encoder_nonlocal_attn": attention,
        "with_decoder_nonlocal_attn": attention,
    }
    old = randomised(generative.AutoencoderKL(num_channels=[8, 8], **settings))
    new = AutoencoderKL(channels=[8, 8], include_fc=include_fc, **settings).eval()
    new.load_state_dict(from_monai_generative(old.state_dict(), new.state_dict()))
    x = torch.randn(2, 1, *[8] * spatial_dims)
    with torch.no_grad():
        for mine, theirs in zip(new.encode(x), old.encode(x), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(new.reconstruct(x), old.reconstruct(x), atol=1e-5, rtol=0)


def test_generative_unet_imports_into_a_bundle(generative, tmp_path):
    torch.manual_seed(0)
    old = generative.DiffusionModelUNet(
        3,
        2,
        1,
        num_res_blocks=1,
        num_channels=[4, 8],
        attention_levels=[False, True],
        norm_num_groups=2,
        num_head_channels=4,
    )
    old = randomised(old)
    torch.save(old.state_dict(), tmp_path / "generative.pt")
    given = {"norm_num_groups": 2, "network_def::num_head_channels": 4}
    with pytest.raises(CheckpointError, match="--network_def::num_head_channels"):
        import_checkpoint(BUNDLE, tmp_path / "generative.pt", layout="monai_generative")
    network, card = import_checkpoint(BUNDLE, tmp_path / "generative.pt", layout="monai_generative", **given)
    assert (card["knobs"]["condition_labels"], card["knobs"]["num_res_blocks"]) == ([2], 1)
    x, t = torch.randn(1, 2, 8, 8, 8), torch.tensor([700])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), old(x, t), atol=1e-5, rtol=0)
