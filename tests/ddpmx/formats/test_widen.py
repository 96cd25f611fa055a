"""ONNX models in half precision, widened to float32: against the onnx package, which has written and read them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ddpmx.errors import FileFormatError
from ddpmx.formats import widen as widening
from ddpmx.formats.onnx_file import read_onnx
from ddpmx.formats.protobuf import MalformedError
from ddpmx.formats.widen import TYPE_ATTRIBUTES, holds_half, read_widened, widen
from ddpmx.models import shipped
from oracles import protobuf
from oracles.protobuf import FLOAT, FLOAT16, field

onnx = pytest.importorskip("onnx", reason="not verified here: widened models (the onnx package is not installed)")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

BFLOAT16 = TensorProto.BFLOAT16
KINDS = pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16], ids=["float16", "bfloat16"])


def rounded(values, kind):
    """float32, rounded to this type by the onnx package."""
    return np.asarray(values, np.float32).astype(helper.tensor_dtype_to_np_dtype(kind)).astype(np.float32)


def tensor(name, values, kind, to):
    """Values that were rounded to ``kind``, stored as ``to``."""
    values = rounded(values, kind)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(to)), name)


def values_of(seed=0, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def everything(kind, to):
    """A model with a number of type ``kind`` wherever one may be, written as ``to``: as it is, or as float32."""

    def info(name, type_=to, shape=(2,)):
        return helper.make_tensor_value_info(name, type_, shape)

    def branch(name):
        nodes = [
            helper.make_node("Constant", [], ["c"], value=tensor("c", [1, 2.3], kind, to)),
            helper.make_node("Add", ["h", "c"], [name]),
        ]
        return helper.make_graph(nodes, name, [], [info(name)], [tensor("unused", 0.1, kind, to)])

    function = helper.make_function(
        "own",
        "Halve",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["half"], value=tensor("half", 0.5, kind, to)),
            helper.make_node("Mul", ["a", "half"], ["b"]),
        ],
        [helper.make_opsetid("", 20)],
        attribute_protos=[helper.make_attribute("default", tensor("d", 1.1, kind, to))],
        value_info=[info("b")],
    )
    optional = helper.make_optional_type_proto(helper.make_sequence_type_proto(helper.make_tensor_type_proto(to, [1])))
    mapped = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(to, [1]))
    sparse = helper.make_sparse_tensor(tensor("s", [1.7], kind, to), numpy_helper.from_array(np.array([1]), "i"), [2])
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=to),
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT32),
        helper.make_node("If", ["yes"], ["i"], then_branch=branch("one"), else_branch=branch("two")),
        helper.make_node("ConstantOfShape", ["two"], ["filled"], value=tensor("f", [0.3], kind, to)),
        helper.make_node("EyeLike", ["square"], ["eye"], dtype=to),
        helper.make_node("Optional", [], ["nothing"], type=optional),
        helper.make_node("SequenceEmpty", [], ["empty"], dtype=to),
        helper.make_node("Halve", ["i"], ["halved"], domain="own"),
        helper.make_node("Clip", ["halved", "low", "high"], ["clipped"]),
        helper.make_node("Constant", [], ["from sparse"], sparse_value=sparse),
        helper.make_node("Cast", ["clipped"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "everything",
        [info("x", FLOAT), info("weight")],
        [info("y", FLOAT)],
        [
            tensor("weight", values_of(1, 2), kind, to),
            tensor("low", -65504.0 if kind == FLOAT16 else -3e38, kind, to),
            tensor("high", 1e-5, kind, to),
            tensor("none", np.zeros((0, 3)), kind, to),
            numpy_helper.from_array(np.array([2]), "two"),
            numpy_helper.from_array(np.array(True), "yes"),
            numpy_helper.from_array(np.zeros((2, 2), np.float32), "square"),
        ],
        value_info=[info("h"), info("whole", TensorProto.INT32), helper.make_value_info("m", mapped)],
        sparse_initializer=[sparse],
    )
    graph.initializer[0].doc_string = "stays"
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    training = model.training_info.add()
    training.algorithm.CopyFrom(branch("step"))
    helper.set_model_props(model, {"ddpmx": "stays"})
    return model


def loaded(data):
    return onnx.load_from_string(data)


@KINDS
def test_all_that_is_half_becomes_float32_and_nothing_else_changes(kind):
    wide = widen(memoryview(everything(kind, kind).SerializeToString()), {})
    assert loaded(wide) == everything(kind, FLOAT)
    assert widen(memoryview(wide), {}) is None


def test_the_numbers_are_those_of_the_model_whose_weights_were_rounded():
    """By onnx's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    ours = widen(memoryview(everything(FLOAT16, FLOAT16).SerializeToString()), {})
    graph, x = loaded(ours), np.array([-2.5, 0.7], np.float32)
    for node in [each for each in graph.graph.node if each.output[0] in ("nothing", "empty", "from sparse")]:
        graph.graph.node.remove(node)  # which it cannot run
    del graph.graph.sparse_initializer[:]
    (y,) = ReferenceEvaluator(graph).run(["y"], {"x": x})
    constant = np.array([1, 2.3], np.float16).astype(np.float32)
    expected = np.clip((x + constant) * np.float32(0.5), -65504, np.float32(np.float16(1e-5)))
    assert y.dtype == np.float32
    assert np.array_equal(y, expected)


