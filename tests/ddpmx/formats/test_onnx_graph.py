"""Nodes and constants of a graph: read as the onnx package reads them, and written so that it can read them."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.formats.onnx_graph import (
    edited,
    read_constant,
    read_node,
    write_constant,
    write_node,
)
from ddpmx.formats.protobuf import MalformedError
from ddpmx.models import shipped
from oracles.protobuf import field

onnx = pytest.importorskip("onnx", reason="not verified here: nodes of a graph (the onnx package is not installed)")

from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper  # noqa: E402

WHOLE = (AttributeProto.INT, AttributeProto.INTS, AttributeProto.STRING)


def test_nodes_are_read_as_the_onnx_package_reads_them():
    model = onnx.load(shipped.find("garments"))
    for node in model.graph.node:
        read = read_node(memoryview(node.SerializeToString()))
        assert (read.operator, read.domain) == (node.op_type, node.domain)
        assert (read.inputs, read.outputs) == (tuple(node.input), tuple(node.output))
        for attribute in node.attribute:
            value = onnx.helper.get_attribute_value(attribute)
            values = value if isinstance(value, list) else [value.decode() if isinstance(value, bytes) else value]
            assert read.attributes[attribute.name] == (tuple(values) if attribute.type in WHOLE else (None,))


def test_negative_numbers_are_read():
    node = onnx.helper.make_node("Softmax", ["a"], ["b"], axis=-1, several=[-2, 3])
    assert read_node(memoryview(node.SerializeToString())).attributes == {"axis": (-1,), "several": (-2, 3)}


def test_nodes_are_written_for_the_onnx_package():
    node = NodeProto.FromString(write_node("Gather", ("a", "b"), ("c",), domain="d", axis=1, f=0.5, perm=(0, 2)))
    assert node == onnx.helper.make_node("Gather", ["a", "b"], ["c"], "c", domain="d", axis=1, perm=[0, 2], f=0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int8, np.int32, np.int64])
def test_constants_are_those_of_the_onnx_package(dtype):
    for array in (np.array([[-3, 2, 1]]).astype(dtype), np.array(5, dtype), np.zeros((0, 2), dtype)):
        theirs = numpy_helper.from_array(array, "name")
        assert TensorProto.FromString(write_constant("name", array)) == theirs
        name, read = read_constant(memoryview(theirs.SerializeToString()))
        assert (name, read.dtype) == ("name", dtype)
        np.testing.assert_array_equal(read, array)


def test_small_integers_stored_as_numbers_are_read():
    theirs = onnx.helper.make_tensor("name", TensorProto.INT8, (3,), [-128, 0, 127])
    assert not theirs.raw_data
    np.testing.assert_array_equal(read_constant(memoryview(theirs.SerializeToString()))[1], [-128, 0, 127])


@pytest.mark.parametrize(
    "tensor",
    [
        onnx.helper.make_tensor("name", TensorProto.FLOAT16, (1,), [1.0]),
        onnx.helper.make_tensor("name", TensorProto.FLOAT, (1,), [1.0]),
        TensorProto(name="name", data_type=TensorProto.INT8, dims=[2], data_location=TensorProto.EXTERNAL),
    ],
    ids=["half", "numbers in their own field", "in another file"],
)
def test_what_is_stored_otherwise_has_no_array(tensor):
    assert read_constant(memoryview(tensor.SerializeToString())) == ("name", None)


@pytest.mark.parametrize(
    "fields",
    [
        [(1, 3), (2, 3), (8, "name"), (9, b"ab")],
        [(1, 1), (2, 3), (8, "name"), (5, 200)],
        [(8, 7)],
    ],
    ids=["too short", "beyond its type", "a number for a name"],
)
def test_a_damaged_constant_is_an_error(fields):
    with pytest.raises(MalformedError):
        read_constant(memoryview(b"".join(field(number, value) for number, value in fields)))


def test_a_model_gets_other_nodes_and_keeps_everything_else():
    model = onnx.load(shipped.find("garments"))
    nodes = [node.SerializeToString() for node in model.graph.node]
    more = write_constant("more", np.arange(3))
    changed = onnx.load_from_string(edited(model.SerializeToString(), nodes, [more], domains={"com.microsoft": 1}))
    model.graph.initializer.append(TensorProto.FromString(more))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    del model.graph.value_info[:]
    assert changed == model
    asked = onnx.load_from_string(edited(model.SerializeToString(), nodes, [], outputs=["h", "k"]))
    assert [value.name for value in asked.graph.output] == ["h", "k"]
