"""Parity: numbers made by running the published code, reproduced through our public parts.

``$PARITY_DIR`` (default ``../shared/parity``) holds one folder for each bundle, ``$PARITY_SET`` (default ``dev``) is
the prefix of the files. Nothing here knows sizes: they are read from the files, so that any further set runs as it is.
Tolerances are maximal absolute differences.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import DiffusionInferer
from monai.transforms import Compose, Orientationd, Resized

from common.checkpoints import read_weights, translate
from common.conditioning import ConditionPrepareBatch
from common.sampler import DiffusionSampler, InversionSampler, LayoutGuidedSampler
from common.schedules import DDPM
from common.solvers import DPMSolverPP
from common.training import WeightEMA
from common.transforms import ColumnScaled, CropNoduled, LayoutToConditiond
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


def settings(bundle: str, name: str) -> Any:
    return json.loads(parity_file(bundle, name).read_text())


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
