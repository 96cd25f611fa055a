"""Overhead of the chain: time of S steps of the chain ÷ S bare onnxruntime calls, CIFAR network, batch 1.

    python tests/benchmarks/chain_overhead.py [--rounds 9] [--steps 12]

The bare call is onnxruntime's IO binding with the same shapes in the same session settings, not the slower
``session.run``. Chain and bare loop take turns, and the ratio is taken round by round, since the machine's speed may drift.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ddpm_export.graph.onnx_export import export_network
from ddpm_export.networks.unet import UNet, cifar10
from ddpmx import load
from ddpmx.backends.base import Buffers
from ddpmx.backends.ort import OrtBackend
from ddpmx.formats.spec import ModelSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cifar.onnx"
        torch.manual_seed(0)
        export_network(UNet(cifar10()), ModelSpec((3, 32, 32)), path)
        bare = OrtBackend(path, "eps")
        buffers = Buffers.of(1, (3, 32, 32))
        buffers.x[...] = np.random.default_rng(0).standard_normal(buffers.x.shape)
        bare.bind(buffers)

        def bare_calls() -> None:
            for _ in range(arguments.steps):
                bare.enqueue()

        with load(path) as pipeline:
            ratios = paired(lambda: pipeline.generate(1, steps=arguments.steps), bare_calls, arguments.rounds)
    median = statistics.median(ratios)
    print(f"chain ÷ bare network: median {median:.3f}, {min(ratios):.3f} … {max(ratios):.3f} (goal: at most 1.05)")


def paired(a: Callable[[], object], b: Callable[[], object], rounds: int) -> list[float]:
    """time(a) ÷ time(b), round by round, after one round to warm up."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for action in (a, b):
            begun = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - begun)
        ratios.append(seconds[0] / seconds[1])
    return ratios[1:]


if __name__ == "__main__":
    main()
