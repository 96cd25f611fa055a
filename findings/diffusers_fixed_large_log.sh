#!/bin/sh
# diffusers' DDPMScheduler(variance_type="fixed_large_log") is one of the values that its constructor names. One would guess
# that it draws as "fixed_large" does, since a logarithm only says how the same variance is stored ("fixed_small_log" draws
# as "fixed_small" does). Every step but the last gives NaN in all pixels, without an error: the step takes the square root
# of log(beta), which is negative.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 numpy==2.2.6
cat > "$folder/check.py" <<'PY'
import sys

import diffusers
import torch

x, seen = torch.zeros(1, 1, 64, 64), {}
for kind in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"):
    scheduler, generator = diffusers.DDPMScheduler(variance_type=kind), torch.Generator().manual_seed(0)
    drawn = scheduler.step(torch.zeros_like(x), 500, x, generator=generator).prev_sample
    seen[kind] = "NaN" if torch.isnan(drawn).all() else round(drawn.std().item(), 4)
print("diffusers", diffusers.__version__, "deviation after a step at t = 500:", seen)
same = isinstance(seen["fixed_large"], float) and seen["fixed_small"] == seen["fixed_small_log"]
sys.exit(not same or seen["fixed_large_log"] != "NaN")
PY
"$folder/venv/bin/python" "$folder/check.py"
