"""TensorRT-RTX builds the shipped model in 8 bits, for real and without a GPU, and the weights in the plan have 8 bits."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx", reason="not verified here: 8 bits in a plan (no TensorRT-RTX)")

import dataclasses

import onnx

from ddpm_export.graph.onnx_export import write_graph
from ddpm_export.quantize.convolutions import convolutions, first_and_last
from ddpm_export.quantize.graph import insert, store_in_half
from ddpmx.errors import BackendError
from ddpmx.formats.onnx_file import FLOAT8E4M3FN, FLOAT16, INT8, onnx_spec, read_onnx
from ddpmx.models import shipped
from ddpmx.trt import build as trt_build
from ddpmx.trt import library as trt_library
from ddpmx.trt.precision import assert_precision

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.mark.parametrize(("precision", "kind", "target"), [("int8", INT8, "8.6"), ("fp8", FLOAT8E4M3FN, "8.9")])
def test_8_bit_weights_are_in_the_plan(tmp_path, precision, kind, target):
    path, file = shipped.find("garments"), tmp_path / "model.onnx"
    base = onnx.load(path)
    spec = onnx_spec(path, read_onnx(path)).replace(precision=precision)
    layers = {name: one for name, one in convolutions(base).items() if name not in first_and_last(base)}
    model = insert(base, layers, {one.input: 8.0 for one in layers.values()}, precision)
    store_in_half(model)
    write_graph(model, spec, file)
    info, library = read_onnx(file), trt_library.load("TensorRT-RTX")
    assert info.weights[kind] > 900_000
    built = trt_build.build(file, options=trt_build.BuildOptions(targets=(target,)), library=library)
    assert built.precision.startswith(f"{precision}: ")
    assert built.info.spec == spec
    # control: the same plan, if the graph's weights were a half or a twice as wide
    plan = file.with_suffix(".plan").read_bytes()
    for factor in (0.5, 2):
        other = {**info.weights, kind: int(info.weights[kind] * factor), FLOAT16: info.weights[FLOAT16]}
        with pytest.raises(BackendError, match="did not keep the precision"):
            assert_precision(plan, spec, dataclasses.replace(info, weights=other), library, stripped=False)
