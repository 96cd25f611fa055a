"""Planted faults in 8 bits are found by the ladder, on the shipped model; and the right file is not one."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from ddpm_export.proof.record import record
from ddpm_export.quantize import states as calibration
from ddpm_export.quantize.calibrate import correct_biases, largest_values
from ddpm_export.quantize.convolutions import convolutions, first_and_last
from ddpm_export.quantize.graph import insert
from ddpm_export.quantize.run import Runner, RunnerBackend
from ddpmx.formats.onnx_file import onnx_spec, read_onnx
from ddpmx.models import shipped
from ddpmx.parity.ladder import run_ladder

pytestmark = [pytest.mark.torch, pytest.mark.slow]

LAYER = "up.1.resample.conv/Conv"


class Graph(nn.Module):
    """A graph as a module, by ONNX Runtime."""

    def __init__(self, model):
        super().__init__()
        self.runner = Runner(model)

    def forward(self, x, t):
        return torch.from_numpy(self.runner({"x": x.numpy(), "t": t.numpy()}, ["eps"])[0])


@dataclasses.dataclass
class Place:
    base: onnx.ModelProto
    spec: object
    states: calibration.States
    reference: object
    layers: dict
    largest: dict

    def quantised(self, largest=None):
        model = insert(self.base, self.layers, largest or self.largest, "int8")
        correct_biases(self.base, model, self.layers, self.states, self.spec)
        return model

    def judged(self, model):
        return run_ladder(RunnerBackend(model), self.spec, self.reference)


@pytest.fixture(scope="module")
def place():
    path = shipped.find("garments")
    base = onnx.load(path)
    spec = onnx_spec(path, read_onnx(path)).replace(precision="int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "short_chain", lambda shape: 8)
        patch.setattr(calibration, "IMAGES", 4)
        states = calibration.calibration_states(Graph(base), spec)
    reference = record(Graph(base), spec, steps=12)
    layers = convolutions(base)
    for name in first_and_last(base):
        del layers[name]
    return Place(base, spec, states, reference, layers, largest_values(base, layers, states)[0])


def failed(report):
    return {check.name for check in report.checks if not check.passed}


def weight_constant(model, place):
    """The constants of a weight: its scale, and its 8-bit numbers."""
    node = next(one for one in model.graph.node if one.name == place)
    producer = next(one for one in model.graph.node if node.input[1] in one.output)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return constants[producer.input[1]], constants[producer.input[0]]


def replace(tensor, values):
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def test_a_right_file_passes_and_single_calls_are_shown(place):
    report = place.judged(place.quantised())
    assert report.passed, report.verdict
    shown = [check for check in report.checks if check.skipped and check.skipped.startswith("8 bits are judged")]
    assert [check.name for check in shown][:3] == ["ε, RMS", "ε, largest error", "one step, RMS of x_{t−1}"]
    assert len(shown) == 5
    assert all(np.isfinite(check.value) for check in shown)
    names = " ".join(check.name for check in report.checks if check.skipped is None)
    for judged in ("variational bound", "distortion", "pixels within one level", "errors in levels", "light judge"):
        assert judged in names


def test_a_scale_off_by_two_is_found(place):
    model = place.quantised()
    scale, _ = weight_constant(model, LAYER)
    replace(scale, (2 * numpy_helper.to_array(scale)).astype(np.float16))
    assert any("errors in levels" in name for name in failed(place.judged(model)))


def test_two_channels_that_changed_places_are_found(place):
    model = place.quantised()
    _, weight = weight_constant(model, LAYER)
    values = numpy_helper.to_array(weight).copy()
    values[[3, 40]] = values[[40, 3]]
    replace(weight, values)
    assert any("errors in levels" in name for name in failed(place.judged(model)))


def test_calibration_at_one_t_only_is_found(place):
    one = dataclasses.replace(place.states, batches=place.states.batches[:1])
    largest, _ = largest_values(place.base, place.layers, one)
    assert any("errors in levels" in name for name in failed(place.judged(place.quantised(largest))))
