#!/bin/sh
# torch 2.13, on the CPU. channels_last is an order in memory, so one would guess that group_norm gives the same numbers, but for rounding.
# For it the variance is taken as E[x²] − E[x]² in float32, where the contiguous kernel subtracts the mean first: the digits cancel where
# the mean is large beside the standard deviation. With σ = 1 the largest error of a normalised value, against float64, is below 1e-5
# whatever the order for a mean of 0, and for a mean of 100 it is 1e-2, of 1000 about 1, of 10000 about 1000; contiguous it is 1e-5,
# 1e-4 and 1e-3. instance_norm, and layer_norm over the same channels, do not have this.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import torch
from torch.nn.functional import group_norm

torch.manual_seed(0)
for mean in (0, 100, 1000, 10000):
    x = torch.randn(2, 32, 16, 16) + mean
    exact = group_norm(x.double(), 8)
    errors = [float((group_norm(x.to(memory_format=order), 8) - exact).abs().max()) for order in (torch.contiguous_format, torch.channels_last)]
    verdict = "equal" if errors[1] < 4 * errors[0] else "wrong" if errors[1] > 100 * errors[0] else "?"
    print(f"{torch.__version__.split('+')[0]} mean {mean}: contiguous {errors[0]:.0e}, channels_last {errors[1]:.0e}, {verdict}")
PY
"$folder/venv/bin/python" "$folder/show.py" | tee "$folder/seen"
grep -q "^2.13.0 mean 0: .*, equal$" "$folder/seen"
for mean in 100 1000 10000; do
  grep -q "^2.13.0 mean $mean: .*, wrong$" "$folder/seen"
done
