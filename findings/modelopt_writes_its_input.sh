#!/bin/sh
# nvidia-modelopt's ONNX quantiser with an output_path of its own. One would guess that its input is only read. It is written
# as well: afterwards the input file has the shapes that were inferred of the values in between, another hash, and another
# date. It calls onnx.shape_inference.infer_shapes_path(path), which writes to its first path where there is no second.
# Give it a copy.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# not nvidia-modelopt[onnx], which brings CUDA's packages
"$folder/venv/bin/pip" install --quiet torch==2.13.0 nvidia-modelopt==0.47.0 onnx==1.21.0 onnxruntime==1.24.4 \
  onnxscript==0.7.2 onnxconverter-common==1.16.0 onnx_graphsurgeon==0.6.1 onnxslim==0.1.98 polygraphy==0.53.6 cppimport==26.4.17 \
  lief==1.0.0 ml_dtypes==0.6.0
cat > "$folder/check.py" <<'PY'
import logging, pathlib, sys

import modelopt
import numpy as np
import onnx
from modelopt.onnx.quantization import quantize
from onnx import TensorProto, helper, numpy_helper

logging.disable(logging.CRITICAL)
source = pathlib.Path(sys.argv[1], "model.onnx")
rng = np.random.default_rng(0)
weight = numpy_helper.from_array(rng.normal(size=(16, 16, 3, 3)).astype(np.float32), "w")
nodes = [
    helper.make_node("Conv", ["x", "w"], ["h"], "conv", pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["h"], ["y"], "relu"),
]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16, 8, 8]) for name in ("x", "y")]
graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, source)
before = source.read_bytes()
quantize(
    str(source),
    quantize_mode="int8",
    calibration_data={"x": rng.normal(size=(4, 16, 8, 8)).astype(np.float32)},
    calibration_method="max",
    calibration_eps=["cpu"],
    high_precision_dtype="fp32",
    output_path=str(source.with_name("int8.onnx")),
)
added = [value.name for value in onnx.load(source).graph.value_info]
print("nvidia-modelopt", modelopt.__version__, "bytes of the input before and after:", len(before), source.stat().st_size)
print("value_info in it now:", added, "output written:", source.with_name("int8.onnx").exists())
sys.exit(source.read_bytes() == before)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
