#!/bin/sh
# TensorRT-RTX 1.7.1. It builds for compute capability 7.5 (Turing), and one would guess that what it cannot do there are newer types, such
# as bfloat16. It is float32: a multiplication of float32 matrices does not build for 7.5, and of float16 ones it does; for 8.0 both do.
# A float32 convolution builds for 7.5 as well. So a float32 network with one Gemm, or one attention, has no plan for Turing.
# No GPU is needed: the engines are built, not run.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorrt-rtx-cu13==1.7.1.116 onnx==1.22.0 numpy==2.2.6
cat > "$folder/show.py" <<'PY'
import numpy as np, tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
TYPES = {"float32": (TensorProto.FLOAT, np.float32), "float16": (TensorProto.FLOAT16, np.float16)}


def builds(kind, target, node, shape, weights):
    onnx_type, numpy_type = TYPES[kind]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx_type, ["batch", *shape])],
        [helper.make_tensor_value_info("y", onnx_type, None)],
        [numpy_helper.from_array(np.full(weights, 0.01, numpy_type), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *((n, *shape) for n in (1, 4, 8)))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config) is not None


matmul = helper.make_node("MatMul", ["x", "w"], ["y"])
conv = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
for target in ("SM75", "SM80"):
    for kind in TYPES:
        found = builds(kind, target, matmul, (64, 32), (32, 64)), builds(kind, target, conv, (32, 16, 16), (32, 32, 3, 3))
        print(trt.__version__, target, kind, "MatMul: {}, Conv: {}".format(*("builds" if each else "fails" for each in found)))
PY
"$folder/venv/bin/python" "$folder/show.py" | tee "$folder/seen"
grep -q "SM75 float32 MatMul: fails, Conv: builds$" "$folder/seen"
for case in "SM75 float16" "SM80 float32" "SM80 float16"; do
  grep -q "$case MatMul: builds, Conv: builds$" "$folder/seen"
done
