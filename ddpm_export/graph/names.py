"""Names in the graph say what they are: the path of the module, and what is computed there.

torch numbers its values (``val_36``), and tools that change a file make names by appending numbers: ONNX Runtime's
``quantize_static`` calls its copy of a shared constant ``val_36`` by a name that may be another value's. So no name here
ends in a digit, but for those of the contract (``x0``):

    down.0.conv/Conv, down.0.conv/2/Conv    the first and the second convolution there; their values too
    down.0.norm/Reshape/shape               a constant, after the first node that takes it and what it is to that node
    down.0.conv.weight                      a weight
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"
_ROOT = "_empty_nn_module_stack"  # torch's name of a place outside of all modules


def name_everything(model: onnx.ModelProto, weights: Collection[str], *, root: str = "") -> None:
    """Give all nodes, values and constants of a graph that torch wrote their names. Needs torch's metadata in the nodes.

    Args:
        model: changed in place. Its inputs and outputs keep their names.
        weights: the paths of the network's parameters and buffers, which are names of constants.
        root: a prefix that is left out of paths.
    """
    graph = model.graph
    names = _Names(root)
    for value in (*graph.input, *graph.output):
        names.new[value.name] = names.unique(value.name, plain=False)
    for constant in graph.initializer:
        if constant.name in weights:
            names.new[constant.name] = names.unique(constant.name.removeprefix(root))
    outputs = {value.name for value in graph.output}
    names.walk(graph, outputs)
    for each in _graphs(graph):
        for node in each.node:
            node.input[:] = [names.new.get(name, name) for name in node.input]
            node.output[:] = [names.new.get(name, name) for name in node.output]
        for tensor in each.initializer:
            tensor.name = names.new.get(tensor.name, tensor.name)
        for value in (*each.input, *each.output):
            value.name = names.new.get(value.name, value.name)
        del each.value_info[:]  # nothing needs it, and a batch named there keeps some runtimes from fixing it


class _Names:
    """The names that are taken, and what each old name becomes."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._taken: set[str] = set()
        self.new: dict[str, str] = {"": ""}

    def walk(self, graph: onnx.GraphProto, outputs: Collection[str]) -> None:
        """Name the nodes of a graph and of those inside it, their values and their constants."""
        constants = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            path = module_path(node).removeprefix(self._root)
            written = next((name for name in node.output if name in outputs), None)
            # a node that writes an output is called after it: some runtimes name outputs after nodes
            node.name = written or self.unique(f"{path}/{node.op_type}" if path else node.op_type)
            for place, name in enumerate(node.input):
                if name in constants and name not in self.new:
                    self.new[name] = self.unique(f"{node.name}/{_role(node, place)}")
            for place, name in enumerate(node.output):
                if name not in self.new:
                    several = len(node.output) > 1
                    base = f"{node.name}/{place}/{node.op_type}" if several else node.name
                    self.new[name] = self.unique(base) if several or written else base
            for inner in _inner(node):
                for value in inner.input:
                    self.new[value.name] = self.unique(f"{node.name}/input")
                self.walk(inner, ())
        for name in sorted(constants - self.new.keys()):
            self.new[name] = self.unique("unused")

    def unique(self, name: str, *, plain: bool = True) -> str:
        """A name that is not taken and, where ``plain``, ends in no digit."""
        if plain and name[-1].isdigit():
            name += "/value"
        head, _, last = name.rpartition("/")
        count = 1
        while name in self._taken:
            count += 1
            name = f"{head}/{count}/{last}" if head else f"{count}/{last}"
        self._taken.add(name)
        return name


def module_path(node: onnx.NodeProto) -> str:
    """The path of the module in which torch made the node: "down.0.conv"."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    scopes = [str(scope) for scope in ast.literal_eval(text)][:-1]
    return next((scope for scope in reversed(scopes) if scope and not scope.startswith(_ROOT)), "")


def _role(node: onnx.NodeProto, place: int) -> str:
    """What an input is to its node, by ONNX's own names: "shape", "axes", "b"."""
    try:
        inputs = onnx.defs.get_schema(node.op_type).inputs
    except onnx.defs.SchemaError:
        return "constant"
    return inputs[min(place, len(inputs) - 1)].name.lower().rstrip("_0123456789") or "constant"


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in _inner(node):
            yield from _graphs(inner)
