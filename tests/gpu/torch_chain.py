"""Runs and measures the chain of a checkpoint with torch as its network: the chain alone, where no TensorRT runs.

    python tests/gpu/torch_chain.py RUN BENCH.json SPEED.json [--batch 1,64] [--images 256] [--steps S]

torch's kernels are captured in the chain's stream, in fp16 as for an export. First every executor has to give the images of
the chain in NumPy; then the chain is measured as `ddpmx bench` does it, and IMAGES images as by speed.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `gpu`, wherever this is started

from ddpmx.backends.base import EXECUTORS, CopyingBackend
from ddpmx.bench.figures import Settings
from ddpmx.bench.gpu import DeviceBench
from ddpmx.device.driver import Driver
from ddpmx.errors import DdpmxError
from ddpmx.parity import on_device
from ddpmx.pipeline import Pipeline
from gpu.speed import measure
from gpu.torch_network import TorchDevice, of_checkpoint

METHOD = [
    "torch computes the network, and no engine: these figures tell what the chain costs, not how fast a plan is.",
    "A step is the network, the step's noise and the update, timed by events in the chain's stream.",
    "Chain ÷ net: against the same network, captured alone in a graph and launched as often in the same stream, in turns "
    "with the chain; median over the chains.",
]


def main(
    arguments: Sequence[str] | None = None,
    *,
    driver: Driver | None = None,
    make: Callable[..., TorchDevice] = TorchDevice,
    where: str = "cuda",
) -> None:
    """Write both files.

    Args:
        arguments: the command line.
        driver: the GPU; by default one of its own.
        make: makes the network's device.
        where: torch's name for it.

    Raises:
        DdpmxError: something fails, or the images of an executor are not NumPy's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("bench", type=Path)
    parser.add_argument("speed", type=Path)
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args(arguments)
    import torch

    batches, begun = [int(n) for n in options.batch.split(",")], time.perf_counter()
    with driver or Driver() as opened:
        with opened.current():
            free = opened.free_memory()[0]
        spec, call = of_checkpoint(options.run, "fp16", where)
        device = make(opened, torch, spec, call, largest=max(*batches, options.images))
        load_s = time.perf_counter() - begun
        backend = CopyingBackend(device)
        for check in on_device.checks(backend, spec):
            print(check, flush=True)
            if not (check.passed or check.skipped):
                raise DdpmxError(f"{device.description}: {check}")
        bench = DeviceBench(device, spec, Settings(options.seconds), backend=backend, free_before=free)
        cells = [bench.measure(batch, executor) for batch in batches for executor in EXECUTORS[::-1]]
        report = {
            "file": {"runs_on": device.description, "load_s": load_s},
            "cells": [cell.to_json() for cell in cells],
            "left_out": [],
            "method": METHOD,
        }
        options.bench.write_text(json.dumps(report, indent=1))
        sampling = {} if options.steps is None else {"steps": options.steps}
        with Pipeline(spec, backend) as pipeline:
            found = measure(pipeline, "torch", options.images, rounds=1, **sampling)
        options.speed.write_text(json.dumps(found, indent=1))
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    try:
        main()
    except DdpmxError as error:
        sys.exit(f"Error: {error}")
