#!/bin/sh
# diffusers' DDPMScheduler(variance_type="learned") takes the model's second output as the variance itself: sigma is its square
# root. In Ho's code and in OpenAI's (ModelVarType.LEARNED), from which the name comes, that output is the logarithm of the
# variance, and one would guess so, since a network's output may be negative: here a negative one gives NaN.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 numpy==2.2.6
cat > "$folder/check.py" <<'PY'
import math, sys

import diffusers
import torch

scheduler = diffusers.DDPMScheduler(variance_type="learned", clip_sample=False)
x = torch.zeros(1, 1, 64, 64)


def sigma(second):
    """Of one reverse step at t = 500, by its own noise: two equal steps but for the second output."""
    steps = []
    for value in (0.0, second):
        output = torch.cat([torch.zeros_like(x), torch.full_like(x, value)], dim=1)
        generator = torch.Generator().manual_seed(0)
        steps.append(scheduler.step(output, 500, x, generator=generator).prev_sample)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return ((steps[1] - steps[0]) / z).median().item()


seen = {second: sigma(second) for second in (0.04, 1.0, -3.0)}
print("diffusers", diffusers.__version__, "sigma by the second output:", seen)
right = abs(seen[0.04] - 0.2) < 1e-4 and abs(seen[1.0] - 1) < 1e-4 and math.isnan(seen[-3.0])
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/check.py"
