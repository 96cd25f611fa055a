#!/bin/sh
# torch 2.13, on the CPU. Adam keeps two moments for each weight. How a tensor lies in memory (contiguous or channels_last) is a matter of
# speed, and one would guess that fused=True gives what fused=False gives, but for rounding. It pairs weights, gradients and moments by
# their place in memory: if a network becomes channels_last after its first step, or if moments are loaded that are contiguous, each
# convolution's weights are moved by other weights' moments, and no error is raised. Below, the largest difference between the two after
# one more step: that of rounding where the layouts agree, more than the learning rate of 0.01 where they do not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import torch


def trained(fused, change):
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 4, 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, fused=fused)
    x = torch.randn(2, 4, 8, 8)
    for step in range(4):
        if step == 3:
            optimizer = change(network, optimizer, fused)
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
    return network.weight.detach()


def nothing(network, optimizer, fused):
    return optimizer


def channels_last(network, optimizer, fused):
    network.to(memory_format=torch.channels_last)
    return optimizer


def resumed(network, optimizer, fused):
    """A new optimizer with the state of the old one, for a network that is channels_last."""
    state = optimizer.state_dict()
    network.to(memory_format=torch.channels_last)
    again = torch.optim.Adam(network.parameters(), lr=0.01, fused=fused)
    again.load_state_dict(state)
    return again


for change in (nothing, channels_last, resumed):
    apart = float((trained(True, change) - trained(False, change)).abs().max())
    verdict = "rounding" if apart < 1e-6 else "more than the learning rate" if apart > 0.01 else "?"
    print(f"{torch.__version__.split('+')[0]} {change.__name__}: {apart:.1e}, {verdict}")
PY
"$folder/venv/bin/python" "$folder/show.py" | tee "$folder/seen"
grep -q "^2.13.0 nothing: .*, rounding$" "$folder/seen"
grep -q "^2.13.0 channels_last: .*, more than the learning rate$" "$folder/seen"
grep -q "^2.13.0 resumed: .*, more than the learning rate$" "$folder/seen"
