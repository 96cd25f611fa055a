#!/bin/sh
# torch-fidelity's option for the feature extractor's numbers (--feature-extractor-internal-dtype float64, "to improve numerical
# precision") is accepted and computes in float32: its table of names maps "float64" to torch.float32. One would guess doubles,
# since the check beside it says that 32 and 64 bit floats are supported and anything else is refused. Who runs FID twice, in
# float32 and "float64", to see how many digits can be trusted, sees two equal figures and trusts all of them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
# without torchvision, which the one function that is looked at does not need
"$folder/venv/bin/pip" install --quiet --no-deps torch-fidelity==0.4.0
cat > "$folder/check.py" <<'PY'
import sys
import types
from importlib.metadata import distribution, version

import torch

package = distribution("torch-fidelity")
# the package's own modules, without its __init__, which imports torchvision
whole = types.ModuleType("torch_fidelity")
whole.__path__ = [str(package.locate_file("torch_fidelity"))]
sys.modules["torch_fidelity"] = whole
from torch_fidelity import helpers

extractor = package.locate_file("torch_fidelity/feature_extractor_inceptionv3.py").read_text()
print("torch-fidelity", version("torch-fidelity"))
asks = 'text_to_dtype(feature_extractor_internal_dtype, "float32")' in extractor
print("Inception takes its dtype from text_to_dtype:", asks)
found = {name: helpers.text_to_dtype(name, "float32") for name in ("float32", "float64")}
for name, dtype in found.items():
    print(f"{name} is computed in {dtype}")
third = torch.tensor(1 / 3, dtype=torch.float64)
print("1/3 in it:", *(f"{third.to(dtype).item():.17f}" for dtype in found.values()))
sys.exit(not asks or found["float64"] != torch.float32)
PY
"$folder/venv/bin/python" "$folder/check.py"
