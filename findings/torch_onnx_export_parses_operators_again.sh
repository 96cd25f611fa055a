#!/bin/sh
# Each torch.onnx.export parses the Python source of all of onnxscript's operators again, some 500, also for a module of two
# layers and in a process that has just exported one: half of the time of a small export. One would guess that the registry of
# operators, which depends on neither the module nor the arguments, is made once.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2
cat > "$folder/check.py" <<'PY'
import ast
import sys
import warnings
from importlib.metadata import version

import torch

warnings.simplefilter("ignore")
module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU()).eval()
parse, parsed = ast.parse, 0


def counted(*arguments, **options):
    global parsed
    parsed += 1
    return parse(*arguments, **options)


ast.parse = counted
counts = []
for _ in range(3):
    parsed = 0
    torch.onnx.export(module, (torch.zeros(2, 4),), dynamo=True, verbose=False)
    counts.append(parsed)
print("torch", version("torch"), "onnxscript", version("onnxscript"))
print("sources parsed by three exports of one module:", counts)
sys.exit(not all(count > 400 for count in counts))
PY
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
