"""Is the anatomy as the report says, and as in real patients? Organs measured in label maps, and reports read off them.

What "enlarged" or "in the sigmoid colon" means is learned from real label maps with their reports, so the same reader
judges any cohort that has both. `volume_evaluation` makes a report of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage, stats

from .reports import SITES, Attributes, Finding

Measured = Mapping[str, Mapping[str, Any]]
"""Organ -> what `measure_organs` says of it."""

Row = dict[str, Any]
"""One attribute: {"attribute", "kind", "asked", "found", "right"}; right is None where it cannot be judged."""

CANCER = "colorectal_cancer"
KIDNEYS = {"kidney_right": "kidney_left", "kidney_left": "kidney_right"}
KINDS = ("normal", "absence", "size", "side", "tumour presence", "site", "tumour size")

LEAST = 0.1  # an organ of less than so much of the smallest ones that are seen counts as absent
SIZE_TOLERANCE = (1.0, 0.25)  # of a tumour: cm, or share of what was asked, the larger of both
SITE_SPREAD = 0.02  # of the body: sites are not told apart more sharply than that


# ---------------------------------------------------------------------------------------------------------- measuring


def checked(labels: ArrayLike, names: Sequence[str]) -> np.ndarray:
    """A label map as whole numbers, all of them names."""
    values = np.asarray(labels)
    strange = np.setdiff1d(values, np.arange(len(names)))
    if strange.size:
        found = ", ".join(f"{value:g}" for value in strange[:8])
        raise ValueError(
            f"the label map holds {found}, {len(names)} labels have names (0 .. {len(names) - 1}): "
            "bring its numbers to these labels first (totalsegmentator.MapOrgansd)"
        )
    return values.astype(np.int32)


def pieces(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of a mask (*S), corner contact joins: their numbers (*S), and voxels from number 0 on."""
    numbered, _ = ndimage.label(mask, np.ones((3,) * mask.ndim))
    return numbered, np.bincount(numbered.ravel())


