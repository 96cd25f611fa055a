"""Providers that are plugins: a registration proves nothing, a device does."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from ddpmx.backends import ort_common
from ddpmx.backends.ort import OrtBackend
from ddpmx.errors import BackendError

NAME = "OpenVINOExecutionProvider"


class FakeSession:
    def __init__(self, opened):
        self._opened = opened

    def get_providers(self):
        return self._opened


class Runtime:
    """As much of ONNX Runtime as opening a session takes. The plugin registers, and finds ``devices``."""

    __version__ = "1.32.0"

    def __init__(self, devices: int) -> None:
        self.devices, self.registered, self.opened = devices, 0, None

    def get_available_providers(self):
        return ["AzureExecutionProvider", "CPUExecutionProvider"]

    def get_ep_devices(self):
        found = [NAME] * self.devices if self.registered else []
        return [SimpleNamespace(ep_name=name) for name in ["CPUExecutionProvider", *found]]

    def register_execution_provider_library(self, name, path):
        assert (name, path) == (NAME, "plugin.so")
        assert not self.registered, "ONNX Runtime refuses a second time"
        self.registered += 1

    def SessionOptions(self):
        options = SimpleNamespace(log_severity_level=2, devices=[], add_session_config_entry=lambda key, value: None)
        options.add_provider_for_devices = lambda devices, values: options.devices.extend(
            one.ep_name for one in devices
        )
        return options

    def InferenceSession(self, path, options, providers=None):
        assert not (providers and options.devices), "either names or devices"
        self.opened = [*options.devices, *(providers or []), "CPUExecutionProvider"]
        return FakeSession(self.opened)


@pytest.fixture
def runtime(monkeypatch):
    def make(devices: int, *, installed: bool = True) -> Runtime:
        ort = Runtime(devices)
        monkeypatch.setattr("ddpmx.backends.ort.import_onnxruntime", lambda: ort)
        monkeypatch.setattr(ort_common, "_registered", set())
        plugin = SimpleNamespace(get_library_path=lambda: "plugin.so") if installed else None
        monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", plugin)
        return ort

    return make


@pytest.mark.parametrize("name", ["openvino", NAME])
def test_a_plugin_with_a_device_runs_the_network(runtime, name):
    ort = runtime(2)
    assert OrtBackend("m.onnx", "eps", providers=(name,)).provider == NAME
    assert ort.opened == [NAME, "CPUExecutionProvider"], "one device, and not by name"
    OrtBackend("m.onnx", "eps", providers=(name,))
    assert ort.registered == 1


def test_a_plugin_that_registers_and_finds_no_device_is_an_error(runtime):
    ort = runtime(0)
    for _ in range(2):
        with pytest.raises(BackendError, match="finds no device here") as caught:
            OrtBackend("m.onnx", "eps", providers=("openvino",))
    assert caught.value.hint == "--provider cpu"
    assert ort.opened is None
    backend = OrtBackend("m.onnx", "eps", providers=("openvino",), fallback=True)
    assert backend.provider == "CPUExecutionProvider"
    assert "CPUExecutionProvider, not OpenVINOExecutionProvider (" in backend.description


def test_a_plugin_that_is_not_installed_is_named(runtime):
    runtime(1, installed=False)
    with pytest.raises(BackendError, match="has no OpenVINOExecutionProvider here") as caught:
        OrtBackend("m.onnx", "eps", providers=("openvino",))
    assert "pip install onnxruntime-ep-openvino" in str(caught.value.hint)


def test_beside_a_plugin_runs_only_the_cpu_and_the_description_says_so(runtime, monkeypatch):
    ort = runtime(1)
    available = ["DnnlExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    backend = OrtBackend("m.onnx", "eps", providers=("openvino", "DnnlExecutionProvider", "cpu"))
    assert backend.provider == NAME
    assert backend.description.endswith(f"{NAME}, not DnnlExecutionProvider (beside {NAME} runs only the CPU)")


def test_the_first_provider_that_works_is_used_and_no_plugin_after_it(runtime):
    ort = runtime(1)
    assert OrtBackend("m.onnx", "eps", providers=("cpu", "openvino")).provider == "CPUExecutionProvider"
    assert ort.registered == 0
    assert ort.opened == ["CPUExecutionProvider"] * 2, "by its name"
