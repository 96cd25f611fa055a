"""The PyTorch side of tests/benchmarks/native.py, run in processes of its own.

python tests/benchmarks/native_torch.py make FOLDER    the demo's U-Net with random weights: unet.onnx and unet.pt
python tests/benchmarks/native_torch.py run unet.pt    load the weights, and run the network once
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ddpm_export.networks.unet import UNet, UNetConfig

DEMO = UNetConfig(1, 1, (16, 16), 32, (1, 2, 2), 1, (8,), 0.0, 8)


def make(folder: Path) -> None:
    from ddpm_export.graph.onnx_export import export_network
    from ddpmx.formats.spec import ModelSpec

    torch.manual_seed(0)
    network = UNet(DEMO).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    export_network(network, ModelSpec((1, 16, 16)), folder / "unet.onnx")
    torch.save(network.state_dict(), folder / "unet.pt")


def run(weights: Path) -> None:
    torch.set_num_threads(1)
    network = UNet(DEMO).eval()
    network.load_state_dict(torch.load(weights))
    with torch.inference_mode():
        network(torch.randn(1, 1, 16, 16), torch.tensor([999]))


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](Path(sys.argv[2]))
