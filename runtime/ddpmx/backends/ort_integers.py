"""Convolutions in 8 bits as ONNX Runtime's CPU can compute them: integers go in, float32 comes out.

A file by ``ddpmx export --int8`` rounds the input and the weights of a convolution, and not its output:

    y = s_x · s_w · Σ q_x q_w + b

ONNX Runtime's integer convolutions round the output as well, so it would widen both operands of this one and convolve in
float32, in twice the time that the float32 file takes. Its product of integer matrices gives float32
(MatMulIntegerToFloat). So each such convolution becomes one, here, before the session opens: of the matrix that has in each
row the k² · C inputs of one output pixel, gathered from q_x, and of q_w. Σ q_x q_w is exact, in whatever order and batch.

What is left then is limited by memory. So a GroupNorm's scale and shift, a Mul and an Add behind its InstanceNormalization,
become one BatchNormalization with mean 0 and variance 1, which reads and writes once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.backends.ort_common import NAMES, session_options
from ddpmx.errors import FileFormatError
from ddpmx.formats.onnx_graph import (
    GRAPH_CONSTANT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    Node,
    edited,
    read_constant,
    read_node,
    write_constant,
    write_node,
)
from ddpmx.formats.protobuf import MalformedError, as_message, as_text, fields, write_field

_MICROSOFT = "com.microsoft"
_WITH_GRAPHS = ("If", "Loop", "Scan")
_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "Resize")  # that may be there for convolutions alone
_MOST = 64  # of a kernel, a stride, a dilation, a padding, or a factor of a Resize: networks have less
_MOST_GATHERED = 1 << 27  # bytes, for one image: larger ones are convolved in float32
_ZERO = 128  # of q_x, and of q_w where it is unsigned
_ROWS, _INNER, _COLUMNS = 16, 64, 32  # of the product that shows whether sums are exact


@dataclass(frozen=True)
class _Convolution:
    """A convolution with an 8-bit input and 8-bit weights, and a float32 output.

    Attributes:
        node: it.
        source: the tensor whose rounded values it reads, before it is enlarged.
        enlarged: how many times height and width of the source are repeated: (1, 1) where they are not.
        step: s_x.
        steps: s_w, float32 [O].
        weights: q_w, int8 [O, C, k, k'].
    """

    node: Node
    source: str
    enlarged: tuple[int, int]
    step: float
    steps: NDArray[np.float32]
    weights: NDArray[np.int8]

    @property
    def plain(self) -> bool:
        """Whether each output pixel sees the input pixel at its own place and no other."""
        return (
            self.weights.shape[2:] == (1, 1)
            and self.enlarged == (1, 1)
            and self.node.says("strides", 1, 1)
            and self.node.says("pads", 0, 0, 0, 0)
        )

    def gathered(self, height: int, width: int) -> int:
        """How many bytes, or a few more, are gathered for one image of this size."""
        pads = self._pads
        rows = height * self.enlarged[0] + pads[0] + pads[2]
        columns = width * self.enlarged[1] + pads[1] + pads[3]
        return -(-rows // self._two("strides")[0]) * -(-columns // self._two("strides")[1]) * int(self.weights[0].size)

    def places(self, height: int, width: int) -> tuple[NDArray[np.int32], tuple[int, int]]:
        """Which pixels of the source are behind each output pixel.

        Args:
            height, width: of the source. Its pixel (h, w) has the number h · width + w, and outside is height · width.

        Returns:
            int32 [H', W', k, k'], and (H', W').
        """
        top, left, bottom, right = self._pads
        along = []
        for axis, (size, before, after) in enumerate(((height, top, bottom), (width, left, right))):
            stride, dilation = self._two("strides")[axis], self._two("dilations")[axis]
            kernel, times = self.weights.shape[2 + axis], self.enlarged[axis]
            count = (size * times + before + after - dilation * (kernel - 1) - 1) // stride + 1
            at = np.arange(count)[:, None] * stride - before + np.arange(kernel)[None] * dilation
            along.append(np.where((at >= 0) & (at < size * times), at // times, -1))
        rows, columns = along[0][:, None, :, None], along[1][None, :, None, :]
        inside = (rows >= 0) & (columns >= 0)
        numbers = np.where(inside, rows * width + columns, height * width)
        return numbers.astype(np.int32), (len(along[0]), len(along[1]))

    def _two(self, name: str) -> tuple[int, int]:
        first, second = (value for value in self.node.attributes.get(name, (1, 1)) if isinstance(value, int))
        return first, second

    @property
    def _pads(self) -> tuple[int, ...]:
        values = self.node.attributes.get("pads", (0,) * 4)
        return tuple(value for value in values if isinstance(value, int))


def as_integers(ort: Any, model: bytes, inputs: Mapping[str, NDArray[np.generic]]) -> bytes | None:
    """The model with products of integers in place of its 8-bit convolutions; None if it has none that can become one.

    Args:
        ort: the library.
        model: the bytes of an ONNX model in float32 (:mod:`ddpmx.formats.widen`), nothing of it in other files.
        inputs: its inputs for one image. The network runs with them once, which shows the sizes inside.

    Raises:
        FileFormatError: damaged.
    """
    signed = _signed_sums_are_exact(ort)
    if signed is None:
        return None
    try:
        graph = _Graph.of(model)
        if any(node.operator in _WITH_GRAPHS for node in graph.nodes):
            return None  # a graph inside may read any tensor
        found = {index: one for index, node in enumerate(graph.nodes) if (one := graph.convolution(node)) is not None}
        if not found:
            return None
        scaled = {node.inputs[0]: two for node in graph.nodes if (two := graph.scale_and_shift(node)) is not None}
        asked = {one.source for one in found.values() if not one.plain} | {source for source, _, _ in scaled.values()}
        shapes = _shapes(ort, model, graph, asked, inputs)
        if shapes is None:
            return None
        work = _Rewriting(shapes, signed=signed)
        for index, one in list(found.items()):
            if not one.plain and one.gathered(*shapes[one.source][1:]) > _MOST_GATHERED:
                del found[index]
        if not found:
            return None
        for name, (source, scale, _) in list(scaled.items()):
            if len(shapes[source]) != 3 or shapes[source][0] != scale.size:
                del scaled[name]  # one channel that is scaled to several
        for index, node in enumerate(graph.nodes):
            if index in found:
                work.replace(found[index])
            elif scaled.keys() & set(node.outputs):
                continue
            elif node.inputs and node.inputs[0] in scaled:
                work.scale(node, *scaled[node.inputs[0]])
            else:
                work.keep(node, graph.raw[index])
        return edited(model, work.needed(graph.outputs), work.constants, domains={_MICROSOFT: 1})
    except MalformedError as error:
        raise FileFormatError("not a valid ONNX file", note=str(error)) from error


class _Graph:
    """A model's graph, with what is looked up in it."""

    def __init__(
        self, nodes: list[Node], raw: list[memoryview], constants: Mapping[str, memoryview], outputs: set[str]
    ):
        self.nodes, self.raw, self.outputs = nodes, raw, outputs
        self._constants = constants
        self._producers = {name: node for node in nodes for name in node.outputs if name}
        self._readers: dict[str, list[Node]] = {}
        for node in nodes:
            for name in node.inputs:
                self._readers.setdefault(name, []).append(node)

    @classmethod
    def of(cls, model: bytes) -> _Graph:
        """The graph in a ModelProto."""
        nodes, raw, constants, outputs = list[Node](), list[memoryview](), dict[str, memoryview](), set[str]()
        for number, value in fields(memoryview(model)):
            if number != MODEL_GRAPH:
                continue
            for part, item in fields(as_message(value)):
                if part == GRAPH_NODE:
                    raw.append(as_message(item))
                    nodes.append(read_node(raw[-1]))
                elif part == GRAPH_CONSTANT:
                    name = next((as_text(text) for field, text in fields(as_message(item)) if field == 8), "")
                    constants[name] = as_message(item)
                elif part == GRAPH_OUTPUT:
                    outputs.add(next((as_text(text) for field, text in fields(as_message(item)) if field == 1), ""))
        return cls(nodes, raw, constants, outputs)

    def convolution(self, node: Node) -> _Convolution | None:
        """A node as a convolution that becomes a product of integers, or None."""
        if node.operator != "Conv" or node.domain or len(node.inputs) < 2 or len(node.outputs) != 1:
            return None
        if (
            not node.says("group", 1)
            or not node.says("auto_pad", "NOTSET")
            or None in (v for values in node.attributes.values() for v in values)
        ):
            return None
        for name, count, least in (("strides", 2, 1), ("dilations", 2, 1), ("pads", 4, 0)):
            values = node.attributes.get(name, (least,) * count)
            if len(values) != count or any(not isinstance(one, int) or not least <= one <= _MOST for one in values):
                return None
        readers = self._readers.get(node.outputs[0], [])
        if readers and node.outputs[0] not in self.outputs and all(one.operator == "QuantizeLinear" for one in readers):
            return None  # an output in 8 bits as well: ONNX Runtime has an integer convolution for that
        weights, activation = (self._producers.get(name) for name in (node.inputs[1], node.inputs[0]))
        if weights is None or activation is None:
            return None
        behind, steps = self._dequantised(weights)
        stored = self._constant(behind)
        rounded, step = self._dequantised(activation)
        quantise = self._producers.get(rounded)
        if stored is None or stored.dtype != np.int8 or stored.ndim != 4 or max(stored.shape[2:]) > _MOST:
            return None
        if steps is None or step is None:
            return None
        if node.attributes.get("kernel_shape", stored.shape[2:]) != stored.shape[2:]:
            return None
        bias = self._constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None and bias.shape != stored.shape[:1]:
            return None
        if quantise is None or quantise.operator != "QuantizeLinear" or step.size != 1:
            return None
        if steps.size not in (1, len(stored)) or (steps.size > 1 and not weights.says("axis", 0)):
            return None
        if steps.size > 1 and "axis" not in weights.attributes:  # 1 by default: inputs' channels
            return None
        _, before = self._dequantised(quantise, "QuantizeLinear")
        if before is None or not np.array_equal(before, step):
            return None
        source, enlarged = self._before_enlargement(quantise.inputs[0])
        scales = np.broadcast_to(steps.astype(np.float32).ravel(), len(stored)).copy()
        return _Convolution(node, source, enlarged, float(step.ravel()[0]), scales, stored.view(np.int8))

    def scale_and_shift(self, node: Node) -> tuple[str, NDArray[np.float32], NDArray[np.float32]] | None:
        """What an Add shifts that a Mul before it scales, and scale and shift of the channels, float32 [C]; else None."""
        before = self._producers.get(node.inputs[0]) if node.operator == "Add" and len(node.inputs) == 2 else None
        if before is None or before.operator != "Mul" or before.domain or node.domain or len(before.inputs) != 2:
            return None
        if len(before.outputs) != 1 or len(node.outputs) != 1:
            return None
        name = before.outputs[0]
        if len(self._readers[name]) > 1 or name in self.outputs:
            return None
        scale, shift = self._constant(before.inputs[1]), self._constant(node.inputs[1])
        if scale is None or shift is None or scale.shape != shift.shape:
            return None
        if scale.dtype != np.float32 or shift.dtype != np.float32 or not np.isfinite([scale, shift]).all():
            return None
        if scale.ndim not in (3, 4) or scale.size < 2 or scale.shape[-3] != scale.size:
            return None
        return before.inputs[0], scale.view(np.float32).ravel(), shift.view(np.float32).ravel()

    def _dequantised(self, node: Node, operator: str = "DequantizeLinear") -> tuple[str, NDArray[np.generic] | None]:
        """What a node widens (or rounds), and the steps if it does so by int8 without a zero point; else None."""
        if node.operator != operator or node.domain or len(node.inputs) < 3 or "block_size" in node.attributes:
            return "", None
        zero, steps = self._constant(node.inputs[2]), self._constant(node.inputs[1])
        if (
            zero is None
            or zero.dtype != np.int8
            or np.any(zero.astype(int))
            or steps is None
            or steps.dtype.kind != "f"
        ):
            return "", None
        return node.inputs[0], steps

    def _before_enlargement(self, name: str) -> tuple[str, tuple[int, int]]:
        """The tensor that a nearest-neighbour Resize by whole factors repeats, and the factors; else the tensor itself."""
        node = self._producers.get(name)
        if node is None or node.operator != "Resize" or node.domain or len(node.inputs) != 3 or node.inputs[1]:
            return name, (1, 1)
        scales = self._constant(node.inputs[2])
        wanted = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        if scales is None or scales.shape != (4,) or any(node.attributes.get(k) != (v,) for k, v in wanted.items()):
            return name, (1, 1)
        factors = [float(scale) for scale in scales]
        if factors[:2] != [1, 1] or any(factor not in range(1, _MOST + 1) for factor in factors):
            return name, (1, 1)
        if not node.says("antialias", 0) or "axes" in node.attributes:
            return name, (1, 1)
        return node.inputs[0], (int(factors[2]), int(factors[3]))

    def _constant(self, name: str) -> NDArray[np.generic] | None:
        return read_constant(self._constants[name])[1] if name in self._constants else None


class _Rewriting:
    """The nodes of the new graph, in order, and the constants that are added.

    Args:
        shapes: (C, H, W) of the convolutions' sources.
        signed: whether q_w stays signed.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, signed: bool) -> None:
        self.constants: list[bytes] = []
        self._shapes, self._signed = shapes, signed
        self._nodes: list[tuple[tuple[str, ...], tuple[str, ...], bytes | memoryview]] = []
        self._named: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._pixels: dict[tuple[str, float], str] = {}

    def keep(self, node: Node, raw: memoryview) -> None:
        """Take over a node as it is, with whatever a graph inside it reads."""
        self._nodes.append((node.inputs, node.outputs, raw))

    def replace(self, one: _Convolution) -> None:
        """Add the nodes that take a convolution's place."""
        out, channels = one.node.outputs[0], one.weights.shape[1]
        zero = self._constant("zero", np.array(_ZERO, np.uint8))
        step = self._constant("step", np.array(one.step, np.float32))
        rows = self._rounded(one, step, zero)
        if not one.plain:
            places, size = one.places(*self._shapes[one.source][1:])
            outside = self._constant("outside", np.array([0, 0, 0, 0, 1, 0], np.int64))
            numbers = self._constant("places", places.ravel())
            shape = self._constant("rows", np.array([0, *size, places.shape[2] * places.shape[3] * channels], np.int64))
            flat = self._constant("pixels", np.array([0, -1, channels], np.int64))
            rows = self._add("Reshape", (rows, flat), f"{out}/pixels")
            rows = self._add("Pad", (rows, outside, zero), f"{out}/padded")
            rows = self._add("Gather", (rows, numbers), f"{out}/gathered", axis=1)
            rows = self._add("Reshape", (rows, shape), f"{out}/rows")
        matrix = np.ascontiguousarray(one.weights.transpose(2, 3, 1, 0).reshape(-1, len(one.weights)))
        nothing = np.array(0, np.int8)
        if not self._signed:
            matrix, nothing = (matrix.astype(np.int16) + _ZERO).astype(np.uint8), np.array(_ZERO, np.uint8)
        operands: tuple[str, ...] = (
            rows,
            self._constant("weights", matrix),
            step,
            self._constant("steps", one.steps),
            zero,
        )
        operands += (self._constant("nothing", nothing), *[name for name in one.node.inputs[2:3] if name])
        product = self._add("MatMulIntegerToFloat", operands, f"{out}/product", domain=_MICROSOFT)
        self._add("Transpose", (product,), out, perm=(0, 3, 1, 2))

    def scale(self, node: Node, source: str, scale: NDArray[np.float32], shift: NDArray[np.float32]) -> None:
        """Add the node that takes the place of a Mul and the Add behind it, by channel."""
        mean, variance = np.zeros_like(scale), np.ones_like(scale)
        words = {"scale": scale, "shift": shift, "mean": mean, "variance": variance}
        self._add(
            "BatchNormalization",
            (source, *(self._constant(word, array) for word, array in words.items())),
            node.outputs[0],
            epsilon=0.0,
        )

    def needed(self, outputs: set[str]) -> list[bytes | memoryview]:
        """The nodes without those that only rounded what is rounded elsewhere now."""
        nodes, read = list[bytes | memoryview](), set(outputs)
        for inputs, outs, node in reversed(self._nodes):
            if outs and read.isdisjoint(outs) and read_node(memoryview(node)).operator in _ROUNDING:
                continue
            read.update(inputs)
            nodes.append(node)
        return nodes[::-1]

    def _rounded(self, one: _Convolution, step: str, zero: str) -> str:
        """The tensor of q_x, uint8 [n, H, W, C]: one for all convolutions that read it."""
        key = (one.source, one.step)
        if key not in self._pixels:
            name = f"{one.source}/rounded_{len(self._pixels)}"
            rounded = self._add("QuantizeLinear", (one.source, step, zero), f"{name}/Q")
            self._pixels[key] = self._add("Transpose", (rounded,), f"{name}/NHWC", perm=(0, 2, 3, 1))
        return self._pixels[key]

    def _add(self, operator: str, inputs: tuple[str, ...], output: str, **more: Any) -> str:
        self._nodes.append((inputs, (output,), write_node(operator, inputs, (output,), **more)))
        return output

    def _constant(self, word: str, array: NDArray[np.generic]) -> str:
        """The name of a constant; equal ones are one."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._named:
            self._named[key] = f"ddpmx/{word}_{len(self._named)}"
            self.constants.append(write_constant(self._named[key], array))
        return self._named[key]


def _shapes(
    ort: Any, model: bytes, graph: _Graph, names: set[str], inputs: Mapping[str, NDArray[np.generic]]
) -> dict[str, tuple[int, ...]] | None:
    """The shapes of tensors by image, which the network shows when it runs; None if it does not run."""
    ordered = sorted(names)
    shapes = [f"{name}/shape_of_it" for name in ordered]
    nodes: list[bytes | memoryview] = [*graph.raw]
    nodes += (write_node("Shape", (a,), (b,)) for a, b in zip(ordered, shapes, strict=True))
    options = session_options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # whatever is wrong is said when the file itself is opened
    asked = edited(model, nodes, (), outputs=shapes) if shapes else model
    try:
        session = ort.InferenceSession(asked, options, providers=[NAMES["cpu"]])
        wanted = {one.name for one in session.get_inputs()}
        answers = session.run(shapes, {k: v for k, v in inputs.items() if k in wanted}) if shapes else []
    except Exception:  # ONNX Runtime raises its own types, which share no public base
        return None
    return {name: tuple(map(int, shape[1:])) for name, shape in zip(ordered, answers, strict=True)}


@functools.cache
def _signed_sums_are_exact(ort: Any) -> bool | None:
    """Whether products of unsigned by signed integers are exact here; None if this build of ONNX Runtime has none.

    Processors with AVX2 and without VNNI add two products of 8 bits in 16, which saturates: 2·255·127 > 2¹⁵. Both unsigned
    are exact everywhere, and slower where there is VNNI.
    """
    one, zero = np.array(1, np.float32), np.array(0, np.uint8)
    inputs = ("a", "b", "one", "one", "zero")
    node = write_node("MatMulIntegerToFloat", inputs, ("y",), domain=_MICROSOFT)
    left, right = np.full((_ROWS, _INNER), 255, np.uint8), np.full((_INNER, _COLUMNS), 127, np.int8)
    constants: dict[str, NDArray[np.generic]] = {"b": right, "one": one, "zero": zero}
    try:
        session = ort.InferenceSession(_product(node, constants), session_options(ort), providers=[NAMES["cpu"]])
        (sums,) = session.run(None, {"a": left})
    except Exception:  # ONNX Runtime raises its own types, which share no public base
        return None
    return bool((sums == _INNER * 255 * 127).all())


def _product(node: bytes, constants: Mapping[str, NDArray[np.generic]]) -> bytes:
    """A model of one node, with the input ``a`` in uint8 and the output ``y`` in float32."""
    graph = write_field(GRAPH_NODE, node) + write_field(2, "product")
    graph += b"".join(write_field(GRAPH_CONSTANT, write_constant(name, array)) for name, array in constants.items())
    for number, name, kind in ((11, "a", 2), (GRAPH_OUTPUT, "y", 1)):
        shape = b"".join(write_field(1, write_field(2, text)) for text in ("rows", "columns"))
        tensor = write_field(1, kind) + write_field(2, shape)
        graph += write_field(number, write_field(1, name) + write_field(2, write_field(1, tensor)))
    opsets = b"".join(
        write_field(8, write_field(1, domain) + write_field(2, version))
        for domain, version in (("", 17), (_MICROSOFT, 1))
    )
    return write_field(1, 8) + write_field(MODEL_GRAPH, graph) + opsets
