"""What is inserted into a graph: the types and scales that TensorRT wants, and nothing else."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from ddpm_export.quantize.convolutions import constant, convolutions
from ddpm_export.quantize.graph import insert, rounded, set_bias, store_in_half, weight_and_scale
from ddpm_export.quantize.run import Runner
from ddpmx.errors import BackendError
from oracles.eight_bits import WIDTH, graph

pytestmark = pytest.mark.torch

CHOSEN = ("a/Conv", "b/Conv", "skip/Conv")
LARGEST = {"a/Mul": 3.0, "b/Mul": 2.0, "h": 5.0}
STEPS = {"int8": 127, "fp8": 448}


def inserted(precision, model=None, chosen=CHOSEN):
    model = model or graph()
    layers = convolutions(model)
    return insert(model, {name: layers[name] for name in chosen}, LARGEST, precision)


def inputs(n=4):
    x = np.random.default_rng(5).standard_normal((n, 1, 8, 8)).astype(np.float32)
    return {"x": x, "t": np.zeros(n, np.int32)}


def test_a_version_that_cuts_half_precision_off_is_refused(monkeypatch):
    monkeypatch.setattr("ddpm_export.quantize.run.rounds_halves", lambda onnxruntime: False)
    with pytest.raises(BackendError, match=r"8 bits need ONNX Runtime 1\.30 or later, and this is"):
        Runner(graph())


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_only_inputs_and_weights_of_the_chosen_are_in_8_bits(precision):
    before, after = graph(), inserted(precision)
    onnx.checker.check_model(after, full_check=True)
    kind = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[precision]
    constants = {tensor.name: tensor for tensor in after.graph.initializer}
    producers = {name: node for node in after.graph.node for name in node.output}
    for node in after.graph.node:
        if node.op_type == "Conv" and node.name in CHOSEN:
            activation, weight = (producers[name] for name in node.input[:2])
            assert activation.op_type == weight.op_type == "DequantizeLinear"
            assert producers[activation.input[0]].op_type == "QuantizeLinear"
            assert constants[weight.input[0]].data_type == kind
            assert list(constants[weight.input[1]].dims) == [WIDTH]  # a scale for every channel
            assert node.input[2] in {tensor.name for tensor in before.graph.initializer}  # its bias is as it was
        elif node.op_type not in ("QuantizeLinear", "DequantizeLinear"):  # all others read what they read before
            assert not {producers[name].op_type for name in node.input if name in producers} & {"DequantizeLinear"}
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not np.any(numpy_helper.to_array(constants[node.input[2]]).astype(np.float32))
    # TensorRT-RTX refuses int32 behind a DequantizeLinear
    assert TensorProto.INT32 not in {tensor.data_type for tensor in constants.values()}
    for source in LARGEST:
        step = next(n.input[1] for n in after.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == source)
        assert constants[step].data_type == TensorProto.FLOAT16  # half precision goes on beside 8 bits
        assert numpy_helper.to_array(constants[step]) == pytest.approx(LARGEST[source] / STEPS[precision], rel=1e-3)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_names_are_short_and_end_in_no_digit(precision):
    after = inserted(precision)
    names = [name for node in after.graph.node for name in (node.name, *node.output)]
    names += [tensor.name for tensor in after.graph.initializer]
    known = {name for node in graph().graph.node for name in (node.name, *node.output)}
    assert len({tensor.name for tensor in after.graph.initializer}) == len(after.graph.initializer)
    for name in set(names) - known:
        assert not name[-1].isdigit()
        assert "Linear" not in name
    assert not after.graph.value_info
    assert after.producer_name == "ddpmx"


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_weights_are_rounded_to_the_nearest_of_their_channel(precision):
    model, after = graph(), inserted(precision)
    for name in CHOSEN:
        weight = constant(model, convolutions(model)[name].weight).astype(np.float64)
        found, step = weight_and_scale(after, name)
        assert step == pytest.approx(LARGEST[convolutions(model)[name].input] / STEPS[precision], rel=1e-3)
        most = np.abs(weight).reshape(WIDTH, -1).max(axis=1).reshape(-1, 1, 1, 1)
        # half a step of int8; of E4M3, three bits of mantissa: 2⁻⁴ of the number, or half the least step
        allowed = most / 127 / 2 if precision == "int8" else np.maximum(np.abs(weight) * 2**-4, most / 448 * 2**-10)
        assert np.all(np.abs(found - weight) <= allowed * 1.02)


def test_e4m3_is_rounded_as_ml_dtypes_does_and_saturates():
    x = np.linspace(-12, 12, 1001).astype(np.float32)
    step = 10 / 448
    wanted = np.clip(x / np.float32(step), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(rounded(x, step, "fp8"), wanted * np.float32(step))
    assert rounded(np.array([1e9]), step, "fp8")[0] == pytest.approx(10)
    assert rounded(np.array([1e9]), 0.5, "int8")[0] == 63.5


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_onnx_runtime_computes_what_the_graph_says(precision):
    """By hand: rounded inputs, rounded weights, no other rounding but half's."""
    import torch

    after, given = inserted(precision), inputs()
    seen, out = Runner(after, ["a/Mul", "a/Conv"])(given, ["a/Mul", "a/Conv"])
    weight, step = weight_and_scale(after, "a/Conv")
    x = torch.from_numpy(rounded(seen, step, precision))
    bias = torch.from_numpy(constant(graph(), "shared.bias").astype(np.float32))
    expected = torch.nn.functional.conv2d(x, torch.from_numpy(weight), bias, padding=1).numpy()
    np.testing.assert_allclose(out, expected, atol=4e-3)
    (plain,) = Runner(graph(), ["a/Conv"])(given, ["a/Conv"])
    assert np.abs(out.astype(np.float32) - plain).max() > 8e-3  # control: it is not the graph from before


