"""What the tests of builds use: hand-written ONNX files, libraries in name only, and descriptions of GPUs."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ddpmx.device.discovery import Device, Gpus
from ddpmx.formats.onnx_file import BFLOAT16
from ddpmx.formats.spec import ModelSpec
from ddpmx.trt.library import Library
from oracles import protobuf
from oracles.protobuf import FLOAT, FLOAT16, INT32

NO_GPU = Gpus(trouble="there is no NVIDIA driver")
ORIN = Gpus((Device("Orin", "8.7", 8 << 30),), "12.6")
SPEC = ModelSpec((3, 8, 8), timesteps=20, ddpmx="0.1.0")


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


def fake(version: str, flavour: str = "TensorRT") -> Library:
    """A library that has nothing but a name and a version."""
    trt = SimpleNamespace(__version__=version, ILogger=SimpleNamespace(Severity=Severity))
    return Library(trt, flavour, version, SimpleNamespace(lines=[]))


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- ONNX files by hand ----------------------------------------------------------------------------------------------


def cast(source: str, target: str, element_type: int) -> bytes:
    to = protobuf.field(1, "to") + protobuf.field(3, element_type) + protobuf.field(20, 2)
    return protobuf.node("Cast", [source], [target], to)


def external(name: str, dims: tuple[int, ...], location: str, length: int) -> bytes:
    entries = [("location", location), ("offset", "0"), ("length", str(length))]
    data = b"".join(protobuf.field(13, protobuf.field(1, key) + protobuf.field(2, value)) for key, value in entries)
    shape = b"".join(protobuf.field(1, dim) for dim in dims)
    return shape + protobuf.field(2, FLOAT) + protobuf.field(8, name) + data + protobuf.field(14, 1)


def onnx(
    spec: ModelSpec = SPEC, *, weights=FLOAT, table=None, nodes=None, x=("batch", 3, 8, 8), metadata=None
) -> bytes:
    """eps = x · table[t], computed in the type of the weights."""
    if table is None:
        width = {FLOAT: 4, FLOAT16: 2, BFLOAT16: 2}[weights]
        raw = np.random.default_rng(0).integers(0, 60, spec.timesteps * 192 * width, np.uint8).tobytes()
        table = protobuf.tensor("table", weights, (spec.timesteps, *spec.shape), raw)
    if nodes is None:
        nodes = [
            protobuf.node("Gather", ["table", "t"], ["factor"]),
            cast("x", "x16", weights),
            protobuf.node("Mul", ["x16", "factor"], ["product"]),
            cast("product", "eps", FLOAT),
        ]
    return protobuf.model(
        {"x": (FLOAT, x), "t": (INT32, ("batch",))},
        {"eps": (FLOAT, ("batch", 3, 8, 8))},
        metadata={"ddpmx": spec.to_text()} if metadata is None else metadata,
        graph=b"".join(protobuf.field(1, node) for node in nodes) + protobuf.field(5, table),
    )


def with_external(folder: Path, location: str = "weights.bin", seed: int = 0) -> Path:
    size = SPEC.timesteps * 192
    (folder / location).write_bytes(np.random.default_rng(seed).standard_normal(size, np.float32).tobytes())
    path = folder / "model.onnx"
    path.write_bytes(onnx(table=external("table", (SPEC.timesteps, *SPEC.shape), location, 4 * size)))
    return path
