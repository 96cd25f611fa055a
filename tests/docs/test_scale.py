"""docs/scale.md: its table of hours is what its formula gives, with the step that docs/performance.md has measured."""

from __future__ import annotations

import re

import pytest

from docs.reading import ROOT, blocks


def page(stem: str) -> str:
    return (ROOT / "docs" / f"{stem}.md").read_text(encoding="utf-8")


def test_the_hours_of_a_fleet():
    (block,) = [block for block in blocks("scale.md", page("scale")) if "def hours" in block.text]
    scope: dict[str, object] = {}
    exec(compile(block.text, str(block), "exec"), scope)
    hours = scope["hours"]
    step = float(re.search(r"million \| 1\.014 \| ([0-9.]+) ms", page("performance"))[1]) / 1000
    assert f"{step:g} s" in page("scale")
    table = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page("scale"), re.MULTILINE)
    assert len(table) >= 5
    for devices, *cells in table:
        for steps, cell in zip((20, 50, 1000), cells, strict=True):
            assert float(cell) == pytest.approx(hours(int(devices), step, steps), rel=5e-3)
