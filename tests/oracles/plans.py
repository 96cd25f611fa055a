"""TensorRT plans written byte by byte: a header, the network's name and filler. ddpmx reads no more of them."""

from __future__ import annotations

import dataclasses
import struct

from ddpmx.formats.envelope import wrap
from ddpmx.formats.plan_file import RECORD_PREFIX, PlanRecord
from ddpmx.formats.spec import ModelSpec

SPEC = ModelSpec((3, 8, 8), timesteps=20, ddpmx="0.1.0")
RECORD = PlanRecord(
    flavour="TensorRT-RTX",
    version="1.7.1.116",
    targets=("8.0+",),
    platform="linux x86_64",
    batch=(1, 4, 8),
    onnx="a" * 64,
    source="model.onnx",
    options={"workspace": None, "level": 3, "tf32": False, "refit": False, "strip": False},
    key="b" * 64,
)
TENSORRT = dataclasses.replace(RECORD, flavour="TensorRT", version="10.3.0.26", targets=("8.7",))


def name_of(spec: ModelSpec = SPEC, record: PlanRecord = RECORD) -> bytes:
    """What `ddpmx build` gives the network as its name."""
    return f"{spec.to_text()} {wrap(RECORD_PREFIX, record.to_json())}".encode()


def make_plan(
    flavour: bytes = b"vtrt",
    version: tuple[int, ...] = (1, 7, 1, 116),
    spec: ModelSpec = SPEC,
    record: PlanRecord = RECORD,
    tail: bytes = b"",
    *,
    name: bytes | None = None,
    size: int | None = None,
) -> bytes:
    """A plan. ``name`` and ``size`` default to the right ones."""
    body = bytes(36) + (name_of(spec, record) if name is None else name) + bytes(64) + tail + bytes(64)
    header = flavour + bytes(12) + struct.pack("<Q", 28 + len(body) if size is None else size) + bytes(version)
    return header + body


def elf(machine: int, bits: int = 2) -> bytes:
    """The head of a shared library for ``machine`` (e_machine)."""
    return b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9) + struct.pack("<HH", 3, machine) + bytes(44)
