"""Reports of lesions: read, checked, completed, and turned into what LesionDiffusion's networks are told.

A report comes from the user's JSON, from `RuleReportWriter`, which draws what is not said so that it fits together, or
from a language model (`common/llm.py`). Its words are those of `common/lesion_words.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft7Validator

from .io import CaseError, read_text
from .lesion_words import (
    ATTRIBUTES,
    CAVITY,
    DENSITY,
    ENHANCEMENT,
    FEATURES,
    INSIDE,
    KEYS,
    LESION_KINDS,
    LESS,
    LUMEN,
    LUNGS,
    MARGIN,
    MORE,
    NEIGHBOURS,
    NOTHING,
    ORGAN_NAMES,
    OUTWARD,
    SHAPE,
    UNFILLED,
    VALUE,
    VARIATIONS,
    VOCABULARY,
    WALL,
    Kind,
    canonical,
    cavities_of,
    hu_range,
    is_hollow,
    kinds_of,
    lesion_kind,
    near,
    organ_id,
    organ_ids,
    organ_name,
    site_of,
    tell_once,
)

Size = tuple[float, float, float]
LARGEST = 1.2  # of the organ's extent: a lesion may bulge out of it
MASK_KEYS = (ENHANCEMENT, SHAPE, MARGIN, NEIGHBOURS, FEATURES, CAVITY)
IMAGE_KEYS = (ENHANCEMENT, SHAPE, DENSITY, VARIATIONS, VALUE, MARGIN, NEIGHBOURS, FEATURES)

# ---------------------------------------------------------------------------------------------------------------------
# The report


@dataclass(frozen=True)
class LesionReport:
    """What is said of one lesion.

    Attributes:
        organ: name of an organ of version 1 with blanks, "liver", "kidney left".
        lesion: canonical kind, "liver tumor", or any words; "" is not said.
        attributes: names of ``ATTRIBUTES`` -> canonical value without a comma at its end; "CT value": "57 HU".
        size_mm: along L-R, A-P, S-I (x, y, z).
        location: words for the place inside the organ.
        source: who wrote it: "user", "rules", "llm" or "reference".
        organs: all affected organs; () is the organ alone.
    """

    organ: str
    lesion: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    size_mm: Size | None = None
    location: str = ""
    source: str = "user"
    organs: tuple[str, ...] = ()


def _words_of(key: str) -> str:
    return "; ".join(row[0] for row in VOCABULARY[key])


def _attribute(key: str) -> dict[str, Any]:
    if key == VALUE:
        return {"type": ["string", "number"], "description": 'mean of the lesion in Hounsfield units, e.g. "57 HU"'}
    several = " (several with commas between them)" if key in (SHAPE, FEATURES) else ""
    return {"type": "string", "description": f"one of{several}: {_words_of(key)}"}


_NUMBERS = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 3, "maxItems": 3}
SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Lesions to draw into a CT",
    "type": "object",
    "required": ["lesions"],
    "additionalProperties": False,
    "properties": {
        "lesions": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["organ"],
                "additionalProperties": False,
                "properties": {
                    "organ": {"type": "string", "minLength": 1, "description": "TotalSegmentator's name or an alias"},
                    "lesion": {"type": "string", "description": f"e.g. {', '.join(LESION_KINDS)}"},
                    "attributes": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {key: _attribute(key) for key in ATTRIBUTES},
                    },
                    "size_mm": {**_NUMBERS, "description": "along left-right, front-back, feet-head"},
                    "location": {"type": "string", "description": "place inside the organ, e.g. upper posterior"},
                    "source": {"enum": ["user", "rules", "llm", "reference"]},
                    "organs": {"type": "array", "items": {"type": "string"}, "description": "all affected organs"},
                },
            },
        }
    },
}
_VALIDATOR = Draft7Validator(SCHEMA)


def read_reports(content: Mapping | str | os.PathLike, name: str = "") -> list[LesionReport]:
    """Read the reports of a case.

    Args:
        content: ours (``SCHEMA``; one lesion may stand alone, without the list), or the reference's
            ``{"<organ id>": [shape, "", {attributes}, [position, [[X, Y, Z]]]]}``, whose box is the size, in mm, and
            whose attribute "size" is not used: published ones do not fit. Or the path of a JSON file with either.
        name: of the file or case, for messages.

    Returns:
        one for each lesion. In the reference's form one for each organ; those that are equal become one in several
        organs, and lobes of lungs are affected together, as its networks see them.
    """
    if not isinstance(content, Mapping):
        name, content = name or str(content), _read_json(content)
    where = f"report {name}".rstrip()
    reports = read_strictly(content, where)
    for report in reports:
        for problem in unknown_values(report):
            tell_once(f"{where}: {report.organ}: {problem}; it is kept as it is")
    return reports


def read_strictly(content: Mapping, where: str) -> list[LesionReport]:
    """As `read_reports`, of a dict; nothing is said of words that are in no vocabulary."""
    if content and all(str(key).strip().isdigit() for key in content):
        return _from_reference(content, where)
    content = {"lesions": [content]} if "organ" in content and "lesions" not in content else content
    content = _usual_keys(content)
    problems = [_problem(error) for error in _VALIDATOR.iter_errors(content)]
    reports = []
    for number, entry in enumerate([] if problems else content["lesions"]):
        try:
            reports.append(_from_ours(entry, f"lesions[{number}]"))
        except CaseError as error:
            problems.append(str(error))
    if problems:
        raise CaseError(f"{where}: " + "; ".join(problems))
    return reports


def write_reports(reports: Iterable[LesionReport]) -> dict[str, Any]:
    """Plain JSON of ours, which `read_reports` reads back."""
    names = ("organ", "lesion", "attributes", "size_mm", "location", "source", "organs")
    rows = [{name: getattr(report, name) for name in names} for report in reports]
    plain = {"attributes": dict, "size_mm": list, "organs": list}
    return {"lesions": [{k: plain.get(k, str)(v) for k, v in row.items() if v} for row in rows]}


def described(reports: Sequence[LesionReport], overlap: Mapping[int, int]) -> LesionReport:
    """The report of a lesion that lies there, as the reference chooses: that of the organ it shares most voxels with.

    Args:
        reports: of the case.
        overlap: number of an organ -> voxels of the lesion in it.

    Returns:
        the report, in which that organ is ``organ``.
    """
    pairs = [(report, organ) for report in reports for organ in dict.fromkeys((report.organ, *report.organs))]
    own = [pair for pair in pairs if pair[0].organ == pair[1]]  # an entry of the lobe itself, where there is one
    report, organ = max([*own, *pairs], key=lambda pair: overlap.get(organ_id(pair[1]), 0))
    return replace(report, organ=organ)


def _read_json(path: Any) -> Mapping:
    if not isinstance(path, (str, os.PathLike)):
        raise CaseError(f"a report is a dict or a file's path, not a {type(path).__name__}")
    if not Path(path).is_file():
        raise CaseError(f"report {path} does not exist: give a JSON file, or the report itself as a dict")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise CaseError(
            f"report {path} is not valid JSON ({error}): correct it, or check it with a JSON editor"
        ) from None
    if not isinstance(content, Mapping):
        raise CaseError(f'report {path} holds a {type(content).__name__}, expected {{"lesions": [{{"organ": ...}}]}}')
    return content


def _usual_keys(content: Mapping) -> dict[str, Any]:
    """Attributes by their canonical names, in whatever case; and what is null is not said."""
    lesions = content.get("lesions")
    if not isinstance(lesions, list) or not all(isinstance(entry, Mapping) for entry in lesions):
        return dict(content)
    rows = [{key: value for key, value in entry.items() if value is not None} for entry in lesions]
    for row in rows:
        if isinstance(attributes := row.get("attributes"), Mapping):
            row["attributes"] = {_usual_key(str(k)): v for k, v in attributes.items() if v is not None}
    return {**content, "lesions": rows}


def _usual_key(key: str) -> str:
    text = " ".join(key.lower().replace("_", " ").split())
    return {name.lower(): name for name in ATTRIBUTES}.get(text) or KEYS.get(text, key)


def _problem(error: Any) -> str:
    """One line for the user: the field, what came, what is allowed."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        wrong = next(key for key in error.instance if key not in known)
        return f"{path}.{wrong}".lstrip(".") + f" is no field{near(wrong, known)}"
    return f"{path or 'it'}: {error.message[:200]}"


