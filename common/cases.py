"""Cases through an engine: a stream that survives bad ones, and a saver that leaves a side-car with each.

Whatever is synthesised from a case lies beside a JSON side-car that is written last: it marks the case as finished, and
given back as ``--args_file`` it makes the same files again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.image_writer import PILWriter, resolve_writer
from torch.utils.data import IterableDataset

from .io import Case, CaseError, atomic_path, sha256, unwrap, write_json
from .workflow import bundle_root, executed_config, versions

logger = logging.getLogger(__name__)


class CaseStream(IterableDataset):
    """Cases of this process that are not finished yet, one after the other; a bad one is reported, not fatal.

    Under ``torchrun`` every rank takes its share: no case twice, none lost, no padding.

    Args:
        data: cases from `list_cases`.
        transform: preprocessing of one case.
        saver: knows which cases are finished; None takes all.
    """

    def __init__(self, data: Sequence[Case], transform: Callable[[Case], Any], saver: CaseSaver | None = None) -> None:
        super().__init__()
        self.data = list(data)
        self.transform = transform
        self.saver = saver
        self.failures: dict[str, str] = {}
        if saver is not None:
            saver.refuse_inputs(self.data)

    def __iter__(self) -> Iterator[Any]:
        """Yield preprocessed cases."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for case in self.data[rank::world]:
            name = case["name"]
            try:
                if "error" in case:
                    raise CaseError(case["error"])
                if self.saver is not None and self.saver.finished(case):
                    logger.info(f"{name}: already finished, skipped")
                    continue
                item = self.transform({**case, "source": json.dumps(case)})
            except Exception as error:
                self.failures[name] = _explain(case, error)
                logger.error(f"{name}: {self.failures[name]}")
            else:
                yield item

    def report(self) -> None:
        """Raise one error that lists all failed cases, if there were any; the others are finished by now."""
        if self.failures:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in self.failures.items())
            raise CaseError(f"{len(self.failures)} of {len(self.data)} cases failed, the others are done:\n{lines}")


class EqualBatches(IterableDataset):
    """Neighbours of equal shapes as batches; a case of another shape begins a new one, so that no case is padded.

    The loader around it collates, and is told ``batch_size`` None.

    Args:
        dataset: yields preprocessed cases.
        batch_size: how many cases a batch has at most.
    """

    def __init__(self, dataset: Iterable[Mapping[str, Any]], batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.dataset = dataset
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Mapping[str, Any]]]:
        """Yield lists of cases."""
        batch: list[Mapping[str, Any]] = []
        for case in self.dataset:
            if batch and (len(batch) == self.batch_size or _shapes(case) != _shapes(batch[0])):
                yield batch
                batch = []
            batch.append(case)
        if batch:
            yield batch


def _shapes(case: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in case.items() if isinstance(value, torch.Tensor)}


def _explain(case: Case, error: BaseException) -> str:
    """The cause in one line, with the case's files if it names none."""
    error = unwrap(error)
    reason = " ".join(str(error).split())
    if isinstance(error, CaseError):
        return reason
    return f"{type(error).__name__}: {reason}; see {', '.join(_files(case))}"


def _files(case: Case) -> list[str]:
    return [v for v in case.values() if isinstance(v, str) and os.path.isfile(v)]


