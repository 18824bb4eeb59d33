"""The tools as a user runs them: help, exit codes, and what they leave behind."""

from __future__ import annotations

import copy
import json
import re
import sys
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import run_command
from monai.bundle import ConfigParser
from PIL import Image

from common.categorical import CategoricalScheduler
from common.execution import FastPath
from common.mask_statistics import ShrunkKDE, save_statistics
from common.pictures import COLOURS
from common.semantics import Lesion
from tools import benchmark_guidegen, benchmark_siamese, reading
from tools.benchmark_guidegen import (
    LiteralCategorical,
    MaskSteps,
    MaskVolumes,
    SliceVolumes,
    as_it_is,
    cohort_numbers,
    measure_masks,
    measure_side_by_side,
    measure_slices,
    unfused,
)
from tools.benchmark_siamese import STEPS, PairBench, StepBench, measure_guidance, measure_pairs, measure_passes
from tools.demo import picture
from tools.measuring import bundle_config
from tools.smoke import check_synthesis

TOOLS = ("verify", "package", "fetch", "publish", "import_weights", "demo", "benchmark")


CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def siamese_weights(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of smoke size that do not predict zero."""
    torch.manual_seed(0)
    state = reading.build(reading.parser(repo / "bundles/siamese_diffusion", "inference", "smoke"), "cpu").state_dict()
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({key: value + 0.05 * torch.randn(value.shape) for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_explains_itself(tool):
    done = run_command(sys.executable, f"tools/{tool}.py", "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout


@pytest.mark.parametrize("tool", ["demo", "benchmark"])
def test_an_unknown_bundle_is_a_usage_error(tool):
    done = run_command(sys.executable, f"tools/{tool}.py", "lung_dppm")
    assert done.returncode == 2
    assert "lung_dppm" in done.stdout


@pytest.mark.bundle
def test_demo_leaves_volumes_on_the_examples_grid_and_pictures(repo: Path, tmp_path: Path):
    done = run_command(sys.executable, "tools/demo.py", "lung_ddpm", "--samples", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    folder = tmp_path / "lung_ddpm"
    example = repo / "bundles/lung_ddpm/docs/example"
    original, synthetic = nib.load(example / "CT/chest.nii.gz"), nib.load(folder / "chest_image.nii.gz")
    layout = np.asarray(nib.load(folder / "chest_layout.nii.gz").dataobj)
    np.testing.assert_allclose(synthetic.affine, original.affine, atol=1e-4)
    before, after = np.asarray(original.dataobj), np.asarray(synthetic.dataobj)
    assert (before[layout == 0] == after[layout == 0]).all()
    assert (before[layout > 0] != after[layout > 0]).mean() > 0.9
    assert (layout == 2).any(), "the demo adds a nodule"
    # The lungs are air, the nodule is not: the starter weights follow the layout.
    assert after[layout == 1].mean() < -600
    assert after[layout == 2].mean() > after[layout == 1].mean() + 200
    assert Image.open(folder / "montage.png").width > 300
    assert Image.open(folder / "scroll.gif").n_frames == before.shape[2]


@pytest.mark.bundle
def test_demo_draws_masks_and_what_was_asked_over_them(repo: Path, tmp_path: Path):
    done = run_command(sys.executable, "tools/demo.py", "cmdm", "--samples", "7", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    folder = tmp_path / "cmdm"
    assert "cmdm: 7 synthetic cases" in done.stdout
    size = json.loads((repo / "bundles/cmdm/configs/inference.json").read_text())["image_size"]
    assert [np.asarray(Image.open(p)).shape for p in sorted(folder.glob("*_mask.png"))] == [tuple(size)] * 7
    assert check_synthesis(folder) == []
    # The starter weights draw what they are asked for: all but one mask within tolerance, at the least.
    made = [json.loads(p.read_text())["made_by"] for p in folder.glob("mask_*.json")]
    assert sum(m["record"]["accepted"] for m in made) >= 6
    sheet = np.asarray(Image.open(folder / "montage.png"))
    assert sheet.shape[0] < sheet.shape[1], "two rows of six and one"
    assert (sheet == COLOURS[1]).all(axis=-1).any(), "circles of what was asked"
    assert (sheet == 255).all(axis=-1).any()


@pytest.mark.bundle
def test_demo_draws_images_below_their_masks(siamese_weights: Path, tmp_path: Path):
    command = ["siamese_diffusion", "--preset", "smoke", "--weights", str(siamese_weights), "--output", str(tmp_path)]
    done = run_command(sys.executable, "tools/demo.py", *command)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "siamese_diffusion: 12 synthetic cases" in done.stdout
    assert check_synthesis(tmp_path / "siamese_diffusion") == []
    assert Image.open(tmp_path / "siamese_diffusion" / "montage.png").size == (6 * 162, 2 * 2 * 162)


def test_pairs_are_shown_in_rows_each_image_below_its_mask_and_no_reference(tmp_path: Path):
    cases = []
    for i in range(7):
        case = {key: str(tmp_path / f"{i}_{key}.png") for key in ("image", "mask", "reference")}
        colours = {"image": (10 * i, 90, 200), "reference": (255, 255, 0)}
        for key, colour in colours.items():
            Image.new("RGB", (8, 4), colour).save(case[key])
        mask = np.zeros((4, 8), dtype=np.uint8)
        mask[:, 4:] = 255
        Image.fromarray(mask).save(case["mask"])
        cases.append(case)
    (path,) = picture(cases, tmp_path)
    sheet = np.asarray(Image.open(path))
    height, width = 160 + 2, 320 + 2  # with their rims
    assert sheet.shape == (2 * 2 * height, 6 * width, 3)
    for i in range(7):
        top, left = i // 6 * 2 * height, i % 6 * width
        mask, image = (sheet[top + k * height :][1:161, left + 1 : left + 321] for k in (0, 1))
        assert (mask[:, :160] == 0).all()
        assert (mask[:, 160:] == 255).all(), "the mask's right half, with a sharp edge"
        assert (image == (10 * i, 90, 200)).all()
    assert not (sheet == (255, 255, 0)).all(axis=-1).any(), "nothing of the real image"


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--weights", "x.pt"], ["--preset", "smoke"]])
def test_demo_refuses_what_makes_no_sense(arguments: list[str]):
    assert run_command(sys.executable, "tools/demo.py", *arguments).returncode == 2


@pytest.mark.bundle
def test_benchmark_of_masks_prints_tables(repo: Path, tmp_path: Path):
    weights = tmp_path / "model.pt"
    command = ["cmdm", "--preset", "smoke", "--runs", "1", "--batch", "2", "--cases", "3", "--calls", "2", "4"]
    torch.save(reading.build(reading.parser(repo / "bundles/cmdm", "inference", "smoke"), "cpu").state_dict(), weights)
    model = ShrunkKDE().fit([[Lesion(0.1 + 0.01 * i, 0.4, 0.5)] for i in range(6)])
    save_statistics(model, tmp_path / "statistics.json")
    done = run_command(sys.executable, "tools/benchmark.py", *command, "--weights", str(weights))
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [line.strip("| \n").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    titles = [row[0] for row in rows]
    assert "2 cases" in titles
    for title in ("network call", "training step", "one chain in a call", "an unconditional pass at guidance 1"):
        assert title in titles
    curve = [row for row in rows if row[0].startswith(("ancestral", "DPM-Solver"))]
    assert [row[1] for row in curve] == ["500", "2", "4"]
    header = next(row for row in rows if row[0] == "sampler")
    for row in curve:
        assert len(row) == len(header)
        assert re.fullmatch(r"\d+\.\d+ s", row[2])
        assert 0 <= float(row[header.index("within tolerance")]) <= 1


@pytest.mark.bundle
def test_benchmark_prints_a_table(repo: Path):
    done = run_command(
        sys.executable, "tools/benchmark.py", "lung_ddpm", "--preset", "smoke", "--runs", "1", "--calls", "3"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "| network call |" in done.stdout
    assert "sampler noise" in done.stdout


@pytest.fixture(scope="module")
def steps() -> StepBench:
    torch.manual_seed(0)
    return StepBench(bundle_config("siamese_diffusion", ["smoke"]), 5, CPU)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize(("step", "of"), STEPS.values())
def test_the_timed_steps_are_one_step_made_in_two_ways(
    steps: StepBench, prediction: str, step: int, of: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(steps.scheduler, "prediction_type", prediction)
    network = copy.deepcopy(steps.fused)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    literal = steps.literal(copy.deepcopy(network), step, of)
    ours = steps.ours(network, step, of, precision="float32", channels_last=False)
    first, second = float(literal()), float(literal())
    assert [float(ours()), float(ours())] == pytest.approx([first, second], rel=2e-5)
    assert second != pytest.approx(first, rel=2e-4), "the optimiser made a step"


def test_passes_are_counted_where_they_happen(steps: StepBench):
    assert (steps.due, int((steps.batch["timesteps"] <= 200).sum())) == (1, 1)
    assert measure_passes(steps) == [
        ["as published", "10", "10", "15", "15", "2"],
        ["ours", "5", "10", "10", "10", "0"],
        ["as published, augmenting", "15", "15", "20", "20", "2"],
        ["ours, augmenting", "6", "11", "11", "10", "0"],
    ]


def test_networks_that_are_compared_differ_in_attention_alone(steps: StepBench):
    def fused(network: torch.nn.Module) -> set[bool]:
        return {m.use_flash_attention for m in network.modules() if hasattr(m, "use_flash_attention")}

    assert (fused(steps.plain), fused(steps.fast), fused(steps.fused)) == ({False}, {True}, {True})
    state = steps.plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in steps.fast.state_dict().items())
    x = steps.batch["inputs"]
    assert steps.call()().shape == steps.fast_call()().shape == x.shape


def test_samplers_of_pairs_are_compared_on_equal_masks_and_seeds(
    siamese_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(benchmark_siamese, "REFERENCE_CALLS", 6)
    torch.manual_seed(0)  # of the autoencoder, which has no weights at this size
    config = bundle_config("siamese_diffusion", ["smoke"], siamese_weights)
    bench = PairBench(config, 3, 2, str(tmp_path), CPU)
    assert (bench.masks > 0).flatten(1).any(1).all()
    rows = measure_pairs(bench, [6, 2])
    assert [row[:2] for row in rows] == [
        ["DPM-Solver++(2M)", "6"],
        ["the same, another seed", "6"],
        ["DDIM (published)", "50"],
        ["DPM-Solver++(2M)", "6"],
        ["DPM-Solver++(2M)", "2"],
    ]
    assert rows[3][3:] == ["0.000", "0.000"], "the reference over again"
    assert float(rows[1][4].split()[0]) > float(rows[4][4]) > 0
    (guidance,) = measure_guidance(bench, 1, 2)
    assert all(re.fullmatch(r"\d+\.\d{3} s", cell) for cell in guidance[1:3])


def test_distances_are_told_inside_the_lesion_and_all_over(siamese_weights: Path, tmp_path: Path):
    bench = PairBench(bundle_config("siamese_diffusion", ["smoke"], siamese_weights), 2, 2, str(tmp_path), CPU)
    image = torch.zeros(2, 3, 32, 32)
    inside = (bench.masks > 0).expand_as(image)
    share = float(inside.float().mean())
    assert 0 < share < 0.9
    assert bench.distances(torch.where(inside, 0.5, image), image) == pytest.approx([0.5, 0.5 * share**0.5])


@pytest.mark.bundle
def test_benchmark_of_pairs_prints_tables(siamese_weights: Path):
    command = ["siamese_diffusion", "--preset", "smoke", "--weights", str(siamese_weights)]
    command += ["--runs", "1", "--batch", "5", "--cases", "2", "--calls", "2"]
    done = run_command(sys.executable, "tools/benchmark.py", *command)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [line.strip("| \n").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    titles = [row[0] for row in rows]
    for title in ("network call", "training step", "training step, augmenting 1", "ours, augmenting"):
        assert title in titles
    assert [row[1] for row in rows if row[0].startswith(("DPM-Solver", "the same", "DDIM"))] == [
        "250",
        "250",
        "50",
        "2",
    ]


LABELS = CategoricalScheduler(50, 4)


def labels_and_logits(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 4, (2, 1, *shape), generator=g), 2 * torch.randn(2, 4, *shape, generator=g, dtype=dtype)


@pytest.mark.parametrize(("t", "s"), [(49, 30), (20, 19), (1, 0)])
def test_tables_of_every_x_0_are_what_ours_sums_up(t: int, s: int):
    x_t, logits = labels_and_logits(5, 3, 2)
    w, plain = logits.softmax(dim=1), LiteralCategorical(LABELS, slab=2)
    mixed = plain.mixture(x_t, w, t, s)
    near = {"atol": 1e-5, "rtol": 0}  # planes are float32
    torch.testing.assert_close(LABELS.mixture(x_t, w, t, s), mixed, **near)
    torch.testing.assert_close(LABELS.posterior_mixture(x_t, logits, t, s).exp(), mixed, **near)
    torch.testing.assert_close(LiteralCategorical(LABELS, slab=100).mixture(x_t, w, t, s), mixed, **near)
    x_0 = x_t.flip(0)
    true = plain.posterior(x_t, x_0, t, s)
    torch.testing.assert_close(LABELS.posterior(x_t, x_0, t, s).exp(), true, **near)
    slopes = []
    for kl in (plain.kl, LABELS.kl):
        leaf = logits.clone().requires_grad_()
        value = kl(x_0, x_t, leaf, t, s)
        slopes.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    for literal, ours in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, literal, atol=2e-6, rtol=1e-4)


def test_literal_draws_have_their_probabilities():
    torch.manual_seed(0)
    t, s, plain = 20, 10, LiteralCategorical(LABELS)
    x_t, logits = labels_and_logits(1, 1, dtype=torch.float32)
    x_t, many = x_t[:1], (1, -1, 200, 200)
    noised = plain.add_noise(x_t.expand(many), t)
    drawn = plain.step(logits[:1].expand(many), x_t.expand(many), t, s)
    for labels, due in (
        (noised, LABELS.marginal(x_t, t)),
        (drawn, LABELS.mixture(x_t, logits[:1].softmax(dim=1), t, s)),
    ):
        assert labels.shape == (1, 1, 200, 200)
        shares = torch.bincount(labels.flatten().long(), minlength=4) / labels.numel()
        torch.testing.assert_close(shares, due.flatten(), atol=0.01, rtol=0)


@pytest.fixture
def guidegen(repo: Path, tmp_path: Path) -> ConfigParser:
    """Smoke size with random weights that do not predict zero."""
    torch.manual_seed(0)
    for name in ("mask_network", "network"):
        parser = reading.parser(repo / "bundles/guidegen", "inference", "smoke")
        state = reading.build(parser, "cpu", f"{name}_def").state_dict()
        torch.save({k: v + 0.1 * torch.randn(v.shape) for k, v in state.items()}, tmp_path / f"{name}.pt")
    parser = bundle_config("guidegen", ["smoke"], tmp_path / "network.pt")
    parser["mask_weights"] = str(tmp_path / "mask_network.pt")
    parser["mask_train_timesteps"] = 6
    return parser


def test_masks_are_trained_and_drawn_alike_on_either_path(guidegen: ConfigParser):
    bench = MaskSteps(guidegen, 2, CPU)
    fast = bench.network()
    torch.nn.init.normal_(fast.out[2].conv.weight, std=0.1)
    plain = unfused(fast)
    flags = [{m.use_flash_attention for m in n.modules() if hasattr(m, "use_flash_attention")} for n in (plain, fast)]
    assert flags == [{False}, {True}]
    drawn = [
        bench.sampling(plain, as_it_is)(),
        bench.sampling(fast, partial(FastPath, precision="float32"))(),
    ]
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=0)
    literal = bench.training(plain, as_it_is)
    ours = bench.training(fast, partial(FastPath, precision="float32"))
    losses = [float(literal()), float(literal())]
    assert [float(ours()), float(ours())] == pytest.approx(losses, rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4), "the optimiser made a step"


def test_networks_of_voxels_and_patches_differ_at_the_door_alone(guidegen: ConfigParser):
    bench = MaskSteps(guidegen, 1, CPU)
    voxels, patches = (bench.network(patch) for patch in (1, 2))
    assert (voxels.patch_size, patches.patch_size) == (1, 2)
    assert guidegen["mask_patch_size"] == 2
    shapes = [{k: tuple(v.shape) for k, v in n.state_dict().items()} for n in (voxels, patches)]
    assert {k.split(".")[0] for k in shapes[0] if shapes[0][k] != shapes[1][k]} == {"conv_in", "out"}


def test_cohorts_of_label_volumes_are_compared_on_equal_reports_and_seeds(guidegen: ConfigParser):
    bench = MaskVolumes(guidegen, 3, CPU)
    labels, _ = bench.timed(bench.full)
    assert labels.shape == (3, 1, 24, 24, 6)
    assert len(labels.unique()) > 2
    assert torch.equal(labels[:1], bench.draw(bench.full, n=1)), "a case's draw is its own"
    cohort = bench.cohort(labels)
    same = cohort_numbers(cohort, cohort)
    assert (same["coverage"], same["least"], same["occurrence"]) == (1, 1, 0)
    rows = measure_masks(bench, [6, 2])
    assert [row[0] for row in rows] == ["6 (reference)", "6, other seeds", "6", "2"]
    assert rows[2][2:5] == ["1.000", "1.000", "0.000"], "the reference over again"
    assert float(rows[1][2]) < 1
    assert float(rows[3][2]) < 1


def test_ct_volumes_are_compared_inside_the_body(guidegen: ConfigParser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_guidegen, "REFERENCE_CALLS", 5)
    torch.manual_seed(0)  # of the autoencoder, which has no weights at this size
    bench = SliceVolumes(guidegen, 2, CPU)
    assert bench.layout.shape == (2, 1, 24, 24, 16)
    real = torch.as_tensor(bench.real).float()
    assert bench.jumps(real) == pytest.approx([1, 1])
    outside = bench.layout[:, 0] == 0
    assert bench.rmse(real, torch.where(outside, real + 100, real)) == 0
    assert bench.rmse(real, torch.where(outside, real, real + 100)) == pytest.approx(100)
    rows = measure_slices(bench, [5, 2])
    assert [row[0] for row in rows] == ["5", "5, other seeds", "5", "2"]
    assert rows[2][2] == "0.0 HU", "the reference over again"
    assert min(float(rows[i][2].split()[0]) for i in (1, 3)) > 0
    assert [row[0] for row in measure_side_by_side(bench, 1)] == ["2 volumes", "4 volumes"]


@pytest.mark.bundle
def test_benchmark_of_a_cascade_prints_tables():
    command = ["guidegen", "--preset", "smoke", "--runs", "1", "--batch", "2", "--cases", "1", "--calls", "2"]
    done = run_command(sys.executable, "tools/benchmark.py", *command, "--volume", "8", "12", "10")
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [line.strip("| \n").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    titles = [row[0] for row in rows]
    for title in ("8 x 12 x 10", "whole step, softmax and draw included", "two sampling calls", "network call"):
        assert title in titles
    assert [title for title in titles if title[0].isdigit()][-8:] == [
        "250 (reference)",
        "250, other seeds",
        "2",
        "50",
        "50, other seeds",
        "2",
        "2 volumes",
        "4 volumes",
    ]


@pytest.mark.bundle
def test_benchmark_of_lesions_prints_tables(repo: Path, tmp_path: Path):
    weights = tmp_path / "model.pt"
    bundle = repo / "bundles" / "lesion_diffusion"
    torch.save(reading.build(reading.parser(bundle, "inference", "smoke"), "cpu").state_dict(), weights)
    command = ("lesion_diffusion", "--preset", "smoke", "--weights", str(weights), "--runs", "1", "--batch", "1")
    done = run_command(sys.executable, "tools/benchmark.py", *command, "--cases", "1", "--calls", "2")
    assert done.returncode == 0, done.stdout
    for title in ("LMNet:", "LINet:", "The autoencoder, there and back", "in fewer calls", "The word for the density"):
        assert title in done.stdout
    assert "| 200 (reference) |" in done.stdout
