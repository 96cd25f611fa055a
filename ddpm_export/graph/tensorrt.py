"""Whether TensorRT takes a graph: said at the export, where the line of the module's source is still known.

The table is that of the oldest TensorRT that ddpmx serves: onnx-tensorrt's ``docs/operators.md`` of release 10.1 (opset 9
to 20), which is the newest one below 10.3 (JetPack 6). Later releases take more types and more opsets, and refuse the same
operators. Where a TensorRT is installed that can parse here, it is asked as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from ddpm_export.graph.names import module_path
from ddpm_export.graph.where import operator, place_in_trace
from ddpmx.errors import DdpmxError
from ddpmx.trt import library as trt_library

_MARKED_YES = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu Clip
    Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization GRU HardSigmoid HardSwish Hardmax
    Identity If ImageScaler InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg
    NonMaxSuppression NonZero Not OneHot Or Pad ParametricSoftplus Pow PRelu QuantizeLinear RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RNN RoiAlign Round ScaledTanh Scan
    Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
TAKEN = frozenset(_MARKED_YES.split())
"""The operators marked "Y"."""

_NO_TYPES = {TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64, TensorProto.INT16,
             TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128}  # fmt: skip

_MODES = {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}
_NEAREST = {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"}
_MOST_K = 3839

Attributes = dict[str, Any]


def _ones(values: Any) -> bool:
    return all(value == 1 for value in values or ())


LIMITS: dict[str, list[tuple[str, Callable[[onnx.NodeProto, Attributes], bool]]]] = {
    "Resize": [
        ("with antialias", lambda _, a: bool(a.get("antialias"))),
        (
            "in coordinates of another kind",
            lambda _, a: a.get("coordinate_transformation_mode", "half_pixel") not in _MODES,
        ),
        ("with another rounding", lambda _, a: a.get("nearest_mode", "round_prefer_floor") not in _NEAREST),
        ("that keeps the aspect ratio", lambda _, a: a.get("keep_aspect_ratio_policy", "stretch") != "stretch"),
    ],
    "MaxPool": [
        ("with indices", lambda n, _: len(n.output) > 1 and bool(n.output[1])),
        ("with dilation", lambda _, a: not _ones(a.get("dilations"))),
    ],
    "AveragePool": [("with dilation", lambda _, a: not _ones(a.get("dilations")))],
    "LpPool": [("with dilation", lambda _, a: not _ones(a.get("dilations")))],
    "ScatterElements": [("with a reduction", lambda _, a: a.get("reduction", "none") != "none")],
    "ScatterND": [("with a reduction", lambda _, a: a.get("reduction", "none") != "none")],
    "LayerNormalization": [("with more than one output", lambda n, _: any(n.output[1:]))],
    "LSTM": [("with input_forget or another layout", lambda _, a: bool(a.get("input_forget") or a.get("layout")))],
    "TopK": [("without sorting", lambda _, a: not a.get("sorted", 1))],
}
"""What an operator that is taken must not have, from the column "Restrictions"."""

MUST_BE_CONSTANT = {
    "CumSum": (1,), "Slice": (3,), "Pad": (3,), "Squeeze": (1,), "Unsqueeze": (1,), "OneHot": (1,),
    **{name: (1,) for name in TAKEN if name.startswith("Reduce")},
}  # fmt: skip
"""Inputs that must be initialisers."""

CURES = {
    "Resize with antialias": "interpolate without antialias, or average first: F.avg_pool2d",
    "DFT": "write the transform as matrix products with constant sines and cosines",
    "Col2Im": "F.fold as a transposed convolution, or by reshape and permute",
    "MaxPool with indices": "pool without return_indices, and upsample in place of unpooling",
    "MaxUnpool": "upsample in place of unpooling",
    "AffineGrid": "compute the grid with plain operators, or once, as a buffer",
}


@dataclass(frozen=True)
class Refusal:
    """Something in a graph that TensorRT does not take.

    Attributes:
        what: the operator, and what is wrong with it: "Resize with antialias".
        place: where in the module's source, None if torch kept no trace of it.
        cure: what to write instead, None if that is not known.
        operator: the operation in torch that became it: "aten.fold".
    """

    what: str
    place: str | None
    cure: str | None = None
    operator: str = ""

    def __str__(self) -> str:
        """In a sentence."""
        at = f", at {self.place}" if self.place else ""
        return f"TensorRT does not take {self.what}{at}" + (f" ({self.cure})" if self.cure else "")


def refusals(model: onnx.ModelProto) -> list[Refusal]:
    """What TensorRT 10.3 and later do not take of a graph, by the table; each kind once, at its first place.

    Args:
        model: with torch's metadata in its nodes, which has the places.
    """
    found: dict[str, Refusal] = {}
    types = _types(model)
    for node, constants in _nodes(model.graph, frozenset()):
        if (what := _refused(node, constants, types)) is not None and what not in found:
            found[what] = Refusal(what, place_of(node), CURES.get(what, CURES.get(node.op_type)), _operator_of(node))
    return list(found.values())


def parser_refusals(model: onnx.ModelProto) -> list[Refusal]:
    """What the parser of a TensorRT that is installed here refuses; nothing where there is none that can parse."""
    try:
        library = trt_library.load()
        builder = library.made("builder", lambda: library.trt.Builder(library.logger))
        flag = 1 << int(library.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = library.made("network", lambda: builder.create_network(flag))
        parser = library.made("parser", lambda: library.trt.OnnxParser(network, library.logger))
    except DdpmxError:  # not installed, or it needs a GPU even for that
        return []
    if parser.parse(model.SerializeToString()):
        return []
    nodes = {node.name: node for node, _ in _nodes(model.graph, frozenset())}
    found: dict[str, Refusal] = {}
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = nodes.get(error.node_name())
        what = f"{error.node_operator() or 'this graph'} ({library}: {_short(error.desc())})"
        found.setdefault(
            what, Refusal(what, None) if node is None else Refusal(what, place_of(node), operator=_operator_of(node))
        )
    return list(found.values())


def place_of(node: onnx.NodeProto) -> str | None:
    """The module and the line of its source that made a node, from torch's metadata."""
    trace = next((entry.value for entry in node.metadata_props if entry.key.endswith("stack_trace")), "")
    line = place_in_trace(trace)
    path = module_path(node)
    return line if not path or line is None else f"{path.removeprefix('module.')}, {line}"


