"""Every test for GPUs, on the fakes; and the stand-in's kernel, whose PTX is executed and assembled here."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpu
from gpu.stand_in import PTX, factors, scaled
from gpu.stand_in import SPEC as STAND_IN
from gpu.test_chains import *  # noqa: F403
from gpu.test_engines import *  # noqa: F403
from gpu.test_kernels import *  # noqa: F403
from gpu.test_networks import *  # noqa: F403
from oracles import ptx

pytestmark = pytest.mark.slow

GPU = Path(next(iter(gpu.__path__)))


def test_no_test_for_gpus_is_left_out():
    modules = [importlib.import_module(f"gpu.{path.stem}") for path in sorted(GPU.glob("test_*.py"))]
    names = [name for module in modules for name in vars(module) if name.startswith("test_")]
    assert len(modules) == 4
    assert len(names) == len(set(names)), "two tests of the same name: one of them would not run here"
    assert set(names) <= set(globals())


def test_tests_for_gpus_import_nothing_heavy():
    """They are collected on every machine."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import gpu.conftest, gpu.test_chains, gpu.test_engines, gpu.test_kernels, gpu.test_networks\n"
        "print([m for m in ('torch', 'tensorrt', 'tensorrt_rtx', 'onnx', 'onnxruntime', 'cupy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(GPU.parent)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- the stand-in's kernel -------------------------------------------------------------------------------------------


def test_the_ptx_of_the_stand_in_equals_its_twin():
    kernel = ptx.parse(PTX.decode().rstrip("\0"))["scale"]
    batch, image, block = 3, int(np.prod(STAND_IN.shape)), 128
    x = np.random.default_rng(0).standard_normal((batch, *STAND_IN.shape)).astype(np.float32)
    t, by, out = np.array([0, 999, 500], np.int32), factors(STAND_IN), np.full_like(x, np.nan)
    values = (*(array.ctypes.data for array in (x, t, by, out)), image, x.size)
    arguments = dict(zip(kernel.parameters, values, strict=True))
    for number in range(-(-x.size // block)):
        for thread in range(block):
            special = {"%ctaid.x": number, "%tid.x": thread, "%ntid.x": block}
            for _ in ptx.Thread(kernel, arguments, special).run():
                pass
    assert out.tobytes() == scaled(x, t, by).tobytes()


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_120"])
def test_the_ptx_of_the_stand_in_assembles(tmp_path, architecture):
    ptxas = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
    if ptxas is None:
        pytest.skip("not verified here: that the stand-in's PTX assembles (no ptxas)")
    (tmp_path / "scale.ptx").write_bytes(PTX.rstrip(b"\0"))
    command = [ptxas, f"-arch={architecture}", str(tmp_path / "scale.ptx"), "-o", str(tmp_path / "scale.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "is not defined for option" in done.stderr:
        pytest.skip(
            f"not verified here: that the stand-in's PTX assembles for {architecture} (this ptxas does not support it)"
        )
    assert done.returncode == 0, done.stderr
