"""Organ maps: brought by a case, made and kept, or by the real TotalSegmentator with hand-made tiny weights."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from common.abdomen_phantoms import abdomen
from common.io import CaseError, sha256
from common.organs import MODES, OrganMapd, TotalSegmentatorOrgans, organ_numbers, weights_root
from common.totalsegmentator import ORGANS, TOTAL_V1, TOTAL_V2
from common.transforms import CheckCased, LoadCased

REPO = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DATA_DIR", REPO.parent / "shared" / "data"))

# Unequal voxels, axes not along the world's, mirrored: whoever resamples or forgets the affine is caught.
AFFINE = np.array([[-1.5, 0.2, 0, 31], [0.2, 1.5, 0, -7], [0, 0, 5, 11], [0, 0, 0, 1.0]])
SHAPE = (9, 8, 7)


def write(path: Path, values: Any, affine: np.ndarray = AFFINE, dtype: Any = np.int16) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values).astype(dtype), affine), path)
    return str(path)


def ct(path: Path, seed: int = 0) -> str:
    return write(path, np.random.default_rng(seed).integers(-1000, 1000, SHAPE))


def loaded(name: str, **files: str) -> dict:
    data = LoadCased(("image", "organs"))({"name": name, **files})
    return CheckCased("image")(data)


class Segmenter:
    """Counts its calls; puts the liver where the CT is dense."""

    description = "dense is liver, 1"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, path: str) -> np.ndarray:
        self.calls.append(path)
        return np.where(np.asarray(nib.load(path).dataobj) > 0, 5, 0).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_tables_go_by_name() -> None:
    assert organ_numbers("totalsegmentator_v1") == {n: n for n in range(105)}
    v2 = organ_numbers("totalsegmentator_v2")
    assert list(v2) == list(range(118))
    for number, name in enumerate(TOTAL_V2, start=1):
        assert v2[number] == (TOTAL_V1.index(name) + 1 if name in TOTAL_V1 else 0)
    # The version knows no parts of the heart, and no face; everything else it has.
    assert set(range(105)) - set(v2.values()) == {44, 45, 46, 47, 48, 49, 93}
    named = {ORGANS[value]: number for value, number in organ_numbers("guidegen").items()}
    assert named == {
        "background": 0, "spleen": 1, "kidney_right": 2, "kidney_left": 3, "liver": 5, "stomach": 6, "pancreas": 10,
        "small_bowel": 55, "duodenum": 56, "colon": 57, "urinary_bladder": 104, "colorectal_cancer": 57,
        "vertebrae": 20, "body": 0,
    }  # fmt: skip
    assert organ_numbers({"1": "liver", "2": "left kidney", 7: 104}) == {0: 0, 1: 5, 2: 3, 7: 104}
    with pytest.raises(ValueError, match=r"organ_table must be one of .*guidegen.*got 'v2'"):
        organ_numbers("v2")
    with pytest.raises(ValueError, match=r"'livr' is unknown: near names are.*liver"):
        organ_numbers({"1": "livr"})
    with pytest.raises(ValueError, match=r"organ_table has \{1: 105\}"):
        organ_numbers({"1": 105})


# ---------------------------------------------------------------------------------------------------------------------
# Maps that cases bring


@pytest.mark.parametrize(
    ("table", "values", "expected"),
    [
        ("totalsegmentator_v1", [0, 5, 104], [0, 5, 104]),
        ("totalsegmentator_v2", [0, 21, 51, 5], [0, 104, 0, 5]),  # urinary bladder; heart, which v1 has in parts
        ("guidegen", [0, 4, 11, 13], [0, 5, 57, 0]),
        ({"1": 5}, [0, 1], [0, 5]),
        ({"2": "urinary bladder", "0": 0}, [0, 2], [0, 104]),
    ],
)
def test_own_maps_are_renumbered(tmp_path: Path, table: Any, values: list[int], expected: list[int]) -> None:
    numbers = np.resize(values, SHAPE)
    data = loaded("a", image=ct(tmp_path / "a.nii.gz"), organs=write(tmp_path / "o.nii.gz", numbers))
    before = data["organs"].clone()
    organs = OrganMapd(table=table)(data)["organs"]
    np.testing.assert_array_equal(organs[0], np.resize(expected, SHAPE))
    assert organs.dtype == data["image"].dtype
    assert organs.meta["filename_or_obj"] == str(tmp_path / "o.nii.gz")
    np.testing.assert_allclose(organs.affine, AFFINE)
    assert torch.equal(before, data["organs"])


@pytest.mark.parametrize(
    ("values", "affine", "message"),
    [
        (np.zeros((9, 8, 8)), AFFINE, r"o.nii.gz and .*a.nii.gz have different shapes, \(9, 8, 8\) and \(9, 8, 7\)"),
        (np.zeros(SHAPE), AFFINE + 0.1 * np.eye(4), "o.nii.gz and .*a.nii.gz have different affines: resample"),
        (np.full(SHAPE, 5.5), AFFINE, "o.nii.gz holds fractional values.*resample it with nearest"),
        (np.full(SHAPE, np.nan), AFFINE, "o.nii.gz holds fractional values"),
        (
            np.resize([0, 105], SHAPE),
            AFFINE,
            r"holds labels \[105\] that its table does not know.*organ_table",
        ),
        (np.resize([0, -1], SHAPE), AFFINE, r"holds labels \[-1\]"),
    ],
)
def test_unusable_maps_are_refused(tmp_path: Path, values: np.ndarray, affine: np.ndarray, message: str) -> None:
    organs = write(tmp_path / "o.nii.gz", values, affine, np.float32)
    data = loaded("a", image=ct(tmp_path / "a.nii.gz"), organs=organs)
    with pytest.raises(CaseError, match=message):
        OrganMapd()(data)


def test_without_map_or_segmenter_the_ways_out_are_named(tmp_path: Path) -> None:
    data = loaded("a", image=ct(tmp_path / "CT" / "a.nii.gz"))
    with pytest.raises(CaseError, match=r"a has no organ map: .*ORGANS/a.nii.gz.*pip install torch.*--segmenter"):
        OrganMapd()(data)
    with pytest.raises(ValueError, match="give output_dir"):
        OrganMapd(Segmenter())
    pinned = (REPO / "requirements-extras.txt").read_text(encoding="utf-8")
    assert "TotalSegmentator==2.18.0" in pinned  # the version that messages name


# ---------------------------------------------------------------------------------------------------------------------
# Maps that are made


def test_made_once_and_kept(tmp_path: Path) -> None:
    image, out = ct(tmp_path / "CT" / "a.nii.gz"), tmp_path / "out"
    segmenter = Segmenter()
    first = OrganMapd(segmenter, out)(loaded("a", image=image))["organs"]
    expected = np.where(np.asarray(nib.load(image).dataobj) > 0, 5, 0)
    np.testing.assert_array_equal(first[0], expected)
    stored = nib.load(out / "a_organs.nii.gz")
    assert stored.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(stored.dataobj, expected)
    np.testing.assert_allclose(stored.affine, AFFINE)
    assert sorted(path.name for path in out.iterdir()) == ["a_organs.json", "a_organs.nii.gz"]
    # Another run, and other samples of the same CT, take what is there.
    for name in ("a", "a_s0", "a_s1"):
        again = OrganMapd(segmenter, out)(loaded(name, image=image))["organs"]
        assert torch.equal(first.as_tensor(), again.as_tensor())
    assert segmenter.calls == [image]
    # A table is for what cases bring, not for what segmenters make.
    again = OrganMapd(segmenter, out, table="guidegen")(loaded("a", image=image))["organs"]
    assert torch.equal(first.as_tensor(), again.as_tensor())


def test_stale_maps_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reference takes whatever lies there from an earlier run."""
    image, out = ct(tmp_path / "a.nii.gz"), tmp_path / "out"
    segmenter = Segmenter()

    def run() -> int:
        with caplog.at_level(logging.WARNING, "common.organs"):
            OrganMapd(segmenter, out)(loaded("a", image=image))
        return len(segmenter.calls)

    assert run() == run() == 1
    assert "made anew" not in caplog.text
    ct(tmp_path / "a.nii.gz", seed=1)  # another CT of the same name
    assert run() == run() == 2
    segmenter.description = "dense is liver, 2"
    assert run() == run() == 3
    write(out / "a_organs.nii.gz", np.zeros(SHAPE))  # not what was written
    assert run() == run() == 4
    assert caplog.text.count("not of this CT and segmenter, or was changed: made anew") == 3
    (out / "a_organs.json").unlink()
    assert run() == 5
    assert json.loads((out / "a_organs.json").read_text())["image_sha256"] == sha256(image)


