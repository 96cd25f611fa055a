"""What builds of engines are tested with: ONNX files by hand, libraries in name only, and GPUs that are not here."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ddpmx.device.discovery import Device, Gpus
from ddpmx.formats.onnx_file import BFLOAT16
from ddpmx.formats.spec import ModelSpec
from ddpmx.trt.library import Library
from oracles import wire
from oracles.wire import FLOAT, FLOAT16, INT32

NO_GPU = Gpus(trouble="there is no NVIDIA driver")
ORIN = Gpus((Device("Orin", "8.7", 8 << 30),), "12.6")
SPEC = ModelSpec((3, 8, 8), timesteps=20, ddpmx="0.1.0")


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


def fake(version: str, flavour: str = "TensorRT") -> Library:
    """A library of which only the name is asked."""
    trt = SimpleNamespace(__version__=version, ILogger=SimpleNamespace(Severity=Severity))
    return Library(trt, flavour, version, SimpleNamespace(lines=[]))


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- ONNX files by hand ----------------------------------------------------------------------------------------------


def cast(source: str, target: str, element_type: int) -> bytes:
    to = wire.field(1, "to") + wire.field(3, element_type) + wire.field(20, 2)
    return wire.node("Cast", [source], [target], to)


def external(name: str, dims: tuple[int, ...], location: str, length: int) -> bytes:
    entries = [("location", location), ("offset", "0"), ("length", str(length))]
    data = b"".join(wire.field(13, wire.field(1, key) + wire.field(2, value)) for key, value in entries)
    shape = b"".join(wire.field(1, dim) for dim in dims)
    return shape + wire.field(2, FLOAT) + wire.field(8, name) + data + wire.field(14, 1)


def onnx(
    spec: ModelSpec = SPEC, *, weights=FLOAT, table=None, nodes=None, x=("batch", 3, 8, 8), metadata=None
) -> bytes:
    """eps = x · table[t], computed in the type of the weights."""
    if table is None:
        width = {FLOAT: 4, FLOAT16: 2, BFLOAT16: 2}[weights]
        raw = np.random.default_rng(0).integers(0, 60, spec.timesteps * 192 * width, np.uint8).tobytes()
        table = wire.tensor("table", weights, (spec.timesteps, *spec.shape), raw)
    if nodes is None:
        nodes = [
            wire.node("Gather", ["table", "t"], ["factor"]),
            cast("x", "x16", weights),
            wire.node("Mul", ["x16", "factor"], ["product"]),
            cast("product", "eps", FLOAT),
        ]
    return wire.model(
        {"x": (FLOAT, x), "t": (INT32, ("batch",))},
        {"eps": (FLOAT, ("batch", 3, 8, 8))},
        metadata={"ddpmx": spec.to_text()} if metadata is None else metadata,
        graph=b"".join(wire.field(1, node) for node in nodes) + wire.field(5, table),
    )


def with_external(folder: Path, location: str = "weights.bin", seed: int = 0) -> Path:
    size = SPEC.timesteps * 192
    (folder / location).write_bytes(np.random.default_rng(seed).standard_normal(size, np.float32).tobytes())
    path = folder / "model.onnx"
    path.write_bytes(onnx(table=external("table", (SPEC.timesteps, *SPEC.shape), location, 4 * size)))
    return path
