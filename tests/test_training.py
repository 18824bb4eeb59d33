"""Laws of training: averages by the papers' rule, nothing lost when a run dies, pictures that do not disturb it."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from common.checkpoints import filled
from common.pictures import VolumeSheet
from common.training import EpochSeed, Preview, Progress, TrainingState, WeightEMA
from common.unet import DiffusionUNet


class Tiny(nn.Module):
    """One weight and one buffer."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        return self.weight.sum() * x


def engine(step=lambda engine, batch: {"loss": torch.tensor(1.0)}) -> Engine:
    result = Engine(step)
    result.logger.setLevel(logging.WARNING)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Averages


def test_the_average_follows_the_papers_rule():
    """0.995 at every tenth step, a plain copy before step 2000; buffers are copied."""
    network = Tiny()
    ema, expected, seen = WeightEMA(network, 0.995, every=10, start=2000), 0.0, {}

    def step(engine, batch):
        with torch.no_grad():
            network.weight += 1
            network.count += 1
        return {"loss": torch.tensor(0.0)}

    trainer = engine(step)
    ema.attach(trainer)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.update({e.state.iteration: ema.module.weight[0].item()})
    )
    trainer.run(range(2100), max_epochs=1)
    for k in range(1, 2101):
        if k % 10 == 0:
            expected = float(k) if k < 2000 else 0.995 * expected + 0.005 * k
        assert seen[k] == pytest.approx(expected, rel=1e-5)
    assert seen[1999] == 1990
    assert ema.module.count == 2100
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())


@pytest.mark.parametrize("every", [1, 5])
def test_the_average_may_warm_up(every):
    """The n-th update weighs the past by (1 + n) / (10 + n), until that is more than the decay; it needs no counter."""
    network = Tiny()
    ema, expected = WeightEMA(network, 0.9, every=every, warmup=True), network.weight[0].item()
    weights = []
    for n in range(1, 121):
        network.weight.data += 1
        state = type("State", (), {"iteration": n * every})
        ema(type("Engine", (), {"state": state}))
        weights.append(min(0.9, (1 + n) / (10 + n)))
        expected = weights[-1] * expected + (1 - weights[-1]) * network.weight[0].item()
        assert ema.module.weight[0].item() == pytest.approx(expected, rel=1e-5)
    assert weights[0] == 2 / 11
    assert weights[-1] == 0.9


def test_the_average_ignores_memory_layout():
    network = nn.Conv3d(2, 3, 3).to(memory_format=torch.channels_last_3d)
    ema = WeightEMA(nn.Conv3d(2, 3, 3), decay=0.5)
    ema.network = network
    expected = ema.module.weight.clone().lerp(network.weight, 0.5)
    ema(engine())
    assert torch.equal(ema.module.weight, expected)


# ---------------------------------------------------------------------------------------------------------------------
# State


def state(folder: Path, value: float = 0.0, **settings) -> tuple[TrainingState, Tiny, torch.optim.Optimizer]:
    network = Tiny(value)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    return TrainingState(folder, {"network": network, "optimizer": optimizer}, network, **settings), network, optimizer


def train(handler: TrainingState, network: Tiny, optimizer, epochs: int) -> Engine:
    def step(engine, batch):
        optimizer.zero_grad()
        loss = (network.weight - 5).square().sum()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    trainer = engine(step)
    handler.attach(trainer)
    trainer.run(range(4), max_epochs=epochs)
    return trainer


def test_a_broken_run_goes_on_as_if_unbroken(tmp_path):
    _, whole, _ = (run := state(tmp_path / "whole"))
    train(*run, epochs=6)
    train(*state(tmp_path / "parts"), epochs=3)
    _, rest, _ = (run := state(tmp_path / "parts", value=9.0))
    trainer = train(*run, epochs=6)
    assert torch.equal(rest.weight, whole.weight)
    assert trainer.state.iteration == 24
    files = [(tmp_path / f / "model.pt").read_bytes() for f in ("whole", "parts")]
    assert files[0] == files[1]


