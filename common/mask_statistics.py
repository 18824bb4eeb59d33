"""Models of what masks show: how size, place and count vary together; new statistics drawn or asked for (CMDM, 2025).

`ShrunkKDE` is a smoothed bootstrap of whole masks, `GaussianProcessKDE` the model of Heo and Jung (doi
10.1016/j.compbiomed.2025.110807). `list_requests` turns a model, or a table of wishes, into cases to synthesise.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy import special, stats

from .io import Case, CaseError, atomic_path, case_seed, write_json
from .semantics import Lesion, lesions_in, table_of

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike
KIND = "semantic statistics"
NEVER = 1e-4  # how near to the frame a place counts in logit space, where the frame itself is infinitely far


def _features(table: np.ndarray) -> np.ndarray:
    """Fractions -> unconstrained (log size, logit x, logit y)."""
    places = special.logit(table[..., 1:].clip(NEVER, 1 - NEVER))
    return np.concatenate([np.log(table[..., :1]), places], axis=-1)


def _fractions(features: np.ndarray) -> np.ndarray:
    """Inverse of `_features`."""
    return np.concatenate([np.exp(features[..., :1]), special.expit(features[..., 1:])], axis=-1)


def _covariance(rows: np.ndarray) -> np.ndarray:
    """Covariance over rows with gaps, of the pairs that are there; 0 where fewer than two are."""
    present = (~np.isnan(rows)).astype(float)
    centred = np.nan_to_num(rows - np.nansum(rows, axis=0) / present.sum(axis=0).clip(1))
    pairs = present.T @ present
    return np.divide(centred.T @ centred, pairs - 1, out=np.zeros_like(pairs), where=pairs > 1)


@dataclass
class Statistics:
    """What the models share: counts by frequency, rules that every draw obeys, redraws with an end.

    Masks are grouped by how many components of each label they have; a model proposes masks of a group.

    Args:
        min_size: smallest area of a lesion, a fraction of the image's (100 pixels of 256 x 256).
        spacing: centres of two lesions of a label are at least so many sums of radii (of discs of equal area) apart.
            In real pairs of polyps the least are 0.86 to 0.95.
        max_fill: all lesions of a label cover less than this.
        max_tries: proposals before a draw is given up.
    """

    min_size: float = 0.0015
    spacing: float = 0.85
    max_fill: float = 0.9
    max_tries: int = 200

    def __post_init__(self) -> None:
        if not (0 <= self.min_size < self.max_fill <= 1 and self.spacing >= 0 and self.max_tries >= 1):
            raise ValueError(f"expected 0 <= min_size < max_fill <= 1, spacing >= 0 and max_tries >= 1, got {self}")
        self.masks: list[list[Lesion]] = []
        self.labels: list[int] = []
        self.empty = 0

    def fit(self, masks: Sequence[Sequence[Lesion]], labels: Sequence[int] = (1,)) -> Self:
        """Learn from measured masks, empty ones left out; returns itself."""
        return self.restore(masks, labels, {})

    def restore(self, masks: Sequence[Sequence[Lesion]], labels: Sequence[int], fitted: Mapping[str, Any]) -> Self:
        """As `fit`, with what `fitted` kept."""
        self.masks = [list(mask) for mask in masks if mask]
        self.labels = list(labels)
        self.empty = len(masks) - len(self.masks)
        if not self.masks:
            raise CaseError(f"no statistics without lesions: all {len(masks)} masks are empty")
        self.tables = [table_of(mask, self.labels) for mask in self.masks]
        self.counts = [tuple(map(int, (~np.isnan(table[..., 0])).sum(axis=0))) for table in self.tables]
        self.learn(fitted)
        return self

    def learn(self, fitted: Mapping[str, Any]) -> None:
        """Learn from ``masks`` and their ``tables``, or take what `fitted` kept."""
        raise NotImplementedError

    def propose(self, counts: tuple[int, ...], n: int, rng: np.random.Generator) -> np.ndarray:
        """Masks (n, P, K, 3) with so many components of each label, the rules not applied."""
        raise NotImplementedError

    def fitted(self) -> dict[str, Any]:
        """What `learn` shall not have to find again, for JSON."""
        return {}

    def faults(self, tables: np.ndarray, given: int = 0) -> dict[str, np.ndarray]:
        """Rule -> which masks of (n, P, K, 3) break it; the first ``given`` parts are beyond judgement."""
        sizes, places, new = tables[..., 0], tables[..., 1:], slice(given, None)
        radii = np.sqrt(sizes / np.pi)
        distances = np.linalg.norm(places[:, new, None] - places[:, None], axis=-1)
        close = distances < self.spacing * (radii[:, new, None] + radii[:, None])
        earlier = np.arange(given, sizes.shape[1])[:, None] > np.arange(sizes.shape[1])
        broken = {
            f"smaller than min_size {self.min_size:g}": (sizes[:, new] < self.min_size) | (sizes[:, new] <= 0),
            "outside the frame": (places[:, new] < 0) | (places[:, new] > 1),
            f"filling max_fill {self.max_fill:g}": np.nansum(sizes, axis=1) >= self.max_fill,
            f"closer than spacing {self.spacing:g}": close & earlier[..., None],
        }
        return {rule: masks.reshape(len(tables), -1).any(axis=1) for rule, masks in broken.items()}

    def first_valid(self, tables: np.ndarray, given: int = 0) -> np.ndarray:
        """The first of the proposed masks that obeys the rules."""
        faults = self.faults(tables, given)
        bad = np.any(list(faults.values()), axis=0)
        if bad.all():
            reasons = ", ".join(f"{n} {rule}" for rule, n in ((r, int(f.sum())) for r, f in faults.items()) if n)
            raise CaseError(
                f"no valid mask of {(~np.isnan(tables[0, ..., 0])).sum()} lesions in {len(tables)} tries ({reasons}): "
                "ask for fewer or smaller lesions, or loosen that rule of the statistics"
            )
        return tables[np.argmin(bad)]

    def draw(self, n: int, rng: np.random.Generator, count: int | None = None) -> list[list[Lesion]]:
        """Draw masks.

        Args:
            n: how many.
            rng: the source of chance.
            count: components of each mask, all labels together; None draws it, too. With one label, a count that was
                never seen is composed of lesions from the masks nearest to it.
        """
        pool = [counts for counts in self.counts if count in (None, sum(counts))]
        if not pool:
            return [self.complete([], count or 0, rng) for _ in range(n)]
        chosen = (pool[rng.integers(len(pool))] for _ in range(n))
        tables = (self.first_valid(self.propose(counts, self.max_tries, rng)) for counts in chosen)
        return [lesions_in(table, self.labels) for table in tables]

    def complete(self, lesions: Sequence[Lesion], count: int, rng: np.random.Generator) -> list[Lesion]:
        """Add drawn lesions of the one label to the given ones, which stay as they are, until there are ``count``."""
        if len(self.labels) > 1:
            raise self._unseen(count)
        if count < max(1, len(lesions)) or count % 1:
            raise CaseError(f"count {count} cannot be: a mask has 1 lesion or more, and {len(lesions)} are given")
        gaps = np.array([abs(n - count) for (n,) in self.counts])
        nearest, given = np.flatnonzero(gaps == gaps.min()), table_of(lesions, self.labels)
        for tries in reversed(range(20)):  # begin anew where the first lesions leave no room for the last
            table = given
            try:
                while len(table) < count:
                    tables = self.propose(self.counts[rng.choice(nearest)], self.max_tries, rng)
                    one = tables[np.arange(len(tables)), rng.integers(tables.shape[1], size=len(tables)), None]
                    before = np.broadcast_to(table, (len(one), *table.shape))
                    table = self.first_valid(np.concatenate([before, one], axis=1), given=len(table))
            except CaseError as error:
                if not tries:
                    raise CaseError(f"count {count}: {error}") from error
            else:
                break
        return [*lesions, *lesions_in(table[len(lesions) :], self.labels)]

    def _unseen(self, count: int) -> CaseError:
        seen = ", ".join(map(str, sorted({sum(counts) for counts in self.counts})))
        return CaseError(f"count {count} was never seen with labels {self.labels}, expected one of {seen}")


@dataclass
class ShrunkKDE(Statistics):
    """Smoothed bootstrap of masks: a training mask, lightly moved, then shrunk so that the covariance is kept.

    Works on log size, logit x and logit y of each class. The noise has the covariance of all parts, pooled, because
    groups of masks with several lesions are tiny; classes of one part (a cavity in its wall) move together.

    Args:
        bandwidth: noise relative to the data's spread, the paper's h of shrunk kernels.
    """

    bandwidth: float = 0.25

    def learn(self, fitted: Mapping[str, Any]) -> None:
        """Group the masks, pool the covariance."""
        groups: dict[tuple[int, ...], list[np.ndarray]] = {}
        for counts, table in zip(self.counts, self.tables):
            groups.setdefault(counts, []).append(_features(table).reshape(len(table), -1))
        self.groups = {counts: np.stack(group) for counts, group in groups.items()}
        distinct = len({tuple(mask) for mask in self.masks})
        if distinct < 5:
            ending = "every draw repeats it" if distinct == 1 else "draws stay near them"
            logger.warning(f"{distinct} different of {len(self.masks)} masks: the spread cannot be known, {ending}")
        rows = np.concatenate([mask for group in groups.values() for mask in group])
        covariance = _covariance(rows) if distinct > 1 else np.zeros((rows.shape[1],) * 2)
        values, vectors = np.linalg.eigh(covariance)
        self.root = vectors * np.sqrt(values.clip(0))  # pairwise covariances need not be positive

    def features(self, counts: tuple[int, ...], n: int, rng: np.random.Generator) -> np.ndarray:
        """Draws (n, P, 3K) in feature space."""
        group = self.groups[counts]
        mean = group.mean(axis=0)
        noise = rng.standard_normal((n, *mean.shape)) @ self.root.T
        moved = group[rng.integers(len(group), size=n)] + self.bandwidth * noise
        return mean + (moved - mean) / np.sqrt(1 + self.bandwidth**2)

    def propose(self, counts: tuple[int, ...], n: int, rng: np.random.Generator) -> np.ndarray:
        """Masks (n, P, K, 3)."""
        features = self.features(counts, n, rng)
        return _fractions(features.reshape(*features.shape[:2], -1, 3))

    def complete(self, lesions: Sequence[Lesion], count: int, rng: np.random.Generator) -> list[Lesion]:
        """As in `Statistics`; with several labels the missing ones follow the given ones of their part."""
        if len(self.labels) == 1:
            return super().complete(lesions, count, rng)
        given = table_of(lesions, self.labels)
        asked = (~np.isnan(given[..., 0])).sum(axis=0)
        fitting = [counts for counts in self.counts if sum(counts) == count and (asked <= counts).all()]
        if not fitting:
            raise self._unseen(count)
        counts = fitting[rng.integers(len(fitting))]
        given = np.pad(given, ((0, max(counts) - len(given)), (0, 0), (0, 0)), constant_values=np.nan)
        wanted = _features(given).reshape(len(given), -1)
        covariance = self.root @ self.root.T

        # Matheron's rule: a joint draw, corrected by what its given part lacks.
        features = self.features(counts, self.max_tries, rng)
        for j, known in enumerate(~np.isnan(wanted)):
            gain = covariance[:, known] @ np.linalg.pinv(covariance[np.ix_(known, known)], rcond=1e-6)
            features[:, j] += (wanted[j, known] - features[:, j, known]) @ gain.T
        tables = _fractions(features.reshape(-1, *given.shape))
        return lesions_in(self.first_valid(np.where(np.isnan(given), tables, given)), self.labels)


def size_regressor(yx: np.ndarray, sizes: np.ndarray, theta: Sequence[float] | None = None) -> Any:
    """The reference's Gaussian process, size from place; given ``theta`` (logs of constant and length) as it is."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    kernel = ConstantKernel(1.0, (1e-4, 10.0)) * RBF(10.0, (1e-4, 10.0))
    if theta is not None:
        fixed = kernel.clone_with_theta(np.asarray(theta))
        return GaussianProcessRegressor(fixed, alpha=0.01, optimizer=None).fit(yx, sizes)
    return GaussianProcessRegressor(kernel, alpha=0.01, n_restarts_optimizer=10, random_state=42).fit(yx, sizes)


