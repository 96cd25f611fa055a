#!/bin/sh
# MNN's converter does not look at whether its writes succeed: where a file may not grow any more, as on a full disk, it prints
# "Converted Success!" and ends with 0, and what it leaves is a file that was cut short. One would guess that a converter
# that ends with 0 has written its output. (Here the limit is the process's own, RLIMIT_FSIZE.)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 MNN==3.6.1 numpy==2.2.6
cat > "$folder/check.py" <<'PY'
import os, resource, signal, subprocess, sys

import MNN
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

folder, limit = sys.argv[1], 1 << 20
weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(256, 256, 3, 3)).astype(np.float32), "w")
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 256, 8, 8]) for name in ("x", "y")]
node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
graph = helper.make_graph([node], "one", ends[:1], ends[1:], [weight])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), f"{folder}/m.onnx")


def full():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with EFBIG, as it fails with ENOSPC on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def convert(name, before=None):
    words = ["-f", "ONNX", "--modelFile", f"{folder}/m.onnx", "--MNNModel", f"{folder}/{name}.mnn", "--bizCode", "x"]
    code = "import sys, _tools; _tools.mnnconvert(sys.argv)"
    done = subprocess.run([sys.executable, "-c", code, *words], preexec_fn=before, capture_output=True, text=True)
    return done.returncode, os.path.getsize(f"{folder}/{name}.mnn"), "Converted Success!" in done.stdout + done.stderr


found = {"with room": convert("whole"), "without": convert("cut", full)}
print(f"MNN {MNN.version()}: (exit code, bytes written, whether it says success):", found)
whole, cut = found.values()
sys.exit(not (whole[0] == cut[0] == 0 and cut[1] <= limit < whole[1] and cut[2]))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
