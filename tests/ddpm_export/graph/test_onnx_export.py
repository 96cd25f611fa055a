"""The exported file: its contract, what it reveals, the error of its outputs, and that it is whole or not there."""

from __future__ import annotations

import copy
import errno
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the export (no torch)")
pytest.importorskip("onnx", reason="not verified here: the export (no onnx)")

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from conftest import FASHION
from ddpm_export.graph import onnx_export
from ddpm_export.graph.onnx_export import TimeTable, export, export_network, to_precision
from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.training.checkpoint import load_network, weights_hash
from ddpm_export.training.data import load_dataset
from ddpm_export.training.diffusion import GaussianDiffusion
from ddpmx.errors import BackendError, InputError, OutputError
from ddpmx.formats import atomic
from ddpmx.formats.onnx_file import METADATA_KEY, TRAINING_KEY
from ddpmx.formats.spec import ModelSpec
from ddpmx.pipeline import Pipeline, load
from oracles.onnx_types import element_types, half_precision_faults
from oracles.random_weights import rerandomise

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ALL_T = np.linspace(0, 999, 32).round().astype(np.int32)
"""32 of the 1000, both ends among them."""


class Exported(NamedTuple):
    """A network, the file it became, and what the file should say."""

    network: UNet
    file: Path
    spec: ModelSpec
    model: onnx.ModelProto


def random_network() -> UNet:
    """Random weights in every layer, an image that is not square, an output of RMS 1."""
    network = UNet(UNetConfig(3, 3, (12, 16), 16, (1, 2), 1, (6,), 0.0, 8)).eval().requires_grad_(False)
    rerandomise(network)
    generator = torch.Generator().manual_seed(0)
    out = network(torch.randn(32, 3, 12, 16, generator=generator), torch.from_numpy(ALL_T))
    rms = out.square().mean().sqrt()
    network.conv_out.weight /= rms
    network.conv_out.bias /= rms
    return network


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory) -> dict[str, Exported]:
    """Every way of exporting, once."""
    folder = tmp_path_factory.mktemp("exports")
    network, spec = load_network(trained.run)
    made = {
        "trained fp32": (network, trained.fp32, spec),
        "trained fp16": (network, trained.fp16, spec.replace(precision="fp16")),
    }
    random, image = random_network(), (3, 12, 16)
    for name, spec, how in (
        ("random fp32", ModelSpec(image), {}),
        ("random fp16", ModelSpec(image), {"precision": "fp16"}),
        ("table fp32, v", ModelSpec(image, prediction="v"), {"time_table": True}),
        ("table fp16, x0", ModelSpec(image, prediction="x0"), {"time_table": True, "precision": "fp16"}),
    ):
        file = folder / f"{name}.onnx"
        made[name] = random, file, export_network(random, spec, file, **how)
    assert {tensor.dtype for tensor in random.state_dict().values()} == {torch.float32}, "the network is left as it was"
    return {name: Exported(*parts, onnx.load(parts[1])) for name, parts in made.items()}


NAMES = ["trained fp32", "trained fp16", "random fp32", "random fp16", "table fp32, v", "table fp16, x0"]
every_export = pytest.mark.parametrize("name", NAMES)


def file_output(file: Path, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": x, "t": t})
    return out


def torch_output(network: UNet, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(x), torch.from_numpy(t)).numpy()


# --- the contract ----------------------------------------------------------------------------------------------------


@every_export
def test_inputs_and_outputs(exports, name):
    """The same in every precision, so that files are interchangeable."""
    _, _, spec, model = exports[name]
    image = ["batch", *spec.shape]

    def described(values) -> dict[str, tuple[int, list[int | str]]]:
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    assert described(model.graph.input) == {"x": (TensorProto.FLOAT, image), "t": (TensorProto.INT32, ["batch"])}
    assert described(model.graph.output) == {spec.prediction: (TensorProto.FLOAT, image)}


@every_export
def test_plain_operators_of_opset_20(exports, name):
    model = exports[name].model
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version <= 10
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)


@every_export
def test_the_file_describes_itself(exports, name):
    _, file, spec, model = exports[name]
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries.keys() - {TRAINING_KEY} == {METADATA_KEY}
    assert (TRAINING_KEY in entries) == name.startswith("trained"), "of a checkpoint, and of nothing else"
    assert ModelSpec.from_text(entries[METADATA_KEY]) == spec
    with load(file) as pipeline:
        assert pipeline.spec == spec