@dataclass
class GaussianProcessKDE(Statistics):
    """The published model of one label: places by a kernel density, sizes by a Gaussian process of the place.

    Kept for comparison. It draws lesions one by one, and their sizes vary by only 0.64 of what polyps do. The counts
    and rules are ours: the publication draws one or two lesions and redraws without end.
    """

    def learn(self, fitted: Mapping[str, Any]) -> None:
        """Fit on 90 % of the lesions; the mean error on the others is the spread of the sizes."""
        from sklearn.model_selection import train_test_split

        if len(self.labels) > 1:
            raise CaseError(f"GaussianProcessKDE models one label, got {self.labels}: use ShrunkKDE")
        rows = np.array([(lesion.size, lesion.y, lesion.x) for mask in self.masks for lesion in mask])
        sizes, yx = rows[:, 0], rows[:, 1:]
        try:
            self.places = stats.gaussian_kde(yx.T)  # Scott's bandwidth
        except (ValueError, np.linalg.LinAlgError) as error:
            message = f"GaussianProcessKDE needs 3 or more lesions in different places, got {len(rows)}: use ShrunkKDE"
            raise CaseError(message) from error
        if fitted:
            self.train, self.error = list(fitted["train"]), float(fitted["error"])
            self.regressor = size_regressor(yx[self.train], sizes[self.train], fitted["theta"])
            return
        train, test = train_test_split(np.arange(len(rows)), test_size=0.1, random_state=42)
        self.train = train.tolist()
        self.regressor = size_regressor(yx[train], sizes[train])
        self.error = float(abs(self.regressor.predict(yx[test]) - sizes[test]).mean())

    def fitted(self) -> dict[str, Any]:
        """Kernel, error, and which lesions were trained on."""
        return {"theta": self.regressor.kernel_.theta.tolist(), "error": self.error, "train": self.train}

    def propose(self, counts: tuple[int, ...], n: int, rng: np.random.Generator) -> np.ndarray:
        """The reference's own draws (n, P, 1, 3), some of them outside the frame."""
        yx = self.places.resample(n * counts[0], seed=rng).T
        sizes = self.regressor.predict(yx) + rng.uniform(-self.error, self.error, len(yx))
        return np.column_stack([sizes.clip(0), yx[:, ::-1]]).reshape(n, counts[0], 1, 3)


