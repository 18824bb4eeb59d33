"""MONAI Label app for bundles that synthesise: a request becomes a case, the bundle's own recipe runs on it.

The stock ``monaibundle`` app hands a network one image and takes one label map. Ours are asked with texts, with several
files or with nothing, and answer with images as well as masks. So this app runs ``inference.json`` and ``train.json``
whole, as the command line does: the same request gives the same bytes as there. What a bundle takes of a request it
says in its metadata.json, ``supported_apps``, ``monailabel``:

    infer   {way to use it: {key of the case: source}}; the first way whose sources are all there is taken
    train   {key of the case: source}
    result  the one of the recipe's files that is the answer, unless the request names another
    text    the parameter that a .txt or .json file fills, if it is sent in the image's place

Sources: ``image``, the study or the file sent; ``label``, the label sent, else the study's final one; ``label:TAG``,
the study's label of that tag; ``file:REPORT/*.json``, a file of the study's name beside the studies; any other word is
a parameter. With ``?`` at its end a source may be missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monai.bundle import ConfigWorkflow
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list, name_to_device

logger = logging.getLogger(__name__)

# What a client is told of a synthesis, out of its side-car.
TOLD = ("seed", "record", "weights_sha256", "recipe_sha256", "versions", "notice")
# Overlays that are no presets of a synthesis.
NOT_FOR_INFERENCE = ("train", "multi_gpu", "evaluate", "inference", "fine_tune")
# Recipes put their bundle first on sys.path and fix global seeds: one at a time in this process.
ONE_AT_A_TIME = threading.Lock()

Case = dict[str, Any]


def refused(reason: str, status: int = 422) -> HTTPException:
    """An error that the client reads."""
    return HTTPException(status, reason)


# ---------------------------------------------------------------------------------------------------------------------
# A bundle, and what there is to make a case of


class Bundle:
    """An unzipped bundle, read as data.

    Args:
        root: its folder.
        trained: where trainings of this server leave their weights.
    """

    def __init__(self, root: Path, trained: Path) -> None:
        self.root, self.trained, self.name = root, trained, root.name
        self.metadata, self.inference, self.train = (
            json.loads((root / "configs" / f"{file}.json").read_text(encoding="utf-8"))
            for file in ("metadata", "inference", "train")
        )
        self.serving: dict[str, Any] = self.metadata["supported_apps"]["monailabel"]

    def knobs(self) -> Case:
        """What a client may turn, with defaults: `displayable_configs` of inference.json."""
        names = [name for name in self.inference["displayable_configs"] if name != "num_samples"]
        return {name: self.inference[name] for name in names}

    def texts(self) -> dict[str, str]:
        """Parameters that become part of a case, with the recipe's defaults."""
        sources = {source.rstrip("?") for way in self.serving["infer"].values() for source in way.values()}
        words = sorted(word for word in sources if word not in ("image", "label") and ":" not in word)
        return {word: self.inference.get(word) or "" for word in words}

    def weights(self) -> dict[str, Path]:
        """Weights to choose from: those of the release, those trained here."""
        found = {"shipped": self.root / "models" / "model.pt", "trained": self.trained / "model.pt"}
        return {name: path for name, path in found.items() if path.is_file()}

    def presets(self) -> list[str]:
        """Overlays that change a synthesis."""
        names = sorted(path.stem for path in (self.root / "configs").glob("*.json"))
        data = ("metadata", "import_rules")
        return ["", *(name for name in names if name not in data and not name.startswith(NOT_FOR_INFERENCE))]

    def recipe(self, name: str, preset: str) -> list[str]:
        """Config files of a run."""
        return [str(self.root / "configs" / f"{part}.json") for part in (name, preset) if part]


