"""Conditioned networks in a file: the spec's fields and the graph's inputs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ddpmx.errors import InputError, SpecError
from ddpmx.formats import onnx_file
from ddpmx.formats.describe import describe
from ddpmx.formats.spec import MAX_TEXT, ModelSpec, input_type
from oracles import conditioning
from oracles.conditioning import CHANNELS, KINDS, spec_of
from oracles.protobuf import FLOAT, FLOAT16, INT32, INT64

FIELDS = {"classes", "self_condition", "condition", "null_class", "class_names", "betas"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_survives_as_text(kind):
    spec = spec_of(kind)
    again = ModelSpec.from_text(spec.to_text())
    assert again == spec
    assert again.to_text() == spec.to_text()
    assert len(spec.to_text()) < MAX_TEXT
    assert spec != spec_of(kind, **dict.fromkeys(("classes", "condition")), self_condition=False)


def test_a_text_from_before_there_were_these_fields_stays_as_it_is(gaussian_onnx):
    """Plans are compared by it, character by character."""
    old = onnx_file.read_onnx(gaussian_onnx).metadata["ddpmx"]
    spec = ModelSpec.from_text(old)
    assert spec.to_text() == old
    assert not FIELDS & set(spec.to_json())
    assert (spec.classes, spec.self_condition, spec.condition, spec.betas, spec.conditioning_shapes) == (
        None,
        False,
        None,
        None,
        {},
    )


def test_conditioning_changes_no_coefficient():
    plain = ModelSpec((3, 8, 8), timesteps=20)
    assert {spec_of(kind).to_json()["coefficients"] for kind in KINDS} == {plain.to_json()["coefficients"]}


def test_the_inputs_by_name():
    spec = spec_of("all")
    assert spec.inputs == {
        "x": (3, 8, 8),
        "t": (),
        "y": (),
        "x0_prev": (3, 8, 8),
        "cond": (CHANNELS, 8, 8),
    }
    assert [input_type(name) for name in spec.inputs] == [np.float32, np.int32, np.int32, np.float32, np.float32]
    assert spec.outputs == ("eps",)
    assert spec.replace(variance="learned_range", prediction="v").outputs == ("v", "var")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("classes", 0, "classes must be"),
        ("classes", -3, "classes must be"),
        ("classes", True, "classes must be"),
        ("classes", 1.0, "classes must be"),
        ("classes", "10", "classes must be"),
        ("classes", 1 << 40, "classes must be"),
        ("condition", 0, "condition must be"),
        ("condition", False, "condition must be"),
        ("condition", [3], "condition must be"),
        ("condition", 1 << 13, "condition must be"),
        ("self_condition", 1, "self_condition must be"),
        ("self_condition", None, "self_condition must be"),
        ("self_condition", "yes", "self_condition must be"),
        ("null_class", 1, "null_class must be"),
        ("null_class", None, "null_class must be"),
        ("null_class", True, "for networks with classes"),
        ("class_names", ["a"], "for networks with classes"),
        ("classess", 3, "does not know: classess"),
    ],
)
def test_fields_out_of_range_are_refused(field, value, message):
    values = json.loads(json.dumps({"shape": [3, 8, 8], field: value}))
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_json(values)


def test_no_class_is_one_more_label_and_no_other_input():
    plain = ModelSpec((3, 8, 8), classes=4)
    spec = plain.replace(null_class=True)
    assert (plain.label_count, spec.label_count, plain.replace(classes=None).label_count) == (4, 5, 0)
    assert spec.inputs == plain.inputs
    assert ModelSpec.from_text(spec.to_text()) == spec != plain
    assert (spec.to_json()["null_class"], "null_class" in plain.to_json()) == (True, False)


def test_classes_have_names():
    spec = ModelSpec((3, 8, 8), classes=3, class_names=("cats", "dogs", "Möwen"))
    assert ModelSpec.from_text(spec.to_text()) == spec
    assert spec.to_json()["class_names"] == ["cats", "dogs", "Möwen"]
    assert "class_names" not in spec.replace(class_names=None).to_json()
    assert [spec.class_number(name) for name in ("Möwen", "cats", "1", "-7")] == [2, 0, 1, -7]
    with pytest.raises(InputError, match="no class 'cat'") as refused:
        spec.class_number("cat")
    assert refused.value.hint == "the model's are cats, dogs, Möwen"
    with pytest.raises(InputError, match="no class 'cats'") as refused:
        spec.replace(class_names=None).class_number("cats")
    assert (refused.value.note, refused.value.hint) == ("the classes of this model have no names", "labels: 0…2")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "must be 2 names"),
        ("ab", "must be 2 names"),
        (["a", "a"], "must differ"),
        (["a", ""], "cannot have the name ''"),
        (["a", "b,c"], "cannot have the name 'b,c'"),
        (["a", "12"], "cannot have the name '12'"),
        (["a", " b"], "cannot have the name ' b'"),
        (["a", "b\n"], "cannot have the name"),
        (["a", "\ud800"], "cannot have the name"),
        (["a", "é" * 65], "cannot have the name"),
        (["a", 1], "cannot have the name 1"),
    ],
)
def test_names_that_could_be_mistaken_are_refused(names, message):
    """``--labels a,12`` could mean the class number 12, and a comma would end a name."""
    with pytest.raises(SpecError, match=message):
        ModelSpec((3, 8, 8), classes=2, class_names=names)


def test_a_condition_that_fills_memory_is_refused():
    with pytest.raises(SpecError, match="numbers for one image"):
        ModelSpec((1, 1 << 10, 1 << 10), condition=1 << 12)


# --- the graph -------------------------------------------------------------------------------------------------------


def graph(folder, spec, inputs=None):
    path = folder / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}, inputs=inputs))
    return path


def inputs_of(spec, **changes):
    types = {name: INT32 if name in ("t", "y") else FLOAT for name in spec.inputs}
    every = {name: (types[name], ("batch", *dims)) for name, dims in spec.inputs.items()} | changes
    return {name: what for name, what in every.items() if what is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_matches_its_spec_is_accepted(tmp_path, kind):
    spec = spec_of(kind)
    path = graph(tmp_path, spec)
    assert onnx_file.onnx_spec(path, onnx_file.read_onnx(path)) == spec
    description = describe(path)
    assert set(description["inputs"]) == set(spec.inputs)
    assert FIELDS & set(description["spec"]) == set(KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "changes", "fault"),
    [
        ("classes", {"y": None}, "missing input 'y'"),
        ("classes", {"y": (INT64, ("batch",))}, "'y' is int64, not int32"),
        ("classes", {"y": (INT32, ("batch", 1))}, "'y' has the shape"),
        ("classes", {"y": (INT32, (1,))}, "'y' has the shape"),
        ("itself", {"x0_prev": None}, "missing input 'x0_prev'"),
        ("itself", {"x0_prev": (FLOAT, ("batch", 1, 8, 8))}, "'x0_prev' has the shape"),
        ("condition", {"cond": None}, "missing input 'cond'"),
        ("condition", {"cond": (FLOAT16, ("batch", CHANNELS, 8, 8))}, "'cond' is float16, not float32"),
        ("condition", {"cond": (FLOAT, ("batch", 3, 8, 8))}, "'cond' has the shape"),
        ("condition", {"y": (INT32, ("batch",))}, "unexpected input 'y'"),
        ("classes", {"x0_prev": (FLOAT, ("batch", 3, 8, 8))}, "unexpected input 'x0_prev'"),
    ],
)
def test_a_graph_that_does_not_match_is_refused(tmp_path, kind, changes, fault):
    spec = spec_of(kind)
    path = graph(tmp_path, spec, inputs_of(spec, **changes))
    with pytest.raises(SpecError, match="does not match the spec") as caught:
        onnx_file.onnx_spec(path, onnx_file.read_onnx(path))
    assert fault in str(caught.value)


def test_the_hint_names_all_inputs(tmp_path):
    path = graph(tmp_path, spec_of("all"), inputs_of(spec_of("all"), y=None))
    with pytest.raises(SpecError) as caught:
        onnx_file.onnx_spec(path, onnx_file.read_onnx(path))
    assert (
        "x float32 [batch, C, H, W], t int32 [batch], y int32 [batch], x0_prev float32 [batch, C, H, W] and "
        "cond float32 [batch, K, H, W], and returns 'eps'" in str(caught.value)
    )


def test_a_file_of_someone_else_s_is_described_by_the_given_spec(tmp_path):
    spec = spec_of("classes")
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata={}))
    assert onnx_file.onnx_spec(path, onnx_file.read_onnx(path), spec) == spec
    with pytest.raises(SpecError, match="unexpected input 'y'"):
        onnx_file.onnx_spec(path, onnx_file.read_onnx(path), spec.replace(classes=None))
