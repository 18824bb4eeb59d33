"""Release zips: complete, the same bytes twice, with a preset or other weights if asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import NAMES, REPO, copy_checkout, run_command

from common import io
from tools import package, reading
from tools.contents import FILES, check_files
from tools.laws import check_json, check_shared_ids
from tools.networks import check_data_format


def hollow(bundle: Path, folder: Path, *names: str) -> dict[str, Path]:
    """Write weights of every network that a recipe fills from a file, however large: zeros that share their memory."""
    parsed, weights = reading.parser(bundle, *names), {}
    for knob in [knob for knob in reading.read(bundle / "configs/inference.json") if knob.endswith("weights")]:
        if isinstance(parsed.get_parsed_content(knob), str):
            network = reading.build(parsed, network=reading.FILLS.get(knob, knob.replace("weights", "def")))
            state = {key: torch.zeros((), dtype=v.dtype).expand(v.shape) for key, v in network.state_dict().items()}
            weights[knob] = folder / f"{knob}.pt"
            torch.save(state, weights[knob])
    return weights


def held(path: Path) -> dict[str, bytes]:
    """What a zip holds, by path inside the bundle."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_zip_is_complete(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(package.package(checkout, tmp_path)) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert {name.split("/")[0] for name in names} == {checkout.name}
        assert not [n for n in names if "__pycache__" in n or "/output/" in n or "/." in n or ".." in n]
        assert {(e.date_time, e.external_attr >> 16, e.compress_type) for e in archive.infolist()} == {
            ((2020, 1, 1, 0, 0, 0), 0o100644, zipfile.ZIP_STORED)
        }
        requirements = archive.read(f"{checkout.name}/docs/requirements.txt")
    assert requirements == (checkout.parents[1] / "requirements.txt").read_bytes()
    expected = [
        *FILES,
        "models/model.json",
        "scripts/__init__.py",
        "scripts/common/__init__.py",
        "scripts/common/io.py",
    ]
    assert {f"{checkout.name}/{name}" for name in expected} <= set(names)


