"""Runs a network by ONNX Runtime on an NVIDIA GPU: inputs and outputs stay in its memory, and all work is in one stream.

A list of providers proves little: a build may list CUDA, install, open a session, and have no kernel for this GPU, or give
a session that runs on the CPU instead. So a provider is trusted only after one real run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import os
import platform
import shlex
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpmx.backends.base import NO_CONDITIONING, VARIANCE, Buffers, CopyingBackend
from ddpmx.backends.forks import never_free_in_forks
from ddpmx.backends.ort_common import (
    GPU_PACKAGE,
    NAMES,
    PROVIDERS,
    available_providers,
    device_provider,
    import_onnxruntime,
    last_words,
    no_provider,
    session_options,
)
from ddpmx.device.driver import Driver
from ddpmx.device.versions import version_numbers
from ddpmx.errors import BackendError, InputError
from ddpmx.formats.spec import ConditioningShapes, input_type

LARGEST_BATCH = 1 << 20
"""ONNX Runtime has no largest batch; the GPU's memory is exhausted long before."""

USED = {
    "": (
        "InferenceSession",
        "RunOptions",
        "SessionOptions",
        "get_available_providers",
        "get_ep_devices",
        "preload_dlls",
        "register_execution_provider_library",
    ),
    "InferenceSession": ("get_providers", "io_binding", "run_with_iobinding"),
    "IOBinding": ("bind_input", "bind_output"),
    "RunOptions": ("add_run_config_entry",),
    "SessionOptions": ("add_provider_for_devices", "log_severity_level"),
}
"""The names of ONNX Runtime that are used, by class. ``preload_dlls`` came with 1.21."""

PLUGIN_RELEASE = (1, 25)
"""Before it a build without CUDA bound "cuda" to a device of no vendor, whose memory a plugin of NVIDIA's does not take."""

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_registering = threading.Lock()
_registered: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
"""The plugins that were registered, by ONNX Runtime's module, which does not tell of one that has found no GPU."""


