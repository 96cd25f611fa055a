"""The graph of one network, traced once for all tests and all their processes: torch takes ten seconds for each."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LARGE = 10_000_000
"""Parameters. A larger network is traced every time: its file would take longer to write than the test is worth."""


def trace_once(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Have the export of ddpmx's own U-Nets use a graph that was traced before in this run, if there is one.

    What decides the graph is in the name of its file: weights, buffers, structure, configuration, inputs and outputs. Any
    other module is traced every time, and so is everything that runs in a process of its own.

    Returns:
        What traces anew.
    """
    import onnx

    from ddpm_export.graph import onnx_export
    from ddpm_export.networks.lucidrains_unet import LucidrainsUNet
    from ddpm_export.networks.unet import UNet

    _operators_once(patch)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traced"
    folder.mkdir(exist_ok=True)
    trace: Callable[..., onnx.ModelProto] = onnx_export._trace

    def traced(network: Any, spec: Any) -> onnx.ModelProto:
        known = type(network) in (UNet, LucidrainsUNet)
        if not known or sum(tensor.numel() for tensor in network.parameters()) > LARGE:
            return trace(network, spec)
        file = folder / f"{_key(network, spec)}.onnx"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                part = Path(f"{file}.part")
                part.write_bytes(trace(network, spec).SerializeToString())
                part.rename(file)
        return onnx.load_model_from_string(file.read_bytes())

    if getattr(trace, "is_cached", False):
        return trace
    traced.is_cached = True  # type: ignore[attr-defined]
    patch.setattr(onnx_export, "_trace", traced)
    return trace


def _operators_once(patch: pytest.MonkeyPatch) -> None:
    """Have torch read the source of onnxscript's 560 operators once, and not at each export: half of a small one's time."""
    from torch.onnx._internal.exporter import _registration

    apis = getattr(_registration, "onnxscript_apis", None)
    if apis is not None and not hasattr(apis.get_torchlib_ops, "cache_info"):
        patch.setattr(apis, "get_torchlib_ops", _kept(apis.get_torchlib_ops))


@functools.cache
def _kept(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function with a memory that outlives the tests of one module."""
    return functools.cache(function)


def _key(network: Any, spec: Any) -> str:
    import torch

    asked = (spec.inputs, spec.outputs, spec.timesteps, spec.label_count)  # all that onnx_export._trace reads of a spec
    whole = hashlib.sha256(f"{network!r} {network.config!r} {asked}".encode())
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()]):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