def _operator_of(node: onnx.NodeProto) -> str:
    scope = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
    return operator(scope.rpartition(": ")[2])


def _refused(node: onnx.NodeProto, constants: frozenset[str], types: dict[str, int]) -> str | None:
    if node.domain not in ("", "ai.onnx"):
        return f"{node.domain}.{node.op_type}"
    if node.op_type not in TAKEN:
        return node.op_type
    attributes = {one.name: _value(one) for one in node.attribute}
    for what, holds in LIMITS.get(node.op_type, ()):
        if holds(node, attributes):
            return f"{node.op_type} {what}"
    for place in MUST_BE_CONSTANT.get(node.op_type, ()):
        if place < len(node.input) and node.input[place] and node.input[place] not in constants:
            return f"{node.op_type} whose {('axes', 'depth')[node.op_type == 'OneHot']} are computed"
    for name in (*node.input, *node.output):
        if (kind := types.get(name)) in _NO_TYPES:
            return f"{node.op_type} of {helper.tensor_dtype_to_np_dtype(int(kind or 0))}"
    return None


def _value(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _nodes(graph: onnx.GraphProto, outer: frozenset[str]) -> Iterator[tuple[onnx.NodeProto, frozenset[str]]]:
    """Every node, those of inner graphs too, with the names of the constants that it sees."""
    constants = outer | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants |= set(node.output)
        yield node, constants
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner, constants)


def _short(text: str) -> str:
    """The last clause of a parser's message, without its source files."""
    return re.sub(r"\s+", " ", text.strip().rsplit("\n", 1)[-1])[:160]
