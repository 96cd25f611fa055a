"""The kind of a file, from its bytes: ours, foreign, damaged or hostile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

import ddpmx
from ddpmx.errors import DdpmxError, FileFormatError, SpecError
from ddpmx.formats import model_file, onnx_file
from ddpmx.formats.onnx_file import TensorInfo
from ddpmx.formats.spec import ModelSpec
from oracles import gaussian, protobuf
from oracles.protobuf import FLOAT, FLOAT16, INT32, INT64

SPEC = ModelSpec((3, 8, 8), timesteps=20)
INPUTS = {"x": (FLOAT, ("batch", 3, 8, 8)), "t": (INT32, ("batch",))}
OUTPUTS = {"eps": (FLOAT, ("batch", 3, 8, 8))}


@pytest.fixture
def write(tmp_path):
    """``write(data)`` puts a model file into a folder of its own."""
    folder = tmp_path / "model"
    folder.mkdir()

    def put(data: bytes) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(data)
        return path

    return put


def spec_of(path: Path, override: ModelSpec | None = None) -> ModelSpec:
    """Every check of a file before a backend opens it."""
    info = onnx_file.read_onnx(path)
    onnx_file.check_external(path, info)
    return onnx_file.onnx_spec(path, info, override)


# --- which kind ------------------------------------------------------------------------------------------------------


def test_kinds_are_known_by_their_bytes(tmp_path, gaussian_onnx):
    assert model_file.identify(gaussian_onnx) == "onnx"
    renamed = tmp_path / "model.plan"
    renamed.write_bytes(gaussian_onnx.read_bytes())
    assert model_file.identify(renamed) == "onnx"
    for magic in (b"ftrt", b"vtrt"):
        (tmp_path / "model.onnx").write_bytes(magic + bytes(100))
        assert model_file.identify(tmp_path / "model.onnx") == "plan"


def test_checkpoints_are_folders(tmp_path):
    with pytest.raises(FileFormatError, match="not a ddpmx checkpoint") as refused:
        model_file.identify(tmp_path)
    assert refused.value.hint is None
    (tmp_path / "theirs" / "unet").mkdir(parents=True)
    (tmp_path / "theirs" / "unet" / "model.safetensors").touch()
    with pytest.raises(FileFormatError, match="not a ddpmx checkpoint") as refused:
        model_file.identify(tmp_path / "theirs")
    assert "ddpmx import" in str(refused.value.hint)
    (tmp_path / "spec.json").write_text("{}")
    assert model_file.identify(tmp_path) == "checkpoint"
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert model_file.identify(run) == "checkpoint"


@pytest.mark.parametrize("content", [b"<html>", b"PK\x03\x04", b"\x89PNG", b"\x80", b"{", b"ftr", b"\x00" * 40])
def test_foreign_files_are_refused_with_what_they_begin_with(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="neither") as caught:
        model_file.identify(path)
    assert repr(content[:4]) in str(caught.value)


def test_empty_and_missing_files_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(FileFormatError, match="empty"):
        model_file.identify(tmp_path / "empty")
    with pytest.raises(FileFormatError, match="cannot be read"):
        model_file.identify(tmp_path / "missing.onnx")
    with pytest.raises(FileFormatError, match="cannot be read"):
        model_file.identify(tmp_path / "empty" / "below-a-file")


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_toy_model_is_read(gaussian_onnx):
    info = onnx_file.read_onnx(gaussian_onnx)
    assert info.inputs == {
        "x": TensorInfo(FLOAT, ("batch", 3, 8, 8)),
        "t": TensorInfo(INT32, ("batch",)),
    }
    assert info.outputs == {"eps": TensorInfo(FLOAT, ("batch", 3, 8, 8))}
    assert info.opset == 20
    assert info.external == ()
    assert spec_of(gaussian_onnx) == gaussian.SPEC


@pytest.mark.torch
def test_the_onnx_package_reads_the_same(gaussian_onnx):
    onnx = pytest.importorskip("onnx", reason="not verified here: that the onnx package reads the same as ddpmx")
    model = onnx.load(gaussian_onnx)
    info = onnx_file.read_onnx(gaussian_onnx)

    def tensors(values):
        return {
            value.name: TensorInfo(
                value.type.tensor_type.elem_type,
                tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        }

    assert info.inputs == tensors(model.graph.input)
    assert info.outputs == tensors(model.graph.output)
    assert info.metadata == {prop.key: prop.value for prop in model.metadata_props}
    assert info.opset == model.opset_import[0].version


@pytest.mark.torch
def test_the_onnx_package_reads_what_these_tests_write():
    """The hand-written bytes of these tests are valid ONNX files."""
    onnx = pytest.importorskip("onnx", reason="not verified here: that the hand-written ONNX files are ONNX files")
    graph = protobuf.field(5, protobuf.external_tensor("weights.bin"))
    graph += protobuf.field(1, protobuf.node("Identity", ["x"], ["eps"]))
    model = onnx.load_from_string(protobuf.model(INPUTS, OUTPUTS, metadata={"a": "b"}, graph=graph))
    assert [value.name for value in model.graph.input] == ["x", "t"]
    assert [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim] == [0, 3, 8, 8]
    assert model.graph.node[0].op_type == "Identity"
    assert model.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
    assert model.graph.initializer[0].external_data[0].value == "weights.bin"
    assert model.metadata_props[0].value == "b"


@pytest.mark.torch
def test_the_committed_toy_model_is_the_one_that_its_source_writes(gaussian_onnx):
    pytest.importorskip("onnx", reason="not verified here: that tests/data/gaussian.onnx is up to date")
    assert gaussian_onnx.read_bytes() == gaussian.onnx_bytes()


def test_weights_that_are_listed_as_inputs_are_no_inputs(write):
    """IR versions before 4 require every initializer among the inputs."""
    inputs = {**INPUTS, "w": (FLOAT, (1,))}
    graph = protobuf.field(5, protobuf.tensor("w", FLOAT, [1], bytes(4)))
    info = onnx_file.read_onnx(write(protobuf.model(inputs, OUTPUTS, graph=graph)))
    assert list(info.inputs) == ["x", "t"]


def output_dtype(kind: int) -> bytes:
    return protobuf.field(1, "output_dtype") + protobuf.field(3, kind) + protobuf.field(20, 2)


@pytest.mark.parametrize(
    ("inputs", "attributes", "to"),
    [
        (["w", "s", "zero"], [], 3),  # as the zero point: int8
        (["w", "s"], [output_dtype(17)], 17),
        (["w", "s"], [], 2),  # ONNX: uint8
        (["x", "s", "zero"], [], None),  # no constant
    ],
)
def test_constants_that_the_graph_rounds_are_counted(write, inputs, attributes, to):
    graph = b"".join(
        protobuf.field(5, item)
        for item in (
            protobuf.tensor("w", FLOAT, [4, 5], bytes(80)),
            protobuf.tensor("zero", 3, [], bytes(1)),
            protobuf.tensor("s", FLOAT, [], bytes(4)),
        )
    )
    graph += protobuf.field(1, protobuf.node("QuantizeLinear", inputs, ["q"], *attributes))
    info = onnx_file.read_onnx(write(protobuf.model(INPUTS, OUTPUTS, graph=graph)))
    assert info.weights == {FLOAT: 84, 3: 1}
    assert info.rounded == ({} if to is None else {(FLOAT, to): 80})
    after = Counter({FLOAT: 84, 3: 1} if to is None else {FLOAT: 4, 3: 1})
    after.update({} if to is None else {to: 20})
    assert info.computed == after


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        b"\x08\x08",  # no graph
        protobuf.model(INPUTS, OUTPUTS, rest=protobuf.field(7, b"")),  # two: protobuf would merge them
        protobuf.field(1, 8) + protobuf.field(7, 5),  # a number where a message belongs
        protobuf.field(1, 8) + protobuf.varint(7 << 3 | 2) + protobuf.varint(2**60),
        protobuf.field(1, 8) + protobuf.varint(7 << 3 | 3),  # a group
        b"\x08\x08" + b"\xff" * 20,
        protobuf.field(1, 8) + protobuf.field(0, 1),
    ],
)
def test_damaged_files_are_refused(write, data):
    with pytest.raises(FileFormatError):
        onnx_file.read_onnx(write(data))


def nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = protobuf.field(1, protobuf.node("If", [], [], protobuf.attribute(6, graph)))
    return protobuf.model(INPUTS, OUTPUTS, graph=graph)


def test_absurd_nesting_is_refused_and_real_nesting_is_not(write):
    assert onnx_file.read_onnx(write(nested(10)))
    for depth in (100, 1000):
        with pytest.raises(FileFormatError):
            onnx_file.read_onnx(write(nested(depth)))


def attempt(path: Path) -> None:
    """Reading succeeds or fails with a DdpmxError, in bounded time."""
    start = time.monotonic()
    with contextlib.suppress(DdpmxError):
        spec_of(path)
    assert time.monotonic() - start < 5


def test_truncation_never_escapes(write, gaussian_onnx):
    whole = gaussian_onnx.read_bytes()
    for length in range(0, len(whole), 37):
        path = write(whole[:length])
        attempt(path)
        with pytest.raises(DdpmxError):  # the spec comes last, so there is no length at which nothing is missing
            spec_of(path)


@pytest.mark.parametrize("which", ["toy", "bare"])
def test_mutations_never_escape(write, gaussian_onnx, which):
    """The toy is mostly weights; the bare file is all structure."""
    graph = protobuf.field(
        1, protobuf.node("If", [], [], protobuf.attribute(6, protobuf.field(5, protobuf.external_tensor("w.bin"))))
    )
    bare = protobuf.model(INPUTS, OUTPUTS, metadata={"ddpmx": SPEC.to_text()}, graph=graph)
    whole = gaussian_onnx.read_bytes() if which == "toy" else bare
    rng = random.Random(8)
    for _ in range(300):
        mutated = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 4))):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        attempt(write(bytes(mutated)))


# --- weights in other files ------------------------------------------------------------------------------------------

PLACES = {
    "an initializer": lambda tensor: {"graph": protobuf.field(5, tensor)},
    "a sparse initializer's values": lambda tensor: {"graph": protobuf.field(15, protobuf.field(1, tensor))},
    "a sparse initializer's indices": lambda tensor: {"graph": protobuf.field(15, protobuf.field(2, tensor))},
    "a constant": lambda tensor: {"graph": in_node(protobuf.attribute(5, tensor))},
    "several constants": lambda tensor: {"graph": in_node(protobuf.attribute(10, tensor))},
    "a sparse constant": lambda tensor: {"graph": in_node(protobuf.attribute(22, protobuf.field(1, tensor)))},
    "several sparse constants": lambda tensor: {"graph": in_node(protobuf.attribute(23, protobuf.field(2, tensor)))},
    "a subgraph": lambda tensor: {"graph": in_node(protobuf.attribute(6, protobuf.field(5, tensor)))},
    "several subgraphs": lambda tensor: {"graph": in_node(protobuf.attribute(11, protobuf.field(5, tensor)))},
    "a subgraph's subgraph": lambda tensor: {
        "graph": in_node(protobuf.attribute(6, in_node(protobuf.attribute(6, in_node(protobuf.attribute(5, tensor))))))
    },
    "a function": lambda tensor: {
        "rest": protobuf.field(25, protobuf.field(7, protobuf.node("C", [], [], protobuf.attribute(5, tensor))))
    },
    "a function's default": lambda tensor: {
        "rest": protobuf.field(25, protobuf.field(11, protobuf.attribute(5, tensor)))
    },
    "training's first graph": lambda tensor: {"rest": protobuf.field(20, protobuf.field(1, protobuf.field(5, tensor)))},
    "training's second graph": lambda tensor: {
        "rest": protobuf.field(20, protobuf.field(2, protobuf.field(5, tensor)))
    },
}


def in_node(attribute: bytes) -> bytes:
    return protobuf.field(1, protobuf.node("Constant", [], ["c"], attribute))


def external_model(location: str, place: str = "an initializer") -> bytes:
    return protobuf.model(INPUTS, OUTPUTS, **PLACES[place](protobuf.external_tensor(location)))


@pytest.mark.parametrize("place", PLACES)
def test_weights_outside_the_folder_are_found_wherever_they_hide(write, place):
    path = write(external_model("/etc/passwd", place))
    info = onnx_file.read_onnx(path)
    assert info.external == ("/etc/passwd",)
    with pytest.raises(FileFormatError, match="outside its own folder"):
        onnx_file.check_external(path, info)


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../secret",
        "sub/../../secret",
        "..\\secret",
        "C:\\secret",
        "",
        "./../model/../secret",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_other_places_are_refused(write, tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(4))
    path = write(external_model(location))
    with pytest.raises(FileFormatError, match="outside its own folder"):
        onnx_file.check_external(path, onnx_file.read_onnx(path))


def test_a_field_that_others_take_for_another_one_is_refused(write):
    """A key is a number of 32 bits: protobuf drops the higher bits, and would see weights that have not been checked."""
    tensor = protobuf.external_tensor("/etc/passwd")
    hidden = protobuf.varint((1 << 32) + (5 << 3 | 2)) + protobuf.varint(len(tensor)) + tensor
    with pytest.raises(FileFormatError, match="not a valid ONNX file"):
        onnx_file.read_onnx(write(protobuf.model(INPUTS, OUTPUTS, graph=hidden)))


def test_a_symlink_that_leaves_the_folder_is_refused(write, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4))
    path = write(external_model("weights.bin"))
    os.symlink(tmp_path / "secret", path.parent / "weights.bin")
    with pytest.raises(FileFormatError, match="outside its own folder"):
        onnx_file.check_external(path, onnx_file.read_onnx(path))


def test_a_folder_that_is_a_symlink_out_is_refused(write, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w").write_bytes(bytes(4))
    path = write(external_model("sub/w"))
    os.symlink(tmp_path / "elsewhere", path.parent / "sub")
    with pytest.raises(FileFormatError, match="outside its own folder"):
        onnx_file.check_external(path, onnx_file.read_onnx(path))


@pytest.mark.parametrize("location", ["missing.bin", ".", "a" * 300, "nul\0byte", "loop", "a\udcffb"])
def test_files_that_cannot_be_are_refused(write, location):
    path = write(external_model(location))
    os.symlink("loop", path.parent / "loop")
    with pytest.raises(FileFormatError):
        onnx_file.check_external(path, onnx_file.read_onnx(path))


def test_weights_beside_the_model_are_welcome(write):
    path = write(external_model("weights.bin") + protobuf.field(25, protobuf.field(7, b"")))
    weights = path.parent / "weights.bin"
    weights.write_bytes(bytes(4))
    assert onnx_file.check_external(path, onnx_file.read_onnx(path)) == [weights.resolve()]


def test_load_checks_before_anything_is_read(write):
    path = write(external_model("/etc/passwd"))
    with pytest.raises(FileFormatError, match="outside its own folder"):
        ddpmx.load(path, spec=SPEC)


# --- the spec and the graph ------------------------------------------------------------------------------------------


def test_a_file_without_a_spec_asks_for_one(write):
    path = write(protobuf.model(INPUTS, OUTPUTS))
    with pytest.raises(SpecError, match="--spec"):
        spec_of(path)
    assert spec_of(path, SPEC) == SPEC


def test_a_spec_in_the_file_takes_precedence(write):
    path = write(protobuf.model(INPUTS, OUTPUTS, metadata={"ddpmx": SPEC.to_text(), "other": "entry"}))
    assert spec_of(path) == SPEC
    assert spec_of(path, SPEC) == SPEC
    with pytest.raises(SpecError, match="contradicts"):
        spec_of(path, SPEC.replace(variance="fixed_small"))


@pytest.mark.parametrize("text", ["", "ddpmx1", SPEC.to_text()[:-2], SPEC.to_text().replace("eps", "epz")])
def test_a_damaged_spec_names_the_file_and_is_not_replaced(write, text):
    path = write(protobuf.model(INPUTS, OUTPUTS, metadata={"ddpmx": text}))
    for override in (None, SPEC):
        with pytest.raises(SpecError, match=r"model\.onnx"):
            spec_of(path, override)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"t": (INT64, ("batch",))}, "'t' is int64"),
        ({"t": (FLOAT, ("batch",))}, "'t' is float32"),
        ({"t": (INT32, ())}, "'t' has the shape"),
        ({"t": (INT32, ("batch", 1))}, "'t' has the shape"),
        ({"t": None}, "missing input 't'"),
        ({"x": None}, "missing input 'x'"),
        ({"x": (FLOAT16, ("batch", 3, 8, 8))}, "'x' is float16"),
        ({"x": (FLOAT, ("batch", 1, 8, 8))}, "'x' has the shape"),
        ({"x": (FLOAT, ("batch", 3, 8))}, "'x' has the shape"),
        ({"x": (FLOAT, ("batch", 3, 8, 9))}, "'x' has the shape"),
        ({"labels": (INT32, ("batch",))}, "unexpected input 'labels'"),
        ({"eps": (FLOAT, ("batch", 6, 8, 8))}, "'eps' has the shape"),
        ({"eps": (FLOAT16, ("batch", 3, 8, 8))}, "'eps' is float16"),
    ],
)
def test_graphs_that_break_the_contract_are_refused(write, change, complaint):
    inputs = {**INPUTS, **{name: value for name, value in change.items() if name != "eps"}}
    outputs = {**OUTPUTS, **{name: value for name, value in change.items() if name == "eps"}}
    path = write(protobuf.model({k: v for k, v in inputs.items() if v}, outputs))
    with pytest.raises(SpecError, match=r"does not match the spec") as caught:
        spec_of(path, SPEC)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("outputs", [{}, {"out": OUTPUTS["eps"]}, {"v": OUTPUTS["eps"]}])
def test_the_output_is_named_by_what_it_predicts(write, outputs):
    path = write(protobuf.model(INPUTS, outputs))
    with pytest.raises(SpecError, match="missing output 'eps'"):
        spec_of(path, SPEC)
    if "v" in outputs:
        assert spec_of(path, SPEC.replace(prediction="v")).prediction == "v"


LEARNING = SPEC.replace(variance="learned_range")
VAR = {"var": OUTPUTS["eps"]}


def test_a_model_that_learns_its_variance_has_two_outputs(write):
    path = write(protobuf.model(INPUTS, {**OUTPUTS, **VAR}))
    assert spec_of(path, LEARNING) == LEARNING
    path = write(protobuf.model(INPUTS, {**VAR, **OUTPUTS}, metadata={"ddpmx": LEARNING.to_text()}))  # in any order
    assert spec_of(path) == LEARNING


@pytest.mark.parametrize(
    ("spec", "outputs", "complaint"),
    [
        (LEARNING, OUTPUTS, "missing output 'var'"),
        (LEARNING, VAR, "missing output 'eps'"),
        (LEARNING, {**OUTPUTS, "var": (FLOAT16, ("batch", 3, 8, 8))}, "'var' is float16"),
        (LEARNING, {**OUTPUTS, "var": (FLOAT, ("batch", 6, 8, 8))}, "'var' has the shape"),
        (LEARNING, {**OUTPUTS, "var": (FLOAT, ("batch",))}, "'var' has the shape"),
        (LEARNING, {**OUTPUTS, **VAR, "x0": OUTPUTS["eps"]}, "unexpected output 'x0'"),
        (SPEC, {**OUTPUTS, **VAR}, "unexpected output 'var'"),
        (SPEC, {**OUTPUTS, "x0": OUTPUTS["eps"]}, "unexpected output 'x0'"),
    ],
)
def test_outputs_are_those_that_the_spec_describes(write, spec, outputs, complaint):
    with pytest.raises(SpecError, match=r"does not match the spec") as caught:
        spec_of(write(protobuf.model(INPUTS, outputs)), spec)
    assert complaint in str(caught.value)
    assert ("'eps' and 'var'" in caught.value.hint) is (spec is LEARNING)


def test_an_output_does_not_stand_in_for_an_input(write):
    path = write(protobuf.model({"t": INPUTS["t"]}, {**OUTPUTS, "x": INPUTS["x"]}))
    with pytest.raises(SpecError, match="missing input 'x'"):
        spec_of(path, SPEC)


def test_dimensions_may_have_any_name_or_none(write):
    inputs = {"x": (FLOAT, ("N", None, "h", 8)), "t": (INT32, (None,))}
    assert spec_of(write(protobuf.model(inputs, OUTPUTS)), SPEC) == SPEC


# --- spec.json -------------------------------------------------------------------------------------------------------


def test_a_spec_file_holds_a_spec_or_a_checkpoints_description(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SPEC.to_json()))
    assert model_file.read_spec(path) == SPEC
    path.write_text(json.dumps({"model": SPEC.to_json(), "network": {}}))
    assert model_file.read_spec(path) == SPEC


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff", b"{}", b'{"model": 3}', b'{"shape": [NaN]}', b" " * 2**21]
)
def test_broken_spec_files_are_refused(tmp_path, content):
    path = tmp_path / "spec.json"
    path.write_bytes(content)
    with pytest.raises(SpecError):
        model_file.read_spec(path)


def test_a_missing_spec_file_is_refused(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        model_file.read_spec(tmp_path / "spec.json")
    with pytest.raises(SpecError, match="cannot be read"):
        model_file.read_spec(tmp_path)


def test_the_checksum_of_a_file(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # the example of FIPS 180-4
    assert model_file.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