def test_the_previous_checkpoint_is_kept_and_nothing_else(tmp_path):
    train(*state(tmp_path), epochs=3)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["checkpoint.previous.pt", "checkpoint.pt", "model.json", "model.pt"]
    epochs = [torch.load(tmp_path / f, weights_only=True)["epoch"] for f in ("checkpoint.previous.pt", "checkpoint.pt")]
    assert epochs == [2, 3]
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(model["weight"], torch.load(tmp_path / "checkpoint.pt")["network"]["weight"])


def test_the_last_epoch_is_saved_whatever_the_interval(tmp_path):
    train(*state(tmp_path, interval=2), epochs=3)
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 3


@pytest.mark.parametrize("dies_in", ["network", "checkpoint.pt", "model.pt", "replace"])
def test_a_run_that_dies_while_saving_leaves_a_whole_state(tmp_path, monkeypatch, dies_in):
    """Whatever the moment, what lies in the folder resumes, and ends with the unbroken run's model."""
    _, whole, _ = (run := state(tmp_path / "whole"))
    train(*run, epochs=3)
    train(*state(tmp_path / "parts"), epochs=2)
    save, replace = torch.save, os.replace

    def dying_save(content, file):
        if dies_in in file.name or (dies_in == "network" and "network" in content):
            file.write(b"half")
            raise KeyboardInterrupt
        save(content, file)

    def dying_replace(source, target):
        if dies_in == "replace" and str(target).endswith("checkpoint.pt"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(torch, "save", dying_save)
    monkeypatch.setattr(os, "replace", dying_replace)
    with pytest.raises(KeyboardInterrupt):
        train(*state(tmp_path / "parts"), epochs=3)
    monkeypatch.undo()
    assert not list((tmp_path / "parts").glob(".tmp*"))
    _, rest, _ = (run := state(tmp_path / "parts", value=9.0))
    train(*run, epochs=3)
    assert torch.equal(rest.weight, whole.weight)
    assert torch.equal(torch.load(tmp_path / "parts" / "model.pt")["weight"], whole.weight)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, keep):
    _, whole, _ = (run := state(tmp_path / "whole"))
    train(*run, epochs=4)
    train(*state(tmp_path / "parts"), epochs=3)
    path = tmp_path / "parts" / "checkpoint.pt"
    size = keep if keep >= 1 or keep == 0 else int(keep * path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    caplog.set_level(logging.INFO, logger="common.training")
    _, rest, _ = (run := state(tmp_path / "parts", value=9.0))
    train(*run, epochs=4)
    assert "checkpoint.pt is damaged, passed over" in caplog.text
    assert "checkpoint.previous.pt at epoch 2 of 4" in caplog.text
    assert torch.equal(rest.weight, whole.weight)


def test_the_damaged_checkpoint_never_takes_the_place_of_the_good_one(tmp_path):
    train(*state(tmp_path), epochs=3)
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    train(*state(tmp_path), epochs=3)
    assert torch.load(tmp_path / "checkpoint.previous.pt")["epoch"] == 2
    assert torch.load(tmp_path / "checkpoint.pt")["epoch"] == 3


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path):
    (tmp_path / ".tmp-123-checkpoint.pt").write_bytes(b"half")
    train(*state(tmp_path), epochs=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "model.json", "model.pt"]


def test_nothing_readable_teaches(tmp_path):
    train(*state(tmp_path), epochs=2)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read.*--resume False"):
        train(*state(tmp_path), epochs=2)
    train(*state(tmp_path, resume=False), epochs=2)


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"epoch": 1, "network": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="can be read"):
        train(*state(tmp_path), epochs=2)
    assert not (tmp_path / "ran").exists()


