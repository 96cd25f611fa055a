#!/bin/sh
# MNN's converter gives each file a random number (mnn_uuid): the same ONNX file converted twice, by the same version with the
# same options, gives two files with other hashes. One would guess that a converter is a function, as a build cache by hash
# needs it to be.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 MNN==3.6.1 numpy==2.2.6
cat > "$folder/check.py" <<'PY'
import subprocess, sys

import MNN
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

folder = sys.argv[1]
weight = numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w")
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "y")]
graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], "one", ends[:1], ends[1:], [weight])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), f"{folder}/m.onnx")
made = []
for name in ("a", "b"):
    words = ["-f", "ONNX", "--modelFile", f"{folder}/m.onnx", "--MNNModel", f"{folder}/{name}.mnn", "--bizCode", "x"]
    subprocess.run([sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)", *words], check=True, capture_output=True)
    made.append(open(f"{folder}/{name}.mnn", "rb").read())
numbers = [MNN.get_model_uuid(f"{folder}/{name}.mnn") for name in ("a", "b")]
rest = [data.replace(number.encode(), b"") for data, number in zip(made, numbers)]
print(f"MNN {MNN.version()}: two conversions equal: {made[0] == made[1]}; without their numbers {numbers}: {rest[0] == rest[1]}")
sys.exit(made[0] == made[1] or rest[0] != rest[1] or not all(numbers))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