class Sources:
    """Where the parts of a case come from.

    Args:
        datastore: the studies.
        folder: where they lie.
        study: id of the one that is asked about, "" if a file was sent.
        image: its file, or the one sent.
        label: the label's file, if one was sent.
        texts: parameters.
    """

    # No dataclass: MONAI Label loads this file without making it known to `sys.modules`.
    def __init__(
        self,
        datastore: Datastore,
        folder: str,
        study: str = "",
        image: str = "",
        label: str = "",
        texts: Mapping[str, Any] | None = None,
    ) -> None:
        self.datastore, self.folder, self.study = datastore, folder, study
        self.image, self.label, self.texts = image, label, texts or {}

    def find(self, source: str) -> Any:
        """What a source gives, None if it is not there."""
        kind, _, rest = source.partition(":")
        found: Any = None
        if source == "image":
            found = self.image if os.path.exists(self.image) else None
        elif kind == "label":
            sent = "" if rest else self.label
            found = sent or self.datastore.get_label_uri(self.study, rest or DefaultLabelTag.FINAL)
        elif kind == "file":
            path = Path(self.folder, rest.replace("*", self.study))
            found = str(path) if self.study and path.is_file() else None
        else:
            found = self.texts.get(source)
        return found or None

    def case(self, way: Mapping[str, str]) -> Case | None:
        """A case of the wanted parts; None if one is missing."""
        found = {key: self.find(source.rstrip("?")) for key, source in way.items()}
        if any(found[key] is None and not source.endswith("?") for key, source in way.items()):
            return None
        return {key: value for key, value in found.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class Synthesis(InferTask):
    """Answers /infer with a file that the bundle's recipe makes.

    Args:
        bundle: which one.
        app: knows the studies.
    """

    def __init__(self, bundle: Bundle, app: SynthesisApp) -> None:
        serving, description = bundle.serving, bundle.metadata["description"]
        super().__init__(InferType.SEGMENTATION, serving["labels"], serving["dimension"], description)
        self.bundle, self.app = bundle, app
        outputs = bundle.inference["saver"]["outputs"].values()
        self.results = sorted(outputs, key=lambda name: name != serving["result"])

    def is_valid(self) -> bool:
        """Whether there are weights to run with."""
        return bool(self.bundle.weights())

    def info(self) -> Case:
        """What clients show."""
        return {**super().info(), "version": self.bundle.metadata["version"]}

    def choices(self) -> dict[str, list[str]]:
        """Options of which one is to be chosen; the first is the default."""
        return {
            "device": device_list(),
            "weights": list(self.bundle.weights()),
            "preset": self.bundle.presets(),
            "given": ["", *self.bundle.serving["infer"]],
            "result": self.results,
            "store": ["no", DefaultLabelTag.ORIGINAL.value, DefaultLabelTag.FINAL.value],
        }

    def config(self) -> Case:
        """All options of a request, for clients."""
        free = {**self.bundle.texts(), **self.bundle.knobs()}
        return {**self.choices(), **{name: "" if value is None else value for name, value in free.items()}}

    def __call__(self, request: Case) -> tuple[str, Case]:
        """Synthesise -> (file, what clients are told of it)."""
        begin = time.time()
        chosen = {name: choose(request, name, known) for name, known in self.choices().items()}
        case, name = self.case(request, chosen["given"])
        knobs = {"num_samples": 1, "weights": str(self.bundle.weights()[chosen["weights"]])}
        knobs |= {"device": str(name_to_device(chosen["device"])), **self.turned(request)}
        with tempfile.TemporaryDirectory(prefix="synthesis-") as folder:
            made = run_recipe(self.bundle, chosen["preset"], case, knobs, Path(folder))
            files = {kind: Path(folder, "out", file) for kind, file in made["files"].items()}
            if chosen["result"] not in files:
                raise refused(f"the recipe made no {chosen['result']}, only {', '.join(files)}: ask for that")
            stored = self.store(name, made, files, chosen["store"])
            answer = files[chosen["result"]]
            with tempfile.NamedTemporaryFile(suffix=f"_{answer.name}", delete=False) as file:
                file.write(answer.read_bytes())
        told = {key: made[key] for key in TOLD if key in made} | {"case": made["case"]["name"], "stored": stored}
        told |= {"result": chosen["result"], "files": sorted(files), "label_names": self.labels}
        return file.name, {**told, "latencies": {"total": round(time.time() - begin, 2)}}

    def case(self, request: Case, given: str) -> tuple[Case | None, str]:
        """The case that a request describes, None for one of the recipe's own; and what to call it."""
        texts = {word: parsed(request.get(word, default)) for word, default in self.bundle.texts().items()}
        image, study, serving = request.get("image") or "", request.get("study", ""), self.bundle.serving
        if image.endswith((".txt", ".json")) and "text" in serving:
            texts[serving["text"]] = parsed(Path(image).read_text(encoding="utf-8-sig").strip())
            image = ""
        ways = {given: serving["infer"][given]} if given else serving["infer"]
        sources = Sources(self.app.datastore(), self.app.studies, study, image, request.get("label") or "", texts)
        case = next((case for way in ways.values() if (case := sources.case(way)) is not None), None)
        if case is None:
            needs = "; or ".join(f"{name}: {', '.join(way.values())}" for name, way in ways.items())
            raise refused(f"{self.bundle.name} lacks a part of {needs}; asked with study {study or '(none)'}")
        # A case's seed hangs from its name; a file that is sent comes under a random one.
        files = [value for value in case.values() if isinstance(value, str) and os.path.isfile(value)]
        content = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files))
        name = study or (f"upload-{content.hexdigest()[:8]}" if files else "synthetic")
        return ({"name": name, **case} if case else None), name

    def turned(self, request: Case) -> Case:
        """Knobs that the request turns."""
        turned = {name: request.get(name, default) for name, default in self.bundle.knobs().items()}
        changed = {n: value for n, value in turned.items() if value not in ("", self.bundle.inference[n])}
        for name, value in changed.items():
            if any(sign in json.dumps(value) for sign in "$@%"):
                raise refused(f"{name} {value!r} holds a sign that MONAI would evaluate: give a plain value")
        return changed

    def store(self, name: str, made: Case, files: Mapping[str, Path], tag: str) -> str:
        """Put the synthetic image and its label among the studies, if that is wanted -> its id there."""
        if tag == "no":
            return ""
        image = files.get("image", next(iter(files.values())))
        datastore, study = self.app.datastore(), f"{name}_{self.bundle.name}_{made['recipe_sha256'][:8]}"
        study = datastore.add_image(study, str(image), {"synthetic": made["notice"]})
        for label in [file for kind, file in files.items() if kind != "image" and file != image]:
            info = {"model": self.bundle.name, "params": {"label_names": self.labels}}
            datastore.save_label(study, str(label), tag, info)
        return study


