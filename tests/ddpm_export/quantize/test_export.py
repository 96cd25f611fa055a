"""A graph in half precision becomes one in 8 bits, and says what became of it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import numpy as np
import torch
from torch import nn

import ddpm_export
from ddpm_export.graph.onnx_export import export_network, write_graph
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.quantize import export as quantize
from ddpm_export.quantize.run import Runner, RunnerBackend
from ddpm_export.quantize.states import calibration_states
from ddpmx.backends.open import open_model
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from oracles.eight_bits import graph

pytestmark = pytest.mark.torch

SPEC = ModelSpec((1, 8, 8), timesteps=20, precision="int8", weights="a" * 64)


class Graph(nn.Module):
    """The graph as a module."""

    def __init__(self):
        super().__init__()
        self.runner = Runner(graph())

    def forward(self, x, t):
        return torch.from_numpy(self.runner({"x": x.numpy(), "t": t.numpy()}, ["eps"])[0])


@pytest.fixture(scope="module")
def states():
    return calibration_states(Graph(), SPEC)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_graph_becomes_one_in_8_bits(states, tmp_path, precision):
    spec = SPEC.replace(precision=precision)
    seen = []
    model, about = quantize.quantise(graph(), spec, states, progress=lambda *step: seen.append(step))
    assert about.spec == spec
    assert about.layers == (3, 5)  # not the first and the last
    usable = 2 * 64 * 36 * 9 + 64 * 36
    assert about.share == pytest.approx(usable / (usable + 2 * 64 * 6 * 9))
    assert about.states == (20 * 8, 0)
    assert set(about.drifts) == set(quantize.ROOMS)
    assert states.drift(RunnerBackend(model), spec) == pytest.approx(min(about.drifts.values()), rel=0.05)
    assert ("trying single layers", 3, 3) in seen
    assert ("trying scales on the chain", 5, 5) in seen
    write_graph(model, spec, tmp_path / "model.onnx")
    found, backend = open_model(tmp_path / "model.onnx")
    assert ("8-bit integers" in backend.description) == (precision == "int8")
    backend.close()
    assert found == spec
    text = "\n".join(about.lines)
    for part in ("3 of 5 convolutions", f"{about.share:.1%} of the multiplications", "160 states", "the best of 5"):
        assert part in text


def test_the_pass_ends_with_its_time_and_says_so(states):
    _, about = quantize.quantise(graph(), SPEC, states, seconds=-1)
    assert about.looked_at == (0, 3)
    assert list(about.drifts) == [1.1]
    assert "0 of 3 were tried in the time" in about.lines[1]


def test_a_layer_may_stay_in_half_where_enough_is_in_8_bits(states, monkeypatch):
    monkeypatch.setattr(quantize, "SHARE", 0.3)
    errors = {"a/Conv": 1.0, "b/Conv": 0.1, "skip/Conv": 0.1}
    monkeypatch.setattr(quantize.calibrate, "errors_by_layer", lambda *_, **__: errors)
    model, about = quantize.quantise(graph(), SPEC, states)
    assert about.kept == ("a/Conv",)
    assert about.layers == (2, 5)
    assert "the last: a" in about.lines[1]
    node = next(node for node in model.graph.node if node.name == "a/Conv")
    assert node.input[:2] == ["a/Mul", "a.weight"]


def test_a_network_without_other_convolutions_is_refused(states):
    model = graph()
    kept = [node for node in model.graph.node if node.name in ("first/Conv", "eps")]
    kept[1].input[0] = "first/Conv"
    del model.graph.node[:]
    model.graph.node.extend(kept)
    with pytest.raises(InputError, match="no convolution for 8 bits"):
        quantize.quantise(model, SPEC, states)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bits_without_calibration_are_refused(tmp_path, precision):
    network = UNet(UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.0, 4)).eval()
    with pytest.raises(InputError, match="8 bits need calibration"):
        export_network(network, SPEC, tmp_path / "model.onnx", precision=precision)
    with pytest.raises(InputError, match="8 bits are for checkpoints"):
        ddpm_export.export(Graph(), SPEC, tmp_path / "model.onnx", precision=precision)
    assert not list(tmp_path.iterdir())


def test_the_error_is_said_for_both_ends_of_the_chain(states):
    _, about = quantize.quantise(graph(), SPEC, states)
    assert about.error["t"][0] == 0
    assert about.error["t"][-1] == 19
    assert np.all(np.array(about.error["rms"]) < 0.05)
    assert f"{about.error['rms'][-1]:.2%} at t = 19" in about.lines[-1]