def save_statistics(model: Statistics, path: PathLike) -> None:
    """Write a fitted model as JSON."""
    content = {
        "kind": KIND,
        "model": type(model).__name__,
        "labels": model.labels,
        "parameters": {field.name: getattr(model, field.name) for field in fields(model)},
        "report": report(model),
        "empty": model.empty,
        "fitted": model.fitted(),
        "masks": [[asdict(lesion) for lesion in mask] for mask in model.masks],
    }
    write_json(path, content)


def load_statistics(path: PathLike) -> Statistics:
    """Read what `save_statistics` wrote; nothing is fitted anew."""
    if Path(path).suffix.lower() == ".csv":
        raise CaseError(f"{path} is a table, not fitted statistics: give rows by --dataset_dir")
    content = _read_json(path, "train.json writes it; or give --dataset_dir")
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CaseError(f"{path} holds no {KIND}: give the file that train.json wrote; rows go to --dataset_dir")
    models = {model.__name__: model for model in Statistics.__subclasses__()}
    try:
        model = models[content["model"]](**content["parameters"])
        masks = [[Lesion(**lesion) for lesion in mask] for mask in content["masks"]] + [[]] * content["empty"]
        return model.restore(masks, content["labels"], content["fitted"])
    except (KeyError, TypeError, ValueError) as error:
        raise CaseError(f"{path} is damaged ({type(error).__name__}: {error}): fit the statistics anew") from error


