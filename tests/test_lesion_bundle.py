"""LesionDiffusion as a user runs it: CTs in, with as much beside them as there is, CTs with lesions and labels out.

A process takes some seconds to start, so one run takes many cases.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from common.io import sha256
from common.lesion_phantoms import lesion_cohort
from tools import reading
from tools.benchmark_lesions import LesionBench, contrast, mean
from tools.smoke import check_synthesis

pytestmark = pytest.mark.bundle

Run = Callable[..., subprocess.CompletedProcess]
NAME = "lesion_diffusion"
BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / NAME
SHAPE = (40, 32, 42)


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())["made_by"]["record"]["reports"][0]


def succeeded(run: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert run.returncode == 0, run.stdout
    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of the smoke size."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.manual_seed(0)
    torch.save(reading.build(reading.parser(BUNDLE, "inference", "smoke"), "cpu").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lesion phantoms: everything a data set may hold. Read only."""
    return Path(lesion_cohort(tmp_path_factory.mktemp("studies"), 4, shape=SHAPE, seed=5))


@pytest.fixture
def infer(run_bundle: Run, weights: Path) -> Run:
    return lambda *overlays, **knobs: run_bundle(
        NAME, "inference", "smoke", *overlays, **{"weights": weights, "num_inference_steps": 1, **knobs}
    )


def test_what_is_there_is_used_and_what_is_bad_is_told(studies: Path, infer: Run, tmp_path: Path) -> None:
    """Four cases: with everything, with a report, with organs alone, and one that nobody can do; inputs stay."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(studies, data)
    names = [f"lesion_{i:04d}" for i in range(4)]
    for name in names[1:]:
        (data / "LABEL" / f"{name}.nii.gz").unlink()
    for name in names[2:]:
        (data / "REPORT" / f"{name}.json").unlink()
    (data / "ORGANS" / f"{names[3]}.nii.gz").unlink()
    before = {path: sha256(path) for path in data.rglob("*") if path.is_file()}
    done = infer(dataset_dir=data, output_dir=out)
    assert done.returncode != 0
    assert "1 of 4 cases failed, the others are done" in done.stdout
    assert f"{names[3]} has no organ map" in done.stdout
    assert "set --segmenter" in done.stdout
    assert check_synthesis(out) == []
    assert {path: sha256(path) for path in before} == before, "inputs were written to"
    # The given lesion is painted as it is.
    given = read(data / "LABEL" / f"{names[0]}.nii.gz") == 2
    assert np.array_equal(read(out / f"{names[0]}_label.nii.gz") == 2, given)
    asked = json.loads((data / "REPORT" / f"{names[1]}.json").read_text())["lesions"][0]
    assert record(out, names[1])["attributes"] == asked["attributes"]
    for name in names[:3]:
        image, original = read(out / f"{name}_image.nii.gz"), read(data / "CT" / f"{name}.nii.gz")
        label = read(out / f"{name}_label.nii.gz")
        assert image.dtype == original.dtype == np.int16
        assert (label == 2).any()
        assert 0 < (image != original).mean() < 0.2
        assert np.allclose(
            nib.load(out / f"{name}_image.nii.gz").affine, nib.load(data / "CT" / f"{name}.nii.gz").affine
        )
    # Mended, the last case is done, the others are skipped, and nothing is planned again.
    shutil.copy(studies / "ORGANS" / f"{names[3]}.nii.gz", data / "ORGANS")
    done = succeeded(infer(dataset_dir=data, output_dir=out))
    assert done.stdout.count("already finished, skipped") == 3


def test_wishes_by_knobs_for_every_case(studies: Path, infer: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder in ("CT", "ORGANS"):
        shutil.copytree(studies / folder, data / folder)
    knobs = {"organ": "liver", "attributes": {"density": "hyperdense"}, "size_mm": [36, 36, 36], "num_lesions": 2}
    done = infer(dataset_dir=data, output_dir=tmp_path / "out", **knobs)
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*_plan.json"))]
    assert reports, done.stdout
    for lesion in (lesion for plan in reports for lesion in plan["lesions"]):
        assert lesion["report"]["organ"] == "liver"
        assert lesion["report"]["attributes"]["density"] == "hyperdense lesion"
    done = infer(dataset_dir=data, output_dir=tmp_path / "other", organ="lever")
    assert done.returncode != 0
    assert "organ 'lever' is unknown: near names are" in done.stdout


def test_the_lists_of_the_release_train(studies: Path, run_bundle: Run, tmp_path: Path) -> None:
    """Eight text files; a row out of place is named."""
    lists = tmp_path / "lists"
    lists.mkdir()
    rows = {"img": "CT/{}.nii.gz", "label": "LABEL/{}.nii.gz", "type": "REPORT/{}.json", "seg": "ORGANS/{}.nii.gz"}
    for split, numbers in {"train": (0, 1, 2), "val": (3,)}.items():
        for key, pattern in rows.items():
            lines = [str(studies / pattern.format(f"lesion_{i:04d}")) for i in numbers]
            (lists / f"{split}_{key}_list.txt").write_text("\n".join(lines) + "\n")
    succeeded(run_bundle(NAME, "train", "train_mask", "smoke", dataset_dir=lists, output_dir=tmp_path / "out"))
    assert (tmp_path / "out" / "model.pt").is_file()
    path = lists / "train_label_list.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[0], lines[2]]) + "\n")
    done = run_bundle(NAME, "train", "train_mask", "smoke", dataset_dir=lists, output_dir=tmp_path / "bad")
    assert done.returncode != 0
    assert "train_label_list.txt, line 1" in done.stdout


def test_fine_tuning_begins_with_given_weights(weights: Path, studies: Path, run_bundle: Run, tmp_path: Path) -> None:
    knobs = {"dataset_dir": studies, "output_dir": tmp_path, "base": weights, "lr": 0.0, "weight_decay": 0.0}
    done = run_bundle(NAME, "train", "fine_tune", "smoke", **knobs, lr_end=0.0, weights_dtype="float32")
    succeeded(done)
    tuned, began = (torch.load(p, weights_only=True) for p in (tmp_path / "model.pt", weights))
    assert all(torch.equal(tuned[key], began[key]) for key in began)


@pytest.fixture
def server() -> Iterator[str]:
    """A language model's server that first fails, then talks, then answers."""
    answer = {
        "lesions": [
            {"organ": "liver", "lesion": "liver tumor", "size_mm": [60, 60, 60], "attributes": {"shape": "round-like"}}
        ]
    }
    replies = [(500, "no"), (200, "Certainly! Here it is."), *[(200, json.dumps(answer))] * 20]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, text = replies.pop(0)
            body = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()


