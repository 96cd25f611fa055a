"""Fixtures that several files here share: builds with TensorRT-RTX, and plans of conditioned networks."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from ddpmx.backends import trt
from ddpmx.device.driver import Driver
from ddpmx.trt import build as trt_build
from ddpmx.trt import library as trt_library
from ddpmx.trt.build import BuildOptions
from ddpmx.trt.library import Library
from oracles.cuda_on_host import Toy
from oracles.engines import NO_GPU
from oracles.fake_tensorrt import ADA, FakeTrt
from oracles.plans import make_plan

# --- builds ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="not verified here: what TensorRT-RTX builds (it is not installed)")
    return trt_library.load("TensorRT-RTX")


@pytest.fixture
def folder(tmp_path):
    """A folder of its own, so that leftovers can be listed."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def toy(folder, gaussian_onnx) -> Path:
    return Path(shutil.copy(gaussian_onnx, folder / "model.onnx"))


@pytest.fixture
def build(library):
    """``build(path, output, batch=(1, 2, 4), …)`` takes fields of the options as well as arguments of ``build``."""
    names = {field.name for field in dataclasses.fields(BuildOptions)}

    def call(path, output=None, **arguments):
        options = BuildOptions(**{name: arguments.pop(name) for name in names & set(arguments)})
        return trt_build.build(path, output, options, **{"library": library, "devices": NO_GPU, **arguments})

    return call


# --- plans of conditioned networks -----------------------------------------------------------------------------------


@pytest.fixture
def conditioned_plan(tmp_path, monkeypatch, fake):
    """``conditioned_plan(spec)``: the path of a plan of this model, on a fake TensorRT and a fake driver."""
    monkeypatch.setattr(trt_library, "host_platform", lambda: "linux x86_64")
    monkeypatch.setattr(trt, "Driver", lambda: Driver(library=fake))
    monkeypatch.setattr(trt, "gpus", lambda: ADA)

    def make(spec, **options):
        path = tmp_path / "model.plan"
        path.write_bytes(make_plan(spec=spec))
        module = FakeTrt(fake, spec=spec, **options)
        module.make = lambda: Toy(spec.shape)
        monkeypatch.setattr(trt_library, "load", lambda flavour=None: module.library())
        return path

    return make
