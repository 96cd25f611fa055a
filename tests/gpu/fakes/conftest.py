"""The same fixtures without a GPU: a fake driver that runs the real kernels on the CPU, and a fake TensorRT.

They run each test of tests/gpu once, so that a slip in a test is found before it meets a GPU. What the tests prove on a GPU
they do not prove here.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

import ddpmx
from ddpmx.backends import ort_device, trt
from ddpmx.backends.open import open_model
from ddpmx.backends.ort import open_onnx
from ddpmx.device.driver import Driver
from ddpmx.pipeline import Pipeline
from ddpmx.trt import library as trt_library
from gpu.arrays import Cupy, Ours, Torch
from gpu.stand_in import scaled
from gpu.torch_network import TorchDevice, small
from oracles import cuda_on_host, gaussian
from oracles.device_chain import array_at
from oracles.fake_cuda import Failure, FakeCuda
from oracles.fake_onnxruntime import FakeOrt
from oracles.fake_tensorrt import ADA, FakeTrt
from oracles.parity import make_reference
from oracles.plans import RECORD, make_plan, name_of


class Cuda(FakeCuda):
    """Runs the stand-in's kernel, refuses invalid PTX, and captures copies, as a real driver does."""

    def _cuModuleLoadDataEx(self, out, image, count, options, values):
        if b".entry" not in image:
            ctypes.memmove(values[0], b"ptxas fatal: syntax error\0", 26)
            raise Failure(222)
        super()._cuModuleLoadDataEx(out, image, count, options, values)

    def _cuMemAlloc_v2(self, out, size):
        if size > 1 << 32:
            raise Failure(2)
        super()._cuMemAlloc_v2(out, size)

    def _cuMemcpyDtoDAsync_v2(self, to, source, size, stream):
        if self._stream(stream).capture is None:
            super()._cuMemcpyDtoDAsync_v2(to, source, size, stream)
        else:  # a copy on the device becomes a node as well
            self.enqueue(stream, lambda: ctypes.memmove(to, source, size), "copy")

    def _cuGraphAddNode_v2(self, out, graph, *rest):
        super()._cuGraphAddNode_v2(out, graph, *rest)
        node = self._get("graph", graph)[-1]  # two pipelines have two of them at the same time
        node.body_handle = node.bodies[0] = 0x600D0000 + (node.handle >> 32) % 0x10000

    def _cuLaunchKernel(self, function, *arguments):
        if self._get("function", function) != "scale":
            super()._cuLaunchKernel(function, *arguments)
            return
        grid, _, _, block, *_, stream, params, _ = arguments
        x, t, factors, out, image, count = (ctypes.c_uint64.from_address(pointer).value for pointer in params)
        assert grid * block >= count > (grid - 1) * block

        def run():
            n, floats = count // image, ctypes.c_float
            steps = array_at(t, (n,), ctypes.c_int32)
            array_at(out, (n, image), floats)[...] = scaled(
                array_at(x, (n, image), floats), steps, array_at(factors, (1000,), floats)
            )

        self.enqueue(stream, run)


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    try:
        return cuda_on_host.build(tmp_path_factory.mktemp("kernels"), Path(ddpmx.__file__).parent / "cuda")
    except cuda_on_host.Unavailable as why:
        pytest.skip(f"not verified here: whether the tests for GPUs run at all ({why})")


@pytest.fixture
def fake(host_kernels):
    """A fake driver. Afterwards nothing may have leaked or been misused."""
    cuda = Cuda(host_kernels)
    cuda.burst = 64
    yield cuda
    cuda.live.pop("function", None)  # freed with its module
    assert (cuda.alive(), cuda.retained, cuda.faults) == ({}, 0, [])


@pytest.fixture
def driver(fake):
    with Driver(library=fake) as opened:
        yield opened


@pytest.fixture
def many_steps():
    return 200


@pytest.fixture
def many_images():
    return 2


@pytest.fixture
def at_once():
    """One after the other, since the fake driver is not thread-safe."""

    def run(functions):
        for function in functions:
            function()

    return run


@pytest.fixture
def figure():
    """Asserts the bounds and records nothing: these figures are not of a GPU."""

    def check(what, value, *, at_most=None, at_least=None):
        assert value <= at_most if at_most is not None else value >= at_least, what

    return check


# --- other libraries' arrays -----------------------------------------------------------------------------------------


class HostTorch(Torch):
    """torch for CPUs: its tensors are on the host, and it cannot view device memory."""

    def adopt(self, array):
        return self._torch.from_numpy(array.numpy())


class HostCupy:
    """The used part of cupy, by NumPy."""

    asarray, asnumpy = staticmethod(np.array), staticmethod(np.asarray)
    from_dlpack = staticmethod(lambda array: array.numpy())


@pytest.fixture(params=["ours", "torch", "cupy"])
def arrays(request, driver):
    if request.param == "ours":
        return Ours(driver)
    if request.param == "cupy":
        return Cupy(HostCupy)
    return HostTorch(pytest.importorskip("torch", reason="not verified here: torch's arrays (no torch)"), "cpu")


class HostTorchDevice(TorchDevice):
    """torch on the host, run in stream order by the fake driver."""

    def __init__(self, driver, torch, spec, call, *, largest=8):
        super().__init__(driver, torch, spec, call, largest=largest, device="cpu")

    def see(self, address, shape, typestr):
        kind = {"<f4": ctypes.c_float, "<i4": ctypes.c_int32}[typestr]
        return self.torch.from_numpy(array_at(address, shape, kind))

    def put(self, stream, work):
        self.driver._library.enqueue(stream, work)


@pytest.fixture
def torch_network(driver):
    torch = pytest.importorskip("torch", reason="not verified here: a network of torch's (no torch)")
    return lambda: HostTorchDevice(driver, torch, *small(torch, "cpu"))


# --- TensorRT and ONNX Runtime ---------------------------------------------------------------------------------------


class FakeEngines:
    """Plans with the closed form's name, which run the closed form."""

    def __init__(self, fake, library, folder):
        self.module, self.library, self.folder, self.kernels = fake, library, folder, folder / "kernels"

    def build(self, onnx, *, batch=(1, 4, 8)):
        self.module.profiles = (batch,)
        path = self.folder / "model.plan"
        path.write_bytes(make_plan(spec=gaussian.SPEC))
        return path

    def open(self, onnx):
        return open_model(self.build(onnx), cache=self.kernels)


@pytest.fixture
def engines(fake, monkeypatch, tmp_path_factory):
    module = FakeTrt(fake, name=name_of(gaussian.SPEC).decode())
    library = module.library()
    monkeypatch.setattr(trt_library, "load", lambda flavour=None: library)
    monkeypatch.setattr(trt_library, "host_platform", lambda: RECORD.platform)
    monkeypatch.setattr(trt, "gpus", lambda: ADA)
    monkeypatch.setattr(trt, "Driver", lambda: Driver(library=fake))
    return FakeEngines(module, library, tmp_path_factory.mktemp("plans"))


@pytest.fixture
def u_net(gaussian_onnx):
    return gaussian_onnx


@pytest.fixture
def references(gaussian_onnx):
    return [("fp32", gaussian_onnx, make_reference())]


@pytest.fixture
def ort_pipeline(fake, monkeypatch, gaussian_onnx):
    module = FakeOrt(fake)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    monkeypatch.setattr(ort_device, "Driver", lambda: Driver(library=fake))
    with Pipeline(gaussian.SPEC, open_onnx(gaussian_onnx, gaussian.SPEC, providers=("cuda",))) as pipeline:
        yield pipeline
