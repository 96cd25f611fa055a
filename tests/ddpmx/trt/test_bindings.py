"""Every name of TensorRT that ddpmx uses exists in every TensorRT that ddpmx supports.

The names are looked up in NVIDIA's own Python bindings, which needs no GPU: see ``oracles/tensorrt_bindings.py``. What a
function does is not tested here.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest

from ddpmx.trt.builder import USED
from oracles import tensorrt_bindings

RUNTIME = Path(__file__).parents[3] / "runtime" / "ddpmx"
CACHE = Path(__file__).parents[3] / ".cache" / "tensorrt-bindings"
LABELS = list(tensorrt_bindings.WHEELS)

# properties that ddpmx sets
SET = (
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.profiling_verbosity",
    "IBuilderConfig.progress_monitor",
    "INetworkDefinition.name",
    "Runtime.engine_host_code_allowed",
)
# functions that ddpmx or TensorRT calls, with all parameters of one overload
PARAMETERS: dict[str, tuple[str, ...]] = {
    "Builder.__init__": ("logger",),
    "Builder.create_network": ("flags",),
    "Builder.build_serialized_network": ("network", "config"),
    "IBuilderConfig.set_memory_pool_limit": ("pool", "pool_size"),
    "IBuilderConfig.create_timing_cache": ("serialized_timing_cache",),
    "IBuilderConfig.set_timing_cache": ("cache", "ignore_mismatch"),
    "OnnxParser.__init__": ("network", "logger"),
    "OnnxParser.parse": ("model", "path"),
    "OnnxParser.parse_from_file": ("model",),
    "IOptimizationProfile.set_shape": ("input", "min", "opt", "max"),
    "Runtime.__init__": ("logger",),
    "Runtime.deserialize_cuda_engine": ("serialized_engine",),
    "ICudaEngine.get_tensor_profile_shape": ("name", "profile_index"),
    "ILogger.log": ("severity", "msg"),
    "IProgressMonitor.phase_start": ("phase_name", "parent_phase", "num_steps"),
    "IProgressMonitor.step_complete": ("phase_name", "step"),
    "IProgressMonitor.phase_finish": ("phase_name",),
}


@functools.cache
def _describe(label: str) -> dict[str, Any] | tensorrt_bindings.Unavailable:
    try:
        return tensorrt_bindings.describe(label, CACHE)
    except tensorrt_bindings.Unavailable as why:
        return why  # so that a machine without a network tries once per version


def bindings(label: str) -> dict[str, Any]:
    found = _describe(label)
    if isinstance(found, tensorrt_bindings.Unavailable):
        pytest.skip(f"not verified here: that TensorRT {label} has what ddpmx uses of it ({found})")
    return found


def missing(label: str, used: dict[str, tuple[str, ...]]) -> list[str]:
    names = bindings(label)["names"]
    return [f"{kind}.{name}" for kind, wanted in used.items() for name in wanted if name not in names.get(kind, ())]


@pytest.mark.parametrize("label", LABELS)
def test_the_bindings_are_those_of_the_version(label: str):
    assert f"{bindings(label)['version']}.".startswith(f"{label}.")


@pytest.mark.parametrize("label", LABELS)
def test_every_name_exists(label: str):
    assert missing(label, USED) == []


@pytest.mark.parametrize("label", LABELS)
def test_every_property_that_is_set_is_writable(label: str):
    assert [name for name in SET if name not in bindings(label)["writable"]] == []


@pytest.mark.parametrize("label", LABELS)
def test_every_call_has_its_parameters(label: str):
    signatures = bindings(label)["signatures"]
    differ = {
        name: signatures.get(name)
        for name, wanted in PARAMETERS.items()
        if wanted not in tensorrt_bindings.parameters(signatures.get(name, ""))
    }
    assert differ == {}


def used(*modules: str) -> tuple[set[str], set[str]]:
    """(every X of trt.X, every attribute) in modules of the runtime."""
    nodes = [
        node
        for module in modules
        for node in ast.walk(ast.parse((RUNTIME / f"{module}.py").read_text(encoding="utf-8")))
    ]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    classes = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "trt"}
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}  # those that TensorRT calls
    return classes, {node.attr for node in attributes} | functions


def test_the_list_is_what_the_sources_use():
    """ComputeCapability exists in TensorRT-RTX only."""
    classes, names = used("trt/builder", "trt/timing_cache", "trt/library")
    assert classes - {"ComputeCapability", "__version__"} <= set(USED)
    assert {name for wanted in USED.values() for name in wanted} - names <= {"code"}  # reported: nothing reads it


def test_a_removed_name_is_noticed():
    """The tests above can fail: TensorRT 11 dropped these two."""
    removed = {"BuilderFlag": ("FP16",), "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",)}
    assert missing("11.4", removed) == ["BuilderFlag.FP16", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"]
    assert missing("10.3", removed) == []


def test_a_removed_overload_is_noticed():
    """Before TensorRT 11 a stream reader could be deserialized; the current one is another class."""
    name, wanted = "Runtime.deserialize_cuda_engine", ("stream_reader",)
    assert wanted in tensorrt_bindings.parameters(bindings("10.3")["signatures"][name])
    assert wanted not in tensorrt_bindings.parameters(bindings("11.4")["signatures"][name])


def test_a_read_only_property_is_noticed():
    assert "ICudaEngine.name" not in bindings("11.4")["writable"]
    assert "ICudaEngine.name" in bindings("11.4")["signatures"]
