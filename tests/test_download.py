"""Downloads for real, from 127.0.0.1: every source that MONAI knows, our own fetch, and the hub we publish to.

MONAI's code and addresses are left alone. Its ``https`` hosts are found behind a proxy that has a certificate for them
(``HTTPS_PROXY``, ``SSL_CERT_FILE``), the Hugging Face hub by ``HF_ENDPOINT``: see `loopback`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from conftest import REPO, names, run_command
from loopback import TOKEN, Page, Repository, Web

from tools import fetch, package, publish

VERSION = "0.1.0"
PAIR = ("cmdm", "lung_ddpm")  # small ones; the first has scripts of its own
ZIP = f"{PAIR[0]}_v{VERSION}.zip"
GITHUB = "github.com/owner/bundles/releases/download/v1"
ZOO = "raw.githubusercontent.com/Project-MONAI/model-zoo/dev/models/model_info.json"
NGC = "api.ngc.nvidia.com/v2/models/nvidia"


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of two bundles, and what fetches them."""
    folder = tmp_path_factory.mktemp("dist")
    for name in PAIR:
        package.package(REPO / "bundles" / name, folder)
    package.package_fetch(folder)
    package.write_index(folder, f"https://{GITHUB}")
    return folder


@pytest.fixture(scope="session")
def members(dist: Path) -> dict[str, bytes]:
    """What the first bundle's zip holds, by path inside the bundle."""
    with zipfile.ZipFile(dist / ZIP) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="session")