def test_the_spec_names_precision_version_and_weights(exports, trained):
    import ddpmx

    for name, precision in (("trained fp32", "fp32"), ("trained fp16", "fp16")):
        spec = ModelSpec.from_text(exports[name].model.metadata_props[0].value)
        assert spec.precision == precision
        assert spec.ddpmx == ddpmx.__version__
        assert spec.weights == weights_hash(load_network(trained.run)[0].state_dict())


@every_export
def test_the_file_does_not_reveal_where_it_was_made(exports, name, tmp_path_factory):
    """torch writes stack traces, with the paths of every source file, into each node."""
    model = exports[name].model
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        assert not part.metadata_props
        assert not part.doc_string
    assert not graph.metadata_props
    assert (model.producer_name, model.doc_string, graph.doc_string) == ("ddpmx", "", "")
    text = onnx.ModelProto()
    text.CopyFrom(model)
    for tensor in text.graph.initializer:
        tensor.ClearField("raw_data")  # in which any three letters stand somewhere
    places = [str(tmp_path_factory.getbasetemp()), str(Path.home()), str(Path.cwd()), sys.prefix]
    for trace in (*places, "site-packages", "/home", "/tmp", ".py", "torch.", "File "):
        assert trace.encode() not in text.SerializeToString(), trace


@every_export
def test_weights_are_inside_the_file(exports, name):
    tensors = list(exports[name].model.graph.initializer)
    assert tensors
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in tensors)


@pytest.mark.long
@pytest.mark.traces
def test_another_process_exports_the_same_bytes_and_prints_nothing(trained, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"from ddpm_export.graph.onnx_export import export; export({str(trained.run)!r})"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "model.onnx").read_bytes() == trained.fp32.read_bytes()


# --- half precision --------------------------------------------------------------------------------------------------


@every_export
def test_norms_softmax_and_time_path_stay_float32(exports, name):
    operators = Counter(node.op_type for node in exports[name].model.graph.node)
    assert operators["Softmax"] > 0, "there is something to find"
    assert operators["InstanceNormalization"] > 0
    assert half_precision_faults(exports[name].model) == []


