"""Specs: written and read back, and every wrong value refused."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddpmx.diffusion.samplers import PREDICTIONS, VARIANCES, make_table
from ddpmx.diffusion.schedule import SCHEDULES
from ddpmx.errors import SpecError
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.spec import MAX_TEXT, ModelSpec

SMALL = {"shape": [1, 4, 4], "timesteps": 10}

SPECS = [
    ModelSpec((3, 32, 32)),
    ModelSpec((1, 16, 16), 250, "cosine", {"s": 0.01}, "v", "fixed_small", None, "fp16", "ab" * 32, "9.9.9"),
    ModelSpec((4, 8, 8), 4000, "jsd", prediction="x0", clip=2.5),
    ModelSpec((3, 64, 64), 4000, "cosine", variance="learned_range"),
    ModelSpec((3, 64, 64), prediction="mu", variance="learned"),
    *(ModelSpec((1, 1, 1), 50, name, prediction="v") for name in SCHEDULES),
]


def text_of(body: bytes | str) -> str:
    """``body`` in an intact envelope."""
    raw = body.encode() if isinstance(body, str) else body
    return f"ddpmx1 {len(raw)} {zlib.crc32(raw):08x} " + raw.decode()


@pytest.mark.parametrize("spec", SPECS)
def test_there_and_back(spec):
    assert ModelSpec.from_text(spec.to_text()) == spec
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("spec", SPECS)
def test_the_text_is_one_line_of_ascii_that_a_plan_can_carry(spec):
    text = spec.to_text()
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= MAX_TEXT == 4095


def test_a_text_longer_than_a_plan_can_carry_is_refused():
    fits = ModelSpec((1, 4, 4), ddpmx="v" * (MAX_TEXT - len(ModelSpec((1, 4, 4)).to_text()) - 1))
    assert len(fits.to_text()) <= MAX_TEXT
    with pytest.raises(SpecError, match="bytes"):
        ModelSpec((1, 4, 4), ddpmx="v" * MAX_TEXT).to_text()


def test_defaults_are_written_out():
    """So that a later ddpmx with other defaults reads the same spec."""
    assert ModelSpec((1, 4, 4)).to_json()["schedule_params"] == {"beta_start": 1e-4, "beta_end": 0.02}
    minimal = ModelSpec.from_json({"shape": [1, 4, 4]})
    assert minimal == ModelSpec((1, 4, 4))
    assert minimal.to_text() == ModelSpec((1, 4, 4)).to_text()


def test_a_copy_with_changes_is_checked_like_any_other():
    spec = ModelSpec((1, 4, 4))
    assert spec.replace(clip=None).clip is None
    assert spec.replace(clip=None) != spec
    with pytest.raises(SpecError):
        spec.replace(timesteps=0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text + " ",
        lambda text: text[1:],
        lambda text: text.replace("ddpmx1", "ddpmx2"),
        lambda text: text.replace("linear", "linaer"),
        lambda text: text.replace(text.split()[1], str(int(text.split()[1]) + 1), 1),
        lambda text: text.replace(" ", "  ", 1),
        lambda text: text.replace('"eps"', '"x0"'),
        lambda text: text[text.index("{") :],
        lambda text: "main_graph",
        lambda text: "\N{GRINNING FACE}",
        lambda text: "\ud800" + text,  # half of a surrogate pair, as JSON and file names may contain
        lambda text: text + "\udcff",
    ],
)
def test_damaged_texts_are_refused(damage):
    with pytest.raises(SpecError):
        ModelSpec.from_text(damage(ModelSpec((1, 4, 4)).to_text()))


def test_every_shorter_text_is_refused():
    text = ModelSpec((1, 4, 4)).to_text()
    for length in range(len(text)):
        with pytest.raises(SpecError):
            ModelSpec.from_text(text[:length])


@pytest.mark.parametrize("body", ["", "[]", "3", "null", '"text"', "{", '{"shape":[1,2,2],}', "\u00e9", "[" * 4000])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(SpecError):
        ModelSpec.from_text(text_of(body))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_json_has_no_nan_and_no_infinity_here(constant):
    with pytest.raises(SpecError):
        ModelSpec.from_text(text_of(f'{{"shape":[1,4,4],"clip":{constant}}}'))
    with pytest.raises(SpecError):
        ModelSpec.from_text(text_of(f'{{"shape":[1,4,4],"schedule_params":{{"beta_end":{constant}}}}}'))


@pytest.mark.parametrize("text", ["NaN", "[1,", b"\xff\xfe\x00", "[" * 100_000, "9" * 5000, ""])
def test_broken_json_is_refused(text):
    with pytest.raises(SpecError, match="JSON"):
        parse_json(text)


def test_unknown_fields_are_named_with_the_version_that_wrote_them():
    with pytest.raises(SpecError, match="thresholding") as caught:
        ModelSpec.from_json({**SMALL, "thresholding": "dynamic", "ddpmx": "7.0"})
    assert "7.0" in str(caught.value)


def test_private_fields_cannot_be_set_from_a_file():
    for name in ("_schedule", "_coefficients"):
        with pytest.raises(SpecError, match="not know"):
            ModelSpec.from_json({**SMALL, name: None})


def test_the_shape_must_be_there():
    with pytest.raises(SpecError, match="shape"):
        ModelSpec.from_json({"timesteps": 10})


def test_another_meaning_of_the_schedule_is_noticed():
    values = ModelSpec((1, 4, 4)).to_json()
    assert ModelSpec.from_json(values)
    for change in (
        {"coefficients": "00000000"},
        {"coefficients": 5},
        {"schedule": "quad"},
        {"variance": "fixed_small"},
        {"variance": "learned_range"},
        {"variance": "learned"},
        {"prediction": "v"},
        {"prediction": "mu"},
        {"timesteps": 999},
    ):
        with pytest.raises(SpecError, match="coefficients"):
            ModelSpec.from_json({**values, **change})


@pytest.mark.parametrize(
    ("spec", "checksum"),
    [
        (ModelSpec((3, 32, 32)), "03bad913"),
        (ModelSpec((1, 16, 16), 250, "cosine", prediction="v", variance="fixed_small"), "9d3504ee"),
    ],
)
def test_files_of_older_versions_still_read(spec, checksum):
    """Specs from before learned variances."""
    assert ModelSpec.from_json({**spec.to_json(), "coefficients": checksum}) == spec


def test_the_checksum_covers_the_range_of_a_learned_variance():
    """The rows do not contain it: with a learned variance their σ is 1."""
    spec = ModelSpec((1, 4, 4), 10, variance="learned_range")
    table = make_table(spec.make_schedule(), "eps", "learned_range")
    numbers = np.concatenate([table.rows, table.learned], axis=1).astype("<f4")
    assert spec.to_json()["coefficients"] == f"{zlib.crc32(numbers.tobytes()):08x}"
    assert spec.to_json()["coefficients"] != f"{zlib.crc32(table.rows.astype('<f4').tobytes()):08x}"


WRONG = {
    "shape": [
        None, 3, "3,4,4", [], [1], [1, 4], [1, 4, 4, 4], [1.0, 4, 4], [True, 4, 4], [0, 4, 4], [-1, 4, 4], ["1", 4, 4],
        [1, 2**20, 2**20], [10**30, 10**30, 10**30], {"C": 1}, [[1], 4, 4],
    ],
    "timesteps": [None, 0, -1, 1.5, 10.0, "10", True, 10**6 + 1, 10**40, [], {}],
    "schedule": [None, "", "Linear", "sigmoid", 3, [], {}, True],
    "schedule_params": [
        None, 3, "x", [], [["beta_end", 0.02]], {"beta": 1}, {"T": 5}, {"beta_end": "x"}, {"beta_end": None},
        {"beta_end": True}, {"beta_end": [0.02]}, {"beta_end": 0}, {"beta_end": -1}, {"beta_end": 2}, {"beta_end": 2**70},
        {"beta_end": 10**400},
    ],
    "prediction": [None, "epsilon", "EPS", 1, [], {}, True, ["eps"]],
    "variance": [None, "learnt", "learned_variance", 1, [], {}, True, ["fixed_small"]],
    "clip": [0, -1, True, "1", [], {}, [1.0], math.nan, math.inf, 10**400],
    "precision": [None, "tf32", "int4", 16, [], {}],
    "weights": ["", "ab", "AB" * 32, "g" * 64, "a" * 65, "a" * 64 + "\n", 5, [], {}, True],
    "ddpmx": [None, 1, [], {}, True],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_wrong_values_are_refused(name, value):
    with pytest.raises(SpecError):
        ModelSpec.from_json({**SMALL, name: value})


def test_every_field_has_wrong_values_here():
    assert set(WRONG) == set(ModelSpec((1, 4, 4)).to_json()) - {"coefficients"}


@pytest.mark.parametrize(
    ("schedule", "params"),
    [
        ("const", {"beta_end": 0.5}),  # √(1/ᾱ) at t = 299 is 10⁴⁵, beyond float32
        ("const", {"beta_end": 1.0}),
        ("sigmoid_alpha_bar", {"tau": 0.0}),
        ("sigmoid_alpha_bar", {"tau": 0.001}),  # ᾱ does not move for most of the chain
    ],
)
def test_schedules_with_coefficients_that_are_not_finite_are_refused(schedule, params):
    with pytest.raises(SpecError):
        ModelSpec((1, 4, 4), 300, schedule, params)


# --- anything at all ---------------------------------------------------------------------------------------------------

numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.integers(-(10**400), 10**400)
anything = st.recursive(
    numbers | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
params = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("beta_start", "beta_end", "s", "beta_max", "start", "end", "tau", "width"), numbers),
)
objects = st.fixed_dictionaries(
    {"shape": st.just([1, 4, 4]) | anything},
    optional={
        "timesteps": st.integers(-5, 50) | anything,
        "schedule": st.sampled_from(list(SCHEDULES)) | anything,
        "schedule_params": params | anything,
        "prediction": st.sampled_from(PREDICTIONS) | anything,
        "variance": st.sampled_from(VARIANCES) | anything,
        "clip": anything,
        "precision": st.sampled_from(["fp32", "fp16"]) | anything,
        "weights": anything,
        "ddpmx": anything,
        "coefficients": anything,
    },
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True)
@given(values=objects | anything)
@example(values={"shape": [1, 4, 4], "clip": 2**64})
@example(values={"shape": [1, 4, 4], "schedule_params": {"beta_end": 2**64}})
def test_any_json_is_a_spec_or_a_spec_error(values):
    try:
        spec = ModelSpec.from_json(values)
    except SpecError:
        return
    assert ModelSpec.from_json(spec.to_json()) == spec


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=st.sampled_from(list(SCHEDULES)), values=params, steps=st.integers(1, 30))
@example(name="sigmoid_alpha_bar", values={"tau": 0.0}, steps=10)
def test_any_parameters_are_a_schedule_or_a_spec_error(name, values, steps):
    """Only with the schedule's own parameters: unknown ones are refused before they are tried."""
    known = {key: value for key, value in values.items() if key in inspect.signature(SCHEDULES[name]).parameters}
    with contextlib.suppress(SpecError):
        ModelSpec((1, 4, 4), steps, name, known, prediction="v")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=60) | st.text(max_size=60).map(text_of) | st.characters(categories=["Cs"]))
def test_any_text_is_a_spec_or_a_spec_error(text):
    with pytest.raises(SpecError):
        ModelSpec.from_text(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_changed_character_is_noticed(data):
    text = ModelSpec((1, 4, 4)).to_text()
    position = data.draw(st.integers(0, len(text) - 1))
    changed = text[:position] + data.draw(st.characters()) + text[position + 1 :]
    if changed != text:
        with pytest.raises(SpecError):
            ModelSpec.from_text(changed)
