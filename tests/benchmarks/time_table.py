"""Measures ``export --time-table``: speed, size and error, CIFAR network, batches of 1 and 8.

python tests/benchmarks/time_table.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from chain_overhead import paired

from ddpm_export.graph.onnx_export import export_network
from ddpm_export.networks.unet import UNet, cifar10
from ddpmx.backends.base import Buffers
from ddpmx.backends.ort import OrtBackend
from ddpmx.formats.spec import ModelSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    network, spec = UNet(cifar10()), ModelSpec((3, 32, 32))
    for parameter in network.parameters():  # layers that begin near zero would hide differences
        torch.nn.init.normal_(parameter, std=0.05)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("computed.onnx", "table.onnx")]
        for path, table in zip(paths, (False, True), strict=True):
            export_network(network, spec, path, time_table=table)
        sizes = [path.stat().st_size / 1e6 for path in paths]
        print(f"file: {sizes[0]:.1f} MB computed, {sizes[1]:.1f} MB with the table")
        for batch in (1, 8):
            runs, outputs = [], []
            for path in paths:
                backend, buffers = OrtBackend(path, "eps"), Buffers.of(batch, spec.shape)
                buffers.x[...] = np.random.default_rng(0).standard_normal(buffers.x.shape)
                buffers.t[...] = 500
                backend.bind(buffers)
                backend.enqueue()
                runs.append(backend)
                outputs.append(buffers.out.copy())
            ratio = statistics.median(paired(runs[1].enqueue, runs[0].enqueue, rounds))
            apart = np.abs(outputs[1] - outputs[0]).max() / np.abs(outputs[0]).max()
            print(f"batch {batch}: time of table ÷ computed {ratio:.3f}, outputs differ by {apart:.1e} of the largest")


if __name__ == "__main__":
    main()
