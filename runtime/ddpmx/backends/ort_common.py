"""What ONNX Runtime's two backends share: names of providers, options of a session, and its errors."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from ddpmx.device.discovery import gpus
from ddpmx.device.versions import version_numbers
from ddpmx.errors import BackendError

NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
"""Short names of ONNX Runtime's execution providers."""

GPU_PACKAGE = "onnxruntime-gpu[cuda,cudnn]"
"""What pip installs for "cuda": the extras bring CUDA's libraries, the second one cuBLAS."""

PROVIDERS = ("cuda", "tensorrt", "rtx")
"""The providers that compute on an NVIDIA GPU: ONNX Runtime's own kernels, TensorRT 10, and TensorRT-RTX as a plugin."""

PLUGINS = {
    "OpenVINOExecutionProvider": "onnxruntime_ep_openvino",
    "WebGpuExecutionProvider": "onnxruntime_ep_webgpu",
}
"""The packages of providers that are plugins and compute from host memory."""

_registering = threading.Lock()
_registered: set[str] = set()

_INSTALL = "pip install onnxruntime (or onnxruntime-gpu on a machine with an NVIDIA GPU, never both)"


def import_onnxruntime() -> Any:
    """The library.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError("ONNX Runtime is not installed", note=str(error), hint=_INSTALL) from error
    return onnxruntime


def rounds_halves(ort: Any) -> bool:
    """Whether QuantizeLinear rounds float16: before 1.30 it cuts it off (findings/onnxruntime_half_is_cut_off.sh)."""
    return version_numbers(ort.__version__) >= (1, 30)


def available_providers(ort: Any) -> list[str]:
    """The providers that this build lists. Only a run shows whether one works here."""
    # every build lists Azure's provider, which calls a service instead of computing
    return [name for name in ort.get_available_providers() if name != "AzureExecutionProvider"]


def plugin_devices(ort: Any, name: str) -> list[Any]:
    """The devices that a plugin's provider can compute on here. It is registered once per process, for good.

    A plugin registers, and says nothing, on a machine without any device that it supports; so devices are counted.

    Raises:
        BackendError: the plugin is not installed, does not load, or has no device here.
    """
    package = PLUGINS[name]
    try:
        plugin = importlib.import_module(package)
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime has no {name} here",
            note=f"its plugin is not installed: {error}",
            hint=f"--provider cpu, or pip install {package.replace('_', '-')}",
        ) from error
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load plugins", hint="pip install 'onnxruntime>=1.24'"
        )
    with _registering:
        try:
            if not any(device.ep_name == name for device in ort.get_ep_devices()) and name not in _registered:
                ort.register_execution_provider_library(name, plugin.get_library_path())
                _registered.add(name)
        except Exception as error:  # ONNX Runtime raises its own types, which share no public base
            raise BackendError(f"the plugin of {name} does not load", note=last_words(error)) from error
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise BackendError(
            f"{name} finds no device here that it supports",
            note=f"its plugin {package} is installed and registers",
            hint="--provider cpu",
        )
    return devices


def no_provider(ort: Any, name: str) -> BackendError:
    """The error for a provider that this build does not list."""
    nvidia, here = name in (NAMES["cuda"], NAMES["tensorrt"]), bool(gpus().devices)
    install = f"pip uninstall onnxruntime; pip install '{GPU_PACKAGE}'" if nvidia else _INSTALL
    if nvidia and not here:
        install += ", on a machine with an NVIDIA GPU: there is none here"
    return BackendError(
        f"ONNX Runtime has no {name} here",
        note=f"version {ort.__version__} has {', '.join(available_providers(ort))}",
        hint=f"--provider cpu, or {install}",
    )


def session_options(ort: Any) -> Any:
    """Options for a session that logs errors only."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # else the file's name decides the format, and a checked ONNX file may be valid in another one as well
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return options


def last_words(error: Exception) -> str:
    """The end of ONNX Runtime's message, which is its useful part: it begins with source files of its own."""
    return str(error).strip()[-300:] or type(error).__name__


def device_provider(name: str) -> str | None:
    """The one of :data:`PROVIDERS` that a name means, short or ONNX Runtime's own; None for other providers."""
    return next((short for short in PROVIDERS if name in (short, NAMES[short])), None)
