"""What several files here share: builds with TensorRT-RTX."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from ddpmx.trt import build as trt_build
from ddpmx.trt import library as trt_library
from ddpmx.trt.build import BuildOptions
from ddpmx.trt.library import Library
from oracles.engines import NO_GPU

# --- builds ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="not verified here: what TensorRT-RTX builds (it is not installed)")
    return trt_library.load("TensorRT-RTX")


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
        return trt_build.build(path, output, options, **{"library": library, "devices": NO_GPU, **given})

    return call