def _from_ours(entry: Mapping, path: str) -> LesionReport:
    try:
        own = organ_ids(entry["organ"])
        numbers = dict.fromkeys(number for name in entry.get("organs", []) for number in organ_ids(name))
        numbers = numbers if own[0] in numbers else dict.fromkeys([*own, *numbers])
        organ = organ_name(own[0])
        lesion = lesion_kind(entry.get("lesion", ""), organ)
    except CaseError as error:
        raise CaseError(f"{path}: {error}") from None
    attributes = {}
    for key, value in entry.get("attributes", {}).items():
        if text := canonical(key, value):
            attributes[key] = text
        elif key == VALUE and str(value).strip(" ,").lower() not in NOTHING:
            raise CaseError(f"{path}.attributes.{key}: {value!r:.60} is no CT value, expected e.g. '57 HU'")
    size = entry.get("size_mm")
    if size is not None and not all(map(math.isfinite, size)):
        raise CaseError(f"{path}.size_mm: {size} is not finite: give three lengths in mm")
    several = tuple(map(organ_name, numbers)) if len(numbers) > 1 else ()
    source, location = entry.get("source", "user"), " ".join(entry.get("location", "").split())
    triple = None if size is None else (float(size[0]), float(size[1]), float(size[2]))
    report = LesionReport(organ, lesion, _ordered(attributes), triple, location, source, several)
    try:
        cavity_of(report)
    except CaseError as error:
        raise CaseError(f"{path}.attributes.{error}") from None
    return report