def test_other_settings_teach(tmp_path):
    train(*state(tmp_path), epochs=1)
    other = nn.Linear(2, 2)
    handler = TrainingState(tmp_path, {"network": other}, other)
    with pytest.raises(ValueError, match=r"belongs to a run with other settings.*--resume False"):
        handler.load(engine())
    with pytest.raises(ValueError, match=r"belongs to a run with other settings.*'more'"):
        TrainingState(tmp_path, {"more": other}, other).load(engine())


def test_more_epochs_than_the_run_began_with_are_warned_about(tmp_path, caplog):
    train(*state(tmp_path), epochs=2)
    train(*state(tmp_path), epochs=3)
    assert "--epochs is 3, the run began with 2" in caplog.text


def test_a_finished_run_trains_nothing_and_says_so(tmp_path, caplog):
    train(*state(tmp_path), epochs=2)
    before = (tmp_path / "model.pt").stat().st_mtime_ns
    caplog.set_level(logging.INFO, logger="common.training")
    trainer = train(*state(tmp_path), epochs=2)
    assert "nothing left to train" in caplog.text
    assert trainer.state.iteration == 8
    assert (tmp_path / "model.pt").stat().st_mtime_ns == before


def test_resume_false_starts_anew(tmp_path):
    train(*state(tmp_path), epochs=2)
    _, network, _ = (run := state(tmp_path, value=9.0, resume=False))
    assert train(*run, epochs=1).state.epoch == 1
    assert network.weight[0] > 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_model_may_be_half_the_size_and_resuming_stays_exact(tmp_path, dtype):
    _, whole, _ = (run := state(tmp_path / "whole"))
    train(*run, epochs=4)
    train(*state(tmp_path / "parts", dtype=dtype), epochs=2)
    half = torch.load(tmp_path / "parts" / "model.pt", weights_only=True)
    exact = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["network"]
    assert half["weight"].dtype == getattr(torch, dtype)
    assert exact["weight"].dtype == torch.float32
    assert torch.equal(half["weight"], exact["weight"].to(half["weight"].dtype))
    assert not torch.equal(half["weight"].float(), exact["weight"]), "else half precision is not tested"

    _, rest, _ = (run := state(tmp_path / "parts", value=9.0, dtype=dtype))
    train(*run, epochs=4)
    assert torch.equal(rest.weight, whole.weight)
    assert rest.weight.dtype == torch.float32
    assert not list((tmp_path / "parts").glob(".tmp*"))
    network = filled(Tiny(9.0), tmp_path / "parts" / "model.pt")
    assert network.weight.dtype == torch.float32
    torch.testing.assert_close(network.weight, whole.weight, rtol=1e-2, atol=0)


def test_half_precision_is_half_the_file(tmp_path):
    sizes = []
    for dtype in ("float32", "float16"):
        network = nn.Linear(200, 200)
        trainer = engine()
        TrainingState(tmp_path / dtype, {"network": network}, network, dtype=dtype).attach(trainer)
        trainer.run(range(1), max_epochs=1)
        sizes.append((tmp_path / dtype / "model.pt").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_counters_are_no_weights_and_keep_their_type(tmp_path, dtype):
    """70001 is no number of half precision: rounded it would be infinite."""
    handler, network, optimizer = state(tmp_path, dtype=dtype)
    network.count += 70_001
    train(handler, network, optimizer, epochs=1)
    count = torch.load(tmp_path / "model.pt", weights_only=True)["count"]
    assert (count.dtype, count.item()) == (torch.int64, 70_001)


@pytest.mark.parametrize("dtype", ["fp16", "half precision", "int8", "cat"])
def test_a_type_that_no_weights_have_is_refused_at_the_door(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"'float16' or 'bfloat16', got '{dtype}'"):
        state(tmp_path, dtype=dtype)


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    train(*state(tmp_path), epochs=2)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


def draws(rank: int = 0, seed: int = 0, start: int = 0, epochs: int = 3) -> dict[int, list]:
    """What an epoch's loader, transforms and generators draw."""
    os.environ["RANK"] = str(rank)
    try:
        noisy = Compose([RandGaussianNoised("x", prob=1.0)])
        dataset = CacheDataset([{"x": torch.full((1, 2), float(i))} for i in range(6)], noisy, progress=False)
        seen: dict[int, list] = {}

        def step(engine, batch):
            values = [batch["x"].flatten().tolist(), torch.rand(1).item(), np.random.rand(), random.random()]
            seen.setdefault(engine.state.epoch, []).append(values)

        trainer = engine(step)
        EpochSeed(seed, dataset).attach(trainer)
        if start:
            trainer.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "epoch", start))
        trainer.run(DataLoader(dataset, batch_size=2, shuffle=True, num_workers=0), max_epochs=epochs)
        return seen
    finally:
        del os.environ["RANK"]