@KINDS
@pytest.mark.parametrize("numbers", [False, True], ids=["raw", "int32_data"])
def test_every_half_is_the_float32_that_it_is(kind, numbers):
    """Zeros, subnormal halves, infinities, NaN: all 65536."""
    bits = np.arange(65536, dtype=np.uint16)
    half = TensorProto(dims=[256, 256], data_type=kind, name="all")
    if numbers:
        half.int32_data.extend(bits.tolist())
    else:
        half.raw_data = bits.astype("<u2").tobytes()
    graph = helper.make_graph([], "g", [], [], [half])
    (wide,) = loaded(widen(memoryview(helper.make_model(graph).SerializeToString()), {})).graph.initializer
    assert (wide.data_type, list(wide.dims), len(wide.int32_data)) == (FLOAT, [256, 256], 0)
    expected = numpy_helper.to_array(half).astype(np.float32)
    found = numpy_helper.to_array(wide)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


def test_the_shipped_model(figure):
    """As the onnx package rewrites it, whole and checked; and by ONNX Runtime, near to what it makes of the file."""
    path = shipped.find("garments")
    wide, expected = read_widened(path, read_onnx(path)), onnx.load(path)
    for each in expected.graph.initializer:
        if each.data_type == FLOAT16:
            each.raw_data = numpy_helper.to_array(each).astype("<f4").tobytes()
            each.data_type = FLOAT
    for node in expected.graph.node:
        for attribute in node.attribute:
            if (node.op_type, attribute.name, attribute.i) == ("Cast", "to", FLOAT16):
                attribute.i = FLOAT
    assert loaded(wide) == expected
    onnx.checker.check_model(loaded(wide), full_check=True)
    ort = pytest.importorskip("onnxruntime", reason="not verified here: a widened model by ONNX Runtime")
    x = values_of(0, 1, 1, 16, 16).astype(np.float32)
    inputs = {"x": x, "t": np.array([300], np.int32)}
    half, float32 = (ort.InferenceSession(model).run(None, inputs)[0] for model in (str(path), wide))
    apart = float(np.sqrt(np.mean((half - float32) ** 2) / np.mean(float32**2)))
    figure("garments widened, against the file in ONNX Runtime: relative error of ε", apart, at_most=1e-3)


def test_there_may_be_nothing_to_do(gaussian_onnx, tmp_path):
    assert not holds_half(gaussian_onnx)
    assert read_widened(gaussian_onnx, read_onnx(gaussian_onnx)) is None
    assert holds_half(shipped.find("garments"))
    cast = helper.make_model(helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=FLOAT16)], "g", [], []))
    (tmp_path / "cast.onnx").write_bytes(cast.SerializeToString())
    assert holds_half(tmp_path / "cast.onnx")
    foreign = helper.make_model(
        helper.make_graph([helper.make_node("Gelu", ["x"], ["y"], domain="other")], "g", [], [])
    )
    assert widen(memoryview(foreign.SerializeToString()), {}) is None


def test_the_attributes_that_are_types_are_known():
    """Of all operators of ONNX in all versions: whole numbers that are a type by their name or their description."""
    found = {
        attribute.name: f"{schema.name} {schema.since_version}"
        for schema in onnx.defs.get_all_schemas_with_history()
        for attribute in schema.attributes.values()
        if schema.domain == "" and attribute.type == onnx.defs.OpSchema.AttrType.INT
        if re.search("type|precision|^to$", attribute.name) or "data type" in attribute.description.lower()
    }
    assert {"to", "dtype", "output_dtype", "stash_type"} <= found.keys() <= TYPE_ATTRIBUTES, found


