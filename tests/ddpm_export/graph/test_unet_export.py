"""Files of networks with classes, a learned variance and the other knobs: their contract and their outputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the export of knobs (no torch)")
pytest.importorskip("onnx", reason="not verified here: the export of knobs (no onnx)")

import onnx
import onnxruntime
import torch

from ddpm_export.graph.onnx_export import TimeTable, export_network, to_precision
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from oracles.onnx_types import element_types, half_precision_faults
from oracles.random_weights import rerandomise

pytestmark = [pytest.mark.torch, pytest.mark.slow]

T = torch.arange(0, 1000, 37, dtype=torch.int32)

SMALL = UNetConfig(3, 3, (8, 16), 16, (1, 2), 1, (4,), 0.0, 8)
NETWORKS = {
    "guided": dataclasses.replace(
        SMALL, out_channels=6, norm_eps=1e-5, cos_first=True, frequency_shift=0, head_channels=8, scale_shift=True,
        resample_blocks=True, classes=5, self_condition=True, condition=2,
    ),
    "improved": dataclasses.replace(
        SMALL, out_channels=6, cos_first=True, frequency_shift=0, time_scale=0.25, symmetric_padding=True, heads=2,
        scale_shift=True,
    ),
    "average_pool": dataclasses.replace(SMALL, average_pool=True, heads=4),
}  # fmt: skip


EXPORTS = [("guided", "fp16"), ("improved", "fp16"), ("average_pool", "fp32")]
every_export = pytest.mark.parametrize(("name", "precision"), EXPORTS)
every_network = pytest.mark.parametrize("name", NETWORKS)


def random_network(config: UNetConfig) -> UNet:
    network = UNet(config).eval().requires_grad_(False)
    rerandomise(network)
    return network


def spec_of(config: UNetConfig) -> ModelSpec:
    variance = "learned_range" if config.learned_variance else "fixed_large"
    conditioning = {name: getattr(config, name) for name in ("classes", "self_condition", "condition")}
    return ModelSpec((3, 8, 16), variance=variance, **conditioning)


def inputs_for(config: UNetConfig) -> dict[str, torch.Tensor]:
    """An image for each t, with the conditioning that the network takes."""
    generator = torch.Generator().manual_seed(1)

    def images(channels: int) -> torch.Tensor:
        return torch.randn(len(T), channels, *config.size, generator=generator)

    found = {"x": images(3), "t": T}
    if config.classes is not None:
        found["y"] = torch.arange(len(T), dtype=torch.int32) % config.classes
    if config.self_condition:
        found["x0_prev"] = images(3).clip(-1, 1)
    if config.condition is not None:
        found["cond"] = images(config.condition)
    return found


def output(network: UNet, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output, with the variance behind it if there is one."""
    with torch.no_grad():
        out = network(**inputs)
    return torch.cat(out, dim=1) if isinstance(out, tuple) else out


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(network, spec, file) of each."""
    folder = tmp_path_factory.mktemp("exports")
    networks = {name: random_network(config) for name, config in NETWORKS.items()}
    made = {}
    for name, precision in EXPORTS:
        file = folder / f"{name} {precision}.onnx"
        spec = export_network(networks[name], spec_of(NETWORKS[name]), file, precision=precision)
        made[name, precision] = networks[name], spec, file
    return made


@every_export
def test_the_file_has_the_inputs_and_outputs_of_the_spec(exports, name, precision):
    _, _, file = exports[name, precision]
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    kinds = {"x": onnx.TensorProto.FLOAT, "t": onnx.TensorProto.INT32, "y": onnx.TensorProto.INT32}
    image = ["batch", 3, 8, 16]
    wanted = {"x": (kinds["x"], image), "t": (kinds["t"], ["batch"])}
    if name == "guided":
        wanted |= {"y": (kinds["y"], ["batch"]), "x0_prev": (kinds["x"], image)}
        wanted["cond"] = (kinds["x"], ["batch", 2, 8, 16])

    def described(values):
        return {
            v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in values
        }

    assert list(described(model.graph.input).items()) == list(wanted.items()), "in the order of the contract"
    outputs = ["eps"] if name == "average_pool" else ["eps", "var"]
    assert described(model.graph.output) == dict.fromkeys(outputs, (kinds["x"], image))


@every_export
def test_the_file_computes_what_torch_does_in_every_batch(exports, name, precision, figure):
    network, spec, file = exports[name, precision]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs = inputs_for(network.config)
    wanted = output(network, inputs).numpy()

    def file_output(n: int) -> np.ndarray:
        return np.concatenate(
            session.run(list(spec.outputs), {key: value[:n].numpy() for key, value in inputs.items()}), axis=1
        )

    error = file_output(len(T)) - wanted
    relative = np.sqrt(np.mean(error**2) / np.mean(wanted**2))
    bound = 1e-5 if precision == "fp32" else 5e-3
    figure(
        f"{name} {precision} in onnxruntime against torch float32: relative RMS error, 28 t", relative, at_most=bound
    )
    for n in (1, 3):
        assert np.abs(file_output(n) - file_output(len(T))[:n]).max() < 1e-5


@pytest.mark.parametrize("name", ["guided", "improved"])
def test_in_half_all_but_norms_softmax_time_and_the_outermost_layers_is_half(exports, name):
    _, _, file = exports[name, "fp16"]
    model = onnx.load(file)
    assert half_precision_faults(model) == []
    types = element_types(model)
    full, half = [], []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "AveragePool", "Resize"):
            kind = types[node.input[1 if node.op_type == "Conv" else 0]]
            (half if kind == onnx.TensorProto.FLOAT16 else full).append(node)
    assert [node.op_type for node in full] == ["Conv", "Conv"]
    joined = {
        output: list(node.input) for node in model.graph.node for output in node.output if node.op_type == "Concat"
    }
    images = [full[0].input[0]]
    while images[0] in joined:
        images[:1] = joined[images[0]]
    assert images == (["x", "x0_prev", "cond"] if name == "guided" else ["x"])
    assert {node.op_type for node in half} >= {"Conv", "MatMul", "Resize"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@every_network
def test_parameters_are_halved_by_kind(name, precision):
    network = to_precision(UNet(NETWORKS[name]), precision)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for key, tensor in network.state_dict().items():
        part = key.split(".")[-2]
        full = key.startswith(("time.", "conv_in.", "conv_out.")) or part.startswith("norm")
        assert tensor.dtype == (torch.float32 if full else half), key
    out = output(network, inputs_for(NETWORKS[name]))
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


def test_a_network_that_names_no_parts_cannot_be_halved():
    layer = torch.nn.Conv2d(1, 1, 1)
    assert to_precision(layer, "fp32").weight.dtype == torch.float32
    with pytest.raises(InputError, match="fp16"):
        to_precision(layer, "fp16")


def test_a_time_table_knows_the_scale_and_both_halves():
    network = random_network(NETWORKS["improved"])
    t = torch.tensor([0, 999, 517], dtype=torch.int32)
    computed = network.time(torch.arange(1000))
    for row, wanted in zip(TimeTable(network.time, 1000)(t), computed, strict=True):
        assert torch.equal(row, wanted[t.long()])


def test_with_classes_there_is_no_time_table(tmp_path):
    config = NETWORKS["guided"]
    with pytest.raises(InputError, match="time table") as caught:
        export_network(UNet(config), spec_of(config), tmp_path / "model.onnx", time_table=True)
    assert "class" in str(caught.value.note)
    assert not list(tmp_path.iterdir())


class Conditioned(torch.nn.Module):
    """A network other than a U-Net, with every input that the contract knows."""

    def forward(self, x, t, y, x0_prev, cond):
        shift = (t + y).to(torch.float32)[:, None, None, None]
        return x + 2 * x0_prev + cond.sum(dim=1, keepdim=True) + shift, x * cond[:, :1]


def test_any_network_gets_its_conditioning_by_name(tmp_path):
    spec = ModelSpec((1, 4, 4), variance="learned_range", classes=3, self_condition=True, condition=2)
    export_network(Conditioned(), spec, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    inputs = {"t": np.array([1, 5, 9], np.int32), "y": np.array([0, 2, 1], np.int32)}
    inputs |= {name: rng.random((3, c, 4, 4), np.float32) for name, c in (("x", 1), ("x0_prev", 1), ("cond", 2))}
    assert {value.name for value in session.get_inputs()} == set(inputs)
    eps, var = session.run(["eps", "var"], inputs)
    with torch.no_grad():
        wanted = Conditioned()(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    assert np.allclose(eps, wanted[0], atol=1e-5)
    assert np.allclose(var, wanted[1], atol=1e-6)
    with pytest.raises(InputError, match="U-Net"):
        export_network(Conditioned(), spec, tmp_path / "table.onnx", time_table=True)


@every_export
def test_tensorrt_rtx_builds_it(exports, name, precision, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="not verified here: what TensorRT-RTX builds (it is not installed)")
    from ddpmx.trt import build as trt_build
    from ddpmx.trt import library as trt_library
    from oracles.engines import NO_GPU

    _, spec, file = exports[name, precision]
    built = trt_build.build(
        file, tmp_path / "model.plan", trt_build.BuildOptions(batch=(1, 2, 4)),
        library=trt_library.load("TensorRT-RTX"), devices=NO_GPU,
    )  # fmt: skip
    assert built.info.spec == spec
