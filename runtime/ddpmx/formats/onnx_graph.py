"""Nodes and constants of an ONNX graph, read and written without the onnx package, for small changes of a graph.

Numbers of fields are those of onnx.proto. What is not understood is not changed: such an attribute has the value None,
such a constant has no array.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpmx.formats.protobuf import (
    MalformedError,
    as_message,
    as_number,
    as_text,
    fields,
    packed,
    raw_fields,
    write_field,
)

MODEL_GRAPH, MODEL_OPSET = 7, 8
"""Fields of a ModelProto: its graph, and the operators that it imports."""

GRAPH_NODE, GRAPH_CONSTANT, GRAPH_OUTPUT, GRAPH_TYPES = 1, 5, 12, 13
"""Fields of a GraphProto: nodes, initializers, outputs, and what it says of tensors in between."""

_INPUT, _OUTPUT, _NAME, _OPERATOR, _ATTRIBUTE, _DOMAIN = 1, 2, 3, 4, 5, 7
_MOST = 1 << 31  # numbers in a tensor
_FLOAT, _INT, _INTS = 1, 2, 7  # AttributeProto.FLOAT, .INT, .INTS
_FLOAT_KEY = bytes([2 << 3 | 5])  # AttributeProto.f, four bytes
_DTYPES = {1: "<f4", 2: "|u1", 3: "|i1", 6: "<i4", 7: "<i8"}
_TYPES = {np.dtype(name): number for number, name in _DTYPES.items()}

Values = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        operator: its type, as "Conv".
        domain: "" for ONNX's own operators.
        inputs: names of tensors; "" where an optional one is left out.
        outputs: likewise.
        attributes: whole numbers or a text; what is neither is None.
    """

    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Values]

    def says(self, name: str, *plain: int | str) -> bool:
        """Whether an attribute has this value, or is not there."""
        return self.attributes.get(name, plain) == plain


def read_node(view: memoryview) -> Node:
    """A NodeProto.

    Raises:
        MalformedError: damaged.
    """
    inputs, outputs = list[str](), list[str]()
    operator = domain = ""
    attributes: dict[str, Values] = {}
    for number, value in fields(view):
        if number == _INPUT:
            inputs.append(as_text(value))
        elif number == _OUTPUT:
            outputs.append(as_text(value))
        elif number == _OPERATOR:
            operator = as_text(value)
        elif number == _DOMAIN:
            domain = as_text(value)
        elif number == _ATTRIBUTE:
            name, values = read_attribute(as_message(value))
            attributes[name] = values
    domain = "" if domain == "ai.onnx" else domain
    return Node(operator, domain, tuple(inputs), tuple(outputs), attributes)


def read_attribute(view: memoryview) -> tuple[str, Values]:
    """An AttributeProto: its name, and its whole numbers or its text; None stands for everything else.

    Raises:
        MalformedError: damaged.
    """
    name, values = "", list[int | str | None]()
    for number, value in fields(view):
        if number == 1:
            name = as_text(value)
        elif number == 3:
            values.append(_signed(as_number(value)))
        elif number == 4:
            values.append(as_text(value))
        elif number == 8:
            values += map(_signed, [value] if isinstance(value, int) else packed(value))
        elif number not in (13, 20):  # a text for people, the type
            values.append(None)
    return name, tuple(values)


def read_constant(view: memoryview) -> tuple[str, NDArray[np.generic] | None]:
    """A TensorProto: its name and its array, which is None if its type or its storage is not known here.

    Raises:
        MalformedError: damaged, or of another size than it says.
    """
    name, data_type, dims, raw, elsewhere = "", 0, list[int](), None, False
    numbers = list[int]()
    for number, value in fields(view):
        if number == 1:
            dims += [value] if isinstance(value, int) else packed(value)
        elif number == 2:
            data_type = as_number(value)
        elif number == 5:  # int32_data, which small integers may lie in
            numbers += [value] if isinstance(value, int) else packed(value)
        elif number == 8:
            name = as_text(value)
        elif number == 9:
            raw = as_message(value)
        elif number in (3, 4, 6, 7, 10, 11, 13):  # numbers stored otherwise, or in another file
            elsewhere = True
    if data_type not in _DTYPES or elsewhere:
        return name, None
    dtype, count = np.dtype(_DTYPES[data_type]), math.prod(dims)
    if math.prod(dim or 1 for dim in dims) > _MOST:
        raise MalformedError(f"a tensor of the shape {dims[:8]}")
    if raw is not None:
        if len(raw) != count * dtype.itemsize:
            raise MalformedError(f"a tensor of {count} numbers has {len(raw)} bytes")
        return name, _shaped(np.frombuffer(raw, dtype), dims)
    if dtype.kind == "f" or dtype.itemsize == 8 or len(numbers) != count:
        return name, None
    signed = np.array([_signed(one) for one in numbers], np.int64)
    if len(signed) and (signed.min() < np.iinfo(dtype).min or signed.max() > np.iinfo(dtype).max):
        raise MalformedError("a tensor with numbers beyond its type")
    return name, _shaped(signed.astype(dtype), dims)


