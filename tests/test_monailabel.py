"""MONAI Label's real server with our app and all bundles from their zips: every command of its page, asked over HTTP.

Slow, and needs an environment of its own: ``make label-test`` makes it. Elsewhere skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import NAMES, REPO
from PIL import Image

from common.lesion_phantoms import lesion_cohort
from common.phantoms import thorax_cohort
from tools import package

BIN = Path(os.environ.get("MONAILABEL_BIN", REPO / ".venv-label" / "bin"))
APP = REPO / "tools" / "monailabel_app"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "monailabel").is_file(), reason=f"no MONAI Label in {BIN}: make label-test"),
]


@dataclass
class Server:
    """A running server: where it listens, and the folder that its page's commands are run in."""

    url: str
    folder: Path
    log: Path

    def ask(self, path: str, **params: Any) -> tuple[int, Any]:
        """Ask for JSON -> (status, content)."""
        fields = "&".join(f"{key}={value}" for key, value in {"output": "json", **params.pop("query", {})}.items())
        command = [
            "curl",
            "-s",
            "-w",
            "\n%{http_code}",
            f"{self.url}/{path}?{fields}",
            "-F",
            f"params={json.dumps(params)}",
        ]
        text, _, status = subprocess.run(command, capture_output=True, text=True).stdout.rpartition("\n")
        return int(status), json.loads(text or "null")

    def get(self, path: str) -> Any:
        """Read JSON."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """All bundles, unzipped into a copy of the app, with a few studies; nothing of the repository is in reach."""
    folder = tmp_path_factory.mktemp("label")
    assert package.main(["--output", str(folder / "dist")]) == 0
    app = folder / "app"
    zipfile.ZipFile(folder / "dist" / "monailabel_app.zip").extractall(folder)
    (folder / "monailabel_app").rename(app)
    for name in NAMES:
        zipfile.ZipFile(next((folder / "dist").glob(f"{name}_v*.zip"))).extractall(app / "model")
    studies = prepare(folder)
    port = free_port()
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    command = ["monailabel", "start_server", "--app", str(app), "--studies", str(studies), "--host", "127.0.0.1"]
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Server(f"http://127.0.0.1:{port}", folder, log)
    try:
        wait_for(running, process)
        yield running
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def prepare(folder: Path) -> Path:
    """Studies: a chest's layout, chests with layouts, bodies with a lesion, organs and reports."""
    studies = folder / "studies"
    chests, bodies = (
        Path(thorax_cohort(folder / "chests", 5, (32, 32, 32))),
        Path(lesion_cohort(folder / "bodies", 5, crop=48)),
    )
    for place in ("labels/final", "labels/organs", "REPORT"):
        (studies / place).mkdir(parents=True)
    for source, target in (
        (chests / "CT", "."),
        (chests / "SEG", "labels/final"),
        (bodies / "CT", "."),
        (bodies / "LABEL", "labels/final"),
        (bodies / "ORGANS", "labels/organs"),
        (bodies / "REPORT", "REPORT"),
    ):
        shutil.copytree(source, studies / target, dirs_exist_ok=True)
    shutil.copy(next((chests / "SEG").iterdir()), studies / "chest_layout.nii.gz")
    shutil.copy(next((bodies / "CT").iterdir()), studies / "body.nii.gz")
    shutil.copy(next((bodies / "ORGANS").iterdir()), folder / "body_organs.nii.gz")
    labels = np.zeros((24, 20, 12), np.uint8)
    labels[4:20, 4:16, :] = 13
    labels[6:12, 6:12, 2:9] = 4
    nib.save(nib.Nifti1Image(labels, np.diag([15, 13.5, 32, 1])), folder / "organs.nii.gz")
    return studies


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(server: Server, process: subprocess.Popen) -> None:
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            server.get("info/")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"the server did not come up:\n{server.log.read_text()[-3000:]}")


def commands(section: str) -> list[str]:
    """The commands of one section of the app's page."""
    text = (APP / "README.md").read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if not line.startswith("#")]


def follow(server: Server, line: str) -> subprocess.CompletedProcess:
    line = line.replace("http://127.0.0.1:8000", server.url)
    return subprocess.run(["bash", "-c", line], cwd=server.folder, capture_output=True, text=True)