class Training(TrainTask):
    """Answers /train by running the bundle's train.json on the studies that have what it needs.

    Args:
        bundle: which one.
        app: knows the studies.
    """

    def __init__(self, bundle: Bundle, app: SynthesisApp) -> None:
        super().__init__(f"Training of {bundle.name}")
        self.bundle, self.app = bundle, app

    def choices(self) -> dict[str, list[str]]:
        """Options of which one is to be chosen; the first is the default."""
        presets = [name for name in ("paper", "smoke", "fine_tune") if Path(*self.bundle.recipe(name, "")).is_file()]
        return {"device": device_list(), "preset": ["", *presets]}

    def config(self) -> Case:
        """All options of a request, for clients."""
        numbers = {name: self.bundle.train[name] for name in ("batch_size", "lr", "seed")}
        return {**self.choices(), "max_epochs": self.bundle.train["epochs"], **numbers}

    def __call__(self, request: Case, datastore: Datastore) -> Case:
        """Train in a process of its own; what was interrupted goes on, unless the studies are others by now."""
        chosen = {name: choose(request, name, known) for name, known in self.choices().items()}
        knobs: Case = {"dataset_dir": str(self.bundle.trained / "cases.json"), "output_dir": str(self.bundle.trained)}
        knobs |= {"device": str(name_to_device(chosen["device"]))}
        for name, knob in (("max_epochs", "epochs"), ("batch_size", "batch_size"), ("lr", "lr"), ("seed", "seed")):
            if name in request:
                knobs[knob] = float(request[name]) if name == "lr" else int(request[name])
        cases = self.write_cases(datastore)
        recipe = str(self.bundle.recipe("train", chosen["preset"]))
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", recipe]
        command += [part for key, value in knobs.items() for part in (f"--{key}", str(value))]
        logger.info("training on %d studies: %s", len(cases), " ".join(command))
        if subprocess.run(command, stdout=sys.stdout, stderr=subprocess.STDOUT, check=False).returncode:
            raise refused(f"training of {self.bundle.name} failed; why is in the server's log", 500)
        return {"weights": str(self.bundle.weights()["trained"]), "cases": len(cases)}

    def write_cases(self, datastore: Datastore) -> list[Case]:
        """Write down the studies that have all that training needs."""
        way, cases = self.bundle.serving["train"], []
        for study in sorted(datastore.list_images()):
            image, texts = datastore.get_image_uri(study), self.bundle.texts()
            case = Sources(datastore, self.app.studies, study, image, texts=texts).case(way)
            cases += [] if case is None else [{"name": study, **case}]
        if not cases:
            raise refused(f"no study has all of {', '.join(way.values())}, which {self.bundle.name} trains on")
        self.bundle.trained.mkdir(parents=True, exist_ok=True)
        datalist, text = self.bundle.trained / "cases.json", json.dumps(cases, indent=4)
        if datalist.is_file() and datalist.read_text(encoding="utf-8") != text:
            (self.bundle.trained / "checkpoint.pt").unlink(missing_ok=True)
        datalist.write_text(text, encoding="utf-8")
        return cases


