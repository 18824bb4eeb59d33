"""Cases through an engine: streaming past bad ones, saving with side-cars."""

from __future__ import annotations

import errno
import json
import os
from itertools import pairwise
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import names, touch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, LoadImage
from PIL import Image

from common.cases import CaseSaver, CaseStream, EqualBatches
from common.io import CaseError, list_cases, list_synthetic, sha256, unwrap
from common.transforms import FromMaskd, FromPictured, LoadCased, ToHintd, ToPictured

FOLDERS = {"image": "CT", "layout": "SEG"}


def test_bad_cases_are_reported_and_the_others_come(caplog: pytest.LogCaptureFixture) -> None:
    def transform(case: dict) -> dict:
        if case["name"] == "bug":
            try:
                raise KeyError("image")
            except KeyError as error:
                raise RuntimeError("applying transform <X>") from error
        if case["name"] == "bad":
            raise CaseError("bad.nii\nis bad")
        return case

    data = [{"name": "bug", "layout": __file__}, {"name": "a"}, {"name": "bad"}, {"name": "z", "error": "unpaired"}]
    stream = CaseStream(data, transform)
    assert [(c["name"], json.loads(c["source"])) for c in stream] == [("a", {"name": "a"})]
    with pytest.raises(CaseError) as error:
        stream.report()
    assert str(error.value).splitlines() == [
        "3 of 4 cases failed, the others are done:",
        f"  bug: KeyError: 'image'; see {__file__}",
        "  bad: bad.nii is bad",
        "  z: unpaired",
    ]
    assert len(caplog.records) == 3


def test_a_clean_stream_reports_nothing() -> None:
    stream = CaseStream([{"name": "a"}], dict)
    list(stream)
    stream.report()


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_cases_exactly(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [{"name": str(i)} for i in range(7)]
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        seen += [c["name"] for c in CaseStream(data, dict)]
    assert sorted(seen) == [c["name"] for c in data]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_hold_neighbours_of_equal_shapes_and_lose_none(batch_size: int) -> None:
    depths = [4, 4, 4, 7, 4, 5, 5]
    cases = [{"name": str(i), "layout": torch.full((1, 2, depth), i)} for i, depth in enumerate(depths)]
    loader = DataLoader(EqualBatches(cases, batch_size), batch_size=None)
    batches = list(loader)
    assert [name for batch in batches for name in batch["name"]] == [case["name"] for case in cases]
    for batch in batches:
        count = len(batch["name"])
        assert batch["layout"].shape == (count, 1, 2, depths[int(batch["name"][0])])
        assert count <= batch_size
    neighbours = [(len(a["name"]), a["layout"].shape[-1] == b["layout"].shape[-1]) for a, b in pairwise(batches)]
    assert all(count == batch_size for count, alike in neighbours if alike), "a batch ended early for nothing"


def test_unwrap_peels_off_monai_and_keeps_what_teaches() -> None:
    teaching = OSError("cannot write")
    teaching.__cause__ = OSError("low level")
    inner, outer = RuntimeError("applying transform"), RuntimeError("Failed to instantiate")
    inner.__cause__, outer.__cause__ = teaching, inner
    assert unwrap(outer) is teaching
    assert unwrap(lonely := RuntimeError("of its own")) is lonely


@pytest.fixture
def case(tmp_path: Path) -> dict:
    touch(tmp_path, "in/CT/a.nii", "in/SEG/a.nii", "weights.pt")
    return list_cases(tmp_path / "in", FOLDERS)[0]


def saver_for(root: Path) -> CaseSaver:
    outputs = {"pred": "image", "label": "layout"}
    return CaseSaver(root / "out", outputs, dtypes={"pred": "int16", "label": "uint8"}, weights=root / "weights.pt")


def save(saver: CaseSaver, case: dict) -> None:
    affine = torch.tensor([[0, -2.0, 0, 5], [1, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]], dtype=torch.float64)
    pred = MetaTensor(torch.arange(24.0).reshape(1, 2, 3, 4) - 12, affine=affine)
    saver.save({"source": json.dumps(case), "pred": pred, "label": (pred > 0).float(), "seed": case["seed"]})


def test_files_and_sidecar(case: dict, tmp_path: Path) -> None:
    saver = saver_for(tmp_path)
    saver.start()
    save(saver, case)
    run = saver.run_file().name
    assert names(tmp_path / "out") == sorted(["a.json", "a_image.nii.gz", "a_layout.nii.gz", run])
    image = nib.load(tmp_path / "out/a_image.nii.gz")
    assert image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(image.dataobj).ravel(), np.arange(24) - 12)
    np.testing.assert_allclose(image.affine[:2], [[0, -2, 0, 5], [1, 0, 0, 6]])

    sidecar = json.loads((tmp_path / "out/a.json").read_text())
    made_by = sidecar["made_by"]
    assert sidecar["config_file"] == str(tmp_path / "out" / run)
    assert sidecar["cases"] == [{**case, "weights_sha256": sha256(tmp_path / "weights.pt")}]
    assert made_by["case"] == case
    assert made_by["seed"] == case["seed"]
    assert made_by["inputs"] == {case[k]: sha256(case[k]) for k in FOLDERS}
    assert made_by["outputs"] == {f: sha256(tmp_path / "out" / f) for f in ("a_image.nii.gz", "a_layout.nii.gz")}
    assert made_by["versions"]["monai"] == monai.__version__
    assert list_synthetic(tmp_path / "out") == [
        {k: str(tmp_path / f"out/a_{k}.nii.gz") for k in FOLDERS} | {"reference": case["image"]}
    ]


