"""The house keeps its shape: who may import whom, and the laws of the configs.

`common/` has two layers. Leaves know no other room, but for `io` (files in and out) and `schedules` (tables of noise),
which any leaf may use; rooms build on leaves and, without a cycle, on each other. `common` knows no bundle and no tool;
tools know bundles as data only.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tools import reading, verify

REPO = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parent for path in (REPO / "bundles").glob("*/configs"))
COMMON = sorted((REPO / "common").glob("*.py"))
SOURCES = [*COMMON, *sorted((REPO / "tools").rglob("*.py")), *sorted((REPO / "bundles").glob("*/scripts/*.py"))]

LEAVES = {"schedules", "solvers", "semantics", "transforms", "totalsegmentator", "reports", "io", "checkpoints"}
LEAVES |= {"metrics", "phantoms", "mask_phantoms", "prompts", "execution", "pictures", "workflow"}
ROOMS = {"unet", "sampler", "conditioning", "siamese", "categorical", "training", "cases"}
ROOMS |= {"evaluation", "mask_evaluation", "mask_metrics", "mask_sampler", "mask_statistics"}
ROOMS |= {"autoencoder", "controlnet", "ldm_layout", "endoscopy_phantoms", "downstream", "image_evaluation"}
ROOMS |= {"text", "report_unet", "slices", "abdomen_phantoms", "anatomy_metrics", "volume_evaluation"}
ROOMS |= {"attribute_unet", "codebook", "lesion_diffusion", "lesion_sampler", "lesion_plan", "lesion_boxes"}
ROOMS |= {"lesion_geometry", "lesion_reports", "lesion_lists", "lesion_phantoms", "lesion_evaluation"}
ROOMS |= {"organs", "llm", "biomedclip", "lesion_words"}
FOR_ALL = {"io", "schedules"}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


def imports(path: Path) -> set[str]:
    """Modules that a file imports, with full names: within common, ``from .x import y`` gives common.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = path.parent.name
            found |= {f"{package}.{node.module}"} if node.module else {f"{package}.{a.name}" for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def neighbours(path: Path) -> set[str]:
    """Rooms of common/ that a room imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("common.")}


@pytest.mark.parametrize("path", COMMON, ids=name_of)
def test_common_knows_no_bundle_and_no_tool(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"bundles", "tools", "tests", "scripts"}
    assert not {name for name in imports(path) if name == "common"}, "inside common, imports are relative"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_bundles_are_data(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] == "bundles"}
    if "bundles" in path.parts:
        assert not {name for name in imports(path) if name.split(".")[0] in ("tools", "tests", "common")}


@pytest.mark.parametrize("path", [p for p in COMMON if p.stem != "__init__"], ids=name_of)
def test_layers(path: Path) -> None:
    assert path.stem in LEAVES | ROOMS, (
        "a new room: give it a place in the layers above and on the map in common/__init__"
    )
    allowed = FOR_ALL if path.stem in LEAVES else LEAVES | ROOMS
    assert neighbours(path) <= allowed - {path.stem}


def test_no_cycles() -> None:
    graph = {path.stem: neighbours(path) for path in COMMON}
    assert list(TopologicalSorter(graph).static_order())


def test_map_of_rooms_is_complete() -> None:
    text = ast.get_docstring(ast.parse((REPO / "common" / "__init__.py").read_text())) or ""
    assert [p.stem for p in COMMON if p.stem != "__init__" and f"`{p.stem}`" not in text] == []


@pytest.mark.parametrize("path", [p for p in SOURCES if "tools" not in p.parts], ids=name_of)
def test_shared_code_does_not_print(path: Path) -> None:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert not any(isinstance(function, ast.Name) and function.id == "print" for function in calls)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert path.stem not in {"utils", "util", "helpers", "misc", "tools", "base"}


def test_nothing_shadows_scripts() -> None:
    assert not (REPO / "scripts").exists()
    assert not (REPO / "scripts.py").exists()


def test_shim_is_the_same_everywhere() -> None:
    assert len({(bundle / "scripts" / "__init__.py").read_bytes() for bundle in BUNDLES}) == 1


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
@pytest.mark.parametrize("check", [*verify.LAWS, *verify.STATIC], ids=lambda check: check.__name__)
def test_law(check: reading.Check, bundle: Path) -> None:
    assert check(bundle) == []
