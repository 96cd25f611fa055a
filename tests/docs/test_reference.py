"""The reference pages against the code: rooms, pairs of files, formats, API pages, errors, paths."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re

import pytest

import ddpmx
from ddpmx import errors
from ddpmx.diffusion.grids import SPACINGS
from ddpmx.diffusion.samplers import SAMPLERS, VARIANCES
from ddpmx.diffusion.schedule import SCHEDULES
from ddpmx.formats import betas, plan_file, spec
from ddpmx.formats.envelope import unwrap
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity import reference
from ddpmx.sampling.request import Sampling
from docs.reading import PAGES, ROOT, blocks, name


def page(stem: str) -> str:
    return (ROOT / "docs" / f"{stem}.md").read_text(encoding="utf-8")


def rows(markdown: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    _, _, below = f"\n{markdown}".partition(f"\n{heading}\n")
    assert below, f"there is no {heading!r}"
    table = re.search(r"(?:^\|.*\n?)+", below, re.MULTILINE)
    assert table is not None
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))] for row in table[0].splitlines()[2:]
    ]


def code(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


# --- architecture -----------------------------------------------------------------------------------------------------


def order(constant: str) -> list[str]:
    """A tuple of tests/ddpmx/test_rooms.py, which holds the imports against it."""
    tree = ast.parse((ROOT / "tests" / "ddpmx" / "test_rooms.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == constant
    )
    return list(ast.literal_eval(value))


@pytest.mark.parametrize(
    ("heading", "constant"),
    [("## The runtime: `runtime/ddpmx`", "DDPMX"), ("## The export side: `ddpm_export`", "DDPM_EXPORT")],
)
def test_the_rooms_and_their_order(heading, constant):
    found = [code(row[0])[0] for row in rows(page("architecture"), heading)]
    if constant == "DDPMX":
        assert found == order(constant)
    else:  # the first two stand beside each other
        assert sorted(found[:2]) == sorted(order(constant)[:2])
        assert found[2:] == order(constant)[2:]


def test_the_extras_are_those_that_there_are():
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    table = (ROOT / "docs" / "install.md").read_text().split("## Extras")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


def test_pairs_of_python_and_cpp_exist():
    found = rows(page("architecture"), "## Python and C++")
    assert len(found) >= 18
    for python, cpp in found:
        for path in code(python):
            assert (ROOT / "runtime" / "ddpmx" / path).exists(), path
        for path in code(cpp):
            inside = "ddpmx" if path == "cuda/step.h" else "native/src"
            assert (ROOT / "runtime" / inside / path).exists(), path


# --- formats ----------------------------------------------------------------------------------------------------------


def test_the_versions_of_the_formats():
    versions = {cell for row in rows(page("formats"), "# Formats") for cell in code(row[2])}
    assert {spec.PREFIX, plan_file.RECORD_PREFIX, reference.FORMAT} <= versions
    assert betas.to_text(betas.as_betas([0.1])).split()[0] in versions


def test_the_envelope_on_the_page_is_one():
    text = blocks("formats.md", page("formats"))[0].text.strip()
    described = ModelSpec.from_text(text)
    assert described.to_text() == text
    assert described.shape == (1, 16, 16)


def test_the_fields_of_a_spec():
    found = [code(row[0])[0] for row in rows(page("formats"), "## The envelope")]
    fields = [field.name for field in dataclasses.fields(ModelSpec) if field.init]
    assert sorted(found) == sorted({*fields, "coefficients"})
    schedule = next(row for row in rows(page("formats"), "## The envelope") if row[0] == "`schedule`")
    assert {*SCHEDULES, spec.BETAS} <= set(code(schedule[2]))


def test_the_fields_of_a_plan_s_record():
    found = [word for row in rows(page("formats"), "## The plan and its sidecar") for word in code(row[0])]
    assert sorted(found) == sorted(field.name for field in dataclasses.fields(plan_file.PlanRecord))


def test_the_arrays_of_a_parity_record():
    found = [word for row in rows(page("formats"), "## The parity record") for word in code(row[0])]
    inside = set(code(rows(page("formats"), "## The parity record")[0][2])) - {"ddpmx-parity1", "format"}
    fields = {field.name for field in dataclasses.fields(reference.Reference)}
    assert set(found) == {*(fields - inside), "about"}
    assert inside <= fields
    assert "4096" in page("formats")
    assert reference.ELEMENTS == 4096


@pytest.mark.torch
@pytest.mark.slow
def test_the_files_of_a_run(prepared):
    from ddpm_export.training import checkpoint

    tree = next(block.text for block in blocks("formats.md", page("formats")) if "checkpoints/" in block.text)
    (folder,) = (prepared / "runs" / "photos" / "checkpoints").iterdir()
    for path in folder.iterdir():
        assert path.name in tree
    assert {checkpoint.TRAINING_JSON, checkpoint.TRAINING_TENSORS, *checkpoint.FILES.values()} <= {
        path.name for path in folder.iterdir()
    }


def test_the_keys_of_a_report():
    from ddpmx.parity.ladder import ParityReport
    from ddpmx.parity.report import to_json

    report = ParityReport(ModelSpec((1, 8, 8)), "here", None, ())
    found = {word for row in rows(page("formats"), "## The report") for word in code(row[0])}
    assert set(to_json(report, "model.onnx")) == found - {"engine", "mnn", "polygraphy"}


def test_a_changed_envelope_is_noticed():  # control
    text = blocks("formats.md", page("formats"))[0].text.strip()
    with pytest.raises(errors.SpecError):
        unwrap(spec.PREFIX, text.replace('"linear"', '"cosine"'))


# --- the Python API ---------------------------------------------------------------------------------------------------


def test_the_tree_of_errors():
    found = rows(page("python-api"), "## Errors")
    classes = {cls.__name__: cls for _, cls in inspect.getmembers(errors, inspect.isclass)}
    assert sorted(code(row[0])[0] for row in found) == sorted(classes)
    above: dict[int, str] = {}
    for row in found:
        depth = len(re.sub(r"`.*`", "", row[0]).replace(" ", ""))
        above[depth] = code(row[0])[0]
        if depth:
            assert classes[above[depth]].__bases__ == (classes[above[depth - 1]],)


def test_the_fields_of_sampling():
    found = {code(row[0])[0]: row[1] for row in rows(page("python-api"), "### How the chain is run")}
    assert sorted(found) == sorted(field.name for field in dataclasses.fields(Sampling))
    for field, names in {"sampler": SAMPLERS, "spacing": SPACINGS, "variance": VARIANCES}.items():
        assert code(found[field]) == list(names)


def test_what_the_overview_names_is_there():
    text = page("python-api")
    for path in set(re.findall(r"`((?:ddpmx|ddpm_export)(?:\.\w+)+)", text)) - {"ddpmx.DdpmxError"}:
        module, _, attribute = path.rpartition(".")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, owner = module.rpartition(".")
            found = getattr(importlib.import_module(module), owner)
        except ImportError as error:
            pytest.skip(f"not verified here: what of {module} the overview names ({error})")
        assert hasattr(found, attribute) or importlib.import_module(path), path
    for method in re.findall(r"^\| `Pipeline\.(\w+)`", text, re.MULTILINE):
        assert method == "spec" or hasattr(ddpmx.Pipeline, method)


def test_every_public_name_has_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    for public in set(ddpmx.__all__) - {"__version__"}:
        assert getattr(ddpmx, public).__module__ in documented, public
    for module in documented:
        assert (ROOT / "runtime" / (path := module.replace(".", "/") + ".py")).exists() or (ROOT / path).exists(), (
            module
        )


# --- all pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_paths_of_the_repository_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|runtime|ddpm_export|cli|docs|examples)/[\w./-]+)`", text))
    if path.name == "CHANGELOG.md":
        return
    assert [each for each in sorted(named) if not (ROOT / each).exists()] == []


def test_words_of_the_glossary_are_sorted():
    words = [row[0] for row in rows(page("glossary"), "# Glossary")]
    assert 12 <= len(words) <= 40
    assert words[:-1] == sorted(words[:-1])  # x̂₀ is the last
