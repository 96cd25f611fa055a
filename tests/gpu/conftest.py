"""Fixtures for a real GPU, which skip without one. Nothing here imports torch or TensorRT before a test needs it."""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpmx.backends.base import EXECUTORS, CopyingBackend
from ddpmx.backends.open import open_model
from ddpmx.cuda.executors import why_no_while
from ddpmx.cuda.kernels import Kernels
from ddpmx.device.discovery import gpus
from ddpmx.device.driver import Driver
from ddpmx.errors import BackendError
from ddpmx.models import shipped
from ddpmx.pipeline import Pipeline
from ddpmx.trt import build as trt_build
from ddpmx.trt import library as trt_library
from ddpmx.trt.build import BuildOptions
from gpu.arrays import Cupy, Maker, Ours, Torch
from gpu.stand_in import SPEC, StandIn

RTX_NAMES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities that TensorRT-RTX 1.7 knows by name."""


def importorskip(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        pytest.skip(f"not verified here: {what} ({name}: {str(error).splitlines()[0][:200]})")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU there is one skip for each file, instead of one for each test."""
    trouble, here = gpus().trouble, Path(__file__).parent
    if not trouble:
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.path.parent == here:
            files.setdefault(item.path, []).append(item)
    for path, found in files.items():
        reason = f"not verified here: {path.stem.removeprefix('test_')} on a GPU, {len(found)} tests ({trouble})"
        found[0].add_marker(pytest.mark.skip(reason=reason))
    left_out = [item for found in files.values() for item in found[1:]]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


# --- the GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver() -> Iterator[Driver]:
    if trouble := gpus().trouble:
        pytest.skip(f"not verified here: anything on a GPU ({trouble})")
    with Driver() as opened:
        yield opened


@pytest.fixture
def loaded(driver: Driver) -> Kernels:
    """Noise and update, compiled for this GPU."""
    return Kernels(driver)


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest, driver: Driver, loaded: Kernels) -> str:
    if request.param == "while" and (why := why_no_while(driver, loaded)):
        pytest.skip(f"not verified here: a chain in one launch ({why})")
    return str(request.param)


@pytest.fixture
def open_pipeline(driver: Driver) -> Iterator[Callable[..., Pipeline]]:
    """``open_pipeline(executor, device)``: a pipeline of the stand-in, or of another device's network."""
    opened: list[Pipeline] = []

    def make(executor: str = "auto", device: Any = None) -> Pipeline:
        device = device or StandIn(driver)
        opened.append(Pipeline(device.spec, CopyingBackend(device), executor=executor))
        return opened[-1]

    yield make
    for pipeline in opened:
        pipeline.close()


@pytest.fixture
def many_steps() -> int:
    """Enough for a chain to take some milliseconds, so that it can be stopped in the middle."""
    return 1000


@pytest.fixture
def many_images() -> int:
    """Enough for more than one wave of blocks on any GPU."""
    return 64


@pytest.fixture
def at_once() -> Callable[[list[Callable[[], None]]], None]:
    """Run functions in threads of their own, at the same time, and raise the first exception."""

    def run(functions: list[Callable[[], None]]) -> None:
        troubles: list[BaseException] = []

        def guarded(function: Callable[[], None]) -> None:
            try:
                function()
            except BaseException as error:
                troubles.append(error)

        threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if troubles:
            raise troubles[0]

    return run


# --- other libraries' arrays -----------------------------------------------------------------------------------------


@pytest.fixture(params=["ours", "torch", "cupy"])
def arrays(request: pytest.FixtureRequest, driver: Driver) -> Maker:
    """A library that makes arrays on the GPU."""
    if request.param == "ours":
        return Ours(driver)
    if request.param == "torch":
        return Torch(cuda_torch(), "cuda")
    cupy = importorskip("cupy", "cupy's arrays")
    return Cupy(cupy)


def cuda_torch() -> Any:
    torch = importorskip("torch", "torch on the GPU")
    if not torch.cuda.is_available():
        pytest.skip(f"not verified here: torch on the GPU (torch {torch.__version__} has no CUDA here)")
    return torch


