"""Is a synthetic cohort good? Distances between cohorts, errors against a reference, signs of memorisation.

FID (Heusel 2017, Eq. 6), KID (Binkowski 2018), MMD (Gretton 2012, Eq. 5), density and coverage (Naeem 2020, Eqs. 5-6),
MS-SSIM (Wang 2003, Eq. 7). `evaluation` makes a report of them.

Why MONAI's are not called as they are: `get_fid_score` takes the root of a matrix that is singular for fewer cases than
features (negative values) and fails on one feature; `MMDMetric` has a linear kernel (sees means only) and wants equally
many cases; `MSEMetric` and `MultiScaleSSIMMetric` cannot be masked, the latter wants 176 voxels per axis, and its
luminance term values in [0, data_range]. Where both are defined we agree with MONAI: the tests hold us to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics.regression import compute_ssim_and_cs

Extractor = Callable[[torch.Tensor], torch.Tensor]
"""Images (N, C, *S), float in [-1, 1] -> features (N, F)."""

STATISTICS = ("mean", "std", "p5", "p50", "p95")
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang 2003, Section 3.2


class RandomConvFeatures:
    """Feature extractor that needs no download: a fixed random convolutional pyramid, pooled.

    Four times over: 3-wide convolution, ReLU, spatial mean and standard deviation, halve. Weights depend on the seed,
    the channels and the spatial dimensions only. They are uniform, hence exact integers scaled, equal on every machine.
    A baseline that sees intensity, texture and noise; for anatomy bring a trained network (`load_torchscript`).

    Args:
        features: length of the feature vector, a multiple of 8.
        seed: which random network.
    """

    levels = 4

    def __init__(self, features: int = 96, *, seed: int = 0) -> None:
        if features < 8 or features % (2 * self.levels):
            raise ValueError(f"features must be a positive multiple of {2 * self.levels}, got {features}")
        self.features, self.seed = features, seed
        self.description = f"RandomConvFeatures(features={features}, seed={seed})"

    def weights(self, channels: int, spatial_dims: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Kernels (K, C, 3, 3[, 3]) and biases (K,) of each level, drawn from a generator of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        width, layers = self.features // (2 * self.levels), []
        for level in range(self.levels):
            shape = (width, channels if level == 0 else width, *(3,) * spatial_dims)
            bound = math.sqrt(6 / math.prod(shape[1:]))  # He initialisation keeps the scale from level to level
            kernel = (2 * torch.rand(shape, generator=generator) - 1) * bound
            layers.append((kernel, torch.rand(width, generator=generator) - 0.5))
        return layers

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, *S), every axis at least 16 -> features (N, F)."""
        spatial_dims = images.ndim - 2
        if spatial_dims not in (2, 3) or min(images.shape[2:]) < 16:
            raise ValueError(f"expected images (N, C, *S), 2-D or 3-D, each axis >= 16, got {tuple(images.shape)}")
        conv, pool = (F.conv2d, F.avg_pool2d) if spatial_dims == 2 else (F.conv3d, F.avg_pool3d)
        state, pooled = images.float(), []
        for kernel, bias in self.weights(images.shape[1], spatial_dims):
            padded = F.pad(state, (1, 1) * spatial_dims, mode="replicate")  # zeros would draw a frame
            state = F.relu(conv(padded, kernel.to(state), bias.to(state)))
            flat = state.flatten(2)
            pooled += [flat.mean(2), flat.std(2)]
            state = pool(state, 2)
        return torch.cat(pooled, dim=1)


def load_torchscript(path: str | Path, device: str = "cpu") -> Extractor:
    """Extractor from your own TorchScript file, e.g. MedicalNet's; a feature map (N, F, *S) is averaged over space."""
    if not Path(path).is_file():
        raise ValueError(f"no TorchScript file at {path}: make one with torch.jit.trace(network, example).save(path)")
    network = torch.jit.load(str(path), map_location=device).eval()

    @torch.no_grad()
    def extract(images: torch.Tensor) -> torch.Tensor:
        output = network(images.to(device)).cpu()
        return output.reshape(*output.shape[:2], -1).mean(2)

    extract.description = f"TorchScript({Path(path).name})"  # type: ignore[attr-defined]
    return extract


