#!/bin/sh
# diffusers 0.42.1. DDPMScheduler.add_noise makes x_t = √ᾱ x_0 + √(1 − ᾱ) ε in the images' type, and one would guess that in bfloat16 its
# coefficients are off by a rounding, some 0.4 %. ᾱ itself is rounded before it is taken from 1: it is near 1 at small t, where bfloat16
# has steps of 0.004. With the schedule of the paper (T = 1000, linear) the images of t = 0 … 9 get no noise at all, and at 25 of the t its
# standard deviation is off by more than 5 %; with that of Stable Diffusion t = 0 and 1 get none. In float16 it is t = 0 and 1 of the
# paper's. A training loop that casts its images to the type of mixed precision first asks the network for noise that is not there.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import diffusers, torch

t = torch.arange(1000)
paper = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
latent = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
for name, schedule in (("the paper", paper), ("Stable Diffusion", latent)):
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        scheduler = diffusers.DDPMScheduler(1000, **schedule)
        exact = (1 - scheduler.alphas_cumprod.double()).sqrt()
        zeros, ones = torch.zeros(1000, 1, dtype=kind), torch.ones(1000, 1, dtype=kind)
        sigma = scheduler.add_noise(zeros, ones, t)[:, 0].double()  # of x_0 = 0 and ε = 1: √(1 − ᾱ)
        off = int(((sigma / exact - 1).abs() > 0.05).sum())
        print(f"{diffusers.__version__} {name}, {str(kind)[6:]}: no noise at {int((sigma == 0).sum())} of 1000 t, off by over 5 % at {off}")
PY
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null | tee "$folder/seen"
for line in "the paper, float32: no noise at 0 of 1000 t, off by over 5 % at 0" "the paper, float16: no noise at 2 of 1000 t, off by over 5 % at 6" \
  "the paper, bfloat16: no noise at 10 of 1000 t, off by over 5 % at 25" "Stable Diffusion, float32: no noise at 0 of 1000 t, off by over 5 % at 0" \
  "Stable Diffusion, bfloat16: no noise at 2 of 1000 t, off by over 5 % at 12"; do
  grep -qx "0.42.1 $line" "$folder/seen"
done