def test_an_epochs_draws_are_a_function_of_seed_epoch_and_rank():
    torch.manual_seed(123)
    whole = draws()
    assert set(whole) == {1, 2, 3}
    assert whole[1] != whole[2]
    assert draws(start=1)[2] == whole[2]
    assert draws(start=2)[3] == whole[3]
    assert draws(rank=1)[1] != whole[1]
    assert draws(seed=1)[1] != whole[1]


class Sampler:
    """A sampler that draws from the global generator, as it should not."""

    def __call__(self, inputs, network, seeds):
        self.inputs, self.seeds = inputs, seeds
        return torch.randn(len(inputs), 1, *inputs.shape[2:])


def test_preview_and_progress_leave_the_generators_alone(tmp_path):
    trainer, sampler = engine(), Sampler()
    image, condition = torch.zeros(1, 4, 5, 6), torch.ones(2, 4, 5, 6)
    inputs, show = torch.cat([image, condition])[None], VolumeSheet(image, condition)
    Preview(sampler, Tiny(), inputs, show, tmp_path / "preview", interval=2).attach(trainer)
    Progress().attach(trainer)
    before = torch.random.get_rng_state(), random.getstate(), str(np.random.get_state())
    trainer.run(torch.zeros(3, 1), max_epochs=4, epoch_length=3)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert sorted(p.name for p in (tmp_path / "preview").iterdir()) == ["epoch_0002.png", "epoch_0004.png"]
    assert sampler.inputs.shape == (1, 3, 4, 5, 6)
    assert sampler.seeds == [0]


def test_progress_counts_all_steps_and_closes_on_failure(capfd):
    trainer, progress = engine(lambda e, b: [{"loss": torch.tensor(2.0, requires_grad=True)}]), Progress()
    progress.attach(trainer)
    trainer.run(range(3), max_epochs=4)
    assert (progress.bar.n, progress.bar.total, progress.loss) == (12, 12, pytest.approx(2.0))
    assert "epoch=4/4" in capfd.readouterr().err

    def fails(engine, batch):
        raise RuntimeError("boom")

    trainer, progress = engine(fails), Progress()
    progress.attach(trainer)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.run(range(3))
    assert progress.bar.disable  # closed


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs, each in its own process


