#!/bin/sh
# ONNX Runtime's ConvInteger needs several times as long with uint8 inputs and int8 weights, as its quantiser for CPUs makes
# them, as with int8 inputs and uint8 weights, for equal sums. One would guess the reverse: its products of matrices are made
# for unsigned times signed. In ConvInteger the weights are the left operand and the pixels the right one, so it is the
# weights that have to be unsigned; signed times unsigned has no fast kernel, here slower than the float convolution.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.4
cat > "$folder/check.py" <<'PY'
import platform
import sys
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

if platform.machine() not in ("x86_64", "AMD64"):
    print("this is about x86-64")
    sys.exit(0)
random = np.random.default_rng(0)
SHAPE, KERNEL = (1, 64, 32, 32), (64, 64, 3, 3)
pixels = random.integers(-60, 60, SHAPE).astype(np.int8)
weights = random.integers(-60, 60, KERNEL).astype(np.int8)


def unsigned(array):
    return (array.astype(np.int16) + 128).astype(np.uint8)


def session(operator, x, w, zeros=()):
    constants = [numpy_helper.from_array(w, "w"), *(numpy_helper.from_array(z, f"z{i}") for i, z in enumerate(zeros))]
    names = ["x", "w", *(f"z{i}" for i in range(len(zeros)))]
    node = helper.make_node(operator, names, ["y"], pads=[1, 1, 1, 1])
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    out = TensorProto.FLOAT if operator == "Conv" else TensorProto.INT32
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", out, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), x


z8, zu = np.int8(0), np.uint8(128)
cases = {
    "float32": session("Conv", pixels.astype(np.float32), weights.astype(np.float32)),
    "uint8 inputs, int8 weights": session("ConvInteger", unsigned(pixels), weights, (zu, z8)),
    "int8 inputs, uint8 weights": session("ConvInteger", pixels, unsigned(weights), (z8, zu)),
    "uint8 inputs, uint8 weights": session("ConvInteger", unsigned(pixels), unsigned(weights), (zu, zu)),
}
answers = {name: one.run(None, {"x": x})[0] for name, (one, x) in cases.items()}
times = {name: [] for name in cases}
for _ in range(15):
    for name, (one, x) in cases.items():
        begun = time.perf_counter()
        one.run(None, {"x": x})
        times[name].append(time.perf_counter() - begun)
print("onnxruntime", onnxruntime.__version__)
least = {name: min(found) for name, found in times.items()}
for name, found in least.items():
    print(f"{name}: {1e3 * found:.2f} ms, {found / least['float32']:.2f} of float32's time")
equal = all(np.array_equal(answer, answers["float32"]) for answer in answers.values())
ratio = least["uint8 inputs, int8 weights"] / least["int8 inputs, uint8 weights"]
print(f"all sums equal: {equal}; the common order needs {ratio:.1f} times as long as the other")
sys.exit(not (equal and ratio > 2))
PY
"$folder/venv/bin/python" "$folder/check.py"
