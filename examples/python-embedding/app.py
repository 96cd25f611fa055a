"""Draws images in a chain on a thread of its own. The main thread stays free; here it only writes files.

    python app.py model.onnx frames                       # or model.plan, on a GPU
    python app.py model.onnx frames --every 10            # and a preview of every tenth step
    python app.py model.onnx frames --patience 0.5        # give up after so many seconds, and go on with the next seed

Exit codes: 130 after Ctrl-C, 2 if the model cannot be run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from worker import Ended, Frame, HostMemory, Memory, Preview, TorchMemory, Worker

from ddpmx.errors import Cancelled, DdpmxError
from ddpmx.images import writers
from ddpmx.sampling.pixels import to_nhwc

CPU = 1  # in DLPack
TICK = 0.02  # seconds; how often a program checks for something to show


def memory_for(path: Path) -> Memory:
    """The GPU's memory for a plan, if PyTorch can use the GPU; else the host's, to which ddpmx copies."""
    if path.suffix == ".plan":
        try:
            return TorchMemory()
        except (ImportError, AssertionError, RuntimeError) as error:
            print(f"images on the host, since PyTorch has no GPU here: {error}", file=sys.stderr)
    return HostMemory()


def pixels(frame: Frame, memory: Memory) -> NDArray[np.uint8]:
    """The first image of a frame, on the host."""
    if frame.array.__dlpack_device__()[0] == CPU:
        return np.from_dlpack(frame.array)[0].copy()
    import torch

    with torch.cuda.stream(memory.stream):  # the same memory: the first copy is made here
        return torch.from_dlpack(frame.array)[0].cpu().numpy()


def run(worker: Worker, options: argparse.Namespace) -> None:
    jobs = deque(
        worker.submit(seed, every=options.every, steps=options.steps)
        for seed in range(options.seed, options.seed + options.count)
    )
    since = time.monotonic()
    while jobs:
        if options.patience is not None and time.monotonic() - since > options.patience:
            jobs[0].cancel()
        try:
            item = worker.outbox.get(TICK)
        except TimeoutError:
            continue  # a program would draw its window here
        if isinstance(item, Preview):
            x0 = to_nhwc(np.from_dlpack(item.x0))
            writers.save_png(options.folder / f"{item.job.seed:05d}-t{item.t:04d}.png", x0[0], zoom=options.zoom)
            continue
        job, seconds, since = jobs.popleft(), time.monotonic() - since, time.monotonic()
        if isinstance(item, Frame):
            with item:
                writers.save_png(options.folder / f"{job.seed:05d}.png", pixels(item, worker.memory), zoom=options.zoom)
            print(f"seed {job.seed}: {seconds:.2f} s")
        elif isinstance(item, Ended) and isinstance(item.error, Cancelled):
            print(f"seed {job.seed}: given up after {seconds:.2f} s")
        elif isinstance(item, Ended):
            raise item.error
    print(f"{worker.outbox.dropped} previews came too late to be shown")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, help="folder for the PNG files")
    parser.add_argument("--count", type=int, default=4, help="how many seeds; 4")
    parser.add_argument("--seed", type=int, default=0, help="the first one; 0")
    parser.add_argument("--steps", type=int, help="of the chain; all by default")
    parser.add_argument("--every", type=int, default=0, help="a preview after every so many steps; none by default")
    parser.add_argument("--patience", type=float, help="seconds for an image; no limit by default")
    parser.add_argument("--zoom", type=int, default=1, help="pixels of a PNG for each of the image; 1")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        with Worker(options.model, memory=memory_for(options.model)) as worker:
            run(worker, options)
    except DdpmxError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
