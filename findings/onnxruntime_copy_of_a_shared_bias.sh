#!/bin/sh
# onnxruntime's quantize_static gives each user of a shared bias a copy of its own. The copy's name is the bias's with a number
# appended, and only other initializers are looked at for whether that is free: an activation may have it. One would guess
# that a valid model, in which every name is unique, becomes a valid model. It is written without a word, and does not load.
# Exporters that number their values (val_36, val_360) make such models.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0
cat > "$folder/check.py" <<'PY'
import logging, sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

logging.disable(logging.CRITICAL)
folder = sys.argv[1]
rng = np.random.default_rng(0)


def model(path, middle):
    weights = [numpy_helper.from_array(rng.normal(size=(4, 4, 3, 3)).astype(np.float32), name) for name in ("v", "w")]
    bias = numpy_helper.from_array(rng.normal(size=4).astype(np.float32), "bias")
    nodes = [
        helper.make_node("Conv", ["x", "v", "bias"], [middle], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", [middle, "w", "bias"], ["y"], pads=[1, 1, 1, 1]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "two", ends[:1], ends[1:], [*weights, bias])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, path)


class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


def outcome(middle):
    source, made = f"{folder}/{middle}.onnx", f"{folder}/{middle}-int8.onnx"
    model(source, middle)
    onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    quantize_static(source, made, Reader())
    try:
        onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    except Exception as error:
        return type(error).__name__
    return "loads"


seen = {middle: outcome(middle) for middle in ("between", "bias0")}
print("onnxruntime", onnxruntime.__version__, "by the name of the value between two convolutions:", seen)
sys.exit(seen["between"] != "loads" or seen["bias0"] == "loads")
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
