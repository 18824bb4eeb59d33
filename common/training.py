"""Training handlers that Ignite and MONAI lack: EMA by the papers' rule, exact resume, progress with ETA, previews.

A run that is killed and started again ends with the same weights as an unbroken one: after every epoch all state is
written atomically, and the random numbers of an epoch are a function of (seed, epoch, rank) alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import random
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.inferers import Inferer
from PIL import Image
from torch import nn
from tqdm import tqdm

from .checkpoints import unwrapped
from .io import atomic_path, sha256, write_json
from .pictures import save_png
from .workflow import executed_config, versions

logger = logging.getLogger(__name__)


def rank() -> int:
    """This process's rank under ``torchrun``, else 0."""
    return int(os.environ.get("RANK", 0))


def save_tensors(content: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, the bytes a function of the content alone (given a path, it writes the file's name into it)."""
    with path.open("wb") as file:
        torch.save(content, file)


class EpochSeed:
    """Handler that seeds every random source at the start of an epoch from (seed, epoch, rank).

    Args:
        seed: the run's seed.
        dataset: MONAI dataset whose random transforms are seeded too.
    """

    def __init__(self, seed: int, dataset: Any = None) -> None:
        self.seed = seed
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        """Seed before the epoch's data loader starts."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed torch, numpy, random and the dataset's transforms."""
        key = f"{self.seed}/{engine.state.epoch}/{rank()}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        if self.dataset is not None:
            set_rnd(self.dataset, seed=seed)


class WeightEMA:
    """Handler that keeps an exponential moving average of the weights: ``ema = decay ema + (1 - decay) w``.

    Lung-DDPM's rule: every ``every`` steps; a plain copy before step ``start``. Buffers are copied, not averaged.

    Args:
        network: the network that is trained.
        decay: weight of the past.
        every: steps between updates.
        start: steps before which the average is a plain copy.
        warmup: let the past weigh min(decay, (1 + n) / (10 + n)) at the n-th update, as latent diffusion does.
    """

    def __init__(
        self, network: nn.Module, decay: float = 0.995, every: int = 1, start: int = 0, warmup: bool = False
    ) -> None:
        self.network = network
        self.decay = decay
        self.every = every
        self.start = start
        self.warmup = warmup
        self.module = deepcopy(unwrapped(network)).eval().requires_grad_(False)

    def attach(self, engine: Engine) -> None:
        """Update after every iteration that is due."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Average, or copy while it is early."""
        source = unwrapped(self.network)
        averaged: list[torch.Tensor] = list(self.module.parameters())
        current: list[torch.Tensor] = list(source.parameters())
        weight = 1.0 if engine.state.iteration < self.start else 1.0 - self.decay_at(engine.state.iteration)
        torch._foreach_lerp_(averaged, current, weight)
        for mine, theirs in zip(self.module.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)

    def decay_at(self, iteration: int) -> float:
        """Weight of the past at a step: a function of the step alone, so that a resumed run goes on as it was."""
        updates = iteration // self.every
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay


class TrainingState:
    """Handler that saves everything a run needs to go on, and picks it up at the start.

    ``checkpoint.pt`` (network, EMA, optimiser, ..., epoch) is written after every ``interval`` epochs, the previous one
    kept as ``checkpoint.previous.pt``. ``model.pt`` holds the EMA weights alone, ready for inference, ``model.json``
    says where they come from.

    Args:
        folder: where both lie.
        objects: name -> object with ``state_dict``/``load_state_dict``.
        model: the network whose weights become ``model.pt``, normally the EMA's module.
        interval: epochs between saves; the last epoch is always saved.
        resume: pick up ``checkpoint.pt`` if there is one, the previous one if it is damaged; else start anew (and
            replace it).
        dtype: of the weights in ``model.pt``, counters and such apart: ``"float16"`` halves the file; networks compute
            in their own.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        objects: Mapping[str, Any],
        model: nn.Module,
        interval: int = 1,
        resume: bool = True,
        dtype: str = "float32",
    ) -> None:
        self.path = Path(folder) / "checkpoint.pt"
        self.previous = Path(folder) / "checkpoint.previous.pt"
        self.objects = dict(objects)
        self.model = model
        self.interval = interval
        self.resume = resume
        self.dtype = getattr(torch, dtype, None)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be that of weights, 'float32', 'float16' or 'bfloat16', got {dtype!r}")
        self.damaged: set[Path] = set()

    def attach(self, engine: Engine) -> None:
        """Load at the start, save after epochs."""
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        """Restore the newest whole checkpoint, if there is one."""
        # What a killed run was writing can be as large as a checkpoint.
        for leftover in self.path.parent.glob(".tmp-*.pt") if rank() == 0 else ():
            leftover.unlink(missing_ok=True)
        source, state = self.newest() if self.resume else (self.path, None)
        if state is None:
            return
        try:
            for name, target in self.objects.items():
                target = unwrapped(target) if isinstance(target, nn.Module) else target
                target.load_state_dict(state[name])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"cannot resume from {source}: it belongs to a run with other settings "
                f"({' '.join(str(error).split())[:200]}); give the old settings, another --output_dir, or "
                "--resume False to start anew"
            ) from error
        epochs, begun = engine.state.max_epochs or 0, state.get("epochs")
        if begun not in (None, epochs):
            logger.warning(
                f"--epochs is {epochs}, the run began with {begun}: the learning rate goes on by the old schedule"
            )
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * (engine.state.epoch_length or 0)
        done = ": nothing left to train; another --output_dir starts anew" if state["epoch"] >= epochs else ""
        logger.info(f"resumed {source} at epoch {state['epoch']} of {epochs}{done}")

    def newest(self) -> tuple[Path, dict[str, Any] | None]:
        """The newest checkpoint that can be read, None if there is none at all."""
        found = [path for path in (self.path, self.previous) if path.is_file()]
        for path in found:
            try:
                return path, torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
                self.damaged.add(path)
                logger.warning(f"{path} is damaged, passed over ({' '.join(str(error).split())[:100]})")
        if found:
            raise ValueError(
                f"no checkpoint in {self.path.parent} can be read: restore one, or start anew with --resume False or "
                "another --output_dir"
            )
        return self.path, None

    def card(self, model: Path, epoch: int) -> dict[str, Any]:
        """Provenance of the weights: what made them, from what."""
        config = executed_config()
        wiring = ("imports", "initialize", "run", "load", "to_network", "to_batch")
        room = dict(config.get("phantoms") or {}).get("_target_", "common.phantoms.").split(".")[-2]
        knobs = {k: v for k, v in config.items() if not isinstance(v, (dict, str)) and k not in wiring}
        return {
            "source": f"trained with: {config.get('_desc_', 'train.json')}",
            "weights": model.name,
            "weights_sha256": sha256(model),
            "weights_are": "the exponential moving average",
            "epoch": epoch,
            "training_data": config.get("dataset_dir") or f"phantoms generated by common/{room}.py; no patient data",
            "licence": "Apache-2.0 for weights trained on phantoms; else as your data demand",
            "knobs": knobs,
            "versions": versions(),
        }

    def save(self, engine: Engine) -> None:
        """Save on rank 0, when due."""
        epoch, epochs = engine.state.epoch, engine.state.max_epochs
        if rank() > 0 or (epoch % self.interval and epoch != epochs):
            return
        # The model first: a run that dies before its last checkpoint makes both again.
        state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        weights = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in state.items()}
        model = self.path.with_name("model.pt")
        with atomic_path(model) as temporary:
            save_tensors(weights, temporary)
        write_json(model.with_suffix(".json"), self.card(model, epoch))
        objects = {n: unwrapped(o) if isinstance(o, nn.Module) else o for n, o in self.objects.items()}
        with atomic_path(self.path) as temporary:
            states = {n: o.state_dict() for n, o in objects.items()}
            save_tensors({**states, "epoch": epoch, "epochs": epochs}, temporary)
            if self.path.is_file() and self.path not in self.damaged:
                os.replace(self.path, self.previous)
        self.damaged.clear()


class Progress:
    """Handler that shows one bar over all steps of the run: loss, steps per second, time left."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.loss: float | None = None

    def attach(self, engine: Engine) -> None:
        """Follow the engine from start to end."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.stop)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Open the bar where the run stands."""
        if self.bar is None:
            self.bar = tqdm(
                total=(engine.state.epoch_length or 0) * (engine.state.max_epochs or 0),
                initial=engine.state.iteration,
                desc="training",
                unit="step",
                mininterval=0.1 if sys.stderr.isatty() else 10.0,
                disable=rank() > 0,
            )

    def __call__(self, engine: Engine) -> None:
        """Advance, with a smoothed loss."""
        output: Any = engine.state.output
        output = output[0] if isinstance(output, list) else output
        loss = float(torch.as_tensor(output["loss"]).detach())
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        epoch = f"{engine.state.epoch}/{engine.state.max_epochs}"
        self.bar.set_postfix(epoch=epoch, loss=f"{self.loss:.4f}", refresh=False)
        self.bar.update()

    def stop(self, engine: Engine) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Close the bar and let the error through."""
        self.stop(engine)
        raise error


class Preview:
    """Handler that synthesises a fixed batch with the current EMA weights and saves a picture of it.

    Args:
        sampler: the sampler inference uses.
        network: the EMA's module.
        inputs: batch the sampler starts from.
        show: makes a picture of the synthetic batch.
        folder: where ``epoch_0010.png`` and so on go.
        interval: epochs between pictures.
    """

    def __init__(
        self,
        sampler: Inferer,
        network: nn.Module,
        inputs: torch.Tensor,
        show: Callable[[torch.Tensor], Image.Image],
        folder: str | os.PathLike,
        interval: int = 1,
    ) -> None:
        self.sampler = sampler
        self.network = network
        self.inputs = inputs
        self.show = show
        self.folder = Path(folder)
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """Draw after epochs."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Engine) -> None:
        """Synthesise and save on rank 0."""
        if rank() > 0:
            return
        device = next(self.network.parameters()).device
        # The draws of the preview must not shift the draws of the training.
        with torch.random.fork_rng(devices=[]):
            seeds = list(range(len(self.inputs)))
            synthetic = self.sampler(self.inputs.to(device), self.network, seeds=seeds).cpu()
        save_png(self.show(synthetic), self.folder / f"epoch_{engine.state.epoch:04d}.png")
