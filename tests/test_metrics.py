"""Laws of `common.metrics`: textbook values, identities, monotony, and agreement with MONAI where MONAI is right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import blobs, normal
from monai.metrics import MMDMetric, MSEMetric, MultiScaleSSIMMetric
from monai.metrics.fid import get_fid_score

from common import metrics
from common.metrics import RandomConvFeatures

# Distribution metrics, fed features directly.


@pytest.mark.parametrize("n", [2, 4, 200], ids=["two cases", "fewer than features", "more than features"])
def test_identical_sets_are_at_zero(n):
    x = normal(n, 24)
    assert metrics.fid(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.mmd(x, x) == pytest.approx(0, abs=1e-12)
    assert metrics.density_coverage(x, x)[1] == 1
    assert metrics.mmd(torch.ones(n, 3), torch.ones(n, 3)) == 0  # no spread at all


def test_kid_of_equal_distributions_is_zero_within_noise():
    mean, std = metrics.kid(normal(400, 16), normal(300, 16, seed=1))
    assert abs(mean) < std
    assert metrics.kid(normal(400, 16), normal(300, 16, seed=1) + 1)[0] > 10 * std


def test_kid_of_the_whole_set_is_the_u_statistic():
    x, y = normal(5, 3).double(), normal(5, 3, seed=1).double()

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    off = [(i, j) for i in range(5) for j in range(5) if i != j]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in off) / 20
    across = sum(k(a, b) for a in x for b in y) / 25
    mean, std = metrics.kid(x, y, subset_size=5, subsets=3)
    assert mean == pytest.approx(within - 2 * across)
    assert std == pytest.approx(0, abs=1e-9)


def test_fid_has_the_textbook_value():
    # Sets with exactly known moments: means 0 and m, diagonal covariances a^2 and b^2.
    basis = torch.linalg.qr(normal(50, 4).double() - normal(50, 4).double().mean(0)).Q * math.sqrt(49)
    a, b = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([2.0, 2.0, 1.5, 1.0])
    m = torch.tensor([1.0, -2.0, 0.0, 0.5])
    assert metrics.fid(basis * a, basis * b + m) == pytest.approx(float(m.square().sum() + (a - b).square().sum()))
    assert metrics.fid(basis, basis + 3) == pytest.approx(36)


@pytest.mark.parametrize(("n", "m"), [(60, 40), (100, 3), (3, 3)])
def test_fid_is_symmetric_and_agrees_with_monai(n, m):
    x, y = normal(n, 8), normal(m, 8, seed=1) * 2 + 0.3
    assert metrics.fid(x, y) == pytest.approx(metrics.fid(y, x))
    # MONAI's root of a singular product is off by 1e-5 or so; ours is not.
    assert metrics.fid(x, y) == pytest.approx(float(get_fid_score(x, y)), abs=1e-8 if min(n, m) > 8 else 1e-3)


def test_fid_works_where_monai_fails_on_one_feature():
    x = normal(50, 1)
    assert metrics.fid(x, x * 2) == pytest.approx(float(x.mean() ** 2 + x.std() ** 2))


def test_mmd_sees_a_change_of_spread_that_monais_linear_kernel_cannot():
    x = normal(80, 8)
    assert metrics.mmd(x, 4 * normal(80, 8, seed=1)) > 10 * metrics.mmd(x, normal(80, 8, seed=1))
    centred = x - x.mean(0)
    assert float(MMDMetric()(centred, 4 * centred)) < 0


def test_mmd_equals_enumeration():
    x, y = normal(3, 2).double(), normal(4, 2, seed=1).double()

    def mean(a, b):
        return np.mean([[math.exp(-float((p - q).square().sum()) / 2 / 0.7**2) for q in b] for p in a])

    assert metrics.mmd(x, y, bandwidth=0.7) == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_coverage_sees_mode_collapse_and_density_sees_outliers():
    x = normal(100, 4)
    assert metrics.density_coverage(x, x[:1] + 1e-3 * normal(100, 4, seed=1))[1] < 0.2
    assert metrics.density_coverage(x, x + 100) == (0, 0)
    density, coverage = metrics.density_coverage(x, normal(100, 4, seed=2))
    assert density == pytest.approx(1, abs=0.25)
    assert coverage > 0.8


# The extractor.


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (3, 2, 16, 21, 17), (2, 3, 40, 33)], ids=str)
def test_extractor_is_deterministic_and_treats_a_batch_as_its_cases(shape):
    images, extract = normal(*shape).tanh(), RandomConvFeatures(64)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    features = extract(images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(RandomConvFeatures(64)(images), features)
    assert features.shape == (shape[0], 64)
    assert features.isfinite().all()
    torch.testing.assert_close(torch.cat([extract(x[None]) for x in images]), features, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(RandomConvFeatures(64, seed=1)(images), features)


def test_extractor_weights_are_the_same_on_every_machine():
    kernel, bias = RandomConvFeatures().weights(1, 3)[0]
    uniform = np.array([0.49625659, 0.76822180, 0.08847743])  # what seed 0 is known to give
    assert kernel.flatten()[:3].tolist() == pytest.approx((2 * uniform - 1) * math.sqrt(6 / 27), abs=1e-7)
    assert bias.shape == (12,)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_distances_grow_with_damage(dims, damage):
    images, extract = blobs(12, dims=dims) + 0.1 * normal(12, 1, *(24,) * dims, seed=5), RandomConvFeatures()
    pool = torch.nn.functional.avg_pool2d if dims == 2 else torch.nn.functional.avg_pool3d

    def worse(k):
        return images + 0.1 * k * normal(*images.shape, seed=9) if damage == "noise" else pool(images, 2 * k + 1, 1, k)

    real = extract(images)
    for metric in (metrics.fid, metrics.mmd, lambda a, b: metrics.kid(a, b, subset_size=12, subsets=1)[0]):
        values = [metric(real, extract(worse(k))) for k in (1, 2, 4)]
        assert values == sorted(values)
        assert values[0] > metric(real, real)


def test_torchscript_extractor_pools_feature_maps(tmp_path):
    network = torch.nn.Conv3d(1, 4, 3)
    torch.jit.trace(network, torch.zeros(1, 1, 8, 8, 8)).save(str(tmp_path / "net.pt"))
    extract = metrics.load_torchscript(tmp_path / "net.pt")
    images = normal(2, 1, 16, 16, 16)
    torch.testing.assert_close(extract(images), network(images).mean((2, 3, 4)))
    with pytest.raises(ValueError, match=r"no TorchScript file at .*other\.pt"):
        metrics.load_torchscript(tmp_path / "other.pt")


# Image metrics.


@pytest.mark.parametrize("dims", [2, 3])
def test_mse_and_ms_ssim_agree_with_monai(dims):
    x, y = blobs(2, 48, dims), blobs(2, 48, dims, seed=1)
    torch.testing.assert_close(metrics.mse(x, y), MSEMetric()(x, y))
    weights = np.array(metrics.MS_SSIM_WEIGHTS[:3]) / sum(metrics.MS_SSIM_WEIGHTS[:3])
    theirs = MultiScaleSSIMMetric(dims, data_range=2.0, weights=weights.tolist())
    z = (x + 0.3 * y).clamp(-1, 1)
    torch.testing.assert_close(metrics.ms_ssim(x, z), theirs(x + 1, z + 1))
    assert metrics.ms_ssim(x, z).shape == (2, 1)
    torch.testing.assert_close(metrics.ms_ssim(x, x), torch.ones(2, 1))


def test_masked_errors_see_their_mask_only():
    x = blobs(1, 64, 2)
    mask = torch.zeros(1, 3, 64, 64)
    mask[:, 0, :20], mask[:, 1, 44:] = 1, 1
    y = x.clone()
    y[..., 40:, :] += 0.5
    error, similarity = metrics.mse(x, y, mask)[0], metrics.ms_ssim(x, y, mask, kernel_size=5)[0]
    assert error[:2].tolist() == pytest.approx([0, 0.25])
    assert similarity[0] == pytest.approx(1)
    assert similarity[1] < 0.999
    assert error[2].isnan()
    assert similarity[2].isnan()


def test_ms_ssim_teaches_its_smallest_size():
    with pytest.raises(ValueError, match=r"kernel_size <= the shortest axis \(8\)"):
        metrics.ms_ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


# Memorisation and label statistics.


def test_memorisation_detects_an_exact_copy():
    training = normal(30, 1, 4, 4)
    nearest = metrics.nearest_training_distance(torch.cat([training[7:8], normal(1, 1, 4, 4, seed=1)]), training)
    assert nearest.distance[0] == 0
    assert nearest.case[0] == 7
    assert 0.5 < nearest.ratio[1] < 2
    assert math.isnan(metrics.nearest_training_distance(training, training[:1]).baseline)
    assert metrics.nearest_training_distance(torch.full((1, 9), 3.0), torch.ones(1, 9)).distance == pytest.approx(2)


def test_label_hu_statistics_are_exact():
    image = torch.tensor([[[0.0, 100.0], [200.0, -1000.0]]])
    layout = torch.tensor([[[1, 1], [1, 2]]])
    table = metrics.label_hu_statistics(image, layout, {"lung": 1, "nodule": 2, "heart": 3})
    assert table["lung"] == pytest.approx(
        {"voxels": 3, "mean": 100, "std": math.sqrt(20000 / 3), "p5": 10, "p50": 100, "p95": 190}
    )
    assert table["nodule"] == {"voxels": 1, "mean": -1000, "std": 0, "p5": -1000, "p50": -1000, "p95": -1000}
    assert table["heart"]["voxels"] == 0
    assert math.isnan(table["heart"]["mean"])


def test_metric_errors_teach():
    x = normal(4, 3)
    with pytest.raises(ValueError, match="at least 2 cases, got 1 synthetic"):
        metrics.fid(x, x[:1])
    with pytest.raises(ValueError, match=r"with one F, got synthetic \(4, 2\)"):
        metrics.mmd(x, x[:, :2])
    with pytest.raises(ValueError, match="real features are not finite"):
        metrics.fid(x / 0, x)
    with pytest.raises(ValueError, match=r"subset_size must lie in 2\.\.4"):
        metrics.kid(x, x, subset_size=9)
    with pytest.raises(ValueError, match="k must be at least 1"):
        metrics.density_coverage(x, x, k=0)
    with pytest.raises(ValueError, match="multiple of 8"):
        RandomConvFeatures(30)
    with pytest.raises(ValueError, match=r"each axis >= 16, got \(1, 1, 8, 16\)"):
        RandomConvFeatures()(torch.zeros(1, 1, 8, 16))
    with pytest.raises(ValueError, match="cases of one shape"):
        metrics.nearest_training_distance(x, x[:, :2])
