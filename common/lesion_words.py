"""Words of lesions: organs, kinds of lesions, attributes, in any usual spelling; what goes together, and its HU.

The vocabulary is LesionDiffusion's (Tian et al., MICCAI 2025), the organs are TotalSegmentator's 104 of version 1.
Densities in HU and sizes are rough ones of adults, ours.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .io import CaseError
from .totalsegmentator import TOTAL_V1, TOTAL_V2

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary: the first of several words for one thing is what networks are told. The publication's words, table 2.2.

ENHANCEMENT, SHAPE, DENSITY, VARIATIONS, VALUE, MARGIN, NEIGHBOURS, FEATURES, CAVITY = ATTRIBUTES = (
    *("enhancement status", "shape", "density", "density variations", "CT value", "surface characteristics"),
    *("relationship with adjacent organs", "specific features", "cavity"),
)
KEYS = {"enhancement": ENHANCEMENT, "margin": MARGIN, "relationship": NEIGHBOURS, "features": FEATURES}

LUMEN, WALL = "within the lumen of a hollow organ", "wall thickening"
INSIDE, OUTWARD = "within the parenchymal organ", "protruding from the parenchymal organ"
MORE, LESS = "presence of increased density areas", "presence of decreased density areas"
FLUID, GROUND_GLASS = "hypoattenuating fluid-like lesion", "low-density ground-glass opacity"
SOFT = "isodense soft tissue mass"
PART_SOLID = f"{SOFT} with peripheral {GROUND_GLASS}"


def _table(lines: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(line.strip().split(" = ")) for line in lines.strip().splitlines())


VOCABULARY: dict[str, tuple[tuple[str, ...], ...]] = {
    ENHANCEMENT: _table("""
        enhanced ct = enhanced = contrast-enhanced ct = contrast-enhanced = with contrast
        non-contrast ct = non-contrast = noncontrast ct = unenhanced ct = unenhanced = plain ct
    """),
    SHAPE: _table("""
        round-like = round = oval
        irregular
        irregular wall thickening = irregular,wall thickening = wall thickening
        punctate = nodular
        cystic
        luminal narrowing
        protrusion into the lumen
    """),
    DENSITY: _table(f"""
        hypodense lesion = low density lesion = hypoattenuating lesion = low attenuation lesion = hypodense
        isodense lesion = isoattenuating lesion = isodense
        hyperdense lesion = high density lesion = hyperattenuating lesion = high attenuation lesion = hyperdense
        mixed-density lesion = mixed attenuation lesion = mixed-density
        {FLUID} = hypodense fluid-like lesion = fluid-like
        {SOFT} = soft tissue mass
        {PART_SOLID}
        {GROUND_GLASS} = ground-glass opacity = ground-glass
        ring enhancement
    """),
    VARIATIONS: _table("""
        homogeneous
        heterogeneous = inhomogeneous
    """),
    MARGIN: _table("""
        well-defined margin = well-defined = well-circumscribed = sharp margin = clear margin
        clear serosal surface
        clear boundary with the renal parenchyma
        ill-defined margin = ill-defined = poorly defined margin = blurred margin = unclear margin
        serosal surface irregularity
        unclear boundary with the renal parenchyma
        poorly defined boundary with normal esophageal tissue
    """),
    NEIGHBOURS: _table("""
        no close relationship with surrounding organs = no close relationship with adjacent organs
        close relationship with adjacent organs = close relationship with surrounding organs
    """),
    FEATURES: _table(f"""
        {LESS} = presence of decreased attenuation areas
        {MORE} = presence of increased attenuation areas
        spiculated margins = spiculated
        retention of pancreatic fluid
        stone = calculus
    """),
    CAVITY: ((LUMEN,), (WALL,), (INSIDE,), (OUTWARD,)),
}
NOTHING = ("", "none", "n/a", "unknown", "not specified", "null")  # an attribute that says so is not said
HOUNSFIELD = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*(?:HU\b|$)", re.IGNORECASE)
HU_RANGE = (-1024, 3071)

# The one list of hollow organs. The reference counts the gallbladder in when it trains, and out when it places a box:
# it has a lumen and a wall. What it has never seen (bowel, trachea) is hollow by anatomy. Vessels are too thin.
HOLLOW = ("gallbladder", "stomach", "esophagus", "trachea", "small bowel", "duodenum", "colon", "urinary bladder")

# CT value of the organ around a lesion, without and with contrast; a lung's lesions are compared with soft tissue.
DEFAULT_HU, HOLLOW_HU = (45, 85), (40, 50)
TISSUE_HU: dict[str, tuple[int, int]] = {
    **{"liver": (55, 110), "spleen": (48, 120), "pancreas": (40, 100), "kidney": (32, 150), "lung": (45, 60)},
    **{"brain": (35, 40), "aorta": (40, 200), "adrenal": (30, 75)},
    **dict.fromkeys(("rib", "hip", "sacrum", "femur", "humerus", "scapula", "clavicula"), (250, 260)),
    **dict.fromkeys(("gluteus", "autochthon", "iliopsoas"), (55, 65)),
    "vertebrae": (200, 210),
}
# Offsets from the organ's value, in parts of it (a liver of 110 HU: hypodense is 22 to 60 HU below); or HU.
RELATIVE_HU = {
    "hypodense lesion": (-0.55, -0.2),
    "isodense lesion": (-0.09, 0.09),
    "hyperdense lesion": (0.2, 0.55),
    "mixed-density lesion": (-0.32, 0.1),
    "ring enhancement": (-0.45, -0.2),
}
ABSOLUTE_HU = {FLUID: (0, 20), SOFT: (25, 60), PART_SOLID: (-150, 0), GROUND_GLASS: (-700, -350)}


@dataclass(frozen=True)
class Kind:
    """What goes together in lesions of one kind; `size_mm` is the range of the diameter, `hu` that of the CT value."""

    size_mm: tuple[float, float]
    shapes: tuple[str, ...]
    densities: tuple[str, ...]
    margins: tuple[str, ...] = ("well-defined margin", "ill-defined margin")
    variations: tuple[str, ...] = ("homogeneous", "heterogeneous")
    features: tuple[str, ...] = ("",)
    hu: tuple[float, float] | None = None
    organs: tuple[str, ...] = ()  # () is any


def _row(values: str) -> tuple[str, ...]:
    return tuple(values.split("; "))


_SOLID, _STEADY, _CLEAR = _row("round-like; irregular"), ("homogeneous",), ("well-defined margin",)
_DENSITIES = _row("hypodense lesion; isodense lesion; hyperdense lesion; mixed-density lesion")
_SEROSA = _row("clear serosal surface; serosal surface irregularity")
_RENAL = _row("clear boundary with the renal parenchyma; unclear boundary with the renal parenchyma")
_GROWTH = _row("irregular wall thickening; protrusion into the lumen; irregular,protrusion into the lumen")
_ISO = ("isodense lesion",)
_KIDNEYS = ("kidney right", "kidney left")
LUNGS = tuple(name.replace("_", " ") for name in TOTAL_V1 if name.startswith("lung"))


def _cyst(largest: float, *organs: str) -> Kind:
    return Kind((5, largest), _row("round-like; cystic"), (FLUID,), _CLEAR, _STEADY, organs=organs)


def _stone(largest: float, hu: tuple[float, float], *organs: str) -> Kind:
    return Kind((4, largest), ("punctate",), ("hyperdense lesion",), _CLEAR, _STEADY, ("stone",), hu, organs)


# The publication's fourteen, then what any organ may have.
LESION_KINDS: dict[str, Kind] = {
    "lung tumor": Kind(
        (8, 70),
        *(_row("round-like; irregular; punctate"), (SOFT, PART_SOLID, GROUND_GLASS)),
        features=("", "spiculated margins"),
        organs=LUNGS,
    ),
    "liver tumor": Kind((10, 80), _SOLID, (*_DENSITIES, "ring enhancement"), organs=("liver",)),
    "liver cyst": _cyst(60, "liver"),
    "gallbladder cancer": Kind((8, 40), _GROWTH, _ISO, _SEROSA, organs=("gallbladder",)),
    "gallstone": _stone(25, (80, 500), "gallbladder"),
    "colon cancer": Kind((15, 70), (*_GROWTH, "luminal narrowing"), _ISO, _SEROSA, organs=("colon",)),
    "bladder cancer": Kind(
        (8, 55), (*_GROWTH, "round-like,protrusion into the lumen"), _ISO, _SEROSA, organs=("urinary bladder",)
    ),
    "esophageal cancer": Kind(
        (12, 50),
        *(_row("irregular wall thickening; luminal narrowing"), _ISO),
        ("poorly defined boundary with normal esophageal tissue",),
        organs=("esophagus",),
    ),
    "stomach cancer": Kind((12, 70), (*_GROWTH, "luminal narrowing"), _ISO, _SEROSA, organs=("stomach",)),
    "kidney tumor": Kind((10, 80), _SOLID, _DENSITIES, _RENAL, organs=_KIDNEYS),
    "kidney cyst": _cyst(70, *_KIDNEYS),
    "kidney stone": _stone(20, (200, 1200), *_KIDNEYS),
    "pancreas tumor": Kind(
        (12, 55),
        *(_SOLID, _row("hypodense lesion; isodense lesion; mixed-density lesion")),
        features=("", "retention of pancreatic fluid"),
        organs=("pancreas",),
    ),
    "pancreas cyst": _cyst(50, "pancreas"),
    "tumor": Kind((8, 60), _SOLID, _DENSITIES),
    "cyst": _cyst(40),
    "stone": _stone(15, (150, 800)),
    "hemorrhage": Kind((8, 60), ("irregular",), ("hyperdense lesion",), ("ill-defined margin",), hu=(55, 85)),
}

# ---------------------------------------------------------------------------------------------------------------------
# Names of organs and kinds: words in any order

_USUAL = {
    "tumor": "tumour tumors tumours cancer carcinoma adenocarcinoma neoplasm mass nodule metastasis metastases",
    "cyst": "cysts",
    "stone": "stones calculus calculi calcification lithiasis",
    "hemorrhage": "haemorrhage hematoma haematoma bleeding",
    **{"liver": "hepatic hepatocellular", "stomach": "gastric", "kidney": "renal kidneys", "lung": "lungs bronchial"},
    **{"bladder": "vesical", "colon": "colonic colorectal", "pancreas": "pancreatic", "spleen": "splenic"},
    **{"esophagus": "oesophagus oesophageal esophageal", "brain": "cerebral intracranial", "bowel": "intestine"},
    **{"adrenal": "suprarenal", "clavicula": "clavicle", "iliopsoas": "psoas", "vena": "vein veins"},
}
_PHRASES = {
    "gall bladder": "gallbladder",
    "large (bowel|intestine)": "colon",
    "ivc": "inferior vena cava",
    "hcc": "liver tumor",
    "gallstones?|cholelithiasis": "gallbladder stone",
    "nephrolithiasis|urolithiasis": "kidney stone",
    "pulmonary(?= (tumou?r|mass|nodule|cancer|metasta))": "lung",
}
_WORDS = {word: usual for usual, words in _USUAL.items() for word in words.split()}
_NATURES = frozenset({"tumor", "cyst", "stone", "hemorrhage"})
_SAY_LITTLE = frozenset(["the", "of", "a", "an", "in", "wall", "bone", "muscle", "gland", "side", "sided", "urinary"])
_SAY_LITTLE |= {"vertebra", "vertebral", "vertebrae", "body"}
_PLACES = frozenset(["left", "right", "upper", "lower", "middle", "lobe", "and", "lesion"])

# Classes that only the models of version 1 fill; of version 2, whatever `v1_order` says, they are empty.
UNFILLED = (*range(44, 50), 93)


def _bag(name: str, drop: frozenset[str] = frozenset()) -> frozenset[str]:
    """Words of a name, each by its usual form."""
    text = " ".join(re.findall(r"[a-z0-9]+", name.lower()))
    for phrase, usual in _PHRASES.items():
        text = re.sub(rf"\b(?:{phrase})\b", usual, text)
    return frozenset(_WORDS.get(word, word) for word in text.split()) - _SAY_LITTLE - drop


ORGAN_NAMES = tuple(name.replace("_", " ") for name in TOTAL_V1)
_LOBE = frozenset({"lobe"})
_ORGANS = {_bag(name, _LOBE): number for number, name in enumerate(ORGAN_NAMES, start=1)}
_ORGANS |= {bag - {"lung"}: number for bag, number in _ORGANS.items() if "lung" in bag}  # "right upper lobe"
_SITES = {_bag(name, _PLACES) for name in ORGAN_NAMES}
_KINDS = {_bag(name): name for name in LESION_KINDS}


def organ_name(number: int) -> str:
    """Name of one of the 104 organs."""
    if not 1 <= number <= len(ORGAN_NAMES):
        raise CaseError(f"organ {number} does not exist: TotalSegmentator's version 1 has 1 .. {len(ORGAN_NAMES)}")
    return ORGAN_NAMES[number - 1]


def organ_id(name: str) -> int:
    """Number of an organ by its name, in any usual spelling.

    Example:
        >>> organ_id("left kidney"), organ_id("Bladder"), organ_id("L5 vertebra")
        (3, 104, 18)
    """
    numbers = organ_ids(name)
    if len(numbers) > 1:
        raise CaseError(f"{name!r} is several organs: name one of {', '.join(map(organ_name, numbers))}")
    return numbers[0]


def organ_ids(name: str) -> tuple[int, ...]:
    """Numbers of an organ, or of all lobes of a lung."""
    bag = _bag(str(name), _LOBE)
    if bag in _ORGANS:
        return (_ORGANS[bag],)
    if "lung" in bag and bag <= {"lung", "left", "right", "both"}:
        sides = bag & {"left", "right"} or {"left", "right"}
        return tuple(organ_id(lobe) for lobe in LUNGS if lobe.split()[-1] in sides)
    version_2 = {_bag(other, _LOBE) for other in TOTAL_V2}
    if bag in version_2 or bag == {"heart"}:
        reason = "it is a class of TotalSegmentator's version 2 alone, and the networks know the 104 of version 1"
        if bag == {"heart"}:
            reason += " (whose heart chambers, 44 to 48, are never filled by models of version 2)"
        raise CaseError(f"organ {name!r} cannot be used: {reason}; choose another organ")
    alike = [organ for organ in ORGAN_NAMES if bag & _bag(organ, _LOBE | {"left", "right"})]
    alike += difflib.get_close_matches(str(name).lower(), [o.lower() for o in ORGAN_NAMES], 4, 0.6)
    near = ", ".join(list(dict.fromkeys(alike))[:8]) or "liver, pancreas, kidney left, ..."
    raise CaseError(f"organ {name!r} is unknown: near names are {near}; all are in common/totalsegmentator.TOTAL_V1")


def is_hollow(organ: str) -> bool:
    """Whether an organ has a lumen and a wall that lesions lie in."""
    return organ in HOLLOW


def site_of(organ: str) -> frozenset[str]:
    """An organ without its side: both kidneys, and all lobes of lungs, are one site."""
    return _bag(organ, _PLACES)


def cavities_of(organ: str) -> tuple[str, str]:
    """The two words for a lesion's place with respect to an organ's inside."""
    return (WALL, LUMEN) if is_hollow(organ) else (INSIDE, OUTWARD)


def lesion_kind(lesion: str, organ: str) -> str:
    """Canonical name of a kind of lesion, a key of `LESION_KINDS`; an unknown word stays as it is, "" is not said.

    Example:
        >>> lesion_kind("hepatic tumour", "liver"), lesion_kind("cysts", "kidney left"), lesion_kind("stone", "spleen")
        ('liver tumor', 'kidney cyst', 'stone')
    """
    said, home = _bag(lesion, _PLACES), site_of(organ)
    natures, place = said & _NATURES, said - _NATURES
    if len(natures) != 1:
        if said <= home:
            return ""  # "liver lesion"
        tell_once(f"lesion {lesion!r} is no kind of LESION_KINDS: it is drawn as a tumor")
        return " ".join(lesion.lower().split())
    nature = next(iter(natures))
    if not place & home and any(site <= place for site in _SITES):
        raise CaseError(f"a {lesion} does not lie in {organ}: name another organ or lesion, or say {nature!r} alone")
    return _KINDS.get(natures | home, nature)


def kinds_of(organ: str) -> list[str]:
    """Kinds of lesions that the publication has in an organ; of any other, those that all may have."""
    return [name for name, kind in LESION_KINDS.items() if organ in kind.organs] or ["tumor", "cyst"]


def hu_range(organ: str, density: str, enhancement: str = "enhanced ct", lesion: str = "") -> tuple[float, float]:
    """CT values (HU) that go with the word for a density, in an organ.

    Example:
        >>> hu_range("liver", "hypodense lesion")
        (49.5, 88.0)
    """
    kind = LESION_KINDS.get(lesion)
    if kind is not None and kind.hu and density in kind.densities:
        return kind.hu
    if density in ABSOLUTE_HU:
        return ABSOLUTE_HU[density]
    first = next((word for word in organ.split() if word in TISSUE_HU), "")
    plain, enhanced = HOLLOW_HU if is_hollow(organ) else TISSUE_HU.get(first, DEFAULT_HU)
    tissue = plain if enhancement.startswith("non") else enhanced
    low, high = RELATIVE_HU.get(density, (-0.3, 0.1))
    return round(tissue * (1 + low), 1), round(tissue * (1 + high), 1)


def canonical(key: str, value: Any) -> str:
    """One attribute's value by the vocabulary's first words, without a comma at its end; unknown words stay.

    Example:
        >>> canonical("density", "Low-density lesion,"), canonical("CT value", "approximately 57 HU,")
        ('hypodense lesion', '57 HU')
    """
    text = re.sub(r"\s*,\s*", ",", " ".join(str(value).split())).strip(" ,.")
    if text.lower() in NOTHING:
        return ""
    if key == VALUE:
        number = HOUNSFIELD.search(text)
        return f"{float(number[1]):g} HU" if number and HU_RANGE[0] <= float(number[1]) <= HU_RANGE[1] else ""
    table = _lookup(key)
    if (whole := _plain(text)) in table:
        return table[whole]
    return ",".join(dict.fromkeys(table.get(_plain(part), part.lower()) for part in text.split(",") if part))


@functools.cache
def _lookup(key: str) -> dict[str, str]:
    return {_plain(word): row[0] for row in VOCABULARY[key] for word in row}


def _plain(text: str) -> str:
    return text.lower().replace("-", " ")


def near(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest of the known words, for a message, or at all of them."""
    known = sorted(known)
    found = difflib.get_close_matches(word, known, 1, 0.5)
    return f" (did you mean {found[0]!r}?)" if found else f" ({'; '.join(known)})"


@functools.cache
def tell_once(message: str) -> None:
    """Warn, but once for each message."""
    logger.warning(message)
