"""Files in and out: case lists, a stream of cases that survives bad ones, atomic writing, and provenance side-cars.

A case is a dict of file paths with a ``name`` and a ``seed``. Whatever is synthesised from it lies beside a JSON
side-car that is written last: it marks the case as finished, and given back as ``--args_file`` it makes the same files
again.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS
from monai.data.image_writer import resolve_writer
from torch.utils.data import IterableDataset

logger = logging.getLogger(__name__)

Case = dict[str, Any]


class CaseError(ValueError):
    """A case's input is unusable; the message names file, cause and fix."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes its place in one step, on failure nothing is left.

    Example:
        >>> with atomic_path("out/report.json") as tmp:  # doctest: +SKIP
        ...     tmp.write_text("{}")
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}; free space or choose another --output_dir"
        raise OSError(error.errno, message) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON atomically, indented by 4 as MONAI's zoo wants it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=4, allow_nan=False) + "\n", encoding="utf-8")


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Case lists


def stem(path: str | os.PathLike) -> str:
    """Case id of a file: its name without the file type, so that ``1.2.840.nii.gz`` is case ``1.2.840``."""
    return Path(path).name.removesuffix(".gz").rpartition(".")[0] or Path(path).name


def case_seed(seed: int, name: str) -> int:
    """Seed of one case: depends on the run's seed and the case's name alone, not on order, batch or machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")


def list_cases(
    dataset_dir: str | os.PathLike,
    folders: Mapping[str, str] | None = None,
    *,
    optional: Sequence[str] = (),
    num_samples: int = 1,
    seed: int = 0,
    strict: bool = True,
) -> list[Case]:
    """List the cases of a folder or of a datalist JSON.

    Args:
        dataset_dir: a folder that holds one folder per key, files paired by name without file type; or a JSON file, a
            list of ``{key: path}`` (or a dict with such a list under "training", "validation" or "test"), paths
            relative to the file.
        folders: key -> folder name, e.g. ``{"image": "CT", "layout": "SEG"}``.
        optional: keys that a case, or the whole data set, may lack.
        num_samples: how many differently seeded samples of every case.
        seed: the run's seed.
        strict: raise for bad cases at once; else they carry an ``error``, which `CaseStream` reports at its end.

    Returns:
        cases ``{key: path, "name": str, "seed": int}``, sorted by name.
    """
    folders = dict(folders or {"image": "CT", "layout": "SEG"})
    root = Path(dataset_dir).absolute()  # side-cars shall be valid anywhere
    if root.suffix == ".json":
        found, errors = _read_datalist(root, folders)
    elif root.is_dir():
        found, errors = _read_folders(root, folders, optional)
    else:
        raise FileNotFoundError(
            f"dataset_dir {root} does not exist: give a folder with {_wanted(folders)} or a .json list"
        )
    for name, case in found.items():
        missing = [k for k in folders if k not in case and k not in optional]
        missing += [f"{k} ({case[k]} is not a file)" for k in folders if k in case and not os.path.isfile(case[k])]
        if missing:
            lack = f"case {name} in {root} lacks {', '.join(missing)}: add the file or remove the case"
            errors.setdefault(name, lack)
    if not found:
        raise FileNotFoundError(f"dataset_dir {root} holds no case: expected {_wanted(folders)}, files of equal names")
    if strict and errors:
        raise CaseError("\n".join(errors.values()))
    cases = []
    for name in sorted(found):
        for k in range(num_samples):
            full = name if num_samples == 1 else f"{name}_s{k}"
            case = {**found[name], "name": full, "seed": case_seed(seed, f"{name}/{k}")}
            cases.append({**case, "error": errors[name]} if name in errors else case)
    return cases


def list_synthetic(output_dir: str | os.PathLike) -> list[Case]:
    """List what an inference run wrote, by its side-cars: ``{"image", "layout", ..., "reference"}`` for each case."""
    cases = []
    for path in sorted(Path(output_dir).glob("*.json")):
        made_by = json.loads(path.read_text(encoding="utf-8")).get("made_by")
        if isinstance(made_by, dict) and "outputs" in made_by:
            case = {stem(file).rpartition("_")[2]: str(path.parent / file) for file in made_by["outputs"]}
            reference = made_by["case"].get("image")
            cases.append({**case, "reference": reference} if reference else case)
    return cases


def _wanted(folders: Mapping[str, str]) -> str:
    return ", ".join(f"{folder}/ ({key})" for key, folder in folders.items())


def _read_folders(root: Path, folders: Mapping[str, str], optional: Sequence[str]) -> tuple[dict, dict]:
    found: dict[str, Case] = {}
    errors: dict[str, str] = {}
    for key, folder in folders.items():
        if not (root / folder).is_dir():
            if key in optional:
                continue
            raise FileNotFoundError(f"{root} has no folder {folder}/ ({key}): expected {_wanted(folders)}")
        for path in sorted((root / folder).iterdir()):
            if path.name.startswith(".") or not path.is_file():
                continue
            case = found.setdefault(stem(path), {})
            if key in case:
                errors[stem(path)] = f"two files for case {stem(path)}: {case[key]} and {path}; keep one"
            case[key] = str(path)
    return found, errors


def _read_datalist(path: Path, folders: Mapping[str, str]) -> tuple[dict, dict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"datalist {path} does not exist") from None
    except ValueError as error:
        raise CaseError(f"datalist {path} is not valid JSON ({error})") from error
    if isinstance(content, dict):
        content = next((content[k] for k in ("training", "validation", "test") if k in content), None)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise CaseError(f"datalist {path} must be a list of {{{', '.join(folders)}}} objects")
    found: dict[str, Case] = {}
    errors: dict[str, str] = {}
    for item in content:
        case = {k: str(path.parent / str(v)) if k in folders else v for k, v in item.items() if v is not None}
        name = str(case.get("name") or next((stem(case[k]) for k in folders if k in case), f"case_{len(found)}"))
        if name != Path(name).name:
            errors[name] = f"datalist {path} names a case {name!r}: a name becomes a file name, use no slashes"
        if name in found:
            errors[name] = f'datalist {path} names case {name} twice: give each entry a different "name"'
        found[name] = case
    return found, errors


# ---------------------------------------------------------------------------------------------------------------------
# A stream of cases


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


def _explain(case: Case, error: BaseException) -> str:
    """The cause in one line, with the case's files if it names none."""
    error = unwrap(error)
    reason = " ".join(str(error).split())
    if isinstance(error, CaseError):
        return reason
    return f"{type(error).__name__}: {reason}; see {', '.join(_files(case))}"


