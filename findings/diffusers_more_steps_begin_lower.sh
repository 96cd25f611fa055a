#!/bin/sh
# diffusers 0.42.1. set_timesteps(S) spreads S steps over T = 1000, and one would guess that more steps only make the gaps smaller. With
# timestep_spacing="leading" the gap is the whole number T // S, and the steps begin at 0: for S = 500 the chain goes from t = 998, but for
# S = 501 … 999 the gap is 1, and it goes from t = S − 1. With 501 steps it begins at t = 500 with pure noise, where the network has only
# seen states that are a quarter image (√ᾱ = 0.28 with the paper's schedule); likewise 334 steps begin at t = 666. No error and no warning.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet diffusers==0.42.1 torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import diffusers

for spacing in ("leading", "trailing"):
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing=spacing)
    for steps in (250, 333, 334, 500, 501, 999):
        scheduler.set_timesteps(steps)
        first = int(scheduler.timesteps[0])
        kept = float(scheduler.alphas_cumprod[first]) ** 0.5
        print(f"{diffusers.__version__} {spacing}: {steps} steps begin at t = {first}, where √ᾱ = {kept:.2f}")
PY
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null | tee "$folder/seen"
for line in "250 steps begin at t = 996, where √ᾱ = 0.01" "334 steps begin at t = 666, where √ᾱ = 0.10" "500 steps begin at t = 998, where √ᾱ = 0.01" \
  "501 steps begin at t = 500, where √ᾱ = 0.28"; do
  grep -qx "0.42.1 leading: $line" "$folder/seen"
done
grep -qx "0.42.1 trailing: 501 steps begin at t = 999, where √ᾱ = 0.01" "$folder/seen"