def command(*overlays: str, launcher: tuple[str, ...] = (), base: str = "train", **knobs: object) -> list[str]:
    files = [f"bundles/lung_ddpm/configs/{name}.json" for name in (base, "smoke", *overlays)]
    flags = [part for key, value in knobs.items() for part in (f"--{key}", str(value))]
    return [sys.executable, *launcher, "-m", "monai.bundle", "run", "--config_file", str(files), *flags]


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def execute(repo: Path, *arguments: str) -> str:
    done = run_command(*arguments, cwd=repo)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.bundle
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(repo, tmp_path):
    knobs = {"epochs": 4, "preview_interval": 4}
    execute(repo, *command(output_dir=tmp_path / "whole", **knobs))

    # SIGKILL at a random moment after the first checkpoint.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    parts, rng = tmp_path / "parts", random.Random(time.time_ns())
    delay = rng.uniform(0, 0.6)
    with (tmp_path / "killed.log").open("w") as log:
        run = subprocess.Popen(command(output_dir=parts, **knobs), cwd=repo, env=env, stdout=log, stderr=log)
        while not (parts / "checkpoint.pt").exists() and run.poll() is None:
            time.sleep(0.005)
        time.sleep(delay)
        run.send_signal(signal.SIGKILL)
        run.wait()

    said = execute(repo, *command(output_dir=parts, **knobs))
    assert "resumed" in said, f"killed after {delay:.3f} s"
    assert same(weights(parts), weights(tmp_path / "whole")), f"killed after {delay:.3f} s"
    assert (parts / "model.pt").read_bytes() == (tmp_path / "whole" / "model.pt").read_bytes()

    said = execute(repo, *command(output_dir=parts, **knobs))
    assert "nothing left to train" in said
    assert same(weights(parts), weights(tmp_path / "whole"))


@pytest.mark.bundle
def test_two_processes_train_one_network_and_one_of_them_writes(repo, tmp_path):
    seen = (
        f"$torch.save([@network.module.state_dict(), @ema.module.state_dict()], r'{tmp_path}/rank' + "
        "os.environ['RANK'] + '.pt')"
    )
    finalize = json.dumps([seen, "$dist.barrier()", "$dist.destroy_process_group()"])
    output = tmp_path / "out"
    said = execute(
        repo, *command("multi_gpu_train", launcher=TWO, output_dir=output, finalize=finalize, preview_interval=2)
    )
    assert "strides" not in said
    assert said.count("Engine run finished") == 3  # the trainer and two validations, on rank 0

    (network, ema), other = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert same(network, other[0])
    assert same(ema, other[1])
    assert same(weights(output), ema)
    assert not any(k.startswith("module.") for k in ema)
    DiffusionUNet(
        3, 3, 1, channels=(8, 8), attention_levels=(False, True), num_res_blocks=1, norm_num_groups=4,
        num_head_channels=(8, 8)
    ).load_state_dict(ema)  # fmt: skip

    # Both ranks made phantoms in the same folder: each whole, none left half.
    files = sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
    writers = {f.split(".")[-2] for f in files if "tfevents" in f}
    assert len(writers) == 1
    assert not [f for f in files if "tmp" in f]
    assert [f for f in files if "tfevents" not in f] == [
        "checkpoint.previous.pt", "checkpoint.pt", "model.json", "model.pt",
        *[f"phantoms/{k}/thorax_000{i}.nii.gz" for k in ("CT", "SEG") for i in range(4)],
        "phantoms/phantoms.json", "preview/epoch_0002.png",
    ]  # fmt: skip

    # Two processes synthesise: no case twice, none lost; a second run finds all of them finished.
    run = {"weights": output / "model.pt", "output_dir": tmp_path / "synthetic", "phantom_cases": 3}
    said = execute(repo, *command(base="inference", launcher=TWO, **run))
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "synthetic").glob("*_image.nii.gz")}
    assert sorted(made) == [f"thorax_000{i}_image.nii.gz" for i in range(3)]
    assert "already finished" not in said
    for sidecar in (tmp_path / "synthetic").glob("thorax_*.json"):
        assert len(json.loads(sidecar.read_text())["cases"]) == 1
    said = execute(repo, *command(base="inference", **run))  # one process now: the shares do not matter
    assert said.count("already finished") == 3
    assert made == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "synthetic").glob("*_image.nii.gz")}


@pytest.mark.bundle
def test_a_run_can_be_tracked_by_mlflow(repo, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    execute(repo, *command(output_dir=tmp_path / "out", epochs=1, tracking="mlflow"))
    found = [p.name for p in (tmp_path / "out").rglob("*")]
    assert any("mlruns" in name for name in found), found
    assert (tmp_path / "out" / "model.pt").is_file()
