"""What calibration measures, against what it should be by hand."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import numpy as np

from ddpm_export.quantize import calibrate
from ddpm_export.quantize.convolutions import convolutions
from ddpm_export.quantize.graph import insert
from ddpm_export.quantize.run import Runner
from ddpm_export.quantize.states import States
from ddpmx.errors import NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.reference import chain_table
from oracles.eight_bits import WIDTH, graph

pytestmark = pytest.mark.torch

SPEC = ModelSpec((1, 8, 8), timesteps=100, precision="int8")
CHOSEN = ("a/Conv", "b/Conv", "skip/Conv")


def states(scales=(1.0, 0.5, 2.0), timesteps=(90, 40, 5)):
    random = np.random.default_rng(3)
    batches = tuple(
        {"x": (scale * random.standard_normal((8, 1, 8, 8))).astype(np.float32), "t": np.full(8, t, np.int32)}
        for scale, t in zip(scales, timesteps, strict=True)
    )
    return States(batches, np.zeros((8, 1, 8, 8), np.float32), {}, 0, 10)


def layers(model):
    return {name: one for name, one in convolutions(model).items() if name in CHOSEN}


def test_ranges_are_the_largest_values_of_all_states():
    model, given = graph(), states()
    largest, sizes = calibrate.largest_values(model, convolutions(model), given)
    assert largest["x"] == max(float(np.abs(batch["x"]).max()) for batch in given)
    assert set(largest) == {"x", "a/Mul", "b/Mul", "h", "out"}
    assert set(sizes.values()) == {(8, 8)}
    assert calibrate.multiplications(model, convolutions(model), sizes)["a/Conv"] == 64 * WIDTH * WIDTH * 9


def test_calibration_at_one_t_only_does_not_see_the_largest():  # control
    model = graph()
    whole, _ = calibrate.largest_values(model, layers(model), states())
    one, _ = calibrate.largest_values(model, layers(model), states((0.5,), (40,)))
    assert all(one[name] < 0.8 * whole[name] for name in whole)


def test_an_activation_that_is_not_finite_is_an_error():
    given = states()
    given.batches[1]["x"][0, 0, 0, 0] = 3e38
    with pytest.raises(NumericError, match="at t = 40 is not finite"):
        calibrate.largest_values(graph(), layers(graph()), given)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_corrected_layer_has_the_mean_that_it_had(precision):
    """On the inputs of the layer itself, each state weighed by what the chain feels there; and without it, it has not."""
    model, given, spec = graph(), states(), SPEC.replace(precision=precision)
    chosen = {"a/Conv": layers(model)["a/Conv"]}  # its input is the same with and without
    largest, _ = calibrate.largest_values(model, chosen, given)
    # few steps, so that there is something to correct
    largest = {name: 30 * value for name, value in largest.items()} if precision == "int8" else largest
    rows = chain_table(spec, spec.timesteps)
    felt = dict(zip(rows.timesteps.tolist(), np.abs(rows.rows[:, 2] * rows.rows[:, 1]), strict=True))

    def shift(of):
        means = []
        for batch in given:
            pair = [Runner(one, ["a/Conv"])(batch, ["a/Conv"])[0].astype(np.float64) for one in (of, model)]
            means.append((pair[0] - pair[1]).mean((0, 2, 3)))
        return np.average(means, axis=0, weights=[felt[int(batch["t"][0])] for batch in given])

    plain, corrected = insert(model, chosen, largest, precision), insert(model, chosen, largest, precision)
    said = calibrate.correct_biases(model, corrected, chosen, given, spec)["a/Conv"]
    before, after = shift(plain), shift(corrected)
    assert said == pytest.approx(np.sqrt(np.mean(before**2)), rel=0.1)
    assert np.abs(after).max() < 3e-4 < np.abs(before).max() / 4  # half's own rounding of the bias is left


def test_a_layers_part_of_the_error_is_in_units_of_the_next_state():
    model, given = graph(), states()
    largest, _ = calibrate.largest_values(model, layers(model), given)
    wide = {name: 8 * value if name == "h" else value for name, value in largest.items()}
    errors = calibrate.errors_by_layer(model, layers(model), wide, given, SPEC, seconds=100)
    assert set(errors) == set(CHOSEN)
    felt, expected = calibrate.felt_by_t(SPEC), []
    alone = insert(model, {"skip/Conv": layers(model)["skip/Conv"]}, wide, "int8")
    for batch in given:
        some = {name: array[:4] for name, array in batch.items()}
        right, wrong = (Runner(one)(some, ["eps"])[0].astype(np.float64) for one in (model, alone))
        expected.append(np.mean((right - wrong) ** 2) * felt[int(batch["t"][0])] ** 2)
    assert errors["skip/Conv"] == pytest.approx(np.mean(expected))
    assert max(errors, key=lambda name: errors[name]) == "skip/Conv"  # whose scale is eight times too wide


def test_the_pass_over_layers_ends_with_its_time():
    model, given = graph(), states()
    largest, _ = calibrate.largest_values(model, layers(model), given)
    assert calibrate.errors_by_layer(model, layers(model), largest, given, SPEC, seconds=-1) == {}


def test_layers_stay_in_half_by_error_and_cost():
    costs = {"cheap": 1, "dear": 50, "usual": 5, "other": 5}
    errors = {"cheap": 5.0, "dear": 9.0, "usual": 0.1, "other": 0.2}
    assert calibrate.left_in_half(errors, costs, 10) == ["cheap"]
    assert calibrate.left_in_half(errors, costs, 60) == ["cheap", "dear"]
    assert calibrate.left_in_half(errors, costs, 0) == []
    assert calibrate.left_in_half({}, costs, 60) == []


def test_the_error_is_split_into_a_multiple_of_the_output_and_the_rest(monkeypatch):
    random = np.random.default_rng(0)
    out = random.standard_normal((8, 1, 64, 64))
    rest = random.standard_normal(out.shape)
    rest -= out * (rest * out).sum() / (out * out).sum()
    answers = {"before": out, "after": out * 1.02 + 0.1 * rest}
    monkeypatch.setattr(calibrate, "Runner", lambda which: lambda batch, names: [answers[which]])
    found = calibrate.correlation("before", "after", states((1.0,), (40,)), SPEC, ["eps"])
    assert found["factor"] == pytest.approx([0.02])
    sizes = np.mean((0.02 * out) ** 2), np.mean((0.1 * rest) ** 2)
    assert found["share"] == pytest.approx([sizes[0] / sum(sizes)])
    assert found["rms"] == pytest.approx([np.sqrt(sum(sizes) / np.mean(out**2))])
    table = chain_table(SPEC, 100)
    row = table.rows[list(table.timesteps).index(40)]
    assert found["sigma"] == pytest.approx([abs(row[1] * row[2]) * np.sqrt(sizes[1]) / row[4]])


def test_real_images_are_no_states_of_the_chain():
    given = dataclasses.replace(states(), real=1)
    assert len(given.own) == 2
    assert given.rows == 24
