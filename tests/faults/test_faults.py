"""Injected faults and signals, a few on each run; ``make faults`` is the same at length."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="not verified here: injected faults (not Linux)"),
]

FOLDER = Path(__file__).parent


def run(program: str, *arguments: str) -> tuple[int, str]:
    """The exit code and the output."""
    pytest.importorskip("onnxruntime", reason="not verified here: injected faults (no ONNX Runtime)")
    if program == "run.py" and shutil.which("cc") is None:
        pytest.skip("not verified here: injected faults (no C compiler)")
    command = [sys.executable, str(FOLDER / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_failing_writes_spoil_nothing():
    code, output = run("run.py", "--count", "24", "--only", "generate", "build")
    assert code == 0, output
    table = {
        line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith(("generate", "build"))
    }
    assert table.keys() == {"generate", "build"}, output
    assert all(int(refused) > 4 for _, refused, _ in table.values()), output


def test_a_plan_that_is_spoiled_is_noticed():  # control
    code, output = run("run.py", "--count", "12", "--only", "build", "--plant")
    assert code == 1, output
    assert "WRONG case" in output
    assert "the sidecar contradicts its plan" in output or "spoiled: gaussian.plan" in output


def test_signals_decide_the_exit_code():
    code, output = run("signals.py", "--count", "6", "--only", "generate", "info", "self-test")
    assert code == 0, output