def _read_json(path: PathLike, hint: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CaseError(f"cannot read {path} ({error.strerror}): {hint}") from error
    except ValueError as error:
        raise CaseError(f"{path} is not valid JSON ({error}): {hint}") from error


def fit_statistics(
    lesions: Sequence[Sequence[Lesion]], model: Statistics, labels: Sequence[int], path: PathLike
) -> Statistics:
    """Fit a model to measured masks, write it to ``path`` and its picture beside it; returns the model."""
    model.fit(lesions, labels)
    save_statistics(model, path)
    plot(model, Path(path).with_suffix(".png"))
    logger.info(f"statistics of {len(model.masks)} masks written to {path}")
    return model


def _correlation(rows: np.ndarray) -> list[list[float | None]]:
    covariance = _covariance(rows)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    matrix = np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0).clip(-1, 1)
    return [[None if np.isnan(v) else round(v, 4) for v in row] for row in matrix.tolist()]


def report(model: Statistics) -> dict[str, Any]:
    """What the masks are like, in numbers that JSON holds; correlations are null where nothing varies."""
    parts = np.concatenate(model.tables)
    names = [f"{name}_{k}" if len(model.labels) > 1 else name for k in model.labels for name in ("size", "x", "y")]
    rows = parts.reshape(len(parts), -1)
    to_centre = np.linalg.norm(parts[..., 1:] - 0.5, axis=-1)
    central = [np.column_stack(pair) for pair in zip(parts[..., 0].T, to_centre.T)]
    levels = [0, 5, 25, 50, 75, 95, 100]
    return {
        "masks": len(model.masks),
        "empty": model.empty,
        "counts": {"+".join(map(str, counts)): n for counts, n in sorted(Counter(model.counts).items())},
        "percentiles": {
            name: {str(q): round(float(np.nanpercentile(column, q)), 6) for q in levels}
            for name, column in zip(names, rows.T)
            if not np.isnan(column).all()
        },
        "columns": names,
        "pearson": _correlation(rows),
        "spearman": _correlation(_ranks(rows)),
        "spearman_size_to_centre": [_correlation(_ranks(pair))[0][1] for pair in central],
    }


