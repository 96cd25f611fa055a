#!/bin/sh
# MNN computes a large 1×1 convolution as one matrix product over all pixels of the batch, by Strassen's algorithm: it adds
# rows of one image to rows of another before it multiplies. The last bits of an image's output then depend on the *content*
# of the other images in the batch. One would guess that images in a batch are computed independently, so that at most
# their number or place matters. A column of padding at the convolution makes MNN take another way.
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

folder, batch, width = sys.argv[1], 4, 512
rng = np.random.default_rng(0)
weight = numpy_helper.from_array((rng.normal(size=(width, width, 1, 1)) / width**0.5).astype(np.float32), "w")


def network(padded):
    name = f"{folder}/{padded}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", width, 16, 17 if padded and n == "y" else 16]) for n in "xy"]
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[0, 0, 0, int(padded)], kernel_shape=[1, 1])
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), f"{name}.onnx")
    words = ["-f", "ONNX", "--modelFile", f"{name}.onnx", "--MNNModel", f"{name}.mnn", "--bizCode", "x"]
    subprocess.run([sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)", *words], check=True, capture_output=True)
    made = MNN.Interpreter(f"{name}.mnn")
    session = made.createSession({"backend": "CPU", "numThread": 1})
    made.resizeTensor(made.getSessionInput(session, "x"), (batch, width, 16, 16))
    made.resizeSession(session)

    def run(x):
        floats, nchw = MNN.Halide_Type_Float, MNN.Tensor_DimensionType_Caffe
        made.getSessionInput(session, "x").copyFrom(MNN.Tensor(x.shape, floats, x, nchw))
        made.runSession(session)
        output = made.getSessionOutput(session, "y")
        shape = tuple(output.getShape())
        y = MNN.Tensor(shape, floats, np.zeros(shape, np.float32), nchw)
        output.copyToHostTensor(y)
        return y.getNumpyData().copy()

    return run


first = rng.normal(size=(batch, width, 16, 16)).astype(np.float32)
other = rng.normal(size=first.shape).astype(np.float32)
other[0] = first[0]  # the same image at the same place, beside other images
change = {}
for padded in (False, True):
    run = network(padded)
    assert np.array_equal(run(first), run(first))
    change["padded" if padded else "as it is"] = float(np.abs(run(first)[0] - run(other)[0]).max())
print(f"MNN {MNN.version()}: how far an image's output moves when its neighbours change:", change)
sys.exit(not (0 < change["as it is"] < 1e-3 and change["padded"] == 0))
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
