"""Release zips: the same bytes twice, runnable in an empty folder; and every check of tools/verify.py can fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import package, verify

REPO = Path(__file__).resolve().parents[1]
NAMES = sorted(path.parent.name for path in (REPO / "bundles").glob("*/configs"))
IGNORED = shutil.ignore_patterns("output", "data", "eval", "__pycache__", ".*", "*.previous.*")


@pytest.fixture(scope="session", params=NAMES)
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of one bundle in a small checkout, with untrained weights, which make any size cheap. Read only.

    What else lies in models/ (statistics, say) stays.
    """
    root = tmp_path_factory.mktemp("checkout")
    bundle = root / "bundles" / request.param
    shutil.copytree(REPO / "common", root / "common", ignore=IGNORED)
    shutil.copy(REPO / "requirements.txt", root)
    shutil.copytree(REPO / "bundles" / request.param, bundle, ignore=IGNORED)
    for path in (bundle / "models").glob("model*.pt"):
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
    (bundle / "models").mkdir(exist_ok=True)
    levels = len(json.loads((bundle / "configs" / "inference.json").read_text())["attention_levels"])
    for name in ("inference", "train"):
        edit(bundle, name, channels=[8, 8, 16, 16][:levels], norm_num_groups=4)
    save_weights(bundle, verify.build(verify.parser(bundle, "inference"), "cpu").state_dict())
    return bundle


def edit(bundle: Path, name: str, /, **items: Any) -> None:
    """Set top-level items of a config."""
    path = bundle / "configs" / f"{name}.json"
    path.write_bytes(package._json(json.loads(path.read_text()) | items))


def edit_format(bundle: Path, group: str, entry: str, **items: Any) -> None:
    """Set items of an entry of metadata.json's network_data_format."""
    meta = json.loads((bundle / "configs/metadata.json").read_text())
    meta["network_data_format"][group][entry] |= items
    edit(bundle, "metadata", **meta)


def save_weights(bundle: Path, state: dict[str, torch.Tensor]) -> None:
    path = bundle / "models" / "model.pt"
    torch.save({key: value.half().float() for key, value in state.items()}, path)
    path.with_suffix(".json").write_text(json.dumps({"weights_sha256": verify.sha256(path)}))


# ---------------------------------------------------------------------------------------------------------------------
# The zip


