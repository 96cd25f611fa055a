"""MNN models made by hand: the part of a FlatBuffer that ddpmx reads, and bytes that stand for a network."""

from __future__ import annotations

import struct

from ddpmx.formats.mnn_file import MnnRecord, describe_network
from ddpmx.formats.spec import ModelSpec

RECORD = MnnRecord(version="3.6.1", onnx="1" * 64, source="model.onnx", network="0" * 64, part=4)


def network(text: bytes = b"ddpmx", weights: bytes = bytes(range(100))) -> bytes:
    """A FlatBuffer whose root table has one field, a string. https://flatbuffers.dev/internals/"""
    vtable = struct.pack("<3H", 6, 8, 4) + bytes(2)  # its size, the table's, the field's place; to a multiple of 4
    table = struct.pack("<iI", len(vtable), 4)  # how far back the vtable is, how far on the string
    return struct.pack("<I", 4 + len(vtable)) + vtable + table + struct.pack("<I", len(text)) + text + b"\0" + weights


def mnn_file(spec: ModelSpec | None = None, record: MnnRecord = RECORD) -> bytes:
    """What ``ddpmx build --for mnn`` would write."""
    return describe_network(network(), spec or ModelSpec((1, 8, 8), timesteps=20), record)
