#!/bin/sh
# QuantizeLinear in onnxruntime before 1.30, on the CPU. ONNX says: x / scale is rounded, half to even, and saturated. So it is for
# float32; one would guess that a float16 input gives the same integers where both types hold the numbers exactly. Up to 1.29 the
# fraction of a float16 input is cut off instead: 1.9 becomes 1, and -0.75 becomes 0, whatever the optimisation level. A Q/DQ model with
# half precision between its 8 bits so has every activation pulled towards zero by half a step on average, and no error is reported.
# 1.30 rounds.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/show.py" <<'PY'
import numpy as np, onnxruntime
from onnx import TensorProto, helper

options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
x = np.array([0.25, 0.75, 1.9, 2.5, -0.75, -1.9, 100.5, -3.5])
for kind, numpy_kind in ((TensorProto.FLOAT, np.float32), (TensorProto.FLOAT16, np.float16)):
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "rounding",
        [helper.make_tensor_value_info("x", kind, [len(x)])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [len(x)])],
        [helper.make_tensor("scale", kind, [], [1.0]), helper.make_tensor("zero", TensorProto.INT8, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.astype(numpy_kind)})
    print(f"{onnxruntime.__version__} {np.dtype(numpy_kind)}:", *y)
PY
for version in 1.29.0 1.30.0; do
  "$folder/venv/bin/pip" install --quiet "onnxruntime==$version" onnx==1.22.0 numpy==2.2.6
  "$folder/venv/bin/python" "$folder/show.py" | tee -a "$folder/seen"
done
rounded="0 1 2 2 -1 -2 100 -4"
grep -qx "1.29.0 float32: $rounded" "$folder/seen"
grep -qx "1.29.0 float16: 0 0 1 2 0 -1 100 -3" "$folder/seen"
grep -qx "1.30.0 float32: $rounded" "$folder/seen"
grep -qx "1.30.0 float16: $rounded" "$folder/seen"