def test_all_bundles_are_listed_with_their_options(server: Server) -> None:
    models = server.get("info/")["models"]
    assert sorted(models) == NAMES
    assert models["lung_ddpm"]["config"]["result"] == ["image", "layout"]
    assert models["lesion_diffusion"]["config"]["result"][0] == "label"
    assert models["siamese_diffusion"]["config"]["prompt"] == "A photo of a polyp."
    assert all(model["config"]["num_inference_steps"] > 1 for model in models.values())
    assert {"lung_ddpm", "lesion_diffusion"} <= set(server.get("info/")["trainers"])


@pytest.fixture(scope="session")
def answers(server: Server) -> Path:
    """The folder after all commands of the page's "Ask"."""
    for line in commands("Ask"):
        done = follow(server, line)
        assert done.returncode == 0, f"{line}\n{done.stderr[-500:]}\n{server.log.read_text()[-3000:]}"
    return server.folder


def test_every_bundle_answers_with_a_correct_file(answers: Path) -> None:
    studies = answers / "studies"
    for image, like in (
        ("chest_image", studies / "chest_layout.nii.gz"),
        ("organs_image", answers / "organs.nii.gz"),
        ("body_image", studies / "body.nii.gz"),
        ("body_label", studies / "body.nii.gz"),
    ):
        made, given = nib.load(answers / f"{image}.nii.gz"), nib.load(like)
        assert made.shape == given.shape
        np.testing.assert_allclose(made.affine, given.affine, atol=1e-4)
    chest, layout = (
        np.asarray(nib.load(f).dataobj) for f in (answers / "chest_image.nii.gz", studies / "chest_layout.nii.gz")
    )
    assert chest[layout == 1].mean() < -500, "lungs are air"
    abdomen = np.asarray(nib.load(answers / "abdomen_image.nii.gz").dataobj)
    assert abdomen.std() > 20
    mask = np.asarray(Image.open(answers / "mask.png"))
    assert set(np.unique(mask)) == {0, 255}
    assert (mask > 0).mean() == pytest.approx(0.04, rel=0.3)
    polyp = Image.open(answers / "polyp.png")
    assert (polyp.mode, polyp.size) == ("RGB", (64, 64))
    body, before = (np.asarray(nib.load(f).dataobj) for f in (answers / "body_image.nii.gz", studies / "body.nii.gz"))
    label = np.asarray(nib.load(answers / "body_label.nii.gz").dataobj)
    assert (label == 2).any(), "a lesion"
    changed = body != before
    assert changed[label == 2].mean() > 0.5
    assert changed.sum() < 5 * (label == 2).sum(), "the rest of the CT is left alone"


