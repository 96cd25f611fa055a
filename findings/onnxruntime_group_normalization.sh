#!/bin/sh
# onnxruntime 1.32, on the CPU, and ONNX's GroupNormalization (opset 21). One would guess that it is what exporters write in its place: a
# Reshape, InstanceNormalization, a Reshape back. onnxruntime has no kernel for it and takes the operators that ONNX gives as its
# definition, in which the variance is E[x²] − E[x]² in float32: the digits cancel where the mean is large beside the standard deviation.
# With σ = 1 and a mean of 100 a normalised value is off by 7e-3, with 1000 by about 1, and with 10000 it is NaN; by
# InstanceNormalization these are 1e-5, 1e-4 and 1e-3.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.22.0 numpy==2.2.6
cat > "$folder/show.py" <<'PY'
import numpy as np, onnxruntime
from onnx import TensorProto, helper, numpy_helper

SHAPE, GROUPS = [2, 32, 16, 16], 8


def run(nodes, constants, x):
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def group(x):
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=GROUPS, epsilon=1e-5)
    return run([node], {"scale": np.ones(32, np.float32), "bias": np.zeros(32, np.float32)}, x)


def instance(x):
    nodes = [
        helper.make_node("Reshape", ["x", "grouped"], ["a"]),
        helper.make_node("InstanceNormalization", ["a", "scale", "bias"], ["b"], epsilon=1e-5),
        helper.make_node("Reshape", ["b", "whole"], ["y"]),
    ]
    constants = {"scale": np.ones(GROUPS, np.float32), "bias": np.zeros(GROUPS, np.float32)}
    return run(nodes, {**constants, "grouped": np.array([0, GROUPS, -1]), "whole": np.array(SHAPE)}, x)


rng = np.random.default_rng(0)
for mean in (0, 100, 1000, 10000):
    x = (rng.standard_normal(SHAPE) + mean).astype(np.float32)
    wide = x.astype(np.float64).reshape(SHAPE[0], GROUPS, -1)
    exact = ((wide - wide.mean(2, keepdims=True)) / np.sqrt(wide.var(2, keepdims=True) + 1e-5)).reshape(SHAPE)
    errors = [float(np.abs(norm(x) - exact).max()) for norm in (instance, group)]
    verdict = "NaN" if np.isnan(errors[1]) else "wrong" if errors[1] > 100 * errors[0] else "equal" if errors[1] < 4 * errors[0] else "?"
    print(f"{onnxruntime.__version__} mean {mean}: InstanceNormalization {errors[0]:.0e}, GroupNormalization {errors[1]:.0e}, {verdict}")
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py" | tee "$folder/seen"
grep -q "^1.32.0 mean 0: .*, equal$" "$folder/seen"
grep -q "^1.32.0 mean 100: .*, wrong$" "$folder/seen"
grep -q "^1.32.0 mean 1000: .*, wrong$" "$folder/seen"
grep -q "^1.32.0 mean 10000: .*, NaN$" "$folder/seen"
