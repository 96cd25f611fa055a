"""parity, info and doctor on the command line, and what export does beside exporting."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ddpmx.parity.reference import Reference
from oracles.gaussian import SPEC, coefficients
from oracles.parity import make_reference

# --- info ------------------------------------------------------------------------------------------------------------


def test_info_says_what_an_onnx_file_is(ddpmx, gaussian_onnx):
    done = ddpmx("info", gaussian_onnx)
    assert done.code == 0
    for said in ("ONNX", "8×8", "T = 1000", "linear", "eps", "fp32", "opset"):
        assert said in done.out
    told = json.loads(ddpmx("info", gaussian_onnx, "--json").out)
    assert told["spec"]["shape"] == [3, 8, 8]
    assert told["inputs"] == {"x": "float32 ['batch', 3, 8, 8]", "t": "int32 ['batch']"}


def test_info_needs_no_library(gaussian_onnx):
    """Neither a model's nor a GPU's."""
    code = """
import sys
for name in ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "matplotlib"):
    sys.modules[name] = None
from ddpmx_cli.main import run
run()
"""
    done = subprocess.run([sys.executable, "-c", code, "info", str(gaussian_onnx)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8×8" in done.stdout


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(50), "neither"),
        (b"vtrt" + bytes(10), "whole TensorRT plan"),
        (b"\x08\x0a\x3a\xff", "whole ONNX"),
    ],
)
def test_info_refuses_what_it_cannot_read(refused, tmp_path, content, says):
    if content is not None:
        (tmp_path / "model").write_bytes(content)
    assert says in refused("info", tmp_path / "model")


def test_info_shows_a_foreign_plan_s_version(ddpmx, tmp_path):
    (tmp_path / "model.plan").write_bytes(b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]) + bytes(100))
    done = ddpmx("info", tmp_path / "model.plan")
    assert done.code == 0
    assert "TensorRT 10.3.0.26" in done.out
    assert "does not say" in done.out


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_here(ddpmx):
    import onnxruntime

    done = ddpmx("doctor")
    assert done.code == 0
    assert f"onnxruntime {onnxruntime.__version__}" in done.out
    assert "TensorRT" in done.out
    told = json.loads(ddpmx("doctor", "--json").out)
    assert told["libraries"]["onnxruntime"]["version"] == onnxruntime.__version__
    assert {"train", "export"} <= {finding["what"] for finding in told["findings"]}


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(tmp_path, gaussian_onnx):
    """gaussian.onnx with a record of what its closed form answers beside it."""
    shutil.copy(gaussian_onnx, tmp_path / "model.onnx")
    make_reference().save(tmp_path / "model.parity.npz")
    return tmp_path / "model.onnx"


def test_parity_finds_the_record_and_writes_a_report(ddpmx, judged):
    done = ddpmx("parity", judged)
    assert done.code == 0, done
    assert "PASSED" in done.out
    report = judged.with_suffix(".report")
    told = json.loads((report / "report.json").read_text())
    assert told["passed"] is True
    assert "ε, RMS" in (report / "report.md").read_text()


def test_parity_that_fails_says_so_in_one_line_and_exits_with_1(ddpmx, judged):
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


def test_answers_that_are_no_numbers_fail(ddpmx, judged):
    slope, _ = coefficients(SPEC.make_schedule())
    whole, value = judged.read_bytes(), np.float32(slope[0]).tobytes()
    assert whole.count(value) == 1
    judged.write_bytes(whole.replace(value, np.float32(np.nan).tobytes()))
    done = ddpmx("parity", judged)
    assert done.code == 1, done
    assert "not finite" in done.err
    assert "FAILED" in (judged.with_suffix(".report") / "report.md").read_text(), "no report of yesterday stays"


def test_parity_without_a_record_asks_for_one(ddpmx, refused, judged):
    judged.with_suffix(".parity.npz").unlink()
    said = refused("parity", judged)
    assert "--against" in said
    assert "--self-test" in said
    done = ddpmx("parity", judged, "--self-test")
    assert done.code == 0
    assert "NOT VERIFIED" in done.out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--self-test", "--against", "x.npz"), "exclude"),
        (("--full",), "--checkpoint"),
        (("--against", "missing.npz"), "no record"),
        (("--self-test", "--polygraphy"), "reference"),
    ],
)
def test_parity_refuses_flags_that_contradict(refused, judged, flags, says):
    assert says in refused("parity", judged, *flags)
    assert not judged.with_suffix(".report").exists()


def test_polygraphy_that_is_missing_is_an_error_of_ours(refused, judged, monkeypatch):
    pytest.importorskip("onnx", reason="not verified here: --polygraphy without Polygraphy (no ddpm_export)")
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert "pip install polygraphy" in refused("parity", judged, "--polygraphy")


def test_a_self_test_does_not_replace_the_report(ddpmx, judged):
    assert ddpmx("parity", judged).code == 0
    before = (judged.with_suffix(".report") / "report.md").read_bytes()
    assert ddpmx("parity", judged, "--self-test").code == 0
    assert (judged.with_suffix(".report") / "report.md").read_bytes() == before
    assert "NOT VERIFIED" in (judged.with_suffix(".self-test") / "report.md").read_text()


def test_parity_refuses_another_model_s_record(refused, judged):
    reference = Reference.load(judged.with_suffix(".parity.npz"))
    other = Reference(**{**vars(reference), "spec": reference.spec.replace(variance="fixed_small")})
    other.save(judged.with_suffix(".parity.npz"))
    assert "another model" in refused("parity", judged)


def test_parity_needs_neither_torch_nor_onnx(judged):
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


# --- what an attacker tried ------------------------------------------------------------------------------------------


def test_a_user_s_files_are_not_taken_for_a_report_s(refused, judged):
    own = judged.parent / "own"
    own.mkdir()
    (own / "images.png").write_text("mine")
    assert "not of a report" in refused("parity", judged, "-o", own)
    assert [(path.name, path.read_text()) for path in own.iterdir()] == [("images.png", "mine")]


def test_a_matplotlib_that_cannot_draw_loses_no_judgement(ddpmx, judged, monkeypatch):
    pytest.importorskip("matplotlib", reason="not verified here: a matplotlib that cannot draw (no matplotlib)")
    from ddpmx.parity import plots

    def broken(*_):
        raise ValueError("no such backend")

    monkeypatch.setattr(plots, "draw", broken)
    done = ddpmx("parity", judged)
    assert done.code == 0, done
    assert "No plots" in (judged.with_suffix(".report") / "report.md").read_text()


def test_a_matplotlibrc_in_the_current_folder_has_no_say(ddpmx, judged, monkeypatch):
    pytest.importorskip("matplotlib", reason="not verified here: a matplotlibrc in the way (no matplotlib)")
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    assert ddpmx("parity", judged).code == 0
    assert (judged.with_suffix(".report") / "error.png").exists()


def test_where_there_is_no_home_there_is_no_cache(monkeypatch):
    from pathlib import Path

    from ddpmx_cli import console

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert console.cache_folder() is None


def test_what_a_file_says_does_not_reach_the_terminal_as_commands(ddpmx, refused, tmp_path):
    from oracles import protobuf

    image = (protobuf.FLOAT, ("batch", 3, 8, 8))
    name = "x\x1b[31m\n  PASSED"
    model = protobuf.model({name: image, "t": (protobuf.INT32, ("batch",))}, {"eps": image})
    (tmp_path / "model.onnx").write_bytes(model)
    said = ddpmx("info", tmp_path / "model.onnx").out
    assert "\x1b" not in said
    assert "PASSED" in said
    assert not [line for line in said.splitlines() if line.strip().startswith("PASSED")]
    assert "\x1b" not in refused("info", tmp_path / "a\x1b[31mb")


def test_an_error_that_nobody_can_read_keeps_its_exit_code(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "ddpmx_cli.main", "info", str(tmp_path / "none")], stderr=full)
    assert done.returncode == 2


def test_a_missing_package_is_not_a_failed_parity(judged):
    code = "import sys; sys.modules['PIL'] = None; from ddpmx_cli.main import run; run()"
    done = subprocess.run([sys.executable, "-c", code, "parity", str(judged)], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