def web(dist: Path, members: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """The release on a plain server, on GitHub, and in the places of MONAI's own zoo."""
    server = Web(tmp_path_factory.mktemp("web"))
    for path in dist.iterdir():
        server.pages[f"/{path.name}"] = server.pages[f"{GITHUB}/{path.name}"] = Page(path.read_bytes())
    index = server.pages["/model_info.json"]
    server.pages["raw.githubusercontent.com/owner/bundles/v1/models/model_info.json"] = server.pages[ZOO] = index
    server.pages[f"{NGC}/monaihosting/{PAIR[1]}/versions/{VERSION}/files/{PAIR[1]}_v{VERSION}.zip"] = Page(
        (dist / f"{PAIR[1]}_v{VERSION}.zip").read_bytes()
    )
    toolkit = f"{NGC}/monaitoolkit/monai_{PAIR[0]}/versions"
    versions = [{"createdDate": "2030-01-01", "versionId": VERSION}]
    server.pages[f"{toolkit}/"] = Page(json.dumps({"modelVersions": versions}).encode())
    files = [{"path": name} for name in members]
    server.pages[f"{toolkit}/{VERSION}/files"] = Page(json.dumps({"modelFiles": files}).encode())
    server.pages |= {f"{toolkit}/{VERSION}/files/{name}": Page(content) for name, content in members.items()}
    server.pages["authn.nvidia.com/token"] = Page(b'{"token": "any"}')
    private = f"api.ngc.nvidia.com/v2/org/owner/team/ours/models/monai_{PAIR[0]}/versions/{VERSION}/zip"
    server.pages[private] = Page(craft(dist.parent / "private.zip", *members.items()))  # has no folder of its own
    server.hub[f"MONAI/{PAIR[0]}"] = Repository(members, [VERSION])
    yield server
    server.shutdown()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the hub client's notes."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if not name.startswith(".cache/")}


def said(done: subprocess.CompletedProcess) -> str:
    """The one line in which a tool refuses."""
    assert done.returncode == 1, done.stdout
    (line,) = done.stdout.splitlines()
    return line


# ---------------------------------------------------------------------------------------------------------------------
# MONAI's own commands


@pytest.mark.bundle
def test_a_bundle_downloaded_by_address_runs(web: Web, members: dict[str, bytes], tmp_path: Path, run_bundle) -> None:
    command = ["download", "--name", PAIR[0], "--url", f"{web.address}/{ZIP}", "--bundle_dir", "zoo"]
    done = run_command(sys.executable, "-m", "monai.bundle", *command, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stdout
    root = tmp_path / "zoo" / PAIR[0]
    assert tree(root) == members
    knobs = {"num_inference_steps": 2, "num_samples": 2, "max_tries": 1, "output_dir": tmp_path / "out"}
    done = run_bundle(PAIR[0], "inference", cwd=tmp_path, root=root, **knobs)
    assert done.returncode == 0, done.stdout
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 2


# The calls, the bundle each brings, and what the hub's page adds to it.
SOURCES: dict[str, dict[str, Any]] = {
    "github": {"source": "github", "repo": "owner/bundles/v1"},
    "github, a version": {"source": "github", "repo": "owner/bundles/v1", "version": VERSION},
    "hub": {"source": "huggingface_hub", "repo": "owner/published"},
    "hub, a version": {"source": "huggingface_hub", "repo": "owner/published", "version": VERSION},
    "zoo, on the hub": {"source": "monaihosting"},
    "zoo, on NGC": {"source": "monaihosting", "name": PAIR[1]},
    "NGC": {"source": "ngc"},
    "NGC, private": {"source": "ngc_private", "repo": "org/owner/team/ours", "version": VERSION},
}
CALLS = """
import json, sys, monai.bundle
for folder, options in json.loads(sys.argv[1]).items():
    monai.bundle.download(bundle_dir=folder, progress=False, **options)
print(monai.bundle.get_all_bundles_list("owner/bundles", "v1"))
print(monai.bundle.get_bundle_info("cmdm", repo="owner/bundles", tag="v1")["browser_download_url"])
network = monai.bundle.load("cmdm", bundle_dir="loaded", source="github", repo="owner/bundles/v1", progress=False)
print(type(network).__module__, sum(p.numel() for p in network.parameters()))
"""


@pytest.fixture(scope="session")
def sources(web: Web, published: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder for every source, and what a process that asked them all printed."""
    folder = tmp_path_factory.mktemp("sources")
    calls = {source: {"name": PAIR[0], **options} for source, options in SOURCES.items()}
    environment = web.environment(folder / "hub") | {"NGC_API_KEY": "any"}
    done = run_command(sys.executable, "-c", CALLS, json.dumps(calls), cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


@pytest.mark.bundle
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.replace(" ", "_"))
def test_every_source_brings_the_same_bundle(
    sources: tuple[Path, str], members: dict[str, bytes], dist: Path, source: str
) -> None:
    name = SOURCES[source].get("name", PAIR[0])
    found = tree(sources[0] / source / name)
    if name != PAIR[0]:
        with zipfile.ZipFile(dist / f"{name}_v{VERSION}.zip") as archive:
            members = {member.partition("/")[2]: archive.read(member) for member in archive.namelist()}
    if "published" in SOURCES[source].get("repo", ""):
        assert {*found} - {*members} == {"README.md", "montage.png"}, "the hub's page"
    assert {key: value for key, value in found.items() if key in members} == members


@pytest.mark.bundle
def test_the_index_of_a_release_lists_versions_and_addresses(sources: tuple[Path, str], members: dict) -> None:
    printed = sources[1].splitlines()
    assert str([(name, VERSION) for name in PAIR]) in printed
    assert f"https://{GITHUB}/{ZIP}" in printed
    state = torch.load(sources[0] / "loaded" / PAIR[0] / "models/model.pt", weights_only=True)
    assert f"scripts.network {sum(value.numel() for value in state.values())}" in printed, "load() downloads by itself"


TWO_BUNDLES = """
import json, sys, torch
from monai.bundle import create_workflow, load
root, *names = sys.argv[1:]
found = []
for name in names:
    for kind in ("train", "inference"):
        network = load(name, bundle_dir=root, workflow_type=kind)
        files = [f"{root}/{name}/configs/{file}.json" for file in (kind, "smoke")]
        place = {} if kind == "train" else {"weights": f"{root}/{name}/models/model.pt"}  # statistics lie beside it
        workflow = create_workflow(config_file=files, workflow_type=kind, **place)
        assert workflow.check_properties() == [], workflow.check_properties()
        found.append((name, network, workflow))
    files = {key: m.__file__ for key, m in sys.modules.items() if key.split(".")[0] == "scripts" and m.__file__}
    print("FILES", json.dumps([name, files]))
for name, network, workflow in found:  # those of the first bundle still are its own
    expected, state = torch.load(f"{root}/{name}/models/model.pt", weights_only=True), network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value.to(state[key].dtype)) for key, value in expected.items())
    assert type(network).__qualname__ == type(workflow.network_def).__qualname__
"""


@pytest.mark.bundle
@pytest.mark.parametrize("order", [1, -1], ids=["there", "back"])
def test_two_bundles_load_in_one_process_each_with_its_own_code(dist: Path, tmp_path: Path, order: int) -> None:
    for name in PAIR:
        zipfile.ZipFile(dist / f"{name}_v{VERSION}.zip").extractall(tmp_path / "zoo")
    (tmp_path / "two_bundles.py").write_text(TWO_BUNDLES)
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, str(tmp_path / "two_bundles.py"), str(tmp_path / "zoo"), *PAIR[::order]]
    done = run_command(*command, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stdout
    seen = dict(
        json.loads(line.removeprefix("FILES ")) for line in done.stdout.splitlines() if line.startswith("FILES")
    )
    assert [*seen] == [*PAIR[::order]]
    for name, files in seen.items():
        assert {"scripts", "scripts.common", "scripts.common.io"} <= {*files}
        assert ("scripts.network" in files) == (name == PAIR[0])
        assert [file for file in files.values() if not file.startswith(f"{tmp_path}/zoo/{name}/scripts/")] == []
    assert names(tmp_path / "elsewhere") == []


# ---------------------------------------------------------------------------------------------------------------------
# Zips that are not what they should be


def craft(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    """Write a zip -> its bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path.read_bytes()


def link(name: str) -> zipfile.ZipInfo:
    """Make the entry of a symbolic link."""
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


META = ("x/configs/metadata.json", b"{}")
WHOLE = [("x/LICENSE", b"Apache License"), META, ("x/docs/large.txt", bytes(2**16)), ("x/scripts/__init__.py", b"")]
FILES = {name.removeprefix("x/"): content for name, content in WHOLE}


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of a bundle that is only files: a zip and its checksums."""
    folder = tmp_path_factory.mktemp("small")
    craft(folder / "x_v1.zip", *WHOLE)
    package.write_index(folder)
    return folder / "x_v1.zip"


@pytest.fixture
def bad(tmp_path_factory: pytest.TempPathFactory, small: Path, tmp_path: Path, web: Web) -> Iterator[dict[str, str]]:
    """Addresses of zips that are not what they should be."""
    good, scratch = small.read_bytes(), tmp_path_factory.mktemp("scratch") / "any.zip"
    middle = len(good) // 2  # a byte of the large file
    zips = {
        "traversal": craft(scratch, META, ("x/../../outside", b"")),
        "absolute": craft(scratch, META, (f"{tmp_path}/outside", b"")),
        "link": craft(scratch, META, (link("x/configs/train.json"), b"/etc/passwd")),
        "damaged": good[:middle] + b"?" + good[middle + 1 :],
        "no_zip": b"<html>not found</html>",
        "no_bundle": craft(scratch, ("x/readme.txt", b"")),
        "two_bundles": craft(scratch, META, ("y/configs/metadata.json", b"{}")),
    }
    pages = {f"/bad/{name}.zip": Page(content) for name, content in zips.items()}
    pages["/bad/broken.zip"] = Page(good, sent=middle)
    web.pages |= pages
    yield {name: f"{web.address}/bad/{name}.zip" for name in [*zips, "broken", "missing"]}
    for page in pages:
        del web.pages[page]


# What MONAI 1.6.1 does with them, in place, which is why there is tools/fetch.py: error, files left.
LEFT: dict[str, tuple[str, list[str]]] = {
    "traversal": ("ValueError", ["x/configs/metadata.json"]),
    "absolute": ("ValueError", ["x/configs/metadata.json"]),
    "link": ("", ["x/configs/metadata.json", "x/configs/train.json"]),  # a file that holds the path it links to
    "damaged": ("BadZipFile", ["x/LICENSE", "x/configs/metadata.json", "x/docs/large.txt"]),
    "broken": ("ContentTooShortError", []),
    "no_zip": ("BadZipFile", []),
}


@pytest.mark.parametrize("case", LEFT)
def test_monai_refuses_late_if_at_all(bad: dict[str, str], tmp_path: Path, case: str) -> None:
    error, left = LEFT[case]
    raised = ""
    try:
        monai.bundle.download("x", bundle_dir=tmp_path / "zoo", url=bad[case], progress=False)
    except Exception as caught:
        raised = type(caught).__name__
    assert raised == error
    assert [name for name in tree(tmp_path / "zoo") if name != "x.zip"] == left
    assert not [path for path in (tmp_path / "zoo").rglob("*") if path.is_symlink()]
    if case == "damaged":  # and the next time takes it for whole
        monai.bundle.download("x", bundle_dir=tmp_path / "zoo", url=bad[case], progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Our own fetch


def run_fetch(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return run_command(sys.executable, str(REPO / "tools/fetch.py"), *map(str, arguments), cwd=cwd)


def digest(path: Path, algorithm: str = "sha256") -> str:
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


@pytest.mark.parametrize("given", ["SHA256SUMS", "model_info.json", "sums", "digest", "nothing", "file"])
def test_fetch_puts_a_whole_bundle_in_place(web: Web, small: Path, tmp_path: Path, given: str) -> None:
    place = f"/{given}"
    web.pages[f"{place}/x_v1.zip"] = Page(small.read_bytes())
    arguments: list[object] = [f"{web.address}{place}/x_v1.zip", "--bundle_dir", "zoo"]
    told = f"sha256 {digest(small)}"
    if given in fetch.LISTS:
        web.pages[f"{place}/{given}"] = Page(small.with_name(given).read_bytes())
        told = told if given == "SHA256SUMS" else f"sha1 {digest(small, 'sha1')}"
    elif given == "sums":
        arguments += ["--sums", small.with_name("SHA256SUMS")]
    elif given == "digest":
        arguments += ["--sha256", digest(small).upper()]
    elif given == "nothing":
        arguments, told = [*arguments, "--no-checksum"], "checksum not compared"
    else:
        arguments[0] = small
    done = run_fetch(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.strip().lower() == f"zoo/x: {told}"
    assert names(tmp_path / "zoo") == ["x"]
    assert tree(tmp_path / "zoo" / "x") == dict(sorted(FILES.items()))


REFUSED = {
    "traversal": "outside",
    "absolute": "outside",
    "link": "train.json",
    "damaged": "expected",
    "broken": "broke off",
    "missing": "404",
    "no_zip": "zip",
    "no_bundle": "no bundle",
    "two_bundles": "",
}


@pytest.mark.parametrize("case", REFUSED)
def test_fetch_refuses_before_anything_is_written(bad: dict[str, str], small: Path, tmp_path: Path, case: str) -> None:
    known = ["--sha256", digest(small)] if case == "damaged" else ["--no-checksum"]
    (tmp_path / "zoo").mkdir()
    line = said(run_fetch(bad[case], *known, "--bundle_dir", "zoo", "--allow", "network,", cwd=tmp_path))
    assert line.startswith(f"fetch: {bad[case]}: ")
    assert REFUSED[case] in line.removeprefix(f"fetch: {bad[case]}: ")
    assert names(tmp_path) == ["zoo"]
    assert names(tmp_path / "zoo") == []


def test_fetch_wants_a_checksum(web: Web, small: Path, bad: dict[str, str], tmp_path: Path) -> None:
    line = said(run_fetch(bad["link"], cwd=tmp_path))
    assert "no checksum of link.zip" in line
    assert "--no-checksum" in line
    shutil.copy(small, tmp_path / "other.zip")
    sums = small.with_name("SHA256SUMS")
    assert "no checksum of other.zip" in said(run_fetch("other.zip", "--sums", sums, cwd=tmp_path))
    assert "cannot read" in said(run_fetch("other.zip", "--sums", f"{web.address}/none", cwd=tmp_path))
    assert names(tmp_path) == ["other.zip"]
    for wrong in (["nothing.zip"], ["other.zip", "--sha256", "12"], ["other.zip", "--sums", sums, "--no-checksum"]):
        assert run_fetch(*wrong, cwd=tmp_path).returncode == 2


def test_fetch_replaces_a_bundle_only_if_told_and_only_by_a_whole_one(
    small: Path, bad: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/mine.txt").write_text("mine")
    assert "already there" in said(run_fetch(small, cwd=tmp_path))
    said(run_fetch(bad["damaged"], "--no-checksum", "--force", cwd=tmp_path))
    assert tree(tmp_path) == {"x/mine.txt": b"mine"}
    assert run_fetch(small, "--force", cwd=tmp_path).returncode == 0
    assert names(tmp_path) == ["x"]
    assert tree(tmp_path / "x") == dict(sorted(FILES.items()))


def test_the_old_bundle_comes_back_if_the_new_one_cannot_take_its_place(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename = tmp_path / "x", os.rename
    place.mkdir()
    (place / "mine.txt").write_text("mine")

    def fail(source: Path, target: Path) -> None:
        if target == place and source.parent.name == "unpacked":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    assert fetch.main([str(small), "--force", "--bundle_dir", str(tmp_path)]) == 1
    assert tree(tmp_path) == {"x/mine.txt": b"mine"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fetch_leaves_nothing(web: Web, tmp_path: Path, number: signal.Signals) -> None:
    hold = threading.Event()
    web.pages["/held.zip"] = Page(bytes(2**22), sent=2**21, hold=hold)
    command = [sys.executable, str(REPO / "tools/fetch.py"), f"{web.address}/held.zip", "--no-checksum"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not [path for path in tmp_path.glob(".tmp-fetch-*/*") if path.stat().st_size >= 2**20]:
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    hold.set()
    assert process.returncode == 1
    assert re.fullmatch(r"fetch: .*: interrupted; nothing is left of it\n", error)
    assert names(tmp_path) == []


def test_a_release_is_fetched_with_one_file_and_python_alone(
    dist: Path, web: Web, members: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copy(dist / "fetch.pyz", tmp_path)
    command = [sys.executable, "-I", "-S", "fetch.pyz"]  # without installed packages and environment
    line = said(run_command(*command, str(dist / ZIP), cwd=tmp_path, fresh=True))
    assert "--allow" in line, "its code is the user's to judge"
    assert "--look" in line, "in full"
    done = run_command(*command, f"{web.address}/{ZIP}", "--allow", "network,dynamic", cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stdout
    assert tree(tmp_path / PAIR[0]) == dict(sorted(members.items()))


# ---------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture(scope="session")
def published(web: Web, dist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What publishing printed: rehearsed, refused for a wrong token, and done."""
    arguments, printed = [str(dist / ZIP), "--repo", "owner/published"], {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert publish.main([*arguments, "--dry-run"]) == 0
    printed["rehearsed"] = output.getvalue()
    assert web.posts == []
    for what, token in (("refused", "hf_wrong"), ("done", TOKEN)):
        environment = web.environment(tmp_path_factory.mktemp("hub")) | {"HF_TOKEN": token}
        done = run_command(sys.executable, "tools/publish.py", *arguments, env=environment)
        assert done.returncode == (what == "refused"), done.stdout
        printed[what] = done.stdout
    return printed


@pytest.mark.bundle
def test_a_rehearsal_of_publishing_lists_what_the_hub_then_holds(web: Web, published: dict[str, str]) -> None:
    repository = web.hub["owner/published"]
    listed = dict(re.findall(r"^([0-9a-f]{64}) +\d+ (.*)$", published["rehearsed"], re.MULTILINE))
    assert listed == {hashlib.sha256(content).hexdigest(): name for name, content in repository.files.items()}
    assert (
        repository.tags == [VERSION, "latest_version"] == re.findall("^tag (.*)$", published["rehearsed"], re.MULTILINE)
    )
    page = repository.files["README.md"].decode()
    head, _, rest = page.removeprefix("---\n").partition("---\n")
    assert head == "tags:\n- monai\n- medical\nlibrary_name: monai\nlicense: apache-2.0\n"
    assert rest.encode() == repository.files["docs/README.md"]
    assert {*re.findall(r"\]\((\w+\.png)\)", rest)} <= {*repository.files}, "pictures show"
    assert published["done"].splitlines()[-1].startswith(f"{web.address}/owner/published")
    assert [line for line in published["refused"].splitlines() if line.startswith("publish: ")]


def test_publish_wants_a_zip_and_a_repository(dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for wrong in (["none.zip", "--repo", "a/b"], [str(dist / ZIP), "--repo", "a"], [str(dist / ZIP)]):
        with pytest.raises(SystemExit) as caught:
            publish.main(wrong)
        assert caught.value.code == 2
    (tmp_path / "no.zip").write_text("no zip")
    assert publish.main([str(tmp_path / "no.zip"), "--repo", "a/b", "--dry-run"]) == 1
    assert "publish: " in capsys.readouterr().err
