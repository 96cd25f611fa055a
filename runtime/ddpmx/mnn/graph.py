"""A change of the ONNX graph for MNN, without which neighbours in a batch would make a difference.

MNN computes a 1×1 convolution as one product of matrices over all pixels of a batch, a large one by Strassen's algorithm
(Strassen 1969). That adds halves of the matrix to each other before it multiplies: pixels of one image to those of
another. So an image's last bits depend on its neighbours. A convolution whose output has another size than its input is
computed pixel by pixel; here each 1×1 convolution gets one column of padding, which is cut off behind it.
"""

from __future__ import annotations

import numpy as np

from ddpmx.errors import FileFormatError
from ddpmx.formats.onnx_graph import (
    GRAPH_CONSTANT,
    GRAPH_NODE,
    MODEL_GRAPH,
    Values,
    read_attribute,
    read_node,
    write_attribute,
    write_constant,
    write_node,
)
from ddpmx.formats.protobuf import MalformedError, as_message, raw_fields, write_field

_FIRST, _LAST, _AXIS = "ddpmx/first", "ddpmx/before_last", "ddpmx/width"
_CONSTANTS = {_FIRST: 0, _LAST: -1, _AXIS: 3}
_OUTPUT, _ATTRIBUTE = 2, 5  # fields of a NodeProto


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
            if number == MODEL_GRAPH:
                graph, changed = _graph(as_message(value))
                parts.append(write_field(MODEL_GRAPH, graph))
            else:
                parts.append(raw)
        return b"".join(parts), changed
    except MalformedError as error:
        raise FileFormatError("not a valid ONNX file", note=str(error)) from error


def _graph(view: memoryview) -> tuple[bytes, int]:
    parts: list[bytes | memoryview] = []
    changed = 0
    for number, value, raw in raw_fields(view):
        if number == GRAPH_NODE and (nodes := _apart(as_message(value))) is not None:
            parts += (write_field(GRAPH_NODE, node) for node in nodes)
            changed += 1
        else:
            parts.append(raw)
    if changed:
        numbers = {name: np.array([value], np.int64) for name, value in _CONSTANTS.items()}
        parts += (write_field(GRAPH_CONSTANT, write_constant(name, number)) for name, number in numbers.items())
    return b"".join(parts), changed


def _apart(view: memoryview) -> tuple[bytes, bytes] | None:
    """A 1×1 convolution with padding, and the node that cuts it off; None for all other nodes."""
    node = read_node(view)
    plain: dict[str, Values] = {
        "kernel_shape": (1, 1),
        "strides": (1, 1),
        "dilations": (1, 1),
        "pads": (0,) * 4,
        "group": (1,),
        "auto_pad": ("NOTSET",),
    }
    if node.operator != "Conv" or node.attributes.get("kernel_shape") != (1, 1):
        return None
    if any(plain.get(name) != values for name, values in node.attributes.items()):
        return None
    wide = f"{node.outputs[0]}/wide"
    parts = [
        raw
        for number, value, raw in raw_fields(view)
        if number != _OUTPUT and not (number == _ATTRIBUTE and read_attribute(as_message(value))[0] == "pads")
    ]
    pads = write_attribute("pads", (0, 0, 0, 1))
    padded = b"".join(parts) + write_field(_OUTPUT, wide) + write_field(_ATTRIBUTE, pads)
    cut = write_node("Slice", (wide, _FIRST, _LAST, _AXIS), node.outputs[:1], name=f"{node.outputs[0]}/narrow")
    return padded, cut
