"""What every operator of an ONNX graph computes in. Needs onnx."""

from __future__ import annotations

import onnx
from onnx import TensorProto

FULL_PRECISION = {
    "InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization",
    "Softmax", "LogSoftmax", "Exp", "Sin", "Cos", "Gemm",
}  # fmt: skip


def half_precision_faults(model: onnx.ModelProto) -> list[str]:
    """Operators that compute in half what should be float32: norms, sums, softmax and the time path."""
    types = element_types(model)
    return [
        node.op_type
        for node in model.graph.node
        if (node.op_type in FULL_PRECISION or node.op_type.startswith("Reduce"))
        and any(types[name] == TensorProto.FLOAT16 for name in node.input if name)
    ]


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every value, by its name."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert all(types[name] for node in graph.node for name in node.output), "the type of every value is known"
    return types
