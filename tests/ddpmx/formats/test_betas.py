"""A schedule that is an array of β: stored beside the spec in every kind of file, and missing, damaged or different."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib

import numpy as np
import pytest

from ddpmx import pipeline
from ddpmx.diffusion.samplers import make_table
from ddpmx.diffusion.schedule import Schedule, cosine, make_schedule
from ddpmx.errors import InputError, SpecError
from ddpmx.formats import betas as free_betas
from ddpmx.formats import model_file, onnx_file, plan_file
from ddpmx.formats.describe import describe
from ddpmx.formats.spec import ModelSpec
from oracles import conditioning, protobuf
from oracles.plans import RECORD, make_plan

T = 20
BETAS = np.linspace(0.1, 0.9, T) ** 2 / 3
SPEC = ModelSpec((3, 8, 8), timesteps=T, schedule="betas", betas=BETAS, ddpmx="0.1.0")


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_the_schedule_is_that_array():
    schedule = SPEC.make_schedule()
    np.testing.assert_array_equal(schedule.betas, BETAS)
    np.testing.assert_allclose(schedule.alpha_bar, np.cumprod(1 - BETAS), rtol=1e-15)


def test_a_named_schedule_as_an_array_gives_the_same_table():
    named = ModelSpec((3, 8, 8), schedule="cosine")
    free = named.replace(schedule="betas", schedule_params={}, betas=cosine(1000))
    tables = [make_table(spec.make_schedule(), "eps", "fixed_large") for spec in (named, free)]
    np.testing.assert_array_equal(tables[0].rows, tables[1].rows)
    assert free.to_json()["coefficients"] == named.to_json()["coefficients"]


def test_alpha_bar_gives_its_betas():
    wanted = make_schedule("linear", 1000)
    got = Schedule.from_alpha_bar(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    np.testing.assert_allclose(got.betas, wanted.betas, rtol=1e-11)
    np.testing.assert_allclose(got.alpha_bar, wanted.alpha_bar, rtol=1e-12)


@pytest.mark.parametrize(
    "alpha_bar", [[], [[0.5]], [1.0, 0.5], [0.5, 0.5], [0.4, 0.5], [0.5, -0.1], [np.nan], [0.5, np.nan], [1.5, 0.5]]
)
def test_an_invalid_alpha_bar_is_refused(alpha_bar):
    with pytest.raises(InputError, match="ᾱ"):
        Schedule.from_alpha_bar(np.array(alpha_bar))


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (None, "needs an array of β"),
        ([], "must be 1…"),
        ([[0.1]], "must be 1…"),
        (0.1, "must be 1…"),
        ([0.1, [0.2]], "array of numbers"),
        (["a"], "array of numbers"),
        ([True], "array of numbers"),
        ([0.1, 0.0], r"lie in \(0, 1\]"),
        ([0.1, 1.1], r"lie in \(0, 1\]"),
        ([0.1, float("nan")], r"lie in \(0, 1\]"),
        ([0.1] * 3, "3 β, and timesteps is 2"),
        ([0.1] * (free_betas.MAX_BETAS + 1), "must be 1…"),
    ],
)
def test_an_invalid_array_of_betas_is_refused(betas, message):
    with pytest.raises(SpecError, match=message):
        ModelSpec((1, 2, 2), timesteps=2, schedule="betas", betas=betas)


def test_betas_belong_to_their_schedule_and_have_no_parameters():
    with pytest.raises(SpecError, match="belong to the schedule 'betas'"):
        ModelSpec((1, 2, 2), timesteps=2, betas=[0.1, 0.2])
    with pytest.raises(SpecError, match="no parameters"):
        ModelSpec((1, 2, 2), timesteps=2, schedule="betas", betas=[0.1, 0.2], schedule_params={"beta_end": 0.1})


# --- the spec --------------------------------------------------------------------------------------------------------


def test_the_text_is_short_and_comes_back_with_the_array():
    long = ModelSpec((3, 8, 8), timesteps=4000, schedule="betas", betas=np.linspace(1e-5, 0.01, 4000))
    assert len(long.to_text()) < 500
    again = ModelSpec.from_text(long.to_text(), betas=long.betas)
    assert again == long
    np.testing.assert_array_equal(again.betas, long.betas)
    assert json.loads(json.dumps(long.to_json(whole=True)))["betas"] == long.betas.tolist()
    assert ModelSpec.from_json(json.loads(json.dumps(long.to_json(whole=True)))) == long


def test_two_arrays_are_two_specs():
    other = BETAS.copy()
    other[3] = np.nextafter(other[3], 1)
    assert SPEC == SPEC.replace(betas=BETAS.copy()) == SPEC.replace(prediction="eps")
    assert SPEC.replace(betas=other) != SPEC


def test_the_array_cannot_be_changed_behind_the_spec():
    mine = BETAS.copy()
    spec = SPEC.replace(betas=mine)
    mine[0] = 0.5
    assert spec == SPEC
    with pytest.raises(ValueError, match="read-only"):
        spec.betas[0] = 0.5


def test_another_array_than_the_spec_s_is_refused():
    """However small the difference."""
    other = BETAS.copy()
    other[-1] = np.nextafter(other[-1], 1)
    with pytest.raises(SpecError, match="does not match the spec"):
        ModelSpec.from_text(SPEC.to_text(), betas=other, where="the file")
    with pytest.raises(SpecError, match="array is missing") as caught:
        ModelSpec.from_text(SPEC.to_text(), where="the file")
    assert "should be in the file" in str(caught.value)


def test_the_text_of_the_array():
    text = free_betas.to_text(SPEC.betas)
    raw = BETAS.astype("<f8").tobytes()
    assert text == f"betas1 {T} {zlib.crc32(raw):08x} {base64.b64encode(raw).decode()}"
    np.testing.assert_array_equal(free_betas.from_text(text), BETAS)


def broken(text):
    """Texts with a changed character, or without the end."""
    yield from (
        "",
        "betas1",
        text[:-1],
        text[:-4],
        text + "A",
        text.replace("betas1", "betas2"),
        text.replace("betas1 ", ""),
    )
    yield text.replace(f" {T} ", f" {T + 1} ")
    for at in range(len(text) - 60, len(text) - 4):
        yield text[:at] + ("B" if text[at] == "A" else "A") + text[at + 1 :]
    yield from (None, 7, ["betas1"])


def test_a_changed_text_is_refused():
    text = free_betas.to_text(SPEC.betas)
    changed = [other for other in broken(text) if other != text]
    assert len(changed) > 50
    for other in changed:
        with pytest.raises(SpecError, match="array of β is damaged"):
            free_betas.from_text(other)


def test_a_whole_text_of_no_betas_is_refused():
    raw = np.array([0.1, 2.0]).tobytes()
    text = f"betas1 2 {zlib.crc32(raw):08x} {base64.b64encode(raw).decode()}"
    with pytest.raises(SpecError, match=r"the array of β: .*lie in \(0, 1\]"):
        free_betas.from_text(text)


# --- ONNX files ------------------------------------------------------------------------------------------------------


def make_onnx(folder, metadata):
    path = folder / "model.onnx"
    path.write_bytes(
        protobuf.model(
            {"x": (protobuf.FLOAT, ("batch", 3, 8, 8)), "t": (protobuf.INT32, ("batch",))},
            {"eps": (protobuf.FLOAT, ("batch", 3, 8, 8))},
            metadata=metadata,
        )
    )
    return path


def test_an_onnx_file_brings_its_betas(tmp_path):
    metadata = onnx_file.metadata(SPEC)
    assert set(metadata) == {"ddpmx", "ddpmx.betas"}
    path = make_onnx(tmp_path, metadata)
    spec = onnx_file.onnx_spec(path, onnx_file.read_onnx(path))
    assert spec == SPEC
    np.testing.assert_array_equal(spec.betas, BETAS)
    assert describe(path)["spec"]["betas"] == SPEC.to_json()["betas"]
    assert set(onnx_file.metadata(ModelSpec((3, 8, 8)))) == {"ddpmx"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("ddpmx.betas"), "the array is missing"),
        (lambda m: m.update({"ddpmx.betas": m["ddpmx.betas"][:-8]}), "is damaged"),
        (
            lambda m: m.update({"ddpmx.betas": free_betas.to_text(free_betas.as_betas(BETAS / 2))}),
            "does not match the spec",
        ),
    ],
)
def test_an_onnx_file_without_its_betas_is_refused(tmp_path, change, message):
    metadata = onnx_file.metadata(SPEC)
    change(metadata)
    path = make_onnx(tmp_path, metadata)
    with pytest.raises(SpecError, match=message) as caught:
        onnx_file.onnx_spec(path, onnx_file.read_onnx(path))
    assert "model.onnx" in str(caught.value)


def test_the_chain_runs_on_these_betas(tmp_path, figure):
    pytest.importorskip("onnxruntime", reason="not verified here: chains of files (no ONNX Runtime)")
    spec = conditioning.spec_of("all", schedule="betas", betas=BETAS)
    path = tmp_path / "model.onnx"
    path.write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
    mine = conditioning.conditioning_of(spec)
    wanted = conditioning.chain_by_hand(spec, mine, seed=2, n=3, beta=BETAS)
    with pipeline.load(path) as p:
        *_, last = p.stream(3, seed=2, **conditioning.as_arguments(mine))
    figure("a chain on an array of β against float64", np.abs(last.x0 - wanted[-1]).max(), at_most=2e-5)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    """A plan and its sidecar."""
    path = tmp_path / "model.plan"
    path.write_bytes(make_plan(spec=SPEC))
    sidecar = plan_file.sidecar_json(path.stat().st_size, SPEC, RECORD, {"seconds": 1.0})
    plan_file.sidecar_path(path).write_text(json.dumps(sidecar))
    return path


def test_a_plan_has_its_betas_in_the_sidecar(plan):
    info = plan_file.read_plan(plan)
    assert info.spec == SPEC
    np.testing.assert_array_equal(info.spec.betas, BETAS)
    assert describe(plan)["spec"]["betas"] == SPEC.to_json()["betas"]
    assert "betas" not in plan_file.sidecar_json(1, ModelSpec((3, 8, 8)), RECORD, {})


def test_a_plan_that_has_lost_its_sidecar_is_refused_with_the_place(plan):
    plan_file.sidecar_path(plan).unlink()
    with pytest.raises(SpecError, match="the array is missing") as caught:
        plan_file.read_plan(plan)
    assert "model.plan.json" in str(caught.value)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (None, "the array is missing"),
        ("betas1 20 00000000 AAAA", "is damaged"),
        (free_betas.to_text(free_betas.as_betas(BETAS)).replace(f" {T} ", " ٢٠ "), "is damaged"),
        ([0.1], "is damaged"),
        (free_betas.to_text(free_betas.as_betas(BETAS / 2)), "does not match the spec"),
    ],
)
def test_a_plan_whose_sidecar_has_other_betas_is_refused(plan, betas, message):
    file = plan_file.sidecar_path(plan)
    values = json.loads(file.read_text())
    values["betas"] = betas
    file.write_text(json.dumps(values))
    with pytest.raises(SpecError, match=message):
        plan_file.read_plan(plan)


def test_a_contradiction_is_still_found(plan):
    file = plan_file.sidecar_path(plan)
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"bytes": 5}))
    with pytest.raises(SpecError, match="contradicts its plan"):
        plan_file.read_plan(plan)
    file.write_text(json.dumps(values | {"engine": dataclasses.replace(RECORD, source="other.onnx").to_json()}))
    with pytest.raises(SpecError, match="contradicts its plan"):
        plan_file.read_plan(plan)


# --- spec.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        SPEC.to_json(whole=True),
        {"model": SPEC.to_json(whole=True), "network": {}},
        {"model": SPEC.to_json(), "betas": BETAS.tolist(), "network": {}},
        {"shape": [3, 8, 8], "timesteps": T, "schedule": "betas", "betas": BETAS.tolist(), "ddpmx": "0.1.0"},
    ],
    ids=["bare", "in the model", "beside the model", "by hand"],
)
def test_a_spec_json_has_the_numbers(tmp_path, values):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(values))
    spec = model_file.read_spec(path)
    assert spec == SPEC
    np.testing.assert_array_equal(spec.betas, BETAS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": SPEC.to_json()}, "the array is missing"),
        ({"model": SPEC.to_json(), "betas": (BETAS / 2).tolist()}, "does not match the spec"),
        ({"model": SPEC.to_json(), "betas": "many"}, "array of numbers"),
        ({**SPEC.to_json(whole=True), "betas": [0.1] * T}, "gives other coefficients"),
        ({"shape": [3, 8, 8], "timesteps": T, "schedule": "betas"}, "the array is missing"),
        ({"shape": [3, 8, 8], "timesteps": T, "schedule": "betas", "betas": {"a": 1}}, "array of numbers"),
        ({"shape": [3, 8, 8], "timesteps": T, "schedule": "betas", "betas": [None] * T}, "array of numbers"),
    ],
)
def test_a_spec_json_without_its_betas_is_refused(tmp_path, values, message):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(values))
    with pytest.raises(SpecError, match=message) as caught:
        model_file.read_spec(path)
    assert "spec.json" in str(caught.value)
