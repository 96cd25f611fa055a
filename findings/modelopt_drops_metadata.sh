#!/bin/sh
# nvidia-modelopt's ONNX quantiser, int8 on the CPU. One would guess that an ONNX file's metadata_props, which belong to the
# model and not to its graph, are in the quantised file as well, as after onnxsim, onnxslim and onnx's version converter. They
# are gone, without a word: the model goes through onnx_graphsurgeon, of which export_onnx(import_onnx(model)) has none. And
# one would guess that an int8 file is a quarter of the size. The weights stay float32, each followed by a QuantizeLinear and
# a DequantizeLinear, which TensorRT folds at build: the file is as large as before, and its initializers do not show that it
# is an int8 model.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# not nvidia-modelopt[onnx], which brings CUDA's packages
"$folder/venv/bin/pip" install --quiet torch==2.13.0 nvidia-modelopt==0.47.0 onnx==1.21.0 onnxruntime==1.24.4 \
  onnxscript==0.7.2 onnxconverter-common==1.16.0 onnx_graphsurgeon==0.6.1 onnxslim==0.1.98 polygraphy==0.53.6 cppimport==26.4.17 \
  lief==1.0.0 ml_dtypes==0.6.0
cat > "$folder/check.py" <<'PY'
import logging, sys

import modelopt
import numpy as np
import onnx
from modelopt.onnx.quantization import quantize
from onnx import TensorProto, helper, numpy_helper

logging.disable(logging.CRITICAL)
folder = sys.argv[1]
rng = np.random.default_rng(0)
weights = [numpy_helper.from_array(rng.normal(size=(16, 16, 3, 3)).astype(np.float32), name) for name in ("v", "w")]
nodes = [
    helper.make_node("Conv", ["x", "v"], ["h"], "first", pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["h"], ["r"], "relu"),
    helper.make_node("Conv", ["r", "w"], ["y"], "second", pads=[1, 1, 1, 1]),
]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 8, 8]) for name in ("x", "y")]
graph = helper.make_graph(nodes, "two", ends[:1], ends[1:], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
helper.set_model_props(model, {"license": "CC0"})
onnx.checker.check_model(model, full_check=True)
onnx.save(model, f"{folder}/model.onnx")
quantize(
    f"{folder}/model.onnx",
    quantize_mode="int8",
    calibration_data={"x": rng.normal(size=(4, 16, 8, 8)).astype(np.float32)},
    calibration_method="max",
    calibration_eps=["cpu"],
    high_precision_dtype="fp32",
    output_path=f"{folder}/int8.onnx",
)
made = onnx.load(f"{folder}/int8.onnx")
before, after = ({entry.key: entry.value for entry in each.metadata_props} for each in (model, made))
stored = {TensorProto.DataType.Name(tensor.data_type) for tensor in made.graph.initializer if len(tensor.dims) == 4}
operators = {node.op_type for node in made.graph.node}
sizes = [len(each.SerializeToString()) for each in (model, made)]
print("nvidia-modelopt", modelopt.__version__, "metadata before", before, "after", after)
print("weights are stored as", *stored, "and the graph has", *sorted(operators), "- bytes before and after:", *sizes)
sys.exit(after != {} or stored != {"FLOAT"} or "QuantizeLinear" not in operators)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
