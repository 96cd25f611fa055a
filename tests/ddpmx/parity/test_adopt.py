"""A file that another tool made gets its description back if it is the same model, and nothing otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: files changed by other tools (no torch)")
pytest.importorskip("onnx", reason="not verified here: files changed by other tools (no onnx)")

import onnx
from onnxruntime import quantization
from typer.testing import CliRunner

from ddpm_export.graph.onnx_export import export_network
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.proof.record import record
from ddpmx.errors import InputError, SpecError
from ddpmx.formats.describe import describe
from ddpmx.formats.onnx_file import metadata, onnx_spec, read_onnx
from ddpmx.formats.spec import BETAS, ModelSpec
from ddpmx.parity.adopt import adopt, kinship
from ddpmx.pipeline import load
from ddpmx_cli.main import app
from oracles.random_weights import rerandomise

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SPEC = ModelSpec((3, 8, 8), timesteps=20, schedule=BETAS, betas=np.linspace(0.01, 0.3, 20), weights="ab" * 32)


def unet() -> UNet:
    network = UNet(UNetConfig(3, 3, (8, 8), 16, (1, 2), 1, (), 0.0, 8)).eval().requires_grad_(False)
    rerandomise(network)
    return network


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.left = [
            {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32), "t": np.array([t], np.int32)}
            for t in range(0, 20, 3)
        ]

    def get_next(self):
        return self.left.pop() if self.left else None


def bare(path: Path, to: Path) -> Path:
    """The file without its metadata, as modelopt writes it."""
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, to)
    return to


def rounded_on_load(path: Path, to: Path) -> Path:
    """The weights of convolutions stay float32, and the graph rounds them to 8 bits, as nvidia-modelopt 0.47 writes it."""
    model = onnx.load(path)
    del model.metadata_props[:]
    graph = model.graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 4}
    graph.initializer.append(onnx.numpy_helper.from_array(np.int8(0), "zero"))
    for node in graph.node:
        for place, name in enumerate(node.input):
            if node.op_type == "Conv" and name in weights:
                node.input[place] = f"{name}_rounded"
    for name, values in reversed(weights.items()):
        scale = np.float32(np.abs(values).max() / 127)
        graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
        parts = [f"{name}_scale", "zero"]
        graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", [f"{name}_8", *parts], [f"{name}_rounded"]))
        graph.node.insert(0, onnx.helper.make_node("QuantizeLinear", [name, *parts], [f"{name}_8"]))
    onnx.save(model, to)
    return to


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder: Path = tmp_path_factory.mktemp("adopt")
    made = {"original": folder / "model.onnx", "int8": folder / "int8.onnx", "other": folder / "other.onnx"}
    export_network(unet(), SPEC, made["original"], training={"network": {}, "training": {"step": 3}})
    record(unet(), SPEC, steps=2).save(made["original"].with_suffix(".parity.npz"))
    quantization.quantize_static(str(made["original"]), str(folder / "q.onnx"), Reader(), per_channel=True)
    bare(folder / "q.onnx", made["int8"])
    made["rounded"] = rounded_on_load(made["original"], folder / "rounded.onnx")
    export_network(unet(), SPEC, folder / "h.onnx", precision="fp16")
    made["fp16"] = bare(folder / "h.onnx", folder / "half.onnx")
    other = onnx.load(made["original"])
    rng = np.random.default_rng(1)
    for tensor in other.graph.initializer:
        if (values := onnx.numpy_helper.to_array(tensor)).dtype == np.float32 and values.ndim > 1:
            tensor.CopyFrom(onnx.numpy_helper.from_array(rng.permuted(values, axis=None), tensor.name))
    onnx.save(other, folder / "o.onnx")
    bare(folder / "o.onnx", made["other"])
    return made


def copied(file: Path, folder: Path) -> Path:
    target = folder / file.name
    target.write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(("name", "precision"), [("int8", "int8"), ("rounded", "int8"), ("fp16", "fp16")])
def test_a_file_gets_spec_betas_and_record_back_and_its_graph_is_untouched(files, name, precision, tmp_path, figure):
    changed = copied(files[name], tmp_path)
    before = onnx.load(changed).graph
    note = describe(changed)["note"]
    assert "ddpmx adopt" in note
    adopted = adopt(changed, files["original"])
    figure(f"{name}: error of ε", adopted.error, at_most=0.15)
    assert adopted.alike == 1
    info = read_onnx(changed)
    spec = onnx_spec(changed, info)
    assert spec == onnx_spec(files["original"], read_onnx(files["original"])).replace(precision=precision)
    np.testing.assert_array_equal(spec.betas, SPEC.betas)
    assert describe(changed)["made_of"]["training"] == {"step": 3}
    assert onnx.load(changed).graph == before
    onnx.checker.check_model(onnx.load(changed), full_check=True)
    assert changed.with_suffix(".parity.npz").read_bytes() == files["original"].with_suffix(".parity.npz").read_bytes()
    with load(changed) as pipeline:
        assert pipeline.generate(1, seed=0).shape == (1, 8, 8, 3)
    assert adopt(changed, files["original"]).spec == spec, "a second time nothing is added"
    assert read_onnx(changed).metadata == info.metadata


def test_a_description_that_was_kept_says_the_precision_that_the_file_has_now(files, tmp_path):
    model, said = onnx.load(files["fp16"]), onnx.load(files["original"]).metadata_props
    model.metadata_props.extend([onnx.StringStringEntryProto(key="author", value="a tool"), *said])
    changed = tmp_path / "half.onnx"
    onnx.save(model, changed)
    assert onnx_spec(changed, read_onnx(changed)).precision == "fp32"  # control
    adopted = adopt(changed, files["original"])
    assert adopted.spec.precision == "fp16"
    assert adopted.spec == onnx_spec(changed, read_onnx(changed))
    again = onnx.load(changed)
    assert sorted(entry.key for entry in again.metadata_props) == sorted(["author", *(entry.key for entry in said)])
    assert again.graph == model.graph
    onnx.checker.check_model(again)


def test_another_model_is_refused_by_its_weights_and_then_by_epsilon(files, tmp_path, monkeypatch):
    changed = copied(files["other"], tmp_path)
    before = changed.read_bytes()
    assert kinship(changed, files["original"]) < 0.1
    with pytest.raises(InputError, match="its weights are not those of"):
        adopt(changed, files["original"])
    monkeypatch.setattr("ddpmx.parity.adopt.kinship", lambda changed, like: None)
    with pytest.raises(InputError, match="its ε is not that of"):
        adopt(changed, files["original"])
    assert changed.read_bytes() == before
    assert not changed.with_suffix(".parity.npz").exists()


def test_other_inputs_and_a_description_of_another_model_are_refused(files, tmp_path):
    model = onnx.load(files["int8"])
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.save(model, tmp_path / "t.onnx")
    with pytest.raises(SpecError, match="does not match the spec"):
        adopt(tmp_path / "t.onnx", files["original"])
    for name, changes in {"weights": {"weights": "cd" * 32}, "variance": {"variance": "fixed_small"}}.items():
        model = onnx.load(files["other"])
        onnx.helper.set_model_props(model, metadata(SPEC.replace(**changes)))
        onnx.save(model, tmp_path / f"{name}.onnx")
        with pytest.raises(InputError, match="describes itself already, as another model"):
            adopt(tmp_path / f"{name}.onnx", files["original"])
    with pytest.raises(InputError, match="it is the original"):
        adopt(files["int8"], files["original"], files["original"])


def test_the_command(files, tmp_path):
    done = CliRunner().invoke(
        app, ["adopt", str(files["int8"]), "--like", str(files["original"]), "-o", str(tmp_path / "mine.onnx")]
    )
    assert done.exit_code == 0, done.output
    assert "100% alike" in done.output
    assert read_onnx(tmp_path / "mine.onnx").metadata
    assert not read_onnx(files["int8"]).metadata, "with -o the file itself is left alone"
