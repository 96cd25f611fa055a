"""An ONNX Runtime whose provider for GPUs is the toy network on a fake driver, for control flow.

It is as strict as ONNX Runtime: names of options must be known, bindings must belong to the session that runs them, and
the stream of a session must outlive it.
"""

from __future__ import annotations

import ctypes
import weakref
from types import SimpleNamespace

import numpy as np

from ddpmx.backends.base import Buffers
from oracles.cuda_on_host import Toy
from oracles.device_chain import array_at

CUDA, TENSORRT, RTX, CPU = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "CPUExecutionProvider",
)
OLD_RTX = "nv_tensorrt_rtx"
"""The plugin's name for itself in its releases up to 0.4."""

OPTIONS = {
    CUDA: {"device_id", "user_compute_stream", "use_tf32", "cudnn_conv_algo_search"},
    TENSORRT: {"device_id", "user_compute_stream"},
    RTX: {"has_user_compute_stream", "user_compute_stream"},
    OLD_RTX: {"has_user_compute_stream", "user_compute_stream"},
    CPU: set(),
}


class Fail(Exception):  # noqa: N818
    """Like ONNX Runtime's own errors, it derives from Exception alone."""


class FakeOrt:
    """The module, and the plugin's module as well.

    Attributes:
        listed: the providers that the build lists.
        instead: the providers that a session gets in place of the requested ones.
        refuse: what raises: "preload", "session", "bind", "run", "register".
        refuse_at: the number, from 1, of the run that is refused.
        devices: how many GPUs the plugin finds.
        plugin: the name that the plugin gives itself.
        model: the path, or the bytes, of the last session.
        requested: (provider, options) of the last session, best first.
        runs: how many there were.
    """

    __version__ = "1.31.1"
    __file__ = None

    def __init__(self, cuda, *, listed=(TENSORRT, CUDA, CPU)):
        self.cuda, self.listed = cuda, list(listed)
        self.instead: list[str] = []
        self.plugin = RTX
        self.refuse: set[str] = set()
        self.refuse_at, self.runs, self.devices, self.preloaded, self.registered = 0, 0, 1, 0, 0
        self.model: str | bytes = ""
        self.requested: list[tuple[str, dict[str, str]]] = []
        self.events: list[str] = []

    def check(self, what):
        if what in self.refuse:
            raise Fail(f"[ONNXRuntimeError] : 1 : FAIL : {'/onnxruntime_src/' * 40} {what} refused")

    # --- the module --------------------------------------------------------------------------------------------------

    def get_available_providers(self):
        return list(self.listed)

    def get_all_providers(self):
        return ["CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self):
        self.preloaded += 1
        print("Failed to load libcublasLt.so.13")
        if "preload" in self.refuse:
            raise OSError("no such file")

    def get_ep_devices(self):
        return [SimpleNamespace(ep_name=self.plugin) for _ in range(self.devices)] if self.registered else []

    def register_execution_provider_library(self, name, path):
        assert (name, path) == (self.plugin, "plugin.so")
        self.check("register")
        self.registered += 1

    def SessionOptions(self):
        entries: dict[str, str] = {}
        options = SimpleNamespace(log_severity_level=2, devices=[], add_session_config_entry=entries.__setitem__)
        options.entries = entries
        options.add_provider_for_devices = lambda devices, values: options.devices.append((devices[0].ep_name, values))
        return options

    def RunOptions(self):
        entries: dict[str, str] = {}
        return SimpleNamespace(entries=entries, add_run_config_entry=entries.__setitem__)

    def InferenceSession(self, path, options, providers=None, *, enable_fallback=1):
        self.model = path
        assert not enable_fallback, "it would print, and run on the CPU"
        assert options.entries == {"session.load_model_format": "ONNX"}, "the file's name would decide what it is"
        self.requested = [*options.devices, *(providers or [])]
        for name, values in self.requested:
            assert set(values) == OPTIONS[name]
            assert all(isinstance(value, str) for value in values.values())
        self.check("session")
        return FakeSession(self)

    # --- the plugin's ------------------------------------------------------------------------------------------------

    def get_ep_name(self):
        return self.plugin

    def get_library_path(self):
        return "plugin.so"


class FakeSession:
    def __init__(self, ort):
        self.ort, self.stream = ort, int(ort.requested[0][1]["user_compute_stream"])
        assert self.stream in ort.cuda.live["stream"]
        weakref.finalize(self, _gone, ort, self.stream)

    def get_providers(self):
        return [*(self.ort.instead or [name for name, _ in self.ort.requested]), CPU]

    def io_binding(self):
        return FakeBinding(self)

    def run_with_iobinding(self, binding, options):
        ort = self.ort
        assert binding.session is self
        assert options.entries == {"disable_synchronize_execution_providers": "1"}
        ort.runs += 1
        if ort.runs == ort.refuse_at:
            raise Fail("Failed to allocate memory for requested buffer of size 9")
        ort.check("run")
        x, shape = binding.bound["x"]
        toy = Toy(shape[1:])
        conditioning = {
            name: array_at(*binding.bound[name], ctypes.c_int32 if name == "y" else ctypes.c_float)
            for name in ("y", "x0_prev", "cond")
            if name in binding.bound
        }
        toy.bind(
            Buffers(
                array_at(x, shape, ctypes.c_float),
                array_at(*binding.bound["t"], ctypes.c_int32),
                array_at(*binding.bound["eps"], ctypes.c_float),
                **conditioning,
            )
        )
        variance = binding.bound.get("var")

        def work():
            toy.enqueue()
            if variance is not None:
                array_at(*variance, ctypes.c_float)[...] = 0.25

        ort.cuda.enqueue(self.stream, work)


class FakeBinding:
    def __init__(self, session):
        self.session, self.bound = session, {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        self.session.ort.check("bind")
        assert (device_type, device_id) == ("cuda", 0)
        assert element_type is (np.int32 if name in ("t", "y") else np.float32)
        self.bound[name] = buffer_ptr, shape

    bind_output = bind_input


def _gone(ort, stream):
    ort.events.append("session")
    if stream not in ort.cuda.live.get("stream", {}):
        ort.cuda.faults.append("a session outlives its stream")