def test_nothing_is_left_of_a_broken_run(tmp_path: Path) -> None:
    def broken(path: str) -> np.ndarray:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        OrganMapd(broken, tmp_path / "out")(loaded("a", image=ct(tmp_path / "a.nii.gz")))
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.zeros((9, 8, 35), np.uint8), r"is not on the CT's grid \(shapes \(9, 8, 35\) and \(9, 8, 7\)\)"),
        # The reference resamples to 1 mm and keeps the affine, so that organs come from a body of another size.
        (nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4)), "is not on the CT's grid"),
        (np.full(SHAPE, 117, np.uint8), r"holds labels \[117\]"),
    ],
)
def test_segmenters_off_the_grid_are_refused(tmp_path: Path, result: Any, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        OrganMapd(lambda path: result, tmp_path / "out")(loaded("a", image=ct(tmp_path / "a.nii.gz")))
    assert not list(tmp_path.glob("out/*"))


def test_real_organ_maps() -> None:
    torso, demo = DATA / "ct_totalseg_torso", DATA / "lesion_demo"
    if not torso.is_dir() or not demo.is_dir():
        pytest.skip(f"no {torso} or {demo}")
    data = loaded("torso", image=str(torso / "ct.nii.gz"), organs=str(torso / "seg_v1_104.nii.gz"))
    assert torch.equal(OrganMapd()(data)["organs"].as_tensor(), data["organs"].as_tensor())
    with pytest.raises(CaseError, match="its table does not know"):
        OrganMapd(table="guidegen")(data)
    for name, number in (("Liver_cancer", 5), ("Bladder_cancer", 104)):
        files = {"image": str(demo / f"{name}_label_3mm.nii.gz")}
        files["organs"] = str(demo / f"{name}_totalseg_health_3mm.nii.gz")
        organs = OrganMapd()(loaded(name, **files))["organs"]
        assert number in organs.unique()


# ---------------------------------------------------------------------------------------------------------------------
# TotalSegmentator: at the door


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.organs.metadata.version", lambda name: "2.18.0")


def test_unknown_modes_are_refused(installed: None) -> None:
    with pytest.raises(ValueError, match=r"mode must be one of fastest, fast, default, got 'slow'"):
        TotalSegmentatorOrgans("slow")


def test_missing_package_is_named() -> None:
    if shutil.which("TotalSegmentator") or _version() is not None:
        pytest.skip("TotalSegmentator is installed")
    with pytest.raises(ImportError, match=r"not installed: pip install torch==2.13.0 TotalSegmentator"):
        TotalSegmentatorOrgans()


def _version() -> str | None:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("TotalSegmentator")
    return None


@pytest.mark.parametrize(("mode", "task"), [("fast", "total_fast"), ("fastest", "total_fast"), ("default", "total")])
def test_missing_weights_are_named_with_the_command(tmp_path: Path, installed: None, mode: str, task: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        TotalSegmentatorOrgans(mode, weights_dir=tmp_path)
    assert f"TOTALSEG_WEIGHTS_PATH={tmp_path} totalseg_download_weights -t {task}" in str(error.value)
    for folder in MODES[mode][2]:
        assert folder in str(error.value)
    # A folder without its weights, as a broken download leaves it, does not do.
    (tmp_path / MODES[mode][2][0]).mkdir()
    with pytest.raises(FileNotFoundError, match=MODES[mode][2][0]):
        TotalSegmentatorOrgans(mode, weights_dir=tmp_path)


def test_weights_are_looked_for_where_totalsegmentator_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert weights_root() == Path.home() / ".totalsegmentator" / "nnunet" / "results"
    monkeypatch.setenv("TOTALSEG_HOME_DIR", "/home/x/ts")
    assert weights_root() == Path("/home/x/ts/nnunet/results")
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", "/weights")
    assert weights_root() == Path("/weights")


# ---------------------------------------------------------------------------------------------------------------------
# TotalSegmentator and nnU-Net as they are, with weights of a few kB that nobody trained


def write_tiny_weights(root: Path, mode: str) -> None:
    """What nnU-Net needs of a trained model: plans, data set, checkpoint; here two stages and random weights."""
    from totalsegmentator.map_to_binary import class_map, class_map_5_parts, map_taskid_to_partname_ct

    spacing = {"fastest": 6.0, "fast": 3.0, "default": 1.5}[mode]
    _, trainer, folders = MODES[mode]
    for folder in folders:
        task = int(folder[7:10])
        classes = class_map_5_parts[map_taskid_to_partname_ct[task]] if mode == "default" else class_map["total"]
        labels = {"background": 0, **{name: number for number, name in classes.items()}}
        model = root / folder / f"{trainer}__nnUNetPlans__3d_fullres"
        (model / "fold_0").mkdir(parents=True)
        architecture = write_plans(model, folder, spacing)
        dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
        (model / "dataset.json").write_text(json.dumps(dataset))
        checkpoint = {
            "trainer_name": trainer, "init_args": {"configuration": "3d_fullres"},
            "inference_allowed_mirroring_axes": None, "network_weights": weights(architecture, len(labels), task),
        }  # fmt: skip
        torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")


def write_plans(model: Path, dataset: str, spacing: float) -> dict:
    """``plans.json``; returns the network's arguments."""
    resampling = {"order": 1, "order_z": 0, "force_separate_z": None}
    name = "resample_data_or_seg_to_shape"
    arguments = {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]], "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1], "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [32] * 3, "median_image_size_in_voxels": [40.0] * 3, "spacing": [spacing] * 3,
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
        "resampling_fn_data": name, "resampling_fn_data_kwargs": {"is_seg": False, **resampling},
        "resampling_fn_seg": name, "resampling_fn_seg_kwargs": {"is_seg": True, **resampling},
        "resampling_fn_probabilities": name, "resampling_fn_probabilities_kwargs": {"is_seg": False, **resampling},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments, "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": True,
    }  # fmt: skip
    intensities = {"mean": 0.0, "std": 300.0, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0}
    plans = {
        "dataset_name": dataset, "plans_name": "nnUNetPlans", "original_median_spacing_after_transp": [spacing] * 3,
        "original_median_shape_after_transp": [40] * 3, "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration}, "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {**intensities, "min": -1e3, "max": 1e3, "median": 0.0}},
    }  # fmt: skip
    (model / "plans.json").write_text(json.dumps(plans))
    return arguments