def _from_reference(content: Mapping, where: str) -> list[LesionReport]:
    reports: list[LesionReport] = []
    for key, entry in content.items():
        organ = organ_name(int(key))
        if not isinstance(entry, Sequence) or len(entry) < 3 or not isinstance(entry[2], Mapping):
            raise CaseError(f"{where}: {key} is {entry!r:.80}, expected [shape, '', {{attributes}}, [position, box]]")
        said = {_usual_key(str(name)): value for name, value in entry[2].items()}
        attributes = {
            name: text for name, value in said.items() if name in ATTRIBUTES and (text := canonical(name, value))
        }
        size = _reference_size(entry[3], f"{where}: {key}[3]") if len(entry) > 3 else None
        if attributes.get(CAVITY) and attributes[CAVITY] not in cavities_of(organ):
            # The reference throws a report's cavity away, so a wrong one has harmed nobody so far.
            tell_once(f"{where}: {key}.{CAVITY} {attributes.pop(CAVITY)!r} does not fit {organ}, and is left out")
        reports.append(LesionReport(organ, "", _ordered(attributes), size, source="reference"))
    return _together(reports)


def _reference_size(position: Any, where: str) -> Size | None:
    """The box ``[[X, Y, Z]]`` behind the position; voxels of 1 mm."""
    if not position:
        return None
    try:
        x, y, z = (float(number) for number in position[1][0])
    except (TypeError, ValueError, LookupError):
        x = y = z = math.nan
    if not all(0 < number < math.inf for number in (x, y, z)):
        raise CaseError(
            f"{where} is {position!r:.80}, expected [[[...]], [[X, Y, Z]]] with three lengths in mm above 0"
        )
    return x, y, z


def _together(reports: Sequence[LesionReport]) -> list[LesionReport]:
    lungs = tuple(report.organ for report in reports if report.organ in LUNGS)
    merged: dict[str, list[LesionReport]] = {}
    for report in reports:
        merged.setdefault(json.dumps([report.attributes, report.size_mm], sort_keys=True), []).append(report)
    result = []
    for equal in merged.values():
        organs = lungs if equal[0].organ in LUNGS else tuple(report.organ for report in equal)
        result.append(replace(equal[0], organs=organs if len(organs) > 1 else ()))
    return result


def _ordered(attributes: Mapping[str, str]) -> dict[str, str]:
    return {key: attributes[key] for key in ATTRIBUTES if attributes.get(key)}


def unknown_values(report: LesionReport) -> list[str]:
    """What of a report is in no vocabulary, one line each."""
    lines = []
    for key, value in report.attributes.items():
        known = {row[0] for row in VOCABULARY.get(key, ((value,),))}
        wrong = [part for part in value.split(",") if value not in known and part not in known]
        lines += [f"{key}: {part!r} is not in the vocabulary{near(part, known)}" for part in wrong]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# What networks are told


