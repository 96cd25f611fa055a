#!/bin/sh
# MNN's convolutions give an image other last bits by its place in the batch: the tiles of the last images are computed by
# another kernel. One would guess, as with onnxruntime's CPU, that equal images in a batch have equal outputs, or that only
# the batch's size matters. Padding a batch to a fixed size is therefore not enough to make images reproducible.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 MNN==3.6.1 numpy==2.2.6
cat > "$folder/check.py" <<'PY'
import subprocess, sys

import MNN
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

folder, batch = sys.argv[1], 4
rng = np.random.default_rng(0)
weights = [
    numpy_helper.from_array((rng.normal(size=(16, n, 3, 3)) / (3 * n**0.5)).astype(np.float32), f"w{i}")
    for i, n in enumerate((1, 16, 16))
]
names = ["x", "a", "b", "y"]
nodes = [helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], pads=[1, 1, 1, 1]) for i in range(3)]
ends = [
    helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", c, 16, 16]) for name, c in (("x", 1), ("y", 16))
]
graph = helper.make_graph(nodes, "three", ends[:1], ends[1:], weights)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), f"{folder}/m.onnx")
convert = "import sys, _tools; _tools.mnnconvert(sys.argv)"
words = ["convert", "-f", "ONNX", "--modelFile", f"{folder}/m.onnx", "--MNNModel", f"{folder}/m.mnn", "--bizCode", "x"]
subprocess.run([sys.executable, "-c", convert, *words[1:]], check=True, capture_output=True)

x = np.repeat(rng.normal(size=(1, 1, 16, 16)).astype(np.float32), batch, axis=0)
network = MNN.Interpreter(f"{folder}/m.mnn")
session = network.createSession({"backend": "CPU", "numThread": 1})
network.resizeTensor(network.getSessionInput(session, "x"), x.shape)
network.resizeSession(session)
floats, nchw = MNN.Halide_Type_Float, MNN.Tensor_DimensionType_Caffe
network.getSessionInput(session, "x").copyFrom(MNN.Tensor(x.shape, floats, x, nchw))
network.runSession(session)
shape = (batch, 16, 16, 16)
y = MNN.Tensor(shape, floats, np.zeros(shape, np.float32), nchw)
network.getSessionOutput(session, "y").copyToHostTensor(y)
mnn = y.getNumpyData()
ort = onnxruntime.InferenceSession(f"{folder}/m.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
equal = {name: [bool(np.array_equal(out[0], out[i])) for i in range(batch)] for name, out in (("MNN", mnn), ("onnxruntime", ort))}
print(f"MNN {MNN.version()}: four equal images; outputs equal to the first one's:", equal)
print("largest difference:", float(np.abs(mnn - mnn[:1]).max()), "of", float(np.abs(mnn).max()))
sys.exit(bool(all(equal["MNN"]) or not all(equal["onnxruntime"]) or np.abs(mnn - mnn[:1]).max() > 1e-4))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
