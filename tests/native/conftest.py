"""libddpmx, built once for all tests that need it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runtime" / "native"
NOT_VERIFIED = "not verified here: anything of libddpmx ({})"


def tool(name: str) -> str | None:
    """The path of a program in this environment, or in the system."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def build_native(folder: Path, *options: str, targets: Sequence[str] = (), **environment: str) -> Path:
    """Build the CMake project, or these ``targets``, in ``folder``, or update it; one process at a time."""
    cmake, compiler = tool("cmake"), shutil.which("c++") or shutil.which("g++")
    if cmake is None or compiler is None:
        pytest.skip(NOT_VERIFIED.format("no CMake" if cmake is None else "no C++ compiler"))
    folder.mkdir(parents=True, exist_ok=True)
    environ = {**os.environ, **environment}
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "-S", str(SOURCE), "-B", str(folder), "-DDDPMX_TESTS=ON", "-DDDPMX_WERROR=ON", *options],
            [cmake, "--build", str(folder), "--parallel", "2", *(["--target", *targets] if targets else [])],
        ):
            done = subprocess.run(command, capture_output=True, text=True, env=environ)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return folder


@pytest.fixture(scope="session")
def native_build() -> Path:
    """The folder in which libddpmx and its tests have been built. Its wheel is built file by file (test_package)."""
    return build_native(ROOT / "build" / "native", "-DCMAKE_UNITY_BUILD=ON")


@pytest.fixture(scope="session")
def ort_library() -> Path:
    """The shared library in Python's onnxruntime: the same code, so the same bits."""
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="not verified here: that libddpmx gives Python's images (no ONNX Runtime)"
    )
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("not verified here: that libddpmx gives Python's images (this ONNX Runtime has no shared library)")
    return found[0]
