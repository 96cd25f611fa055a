#!/bin/sh
# diffusers' DPMSolverMultistepScheduler.step rounds the sample to float32 before the update, whatever its dtype, and returns float64. One
# would guess that a sample in double precision keeps its digits, as in UniPCMultistepScheduler and DDIMScheduler, since the dtype
# of the result says so. Who checks another implementation against it sees errors of 1e-8 to 1e-7 a step and looks for them at
# home; who compares the orders of solvers sees the error stop falling.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 numpy==2.2.6
cat > "$folder/check.py" <<'PY'
import sys

import diffusers
import torch


def after(name, x, x0):
    scheduler = getattr(diffusers, name)(prediction_type="sample")
    scheduler.set_timesteps(10)
    return scheduler.step(x0, scheduler.timesteps[0], x).prev_sample


draw = torch.Generator().manual_seed(0)
x, x0 = (torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=draw) for _ in range(2))
rounded = x.float().double()
print("diffusers", diffusers.__version__)
same = {}
for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"):
    whole, cut = after(name, x, x0), after(name, rounded, x0)
    assert whole.dtype == torch.float64, whole.dtype
    same[name] = torch.equal(whole, cut)
    print(f"{name:28} returns {whole.dtype}; the sample's digits beyond float32 are {'lost' if same[name] else 'kept'}")
sys.exit(list(same.values()) != [True, False, False])
PY
"$folder/venv/bin/python" "$folder/check.py"