def unwrap(error: BaseException) -> BaseException:
    """The error that MONAI's transforms and config parser have wrapped in RuntimeErrors."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _files(case: Case) -> list[str]:
    return [v for v in case.values() if isinstance(v, str) and os.path.isfile(v)]


# ---------------------------------------------------------------------------------------------------------------------
# Saving, with provenance


class CaseSaver:
    """Engine handler that writes every finished case: its files, atomically, then the side-car.

    Args:
        output_dir: where to write.
        outputs: key in the engine's output or batch -> suffix of the file name, e.g. ``{"pred": "image"}``.
        extension: file type, one that MONAI has a writer for.
        dtypes: key -> dtype on disk.
        weights: file whose hash the side-car records.
    """

    # What does not shape a sample: places, how many, what is done with it afterwards, and what ``--tracking`` adds.
    PLACES = ("bundle_root", "dataset_dir", "phantoms", "cases", "weights", "output_dir", "num_samples", "batch_size")
    AFTERWARDS = ("_desc_", "run", "real", "real_dir", "extractor", "evaluation", "handlers")
    TRACKING = ("tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0")

    def __init__(
        self,
        output_dir: str | os.PathLike,
        outputs: Mapping[str, str],
        extension: str = ".nii.gz",
        dtypes: Mapping[str, str] | None = None,
        weights: str | os.PathLike | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.outputs = dict(outputs)
        self.extension = extension
        self.dtypes = dict(dtypes or {})
        self.weights = None if weights is None else str(weights)
        self._weights_sha256: str | None = None
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
            content = {k: v for k, v in _running_config().items() if k not in ("_meta_", "made_by")}
            self._config = json.loads(json.dumps(content, default=str))
        return self._config

    def weights_sha256(self) -> str | None:
        """Hash of the weights file."""
        if self._weights_sha256 is None and self.weights and Path(self.weights).is_file():
            self._weights_sha256 = sha256(self.weights)
        return self._weights_sha256

    def fingerprint(self) -> str:
        """Hash of all that shapes a sample besides the case itself: the config without its places, and the weights."""
        recipe = {k: v for k, v in self.config().items() if k not in (*self.PLACES, *self.AFTERWARDS, *self.TRACKING)}
        return hashlib.sha256(json.dumps([recipe, self.weights_sha256()], sort_keys=True).encode()).hexdigest()

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
                    self._write(temporary, data[key], self.dtypes.get(key, "float32"))
                written[path.name] = sha256(path)
        root = _bundle_root()
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
                "versions": {"monai": monai.__version__, "torch": torch.__version__, "numpy": np.__version__},
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
        writer = resolve_writer(self.extension.lstrip("."))[0](output_dtype=np.dtype(dtype))
        writer.set_data_array(image, channel_dim=0)
        writer.set_metadata(getattr(image, "meta", None), resample=False)
        writer.write(str(path), verbose=False)


def _plain(case: Case) -> Case:
    return {k: v for k, v in case.items() if k not in ("source", "weights_sha256", "error")}


# ---------------------------------------------------------------------------------------------------------------------
# The running workflow


def running_workflow() -> ConfigWorkflow | None:
    """The MONAI workflow that is executing us, found on the call stack; None outside one."""
    for frame, _ in traceback.walk_stack(None):
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, ConfigWorkflow):
            return candidate
    return None


def _running_config() -> dict[str, Any]:
    workflow = running_workflow()
    config: Any = {} if workflow is None else workflow.parser.config
    return config


def _bundle_root() -> Path | None:
    """Root of the running bundle; a replay, whose config lies elsewhere, spells it out."""
    workflow = running_workflow()
    if workflow is None:
        return None
    root = str(_running_config().get("bundle_root", "$"))
    return workflow.config_root_path.resolve().parent if root.startswith("$") else Path(root)


def check_knobs() -> None:
    """Refuse knobs that no config of the bundle knows, and values of another type than the default's.

    MONAI accepts any top-level key, so ``--epoch 5`` would pass silently. Called in every ``initialize``, where it also
    sees to it that a failed run ends with the cause.
    """
    root = _bundle_root()
    if root is None:
        return
    sys.excepthook = _end_with_cause
    configs, defaults = root / "configs", dict[str, Any]()
    for path in [configs / "inference.json", configs / "train.json", *sorted(configs.glob("*.json"))]:
        if path.is_file() and path.name not in ("metadata.json", "import_rules.json"):
            defaults = {k.lstrip("+"): v for k, v in json.loads(path.read_text(encoding="utf-8")).items()} | defaults
    tracking: Any = DEFAULT_EXP_MGMT_SETTINGS
    reserved = {"_meta_", "_desc_", "made_by", "tracking_uri", "experiment_name", "run_name"}
    reserved |= set(tracking["mlflow"]["configs"])
    problems = []
    for key, value in _running_config().items():
        if key not in defaults and key not in reserved:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see the table of knobs in docs/README.md"
            problems.append(f"unknown knob --{key}: {hint}")
        elif key in defaults and not _same_kind(defaults[key], value):
            problems.append(f"knob --{key} got {value!r}, expected something like {defaults[key]!r}")
    if problems:
        raise ValueError("; ".join(problems))


def _same_kind(default: Any, value: Any) -> bool:
    """Whether a value may take a default's place; expressions, components and open defaults yield to anything."""
    if default is None or value is None or any(isinstance(v, str) and v[:1] in "$@%" for v in (default, value)):
        return True
    if isinstance(default, dict) and "_target_" in default:
        return True
    if isinstance(default, float) and type(value) is int:
        return True
    kind = (list, tuple) if isinstance(default, list) else type(default)
    return isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)


def _end_with_cause(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook: below the traceback, say once more what MONAI's own errors have wrapped."""
    sys.__excepthook__(kind, error, trace)
    cause = unwrap(error)
    if cause is not error:
        sys.stderr.write(f"\n{type(cause).__name__}: {cause}\n")
