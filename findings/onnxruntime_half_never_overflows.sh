#!/bin/sh
# onnxruntime 1.32, on the CPU. A float16 model whose value in between exceeds 65504 has an infinity there, and one would guess that
# running the file on a CPU shows it. Its CPU kernels are of float32: casts are put around each node, and those between two nodes are
# taken away again, with all optimisations disabled as well. So 300 · 300 · 0.001 is 90, where half precision has inf · 0.001 = inf: a
# file that overflows on every GPU passes its test on a CPU. Marked as an output of the graph, the value in between is infinite.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.22.0 numpy==2.2.6
cat > "$folder/show.py" <<'PY'
import numpy as np, onnxruntime
from onnx import TensorProto, helper

HALF = TensorProto.FLOAT16
x = np.array([300], np.float16)


def value(name):
    return helper.make_tensor_value_info(name, HALF, [1])


def run(outputs, level):
    nodes = [helper.make_node("Mul", ["x", "x"], ["square"]), helper.make_node("Mul", ["square", "k"], ["y"])]
    constants = [helper.make_tensor("k", HALF, [], [0.001])]
    graph = helper.make_graph(nodes, "g", [value("x")], [value(name) for name in outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [float(array[0]) for array in session.run(None, {"x": x})]


with np.errstate(over="ignore"):
    print("float16 by NumPy:", float((x * x * np.float16(0.001))[0]))
levels = onnxruntime.GraphOptimizationLevel
for name, level in (("no", levels.ORT_DISABLE_ALL), ("all", levels.ORT_ENABLE_ALL)):
    (y,) = run(["y"], level)
    print(f"{onnxruntime.__version__}, {name} optimisations: y = {y:.1f}; with the square as an output:", *run(["square"], level))
PY
"$folder/venv/bin/python" "$folder/show.py" | tee "$folder/seen"
grep -qx "float16 by NumPy: inf" "$folder/seen"
for level in no all; do
  grep -qx "1.32.0, $level optimisations: y = 90.1; with the square as an output: inf" "$folder/seen"
done
