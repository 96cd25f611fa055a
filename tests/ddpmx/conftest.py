"""What several files here share: a fake driver with the kernels on the host, and builds with TensorRT-RTX."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

import ddpmx
from ddpmx import engine, tensorrt_library
from ddpmx.backends import trt
from ddpmx.cuda.driver import Driver
from ddpmx.engine import BuildOptions
from ddpmx.tensorrt_library import Library
from oracles import cuda_on_host
from oracles.engines import NO_GPU
from oracles.fake_cuda import FakeCuda
from oracles.plans import RECORD, make_plan

# --- a chain on a fake driver ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    try:
        return cuda_on_host.build(tmp_path_factory.mktemp("kernels"), Path(ddpmx.__file__).parent / "cuda")
    except cuda_on_host.Unavailable as why:
        pytest.skip(f"not verified here: the executors' control flow ({why})")


@pytest.fixture
def fake(kernels):
    """A driver that is asked afterwards whether anything leaked or was abused."""
    cuda = FakeCuda(kernels)
    yield cuda
    cuda.live.pop("function", None)  # a module's, and gone with it
    assert (cuda.alive(), cuda.retained, cuda.faults) == ({}, 0, [])


# --- plans on a fake TensorRT and a fake driver ---------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_library, "host_platform", lambda: RECORD.platform)
    path = tmp_path / "model.plan"
    path.write_bytes(make_plan())
    return path


@pytest.fixture
def plan_driver(fake, monkeypatch):
    """A driver that the engine makes and closes itself."""
    monkeypatch.setattr(trt, "Driver", lambda: Driver(library=fake))
    return fake


# --- builds ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="not verified here: what TensorRT-RTX builds (it is not installed)")
    return tensorrt_library.load("TensorRT-RTX")


@pytest.fixture
def folder(tmp_path):
    """A folder of its own, so that what is left in it can be listed."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def toy(folder, gaussian_onnx) -> Path:
    return Path(shutil.copy(gaussian_onnx, folder / "model.onnx"))


@pytest.fixture
def build(library):
    """``build(path, output, batch=(1, 2, 4), …)``: fields of the options and arguments of ``build`` alike."""
    names = {field.name for field in dataclasses.fields(BuildOptions)}

    def call(path, output=None, **given):
        options = BuildOptions(**{name: given.pop(name) for name in names & set(given)})
        return engine.build(path, output, options, **{"library": library, "devices": NO_GPU, **given})

    return call