def test_the_same_request_gives_the_bytes_of_the_command_line(server: Server, answers: Path) -> None:
    case = {"name": "chest_layout", "layout": str(answers / "studies" / "chest_layout.nii.gz")}
    (answers / "cases.json").write_text(json.dumps([case]))
    config = answers / "app/model/lung_ddpm/configs/inference.json"
    command = [
        str(BIN / "python"),
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(config),
        "--dataset_dir",
        "cases.json",
    ]
    done = subprocess.run(
        [*command, "--num_inference_steps", "4", "--output_dir", "cli"], cwd=answers, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert digest(answers / "cli/chest_layout_image.nii.gz") == digest(answers / "chest_image.nii.gz")


def digest(path: Path) -> str:
    return hashlib.sha256(np.asarray(nib.load(path).dataobj).tobytes()).hexdigest()


def test_a_given_lesion_is_painted_and_stored_among_the_studies(server: Server) -> None:
    given = {"given": "a CT and the lesion's mask", "store": "final", "preset": "smoke"}
    refused, reason = server.ask(
        "infer/lesion_diffusion", query={"image": "lesion_0001"}, **given, seed="$__import__('os')"
    )
    assert refused == 422
    assert "would evaluate" in reason["detail"]
    status, told = server.ask(
        "infer/lesion_diffusion", query={"image": "lesion_0001"}, given=given["given"], store="final"
    )
    assert status == 200, told
    assert told["record"]["reports"], "what was drawn"
    stored = server.folder / "studies" / f"{told['stored']}.nii.gz"
    assert stored.is_file()
    label = nib.load(server.folder / "studies/labels/final" / stored.name)
    assert 2 in np.unique(np.asarray(label.dataobj))
    assert told["stored"] in server.get("datastore/?output=all")["objects"]


@pytest.mark.parametrize(
    ("bundle", "study", "params", "reason"),
    [
        ("lung_ddpm", "nobody", {}, "lacks a part of"),
        ("guidegen", "nobody", {}, "a report: report"),
        ("lesion_diffusion", "lesion_0000", {"given": "words"}, "choose one of"),
        ("cmdm", "any", {"result": "image"}, "choose one of 'mask'"),
        ("cmdm", "any", {"lesions": "[{"}, "not valid JSON"),
        ("cmdm", "any", {"lesions": [{"size": 2, "x": 0.5, "y": 0.5}]}, "row"),
        ("siamese_diffusion", "chest_layout", {}, "one 2-D mask"),
        ("lung_ddpm", "chest_layout", {"weights": "/etc/passwd"}, "choose one of"),
        ("lung_ddpm", "chest_layout", {"num_inference_steps": "@seed"}, "would evaluate"),
    ],
)
def test_what_cannot_be_done_is_answered_with_the_reason(
    server: Server, bundle: str, study: str, params: dict, reason: str
) -> None:
    status, answer = server.ask(f"infer/{bundle}", query={"image": study}, **params)
    assert (status, reason in answer["detail"]) == (422, True), answer
    assert len(answer["detail"].splitlines()) == 1


def test_bundles_take_turns_and_repeat_themselves(server: Server) -> None:
    asked = [("cmdm", "any"), ("lung_ddpm", "chest_layout"), ("cmdm", "any"), ("lung_ddpm", "chest_layout")]
    told = [server.ask(f"infer/{bundle}", query={"image": study}, num_inference_steps=2) for bundle, study in asked]
    assert [status for status, _ in told] == [200] * 4
    for first, second in (told[0::2], told[1::2]):
        assert first[1]["seed"] == second[1]["seed"]
        assert first[1]["recipe_sha256"] == second[1]["recipe_sha256"]


def test_training_on_studies_gives_weights_that_serve(server: Server) -> None:
    start, status, use = commands("Train")
    assert json.loads(follow(server, start).stdout)["status"] in ("SUBMITTED", "RUNNING")
    task = finished(server, status)
    assert task["status"] == "DONE", task["details"]
    cases = json.loads((server.folder / "app/trained/lung_ddpm/cases.json").read_text())
    assert {"thorax_0000", "thorax_0004"} <= {case["name"] for case in cases}
    assert follow(server, use).returncode == 0
    assert nib.load(server.folder / "trained_image.nii.gz").shape == (32, 32, 32)


def test_lesions_are_trained_with_organs_and_reports(server: Server) -> None:
    start, status, _ = commands("Train")
    assert follow(server, start.replace("lung_ddpm", "lesion_diffusion")).returncode == 0
    task = finished(server, status)
    assert task["status"] == "DONE", task["details"]
    cases = json.loads((server.folder / "app/trained/lesion_diffusion/cases.json").read_text())
    assert [case["name"] for case in cases] == [f"lesion_{i:04d}" for i in range(5)]
    assert all({"organs", "label", "report"} <= case.keys() for case in cases)
    assert (server.folder / "app/trained/lesion_diffusion/model.pt").is_file()


def finished(server: Server, status: str) -> dict:
    """The training's last word."""
    for _ in range(180):
        task = json.loads(follow(server, status).stdout)
        if task["status"] not in ("SUBMITTED", "RUNNING"):
            return task
        time.sleep(1)
    pytest.fail("the training did not end")


def test_the_page_sets_up_what_the_makefile_does() -> None:
    page, makefile = " ".join(commands("Set up")), (REPO / "Makefile").read_text()
    pins = re.search(r"pip install --no-deps (\S+ \S+)", page)
    assert pins is not None
    assert pins[1] in makefile
    assert all(pin in (APP / "requirements.txt").read_text() for pin in ("pydicom==2.4.5", pins[1]))
    assert shlex.split(page)