@pytest.mark.parametrize("half", [True, False], ids=["half", "float"])
@pytest.mark.parametrize("op", ["Softmax", "ReduceMean", "Sin", "Cos", "InstanceNormalization", "Gemm"])
def test_the_walk_finds_what_it_looks_for(op, half):
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    scale = [numpy_helper.from_array(np.ones((3, 3) if op == "Gemm" else 3, np.float16 if half else np.float32), "w")]
    weights = {"InstanceNormalization": ["w", "w"], "Gemm": ["w"]}.get(op, [])
    shape = [2, 3] if op == "Gemm" else [2, 3, 4]
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=kind),
        helper.make_node(op, ["cast", *weights], ["out"]),
        helper.make_node("Cast", ["out"], ["eps"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "hand-made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("eps", TensorProto.FLOAT, None)],
        scale if weights else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert half_precision_faults(model) == ([op] if half else [])


@pytest.mark.parametrize("name", ["trained fp16", "random fp16", "table fp16, x0"])
def test_all_convolutions_but_the_first_and_the_last_are_half(exports, name):
    _, _, spec, model = exports[name]
    types = element_types(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    full = [node for node in convolutions if types[node.input[1]] == TensorProto.FLOAT]
    assert [node.input[0] for node in full][:1] == ["x"]
    assert [node.output[0] for node in full][-1:] == [spec.prediction]
    assert len(full) == 2
    for node in convolutions:
        if node not in full:
            assert {types[value] for value in (*node.input, *node.output)} == {TensorProto.FLOAT16}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert products
    for node in products:
        assert {types[value] for value in node.input} == {TensorProto.FLOAT16}, "attention multiplies in half"


@pytest.mark.parametrize("name", ["trained fp32", "random fp32", "table fp32, v"])
def test_a_float32_file_has_no_half_in_it(exports, name):
    assert TensorProto.FLOAT16 not in element_types(exports[name].model).values()


def test_a_half_file_is_half_as_large(exports):
    sizes = {name: exports[name].file.stat().st_size for name in ("trained fp32", "trained fp16")}
    assert sizes["trained fp16"] < 0.65 * sizes["trained fp32"]


def test_only_known_precisions():
    with pytest.raises(InputError, match="int8"):
        to_precision(random_network(), "int8")


# --- the error of its outputs ----------------------------------------------------------------------------------------


def noisy_images(shape: tuple[int, int, int], each: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """x_t and t of ``each`` images at 32 t: real images for the trained network, random ones for the other."""
    generator = torch.Generator().manual_seed(0)
    t = torch.from_numpy(ALL_T).repeat_interleave(each)
    if shape == (1, 16, 16):
        x0 = torch.from_numpy(load_dataset(FASHION).images[: len(t)]).permute(0, 3, 1, 2).float() / 127.5 - 1
    else:
        x0 = 2 * torch.rand(len(t), *shape, generator=generator) - 1
    eps = torch.randn(x0.shape, generator=generator)
    return GaussianDiffusion(ModelSpec(shape).make_schedule()).q_sample(x0, t, eps).numpy(), t.numpy()


@pytest.mark.parametrize("name", NAMES[:4])
def test_its_outputs_are_those_of_torch(exports, name, figure):
    """ε has variance 1, so an absolute error of 1e-3 is a thousandth of the noise."""
    network, file, spec, _ = exports[name]
    x, t = noisy_images(spec.shape)
    wanted = torch_output(network, x, t).astype(np.float64)
    assert 0.5 < np.sqrt(np.mean(wanted**2)) < 1.5
    error = (file_output(file, x, t) - wanted).reshape(32, -1)
    bound = 2e-5 if spec.precision == "fp32" else 3e-3
    worst = np.sqrt(np.mean(error**2, axis=1)).max()
    figure(f"{name} in onnxruntime against torch float32: largest RMS error over 32 t", worst, at_most=bound)
    relative = (np.linalg.norm(error, axis=1) / np.linalg.norm(wanted.reshape(32, -1), axis=1)).max()
    figure(f"{name} in onnxruntime against torch float32: largest relative L2 error", relative, at_most=2 * bound)


@pytest.mark.parametrize("name", ["random fp32", "random fp16"])
def test_an_output_depends_on_no_other_image_of_the_batch(exports, name):
    _, file, spec, _ = exports[name]
    x, t = noisy_images(spec.shape)
    x, t = x[::8], t[::8]
    together = file_output(file, x, t)
    assert len(together) == 16
    for size in (1, 3):
        assert np.abs(file_output(file, x[:size], t[:size]) - together[:size]).max() < 1e-5


@pytest.mark.long
def test_a_chain_in_half_precision_gives_the_same_images(exports, figure):
    """1000 steps with the same noise."""
    files = [exports[name].file for name in ("trained fp32", "trained fp16")]
    images = []
    for file in files:
        with load(file) as pipeline:
            images.append(pipeline.generate(8, seed=1, batch=8).astype(int))
    full, half = images
    assert full.std() > 30, "images, not a flat grey"
    share = np.mean(np.abs(full - half) <= 1)
    figure("fp16 against fp32, 1000 steps of 8 images: share of pixels within one level", share, at_least=0.999)
    network, _, spec, _ = exports["trained fp32"]
    by_torch = Pipeline(spec, TorchBackend(network)).generate(4, seed=1, batch=4).astype(int)
    share = np.mean(np.abs(full[:4] - by_torch) <= 1)
    figure("onnxruntime against torch, 1000 steps of 4 images: share of pixels within one level", share, at_least=0.999)


# --- the time table --------------------------------------------------------------------------------------------------


def shifts(network: UNet) -> np.ndarray:
    with torch.no_grad():
        return torch.cat(network.time(torch.arange(1000)), dim=1).numpy()


@pytest.mark.parametrize("name", ["table fp32, v", "table fp16, x0"])
def test_the_table_is_what_would_be_computed_bit_for_bit(exports, name):
    network, _, _, model = exports[name]
    wanted = shifts(network)
    (table,) = (t for t in model.graph.initializer if list(t.dims) == list(wanted.shape))
    assert np.array_equal(numpy_helper.to_array(table), wanted)
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Sin", "Cos", "Gemm"}, "nothing is left of the time path"


def test_the_table_is_read_row_by_row():
    network = random_network()
    table = TimeTable(network.time, 1000)
    t = torch.tensor([999, 0, 500, 0], dtype=torch.int32)
    assert torch.equal(torch.cat(table(t), dim=1), torch.from_numpy(shifts(network))[t.long()])
    assert [part.shape for part in table(t)] == [part.shape for part in network.time(t)]


@pytest.mark.parametrize(
    ("table", "plain", "bound"), [("table fp32, v", "random fp32", 1e-5), ("table fp16, x0", "random fp16", 3e-3)]
)
def test_with_a_table_the_outputs_are_the_same(exports, table, plain, bound, figure):
    x, t = noisy_images((3, 12, 16))
    error = (file_output(exports[table].file, x, t) - file_output(exports[plain].file, x, t)).reshape(32, -1)
    worst = np.sqrt(np.mean(error**2, axis=1)).max()
    figure(f"{table} against {plain}: largest RMS difference over 32 t", worst, at_most=bound)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(trained, monkeypatch):
    """Tracing takes seconds; what is tested below comes after it."""
    model = onnx.load(trained.fp32)
    monkeypatch.setattr(onnx_export, "_trace", lambda *_: copy.deepcopy(model))


def raising(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over another"])
@pytest.mark.parametrize(
    ("where", "what", "error", "kind"),
    [
        (onnx_export, "_trace", KeyboardInterrupt(), KeyboardInterrupt),
        (onnx.checker, "check_model", KeyboardInterrupt(), KeyboardInterrupt),
        (onnx.checker, "check_model", onnx.checker.ValidationError("bad"), Exception),
        (atomic, "_create", PermissionError(errno.EACCES, "Permission denied"), OutputError),
        (atomic.os, "fsync", DISK_FULL, OutputError),
        (atomic.os, "fsync", KeyboardInterrupt(), KeyboardInterrupt),
        (atomic.os, "replace", DISK_FULL, OutputError),
    ],
    ids=lambda value: getattr(value, "__name__", None) or repr(value),
)
def test_an_interrupted_export_leaves_all_as_it_was(
    trained, traced, tmp_path, monkeypatch, existing, where, what, error, kind
):
    output = tmp_path / "model.onnx"
    if existing:
        output.write_bytes(b"the model of yesterday")
    monkeypatch.setattr(where, what, raising(error))
    with pytest.raises(kind) as caught:
        export(trained.run, output)
    monkeypatch.undo()
    if kind is OutputError:
        assert str(output) in caught.value.fact
    assert [path.name for path in tmp_path.iterdir()] == (["model.onnx"] if existing else [])
    if existing:
        assert output.read_bytes() == b"the model of yesterday"


@pytest.mark.usefixtures("traced")
def test_an_export_replaces_the_file_that_was_there(trained, tmp_path):
    output = tmp_path / "model.onnx"
    output.write_bytes(b"the model of yesterday")
    export(trained.run, output)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    export(trained.run, tmp_path / "new.onnx")
    assert output.read_bytes() == (tmp_path / "new.onnx").read_bytes()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["folder", "missing/model.onnx", "file/model.onnx"])
def test_impossible_outputs_are_refused(trained, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=name):
        export(trained.run, tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.usefixtures("traced")
def test_a_model_too_large_for_one_file_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_PROTOBUF_BYTES", 1000)
    with pytest.raises(OutputError, match="2 GiB"):
        export(trained.run, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("traced")
def test_raw_weights_are_named_as_such(trained, tmp_path):
    raw = export(trained.run, tmp_path / "raw.onnx", weights="raw")
    averaged = export(trained.run, tmp_path / "ema.onnx")
    assert raw.weights == weights_hash(load_network(trained.run, "raw")[0].state_dict())
    assert averaged.weights == weights_hash(load_network(trained.run, "ema")[0].state_dict())
    assert raw.weights != averaged.weights


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.8.0"])
def test_a_torch_that_cannot_export_is_named(monkeypatch, tmp_path, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(BackendError, match=f"torch {re.escape(version)} is too old to export with"):
        export_network(torch.nn.Identity(), ModelSpec((1, 8, 8)), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