# --- weights beside the model -----------------------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path):
    """A model with weights in another file, in half and in other types."""
    numbers = {"a": values_of(2, 300).astype(np.float16), "b": values_of(3, 300), "c": np.arange(300)}
    constants = [numpy_helper.from_array(values, name) for name, values in numbers.items()]
    model = helper.make_model(helper.make_graph([], "g", [], [], constants))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert read_onnx(tmp_path / "m.onnx").external
    return tmp_path / "m.onnx", numbers


def test_weights_beside_the_model_come_into_it(beside):
    path, numbers = beside
    found = {
        each.name: numpy_helper.to_array(each) for each in loaded(read_widened(path, read_onnx(path))).graph.initializer
    }
    for name, values in numbers.items():
        assert found[name].dtype == (np.float32 if name == "a" else values.dtype)
        assert np.array_equal(found[name], values)


def test_weights_that_are_cut_short_missing_or_elsewhere_are_refused(beside):
    path, _ = beside
    info, file = read_onnx(path), path.with_name("w.bin")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"m\.onnx: not a valid ONNX file(.|\n)*bytes, and 3000 to"):
        read_widened(path, info)
    file.write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"'w\.bin' has 0 bytes"):
        read_widened(path, info)
    file.unlink()
    with pytest.raises(FileFormatError, match="missing weights file"):
        read_widened(path, info)
    with pytest.raises(MalformedError, match="external data at"):
        widen(memoryview(path.read_bytes()), {})


# --- what is refused --------------------------------------------------------------------------------------------------

HALF = protobuf.tensor("h", FLOAT16, [2], bytes(4))


def graph(*parts):
    """A ModelProto with these fields in its graph."""
    return memoryview(field(7, b"".join(parts)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            graph(field(5, HALF), field(1, protobuf.node("Gelu", ["x"], ["y"]) + field(7, "com.microsoft"))),
            "Gelu of com",
        ),
        (graph(field(5, HALF), field(1, protobuf.node("BitCast", ["x"], ["y"]))), "BitCast of ai.onnx"),
        (
            graph(field(5, HALF), field(1, protobuf.node("Cast", ["x"], ["y"], field(1, "to") + field(21, "type")))),
            "a type as its argument",
        ),
    ],
)
def test_what_is_not_known_is_refused(model, message):
    with pytest.raises(FileFormatError, match=message) as caught:
        widen(model, {})
    assert "cannot be computed in float32" in caught.value.fact


@pytest.mark.parametrize(
    "part",
    [
        protobuf.tensor("h", FLOAT16, [3], bytes(4)),
        protobuf.tensor("h", FLOAT16, [1 << 40, 1 << 40], bytes(4)),
        HALF + field(9, bytes(4)),
        HALF + field(2, FLOAT),
        field(1, 1) + field(2, FLOAT16) + field(5, 1 << 16),
        field(1, 2) + field(2, FLOAT16) + field(5, b"\x01\x02\x03"),
        protobuf.tensor("h", FLOAT16, [2], bytes(4))[:-1],
    ],
    ids=["size", "huge", "two contents", "two types", "no half", "numbers", "cut"],
)
def test_damaged_tensors_are_refused(part):
    with pytest.raises(MalformedError):
        widen(graph(field(5, part)), {})


def test_an_attribute_with_two_tensors_is_refused():
    """Readers would put them together, and take the type of one for the numbers of the other."""
    twice = protobuf.attribute(5, HALF) + field(5, HALF)
    with pytest.raises(MalformedError, match="several tensors"):
        widen(graph(field(1, protobuf.node("Constant", [], ["y"], twice))), {})


def test_the_limit_of_an_onnx_model(monkeypatch):
    whole = graph(field(5, HALF))
    monkeypatch.setattr(widening, "MAX_MODEL", len(widen(whole, {})))
    assert widen(whole, {})
    monkeypatch.setattr(widening, "MAX_MODEL", widening.MAX_MODEL - 1)
    with pytest.raises(FileFormatError, match="larger than 2 GiB"):
        widen(whole, {})