def write_node(
    operator: str,
    inputs: Iterable[str],
    outputs: Iterable[str],
    *,
    domain: str = "",
    name: str = "",
    **attributes: float | tuple[int, ...],
) -> bytes:
    """A NodeProto, by default named after its first output; attributes are numbers, whole ones 0 or more."""
    outputs = tuple(outputs)
    parts = [write_field(_INPUT, tensor) for tensor in inputs] + [write_field(_OUTPUT, tensor) for tensor in outputs]
    parts += [write_field(_NAME, name or outputs[0]), write_field(_OPERATOR, operator)]
    parts += [write_field(_ATTRIBUTE, write_attribute(key, value)) for key, value in attributes.items()]
    if domain:
        parts.append(write_field(_DOMAIN, domain))
    return b"".join(parts)


def write_attribute(name: str, value: float | tuple[int, ...]) -> bytes:
    """An AttributeProto of one float, or of whole numbers, 0 or more."""
    head = write_field(1, name)
    if isinstance(value, float):
        return head + _FLOAT_KEY + struct.pack("<f", value) + write_field(20, _FLOAT)
    if isinstance(value, int):
        return head + write_field(3, value) + write_field(20, _INT)
    return head + b"".join(write_field(8, one) for one in value) + write_field(20, _INTS)


def write_constant(name: str, array: NDArray[np.generic]) -> bytes:
    """A TensorProto of float32, int8, uint8, int32 or int64."""
    dims = b"".join(write_field(1, size) for size in array.shape)
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return dims + write_field(2, _TYPES[array.dtype]) + write_field(8, name) + write_field(9, data)


def edited(
    model: bytes,
    nodes: Iterable[bytes | memoryview],
    constants: Iterable[bytes],
    *,
    outputs: Iterable[str] | None = None,
    domains: Mapping[str, int] | None = None,
) -> bytes:
    """The model with other nodes and more constants. What it says of the tensors in between is left out.

    Args:
        model: the bytes of a ModelProto.
        nodes: all NodeProtos of its graph, in an order in which they can run.
        constants: TensorProtos that are added.
        outputs: other outputs than the graph has, by name, without a type.
        domains: operators that it imports as well, with the version of each.

    Raises:
        MalformedError: damaged.
    """
    parts = list[bytes | memoryview]()
    for number, value, raw in raw_fields(memoryview(model)):
        if number != MODEL_GRAPH:
            parts.append(raw)
            continue
        left_out = {GRAPH_NODE, GRAPH_TYPES, *([GRAPH_OUTPUT] if outputs is not None else [])}
        graph: list[bytes | memoryview] = [
            field for part, _, field in raw_fields(as_message(value)) if part not in left_out
        ]
        graph += (write_field(GRAPH_NODE, bytes(node)) for node in nodes)
        graph += (write_field(GRAPH_CONSTANT, constant) for constant in constants)
        graph += (write_field(GRAPH_OUTPUT, write_field(1, name)) for name in outputs or ())
        parts.append(write_field(MODEL_GRAPH, b"".join(graph)))
    for domain, version in (domains or {}).items():
        parts.append(write_field(MODEL_OPSET, write_field(1, domain) + write_field(2, version)))
    return b"".join(parts)


def _shaped(array: NDArray[np.generic], dims: list[int]) -> NDArray[np.generic]:
    try:
        return array.reshape(dims)
    except (ValueError, OverflowError) as error:  # more dimensions than NumPy has
        raise MalformedError(f"a tensor of the shape {dims[:8]}") from error


def _signed(number: int) -> int:
    """A varint of 64 bits as int64."""
    return number - (1 << 64) if number >> 63 else number
