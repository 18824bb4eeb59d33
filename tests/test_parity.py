"""Parity: numbers made by running the published code, reproduced through our public parts.

``$PARITY_DIR`` (default ``../shared/parity``) holds one folder for each bundle, ``$PARITY_SET`` (default ``dev``) is
the prefix of the files. Nothing here knows sizes: they are read from the files, so that any further set runs as it is.
Tolerances are maximal absolute differences.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import DiffusionInferer
from monai.transforms import Compose, Orientationd, Resized, ScaleIntensityRange
from PIL import Image
from scipy import ndimage, stats

from common import lesion_boxes
from common.attribute_unet import AttributeUNet
from common.autoencoder import LatentSpace, LDMAutoencoder
from common.biomedclip import BiomedCLIPText, read_tower
from common.categorical import CategoricalKLLoss, CategoricalSampler, CategoricalScheduler
from common.checkpoints import read_knobs, read_weights, select, translate
from common.codebook import VQ, CodebookAutoencoder, codebook_usage
from common.conditioning import ConditionPrepareBatch, CrossAttention, Guided, GuidedContext
from common.controlnet import DenseHintInput, HintControlNet
from common.ldm_layout import (
    ATTRIBUTE_UNET,
    AUTOENCODER,
    CONTROLNET,
    PLAIN_UNET,
    PREFIXES,
    TEXT_ADAPTER,
    UNET,
    controlled_from_ldm,
    parts,
)
from common.lesion_diffusion import (
    AttributeCondition,
    BoxWeightedLoss,
    InpaintingLoss,
    InpaintingSampler,
    LesionInferer,
    box_volume,
)
from common.lesion_geometry import AIR, Grid, crop_start, resample, to_hu, to_unit, working_grid
from common.lesion_plan import on_latents
from common.lesion_reports import described, image_texts, mask_texts, read_reports
from common.lesion_words import canonical, cavities_of, organ_name
from common.mask_statistics import GaussianProcessKDE, size_regressor
from common.report_unet import ReportUNet, TextAdapter
from common.sampler import DiffusionSampler, InversionSampler, LayoutGuidedSampler
from common.schedules import DDIM, DDPM
from common.semantics import Lesion, components, conditions
from common.siamese import NoiseConsistencyLoss, SiameseInferer, SiameseUNet, mixed
from common.slices import GreyCondition, SliceSampler, to_unit_range
from common.solvers import DPMSolverPP
from common.totalsegmentator import MapOrgansd
from common.training import WeightEMA
from common.transforms import ColumnScaled, CropNoduled, LayoutToConditiond, ToHintd, ToMaskd, ToPictured
from common.unet import DiffusionUNet
from tools.import_weights import import_checkpoint

REPO = Path(__file__).resolve().parent.parent
PARITY_DIR = Path(os.environ.get("PARITY_DIR", REPO.parent / "shared" / "parity"))
PARITY_SET = os.environ.get("PARITY_SET", "dev")


def parity_file(bundle: str, name: str) -> Path:
    """A file of the set; its test is skipped where parity data are absent, and fails where they were asked for."""
    path = PARITY_DIR / bundle / f"{PARITY_SET}_{name}"
    if not path.is_file():
        if "PARITY_DIR" in os.environ and not any(PARITY_DIR.glob(f"*/{PARITY_SET}_*")):
            pytest.fail(f"no files of set {PARITY_SET!r} in {PARITY_DIR}")
        pytest.skip(f"parity data absent: {path}")
    return path


def numbers(bundle: str, name: str) -> Any:
    return torch.load(parity_file(bundle, name), weights_only=True)


def arrays(bundle: str, name: str) -> dict[str, np.ndarray]:
    with np.load(parity_file(bundle, name)) as file:
        return dict(file)


def settings(bundle: str, name: str) -> Any:
    return json.loads(parity_file(bundle, name).read_text())


def files_of_set(bundle: str, pattern: str) -> list[str]:
    """Names, without the set's prefix, of all files of a kind; the pattern itself if there are none, to be skipped."""
    found = (PARITY_DIR / bundle).glob(f"{PARITY_SET}_{pattern}")
    return sorted(path.name.removeprefix(f"{PARITY_SET}_") for path in found) or [pattern]


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= tolerance


class Replay:
    """A noise source that plays back recorded draws; the sampler must ask for exactly as many."""

    def __init__(self, draws: Iterable[torch.Tensor]) -> None:
        self.draws = list(draws)

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        return self.draws.pop(0).expand_as(like).clone()


# ---------------------------------------------------------------------------------------------------------------------
# lung_ddpm


def lung_network(variant: str, **knobs: Any) -> torch.nn.Module:
    """The authors' checkpoint through the public import path."""
    config = settings("lung_ddpm", f"{variant}_config.json")
    network, _ = import_checkpoint(
        REPO / "bundles" / "lung_ddpm",
        parity_file("lung_ddpm", f"{variant}_ckpt.pt"),
        norm_num_groups=config["norm_num_groups"],
        **knobs,
    )
    count = sum(p.numel() for p in network.parameters())
    assert count == config["resolved"]["params"]
    return network.eval()


@pytest.mark.parametrize("variant", ["lungddpm", "plus"])
def test_lung_ddpm_network(variant):
    io = numbers("lung_ddpm", f"{variant}_io.pt")
    network = lung_network(variant)
    with torch.no_grad():
        for t, expected in zip(io["t"], io["out"], strict=True):
            assert_near(network(torch.cat([io["x"], io["condition"]], dim=1), t), expected, 2e-5)
        raw = lung_network(variant, part="model")
        out = raw(torch.cat([io["x"], io["condition"]], dim=1), io["t"][0])
    assert_near(out, io["out_raw_model_t0"], 2e-5)
    assert (out - io["out"][0]).abs().max() > 1e-3, "EMA and raw weights must differ, else the choice is not tested"


def test_lung_ddpm_schedule():
    tables = numbers("lung_ddpm", "schedule.pt")
    for name, table in tables.items():
        scheduler = DDPM(int(name.removeprefix("T")), "cosine_exact", clip_sample=True)
        assert_near(scheduler.betas, table["betas_float64"], 1e-13)
        assert_near(scheduler.alphas_cumprod, table["alphas_cumprod_float64"], 1e-13)
        assert_near(scheduler.betas.float(), table["betas"], 1e-7)
        assert_near(scheduler.alphas_cumprod.float(), table["alphas_cumprod"], 1e-7)


def test_lung_ddpm_posterior_steps():
    data = numbers("lung_ddpm", "lungddpm_steps_T250.pt")
    scheduler = DDPM(250, "cosine_exact")
    for step in data["steps"]:
        x_prev, _ = scheduler.step(step["eps"], step["i"], step["x_t"], generator=Replay([step["noise"]]))
        assert_near(x_prev, step["x_prev"], 1e-5)


def test_lung_ddpm_ema_rule():
    rule = numbers("lung_ddpm", "lungddpm_steps_T250.pt")["ema_rule"]
    network = torch.nn.Linear(rule["model"].shape[1], rule["model"].shape[0], bias=False)
    network.weight.data = rule["ema_before"].clone()
    ema = WeightEMA(network, decay=rule["beta"], every=10, start=2000)
    network.weight.data = rule["model"].clone()
    engine = type("Engine", (), {"state": type("State", (), {"iteration": 2000})})
    ema(engine)
    assert_near(ema.module.weight, rule["ema_after"], 1e-7)


