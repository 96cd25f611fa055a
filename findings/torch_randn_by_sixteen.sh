#!/bin/sh
# torch 2.13, on the CPU. A generator is a stream of numbers, so one would guess that with the same seed torch.randn(a) is the beginning
# of torch.randn(b) for a < b, as it is for torch.rand: then the first image of a seed does not depend on how many are drawn with it.
# It is so if a and b are multiples of 16. Otherwise the last 16 numbers are drawn once more, and below 16 numbers another order is used:
# images of 28×28 pixels (784 = 49 · 16) keep their noise in any batch, of images of 5×5×3 the first one shares 59 of its 75 numbers
# with the first of two, and randn(16) shares one number with randn(17).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import torch


def equal(draw, a, b):
    """How many of the first ``a`` numbers are the same in a tensor of ``b``."""
    first, second = (draw(n, generator=torch.Generator().manual_seed(0)) for n in (a, b))
    return int((first == second[:a]).sum())


for draw in (torch.randn, torch.rand):
    for a, b in ((784, 1568), (75, 150), (16, 17), (8, 16)):
        print(torch.__version__.split("+")[0], draw.__name__, f"{a} of {b}:", equal(draw, a, b), "equal")
PY
"$folder/venv/bin/python" "$folder/show.py" | tee "$folder/seen"
for line in "randn 784 of 1568: 784" "randn 75 of 150: 59" "randn 16 of 17: 1" "randn 8 of 16: 0" "rand 784 of 1568: 784" "rand 75 of 150: 75" \
  "rand 16 of 17: 16" "rand 8 of 16: 8"; do
  grep -qx "2.13.0 $line equal" "$folder/seen"
done