def test_zip_is_deterministic_and_complete(checkout: Path, tmp_path: Path) -> None:
    first = package.package(checkout, tmp_path / "a")
    (checkout / "scripts" / "__pycache__").mkdir(exist_ok=True)
    (checkout / "scripts" / "__pycache__" / "stale.pyc").write_bytes(b"x")
    (checkout / "output").mkdir(exist_ok=True)
    (checkout / "output" / "left.txt").write_text("x")
    os.utime(checkout / "LICENSE", (0, 0))
    second = package.package(checkout, tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert {name.split("/")[0] for name in names} == {checkout.name}
        assert not [n for n in names if "__pycache__" in n or "/output/" in n or "/." in n or ".." in n]
        assert {(entry.date_time, entry.external_attr >> 16) for entry in archive.infolist()} == {
            ((2020, 1, 1, 0, 0, 0), 0o100644)
        }
    expected = [
        *verify.FILES,
        "models/model.json",
        "scripts/__init__.py",
        "scripts/common/__init__.py",
        "scripts/common/io.py",
    ]
    assert {f"{checkout.name}/{name}" for name in expected} <= set(names)


def test_index_gives_checksums(checkout: Path, tmp_path: Path) -> None:
    path = package.package(checkout, tmp_path)
    package.write_index(tmp_path)
    info = json.loads((tmp_path / "model_info.json").read_text())
    assert info == {path.stem: {"checksum": hashlib.sha1(path.read_bytes()).hexdigest(), "source": ""}}
    assert (tmp_path / "SHA256SUMS").read_text() == f"{verify.sha256(path)}  {path.name}\n"


def test_incomplete_bundle_is_refused(checkout: Path, tmp_path: Path) -> None:
    bundle = copy(checkout, tmp_path)
    (bundle / "LICENSE").unlink()
    with pytest.raises(package.PackageError, match="lacks LICENSE"):
        package.package(bundle, tmp_path / "dist")
    (bundle / "LICENSE").symlink_to(checkout / "LICENSE")
    with pytest.raises(package.PackageError, match="symbolic link"):
        package.package(bundle, tmp_path / "dist")


def test_preset_becomes_the_default(checkout: Path, tmp_path: Path) -> None:
    small, weights = copy(checkout, tmp_path), tmp_path / "big.pt"
    # A published network of a billion parameters takes minutes to pack: thinner ones, and the shipped networks that
    # stand beside it (an autoencoder, a first stage), whose knobs stay as they are.
    preset = verify.read(small / "configs/paper.json")
    beside = ("autoencoder", "latent_channels", "mask_", "adapter_", "summary_", "token_width", "num_classes")
    beside += ("encoder_blocks", "decoder_blocks", "num_codes", "null_token")
    kept = {k: v for k, v in preset.items() if not k.startswith(beside)}
    text = package._json(kept | {"channels": [32] * len(preset["channels"])})
    (small / "configs/paper.json").write_bytes(text)
    torch.save(verify.build(verify.parser(small, "inference", "paper"), "cpu").state_dict(), weights)
    path = package.package(small, tmp_path / "dist", weights=weights, preset="paper")
    zipfile.ZipFile(path).extractall(tmp_path / "unzipped")
    bundle = tmp_path / "unzipped" / checkout.name
    for base in ("train", "inference"):
        baked, plain, paper = (verify.read(bundle / "configs" / f"{name}.json") for name in (base, base, "paper"))
        assert {k: baked[k] for k in paper if k in plain and k != "_desc_"} == {
            k: paper[k] for k in paper if k in plain and k != "_desc_"
        }
    checks = [verify.check_json, verify.check_shared_ids, verify.check_data_format, verify.check_weights]
    problems = [problem for check in checks for problem in check(bundle)]
    assert [problem for problem in problems if "MB, more than" not in problem] == []


def test_other_weights_bring_what_lies_beside_them(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Statistics, say: they describe the data that the weights were trained on."""
    bundle = copy(checkout, tmp_path)
    (bundle / "models/table.json").write_text('"ours"')
    (bundle / "models/second.pt").write_bytes(b"ours")
    (bundle / "models/second.json").write_text('"ours"')
    shutil.copy(bundle / "models/model.pt", tmp_path / "mine.pt")
    (tmp_path / "second.json").write_text('"theirs"')
    for number, there in enumerate((False, True)):
        if there:
            (tmp_path / "table.json").write_text('"theirs"')
        path = package.package(bundle, tmp_path / str(number), weights=tmp_path / "mine.pt")
        with zipfile.ZipFile(path) as archive:
            held = {n: archive.read(f"{bundle.name}/models/{n}.json") for n in ("table", "second")}
        assert held == {"table": b'"theirs"' if there else b'"ours"', "second": b'"ours"'}
        assert ("table.json stays as it is" in capsys.readouterr().err) is not there


def test_command_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for wrong in (["nothing"], [NAMES[0], "--preset", "paper"], ["--weights", "x.pt"], [NAMES[0], "--weights", "x.pt"]):
        with pytest.raises(SystemExit) as caught:
            package.main([*wrong, "--output", str(tmp_path)])
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        verify.main(["nothing"])
    assert caught.value.code == 2
    assert "choose one of" in capsys.readouterr().err


def test_an_unzipped_release_passes_every_check(checkout: Path, tmp_path: Path) -> None:
    """So nothing but its mutation is wrong with a mutant below. ``.ci/run`` runs the real releases."""
    zipfile.ZipFile(package.package(checkout, tmp_path / "dist")).extractall(tmp_path)
    problems = {check.__name__: verify.attempt(check, tmp_path / checkout.name) for check in verify.CHECKS}
    assert problems == {check.__name__: [] for check in verify.CHECKS}


# ---------------------------------------------------------------------------------------------------------------------
# Mutants: each breaks a bundle in one way, and the check made for it says so


def copy(checkout: Path, folder: Path, name: str | None = None) -> Path:
    """Copy the checkout's bundle, to break it; the shared code stays where it is."""
    bundle = folder / "bundles" / (name or checkout.name)
    shutil.copytree(checkout, bundle)
    (folder / "common").symlink_to(checkout.parents[1] / "common")
    shutil.copy(checkout.parents[1] / "requirements.txt", folder)
    return bundle


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Make a mutation that replaces text in a file, once."""

    def mutate(bundle: Path) -> None:
        path = bundle / name
        text = path.read_text(encoding="utf-8")
        assert old in text, f"the mutant needs {old!r} in {name}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return mutate


def put(name: str, **items: Any) -> Callable[[Path], None]:
    """Make a mutation that sets top-level items of a config."""
    return lambda bundle: edit(bundle, name, **items)


def put_in_network(**items: Any) -> Callable[[Path], None]:
    """Make a mutation of the network that inference.json denoises with, where several stand in the file."""
    return lambda bundle: edit(bundle, "inference", network_def=verify.read(bundle / INFER)["network_def"] | items)


def spoil_weights(function: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Make a mutation of the state dict, with a card that fits."""

    def mutate(bundle: Path) -> None:
        state = torch.load(bundle / "models" / "model.pt", weights_only=True)
        function(state)
        save_weights(bundle, state)

    return mutate


TRAIN, INFER, META = (f"configs/{name}.json" for name in ("train", "inference", "metadata"))
REQUIRES = '            "_requires_": "@use_bundle",\n'
MUTANTS: dict[str, tuple[verify.Check, Callable[[Path], Any], str]] = {
    "no licence": (verify.check_files, lambda b: (b / "LICENSE").unlink(), "no LICENSE"),
    "no logging": (verify.check_files, lambda b: (b / "configs/logging.conf").unlink(), "no configs/logging.conf"),
    "knob without its file": (
        verify.check_files,
        put("inference", table="$os.path.join(os.path.dirname(@weights), 'table.json')"),
        "no models/table.json",
    ),
    "tab": (verify.check_json, change(TRAIN, '    "seed"', '\t"seed"'), "not indented"),
    "indent 2": (verify.check_json, change(INFER, '    "seed"', '  "seed"'), "not indented by 4"),
    "key twice": (verify.check_json, change(TRAIN, '    "seed": 0,', '    "seed": 0,\n    "seed": 1,'), "stands twice"),
    "not JSON": (verify.check_json, change(TRAIN, '"seed": 0,', '"seed": 0'), "train.json"),
    "other head": (verify.check_head, change(INFER, "os.path.abspath(", "os.path.realpath("), "bundle_root differs"),
    "head of another bundle": (
        verify.check_head,
        change(TRAIN, "isdir('bundles/", "isdir('bundles/my_"),
        "bundle_root",
    ),
    "head too late": (
        verify.check_head,
        change(TRAIN, '    "device": "$t', '    "x": 0,\n    "device": "$t'),
        "device differs",
    ),
    "no requires": (verify.check_requires, change(TRAIN, REQUIRES, ""), "lacks"),
    "imports scripts": (
        verify.check_requires,
        change(INFER, "$import glob", "$from scripts.common import io"),
        "imports scripts",
    ),
    "file macro": (verify.check_strings, put("inference", seed="%train.json::seed"), "is a macro"),
    "metadata reference": (verify.check_strings, put("train", seed="$@_meta_::version"), "reads @_meta_"),
    "hash sign": (verify.check_strings, change(META, '"task": "', '"task": "issue #5, '), "holds a #"),
    "other value": (verify.check_shared_ids, put("train", prediction_type="another"), "prediction_type differs"),
    "other network": (
        verify.check_shared_ids,
        put_in_network(norm_eps=1e-06),
        "network_def::norm_eps",
    ),
    "buried knob": (verify.check_flat_knobs, change(TRAIN, '"lr": "@lr"', '"lr": 0.001'), "top-level knob"),
    "buried epochs": (verify.check_flat_knobs, put("smoke", **{"train::trainer::max_epochs": 2}), "top-level knob"),
    "orphan knob": (verify.check_overlays, put("paper", epoch=5), "no base has epoch"),
    "orphan parent": (verify.check_overlays, put("smoke", **{"training::trainer": "@x"}), "training::trainer"),
    "network again": (
        verify.check_overlays,
        lambda b: edit(b, "paper", network_def=verify.read(b / INFER)["network_def"]),
        "second copy",
    ),
    "late use_bundle": (verify.check_initialize, change(TRAIN, '"$@use_bundle",\n', '"$1",\n'), "does not start with"),
    "no seed": (
        verify.check_initialize,
        change(INFER, "set_determinism(@seed)", "set_determinism(1)"),
        "lacks set_determinism",
    ),
    "no knob check": (verify.check_initialize, change(INFER, "workflow.check_knobs", "io.list_cases"), "check_knobs"),
    "no task": (verify.check_metadata, change(META, '"task"', '"tasks"'), "'task' is a required property"),
    "null range": (
        verify.check_metadata,
        change(META, '"value_range": []', '"value_range": [null, null]'),
        "value_range",
    ),
    "half a tensor": (verify.check_metadata, change(META, '"num_channels"', '"channels"'), "inputs::image"),
    "no outputs": (verify.check_metadata, change(META, '"outputs"', '"output"'), "'outputs' is a required property"),
    "version unknown": (verify.check_metadata, change(META, '"version": "0', '"version": "9'), "not in the changelog"),
    "other package": (verify.check_versions, change(META, '"monai_version": "1', '"monai_version": "0'), "monai is 0"),
    "other size": (
        verify.check_data_format,
        lambda b: edit_format(b, "inputs", "image", spatial_shape=[8, 8]),
        "spatial_shape",
    ),
    "other channels": (
        verify.check_data_format,
        lambda b: edit_format(b, "inputs", "image", num_channels=9),
        "num_channels is 9",
    ),
    "unnamed channels": (
        verify.check_data_format,
        lambda b: edit_format(b, "outputs", "pred", channel_def={"0": "a", "1": "b"}),
        "names 2 channels",
    ),
    "no dataset_dir": (
        verify.check_properties,
        change(TRAIN, '"dataset_dir": null', '"data_dir": null'),
        "not in the config",
    ),
    "hidden handlers": (
        verify.check_properties,
        change(INFER, '"val_handlers": "@handlers"', '"val_handlers": "@saver"'),
        "handlers",
    ),
    "network narrows": (
        verify.check_network,
        lambda b: edit_format(b, "outputs", "pred", num_channels=7),
        "metadata.json says",
    ),
    "paper differs": (verify.check_paper, put("paper", num_res_blocks=3), "parameters, expected"),
    "paper unknown": (
        verify.check_paper,
        lambda b: shutil.copy(b / "configs/paper.json", b / "configs/paper_x.json"),
        "paper_x",
    ),
    "no such argument": (verify.check_export, put_in_network(norm_epsilon=1e-05), "norm_epsilon"),
    "no weights": (verify.check_weights, lambda b: (b / "models/model.pt").unlink(), "no weights"),
    "no card": (verify.check_weights, lambda b: (b / "models/model.json").unlink(), "no provenance card"),
    "other card": (verify.check_weights, lambda b: (b / "models/model.json").write_text("{}"), "is not that of"),
    "key lost": (verify.check_weights, spoil_weights(lambda s: s.popitem()), "Missing key"),
    "key more": (verify.check_weights, spoil_weights(lambda s: s.update(x=torch.ones(1))), "Unexpected key"),
    "NaN": (verify.check_weights, spoil_weights(lambda s: next(iter(s.values())).fill_(float("nan"))), "NaN"),
    "too big": (
        verify.check_weights,
        lambda b: (b / "models/x.bin").write_bytes(bytes(verify.MAX_MODELS)),
        "more than",
    ),
    "code inside": (verify.check_weights, lambda b: torch.save({"x": print}, b / "models/model.pt"), "weights_only"),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda name: name.replace(" ", "_"))
def test_mutant_is_caught(checkout: Path, tmp_path: Path, mutant: str) -> None:
    check, mutate, reason = MUTANTS[mutant]
    bundle = copy(checkout, tmp_path)
    mutate(bundle)
    problems = verify.attempt(check, bundle)
    assert problems, f"{check.__name__} overlooks it"
    assert reason in "; ".join(problems)


def test_name_with_version_is_caught(checkout: Path, tmp_path: Path) -> None:
    assert "contains _v" in "; ".join(verify.check_files(copy(checkout, tmp_path, f"{checkout.name}_vae")))


def test_every_check_has_a_mutant() -> None:
    assert {check for check, _, _ in MUTANTS.values()} == set(verify.CHECKS)
