"""Siamese-Diffusion as a user runs it: three stages that build on each other, pairs that belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.endoscopy_phantoms import endoscopy_cohort

pytestmark = pytest.mark.bundle

Runner = Callable[..., object]
NAME = "siamese_diffusion"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs of 48 x 48 pixels, as a user's data set without an index."""
    root = Path(endoscopy_cohort(tmp_path_factory.mktemp("pairs"), 10, size=48))
    (root / "prompt.json").unlink()
    (root / "phantoms.json").unlink()
    return root


@pytest.fixture(scope="module")
def stages(data: Path, run_bundle: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Autoencoder, U-Net and ControlNet trained one after the other on the user's pairs -> their folders."""
    root, made = tmp_path_factory.mktemp("stages"), {}
    for stage, overlays, needs in (
        ("autoencoder", ["train_autoencoder"], {}),
        ("base", ["train_base"], {"autoencoder_weights": "autoencoder"}),
        ("siamese", [], {"autoencoder_weights": "autoencoder", "base": "base"}),
    ):
        made[stage] = root / stage
        places = {key: made[name] / "model.pt" for key, name in needs.items()}
        done = run_bundle(
            NAME,
            "train",
            *overlays,
            "smoke",
            dataset_dir=data,
            weights_dtype="float32",
            output_dir=made[stage],
            **places,
        )
        assert done.returncode == 0, done.stdout
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def test_the_last_stage_keeps_the_encoder_and_trains_the_rest(stages: dict[str, Path]) -> None:
    base, whole = weights(stages["base"]), weights(stages["siamese"])
    moved = {key for key, value in base.items() if not torch.equal(whole[f"unet.{key}"], value)}
    assert moved
    assert all(key.startswith(("up_blocks.", "out.")) for key in moved)
    copied = whole["controlnet.conv_in.conv.weight"] - base["conv_in.conv.weight"]
    assert 0 < copied.abs().max() < 0.1, "the ControlNet began as a copy of the encoder and learnt"


def test_the_first_stage_tells_the_scale_of_its_latents(
    stages: dict[str, Path], data: Path, run_bundle: Runner, tmp_path: Path
) -> None:
    done = run_bundle(NAME, "train", "train_autoencoder", "smoke", dataset_dir=data, output_dir=tmp_path)
    assert "--latent_scale " in done.stdout


@pytest.fixture(scope="module")
def pairs(stages: dict[str, Path], data: Path, run_bundle: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images for each moved mask of the user's."""
    folder = tmp_path_factory.mktemp("synthetic")
    places = {"weights": stages["siamese"] / "model.pt", "autoencoder_weights": stages["autoencoder"] / "model.pt"}
    done = run_bundle(
        NAME,
        "inference",
        "smoke",
        dataset_dir=data / "masks",
        masks="random",
        num_samples=2,
        output_dir=folder,
        **places,
    )
    assert done.returncode == 0, done.stdout
    return folder


def test_masks_are_one_bit_and_images_eight(pairs: Path) -> None:
    cards = [json.loads(path.read_text())["made_by"] for path in sorted(pairs.glob("case_*.json"))]
    assert len(cards) == 20
    for card in cards:
        mask, image = (Image.open(pairs / f"{card['case']['name']}_{kind}.png") for kind in ("mask", "image"))
        assert (mask.mode, image.mode, mask.size, image.size) == ("1", "RGB", (32, 32), (32, 32))
        share = np.asarray(mask).mean()
        with Image.open(card["case"]["mask"]) as given:
            assert 0.3 < share / (np.asarray(given) > 127).mean() < 3, "moved and resized, within its range"


def test_samples_of_one_mask_differ_in_mask_and_image(pairs: Path) -> None:
    for kind in ("mask", "image"):
        first, second = (np.asarray(Image.open(pairs / f"case_0000_s{k}_{kind}.png")) for k in (0, 1))
        assert (first != second).any()


def test_a_missing_image_is_named_before_training(data: Path, run_bundle: Runner, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    for folder in ("images", "masks"):
        (broken / folder).mkdir(parents=True)
        for path in sorted((data / folder).iterdir())[: 4 if folder == "masks" else 3]:
            (broken / folder / path.name).write_bytes(path.read_bytes())
    done = run_bundle(NAME, "train", "smoke", dataset_dir=broken, output_dir=tmp_path / "out")
    assert done.returncode != 0
    assert "case_0003" in done.stdout.splitlines()[-1]
    assert not (tmp_path / "out" / "model.pt").exists()