def cavity_of(report: LesionReport) -> str:
    """Where a lesion lies with respect to its organ's inside: what the report says, else what goes with its kind.

    The reference reads it off the names of folders and ignores the report. In training its hollow organs have stones
    within the lumen, and all else in the wall.
    """
    fitting = cavities_of(report.organ)
    said = report.attributes.get(CAVITY, "")
    if said in fitting:
        return said
    if said:
        kind = "hollow" if is_hollow(report.organ) else "parenchymal"
        raise CaseError(f"{CAVITY}: {said!r} does not fit {report.organ}, a {kind} organ: say {' or '.join(fitting)}")
    if is_hollow(report.organ):
        stone = "stone" in report.attributes.get(FEATURES, "") or "stone" in report.lesion
        return LUMEN if stone else WALL
    outward = re.search(r"exophytic|protrud|bulging", f"{report.location} {report.lesion}".lower())
    return OUTWARD if outward else INSIDE


def mask_texts(report: LesionReport) -> list[str]:
    """What the mask network is told: each attribute a text of its own."""
    return _texts(replace(report, attributes={**report.attributes, CAVITY: cavity_of(report)}), MASK_KEYS)


def image_texts(report: LesionReport) -> list[str]:
    """What the painting network is told: each attribute a text of its own."""
    return _texts(report, IMAGE_KEYS)


def _texts(report: LesionReport, keys: Sequence[str]) -> list[str]:
    """Values in the form of the reference's training: one comma behind each but the organ's name."""
    said = {key: canonical(key, report.attributes.get(key, "")) for key in keys}
    if said.get(VALUE):
        said[VALUE] = f"{float(said[VALUE].removesuffix(' HU')):.1f} HU"
    rows = [f"{said[key]}," for key in keys if said[key]]
    at = 1 if said[ENHANCEMENT] else 0
    return [*rows[:at], report.organ, *rows[at:]]


# ---------------------------------------------------------------------------------------------------------------------
# The offline writer


def check_wish(
    wish: LesionReport, present: Collection[int] | None = None, extent_mm: Sequence[float] | None = None
) -> LesionReport:
    """The wish, of several organs those that are there; refuses with the reason what cannot be.

    Args:
        wish: what is said so far.
        present: numbers of the organs in the scan; None is not known.
        extent_mm: the organ's extent along x, y, z; None is not known.
    """
    organs = wish.organs or (wish.organ,)
    if present is not None:
        organs = tuple(organ for organ in organs if organ_id(organ) in set(present))
        if not organs:
            number = organ_id(wish.organ)
            there = ", ".join(organ_name(n) for n in sorted(present)[:12] if 1 <= n <= len(ORGAN_NAMES)) or "none"
            why = " (TotalSegmentator's version 2 never fills it)" if number in UNFILLED else ""
            raise CaseError(f"{wish.organ} ({number}) is not in the scan{why}: choose an organ that is, e.g. {there}")
    if (
        wish.size_mm
        and extent_mm is not None
        and any(s > LARGEST * e for s, e in zip(wish.size_mm, extent_mm, strict=True))
    ):
        size, extent = (" x ".join(f"{n:.0f}" for n in numbers) for numbers in (wish.size_mm, extent_mm))
        raise CaseError(f"a lesion of {size} mm does not fit {wish.organ}, {extent} mm here: ask for a smaller one")
    organ = wish.organ if wish.organ in organs else organs[0]
    checked = replace(wish, organ=organ, organs=organs if len(organs) > 1 else ())
    cavity_of(checked)
    return checked


def complete(
    wish: LesionReport,
    rng: np.random.Generator,
    present: Collection[int] | None = None,
    extent_mm: Sequence[float] | None = None,
) -> LesionReport:
    """Draw what a report does not say, so that it fits what it says. What is said stays; arguments as `check_wish`."""
    wish = check_wish(wish, present, extent_mm)
    said = {key: text for key, value in wish.attributes.items() if (text := canonical(key, value))}
    lesion = lesion_kind(wish.lesion, wish.organ) or _draw_kind(said, wish.organ, rng)
    kind = LESION_KINDS.get(lesion, LESION_KINDS["tumor"])
    enhancement = said.get(ENHANCEMENT) or ("non-contrast ct" if rng.random() < 0.3 else "enhanced ct")
    density = said.get(DENSITY) or _draw_density(kind, lesion, wish.organ, enhancement, said.get(VALUE), rng)
    low, high = hu_range(wish.organ, density, enhancement, lesion)
    size = wish.size_mm or _draw_size(kind, extent_mm, rng)
    areas = any("density areas" in part for part in said.get(FEATURES, "").split(","))
    variations = said.get(VARIATIONS) or ("heterogeneous" if areas else _one(kind.variations, rng))
    close = rng.random() < (0.5 if max(size) > sum(kind.size_mm) / 2 else 0.2)
    drawn = {
        ENHANCEMENT: enhancement,
        SHAPE: _one(kind.shapes, rng),
        DENSITY: density,
        VARIATIONS: variations,
        VALUE: f"{rng.uniform(low, high):.0f} HU",
        MARGIN: _one(kind.margins, rng),
        NEIGHBOURS: VOCABULARY[NEIGHBOURS][int(close)][0],
        FEATURES: ",".join(filter(None, [_one(kind.features, rng), _draw_areas(variations, rng)])),
    }
    source = "rules" if set(drawn) - set(said) or not wish.size_mm else wish.source
    full = replace(wish, lesion=lesion, attributes=_ordered({**drawn, **said}), size_mm=size, source=source)
    return replace(full, attributes={**full.attributes, CAVITY: cavity_of(full)})