def test_lung_ddpm_training_losses_and_gradients():
    data = numbers("lung_ddpm", "lungddpm_train.pt")
    rules = json.loads((REPO / "bundles/lung_ddpm/configs/import_rules.json").read_text())["authors"]
    network = lung_network("lungddpm")
    scheduler = DDPM(250, "cosine_exact")
    t, noise = data["t"], data["noise"]
    assert_near(scheduler.add_noise(data["x_start"], noise, t), data["x_noisy"], 1e-6)
    inferer, mode = DiffusionInferer(scheduler), ConditionPrepareBatch(250).mode
    forward = {"noise": noise, "timesteps": t, "condition": data["condition"], "mode": mode}

    pred = inferer(data["x_start"], network, **forward)
    loss = torch.nn.functional.l1_loss(pred, noise)
    assert_near(loss.detach(), data["loss_l1"], 1e-5)
    assert_near(torch.nn.functional.mse_loss(pred, noise).detach(), data["loss_l2"], 1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert (norm / data["grad_norm_l1"] - 1).abs() <= 1e-5

    # Gradients travel through the same rename table as weights.
    source = read_weights(parity_file("lung_ddpm", "lungddpm_ckpt.pt"))["ema"]
    known = {f"denoise_fn.{k}": v for k, v in data["grads_l1_reference_names"].items()}
    marks = translate({k: torch.full_like(v, float(k in known)) for k, v in source.items()}, rules, gradients)
    expected = translate({k: known.get(k, torch.zeros_like(v)) for k, v in source.items()}, rules, gradients)
    assert sum(bool(m.any()) for m in marks.values()) >= len(known)
    for name, mark in marks.items():
        assert_near(gradients[name] * mark, expected[name], 1e-6)

    # Three Adam steps of accumulated halves are three steps of the batch twice as large.
    adam = data["adam"]
    optimizer = torch.optim.Adam(network.parameters(), lr=adam["lr"])
    losses = []
    for _ in range(adam["steps"]):
        optimizer.zero_grad()
        for _ in range(adam["accumulate"]):
            loss = torch.nn.functional.l1_loss(inferer(data["x_start"], network, **forward), noise)
            losses.append(loss.detach())
            (loss / adam["accumulate"] / adam["batch_divisor"]).backward()
        optimizer.step()
    assert_near(torch.stack(losses), adam["losses"], 1e-5)
    assert_near(network.out[2].conv.weight.detach(), adam["out_conv_weight_after"], 1e-6)
    assert_near(network.conv_in.conv.weight.detach(), adam["conv_in_weight_after"], 1e-6)


def lung_sampler(steps: int, blend_from: int) -> LayoutGuidedSampler:
    return LayoutGuidedSampler(
        DDPM(steps, "cosine_exact", clip_sample=True), steps, blend_from=blend_from, blend_mode="reference"
    )


def test_lung_ddpm_layout_guided_trajectory():
    """The published sampler with every draw recorded: start, steps, blends, for each ``blend_from``."""
    data, detail = numbers("lung_ddpm", "lungddpm_traj_noise.pt"), numbers("lung_ddpm", "lungddpm_traj_detail.pt")
    steps, network = data["T"], lung_network("lungddpm")
    inputs = torch.cat([data["x_ref"], data["condition"].float()], dim=1)
    for name, result in data["results"].items():
        draws = [data["init_noise"]]
        for i in reversed(range(steps)):
            draws += [data["step_noise"][i], data["blend_noise"][i]]
        states: dict[int, torch.Tensor] = {}
        sampler = lung_sampler(steps, int(name.removeprefix("blend_from_")))
        sampler.on_step = lambda index, x, states=states: states.update({steps - 2 - index: x})
        replay = Replay(draws)
        final = sampler(inputs, network, noise=replay)
        assert not replay.draws, "the reference draws at every step, also where it does not use the draw"
        assert_near(final, result["final"], 1e-4)
        for i, expected in detail["results"][name]["step_input"].items():
            if int(i) in states:
                assert_near(states[int(i)], expected, 1e-4)


def test_lung_ddpm_seeded_trajectory():
    """A seed means the same sample as in the reference: one generator, its draws in its order."""
    data = numbers("lung_ddpm", "lungddpm_traj_T250_seeded.pt")
    network = lung_network("lungddpm")
    inputs = torch.cat([data["x_ref"], data["condition"].float()], dim=1)
    for name, result in data["results"].items():
        sampler = lung_sampler(data["T"], int(name.removeprefix("blend_from_")))
        if len(inputs) == 1:
            final = sampler(inputs, network, seeds=[result["seed"]])
        else:
            generator = torch.Generator().manual_seed(result["seed"])
            final = sampler(inputs, network, noise=lambda like, g=generator: torch.randn(like.shape, generator=g))
        assert_near(final, result["final"], 1e-4)


def test_lung_ddpm_plus_solver():
    """Lung-DDPM+ as published: inversion, third order, dynamic thresholding and the mis-scaled time."""
    data = numbers("lung_ddpm", "plus_dpm.pt")
    network = lung_network("plus")
    inputs = torch.cat([data["x_ref"], data["condition"]], dim=1)
    runs = [{**data, "uses_x_ref": True, "t_inputs": data["model_time_inputs"]}, *data["short"]]
    for run in runs:
        solver = DPMSolverPP(run["T"], "cosine_exact", order=run["order"], thresholding="dynamic", time_scale=1000.0)
        times: list[float] = []

        def watched(x, t, times=times):
            times.append(float(t[0]))
            return network(x, t)

        if run["uses_x_ref"]:
            final = InversionSampler(solver, run["steps"])(inputs, watched, noise=lambda like: data["init_noise"])
        else:
            final = DiffusionSampler(solver, run["steps"])(
                data["condition"], watched, noise=lambda like: data["init_noise"]
            )
        assert_near(final, run["final"], 1e-3)
        # The reference makes one more call at the end of every run and throws it away.
        n = run["steps"]
        useful = [t for i, t in enumerate(run["t_inputs"].tolist()) if i % (n + 1) != n]
        assert_near(torch.tensor(times), torch.tensor(useful), 1e-3)

    solver = DPMSolverPP(data["T"], "cosine_exact", order=data["order"], thresholding="dynamic", time_scale=1000.0)
    sampler = InversionSampler(solver, data["steps"])
    denoise = sampler.condition(network, data["condition"])
    with torch.no_grad():
        assert_near(sampler.invert(inputs, denoise, lambda like: data["init_noise"]), data["inverted"], 1e-3)


def raw_volume(array: torch.Tensor) -> MetaTensor:
    """The reference reads raw arrays as (D, H, W); we say so with an affine whose axes point S, P, L."""
    affine = torch.tensor([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    return MetaTensor(array[None].float(), affine=affine)


@pytest.mark.parametrize("case", ["same_size", "resized"])
def test_lung_ddpm_preparation(case):
    """The legacy scaling and axis order of the training loader."""
    data = numbers("lung_ddpm", "prep.pt")[case]
    size = (data["size_d"], data["size_hw"], data["size_hw"])
    prepare = Compose(
        [
            Orientationd(("image", "layout"), axcodes="SLP", labels=None),
            LayoutToConditiond("layout", "condition", labels=range(1, 1 + len(data["condition"]))),
            ColumnScaled("image", axis=1),
            Resized(("image", "condition"), size, mode="trilinear", align_corners=False),
        ]
    )
    out = prepare({"image": raw_volume(data["ct_raw"]), "layout": raw_volume(data["seg_raw"])})
    assert_near(torch.as_tensor(out["image"]), data["target"], 1e-5)
    assert_near(torch.as_tensor(out["condition"]), data["condition"], 1e-5)


def test_lung_ddpm_plus_crop():
    """The cube around one nodule voxel, exactly."""
    data = numbers("lung_ddpm", "prep.pt")["plus_crop"]
    for case in data["cases"]:
        layout = torch.zeros_like(data["ct_raw"])
        layout[tuple(case["nodule_voxel"].tolist())] = 2
        prepare = Compose(
            [
                Orientationd(("image", "layout"), axcodes="SLP", labels=None),
                ColumnScaled("image", axis=1),
                CropNoduled(("image", "layout"), "layout", size=[int(case["cube"])] * 3),
                LayoutToConditiond("layout", "condition", labels=[2]),
            ]
        )
        out = prepare({"image": raw_volume(data["ct_raw"]), "layout": raw_volume(layout)})
        assert_near(torch.as_tensor(out["image"]), case["target"], 1e-6)
        assert_near(torch.as_tensor(out["condition"]), case["condition"], 0)


# ---------------------------------------------------------------------------------------------------------------------
# cmdm


@pytest.mark.parametrize("name", files_of_set("cmdm", "semantics_*.json"))
def test_cmdm_semantics_of_masks(name):
    """Masks bit for bit, components and conditions exactly."""
    expected = settings("cmdm", name)
    size = expected["image_size"]
    binary = arrays("cmdm", name.replace(".json", "_binary.npz"))["masks"]
    prepare, found = ToMaskd("mask", (size, size)), []
    for row, theirs in zip(expected["per_file"], binary, strict=True):
        image = np.array(Image.open(PARITY_DIR / "cmdm" / f"{PARITY_SET}_semantic_masks" / row["file"]))
        image = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
        columns_first = MetaTensor(torch.as_tensor(image).transpose(1, 2))
        ours = prepare({"mask": columns_first})["mask"][0].numpy()
        assert np.array_equal(ours * 255, theirs), row["file"]
        _, rows = components(ours > 0, expected["size_threshold"])
        assert rows.tolist() == [[part["size"], part["x"], part["y"]] for part in row["components"]], row["file"]
        assert len(rows) == row["count"]
        found += (rows / [size**2, size, size]).tolist()
    condition = np.concatenate([conditions([Lesion(*row)], [1]) for row in found])
    theirs = np.column_stack([expected["size_norm"], expected["location_norm"]])
    assert np.array_equal(condition, theirs.astype(np.float32))


@pytest.mark.parametrize("name", files_of_set("cmdm", "sampling_*.json"))
def test_cmdm_statistics_of_size_given_place(name):
    """The Gaussian process with the recorded rows and kernel."""
    data, expected = arrays("cmdm", name.replace(".json", ".npz")), settings("cmdm", name)
    regressor = size_regressor(data["X_train"], data["y_train"], expected["gp_theta_log"])
    mean, deviation = regressor.predict(data["grid_yx"], return_std=True)
    np.testing.assert_allclose(mean, data["gp_mean"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(deviation, data["gp_std"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(regressor.predict(data["X_test"]), data["y_pred"], rtol=0, atol=1e-6)
    likelihood = regressor.log_marginal_likelihood(regressor.kernel_.theta)
    assert likelihood == pytest.approx(expected["gp_log_marginal_likelihood"], abs=1e-4)


@pytest.mark.parametrize("name", files_of_set("cmdm", "sampling_*.json"))
def test_cmdm_statistics_of_the_whole_model(name):
    """Our fit finds their split, kernel, error and density; our draws are distributed as theirs."""
    data, expected = arrays("cmdm", name.replace(".json", ".npz")), settings("cmdm", name)
    scale = np.array([expected["image_size"] ** 2, expected["image_size"], expected["image_size"]])
    rows = np.column_stack([data["size"], data["x"], data["y"]]) / scale
    of_masks = np.split(rows, np.cumsum(data["count"])[:-1])
    model = GaussianProcessKDE().fit([[Lesion(*row) for row in mask.tolist()] for mask in of_masks])
    np.testing.assert_allclose(rows[model.train][:, [2, 1]], data["X_train"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(model.regressor.kernel_.theta, expected["gp_theta_log"], rtol=0, atol=1e-3)
    assert model.error == pytest.approx(expected["mae"], abs=1e-5)
    np.testing.assert_allclose(model.places.covariance, data["kde_covariance"], rtol=1e-6)
    assert model.places.factor == pytest.approx(expected["kde_factor"], rel=1e-9)
    draws = model.propose((1,), 4000, np.random.default_rng(0))[:, 0, 0]
    theirs = data["draws_size_y_x"][:, [0, 2, 1]] / scale
    for ours, drawn in zip(draws.T, theirs.T, strict=True):
        assert stats.ks_2samp(ours, drawn).pvalue > 0.001


def cmdm_network(name: str) -> torch.nn.Module:
    """The authors' checkpoint through the public import path."""
    expected = settings("cmdm", name)
    file = parity_file("cmdm", name.replace(".json", ".pt"))
    network, card = import_checkpoint(REPO / "bundles" / "cmdm", file, preset="paper", num_heads=expected["num_heads"])
    assert card["parameters"] == expected["parameters"]
    assert sum(entry["count"] for entry in card["keys"]["dropped"].values()) == 7, "only the schedule's tables"
    return network.eval()


def cmdm_scheduler(expected: dict) -> DDPM:
    """As paper.json has it: T + 1 entries, of which entry 0 is never visited."""
    paper = json.loads((REPO / "bundles/cmdm/configs/paper.json").read_text())["scheduler"]
    fixed = {k: v for k, v in paper.items() if k[0] != "_" and not str(v).startswith("@")}
    betas = {"beta_start": expected["beta1"], "beta_end": expected["beta2"]}
    return DDPM(expected["n_T"] + 1, "linear_exact", **betas, **fixed)


CMDM_NETWORKS = files_of_set("cmdm", "net_*.json")


def tensors(bundle: str, name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in arrays(bundle, name).items()}


@pytest.mark.parametrize("name", CMDM_NETWORKS)
def test_cmdm_network(name):
    data, network = tensors("cmdm", name.replace(".json", ".npz")), cmdm_network(name)
    probed: dict[str, torch.Tensor] = {}
    stages = {"time_embed": network.time_embed, "input_block_1": network.down_blocks[0].resnets[0]}
    stages["output_block_0"] = network.up_blocks[0].resnets[0]
    # A reference block is a residual block and, where there is one, the attention behind it.
    if hasattr(network.down_blocks[0], "attentions"):
        stages["input_block_1"] = network.down_blocks[0].attentions[0]
    if hasattr(network.up_blocks[0], "attentions"):
        stages["output_block_0"] = network.up_blocks[0].attentions[0]
    stages["middle_block"] = network.middle_block
    for probe, module in stages.items():
        module.register_forward_hook(lambda _m, _i, out, probe=probe: probed.update({probe: out}))
    times = data["t"] * settings("cmdm", name)["n_T"]
    with torch.no_grad():
        assert_near(network(data["x"], times, data["cond"]), data["eps"], 2e-5)
        for probe, value in probed.items():
            assert_near(value, data[f"probe_{probe}"], 2e-5)
        assert_near(network(data["x"], times), data["eps_null"], 2e-5)
        assert_near(network(data["x"], times, torch.zeros_like(data["cond"])), data["eps_null"], 2e-5)


@pytest.mark.parametrize("name", CMDM_NETWORKS)
def test_cmdm_training_loss_and_gradients(name):
    data, expected, network = tensors("cmdm", name.replace(".json", ".npz")), settings("cmdm", name), cmdm_network(name)
    scheduler = cmdm_scheduler(expected)
    prepare = ConditionPrepareBatch(expected["n_T"] + 1, first_timestep=1, mode="crossattn", drop=1.0)
    dropped = torch.where(data["train_drop"][:, None] > 0, prepare.dropped(data["train_cond"]), data["train_cond"])
    assert_near(dropped, data["train_cond_after_drop"], 0)
    pred = DiffusionInferer(scheduler)(
        data["train_x0"],
        network,
        data["train_noise"],
        data["train_t_index"].long(),
        condition=dropped,
        mode="crossattn",
    )
    loss = torch.nn.functional.mse_loss(pred, data["train_noise"])
    assert abs(loss.item() - data["train_loss"].item()) <= 1e-6 * max(1, loss.item())
    loss.backward()
    rules = json.loads((REPO / "bundles/cmdm/configs/import_rules.json").read_text())["authors"]
    source = read_weights(parity_file("cmdm", name.replace(".json", ".pt")))["model_state_dict"]
    known = {key.removeprefix("grad__"): value for key, value in data.items() if key.startswith("grad__")}
    known = {key if key in source else f"nn_model.{key}": value for key, value in known.items()}
    assert len(known) >= 5
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    marks = translate({k: torch.full_like(v, float(k in known)) for k, v in source.items()}, rules, gradients)
    theirs = translate({k: known.get(k, torch.zeros_like(v)) for k, v in source.items()}, rules, gradients)
    assert sum(bool(mark.any()) for mark in marks.values()) >= len(known)
    for key, mark in marks.items():
        assert_near(gradients[key] * mark, theirs[key], 1e-5)


@pytest.mark.parametrize("name", CMDM_NETWORKS)
def test_cmdm_chains(name):
    """Whole reverse chains with every draw recorded, for each guidance weight w: our scale is 1 + w."""
    data, expected, network = tensors("cmdm", name.replace(".json", ".npz")), settings("cmdm", name), cmdm_network(name)
    size = (expected["image_size"],) * 2
    for weight in expected["guide_weights"]:
        # The reference draws nothing at the last step, where ours draws and does not use it.
        replay = Replay([*data["sample_noise"], torch.zeros(1)])
        guided = Guided(CrossAttention(), 1 + weight)
        sampler = DiffusionSampler(cmdm_scheduler(expected), expected["n_T"], condition=guided, latent_shape=size)
        assert_near(sampler(data["sample_cond"], network, noise=replay), data[f"sample_out_w{weight}"], 2e-4)
        assert not replay.draws


@pytest.mark.parametrize("name", files_of_set("cmdm", "schedules.npz"))
def test_cmdm_schedules(name):
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors("cmdm", name).items():
        prefix, _, table = key.rpartition("__")
        groups.setdefault(prefix, {})[table] = value
    for prefix, tables in groups.items():
        b1, b2, steps = (float(part.partition("=")[2]) for part in prefix.split(","))
        scheduler = cmdm_scheduler({"n_T": int(steps), "beta1": b1, "beta2": b2})
        alpha, abar, beta = scheduler.alphas, scheduler.alphas_cumprod, scheduler.betas
        # The reference takes 1 - abar in float32, where digits cancel near 0: compare what it took the root of.
        tables["mab_over_sqrtmab"] = tables["mab_over_sqrtmab"] * tables["sqrtmab"]
        tables["sqrtmab"] = tables["sqrtmab"] ** 2
        ours = {
            "alpha_t": alpha,
            "oneover_sqrta": 1 / alpha.sqrt(),
            "sqrt_beta_t": beta.sqrt(),
            "alphabar_t": abar,
            "sqrtab": abar.sqrt(),
            "sqrtmab": 1 - abar,
            "mab_over_sqrtmab": beta,
        }
        assert set(ours) == set(tables)
        for table, values in tables.items():
            assert_near(ours[table].to(values), values, 5e-7)


# ---------------------------------------------------------------------------------------------------------------------
# siamese_diffusion

SIAMESE = [name.removesuffix("settings.json") for name in files_of_set("siamese_diffusion", "*settings.json")]
of_siamese = pytest.mark.parametrize("variant", SIAMESE)


def siamese_checkpoint(variant: str) -> dict[str, torch.Tensor]:
    """The parts of the set put together as the merged checkpoint they come from, in float32."""
    merged: dict[str, torch.Tensor] = {}
    for name, prefix in {"unet": PREFIXES["unet"], "vae": PREFIXES["autoencoder"]}.items():
        merged |= {prefix + k: v for k, v in tensors("siamese_diffusion", f"{variant}weights_{name}.npz").items()}
    for name in ("controlnet", "dhi"):
        weights = tensors("siamese_diffusion", f"{variant}weights_{name}.npz")
        merged |= {PREFIXES["controlnet"] + k: v for k, v in weights.items()}
    expected = settings("siamese_diffusion", f"{variant}settings.json")["checkpoint_keys"]
    merged |= {k: torch.zeros(shape) for k, shape in expected.items() if k not in merged and "." not in k}
    assert {k: list(v.shape) for k, v in merged.items()} == expected
    return {k: v.float() for k, v in merged.items()}


def siamese_built(found: dict[str, dict], heads: list[int]) -> SiameseUNet:
    """U-Net and ControlNet at the size of the weights."""
    knobs = read_knobs(found["unet"], UNET, {"num_head_channels": heads})
    control = read_knobs(found["controlnet"], CONTROLNET, {"num_head_channels": heads})
    hint, dense, merges = (control.pop(k) for k in ("hint_channels", "dense_hint", "num_merges"))
    stem = DenseHintInput(2, hint, knobs["channels"][0], merges) if dense else None
    controlnet = HintControlNet(2, stem=stem, conditioning_embedding_in_channels=hint, **control)
    return SiameseUNet(DiffusionUNet(2, **knobs), controlnet)


def siamese_heads(config: dict, found: dict[str, dict]) -> list[int]:
    channels = read_knobs(found["unet"], UNET)["channels"]
    return [c // config["num_heads"] if "num_heads" in config else config["num_head_channels"] for c in channels]


def siamese_network(variant: str) -> SiameseUNet:
    """The authors' merged checkpoint through the public import path."""
    merged, config = siamese_checkpoint(variant), siamese_settings(variant)["unet_config"]
    found = parts(merged)
    network = siamese_built(found, siamese_heads(config, found))
    network.load_state_dict(controlled_from_ldm(merged, network.state_dict()))
    return network


def siamese_settings(variant: str) -> dict:
    return settings("siamese_diffusion", f"{variant}settings.json")["settings"]


def siamese_scheduler(variant: str, kind: type = DDPM, **kwargs: Any) -> Any:
    expected = siamese_settings(variant)
    betas = {"beta_start": expected["linear_start"], "beta_end": expected["linear_end"]}
    return kind(expected["timesteps"], "scaled_linear_exact", **betas, clip_sample=False, **kwargs)


@of_siamese
def test_siamese_diffusion_networks(variant):
    data, network = tensors("siamese_diffusion", f"{variant}networks.npz"), siamese_network(variant)
    x, t, context = data["x"], data["timesteps"], data["context"]
    with torch.no_grad():
        control = {}
        for kind in ("mask", "image"):
            hint = network.encode_hint(data[f"hint_{kind}"])
            assert_near(hint, data[f"dhi_{kind}"], 2e-5)
            control[kind] = network.controlnet(x, t, context=context, encoded=hint)
            expected = [data[k] for k in sorted(data) if k.startswith(f"control_{kind}_")]
            for ours, theirs in zip([*control[kind][0], control[kind][1]], expected, strict=True):
                assert_near(ours, theirs, 5e-5)
        assert_near(network(x, t, context), data["eps_no_control"], 2e-5)
        assert_near(network(x, t, context, data["hint_mask"]), data["eps_mask"], 2e-5)
        features = network.encode(x, t, context)
        for key in (k for k in data if k.startswith("eps_mix_wi")):
            control_mix = mixed(control["mask"], control["image"], float(key.removeprefix("eps_mix_wi")))
            assert_near(network.decode(features, control_mix, context), data[key], 2e-5)
        # The reference's switch "only middle control" is a control whose skips are zero.
        only_mid = ([torch.zeros_like(c) for c in control["mask"][0]], control["mask"][1])
        assert_near(network.decode(features, only_mid, context), data["eps_mask_only_mid"], 2e-5)


def siamese_latents(variant: str) -> LatentSpace:
    state = parts(siamese_checkpoint(variant))["autoencoder"]
    autoencoder = LDMAutoencoder(2, **read_knobs(state, AUTOENCODER))
    autoencoder.load_state_dict(translate(state, AUTOENCODER, autoencoder.state_dict()))
    return LatentSpace(autoencoder, siamese_settings(variant)["scale_factor"])


@of_siamese
def test_siamese_diffusion_vae(variant):
    data, latents = tensors("siamese_diffusion", f"{variant}vae.npz"), siamese_latents(variant)
    mean, deviation = latents.moments(data["pixel"])
    assert_near(mean, data["latent_scaled_mean"], 2e-5)
    assert_near(mean / latents.scale, data["mean"], 5e-5)
    assert_near(deviation / latents.scale, data["std"], 5e-5)
    assert_near(2 * (deviation / latents.scale).log(), data["logvar"], 5e-5)
    assert_near(latents.decode(latents.scale * data["z"]), data["decoded"], 1e-4)


class Answers(SiameseUNet):
    """Networks replaced by recorded answers; remembers what they were asked."""

    def __init__(self, answers: dict[str, torch.Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.answers, self.asked = answers, []

    def encode(self, x, timesteps, context):
        self.asked.append(x)
        return x, [], x

    def encode_hint(self, hint):
        return hint

    def controlnet(self, x, *args, **kwargs):
        return [], torch.zeros_like(x)

    def tokens(self, x, context):
        return context

    def decode(self, encoded, control, context, frozen=False):
        if frozen:
            return self.answers["mix"]
        return self.answers["mask"] if len(self.asked) == 1 else self.answers["mask_aug"]


@of_siamese
def test_siamese_diffusion_losses(variant):
    """Our step with the recorded predictions: what is asked, the terms, and the gradients with respect to them."""
    data = tensors("siamese_diffusion", f"{variant}losses.npz")
    for case in settings("siamese_diffusion", f"{variant}settings.json")["loss_cases"]:
        mine = {
            k.removeprefix(f"case{case['case']}_"): v
            for k, v in data.items()
            if k[4 : k.index("_")] == str(case["case"])
        }
        t, noise, hint = mine["t"], mine["noise"], torch.zeros(len(mine["t"]), 1, 1, 1)
        given = {k: mine[f"eps_{k}"].requires_grad_() for k in ("mask", "mix", "mask_aug")}
        due = (t <= 200) & case["online_aug_ran"]
        network = Answers({**given, "mask_aug": given["mask_aug"][due]})
        inferer, loss = SiameseInferer(siamese_scheduler(variant)), NoiseConsistencyLoss()
        inferer.advance(case["global_step"], case["max_steps"])
        pred = inferer(mine["z0"], network, noise, t, hint, hint)
        assert_near(network.asked[0], mine["z_t"], 1e-6)
        assert (len(network.asked) == 2) == case["online_aug_ran"]
        if case["online_aug_ran"]:
            assert_near(network.asked[1], mine["z_t_aug"][due], 1e-5)
        total = loss(pred, noise)
        assert_near(total.detach(), mine["total"], 1e-6)
        rows = torch.stack(list(loss.terms(pred, noise).values())).detach()
        assert_near(rows[:3], mine["terms_per_sample"][:3], 1e-6)
        if case["online_aug_ran"]:
            assert_near(rows[3], mine["terms_per_sample"][3] * due, 1e-6)
        total.backward()
        for name, answer in given.items():
            if f"grad_eps_{name}" in mine:
                assert_near(answer.grad, mine[f"grad_eps_{name}"], 1e-6)


@of_siamese
def test_siamese_diffusion_train_steps(variant):
    """Whole steps: terms, the norm of every gradient, some gradients in full, and who gets none."""
    data = tensors("siamese_diffusion", f"{variant}train_steps.npz")
    network, found = siamese_network(variant), parts(siamese_checkpoint(variant))
    rules = {"control": (found["controlnet"], CONTROLNET), "unet": (found["unet"], UNET)}
    modules = {"control": network.controlnet, "unet": network.unet}
    for case in settings("siamese_diffusion", f"{variant}settings.json")["train_step_cases"]:
        mine = {k.partition("_")[2]: v for k, v in data.items() if k.startswith(f"case{case['case']}_")}
        inferer, loss = SiameseInferer(siamese_scheduler(variant)), NoiseConsistencyLoss()
        inferer.advance(case["global_step"], case["max_steps"])
        network.zero_grad(set_to_none=True)
        inputs = [data[k] for k in ("noise", "hint_mask", "hint_image", "context")]
        pred = inferer(data["z0"], network, inputs[0], mine["t"], *inputs[1:])
        total = loss(pred, data["noise"])
        assert_near(pred["mask"].detach(), mine["eps_mask"], 2e-5)
        assert_near(pred["image"].detach(), mine["eps_mix"], 2e-5)
        assert abs(total.item() - case["total"]) <= 5e-6 * max(1, case["total"])
        rows = torch.stack(list(loss.terms(pred, data["noise"]).values())).detach()
        due = mine["t"] <= 200
        if "eps_mask_aug" in mine:
            assert_near(pred["augmented"][due].detach(), mine["eps_mask_aug"][due], 5e-5)
        assert_near(rows[:3], mine["terms_per_sample"][:3], 1e-5)
        total.backward()
        for side, (weights, rule) in rules.items():
            gradients = {k: p.grad for k, p in modules[side].named_parameters()}
            # Names travel as weights do: each is written into a tensor of its own shape.
            order = list(weights)
            marks = translate(
                {k: torch.full_like(weights[k], n) for n, k in enumerate(order)}, rule, gradient_shapes(modules[side])
            )
            theirs = {order[int(mark.flatten()[0])]: gradients[k] for k, mark in marks.items()}
            norms = case[f"grad_norm_{side}"]
            assert {k for k, g in theirs.items() if g is not None} == set(norms)
            largest = max(norms.values())
            for key, norm in norms.items():
                assert abs(theirs[key].norm().item() - norm) <= 1e-4 * norm + 1e-6 * largest, key
            known = {k.removeprefix(f"grad_{side}."): v for k, v in mine.items() if k.startswith(f"grad_{side}.")}
            assert known
            for key, gradient in known.items():
                assert_near(theirs[key], gradient, 1e-5 * max(1, gradient.abs().max().item()))


def gradient_shapes(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: torch.zeros(p.shape) for k, p in module.named_parameters()}


@of_siamese
def test_siamese_diffusion_ddim(variant, monkeypatch):
    """Guided sampling by the public sampler: timesteps, every state and x_0, the decoded image."""
    data, network = tensors("siamese_diffusion", f"{variant}ddim.npz"), siamese_network(variant)
    scheduler = siamese_scheduler(variant, DDIM, grid="strided", steps_offset=1, final_alpha="first")
    step = scheduler.step
    assert_near(scheduler.betas.float(), data["betas"], 1e-7)
    assert_near(scheduler.alphas_cumprod.float(), data["alphas_cumprod"], 1e-6)
    for name in sorted(k.removesuffix("_latent") for k in data if k.endswith("_latent")):
        steps, scale = (float(part.lstrip("Scfg")) for part in name.split("_"))
        guided = GuidedContext(scale, data["uncond_context"], context=data["context"])
        sampler = DiffusionSampler(scheduler, int(steps), channels=data["x_T"].shape[1], condition=guided,
                                   latent_shape=data["x_T"].shape[2:])  # fmt: skip
        steps_made: list[tuple[torch.Tensor, torch.Tensor]] = []
        monkeypatch.setattr(scheduler, "step", lambda *a, s=steps_made, **k: s.append(step(*a, **k)) or s[-1])
        latent = sampler(data["hint_mask"], network, noise=lambda like: data["x_T"])
        theirs = data[f"timesteps_S{int(steps)}"]
        assert scheduler.timesteps.tolist() in (theirs.tolist(), theirs.flip(0).tolist())
        assert_near(latent, data[f"{name}_latent"], 2e-3)
        if f"{name}_x_inter" in data:
            states, clean = (torch.stack(tensors) for tensors in zip(*steps_made, strict=True))
            assert_near(states, data[f"{name}_x_inter"], 2e-3)
            assert_near(clean, data[f"{name}_pred_x0"], 2e-3)
        if f"{name}_image" in data:
            assert_near(siamese_latents(variant).decode(latent), data[f"{name}_image"], 2e-3)


@pytest.mark.parametrize("name", files_of_set("siamese_diffusion", "*sd15_size_keys.json"))
def test_siamese_diffusion_keys_at_stable_diffusions_size(name):
    """Every key of the full checkpoint has its place and shape: no memory, all on the meta device."""
    # As integers, for which nobody asks whether they are finite.
    content = {
        k: torch.empty(s, dtype=torch.int8, device="meta") for k, s in settings("siamese_diffusion", name).items()
    }
    found = parts(content)
    with torch.device("meta"):
        channels = read_knobs(found["unet"], UNET)["channels"]
        network = siamese_built(found, [c // 8 for c in channels])
        autoencoder = LDMAutoencoder(2, **read_knobs(found["autoencoder"], AUTOENCODER))
    filled = controlled_from_ldm(content, network.state_dict())
    assert {k: v.shape for k, v in filled.items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert len(found["unet"]) + len(found["controlnet"]) == len(filled)
    vae = translate(found["autoencoder"], AUTOENCODER, autoencoder.state_dict())
    assert len(vae) == len(found["autoencoder"]) + 2, "quant_conv splits in two, weight and bias"
    # Stable Diffusion as it is released: the ControlNet starts as the U-Net's encoder.
    plain = {k: v for k, v in content.items() if not k.startswith(PREFIXES["controlnet"])}
    assert set(controlled_from_ldm(plain, network.state_dict())) == set(filled)


@pytest.mark.parametrize("name", files_of_set("siamese_diffusion", "*dataset.npz"))
def test_siamese_diffusion_preprocessing(name):
    """Masks bit for bit, images within one grey level (the reference rounds between resizing and scaling)."""
    data = arrays("siamese_diffusion", name)

    def prepared(k: int, size: tuple[int, ...]) -> dict[str, torch.Tensor]:
        prepare = Compose([ToHintd("mask", size), ToPictured("image", size)])
        loaded = {}
        for key in ("image", "mask"):
            picture = data[f"in_{key}_{k}"]
            picture = picture[..., None] if picture.ndim == 2 else picture
            loaded[key] = MetaTensor(torch.from_numpy(picture).permute(2, 1, 0))
        return {key: value.as_tensor() for key, value in prepare(loaded).items()}

    for k in range(sum(key.startswith("in_image_") for key in data)):
        hint, image = (torch.from_numpy(data[f"out_{key}_{k}"]).movedim(-1, 0) for key in ("hint", "jpg"))
        ours = prepared(k, tuple(hint.shape[1:]))
        assert torch.equal(ours["mask"].expand_as(hint), hint)
        assert_near(ours["image"], image, 1 / 127.5)
    default = prepared(0, (384, 384))
    assert 3 * default["mask"].sum().item() == data["out384_hint_0_sum"]
    assert default["image"].mean().item() == pytest.approx(float(data["out384_jpg_0_mean"]), abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# guidegen


def categorical_cases(name: str) -> list[dict[str, Any]]:
    data = arrays("guidegen", name)
    return [
        {k.removeprefix(f"c{n}_"): v for k, v in data.items() if k.startswith(f"c{n}_")}
        for n in range(int(data["n_cases"]))
    ]


def categorical_scheduler(case: dict[str, Any], stored: bool = True) -> CategoricalScheduler:
    """The published mode; with its own float32 tables, or with ours."""
    T, K = int(case["T"]), int(case["K"])
    if str(case["schedule"]) == "cosine":
        scheduler = CategoricalScheduler(T, K, "cosine_exact", mode="ccdm_v1")
    else:
        scheduler = CategoricalScheduler(T, K, "linear_exact", mode="ccdm_v1", beta_start=0.01, beta_end=0.2)
    tables = {"betas": "betas", "alphas": "alphas", "alphas_cumprod": "cumalphas"}
    for ours, theirs in tables.items():
        table = torch.from_numpy(case[theirs]).double()
        assert_near(getattr(scheduler, ours), table, 1e-6)
        if stored:
            setattr(scheduler, ours, table)
    if stored:
        scheduler.betas = 1 - scheduler.alphas
    return scheduler


@pytest.mark.parametrize("stored", [True, False], ids=["stored-tables", "our-tables"])
@pytest.mark.parametrize("name", files_of_set("guidegen", "categorical.npz"))
def test_guidegen_categorical(name, stored):
    """Forward process, posterior, its mixture, KL and the published loss."""
    tolerance = 2e-6 if stored else 5e-4
    for case in categorical_cases(name):
        scheduler, t = categorical_scheduler(case, stored), torch.from_numpy(case["t"]) - 1
        mine = {k: torch.from_numpy(v) for k, v in case.items() if v.dtype.kind in "fu" and v.ndim > 1}
        x_0, x_t, x_before = (mine[f"{k}_lab"][:, None] for k in ("x0", "xt", "xtm1"))
        logits = mine["x0_probs"].log()
        assert_near(scheduler.marginal(x_0, t), mine["q_xt_x0"], tolerance)
        assert_near(scheduler.marginal(x_before, t, None), mine["q_xt_xtm1"], tolerance)
        assert_near(scheduler.posterior(x_t, x_0, t).exp(), mine["post"], tolerance)
        assert_near(scheduler.posterior_mixture(x_t, logits, t).exp(), mine["post_mix"], tolerance)
        largest = max(1, mine["kl_map"].max().item())
        assert_near(scheduler.kl(x_0, x_t, logits, t)[:, 0], mine["kl_map"], (2e-6 if stored else 2e-3) * largest)
        loss = CategoricalKLLoss(scheduler, case["class_weights"].tolist(), reduction="sum")
        loss({"logits": logits, "x_t": x_t, "timesteps": t}, x_0)
        for term, theirs in (("kl", "loss_kl"), ("ce", "loss_ce_on_probs")):
            relative = loss.latest[term].item() / float(case[theirs]) - 1
            assert abs(relative) <= (1e-5 if stored else 5e-3), (term, relative)


def guidegen_rules(config: dict[str, Any]) -> dict[str, Any]:
    """Rules with what the weights do not tell."""
    return {**PLAIN_UNET, "constants": {**PLAIN_UNET["constants"], "head_channels": config["num_head_channels"]}}


def norms(config: dict[str, Any]) -> dict[str, Any]:
    return {"norm_num_groups": config["norm_groups"], "norm_eps": config["norm_eps"]}


def guidegen_unet(source: dict[str, torch.Tensor], config: dict[str, Any]) -> DiffusionUNet:
    """The published U-Net of either stage, the first without its softmax, at the size that its weights tell."""
    rules = guidegen_rules(config)
    knobs = read_knobs(source, rules, norms(config))
    width = config.get("base_channels", config.get("model_channels"))
    assert knobs["channels"] == [width * m for m in config["channel_mult"]]
    network = DiffusionUNet(config["dims"], **knobs)
    network.load_state_dict(translate(source, rules, network.state_dict()))
    return network.eval()


def guidegen_mask_network(variant: str, weights: str = "average_model") -> DiffusionUNet:
    found = numbers("guidegen", f"{variant}_ckpt.pt")[weights]
    return guidegen_unet(found, settings("guidegen", f"{variant}_settings.json"))


GUIDEGEN_MASKS = files_of_set("guidegen", "stage1*_io.npz")
of_guidegen_masks = pytest.mark.parametrize("name", GUIDEGEN_MASKS)


@of_guidegen_masks
def test_guidegen_mask_networks(name):
    """Logits and probabilities of all weights in the file, with the blank channel at 0 and, as in CCDM, an image."""
    variant, data = name.removesuffix("_io.npz"), tensors("guidegen", name)
    classes = settings("guidegen", f"{variant}_settings.json")["num_classes"]
    planes = CategoricalScheduler(10, classes).one_hot(data["xt_lab"][:, None])
    images = {key.removeprefix("image_"): image for key, image in data.items() if key.startswith("image_")}
    for weights in numbers("guidegen", f"{variant}_ckpt.pt"):
        network, label = guidegen_mask_network(variant, weights), weights.removesuffix("_model")
        for kind, image in images.items():
            with torch.no_grad():
                logits = network(torch.cat([planes, image], dim=1), data["t"])
            assert_near(logits, data[f"logits_{label}_{kind}"], 1e-5)
            assert_near(logits.softmax(dim=1), data[f"probs_{label}_{kind}"], 5e-6)


@of_guidegen_masks
def test_guidegen_mask_network_of_the_bundle(name):
    """Ours fills the blank channel itself, and reads no text."""
    variant, data = name.removesuffix("_io.npz"), tensors("guidegen", name)
    config = settings("guidegen", f"{variant}_settings.json")
    source = numbers("guidegen", f"{variant}_ckpt.pt")["average_model"]
    knobs = read_knobs(source, guidegen_rules(config), norms(config))
    classes = knobs["out_channels"]
    network = ReportUNet(config["dims"], blank_channels=knobs["in_channels"] - classes, **knobs).eval()
    network.load_state_dict(guidegen_mask_network(variant).state_dict())
    planes = CategoricalScheduler(10, classes).one_hot(data["xt_lab"][:, None])
    with torch.no_grad():
        logits = network(planes, data["t"], torch.randn(len(planes), 3, 7))
    assert_near(logits, data["logits_average_zero"], 1e-5)


@of_guidegen_masks
def test_guidegen_mask_chain(name):
    """The reverse loop with the recorded uniforms gives the same labels."""
    variant, data = name.removesuffix("_io.npz"), tensors("guidegen", name)
    if "chain_T" not in data:
        pytest.skip(f"{name} records no chain")
    T, K = int(data["chain_T"]), settings("guidegen", f"{variant}_settings.json")["num_classes"]
    scheduler = CategoricalScheduler(T, K, mode="ccdm_v1")
    network, states = guidegen_mask_network(variant), []
    uniforms = [data["chain_xT_lab"].add(0.5) / K, *data["chain_uniforms"]]
    replay = Replay(torch.special.ndtri(u.double())[:, None].float() for u in uniforms)
    sampler = CategoricalSampler(scheduler, T, on_step=lambda index, x: states.append(x[:, 0]))
    image = torch.zeros_like(uniforms[0])[:, None]
    final = sampler(image, network, noise=replay)
    assert not replay.draws
    for state, theirs in zip(states[:-1], data["chain_step_labs"], strict=True):
        assert torch.equal(state, theirs.float())
    assert torch.equal(final[:, 0], data["chain_final_lab"].float())
    scheduler.last_step = "probs"
    replay = Replay(torch.special.ndtri(u.double())[:, None].float() for u in uniforms)
    assert_near(sampler(image, network, noise=replay), data["chain_final_probs"], 1e-5)


GUIDEGEN_STEPS = 70  # of the rate in the recorded training step, as the data's README says


def guidegen_rates(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The published rate, lr max((1 - m) (1 - step / (S - 1)) + m, m), is torch's linear one."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=1e-3, total_iters=steps - 1)


@of_guidegen_masks
def test_guidegen_mask_training_step(name):
    """One real step: terms of the loss, norm of the gradient, the last bias and its average after it, the next rate."""
    variant, data = name.removesuffix("_io.npz"), tensors("guidegen", name)
    if "train_t" not in data:
        pytest.skip(f"{name} records no training step")
    classes = settings("guidegen", f"{variant}_settings.json")["num_classes"]
    scheduler, network = CategoricalScheduler(1000, classes, mode="ccdm_v1"), guidegen_mask_network(variant, "model")
    optimizer = torch.optim.AdamW(network.parameters(), lr=data["train_lr"].item(), weight_decay=0.01)
    rates, ema = guidegen_rates(optimizer, GUIDEGEN_STEPS), WeightEMA(network, decay=0.9999)

    x_0, x_t = (data[f"train_{k}_lab"][:, None] for k in ("x0", "xt"))
    image = torch.zeros(len(x_t), network.in_channels - classes, *x_t.shape[2:])
    logits = network(torch.cat([scheduler.one_hot(x_t), image], dim=1), data["train_t"])
    loss = CategoricalKLLoss(scheduler, data["train_class_weights"].tolist(), reduction="sum")
    total = loss({"logits": logits, "x_t": x_t, "timesteps": data["train_t"] - 1}, x_0)
    assert loss.latest["kl"].item() == pytest.approx(data["train_loss_kl"].item(), rel=1e-4)
    assert loss.latest["ce"].item() == pytest.approx(data["train_loss_ce"].item(), rel=1e-5)
    assert total.item() == pytest.approx(data["train_loss"].item(), rel=1e-5)
    total.backward()
    norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
    assert norm.item() == pytest.approx(data["train_grad_norm"].item(), rel=1e-5)

    optimizer.step()
    rates.step()
    ema(type("Engine", (), {"state": type("State", (), {"iteration": 1})}))
    assert_near(network.out[2].conv.bias.detach(), data["train_post_out_bias"], 1e-6)
    assert_near(ema.module.out[2].conv.bias, data["train_post_out_bias_ema"], 1e-6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(data["train_lr_next"].item(), rel=1e-9)


@pytest.mark.parametrize("name", files_of_set("guidegen", "text_adapter*.npz"))
def test_guidegen_text_adapter(name):
    """Their tokens are columns, ours rows."""
    data = tensors("guidegen", name)
    source = {k.removeprefix("sd."): v for k, v in data.items() if k.startswith("sd.")}
    knobs = read_knobs(source, TEXT_ADAPTER)
    assert knobs == {"width": int(data["embed_dim"]), "depth": int(data["depth"])}
    heads = {"num_heads": int(data["n_heads"]), "num_head_channels": int(data["d_head"])}
    for dropout in (0.0, float(data["dropout"])):
        adapter = TextAdapter(**knobs, **heads, dropout=dropout).eval()
        adapter.load_state_dict(translate(source, TEXT_ADAPTER, adapter.state_dict()))
        with torch.no_grad():
            assert_near_relative(adapter(data["x"].mT).mT, data["y"], 1e-6)


GUIDEGEN_SLICES = [name for name in files_of_set("guidegen", "stage2*_io.npz") if "_ae" not in name]
of_guidegen_slices = pytest.mark.parametrize("name", GUIDEGEN_SLICES)


def guidegen_stage_2(name: str) -> dict[str, Any]:
    """Settings of the network and of the diffusion, flat."""
    found = settings("guidegen", name.replace("_io.npz", "_settings.json"))
    return {**found, **found["unet"], **found["diffusion"]}


def guidegen_slice_network(name: str, averaged: bool = True) -> DiffusionUNet:
    """The published 2-D U-Net, by the rules that the bundle's import has."""
    content = numbers("guidegen", name.replace("_io.npz", "_unet_ckpt.pt"))
    rules = {"select": ["state_dict"], **({"ema": ["model.", "model_ema."]} if averaged else {})}
    prefix = "model.diffusion_model."
    source = {k.removeprefix(prefix): v for k, v in select(content, rules)[0].items() if k.startswith(prefix)}
    return guidegen_unet(source, guidegen_stage_2(name))


def guidegen_scheduler(name: str, kind: type[DDPM] = DDPM, **kwargs: Any) -> Any:
    expected = guidegen_stage_2(name)
    betas = {"beta_start": expected["linear_start"], "beta_end": expected["linear_end"]}
    return kind(expected["timesteps"], "scaled_linear_exact", clip_sample=False, **betas, **kwargs)


def guidegen_ddim(name: str, eta: float = 0.0) -> DDIM:
    return guidegen_scheduler(name, DDIM, grid="strided", steps_offset=1, final_alpha="first", eta=eta)


def assert_near_relative(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert_near(ours, theirs, tolerance * theirs.abs().max().item())


@of_guidegen_slices
def test_guidegen_slice_training(name):
    """Schedule, forward process, prediction and loss, of the weights and of their averages."""
    data, scheduler = tensors("guidegen", name), guidegen_scheduler(name)
    assert_near(scheduler.betas.float(), data["betas"], 1e-7)
    assert_near(scheduler.alphas_cumprod.float(), data["alphas_cumprod"], 5e-7)
    assert_near(scheduler.add_noise(data["x_start"], data["noise"], data["t"]), data["x_noisy"], 1e-6)
    predictions = []
    for label in ("model", "ema"):
        network = guidegen_slice_network(name, averaged=label == "ema")
        forward = {"condition": data["cond"], "mode": ConditionPrepareBatch(1000).mode}
        with torch.no_grad():
            eps = DiffusionInferer(scheduler)(data["x_start"], network, data["noise"], data["t"], **forward)
        assert_near(eps, data[f"eps_{label}"], 1e-5)
        loss = torch.nn.functional.mse_loss(eps, data["noise"])
        assert loss.item() == pytest.approx(data[f"loss_{label}"].item(), rel=1e-5)
        predictions.append(eps)
    assert (predictions[0] - predictions[1]).abs().max() > 1e-3, "else the choice of weights is not tested"


@of_guidegen_slices
def test_guidegen_ddim(name):
    """Grids, levels and whole runs, without noise and with the recorded one."""
    data, scheduler = tensors("guidegen", name), guidegen_ddim(name)
    for key, theirs in data.items():
        steps = key.removeprefix("ddim_timesteps_")
        if steps.isdigit():
            scheduler.set_timesteps(int(steps))
            assert scheduler.timesteps.flip(0).tolist() == theirs.tolist()
    network, steps = guidegen_slice_network(name), int(data["ddim_S"])
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.flip(0)
    assert times.tolist() == data["ddim_timesteps"].tolist()
    levels = scheduler.alphas_cumprod[times]
    assert_near(levels.float(), data["ddim_alphas"].float(), 5e-7)
    before = torch.cat([scheduler.alphas_cumprod[:1], levels[:-1]])
    assert_near(before.float(), data["ddim_alphas_prev"].float(), 5e-7)
    runs = {key: value for key, value in data.items() if re.fullmatch(r"ddim_eta[\d.]+", key)}
    assert runs
    for key, theirs in runs.items():
        eta = float(key.removeprefix("ddim_eta"))
        replay = Replay([data["ddim_xT"], *(data[f"{key}_noise"] if eta else [])])
        sampler = DiffusionSampler(guidegen_ddim(name, eta), steps, channels=data["ddim_xT"].shape[1])
        assert_near_relative(sampler(data["cond"], network, noise=replay), theirs, 2e-6)
        assert not replay.draws


@of_guidegen_slices
def test_guidegen_slices_one_after_another(name):
    """A whole volume; their slices come first, ours last."""
    data = tensors("guidegen", name)
    if "ar_mask_lab" not in data:
        pytest.skip(f"{name} records no volume")
    layout = data["ar_mask_lab"].movedim(0, -1)[None, None].float()
    first = int(layout.flatten(0, 3).any(dim=0).int().argmax())
    # Where labels begin at the bottom, the reference starts one slice below it, at the top: a slip that ours has not.
    order = [z for z in data["ar_order"].tolist() if z >= 0]
    raw: list[torch.Tensor] = []
    sampler = SliceSampler(
        DiffusionSampler(guidegen_ddim(name), int(data["ddim_S"]), channels=data["x_start"].shape[1]),
        GreyCondition(),
        outside=0.0,
        lead=first - order[0],
        rescale=lambda state: raw.append(state) or to_unit_range(state),
    )
    replay = Replay([data["ar_xT"][z] for z in order])
    volume = sampler(layout, guidegen_slice_network(name), noise=replay).movedim(-1, 2)
    assert not replay.draws
    assert_near_relative(torch.stack(raw, dim=2), data["ar_raw_slices"][:, :, order], 2e-6)
    there = order if len(order) < len(data["ar_order"]) else list(range(volume.shape[2]))
    assert_near(volume[:, :, there], data["ar_volume_minmax"][:, :, there], 2e-6)


@pytest.mark.parametrize("name", files_of_set("guidegen", "stage2*_ae_io.npz"))
def test_guidegen_autoencoder(name):
    data, config = tensors("guidegen", name), settings("guidegen", name.replace("_io.npz", "_settings.json"))
    content = numbers("guidegen", name.replace("_io.npz", "_ckpt.pt"))
    source, _ = select(content, {"select": ["state_dict", ""]})
    knobs = {**read_knobs(source, AUTOENCODER), **norms(config)}
    autoencoder = LDMAutoencoder(config["ddconfig"]["dims"], **knobs).eval()
    autoencoder.load_state_dict(translate(source, AUTOENCODER, autoencoder.state_dict()))
    with torch.no_grad():
        mean, std = autoencoder.encode(data["x"])
        decoded = autoencoder.decode(data["mean"])
    assert_near(mean, data["mean"], 5e-6)
    assert_near(std, data["std"], 5e-6)
    assert_near(2 * std.log(), data["logvar"], 1e-5)
    divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(dim=1)
    assert_near_relative(divergence, data["kl"], 1e-5)
    assert_near(decoded, data["decoded_mean"], 3e-5)


GUIDEGEN_MISC = pytest.mark.parametrize("name", files_of_set("guidegen", "misc*.json"))


@GUIDEGEN_MISC
def test_guidegen_intensities(name):
    """The window of paper.json."""
    misc, paper = settings("guidegen", name), json.loads((REPO / "bundles/guidegen/configs/paper.json").read_text())
    (low, high), (dark, bright) = paper["hu_window"], paper["intensity_range"]
    window = ScaleIntensityRange(low, high, dark, bright, clip=True)
    assert_near(torch.as_tensor(window(torch.tensor(misc["hu"]))), torch.tensor(misc["window_norm"]), 1e-6)


@GUIDEGEN_MISC
def test_guidegen_labels(name):
    """TotalSegmentator's numbers become the first stage's classes; the second stage's, as released, lag by one."""
    misc, tumour = settings("guidegen", name), settings("guidegen", name)["stage1_tumour_label"]
    numbers_of = torch.tensor(misc["totalseg_v1_labels"])[None, :, None, None]
    known = MapOrgansd("layout", "totalsegmentator_v1", "tumour", num_classes=1 + tumour)
    case = {"layout": MetaTensor(numbers_of), "tumour": MetaTensor(torch.zeros(numbers_of.shape))}
    ours = known(case)["layout"].flatten().tolist()
    assert ours == misc["stage1_map"]
    assert [max(0, value - 1) for value in ours] == misc["stage2_map_as_released"]
    case["tumour"][:, 5:9] = 1
    assert known(case)["layout"].flatten().tolist() == [*ours[:5], *[tumour] * 4, *ours[9:]]


@GUIDEGEN_MISC
def test_guidegen_laws_of_training(name):
    """Learning rate, times and the average's warm-up."""
    misc = settings("guidegen", name)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates, found = guidegen_rates(optimizer, misc["lr_total_steps"]), []
    for _ in misc["lr_factor_by_step"]:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    np.testing.assert_allclose(found, misc["lr_factor_by_step"], rtol=1e-9)

    # Their times begin with 1; 0 stands in the table and is never drawn.
    law = ConditionPrepareBatch(misc["t_sampling_T"], t_power=1.5).time_law()
    ours = [law[t - 1].item() if t else 0.0 for t in misc["t_sampling_t"]]
    np.testing.assert_allclose(ours, misc["t_sampling_prob_t"], rtol=1e-6)

    ema = WeightEMA(torch.nn.Linear(1, 1), decay=max(misc["ema_warm_decay"]), warmup=True)
    np.testing.assert_allclose([ema.decay_at(n) for n in misc["ema_warm_updates"]], misc["ema_warm_decay"], rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# lesion_diffusion: a variant's files are called as its kind, with whatever the set puts before or behind that

LESION_MASKS = files_of_set("lesion_diffusion", "*lmnet*_io.npz")
LESION_PAINT = files_of_set("lesion_diffusion", "*linet*_io.npz")
of_lesion_masks = pytest.mark.parametrize("name", LESION_MASKS)
of_lesion_paint = pytest.mark.parametrize("name", LESION_PAINT)


def lesion_settings(name: str) -> dict[str, Any]:
    """Settings of a variant: its own file where it has one, else the set's."""
    parity_file("lesion_diffusion", name)
    variant = re.sub(r"(lmnet|linet|vq)", "settings", name.removesuffix("_io.npz")) + ".json"
    known = files_of_set("lesion_diffusion", "*settings*.json")
    return settings("lesion_diffusion", variant if variant in known else known[0])


def lesion_unet_settings(name: str) -> dict[str, Any]:
    return lesion_settings(name)["linet_unet" if "linet" in name else "lmnet_unet"]


def lesion_checkpoint(name: str) -> dict[str, torch.Tensor]:
    """The authors' checkpoint, which these data hold in two files."""
    stem = name.removesuffix("_io.npz")
    files = [f"{stem}.pt", *(file for file in files_of_set("lesion_diffusion", "*_ema.pt") if file == f"{stem}_ema.pt")]
    return {k: v for file in files for k, v in numbers("lesion_diffusion", file)["state_dict"].items()}


def lesion_network(name: str, averaged: bool = True) -> AttributeUNet:
    ema = {"ema": ["model.", "model_ema."]} if averaged else {}
    state, _ = select(lesion_checkpoint(name), ema)
    source = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    constants = {**ATTRIBUTE_UNET["constants"], "head_channels": lesion_unet_settings(name)["num_head_channels"]}
    rules = {**ATTRIBUTE_UNET, "constants": constants}
    network = AttributeUNet(source["input_blocks.0.0.weight"].ndim - 2, **read_knobs(source, rules)).eval()
    network.load_state_dict(translate(source, rules, network.state_dict()))
    return network


def lesion_condition(name: str) -> AttributeCondition:
    return AttributeCondition(use_text=not lesion_unet_settings(name).get("skip_context", False))


def lesion_scheduler(name: str, kind: type[DDPM] = DDPM, **kwargs: Any) -> Any:
    expected = lesion_settings(name)["schedule"]
    betas = {"beta_start": expected["linear_start"], "beta_end": expected["linear_end"]}
    return kind(expected["timesteps"], "scaled_linear_exact", clip_sample=False, **betas, **kwargs)


def lesion_ddim(name: str, eta: float) -> DDIM:
    return lesion_scheduler(name, DDIM, grid="strided", steps_offset=1, final_alpha="first", eta=eta)


def gradient_norm(network: torch.nn.Module) -> float:
    # What None of the text switches off has no gradient.
    return torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm().item()


@pytest.mark.parametrize("name", files_of_set("lesion_diffusion", "*schedule*.npz"))
def test_lesion_diffusion_schedule(name):
    data, scheduler = tensors("lesion_diffusion", name), lesion_scheduler(name)
    abar = scheduler.alphas_cumprod
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    variance = scheduler.betas * (1 - before) / (1 - abar)
    ours = {
        "betas": scheduler.betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "posterior_variance": variance,
        "posterior_mean_coef1": scheduler.betas * before.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - before) * scheduler.alphas.sqrt() / (1 - abar),
    }
    for key in ours.keys() & data.keys():
        assert_near(ours[key].float(), data[key].float(), 5e-7)
    counts = [int(found[1]) for key in data if (found := re.fullmatch(r"ddim(\d+)_timesteps", key))]
    assert counts
    for steps in counts:
        for eta in (0.0, 1.0):
            ddim = lesion_ddim(name, eta)
            ddim.set_timesteps(steps)
            times = ddim.timesteps.flip(0)
            assert times.tolist() == data[f"ddim{steps}_timesteps"].tolist()
            level = abar[times]
            earlier = torch.cat([abar[:1], level[:-1]])
            assert_near(level, data[f"ddim{steps}_alphas"].double(), 5e-7)
            assert_near(earlier, data[f"ddim{steps}_alphas_prev"].double(), 5e-7)
            # The noise of each step, as the step itself draws it.
            one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
            noisy, still = (
                [ddim.step(nothing, t, nothing, generator=lambda like, z=z: z.to(like))[0] for t in times]
                for z in (one, nothing)
            )
            assert_near(torch.cat(noisy) - torch.cat(still), data[f"ddim{steps}_eta{eta:.0f}_sigmas"].double(), 1e-6)


@of_lesion_masks
def test_lesion_diffusion_mask_network(name):
    data = tensors("lesion_diffusion", name)
    predictions = [
        lesion_condition(name)(lesion_network(name, averaged), data["cond"], data["context"])
        for averaged in (False, True)
    ]
    with torch.no_grad():
        raw, ema = (denoise(data["x_t"], data["t"]) for denoise in predictions)
    assert_near(raw, data["eps"], 2e-5)
    assert_near(ema, data["eps_ema"], 2e-5)
    assert (raw - ema).abs().max() > 1e-3, "else the choice of weights is not tested"


@of_lesion_masks
def test_lesion_diffusion_mask_training(name):
    """Noised mask, loss and gradients of one step."""
    data, network = tensors("lesion_diffusion", name), lesion_network(name, averaged=False)
    scheduler = lesion_scheduler(name)
    assert_near(scheduler.add_noise(data["x0"], data["noise"], data["t"]), data["x_noisy"], 1e-6)
    forward = {"condition": data["cond"], "context": data["context"]}
    pred = LesionInferer(scheduler)(data["x0"], network, data["noise"], data["t"], **forward)
    box = (data["cond"][:, -1:] > 0).float()
    loss = BoxWeightedLoss(lesion_settings(name)["lmnet"]["fg_loss_weight"])(
        pred, {"target": data["noise"], "mask": box}
    )
    assert loss.item() == pytest.approx(data["loss"].item(), rel=1e-5)
    loss.backward()
    assert gradient_norm(network) == pytest.approx(data["grad_norm"].item(), rel=1e-5)
    assert_near_relative(network.conv_in.conv.weight.grad, data["grad_conv_in"], 2e-5)


@of_lesion_masks
def test_lesion_diffusion_mask_chain(name):
    data, ddim = tensors("lesion_diffusion", name), lesion_settings(name)["ddim"]
    cases, channels = data["ddim_x_T"].shape[:2]
    replay = Replay([data["ddim_x_T"], *data["ddim_noise"]])
    sampler = DiffusionSampler(
        lesion_ddim(name, ddim["eta"]), ddim["steps"], channels=channels, condition=lesion_condition(name)
    )
    network = lesion_network(name, ddim["weights"] == "ema")
    sample = sampler(data["cond"][:cases], network, noise=replay, context=data["context"][:cases])
    assert not replay.draws
    assert_near_relative(sample, data["ddim_sample"], 5e-6)


@of_lesion_paint
def test_lesion_diffusion_paint_network(name):
    """With text, from averages, and with the text switched off as in the authors' shipped settings."""
    data = tensors("lesion_diffusion", name)
    told, silent = lesion_condition(name), AttributeCondition(use_text=False)
    for key, averaged, condition in (
        ("out", False, told), ("out_ema", True, told), ("out_skip_context", False, silent)
    ):  # fmt: skip
        network = lesion_network(name, averaged)
        if condition is silent and not network.attends_to_itself:
            continue
        with torch.no_grad():
            out = condition(network, data["mask"], data["context"])(data["x_t"], data["t"])
        assert_near(out, data[key], 2e-5)


@of_lesion_paint
def test_lesion_diffusion_paint_training(name):
    data, network = tensors("lesion_diffusion", name), lesion_network(name, averaged=False)
    context = data["context"] if lesion_condition(name).use_text else None
    forward = {"condition": data["mask"], "context": context, "mask": data["mask"]}
    pred = LesionInferer(lesion_scheduler(name))(data["z0"], network, data["noise"], data["t"], **forward)
    assert (box_volume(data["mask"]) <= data["coarse_mask"].flatten(1).sum(dim=1)).all()
    loss = InpaintingLoss()
    total = loss(pred, {"target": data["noise"], "mask": data["mask"], "box": data["coarse_mask"]})
    assert loss.latest["painted"].item() == pytest.approx(data["loss_l1"].item(), rel=1e-5)
    assert loss.latest["dice"].item() == pytest.approx(data["loss_dice"].item(), rel=1e-5)
    assert total.item() == pytest.approx(data["loss"].item(), rel=1e-5)
    total.backward()
    assert gradient_norm(network) == pytest.approx(data["grad_norm"].item(), rel=1e-5)
    assert_near_relative(network.conv_in.conv.weight.grad, data["grad_conv_in"], 2e-5)


def lesion_autoencoder(name: str) -> CodebookAutoencoder:
    """The first stage in a checkpoint of the second."""
    prefix = "first_stage_model."
    source = {k.removeprefix(prefix): v for k, v in lesion_checkpoint(name).items() if k.startswith(prefix)}
    dims = source["encoder.conv_in.weight"].ndim - 2
    autoencoder = CodebookAutoencoder(dims, **read_knobs(source, VQ)).eval()
    autoencoder.load_state_dict(translate(source, VQ, autoencoder.state_dict()))
    return autoencoder


def lesion_painted(name: str) -> tuple[torch.Tensor, InpaintingSampler]:
    """The chain's latents, and the sampler that made them."""
    data, ddim = tensors("lesion_diffusion", name), lesion_settings(name)["ddim"]
    cases, channels = data["ddim_x_T"].shape[:2]
    replay = Replay([data["ddim_x_T"], *data["ddim_noise"]])
    sampler = InpaintingSampler(
        lesion_ddim(name, ddim["eta"]), ddim["steps"], channels=channels, condition=lesion_condition(name)
    )
    inputs = torch.cat([data["z0"], data["mask"]], dim=1)[:cases]
    network = lesion_network(name, ddim["weights"] == "ema")
    sample = sampler(inputs, network, noise=replay, context=data["context"][:cases])
    assert not replay.draws
    return sample, sampler


@of_lesion_paint
def test_lesion_diffusion_paint_chain(name):
    """Latents, and the image that is decoded from them; their mask comes out as it went in."""
    data = tensors("lesion_diffusion", name)
    sample, sampler = lesion_painted(name)
    mask = data["mask"][: len(sample)]
    assert_near_relative(sample, data["ddim_sample"], 5e-6)
    assert torch.equal(data["ddim_mask_out"], mask)
    assert sampler.mask_logit.shape == mask.shape
    with torch.no_grad():
        assert_near(lesion_autoencoder(name).decode(data["ddim_sample"]), data["decoded"], 3e-5)


LESION_DATA = pytest.mark.parametrize("name", files_of_set("lesion_diffusion", "*preproc*.json"))
LESION_TEXTS = pytest.mark.parametrize("name", files_of_set("lesion_diffusion", "*text*.json"))
LESION_HOLLOW = ("urinary bladder", "stomach", "colon", "esophagus")


def lesion_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays beside a JSON file."""
    return arrays("lesion_diffusion", name.replace(".json", "_arrays.npz"))


def numbered(data: Iterable[str], pattern: str) -> list[str]:
    """Numbers that complete a pattern to names of data."""
    return sorted(found[1] for key in data if (found := re.fullmatch(pattern, key)))


@LESION_DATA
def test_lesion_diffusion_intensities(name):
    data = {key: torch.from_numpy(value) for key, value in lesion_arrays(name).items()}
    assert_near(to_unit(data["hu"]), data["hu_norm"], 2e-7)
    assert_near(to_hu(data["norm"]), data["norm_hu"], 2e-4)


@LESION_DATA
def test_lesion_diffusion_orientation(name):
    """Their loader's axes are ours, S, A, L, whatever the file's."""
    data = lesion_arrays(name)
    for i in numbered(data, r"std(\d+)_in"):
        for file, of, loaded in (("in", "affine", f"load{i}_array"), ("out", "out_affine", f"std{i}_loaded")):
            volume, affine = torch.from_numpy(data[f"std{i}_{file}"])[None], data[f"std{i}_{of}"]
            own = np.abs(affine[:3, :3]).max(axis=1)[::-1]
            ours = resample(volume, affine, working_grid(volume.shape[1:], affine, own))
            assert_near(ours[0], torch.from_numpy(data[loaded]).float(), 1e-4)


@LESION_DATA
def test_lesion_diffusion_true_spacing(name):
    """Theirs zooms end to end, (n - 1) s mm over m voxels that it declares 1 mm; ours is where it says."""
    data, facts = lesion_arrays(name), settings("lesion_diffusion", name)
    for i in numbered(data, r"std(\d+)_in"):
        volume, affine = data[f"std{i}_in"], data[f"std{i}_affine"]
        theirs, declared = data[f"std{i}_out"], np.array(facts[f"std{i}"]["out_zooms"])
        own = Grid(affine, volume.shape)
        lps = MetaTensor(torch.from_numpy(volume)[None], affine=torch.from_numpy(affine))
        lps = Orientationd("image", axcodes=facts[f"std{i}"]["out_axcodes"], labels=None)({"image": lps})["image"]
        n, m = np.array(lps.shape[1:]), np.array(theirs.shape)
        pitch = np.array(np.linalg.norm(np.asarray(lps.affine)[:3, :3], axis=0))
        places = [np.arange(b) * (a - 1) / (b - 1) for a, b in zip(n, m)]
        zoomed = ndimage.map_coordinates(np.asarray(lps[0], np.float64), np.meshgrid(*places, indexing="ij"), order=1)
        np.testing.assert_allclose(theirs, zoomed, atol=1e-3)
        assert np.abs((n - 1) * pitch / (m - 1) - declared).max() > 0.01 or np.allclose(pitch, declared)

        ours = working_grid(volume.shape, affine, float(declared[0]))
        np.testing.assert_allclose(ours.spacing, declared)
        extent = np.sort([own.to_world([-0.5] * 3), own.to_world(np.array(volume.shape) - 0.5)], axis=0)
        covered = np.sort([ours.to_world([-0.5] * 3), ours.to_world(np.array(ours.shape) - 0.5)], axis=0)
        assert (covered[0] <= extent[0] + 1e-6).all()
        assert (covered[1] >= extent[1] - 1e-6).all()
        assert (covered[1] - covered[0] < extent[1] - extent[0] + declared).all()
        if own.spacing.min() >= declared.max():  # nothing to average: the plain reading at the true place
            at = own.index_of(ours.to_world(np.moveaxis(np.indices(ours.shape), 0, -1)))
            plain = ndimage.map_coordinates(volume.astype(np.float64), np.moveaxis(at, -1, 0), order=1, mode="nearest")
            inside = ((at >= -0.5) & (at <= np.array(volume.shape) - 0.5)).all(axis=-1)
            found = resample(torch.from_numpy(volume)[None], affine, ours, fill=AIR)[0].numpy()
            np.testing.assert_allclose(found[inside], plain[inside], atol=1e-3)
            assert (found[~inside] == AIR).all()


@LESION_DATA
def test_lesion_diffusion_training_crops(name):
    """Around the largest lesion; where theirs pads with water at the end, to the crop and 8, ours has air around."""
    data, facts = lesion_arrays(name), settings("lesion_diffusion", name)
    for i in numbered(data, r"crop(\d+)_label"):
        size, label = facts[f"crop{i}"]["crop"], data[f"crop{i}_label"]
        short = any(n <= s for n, s in zip(label.shape[1:], size))
        full = [max(n, s + 8) if short else n for n, s in zip(label.shape[1:], size)]
        assert full == facts[f"crop{i}"]["full_size"]
        padding = [(0, 0), *((0, f - n) for f, n in zip(full, label.shape[1:]))]
        centre = lesion_boxes.centre_of(label[0] == 2)
        start = crop_start(centre, size, full)
        assert list(start) == facts[f"crop{i}"]["crop_start"]
        for key in ("label", "image"):
            volume = torch.from_numpy(data[f"crop{i}_{key}"])
            padded = torch.from_numpy(np.pad(volume.numpy(), padding))
            grid = Grid(np.eye(4), tuple(full))
            found = resample(padded, np.eye(4), grid.crop(start, size), "nearest")
            assert torch.equal(found, torch.from_numpy(data[f"crop{i}_{key}_out"]))
            if short:
                ours = crop_start(centre, size, volume.shape[1:])
                found = resample(volume, np.eye(4), grid.crop(ours, size), "nearest", fill=-9)[0]
                there = lesion_boxes.Box(tuple(max(0, -a) for a in ours), volume.shape[1:]).slices
                kept = lesion_boxes.Box(tuple(max(0, a) for a in ours), tuple(size)).slices
                assert torch.equal(found[there], volume[0][kept])
                assert (found == -9).sum() == found.numel() - volume[0][kept].numel()


@LESION_DATA
def test_lesion_diffusion_boxes(name):
    """Every centre that theirs can draw; and its boxes, which lose a voxel of odd sizes where ours do not."""
    data, facts = lesion_arrays(name), settings("lesion_diffusion", name)
    for i, asked in enumerate(facts["boxes"]):
        organ = data["box_seg"] == int(asked["organ_label"])
        wanted = {"hollow": asked["organ_type"] in LESION_HOLLOW, "cavity": asked["cavity"]}
        ours = lesion_boxes.box_centres(organ, asked["size"], **wanted, reference=True)
        ours, theirs = {tuple(c) for c in ours.tolist()}, {tuple(c) for c in data[f"box{i}_centres"].tolist()}
        assert theirs <= ours
        assert theirs == ours or "fallback" in asked["how"]
    for i, asked in enumerate(facts["box_masks"]):
        half = [n // 2 for n in asked["size"]]
        theirs = data[f"boxmask{i}"] == 2
        first = tuple(c - h for c, h in zip(asked["centre"], half))
        box = lesion_boxes.Box(first, tuple(2 * h for h in half))
        assert np.array_equal(box.mask(theirs.shape), theirs)
        ours = lesion_boxes.Box.around(asked["centre"], asked["size"])
        assert ours.start == first
        assert ours.size == tuple(asked["size"])


@LESION_TEXTS
def test_lesion_diffusion_training_targets(name):
    """The organ and the largest lesion that the mask network learns."""
    data = lesion_arrays(name)
    for case in settings("lesion_diffusion", name)["cases"]:
        of = {k.removeprefix(f"{case['name']}_"): v for k, v in data.items() if k.startswith(f"{case['name']}_")}
        if "train_target" not in of:
            continue
        lesion = of["label"] == 2
        target = lesion_boxes.target_numbers(of["coarseg"], case["organ_keys"], lesion)
        assert np.array_equal(np.isin(of["seg"], target), of["train_target"][0])
        (largest,) = lesion_boxes.components(lesion, max_count=1)
        assert np.array_equal(largest.in_volume(lesion.shape), of["train_label"][0])


@LESION_TEXTS
def test_lesion_diffusion_masks(name):
    """Crops, conditions, thresholds and tries of all lesions of a case, from the recorded draws of the network."""
    data = lesion_arrays(name)
    for case in settings("lesion_diffusion", name)["cases"]:
        of = {k.removeprefix(f"{case['name']}_"): v for k, v in data.items() if k.startswith(f"{case['name']}_")}
        if "infer_soft" not in of:
            continue
        size, shape = case["infer_crop"], of["seg"].shape
        least = lesion_boxes.least_voxels(1.0, stone="stone" in Path(case["image_path"]).parts[-3])
        taken, organs, attempt = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool), 0
        for asked in lesion_boxes.components(of["infer_bbox"] == 2):
            start = crop_start(asked.box.centre, size, shape)
            crop = lesion_boxes.Box(start, tuple(size)).slices
            box = asked.box.moved([-a for a in start])
            target = lesion_boxes.target_numbers(of["coarseg"][crop], case["organ_keys"], np.ones(size, dtype=bool))
            organ = np.isin(of["seg"], target)
            for _ in range(2):
                assert np.array_equal(organ[crop], of["infer_targets"][attempt])
                assert np.array_equal(box.mask(size), of["infer_boxes"][attempt])
                np.testing.assert_allclose(of["seg"][crop] / 104, of["infer_segcond"][attempt], atol=1e-7)
                lesion = lesion_boxes.binarise(
                    of["infer_soft"][attempt], box, least=least, taken=taken[crop], reference=True
                )
                attempt += 1
                if lesion.accepted:
                    break
            if not lesion.overlaps:
                taken[crop] |= lesion.mask
            organs |= organ
        assert attempt == len(of["infer_soft"])
        assert np.array_equal(np.where(taken, 2, organs), of["infer_mask_out"])


@pytest.mark.parametrize("name", files_of_set("lesion_diffusion", "*vq*_io.npz"))
def test_lesion_diffusion_vq(name):
    """The autoencoder and its codebook: latents, the codes they choose, images, loss and gradients."""
    data = tensors("lesion_diffusion", name)
    source, _ = select(lesion_checkpoint(name), VQ)
    knobs = read_knobs(source, VQ)
    autoencoder = CodebookAutoencoder(data["x"].ndim - 2, **knobs).eval()
    autoencoder.load_state_dict(translate(source, VQ, autoencoder.state_dict()))
    expected = lesion_settings(name)["vq"]
    assert (knobs["num_codes"], knobs["latent_channels"]) == (expected["n_embed"], expected["embed_dim"])
    assert autoencoder.factor == 2 ** len(expected["ddconfig"]["sample_depth"])

    latent = autoencoder.encode(data["x"]).detach().requires_grad_()
    codes, indices, loss = autoencoder.quantise(latent)
    (codes.sum() + loss).backward()
    assert_near(latent, data["z_prequant"], 2e-5)
    assert torch.equal(indices, data["indices"].view(indices.shape))
    assert_near(codes, data["z_quant"], 2e-5)
    assert_near(loss, data["codebook_loss"], 1e-6)
    assert_near_relative(codebook_usage(indices, knobs["num_codes"])[1], data["perplexity"], 1e-5)
    assert_near(latent.grad, data["grad_z_of_sum_plus_loss"], 1e-6)
    assert_near(autoencoder.codebook.weight.grad, data["grad_codebook"], 1e-6)
    with torch.no_grad():
        assert_near(autoencoder.decode(data["z_prequant"]), data["dec"], 2e-5)
        assert_near(autoencoder.decode(data["z_prequant"], quantised=False), data["dec_unquantised"], 2e-5)
        assert_near(autoencoder.reconstruct(data["x"]), data["dec"], 2e-5)


@LESION_DATA
def test_lesion_diffusion_whole_run(name):
    """Two lesions, the larger first, each in what the one before left; and the published way back to a file.

    That way, decoding and replacing the whole scan, is not ours: see `test_lesion_sampler`.
    """
    facts, paint = settings("lesion_diffusion", name)["e2e"], LESION_PAINT[0]
    data = {k: torch.from_numpy(v) for k, v in lesion_arrays(name).items() if k.startswith("e2e_")}
    autoencoder, network = lesion_autoencoder(paint), lesion_network(paint)
    with torch.no_grad():
        latent = autoencoder.encode(data["e2e_image_norm"][None, None])
        assert_near(latent, data["e2e_latent"], 2e-5)
        mask = on_latents((data["e2e_label"] == 2)[None, None], latent.shape[2:])
        assert torch.equal(mask, data["e2e_latent_mask"][:, 1:])
        lesions = lesion_boxes.components(data["e2e_label"].numpy() == 2, facts["max_lesions"])
        assert len(lesions) == len(facts["latent_crops"])
        for k, (lesion, crop, noise) in enumerate(zip(lesions, facts["latent_crops"], data["e2e_noise"], strict=True)):
            start = crop_start(lesion.box.centre, facts["crop"], data["e2e_label"].shape)
            part = (..., *(slice(crop[f"{a}1"], crop[f"{a}2"]) for a in "whd"))
            assert [s.start for s in part[1:]] == [n // autoencoder.factor for n in start]
            sampler = InpaintingSampler(
                lesion_ddim(paint, facts["eta"]),
                facts["ddim_steps"],
                channels=latent.shape[1],
                condition=lesion_condition(paint),
            )
            inputs, context = torch.cat([latent, mask], dim=1)[part], data["e2e_context"][k : k + 1]
            latent[part] = sampler(inputs, network, noise=Replay(noise), context=context)
        image = autoencoder.decode(latent)[0, 0]
    assert_near(image, data["e2e_out"], 5e-5)
    assert_near(to_hu(image).permute(2, 1, 0).flip(1), data["e2e_saved_hu"], 0.2)


LESION_TEXTS = pytest.mark.parametrize("name", files_of_set("lesion_diffusion", "*text.json"))
# What the reference tells its networks; the order is the report's.
LESION_MASK_KEYS = ("enhancement status", "lesion location", "shape", "surface characteristics")
LESION_MASK_KEYS += ("relationship with adjacent organs", "specific features", "cavity")


class ReferenceRaisesError(Exception):
    """The reference stops at this report."""


def lesion_overlap(data: dict[str, np.ndarray], case: dict[str, Any], where: np.ndarray) -> dict[int, int]:
    """Voxels of each organ of the report, on the map of the scan with the lesion."""
    return {key: int(((data["coarseg"] == key) & where).sum()) for key in case["organ_keys"]}


def reference_cavity(path: str, data: dict[str, np.ndarray], organ: int, part: tuple[slice, ...]) -> str:
    """The reference's rule, which never looks at the report: names of folders, then what the lesion adds to the organ.

    A defect (section 8, number 6): in the layout of folders that it documents it is always the last line.
    """
    folders = ["", "", "", "", *path.lower().split("/")]
    if any(organ in folders[-4] for organ in ("colon", "bladder", "esophagus", "gall", "stomach")):
        inside = "stone" in folders[-3]
        return "within the lumen of a hollow organ," if inside else "wall thickening,"
    grown = int((data["coarseg"][part] == organ).sum()) - int((data["seg"][part] == organ).sum())
    return "within the parenchymal organ," if grown > 100 else "protruding from the parenchymal organ,"


def reference_mask_texts(
    case: dict[str, Any], data: dict[str, np.ndarray], where: np.ndarray, part: tuple[slice, ...], training: bool
) -> list[list[str]]:
    overlap, keys = lesion_overlap(data, case, where), case["organ_keys"]
    organ = max(keys, key=lambda key: overlap[key])
    if training and any("CT value" not in entry[2] for entry in case["report"].values()):
        raise ReferenceRaisesError("KeyError")
    if len(keys) > 1 and not overlap[organ]:
        raise ReferenceRaisesError("UnboundLocalError")
    said = {**case["report"][str(organ)][2], "lesion location": organ_name(organ)}
    said["cavity"] = reference_cavity(case["image_path"], data, organ, part)
    return [[key, value] for key, value in said.items() if key in LESION_MASK_KEYS and value]


def reference_image_texts(case: dict[str, Any], data: dict[str, np.ndarray]) -> list[list[str]]:
    overlap = lesion_overlap(data, case, data["label"] == 2)
    organ = max(case["organ_keys"], key=lambda key: overlap[key])
    said = {**case["report"][str(organ)][2], "lesion location": organ_name(organ)}
    if "CT value" not in said:
        raise ReferenceRaisesError("KeyError")
    if number := re.search(r"approximately (-?\d+(?:\.\d+)?) HU", said["CT value"]):
        said["CT value"] = f"{float(number[1])} HU,"
    return [[key, value] for key, value in said.items() if key != "size"]


def assert_told(case: dict[str, Any], mode: str, tell: Any) -> None:
    """What the reference tells, or that it stops."""
    if case[mode] is None:
        with pytest.raises(ReferenceRaisesError) as error:
            tell()
        assert case[mode.replace("_text", "_error")].startswith(str(error.value))
    else:
        assert tell() == case[mode]


def lesion_texts(name: str) -> Iterable[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Each case and its arrays."""
    everything = lesion_arrays(name)
    for case in settings("lesion_diffusion", name)["cases"]:
        start = f"{case['name']}_"
        yield case, {key.removeprefix(start): value for key, value in everything.items() if key.startswith(start)}


@LESION_TEXTS
def test_lesion_diffusion_texts_in_training(name):
    """By the reference's rules what it tells; by ours the same in one form, also where the reference stops."""
    for case, data in lesion_texts(name):
        whole = tuple(slice(None) for _ in data["label"].shape)
        lesion = lesion_boxes.components(data["label"] == 2, 1)[0]
        largest = np.zeros(data["label"].shape, dtype=bool)
        largest[lesion.box.slices] = lesion.mask
        assert_told(case, "train_mask_text", lambda: reference_mask_texts(case, data, largest, whole, training=True))  # noqa: B023
        assert_told(case, "train_image_text", lambda: reference_image_texts(case, data))  # noqa: B023

        report = described(read_reports(case["report"], case["name"]), lesion_overlap(data, case, data["label"] == 2))
        entry = case["report"][str(next(key for key in case["organ_keys"] if organ_name(key) == report.organ))][2]
        told = [[key, value] for key, value in entry.items() if key not in ("size", "lesion location", "cavity")]
        ours = [f"{canonical(key, value)}," for key, value in told if key != "CT value" and canonical(key, value)]
        number = re.search(r"-?\d+(\.\d+)?(?= HU)", entry.get("CT value", ""))
        ours += [report.organ] + ([f"{float(number[0])} HU,"] if number else [])
        assert sorted(image_texts(report)) == sorted(ours)
        heard = {canonical(key, value) for key, value in told if key in LESION_MASK_KEYS} | {report.organ}
        assert {text.rstrip(",") for text in mask_texts(report)[:-1]} == heard - {""}
        said = canonical("cavity", entry.get("cavity", ""))
        fitting = [said] if said in cavities_of(report.organ) else cavities_of(report.organ)
        assert mask_texts(report)[-1].rstrip(",") in fitting, "ours keeps what the report says"


@LESION_TEXTS
def test_lesion_diffusion_texts_in_inference(name):
    """For each attempt at each box the text of the organ it lies in; the report's cavity is thrown away."""
    for case, data in lesion_texts(name):
        size, shape = case["infer_crop"], data["label"].shape
        boxes = lesion_boxes.components(data["infer_bbox"] == 2)
        starts = [crop_start(box.box.centre, size, shape) for box in boxes]
        parts = [tuple(slice(s, s + n) for s, n in zip(start, size, strict=True)) for start in starts]
        for attempt, told in enumerate(case["infer_mask_text"] or []):
            fed = data["infer_boxes"][attempt] > 0
            alike = [part for part, box in zip(parts, boxes, strict=True) if fed.sum() == box.mask.sum()]
            part = next(p for p in alike if (fed <= (data["infer_bbox"][p] == 2)).all())
            within = np.zeros(shape, dtype=bool)
            within[part] = fed
            assert reference_mask_texts(case, data, within, part, training=False) == told


def lesion_tokenizer(name: str, folder: Path) -> BiomedCLIPText:
    """BiomedCLIP's rules with those words of its list that the data show: a text of n words and n tokens."""
    words: dict[int, str] = {0: "[PAD]", 1: "[UNK]", 2: "[CLS]", 3: "[SEP]", 4: "[MASK]"}
    for text in settings("lesion_diffusion", name)["strings"]:
        parts = re.findall(r"\w+|[^\w\s]", text["text"].lower())
        words |= dict(zip(text["ids"][1:-1], parts, strict=True)) if len(parts) == len(text["ids"]) - 2 else {}
    (folder / "vocab.txt").write_text("\n".join(words.get(n, f"[unused{n}]") for n in range(max(words) + 1)) + "\n")
    heads = lesion_settings(name)["text"]["heads"]
    tower = parity_file("lesion_diffusion", name.replace(".json", "_tower.pt"))
    return BiomedCLIPText(folder, weights=tower, heads=heads)


@LESION_TEXTS
def test_lesion_diffusion_text_tower(name, tmp_path):
    """Token numbers and vectors; single texts, and padded together as the reference has them."""
    pytest.importorskip("transformers")
    strings, data = settings("lesion_diffusion", name)["strings"], lesion_arrays(name)
    expected = torch.from_numpy(data["strings_emb"])[0]
    encoder = lesion_tokenizer(name, tmp_path)
    tower = read_tower(encoder.weights, encoder.heads)
    rows = [torch.tensor(text["ids"]) for text in strings]
    assert_near(torch.stack([tower(row[None])[0] for row in rows]), expected, 1e-5)
    assert_near(tower(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)), expected, 1e-5)

    known = [
        (text, vector) for text, vector in zip(strings, expected, strict=True) if 1 not in encoder.tokens(text["text"])
    ]
    assert len(known) > len(strings) / 2
    for text, vector in known:
        assert encoder.tokens(text["text"]) == text["ids"]
        assert_near(encoder(text["text"]), vector, 1e-5)
    checked = 0
    for case, arrays_of_case in lesion_texts(name):
        for mode in ("train_mask_text", "train_image_text"):
            vectors = torch.from_numpy(arrays_of_case.get(f"{mode}_emb", np.zeros((1, 0, expected.shape[1]))))[0]
            for (_, text), vector in zip(case[mode] or [], vectors, strict=True):
                if 1 not in encoder.tokens(text):
                    assert_near(encoder(text), vector.float(), 1e-5)
                    checked += 1
    assert checked >= 5