def weights(arguments: dict, outputs: int, seed: int) -> dict:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    modules = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PlainConvUNet(1, num_classes=outputs, deep_supervision=False, **{**arguments, **modules})
    return network.state_dict()


@pytest.mark.slow
def test_installed_package_agrees() -> None:
    pytest.importorskip("totalsegmentator", reason="TotalSegmentator is not installed: requirements-extras.txt")
    from totalsegmentator.bin.totalseg_download_weights import TASK_TO_ID
    from totalsegmentator.map_tasks_config import TASK_CONFIGS, TASK_ID_WEIGHTS_CONFIGS

    for mode, (task, trainer, folders) in MODES.items():
        config = TASK_CONFIGS["total"]["sub_modes"][mode]
        numbers = np.atleast_1d(config["task_id"]).tolist()
        assert trainer == config["trainer"]
        assert folders == tuple(TASK_ID_WEIGHTS_CONFIGS[number]["foldername"] for number in numbers)
        assert set(numbers) <= set(TASK_TO_ID[task])


@pytest.mark.slow
def test_real_totalsegmentator(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("totalsegmentator", reason="TotalSegmentator is not installed: requirements-extras.txt")
    write_tiny_weights(tmp_path / "weights", "fast")
    # As a scanner writes it: x and y grow to the left and to the back. A body of a quarter's size is one patch.
    phantom = abdomen(1, shape=(40, 32, 24))
    flip = np.diag([-1.0, -1, 1, 1])
    flip[:2, 3] = np.array(phantom.image.shape[:2]) - 1
    affine = np.diag([0.25, 0.25, 0.25, 1]) @ phantom.affine @ flip
    image = write(tmp_path / "CT" / "a.nii.gz", phantom.image[::-1, ::-1], affine)
    bytes_before, environment = Path(image).read_bytes(), dict(os.environ)

    segmenter = TotalSegmentatorOrgans("fast", weights_dir=tmp_path / "weights")
    random_state = torch.get_rng_state()
    result = segmenter(image)
    values = np.asarray(result.dataobj)
    assert values.shape == phantom.image.shape
    np.testing.assert_allclose(result.affine, affine, atol=1e-4)
    assert values.dtype == np.uint8
    assert len(np.unique(values)) > 3
    assert values.max() <= 104
    assert not np.isin(values, [44, 45, 46, 47, 48, 49, 93]).any()  # the second version has none of these

    # Nothing is left behind: the CT, the settings, the run's random numbers, the screen.
    assert Path(image).read_bytes() == bytes_before
    assert [path.name for path in (tmp_path / "CT").iterdir()] == ["a.nii.gz"]
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capsys.readouterr().out == ""

    # As a stage of the bundle: the same again, and kept.
    organs = OrganMapd(segmenter, tmp_path / "out")(loaded("a", image=image))["organs"]
    np.testing.assert_array_equal(organs[0], values)
    assert json.loads((tmp_path / "out" / "a_organs.json").read_text())["segmenter"] == segmenter.description
