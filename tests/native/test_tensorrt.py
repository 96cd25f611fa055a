"""libddpmx_trt compiled with real headers of TensorRT, and run with a fake TensorRT library.

``TENSORRT_ROOTS=/opt/TensorRT-10.3:/opt/TensorRT-11.1 pytest tests/native/test_tensorrt.py`` takes several versions.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from native.conftest import ROOT, build_native

pytestmark = pytest.mark.slow

ROOTS = [
    Path(root) for root in os.environ.get("TENSORRT_ROOTS", os.environ.get("TENSORRT_ROOT", "")).split(":") if root
]
SYSTEM = [Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include/aarch64-linux-gnu"), Path("/usr/include")]


@pytest.fixture(scope="module", params=ROOTS or ["system"], ids=str)
def module(request) -> Path:
    """The folder in which libddpmx_trt.so has been built."""
    if not ROOTS and not any((folder / "NvInferRuntime.h").is_file() for folder in SYSTEM):
        pytest.skip(
            "not verified here: that libddpmx_trt compiles and runs (no headers of TensorRT; see TENSORRT_ROOTS)"
        )
    number = ROOTS.index(request.param) if ROOTS else 0
    where = [f"-DTENSORRT_ROOT={request.param}"] if ROOTS else []
    folder = ROOT / "build" / f"native-tensorrt-{number}"
    options = ["-DDDPMX_TENSORRT=ON", "-DCMAKE_UNITY_BUILD=ON", *where]
    return build_native(folder, *options, targets=["ddpmx_trt", "test_trt_module"])


def test_it_runs_a_plan_on_a_stand_in(module):
    done = subprocess.run([module / "tests" / "test_trt_module"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^[1-9]\d* checks, 0 failed$", done.stdout, re.MULTILINE)


def test_it_is_not_linked_to_tensorrt(module):
    symbols = subprocess.run(
        ["nm", "-D", module / "libddpmx_trt.so"], capture_output=True, text=True, check=True
    ).stdout
    defined = {line.split()[-1] for line in symbols.splitlines() if " T " in line}
    missing = {line.split()[-1] for line in symbols.splitlines() if " U " in line}
    assert defined == {"ddpmx_trt_get@@DDPMX_TRT_1"}
    assert missing
    assert not [name for name in missing if re.search(r"nvinfer|[iI]nfer|cuda|^cu[A-Z]", name)]