def _ranks(rows: np.ndarray) -> np.ndarray:
    return np.asarray(stats.rankdata(rows, axis=0, nan_policy="omit"))


def plot(model: Statistics, path: PathLike, n: int = 1000, seed: int = 0) -> None:
    """Write a picture of the masks against ``n`` drawn ones: places and sizes, how each varies, how many there are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = {"masks": model.masks, "drawn": model.draw(n, np.random.default_rng(seed))}
    present = {lesion.label for mask in model.masks for lesion in mask}
    colours = {label: f"C{i % 10}" for i, label in enumerate(model.labels) if label in present}
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    frame = {"xlim": (0, 1), "ylim": (1, 0), "xlabel": "x", "ylabel": "y", "aspect": "equal"}
    # As many drawn masks as there are others, for clouds of equal density.
    for axis, (name, masks) in zip(axes[0], sets.items()):
        shown = [lesion for mask in masks[: len(model.masks)] for lesion in mask]
        for label, colour in colours.items():
            points = [(a.x, a.y, 1000 * a.size) for a in shown if a.label == label]
            axis.scatter(*np.reshape(points, (-1, 3)).T, alpha=0.35, color=colour, linewidths=0, label=f"label {label}")
        axis.set(title=f"{name}: {len(shown)} lesions, area as size", **frame)
    if len(colours) > 1:
        axes[0, 0].legend(fontsize="small")
    for axis, column in zip(axes[1], ("size", "x", "y")):
        values = {name: [(a.label, getattr(a, column)) for m in masks for a in m] for name, masks in sets.items()}
        every = [value for pairs in values.values() for _, value in pairs]
        bins = np.linspace(max(0, min(every) - 0.01), min(1, max(every) + 0.01), 30)
        for name, style in (("masks", {"alpha": 0.35}), ("drawn", {"histtype": "step", "linewidth": 1.5})):
            for label, colour in colours.items():
                of_label = [value for k, value in values[name] if k == label]
                axis.hist(of_label, bins, density=True, color=colour, label=name, **style)
        axis.set(xlabel=column, ylabel="density", xlim=bins[[0, -1]])
    handles = axes[1, 0].get_legend_handles_labels()[0]
    axes[1, 0].legend(handles[:: len(colours)], sets)
    totals = sorted({len(mask) for masks in sets.values() for mask in masks})
    for shift, grey, (name, masks) in zip((-0.2, 0.2), ("0.8", "0.5"), sets.items()):
        shares = [sum(len(mask) == total for mask in masks) / len(masks) for total in totals]
        bars = axes[0, 2].bar(np.arange(len(totals)) + shift, shares, 0.4, color=grey, label=name)
        axes[0, 2].bar_label(bars, [f"{share:.0%}" for share in shares], fontsize="small")
    ticks = {"xticks": range(len(totals)), "xticklabels": totals, "xlim": (-1, len(totals))}
    axes[0, 2].set(title="lesions in a mask", ylabel="share", ylim=(0, 1.1), **ticks)
    axes[0, 2].legend()
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def list_requests(
    statistics: PathLike,
    requests: PathLike | None = None,
    num_samples: int = 1,
    count: int | None = None,
    seed: int = 0,
    labels: Sequence[int] = (1,),
    min_size: float = 0.0,
) -> list[Case]:
    """List the masks to synthesise: drawn from fitted statistics, or asked for in a table.

    Args:
        statistics: file of `save_statistics`; opened only if something is to be drawn.
        requests: CSV with the columns size, x, y and if wanted count, label, mask; or JSON, a list of such objects, or
            of masks ``{"name": ..., "count": ..., "lesions": [{"size": ..., "x": ..., "y": ...}]}``, which may stand
            under ``"masks"``. Rows that share a ``mask`` make one mask; where ``count`` asks for more lesions than are
            given, they are drawn.
        num_samples: how many masks to draw; not used with requests.
        count: lesions in each mask, where the request does not say.
        seed: the run's seed. Mask i depends on (seed, i) alone.
        labels: the label values that are expected.
        min_size: fraction of the image below which nothing counts as a lesion, so that nothing is asked for.

    Returns:
        cases ``{"name": str, "seed": int, "lesions": [{"size", "x", "y", "label"}]}``; a bad request has an ``error``.
    """

    @functools.cache
    def model() -> Statistics:
        fit = load_statistics(statistics)
        if fit.labels != list(labels):
            raise CaseError(f"{statistics} was fitted to labels {fit.labels}, expected {list(labels)}: fit it anew")
        return fit

    def case(name: str, lesions: Sequence[Lesion]) -> Case:
        return {"name": name, "seed": case_seed(seed, name), "lesions": [asdict(lesion) for lesion in lesions]}

    sources = (np.random.default_rng([seed, i]) for i in itertools.count())
    if requests is None:
        return [case(f"mask_{i:04d}", model().draw(1, next(sources), count)[0]) for i in range(num_samples)]
    cases: dict[str, Case] = {}
    for i, ((name, rows), rng) in enumerate(zip(_read_requests(requests), sources)):
        name, problem = name or f"mask_{i:04d}", ""
        if name in cases or not re.fullmatch(r"\w[\w .+-]{0,99}", name):
            problem = f"name {name!r} is taken or cannot name a file: choose another of letters, digits, _ and -"
            name = f"mask_{i:04d}_refused"
        try:
            if problem:
                raise CaseError(f"{requests}, row {rows[0][0]}: {problem}")
            lesions, wanted = _asked(str(requests), rows, labels, min_size)
            wanted = wanted or count or len(lesions)
            if wanted != len(lesions):
                try:
                    lesions = model().complete(lesions, wanted, rng)
                except CaseError as error:
                    raise CaseError(f"{requests}, row {rows[0][0]}: {error}") from error
            cases[name] = case(name, lesions)
        except CaseError as error:
            cases[name] = {**case(name, []), "error": str(error)}
    return list(cases.values())


Row = tuple[int, dict]


def _read_requests(path: PathLike) -> list[tuple[str, list[Row]]]:
    """Masks of a file, each with its name or "", and its rows numbered as in the file (a table's header is row 1)."""
    wanted = "expected a table with the header size,x,y (if wanted count,label,mask), or JSON: a list of such objects"
    if Path(path).suffix.lower() == ".json":
        content = _read_json(path, wanted)
        masks = content.get("masks") if isinstance(content, dict) else content
        if masks and isinstance(masks, list) and (masks is not content or "lesions" in _dicts(masks)[0]):
            return [
                (str(m.get("name") or ""), [(i, {"count": m.get("count"), **a}) for a in _dicts(m.get("lesions"))])
                for i, m in enumerate(_dicts(masks), 1)
            ]
        rows = list(enumerate(_dicts(content), 1)) if content and isinstance(content, list) else []
    else:
        rows = _read_table(path, wanted)
    if not rows:
        raise CaseError(f"{path} asks for no mask: {wanted}")
    groups: dict[str | int, tuple[str, list[Row]]] = {}
    for row, values in rows:
        name = str(values.get("mask") or values.get("name") or "").strip()
        groups.setdefault(name or row, (name, []))[1].append((row, values))
    return list(groups.values())


def _dicts(items: Any) -> list[dict]:
    """What should be a list of objects, as such; whatever is not lacks all it should have."""
    return [item if isinstance(item, dict) else {} for item in items] if items and isinstance(items, list) else [{}]


def _read_table(path: PathLike, wanted: str) -> list[Row]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames or []]
            if not {"size", "x", "y"} <= set(reader.fieldnames):
                raise CaseError(f"{path} has the header {','.join(reader.fieldnames) or 'of an empty file'}: {wanted}")
            return [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise CaseError(f"cannot read {path} ({error.strerror}): {wanted}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CaseError(f"{path} is not a text table ({error}): {wanted}") from error


def _asked(path: str, rows: Sequence[Row], labels: Sequence[int], min_size: float) -> tuple[list[Lesion], int]:
    """The lesions that the rows of one mask give, and the count they ask for, 0 if none."""
    lesions, counts = [], set()
    for row, values in rows:
        try:
            if None in values:
                raise ValueError("it has more values than the header")
            if len(labels) == 1 and values.get("label") in (None, ""):
                values = {**values, "label": labels[0]}
            size, x, y, label = (_number(values, key) for key in ("size", "x", "y", "label"))
            if label not in labels:
                raise ValueError(f"label {label:g} is unknown, expected one of {list(labels)}")
            lesions.append(Lesion(size, x, y, int(label)))
            if size < min_size:
                raise ValueError(f"size {size:g} is below min_size, {min_size:.4g} of the image, and would not count")
            if values.get("count") not in (None, ""):
                counts.add(_number(values, "count"))
        except ValueError as error:
            raise CaseError(f"{path}, row {row}: {error}") from error
    if len(counts) > 1 or not all(n % 1 == 0 and n >= len(lesions) for n in counts):
        found = " and ".join(f"{n:g}" for n in sorted(counts))
        expected = f"expected one whole number, at least the {len(lesions)} lesions given"
        raise CaseError(f"{path}, row {rows[0][0]}: count {found}: {expected}")
    return lesions, int(max(counts, default=0))


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if value is None or value == "":
        raise ValueError(f"{key} is missing")
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{key} {value!r} is not a number")
