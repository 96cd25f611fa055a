"""The report: written as a whole or not at all, readable, and with every figure in it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ddpmx
import ddpmx.parity
from ddpmx.errors import OutputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity import report
from ddpmx.parity.check import BOUNDS
from ddpmx.parity.ladder import ParityReport, run_ladder
from ddpmx.parity.reference import Reference
from oracles.parity import SPEC, STEPS, Faulty, biased, channels_swapped, make_reference, neighbours_leak
from oracles.toy_backend import ToyBackend

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="not verified here: the plots of a report (no matplotlib)"
)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference()


@pytest.fixture(scope="module")
def untrained() -> Reference:
    return make_reference(loss=0.5)


# --- the report ------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.fixture(scope="module")
def results(reference, untrained) -> dict[str, ParityReport]:
    return {
        "passed": run_ladder(ToyBackend(), SPEC, reference),
        "failed": run_ladder(Faulty(channels_swapped), SPEC.replace(precision="fp16"), reference),
        "untrained": run_ladder(ToyBackend(), SPEC, untrained),
        "itself": run_ladder(ToyBackend(), SPEC, None),
        "itself, failed": run_ladder(Faulty(neighbours_leak), SPEC, None),
        "itself, one": run_ladder(ToyBackend(), SPEC, None, batch=1),
    }


RESULTS = ["passed", "failed", "untrained", "itself", "itself, failed", "itself, one"]


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in {"matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ddpmx.parity.plots", raising=False)
    monkeypatch.delattr(ddpmx.parity, "plots", raising=False)


@pytest.mark.parametrize("name", RESULTS)
def test_the_json_is_valid_and_holds_every_figure(results, name):
    result = results[name]
    values = json.loads(json.dumps(report.to_json(result, "some/model.onnx", {"polygraphy": None}), allow_nan=False))
    assert values["file"] == "model.onnx"
    assert values["polygraphy"] is None
    assert values["passed"] is result.passed
    assert values["verdict"] == result.verdict
    assert ModelSpec.from_json(values["spec"]) == result.spec
    assert [r["name"] for r in values["rungs"]] == [r.name for r in result.checks]
    for written, real in zip(values["rungs"], result.checks, strict=True):
        assert written["passed"] is real.passed
        assert written["bound"] == real.bound
        assert written["value"] == (None if math.isnan(real.value) else real.value)
    assert set(values["curves"]) == set(result.curves)
    if result.reference is None:
        assert values["reference"] is None
    else:
        assert values["reference"]["chain"] == STEPS
        assert values["reference"]["images"] == "the user's"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_json_is_valid_for_infinite_errors():
    spec = SPEC.replace(clip=None)
    record = make_reference(spec=spec, loss=1.0)
    result = run_ladder(biased(1e38), spec, record)
    assert not result.passed
    json.dumps(report.to_json(result, "model.onnx"), allow_nan=False)


@pytest.mark.parametrize("name", RESULTS)
def test_the_text_lists_every_check_with_its_bound(results, name):
    result = results[name]
    text = report.to_markdown(result, "some/model.onnx", {})
    title = "FAILED" if not result.passed else "passed" if result.reference else "consistent with itself"
    if all(one.skipped for one in result.checks):
        title = "NOT VERIFIED"
    assert text.startswith(f"# model.onnx: {title}\n")
    assert result.verdict in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "measured" not in line]
    assert len(rows) == len(result.checks)
    for row, one in zip(rows, result.checks, strict=True):
        title, figure, bound, mark = (cell.strip() for cell in row.strip("|").split("|"))
        assert title == one.title
        expected = f"≥ {one.bound:.1%}" if one.at_least else f"≤ {one.bound:.2e}"
        assert bound == ("—" if one.skipped else expected)
        assert mark == ("not judged" if one.skipped else "holds" if one.passed else "**FAILS**")
        assert (figure == "—") == (one.skipped is not None)
        (meaning,) = (line for line in text.splitlines() if line.startswith(f"- **{one.title}.** "))
        assert len(meaning) > len(one.title) + 30, "what it means"
    assert "nan" not in text.lower()


def test_a_bound_is_printed_with_all_its_digits():
    """0.999 is not 1: "≥ 100 %" would be another bound."""
    for bounds in BOUNDS.values():
        assert float(f"{bounds.pixels:.1%}".rstrip("%")) / 100 == pytest.approx(bounds.pixels, abs=1e-9)
        for bound in (bounds.eps, bounds.eps_pixel):
            assert float(f"{bound:.2e}") == bound


def test_a_report_without_a_reference_says_not_verified(results, tmp_path):
    names = [path.name for path in report.write(results["itself"], "model.onnx", tmp_path)]
    assert names == ["report.md", "report.json"]
    assert "NOT VERIFIED" in (tmp_path / "report.md").read_text()
    assert "NOT VERIFIED" not in report.to_markdown(results["passed"], "model.onnx", {})


def test_where_nothing_was_judged_nothing_has_passed(results):
    nothing = results["itself, one"]
    assert not nothing.judged
    assert not nothing.passed
    assert nothing.verdict == "NOT VERIFIED: nothing could be judged"
    assert results["itself"].judged  # control


def test_a_report_is_written_for_any_file_name(results, tmp_path):
    report.write(results["itself"], os.fsdecode(b"\xe4.onnx"), tmp_path)
    assert (tmp_path / "report.md").read_text().startswith("# ?.onnx: ")


def test_a_report_names_its_reference(results):
    text = report.to_markdown(results["passed"], "model.onnx", {})
    assert "NumPy, by hand, on real images, 32 timesteps from 0 to 999, a chain of 50 steps" in text
    own = dataclasses.replace(results["passed"], reference=make_reference(real=False))
    assert "on the network's own images" in report.to_markdown(own, "model.onnx", {})
    assert "toy" in text


PLOTS = ["error.png", "chain.png", "levels.png"]


@pytest.mark.slow
@needs_matplotlib
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("passed", [*PLOTS, "images.png"]), ("failed", [*PLOTS, "images.png"]), ("untrained", PLOTS[:2])],
)
def test_a_report_has_its_pictures(results, tmp_path, name, wanted):
    folder = tmp_path / "new" / "report"
    written = report.write(results[name], "model.onnx", folder, extra={"more": 1})
    assert written == [folder / entry for entry in ("report.md", "report.json", *wanted)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["report.md", "report.json", *wanted])
    assert json.loads((folder / "report.json").read_text())["more"] == 1
    text = (folder / "report.md").read_text(encoding="utf-8")
    for entry in wanted:
        assert f"]({entry})" in text
        with Image.open(folder / entry) as picture:
            picture.load()
            assert picture.format == "PNG"
            width, height = picture.size
            assert 250 <= width <= 1600
            assert 200 <= height <= 1600
            assert len(set(picture.convert("L").tobytes())) > 2, "something is on it"
    assert "pip install matplotlib" not in text


@needs_matplotlib
def test_plots_are_drawn_without_a_screen():
    """pyplot would need one."""
    program = "import sys, ddpmx.parity.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_the_images_show_pytorchs_above_the_files_above_the_difference(results, tmp_path):
    report.write(results["failed"], "model.onnx", tmp_path)
    result = results["failed"]
    with Image.open(tmp_path / "images.png") as picture:
        sheet = np.asarray(picture)
    zoom = sheet.shape[1] // (4 * 9 + 1)
    small = sheet[zoom // 2 :: zoom, zoom // 2 :: zoom]
    assert small.shape == (3 * 9 + 1, 4 * 9 + 1, 3)
    theirs = result.reference.final.transpose(0, 2, 3, 1)
    for i in range(4):
        above, middle, below = (small[1 + 9 * row : 9 + 9 * row, 1 + 9 * i : 9 + 9 * i] for row in range(3))
        assert np.array_equal(above, theirs[i])
        assert np.array_equal(middle, result.finals[i])
        assert np.array_equal(below, (64 * np.abs(theirs[i].astype(int) - result.finals[i])).clip(0, 255))


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_images_are_written_and_the_plots_are_not(results, tmp_path):
    (tmp_path / "error.png").write_text("of yesterday")
    (tmp_path / "report.json").write_bytes(YESTERDAY["report.json"])
    (tmp_path / "mine.png").write_text("not the report's")
    report.write(results["passed"], "model.onnx", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.png", "mine.png", "report.json", "report.md"]
    with Image.open(tmp_path / "images.png") as picture:
        assert min(picture.size) >= 200
    assert "](images.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("other", [None, b"", b"[]", b'{"scores": []}'])
def test_files_with_a_report_s_names_that_are_not_of_a_report_are_kept(results, tmp_path, other):
    (tmp_path / "error.png").write_text("not the report's")
    if other is not None:
        (tmp_path / "report.json").write_bytes(other)
    before = content(tmp_path)
    with pytest.raises(OutputError, match=r"refusing to overwrite .*: not part of a report"):
        report.write(results["passed"], "model.onnx", tmp_path)
    assert content(tmp_path) == before


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize("name", ["passed", "untrained"])
def test_without_matplotlib_the_text_names_the_package_to_install(results, tmp_path, name):
    report.write(results[name], "model.onnx", tmp_path)
    assert "pip install matplotlib" in (tmp_path / "report.md").read_text(encoding="utf-8")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


YESTERDAY = dict.fromkeys(["report.md", *PLOTS, "images.png"], b"of yesterday")
YESTERDAY["report.json"] = b'{"ddpmx": "of yesterday", "rungs": []}'


def draw_nothing(report: ParityReport, folder: Path) -> dict[str, str]:
    """Drawing takes half a second."""
    for name in PLOTS:
        (folder / name).write_bytes(b"of today")
    return dict.fromkeys(PLOTS, "drawn")


@pytest.mark.parametrize("before", [{}, YESTERDAY], ids=["new", "over another"])
@pytest.mark.parametrize("where", ["text", "json", "plots", "report.md", "report.json", "images.png"])
def test_a_report_is_written_as_a_whole_or_not_at_all(results, tmp_path, monkeypatch, before, where):
    folder = tmp_path / "report"
    folder.mkdir()
    for name, data in before.items():
        (folder / name).write_bytes(data)
    full = OSError(28, "No space left on device")
    if importlib.util.find_spec("matplotlib") is not None:
        from ddpmx.parity import plots

        monkeypatch.setattr(plots, "draw", raising(full) if where == "plots" else draw_nothing)
    elif where == "plots":
        pytest.skip("not verified here: the plots of a report (no matplotlib)")
    if where in ("text", "json"):
        write_text = Path.write_text

        def failing(self, *args, **kwargs):
            if self.suffix == {"text": ".md", "json": ".json"}[where]:
                raise full
            return write_text(self, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", failing)
    elif where != "plots":
        replace, failures = os.replace, [full]

        def failing(source, target):
            if Path(target) == folder / where and failures:
                raise failures.pop()
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match="report") as caught:
        report.write(results["passed"], "model.onnx", folder)
    assert "No space left" in caught.value.note
    monkeypatch.undo()
    assert content(folder) == before


def test_a_failed_write_removes_no_picture(results, tmp_path, monkeypatch):
    for name, data in YESTERDAY.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        report.write(results["itself"], "model.onnx", tmp_path)
    assert content(tmp_path) == YESTERDAY


def test_a_report_replaces_another_and_its_stale_pictures(results, tmp_path):
    for name, data in YESTERDAY.items():
        (tmp_path / name).write_bytes(data)
    written = report.write(results["itself"], "model.onnx", tmp_path)
    assert sorted(content(tmp_path)) == sorted(path.name for path in written) == ["report.json", "report.md"]
    assert b"of yesterday" not in content(tmp_path).values()


def test_a_file_in_place_of_the_folder_is_refused(results, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "report"):
        with pytest.raises(OutputError, match="file"):
            report.write(results["passed"], "model.onnx", folder)
    assert content(tmp_path) == {"file": b"x"}


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="not verified here: read-only folders (root may write)"
)
def test_a_read_only_folder_is_refused(results, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError):
            report.write(results["passed"], "model.onnx", tmp_path)
        assert content(tmp_path) == {}
    finally:
        tmp_path.chmod(0o700)