def test_finished_cases_are_skipped_and_changed_ones_made_again(case: dict, tmp_path: Path) -> None:
    saver = saver_for(tmp_path)
    assert not saver.finished(case)
    save(saver, case)
    assert saver.finished(case)
    assert list(CaseStream([case], dict, saver)) == []
    assert not saver.finished({**case, "seed": 1})

    (tmp_path / "weights.pt").write_text("other weights")
    assert not saver_for(tmp_path).finished(case)
    (tmp_path / "weights.pt").write_text("weights.pt")
    Path(case["image"]).write_text("another scan")
    assert not saver_for(tmp_path).finished(case)
    touch(tmp_path, "in/CT/a.nii")
    other = saver_for(tmp_path)
    other._config = {"num_inference_steps": 5}
    assert not other.finished(case)
    other._config = {"output_dir": "elsewhere", "batch_size": 4}
    assert other.finished(case)

    (tmp_path / "out/a_image.nii.gz").write_text("of a run with another recipe that was cut short")
    assert not saver_for(tmp_path).finished(case)
    (tmp_path / "out/a_image.nii.gz").unlink()
    assert not saver_for(tmp_path).finished(case)


def test_a_replay_with_other_weights_is_refused(case: dict, tmp_path: Path) -> None:
    stream = CaseStream([{**case, "weights_sha256": "0" * 64}], dict, saver_for(tmp_path))
    assert list(stream) == []
    with pytest.raises(CaseError, match="other weights"):
        stream.report()


@pytest.mark.parametrize("place", ["in/CT", "in/SEG", "in/../in/SEG"])
def test_outputs_never_go_where_inputs_lie(place: str, case: dict, tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"holds the input .*a\.nii: choose another --output_dir"):
        CaseStream([case], dict, CaseSaver(tmp_path / place, {"pred": "image"}))


def test_a_full_disk_leaves_no_half_case(case: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_for(tmp_path)
    write = saver._write

    def run_out(path: Path, image: torch.Tensor, dtype: str) -> None:
        write(path, image, dtype)
        if dtype == "uint8":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saver, "_write", run_out)
    with pytest.raises(OSError, match=r"cannot write .*a_layout\.nii\.gz: No space left on device; free space"):
        save(saver, case)
    assert names(tmp_path / "out") == ["a_image.nii.gz"]
    assert not saver.finished(case)