def test_a_language_model_writes_reports(
    studies: Path, weights: Path, run_bundle: Run, server: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for folder in ("CT", "ORGANS"):
        (data / folder).mkdir(parents=True)
        shutil.copy(studies / folder / "lesion_0000.nii.gz", data / folder)
    env = {"OPENAI_BASE_URL": server, "OPENAI_API_KEY": "secret-key", "OPENAI_MODEL": "tiny", "NO_PROXY": "*"}
    knobs = {"dataset_dir": data, "output_dir": tmp_path / "out", "weights": weights, "organ": "liver"}
    done = succeeded(run_bundle(NAME, "inference", "llm", "smoke", env=env, **knobs))
    report = record(tmp_path / "out", "lesion_0000")
    assert (report["source"], report["lesion"], report["attributes"]["shape"]) == ("llm", "liver tumor", "round-like")
    assert "secret-key" not in done.stdout
    assert not any(b"secret-key" in path.read_bytes() for path in (tmp_path / "out").glob("*.json"))


def test_shipped_weights_heed_words() -> None:
    """Hyperdense is brighter than hypodense by a wide margin; with the text off, words do nothing."""
    parsed = reading.parser(BUNDLE, "inference")
    bench = LesionBench(parsed, 2, torch.device("cpu"))
    gap = {}
    for on in (True, False):
        bench.words(on)
        dark, bright = (
            mean([contrast(made) for made in bench.draw({"density": word})])
            for word in ("hypodense lesion", "hyperdense lesion")
        )
        gap[on] = bright - dark
    assert gap[True] > 40
    assert abs(gap[False]) < 1
