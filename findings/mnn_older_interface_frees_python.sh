#!/bin/sh
# MNN has two Python interfaces. The newer one (nn.Module), which its documentation recommends, holds Python's lock while the
# network computes: no other thread runs, so neither a progress bar nor a second model in a thread. The older one
# (Interpreter, Session) gives the lock away. One would guess the newer one to be the better one for servers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 MNN==3.6.1 numpy==2.2.6
cat > "$folder/check.py" <<'PY'
import subprocess, sys, threading, time

import MNN
import MNN.expr as expr
import MNN.nn as nn
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

folder = sys.argv[1]
rng = np.random.default_rng(0)
weights = [numpy_helper.from_array(rng.normal(size=(64, 64, 3, 3)).astype(np.float32) / 24, f"w{i}") for i in range(8)]
nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], pads=[1, 1, 1, 1]) for i in range(8)]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64, 256, 256]) for name in ("x0", "x8")]
graph = helper.make_graph(nodes, "eight", ends[:1], ends[1:], weights)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), f"{folder}/m.onnx")
convert = "import sys, _tools; _tools.mnnconvert(sys.argv)"
words = ["-f", "ONNX", "--modelFile", f"{folder}/m.onnx", "--MNNModel", f"{folder}/m.mnn", "--bizCode", "x"]
subprocess.run([sys.executable, "-c", convert, *words], check=True, capture_output=True)
x = rng.normal(size=(1, 64, 256, 256)).astype(np.float32)

module = nn.load_module_from_file(f"{folder}/m.mnn", ["x0"], ["x8"], thread_num=1)
network = MNN.Interpreter(f"{folder}/m.mnn")
session = network.createSession({"backend": "CPU", "numThread": 1})
variable = expr.const(x, list(x.shape), expr.NCHW)


def newer():
    expr.convert(module.forward(variable), expr.NCHW).read()


def older():
    network.runSession(session)


def ticks(run):
    """How often another thread gets to run per second of a call."""
    run()
    count, stop = [0], threading.Event()

    def tick():
        while not stop.wait(0.0005):
            count[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    begun = time.perf_counter()
    run()
    seconds, seen = time.perf_counter() - begun, count[0]
    stop.set()
    thread.join()
    return round(seen / seconds), round(seconds, 2)


found = {name: ticks(run) for name, run in (("nn.Module", newer), ("Interpreter", older))}
print(f"MNN {MNN.version()}: (turns of another thread per second of a call, seconds):", found)
sys.exit(not (found["nn.Module"][0] * 10 < found["Interpreter"][0] and found["Interpreter"][0] > 50))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