def find_bounds(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First voxel and size, per axis, of the box around the largest piece of a mask; stray voxels do not move it."""
    numbered, voxels = pieces(mask)
    if len(voxels) < 2:
        return np.zeros(mask.ndim), np.ones(mask.ndim)
    box = ndimage.find_objects(numbered)[voxels[1:].argmax()]
    return np.array([s.start for s in box]), np.array([s.stop - s.start for s in box])


def measure_organs(labels: ArrayLike, affine: ArrayLike, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measure every organ of a label map.

    Args:
        labels: label map (X, Y, Z) in RAS orientation, values are indices into ``names``.
        affine: voxel to world matrix (4, 4), mm.
        names: of the labels, background first.

    Returns:
        Of each organ: ``volume_ml``; ``centre``, that of its voxels as a fraction of the body's box (3,), the body
        being whatever has a label; ``components``; ``largest_share``, the largest component's share of the organ;
        ``largest_centre`` and ``diameter_cm`` of that component, the diameter being that of a ball of its volume. An
        absent organ has volume, components and diameter 0, the rest is NaN.
    """
    labels = checked(labels, names)
    if labels.ndim != 3:
        raise ValueError(f"expected a label map (X, Y, Z), got {labels.shape}: index away batch and channel")
    voxel_ml = abs(float(np.linalg.det(np.asarray(affine, dtype=float)[:3, :3]))) / 1000
    start, size = find_bounds(labels > 0)
    boxes = ndimage.find_objects(labels, max_label=len(names) - 1)
    result = {}
    for value, (name, box) in enumerate(zip(names[1:], boxes, strict=True), 1):
        if box is None:
            nowhere = [math.nan] * 3
            result[name] = {"volume_ml": 0.0, "centre": nowhere, "components": 0, "largest_share": math.nan}
            result[name] |= {"largest_centre": nowhere, "diameter_cm": 0.0}
            continue
        numbered, voxels = pieces(labels[box] == value)
        largest, total = 1 + int(voxels[1:].argmax()), int(voxels[1:].sum())
        corner = np.array([s.start for s in box]) + 0.5 - start  # half: a voxel's middle
        centre, of_largest = (
            ((corner + ndimage.center_of_mass(mask)) / size).tolist() for mask in (numbered > 0, numbered == largest)
        )
        result[name] = {
            "volume_ml": total * voxel_ml,
            "centre": centre,
            "components": len(voxels) - 1,
            "largest_share": float(voxels[largest] / total),
            "largest_centre": of_largest,
            "diameter_cm": float(np.cbrt(6 * voxels[largest] * voxel_ml / np.pi)),
        }
    return result


def measure_coverage(labels: ArrayLike, names: Sequence[str]) -> dict[str, float]:
    """Share of all voxels that each label has, background included."""
    values = checked(labels, names).ravel()
    shares = np.bincount(values, minlength=len(names)) / values.size
    return {name: float(share) for name, share in zip(names, shares, strict=True)}


def slice_jumps(volume: ArrayLike, layout: ArrayLike) -> dict[str, float]:
    """How far neighbouring slices are apart, inside the body: seams show as a large "mean".

    Args:
        volume: HU (X, Y, Z), slices along Z.
        layout: label map (X, Y, Z); inside is where both slices have a label.

    Returns:
        Mean over pairs of slices of ``voxel``, the mean absolute difference of voxels (noise and anatomy as well); and
        of ``mean``, the absolute difference of the slices' means (brightness). NaN without such a pair.
    """
    volume, layout = np.asarray(volume, dtype=np.float32), np.asarray(layout)
    if volume.ndim != 3 or volume.shape != layout.shape:
        raise ValueError(f"expected two volumes (X, Y, Z) of one shape, got {volume.shape} and {layout.shape}")
    jumps = []
    for z in range(1, volume.shape[2]):
        inside = (layout[..., z] > 0) & (layout[..., z - 1] > 0)
        if inside.any():
            step = (volume[..., z] - volume[..., z - 1])[inside]
            jumps.append((float(np.abs(step).mean()), abs(float(step.mean()))))
    voxel, mean = np.mean(jumps, axis=0) if jumps else (math.nan, math.nan)
    return {"voxel": float(voxel), "mean": float(mean)}


# ------------------------------------------------------------------------------------------------- reports, read off


def said(attributes: Attributes) -> dict[str, str]:
    """State of each noun that a report names; if it says several, what is unusual counts."""
    states: dict[str, str] = {}
    for finding in attributes.findings:
        if states.get(finding.what, "present") == "present":
            states[finding.what] = finding.state
    return states


def asked_tumour(attributes: Attributes) -> Finding | None:
    """The tumour that a report speaks of: of several the largest, or the first."""
    tumours = [finding for finding in attributes.findings if finding.what == "tumour"]
    return max(tumours, key=lambda f: (f.state != "absent", f.size_cm or 0.0), default=None)


class AttributeReader:
    """Tells from measured organs what a report would say of them, as it has learned from real cases.

    An organ is absent below `LEAST` of the smallest ones seen, else in the state whose mean log volume is nearest. A
    size that was reported of other organs only is taken to change this one as it changes those; not so for organs of
    which no size is ever reported. A tumour's site is the one whose mean place is nearest, its size the diameter times
    the usual ratio.
    """

    def __init__(self) -> None:
        self.least: dict[str, float] = {}  # ml
        self.states: dict[str, dict[str, float]] = {}
        self.sites: dict[str, np.ndarray] = {}
        self.spread = np.ones(3)
        self.ratio = 1.0  # of reported to measured diameter

    def fit(self, measured: Sequence[Measured], attributes: Sequence[Attributes]) -> Self:
        """Learn from real cases, by their measured organs and what their reports say; returns itself."""
        if not measured or len(measured) != len(attributes):
            raise ValueError(f"needs as many reports as measured cases, got {len(attributes)} and {len(measured)}")
        for organ in measured[0]:
            self.learn_states(organ, [case[organ]["volume_ml"] for case in measured], [said(a) for a in attributes])
        self.borrow_states()
        if CANCER in measured[0]:
            tumours = [asked_tumour(a) for a in attributes]
            self.learn_tumours([(m[CANCER], t) for m, t in zip(measured, tumours, strict=True) if t is not None])
        return self

    def learn_states(self, organ: str, volumes: Sequence[float], reports: Sequence[Mapping[str, str]]) -> None:
        """Volumes of one organ by what is said of it; what is not named is usual."""
        name = "tumour" if organ == CANCER else organ
        seen: dict[str, list[float]] = {}
        for volume, states in zip(volumes, reports, strict=True):
            if volume > 0 and states.get(name) != "absent":
                seen.setdefault(states.get(name, "present"), []).append(volume)
        if seen:
            # Not the very smallest: an organ may be cut off at the end of a scan.
            self.least[organ] = LEAST * float(np.percentile(np.concatenate(list(seen.values())), 5))
            self.states[organ] = {state: float(np.log(some).mean()) for state, some in seen.items()}

    def borrow_states(self) -> None:
        """Sizes that were seen of some organs only, for the others that vary in size."""
        varying = [known for known in self.states.values() if "present" in known and len(known) > 1]
        for state in ("small", "enlarged"):
            steps = [known[state] - known["present"] for known in varying if state in known]
            for known in varying if steps else ():
                known.setdefault(state, known["present"] + float(np.median(steps)))

    def learn_tumours(self, tumours: Sequence[tuple[Mapping[str, Any], Finding]]) -> None:
        """Mean place of each site, how far tumours of a site lie apart, and what their size is as reported."""
        tumours = [(found, finding) for found, finding in tumours if found["components"] and finding.state != "absent"]
        places: dict[str, list[Any]] = {}
        for found, finding in tumours:
            if finding.where in SITES:
                places.setdefault(finding.where, []).append(found["largest_centre"])
        self.sites = {site: np.mean(centres, axis=0) for site, centres in places.items()}
        if places:
            apart = np.concatenate([np.asarray(centres) - self.sites[site] for site, centres in places.items()])
            self.spread = np.maximum(apart.std(axis=0), SITE_SPREAD)
        ratios = [finding.size_cm / found["diameter_cm"] for found, finding in tumours if finding.size_cm]
        self.ratio = float(np.median(ratios)) if ratios else 1.0

    def read(self, measured: Measured) -> Attributes:
        """What a report would say: a state of every organ that is known, the tumour with site and size."""
        findings = []
        for organ in self.states:
            state = self.state(organ, measured[organ]["volume_ml"])
            if organ != CANCER:
                findings.append(Finding(organ, state))
            elif state == "absent":
                findings.append(Finding("tumour", state))
            else:
                diameter = round(self.ratio * measured[organ]["diameter_cm"], 1)
                findings.append(Finding("tumour", "present", self.site(measured[organ]["largest_centre"]), diameter))
        return Attributes(tuple(findings))

    def state(self, organ: str, volume_ml: float) -> str:
        """State of an organ by its volume."""
        if volume_ml <= self.least[organ]:
            return "absent"
        return min(self.states[organ], key=lambda state: abs(self.states[organ][state] - math.log(volume_ml)))

    def site(self, centre: ArrayLike) -> str:
        """Site of a tumour by its place, "" if none is known."""
        far = {site: np.sum(((np.asarray(centre) - place) / self.spread) ** 2) for site, place in self.sites.items()}
        return min(far, key=far.__getitem__, default="")

    def judges(self, finding: Finding) -> bool:
        """Whether the state that a report asks of an organ, or of the tumour, can be read."""
        organ = CANCER if finding.what == "tumour" else finding.what
        return organ in self.states and (finding.state == "absent" or finding.state in self.states[organ])


def attribute_accuracy(asked: Attributes, reader: AttributeReader, measured: Measured) -> list[Row]:
    """Judge each attribute that a report asks for.

    Kinds: "normal" (an organ is named and usual), "absence" and "size" of an organ; "side" of an unusual kidney, right
    if both kidneys are as asked; "tumour presence", "site" and "tumour size", the latter right within
    `SIZE_TOLERANCE`. Nouns that no label shows, and sizes and sites that the reader never saw, cannot be judged.

    Args:
        asked: what the report says.
        reader: fitted to real cases.
        measured: the synthetic case.
    """
    found = reader.read(measured)
    states, wanted = said(found), said(asked)
    rows = []
    for what, state in wanted.items():
        if what == "tumour":
            continue
        answer = states.get(what) if reader.judges(Finding(what, state)) else None
        kind = {"present": "normal", "absent": "absence"}.get(state, "size")
        right = None if answer is None else answer == state
        if what in KIDNEYS and kind != "normal":
            kind, other = "side", KIDNEYS[what]
            if right is not None and other in states:
                right = right and states[other] == wanted.get(other, "present")
                answer = f"{answer}, {other} {states[other]}"
        rows.append(_row(f"{what} {state}", kind, state, answer, right))
    tumour, seen = asked_tumour(asked), asked_tumour(found)
    return rows if tumour is None else rows + _tumour_rows(tumour, seen, reader)


def _tumour_rows(asked: Finding, found: Finding | None, reader: AttributeReader) -> list[Row]:
    """What is asked of the tumour; where there is none, site and size are wrong."""
    if found is None:
        return [_row(f"tumour {asked.state}", "tumour presence", asked.state, None, None)]
    state = "absent" if asked.state == "absent" else "present"
    rows = [_row(f"tumour {state}", "tumour presence", state, found.state, found.state == state)]
    if state == "absent":
        return rows
    if asked.where:
        known = asked.where in reader.sites
        right = found.where == asked.where if known else None
        rows.append(_row(f"tumour in {asked.where}", "site", asked.where, found.where if known else None, right))
    if asked.size_cm:
        size, (least, share) = found.size_cm or 0.0, SIZE_TOLERANCE
        right = abs(size - asked.size_cm) <= max(least, share * asked.size_cm)
        rows.append(_row(f"tumour {asked.size_cm:g} cm", "tumour size", asked.size_cm, size, right))
    return rows


def _row(attribute: str, kind: str, asked: Any, found: Any, right: bool | None) -> Row:
    return {"attribute": attribute, "kind": kind, "asked": asked, "found": found, "right": right}


def accuracy_table(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """How many attributes are right, of how many judged: overall, of each kind that is there, and of what is unusual.

    "unusual" is all but "normal": what a cohort that ignores its reports gets right by chance is mostly normal.
    """
    result = {}
    for kind in ("overall", "unusual", *KINDS):
        kinds = {"overall": KINDS, "unusual": KINDS[1:]}.get(kind, (kind,))
        of_kind = [row["right"] for row in rows if row["kind"] in kinds]
        judged = [right for right in of_kind if right is not None]
        if of_kind or kind == "overall":
            result[kind] = {
                "accuracy": sum(judged) / len(judged) if judged else math.nan,
                "right": sum(judged),
                "judged": len(judged),
                "not_judged": len(of_kind) - len(judged),
            }
    return result


# ------------------------------------------------------------------------------------------------------ two cohorts


def volume_statistics_agreement(real: Sequence[Measured], synthetic: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Do organs of two cohorts have the same volumes and places?

    Returns:
        Of each organ: the share of cases that have it, ``occurrence_real`` and ``occurrence_synthetic``; of those
        cases the ``volume_ratio`` of mean volumes, synthetic to real; Wasserstein distances of log volumes and of
        centres (mean over axes), ``volume_distance`` and ``centre_distance``, over the real standard deviation: 0 is
        equal, 1 is as far off as a real patient is from the mean. NaN where a cohort lacks the organ or does not vary.
    """
    if not real or not synthetic:
        raise ValueError(f"nothing to compare: {len(real)} real and {len(synthetic)} synthetic cases")
    result = {}
    for organ in real[0]:
        r, s = ([case[organ] for case in cases if case[organ]["volume_ml"] > 0] for cases in (real, synthetic))
        row = {"occurrence_real": len(r) / len(real), "occurrence_synthetic": len(s) / len(synthetic)}
        row |= dict.fromkeys(("volume_ratio", "volume_distance", "centre_distance"), math.nan)
        if r and s:
            x, y = (np.array([case["volume_ml"] for case in cases]) for cases in (r, s))
            a, b = (np.array([case["centre"] for case in cases]) for cases in (r, s))
            row["volume_ratio"] = float(y.mean() / x.mean())
            row["volume_distance"] = _distance(np.log(x), np.log(y))
            row["centre_distance"] = float(np.mean([_distance(a[:, i], b[:, i]) for i in range(a.shape[1])]))
        result[organ] = row
    return result


def _distance(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Wasserstein distance over the real spread; NaN without any."""
    spread = float(real.std())
    return float(stats.wasserstein_distance(real, synthetic)) / spread if spread > 1e-9 else math.nan


def coverage_agreement(first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each label, the smaller of two cohorts' mean `measure_coverage` over the larger; NaN where neither has it."""
    if not first or not second:
        raise ValueError(f"nothing to compare: {len(first)} and {len(second)} cases")
    result = {}
    for name in first[0]:
        low, high = sorted(float(np.mean([case[name] for case in cases])) for cases in (first, second))
        result[name] = low / high if high else math.nan
    return result