class CaseSaver:
    """Engine handler that writes every finished case: its files, atomically, then the side-car.

    Args:
        output_dir: where to write.
        outputs: key in the engine's output or batch -> suffix of the file name, e.g. ``{"pred": "image"}``.
        extension: file type, one that MONAI has a writer for.
        dtypes: key -> dtype on disk; None keeps that of the result.
        weights: file whose hash the side-car records.
        files: further ones that shape a sample, e.g. an autoencoder's weights.
        record: key of further facts about a case, in plain JSON, for the side-car.
    """

    # What does not shape a sample: places, how many, what is done with it afterwards, and what ``--tracking`` adds.
    PLACES: tuple[str, ...] = ("bundle_root", "output_dir", "weights", "batch_size", "num_samples")
    PLACES += ("dataset_dir", "phantoms", "phantom_cases", "phantom_size", "phantom_seed", "phantom_kind")
    PLACES += ("phantom_crop", "phantom_lesions")
    PLACES += ("cases", "statistics", "count", "autoencoder_weights", "contexts_file")
    PLACES += ("reports", "own_masks", "from_masks", "mask_weights", "pair_autoencoder_weights", "further_weights")
    AFTERWARDS: tuple[str, ...] = ("_desc_", "run", "handlers")
    AFTERWARDS += ("real", "real_dir", "masks_dir", "load_real", "extractor", "evaluation", "cohorts")
    AFTERWARDS += ("held_out", "held_out_dir", "held_out_phantoms", "held_out_cases", "held_out_seed")
    AFTERWARDS += ("segment", "segmenter_epochs", "segmenter_seeds")
    AFTERWARDS += ("real_cases", "real_seed", "real_phantoms", "real_crop", "plane_slices", "organs")
    AFTERWARDS += ("downstream_few", "downstream_seeds", "downstream_steps")
    TRACKING = ("tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0")

    def __init__(
        self,
        output_dir: str | os.PathLike,
        outputs: Mapping[str, str],
        extension: str = ".nii.gz",
        dtypes: Mapping[str, str | None] | None = None,
        weights: str | os.PathLike | None = None,
        record: str | None = None,
        files: Sequence[str | os.PathLike] = (),
    ) -> None:
        self.output_dir = Path(output_dir)
        self.outputs = dict(outputs)
        self.extension = extension
        self.dtypes = dict(dtypes or {})
        self.weights = None if weights is None else str(weights)
        self.record = record
        self.files = list(files)
        self._digests: dict[str, str] = {}
        self._config: dict | None = None

    def attach(self, engine: Engine) -> None:
        """Write after every iteration."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine | None = None) -> None:
        """Write down the executed config, and so find out at the door whether writing is possible."""
        write_json(self.run_file(), self.config())

    def config(self) -> dict:
        """The executed config, as the running workflow holds it; empty outside a workflow."""
        if self._config is None:
            self._config = executed_config()
        return self._config

    def weights_sha256(self) -> str | None:
        """Hash of the weights file."""
        if not self.weights or not (self.weights in self._digests or Path(self.weights).is_file()):
            return None
        return self._digest(self.weights)

    def _digest(self, file: str | os.PathLike) -> str:
        """Hash of a file that stays as it is during a run, and may be large: read once, not once a case."""
        if str(file) not in self._digests:
            self._digests[str(file)] = sha256(file)
        return self._digests[str(file)]

    def fingerprint(self) -> str:
        """Hash of all that shapes a sample besides the case itself: the config without its places, weights, files."""
        recipe = {k: v for k, v in self.config().items() if k not in (*self.PLACES, *self.AFTERWARDS, *self.TRACKING)}
        made_of = [recipe, self.weights_sha256(), *map(self._digest, self.files)]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def run_file(self) -> Path:
        """Where the executed config is kept."""
        return self.output_dir / f"run-{self.fingerprint()[:8]}.json"

    def path(self, name: str, key: str) -> Path:
        """Where the file for ``key`` of case ``name`` goes."""
        return self.output_dir / f"{name}_{self.outputs[key]}{self.extension}"

    def finished(self, case: Case) -> bool:
        """Whether the same recipe made the case from the same inputs before; refuses a replay with other weights."""
        expected = case.get("weights_sha256")
        if expected and expected != self.weights_sha256():
            raise CaseError(f"the side-car of {case['name']} was made with other weights than {self.weights}")
        try:
            made_by = json.loads((self.output_dir / f"{case['name']}.json").read_text(encoding="utf-8"))["made_by"]
        except FileNotFoundError:
            return False
        if any(made_by[k] != v for k, v in self.origin(case).items()):
            logger.warning(f"{case['name']}: made by another recipe before, made again")
            return False
        outputs = {self.output_dir / file: digest for file, digest in made_by["outputs"].items()}
        return all(path.is_file() and sha256(path) == digest for path, digest in outputs.items())

    def origin(self, case: Case) -> dict[str, Any]:
        """All that decides what becomes of a case."""
        inputs = {file: sha256(file) for file in _files(case)}
        return {"case": _plain(case), "recipe_sha256": self.fingerprint(), "inputs": inputs}

    def __call__(self, engine: Engine) -> None:
        """Write the cases of the finished iteration."""
        state: Any = engine.state
        for batch, output in zip(state.batch, state.output, strict=True):
            self.save({**batch, **output})

    def save(self, data: Mapping[str, Any]) -> None:
        """Write one case: files first, the side-car last."""
        case = json.loads(data["source"])
        written = {}
        for key in self.outputs:
            if isinstance(data.get(key), torch.Tensor):
                path = self.path(case["name"], key)
                if not torch.isfinite(data[key]).all():
                    raise ValueError(f"{path} would hold NaN or infinite voxels: have the weights diverged?")
                with atomic_path(path) as temporary:
                    dtype = self.dtypes.get(key, "float32") or str(data[key].dtype).removeprefix("torch.")
                    self._write(temporary, data[key], dtype)
                written[path.name] = sha256(path)
        root = bundle_root()
        sidecar: dict[str, Any] = {
            "config_file": str(self.run_file().resolve()),
            "bundle_root": None if root is None else str(root),
            "cases": [{**_plain(case), "weights_sha256": self.weights_sha256()}],
            "made_by": {
                **self.origin(case),
                "seed": case.get("seed"),
                "weights": self.weights,
                "weights_sha256": self.weights_sha256(),
                "outputs": written,
                **({} if self.record is None else {"record": data[self.record]}),
                "versions": versions(),
                "notice": "synthetic image, not of a patient; to make it again: "
                "python -m monai.bundle run --args_file THIS_FILE --output_dir ELSEWHERE",
            },
        }
        if root is not None:
            configs = root / "configs"
            sidecar |= {"meta_file": str(configs / "metadata.json"), "logging_file": str(configs / "logging.conf")}
        write_json(self.output_dir / f"{case['name']}.json", sidecar)
        logger.info(f"{case['name']}: written to {self.output_dir}")

    def refuse_inputs(self, cases: Sequence[Case]) -> None:
        """Outputs never go where inputs lie, so that they neither replace one nor are taken for one."""
        for file in (file for case in cases for file in _files(case)):
            if Path(file).resolve().parent == self.output_dir.resolve():
                raise CaseError(f"output_dir {self.output_dir} holds the input {file}: choose another --output_dir")

    def _write(self, path: Path, image: torch.Tensor, dtype: str) -> None:
        # The writer of PNG would clip to [0, 1] and stretch: what comes is what is to be written.
        writer = resolve_writer(self.extension.lstrip("."))[0](output_dtype=np.dtype(dtype), scale=None)
        # A mask in a volume's file keeps a third axis, of length one.
        dims = image.ndim - 1
        squeeze = dims == 3 or isinstance(writer, PILWriter)
        writer.set_data_array(image, channel_dim=0, squeeze_end_dims=squeeze, spatial_ndim=dims)
        writer.set_metadata(getattr(image, "meta", None), resample=False)
        writer.write(str(path), verbose=False)


def _plain(case: Case) -> Case:
    return {k: v for k, v in case.items() if k not in ("source", "weights_sha256", "error")}
