#!/bin/sh
# torch 2.13, ml_dtypes 0.6 and onnxruntime 1.32, on the CPU. float8_e4m3fn has no infinity and ends at 448, and one would guess that the
# three convert a float32 to it alike, as they do to float16. Above 464 ml_dtypes, which NumPy uses for this type, gives NaN, and torch and
# onnxruntime give 448, torch for infinity as well: an overflow that is looked for by isnan is found in one and not in the others. To
# float8_e5m2, which has an infinity, torch and ml_dtypes give that, and onnxruntime the largest number, 57344.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 ml_dtypes==0.6.0 onnxruntime==1.32.0 onnx==1.22.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import ml_dtypes, numpy as np, onnxruntime, torch
from onnx import TensorProto, helper


def by_torch(x, kind):
    return torch.from_numpy(x).to(getattr(torch, kind)).float().numpy()


def by_ml_dtypes(x, kind):
    return x.astype(getattr(ml_dtypes, kind)).astype(np.float32)


def by_onnxruntime(x, kind):
    to = {"float8_e4m3fn": TensorProto.FLOAT8E4M3FN, "float8_e5m2": TensorProto.FLOAT8E5M2}[kind]
    nodes = [helper.make_node("Cast", ["x"], ["q"], to=to), helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x)]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


for kind, numbers in (("float8_e4m3fn", [448, 460, 470, 1000, np.inf]), ("float8_e5m2", [57344, 1e5, np.inf])):
    for convert in (by_torch, by_ml_dtypes, by_onnxruntime):
        with np.errstate(all="ignore"):
            print(kind, f"{convert.__name__}:", *convert(np.array(numbers, np.float32), kind))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py" | tee "$folder/seen"
grep -qx "float8_e4m3fn by_torch: 448.0 448.0 448.0 448.0 448.0" "$folder/seen"
grep -qx "float8_e4m3fn by_ml_dtypes: 448.0 448.0 nan nan nan" "$folder/seen"
grep -qx "float8_e4m3fn by_onnxruntime: 448.0 448.0 448.0 448.0 448.0" "$folder/seen"
grep -qx "float8_e5m2 by_torch: 57344.0 inf inf" "$folder/seen"
grep -qx "float8_e5m2 by_ml_dtypes: 57344.0 inf inf" "$folder/seen"
grep -qx "float8_e5m2 by_onnxruntime: 57344.0 57344.0 57344.0" "$folder/seen"