def draw_report(rng: np.random.Generator, present: Collection[int]) -> LesionReport:
    """A whole report for an organ that is there; each site of the publication's is as likely as each other."""
    names = [organ_name(number) for number in sorted(set(present) - {0}) if number not in UNFILLED]
    if not names:
        raise CaseError("no organ is in the scan: segment it first, or give a scan that shows one")
    sites: dict[frozenset[str], list[str]] = {}
    for name in names:
        if any(name in kind.organs for kind in LESION_KINDS.values()):
            sites.setdefault(site_of(name), []).append(name)
    places = [*sites.values()] or [[name] for name in names]
    return complete(LesionReport(_one(places[int(rng.integers(len(places)))], rng)), rng, present)


class RuleReportWriter:
    """`complete` with the signature that all writers share, so that a config may name either."""

    def __call__(
        self,
        wish: LesionReport,
        *,
        seed: int,
        present: Collection[int] | None = None,
        extent_mm: Sequence[float] | None = None,
    ) -> LesionReport:
        """Complete a report; the same seed draws the same."""
        return complete(wish, np.random.default_rng(seed), present, extent_mm)


def _one(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _draw_kind(said: Mapping[str, str], organ: str, rng: np.random.Generator) -> str:
    """A kind of the organ's that agrees most with what is said."""

    def agreement(name: str) -> int:
        kind = LESION_KINDS[name]
        rows = (
            (SHAPE, kind.shapes),
            (DENSITY, kind.densities),
            (VARIATIONS, kind.variations),
            (FEATURES, kind.features),
        )
        hits = sum(said[key] in options for key, options in rows if key in said)
        if VALUE in said and DENSITY not in said:
            hits += any(_distance(said, name, density, organ) == 0 for density in kind.densities)
        return hits

    scores = {name: agreement(name) for name in kinds_of(organ)}
    return _one([name for name, score in scores.items() if score == max(scores.values())], rng)


def _distance(said: Mapping[str, str], lesion: str, density: str, organ: str) -> float:
    """HU between a CT value and the range of a word for the density."""
    value = float(said[VALUE].removesuffix(" HU"))
    low, high = hu_range(organ, density, said.get(ENHANCEMENT, "enhanced ct"), lesion)
    return max(low - value, value - high, 0.0)


def _draw_density(
    kind: Kind, lesion: str, organ: str, enhancement: str, value: str | None, rng: np.random.Generator
) -> str:
    """A word for the density; where the CT value is said, the one that is nearest to it."""
    options = [d for d in kind.densities if d != "ring enhancement" or enhancement == "enhanced ct"]
    if value is None:
        return _one(options, rng)
    said = {VALUE: value, ENHANCEMENT: enhancement}
    return min(options, key=lambda density: _distance(said, lesion, density, organ))


def _draw_areas(variations: str, rng: np.random.Generator) -> str:
    return _one(["", LESS, MORE, f"{MORE},{LESS}"], rng) if variations == "heterogeneous" else ""


def _draw_size(kind: Kind, extent_mm: Sequence[float] | None, rng: np.random.Generator) -> Size:
    """Three lengths in mm about a diameter, small ones more often; at most nine tenths of the organ's."""
    diameter = math.exp(rng.uniform(math.log(kind.size_mm[0]), math.log(kind.size_mm[1])))
    lengths = diameter * rng.uniform(0.8, 1.2, 3)
    if extent_mm is not None:
        lengths = np.minimum(lengths, 0.9 * np.asarray(extent_mm))
    x, y, z = (round(float(length), 1) for length in lengths)
    return x, y, z
