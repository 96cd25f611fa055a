"""The convolutions of a graph: their geometry, their multiplications, and which of them are the first and the last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Convolution:
    """A convolution in two dimensions.

    Attributes:
        name: of its node.
        input, weight, bias, output: of its tensors; ``bias`` is empty where it has none.
        group: of its channels.
        strides, pads, dilations: as in ONNX; pads are those before, then those after.
        kernel: height and width.
    """

    name: str
    input: str
    weight: str
    bias: str
    output: str
    group: int
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    kernel: tuple[int, int]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        return (
            (height + self.pads[0] + self.pads[2] - spans[0]) // self.strides[0] + 1,
            (width + self.pads[1] + self.pads[3] - spans[1]) // self.strides[1] + 1,
        )

    def mean_patch(self, x: NDArray[np.floating]) -> Float64:
        """The mean of what the kernel lies on, over images and positions: float64 [C, kernel height, kernel width].

        A convolution is linear, so its mean output is its weights times this.

        Args:
            x: the input, [n, C, H, W].
        """
        top, left, bottom, right = self.pads
        padded = np.pad(x.mean(axis=0, dtype=np.float64), ((0, 0), (top, bottom), (left, right)))
        rows, columns = self.output_size(*x.shape[2:])
        patch = np.empty((x.shape[1], *self.kernel))
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                first, second = i * self.dilations[0], j * self.dilations[1]
                seen = padded[
                    :,
                    first : first + (rows - 1) * self.strides[0] + 1 : self.strides[0],
                    second : second + (columns - 1) * self.strides[1] + 1 : self.strides[1],
                ]
                patch[:, i, j] = seen.mean(axis=(1, 2))
        return patch

    def mean_output(self, weight: NDArray[np.floating], patch: Float64) -> Float64:
        """The mean of the output without its bias, by channel: float64 [channels].

        Args:
            weight: [channels, C / group, kernel height, kernel width].
            patch: from :meth:`mean_patch`.
        """
        flat = patch.reshape(self.group, -1)
        rows = weight.astype(np.float64).reshape(self.group, -1, flat.shape[1])
        means: Float64 = np.einsum("gok,gk->go", rows, flat).reshape(-1)
        return means


def convolutions(model: onnx.ModelProto) -> dict[str, Convolution]:
    """A graph's convolutions in two dimensions whose weights are constants, by their nodes' names, in running order."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights or len(weights[node.input[1]].dims) != 4:
            continue
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            continue
        found[node.name] = Convolution(
            node.name,
            node.input[0],
            node.input[1],
            node.input[2] if len(node.input) > 2 else "",
            node.output[0],
            attributes.get("group", 1),
            _two(attributes.get("strides", (1, 1))),
            _four(attributes.get("pads", (0, 0, 0, 0))),
            _two(attributes.get("dilations", (1, 1))),
            _two(weights[node.input[1]].dims[2:]),
        )
    return found


def first_and_last(model: onnx.ModelProto, names: tuple[str, ...] = ("t", "y")) -> set[str]:
    """The convolutions that no other comes before, from the images, or after, to the outputs.

    Args:
        model: the graph.
        names: inputs that are no images.
    """
    consumers, producers = defaultdict(list), {}
    for node in model.graph.node:
        for name in node.input:
            consumers[name].append(node)
        for name in node.output:
            producers[name] = node
    found = set()
    for ends, forward in (
        ([value.name for value in model.graph.input if value.name not in names], True),
        ([value.name for value in model.graph.output], False),
    ):
        seen, todo = set(ends), list(ends)
        while todo:
            name = todo.pop()
            for node in consumers[name] if forward else filter(None, [producers.get(name)]):
                if node.op_type == "Conv":
                    found.add(node.name)
                    continue
                more = [one for one in (node.output if forward else node.input) if one and one not in seen]
                seen.update(more)
                todo += more
    return found


def constant(model: onnx.ModelProto, name: str) -> NDArray[np.floating]:
    """A constant of the graph."""
    tensor = next(one for one in model.graph.initializer if one.name == name)
    return np.asarray(numpy_helper.to_array(tensor))


def _two(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _four(values: Sequence[int]) -> tuple[int, int, int, int]:
    return int(values[0]), int(values[1]), int(values[2]), int(values[3])