def test_nothing_chosen_is_the_graph_itself():
    assert insert(graph(), {}, {}, "int8") == graph()


def test_a_layer_that_the_quantizer_leaves_out_is_an_error(monkeypatch):
    from onnxruntime import quantization

    monkeypatch.setattr(quantization.QDQQuantizer, "quantize_model", lambda self: None)
    with pytest.raises(BackendError, match="left out a convolution"):
        inserted("int8")


def test_a_quantizer_that_fails_is_one_error(monkeypatch):
    from onnxruntime import quantization

    def fails(self):
        raise ValueError("no such thing")

    monkeypatch.setattr(quantization.QDQQuantizer, "quantize_model", fails)
    with pytest.raises(BackendError, match="quantizer failed") as caught:
        inserted("int8")
    assert caught.value.note == "no such thing"


def test_a_layer_gets_a_bias_of_its_own_where_it_shared_one():
    after = inserted("int8")
    set_bias(after, "a/Conv", np.arange(WIDTH))
    onnx.checker.check_model(after, full_check=True)
    nodes = {node.name: node for node in after.graph.node}
    assert nodes["b/Conv"].input[2] == nodes["skip/Conv"].input[2] == "shared.bias" != nodes["a/Conv"].input[2]
    np.testing.assert_array_equal(constant(after, nodes["a/Conv"].input[2]), np.arange(WIDTH))
    assert constant(after, nodes["a/Conv"].input[2]).dtype == np.float16
    for name in ("b/Conv", "skip/Conv"):
        set_bias(after, name, np.zeros(WIDTH))
    assert "shared.bias" not in {tensor.name for tensor in after.graph.initializer}  # nobody uses it any more


def test_large_matrices_are_stored_in_half_and_compute_in_float32():
    model = graph()
    time = constant(model, "time.weight")
    multiplied = onnx.helper.make_node("MatMul", ["time.weight", "time.weight"], ["square"], "square")
    model.graph.node.append(multiplied)
    before, size = Runner(model, ["square"])(inputs(), ["square"])[0], model.ByteSize()
    store_in_half(model)
    assert model.ByteSize() < size - time.nbytes / 2 + 200
    assert constant(model, "time.weight/half").dtype == np.float16
    (after,) = Runner(model, ["square"])(inputs(), ["square"])
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, atol=0.03)
    half = time.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(after, half @ half, atol=1e-5)
