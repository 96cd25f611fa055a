"""ONNX files written byte by byte, so that they can be made, and made wrong, where the onnx package is missing.

Protobuf's wire format is a row of (field number, value); numbers and names are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FLOAT, INT32, INT64, FLOAT16 = 1, 6, 7, 10

Dims = Sequence["int | str | None"]


def varint(number: int) -> bytes:
    """Seven bits per byte, lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, value: int | str | bytes) -> bytes:
    """One field: a number, a text or a message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode("utf-8", errors="surrogateescape") if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def value_info(name: str, element_type: int, dims: Dims) -> bytes:
    """ValueInfoProto: a graph input or output. A dimension is a number, a name, or None for neither."""
    shape = b"".join(
        field(1, b"" if dim is None else field(1, dim) if isinstance(dim, int) else field(2, dim)) for dim in dims
    )
    return field(1, name) + field(2, field(1, field(1, element_type) + field(2, shape)))


def external_tensor(location: str, name: str = "w") -> bytes:
    """TensorProto: one float32 whose bytes lie in the file ``location``."""
    entries = [("location", location), ("offset", "0"), ("length", "4")]
    data = b"".join(field(13, field(1, key) + field(2, value)) for key, value in entries)
    return field(1, 1) + field(2, FLOAT) + field(8, name) + data + field(14, 1)


def tensor(name: str, data_type: int, dims: Sequence[int], raw: bytes) -> bytes:
    """TensorProto with its bytes inside."""
    shape = b"".join(field(1, dim) for dim in dims)
    return shape + field(2, data_type) + field(8, name) + field(9, raw)


def attribute(part: int, value: bytes) -> bytes:
    """AttributeProto: ``part`` is 5 for a tensor, 6 for a graph, 10 and 11 for several, 22 and 23 for sparse ones."""
    return field(1, "value") + field(part, value)


def ints(name: str, values: Sequence[int]) -> bytes:
    """AttributeProto: whole numbers, such as a permutation."""
    return field(1, name) + b"".join(field(8, value) for value in values) + field(20, 7)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], *attributes: bytes) -> bytes:
    """NodeProto."""
    names = b"".join(field(1, name) for name in inputs) + b"".join(field(2, name) for name in outputs)
    return names + field(4, op) + b"".join(field(5, item) for item in attributes)


def model(
    inputs: Mapping[str, tuple[int, Dims]],
    outputs: Mapping[str, tuple[int, Dims]],
    *,
    metadata: Mapping[str, str] | None = None,
    graph: bytes = b"",
    rest: bytes = b"",
) -> bytes:
    """ModelProto. ``graph`` is appended to the GraphProto, ``rest`` to the model itself."""
    parts = b"".join(field(11, value_info(name, *what)) for name, what in inputs.items())
    parts += b"".join(field(12, value_info(name, *what)) for name, what in outputs.items())
    props = b"".join(field(14, field(1, key) + field(2, value)) for key, value in (metadata or {}).items())
    opset = field(8, field(1, "") + field(2, 20))
    return field(1, 8) + field(7, field(2, "test") + parts + graph) + opset + props + rest
