"""`ddpmx parity`: reports, exit codes, refusals, and hostile surroundings."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ddpmx.parity import ladder
from ddpmx.parity.reference import Reference
from oracles.gaussian import SPEC, coefficients
from oracles.parity import make_reference


@pytest.fixture
def judged(tmp_path, gaussian_onnx):
    """gaussian.onnx, and beside it a record of the closed form's outputs."""
    shutil.copy(gaussian_onnx, tmp_path / "model.onnx")
    make_reference().save(tmp_path / "model.parity.npz")
    return tmp_path / "model.onnx"


def test_the_record_beside_the_file_is_found_and_a_report_is_written(ddpmx, judged):
    done = ddpmx("parity", judged)
    assert done.code == 0, done
    assert "PASSED" in done.out
    report = judged.with_suffix(".report")
    values = json.loads((report / "report.json").read_text())
    assert values["passed"] is True
    assert "ε, RMS" in (report / "report.md").read_text()


def test_a_failure_is_one_line_and_exit_code_1(ddpmx, judged):
    reference = Reference.load(judged.with_suffix(".parity.npz"))
    out = reference.out.copy()
    out[5] += np.float32(1e-2)
    Reference(**{**vars(reference), "out": out}).save(judged.with_suffix(".parity.npz"))
    done = ddpmx("parity", judged, "-o", judged.parent / "report")
    assert done.code == 1
    (line,) = done.err.strip().splitlines()
    assert "FAILED" in line
    assert f"t = {reference.t[5]}" in line
    assert json.loads((judged.parent / "report" / "report.json").read_text())["passed"] is False


def test_outputs_that_are_not_finite_fail(ddpmx, judged):
    slope, _ = coefficients(SPEC.make_schedule())
    whole, value = judged.read_bytes(), np.float32(slope[0]).tobytes()
    assert whole.count(value) == 1
    judged.write_bytes(whole.replace(value, np.float32(np.nan).tobytes()))
    done = ddpmx("parity", judged)
    assert done.code == 1, done
    assert "not finite" in done.err
    assert "FAILED" in (judged.with_suffix(".report") / "report.md").read_text(), "no older report stays"


def test_without_a_record_the_error_names_the_flags(ddpmx, refused, judged):
    judged.with_suffix(".parity.npz").unlink()
    error = refused("parity", judged)
    assert "--against" in error
    assert "--self-test" in error
    done = ddpmx("parity", judged, "--self-test")
    assert done.code == 0
    assert "NOT VERIFIED" in done.out


def test_where_no_check_can_be_made_that_is_an_error_and_no_pass(refused, judged, monkeypatch):
    monkeypatch.setattr(ladder, "run_ladder", functools.partial(ladder.run_ladder, batch=1))
    error = refused("parity", judged, "--self-test")
    assert "NOT VERIFIED: nothing could be judged\nNote: identical rows, largest difference: not judged" in error
    text = (judged.with_suffix(".self-test") / "report.md").read_text()
    assert text.startswith(f"# {judged.name}: NOT VERIFIED\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--self-test", "--against", "x.npz"), "exclude"),
        (("--full",), "--checkpoint"),
        (("--against", "missing.npz"), "no record"),
        (("--self-test", "--polygraphy"), "reference"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(refused, judged, flags, message):
    assert message in refused("parity", judged, *flags)
    assert not judged.with_suffix(".report").exists()


def test_without_polygraphy_the_error_says_what_to_install(refused, judged, monkeypatch):
    pytest.importorskip("onnx", reason="not verified here: --polygraphy without Polygraphy (no ddpm_export)")
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert "pip install polygraphy" in refused("parity", judged, "--polygraphy")


@pytest.mark.slow
def test_a_self_test_does_not_replace_the_report(ddpmx, judged):
    assert ddpmx("parity", judged).code == 0
    before = (judged.with_suffix(".report") / "report.md").read_bytes()
    assert ddpmx("parity", judged, "--self-test").code == 0
    assert (judged.with_suffix(".report") / "report.md").read_bytes() == before
    assert "NOT VERIFIED" in (judged.with_suffix(".self-test") / "report.md").read_text()


def test_the_record_of_another_model_is_refused(refused, judged):
    reference = Reference.load(judged.with_suffix(".parity.npz"))
    other = Reference(**{**vars(reference), "spec": reference.spec.replace(variance="fixed_small")})
    other.save(judged.with_suffix(".parity.npz"))
    assert "another model" in refused("parity", judged)


@pytest.mark.slow
def test_neither_torch_nor_onnx_is_needed(judged):
    code = """
import sys
for name in ("torch", "onnx", "polygraphy", "ddpm_export"):
    sys.modules[name] = None
from ddpmx_cli.main import run
run()
"""
    done = subprocess.run([sys.executable, "-c", code, "parity", str(judged)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PASSED" in done.stdout


# --- hostile surroundings --------------------------------------------------------------------------------------------


def test_a_user_s_files_are_not_replaced_by_a_report(refused, judged):
    own = judged.parent / "own"
    own.mkdir()
    (own / "images.png").write_text("mine")
    assert "not part of a report" in refused("parity", judged, "-o", own)
    assert [(path.name, path.read_text()) for path in own.iterdir()] == [("images.png", "mine")]


def test_a_broken_matplotlib_costs_only_the_plots(ddpmx, judged, monkeypatch):
    pytest.importorskip("matplotlib", reason="not verified here: a matplotlib that cannot draw (no matplotlib)")
    from ddpmx.parity import plots

    def broken(*_):
        raise ValueError("no such backend")

    monkeypatch.setattr(plots, "draw", broken)
    done = ddpmx("parity", judged)
    assert done.code == 0, done
    assert "No plots" in (judged.with_suffix(".report") / "report.md").read_text()


@pytest.mark.slow
def test_a_matplotlibrc_in_the_current_folder_is_ignored(ddpmx, judged, monkeypatch):
    pytest.importorskip("matplotlib", reason="not verified here: a matplotlibrc in the way (no matplotlib)")
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    assert ddpmx("parity", judged).code == 0
    assert (judged.with_suffix(".report") / "error.png").exists()


def test_without_a_home_folder_there_is_no_cache(monkeypatch):
    from pathlib import Path

    from ddpmx_cli import console

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert console.cache_folder() is None


def test_control_characters_of_a_file_do_not_reach_the_terminal(ddpmx, refused, tmp_path):
    from oracles import protobuf

    image = (protobuf.FLOAT, ("batch", 3, 8, 8))
    name = "x\x1b[31m\n  PASSED"
    model = protobuf.model({name: image, "t": (protobuf.INT32, ("batch",))}, {"eps": image})
    (tmp_path / "model.onnx").write_bytes(model)
    out = ddpmx("info", tmp_path / "model.onnx").out
    assert "\x1b" not in out
    assert "PASSED" in out
    assert not [line for line in out.splitlines() if line.strip().startswith("PASSED")]
    assert "\x1b" not in refused("info", tmp_path / "a\x1b[31mb")


def test_an_error_without_a_standard_error_keeps_its_exit_code(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "ddpmx_cli.main", "info", str(tmp_path / "none")], stderr=full)
    assert done.returncode == 2


def test_a_missing_package_is_not_a_failed_parity(judged):
    code = "import sys; sys.modules['PIL'] = None; from ddpmx_cli.main import run; run()"
    done = subprocess.run([sys.executable, "-c", code, "parity", str(judged)], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