def test_place_time_and_leftovers_leave_no_trace_in_the_zip(checkout: Path, tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        other = tmp_path / "another place"
        shutil.copytree(checkout.parents[1], other, copy_function=shutil.copyfile)
    finally:
        os.umask(mask)
    bundle = other / "bundles" / checkout.name
    for left in ("scripts/__pycache__/stale.pyc", "output/left.txt", ".tmp-1", "models/model.previous.pt"):
        (bundle / left).parent.mkdir(exist_ok=True)
        (bundle / left).write_text("x")
    first, second = (package.package(b, tmp_path / str(i)) for i, b in enumerate((checkout, bundle)))
    assert first.read_bytes() == second.read_bytes()


def test_environment_leaves_no_trace_in_the_zips(tmp_path: Path) -> None:
    """By the command line; only the addresses in the index are the user's."""
    base = "https://example.org/v1"
    command = [sys.executable, "tools/package.py", NAMES[0], "--output", str(tmp_path / "a"), "--source", f"{base}/"]
    environment = {"LC_ALL": "C", "LANG": "C", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "1", "PYTHONUTF8": "0"}
    environment["PYTHONCOERCECLOCALE"] = "0"
    done = run_command(*command, env=environment)
    assert done.returncode == 0, done.stdout
    path = package.package(REPO / "bundles" / NAMES[0], tmp_path / "b")
    package.write_index(tmp_path / "b", base)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    assert json.loads((tmp_path / "b/model_info.json").read_text())[path.stem]["source"] == f"{base}/{path.name}"


def test_index_gives_checksums_and_keeps_earlier_releases(checkout: Path, tmp_path: Path) -> None:
    earlier = {"any_v0.0.9": {"checksum": "1", "source": "https://example.org/any_v0.0.9.zip"}}
    gone = {"gone_v0.0.9": {"checksum": "1", "source": ""}}
    path = package.package(checkout, tmp_path)
    (tmp_path / "model_info.json").write_text(json.dumps(earlier | gone))
    package.write_index(tmp_path)
    info = json.loads((tmp_path / "model_info.json").read_text())
    assert info == earlier | {path.stem: {"checksum": hashlib.sha1(path.read_bytes()).hexdigest(), "source": ""}}
    assert (tmp_path / "SHA256SUMS").read_text() == f"{io.sha256(path)}  {path.name}\n"


def test_what_fetches_is_one_file_the_same_anywhere_and_listed(tmp_path: Path) -> None:
    first, second = (package.package_fetch(tmp_path / folder) for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    sources = {name: content for name, content in files.items() if name != "__main__.py"}
    assert sources == {name: (REPO / name).read_bytes() for name in sources}
    assert {"LICENSE", "tools/fetch.py", "tools/untrusted/__init__.py"} <= {*sources}
    package.write_index(tmp_path / "a")
    assert (tmp_path / "a/SHA256SUMS").read_text() == f"{io.sha256(first)}  fetch.pyz\n"
    assert json.loads((tmp_path / "a/model_info.json").read_text()) == {}


def test_incomplete_bundle_is_refused(checkout: Path, tmp_path: Path) -> None:
    bundle = copy_checkout(checkout, tmp_path)
    for name in ("models/model.json", "LICENSE"):
        (bundle / name).unlink()
        with pytest.raises(package.PackageError, match=f"lacks .*{name}"):
            package.package(bundle, tmp_path / "dist")
    (bundle / "LICENSE").symlink_to(checkout / "LICENSE")
    with pytest.raises(package.PackageError, match="symbolic link"):
        package.package(bundle, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_no_place_of_this_machine_gets_into_the_zip(checkout: Path, tmp_path: Path) -> None:
    bundle = copy_checkout(checkout, tmp_path)
    card = json.loads((bundle / "models/model.json").read_text())
    places = {"training_data": "/data/mine", "knobs": {"a": [r"C:\data\mine", "a/b", 1]}}
    (bundle / "models/model.json").write_text(json.dumps(card | places))
    files = held(package.package(bundle, tmp_path / "dist"))
    found = json.loads(files["models/model.json"])
    assert found == card | {"training_data": "mine", "knobs": {"a": ["mine", "a/b", 1]}}
    for place in (tmp_path, Path.home()):
        (bundle / "docs/notes.md").write_text(f"see {place}/x")
        with pytest.raises(package.PackageError, match=f"docs/notes.md holds {place}"):
            package.package(bundle, tmp_path / "dist")


def test_preset_becomes_the_default_at_the_publications_size(checkout: Path, tmp_path: Path) -> None:
    weights = hollow(checkout, tmp_path, "inference", "paper")
    path = package.package(checkout, tmp_path / "dist", weights=weights, preset="paper")
    zipfile.ZipFile(path).extractall(tmp_path / "unzipped")
    bundle = tmp_path / "unzipped" / checkout.name
    for base in ("train", "inference"):
        baked, paper = (reading.read(bundle / "configs" / f"{name}.json") for name in (base, "paper"))
        assert {k: baked[k] for k in paper if k in baked and k != "_desc_"} == {
            k: paper[k] for k in paper if k in baked and k != "_desc_"
        }
    parsed = reading.parser(bundle, "inference")
    for knob, file in weights.items():
        place = Path(parsed.get_parsed_content(knob))
        assert place.read_bytes() == file.read_bytes()
        card = reading.read(place.with_suffix(".json"))
        assert (card["weights"], card["weights_sha256"]) == (place.name, io.sha256(file))
    checks = [check_files, check_json, check_shared_ids, check_data_format]
    assert [problem for check in checks for problem in check(bundle)] == []
    configs = "".join(file.read_text(encoding="utf-8") for file in (bundle / "configs").glob("*.json"))
    shipped = [file.relative_to(bundle).as_posix() for file in bundle.rglob("*.pt")]
    assert [name for name in shipped if f"/{name}'" not in configs] == [], "weights of the starter's size"


def test_a_preset_wants_the_weights_of_all_its_stages(checkout: Path, tmp_path: Path) -> None:
    """Or those that are shipped, where the preset leaves a stage as it is."""
    weights = hollow(checkout, tmp_path, "inference", "paper")
    for knob in weights:
        others = {key: file for key, file in weights.items() if key != knob}
        with pytest.raises(package.PackageError, match=f"--weights {knob}=FILE"):
            package.package(checkout, tmp_path / "dist", weights=others, preset="paper")
    with pytest.raises(package.PackageError, match="does not fit network_def"):
        package.package(checkout, tmp_path / "dist", weights={"weights": weights["weights"]})
    with pytest.raises(package.PackageError, match="no knob 'mask'"):
        package.package(checkout, tmp_path / "dist", weights={"mask": weights["weights"]})
    assert not (tmp_path / "dist").exists()


def test_other_weights_bring_what_lies_beside_them(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Statistics, say: they describe the data that the weights were trained on."""
    bundle = copy_checkout(checkout, tmp_path)
    (bundle / "models/table.json").write_text('"ours"')
    (bundle / "models/second.pt").write_bytes(b"ours")
    (bundle / "models/second.json").write_text('"ours"')
    shutil.copy(bundle / "models/model.pt", tmp_path / "mine.pt")
    (tmp_path / "second.json").write_text('"theirs"')
    for number, there in enumerate((False, True)):
        if there:
            (tmp_path / "table.json").write_text('"theirs"')
        path = package.package(bundle, tmp_path / str(number), weights={"weights": tmp_path / "mine.pt"})
        files = held(path)
        assert files["models/table.json"] == (b'"theirs"' if there else b'"ours"')
        assert files["models/second.json"] == b'"ours"'
        assert ("table.json stays as it is" in capsys.readouterr().err) is not there


def test_command_line(tmp_path: Path) -> None:
    for wrong in (
        ["nothing"],
        [NAMES[0], "--preset", "paper"],
        [NAMES[0], "--preset", "paper", "--weights", f"mask_weights={__file__}"],
        ["--weights", __file__],
        [NAMES[0], "--weights", "x.pt"],
        ["--source", "dist"],
    ):
        with pytest.raises(SystemExit) as caught:
            package.main([*wrong, "--output", str(tmp_path)])
        assert caught.value.code == 2
    assert package.main([NAMES[0], "--weights", __file__, "--output", str(tmp_path / "dist")]) == 1
    assert list(tmp_path.iterdir()) == []
