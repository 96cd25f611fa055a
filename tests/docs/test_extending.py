"""docs/extending.md: its examples run, each in a process of its own, and its paths exist."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from docs.reading import ROOT, Block, blocks

pytestmark = pytest.mark.torch

PAGE = ROOT / "docs" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = [block for block in blocks("docs/extending.md", TEXT) if block.kind == "python"]
SECTIONS = ["A sampler", "A backend", "An importer", "A task", "A command"]


def outcome(block: Block, folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", block.text], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("block", EXAMPLES, ids=[section.split()[-1] for section in SECTIONS])
def test_an_example_runs_and_checks_something(block, reader):
    assert "assert" in block.text
    done = outcome(block, reader)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "right", "wrong"),
    [
        (0, "np.sqrt(after) * (1 - ratio)", "np.sqrt(after) * ratio"),
        (1, "/ 16", "/ 4"),
        (2, "(ours,)", '("time.0.bias",)'),
        (3, "(1 - w) * x_t[0] + w * x_t[1]", "w * x_t[0] + (1 - w) * x_t[1]"),
        (4, "nothing.onnx", "other.onnx"),
    ],
    ids=[section.split()[-1] for section in SECTIONS],
)
def test_an_example_can_fail(number, right, wrong, reader):  # control
    block = EXAMPLES[number]
    assert right in block.text
    assert outcome(Block(block.page, block.line, "python", block.text.replace(right, wrong), None), reader).returncode


def test_every_section_has_its_example():
    assert re.findall(r"^## (.*)$", TEXT, re.MULTILINE) == SECTIONS
    assert [part.count("```python\n") for part in TEXT.split("\n## ")[1:]] == [1] * len(SECTIONS)


def test_paths_exist():
    paths = set(re.findall(r"`((?:runtime|ddpm_export|cli|tests|docs)/[\w./]+)`", TEXT))
    assert len(paths) >= 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
