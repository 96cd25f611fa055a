"""Names in the graph say where something is computed, and other tools can process the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: names in the graph (no torch)")
pytest.importorskip("onnx", reason="not verified here: names in the graph (no onnx)")

import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime import quantization

from ddpm_export.graph.names import name_everything
from ddpm_export.graph.onnx_export import export_network
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpmx.formats.spec import ModelSpec, Precision
from oracles.random_weights import rerandomise

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SPEC = ModelSpec((3, 16, 16), timesteps=50)
CONTRACT = {"x", "t", "eps"}


def unet() -> UNet:
    network = UNet(UNetConfig(3, 3, (16, 16), 16, (1, 2), 1, (8,), 0.0, 8)).eval().requires_grad_(False)
    rerandomise(network)
    return network


@pytest.fixture(
    scope="module",
    params=[
        "fp32",
        pytest.param("fp16", marks=pytest.mark.long),
        pytest.param("bf16", marks=pytest.mark.long),
        "time table",
    ],
)
def file(request, tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("names") / "m.onnx"
    precision: Precision = "fp32" if request.param == "time table" else request.param
    export_network(unet(), SPEC, path, precision=precision, time_table=request.param == "time table")
    return path


def test_every_name_is_unique_and_none_ends_in_a_digit(file):
    graph = onnx.load(file).graph
    values = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
    nodes = [node.name for node in graph.node]
    for names in (values, nodes):
        assert len(set(names)) == len(names)
        assert not [name for name in names if name[-1].isdigit()]
        assert not [name for name in names if name.startswith(("val", "node_"))]


def test_names_are_paths_of_modules(file):
    graph = onnx.load(file).graph
    modules = {name for name, _ in unet().named_modules()}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        path = node.input[1].removesuffix(".weight")
        assert path in modules
        assert node.name in (f"{path}/Conv", "eps")
    shapes = {name.rsplit("/", 1)[-1] for name in (tensor.name for tensor in graph.initializer) if "/Reshape/" in name}
    assert shapes == {"shape"}


def test_the_node_of_the_output_is_called_after_it_and_batch_is_named_by_inputs_and_outputs_alone(file):
    graph = onnx.load(file).graph
    assert [node.name for node in graph.node if "eps" in node.output] == ["eps"]
    assert not graph.value_info
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"batch"}


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Eight images of noise, over all t."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        times = np.linspace(0, SPEC.timesteps - 1, 8).astype(np.int32)
        self.left = [
            {"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32), "t": times[i : i + 1]} for i in range(8)
        ]

    def get_next(self):
        return self.left.pop() if self.left else None


def outputs(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["eps"], inputs)[0] for inputs in Reader().left])


def test_quantize_static_with_its_defaults_gives_a_file_that_answers(tmp_path, figure):
    """It copies shared constants under names with digits appended: with names like val_36 that is another value's."""
    export_network(unet(), SPEC, tmp_path / "m.onnx")
    prepared = tmp_path / "prepared.onnx"
    # without auto_merge, ONNX Runtime holds the batch of a Resize, floor(1.0·batch), for another one than batch
    quantization.quant_pre_process(str(tmp_path / "m.onnx"), str(prepared), auto_merge=True)
    for name, source in (("as it is", tmp_path / "m.onnx"), ("prepared", prepared)):
        quantised = tmp_path / f"{name}.onnx"
        quantization.quantize_static(str(source), str(quantised), Reader())
        expected, out = outputs(tmp_path / "m.onnx"), outputs(quantised)
        error = float(np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)))
        figure(f"quantize_static, {name}: relative RMS of ε", error, at_most=0.15)


def test_graphs_inside_nodes_and_weights_that_end_in_digits_are_named_too():
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])

    branch = helper.make_graph([helper.make_node("Add", ["val_1", "w1"], ["val_2"])], "inner", [], [value("val_2")])
    other = helper.make_graph([helper.make_node("ReduceL2", ["val_1"], ["val_9"])], "other", [], [value("val_9")])
    nodes = [
        helper.make_node("Mul", ["x", "val_0"], ["val_1"]),
        helper.make_node("Mul", ["val_1", "val_0"], ["val_4"]),
        helper.make_node("If", ["flag"], ["eps"], then_branch=branch, else_branch=other),
        helper.make_node("Split", ["val_4"], ["val_5", "val_6"], axis=0, num_outputs=2),
    ]
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in ("val_0", "w1", "unused_3")]
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    model = helper.make_model(helper.make_graph(nodes, "g", [value("x"), flag], [value("eps")], weights))
    for node in model.graph.node[:2]:
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'module', 'module.down.1', 'mul_2']"
    name_everything(model, {"w1"}, root="module.")
    graph = model.graph
    assert [node.name for node in graph.node] == ["down.1/Mul", "down.1/2/Mul", "eps", "Split"]
    assert [tensor.name for tensor in graph.initializer] == ["down.1/Mul/b", "w1/value", "unused"]
    assert list(graph.node[0].input) == ["x", "down.1/Mul/b"]
    then, otherwise = (attribute.g for attribute in sorted(graph.node[2].attribute, key=lambda one: one.name)[::-1])
    assert list(then.node[0].input) == ["down.1/Mul", "w1/value"]
    assert then.output[0].name == then.node[0].output[0] == "Add"
    assert otherwise.node[0].output[0] == "ReduceL2/value"
    assert not [name for name in graph.node[3].output if name[-1].isdigit()]
    onnx.checker.check_model(model)
