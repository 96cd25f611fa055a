"""A small graph with what a U-Net has: a first and a last convolution, two between them in half, and one around those."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 6


def graph(seed: int = 0) -> onnx.ModelProto:
    """x [batch, 1, 8, 8], t [batch] → eps. ``a`` and ``b`` share the bias of ``skip``, as in torch's graphs."""
    random = np.random.default_rng(seed)

    def weight(name, *dims, dtype=np.float16):
        values = random.standard_normal(dims) / np.sqrt(np.prod(dims[1:]))
        return numpy_helper.from_array(values.astype(dtype), name)

    constants = [
        weight("first.weight", WIDTH, 1, 3, 3, dtype=np.float32),
        weight("a.weight", WIDTH, WIDTH, 3, 3),
        weight("b.weight", WIDTH, WIDTH, 3, 3),
        weight("skip.weight", WIDTH, WIDTH, 1, 1),
        weight("last.weight", 1, WIDTH, 3, 3, dtype=np.float32),
        weight("time.weight", 32, 32, dtype=np.float32),
        numpy_helper.from_array((random.standard_normal(WIDTH) / 4).astype(np.float16), "shared.bias"),
    ]
    node, pads = helper.make_node, [1, 1, 1, 1]
    nodes = [
        node("Conv", ["x", "first.weight"], ["first/Conv"], "first/Conv", pads=pads),
        node("Cast", ["first/Conv"], ["h"], "Cast", to=TensorProto.FLOAT16),
        node("Sigmoid", ["h"], ["a/Sigmoid"], "a/Sigmoid"),
        node("Mul", ["h", "a/Sigmoid"], ["a/Mul"], "a/Mul"),
        node("Conv", ["a/Mul", "a.weight", "shared.bias"], ["a/Conv"], "a/Conv", pads=pads),
        node("Sigmoid", ["a/Conv"], ["b/Sigmoid"], "b/Sigmoid"),
        node("Mul", ["a/Conv", "b/Sigmoid"], ["b/Mul"], "b/Mul"),
        node("Conv", ["b/Mul", "b.weight", "shared.bias"], ["b/Conv"], "b/Conv", pads=pads),
        node("Conv", ["h", "skip.weight", "shared.bias"], ["skip/Conv"], "skip/Conv"),
        node("Add", ["b/Conv", "skip/Conv"], ["Add"], "Add"),
        node("Cast", ["Add"], ["out"], "Cast/2/Cast", to=TensorProto.FLOAT),
        node("Conv", ["out", "last.weight"], ["eps"], "eps", pads=pads),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8]),
        helper.make_tensor_value_info("t", TensorProto.INT32, ["batch"]),
    ]
    outputs = [helper.make_tensor_value_info("eps", TensorProto.FLOAT, ["batch", 1, 8, 8])]
    body = helper.make_graph(nodes, "ddpmx", inputs, outputs, constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="ddpmx")