@pytest.fixture
def torch_network(driver: Driver) -> Any:
    """``torch_network()``: a small network in torch as a DeviceBackend."""
    torch = cuda_torch()
    from gpu.torch_network import TorchDevice, small

    return lambda: TorchDevice(driver, torch, *small(torch))


# --- TensorRT --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Engines:
    """Builds plans with the installed TensorRT, and opens them."""

    library: Any
    folder: Path
    built: dict[Any, Path] = dataclasses.field(default_factory=dict)

    @property
    def kernels(self) -> Path:
        """A folder for what TensorRT-RTX compiles for this GPU, which takes seconds for a U-Net."""
        return self.folder / "kernels"

    def build(self, onnx: Path, **options: Any) -> Path:
        """A plan; smallest, best and largest batch are 1, 4 and 8 by default. Each plan is built once."""
        key = (onnx, tuple(sorted(options.items())))
        if key not in self.built:
            output = self.folder / f"{len(self.built)}.plan"
            trt_build.build(onnx, output, BuildOptions(**{"batch": (1, 4, 8), **options}), library=self.library)
            self.built[key] = output
        return self.built[key]

    def open(self, onnx: Path) -> tuple[Any, CopyingBackend]:
        """(spec, backend) of a plan of this file."""
        spec, backend = open_model(self.build(onnx), cache=self.kernels)
        assert isinstance(backend, CopyingBackend)
        return spec, backend


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory, gaussian_onnx: Path) -> Engines:
    """Skips where no TensorRT runs. For TensorRT-RTX on a GPU that it does not know, the skip quotes its error."""
    found = gpus()
    if found.trouble:
        pytest.skip(f"not verified here: engines ({found.trouble})")
    try:
        library = trt_library.load()
    except BackendError as error:
        pytest.skip(f"not verified here: engines ({error.fact}: {error.note})")
    made = Engines(library, tmp_path_factory.mktemp("plans"))
    sm = found.devices[0].sm
    try:
        _, backend = made.open(gaussian_onnx)
        backend.close()
    except BackendError as error:
        if library.is_rtx and sm not in RTX_NAMES:
            pytest.skip(f"not verified here: {library} on SM {sm}, which it does not know: {error.fact}: {error.note}")
        raise
    return made


@pytest.fixture
def plan(engines: Engines, gaussian_onnx: Path) -> Path:
    """A plan of the closed-form network, for batches of 1…8."""
    return engines.build(gaussian_onnx)


@pytest.fixture
def u_net() -> Path:
    """An ONNX file of a real U-Net in fp16, which needs no torch."""
    return shipped.find("garments")


@pytest.fixture
def references(request: pytest.FixtureRequest) -> list[tuple[str, Path, Any]]:
    """(name, ONNX file, PyTorch's record) of a small trained U-Net in fp32 and fp16."""
    importorskip("torch", "a trained network")
    importorskip("onnxscript", "a trained network")
    trained = request.getfixturevalue("trained")
    from ddpm_export.proof.proof import record_checkpoint

    reference = record_checkpoint(trained.run)
    return [("fp32", trained.fp32, reference), ("fp16", trained.fp16, reference)]


# --- ONNX Runtime ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ort_pipeline(gaussian_onnx: Path) -> Iterator[Any]:
    """The closed-form network by ONNX Runtime's CUDA provider."""
    if trouble := gpus().trouble:
        pytest.skip(f"not verified here: ONNX Runtime on a GPU ({trouble})")
    onnxruntime = importorskip("onnxruntime", "ONNX Runtime on a GPU")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("not verified here: ONNX Runtime on a GPU (this onnxruntime has no CUDA provider)")
    spec, backend = open_model(gaussian_onnx, providers=("cuda",))
    with Pipeline(spec, backend) as pipeline:
        yield pipeline


@pytest.fixture
def noise() -> np.ndarray:
    """float32 [5, C, H, W], states to begin with."""
    return np.random.default_rng(0).standard_normal((5, *SPEC.shape)).astype(np.float32)
