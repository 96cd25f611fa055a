"""The rooms of the house and their order: a room imports from those below it, and never from one above or beside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DDPMX = (
    "scale",
    "serve",
    "tasks",
    "page",
    "pipeline",
    "parity",
    "bench",
    "system",
    "images",
    "cuda",
    "sampling",
    "backends",
    "trt",
    "mnn",
    "arrays",
    "device",
    "formats",
    "diffusion",
    "models",
    "errors",
)
DDPM_EXPORT = ("quality", "importers", "any_module", "quantize", "proof", "graph", "training", "networks")
"""From the top down."""

HOUSES = {"ddpmx": (ROOT / "runtime" / "ddpmx", DDPMX), "ddpm_export": (ROOT / "ddpm_export", DDPM_EXPORT)}


def imported(source: Path, package: str) -> Iterator[str]:
    """The modules of ``package`` that a source imports, at its top or anywhere below."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{package}.?"  # relative imports would hide from this test
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == package:
                yield from (f"{package}.{alias.name}" for alias in node.names)
            elif node.module.startswith(f"{package}."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(f"{package}."))


def upward(folder: Path, order: Sequence[str]) -> list[str]:
    """Every import that does not lead down: "images/gallery.py: pipeline"."""
    package, wrong = folder.name, []
    for source in sorted(folder.rglob("*.py")):
        place = source.relative_to(folder)
        if place.name == "__init__.py" and len(place.parts) == 1:
            continue  # the door names what is public, wherever that is
        here = place.parts[0].removesuffix(".py")
        for module in imported(source, package):
            there = module.split(".")[1]
            if there != here and not (here in order and there in order and order.index(here) < order.index(there)):
                wrong.append(f"{place.as_posix()}: {there}")
    return wrong


@pytest.mark.parametrize("package", HOUSES)
def test_imports_lead_down(package):
    folder, order = HOUSES[package]
    assert upward(folder, order) == []


@pytest.mark.parametrize("package", HOUSES)
def test_every_room_has_its_place_and_says_what_it_is_for(package):
    folder, order = HOUSES[package]
    rooms = {path.parent.name for path in folder.glob("*/__init__.py")}
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    assert rooms | modules == set(order)
    for room in rooms:
        (docstring,) = ast.parse((folder / room / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr), f"{room}/__init__.py holds more than a docstring"


def test_the_order_can_be_broken(tmp_path):
    """The control: an import upwards is noticed, in a function too, and so is one of a room that has no place."""
    folder = tmp_path / "ddpmx"
    for name, text in {
        "diffusion/noise.py": "def f():\n    from ddpmx.formats import spec\n",
        "formats/spec.py": "from ddpmx.diffusion.noise import f\nimport ddpmx.attic.box\n",
        "pipeline.py": "from ddpmx import images\nfrom ddpmx.formats.spec import f\n",
        "images/gallery.py": "from ..pipeline import Pipeline\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert upward(folder, DDPMX) == ["diffusion/noise.py: formats", "formats/spec.py: attic", "images/gallery.py: ?"]
