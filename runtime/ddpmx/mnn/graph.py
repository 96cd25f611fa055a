"""A change of the ONNX graph for MNN, without which neighbours in a batch would make a difference.

MNN computes a 1×1 convolution as one product of matrices over all pixels of a batch, a large one by Strassen's algorithm
(Strassen 1969). That adds halves of the matrix to each other before it multiplies: pixels of one image to those of
another. So an image's last bits depend on its neighbours. A convolution whose output has another size than its input is
computed pixel by pixel; here each 1×1 convolution gets one column of padding, which is cut off behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

from ddpmx.errors import FileFormatError
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

_FIRST, _LAST, _AXIS = "ddpmx/first", "ddpmx/before_last", "ddpmx/width"
_CONSTANTS = {_FIRST: 0, _LAST: -1, _AXIS: 3}
_INT64, _INTS = 7, 7  # TensorProto.INT64, AttributeProto.INTS

# numbers of onnx.proto: ModelProto.graph; GraphProto.node, .initializer; NodeProto.output, .op_type, .attribute
_GRAPH, _NODE, _INITIALIZER, _OUTPUT, _OP_TYPE, _ATTRIBUTE = 7, 1, 5, 2, 4, 5


def keep_images_apart(model: bytes) -> tuple[bytes, int]:
    """The ONNX model with a column of padding at each 1×1 convolution, and how many there are.

    Args:
        model: the bytes of an ONNX file.

    Raises:
        FileFormatError: not a valid ONNX file.
    """
    try:
        parts: list[bytes | memoryview] = []
        changed = 0
        for number, value, raw in raw_fields(memoryview(model)):
            if number == _GRAPH:
                graph, changed = _graph(as_message(value))
                parts.append(write_field(_GRAPH, graph))
            else:
                parts.append(raw)
        return b"".join(parts), changed
    except MalformedError as error:
        raise FileFormatError("not a valid ONNX file", note=str(error)) from error


def _graph(view: memoryview) -> tuple[bytes, int]:
    parts: list[bytes | memoryview] = []
    changed = 0
    for number, value, raw in raw_fields(view):
        if number == _NODE and (nodes := _apart(as_message(value))) is not None:
            parts += (write_field(_NODE, node) for node in nodes)
            changed += 1
        else:
            parts.append(raw)
    if changed:
        parts += (write_field(_INITIALIZER, _constant(name, value)) for name, value in _CONSTANTS.items())
    return b"".join(parts), changed


def _apart(node: memoryview) -> tuple[bytes, bytes] | None:
    """A 1×1 convolution with padding, and the node that cuts it off; None for all other nodes."""
    inside = list(raw_fields(node))
    if not any(number == _OP_TYPE and as_text(value) == "Conv" for number, value, _ in inside):
        return None
    attributes = {
        name: values for number, value, _ in inside if number == _ATTRIBUTE for name, values in _values(value)
    }
    plain: dict[str, list[int | str | None]] = {
        "kernel_shape": [1, 1],
        "strides": [1, 1],
        "dilations": [1, 1],
        "pads": [0] * 4,
        "group": [1],
    }
    plain["auto_pad"] = ["NOTSET"]
    if attributes.get("kernel_shape") != [1, 1] or any(
        plain.get(name) != values for name, values in attributes.items()
    ):
        return None
    outputs = [as_text(value) for number, value, _ in inside if number == _OUTPUT]
    wide = f"{outputs[0]}/wide"
    parts = [
        raw
        for number, value, raw in inside
        if number != _OUTPUT and not (number == _ATTRIBUTE and next(_values(value))[0] == "pads")
    ]
    pads = write_field(1, "pads") + b"".join(write_field(8, count) for count in (0, 0, 0, 1)) + write_field(20, _INTS)
    padded = b"".join(parts) + write_field(_OUTPUT, wide) + write_field(_ATTRIBUTE, pads)
    cut = b"".join(write_field(1, name) for name in (wide, _FIRST, _LAST, _AXIS))
    cut += write_field(_OUTPUT, outputs[0]) + write_field(3, f"{outputs[0]}/narrow")
    return padded, cut + write_field(_OP_TYPE, "Slice")


def _values(attribute: int | memoryview) -> Iterator[tuple[str, list[int | str | None]]]:
    """The name of an attribute, and its whole numbers or its text; None stands for everything else."""
    name, values = "", list[int | str | None]()
    for number, value in fields(as_message(attribute)):
        if number == 1:
            name = as_text(value)
        elif number == 3:
            values.append(as_number(value))
        elif number == 4:
            values.append(as_text(value))
        elif number == 8:
            values += [value] if isinstance(value, int) else packed(value)
        elif number not in (13, 20):  # a text for people, the type
            values.append(None)
    yield name, values


def _constant(name: str, value: int) -> bytes:
    data = value.to_bytes(8, "little", signed=True)
    return write_field(1, 1) + write_field(2, _INT64) + write_field(8, name) + write_field(9, data)