def _features(real: torch.Tensor, synthetic: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both feature sets in float64, or an error that says why a distribution metric cannot use them."""
    for name, x in (("real", real), ("synthetic", synthetic)):
        if x.ndim != 2 or x.shape[1] != real.shape[1]:
            raise ValueError(f"expected features (N, F) with one F, got {name} {tuple(x.shape)}: pool over space first")
        if len(x) < 2:
            raise ValueError(f"needs at least 2 cases, got {len(x)} {name}")
        if not x.isfinite().all():
            raise ValueError(f"{name} features are not finite: check the extractor")
    return real.double(), synthetic.double()


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (N, M); without the matrix-product shortcut, so that a copy is at exactly 0."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def fid(real: torch.Tensor, synthetic: torch.Tensor) -> float:
    """Frechet distance between Gaussians fitted to features (N, F) and (M, F), N, M >= 2. Heusel 2017, Eq. 6."""
    real, synthetic = _features(real, synthetic)
    # With covariances A'A and B'B, the trace of their product's root is the nuclear norm of AB': exact and real.
    a, b = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (real, synthetic))
    spread = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float((real.mean(0) - synthetic.mean(0)).square().sum() + spread))


def kid(
    real: torch.Tensor,
    synthetic: torch.Tensor,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    generator: np.random.Generator | None = None,
) -> tuple[float, float]:
    """Unbiased squared MMD of features (N, F), (M, F) under the kernel (x'y / F + 1)^3, over random subsets.

    Unbiased means that it is around zero, not above it, for equal distributions. Subsets are drawn without replacement,
    `subset_size` defaults to half the smaller set (2 to 1000).

    Returns:
        mean and standard deviation over the subsets.
    """
    real, synthetic = _features(real, synthetic)
    fewest = min(len(real), len(synthetic))
    size = min(1000, max(2, fewest // 2)) if subset_size is None else subset_size
    if not 2 <= size <= fewest or subsets < 1:
        raise ValueError(f"subset_size must lie in 2..{fewest} and subsets be positive, got {size} and {subsets}")
    generator = np.random.default_rng(0) if generator is None else generator
    values = []
    for _ in range(subsets):
        x, y = (z[generator.choice(len(z), size, replace=False)] for z in (real, synthetic))
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(float(within - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def mmd(real: torch.Tensor, synthetic: torch.Tensor, *, bandwidth: float | None = None) -> float:
    """Squared MMD of features (N, F), (M, F) under exp(-d^2 / (2 bandwidth^2)); biased: 0 for equal sets, never below.

    Args:
        bandwidth: by default the median distance between any two cases of the pooled sets.
    """
    real, synthetic = _features(real, synthetic)
    pooled = torch.cat([real, synthetic])
    distance, n = _distances(pooled, pooled), len(real)
    if bandwidth is None:
        off_diagonal = distance[~torch.eye(len(pooled), dtype=torch.bool)]
        bandwidth = float(off_diagonal.median()) or float(off_diagonal.mean()) or 1.0  # most or all cases may be equal
    kernel = torch.exp(-distance.square() / (2 * bandwidth**2))
    return max(0.0, float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()))


def density_coverage(real: torch.Tensor, synthetic: torch.Tensor, *, k: int = 5) -> tuple[float, float]:
    """Fidelity and diversity on features (N, F), (M, F): real balls reach their k-th (at most N-1-th) real neighbour.

    Returns:
        density, how many real balls hold a synthetic case, over k; coverage, the share of real balls that hold any.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real, synthetic = _features(real, synthetic)
    k = min(k, len(real) - 1)
    radius = _distances(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the case itself
    inside = _distances(real, synthetic) <= radius[:, None]
    return float(inside.double().sum(0).mean() / k), float(inside.any(1).double().mean())


class NearestTraining(NamedTuple):
    """Per synthetic case: distance to and number of the nearest training case, and that distance over `baseline`."""

    distance: torch.Tensor
    case: torch.Tensor
    ratio: torch.Tensor
    baseline: float


def nearest_training_distance(synthetic: torch.Tensor, training: torch.Tensor) -> NearestTraining:
    """Memorisation: root mean square difference of features or voxels (N, ...) from the nearest of (M, ...).

    `baseline` is the median leave-one-out nearest distance inside the training set, so a ratio near 0 is a copy, near 1
    another patient. NaN where there is none: a single training case, or duplicates (baseline 0).
    """
    if synthetic.shape[1:] != training.shape[1:] or not len(synthetic) or not len(training):
        raise ValueError(f"expected cases of one shape, got {tuple(synthetic.shape)}, {tuple(training.shape)}: resize")
    x, y = (z.flatten(1) / math.sqrt(z[0].numel()) for z in (synthetic, training))
    distance, case = _distances(x, y).min(1)
    others = _distances(y, y).fill_diagonal_(math.inf).min(1).values
    baseline = float(others.median()) if len(y) > 1 else math.nan
    return NearestTraining(distance, case, distance / (baseline or math.nan), baseline)


def _mean_inside(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of value (N, C, *S) weighted by each mask (N, K, *S) -> (N, K); NaN where a mask is empty."""
    return (value.mean(1, keepdim=True) * mask).flatten(2).sum(2) / mask.flatten(2).sum(2)


def mse(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of images (N, C, *S) inside each of K masks (N, K, *S) in {0, 1}, or everywhere -> (N, K)."""
    return _mean_inside((pred - target).square(), torch.ones_like(pred[:, :1]) if mask is None else mask)


def ms_ssim(
    pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None, *, kernel_size: int = 11
) -> torch.Tensor:
    """Multi-scale structural similarity of images (N, C, *S) in [-1, 1], over windows centred in each mask -> (N, K).

    Uses as many of the five scales as the shortest axis has room for, their weights renormalised to sum to one.

    Args:
        mask: K masks (N, K, *S) in {0, 1}; by default one, of everything. NaN where no window is centred in a mask.
        kernel_size: width of the Gaussian window (sigma 1.5), odd.
    """
    dims, shortest, rim = pred.ndim - 2, min(pred.shape[2:]), kernel_size // 2
    if shortest < kernel_size or not kernel_size % 2:
        raise ValueError(f"MS-SSIM needs an odd kernel_size <= the shortest axis ({shortest}), got {kernel_size}")
    levels = sum(shortest >> level >= kernel_size for level in range(len(MS_SSIM_WEIGHTS)))
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    pred, target = pred + 1, target + 1  # the luminance term wants [0, data_range]: with [-1, 1] opposites look alike
    mask = torch.ones_like(pred[:, :1]) if mask is None else mask.to(pred)
    score = torch.ones_like(mask.flatten(2)[:, :, 0])
    for level, weight in enumerate(MS_SSIM_WEIGHTS[:levels]):
        ssim, contrast = compute_ssim_and_cs(pred, target, dims, (kernel_size,) * dims, (1.5,) * dims, data_range=2.0)
        centres = F.pad(mask, (-rim, -rim) * dims)  # the convolution has no padding
        value = _mean_inside(ssim if level == levels - 1 else contrast, centres)
        score = score * value.relu() ** (weight / sum(MS_SSIM_WEIGHTS[:levels]))
        pred, target, mask = (pool(x, 2) for x in (pred, target, mask))
    return score


def label_hu_statistics(
    image: torch.Tensor, layout: torch.Tensor, labels: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Voxels, mean, std (population), p5, p50, p95 of an image (C, *S) in HU inside each label of a layout (1, *S).

    A label that is absent has 0 voxels and NaN statistics.
    """
    if image.shape[1:] != layout.shape[1:] or len(layout) != 1:
        raise ValueError(f"image {tuple(image.shape)} and layout {tuple(layout.shape)} must be (C, *S) and (1, *S)")
    result = {}
    for name, value in labels.items():
        mask = layout == value
        inside = image[mask.expand_as(image)].double().numpy()
        numbers = [inside.mean(), inside.std(), *np.percentile(inside, (5, 50, 95))] if inside.size else [math.nan] * 5
        result[name] = {"voxels": float(mask.sum()), **dict(zip(STATISTICS, map(float, numbers), strict=True))}
    return result
