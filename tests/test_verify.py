"""Every check of tools/verify.py passes an untrained copy of each bundle, and fails its mutants."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NAMES, copy_checkout, edit, run_command, save_weights

from common.io import write_json
from tools import contents, laws, networks, package, smoke, verify
from tools.reading import Check, read

SLOW = (networks.check_paper, networks.check_properties, networks.check_network, networks.check_export)


def test_an_unknown_bundle_is_a_usage_error(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        verify.main(["nothing"])
    assert caught.value.code == 2
    assert "choose one of" in capsys.readouterr().err


def test_what_fails_is_told_and_sets_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(verify, "CHECKS", [contents.check_large_files])
    assert verify.main([str(tmp_path)]) == 0
    monkeypatch.setattr(verify, "CHECKS", [contents.check_licence, contents.check_large_files])
    assert verify.main([str(tmp_path)]) == 1
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["ok  ", "FAIL", "ok  "]


def test_an_unzipped_release_passes_every_check(checkout: Path, tmp_path: Path) -> None:
    """So nothing but its mutation is wrong with a mutant below. ``.ci/run`` asks all of the real releases."""
    zipfile.ZipFile(package.package(checkout, tmp_path / "dist")).extractall(tmp_path)
    checks = [check for check in verify.CHECKS if check not in SLOW]
    problems = {check.__name__: verify.attempt(check, tmp_path / checkout.name) for check in checks}
    assert problems == {check.__name__: [] for check in checks}


def test_monai_has_a_say_in_metadata(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schema is ours, so that no mutant could pass the one and fail the other."""

    def refuse(**arguments: Any) -> None:
        raise ValueError(f"{Path(arguments['meta_file']).name} against {Path(arguments['filepath']).name}")

    monkeypatch.setattr(contents, "verify_metadata", refuse)
    assert "metadata.json against metadata_schema.json" in verify.attempt(contents.check_metadata, checkout)[0]


@pytest.mark.parametrize("checkout", NAMES[:1], indirect=True)
def test_a_smoke_run_that_breaks_is_told(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke.subprocess, "run", lambda command, cwd, **_: run_command(*command, cwd=cwd))
    bundle = copy_checkout(checkout, tmp_path)
    edit(bundle, "train", run=["$1 / 0"])
    root, own = verify.attempt(smoke.check_smoke, bundle)
    assert root.startswith(f"train+smoke in {tmp_path}: ")
    assert own.startswith(f"train+smoke in {bundle}: ")
    assert "division by zero" in root


# ---------------------------------------------------------------------------------------------------------------------
# Mutants: each breaks a bundle in one way, and the check made for it says so

Mutation = Callable[[Path], Any]


def delete(name: str) -> Mutation:
    """Make a mutation that deletes a file."""
    return lambda bundle: (bundle / name).unlink()


def write(name: str, text: str = "") -> Mutation:
    """Make a mutation that writes a file."""

    def mutate(bundle: Path) -> None:
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text(text)

    return mutate


def change(name: str, old: str, new: str) -> Mutation:
    """Make a mutation that replaces text in a file, once."""

    def mutate(bundle: Path) -> None:
        path = bundle / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"the mutant needs {old!r} in {name}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return mutate


def put(name: str, **items: Any) -> Mutation:
    """Make a mutation that sets top-level items of a config."""
    return lambda bundle: edit(bundle, name, **items)


def put_in(name: str, *path: str, **items: Any) -> Mutation:
    """Make a mutation that sets items of a dictionary within a config."""

    def mutate(bundle: Path) -> None:
        content = inner = read(bundle / "configs" / f"{name}.json")
        for key in path:
            inner = inner[key]
        inner |= items
        edit(bundle, name, **content)

    return mutate


def put_on_card(**items: Any) -> Mutation:
    """Make a mutation of the provenance card."""
    return lambda bundle: write_json(bundle / CARD, read(bundle / CARD) | items)


def spoil_weights(function: Callable[[dict[str, torch.Tensor]], Any]) -> Mutation:
    """Make a mutation of the state dict, with a card that fits."""

    def mutate(bundle: Path) -> None:
        state = torch.load(bundle / "models" / "model.pt", weights_only=True)
        function(state)
        save_weights(bundle, state)

    return mutate


def spoil_network(result: str) -> Mutation:
    """Make a mutation of the network: its prediction becomes an expression of ``x`` and ``pred``."""

    def mutate(bundle: Path) -> None:
        module, _, name = read(bundle / INFER)["network_def"]["_target_"].rpartition(".")
        code = (
            f"from {module} import {name}\n\n\n"
            f"class Spoilt({name}):\n"
            "    def forward(self, x, *args, **kwargs):\n"
            "        pred = super().forward(x, *args, **kwargs)\n"
            f"        return {result}\n"
        )
        (bundle / "scripts" / "spoilt.py").write_text(code)
        put_in("inference", "network_def", _target_="scripts.spoilt.Spoilt")(bundle)

    return mutate