class OrtDevice:
    """One ONNX file in one session on one GPU, as a :class:`ddpmx.backends.base.DeviceBackend`.

    Its only executor is ``plain``: ONNX Runtime puts the freeing of its own host buffers into the stream, and a captured
    step would read and free them again at every launch, so a capture is refused. Its own CUDA graphs stay off: they cannot
    be launched inside ours either, and need all of a file on the GPU. For graphs, build a plan.

    With "cuda", TF32 is off, and convolutions use the algorithm of cuDNN's heuristics, not the fastest in a measurement, so
    that a file should give the same bits tomorrow. TensorRT's providers have no such options: they measure, and may
    round float32 to TF32. "tensorrt" rebuilds its engine whenever a batch exceeds all before it.

    Args:
        path: the file. Its spec and external data have been checked by the caller.
        output: the name of the graph's output.
        shape: (C, H, W).
        provider: one of :data:`PROVIDERS`, or ONNX Runtime's name for it.
        driver: the GPU, which the caller closes; by default the first one.
        variance: whether the graph has an output ``var``.
        conditioning_shapes: its conditioning inputs, see :attr:`ddpmx.formats.spec.ModelSpec.conditioning_shapes`.
        widened: the file's model in float32 (:mod:`ddpmx.formats.widen`), to be run in its place.

    Attributes:
        driver: the GPU.
        stream: the stream in which everything runs.
        executors: ("plain",).
        provider: ONNX Runtime's name for it.
        path, shape, conditioning_shapes: as passed.

    Raises:
        BackendError: ONNX Runtime, the provider or the driver is missing, or the one real run failed; all is closed then.
        InputError: not a provider for NVIDIA GPUs.
    """

    executors: tuple[str, ...] = ("plain",)

    def __init__(
        self,
        path: str | os.PathLike[str],
        output: str,
        *,
        shape: tuple[int, int, int],
        provider: str = "cuda",
        driver: Driver | None = None,
        variance: bool = False,
        conditioning_shapes: ConditioningShapes = NO_CONDITIONING,
        widened: bytes | None = None,
    ) -> None:
        short = device_provider(provider)
        if short is None:
            raise InputError(f"{provider} is not a provider for NVIDIA GPUs", hint=f"one of {', '.join(PROVIDERS)}")
        self._ort = ort = import_onnxruntime()
        self.path, self.provider, self._short = Path(path), NAMES[short], short
        self._output, self.shape, self.conditioning_shapes = output, shape, conditioning_shapes
        # report what is not installed before what the machine lacks
        plugin = _import_plugin(ort) if short == "rtx" else None
        if plugin is None and self.provider not in available_providers(ort):
            raise no_provider(ort, self.provider)
        self._session: Any = None
        self._widened = widened is not None
        self._networks: list[OrtNetwork] = []
        self._running = threading.Lock()
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with contextlib.ExitStack() as undo:
            self.driver = driver if driver is not None else undo.enter_context(Driver())
            with self.driver.current():
                stream = undo.enter_context(self.driver.stream())
                self.stream = stream.value
                undo.callback(self._drop)  # before the stream, which the session uses
                self._open(plugin, os.fspath(self.path) if widened is None else widened)
                self._probe(variance)
            self._closing = undo.pop_all()

    @property
    def description(self) -> str:
        """Library, version and provider, and whether the file is widened."""
        return f"onnxruntime {self._ort.__version__}, {self.provider}" + ", in float32" * self._widened

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """Any batch up to :data:`LARGEST_BATCH`."""
        return ((1, LARGEST_BATCH),)

    def check_batch(self, batch: int) -> int:
        """0: the only range. Never refuses."""
        return 0

    def network(
        self,
        batch: int,
        *,
        x: int,
        t: int,
        out: int,
        var: int = 0,
        conditioning: Mapping[str, int] = NO_CONDITIONING,
        stream: int,
    ) -> OrtNetwork:
        """The network for ``batch`` images in device memory, see :meth:`ddpmx.backends.base.DeviceBackend.network`.

        Raises:
            BackendError: ONNX Runtime refuses, or ``stream`` is not :attr:`stream`.
        """
        self._check_stream(stream)
        outputs = {self._output: out, **({VARIANCE: var} if var else {})}
        return OrtNetwork(self, batch, {"x": x, "t": t, **conditioning}, outputs)

    def close(self) -> None:
        """Free everything, its networks first. Safe to call again."""
        self._closing.close()

    # --- internals ---------------------------------------------------------------------------------------------------

    def _open(self, plugin: Any, model: str | bytes) -> None:
        """Make the session. ONNX Runtime's exception is not kept, since its traceback would keep the session alive."""
        ort, ordinal = self._ort, str(self.driver.ordinal)
        options, stream = session_options(ort), {"user_compute_stream": str(self.stream)}
        # up to 0.4 the plugin called itself "nv_tensorrt_rtx", and sessions name a plugin as it was registered
        name, trouble = self.provider if plugin is None else plugin.get_ep_name(), ""
        try:
            if plugin is not None:
                options.add_provider_for_devices(
                    _plugin_devices(ort, plugin, self.driver.ordinal), {"has_user_compute_stream": "1", **stream}
                )
                self._session = ort.InferenceSession(model, options, enable_fallback=0)
            else:
                _preload(ort, self._short)
                # EXHAUSTIVE, the default, measures: tomorrow another algorithm may win, with other bits
                cuda = {"device_id": ordinal, **stream, "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
                providers = [(NAMES["cuda"], cuda)]
                if self._short == "tensorrt":  # what TensorRT cannot run stays on the GPU
                    providers.insert(0, (self.provider, {"device_id": ordinal, **stream}))
                self._session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime raises its own types, which share no public base
            trouble = last_words(error)
        if trouble:
            raise self._unusable(_why_not_loaded(ort, self._short) or trouble)
        never_free_in_forks(self._session)
        used = self._session.get_providers()
        if name not in used:
            raise self._unusable(_why_not_loaded(ort, self._short) or f"it uses {', '.join(used)} instead")

    def _probe(self, variance: bool) -> None:
        """Run once, on zeros, and wait."""
        copying = CopyingBackend(self)
        trouble = ""
        try:
            copying.bind(Buffers.of(1, self.shape, var=variance, conditioning_shapes=self.conditioning_shapes))
            copying.enqueue()
        except BackendError as error:
            own = error.fact.startswith(self.description)
            trouble = (own and error.note) or ": ".join(filter(None, (error.fact, error.note)))
        finally:
            copying.release()
        if trouble:
            raise self._unusable(trouble)

    def _unusable(self, why: str) -> BackendError:
        build = f"ddpmx build {shlex.quote(self.path.name)}"
        hint = {
            "cuda": f"pip install '{GPU_PACKAGE}' brings its libraries; --provider cpu runs without",
            "tensorrt": f"it needs TensorRT 10 and '{GPU_PACKAGE}'; {build} makes a plan instead",
            "rtx": f"it needs an RTX GPU of SM 8.6, 8.9 or 12 and later; {build} makes a plan instead",
        }[self._short]
        if platform.machine().lower() in ("aarch64", "arm64"):
            # the wheel for it lists CUDA, and has no kernels for a Jetson
            hint = f"on a Jetson, TensorRT runs this file: {build}"
        return BackendError(
            f"{self.path}: ONNX Runtime {self._ort.__version__} does not run this file by {self.provider} here",
            note=why,
            hint=hint,
        )

    def _check_stream(self, stream: int) -> None:
        if stream != self.stream:
            raise BackendError("ONNX Runtime runs in its own stream and cannot run in another")

    def _check_capture(self) -> None:
        """Check that the stream is not being captured."""
        if self.driver.is_capturing(self.stream):
            raise BackendError(
                "ONNX Runtime's work cannot be captured",
                note="it frees buffers of its own in the stream, and a graph would free them again",
                hint=f"--executor plain, or a plan: ddpmx build {shlex.quote(self.path.name)}",
            )

    def _drop(self) -> None:
        """Release the session, once nothing uses it and all of its work is done."""
        for network in list(self._networks):
            network.close()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(BackendError):
                stack.enter_context(self.driver.current())
                self.driver.wait_for_stream(self.stream)
            self._session = None


class OrtNetwork:
    """A session's inputs and outputs, bound to device memory for one batch. See :meth:`OrtDevice.network`."""

    def __init__(self, device: OrtDevice, batch: int, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        if device._session is None:
            raise BackendError(f"{device.description}: the session is closed")
        self._device = device
        self._binding = device._session.io_binding()
        image, ordinal = (batch, *device.shape), device.driver.ordinal
        trouble = ""
        try:
            for name, address in inputs.items():
                dims = {"x": device.shape, "t": (), **device.conditioning_shapes}[name]
                self._binding.bind_input(name, "cuda", ordinal, input_type(name), (batch, *dims), address)
            for name, address in outputs.items():
                self._binding.bind_output(name, "cuda", ordinal, np.float32, image, address)
        except Exception as error:
            trouble = last_words(error)
        if trouble:
            self._binding = None
            raise BackendError(f"{device.description} does not take these buffers", note=trouble)
        device._networks.append(self)

    def enqueue(self, stream: int) -> None:
        """Put one run into the stream, and wait for nothing.

        Raises:
            BackendError: ONNX Runtime refuses, or the stream is the wrong one or is being captured.
        """
        device = self._device
        if self._binding is None:
            raise BackendError(f"{device.description}: the network is closed")
        device._check_stream(stream)
        device._check_capture()
        trouble = ""
        try:
            with device._running:
                device._session.run_with_iobinding(self._binding, device._run_options)
        except Exception as error:  # not kept: its traceback would keep the session alive
            trouble = last_words(error)
        if trouble:
            hint = "a smaller batch: --batch" if "allocat" in trouble else None
            raise BackendError(f"{device.description} failed to run the network", note=trouble, hint=hint)

    def close(self) -> None:
        """Release the buffers. Wait for the stream first. Safe to call again."""
        self._binding = None
        if self in self._device._networks:
            self._device._networks.remove(self)


def _preload(ort: Any, short: str) -> None:
    """Have CUDA's libraries, and TensorRT's, loaded from where pip puts them, which is not where the system looks.

    ONNX Runtime prints what is missing; that is discarded, since the session's error reports it.
    """
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError):
            ort.preload_dlls()
    if short == "tensorrt":
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt_libs")  # of NVIDIA's wheels; importing it loads them


def _why_not_loaded(ort: Any, short: str) -> str:
    """Why a provider's library does not load, or an empty text. ONNX Runtime reports it on stderr only."""
    name = f"onnxruntime_providers_{short}"
    file = f"{name}.dll" if sys.platform == "win32" else f"lib{name}.so"
    library = Path(ort.__file__ or "").parent / "capi" / file
    if short != "rtx" and library.is_file():
        try:
            ctypes.CDLL(os.fspath(library.resolve()))
        except OSError as error:
            return f"{file}: {error}"[-300:]
    return ""


def _import_plugin(ort: Any) -> Any:
    """The package with TensorRT-RTX's provider."""
    try:
        plugin = importlib.import_module(_PLUGIN)
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime's provider for TensorRT-RTX is not installed",
            note=str(error),
            hint="pip install 'onnxruntime>=1.25' onnxruntime-ep-nv-tensorrt-rtx",
        ) from error
    if version_numbers(ort.__version__) < PLUGIN_RELEASE:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot give a GPU's memory to a plugin",
            hint="pip install 'onnxruntime>=1.25'",
        )
    return plugin


def _plugin_devices(ort: Any, plugin: Any, ordinal: int) -> list[Any]:
    """The plugin's GPU. The plugin is registered once per process, for good."""
    name = plugin.get_ep_name()
    with _registering:
        registered = _registered.setdefault(ort, set())
        if name not in registered and not any(device.ep_name == name for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
        registered.add(name)
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if len(devices) <= ordinal:
        raise RuntimeError(f"{name} finds no GPU that it supports")
    return devices[ordinal : ordinal + 1]