def test_a_diverged_network_writes_nothing(case: dict, tmp_path: Path) -> None:
    pred = MetaTensor(torch.full((1, 2, 2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"a_image\.nii\.gz would hold NaN or infinite voxels"):
        saver_for(tmp_path).save({"source": json.dumps(case), "pred": pred})
    assert not (tmp_path / "out").exists()


def test_an_unwritable_place_is_found_at_the_door(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    with pytest.raises(OSError, match=r"cannot write .*file/sub/run-.*choose another --output_dir"):
        CaseSaver(tmp_path / "file/sub", {"pred": "image"}).start()


@pytest.mark.parametrize("extension", [".png", ".nii.gz"])
def test_masks_are_written_as_they_are(extension, tmp_path):
    """MONAI's PNG writer would clip to [0, 1] and stretch to 255; its NIfTI writer wants a third axis."""
    mask = torch.zeros(1, 6, 4)
    mask[0, 1, 2], mask[0, 5, 0] = 3, 1
    saver = CaseSaver(tmp_path, {"mask": "mask"}, extension, dtypes={"mask": "uint8"}, record="record")
    record = {"tries": 2, "achieved": []}
    saver.save({"source": json.dumps({"name": "a", "seed": 0}), "mask": mask, "record": record})
    back = LoadImage(image_only=True, ensure_channel_first=True)(tmp_path / f"a_mask{extension}")
    assert torch.equal(torch.as_tensor(back).reshape(1, 6, 4), mask)
    assert json.loads((tmp_path / "a.json").read_text())["made_by"]["record"] == record


def save_pair(root: Path, image: torch.Tensor, mask: torch.Tensor) -> None:
    """One synthetic pair, as Siamese-Diffusion writes it."""
    saver = CaseSaver(root, {"pred": "image", "label": "mask"}, ".png", dtypes={"pred": "uint8", "label": "bool"})
    saver.save({"source": json.dumps({"name": "a", "seed": 0}), "pred": image, "label": mask})


@pytest.mark.parametrize("size", [(6, 4), (17, 9), (8, 8)], ids=str)
@pytest.mark.parametrize("kind", [MetaTensor, torch.Tensor.clone], ids=["meta", "plain"])
def test_colour_is_written_pixel_for_pixel_and_a_mask_in_one_bit(size, kind, tmp_path):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator).float()
    mask = 255.0 * (torch.rand(1, *size, generator=generator) > 0.5)
    save_pair(tmp_path, kind(image), kind(mask))
    with Image.open(tmp_path / "a_image.png") as colour, Image.open(tmp_path / "a_mask.png") as bits:
        assert (colour.mode, colour.size) == ("RGB", size), "columns first, as everywhere in MONAI"
        assert (bits.mode, bits.size) == ("1", size)
        np.testing.assert_array_equal(np.asarray(colour).transpose(2, 1, 0), image)
        np.testing.assert_array_equal(np.asarray(bits).T, mask[0] > 0)
    load = LoadImage(image_only=True, ensure_channel_first=True)
    assert torch.equal(torch.as_tensor(load(tmp_path / "a_image.png")), image)
    assert list_synthetic(tmp_path) == [{k: str(tmp_path / f"a_{k}.png") for k in ("image", "mask")}]


def test_what_is_saved_comes_back_as_what_the_network_reads(tmp_path):
    """Written and loaded again, image and mask are the same conditions and targets: they can train the next one."""
    torch.manual_seed(0)
    image, mask = torch.rand(3, 12, 8) * 2 - 1, (torch.rand(1, 12, 8) > 0.5).float()
    on_disk = Compose([FromPictured("pred"), FromMaskd("label")])({"pred": image, "label": mask})
    save_pair(tmp_path, on_disk["pred"], on_disk["label"])
    load = Compose([LoadCased(("image", "mask")), ToPictured("image", (12, 8)), ToHintd("mask", (12, 8))])
    back = load({k: str(tmp_path / f"a_{k}.png") for k in ("image", "mask")})
    assert torch.equal(torch.as_tensor(back["mask"]), mask)
    assert (torch.as_tensor(back["image"]) - image).abs().max().item() <= 0.5 / 127.5 + 1e-6