def export_another(bundle: Path) -> None:
    """Put a TorchScript beside the weights that computes something else."""
    torch.jit.script(torch.nn.Identity()).save(str(bundle / "models" / "model.ts"))


TRAIN, INFER, META = (f"configs/{name}.json" for name in ("train", "inference", "metadata"))
LOGGING, README, CARD = "configs/logging.conf", "docs/README.md", "models/model.json"
REQUIRES = '            "_requires_": "@use_bundle",\n'
IMAGE, PRED = ("network_data_format", "inputs", "image"), ("network_data_format", "outputs", "pred")
APP = {"labels": {"lesion": 1}, "dimension": 2, "infer": {"a mask": {}}, "result": "tissue"}
LARGE = "large_files:\n  - path: models/big.pt\n    url: https://example.org/big.pt\n"

# What is done to a bundle, and what is said about it.
MUTANTS: dict[Check, dict[str, tuple[Mutation, str]]] = {
    laws.check_json: {
        "tab": (change(TRAIN, '    "seed"', '\t"seed"'), "not indented"),
        "indent 2": (change(INFER, '    "seed"', '  "seed"'), "not indented by 4"),
        "indented card": (change(CARD, '    "source"', '  "source"'), "not indented by 4"),
        "key twice": (change(TRAIN, '    "seed": 0,', '    "seed": 0,\n    "seed": 1,'), "stands twice"),
        "not JSON": (change(TRAIN, '"seed": 0,', '"seed": 0'), "train.json"),
    },
    laws.check_head: {
        "other head": (change(INFER, "os.path.abspath(", "os.path.realpath("), "bundle_root differs"),
        "head of another bundle": (change(TRAIN, "isdir('bundles/", "isdir('bundles/my_"), "bundle_root"),
        "head too late": (change(TRAIN, '    "device": "$t', '    "x": 0,\n    "device": "$t'), "device differs"),
    },
    laws.check_requires: {
        "no requires": (change(TRAIN, REQUIRES, ""), "lacks"),
        "imports scripts": (change(INFER, "$import glob", "$from scripts.common import io"), "imports scripts"),
    },
    laws.check_strings: {
        "file macro": (put("inference", seed="%train.json::seed"), "is a macro"),
        "metadata reference": (put("train", seed="$@_meta_::version"), "reads @_meta_"),
        "hash sign": (change(META, '"task": "', '"task": "issue #5, '), "holds a #"),
    },
    laws.check_shared_ids: {
        "other value": (put("train", prediction_type="another"), "prediction_type differs"),
        "other network": (put_in("inference", "network_def", norm_eps=1e-06), "network_def::norm_eps"),
    },
    laws.check_flat_knobs: {
        "buried knob": (change(TRAIN, '"lr": "@lr"', '"lr": 0.001'), "top-level knob"),
        "buried epochs": (put("smoke", **{"train::trainer::max_epochs": 2}), "top-level knob"),
    },
    laws.check_overlays: {
        "orphan knob": (put("paper", epoch=5), "no base has epoch"),
        "orphan parent": (put("smoke", **{"training::trainer": "@x"}), "training::trainer"),
        "network again": (
            lambda bundle: edit(bundle, "paper", network_def=read(bundle / INFER)["network_def"]),
            "second copy",
        ),
    },
    laws.check_initialize: {
        "late use_bundle": (change(TRAIN, '"$@use_bundle",\n', '"$1",\n'), "does not start with"),
        "no seed": (change(INFER, "set_determinism(@seed)", "set_determinism(1)"), "lacks set_determinism"),
        "no knob check": (change(INFER, "workflow.check_knobs", "io.list_cases"), "check_knobs"),
    },
    laws.check_logging: {
        "log to a file": (change(LOGGING, "class=StreamHandler", "class=FileHandler"), "class is FileHandler"),
        "log elsewhere": (change(LOGGING, "(sys.stdout,)", "('x.log',)"), "args is ('x.log',)"),
        "more arguments": (change(LOGGING, "args=", "kwargs={'stream': None}\nargs="), "kwargs is"),
    },
    contents.check_files: {
        "no licence": (delete("LICENSE"), "no LICENSE"),
        "no logging": (delete(LOGGING), "no configs/logging.conf"),
        "no weights for inference": (delete("models/model.pt"), "no models/model.pt"),
        "knob without its file": (
            put("inference", table="$os.path.join(os.path.dirname(@weights), 'table.json')"),
            "no models/table.json",
        ),
    },
    contents.check_tidy: {
        "link": (lambda bundle: (bundle / "docs" / "more.md").symlink_to(bundle / README), "is a symbolic link"),
        "link to a folder": (lambda bundle: (bundle / "docs" / "all").symlink_to(bundle), "is a symbolic link"),
        "hidden file": (write("docs/.DS_Store"), "docs/.DS_Store is hidden"),
        "hidden folder": (write(".idea/x.xml"), ".idea is hidden"),
        "foreign folder": (write("notebooks/try.ipynb"), "has no place in a bundle"),
        "home on a card": (put_on_card(training_data="/home/me/scans"), "names /home/me, a path"),
        "disk in a config": (put("train", dataset_dir="D:\\scans"), "a path of one machine"),
    },
    contents.check_licence: {
        "other licence": (write("LICENSE", "MIT License"), "not the text of the Apache License"),
        "licence with an exception": (change("LICENSE", "worldwide", "national"), "word for word"),
        "nobody's": (put("metadata", copyright="none"), "copyright does not begin"),
        "untold data": (write("docs/data_license.txt"), "data_license.txt does not mention common/"),
        "untold weights": (put_on_card(training_data="scans"), "data_license.txt does not mention model.pt"),
    },
    contents.check_metadata: {
        "no task": (change(META, '"task"', '"tasks"'), "'task' is a required property"),
        "null range": (change(META, '"value_range": []', '"value_range": [null, null]'), "value_range"),
        "half a tensor": (change(META, '"num_channels"', '"channels"'), "inputs::image"),
        "no outputs": (change(META, '"outputs"', '"output"'), "'outputs' is a required property"),
        "version unknown": (change(META, '"version": "0', '"version": "9'), "not in the changelog"),
        "version of two digits": (
            put("metadata", version="0.10.0", changelog={"0.10.0": "x"}),
            "metadata.json::version",
        ),
        "older schema": (change(META, "20240725", "20230608"), "metadata.json::schema"),
        "no exact version": (put("metadata", numpy_version=">=2"), "metadata.json::numpy_version"),
        "no exact package": (
            put_in("metadata", "required_packages_version", tqdm="*"),
            "metadata.json::required_packages_version::tqdm",
        ),
        "app unknown": (put("metadata", supported_apps={"another": {}}), "'another' was unexpected"),
        "no numbers": (put("metadata", eval_metrics={}), "metadata.json::eval_metrics"),
    },
    contents.check_versions: {
        "other package": (change(META, '"monai_version": "1', '"monai_version": "0'), "monai is 0"),
        "package unknown": (put_in("metadata", "required_packages_version", left_pad="1.0"), "left_pad is 1.0"),
        "no requirements": (lambda bundle: (bundle.parents[1] / "requirements.txt").unlink(), "no requirements.txt"),
    },
    contents.check_published: {
        "version published": (
            lambda bundle: write_json(
                bundle.parent / "model_info.json",
                {f"{bundle.name}_v0.1.0": {"checksum": "0", "source": "https://example.org"}},
            ),
            "is published at https://example.org",
        ),
    },
    contents.check_readme: {
        "no section": (change(README, "## Limits", "## Praise"), "no section 'Limits'"),
        "section twice": (change(README, "## Limits", "## Data\n\n## Limits"), "has the sections"),
        "no picture": (delete("docs/montage.png"), "names docs/montage.png"),
        "command of no config": (
            change(README, "configs/train.json", "configs/training.json"),
            "configs/training.json",
        ),
    },
    contents.check_cards: {
        "no terms": (put_on_card(licence="not stated"), "does not state licence"),
        "no source": (put_on_card(source="", knobs={}), "does not state source, knobs"),
        "card of others": (put_on_card(weights="mine.pt"), "is mine.pt's"),
    },
    contents.check_apps: {
        "no such file": (put("metadata", supported_apps={"monailabel": APP}), "answers with tissue"),
        "fixed for clients": (put_in("inference", "displayable_configs", seed=1), "seed is not the knob @seed"),
        "nothing to turn": (put_in("inference", "displayable_configs", speed="@speed"), "has no such knob"),
    },
    contents.check_large_files: {
        "no hash": (write("large_files.yml", LARGE), "hash_val of models/big.pt is None"),
        "outside": (write("large_files.yml", LARGE.replace("models", "..")), "path of ../big.pt"),
        "no https": (write("large_files.yml", LARGE.replace("https", "http")), "url of models/big.pt"),
    },
    networks.check_data_format: {
        "other size": (put_in("metadata", *IMAGE, spatial_shape=[8, 8]), "spatial_shape"),
        "other channels": (put_in("metadata", *IMAGE, num_channels=9), "num_channels is 9"),
        "unnamed channels": (put_in("metadata", *PRED, channel_def={"0": "a", "1": "b"}), "names 2 channels"),
        "no such network": (put("metadata", ghost_data_format={}), "ghost_def, which inference.json does not have"),
    },
    networks.check_paper: {
        "paper differs": (put("paper", num_res_blocks=3), "parameters, expected"),
        "paper unknown": (
            lambda bundle: shutil.copy(bundle / "configs/paper.json", bundle / "configs/paper_x.json"),
            "paper_x",
        ),
    },
    networks.check_properties: {
        "no dataset_dir": (change(TRAIN, '"dataset_dir": null', '"data_dir": null'), "train.json: no dataset_dir"),
        "no output_dir": (change(INFER, '"output_dir":', '"out_dir":'), "inference.json: no output_dir"),
        "no dataset": (change(INFER, '"dataset": {', '"data_set": {'), "dataset"),
        "hidden handlers": (change(INFER, '"val_handlers": "@handlers"', '"val_handlers": "@saver"'), "handlers"),
        "code in the log": (change(LOGGING, "class=StreamHandler", "class=eval"), "refusing to apply logging config"),
    },
    networks.check_network: {
        "network narrows": (put_in("metadata", *PRED, num_channels=7), "metadata.json says"),
        "other precision": (put_in("metadata", *PRED, dtype="float64"), "dtype of output data"),
    },
    networks.check_export: {
        "no such argument": (put_in("inference", "network_def", norm_epsilon=1e-05), "norm_epsilon"),
        "batch traced in": (
            spoil_network("pred.reshape(len(x), *pred.shape[1:])"),
            "failed in the TorchScript interpreter",
        ),
        "number traced in": (spoil_network("pred + float(x.std())"), "TorchScript computes something else"),
        "batch exported in": (
            spoil_network("pred + pred.new_zeros(len(x), *[1] * (pred.ndim - 1))"),
            "specialized",
        ),
        "other export": (export_another, "models/model.ts computes something else"),
    },
    networks.check_weights: {
        "no weights": (delete("models/model.pt"), "no weights"),
        "no card": (delete(CARD), "no provenance card"),
        "other card": (put_on_card(weights_sha256="0"), "is not that of"),
        "key lost": (spoil_weights(lambda state: state.popitem()), "Missing key"),
        "key more": (spoil_weights(lambda state: state.update(x=torch.ones(1))), "Unexpected key"),
        "NaN": (spoil_weights(lambda state: next(iter(state.values())).fill_(float("nan"))), "NaN"),
        "too big": (
            lambda bundle: (bundle / "models/x.json").write_bytes(bytes(networks.MAX_MODELS)),
            "more than",
        ),
        "other format": (write("models/model.bin"), "models/model.bin is no .pt"),
        "code inside": (lambda bundle: torch.save({"x": print}, bundle / "models/model.pt"), "weights_only"),
    },
}