class SynthesisApp(MONAILabelApp):
    """Serves the bundles in a folder that say how to be served.

    Args:
        app_dir: folder of this file.
        studies: folder, or DICOMweb address, of the studies.
        conf: what ``--conf`` gave: ``bundles``, a folder of bundles (default: ``model`` beside this file); ``models``,
            names of those to serve, with commas (default: all).
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        folder = Path(conf.get("bundles") or Path(app_dir, "model")).resolve()
        known = {path.parents[1].name for path in folder.glob("*/configs/metadata.json")}
        names = [name for name in map(str.strip, conf.get("models", "").split(",")) if name] or sorted(known)
        if not names or (unknown := [name for name in names if name not in known]):
            lacks = ", ".join(unknown) if names else "at all"
            raise FileNotFoundError(f"no bundle {lacks} in {folder}: unzip its release there")
        trained = Path(app_dir).resolve() / "trained"
        self.bundles = {name: Bundle(folder / name, trained / name) for name in names}
        title, description = "Synthesis bundles", "Synthetic images and masks from masks, images and texts"
        super().__init__(app_dir, studies, conf, name=title, description=description)

    def init_infers(self) -> dict[str, InferTask]:
        """One for each bundle."""
        return {name: Synthesis(bundle, self) for name, bundle in self.bundles.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """One for each bundle that trains on labelled studies."""
        return {name: Training(bundle, self) for name, bundle in self.bundles.items() if "train" in bundle.serving}

    def infer(self, request: Case, datastore: Datastore | None = None) -> Any:
        """Answer a request; the study's name is kept, which the server replaces by its file's."""
        image = request.get("image")
        study = image if isinstance(image, str) and image in self.datastore().list_images() else ""
        return super().infer({**request, "study": study}, datastore)


# ---------------------------------------------------------------------------------------------------------------------
# Verbs


def choose(request: Mapping[str, Any], name: str, known: list[str]) -> str:
    """What a request chooses among known values; clients send the whole list where nothing was chosen."""
    value = request.get(name)
    value = known[0] if value is None or isinstance(value, list) else value
    if name != "device" and value not in known:
        raise refused(f"{name} {value!r} is unknown: choose one of {', '.join(map(repr, known))}")
    return value


def parsed(text: Any) -> Any:
    """A text that is JSON, as what it says; any other as it is."""
    if isinstance(text, str) and text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise refused(f"{text[:60]!r} is not valid JSON ({error})") from error
    return text


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait for other recipes to end, and leave the path as it was."""
    with ONE_AT_A_TIME:
        before = list(sys.path)
        try:
            yield
        finally:
            sys.path[:] = before


def run_recipe(bundle: Bundle, preset: str, case: Case | None, knobs: Case, folder: Path) -> Case:
    """Run a bundle's inference on one case -> what its side-car tells, and ``files``, by kind, in ``out/``."""
    settings = {key: value for key, value in knobs.items() if key in bundle.inference}
    settings |= {"output_dir": str(folder / "out")}
    if case is not None:
        settings["dataset_dir"] = str(folder / "cases.json")
        (folder / "cases.json").write_text(json.dumps([case]), encoding="utf-8")
    recipe, metadata = bundle.recipe("inference", preset), str(bundle.root / "configs" / "metadata.json")
    try:
        with alone():
            workflow = ConfigWorkflow(recipe, metadata, logging_file=False, workflow_type="infer", **settings)
            workflow.initialize()
            workflow.run()
            workflow.finalize()
    except Exception as error:
        logger.exception("%s failed", bundle.name)
        cause: BaseException = error
        while type(cause) is RuntimeError and cause.__cause__ is not None:
            cause = cause.__cause__
        raise refused(f"{bundle.name}: {' '.join(str(cause).split())}") from error
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "out").glob("*.json")]
    made: Case = next(card["made_by"] for card in cards if "made_by" in card)
    kinds = bundle.inference["saver"]["outputs"].values()
    files = {kind: file for kind in kinds for file in made["outputs"] if f"_{kind}." in file}
    return {**made, "files": files}
