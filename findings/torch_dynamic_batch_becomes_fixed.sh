#!/bin/sh
# torch.onnx.export(dynamo=True) with dynamic_shapes that name the batch. Where the module needs the batch as a number
# (chunk(2) of a doubled batch, as classifier-free guidance is often written), torch.export.export raises "Constraints
# violated (batch)". One would guess that the ONNX export, which calls it, fails too. It tries again with the constraint that
# torch suggests, succeeds, and the file takes a batch of exactly the example's size: input [2, 3] where [batch, 3] was asked
# for. No exception; look at the graph's inputs after every export.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2
cat > "$folder/check.py" <<'PY'
import sys

import torch


class Guided(torch.nn.Module):
    def forward(self, x):
        with_class, without = torch.cat([x, x]).chunk(2)
        return 2 * with_class - without


class Plain(torch.nn.Module):
    def forward(self, x):
        return 2 * x


example, asked = (torch.zeros(2, 3),), ({0: torch.export.Dim("batch", min=1)},)


def dims(module):
    program = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=asked, verbose=False)
    shape = program.model_proto.graph.input[0].type.tensor_type.shape
    return [dim.dim_param or dim.dim_value for dim in shape.dim]


try:
    torch.export.export(Guided(), example, dynamic_shapes=asked)
    alone = "exports"
except Exception as error:
    alone = type(error).__name__
seen = {"torch.export of it": alone, "plain": dims(Plain()), "guided": dims(Guided())}
print("torch", torch.__version__, seen)
sys.exit(seen != {"torch.export of it": "UserError", "plain": ["batch", 3], "guided": [2, 3]})
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