def cases() -> Iterator[Any]:
    """All mutants of all bundles, one bundle after the other; where telling takes a second, each of one, in turn."""
    for turn, bundle in enumerate(NAMES):
        for check, mutants in MUTANTS.items():
            for number, (name, mutant) in enumerate(mutants.items()):
                if check not in SLOW or number % len(NAMES) == turn:
                    yield pytest.param(bundle, check, *mutant, id=f"{bundle}-{name.replace(' ', '_')}")


@pytest.mark.parametrize(("checkout", "check", "mutate", "reason"), cases(), indirect=["checkout"])
def test_mutant_is_caught(checkout: Path, tmp_path: Path, check: Check, mutate: Mutation, reason: str) -> None:
    bundle = copy_checkout(checkout, tmp_path)
    mutate(bundle)
    problems = verify.attempt(check, bundle)
    assert problems, f"{check.__name__} overlooks it"
    assert reason in "; ".join(problems)


def test_name_with_version_is_caught(checkout: Path, tmp_path: Path) -> None:
    bundle = copy_checkout(checkout, tmp_path, f"{checkout.name}_vae")
    assert "contains _v" in "; ".join(contents.check_files(bundle))


def test_every_check_is_run_and_has_a_mutant() -> None:
    found = [value for room in (laws, contents, networks) for name, value in vars(room).items() if name[:6] == "check_"]
    assert {*found} == {*MUTANTS} == {*verify.CHECKS}
    assert len(verify.CHECKS) == len({*verify.CHECKS})
